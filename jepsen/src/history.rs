//! A history: what each process began and how it ended, in the order in which it was recorded.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::time::Instant;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// What a process does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "f")]
pub enum Op {
    /// Replaces a file by a version that no other write has; versions of one writer rise from 1.
    Write {
        /// Which file.
        file: u64,
        /// Its new content.
        version: u64,
    },
    /// Reads a whole file.
    Read {
        /// Which file.
        file: u64,
        /// What was found; 0: no such file. Absent in an invocation.
        version: Option<u64>,
    },
    /// Something is broken or mended; nobody's answer depends on it.
    Fault {
        /// What, for people.
        what: String,
    },
}

/// Where in its life an operation is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It begins.
    Invoke,
    /// It took effect.
    Ok,
    /// It failed; `why` tells how.
    Fail,
    /// Nobody knows, or it is no operation of a client.
    Info,
}

/// One line of a history.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Since the history began, milliseconds.
    pub at_ms: u64,
    /// Who: a process does one thing at a time.
    pub process: String,
    /// Where in its life the operation is.
    pub kind: Kind,
    /// The operation.
    #[serde(flatten)]
    pub op: Op,
    /// Of a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// All events, in the order of their recording.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct History {
    /// In order.
    pub events: Vec<Event>,
}

impl History {
    /// Reads what a [`Recorder`] wrote. A last line that was cut off by a crash is left out.
    ///
    /// Errors: the file can't be read, or a line in its middle is no event.
    pub fn load(path: &Path) -> io::Result<Self> {
        let mut events = Vec::new();
        let mut lines = BufReader::new(File::open(path)?).lines().peekable();
        while let Some(line) = lines.next() {
            match serde_json::from_str(&line?) {
                Ok(event) => events.push(event),
                Err(_) if lines.peek().is_none() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self { events })
    }
}

/// Writes a history down as it happens; shared by all threads.
#[derive(Debug)]
pub struct Recorder {
    began: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    history: History,
}

impl Recorder {
    /// A new history in the file `path`.
    ///
    /// Errors: it can't be created.
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self {
            began: Instant::now(),
            inner: Mutex::new(Inner {
                file: File::create(path)?,
                history: History::default(),
            }),
        })
    }

    /// Adds an event, now.
    ///
    /// Errors: it can't be written down.
    pub fn record(&self, process: &str, kind: Kind, op: Op, why: Option<String>) -> io::Result<()> {
        let mut inner = self.inner.lock();
        let event = Event {
            at_ms: u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            process: process.to_owned(),
            kind,
            op,
            why,
        };
        let mut line = serde_json::to_vec(&event)?;
        line.push(b'\n');
        inner.file.write_all(&line)?;
        inner.history.events.push(event);
        Ok(())
    }

    /// What was recorded so far.
    pub fn history(&self) -> History {
        self.inner.lock().history.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_recorded_is_read_back_and_a_torn_end_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("history.jsonl");
        let recorder = Recorder::create(&path).unwrap();
        let write = Op::Write {
            file: 3,
            version: 1,
        };
        recorder
            .record("writer", Kind::Invoke, write.clone(), None)
            .unwrap();
        recorder
            .record("writer", Kind::Fail, write, Some("no room".to_owned()))
            .unwrap();
        let what = "node 2 is frozen".to_owned();
        recorder
            .record("nemesis", Kind::Info, Op::Fault { what }, None)
            .unwrap();
        let history = recorder.history();
        assert_eq!(history.events.len(), 3);
        assert_eq!(History::load(&path).unwrap(), history);
        let length = std::fs::metadata(&path).unwrap().len();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(length - 5).unwrap();
        let torn = History::load(&path).unwrap();
        assert_eq!(torn.events, history.events[..2]);
    }
}

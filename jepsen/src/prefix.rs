//! Whether readers saw a prefix of a history, which never went back.
//!
//! One process writes: each write replaces one file by its version, one after the other. A reader that has seen version `v` of any
//! file has seen the history up to `v` at least: whatever it reads after that is no older than it was then.

use std::collections::HashMap;

use crate::history::{Event, History, Kind, Op};

/// What can't have been if readers see prefixes.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// The record itself makes no sense.
    #[error("event {event}: {why}")]
    Record {
        /// Its number in the history, from 0.
        event: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A read failed, or found bytes that no write wrote.
    #[error("event {event}: {process} could not read file {file}: {why}")]
    Failed {
        /// Its number in the history, from 0.
        event: usize,
        /// Whose.
        process: String,
        /// Which.
        file: u64,
        /// As recorded.
        why: String,
    },
    /// A version of another file, or of none.
    #[error(
        "event {event}: {process} found version {version} in file {file}, to which it was never written"
    )]
    Foreign {
        /// Its number in the history, from 0.
        event: usize,
        /// Whose.
        process: String,
        /// Which.
        file: u64,
        /// What was found.
        version: u64,
    },
    /// A version whose write had not begun.
    #[error(
        "event {event}: {process} found version {version} in file {file} before it was written"
    )]
    Future {
        /// Its number in the history, from 0.
        event: usize,
        /// Whose.
        process: String,
        /// Which.
        file: u64,
        /// What was found.
        version: u64,
    },
    /// Older than what this reader had seen before.
    #[error(
        "event {event}: {process} found version {version} in file {file} after it had seen the history up to {seen}, where the \
         file is at version {least}"
    )]
    Back {
        /// Its number in the history, from 0.
        event: usize,
        /// Whose.
        process: String,
        /// Which.
        file: u64,
        /// What was found.
        version: u64,
        /// The newest version that this reader had seen of any file.
        seen: u64,
        /// What the file held at that moment of the history.
        least: u64,
    },
}

/// What a history without a violation shows.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    /// The last version that was written for certain.
    pub written: u64,
    /// For each reader: how often it read, and up to which version it saw the history.
    pub readers: HashMap<String, (u64, u64)>,
    /// Faults that were recorded.
    pub faults: u64,
}

/// Checks a history of one writer and any number of readers.
///
/// Errors: the first violation, in order of the history.
pub fn check(history: &History) -> Result<Summary, Violation> {
    // All writes, whenever they began: what a read may have found at all.
    let mut file_of: HashMap<u64, u64> = HashMap::new();
    for event in &history.events {
        if let (Kind::Invoke, Op::Write { file, version }) = (event.kind, &event.op) {
            file_of.insert(*version, *file);
        }
    }
    let mut summary = Summary::default();
    let mut begun = 0;
    // Versions of each file whose write has begun, rising.
    let mut versions: HashMap<u64, Vec<u64>> = HashMap::new();
    for (number, event) in history.events.iter().enumerate() {
        match (&event.op, event.kind) {
            (Op::Write { file, version }, Kind::Invoke) => {
                if *version <= begun {
                    return Err(Violation::Record {
                        event: number,
                        why: "versions must rise",
                    });
                }
                begun = *version;
                versions.entry(*file).or_default().push(*version);
            }
            (Op::Write { version, .. }, Kind::Ok) => {
                summary.written = summary.written.max(*version);
            }
            (Op::Read { file, .. }, Kind::Fail) => {
                return Err(Violation::Failed {
                    event: number,
                    process: event.process.clone(),
                    file: *file,
                    why: event.why.clone().unwrap_or_default(),
                });
            }
            (
                Op::Read {
                    file,
                    version: Some(version),
                },
                Kind::Ok,
            ) => read(
                number,
                event,
                (*file, *version),
                &file_of,
                &versions,
                &mut summary,
            )?,
            (Op::Read { version: None, .. }, Kind::Ok) => {
                return Err(Violation::Record {
                    event: number,
                    why: "a read that found what?",
                });
            }
            (Op::Fault { .. }, _) => summary.faults += 1,
            (Op::Read { .. } | Op::Write { .. }, _) => {}
        }
    }
    Ok(summary)
}

fn read(
    number: usize,
    event: &Event,
    (file, version): (u64, u64),
    file_of: &HashMap<u64, u64>,
    versions: &HashMap<u64, Vec<u64>>,
    summary: &mut Summary,
) -> Result<(), Violation> {
    let process = || event.process.clone();
    if version != 0 && file_of.get(&version) != Some(&file) {
        return Err(Violation::Foreign {
            event: number,
            process: process(),
            file,
            version,
        });
    }
    let written = versions.get(&file).map_or(&[][..], Vec::as_slice);
    if version != 0 && written.binary_search(&version).is_err() {
        return Err(Violation::Future {
            event: number,
            process: process(),
            file,
            version,
        });
    }
    let (reads, seen) = summary.readers.entry(process()).or_default();
    *reads += 1;
    let before = written.partition_point(|version| *version <= *seen);
    let least = before.checked_sub(1).map_or(0, |last| written[last]);
    if version < least {
        return Err(Violation::Back {
            event: number,
            process: process(),
            file,
            version,
            seen: *seen,
            least,
        });
    }
    *seen = version.max(*seen);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(process: &str, kind: Kind, op: Op) -> Event {
        Event {
            at_ms: 0,
            process: process.to_owned(),
            kind,
            op,
            why: None,
        }
    }

    fn write(file: u64, version: u64) -> [Event; 2] {
        [Kind::Invoke, Kind::Ok].map(|kind| event("writer", kind, Op::Write { file, version }))
    }

    fn read_of(process: &str, file: u64, version: u64) -> Event {
        let op = Op::Read {
            file,
            version: Some(version),
        };
        event(process, Kind::Ok, op)
    }

    fn history(events: impl IntoIterator<Item = Event>) -> History {
        History {
            events: events.into_iter().collect(),
        }
    }

    #[test]
    fn going_back_is_seen_across_files_and_only_within_one_reader() {
        let written: Vec<Event> = [write(1, 1), write(2, 2), write(1, 3)].concat();
        let with = |more: &[Event]| history(written.iter().chain(more).cloned());
        // Each reader has a view of its own.
        let fine = [
            read_of("a", 2, 2),
            read_of("a", 1, 1),
            read_of("b", 1, 0),
            read_of("a", 1, 3),
            read_of("b", 2, 2),
        ];
        let summary = check(&with(&fine)).unwrap();
        assert_eq!(summary.written, 3);
        assert_eq!(summary.readers["a"], (3, 3));
        // Who saw 3 has seen 2, which is in another file.
        let back = check(&with(&[read_of("a", 1, 3), read_of("a", 2, 0)]));
        let expected = Violation::Back {
            event: 7,
            process: "a".to_owned(),
            file: 2,
            version: 0,
            seen: 3,
            least: 2,
        };
        assert_eq!(back, Err(expected));
    }

    #[test]
    fn foreign_future_and_failed_reads_are_seen() {
        let foreign = history([write(1, 1).to_vec(), vec![read_of("a", 2, 1)]].concat());
        assert!(matches!(check(&foreign), Err(Violation::Foreign { .. })));
        let future = history([vec![read_of("a", 1, 1)], write(1, 1).to_vec()].concat());
        assert!(matches!(check(&future), Err(Violation::Future { .. })));
        let unwritten = history([read_of("a", 1, 9)]);
        assert!(matches!(check(&unwritten), Err(Violation::Foreign { .. })));
        let op = Op::Read {
            file: 1,
            version: None,
        };
        let failed = history([event("a", Kind::Fail, op)]);
        assert!(matches!(check(&failed), Err(Violation::Failed { .. })));
        // A write that has begun may be seen before it is acknowledged.
        let [begun, ended] = write(1, 1);
        assert!(check(&history([begun, read_of("a", 1, 1), ended])).is_ok());
    }

    /// A writer's history, and readers that each look at a prefix that only grows.
    fn consistent() -> impl Strategy<Value = Vec<Event>> {
        let steps = prop::collection::vec((0u64..6, 0u8..4, 0usize..20), 1..200);
        steps.prop_map(|steps| {
            let (mut events, mut files, mut behind) = (Vec::new(), Vec::new(), [0usize; 2]);
            for (file, what, ahead) in steps {
                match what {
                    0 | 1 => {
                        files.push(file);
                        events.extend(write(file, files.len() as u64));
                    }
                    reader => {
                        let reader = usize::from(reader) - 2;
                        behind[reader] = (behind[reader] + ahead).min(files.len());
                        let shown = &files[..behind[reader]];
                        let version = shown.iter().rposition(|of| *of == file);
                        let version = version.map_or(0, |at| at as u64 + 1);
                        events.push(read_of(["a", "b"][reader], file, version));
                    }
                }
            }
            events
        })
    }

    proptest! {
        #[test]
        fn readers_of_growing_prefixes_pass(events in consistent()) {
            prop_assert!(check(&history(events)).is_ok());
        }

        #[test]
        fn a_reader_that_goes_back_is_caught(events in consistent(), file in 0u64..6) {
            // Reader a has seen all of it, and then an older version of one file.
            let written: Vec<(u64, u64)> = events
                .iter()
                .filter_map(|event| match (&event.op, event.kind) {
                    (Op::Write { file, version }, Kind::Ok) => Some((*file, *version)),
                    _ => None,
                })
                .collect();
            let Some((last_file, last)) = written.last().copied() else { return Ok(()) };
            let of_file: Vec<u64> = written.iter().filter(|(of, _)| *of == file).map(|(_, version)| *version).collect();
            let Some((_, older)) = of_file.split_last() else { return Ok(()) };
            let stale = older.last().copied().unwrap_or(0);
            let mut events = events;
            events.push(read_of("a", last_file, last));
            events.push(read_of("a", file, stale));
            let caught = matches!(check(&history(events)), Err(Violation::Back { .. }));
            prop_assert!(caught);
        }
    }
}

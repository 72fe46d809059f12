//! [`Checkpoint`]: the file that says how far a run came.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::plan::Rules;
use crate::failure::{Failure, Outcome, While};

/// What the file holds, as JSON. All but `done` says whose it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) format: u32,
    pub(crate) source: String,
    pub(crate) destination: String,
    pub(crate) rules: Rules,
    /// (include, pattern)
    pub(crate) filters: Vec<(bool, String)>,
    pub(crate) start: Option<String>,
    pub(crate) end: Option<String>,
    /// Everything up to this key is done; `None`: nothing yet.
    pub(crate) done: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    path: PathBuf,
    state: State,
}

impl Checkpoint {
    /// Takes over what an interrupted run left at `path`, if anything; `state` is what this run is.
    ///
    /// Errors: the file is another run's, or cannot be read.
    pub(crate) fn open(path: &Path, state: State) -> Outcome<Self> {
        let path = path.to_owned();
        let shown = path.display();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let checkpoint = Self { path, state };
                // Better now than after an hour.
                checkpoint.write()?;
                return Ok(checkpoint);
            }
            Err(error) => return Err(error).while_(format_args!("read the checkpoint {shown}")),
        };
        let found: State = serde_json::from_slice(&text)
            .while_(format_args!("use {shown} as a checkpoint"))
            .map_err(|failure| failure.hint("it is no file of `heliofs sync`; name another"))?;
        let same = State {
            done: state.done.clone(),
            ..found.clone()
        } == state;
        if !same {
            return Err(Failure::usage(format!(
                "{shown} is the checkpoint of another run: from {} to {}, or with other flags",
                found.source, found.destination
            ))
            .hint("give what was given then, or remove the file to begin anew"));
        }
        Ok(Self { path, state: found })
    }

    /// Everything up to this key is done.
    pub(crate) fn done(&self) -> Option<&str> {
        self.state.done.as_deref()
    }

    /// Everything up to `done` is done.
    ///
    /// Errors: the file cannot be written.
    pub(crate) fn save(&mut self, done: Option<&str>) -> Outcome {
        if self.state.done.as_deref() == done {
            return Ok(());
        }
        self.state.done = done.map(str::to_owned);
        self.write()
    }

    fn write(&self) -> Outcome {
        let shown = self.path.display();
        let mut temporary = self.path.clone().into_os_string();
        temporary.push(".new");
        let temporary = PathBuf::from(temporary);
        let text = serde_json::to_vec(&self.state).while_("encode the checkpoint")?;
        let written = File::create(&temporary)
            .and_then(|mut file| {
                file.write_all(&text)?;
                file.sync_all()
            })
            .and_then(|()| fs::rename(&temporary, &self.path));
        written.while_(format_args!("write the checkpoint {shown}"))
    }

    /// Nothing is left to do.
    pub(crate) fn remove(self) -> Outcome {
        fs::remove_file(&self.path).while_(format_args!(
            "remove the checkpoint {}",
            self.path.display()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_goes_on_and_another_does_not() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("checkpoint");
        let state = State {
            format: 1,
            source: "/a".to_owned(),
            destination: "s3://b".to_owned(),
            rules: Rules::default(),
            filters: vec![(false, "*.tmp".to_owned())],
            start: None,
            end: None,
            done: None,
        };
        let mut first = Checkpoint::open(&path, state.clone()).unwrap();
        assert_eq!(first.done(), None);
        first.save(Some("k")).unwrap();
        drop(first);
        let again = Checkpoint::open(&path, state.clone()).unwrap();
        assert_eq!(again.done(), Some("k"));
        let other = State {
            destination: "s3://c".to_owned(),
            ..state.clone()
        };
        assert!(Checkpoint::open(&path, other).is_err());
        again.remove().unwrap();
        assert_eq!(Checkpoint::open(&path, state.clone()).unwrap().done(), None);
        fs::write(&path, "{").unwrap();
        assert!(Checkpoint::open(&path, state).is_err());
    }
}

//! Which `state-<n>` directory is live: the file `CURRENT_STATE` says, and changes in one durable step.

use std::fs;
use std::path::{Path, PathBuf};

use super::OpenError;
use super::identity::{sync_directory, write_durably};

const POINTER: &str = "CURRENT_STATE";
const PREFIX: &str = "state-";
const SNAPSHOT: &str = "snapshot-";

/// Names the directories of states and snapshots below a node's data directory.
#[derive(Clone, Debug)]
pub struct StateDirectory {
    data_dir: PathBuf,
}

impl StateDirectory {
    /// Below `data_dir`, which exists.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
        }
    }

    /// The number of the live state, if there is one.
    pub fn current(&self) -> Result<Option<u64>, OpenError> {
        let text = match fs::read_to_string(self.data_dir.join(POINTER)) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(OpenError::io("read CURRENT_STATE")(error)),
        };
        let number = text
            .trim()
            .strip_prefix(PREFIX)
            .and_then(|n| n.parse().ok());
        number
            .map(Some)
            .ok_or_else(|| OpenError::State(format!("CURRENT_STATE says `{text}`")))
    }

    /// Where state `number` is.
    pub fn path(&self, number: u64) -> PathBuf {
        self.data_dir.join(format!("{PREFIX}{number}"))
    }

    /// The number of the state at `path`; `None`: it is not one of this directory's states.
    pub fn number(&self, path: &Path) -> Option<u64> {
        let name = path.file_name()?.to_str()?;
        let number = name.strip_prefix(PREFIX)?.parse().ok()?;
        (self.path(number) == path).then_some(number)
    }

    /// Where a snapshot is built.
    pub fn snapshot_path(&self, name: &str) -> PathBuf {
        self.data_dir.join(format!("{SNAPSHOT}{name}"))
    }

    /// Makes `number` the live state. Its files must be durable already.
    pub fn switch(&self, number: u64) -> std::io::Result<()> {
        write_durably(
            &self.data_dir,
            POINTER,
            format!("{PREFIX}{number}\n").as_bytes(),
        )
    }

    /// A number that no directory uses.
    pub fn next_number(&self) -> std::io::Result<u64> {
        let mut next = 1;
        for entry in fs::read_dir(&self.data_dir)? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
            if let Some(number) = number.and_then(|number| number.parse::<u64>().ok()) {
                next = next.max(number + 1);
            }
        }
        Ok(next)
    }

    /// Removes every state but the live one, and every snapshot: what a crash left half received or half built.
    pub fn clean(&self, live: Option<u64>) -> std::io::Result<()> {
        let live = live.map(|number| format!("{PREFIX}{number}"));
        for entry in fs::read_dir(&self.data_dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else {
                continue;
            };
            let ours = name.starts_with(PREFIX) || name.starts_with(SNAPSHOT);
            if ours && Some(name) != live.as_deref() && entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            }
        }
        sync_directory(&self.data_dir)
    }
}

/// Makes a directory's files and the directory itself durable.
pub(crate) fn sync_tree(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else {
            fs::File::open(entry.path())?.sync_all()?;
        }
    }
    sync_directory(path)
}

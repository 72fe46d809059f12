//! Which node a data directory belongs to: stored in the log, beside the votes that it gives the right to, and in a file
//! that tells that a log must exist.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use heliofs_proto::ids::NodeId;
use serde::{Deserialize, Serialize};

use super::OpenError;

/// The latest format of `log/` and `state-<n>/`.
pub const FORMAT: u32 = 1;

const FILE: &str = "IDENTITY";

/// Binds a node id to one disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// The node.
    pub node: u64,
    /// Random, made with the directory.
    pub store: [u8; 16],
    /// Of the directory's contents.
    pub format: u32,
}

impl Identity {
    /// A new disk's.
    pub fn fresh(node: NodeId) -> Self {
        Self {
            node: node.0,
            store: rand::random(),
            format: FORMAT,
        }
    }

    /// Refuses another node's directory and a newer build's.
    pub fn check(&self, node: NodeId) -> Result<(), OpenError> {
        if self.format > FORMAT {
            return Err(OpenError::Format {
                found: self.format,
                known: FORMAT,
            });
        }
        if self.node != node.0 {
            return Err(OpenError::WrongNode {
                found: self.node,
                expected: node.0,
            });
        }
        Ok(())
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("numbers and arrays of numbers have a JSON form")
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, OpenError> {
        serde_json::from_slice(bytes)
            .map_err(|error| OpenError::Damaged(format!("the identity can't be read: {error}")))
    }

    /// The identity that the directory's file tells, if it has one.
    pub fn read(data_dir: &Path) -> Result<Option<Self>, OpenError> {
        match fs::read(data_dir.join(FILE)) {
            Ok(bytes) => Self::decode(&bytes).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(OpenError::io("read IDENTITY")(error)),
        }
    }

    /// Writes the directory's file, durably.
    pub fn write(&self, data_dir: &Path) -> Result<(), OpenError> {
        write_durably(data_dir, FILE, &self.encode()).map_err(OpenError::io("write IDENTITY"))
    }
}

/// Replaces `dir/name` in one step that survives a power loss.
pub(crate) fn write_durably(dir: &Path, name: &str, content: &[u8]) -> std::io::Result<()> {
    let temporary = dir.join(format!("{name}.new"));
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(name))?;
    sync_directory(dir)
}

/// Makes creations, renames and removals in `dir` durable.
pub(crate) fn sync_directory(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

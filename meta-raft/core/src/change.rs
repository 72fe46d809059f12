//! What applying a command yields besides its reply: changed records, things to invalidate, and the reason to stop.

use bytes::Bytes;
use heliofs_proto::ids::Ino;

/// One record that a command added, replaced or removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The record's key.
    pub key: Bytes,
    /// The value before; `None`: there was no record.
    pub old: Option<Bytes>,
    /// The value after; `None`: the record is removed.
    pub new: Option<Bytes>,
}

/// Something that clients may have cached and that a command changed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Touched {
    /// An inode.
    Inode {
        /// Which.
        ino: Ino,
        /// Its attributes changed.
        attr: bool,
        /// Its content changed (extents, inline data, size).
        content: bool,
        /// Its extended attributes or ACLs changed.
        xattr: bool,
    },
    /// A directory entry appeared, vanished or points elsewhere.
    Entry {
        /// The directory.
        parent: Ino,
        /// The entry's name.
        name: Bytes,
    },
}

/// The records contradict each other or can't be read: the node must stop, since going on would spread the damage.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Corruption {
    /// A record's bytes can't be decoded.
    #[error("record {key:02x?} can't be decoded: {why}")]
    Record {
        /// The record's key.
        key: Vec<u8>,
        /// What was wrong with it.
        why: &'static str,
    },
    /// Two records contradict each other.
    #[error("records contradict each other: {0}")]
    Contradiction(String),
    /// The volume's core level is above this build's: not damage, but this build must not guess.
    #[error(
        "volume {volume} is at core level {level}, this build knows {known}: upgrade this node"
    )]
    UpgradeRequired {
        /// The volume.
        volume: u32,
        /// Its core level.
        level: u32,
        /// The highest level of this build.
        known: u32,
    },
    /// The store under the view failed.
    #[error("store: {0}")]
    Store(String),
}

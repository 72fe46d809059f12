//! What a node keeps on disk: two RocksDB instances, so that the log's syncs and the state's flushes don't meet.
//!
//! - [`identity`]: which node this disk belongs to
//! - [`log`]: `log/`: entries and vote, synced; `writer`: the thread that syncs
//! - [`state`]: `state-<n>/`: what the log has led to; no WAL, rebuilt from the log after a crash
//! - [`view`]: reads of the replicated records; `emptied`: what its scans need not walk over
//! - [`local`]: records of the cluster that no volume's history holds
//! - [`group`]: one applied group, written as one batch
//! - `copies`: what this region's bucket lacks
//! - `pins`: records held as they were at one position
//! - `scrub`: sums of the records, recomputed
//! - `mirrors`: what the state knows of mirrors of its volumes, and of those that are mirrors
//! - [`digests`]: sums per volume, kept as changes are applied
//! - [`directory`]: which `state-<n>` is live, and how another takes its place

mod copies;
pub mod digests;
pub mod directory;
mod emptied;
pub mod group;
mod halves;
pub mod identity;
pub mod local;
pub mod log;
mod mirrors;
mod pins;
mod scrub;
pub mod state;
pub mod view;
mod writer;

pub use log::LogStore;
pub use pins::Pin;
pub use scrub::Scrubbed;
pub use state::State;

/// Why a store can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The log lost or changed entries that this node may have promised to keep. It must not vote or lead again.
    #[error(
        "the log of this node is damaged: {0}; the node can't be trusted any more: remove it from the cluster \
         (heliofs raft remove) and add it again under a new id with an empty data directory"
    )]
    Damaged(String),
    /// The directory belongs to another node.
    #[error("the data directory belongs to node {found}, not to node {expected}")]
    WrongNode {
        /// The id in the directory.
        found: u64,
        /// The id that was asked for.
        expected: u64,
    },
    /// Written by a newer build.
    #[error(
        "the data directory has format {found}, this build knows up to {known}: upgrade this node"
    )]
    Format {
        /// The directory's format.
        found: u32,
        /// The latest that this build reads.
        known: u32,
    },
    /// Applied by a newer build.
    #[error("the state is of level {level}, this build knows {known}: upgrade this node")]
    Upgrade {
        /// What the state needs.
        level: u32,
        /// What this build knows.
        known: u32,
    },
    /// The state can't be read, though the log is sound.
    #[error("the state can't be opened: {0}")]
    State(String),
    /// The disk said no.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl OpenError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// RocksDB's error as openraft wants it.
pub(crate) fn io_error(error: rocksdb::Error) -> std::io::Error {
    std::io::Error::other(error)
}

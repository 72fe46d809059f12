//! What can go wrong between a segment and its bucket, and what the caller should do about it.

use std::time::Duration;

use heliofs_proto::ids::{SegmentId, VolumeId};

/// What the caller should do about a [`StoreError`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Kind {
    /// This attempt failed; another may succeed. Never leaves [`crate::SegmentStore`], which retries within its deadline.
    Retry,
    /// The object does not exist: refresh extents once, then EIO.
    NotFound,
    /// Something else lies under this name already.
    AlreadyExists,
    /// The store refuses these credentials or this operation: a person must look.
    Denied,
    /// The bytes are not what was written: EIO.
    Corrupt,
    /// The store did not answer, or only with errors, until the deadline: EIO now; may work later. A put may or may not have
    /// taken effect.
    Unavailable,
    /// The settings or the arguments are wrong.
    Invalid,
}

/// A failure of the block store. Cheap to clone, since several readers may share one fetch.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// See [`Kind::Retry`].
    #[error("{operation} `{key}` failed, may be tried again: {detail}")]
    Retry {
        /// `put`, `get`, …
        operation: &'static str,
        /// Object key.
        key: String,
        /// What the store said.
        detail: String,
    },
    /// See [`Kind::NotFound`].
    #[error("object `{key}` does not exist")]
    NotFound {
        /// Object key.
        key: String,
    },
    /// See [`Kind::AlreadyExists`].
    #[error("object `{key}` exists already: {detail}")]
    AlreadyExists {
        /// Object key.
        key: String,
        /// What is there.
        detail: String,
    },
    /// See [`Kind::Denied`].
    #[error("{operation} `{key}` was refused: {detail}")]
    Denied {
        /// `put`, `get`, …
        operation: &'static str,
        /// Object key.
        key: String,
        /// What the store said, and what to do.
        detail: String,
    },
    /// See [`Kind::Corrupt`].
    #[error("volume {volume} segment {segment:?} frame {frame} page {page} is corrupt: {detail}")]
    Corrupt {
        /// The volume of the segment.
        volume: VolumeId,
        /// The object.
        segment: SegmentId,
        /// The frame's number; 0 when header or footer is meant.
        frame: u32,
        /// Page within the frame.
        page: u32,
        /// What is wrong with it.
        detail: String,
    },
    /// See [`Kind::Unavailable`].
    #[error(
        "{operation} `{key}` did not succeed within {waited:?} ({attempts} attempts): {detail}"
    )]
    Unavailable {
        /// `put`, `get`, …
        operation: &'static str,
        /// Object key.
        key: String,
        /// How long we tried.
        waited: Duration,
        /// How often we tried.
        attempts: u32,
        /// The last failure.
        detail: String,
    },
    /// See [`Kind::Invalid`].
    #[error("{0}")]
    Invalid(String),
}

impl StoreError {
    /// What the caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Retry { .. } => Kind::Retry,
            Self::NotFound { .. } => Kind::NotFound,
            Self::AlreadyExists { .. } => Kind::AlreadyExists,
            Self::Denied { .. } => Kind::Denied,
            Self::Corrupt { .. } => Kind::Corrupt,
            Self::Unavailable { .. } => Kind::Unavailable,
            Self::Invalid(_) => Kind::Invalid,
        }
    }
}

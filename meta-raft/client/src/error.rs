//! What went wrong, sorted by what the caller should do about it.

use std::time::Duration;

use heliofs_proto::v1::FsError;

const EIO: i32 = 5;

/// What to do about an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum ErrorKind {
    /// The file system's answer: hand its errno on.
    Verdict,
    /// Nobody could serve it in time and it certainly had no effect: may be tried again.
    Unavailable,
    /// A change that may or may not have taken effect, now or later.
    Unknown,
    /// The session is over: attach a new one.
    SessionGone,
    /// The token, or the right to do this, is missing.
    Refused,
    /// It names something that doesn't exist.
    NotFound,
    /// The request makes no sense, or the two ends don't understand each other.
    Invalid,
}

/// Why an operation of a [`crate::Session`] has no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The file system's own answer.
    #[error("{}", .0.as_str_name())]
    Verdict(FsError),
    /// No leader served it within the deadline; it certainly had no effect.
    #[error("no metadata leader within {waited:?}: {detail}")]
    Unavailable {
        /// How long it waited.
        waited: Duration,
        /// What the last attempt to reach a leader said.
        detail: String,
    },
    /// A mutation without an answer within the deadline; it may have taken effect or still do so.
    #[error("no answer within {waited:?}, the outcome is unknown: {detail}")]
    Unknown {
        /// How long it waited.
        waited: Duration,
        /// What the last attempt to reach a leader said.
        detail: String,
    },
    /// The session ended (expired, fenced or detached).
    #[error("the session is over: {0}")]
    SessionGone(String),
    /// The answer doesn't fit the question: a defect of one of the two ends.
    #[error("unexpected answer: {0}")]
    Invalid(String),
}

impl ClientError {
    /// What to do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Verdict(_) => ErrorKind::Verdict,
            Self::Unavailable { .. } => ErrorKind::Unavailable,
            Self::Unknown { .. } => ErrorKind::Unknown,
            Self::SessionGone(_) => ErrorKind::SessionGone,
            Self::Invalid(_) => ErrorKind::Invalid,
        }
    }

    /// The errno that a system call returns for it; the one mapping for every user of sessions. Source: errno(3).
    pub fn errno(&self) -> i32 {
        match self {
            // A verdict without errno is `None`, which is never wrapped in an error; EIO is the honest answer to a defect.
            Self::Verdict(verdict) => verdict.errno().unwrap_or(EIO),
            Self::Unavailable { .. }
            | Self::Unknown { .. }
            | Self::SessionGone(_)
            | Self::Invalid(_) => EIO,
        }
    }

    /// The verdict, when it is one.
    pub fn verdict(&self) -> Option<FsError> {
        match self {
            Self::Verdict(verdict) => Some(*verdict),
            Self::Unavailable { .. }
            | Self::Unknown { .. }
            | Self::SessionGone(_)
            | Self::Invalid(_) => None,
        }
    }
}

/// Why a call that needs no session has no result. Messages are for people and say what to do next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// Nothing answered at any peer.
    #[error(
        "no metadata node answered at {peers}: start one with `heliofs meta`, or check the address ({detail})"
    )]
    NoNode {
        /// Peers tried, separated by commas.
        peers: String,
        /// The last failure.
        detail: String,
    },
    /// Nodes answered, but none of them could serve the call before the deadline.
    #[error(
        "no metadata leader at {peers} within {waited:?}: are a majority of the nodes running? see `heliofs raft status` ({detail})"
    )]
    NoLeader {
        /// Peers tried, separated by commas.
        peers: String,
        /// How long it waited.
        waited: Duration,
        /// The last failure.
        detail: String,
    },
    /// A change without an answer; it may have taken effect.
    #[error(
        "{peer} did not answer {call} in time; it may have taken effect: check with `heliofs status` ({detail})"
    )]
    Unknown {
        /// The node that was asked.
        peer: String,
        /// The call.
        call: &'static str,
        /// The failure.
        detail: String,
    },
    /// The node doesn't accept our token.
    #[error(
        "{peer} refused the cluster token: pass the token the node was started with (--token-file or HELIOFS_TOKEN)"
    )]
    TokenRefused {
        /// The node that refused.
        peer: String,
    },
    /// It names something that doesn't exist.
    #[error("{0}")]
    NotFound(String),
    /// The node refused: already exists, bad argument, wrong version.
    #[error("{0}")]
    Invalid(String),
    /// The changelog no longer reaches back to the position asked for.
    #[error("the changelog no longer reaches back that far: {0}")]
    Trimmed(String),
    /// The position that was named is not one of the volume's history.
    #[error("{0}")]
    OtherHistory(String),
}

impl ClusterError {
    /// What to do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoNode { .. } | Self::NoLeader { .. } => ErrorKind::Unavailable,
            Self::Unknown { .. } => ErrorKind::Unknown,
            Self::TokenRefused { .. } => ErrorKind::Refused,
            Self::NotFound(_) => ErrorKind::NotFound,
            Self::Invalid(_) | Self::Trimmed(_) | Self::OtherHistory(_) => ErrorKind::Invalid,
        }
    }
}

/// Why a session could not begin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// The cluster could not be reached, or refused.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The cluster has no such volume.
    #[error("no volume `{volume}` in this cluster: create it with `heliofs format` ({detail})")]
    NoVolume {
        /// The name asked for.
        volume: String,
        /// What the node said.
        detail: String,
    },
}

impl AttachError {
    /// What to do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Cluster(error) => error.kind(),
            Self::NoVolume { .. } => ErrorKind::NotFound,
        }
    }
}

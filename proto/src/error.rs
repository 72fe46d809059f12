//! Verdicts of the file system and the one table that turns them into errno.

pub use crate::v1::FsError;

impl FsError {
    /// The errno that a system call returns for this verdict, as Linux numbers them on every architecture that we run on.
    ///
    /// `None` has no errno: it is not an error. Source: errno(3), asm-generic/errno.h.
    pub fn errno(self) -> Option<i32> {
        Some(match self {
            Self::None => return None,
            Self::NotFound => 2,
            Self::Exists => 17,
            Self::NotEmpty => 39,
            Self::IsDirectory => 21,
            Self::NotDirectory => 20,
            Self::Invalid => 22,
            Self::NameTooLong => 36,
            Self::TooManyLinks => 31,
            Self::NoSpace => 28,
            Self::QuotaExceeded => 122,
            Self::NoAttribute => 61,
            Self::Range => 34,
            Self::NotPermitted => 1,
            Self::Access => 13,
            Self::Stale => 116,
            Self::ReadOnly => 30,
            Self::Loop => 40,
            Self::FileTooLarge => 27,
            Self::Busy => 16,
            Self::Deadlock => 35,
            Self::WouldBlock => 11,
            Self::NotSupported => 95,
            Self::SessionGone => 5,
            Self::SegmentFenced => 5,
            Self::AlreadyAcknowledged => 5,
            Self::UpgradeRequired => 5,
            Self::TooBig => 7,
            Self::Interrupted => 4,
            Self::CrossDevice => 18,
            Self::Changed => 116,
        })
    }
}

//! The one table from every error a mount meets to the errno that the system call returns.

use blockstore::{Kind, StoreError};
use heliofs_proto::v1::FsError;
use meta_client::ClientError;

/// What a file system operation returns.
pub type FsResult<T> = Result<T, Errno>;

/// A Linux error number; never 0. Source: errno(3).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Errno(i32);

impl Errno {
    /// Operation not permitted.
    pub const PERM: Self = Self(libc::EPERM);
    /// No such file or directory.
    pub const NOENT: Self = Self(libc::ENOENT);
    /// Interrupted; the kernel restarts the system call or returns EINTR, as the signal's handler says.
    pub const INTR: Self = Self(libc::EINTR);
    /// Input or output error.
    pub const IO: Self = Self(libc::EIO);
    /// No such offset (lseek beyond the last data).
    pub const NXIO: Self = Self(libc::ENXIO);
    /// Bad handle.
    pub const BADF: Self = Self(libc::EBADF);
    /// Permission denied.
    pub const ACCESS: Self = Self(libc::EACCES);
    /// Exists already.
    pub const EXIST: Self = Self(libc::EEXIST);
    /// Invalid argument.
    pub const INVAL: Self = Self(libc::EINVAL);
    /// No such operation on this kind of file.
    pub const NOTTY: Self = Self(libc::ENOTTY);
    /// File too large.
    pub const FBIG: Self = Self(libc::EFBIG);
    /// Read-only file system.
    pub const ROFS: Self = Self(libc::EROFS);
    /// Result doesn't fit the caller's buffer.
    pub const RANGE: Self = Self(libc::ERANGE);
    /// The operation doesn't exist here; the kernel stops asking for it.
    pub const NOSYS: Self = Self(libc::ENOSYS);
    /// No such attribute.
    pub const NODATA: Self = Self(libc::ENODATA);
    /// Not supported.
    pub const NOTSUP: Self = Self(libc::EOPNOTSUPP);
    /// The inode or the session is gone; from open and create it makes the kernel look the path up again, once.
    pub const STALE: Self = Self(libc::ESTALE);
    /// Name too long.
    pub const NAMETOOLONG: Self = Self(libc::ENAMETOOLONG);
    /// The mount is being taken down.
    pub const SHUTDOWN: Self = Self(libc::ESHUTDOWN);

    /// The number, positive.
    pub fn number(self) -> i32 {
        self.0
    }
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl From<FsError> for Errno {
    fn from(verdict: FsError) -> Self {
        // `None` as an error is a defect of whoever made it; EIO is the honest answer.
        Self(verdict.errno().unwrap_or(libc::EIO))
    }
}

impl From<ClientError> for Errno {
    fn from(error: ClientError) -> Self {
        Self(error.errno())
    }
}

impl From<StoreError> for Errno {
    fn from(error: StoreError) -> Self {
        match error.kind() {
            // Nothing that the caller could do differs between these: the bytes can't be had or can't be stored now.
            Kind::Retry
            | Kind::NotFound
            | Kind::AlreadyExists
            | Kind::Denied
            | Kind::Corrupt
            | Kind::Unavailable => Self::IO,
            // A defect of this crate: it asked for something that makes no sense.
            Kind::Invalid => Self::IO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verdict_keeps_its_number_and_failures_are_eio() {
        assert_eq!(Errno::from(FsError::NotEmpty).number(), libc::ENOTEMPTY);
        assert_eq!(Errno::from(FsError::QuotaExceeded).number(), libc::EDQUOT);
        assert_eq!(Errno::from(FsError::NotSupported), Errno::NOTSUP);
        let gone = ClientError::SessionGone("expired".into());
        assert_eq!(Errno::from(gone), Errno::IO);
        let missing = StoreError::NotFound { key: "k".into() };
        assert_eq!(Errno::from(missing), Errno::IO);
    }
}

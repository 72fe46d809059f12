//! fcntl and flock locks, across mounts.

use std::time::Duration;

use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1;
use meta_client::ClientError;

use super::{Caller, Fs};
use crate::errno::{Errno, FsResult};

/// How often a blocked caller is looked at. fuser 0.18 answers the kernel's interrupt requests with ENOSYS, after which the
/// kernel sends no more of them, so that a signal can only be noticed by looking.
const SIGNAL_POLL: Duration = Duration::from_millis(50);

/// A lock to place, remove or test.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LockRange {
    /// The kernel's lock owner.
    pub owner: u64,
    /// Unlock, read or write.
    pub kind: v1::LockKind,
    /// First byte.
    pub start: u64,
    /// Last byte; `i64::MAX` (what the kernel sends) or more: to the end of the file.
    pub end: u64,
    /// flock: the whole file, and apart from fcntl locks.
    pub flock: bool,
    /// Whose lock it is, as F_GETLK shows it.
    pub pid: u32,
}

impl LockRange {
    fn to_wire(self, ino: u64, wait: bool) -> v1::Lock {
        let end = if self.end >= i64::MAX as u64 {
            u64::MAX
        } else {
            self.end
        };
        v1::Lock {
            ino,
            owner: self.owner,
            kind: self.kind as i32,
            start: self.start,
            end,
            flock: self.flock,
            wait,
            pid: self.pid,
        }
    }
}

impl Fs {
    /// Places or removes a lock. `wait`: until it is granted or the caller has a signal to handle (`INTR`).
    pub async fn lock(
        &self,
        ino: u64,
        lock: LockRange,
        wait: bool,
        caller: Caller,
    ) -> FsResult<()> {
        self.settled(&[ino]).await?;
        let session = self.session();
        let wait = wait && lock.kind != v1::LockKind::Unlock;
        let granted = session.lock(lock.to_wire(ino, wait));
        if !wait {
            let answer = granted.await;
            if lock.kind != v1::LockKind::Unlock && answer.is_ok() {
                self.coherence.kernel_knows(ino).await;
            }
            return match answer {
                // Nothing was held: the session is new, or the lock never was.
                Err(ClientError::Verdict(FsError::NotFound | FsError::Stale))
                    if lock.kind == v1::LockKind::Unlock =>
                {
                    Ok(())
                }
                answer => Ok(answer?),
            };
        }
        tokio::pin!(granted);
        loop {
            tokio::select! {
                answer = &mut granted => {
                    // What the last holder wrote was announced before the grant.
                    self.coherence.kernel_knows(ino).await;
                    return Ok(answer?);
                }
                // Dropping the future takes the request back.
                () = tokio::time::sleep(SIGNAL_POLL) => {
                    if has_signal(caller.pid) {
                        return Err(Errno::INTR);
                    }
                }
            }
        }
    }

    /// The first lock in the way of `lock`.
    pub async fn test_lock(&self, ino: u64, lock: LockRange) -> FsResult<Option<v1::Lock>> {
        self.settled(&[ino]).await?;
        Ok(self.session().test_lock(lock.to_wire(ino, false)).await?)
    }

    /// Drops all locks of an owner: fcntl locks at each close of a descriptor, flock locks at the last.
    pub async fn release_locks(&self, ino: u64, owner: u64, flock: bool) -> FsResult<()> {
        match self.session().release_locks(Ino(ino), owner, flock).await {
            // With the session its locks are gone, too.
            Err(ClientError::SessionGone(_)) => Ok(()),
            answer => Ok(answer?),
        }
    }
}

/// Whether a thread has a signal that it neither blocks nor ignores, or is gone. Source: proc_pid_status(5).
fn has_signal(thread: u32) -> bool {
    if thread == 0 {
        // It lives in another process name space and can't be looked at.
        return false;
    }
    match std::fs::read_to_string(format!("/proc/{thread}/status")) {
        Ok(status) => is_signalled(&status),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

fn is_signalled(status: &str) -> bool {
    let mask = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|value| u64::from_str_radix(value.trim(), 16).ok())
            .unwrap_or(0)
    };
    let pending = mask("SigPnd") | mask("ShdPnd");
    pending & !mask("SigBlk") & !mask("SigIgn") != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_signals_that_would_be_delivered_interrupt() {
        let status = |pending: &str, blocked: &str, ignored: &str| {
            format!(
                "Name:\tx\nSigPnd:\t0000000000000000\nShdPnd:\t{pending}\nSigBlk:\t{blocked}\nSigIgn:\t{ignored}\n"
            )
        };
        let (none, int) = ("0000000000000000", "0000000000000002");
        assert!(is_signalled(&status(int, none, none)));
        assert!(!is_signalled(&status(int, int, none)));
        assert!(!is_signalled(&status(int, none, int)));
        assert!(!is_signalled(&status(none, none, none)));
        assert!(!has_signal(std::process::id()));
        assert!(!has_signal(0));
    }

    #[test]
    fn the_kernels_end_of_file_is_the_wires() {
        let lock = LockRange {
            owner: 1,
            kind: v1::LockKind::Write,
            start: 0,
            end: i64::MAX as u64,
            flock: true,
            pid: 1,
        };
        assert_eq!(lock.to_wire(5, true).end, u64::MAX);
        assert_eq!(LockRange { end: 9, ..lock }.to_wire(5, true).end, 9);
    }
}

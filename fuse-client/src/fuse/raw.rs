//! Fields of requests that fuser 0.18 receives and does not hand on.
//!
//! Lost are: whether a lock is a flock or an fcntl lock (without it both kinds would exclude each other), whether setattr and
//! open must clear setuid and setgid, exact times before 1970 (fuser takes `-2 s + 0.8 s` for `-2.8 s`), and how much a listing
//! may return. fuser parses in place: [`fuser::Request`] is a `repr(transparent)` view of the header at the beginning of the
//! kernel's message in the read buffer, which lives until the operation's method returns. Here the rest of that message is
//! looked at. Source: include/uapi/linux/fuse.h; fuser 0.18.0, `request_param.rs` and `ll/request.rs`; the version is pinned.
#![allow(unsafe_code)]

use fuser::Request;

use crate::fs::attr::SetTime;

/// Length of fuse_in_header.
const HEADER: usize = 40;

/// FATTR_* bits of fuse_setattr_in.valid.
const FATTR_ATIME: u32 = 1 << 4;
const FATTR_MTIME: u32 = 1 << 5;
const FATTR_ATIME_NOW: u32 = 1 << 7;
const FATTR_MTIME_NOW: u32 = 1 << 8;
const FATTR_KILL_SUIDGID: u32 = 1 << 11;
const FUSE_OPEN_KILL_SUIDGID: u32 = 1 << 0;
const FUSE_LK_FLOCK: u32 = 1 << 0;

/// Source: include/uapi/linux/fuse.h, enum fuse_opcode.
const FUSE_CREATE: u32 = 35;

/// A whole message of the kernel.
#[derive(Clone, Copy)]
pub(super) struct Raw<'a>(&'a [u8]);

impl<'a> Raw<'a> {
    pub(super) fn of(request: &'a Request) -> Self {
        let start = std::ptr::from_ref(request).cast::<u8>();
        // SAFETY: `Request` is a transparent view of fuse_in_header, whose first field is the message's length; fuser has
        // checked that the buffer which the header lies in holds that many bytes (`AnyRequest::try_from`), and the buffer is
        // borrowed for as long as the request is.
        let bytes = unsafe {
            let length = start.cast::<u32>().read_unaligned() as usize;
            std::slice::from_raw_parts(start, length.max(HEADER))
        };
        Self(bytes)
    }

    /// 0 when the message is shorter.
    fn u32(self, at: usize) -> u32 {
        self.0
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_ne_bytes)
    }

    fn i64(self, at: usize) -> i64 {
        self.0
            .get(at..at + 8)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, i64::from_ne_bytes)
    }

    /// fuse_lk_in: a flock, not an fcntl lock.
    pub(super) fn is_flock(self) -> bool {
        self.u32(HEADER + 40) & FUSE_LK_FLOCK != 0
    }

    /// fuse_read_in: bytes that the answer may have.
    pub(super) fn read_size(self) -> usize {
        self.u32(HEADER + 16) as usize
    }

    /// fuse_open_in and fuse_create_in: truncation clears setuid and setgid.
    pub(super) fn open_kills_suidgid(self) -> bool {
        let at = if self.u32(4) == FUSE_CREATE {
            HEADER + 12
        } else {
            HEADER + 4
        };
        self.u32(at) & FUSE_OPEN_KILL_SUIDGID != 0
    }

    /// fuse_setattr_in: clear setuid and setgid.
    pub(super) fn setattr_kills_suidgid(self) -> bool {
        self.u32(HEADER) & FATTR_KILL_SUIDGID != 0
    }

    /// fuse_setattr_in: the access time to set.
    pub(super) fn atime(self) -> Option<SetTime> {
        self.time(FATTR_ATIME, FATTR_ATIME_NOW, HEADER + 32, HEADER + 56)
    }

    /// fuse_setattr_in: the modification time to set.
    pub(super) fn mtime(self) -> Option<SetTime> {
        self.time(FATTR_MTIME, FATTR_MTIME_NOW, HEADER + 40, HEADER + 60)
    }

    fn time(self, set: u32, now: u32, seconds_at: usize, nanos_at: usize) -> Option<SetTime> {
        let valid = self.u32(HEADER);
        if valid & now != 0 {
            return Some(SetTime::Now);
        }
        if valid & set == 0 {
            return None;
        }
        let nanos = i64::from(self.u32(nanos_at));
        Some(SetTime::At(
            self.i64(seconds_at)
                .saturating_mul(1_000_000_000)
                .saturating_add(nanos),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_kernel_puts_them() {
        let mut message = vec![0u8; HEADER + 88];
        message[4..8].copy_from_slice(&4u32.to_ne_bytes());
        let valid = FATTR_ATIME | FATTR_MTIME | FATTR_MTIME_NOW | FATTR_KILL_SUIDGID;
        message[HEADER..HEADER + 4].copy_from_slice(&valid.to_ne_bytes());
        message[HEADER + 32..HEADER + 40].copy_from_slice(&(-2i64).to_ne_bytes());
        message[HEADER + 56..HEADER + 60].copy_from_slice(&800_000_000u32.to_ne_bytes());
        let raw = Raw(&message);
        assert_eq!(raw.atime(), Some(SetTime::At(-1_200_000_000)));
        assert_eq!(raw.mtime(), Some(SetTime::Now));
        assert!(raw.setattr_kills_suidgid());

        let mut message = vec![0u8; HEADER + 48];
        message[HEADER + 40] = 1;
        assert!(Raw(&message).is_flock());
        assert!(!Raw(&message[..HEADER]).is_flock());

        let mut message = vec![0u8; HEADER + 16];
        message[4..8].copy_from_slice(&FUSE_CREATE.to_ne_bytes());
        message[HEADER + 12] = 1;
        assert!(Raw(&message).open_kills_suidgid());
    }
}

//! Inodes.

use bytes::Bytes;
use heliofs_proto::ids::{Ino, UnixNanos};
use heliofs_proto::v1::{self, FileKind};

use super::{Record, kind};
use crate::change::Corruption;
use crate::codec::{Reader, Writer};

/// What stat shows, and what the core keeps beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InodeRecord {
    /// File, directory, …; never changes.
    pub kind: FileKind,
    /// 0..=0o7777.
    pub mode: u32,
    /// Names; a directory: 2 + its subdirectories.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes; a directory: the sum of the lengths of its names; a symlink: the length of its target.
    pub size: u64,
    /// Bytes of its extents.
    pub allocated: u64,
    /// Last read.
    pub atime: UnixNanos,
    /// Last change of content or entries.
    pub mtime: UnixNanos,
    /// Last change of anything.
    pub ctime: UnixNanos,
    /// Creation.
    pub btime: UnixNanos,
    /// makedev, 0 unless a device.
    pub rdev: u32,
    /// seq of the command that last changed the content.
    pub data_seq: u64,
    /// The directory that holds it; of a file with several names, the last one it was given or looked up by a command.
    pub parent: Ino,
    /// `AttrFlag` bits.
    pub flags: u32,
    /// Cookie of the next entry (directories).
    pub next_cookie: u64,
    /// Erased ranges that are not worked off yet: readers of extents must look at them.
    pub erases: u32,
    /// The directory whose quota it is charged to, as it was made or moved below it; 0: none. [`SNAPSHOT`]: it is part of a
    /// snapshot, which is charged to nobody.
    pub quota: Ino,
}

/// In [`InodeRecord::quota`]: part of a snapshot. No inode has this number.
pub const SNAPSHOT: Ino = Ino(u64::MAX);

impl InodeRecord {
    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind == FileKind::Directory
    }

    /// Whether all bits of `flag` are set.
    pub fn has(&self, flag: v1::AttrFlag) -> bool {
        self.flags & flag as u32 != 0
    }

    /// Whether it is part of a snapshot: nobody changes it, and it is charged to nobody.
    pub fn is_snapshot(&self) -> bool {
        self.quota == SNAPSHOT
    }

    /// As clients see it.
    pub fn attr(&self, ino: Ino) -> v1::Attr {
        v1::Attr {
            ino: ino.0,
            kind: self.kind as i32,
            mode: self.mode,
            nlink: self.nlink,
            uid: self.uid,
            gid: self.gid,
            size: self.size,
            allocated: self.allocated,
            atime: self.atime.0,
            mtime: self.mtime.0,
            ctime: self.ctime.0,
            btime: self.btime.0,
            rdev: self.rdev,
            data_seq: self.data_seq,
            parent: self.parent.0,
            flags: match self.is_snapshot() {
                true => self.flags | v1::AttrFlag::Snapshot as u32,
                false => self.flags,
            },
        }
    }
}

impl Record for InodeRecord {
    fn encode(&self) -> Bytes {
        // Version 2 only where it says more: what was written under core level 1 stays as it is.
        let charged = self.quota != Ino(0);
        let mut w = Writer::record(if charged { 2 } else { 1 });
        w.u8(self.kind as u8)
            .varint(self.mode.into())
            .varint(self.nlink.into())
            .varint(self.uid.into())
            .varint(self.gid.into())
            .varint(self.size)
            .varint(self.allocated)
            .i64(self.atime.0)
            .i64(self.mtime.0)
            .i64(self.ctime.0)
            .i64(self.btime.0)
            .varint(self.rdev.into())
            .varint(self.data_seq)
            .varint(self.parent.0)
            .varint(self.flags.into())
            .varint(self.next_cookie)
            .varint(self.erases.into());
        if charged {
            w.varint(self.quota.0);
        }
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let (version, mut r) = Reader::record_up_to(key, value, 2)?;
        let byte = r.u8()?;
        let record = Self {
            kind: kind(&r, byte)?,
            mode: r.varint32()?,
            nlink: r.varint32()?,
            uid: r.varint32()?,
            gid: r.varint32()?,
            size: r.varint()?,
            allocated: r.varint()?,
            atime: UnixNanos(r.i64()?),
            mtime: UnixNanos(r.i64()?),
            ctime: UnixNanos(r.i64()?),
            btime: UnixNanos(r.i64()?),
            rdev: r.varint32()?,
            data_seq: r.varint()?,
            parent: Ino(r.varint()?),
            flags: r.varint32()?,
            next_cookie: r.varint()?,
            erases: r.varint32()?,
            quota: Ino(if version == 2 { r.varint()? } else { 0 }),
        };
        r.end()?;
        Ok(record)
    }
}

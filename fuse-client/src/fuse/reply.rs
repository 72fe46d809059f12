//! Answers to the kernel: attributes in its form, and lifetimes checked under the gate.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo};
use heliofs_proto::v1;
use heliofs_proto::v1::FileKind;

use crate::errno::{Errno, FsResult};
use crate::fs::file::Opened;
use crate::fs::namespace::Looked;
use crate::fs::{Entry, Fs};

/// Inode numbers are never reused.
pub(super) const GENERATION: Generation = Generation(0);

/// Preferred size of reads and writes that stat shows; also the kernel's block size for the file.
const BLOCK_BYTES: u32 = 4096;

pub(super) fn errno(error: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(error.number())
}

fn system_time(nanos: i64) -> SystemTime {
    let magnitude = Duration::from_nanos(nanos.unsigned_abs());
    if nanos >= 0 {
        UNIX_EPOCH + magnitude
    } else {
        UNIX_EPOCH - magnitude
    }
}

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::File | FileKind::Unspecified => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

pub(super) fn file_attr(attr: &v1::Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.allocated.div_ceil(512),
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: system_time(attr.btime),
        kind: file_type(attr.kind()),
        // 12 bits, see Attr.mode.
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

/// The entry `.` or `..` of a listing, of which the kernel takes number and kind only.
pub(super) fn dot_attr(ino: u64) -> FileAttr {
    file_attr(&v1::Attr {
        ino,
        kind: FileKind::Directory as i32,
        ..v1::Attr::default()
    })
}

pub(super) fn open_flags(opened: &Opened) -> FopenFlags {
    if opened.keep_pages {
        FopenFlags::FOPEN_KEEP_CACHE
    } else {
        FopenFlags::empty()
    }
}

/// Answers with attributes, and with how long the kernel may keep them.
fn with_lifetime(
    fs: &Fs,
    entry: &Entry,
    name: Option<(u64, &[u8])>,
    answer: impl FnOnce(Duration, &FileAttr),
) {
    let attr = file_attr(&entry.attr);
    let coherence = fs.coherence();
    let _gate = coherence.gate();
    let lifetime = fs.kernel_lifetime(entry.attr.ino, entry.at, entry.generation, name);
    answer(lifetime, &attr);
}

pub(super) fn entry(fs: &Fs, reply: fuser::ReplyEntry, name: (u64, &[u8]), entry: FsResult<Entry>) {
    match entry {
        Ok(entry) => with_lifetime(fs, &entry, Some(name), |lifetime, attr| {
            reply.entry(&lifetime, attr, GENERATION);
        }),
        Err(error) => reply.error(errno(error)),
    }
}

pub(super) fn looked(
    fs: &Fs,
    reply: fuser::ReplyEntry,
    name: (u64, &[u8]),
    looked: FsResult<Looked>,
) {
    match looked {
        Ok(Looked::Found(found)) => entry(fs, reply, name, Ok(found)),
        Ok(Looked::Absent { at, generation }) => {
            let coherence = fs.coherence();
            let _gate = coherence.gate();
            let lifetime = fs.kernel_lifetime(0, at, generation, Some(name));
            if lifetime.is_zero() {
                reply.error(fuser::Errno::ENOENT);
            } else {
                // Inode 0 with a lifetime is a negative entry that the kernel keeps.
                reply.entry(&lifetime, &file_attr(&v1::Attr::default()), GENERATION);
            }
        }
        Err(error) => reply.error(errno(error)),
    }
}

pub(super) fn attr(fs: &Fs, reply: fuser::ReplyAttr, entry: FsResult<Entry>) {
    match entry {
        Ok(entry) => with_lifetime(fs, &entry, None, |lifetime, attr| {
            reply.attr(&lifetime, attr)
        }),
        Err(error) => reply.error(errno(error)),
    }
}

pub(super) fn created(
    fs: &Fs,
    reply: fuser::ReplyCreate,
    name: (u64, &[u8]),
    created: FsResult<(Entry, Opened)>,
) {
    match created {
        Ok((entry, opened)) => with_lifetime(fs, &entry, Some(name), |lifetime, attr| {
            reply.created(
                &lifetime,
                attr,
                GENERATION,
                FileHandle(opened.handle),
                open_flags(&opened),
            );
        }),
        Err(error) => reply.error(errno(error)),
    }
}

pub(super) fn empty(reply: fuser::ReplyEmpty, done: FsResult<()>) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

pub(super) fn xattr(reply: fuser::ReplyXattr, size: u32, value: FsResult<bytes::Bytes>) {
    match value {
        Ok(value) if size == 0 => match u32::try_from(value.len()) {
            Ok(length) => reply.size(length),
            Err(_) => reply.error(fuser::Errno::E2BIG),
        },
        Ok(value) if value.len() > size as usize => reply.error(fuser::Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(errno(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_keep_their_nanoseconds() {
        let time = system_time(-1_200_000_000);
        assert_eq!(
            UNIX_EPOCH.duration_since(time).unwrap(),
            Duration::from_millis(1200)
        );
        assert_eq!(system_time(5), UNIX_EPOCH + Duration::from_nanos(5));
        system_time(i64::MIN);
    }

    #[test]
    fn blocks_are_rounded_up() {
        let attr = v1::Attr {
            allocated: 513,
            kind: FileKind::File as i32,
            mode: 0o4755,
            ..Default::default()
        };
        assert_eq!(file_attr(&attr).blocks, 2);
        assert_eq!(file_attr(&attr).perm, 0o4755);
    }
}

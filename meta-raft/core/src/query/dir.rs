//! Directories: lookups, listings, walks.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, VolumeId};
use heliofs_proto::limits::{NAME_BYTES_MAX, SYMLINK_BYTES_MAX};
use heliofs_proto::v1::{self, FileKind};

use super::{PAGE_MAX, QueryError, directory, get, inode_record, key_number, named_inode};
use crate::change::Corruption;
use crate::keys;
use crate::records::{CookieRecord, InodeRecord, NameRecord, Record};
use crate::view::View;

/// What `name` means in directory `parent`; `.` and `..` too. Errors: `STALE`, `NOT_DIRECTORY`, `NOT_FOUND`, `NAME_TOO_LONG`.
pub fn lookup(
    view: &impl View,
    volume: VolumeId,
    parent: Ino,
    name: &[u8],
) -> Result<v1::Attr, QueryError> {
    let dir = directory(view, volume, parent)?;
    match name {
        b"." => return Ok(dir.attr(parent)),
        b".." => return Ok(inode_record(view, volume, dir.parent)?.attr(dir.parent)),
        _ if name.len() > NAME_BYTES_MAX => return Err(FsError::NameTooLong.into()),
        _ => {}
    }
    child(view, volume, parent, &dir, name)?
        .map(|(ino, inode)| inode.attr(ino))
        .ok_or(QueryError::Refused(FsError::NotFound))
}

/// What a name means. A removed directory is empty for everybody, also while a tree removal still takes it apart.
fn child(
    view: &impl View,
    volume: VolumeId,
    parent: Ino,
    dir: &InodeRecord,
    name: &[u8],
) -> Result<Option<(Ino, InodeRecord)>, Corruption> {
    if dir.nlink == 0 {
        return Ok(None);
    }
    let entry: Option<NameRecord> = get(view, &keys::name(volume, parent, name))?;
    entry
        .map(|entry| Ok((entry.ino, named_inode(view, volume, entry.ino)?)))
        .transpose()
}

/// Entries whose cookie is above `after`, in cookie order: at most `entries_max` of them (and at most [`PAGE_MAX`]; 0 means
/// [`PAGE_MAX`]). `.` and `..` are not among them: their cookies are 1 and 2, and `DirPage.dir` has what they mean.
///
/// Errors: `STALE`, `NOT_DIRECTORY`.
pub fn read_dir(
    view: &impl View,
    volume: VolumeId,
    ino: Ino,
    after: u64,
    entries_max: u32,
    plus: bool,
) -> Result<v1::DirPage, QueryError> {
    let dir = directory(view, volume, ino)?;
    let mut page = v1::DirPage {
        entries: Vec::new(),
        end: true,
        dir: Some(dir.attr(ino)),
    };
    if dir.nlink == 0 {
        return Ok(page);
    }
    let max = match entries_max as usize {
        0 => PAGE_MAX,
        max => max.min(PAGE_MAX),
    };
    // One more than fits tells whether this is the end.
    let mut entries = scan_cookies(view, volume, ino, after, max + 1)?;
    page.end = entries.len() <= max;
    entries.truncate(max);
    page.entries = entries
        .into_iter()
        .map(|(cookie, entry)| {
            let attr = if plus {
                Some(named_inode(view, volume, entry.ino)?.attr(entry.ino))
            } else {
                None
            };
            Ok(v1::DirEntry {
                name: entry.name,
                ino: entry.ino.0,
                kind: entry.kind as i32,
                cookie,
                attr,
            })
        })
        .collect::<Result<_, Corruption>>()?;
    Ok(page)
}

fn scan_cookies(
    view: &impl View,
    volume: VolumeId,
    ino: Ino,
    after: u64,
    max: usize,
) -> Result<Vec<(u64, CookieRecord)>, Corruption> {
    let (_, to) = keys::number_range(volume, keys::Tag::Cookie, ino.0);
    let from = keys::after(&keys::cookie(volume, ino, after));
    view.scan(&from, &to, max)?
        .iter()
        .map(|(key, value)| Ok((key_number(key, 1)?, CookieRecord::decode(key, value)?)))
        .collect()
}

/// Resolves a path from the root, without following symlinks: the root's attributes, then one per component (`.` and `..` are
/// components, empty ones are not), up to the first that is missing or that lies below something that is no directory.
///
/// Errors: `NAME_TOO_LONG` for a component or for the path; `STALE` if the volume does not exist.
pub fn walk(view: &impl View, volume: VolumeId, path: &[u8]) -> Result<v1::WalkReply, QueryError> {
    if path.len() > SYMLINK_BYTES_MAX {
        return Err(FsError::NameTooLong.into());
    }
    let (mut ino, mut inode) = (Ino::ROOT, inode_record(view, volume, Ino::ROOT)?);
    let mut attrs = vec![inode.attr(ino)];
    for name in path
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty())
    {
        if name.len() > NAME_BYTES_MAX {
            return Err(FsError::NameTooLong.into());
        }
        if !inode.is_directory() {
            break;
        }
        match name {
            b"." => {}
            b".." => {
                ino = inode.parent;
                inode = inode_record(view, volume, ino)?;
            }
            _ => match child(view, volume, ino, &inode, name)? {
                Some(found) => (ino, inode) = found,
                None => break,
            },
        }
        attrs.push(inode.attr(ino));
    }
    Ok(v1::WalkReply { attrs })
}

/// An entry with its inode, for walks over whole trees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Child {
    /// Where the entry stands; give it as `after` to go on.
    pub cookie: u64,
    /// The entry's name.
    pub name: Bytes,
    /// What it names.
    pub ino: Ino,
    /// Its kind.
    pub kind: FileKind,
    /// Names that it has: a walk that must not count files twice remembers those above 1.
    pub nlink: u32,
    /// Bytes.
    pub size: u64,
    /// Bytes of its extents.
    pub allocated: u64,
}

/// One step of a summary: the children of a directory with cookies above `after`, at most `max` (and at most [`PAGE_MAX`]);
/// fewer than that means that there are no more. None if the directory is gone: trees change while they are walked.
pub fn children(
    view: &impl View,
    volume: VolumeId,
    ino: Ino,
    after: u64,
    max: usize,
) -> Result<Vec<Child>, Corruption> {
    let dir: Option<InodeRecord> = get(view, &keys::inode(volume, ino))?;
    if !dir.is_some_and(|dir| dir.is_directory() && dir.nlink > 0) {
        return Ok(Vec::new());
    }
    scan_cookies(view, volume, ino, after, max.min(PAGE_MAX))?
        .into_iter()
        .map(|(cookie, entry)| {
            let inode = named_inode(view, volume, entry.ino)?;
            Ok(Child {
                cookie,
                name: entry.name,
                ino: entry.ino,
                kind: entry.kind,
                nlink: inode.nlink,
                size: inode.size,
                allocated: inode.allocated,
            })
        })
        .collect()
}

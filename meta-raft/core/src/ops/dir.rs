//! Directory entries, and what adding and removing them does to the directory and to the inode named.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::limits::{LINKS_MAX, NAME_BYTES_MAX};
use heliofs_proto::v1::{self, FileKind};

use super::trash;
use crate::change::Corruption;
use crate::keys;
use crate::records::{CookieRecord, InodeRecord, NameRecord, OrphanRecord};
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Cookie of a directory's first entry: 1 and 2 are `.` and `..`.
pub(crate) const COOKIE_FIRST: u64 = 3;

/// Refuses what can't be the name of an entry.
pub(crate) fn check_name(name: &[u8]) -> Result<(), FsError> {
    if name.len() > NAME_BYTES_MAX {
        return Err(FsError::NameTooLong);
    }
    match name {
        b"" | b"." | b".." => Err(FsError::Invalid),
        _ if name.iter().any(|byte| matches!(byte, 0 | b'/')) => Err(FsError::Invalid),
        _ => Ok(()),
    }
}

/// A directory whose entries a command may change. One that was removed but is still open (or that a tree removal takes apart)
/// is empty for everybody and takes no new entries: `NOT_FOUND`, as Linux answers. `READ_ONLY` in a snapshot.
pub(crate) fn live_directory<V: View>(txn: &Txn<V>, ino: Ino) -> OpResult<InodeRecord> {
    let dir = txn.directory(ino)?;
    if dir.nlink == 0 {
        return Err(FsError::NotFound.into());
    }
    txn.changeable(&dir)?;
    Ok(dir)
}

/// An entry that must exist.
pub(crate) fn existing_entry<V: View>(
    txn: &Txn<V>,
    parent: Ino,
    name: &[u8],
) -> OpResult<NameRecord> {
    check_name(name)?;
    Ok(txn.entry(parent, name)?.ok_or(FsError::NotFound)?)
}

/// Adds an entry that did not exist. The caller writes `dir`, and the inode with its new name.
pub(crate) fn add_entry<V: View>(
    txn: &mut Txn<V>,
    parent: Ino,
    dir: &mut InodeRecord,
    name: &Bytes,
    ino: Ino,
    kind: FileKind,
) -> OpResult<()> {
    let cookie = dir.next_cookie;
    dir.next_cookie += 1;
    dir.size += name.len() as u64;
    if kind == FileKind::Directory {
        gain_subdirectory(dir)?;
    }
    changed(txn, dir);
    let entry = NameRecord { ino, kind, cookie };
    put_entry(txn, parent, name, &entry)?;
    Ok(())
}

/// Removes an entry. The caller writes `dir`, and the inode with one name less.
pub(crate) fn remove_entry<V: View>(
    txn: &mut Txn<V>,
    parent: Ino,
    dir: &mut InodeRecord,
    name: &Bytes,
    entry: &NameRecord,
) -> Result<(), Corruption> {
    dir.size = dir.size.saturating_sub(name.len() as u64);
    if entry.kind == FileKind::Directory {
        dir.nlink = dir.nlink.saturating_sub(1);
    }
    changed(txn, dir);
    let volume = txn.volume;
    txn.remove(keys::name(volume, parent, name))?;
    txn.remove(keys::cookie(volume, parent, entry.cookie))?;
    txn.touch_entry(parent, name.clone());
    Ok(())
}

/// Lets an existing entry name another inode: it stays where it stands in listings. The caller writes `dir` and both inodes.
pub(crate) fn point_entry<V: View>(
    txn: &mut Txn<V>,
    parent: Ino,
    dir: &mut InodeRecord,
    name: &Bytes,
    old: &NameRecord,
    (ino, kind): (Ino, FileKind),
) -> OpResult<()> {
    if old.kind == FileKind::Directory {
        dir.nlink = dir.nlink.saturating_sub(1);
    }
    if kind == FileKind::Directory {
        gain_subdirectory(dir)?;
    }
    changed(txn, dir);
    let entry = NameRecord {
        ino,
        kind,
        cookie: old.cookie,
    };
    put_entry(txn, parent, name, &entry)?;
    Ok(())
}

/// Writes both records of an entry.
pub(crate) fn put_entry<V: View>(
    txn: &mut Txn<V>,
    parent: Ino,
    name: &Bytes,
    entry: &NameRecord,
) -> Result<(), Corruption> {
    let volume = txn.volume;
    txn.put(keys::name(volume, parent, name), entry)?;
    let by_cookie = CookieRecord {
        ino: entry.ino,
        kind: entry.kind,
        name: name.clone(),
    };
    txn.put(keys::cookie(volume, parent, entry.cookie), &by_cookie)?;
    txn.touch_entry(parent, name.clone());
    Ok(())
}

fn gain_subdirectory(dir: &mut InodeRecord) -> Result<(), FsError> {
    dir.nlink = dir.nlink.checked_add(1).ok_or(FsError::TooManyLinks)?;
    Ok(())
}

/// Marks a directory's entries as changed.
pub(crate) fn changed<V: View>(txn: &Txn<V>, dir: &mut InodeRecord) {
    dir.mtime = txn.time;
    dir.ctime = txn.time;
}

/// Gives an inode that is no directory one more name.
pub(crate) fn gain_name<V: View>(txn: &Txn<V>, inode: &mut InodeRecord) -> Result<(), FsError> {
    if inode.nlink >= LINKS_MAX {
        return Err(FsError::TooManyLinks);
    }
    inode.nlink += 1;
    inode.ctime = txn.time;
    Ok(())
}

/// Takes a name from an inode (from a directory: its only one) and writes it; whether it became an orphan.
pub(crate) fn lose_name<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
) -> Result<bool, Corruption> {
    inode.ctime = txn.time;
    if inode.is_directory() || inode.nlink <= 1 {
        orphan(txn, ino, inode)?;
    } else {
        inode.nlink -= 1;
    }
    txn.put_inode(ino, inode)?;
    Ok(inode.nlink == 0)
}

/// As [`lose_name`] for the entry `name` of `parent`, which was removed and written; but what loses its last name goes to the
/// trash if the volume has one. Sets `orphaned` and `forget` of the reply.
pub(crate) fn lose_name_or_keep<V: View>(
    txn: &mut Txn<V>,
    (parent, name): (Ino, &Bytes),
    ino: Ino,
    inode: &mut InodeRecord,
    reply: &mut v1::Reply,
) -> OpResult<()> {
    let last = inode.is_directory() || inode.nlink <= 1;
    if last && !inode.is_snapshot() && trash::keeps(txn, parent)? {
        return trash::take(txn, (parent, name), ino, inode, reply);
    }
    reply.orphaned = lose_name(txn, ino, inode)?;
    Ok(())
}

/// Makes an inode without a name an orphan: it lives until nobody has it open. The caller writes the inode.
pub(crate) fn orphan<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
) -> Result<(), Corruption> {
    inode.nlink = 0;
    let record = OrphanRecord { since: txn.time };
    txn.put(keys::orphan(txn.volume, ino), &record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_directory_can_hold_are_refused() {
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0"] {
            assert_eq!(check_name(name), Err(FsError::Invalid), "{name:?}");
        }
        assert_eq!(check_name(&[b'a'; 256]), Err(FsError::NameTooLong));
        for name in [&b"..."[..], b" ", b"\xff\xfe", &[b'a'; 255]] {
            assert_eq!(check_name(name), Ok(()), "{name:?}");
        }
    }
}

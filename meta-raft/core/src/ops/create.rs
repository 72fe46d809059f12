//! mknod, mkdir, symlink, create.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::limits::SYMLINK_BYTES_MAX;
use heliofs_proto::v1::{self, AttrFlag, FileKind};

use super::posix_acl::{self, Acl};
use super::{dir, privileges, session, trash, xattr};
use crate::change::Corruption;
use crate::keys::{self, Tag};
use crate::limits::{CORE_LEVEL_BATCHES, CORE_LEVEL_QUOTAS, INODES_SPARE};
use crate::records::{InodeRecord, QuotaCounters, SNAPSHOT};
use crate::txn::{OpError, OpResult, Txn};
use crate::view::View;

/// Creates an inode and its first name.
pub(crate) fn create<V: View>(txn: &mut Txn<V>, op: &v1::Create) -> OpResult {
    let parent = Ino(op.parent);
    let mut dir = dir::live_directory(txn, parent)?;
    dir::check_name(&op.name)?;
    let kind = op.kind();
    if let Some(entry) = txn.entry(parent, &op.name)? {
        return if op.exclusive || kind != FileKind::File {
            Err(FsError::Exists.into())
        } else if entry.kind == FileKind::Directory {
            Err(FsError::IsDirectory.into())
        } else if entry.kind != FileKind::File {
            // The caller saw no entry: what came in between must be looked up, followed or opened by its own rules.
            Err(FsError::Exists.into())
        } else {
            let inode = txn.named_inode(entry.ino)?;
            Ok(v1::Reply {
                attr: Some(inode.attr(entry.ino)),
                parent: Some(dir.attr(parent)),
                created: false,
                ..v1::Reply::default()
            })
        };
    }
    trash::protect(txn, parent, &op.name)?;
    let ino = match op.ino {
        wanted if wanted != 0 && txn.settings()?.core_level >= CORE_LEVEL_BATCHES => {
            reserved_ino(txn, Ino(wanted))?
        }
        _ => new_ino(txn)?,
    };
    let mut inode = InodeRecord {
        kind,
        mode: op.mode & 0o7777,
        nlink: 1,
        uid: txn.caller.uid,
        gid: txn.caller.gid,
        size: 0,
        allocated: 0,
        atime: txn.time,
        mtime: txn.time,
        ctime: txn.time,
        btime: txn.time,
        rdev: 0,
        data_seq: txn.position.seq,
        parent,
        flags: 0,
        next_cookie: 0,
        erases: 0,
        quota: match makes_snapshot(txn)? {
            true => SNAPSHOT,
            false => dir.quota,
        },
    };
    if dir.mode & privileges::SETGID != 0 {
        inode.gid = dir.gid;
    }
    match kind {
        FileKind::Directory => {
            inode.nlink = 2;
            inode.next_cookie = dir::COOKIE_FIRST;
            inode.mode |= dir.mode & privileges::SETGID;
        }
        FileKind::Symlink => {
            put_target(txn, ino, &mut inode, op)?;
        }
        FileKind::CharDevice | FileKind::BlockDevice => inode.rdev = op.rdev,
        FileKind::File | FileKind::Fifo | FileKind::Socket => {}
        FileKind::Unspecified => return Err(FsError::Invalid.into()),
    }
    if kind != FileKind::Symlink {
        inherit_acl(txn, (parent, &dir), ino, &mut inode, op.umask)?;
    }
    dir::add_entry(txn, parent, &mut dir, &op.name, ino, kind)?;
    txn.put_inode(parent, &dir)?;
    txn.put_fresh(keys::inode(txn.volume, ino), &inode);
    txn.charges.inode(ino, &inode, 1);
    txn.touch(ino, true, false, false);
    Ok(v1::Reply {
        attr: Some(inode.attr(ino)),
        parent: Some(dir.attr(parent)),
        created: true,
        deferrable: kind == FileKind::Directory && may_defer(txn, &inode)?,
        ..v1::Reply::default()
    })
}

/// See `Reply.deferrable`.
fn may_defer<V: View>(txn: &mut Txn<V>, inode: &InodeRecord) -> OpResult<bool> {
    Ok(!inode.is_snapshot() && !inode.has(AttrFlag::Acl) && volume_may_defer(txn)?)
}

/// As far as the volume is concerned: see `Reply.deferrable`.
pub(crate) fn volume_may_defer<V: View>(txn: &mut Txn<V>) -> OpResult<bool> {
    let settings = txn.settings()?;
    if settings.core_level < CORE_LEVEL_BATCHES || settings.trash_days != 0 {
        return Ok(false);
    }
    // What is removed at once takes everything below along, whoever is at work there.
    let (from, to) = keys::tag_range(txn.volume, Tag::RemoveTree);
    if !txn.scan(&from, &to, 1)?.is_empty() {
        return Ok(false);
    }
    let counters = txn.counters()?;
    let inodes_max = settings.inodes_max;
    let spare = INODES_SPARE.saturating_add(inodes_max / 100);
    let has_room = inodes_max == 0 || counters.used_inodes.saturating_add(spare) < inodes_max;
    Ok(has_room && counters.quotas == QuotaCounters::default())
}

/// Whether what the caller creates belongs to a snapshot. Below core level 2 there are none, whatever the caller says.
fn makes_snapshot<V: View>(txn: &Txn<V>) -> OpResult<bool> {
    Ok(txn.caller.snapshot && txn.settings()?.core_level >= CORE_LEVEL_QUOTAS)
}

/// A directory of root's that no caller asked for; its name is free. The parent is written.
pub(crate) fn plain_directory<V: View>(
    txn: &mut Txn<V>,
    parent: Ino,
    name: &Bytes,
    mode: u32,
) -> OpResult<Ino> {
    let mut dir = dir::live_directory(txn, parent)?;
    let ino = new_ino(txn)?;
    let inode = InodeRecord {
        kind: FileKind::Directory,
        mode,
        nlink: 2,
        uid: 0,
        gid: 0,
        size: 0,
        allocated: 0,
        atime: txn.time,
        mtime: txn.time,
        ctime: txn.time,
        btime: txn.time,
        rdev: 0,
        data_seq: txn.position.seq,
        parent,
        flags: 0,
        next_cookie: dir::COOKIE_FIRST,
        erases: 0,
        quota: dir.quota,
    };
    dir::add_entry(txn, parent, &mut dir, name, ino, FileKind::Directory)?;
    txn.put_inode(parent, &dir)?;
    txn.put_fresh(keys::inode(txn.volume, ino), &inode);
    txn.charges.inode_unasked(ino, &inode);
    txn.touch(ino, true, false, false);
    Ok(ino)
}

fn new_ino<V: View>(txn: &mut Txn<V>) -> OpResult<Ino> {
    count_inode(txn)?;
    let epoch = txn.epoch();
    let counters = txn.counters()?;
    let ino = Ino::new(epoch, counters.next_ino).ok_or(FsError::NoSpace)?;
    counters.next_ino += 1;
    Ok(ino)
}

/// An inode of a number that the session reserved.
fn reserved_ino<V: View>(txn: &mut Txn<V>, ino: Ino) -> OpResult<Ino> {
    session::take_ino(txn, ino)?;
    count_inode(txn)?;
    Ok(ino)
}

fn count_inode<V: View>(txn: &mut Txn<V>) -> OpResult<()> {
    let inodes_max = txn.settings()?.inodes_max;
    let counters = txn.counters()?;
    if inodes_max != 0 && counters.used_inodes >= inodes_max {
        return Err(FsError::NoSpace.into());
    }
    counters.used_inodes += 1;
    Ok(())
}

fn put_target<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    op: &v1::Create,
) -> OpResult<()> {
    let target = &op.symlink_target;
    match target.len() {
        0 => return Err(FsError::NotFound.into()),
        length if length > SYMLINK_BYTES_MAX => return Err(FsError::NameTooLong.into()),
        _ if target.contains(&0) => return Err(FsError::Invalid.into()),
        length => inode.size = length as u64,
    }
    inode.mode = 0o777;
    txn.put_bytes(keys::symlink(txn.volume, ino), target.clone())?;
    Ok(())
}

/// The parent's default ACL limits the mode instead of the umask and becomes the access ACL, and of a directory the default ACL
/// too (posix_acl_create).
fn inherit_acl<V: View>(
    txn: &mut Txn<V>,
    (parent, dir): (Ino, &InodeRecord),
    ino: Ino,
    inode: &mut InodeRecord,
    umask: u32,
) -> OpResult<()> {
    let key = keys::xattr(txn.volume, parent, posix_acl::DEFAULT);
    let default = match dir.has(AttrFlag::Acl) {
        true => txn.get_bytes(&key)?,
        false => None,
    };
    let Some(default) = default else {
        inode.mode &= !(umask & 0o777);
        return Ok(());
    };
    let mut acl = stored_acl(&key, &default)?;
    let (mode, equivalent) = acl.create_masq(inode.mode);
    inode.mode = mode;
    if !equivalent {
        xattr::write(txn, ino, inode, posix_acl::ACCESS, acl.encode())?;
    }
    if inode.is_directory() {
        xattr::write(txn, ino, inode, posix_acl::DEFAULT, default)?;
    }
    Ok(())
}

/// An ACL that was checked when it was set.
pub(crate) fn stored_acl(key: &[u8], value: &[u8]) -> OpResult<Acl> {
    let acl = Acl::parse(value).ok().flatten();
    acl.ok_or_else(|| {
        OpError::Corrupt(Corruption::Record {
            key: key.to_vec(),
            why: "stored ACL is invalid",
        })
    })
}

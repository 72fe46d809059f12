//! chmod, chown, truncate, utimens.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, UnixNanos};
use heliofs_proto::limits::FILE_BYTES_MAX;
use heliofs_proto::v1::{self, AttrFlag, FileKind, set_time};

use super::create::stored_acl;
use super::{extents, posix_acl, privileges};
use crate::keys;
use crate::records::InodeRecord;
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Changes attributes; ctime follows always, mtime if the size is set.
pub(crate) fn set_attr<V: View>(txn: &mut Txn<V>, op: &v1::SetAttr) -> OpResult {
    let ino = Ino(op.ino);
    let mut inode = txn.inode(ino)?;
    txn.changeable(&inode)?;
    if let Some(size) = op.size {
        match inode.kind {
            FileKind::File if size > FILE_BYTES_MAX => return Err(FsError::FileTooLarge.into()),
            FileKind::File => {}
            FileKind::Directory => return Err(FsError::IsDirectory.into()),
            _ => return Err(FsError::Invalid.into()),
        }
        extents::truncate(txn, ino, &mut inode, size)?;
        privileges::drop_capability(txn, ino, &mut inode)?;
        inode.mtime = txn.time;
    }
    if let Some(mode) = op.mode {
        change_mode(txn, ino, &mut inode, mode & 0o7777)?;
    }
    if op.uid.is_some() || op.gid.is_some() {
        txn.charges.owned(ino, &inode, -1);
        inode.uid = op.uid.unwrap_or(inode.uid);
        inode.gid = op.gid.unwrap_or(inode.gid);
        txn.charges.owned(ino, &inode, 1);
        // Whoever does it, root too (chown_common in fs/open.c). The kernel asks for the mode's part with `kill_suidgid` or with
        // `mode` or not at all, depending on what it negotiated; the outcome is the same in all three cases.
        if !inode.is_directory() {
            privileges::kill_suidgid(&mut inode);
            privileges::drop_capability(txn, ino, &mut inode)?;
        }
    }
    if op.kill_suidgid {
        privileges::kill_suidgid(&mut inode);
    }
    if let Some(to) = time(txn, op.atime) {
        inode.atime = to;
    }
    if let Some(to) = time(txn, op.mtime) {
        inode.mtime = to;
    }
    inode.ctime = txn.time;
    txn.put_inode(ino, &inode)?;
    Ok(v1::Reply {
        attr: Some(inode.attr(ino)),
        ..v1::Reply::default()
    })
}

fn time<V: View>(txn: &Txn<V>, to: Option<v1::SetTime>) -> Option<UnixNanos> {
    match to?.to? {
        set_time::To::Nanos(nanos) => Some(UnixNanos(nanos)),
        set_time::To::Now(now) => now.then_some(txn.time),
    }
}

/// The access ACL follows the mode (posix_acl_chmod). A symlink has no mode of its own.
fn change_mode<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    mode: u32,
) -> OpResult<()> {
    if inode.kind == FileKind::Symlink {
        return Err(FsError::NotSupported.into());
    }
    inode.mode = mode;
    if !inode.has(AttrFlag::Acl) {
        return Ok(());
    }
    let key = keys::xattr(txn.volume, ino, posix_acl::ACCESS);
    if let Some(value) = txn.get_bytes(&key)? {
        let mut acl = stored_acl(&key, &value)?;
        acl.chmod_masq(mode);
        txn.put_bytes(key, acl.encode())?;
        txn.touch(ino, true, false, true);
    }
    Ok(())
}

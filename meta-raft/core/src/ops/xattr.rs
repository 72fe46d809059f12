//! Extended attributes. What Linux's VFS checks before it asks is checked again: other clients than a kernel exist.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::limits::{XATTR_LIST_BYTES_MAX, XATTR_NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX};
use heliofs_proto::v1::{self, AttrFlag, FileKind};

use super::posix_acl::{self, Acl};
use super::privileges::{CAPABILITY, SETGID};
use crate::change::Corruption;
use crate::keys::{self, Tag};
use crate::limits::{XATTR_BYTES_PER_INODE_MAX, XATTRS_PER_INODE_MAX};
use crate::records::InodeRecord;
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Sets an attribute. An access ACL changes the mode too, and is not kept where the mode says all that it says.
pub(crate) fn set<V: View>(txn: &mut Txn<V>, op: &v1::SetXattr) -> OpResult {
    let ino = Ino(op.ino);
    let mut inode = txn.inode(ino)?;
    txn.changeable(&inode)?;
    check_name(&inode, &op.name)?;
    if op.value.len() > XATTR_VALUE_BYTES_MAX {
        return Err(FsError::TooBig.into());
    }
    if is_acl(&op.name) {
        set_acl(txn, ino, &mut inode, op)?;
    } else {
        let exists = txn.exists(&keys::xattr(txn.volume, ino, &op.name))?;
        if exists && op.create_only {
            return Err(FsError::Exists.into());
        }
        if !exists && op.replace_only {
            return Err(FsError::NoAttribute.into());
        }
        check_room(txn, ino, &inode, &op.name, &op.value)?;
        write(txn, ino, &mut inode, &op.name, op.value.clone())?;
    }
    changed(txn, ino, inode)
}

/// Removes an attribute; an ACL's mode bits stay. Errors: `NO_ATTRIBUTE`.
pub(crate) fn remove<V: View>(txn: &mut Txn<V>, op: &v1::RemoveXattr) -> OpResult {
    let ino = Ino(op.ino);
    let mut inode = txn.inode(ino)?;
    txn.changeable(&inode)?;
    check_name(&inode, &op.name)?;
    if !txn.exists(&keys::xattr(txn.volume, ino, &op.name))? {
        return Err(FsError::NoAttribute.into());
    }
    erase(txn, ino, &mut inode, &op.name)?;
    changed(txn, ino, inode)
}

fn changed<V: View>(txn: &mut Txn<V>, ino: Ino, mut inode: InodeRecord) -> OpResult {
    inode.ctime = txn.time;
    txn.put_inode(ino, &inode)?;
    Ok(v1::Reply {
        attr: Some(inode.attr(ino)),
        ..v1::Reply::default()
    })
}

/// Writes an attribute, without checks. The caller writes the inode.
pub(crate) fn write<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    name: &[u8],
    value: Bytes,
) -> Result<(), Corruption> {
    txn.put_bytes(keys::xattr(txn.volume, ino, name), value)?;
    inode.flags |= AttrFlag::Xattr as u32;
    if is_acl(name) {
        inode.flags |= AttrFlag::Acl as u32;
    }
    if name == CAPABILITY {
        inode.flags |= AttrFlag::Capability as u32;
    }
    txn.touch(ino, true, false, true);
    Ok(())
}

/// Removes an attribute if it exists, without checks. The caller writes the inode.
pub(crate) fn erase<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    name: &[u8],
) -> Result<(), Corruption> {
    let volume = txn.volume;
    txn.remove(keys::xattr(volume, ino, name))?;
    let (from, to) = keys::number_range(volume, Tag::Xattr, ino.0);
    if txn.scan(&from, &to, 1)?.is_empty() {
        inode.flags &= !(AttrFlag::Xattr as u32);
    }
    if is_acl(name)
        && !txn.exists(&keys::xattr(volume, ino, posix_acl::ACCESS))?
        && !txn.exists(&keys::xattr(volume, ino, posix_acl::DEFAULT))?
    {
        inode.flags &= !(AttrFlag::Acl as u32);
    }
    if name == CAPABILITY {
        inode.flags &= !(AttrFlag::Capability as u32);
    }
    txn.touch(ino, true, false, true);
    Ok(())
}

fn is_acl(name: &[u8]) -> bool {
    name == posix_acl::ACCESS || name == posix_acl::DEFAULT
}

/// Length and name space, as setxattr(2) and xattr(7) have them.
fn check_name(inode: &InodeRecord, name: &[u8]) -> Result<(), FsError> {
    if name.is_empty() || name.len() > XATTR_NAME_BYTES_MAX {
        return Err(FsError::Range);
    }
    if name.contains(&0) {
        return Err(FsError::Invalid);
    }
    if is_acl(name) {
        return match inode.kind {
            FileKind::Symlink => Err(FsError::NotSupported),
            _ => Ok(()),
        };
    }
    let suffix = |space: &[u8]| name.strip_prefix(space);
    if let Some(rest) = suffix(b"user.") {
        return match inode.kind {
            // Permission bits of the others guard something else than content (xattr(7)).
            FileKind::File | FileKind::Directory if rest.is_empty() => Err(FsError::Invalid),
            FileKind::File | FileKind::Directory => Ok(()),
            _ => Err(FsError::NotPermitted),
        };
    }
    match suffix(b"trusted.").or_else(|| suffix(b"security.")) {
        None => Err(FsError::NotSupported),
        Some(b"") => Err(FsError::Invalid),
        Some(_) => Ok(()),
    }
}

/// Refuses (`NO_SPACE`) an attribute that makes too many or too much of them for one inode.
fn check_room<V: View>(
    txn: &Txn<V>,
    ino: Ino,
    inode: &InodeRecord,
    name: &[u8],
    value: &[u8],
) -> OpResult<()> {
    if !inode.has(AttrFlag::Xattr) {
        return Ok(());
    }
    let (from, to) = keys::number_range(txn.volume, Tag::Xattr, ino.0);
    let (mut count, mut list_bytes, mut bytes) = (1, name.len() + 1, name.len() + value.len());
    for (key, value) in txn.scan(&from, &to, XATTRS_PER_INODE_MAX + 1)? {
        let other = keys::name_of(&key);
        if other != name {
            count += 1;
            list_bytes += other.len() + 1;
            bytes += other.len() + value.len();
        }
    }
    if count > XATTRS_PER_INODE_MAX
        || list_bytes > XATTR_LIST_BYTES_MAX
        || bytes > XATTR_BYTES_PER_INODE_MAX
    {
        return Err(FsError::NoSpace.into());
    }
    Ok(())
}

/// As set_posix_acl and posix_acl_update_mode do in fs/posix_acl.c. XATTR_CREATE and XATTR_REPLACE do not apply to ACLs.
fn set_acl<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    op: &v1::SetXattr,
) -> OpResult<()> {
    let acl = Acl::parse(&op.value)?;
    if op.name == posix_acl::DEFAULT {
        match acl {
            None => erase(txn, ino, inode, &op.name)?,
            Some(_) if !inode.is_directory() => return Err(FsError::Access.into()),
            Some(acl) => {
                let value = acl.encode();
                check_room(txn, ino, inode, &op.name, &value)?;
                write(txn, ino, inode, &op.name, value)?;
            }
        }
        return Ok(());
    }
    let kept = acl.filter(|acl| {
        let (mode, equivalent) = acl.mode(inode.mode);
        inode.mode = mode;
        !equivalent
    });
    if op.kill_setgid {
        inode.mode &= !SETGID;
    }
    match kept {
        None => erase(txn, ino, inode, &op.name)?,
        Some(acl) => {
            let value = acl.encode();
            check_room(txn, ino, inode, &op.name, &value)?;
            write(txn, ino, inode, &op.name, value)?;
        }
    }
    Ok(())
}

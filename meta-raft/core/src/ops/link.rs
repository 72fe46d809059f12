//! link: one more name for an inode.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1;

use super::{dir, quota, trash};
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Adds a name. Refused for directories (`NOT_PERMITTED`) and for inodes without a name (`NOT_FOUND`): those are on their way
/// out.
pub(crate) fn link<V: View>(txn: &mut Txn<V>, op: &v1::Link) -> OpResult {
    let (ino, parent) = (Ino(op.ino), Ino(op.parent));
    let mut dir = dir::live_directory(txn, parent)?;
    dir::check_name(&op.name)?;
    if txn.entry(parent, &op.name)?.is_some() {
        return Err(FsError::Exists.into());
    }
    trash::protect(txn, parent, &op.name)?;
    let mut inode = txn.inode(ino)?;
    if inode.is_directory() {
        return Err(FsError::NotPermitted.into());
    }
    txn.changeable(&inode)?;
    if inode.nlink == 0 {
        return Err(FsError::NotFound.into());
    }
    quota::adopt(txn, ino, &mut inode, dir.quota, false)?;
    dir::gain_name(txn, &mut inode)?;
    inode.parent = parent;
    dir::add_entry(txn, parent, &mut dir, &op.name, ino, inode.kind)?;
    txn.put_inode(parent, &dir)?;
    txn.put_inode(ino, &inode)?;
    Ok(v1::Reply {
        attr: Some(inode.attr(ino)),
        parent: Some(dir.attr(parent)),
        ..v1::Reply::default()
    })
}

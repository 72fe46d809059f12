//! unlink and rmdir.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1;

use super::{dir, trash};
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Removes a name. What loses its last name goes to the trash, if the volume has one; else it becomes an orphan, which `Reap`
/// removes once nobody has it open.
pub(crate) fn unlink<V: View>(txn: &mut Txn<V>, op: &v1::Unlink) -> OpResult {
    let parent = Ino(op.parent);
    trash::protect(txn, parent, &op.name)?;
    let mut dir = dir::live_directory(txn, parent)?;
    let entry = dir::existing_entry(txn, parent, &op.name)?;
    let mut inode = txn.named_inode(entry.ino)?;
    match (op.directory, inode.is_directory()) {
        (false, true) => return Err(FsError::IsDirectory.into()),
        (true, false) => return Err(FsError::NotDirectory.into()),
        // A directory's size is the sum of the lengths of its names, and no name is empty.
        (true, true) if inode.size > 0 => return Err(FsError::NotEmpty.into()),
        _ => {}
    }
    txn.changeable(&inode)?;
    dir::remove_entry(txn, parent, &mut dir, &op.name, &entry)?;
    txn.put_inode(parent, &dir)?;
    let mut reply = v1::Reply::default();
    dir::lose_name_or_keep(txn, (parent, &op.name), entry.ino, &mut inode, &mut reply)?;
    reply.attr = Some(inode.attr(entry.ino));
    // Read anew: the trash's own directory may have been made in it.
    reply.parent = Some(txn.inode(parent)?.attr(parent));
    Ok(reply)
}

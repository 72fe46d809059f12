//! unlink and rmdir.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1;

use super::dir;
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Removes a name. The last name of an inode makes it an orphan, which `Reap` removes once nobody has it open.
pub(crate) fn unlink<V: View>(txn: &mut Txn<V>, op: &v1::Unlink) -> OpResult {
    let parent = Ino(op.parent);
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
    dir::remove_entry(txn, parent, &mut dir, &op.name, &entry)?;
    txn.put_inode(parent, &dir)?;
    let orphaned = dir::lose_name(txn, entry.ino, &mut inode)?;
    Ok(v1::Reply {
        attr: Some(inode.attr(entry.ino)),
        parent: Some(dir.attr(parent)),
        orphaned,
        ..v1::Reply::default()
    })
}

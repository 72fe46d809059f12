//! Fallocate: extends files and punches holes.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::limits::FILE_BYTES_MAX;
use heliofs_proto::v1;

use super::segments::Balance;
use super::{extents, privileges};
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Extends the file (unless `keep_size`), or makes a range read as zeros.
///
/// Nothing is reserved: objects have no places to reserve, so that a later write may still find the volume full.
///
/// Refused: `STALE`; `IS_DIRECTORY`; `INVALID` for other files without content and for length 0; `NOT_SUPPORTED` for punching and
/// zeroing at once; `FILE_TOO_LARGE`; `BUSY` if too many erasures of the file wait.
/// Source: fallocate(2); ext4_fallocate for the times, which all modes set.
pub(crate) fn fallocate<V: View>(txn: &mut Txn<V>, op: &v1::Fallocate) -> OpResult {
    let ino = Ino(op.ino);
    let mut inode = txn.inode(ino)?;
    extents::regular(&inode)?;
    txn.changeable(&inode)?;
    if op.punch_hole && op.zero_range {
        return Err(FsError::NotSupported.into());
    }
    if op.length == 0 {
        return Err(FsError::Invalid.into());
    }
    let end = op.offset.checked_add(op.length);
    let end = end.filter(|end| *end <= FILE_BYTES_MAX);
    let end = end.ok_or(FsError::FileTooLarge)?;

    let size_before = inode.size;
    let erases = op.punch_hole || op.zero_range;
    if erases {
        let mut balance = Balance::default();
        extents::erase(txn, ino, &mut inode, (op.offset, end), &mut balance)?;
        balance.settle(txn)?;
    }
    if !op.punch_hole && !op.keep_size {
        inode.size = inode.size.max(end);
    }
    if erases || inode.size != size_before {
        extents::content_changed(txn, ino, &mut inode);
    }
    privileges::drop_capability(txn, ino, &mut inode)?;
    if op.kill_suidgid {
        privileges::kill_suidgid(&mut inode);
    }
    inode.mtime = txn.time;
    inode.ctime = txn.time;
    txn.put_inode(ino, &inode)?;
    Ok(v1::Reply {
        attr: Some(inode.attr(ino)),
        ..v1::Reply::default()
    })
}

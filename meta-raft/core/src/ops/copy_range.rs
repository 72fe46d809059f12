//! CopyRange: shares extents between files.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::limits::FILE_BYTES_MAX;
use heliofs_proto::v1;

use super::segments::Balance;
use super::{extents, privileges};
use crate::limits::EXTENTS_PER_COPY;
use crate::records::ExtentRecord;
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Makes a range of the target read as a range of the source does; `value` is how many bytes, fewer than asked for at the source's
/// end and when its range has many extents, 0 at or behind the source's end.
///
/// The bytes count as used once per file that shows them.
/// Refused: `STALE`; `IS_DIRECTORY`; `INVALID` for other files without content and for overlapping ranges of one file;
/// `FILE_TOO_LARGE`; `NO_SPACE`; `BUSY` if too many erasures of the target wait. Source: copy_file_range(2).
pub(crate) fn copy_range<V: View>(txn: &mut Txn<V>, op: &v1::CopyRange) -> OpResult {
    let (source_ino, ino) = (Ino(op.source), Ino(op.target));
    let source = txn.inode(source_ino)?;
    let mut inode = txn.inode(ino)?;
    extents::regular(&source)?;
    extents::regular(&inode)?;
    txn.changeable(&inode)?;

    let length = op.length.min(source.size.saturating_sub(op.source_offset));
    let target_end = op.target_offset.checked_add(length);
    if target_end.is_none_or(|end| end > FILE_BYTES_MAX) {
        return Err(FsError::FileTooLarge.into());
    }
    let apart = op.source_offset.abs_diff(op.target_offset);
    if source_ino == ino && length > 0 && apart < length {
        return Err(FsError::Invalid.into());
    }
    let page = extents::live_extents(
        txn.view(),
        txn.volume,
        source_ino,
        &source,
        op.source_offset,
        length,
        EXTENTS_PER_COPY,
    )?;
    let copied = length.min(page.complete_to - op.source_offset);
    if copied > 0 {
        let source_end = op.source_offset + copied;
        let mut balance = Balance::growing();
        let target = (op.target_offset, op.target_offset + copied);
        extents::erase(txn, ino, &mut inode, target, &mut balance)?;
        for (start, extent) in &page.extents {
            let from = op.source_offset.max(*start);
            let to = source_end.min(start + extent.length);
            if from < to {
                let shared = ExtentRecord {
                    seq: txn.position.seq,
                    ..extent.part(from - start, to - from)
                };
                let offset = op.target_offset + (from - op.source_offset);
                extents::write(txn, ino, &mut inode, offset, &shared, &mut balance)?;
            }
        }
        balance.settle(txn)?;
        inode.size = inode.size.max(target.1);
        extents::content_changed(txn, ino, &mut inode);
        privileges::drop_capability(txn, ino, &mut inode)?;
        if op.kill_suidgid {
            privileges::kill_suidgid(&mut inode);
        }
        inode.mtime = txn.time;
        inode.ctime = txn.time;
        txn.put_inode(ino, &inode)?;
    }
    Ok(v1::Reply {
        attr: Some(inode.attr(ino)),
        value: copied,
        ..v1::Reply::default()
    })
}

//! Extents of one file: reading the live ones, erasing ranges, writing over what is there.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, VolumeId};
use heliofs_proto::limits::{FILE_BYTES_MAX, FRAME_BYTES_MAX};
use heliofs_proto::v1::FileKind;

use super::erase::{Erased, erase_inner, offset_of};
use super::segments::Balance;
use crate::change::Corruption;
use crate::keys;
use crate::limits::EXTENTS_EXAMINED_MAX;
use crate::records::{ExtentData, ExtentRecord, InodeRecord, Record};
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// A page of a file's live extents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LiveExtents {
    /// By first byte, ascending and not overlapping; whole as they are stored.
    pub(crate) extents: Vec<(u64, ExtentRecord)>,
    /// Nothing is missing for file offsets below this; `u64::MAX`: nothing of what was asked for is missing.
    pub(crate) complete_to: u64,
}

/// `IS_DIRECTORY` or `INVALID` unless it is a regular file.
pub(crate) fn regular(inode: &InodeRecord) -> Result<(), FsError> {
    match inode.kind {
        FileKind::File => Ok(()),
        FileKind::Directory => Err(FsError::IsDirectory),
        _ => Err(FsError::Invalid),
    }
}

/// Live extents that intersect `[offset, offset + length)`, the first `extents_max` of them; the first may begin before
/// `offset`. Erased ones that are not removed yet are left out.
///
/// `complete_to` is above `offset` unless `extents_max` is 0, so that a caller who goes on there gets to the end.
pub(crate) fn live_extents(
    view: &impl View,
    volume: VolumeId,
    ino: Ino,
    inode: &InodeRecord,
    offset: u64,
    length: u64,
    extents_max: usize,
) -> Result<LiveExtents, Corruption> {
    let mut found = LiveExtents {
        extents: Vec::new(),
        complete_to: u64::MAX,
    };
    if length == 0 || inode.allocated == 0 {
        return Ok(found);
    }
    if extents_max == 0 {
        found.complete_to = offset;
        return Ok(found);
    }
    let erased = Erased::load(view, volume, ino, inode)?;
    let before = last_live_before(view, volume, ino, &erased, offset)?;
    found
        .extents
        .extend(before.filter(|(start, extent)| start + extent.length > offset));

    let to = keys::extent(volume, ino, offset.saturating_add(length));
    let mut cursor = keys::extent(volume, ino, offset);
    let mut examined = 0;
    loop {
        // One more than asked for, to know where the next one begins.
        let wanted = (extents_max - found.extents.len() + 1).min(EXTENTS_EXAMINED_MAX - examined);
        let page = view.scan(&cursor, &to, wanted)?;
        examined += page.len();
        for (key, value) in &page {
            let start = offset_of(key)?;
            let extent = ExtentRecord::decode(key, value)?;
            if erased.kills(start, &extent) {
                continue;
            }
            if found.extents.len() == extents_max {
                found.complete_to = start;
                return Ok(found);
            }
            found.extents.push((start, extent));
        }
        let Some((last, _)) = page.last().filter(|_| page.len() == wanted) else {
            return Ok(found);
        };
        if examined == EXTENTS_EXAMINED_MAX {
            found.complete_to = offset_of(last)? + 1;
            return Ok(found);
        }
        cursor = keys::after(last);
    }
}

/// The last live extent that begins before `offset` and is near enough to reach it.
fn last_live_before(
    view: &impl View,
    volume: VolumeId,
    ino: Ino,
    erased: &Erased,
    offset: u64,
) -> Result<Option<(u64, ExtentRecord)>, Corruption> {
    // No extent is longer than a frame.
    let from = keys::extent(volume, ino, offset.saturating_sub(FRAME_BYTES_MAX));
    let mut to = keys::extent(volume, ino, offset);
    // The first record decides unless it is dead; then many dead ones may lie before the live one that covers them.
    let mut wanted = 1;
    loop {
        let page = view.scan_back(&from, &to, wanted)?;
        for (key, value) in &page {
            let start = offset_of(key)?;
            let extent = ExtentRecord::decode(key, value)?;
            if !erased.kills(start, &extent) {
                return Ok(Some((start, extent)));
            }
        }
        match page.last().filter(|_| page.len() == wanted) {
            Some((key, _)) => to = key.clone(),
            None => return Ok(None),
        }
        wanted = (wanted * 16).min(1024);
    }
}

/// Sets the file's size. What lies behind a smaller size is erased; a larger one reads as zeros there.
///
/// Sets `size`, `data_seq`, `allocated` and `erases` of `inode`; times, privileges and writing it are the caller's.
/// Refused: `FILE_TOO_LARGE`, `IS_DIRECTORY`, `INVALID` for anything else without content; `BUSY` if too many erasures wait.
pub(crate) fn truncate<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    new_size: u64,
) -> OpResult<()> {
    regular(inode)?;
    if new_size > FILE_BYTES_MAX {
        return Err(FsError::FileTooLarge.into());
    }
    if new_size == inode.size {
        return Ok(());
    }
    if new_size < inode.size {
        let mut balance = Balance::default();
        erase(txn, ino, inode, (new_size, FILE_BYTES_MAX), &mut balance)?;
        balance.settle(txn)?;
    }
    inode.size = new_size;
    content_changed(txn, ino, inode);
    Ok(())
}

/// Marks the content as changed by this command.
pub(crate) fn content_changed<V: View>(txn: &mut Txn<V>, ino: Ino, inode: &mut InodeRecord) {
    inode.data_seq = txn.position.seq;
    txn.touch(ino, true, true, false);
}

/// Makes [from, to) of a file a hole and returns the last live extent before it, if that is near.
///
/// Refused: `BUSY` if too many erasures of this file wait.
pub(crate) fn erase<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    (from, to): (u64, u64),
    balance: &mut Balance,
) -> OpResult<Option<(u64, ExtentRecord)>> {
    if from >= to || inode.allocated == 0 {
        return Ok(None);
    }
    let (volume, size) = (txn.volume, inode.size);
    let erased = Erased::load(txn.view(), volume, ino, inode)?;
    let mut left = last_live_before(txn.view(), volume, ino, &erased, from)?;
    // No live extent reaches behind the size; dead ones lie under their ranges.
    if from >= size {
        return Ok(left);
    }
    let mut covered = false;
    if let Some((start, extent)) = &mut left
        && *start + extent.length > from
    {
        let end = *start + extent.length;
        covered = end >= to;
        if end > to {
            put(
                txn,
                ino,
                inode,
                to,
                &extent.part(to - *start, end - to),
                balance,
            )?;
        }
        *extent = extent.part(0, from - *start);
        put(txn, ino, inode, *start, extent, balance)?;
    }
    // An extent that begins inside and reaches over the end.
    if !covered
        && to < size
        && let Some((start, extent)) = last_live_before(txn.view(), volume, ino, &erased, to)?
        && start >= from
        && start + extent.length > to
    {
        let end = start + extent.length;
        balance.remove(ino, inode, &extent)?;
        txn.remove(keys::extent(volume, ino, start))?;
        put(
            txn,
            ino,
            inode,
            to,
            &extent.part(to - start, end - to),
            balance,
        )?;
    }
    if !covered {
        erase_inner(txn, ino, inode, erased, (from, to), balance)?;
    }
    Ok(left)
}

/// Stores an extent in place of whatever lies in its range; the file reaches at least to its end.
///
/// Refused: `BUSY` if too many erasures of this file wait.
pub(crate) fn write<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    offset: u64,
    extent: &ExtentRecord,
    balance: &mut Balance,
) -> OpResult<()> {
    let range = (offset, offset + extent.length);
    let left = erase(txn, ino, inode, range, balance)?;
    if let Some((start, left)) = left
        && start + left.length == offset
        && let Some(joined) = joined(&left, extent)
    {
        put(txn, ino, inode, start, &joined, balance)?;
    } else {
        put(txn, ino, inode, offset, extent, balance)?;
    }
    inode.size = inode.size.max(range.1);
    Ok(())
}

/// [`write()`] for a file that has nothing stored at or behind `offset`, dead or live, nor had when the command began.
pub(crate) fn write_fresh<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    offset: u64,
    extent: &ExtentRecord,
    balance: &mut Balance,
) -> OpResult<()> {
    balance.add(ino, inode, extent)?;
    txn.put_fresh(keys::extent(txn.volume, ino, offset), extent);
    inode.size = inode.size.max(offset + extent.length);
    Ok(())
}

/// Stores an extent under its key; what was under that key is gone.
pub(super) fn put<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    offset: u64,
    extent: &ExtentRecord,
    balance: &mut Balance,
) -> Result<(), Corruption> {
    let key = keys::extent(txn.volume, ino, offset);
    // First added, then removed: no count falls below what it ends with.
    balance.add(ino, inode, extent)?;
    if let Some(replaced) = txn.get::<ExtentRecord>(&key)? {
        balance.undefer(ino, inode, offset);
        balance.remove(ino, inode, &replaced)?;
    }
    txn.put(key, extent)
}

/// Both as one, if `right` continues `left` in the same frame. `right` is the newer one: a live extent may become younger, since
/// only age kills.
fn joined(left: &ExtentRecord, right: &ExtentRecord) -> Option<ExtentRecord> {
    let (
        ExtentData::Segment {
            segment,
            frame,
            frame_offset,
        },
        ExtentData::Segment {
            segment: right_segment,
            frame: right_frame,
            frame_offset: right_offset,
        },
    ) = (&left.data, &right.data)
    else {
        return None;
    };
    let continues = (segment, frame) == (right_segment, right_frame)
        && u64::from(*frame_offset) + left.length == u64::from(*right_offset);
    let length = left.length + right.length;
    (continues && length <= FRAME_BYTES_MAX).then(|| ExtentRecord {
        length,
        seq: right.seq,
        data: left.data.clone(),
    })
}

//! Relocate: extents follow bytes that compaction has copied.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, SegmentId};
use heliofs_proto::limits::{COMMIT_EXTENTS_MAX, FILE_BYTES_MAX, FRAME_BYTES_MAX};
use heliofs_proto::v1::{self, FileKind};

use super::commit::Named;
use super::extents;
use super::segments::Balance;
use crate::keys;
use crate::limits::{MOVES_PER_RELOCATE, PARTS_PER_RELOCATE};
use crate::records::{ExtentData, ExtentRecord, InodeRecord};
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Lets extents name new places of the same bytes; `value` is how many bytes were moved. What no longer lies at the old place,
/// and files that are gone, are passed over; so is what exceeds [`PARTS_PER_RELOCATE`].
///
/// No reader is told: what clients know of the old places stays true until those segments are deleted, and then they ask again.
/// Refused: `INVALID` when there is too much of anything, a place makes no sense or a segment contradicts its record;
/// `SEGMENT_FENCED` if a new place is in a segment that this session may not commit or that was freed.
pub(crate) fn relocate<V: View>(txn: &mut Txn<V>, op: &v1::Relocate) -> OpResult {
    if op.moves.is_empty()
        || op.moves.len() > MOVES_PER_RELOCATE
        || op.segments.len() > COMMIT_EXTENTS_MAX
        || !op.moves.iter().all(makes_sense)
    {
        return Err(FsError::Invalid.into());
    }
    let mut balance = Balance::default();
    let targets = op.moves.iter().map(|each| SegmentId(each.to_segment));
    let named = Named::read(txn, &op.segments, targets, &mut balance)?;
    let fenced = |each: &v1::Move| !named.admits(SegmentId(each.to_segment));
    if op.moves.iter().any(fenced) {
        return Err(FsError::SegmentFenced.into());
    }
    let (mut moved, mut room) = (0, PARTS_PER_RELOCATE);
    for each in &op.moves {
        moved += follow(txn, each, &mut room, &mut balance)?;
    }
    balance.settle(txn)?;
    Ok(v1::Reply {
        value: moved,
        ..v1::Reply::default()
    })
}

fn makes_sense(each: &v1::Move) -> bool {
    let ends = |frame_offset: u32| u64::from(frame_offset).checked_add(each.length);
    let fits = |frame_offset| ends(frame_offset).is_some_and(|end| end <= FRAME_BYTES_MAX);
    let end = each.offset.checked_add(each.length);
    each.length > 0
        && end.is_some_and(|end| end <= FILE_BYTES_MAX)
        && each.from_segment != 0
        && each.to_segment != 0
        && each.from_segment != each.to_segment
        && fits(each.from_frame_offset)
        && fits(each.to_frame_offset)
}

/// Moves what still lies at the old place; returns its bytes.
fn follow<V: View>(
    txn: &mut Txn<V>,
    each: &v1::Move,
    room: &mut usize,
    balance: &mut Balance,
) -> OpResult<u64> {
    let ino = Ino(each.ino);
    let Some(mut inode) = txn.get::<InodeRecord>(&keys::inode(txn.volume, ino))? else {
        return Ok(0);
    };
    if inode.kind != FileKind::File {
        return Ok(0);
    }
    let page = extents::live_extents(
        txn.view(),
        txn.volume,
        ino,
        &inode,
        each.offset,
        each.length,
        *room,
    )?;
    let (mut moved, allocated) = (0, inode.allocated);
    for (start, extent) in page.extents {
        let end = start + extent.length;
        let (from, to) = (start.max(each.offset), end.min(each.offset + each.length));
        if from >= to || !lies_at(&extent, start, each) {
            continue;
        }
        *room -= 1;
        // Times, size and age stay: the content is the same.
        if start < from {
            let left = extent.part(0, from - start);
            extents::put(txn, ino, &mut inode, start, &left, balance)?;
        }
        let target = ExtentRecord {
            length: to - from,
            seq: extent.seq,
            data: ExtentData::Segment {
                segment: SegmentId(each.to_segment),
                frame: each.to_frame,
                // Within a frame: checked above.
                frame_offset: each.to_frame_offset + (from - each.offset) as u32,
            },
        };
        extents::put(txn, ino, &mut inode, from, &target, balance)?;
        if to < end {
            let right = extent.part(to - start, end - to);
            extents::put(txn, ino, &mut inode, to, &right, balance)?;
        }
        moved += to - from;
    }
    // As many bytes came as went; but a part that was cut off may lie over one that was dead and not removed yet.
    if inode.allocated != allocated {
        txn.put_inode(ino, &inode)?;
    }
    Ok(moved)
}

/// Whether the extent's bytes are those that were copied.
fn lies_at(extent: &ExtentRecord, start: u64, each: &v1::Move) -> bool {
    let ExtentData::Segment {
        segment,
        frame,
        frame_offset,
    } = extent.data
    else {
        return false;
    };
    // Where the extent's first byte would lie if it had been copied along.
    let expected = i128::from(each.from_frame_offset) + i128::from(start) - i128::from(each.offset);
    segment.0 == each.from_segment
        && frame == each.from_frame
        && i128::from(frame_offset) == expected
}

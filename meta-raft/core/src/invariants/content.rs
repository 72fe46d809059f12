//! Extents, erased ranges and segments: nothing overlaps, and every sum is what it sums.

use std::collections::BTreeMap;

use heliofs_proto::ids::{Ino, SegmentId, VolumeId};
use heliofs_proto::limits::{FILE_BYTES_MAX, SEGMENTS_PER_BLOCK};
use heliofs_proto::v1::FileKind;

use super::{Found, Records, decode, each_of, number};
use crate::change::Corruption;
use crate::keys::Tag;
use crate::records::{ExtentData, ExtentRecord};
use crate::view::View;

pub(super) fn check(
    view: &impl View,
    volume: VolumeId,
    records: &Records,
    found: &mut Found,
) -> Result<(), Corruption> {
    let part = records.part;
    let mut bytes = 0;
    let mut allocated: BTreeMap<Ino, u64> = BTreeMap::new();
    let mut live: BTreeMap<SegmentId, u64> = BTreeMap::new();
    // Where the last live extent of the file at hand ends.
    let mut end = (Ino(0), 0);
    each_of(view, volume, Tag::Extent, |key, value| {
        let (ino, offset) = (Ino(number(key, 0)?), number(key, 1)?);
        let extent: ExtentRecord = decode(key, value)?;
        bytes += extent.length;
        if let ExtentData::Segment { segment, .. } = extent.data
            && part.has(segment.0)
        {
            *live.entry(segment).or_default() += extent.length;
        }
        if !part.has_ino(ino) {
            return Ok(());
        }
        *allocated.entry(ino).or_default() += extent.length;
        let inode = records.inodes.get(&ino);
        found.expect(
            inode.is_some_and(|inode| inode.kind == FileKind::File),
            || format!("extent {ino}/{offset} belongs to no file"),
        );
        found.expect(
            extent.length > 0
                && offset
                    .checked_add(extent.length)
                    .is_some_and(|end| end <= FILE_BYTES_MAX),
            || format!("extent {ino}/{offset} has length {}", extent.length),
        );
        if is_dead(records, ino, offset, &extent) {
            return Ok(());
        }
        found.expect(end.0 != ino || end.1 <= offset, || {
            format!(
                "extent {ino}/{offset} overlaps the one before, which ends at {}",
                end.1
            )
        });
        end = (ino, offset.saturating_add(extent.length));
        found.expect(inode.is_none_or(|inode| end.1 <= inode.size), || {
            format!(
                "extent {ino}/{offset} ends at {}, behind the end of its file",
                end.1
            )
        });
        Ok(())
    })?;
    for (ino, inode) in &records.inodes {
        let sum = allocated.get(ino).copied().unwrap_or(0);
        found.expect(inode.allocated == sum, || {
            format!(
                "inode {ino} has allocated {}, its extents have {sum}",
                inode.allocated
            )
        });
        let ranges = records
            .erases
            .get(ino)
            .map_or(0, |erase| erase.ranges.len());
        found.expect(inode.erases as usize == ranges, || {
            format!(
                "inode {ino} counts {} erased ranges of {ranges}",
                inode.erases
            )
        });
    }
    for (ino, erase) in &records.erases {
        found.expect(records.inodes.contains_key(ino), || {
            format!("{ino} has erased ranges and does not exist")
        });
        let ascending = erase
            .ranges
            .windows(2)
            .all(|pair| pair[0].end <= pair[1].start);
        let none_empty = erase.ranges.iter().all(|range| range.start < range.end);
        found.expect(ascending && none_empty && !erase.ranges.is_empty(), || {
            format!("the erased ranges of {ino} are none or out of order")
        });
    }
    for (id, segment) in &records.segments {
        let sum = live.remove(id).unwrap_or(0);
        found.expect(segment.live_bytes == sum && sum > 0, || {
            format!(
                "segment {id} has {} live bytes, extents name {sum}",
                segment.live_bytes
            )
        });
        found.expect(was_brought(records, *id), || {
            format!("segment {id} lives and its block says that nobody brought it")
        });
    }
    for id in live.keys() {
        found.expect(false, || {
            format!("extents name segment {id}, which has no record")
        });
    }
    let used = records.counters.used_bytes;
    found.expect(!part.is_first() || used == bytes, || {
        format!("{used} bytes count as used, extents have {bytes}")
    });
    Ok(())
}

fn is_dead(records: &Records, ino: Ino, offset: u64, extent: &ExtentRecord) -> bool {
    let erase = records.erases.get(&ino);
    erase.is_some_and(|erase| {
        let mut ranges = erase.ranges.iter();
        ranges.any(|range| (range.start..range.end).contains(&offset) && extent.seq < range.seq)
    })
}

fn was_brought(records: &Records, id: SegmentId) -> bool {
    let block = records.blocks.get(&(id.0 / SEGMENTS_PER_BLOCK));
    let bit = (id.0 % SEGMENTS_PER_BLOCK) as usize;
    block.is_some_and(|block| block.brought[bit / 8] & 1 << (bit % 8) != 0)
}

//! What must hold of the records of files at any time.

use std::collections::BTreeMap;

use heliofs_proto::ids::{Ino, SegmentId};
use meta_core::keys::{self, Tag};
use meta_core::records::{
    EraseRecord, ExtentData, ExtentRecord, InodeRecord, Record, SegmentRecord,
};
use meta_core::{Sums, invariants, query};

use crate::world::{Records, VOLUME, World};

fn all<R: Record>(records: &Records, tag: Tag) -> impl Iterator<Item = (u64, Option<u64>, R)> {
    let (from, to) = keys::tag_range(VOLUME, tag);
    records.range(from..to).map(|(key, value)| {
        let record = R::decode(key, value).expect("records can be read");
        let first = keys::number(key, 0).expect("keys have a number");
        (first, keys::number(key, 1), record)
    })
}

/// Panics with what is wrong.
pub(crate) fn check(world: &World) {
    let records = &world.records;
    if let Err(contradictions) = invariants::check(records, VOLUME) {
        panic!("{contradictions:#?}");
    }
    for index in 0..3 {
        let part = invariants::Part { index, of: 3 };
        if let Err(contradictions) = invariants::check_part(records, VOLUME, part) {
            panic!("{part:?}: {contradictions:#?}");
        }
    }
    let mut recomputed = Sums::default();
    for (key, value) in records {
        recomputed.add(key, value);
    }
    assert_eq!(world.sums, recomputed, "digest");

    let mut allocated = BTreeMap::<u64, u64>::new();
    let mut live_bytes = BTreeMap::<u64, u64>::new();
    let erased: BTreeMap<u64, EraseRecord> = all(records, Tag::Erase)
        .map(|(ino, _, record)| (ino, record))
        .collect();
    let inodes: BTreeMap<u64, InodeRecord> = all(records, Tag::Inode)
        .map(|(ino, _, record)| (ino, record))
        .collect();
    for (ino, record) in &erased {
        assert_eq!(inodes[ino].erases as usize, record.ranges.len());
        let mut behind = 0;
        for range in &record.ranges {
            assert!(range.start >= behind && range.start < range.end);
            behind = range.end;
        }
    }
    let mut live_end = (0, 0);
    for (ino, offset, extent) in all::<ExtentRecord>(records, Tag::Extent) {
        let offset = offset.expect("keys of extents have an offset");
        assert!(extent.length > 0);
        *allocated.entry(ino).or_default() += extent.length;
        if let ExtentData::Segment { segment, .. } = extent.data {
            *live_bytes.entry(segment.0).or_default() += extent.length;
        }
        let ranges = erased.get(&ino).map_or(&[][..], |record| &record.ranges);
        let dead = ranges
            .iter()
            .any(|range| (range.start..range.end).contains(&offset) && extent.seq < range.seq);
        if dead {
            continue;
        }
        let end = offset + extent.length;
        for range in ranges {
            let overlaps = offset < range.end && range.start < end;
            assert!(!overlaps || extent.seq >= range.seq, "older than a range");
        }
        assert!(live_end.0 != ino || live_end.1 <= offset, "live overlap");
        live_end = (ino, end);
        assert!(end <= inodes[&ino].size, "an extent behind the end");
    }
    for (ino, inode) in &inodes {
        assert_eq!(inode.allocated, allocated.remove(ino).unwrap_or(0));
        assert!(inode.erases == 0 || erased.contains_key(ino));
    }
    assert!(allocated.is_empty(), "extents without an inode");
    let counters = query::counters(records, VOLUME).expect("counters can be read");
    let used: u64 = inodes.values().map(|inode| inode.allocated).sum();
    assert_eq!(counters.used_bytes, used);
    assert_eq!(counters.used_inodes, inodes.len() as u64);
    let mut segments = 0;
    for (id, _, segment) in all::<SegmentRecord>(records, Tag::Segment) {
        segments += 1;
        assert!(segment.live_bytes > 0);
        assert_eq!(Some(segment.live_bytes), live_bytes.remove(&id));
        assert!(!world.freed.contains(&id), "a freed segment lives");
    }
    assert!(live_bytes.is_empty(), "extents of unknown segments");
    assert_eq!(counters.segments, segments);
}

/// Whether the segment has a record.
pub(crate) fn has_segment(world: &World, segment: u64) -> bool {
    world
        .records
        .contains_key(&keys::segment(VOLUME, SegmentId(segment)))
}

/// The stored inode.
pub(crate) fn inode(world: &World, ino: u64) -> InodeRecord {
    let key = keys::inode(VOLUME, Ino(ino));
    InodeRecord::decode(&key, &world.records[&key]).expect("inodes can be read")
}

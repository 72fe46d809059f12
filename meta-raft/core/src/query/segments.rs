//! Segments for gc, fsck and compaction: which there are, whose an id is, which extents name them.

use std::collections::BTreeSet;

use heliofs_proto::ids::{Ino, SegmentId, VolumeId};
use heliofs_proto::limits::SEGMENTS_PER_BLOCK;

use super::{PAGE_MAX, get, key_number};
use crate::change::Corruption;
use crate::keys::{self, Tag};
use crate::ops::erase::offset_of;
use crate::records::{ExtentData, ExtentRecord, Record, SegmentBlockRecord, SegmentRecord};
use crate::view::View;

/// Segments with ids above `after`, ascending, at most `max` of them (and at most [`PAGE_MAX`]).
pub fn segments(
    view: &impl View,
    volume: VolumeId,
    after: SegmentId,
    max: usize,
) -> Result<Vec<(SegmentId, SegmentRecord)>, Corruption> {
    let (_, to) = keys::tag_range(volume, Tag::Segment);
    let from = keys::after(&keys::segment(volume, after));
    view.scan(&from, &to, max.min(PAGE_MAX))?
        .iter()
        .map(|(key, value)| {
            Ok((
                SegmentId(key_number(key, 0)?),
                SegmentRecord::decode(key, value)?,
            ))
        })
        .collect()
}

/// What the records say of a segment id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    /// No block holds it: never given out.
    Unknown,
    /// Extents refer to it.
    Live,
    /// Its session lives and may still commit it.
    Open,
    /// Nothing refers to it, and nothing ever will: it was freed, or its session ended without committing it.
    Closed,
}

/// Who, if anybody, has a claim to a segment id.
pub fn claim(view: &impl View, volume: VolumeId, segment: SegmentId) -> Result<Claim, Corruption> {
    if view.get(&keys::segment(volume, segment))?.is_some() {
        return Ok(Claim::Live);
    }
    let block: Option<SegmentBlockRecord> = get(view, &keys::segment_block(volume, segment))?;
    let Some(block) = block else {
        return Ok(Claim::Unknown);
    };
    let bit = (segment.0 % SEGMENTS_PER_BLOCK) as usize;
    let brought = block.brought[bit / 8] & 1 << (bit % 8) != 0;
    let lives = view.get(&keys::session(volume, block.session))?.is_some();
    // Brought and without a record: freed, and the core never lets it live again.
    Ok(if lives && !brought {
        Claim::Open
    } else {
        Claim::Closed
    })
}

/// A page of stored extents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// (file, offset, extent), ascending; dead ones too.
    pub extents: Vec<(Ino, u64, ExtentRecord)>,
    /// Where to go on; `None`: that was all.
    pub next: Option<(Ino, u64)>,
}

/// Stored extents from `from` on that name one of `wanted`, or any segment if that is empty. Looks at no more than
/// [`PAGE_MAX`] extents.
pub fn extents_of(
    view: &impl View,
    volume: VolumeId,
    from: (Ino, u64),
    wanted: &BTreeSet<SegmentId>,
) -> Result<Placed, Corruption> {
    let (_, to) = keys::tag_range(volume, Tag::Extent);
    let page = view.scan(&keys::extent(volume, from.0, from.1), &to, PAGE_MAX)?;
    let mut placed = Placed::default();
    if let Some((last, _)) = page.last().filter(|_| page.len() == PAGE_MAX) {
        // No extent begins at the greatest offset.
        placed.next = Some((Ino(key_number(last, 0)?), offset_of(last)? + 1));
    }
    for (key, value) in &page {
        let extent = ExtentRecord::decode(key, value)?;
        if let ExtentData::Segment { segment, .. } = extent.data
            && (wanted.is_empty() || wanted.contains(&segment))
        {
            placed
                .extents
                .push((Ino(key_number(key, 0)?), offset_of(key)?, extent));
        }
    }
    Ok(placed)
}

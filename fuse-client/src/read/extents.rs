//! What is known of one file's committed extents; pure.

use std::collections::BTreeMap;
use std::ops::Range;

use blockstore::FrameRange;
use bytes::Bytes;
use heliofs_proto::v1;

/// Extents kept per file; beyond that all are forgotten, since they can be fetched again.
const EXTENTS_MAX: usize = 1 << 16;

/// Where a part of a file's bytes comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Zeros.
    Hole,
    /// The bytes themselves.
    Inline(Bytes),
    /// A part of a frame.
    Frame(FrameRange),
}

/// A part of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// File offset of its first byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Where they are.
    pub source: Source,
}

/// The extents of a file, as far as they were fetched.
#[derive(Debug, Default)]
pub struct ExtentMap {
    extents: BTreeMap<u64, v1::Extent>,
    /// Start → end of the ranges for which `extents` is complete; disjoint, not touching.
    known: BTreeMap<u64, u64>,
}

/// The part of an extent inside `range`; `None` when there is none.
fn clip(extent: &v1::Extent, range: &Range<u64>) -> Option<v1::Extent> {
    let end = extent.offset.checked_add(extent.length)?;
    let (from, to) = (range.start.max(extent.offset), range.end.min(end));
    if from >= to {
        return None;
    }
    let skip = from - extent.offset;
    let mut part = extent.clone();
    part.offset = from;
    part.length = to - from;
    if extent.segment == 0 {
        let (skip, to) = (skip as usize, (to - extent.offset) as usize);
        // An inline extent that is shorter than it says is corrupt; the missing rest must not panic here.
        part.inline_bytes = extent
            .inline_bytes
            .slice(skip.min(extent.inline_bytes.len())..to.min(extent.inline_bytes.len()));
    } else {
        part.frame_offset = u32::try_from(u64::from(extent.frame_offset) + skip).ok()?;
    }
    Some(part)
}

impl ExtentMap {
    /// Forgets everything.
    pub fn clear(&mut self) {
        self.extents.clear();
        self.known.clear();
    }

    /// Takes a page that is complete for `range`.
    pub fn insert_page(&mut self, range: Range<u64>, extents: &[v1::Extent]) {
        if self.extents.len() + extents.len() > EXTENTS_MAX {
            self.clear();
        }
        self.remove(&range);
        for extent in extents {
            if let Some(part) = clip(extent, &range) {
                self.extents.insert(part.offset, part);
            }
        }
        self.learn(range);
    }

    /// Takes an extent that replaced whatever was in its range.
    pub fn overlay(&mut self, extent: &v1::Extent) {
        let range = extent.offset..extent.offset.saturating_add(extent.length);
        self.remove(&range);
        self.extents.insert(extent.offset, extent.clone());
        self.learn(range);
    }

    /// The file was cut (or had nothing) from `size` on.
    pub fn truncate(&mut self, size: u64) {
        self.remove(&(size..u64::MAX));
        self.learn(size..u64::MAX);
    }

    fn learn(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        let touching: Vec<u64> = self
            .known
            .range(..=range.end)
            .filter(|&(_, &to)| to >= range.start)
            .map(|(&from, _)| from)
            .collect();
        for from in touching {
            if let Some(to) = self.known.remove(&from) {
                start = start.min(from);
                end = end.max(to);
            }
        }
        self.known.insert(start, end);
    }

    fn remove(&mut self, range: &Range<u64>) {
        if range.start >= range.end {
            return;
        }
        if let Some((_, before)) = self.extents.range(..range.start).next_back() {
            let before = before.clone();
            if before.offset + before.length > range.start {
                self.replace(&before, range);
            }
        }
        let inside: Vec<v1::Extent> = self
            .extents
            .range(range.clone())
            .map(|(_, extent)| extent.clone())
            .collect();
        for extent in inside {
            self.replace(&extent, range);
        }
    }

    /// Puts what is left of `extent` outside `range` in its place.
    fn replace(&mut self, extent: &v1::Extent, range: &Range<u64>) {
        self.extents.remove(&extent.offset);
        for part in [
            clip(extent, &(0..range.start)),
            clip(extent, &(range.end..u64::MAX)),
        ]
        .into_iter()
        .flatten()
        {
            self.extents.insert(part.offset, part);
        }
    }

    /// The parts of `range`, in file order and without gaps. Error: the first offset that is not known.
    pub fn plan(&self, range: Range<u64>) -> Result<Vec<Part>, u64> {
        let known_to = self
            .known
            .range(..=range.start)
            .next_back()
            .map_or(0, |(_, &to)| to);
        if known_to <= range.start && range.start < range.end {
            return Err(range.start);
        }
        if known_to < range.end {
            return Err(known_to);
        }
        let mut parts = Vec::new();
        let mut at = range.start;
        let first = self
            .extents
            .range(..=range.start)
            .next_back()
            .map_or(range.start, |(&from, _)| from);
        for (_, extent) in self.extents.range(first..range.end) {
            let Some(part) = clip(extent, &range) else {
                continue;
            };
            push_hole(&mut parts, at, part.offset);
            at = part.offset + part.length;
            parts.push(Part {
                offset: part.offset,
                length: part.length,
                source: match FrameRange::of_extent(extent, range.clone()) {
                    Some(frame) => Source::Frame(frame),
                    None => Source::Inline(part.inline_bytes),
                },
            });
        }
        push_hole(&mut parts, at, range.end);
        Ok(parts)
    }
}

fn push_hole(parts: &mut Vec<Part>, from: u64, to: u64) {
    if from < to {
        parts.push(Part {
            offset: from,
            length: to - from,
            source: Source::Hole,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extent(offset: u64, length: u64, segment: u64) -> v1::Extent {
        v1::Extent {
            offset,
            length,
            segment,
            frame: 0,
            frame_offset: 0,
            inline_bytes: Bytes::new(),
            seq: 0,
        }
    }

    #[test]
    fn what_was_not_fetched_is_not_answered() {
        let mut map = ExtentMap::default();
        assert_eq!(map.plan(0..10), Err(0));
        map.insert_page(0..100, &[extent(10, 20, 7)]);
        assert_eq!(map.plan(50..150), Err(100));
        assert_eq!(map.plan(200..300), Err(200));
        let parts = map.plan(0..40).unwrap();
        assert_eq!(parts.len(), 3);
        assert_eq!(parts[0].source, Source::Hole);
        map.insert_page(100..u64::MAX, &[]);
        assert!(map.plan(0..1 << 40).is_ok());
    }

    #[test]
    fn an_inline_extent_is_cut_with_its_bytes() {
        let mut map = ExtentMap::default();
        let mut inline = extent(0, 10, 0);
        inline.inline_bytes = Bytes::from_static(b"0123456789");
        map.insert_page(0..u64::MAX, &[inline]);
        map.overlay(&extent(3, 2, 9));
        let parts = map.plan(0..10).unwrap();
        assert_eq!(parts[0].source, Source::Inline(Bytes::from_static(b"012")));
        assert_eq!(
            parts[2].source,
            Source::Inline(Bytes::from_static(b"56789"))
        );
    }

    proptest! {
        /// Every byte is named after the command that wrote it last.
        #[test]
        fn overlays_and_cuts_agree_with_an_array(steps in proptest::collection::vec((0u64..200, 1u64..60, any::<bool>()), 1..40)) {
            let mut map = ExtentMap::default();
            map.truncate(0);
            let mut array = vec![(0u64, 0u64); 400];
            for (number, (offset, length, cut)) in steps.into_iter().enumerate() {
                if cut {
                    map.truncate(offset);
                    array[offset as usize..].fill((0, 0));
                } else {
                    let segment = number as u64 + 1;
                    map.overlay(&extent(offset, length, segment));
                    for at in offset..offset + length {
                        array[at as usize] = (segment, at - offset);
                    }
                }
            }
            for part in map.plan(0..400).unwrap() {
                for at in part.offset..part.offset + part.length {
                    let expected = array[at as usize];
                    match &part.source {
                        Source::Hole => prop_assert_eq!(expected, (0, 0)),
                        Source::Frame(frame) => prop_assert_eq!(
                            expected,
                            (frame.segment.0, u64::from(frame.offset) + at - part.offset)
                        ),
                        Source::Inline(_) => prop_assert!(false),
                    }
                }
            }
        }
    }
}

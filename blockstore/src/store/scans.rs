//! How far a fetch reaches: whoever reads the small files of a segment one after the other gets more of them with each request.
//!
//! Files that were written together lie side by side as frames of one segment. A fetch of a frame's first page that begins where
//! the last fetch from the segment ended takes four times as much as that did, up to a whole segment; the frames that come along
//! go into the memory tier. The growth carries over from a segment's end to the next segment's beginning. Reads here and there, and those inside large frames (which read-ahead serves), take what they need.

use std::num::NonZeroUsize;
use std::ops::Range;

use heliofs_proto::ids::SegmentId;
use lru::LruCache;
use parking_lot::Mutex;

use crate::segment::layout::{HEADER_BYTES, PAGE_STRIDE};

/// Segments that are remembered.
const SEGMENTS_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("the number is not 0");

/// Growth from fetch to fetch.
const FACTOR: u64 = 4;

/// Longest fetch, bytes: a segment of the usual size.
const FETCH_BYTES_MAX: u64 = 4 << 20;

/// The last fetch from each segment.
#[derive(Debug)]
pub(super) struct Scans {
    last: Mutex<Last>,
}

#[derive(Debug)]
struct Last {
    fetches: LruCache<SegmentId, Range<u64>>,
    /// Length of the newest fetch, if it reached the end of its segment.
    ended: Option<u64>,
}

impl Scans {
    pub(super) fn new() -> Self {
        Self {
            last: Mutex::new(Last {
                fetches: LruCache::new(SEGMENTS_MAX),
                ended: None,
            }),
        }
    }

    /// What to fetch when `wanted` (bytes of the object, the beginning of a frame) is missing.
    pub(super) fn reach(&self, segment: SegmentId, wanted: Range<u64>) -> Range<u64> {
        let mut last = self.last.lock();
        let goes_on = |last: &Range<u64>| {
            // Its last frame was cut off, or the next one is the first that is missing.
            last.start < wanted.start && wanted.start < last.end + PAGE_STRIDE as u64
        };
        let before = match last.fetches.get(&segment) {
            Some(fetch) if goes_on(fetch) => fetch.end - fetch.start,
            None if wanted.start == HEADER_BYTES as u64 => last.ended.unwrap_or(0),
            _ => 0,
        };
        let length = (before * FACTOR).min(FETCH_BYTES_MAX);
        let reach = wanted.start..wanted.end.max(wanted.start + length);
        last.fetches.put(segment, reach.clone());
        last.ended = None;
        reach
    }

    /// A fetch that reached further than it had to met the end of its segment.
    pub(super) fn ended(&self, reach: &Range<u64>) {
        self.last.lock().ended = Some(reach.end - reach.start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: SegmentId = SegmentId(1);

    #[test]
    fn fetches_grow_while_the_frames_follow_each_other() {
        let scans = Scans::new();
        let page = PAGE_STRIDE as u64;
        assert_eq!(scans.reach(S, 64..64 + page), 64..64 + page);
        // The frame that the end of the fetch cut through.
        let second = scans.reach(S, page - 1000..2 * page - 1000);
        assert_eq!(second, page - 1000..5 * page - 1000);
        let third = scans.reach(S, second.end - 7..second.end + page);
        assert_eq!(third.end - third.start, 16 * page);
        let fourth = scans.reach(S, third.end + 16..third.end + page);
        assert_eq!(fourth.end - fourth.start, FETCH_BYTES_MAX);
        scans.ended(&fourth);
        let next = scans.reach(SegmentId(2), 64..64 + page);
        assert_eq!(next, 64..64 + FETCH_BYTES_MAX, "the next segment");
        assert_eq!(scans.reach(SegmentId(3), 64..64 + page), 64..64 + page);
        // Another place of a segment.
        let other = page..2 * page;
        assert_eq!(scans.reach(S, other.clone()), other);
    }

    #[test]
    fn reads_here_and_there_take_what_they_need() {
        let scans = Scans::new();
        let page = PAGE_STRIDE as u64;
        for at in [900, 3, 500, 700, 20, 21 + 5] {
            let wanted = at * page..(at + 1) * page;
            assert_eq!(scans.reach(S, wanted.clone()), wanted);
        }
    }
}

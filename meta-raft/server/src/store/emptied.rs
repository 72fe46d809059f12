//! Ranges of keys that are known to be empty: where a scan met nothing but what was removed.
//!
//! RocksDB keeps removed records until compaction, and a scan walks over them one by one. Work that removes a million records
//! in steps, each of which looks for the first that is left, would walk over all that went before in every step. Of the apply
//! task alone: only it writes, so that what it knows stays true until it writes there itself.

use std::collections::VecDeque;

use bytes::Bytes;

/// Ranges remembered; a file or tree that is taken apart needs one or two.
const RANGES_MAX: usize = 64;

/// What is known to be empty.
#[derive(Default)]
pub(super) struct Emptied {
    /// Half-open; the longest known come first.
    ranges: VecDeque<(Bytes, Bytes)>,
}

impl Emptied {
    /// Where a scan from `from` may begin: there is no record before.
    pub(super) fn skip(&self, from: &[u8]) -> Option<Bytes> {
        self.ranges
            .iter()
            .filter(|(start, end)| start[..] <= *from && *from < end[..])
            .map(|(_, end)| end.clone())
            .max()
    }

    /// There is no record in `[from, to)`.
    pub(super) fn learn(&mut self, from: &[u8], to: Bytes) {
        // The same place, a few steps later.
        self.ranges
            .retain(|(start, end)| !(*from <= start[..] && *end <= to));
        if self.ranges.len() == RANGES_MAX {
            self.ranges.pop_front();
        }
        self.ranges.push_back((Bytes::copy_from_slice(from), to));
    }

    /// A record is about to be written.
    pub(super) fn written(&mut self, key: &[u8]) {
        self.ranges
            .retain(|(start, end)| *key < start[..] || end[..] <= *key);
    }

    /// Other records have come in the place of some: nothing is known any more.
    pub(super) fn forget(&mut self) {
        self.ranges.clear();
    }

    /// Nothing is known.
    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_skipped_until_something_is_written_into_it() {
        let mut emptied = Emptied::default();
        emptied.learn(b"b", Bytes::from_static(b"f"));
        assert_eq!(emptied.skip(b"a"), None);
        assert_eq!(emptied.skip(b"b").as_deref(), Some(&b"f"[..]));
        assert_eq!(emptied.skip(b"e").as_deref(), Some(&b"f"[..]));
        assert_eq!(emptied.skip(b"f"), None);
        emptied.written(b"a");
        emptied.written(b"f");
        assert!(!emptied.is_empty());
        emptied.written(b"c");
        assert!(emptied.is_empty());
    }

    #[test]
    fn what_grows_takes_one_place_and_the_oldest_goes() {
        let mut emptied = Emptied::default();
        for end in [b"c", b"d", b"e"] {
            emptied.learn(b"b", Bytes::from_static(end));
        }
        assert_eq!(emptied.ranges.len(), 1);
        for n in 0..RANGES_MAX as u8 {
            emptied.learn(&[n + 150], Bytes::copy_from_slice(&[n + 150, 1]));
        }
        assert_eq!(emptied.ranges.len(), RANGES_MAX);
        assert_eq!(emptied.skip(b"b"), None);
    }
}

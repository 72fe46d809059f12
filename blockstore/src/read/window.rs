//! The read-ahead window of one open file: grows while reads are sequential, vanishes when they are not. Pure.
//!
//! Offsets are the file's, not a frame's: the caller turns the answer into extents, and those into ranges to prefetch.

use std::ops::Range;

/// Bounds of a window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadAheadOptions {
    /// The first window, bytes.
    pub bytes_min: u64,
    /// The largest, bytes: what is in flight or unread ahead of a sequential reader.
    pub bytes_max: u64,
}

impl Default for ReadAheadOptions {
    fn default() -> Self {
        Self {
            bytes_min: 128 << 10,
            bytes_max: 8 << 20,
        }
    }
}

/// How far from the expected offset a read still belongs to the stream: the kernel sends the reads of its own read-ahead in
/// parallel, and they arrive in any order.
const SLACK_BYTES: u64 = 1 << 20;

/// One open file's window.
#[derive(Clone, Debug)]
pub struct ReadAhead {
    options: ReadAheadOptions,
    /// Where the next sequential read begins: the furthest end of the stream's reads. `None` before the first read.
    expected: Option<u64>,
    /// Current size; 0 while reads are random.
    window: u64,
    /// What lies below was asked for already.
    asked: u64,
}

impl ReadAhead {
    /// A window before the first read.
    pub fn new(options: ReadAheadOptions) -> Self {
        Self {
            options,
            expected: None,
            window: 0,
            asked: 0,
        }
    }

    /// The reader asks for `[offset, offset + length)` of a file of `size` bytes; returns what should be fetched ahead now, all of
    /// it behind the read.
    ///
    /// A first read at offset 0 counts as sequential; elsewhere the second of two adjacent reads does. One read elsewhere ends
    /// the stream.
    pub fn read(&mut self, offset: u64, length: u64, size: u64) -> Option<Range<u64>> {
        let end = offset.saturating_add(length).min(size);
        let sequential = match self.expected {
            None => offset == 0,
            // While the window is closed only the exact continuation opens it: random reads in a small file come near each other.
            Some(expected) if self.window == 0 => offset == expected,
            Some(expected) => offset.abs_diff(expected) <= SLACK_BYTES,
        };
        if !sequential {
            self.expected = Some(end);
            self.window = 0;
            self.asked = end;
            return None;
        }
        let opened = self.window == 0;
        let advanced = self.expected.is_none_or(|expected| end > expected);
        self.expected = Some(self.expected.map_or(end, |expected| expected.max(end)));
        let front = self.expected.unwrap_or(end);
        if opened {
            self.window = self.options.bytes_min.min(self.options.bytes_max);
            self.asked = front;
        }
        self.asked = self.asked.max(front);
        if !advanced {
            return None;
        }
        // Ask in halves of the window: few large requests instead of one per read.
        let ahead = self.asked - front;
        if !opened && ahead > self.window / 2 {
            return None;
        }
        if !opened {
            self.window = (self.window * 2).min(self.options.bytes_max);
        }
        let until = front.saturating_add(self.window).min(size);
        let from = self.asked.min(until);
        self.asked = self.asked.max(until);
        (from < until).then_some(from..until)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn window() -> ReadAhead {
        ReadAhead::new(ReadAheadOptions::default())
    }

    #[test]
    fn a_sequential_reader_soon_has_the_largest_window_ahead() {
        let mut window = window();
        let mut asked = 0;
        let size = 64 * MIB;
        for offset in (0..size).step_by(128 << 10) {
            if let Some(range) = window.read(offset, 128 << 10, size) {
                assert_eq!(
                    range.start,
                    asked.max(offset + (128 << 10)),
                    "nothing twice, no gap"
                );
                asked = range.end;
            }
            if offset > 16 * MIB && asked < size {
                let ahead = asked - offset;
                assert!(
                    ahead > 4 * MIB && ahead <= 9 * MIB,
                    "{ahead} ahead at {offset}"
                );
            }
        }
        assert_eq!(asked, size);
    }

    #[test]
    fn a_random_reader_gets_nothing_ahead() {
        let mut window = window();
        for offset in [
            5 * MIB,
            91 * MIB,
            17 * MIB,
            3 * MIB,
            60 * MIB,
            60 * MIB + 8192,
        ] {
            assert_eq!(window.read(offset, 4096, 100 * MIB), None);
        }
    }

    #[test]
    fn reads_of_one_stream_may_overtake_each_other() {
        let mut window = window();
        let mut asked = 0;
        let step = 128 << 10;
        for pair in 0..40 {
            for offset in [(2 * pair + 1) * step, 2 * pair * step] {
                if pair == 0 {
                    continue;
                }
                if let Some(range) = window.read(offset, step, 100 * MIB) {
                    asked = range.end;
                }
            }
            if pair == 0 {
                window.read(0, 2 * step, 100 * MIB);
            }
        }
        assert!(asked > 10 * MIB + 4 * MIB);
    }

    #[test]
    fn a_jump_ends_the_stream_and_two_adjacent_reads_begin_one() {
        let mut window = window();
        assert!(window.read(0, 4096, 100 * MIB).is_some());
        assert_eq!(window.read(50 * MIB, 4096, 100 * MIB), None);
        let ahead = window.read(50 * MIB + 4096, 4096, 100 * MIB).unwrap();
        assert_eq!(ahead, 50 * MIB + 8192..50 * MIB + 8192 + (128 << 10));
    }

    proptest! {
        #[test]
        fn what_is_asked_for_lies_behind_the_read_and_within_bounds(
            reads in prop::collection::vec((0u64..20 * MIB, 0u64..2 * MIB, 0u64..20 * MIB), 1..60)
        ) {
            let mut window = window();
            for (offset, length, size) in reads {
                if let Some(range) = window.read(offset, length, size) {
                    prop_assert!(range.start < range.end && range.end <= size);
                    prop_assert!(range.end - range.start <= ReadAheadOptions::default().bytes_max);
                }
            }
        }
    }
}

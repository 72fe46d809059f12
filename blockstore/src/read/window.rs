//! What is read ahead of one open file: a window that grows while reads are sequential, the next steps while they keep a stride,
//! nothing while they are random. Pure.
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

/// Steps of a stride fetched ahead at first, and at most.
const STEPS_MIN: u64 = 2;
const STEPS_MAX: u64 = 32;

/// Reads of the same length at the same distance.
#[derive(Clone, Copy, Debug)]
struct Stride {
    /// From the beginning of one run to that of the next, bytes.
    step: i64,
    /// Bytes of a run.
    length: u64,
    /// Steps to fetch ahead; 0: the distance was seen once only.
    depth: u64,
    /// Steps ahead that were asked for already.
    asked: u64,
}

/// One open file's window.
#[derive(Clone, Debug)]
pub struct ReadAhead {
    options: ReadAheadOptions,
    /// The reads since the last jump, which follow each other.
    run: Range<u64>,
    stride: Option<Stride>,
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
            run: 0..0,
            stride: None,
            expected: None,
            window: 0,
            asked: 0,
        }
    }

    /// No window shall be larger than this from now on.
    pub fn limit(&mut self, bytes_max: u64) {
        self.options.bytes_max = bytes_max;
        self.window = self.window.min(bytes_max);
    }

    /// The reader asks for `[offset, offset + length)` of a file of `size` bytes; returns what should be fetched ahead now: at most
    /// one range behind a sequential reader's, the next steps of a strided one's.
    ///
    /// A first read at offset 0 counts as sequential; elsewhere the second of two adjacent reads does. One read elsewhere ends
    /// the stream; two at the same distance, of the same length, begin a stride.
    pub fn read(&mut self, offset: u64, length: u64, size: u64) -> Vec<Range<u64>> {
        let end = offset.saturating_add(length).min(size);
        let sequential = match self.expected {
            None => offset == 0,
            // While the window is closed only the exact continuation opens it: random reads in a small file come near each other.
            Some(expected) if self.window == 0 => offset == expected,
            Some(expected) => offset.abs_diff(expected) <= SLACK_BYTES,
        };
        if sequential {
            self.run.end = self.run.end.max(end);
            return self.sequential(end, size).into_iter().collect();
        }
        let steps = self.jump(offset, size);
        self.run = offset..end.max(offset);
        self.expected = Some(end);
        self.window = 0;
        self.asked = end;
        steps
    }

    fn sequential(&mut self, end: u64, size: u64) -> Option<Range<u64>> {
        if let Some(stride) = &self.stride
            && stride.depth > 0
        {
            if self.run.end - self.run.start <= stride.length {
                // The rest of a step, which was asked for.
                self.expected = Some(self.run.end);
                return None;
            }
            self.stride = None;
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

    /// A read elsewhere: the next steps, if it keeps a stride.
    fn jump(&mut self, offset: u64, size: u64) -> Vec<Range<u64>> {
        let length = self.run.end - self.run.start;
        let step = i64::try_from(offset)
            .ok()
            .zip(i64::try_from(self.run.start).ok())
            .map(|(offset, start)| offset - start)
            .filter(|step| length > 0 && step.unsigned_abs() >= length);
        let again = |stride: &Stride| step == Some(stride.step) && length == stride.length;
        let Some(mut stride) = self.stride.take().filter(again) else {
            self.stride = step.map(|step| Stride {
                step,
                length,
                depth: 0,
                asked: 0,
            });
            return Vec::new();
        };
        let most = (self.options.bytes_max / length).min(STEPS_MAX);
        stride.depth = (stride.depth * 2).clamp(STEPS_MIN, STEPS_MAX).min(most);
        stride.asked = stride.asked.saturating_sub(1);
        let place = |ahead: u64| {
            let from = offset.checked_add_signed(stride.step.checked_mul(ahead as i64)?)?;
            (from < size).then(|| from..from.saturating_add(length).min(size))
        };
        let steps = (stride.asked + 1..=stride.depth).map_while(place).collect();
        stride.asked = stride.asked.max(stride.depth);
        self.stride = Some(stride);
        steps
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
            for range in window.read(offset, 128 << 10, size) {
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
            assert_eq!(window.read(offset, 4096, 100 * MIB), []);
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
                for range in window.read(offset, step, 100 * MIB) {
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
        assert_eq!(window.read(0, 4096, 100 * MIB).len(), 1);
        assert_eq!(window.read(50 * MIB, 4096, 100 * MIB), []);
        let ahead = window.read(50 * MIB + 4096, 4096, 100 * MIB);
        let from = 50 * MIB + 8192;
        assert_eq!(ahead.len(), 1);
        assert_eq!(ahead[0], from..from + (128 << 10));
    }

    #[test]
    fn a_strided_reader_gets_its_next_steps_and_nothing_twice() {
        for (step, begin) in [(3 * MIB as i64, 0), (-2 * MIB as i64, 90 * MIB as i64)] {
            let (mut window, mut asked, size) = (window(), Vec::new(), 92 * MIB);
            let mut last = 0;
            for n in 0..24 {
                let at = (begin + n * step) as u64;
                // A read of 192 KiB, as the kernel hands it over: in two.
                for (offset, length) in [(at, 128 << 10), (at + (128 << 10), 64 << 10)] {
                    let ahead = window.read(offset, length, size);
                    if n >= 3 {
                        assert!(asked.contains(&(at..at + (192 << 10))), "step {n}");
                        assert!(ahead.iter().all(|range| !asked.contains(range)), "step {n}");
                        last = ahead.len().max(last);
                    }
                    asked.extend(ahead);
                }
            }
            assert!(last > 1 && asked.len() < 80, "{last}, {}", asked.len());
            // Two unequal jumps end it.
            assert_eq!(window.read(91 * MIB, 4096, size), []);
            assert_eq!(window.read(50 * MIB, 4096, size), []);
        }
    }

    #[test]
    fn a_smaller_limit_holds_at_once() {
        let mut window = window();
        for offset in (0..32 * MIB).step_by(1 << 20) {
            window.read(offset, MIB, 100 * MIB);
        }
        window.limit(MIB);
        let ahead: u64 = (32..40)
            .flat_map(|n| window.read(n * MIB, MIB, 100 * MIB))
            .map(|range| range.end - range.start)
            .sum();
        assert!(ahead <= 8 * MIB, "{ahead}");
    }

    proptest! {
        #[test]
        fn what_is_asked_for_lies_behind_the_read_and_within_bounds(
            reads in prop::collection::vec((0u64..20 * MIB, 0u64..2 * MIB, 0u64..20 * MIB), 1..60)
        ) {
            let mut window = window();
            for (offset, length, size) in reads {
                let ahead = window.read(offset, length, size);
                for range in &ahead {
                    prop_assert!(range.start < range.end && range.end <= size);
                }
                let bytes: u64 = ahead.iter().map(|range| range.end - range.start).sum();
                prop_assert!(bytes <= ReadAheadOptions::default().bytes_max);
            }
        }
    }
}

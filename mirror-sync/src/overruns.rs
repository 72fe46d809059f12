//! Copies that came too late: while they were loaded the source wrote more than its log may keep for the mirror. Loading one after
//! the other without end would keep both regions busy for nothing. Pure: time is an argument.

use std::time::{Duration, Instant};

use heliofs_proto::ids::Position;

/// Copies in a row that may come too late before there is a rest.
const IN_A_ROW: u32 = 2;

/// The first rest; each is twice as long as the one before.
const REST: Duration = Duration::from_secs(60);

/// A copy after which the log was kept for as long, and which caught up, was none that came too late.
const GOOD_AFTER: Duration = Duration::from_secs(60);

/// The longest rest.
const REST_MAX: Duration = Duration::from_secs(3600);

/// What is known of a volume's last copies.
#[derive(Debug, Default)]
pub(crate) struct Overruns {
    /// Copies in a row that came too late.
    count: u32,
    /// When a copy was loaded that may turn out to have come too late.
    loaded: Option<Instant>,
    /// Where the source was when it was first heard of after that.
    goal: Option<Position>,
    /// Until then no copy is loaded.
    rest: Option<Instant>,
}

impl Overruns {
    /// A copy was loaded.
    pub(crate) fn loaded(&mut self, now: Instant) {
        self.loaded = Some(now);
        self.goal = None;
    }

    /// The mirror has applied this, and the source is known to have had that.
    pub(crate) fn at(&mut self, now: Instant, applied: Position, source: Option<Position>) {
        let Some(loaded) = self.loaded else {
            return;
        };
        self.goal = self.goal.or(source);
        let caught_up = self.goal.is_some_and(|goal| applied >= goal);
        if caught_up && now >= loaded + GOOD_AFTER {
            *self = Self::default();
        }
    }

    /// A copy must be loaded, as the log does not reach back any more. For how long it must wait; `None`: it may begin.
    pub(crate) fn must_load(&mut self, now: Instant) -> Option<Duration> {
        if self.loaded.take().is_some() {
            self.count += 1;
            if let Some(more) = self.count.checked_sub(IN_A_ROW) {
                let rest = REST.saturating_mul(1 << more.min(16));
                self.rest = Some(now + rest.min(REST_MAX));
            }
        }
        let rest = self.rest?.saturating_duration_since(now);
        (!rest.is_zero()).then_some(rest)
    }
}

#[cfg(test)]
mod tests {
    use heliofs_proto::ids::Epoch;

    use super::*;

    fn at(seq: u64) -> Position {
        Position {
            epoch: Epoch(0),
            seq,
        }
    }

    #[test]
    fn copies_that_come_too_late_are_loaded_ever_more_rarely() {
        let now = Instant::now();
        let mut overruns = Overruns::default();
        assert_eq!(overruns.must_load(now), None);
        overruns.loaded(now);
        overruns.at(now, at(10), Some(at(20)));
        // Once may happen.
        assert_eq!(overruns.must_load(now), None);
        // It is of no use either to catch up for a moment.
        overruns.loaded(now);
        overruns.at(now, at(20), Some(at(20)));
        assert_eq!(overruns.must_load(now), Some(REST));
        // However often it is asked.
        let later = now + REST / 2;
        assert_eq!(overruns.must_load(later), Some(REST / 2));
        let over = now + REST;
        assert_eq!(overruns.must_load(over), None);
        overruns.loaded(over);
        // Nor to be far behind for long.
        overruns.at(over + GOOD_AFTER, at(10), Some(at(20)));
        assert_eq!(overruns.must_load(over), Some(REST * 2));
        for _ in 0..40 {
            overruns.loaded(over);
            overruns.must_load(over);
        }
        assert_eq!(overruns.must_load(over), Some(REST_MAX));
    }

    #[test]
    fn one_that_caught_up_and_stayed_begins_anew() {
        let now = Instant::now();
        let mut overruns = Overruns::default();
        for _ in 0..5 {
            overruns.loaded(now);
            overruns.at(now, at(10), None);
            overruns.at(now, at(10), Some(at(12)));
            // The source goes on: what counts is what there was when the copy was whole.
            overruns.at(now + GOOD_AFTER, at(12), Some(at(15)));
            assert_eq!(overruns.must_load(now), None);
        }
    }
}

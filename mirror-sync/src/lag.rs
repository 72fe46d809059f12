//! How old what a mirror shows is. Pure: time is an argument.
//!
//! Lag is measured by the source's clock alone, so that clocks of regions need not agree: each frame says how far the source was
//! and what its clock showed. When everything up to that is applied, the mirror is known to be as of that moment. Between
//! frames, and when none come, time passes on the mirror's monotonic clock.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use heliofs_proto::ids::{Position, UnixNanos};

/// Frames whose position is not applied yet that are remembered; of more, every other is forgotten.
const AWAITED_MAX: usize = 4096;

/// What is known of one volume's lag.
#[derive(Debug, Default)]
pub struct Lag {
    /// The source's position and clock in the last frame, and when that came.
    heard: Option<(Position, UnixNanos, Instant)>,
    /// The greatest position that the source was ever heard to have, and when it last said anything.
    known: Option<(Position, Instant)>,
    /// The mirror showed everything that the source had at this time of its clock.
    as_of: Option<UnixNanos>,
    /// Positions whose application proves a later `as_of`.
    awaited: VecDeque<(Position, UnixNanos)>,
}

impl Lag {
    /// A frame came.
    pub fn heard(&mut self, head: Position, clock: UnixNanos, now: Instant) {
        self.heard = Some((head, clock, now));
        self.know(head, now);
        if self.awaited.len() >= AWAITED_MAX {
            let mut keep = false;
            self.awaited.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.awaited.push_back((head, clock));
    }

    /// The source answered a report at `at`. While no frames come, since the mirror is `paused`, its clock counts as theirs does;
    /// else it may be another node's than that of the frames.
    pub fn told(&mut self, head: Position, clock: UnixNanos, at: Instant, paused: bool) {
        if self.known.is_some_and(|(_, last)| at <= last) {
            return;
        }
        match paused {
            true => self.heard(head, clock, at),
            false => self.know(head, at),
        }
    }

    fn know(&mut self, head: Position, at: Instant) {
        let (before, last) = self.known.unwrap_or((head, at));
        self.known = Some((before.max(head), last.max(at)));
    }

    /// The mirror has applied `position`, committed at `time`.
    pub fn applied(&mut self, position: Position, time: UnixNanos) {
        while let Some((head, clock)) = self.awaited.front()
            && *head <= position
        {
            self.as_of = self.as_of.max(Some(*clock));
            self.awaited.pop_front();
        }
        if self.heard.is_some_and(|(head, _, _)| position < head) {
            // Behind: it shows the source as of when it committed this. An idle source's last commit says nothing.
            self.as_of = self.as_of.max(Some(time));
        }
    }

    /// The greatest position that the source is known to have had.
    pub fn source_head(&self) -> Option<Position> {
        self.known.map(|(head, _)| head)
    }

    /// How long ago the source was last heard of in any way; `None`: never.
    pub fn contact(&self, now: Instant) -> Option<Duration> {
        self.known.map(|(_, at)| now.saturating_duration_since(at))
    }

    /// How long ago the last frame came.
    pub fn silence(&self, now: Instant) -> Option<Duration> {
        self.heard
            .map(|(_, _, at)| now.saturating_duration_since(at))
    }

    /// Entries that the source had and the mirror has not.
    pub fn entries(&self, applied: Position) -> u64 {
        self.source_head()
            .map_or(0, |head| head.seq.saturating_sub(applied.seq))
    }

    /// How old what the mirror shows is at most; `None`: nothing is known yet.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        let (_, clock, at) = self.heard?;
        let behind = clock.0.saturating_sub(self.as_of?.0).max(0);
        Some(Duration::from_nanos(behind as u64) + now.saturating_duration_since(at))
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

    fn seconds(seconds: i64) -> UnixNanos {
        UnixNanos(seconds * 1_000_000_000)
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn an_idle_source_has_no_lag_and_one_that_is_cut_off_has_more_and_more() {
        let begun = Instant::now();
        let mut lag = Lag::default();
        assert_eq!(lag.age(begun), None);
        // Its last commit was an hour before.
        lag.heard(at(5), seconds(10_000), begun);
        lag.applied(at(5), seconds(6_400));
        assert_eq!(lag.age(begun), Some(Duration::ZERO));
        assert_eq!(lag.age(begun + 7 * SECOND), Some(7 * SECOND));
        lag.heard(at(5), seconds(10_008), begun + 8 * SECOND);
        lag.applied(at(5), seconds(6_400));
        assert_eq!(lag.age(begun + 8 * SECOND), Some(Duration::ZERO));
    }

    #[test]
    fn a_mirror_that_is_behind_shows_the_source_as_of_its_last_entry() {
        let now = Instant::now();
        let mut lag = Lag::default();
        lag.heard(at(100), seconds(1000), now);
        lag.applied(at(40), seconds(940));
        assert_eq!(lag.entries(at(40)), 60);
        assert_eq!(lag.age(now), Some(60 * SECOND));
        lag.applied(at(100), seconds(999));
        assert_eq!(lag.age(now), Some(Duration::ZERO));
        // A minute of silence at the source, then one commit that is on its way: not a minute behind.
        lag.heard(at(100), seconds(1060), now + 60 * SECOND);
        lag.applied(at(100), seconds(999));
        lag.heard(at(101), seconds(1061), now + 61 * SECOND);
        lag.applied(at(100), seconds(999));
        assert_eq!(lag.age(now + 61 * SECOND), Some(SECOND));
    }

    #[test]
    fn what_a_paused_mirror_is_told_counts_and_an_older_word_takes_nothing_back() {
        let now = Instant::now();
        let mut lag = Lag::default();
        assert_eq!(lag.contact(now), None);
        lag.heard(at(10), seconds(100), now);
        lag.applied(at(10), seconds(90));
        lag.told(at(17), seconds(105), now + 5 * SECOND, true);
        assert_eq!(lag.entries(at(10)), 7);
        assert_eq!(lag.age(now + 5 * SECOND), Some(5 * SECOND));
        // The same answer again, later.
        lag.told(at(17), seconds(105), now + 5 * SECOND, true);
        assert_eq!(lag.contact(now + 9 * SECOND), Some(4 * SECOND));
        // It goes on with a replica that is behind, whose clock is another.
        lag.heard(at(12), seconds(110), now + 10 * SECOND);
        assert_eq!(lag.source_head(), Some(at(17)));
        lag.told(at(30), seconds(999), now + 11 * SECOND, false);
        assert_eq!(lag.entries(at(12)), 18);
        lag.applied(at(12), seconds(99));
        // That replica's word does not make it newer than what is known to be missing.
        assert_eq!(lag.age(now + 11 * SECOND), Some(11 * SECOND));
        lag.applied(at(17), seconds(104));
        assert_eq!(lag.age(now + 11 * SECOND), Some(SECOND));
        assert_eq!(lag.contact(now + 12 * SECOND), Some(SECOND));
    }

    #[test]
    fn frames_that_are_forgotten_make_lag_greater_and_not_smaller() {
        let now = Instant::now();
        let mut lag = Lag::default();
        for n in 1..=2 * AWAITED_MAX as u64 {
            lag.heard(at(n), seconds(n as i64), now);
        }
        assert!(lag.awaited.len() <= AWAITED_MAX);
        lag.applied(at(101), seconds(90));
        assert!(lag.age(now) >= Some(Duration::from_secs(2 * AWAITED_MAX as u64 - 101)));
    }
}

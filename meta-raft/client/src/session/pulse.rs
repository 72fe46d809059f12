//! Pings and pongs: when one is due, when the answered one was sent, and whether the leader has fallen silent.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Of one stream at a time; the numbers of pings go on across streams.
pub(super) struct Pulse {
    /// Without a pong, and when their frames were built; ascending.
    unanswered: VecDeque<(u64, Instant)>,
    next: u64,
    /// Since when one waits to be sent.
    due: Option<Instant>,
    last_sent: Option<Instant>,
    last_heard: Instant,
}

impl Pulse {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            unanswered: VecDeque::new(),
            next: 1,
            due: None,
            last_sent: None,
            last_heard: now,
        }
    }

    /// A stream begins: the first ping is due at once.
    pub(super) fn begin(&mut self, now: Instant) {
        self.unanswered.clear();
        self.due = Some(now);
        self.last_heard = now;
    }

    /// The stream ended.
    pub(super) fn end(&mut self) {
        self.unanswered.clear();
        self.due = None;
    }

    /// A frame arrived.
    pub(super) fn heard(&mut self, now: Instant) {
        self.last_heard = now;
    }

    /// Makes a ping due when the last one is `every` ago; true when it just became so.
    pub(super) fn tick(&mut self, every: Duration, now: Instant) -> bool {
        let due = self
            .last_sent
            .is_none_or(|last| now.saturating_duration_since(last) >= every);
        if !due || self.due.is_some() {
            return false;
        }
        self.due = Some(now);
        true
    }

    /// The number of the ping to send with the frame that is being built, if one is due.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<u64> {
        self.due.take()?;
        let number = self.next;
        self.next += 1;
        self.unanswered.push_back((number, now));
        self.last_sent = Some(now);
        Some(number)
    }

    /// When the ping that this pong echoes was sent. Earlier ones count as answered with it.
    pub(super) fn pong(&mut self, number: u64) -> Option<Instant> {
        let mut sent = None;
        while let Some(&(front, at)) = self.unanswered.front()
            && front <= number
        {
            self.unanswered.pop_front();
            sent = (front == number).then_some(at);
        }
        sent
    }

    /// Whether a ping has waited for longer than `silence`, to be sent or for its pong, while no frame came. A ping that
    /// can't be sent counts: the peer doesn't take in what fills the connection.
    pub(super) fn silent(&self, silence: Duration, now: Instant) -> bool {
        let oldest = self.unanswered.front().map(|(_, sent)| *sent);
        let waiting = oldest.into_iter().chain(self.due).min();
        let long = |since: Instant| now.saturating_duration_since(since) > silence;
        waiting.is_some_and(long) && long(self.last_heard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pong_names_when_its_ping_was_sent_and_settles_earlier_ones() {
        let base = Instant::now();
        let at = |ms| base + Duration::from_millis(ms);
        let mut pulse = Pulse::new(base);
        pulse.begin(base);
        assert_eq!(pulse.take_due(at(1)), Some(1));
        assert_eq!(pulse.take_due(at(2)), None);
        assert!(!pulse.tick(Duration::from_millis(100), at(50)));
        assert!(pulse.tick(Duration::from_millis(100), at(101)));
        assert_eq!(pulse.take_due(at(102)), Some(2));
        assert_eq!(pulse.pong(2), Some(at(102)));
        assert_eq!(pulse.pong(1), None);
        assert_eq!(pulse.pong(9), None);
    }

    #[test]
    fn silence_is_a_ping_that_waits_while_no_frame_comes() {
        let base = Instant::now();
        let at = |ms| base + Duration::from_millis(ms);
        let limit = Duration::from_millis(100);
        let mut pulse = Pulse::new(base);
        assert!(!pulse.silent(limit, at(1000)), "nothing was asked");
        pulse.begin(base);
        assert!(pulse.silent(limit, at(101)), "the ping can't be sent");
        pulse.take_due(at(102));
        pulse.heard(at(150));
        assert!(!pulse.silent(limit, at(250)), "a frame came");
        assert!(pulse.silent(limit, at(251)));
        pulse.pong(1);
        assert!(!pulse.silent(limit, at(1000)));
    }
}

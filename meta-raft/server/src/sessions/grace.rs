//! The time after a node became leader in which it must not act on what it does not know yet. Pure: time is an argument.
//!
//! Opens and locks are the leader's memory; a new leader learns them as sessions come back. Until every session of the
//! replicated records came back, or one session time-out has passed, it reaps nothing, expires nobody and grants no new
//! lock.

use std::collections::HashSet;
use std::time::{Duration, Instant};

/// Orphans wait at least this long after the term began: the resend of a create whose reply was lost counts as an open, too,
/// and comes right after its session did.
const ORPHANS_REST: Duration = Duration::from_secs(2);

/// One volume's grace period.
pub struct Grace {
    awaited: HashSet<u64>,
    began: Instant,
    timeout: Duration,
}

impl Grace {
    /// The term began at `began`, with `known` sessions in the records.
    pub fn new(known: impl IntoIterator<Item = u64>, began: Instant, timeout: Duration) -> Self {
        Self {
            awaited: known.into_iter().collect(),
            began,
            timeout,
        }
    }

    /// A session came back, or ended.
    pub fn settle(&mut self, session: u64) {
        self.awaited.remove(&session);
    }

    /// New locks may be granted and sessions expire.
    pub fn is_over(&self, now: Instant) -> bool {
        self.awaited.is_empty() || now >= self.began + self.timeout
    }

    /// Orphans that nobody holds may be reaped.
    pub fn may_reap(&self, now: Instant) -> bool {
        self.is_over(now) && now >= self.began + ORPHANS_REST.min(self.timeout)
    }

    /// The term's begin.
    pub fn began(&self) -> Instant {
        self.began
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grace_ends_with_the_last_session_or_with_the_time_out() {
        let began = Instant::now();
        let timeout = Duration::from_secs(30);
        let mut grace = Grace::new([1, 2], began, timeout);
        assert!(!grace.is_over(began + Duration::from_secs(29)));
        assert!(grace.is_over(began + timeout));
        grace.settle(1);
        assert!(!grace.is_over(began));
        grace.settle(2);
        assert!(grace.is_over(began));
        assert!(!grace.may_reap(began));
        assert!(grace.may_reap(began + ORPHANS_REST));
    }

    #[test]
    fn a_volume_without_sessions_has_no_grace_for_locks() {
        let began = Instant::now();
        assert!(Grace::new([], began, Duration::from_secs(30)).is_over(began));
    }
}

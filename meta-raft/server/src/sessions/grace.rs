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

    /// Whether the session is in the records and did not come back yet.
    pub fn is_awaited(&self, session: u64) -> bool {
        self.awaited.contains(&session)
    }

    /// New locks may be granted and sessions expire.
    pub fn is_over(&self, now: Instant) -> bool {
        self.awaited.is_empty() || now >= self.began + self.timeout
    }

    /// Orphans that nobody holds may be reaped.
    pub fn may_reap(&self, now: Instant) -> bool {
        self.is_over(now) && now >= self.began + ORPHANS_REST.min(self.timeout)
    }

    /// Until when a session that did not come back may trust what an earlier leader told it; `None`: no longer, or none such is
    /// left. The earlier leader renewed no lease after a majority had voted for this one.
    pub fn caches_until(&self, lease: Duration, now: Instant) -> Option<Instant> {
        let until = self.began + lease;
        (!self.awaited.is_empty() && now < until).then_some(until)
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
    fn caches_of_sessions_that_are_away_are_respected_for_one_lease() {
        let began = Instant::now();
        let lease = Duration::from_secs(1);
        let mut grace = Grace::new([1], began, Duration::from_secs(30));
        assert_eq!(grace.caches_until(lease, began), Some(began + lease));
        assert_eq!(grace.caches_until(lease, began + lease), None);
        grace.settle(1);
        assert_eq!(grace.caches_until(lease, began), None);
    }

    #[test]
    fn a_volume_without_sessions_has_no_grace_for_locks() {
        let began = Instant::now();
        assert!(Grace::new([], began, Duration::from_secs(30)).is_over(began));
    }
}

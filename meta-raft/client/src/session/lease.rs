//! The lease: until when cached answers may be used, as this machine's monotonic clock tells.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Read on every cached operation, so it is one atomic number: nanoseconds after `base`.
#[derive(Debug)]
pub struct Lease {
    base: Instant,
    until_nanos: AtomicU64,
}

impl Lease {
    /// No lease yet. `base` is not later than any moment named afterwards.
    pub fn new(base: Instant) -> Self {
        Self {
            base,
            until_nanos: AtomicU64::new(0),
        }
    }

    /// A pong arrived for the ping sent at `sent`: the lease runs `length` from *then*, since the leader confirmed itself at
    /// some moment after it. A late pong of an earlier ping shortens nothing.
    pub fn extend(&self, sent: Instant, length: Duration) {
        let until = sent.saturating_duration_since(self.base) + length;
        let nanos = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX);
        self.until_nanos.fetch_max(nanos, Ordering::AcqRel);
    }

    /// Ends it at once.
    pub fn revoke(&self) {
        self.until_nanos.store(0, Ordering::Release);
    }

    /// How much longer it is live; zero when it is over.
    pub fn left(&self) -> Duration {
        let now = self.base.elapsed().as_nanos();
        let until = u128::from(self.until_nanos.load(Ordering::Acquire));
        Duration::from_nanos(u64::try_from(until.saturating_sub(now)).unwrap_or(u64::MAX))
    }

    /// Whether it is live now.
    pub fn valid(&self) -> bool {
        self.valid_at(Instant::now())
    }

    /// Whether it is live at `now`. At the very end of the lease it is over.
    pub fn valid_at(&self, now: Instant) -> bool {
        let now = now.saturating_duration_since(self.base).as_nanos();
        now < u128::from(self.until_nanos.load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_runs_from_when_the_ping_was_sent() {
        let base = Instant::now();
        let at = |ms| base + Duration::from_millis(ms);
        let second = Duration::from_secs(1);
        let lease = Lease::new(base);
        assert!(!lease.valid_at(base), "there is none before the first pong");
        lease.extend(at(100), second);
        assert!(lease.valid_at(at(1099)));
        assert!(!lease.valid_at(at(1100)));
        lease.extend(at(400), second);
        lease.extend(at(200), second);
        assert!(lease.valid_at(at(1399)), "a late pong shortens nothing");
        lease.revoke();
        assert!(!lease.valid_at(at(500)));
    }
}

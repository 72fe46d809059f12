//! The time of a write: this machine's clock, or the server's when the two disagree.
//!
//! A write's modification time is chosen here and clamped by the server to its own clock when the data is committed. If our
//! clock were ahead, a file's time would go back at the commit; if it were behind, a file could be older than it was before.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

/// Beyond this difference the server's clock is used.
const SKEW_MAX: i64 = 100_000_000;

/// See the module.
#[derive(Debug, Default)]
pub struct Clock {
    /// A time that the server's clock had certainly reached at a moment of ours.
    seen: Mutex<Option<(Instant, i64)>>,
}

/// Nanoseconds since 1970 as this machine tells.
fn local_nanos() -> i64 {
    let now = SystemTime::now();
    match now.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_nanos()).unwrap_or(i64::MAX),
    }
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

impl Clock {
    /// The server stamped something with `time` (its ctime, nanoseconds since 1970).
    pub fn saw(&self, time: i64) {
        let now = Instant::now();
        let mut seen = self.seen.lock();
        let reached = seen.map(|(at, time)| time.saturating_add(nanos(now - at)));
        if reached.is_none_or(|reached| time > reached) {
            *seen = Some((now, time));
        }
    }

    /// Now, nanoseconds since 1970.
    pub fn now(&self) -> i64 {
        let local = local_nanos();
        match *self.seen.lock() {
            Some((at, time)) => {
                let server = time.saturating_add(nanos(at.elapsed()));
                if (local - server).abs() > SKEW_MAX {
                    server
                } else {
                    local.max(time)
                }
            }
            None => local,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skewed_server_decides_the_time() {
        let clock = Clock::default();
        assert!((clock.now() - local_nanos()).abs() < SKEW_MAX);
        let ahead = local_nanos() + 3_600_000_000_000;
        clock.saw(ahead);
        assert!(clock.now() >= ahead);
        clock.saw(ahead - 1_000_000_000);
        assert!(clock.now() >= ahead);
    }
}

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
    seen: Mutex<Option<Seen>>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    /// A time that the server's clock had certainly reached at a moment of ours.
    at: Instant,
    time: i64,
    /// The latest time that it was seen to give.
    newest: i64,
}

impl Seen {
    /// What the server's clock has certainly reached.
    fn reached(&self, now: Instant) -> i64 {
        self.time
            .saturating_add(nanos(now.saturating_duration_since(self.at)))
    }
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
        *seen = Some(match *seen {
            Some(known) if time <= known.reached(now) => Seen {
                newest: known.newest.max(time),
                ..known
            },
            _ => Seen {
                at: now,
                time,
                newest: time,
            },
        });
    }

    /// Now, nanoseconds since 1970; never before a time that was seen.
    pub fn now(&self) -> i64 {
        let local = local_nanos();
        match *self.seen.lock() {
            Some(seen) => {
                let server = seen.reached(Instant::now());
                let now = match (local - server).abs() > SKEW_MAX {
                    true => server,
                    false => local,
                };
                now.max(seen.newest)
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

    #[test]
    fn no_time_is_before_one_that_was_seen() {
        const MILLISECOND: i64 = 1_000_000;
        let clock = Clock::default();
        // The server is ahead of us by less than would be noticed.
        let (begun, base) = (Instant::now(), local_nanos());
        clock.saw(base + 50 * MILLISECOND);
        while begun.elapsed() < Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        // Told a little later than the first was.
        clock.saw(base + 65 * MILLISECOND);
        assert!(clock.now() >= base + 65 * MILLISECOND);
    }
}

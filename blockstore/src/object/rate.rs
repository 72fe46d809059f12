//! Limits of bytes per second. Pure but for [`RateLimit::admit`], which waits.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// What may pass at once after a pause, as time at the full rate: requests come in bursts.
const BURST: Duration = Duration::from_millis(500);

/// Lets bytes pass at a rate, in the order of asking.
#[derive(Debug)]
pub struct RateLimit {
    bytes_per_second: u64,
    paid: Mutex<Paid>,
}

/// Until when what has passed is paid for.
#[derive(Clone, Copy, Debug)]
struct Paid {
    until: Instant,
}

impl Paid {
    /// Charges `bytes`; how long whoever comes next must wait.
    fn charge(&mut self, bytes: u64, bytes_per_second: u64, now: Instant) -> Duration {
        // What was not used before the burst is lost.
        self.until = self.until.max(now - BURST);
        self.until += Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64);
        self.until.saturating_duration_since(now)
    }
}

impl RateLimit {
    /// `None` for 0: no limit.
    pub fn new(bytes_per_second: u64) -> Option<Self> {
        let until = Instant::now();
        (bytes_per_second > 0).then(|| Self {
            bytes_per_second,
            paid: Mutex::new(Paid { until }),
        })
    }

    /// Charges bytes that were moved, when only the answer told how many they were.
    pub fn charge(&self, bytes: u64) {
        self.paid
            .lock()
            .charge(bytes, self.bytes_per_second, Instant::now());
    }

    /// Charges `bytes` and waits until those before them are paid for.
    pub async fn admit(&self, bytes: u64) {
        let wait = {
            let mut paid = self.paid.lock();
            let now = Instant::now();
            let wait = paid.charge(0, self.bytes_per_second, now);
            paid.charge(bytes, self.bytes_per_second, now);
            wait
        };
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn bytes_pass_at_the_rate_after_a_burst() {
        let limit = RateLimit::new(1000).unwrap();
        assert!(RateLimit::new(0).is_none());
        tokio::time::sleep(Duration::from_secs(60)).await;
        let begin = Instant::now();
        for _ in 0..50 {
            limit.admit(100).await;
        }
        // 5000 bytes; the last one's are not waited for, nor is half a second's worth.
        let took = begin.elapsed().as_millis();
        assert!((4350..=4450).contains(&took), "{took}");
        limit.charge(2000);
        let begin = Instant::now();
        limit.admit(0).await;
        let took = begin.elapsed().as_millis();
        assert!((2050..=2150).contains(&took), "{took}");
    }
}

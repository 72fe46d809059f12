//! What the way to the bucket holds: how much it brings a second, and how long the first byte takes. Pure: time is an argument.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Time with requests under way that makes one sample of the rate.
const SAMPLE: Duration = Duration::from_millis(200);

/// Samples of the rate kept; the best of them counts, since a reader that waits for nothing asks for little.
const SAMPLES: usize = 16;

/// Weight of a new latency, as a part of all.
const LATENCY_WEIGHT: u32 = 8;

/// Rate and latency of answers with a body.
#[derive(Debug, Default)]
pub(super) struct Link {
    under_way: u32,
    /// Since when the sample goes on, while requests are under way.
    since: Option<Instant>,
    busy: Duration,
    bytes: u64,
    /// Bytes per second.
    rates: VecDeque<u64>,
    latency: Option<Duration>,
}

impl Link {
    /// A request is sent.
    pub(super) fn begin(&mut self, now: Instant) {
        self.under_way += 1;
        self.since.get_or_insert(now);
    }

    /// Its answer has begun, after this time.
    pub(super) fn answered(&mut self, latency: Duration) {
        self.latency = Some(match self.latency {
            Some(known) => (known * (LATENCY_WEIGHT - 1) + latency) / LATENCY_WEIGHT,
            None => latency,
        });
    }

    /// It is over, and has brought so many bytes.
    pub(super) fn end(&mut self, now: Instant, bytes: u64) {
        self.under_way = self.under_way.saturating_sub(1);
        self.bytes += bytes;
        let Some(since) = self.since else { return };
        self.busy += now.saturating_duration_since(since);
        self.since = (self.under_way > 0).then_some(now);
        if self.busy >= SAMPLE {
            let micros = self.busy.as_micros().max(1);
            let rate = u128::from(self.bytes) * 1_000_000 / micros;
            self.rates
                .push_back(u64::try_from(rate).unwrap_or(u64::MAX));
            if self.rates.len() > SAMPLES {
                self.rates.pop_front();
            }
            (self.busy, self.bytes) = (Duration::ZERO, 0);
        }
    }

    /// Bytes that are under way when the link is used to the full; `None`: not known yet.
    pub(super) fn holds(&self) -> Option<u64> {
        let rate = self.rates.iter().max()?;
        let micros = self.latency?.as_micros();
        u64::try_from(u128::from(*rate) * micros / 1_000_000).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn it_holds_its_rate_times_its_latency() {
        let (mut link, began) = (Link::default(), Instant::now());
        let at = |millis| began + Duration::from_millis(millis);
        assert_eq!(link.holds(), None);
        // Two at a time, 100 ms each, 4 MiB each: 80 MiB/s.
        for n in 0..10 {
            link.begin(at(n * 100));
            link.begin(at(n * 100));
            link.answered(Duration::from_millis(50));
            link.answered(Duration::from_millis(50));
            link.end(at(n * 100 + 100), 4 * MIB);
            link.end(at(n * 100 + 100), 4 * MIB);
        }
        assert_eq!(link.holds(), Some(4 * MIB));
        // Idle time does not count, and a reader that asks for little does not make the link narrower.
        for n in 0..8 {
            link.begin(at(60_000 + n * 200));
            link.answered(Duration::from_millis(50));
            link.end(at(60_000 + n * 200 + 100), 1000);
        }
        assert_eq!(link.holds(), Some(4 * MIB));
        // In the long run it may.
        for n in 0..100 {
            link.begin(at(90_000 + n * 200));
            link.end(at(90_000 + n * 200 + 100), MIB);
        }
        assert_eq!(link.holds(), Some(MIB / 2));
    }

    #[test]
    fn latency_follows_slowly() {
        let (mut link, began) = (Link::default(), Instant::now());
        link.begin(began);
        link.end(began + Duration::from_secs(1), 100 * MIB);
        link.answered(Duration::from_millis(10));
        assert_eq!(link.holds(), Some(MIB));
        link.answered(Duration::from_millis(90));
        assert_eq!(link.holds(), Some(2 * MIB));
    }
}

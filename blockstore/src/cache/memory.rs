//! The memory tier: pages, bounded by bytes.

use bytes::Bytes;
use parking_lot::Mutex;
use prometheus::IntGauge;

use super::PageKey;
use super::two_lists::TwoLists;

/// What a page costs beside its bytes: map, list and allocation.
const ENTRY_BYTES: u64 = 160;

/// Below this, another shard does more harm (uneven budgets) than good (less contention).
const SHARD_BYTES_MIN: u64 = 16 << 20;
const SHARDS_MAX: u64 = 16;

/// Pages in memory, at most so many bytes.
#[derive(Debug)]
pub struct MemoryTier {
    shards: Box<[Mutex<Shard>]>,
    gauge: IntGauge,
}

#[derive(Debug)]
struct Shard {
    pages: TwoLists<PageKey, Bytes>,
    bytes_max: u64,
}

fn cost(page: &Bytes) -> u64 {
    page.len() as u64 + ENTRY_BYTES
}

impl MemoryTier {
    /// An empty tier of at most `bytes_max` bytes, which keeps `gauge` at what it holds.
    pub fn new(bytes_max: u64, gauge: IntGauge) -> Self {
        let shards = (bytes_max / SHARD_BYTES_MIN).clamp(1, SHARDS_MAX);
        let shard = || {
            Mutex::new(Shard {
                pages: TwoLists::new(bytes_max / shards, cost),
                bytes_max: bytes_max / shards,
            })
        };
        Self {
            shards: (0..shards).map(|_| shard()).collect(),
            gauge,
        }
    }

    fn shard(&self, key: &PageKey) -> &Mutex<Shard> {
        // Multiplied by odd constants: neighbouring pages, and the first pages of neighbouring segments, go to different shards.
        let hash = (key.segment.0.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .wrapping_add(u64::from(key.frame.0).wrapping_mul(0xc2b2_ae3d_27d4_eb4f))
            .wrapping_add(u64::from(key.page).wrapping_mul(0x1656_67b1_9e37_79f9));
        &self.shards[((hash >> 32) % self.shards.len() as u64) as usize]
    }

    /// The page, if it is here; counts as a use.
    pub fn get(&self, key: &PageKey) -> Option<Bytes> {
        self.shard(key).lock().pages.get(key).cloned()
    }

    /// Whether the page is here; no use of it.
    pub fn contains(&self, key: &PageKey) -> bool {
        self.shard(key).lock().pages.contains(key)
    }

    /// Adds a page, which must not share its memory with much more than itself.
    pub fn insert(&self, key: PageKey, page: Bytes) {
        let mut guard = self.shard(&key).lock();
        let shard = &mut *guard;
        if cost(&page) > shard.bytes_max || shard.pages.contains(&key) {
            return;
        }
        let before = shard.pages.bytes();
        shard.pages.insert(key, page);
        while shard.pages.bytes() > shard.bytes_max
            && let Some(oldest) = shard.pages.first_out()
        {
            shard.pages.remove(&oldest);
        }
        let after = shard.pages.bytes();
        self.gauge.add(after as i64 - before as i64);
    }
}

#[cfg(test)]
mod tests {
    use heliofs_proto::ids::SegmentId;

    use super::*;
    use crate::FrameNumber;

    fn key(page: u32) -> PageKey {
        PageKey {
            segment: SegmentId(1),
            frame: FrameNumber(4),
            page,
        }
    }

    fn tier(pages: u64) -> MemoryTier {
        let gauge = IntGauge::new("x", "x").unwrap();
        MemoryTier::new(pages * (1000 + ENTRY_BYTES), gauge)
    }

    fn page() -> Bytes {
        Bytes::from(vec![7; 1000])
    }

    #[test]
    fn it_never_holds_more_than_its_budget() {
        let tier = tier(10);
        for n in 0..100 {
            tier.insert(key(n), page());
            tier.get(&key(n / 2));
            assert!(tier.gauge.get() as u64 <= 10 * (1000 + ENTRY_BYTES));
        }
        assert_eq!((0..100).filter(|n| tier.contains(&key(*n))).count(), 10);
    }

    #[test]
    fn a_scan_does_not_drive_out_what_is_used_often() {
        let tier = tier(100);
        for n in 0..50 {
            tier.insert(key(n), page());
            tier.get(&key(n));
        }
        for n in 1000..5000 {
            tier.insert(key(n), page());
        }
        assert!((0..50).all(|n| tier.get(&key(n)).is_some()));
    }

    #[test]
    fn the_last_ones_used_stay() {
        let tier = tier(10);
        for n in 0..20 {
            tier.insert(key(n), page());
        }
        assert!((10..20).all(|n| tier.contains(&key(n))));
    }
}

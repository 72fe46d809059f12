//! Several disk tiers as one: each segment has its disk, so that nothing lies on two and disks work side by side.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use heliofs_proto::ids::{SegmentId, VolumeId};

use super::disk::DiskTier;
use crate::metrics::Metrics;
use crate::segment::page::{Page, PageIdentity};
use crate::store::options::DiskCacheOptions;
use crate::{FrameNumber, StoreError};

/// The disk tiers of one store, at least one.
#[derive(Debug)]
pub struct Disks(Vec<DiskTier>);

impl Disks {
    /// Opens a tier in each directory; they share the budget evenly.
    ///
    /// Errors: `Invalid` when a directory cannot be used.
    pub fn open(
        options: &DiskCacheOptions,
        volume_name: &str,
        volume: VolumeId,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, StoreError> {
        let directories = std::iter::once(&options.directory).chain(&options.more_directories);
        let share = options.bytes_max / (1 + options.more_directories.len() as u64);
        let tiers = directories.map(|directory| {
            let own = DiskCacheOptions {
                directory: directory.clone(),
                more_directories: Vec::new(),
                bytes_max: share,
                ..options.clone()
            };
            DiskTier::open(own, volume_name, volume, Arc::clone(metrics))
        });
        Ok(Self(tiers.collect::<Result<_, _>>()?))
    }

    /// The disk of a segment. A disk more or less moves one in so many segments: rendezvous hashing.
    fn of(&self, segment: SegmentId) -> &DiskTier {
        let weight = |at: &usize| mix(segment.0 ^ mix(*at as u64 + 1));
        let best = (0..self.0.len()).max_by_key(weight).unwrap_or(0);
        &self.0[best]
    }

    /// As [`DiskTier::read`].
    pub fn read(
        &self,
        segment: SegmentId,
        frame: FrameNumber,
        pages: Range<u32>,
    ) -> Vec<Option<Page>> {
        self.of(segment).read(segment, frame, pages)
    }

    /// As [`DiskTier::may_have`].
    pub fn may_have(&self, segment: SegmentId, frame: FrameNumber, pages: Range<u32>) -> bool {
        self.of(segment).may_have(segment, frame, pages)
    }

    /// As [`DiskTier::insert`].
    pub fn insert(
        &self,
        segment: SegmentId,
        frame: FrameNumber,
        first: u32,
        count: u32,
        origin: PageIdentity,
        raw: Bytes,
    ) {
        let tier = self.of(segment);
        tier.insert(segment, frame, first, count, origin, raw);
    }

    /// As [`DiskTier::forget`].
    pub fn forget(&self, segment: SegmentId) {
        self.of(segment).forget(segment);
    }

    /// As [`DiskTier::flush`], of all disks.
    pub async fn flush(&self) {
        for tier in &self.0 {
            tier.flush().await;
        }
    }
}

/// splitmix64's finisher: spreads ids that differ little.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

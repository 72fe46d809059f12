//! The store over memory, a directory, and a store that fails: reads are never wrong, puts end stored or in error.

mod cache;
mod chaos;
mod codec;
mod path;

use std::sync::Arc;

use bytes::Bytes;
use heliofs_proto::ids::{SegmentId, VolumeId};
use object_store::memory::InMemory;

use crate::layers::failing::{FailingStore, Rates};
use crate::{
    Bucket, EncodedSegment, FrameNumber, FrameRange, SegmentBuilder, SegmentStore, StoreOptions,
};

const VOLUME: VolumeId = VolumeId(5);

/// Bytes that differ everywhere and between seeds.
fn noise(length: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

fn segment(id: u64, frames: &[Bytes]) -> (EncodedSegment, Vec<FrameNumber>) {
    let mut builder = SegmentBuilder::new(VOLUME, SegmentId(id));
    let numbers = frames
        .iter()
        .map(|data| builder.add_frame(vec![data.clone()]).unwrap())
        .collect();
    (builder.finish(), numbers)
}

fn range(id: u64, frame: FrameNumber, offset: usize, length: usize) -> FrameRange {
    FrameRange {
        segment: SegmentId(id),
        frame,
        offset: offset as u32,
        length: length as u32,
    }
}

/// Without caches of any kind.
fn bare() -> StoreOptions {
    StoreOptions {
        memory_cache_bytes: 0,
        cache_uploads: false,
        ..Default::default()
    }
}

struct Rig {
    memory: Arc<InMemory>,
    failing: Arc<FailingStore>,
}

impl Rig {
    fn new(seed: u64, rates: Rates) -> Self {
        let memory = Arc::new(InMemory::new());
        let failing = Arc::new(FailingStore::new(Arc::clone(&memory) as _, seed, rates));
        Self { memory, failing }
    }

    fn store(&self, options: StoreOptions) -> Arc<SegmentStore> {
        let bucket = Bucket::over_store(Arc::clone(&self.failing) as _, "vol", &options).unwrap();
        SegmentStore::over(bucket, VOLUME, options).unwrap()
    }
}

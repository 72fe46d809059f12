//! [`SegmentStore`]: puts, reads and deletes the segments of one volume through the cache tiers.
//!
//! - [`options`]: how it behaves; values only
//! - `fetch`: pages of data, decoded
//! - `stored`: pages as they are stored, from disk tier or bucket, verified
//! - `frames`: whole frames, many with one request
//! - `keep`: what goes into the caches
//! - `local`: segments that lie on local disk
//! - `scans`: how far a fetch reaches
//! - `second`: another region's bucket, for what the own one lacks
//! - `flights`: what is being fetched, so that nobody fetches it twice

mod fetch;
mod flights;
mod frames;
mod keep;
mod local;
pub mod options;
mod scans;
mod second;
mod stored;

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use heliofs_proto::ids::{SegmentId, VolumeId};
use heliofs_proto::limits::FRAME_BYTES_MAX;
use heliofs_proto::v1::StorageConfig;
use object_store::PutPayload;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};

use crate::metrics::Metrics;
use crate::object::Bucket;
use crate::segment::codec::FrameEncoder;
use crate::segment::layout::PAGE_BYTES;
use crate::segment::object::FrameEntry;
use crate::segment::page::Compression;
use crate::{
    EncodedSegment, FrameNumber, FrameRange, SegmentBuilder, StoreError, StoreOptions, VolumeKey,
};
use fetch::Shared;
pub use second::CopyNews;
use second::Second;

/// Deletions of one [`SegmentStore::delete`] in flight.
const DELETES_MAX: usize = 16;

/// Least read-ahead: an object of the default size.
const READ_AHEAD_BYTES_MIN: u64 = 4 << 20;

/// Read-ahead before anything is known of the link.
const READ_AHEAD_BYTES_UNKNOWN: u64 = 8 << 20;

/// Of a frame, decoded on the runtime's own threads.
const DECODE_INLINE_BYTES: u32 = 256 << 10;

/// Prefetch budget is counted in units of this many bytes, so that it fits a semaphore's permits.
const BUDGET_UNIT: u64 = 4096;

/// The segments of one volume. One per mount; share it by `Arc`.
#[derive(Debug)]
pub struct SegmentStore {
    shared: Arc<Shared>,
    prefetch_budget: Arc<Semaphore>,
    cache_uploads: bool,
    runtime: Handle,
}

impl SegmentStore {
    /// Opens the store of volume `volume` (`volume_name` is the bucket prefix). Sends nothing: use [`SegmentStore::bucket`] and
    /// [`Bucket::check_marker`] to see whether it is the right one and answers. Must be called within a tokio runtime, which then
    /// runs its fetches.
    ///
    /// `volume` is the id that the segments were built under; on a mirror that is the source's.
    ///
    /// Errors: `Invalid`, when the volume is encrypted and neither passphrase nor RSA key is given too; `Denied` when they are wrong.
    /// Time: some 100 ms of this thread to open an encrypted volume's key.
    pub fn open(
        config: &StorageConfig,
        volume_name: &str,
        volume: VolumeId,
        options: StoreOptions,
    ) -> Result<Arc<Self>, StoreError> {
        let encoder = encoder(config, &options)?;
        let bucket = Bucket::open(config, volume_name, &options)?;
        // "none" is what a volume says that had a codec once.
        Self::build_over(
            bucket,
            None,
            volume,
            encoder,
            !config.compress.is_empty(),
            options,
        )
    }

    /// As [`SegmentStore::open`], with the bucket of another region, `second`, from which objects are read that `config`'s lacks.
    /// What reads find out is to be received and acted upon; when the receiver is dropped, reads bring no more than they need.
    pub fn open_with_second(
        config: &StorageConfig,
        second: &StorageConfig,
        volume_name: &str,
        volume: VolumeId,
        options: StoreOptions,
    ) -> Result<(Arc<Self>, mpsc::Receiver<CopyNews>), StoreError> {
        let encoder = encoder(config, &options)?;
        let bucket = Bucket::open(config, volume_name, &options)?;
        let second = Bucket::open_second(second, volume_name, &options)?;
        let (second, news) = Second::new(second, config.segment_bytes);
        let mixed = !config.compress.is_empty();
        let store = Self::build_over(bucket, Some(second), volume, encoder, mixed, options)?;
        Ok((store, news))
    }

    /// As [`SegmentStore::over`], with a second bucket, see [`SegmentStore::open_with_second`].
    pub fn over_two(
        bucket: Bucket,
        second: Bucket,
        segment_bytes: u64,
        volume: VolumeId,
        options: StoreOptions,
    ) -> Result<(Arc<Self>, mpsc::Receiver<CopyNews>), StoreError> {
        let (second, news) = Second::new(second, segment_bytes);
        let encoder = FrameEncoder::default();
        let store = Self::build_over(bucket, Some(second), volume, encoder, false, options)?;
        Ok((store, news))
    }

    /// These segments are in the second bucket, and not in ours: reads need not look.
    pub fn note_elsewhere(&self, segments: &[u64]) {
        if let Some(second) = &self.shared.second {
            second.note_elsewhere(segments);
        }
    }

    /// The segment is in our bucket now.
    pub fn note_here(&self, segment: SegmentId) {
        if let Some(second) = &self.shared.second {
            second.note_here(segment);
        }
    }

    /// Bytes that reads have brought from the second bucket; 0 without one.
    pub fn second_read_bytes(&self) -> u64 {
        self.shared.second.as_ref().map_or(0, Second::read_bytes)
    }

    /// The second bucket, if there is one.
    pub fn second_bucket(&self) -> Option<&Bucket> {
        self.shared.second.as_ref().map(Second::bucket)
    }

    /// As [`SegmentStore::open`], over a bucket that is open already, and without a codec for what it writes.
    pub fn over(
        bucket: Bucket,
        volume: VolumeId,
        options: StoreOptions,
    ) -> Result<Arc<Self>, StoreError> {
        Self::encoding(bucket, volume, FrameEncoder::default(), options)
    }

    /// As [`SegmentStore::over`]; `encoder` encodes what is written, and its key decrypts what is read.
    pub fn encoding(
        bucket: Bucket,
        volume: VolumeId,
        encoder: FrameEncoder,
        options: StoreOptions,
    ) -> Result<Arc<Self>, StoreError> {
        Self::build_over(bucket, None, volume, encoder, false, options)
    }

    fn build_over(
        bucket: Bucket,
        second: Option<Second>,
        volume: VolumeId,
        encoder: FrameEncoder,
        mixed: bool,
        options: StoreOptions,
    ) -> Result<Arc<Self>, StoreError> {
        let runtime = Handle::try_current()
            .map_err(|_| StoreError::Invalid("a segment store needs a tokio runtime".to_owned()))?;
        let budget = options.prefetch_bytes_max / BUDGET_UNIT;
        Ok(Arc::new(Self {
            prefetch_budget: Arc::new(Semaphore::new(
                (budget as usize).min(Semaphore::MAX_PERMITS),
            )),
            cache_uploads: options.cache_uploads,
            shared: Arc::new(Shared::new(
                bucket,
                second,
                volume,
                encoder,
                mixed,
                &options,
                runtime.clone(),
            )?),
            runtime,
        }))
    }

    /// An empty segment of this volume, whose frames are encoded as the volume asks for.
    pub fn builder(&self, id: SegmentId) -> SegmentBuilder {
        SegmentBuilder::encoding(self.shared.volume, id, self.shared.encoder.clone())
    }

    /// Builds a segment of `frames`, each given in pieces; compression and encryption run on a thread of their own.
    ///
    /// Errors: as [`SegmentBuilder::add_frame`].
    pub async fn build(
        &self,
        id: SegmentId,
        frames: Vec<Vec<Bytes>>,
    ) -> Result<(EncodedSegment, Vec<FrameNumber>), StoreError> {
        let mut builder = self.builder(id);
        let build = move || {
            let numbers = frames
                .into_iter()
                .map(|pieces| builder.add_frame(pieces))
                .collect::<Result<Vec<_>, _>>()?;
            Ok((builder.finish(), numbers))
        };
        if self.shared.encoder.is_plain() {
            return build();
        }
        self.runtime
            .spawn_blocking(build)
            .await
            .map_err(|error| StoreError::Invalid(format!("encoding was broken off: {error}")))?
    }

    /// The bucket below.
    pub fn bucket(&self) -> &Bucket {
        &self.shared.bucket
    }

    /// What has been counted.
    pub fn metrics(&self) -> &Metrics {
        self.shared.bucket.metrics()
    }

    /// Stores a segment. Durable once it returns `Ok`; then commit the extents. Putting the same segment again is fine.
    ///
    /// Errors: `AlreadyExists` (other bytes lie there: a segment id was used twice), `Denied`, `Unavailable` (it may or may not
    /// be stored: put it again, or abandon it), `Invalid` (built for another volume).
    pub async fn put(&self, segment: EncodedSegment) -> Result<(), StoreError> {
        if segment.volume != self.shared.volume {
            return Err(StoreError::Invalid(format!(
                "a segment of volume {} cannot be put into volume {}",
                segment.volume, self.shared.volume
            )));
        }
        let payload = PutPayload::from_iter(segment.chunks.iter().cloned());
        let name = segment.id.object_name();
        self.shared
            .bucket
            .put_new(&name, payload, segment.checksum)
            .await
            .inspect_err(|error| {
                if matches!(error, StoreError::AlreadyExists { .. }) {
                    tracing::error!(
                        volume = segment.volume.0,
                        segment = segment.id.0,
                        "an object with other bytes lies there already"
                    );
                }
            })?;
        if self.cache_uploads && self.shared.caches() {
            self.shared.cache_segment(&segment);
        }
        Ok(())
    }

    /// Reads bytes of a frame, every page of them verified. Concurrent readers of the same pages share one fetch, which goes on
    /// when a reader is dropped.
    ///
    /// Shape: exactly `at.length` bytes. Time: at most twice the deadline per request to the bucket (its turn, then its attempts), and
    /// one more request when the bytes do not verify.
    /// Errors: `NotFound` (the object is gone: refresh extents once), `Corrupt`, `Denied`,
    /// `Unavailable`, `Invalid` (longer than a frame can be).
    pub async fn read(&self, at: FrameRange) -> Result<Bytes, StoreError> {
        if u64::from(at.offset) + u64::from(at.length) > FRAME_BYTES_MAX {
            return Err(StoreError::Invalid(format!(
                "{at:?} is outside of any frame"
            )));
        }
        if at.length == 0 {
            return Ok(Bytes::new());
        }
        let wanted = at.pages();
        let first = wanted.start;
        let pages = Shared::pages(&self.shared, at.segment, at.frame, wanted).await?;
        let beyond = |page: u32| {
            self.shared.corrupt(
                &at,
                page,
                "the extent reaches beyond the end of its frame".to_owned(),
            )
        };
        let end = at.offset as usize + at.length as usize;
        let part = |page: u32, data: &Bytes| {
            let base = page as usize * PAGE_BYTES;
            let from = (at.offset as usize).max(base) - base;
            let to = end.min(base + PAGE_BYTES) - base;
            (to <= data.len())
                .then(|| data.slice(from..to))
                .ok_or_else(|| beyond(page))
        };
        if let [only] = &pages[..] {
            return part(first, only);
        }
        let mut bytes = BytesMut::with_capacity(at.length as usize);
        for (page, data) in (first..).zip(&pages) {
            bytes.extend_from_slice(&part(page, data)?);
        }
        Ok(bytes.freeze())
    }

    /// The frames of a segment, in order of place, from its footer in the bucket.
    ///
    /// Errors: `NotFound`, `Corrupt`, `Denied`, `Unavailable`.
    pub async fn frame_table(&self, segment: SegmentId) -> Result<Vec<FrameEntry>, StoreError> {
        self.shared.frame_table(segment).await
    }

    /// Whole frames as they are stored, page headers and all, from the bucket; every page verified. `entries` are in order of
    /// place. For compaction.
    ///
    /// Shape: one result per entry, in order. Errors: `NotFound`, `Corrupt`, `Denied`, `Unavailable`.
    pub async fn encoded_frames(
        &self,
        segment: SegmentId,
        entries: &[FrameEntry],
    ) -> Vec<Result<Bytes, StoreError>> {
        self.shared.encoded_frames(segment, entries).await
    }

    /// The data of a frame that [`Self::encoded_frames`] gave. Much of it is decoded on a thread of its own.
    ///
    /// Errors: `Corrupt`; `Denied` when it is encrypted with another key.
    pub async fn frame_data(
        &self,
        segment: SegmentId,
        entry: FrameEntry,
        encoded: Bytes,
    ) -> Result<Bytes, StoreError> {
        if entry.codec.is_plain() || entry.decoded_bytes <= DECODE_INLINE_BYTES {
            return self.shared.frame_data(segment, &entry, &encoded);
        }
        let shared = Arc::clone(&self.shared);
        self.runtime
            .spawn_blocking(move || shared.frame_data(segment, &entry, &encoded))
            .await
            .map_err(|error| StoreError::Invalid(format!("decoding was broken off: {error}")))?
    }

    /// How far ahead of a sequential reader to fetch: twice what the link to the bucket holds, so that it is never idle, but whole
    /// requests at least.
    pub fn read_ahead_bytes(&self) -> u64 {
        match self.shared.bucket.link_holds() {
            Some(bytes) => bytes.saturating_mul(2).max(READ_AHEAD_BYTES_MIN),
            None => READ_AHEAD_BYTES_UNKNOWN,
        }
    }

    /// Fetches ranges into the caches in the background. What exceeds the budget, or fails, is left to the read that needs it.
    pub fn prefetch(&self, ranges: Vec<FrameRange>) {
        for range in ranges {
            let pages = range.pages();
            let bytes = u64::from(pages.end - pages.start) * PAGE_BYTES as u64;
            let metrics = self.metrics();
            let units = u32::try_from(bytes / BUDGET_UNIT).unwrap_or(u32::MAX);
            let Ok(permit) = Arc::clone(&self.prefetch_budget).try_acquire_many_owned(units) else {
                metrics.prefetch_skipped_bytes.inc_by(bytes);
                continue;
            };
            metrics.prefetched_bytes.inc_by(bytes);
            // Registered before this returns: a read that follows at once shares the fetch.
            let warming = Shared::warm(&self.shared, range.segment, range.frame, pages);
            self.runtime.spawn(async move {
                if let Err(error) = warming.await {
                    tracing::debug!(?range, %error, "read-ahead failed; the read itself will try again");
                }
                drop(permit);
            });
        }
    }

    /// See [`crate::Bucket::check_epoch`].
    pub async fn check_epoch(&self, epoch: u32) -> Result<(), StoreError> {
        self.shared.bucket.check_epoch(epoch).await
    }

    /// Deletes segments from bucket and caches; one that does not exist is deleted already. One result per id, in order.
    pub async fn delete(&self, ids: &[SegmentId]) -> Vec<(SegmentId, Result<(), StoreError>)> {
        futures::stream::iter(ids.iter().copied())
            .map(|id| async move {
                let deleted = self.shared.bucket.delete(&id.object_name()).await;
                self.shared.forget(id);
                (id, deleted)
            })
            .buffered(DELETES_MAX)
            .collect()
            .await
    }

    /// Waits until what has been handed to the disk tier is written. For tests and for a clean end.
    pub async fn flush_cache(&self) {
        self.shared.flush_disk().await;
    }
}

/// How a volume's frames are encoded.
fn encoder(config: &StorageConfig, options: &StoreOptions) -> Result<FrameEncoder, StoreError> {
    let compression = Compression::parse(&config.compress).ok_or_else(|| {
        StoreError::Invalid(format!(
            "the volume is compressed with `{}`, which this release does not know; upgrade",
            config.compress
        ))
    })?;
    let key = match (&config.encryption, &options.opener) {
        (None, _) => None,
        (Some(encryption), Some(opener)) => Some(Arc::new(VolumeKey::open(encryption, opener)?)),
        (Some(_), None) => {
            return Err(StoreError::Invalid(
                "the volume is encrypted, and no passphrase or key was given".to_owned(),
            ));
        }
    };
    Ok(FrameEncoder { compression, key })
}

#[cfg(test)]
mod tests;

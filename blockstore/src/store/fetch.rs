//! Pages of data from memory, from a fetch under way, or decoded from what is stored: in this order.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use heliofs_proto::ids::{SegmentId, VolumeId};
use lru::LruCache;
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::flights::{Flight, Flights, Landing, Run};
use super::scans::Scans;
use super::second::Second;
use super::stored::{Front, Missed, PageLength, Stored};
use crate::cache::PageKey;
use crate::cache::disks::Disks;
use crate::cache::memory::MemoryTier;
use crate::object::Bucket;
use crate::segment::codec::{FrameEncoder, FrameFault, FrameHead};
use crate::segment::layout::PAGE_BYTES;
use crate::segment::object::FrameEntry;
use crate::segment::page::Page;
use crate::{FrameNumber, FrameRange, Kind, StoreError, StoreOptions};

/// Pages per request and per cache file: 4 MiB, and one for what leads the data of a frame. More is fetched in parallel.
pub(super) const RUN_PAGES_MAX: u32 = 65;

/// Frame tables of compacted segments kept in memory.
const TABLES_MAX: usize = 256;

/// Heads of encoded frames kept in memory; 64 of their blocks take 320 bytes.
const HEADS_MAX: usize = 8192;

/// Locks that readers of an encoded frame whose head is not known take turns at.
const HEAD_TURNS: usize = 64;

/// Blocks decoded on the runtime's own threads; more take long enough for a thread of their own.
const DECODE_INLINE_MAX: usize = 4;

/// How a frame is encoded.
#[derive(Clone, Debug)]
enum Head {
    /// Stored as it is.
    Plain,
    Encoded(Arc<FrameHead>),
}

/// What the tasks of one store share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) bucket: Bucket,
    /// Where objects are that the bucket lacks.
    pub(super) second: Option<Second>,
    pub(super) volume: VolumeId,
    pub(super) memory: Option<MemoryTier>,
    pub(super) disk: Option<Arc<Disks>>,
    flights: Arc<Flights>,
    pub(super) scans: Scans,
    pub(super) tables: Mutex<LruCache<SegmentId, Arc<Vec<FrameEntry>>>>,
    /// Of frames with more than one stored page, in volumes with a codec.
    heads: Mutex<LruCache<(SegmentId, FrameNumber), Head>>,
    head_turns: [tokio::sync::Mutex<()>; HEAD_TURNS],
    pub(super) encoder: FrameEncoder,
    /// Frames may be encoded: the volume has a codec, had one, or has shown one.
    mixed: AtomicBool,
    pub(super) runtime: Handle,
}

impl Shared {
    pub(super) fn new(
        bucket: Bucket,
        second: Option<Second>,
        volume: VolumeId,
        encoder: FrameEncoder,
        mixed: bool,
        options: &StoreOptions,
        runtime: Handle,
    ) -> Result<Self, StoreError> {
        let metrics = bucket.metrics();
        let memory = (options.memory_cache_bytes > 0)
            .then(|| MemoryTier::new(options.memory_cache_bytes, metrics.memory_bytes.clone()));
        let disk = options
            .disk_cache
            .as_ref()
            .map(|disk| Disks::open(disk, bucket.volume_name(), volume, metrics))
            .transpose()?;
        Ok(Self {
            memory,
            disk: disk.map(Arc::new),
            flights: Arc::default(),
            scans: Scans::new(),
            tables: Mutex::new(LruCache::new(
                NonZeroUsize::new(TABLES_MAX).expect("a constant above 0"),
            )),
            heads: Mutex::new(LruCache::new(
                NonZeroUsize::new(HEADS_MAX).expect("a constant above 0"),
            )),
            head_turns: std::array::from_fn(|_| tokio::sync::Mutex::new(())),
            mixed: AtomicBool::new(mixed || !encoder.is_plain()),
            encoder,
            bucket,
            second,
            volume,
            runtime,
        })
    }

    #[cfg(test)]
    pub(super) fn expect_plain(&self) {
        self.mixed.store(false, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(super) fn expect_codecs(&self) {
        self.mixed.store(true, Ordering::Relaxed);
    }

    /// The pages `wanted` of a frame, in order.
    pub(super) async fn pages(
        this: &Arc<Self>,
        segment: SegmentId,
        frame: FrameNumber,
        wanted: Range<u32>,
    ) -> Result<Vec<Bytes>, StoreError> {
        let mut found: Vec<Option<Bytes>> = match &this.memory {
            Some(memory) => wanted
                .clone()
                .map(|page| {
                    memory.get(&PageKey {
                        segment,
                        frame,
                        page,
                    })
                })
                .collect(),
            None => vec![None; wanted.len()],
        };
        let missing: Vec<u32> = wanted
            .clone()
            .zip(&found)
            .filter(|(_, page)| page.is_none())
            .map(|(n, _)| n)
            .collect();
        this.bucket
            .metrics()
            .memory_hits
            .inc_by((wanted.len() - missing.len()) as u64);
        for (page, flight) in Self::enlist(this, segment, frame, missing) {
            let run = flight.await.map_err(|_| this.broken_off(segment))?;
            let result = run
                .page(page)
                .unwrap_or_else(|| Err(this.broken_off(segment)));
            found[(page - wanted.start) as usize] = Some(result?);
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// Begins to fetch what is neither in memory nor under way; the fetches are registered when it returns. The answer waits for
    /// them, and says whether all went well.
    pub(super) fn warm(
        this: &Arc<Self>,
        segment: SegmentId,
        frame: FrameNumber,
        wanted: Range<u32>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        let absent = |page: &u32| {
            let key = PageKey {
                segment,
                frame,
                page: *page,
            };
            !this
                .memory
                .as_ref()
                .is_some_and(|memory| memory.contains(&key))
        };
        let flights = Self::enlist(this, segment, frame, wanted.filter(absent).collect());
        let this = Arc::clone(this);
        async move {
            for (page, flight) in flights {
                let run = flight.await.map_err(|_| this.broken_off(segment))?;
                if let Some(Err(error)) = run.page(page) {
                    return Err(error);
                }
            }
            Ok(())
        }
    }

    /// Finds or begins a fetch for each of the pages, which rise.
    fn enlist(
        this: &Arc<Self>,
        segment: SegmentId,
        frame: FrameNumber,
        missing: Vec<u32>,
    ) -> Vec<(u32, Flight)> {
        if missing.is_empty() {
            return Vec::new();
        }
        let mut waits: Vec<(u32, Flight)> = Vec::with_capacity(missing.len());
        let mut table = this.flights.lock();
        let mut absent: Vec<Range<u32>> = Vec::new();
        for page in missing {
            let key = PageKey {
                segment,
                frame,
                page,
            };
            if let Some(flight) = table.get(&key) {
                this.bucket.metrics().shared_fetches.inc();
                waits.push((page, flight.clone()));
                continue;
            }
            match absent.last_mut() {
                Some(run) if run.end == page && run.end - run.start < RUN_PAGES_MAX => run.end += 1,
                _ => absent.push(page..page + 1),
            }
        }
        for run in absent {
            let (landing, flight) =
                Landing::register(&this.flights, &mut table, segment, frame, run.clone());
            waits.extend(run.clone().map(|page| (page, flight.clone())));
            let task = Arc::clone(this);
            // A task of its own: a reader that goes away leaves the others their pages.
            this.runtime.spawn(async move {
                let fetched = task.fetch(segment, frame, run).await;
                landing.land(fetched);
            });
        }
        waits
    }

    fn broken_off(&self, segment: SegmentId) -> StoreError {
        StoreError::Unavailable {
            operation: "get",
            key: self.bucket.key(&segment.object_name()),
            waited: std::time::Duration::ZERO,
            attempts: 0,
            detail: "the fetch was broken off; the mount is ending".to_owned(),
        }
    }

    /// Fetches pages of data that are neither in memory nor under way.
    async fn fetch(
        self: &Arc<Self>,
        segment: SegmentId,
        frame: FrameNumber,
        wanted: Range<u32>,
    ) -> Run {
        // Pages that were decoded have buffers of their own; others may share one.
        let (pages, shared) = match self.find_head(segment, frame, &wanted).await {
            Ok((Head::Plain, stored)) => {
                let pages = self.plain(segment, frame, &wanted, stored).await;
                (pages, wanted.len() > 1)
            }
            Ok((Head::Encoded(head), stored)) => {
                let pages = self.encoded(segment, frame, &wanted, head, stored).await;
                (pages, false)
            }
            Err(error) => (vec![Err(error); wanted.len()], false),
        };
        for (page, data) in wanted.clone().zip(&pages) {
            if let Ok(data) = data {
                self.remember(segment, frame, page, data.clone(), shared);
            }
        }
        Run {
            first: wanted.start,
            pages,
        }
    }

    /// How a frame is encoded, and the stored pages that had to be fetched to learn it.
    async fn find_head(
        self: &Arc<Self>,
        segment: SegmentId,
        frame: FrameNumber,
        wanted: &Range<u32>,
    ) -> Result<(Head, Vec<(u32, Stored)>), StoreError> {
        let known = || self.heads.lock().get(&(segment, frame)).cloned();
        if let Some(head) = known() {
            return Ok((head, Vec::new()));
        }
        // A frame that is read in the middle: its first page is needed first, by all who read it now.
        let mixed = self.mixed.load(Ordering::Relaxed);
        let _turn = match !mixed || wanted.start == 0 {
            true => None,
            false => Some(self.head_turns[frame.0 as usize % HEAD_TURNS].lock().await),
        };
        if let Some(head) = known() {
            return Ok((head, Vec::new()));
        }
        let front = match mixed && wanted.start > 0 {
            true => self.front(segment, frame).await?,
            false => Front::Untold,
        };
        let likely_plain = match front {
            Front::Encoded(head) => {
                let head = Head::Encoded(head);
                self.heads.lock().put((segment, frame), head.clone());
                return Ok((head, Vec::new()));
            }
            Front::Plain => true,
            Front::Untold => !mixed,
        };
        let mut stored: Vec<(u32, Stored)> = match (likely_plain, wanted.start) {
            (true, _) => {
                let length = PageLength::Guess(PAGE_BYTES);
                let fetched = self.stored_pages(segment, frame, wanted.clone(), length);
                wanted.clone().zip(fetched.await).collect()
            }
            // No longer than its data, but for the prelude: what is asked for, if it begins at the front, is there too.
            (false, 0) => self.front_pages(segment, frame, wanted.end).await,
            (false, _) => self.front_pages(segment, frame, 1).await,
        };
        let codec = |stored: &[(u32, Stored)]| {
            stored
                .iter()
                .find_map(|(_, page)| page.as_ref().ok().map(|page| page.codec))
        };
        if codec(&stored).is_none() && likely_plain && wanted.start > 0 {
            // Nothing of it is there: perhaps it is encoded and ends before. Another mount may write with a codec by now.
            stored.extend(self.front_pages(segment, frame, 1).await);
        }
        if codec(&stored).is_none() {
            // How long the pages are was a guess: what is wrong is found out again by who wants to know it of a certain page.
            let corrupt = |error: &StoreError| error.kind() == Kind::Corrupt;
            stored
                .retain(|(_, page)| !matches!(page, Err(Missed::Failed(error)) if corrupt(error)));
        }
        if codec(&stored).is_none_or(|codec| codec.is_plain()) {
            let several = |page: &Page| page.frame_bytes as usize > page.codec.page_bytes();
            if mixed && stored.iter().flat_map(|(_, page)| page).any(several) {
                self.heads.lock().put((segment, frame), Head::Plain);
            }
            return Ok((Head::Plain, stored));
        }
        self.mixed.store(true, Ordering::Relaxed);
        if !stored.iter().any(|(page, _)| *page == 0) {
            stored.extend(self.front_pages(segment, frame, 1).await);
        }
        let at = FrameRange {
            segment,
            frame,
            offset: 0,
            length: 0,
        };
        let front = match stored.iter().find(|(page, _)| *page == 0) {
            Some((_, Ok(page))) => page,
            Some((_, Err(Missed::Failed(error)))) => return Err(error.clone()),
            Some((_, Err(Missed::Beyond))) | None => {
                return Err(self.corrupt(&at, 0, "the frame has no first page".to_owned()));
            }
        };
        let head = Head::Encoded(Arc::new(self.parse_head(segment, frame, front)?));
        if front.frame_bytes as usize > front.codec.page_bytes() {
            self.heads.lock().put((segment, frame), head.clone());
        }
        Ok((head, stored))
    }

    /// What the first page of an encoded frame says.
    pub(super) fn parse_head(
        &self,
        segment: SegmentId,
        frame: FrameNumber,
        page: &Page,
    ) -> Result<FrameHead, StoreError> {
        let key = self.encoder.key.as_deref();
        FrameHead::parse(&page.data, page.identity, page.codec, page.frame_bytes, key)
            .map_err(|fault| self.undecodable(segment, frame, 0, &fault))
    }

    pub(super) fn undecodable(
        &self,
        segment: SegmentId,
        frame: FrameNumber,
        page: u32,
        fault: &FrameFault,
    ) -> StoreError {
        match fault {
            FrameFault::NoKey(_) | FrameFault::OtherKey { .. } => StoreError::Denied {
                operation: "decrypt",
                key: self.bucket.key(&segment.object_name()),
                detail: fault.to_string(),
            },
            FrameFault::Prelude(_) | FrameFault::Decrypt(_) | FrameFault::Decompress(_) => {
                let at = FrameRange {
                    segment,
                    frame,
                    offset: 0,
                    length: 0,
                };
                self.corrupt(&at, page, fault.to_string())
            }
        }
    }

    /// Stored pages of a frame: those that are here, and the others.
    async fn complete(
        self: &Arc<Self>,
        segment: SegmentId,
        frame: FrameNumber,
        wanted: Range<u32>,
        stored: Vec<(u32, Stored)>,
        page_bytes: usize,
    ) -> Vec<Stored> {
        let mut pages: Vec<Option<Stored>> = vec![None; wanted.len()];
        for (page, found) in stored {
            if wanted.contains(&page) {
                pages[(page - wanted.start) as usize] = Some(found);
            }
        }
        let absent = |slot: &Option<Stored>| slot.is_none();
        if let Some(first) = pages.iter().position(absent) {
            // In one piece: what is here lies at the front.
            let rest = wanted.start + first as u32..wanted.end;
            let length = PageLength::Known(page_bytes);
            let fetched = self.stored_pages(segment, frame, rest, length).await;
            for (slot, page) in pages[first..].iter_mut().zip(fetched) {
                *slot = Some(page);
            }
        }
        pages.into_iter().flatten().collect()
    }

    async fn plain(
        self: &Arc<Self>,
        segment: SegmentId,
        frame: FrameNumber,
        wanted: &Range<u32>,
        stored: Vec<(u32, Stored)>,
    ) -> Vec<Result<Bytes, StoreError>> {
        let pages = self.complete(segment, frame, wanted.clone(), stored, PAGE_BYTES);
        pages
            .await
            .into_iter()
            .zip(wanted.clone())
            .map(|(page, number)| match page {
                Ok(page) if page.codec.is_plain() => Ok(page.data),
                Ok(_) => Err(self.missing(segment, frame, number)),
                Err(Missed::Beyond) => Err(self.missing(segment, frame, number)),
                Err(Missed::Failed(error)) => Err(error),
            })
            .collect()
    }

    fn missing(&self, segment: SegmentId, frame: FrameNumber, page: u32) -> StoreError {
        let at = FrameRange {
            segment,
            frame,
            offset: 0,
            length: 0,
        };
        self.corrupt(&at, page, "missing".to_owned())
    }

    async fn encoded(
        self: &Arc<Self>,
        segment: SegmentId,
        frame: FrameNumber,
        wanted: &Range<u32>,
        head: Arc<FrameHead>,
        stored: Vec<(u32, Stored)>,
    ) -> Vec<Result<Bytes, StoreError>> {
        let blocks = wanted.start.min(head.blocks())..wanted.end.min(head.blocks());
        let mut found: Vec<Result<Bytes, StoreError>> = Vec::with_capacity(wanted.len());
        if !blocks.is_empty() {
            let bytes = head.stored_range(blocks.clone());
            let page_bytes = head.page_bytes() as u32;
            let pages = bytes.start / page_bytes..bytes.end.div_ceil(page_bytes);
            let stored = self.complete(segment, frame, pages.clone(), stored, page_bytes as usize);
            let stored = stored.await;
            // Blocks lie across the borders of pages: one bad page spoils those that touch it.
            let mut contiguous = Vec::with_capacity(stored.len() * page_bytes as usize);
            let mut faults = Vec::new();
            for (page, stored) in pages.clone().zip(stored) {
                let full = page_bytes.min(head.stored_bytes() - page * page_bytes) as usize;
                match stored {
                    Ok(stored) if stored.data.len() == full => {
                        contiguous.extend_from_slice(&stored.data);
                    }
                    Ok(_) | Err(Missed::Beyond) => {
                        faults.push((page, self.missing(segment, frame, page)));
                        contiguous.resize(contiguous.len() + full, 0);
                    }
                    Err(Missed::Failed(error)) => {
                        faults.push((page, error));
                        contiguous.resize(contiguous.len() + full, 0);
                    }
                }
            }
            let base = pages.start * page_bytes;
            let decode = {
                let (head, blocks) = (Arc::clone(&head), blocks.clone());
                move || {
                    let from = (bytes.start - base) as usize;
                    let to = (bytes.end - base) as usize;
                    head.decode(blocks, &contiguous[from..to])
                }
            };
            let decoded = match blocks.len() > DECODE_INLINE_MAX {
                true => self.runtime.spawn_blocking(decode).await,
                false => Ok(decode()),
            };
            let Ok(decoded) = decoded else {
                return vec![Err(self.broken_off(segment)); wanted.len()];
            };
            for (block, data) in blocks.clone().zip(decoded) {
                let range = head.stored_range(block..block + 1);
                let touched = range.start / page_bytes..range.end.div_ceil(page_bytes);
                let fault = faults.iter().find(|(page, _)| touched.contains(page));
                found.push(match (fault, data) {
                    (Some((_, error)), _) => Err(error.clone()),
                    (None, Ok(data)) => Ok(data),
                    (None, Err(fault)) => Err(self.undecodable(segment, frame, block, &fault)),
                });
            }
        }
        for page in wanted.clone().skip(found.len()) {
            found.push(Err(self.missing(segment, frame, page)));
        }
        found
    }

    /// The error for a page that is wrong for good; logged, since a person must look.
    pub(super) fn corrupt(&self, at: &FrameRange, page: u32, detail: String) -> StoreError {
        tracing::error!(
            volume = self.volume.0,
            segment = at.segment.0,
            frame = at.frame.0,
            page,
            detail,
            "corrupt data"
        );
        StoreError::Corrupt {
            volume: self.volume,
            segment: at.segment,
            frame: at.frame.0,
            page,
            detail,
        }
    }
}

//! Pages from memory, from a fetch under way, from disk, from the bucket: in this order, verified at every door.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use heliofs_proto::ids::{SegmentId, VolumeId};
use lru::LruCache;
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::flights::{Flight, Flights, Landing, Run};
use crate::cache::PageKey;
use crate::cache::disk::DiskTier;
use crate::cache::memory::MemoryTier;
use crate::object::Bucket;
use crate::segment::layout::{PAGE_BYTES, PAGE_STRIDE, TRAILER_BYTES};
use crate::segment::object::{FrameEntry, decode_footer, decode_trailer};
use crate::segment::page::{Page, PageFault, PageIdentity, take_page};
use crate::{FrameNumber, FrameRange, StoreError, StoreOptions};

/// Pages per request and per cache file: 4 MiB. More is fetched in parallel.
pub(super) const RUN_PAGES_MAX: u32 = 64;

/// Frame tables of compacted segments kept in memory.
const TABLES_MAX: usize = 256;

/// First guess at a footer's length: 250 frames.
const FOOTER_GUESS_BYTES: u64 = 8192;

const _: () = assert!(FOOTER_GUESS_BYTES > TRAILER_BYTES as u64);

/// What the tasks of one store share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) bucket: Bucket,
    pub(super) volume: VolumeId,
    pub(super) memory: Option<MemoryTier>,
    pub(super) disk: Option<Arc<DiskTier>>,
    flights: Arc<Flights>,
    pub(super) tables: Mutex<LruCache<SegmentId, Arc<Vec<FrameEntry>>>>,
    runtime: Handle,
}

impl Shared {
    pub(super) fn new(
        bucket: Bucket,
        volume: VolumeId,
        options: &StoreOptions,
        runtime: Handle,
    ) -> Result<Self, StoreError> {
        let metrics = bucket.metrics();
        let memory = (options.memory_cache_bytes > 0)
            .then(|| MemoryTier::new(options.memory_cache_bytes, metrics.memory_bytes.clone()));
        let disk = options
            .disk_cache
            .clone()
            .map(|disk| DiskTier::open(disk, bucket.volume_name(), volume, Arc::clone(metrics)))
            .transpose()?;
        Ok(Self {
            memory,
            disk: disk.map(Arc::new),
            flights: Arc::default(),
            tables: Mutex::new(LruCache::new(
                NonZeroUsize::new(TABLES_MAX).expect("a constant above 0"),
            )),
            bucket,
            volume,
            runtime,
        })
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

    /// Fetches pages that are neither in memory nor under way.
    async fn fetch(
        self: &Arc<Self>,
        segment: SegmentId,
        frame: FrameNumber,
        wanted: Range<u32>,
    ) -> Run {
        let mut pages: Vec<Option<Result<Bytes, StoreError>>> = vec![None; wanted.len()];
        if let Some(disk) = &self.disk
            && disk.may_have(segment, frame, wanted.clone())
        {
            let disk = Arc::clone(disk);
            let range = wanted.clone();
            let read = self
                .runtime
                .spawn_blocking(move || disk.read(segment, frame, range))
                .await;
            for (slot, page) in pages.iter_mut().zip(read.unwrap_or_default()) {
                *slot = page.map(Ok);
            }
            let hits = pages.iter().flatten().count() as u64;
            self.bucket.metrics().disk_hits.inc_by(hits);
            for (page, data) in wanted.clone().zip(&pages) {
                if let Some(Ok(data)) = data {
                    self.remember(segment, frame, page, data.clone(), wanted.len() > 1);
                }
            }
        }
        let mut runs: Vec<Range<u32>> = Vec::new();
        for (page, _) in wanted
            .clone()
            .zip(&pages)
            .filter(|(_, found)| found.is_none())
        {
            match runs.last_mut() {
                Some(run) if run.end == page => run.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
        let fetches = runs
            .iter()
            .map(|run| self.download(segment, frame, run.clone()));
        for (run, fetched) in runs.iter().zip(futures::future::join_all(fetches).await) {
            let at = (run.start - wanted.start) as usize;
            for (slot, page) in pages[at..].iter_mut().zip(fetched) {
                *slot = Some(page);
            }
        }
        let lost = || {
            Err(StoreError::Invalid(
                "a page was neither found nor refused".to_owned(),
            ))
        };
        Run {
            first: wanted.start,
            pages: pages
                .into_iter()
                .map(|page| page.unwrap_or_else(lost))
                .collect(),
        }
    }

    /// Fetches pages from the bucket. Bytes that fail verification are fetched once more: a flip on the way heals, one in the
    /// bucket does not.
    async fn download(
        &self,
        segment: SegmentId,
        frame: FrameNumber,
        wanted: Range<u32>,
    ) -> Vec<Result<Bytes, StoreError>> {
        let name = segment.object_name();
        let metrics = self.bucket.metrics();
        metrics.misses.inc_by(wanted.len() as u64);
        let mut good: Vec<Option<Bytes>> = vec![None; wanted.len()];
        let mut faults: Vec<Option<PageFault>> = vec![None; wanted.len()];
        for _ in 0..2 {
            let bytes = match self
                .bucket
                .get_range(&name, frame.byte_range(wanted.clone()))
                .await
            {
                Ok(bytes) => bytes,
                Err(error) => {
                    return good
                        .into_iter()
                        .map(|page| page.ok_or_else(|| error.clone()))
                        .collect();
                }
            };
            let mut origin = PageIdentity {
                volume: self.volume,
                segment,
                frame,
            };
            let mut decoded = decode(&bytes, &origin, wanted.clone());
            if let Some(moved) = moved_from(&decoded)
                && moved != origin
            {
                match self.origin_of(segment, frame).await {
                    Ok(Some(entry)) if entry == moved => {
                        origin = moved;
                        decoded = decode(&bytes, &origin, wanted.clone());
                    }
                    Ok(_) => {}
                    Err(error) => {
                        return good
                            .into_iter()
                            .map(|page| page.ok_or_else(|| error.clone()))
                            .collect();
                    }
                }
            }
            let whole = decoded.iter().all(Result::is_ok);
            let frame_bytes = decoded.iter().flatten().map(|page| page.frame_bytes).next();
            for (at, page) in decoded.into_iter().enumerate() {
                let number = wanted.start + at as u32;
                match page {
                    Ok(page) => {
                        self.remember(segment, frame, number, page.data.clone(), wanted.len() > 1);
                        good[at] = Some(page.data);
                        faults[at] = None;
                    }
                    Err(fault) if good[at].is_none() => {
                        tracing::warn!(
                            volume = self.volume.0, segment = segment.0, frame = frame.0, page = number,
                            %fault, "a page from the bucket fails verification"
                        );
                        metrics.corrupt_pages.inc();
                        faults[at] = Some(fault);
                    }
                    Err(_) => {}
                }
            }
            if whole {
                self.keep_on_disk(segment, frame, wanted.clone(), origin, &bytes, frame_bytes);
                self.harvest(
                    segment,
                    frame,
                    wanted.end,
                    &bytes,
                    wanted.start,
                    frame_bytes,
                );
            }
            // A page behind the end of its frame will not come into being.
            let beyond = |at: usize| {
                let begin = u64::from(wanted.start + at as u32) * PAGE_BYTES as u64;
                frame_bytes.is_some_and(|length| begin >= u64::from(length))
            };
            if (0..good.len()).all(|at| good[at].is_some() || beyond(at)) {
                break;
            }
        }
        let at = FrameRange {
            segment,
            frame,
            offset: 0,
            length: 0,
        };
        good.into_iter()
            .zip(faults)
            .enumerate()
            .map(|(n, (page, fault))| match (page, fault) {
                (Some(page), _) => Ok(page),
                (None, fault) => {
                    let detail = fault.map_or_else(|| "missing".to_owned(), |f| f.to_string());
                    Err(self.corrupt(&at, wanted.start + n as u32, detail))
                }
            })
            .collect()
    }

    /// The name that the pages of a frame carry according to its segment's footer; `None` when the footer lists no such frame.
    async fn origin_of(
        &self,
        segment: SegmentId,
        frame: FrameNumber,
    ) -> Result<Option<PageIdentity>, StoreError> {
        let known = self.tables.lock().get(&segment).cloned();
        let table = match known {
            Some(table) => table,
            None => {
                let table = Arc::new(self.frame_table(segment).await?);
                self.tables.lock().put(segment, Arc::clone(&table));
                table
            }
        };
        let entry = table
            .binary_search_by_key(&frame, |entry| entry.frame)
            .map(|at| table[at]);
        Ok(entry.ok().map(|entry| entry.identity(self.volume)))
    }

    async fn frame_table(&self, segment: SegmentId) -> Result<Vec<FrameEntry>, StoreError> {
        let name = segment.object_name();
        let mut fault = None;
        for _ in 0..2 {
            let mut tail = self.bucket.get_tail(&name, FOOTER_GUESS_BYTES).await?;
            let table = match decode_trailer(&tail) {
                Ok(trailer) => {
                    if trailer.footer_bytes > tail.len() as u64 {
                        tail = self.bucket.get_tail(&name, trailer.footer_bytes).await?;
                    }
                    decode_footer(&tail, self.volume, segment)
                }
                Err(fault) => Err(fault),
            };
            match table {
                Ok(table) => return Ok(table),
                Err(found) => fault = Some(found),
            }
        }
        let at = FrameRange {
            segment,
            frame: FrameNumber(0),
            offset: 0,
            length: 0,
        };
        let detail = fault.map_or_else(String::new, |fault| fault.to_string());
        Err(self.corrupt(&at, 0, detail))
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

/// Verifies each of `pages` by itself; `bytes` begins with the first.
fn decode(bytes: &Bytes, origin: &PageIdentity, pages: Range<u32>) -> Vec<Result<Page, PageFault>> {
    pages
        .enumerate()
        .map(|(n, page)| {
            let mut rest = bytes.slice((n * PAGE_STRIDE).min(bytes.len())..);
            take_page(&mut rest, origin, page)
        })
        .collect()
}

/// The name that sound pages carry when it is not the one expected: a frame that compaction has moved, or misdirected bytes.
fn moved_from(pages: &[Result<Page, PageFault>]) -> Option<PageIdentity> {
    pages.iter().find_map(|page| match page {
        Err(PageFault::Foreign { identity, .. }) => Some(*identity),
        _ => None,
    })
}

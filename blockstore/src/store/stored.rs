//! Pages as they are stored, with codec and checksum: from the disk tier, or from the bucket.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use heliofs_proto::ids::SegmentId;

use super::fetch::Shared;
use super::second::{CopyNews, Origin, Part};
use crate::cache::disks::Disks;
use crate::segment::codec::FrameHead;
use crate::segment::layout::{FINE_PAGE_BYTES, PAGE_BYTES, PAGE_HEADER_BYTES, TRAILER_BYTES};
use crate::segment::object::{FrameEntry, decode_footer, decode_trailer};
use crate::segment::page::{Page, PageFault, PageIdentity, page_bytes_at, peek, take_page};
use crate::{FrameNumber, FrameRange, StoreError};

/// First guess at a footer's length: 250 frames.
const FOOTER_GUESS_BYTES: u64 = 8192;

/// The header of a frame's first page and the prelude of a frame of up to 6 MiB, more than a mount makes by itself.
const FRONT_BYTES: u64 = 512;

const _: () = assert!(FOOTER_GUESS_BYTES > TRAILER_BYTES as u64);

/// Why a stored page can't be had.
#[derive(Clone, Debug)]
pub(super) enum Missed {
    /// The frame ends before it.
    Beyond,
    /// It can't be read.
    Failed(StoreError),
}

/// What the first few hundred bytes of a frame tell.
pub(super) enum Front {
    /// Its prelude, by its own checksum.
    Encoded(Arc<FrameHead>),
    /// Most likely it is stored as it is: the pages that are wanted say so for sure.
    Plain,
    /// Only the whole first page does: it is on this disk, was moved, is of an earlier release, or damaged.
    Untold,
}

/// Stored bytes per page of a frame.
#[derive(Clone, Copy)]
pub(super) enum PageLength {
    /// As the frame's head says.
    Known(usize),
    /// Nothing of the frame was seen yet.
    Guess(usize),
}

impl PageLength {
    fn bytes(self) -> usize {
        match self {
            Self::Known(bytes) | Self::Guess(bytes) => bytes,
        }
    }
}

/// A stored page, or why not.
pub(super) type Stored = Result<Page, Missed>;

impl Shared {
    /// The first stored pages of a frame of which nothing is known, enough for its first `pages` pages of data if the frame is no
    /// longer than its data.
    ///
    /// Shape: as many as there are, from page 0, at least one.
    pub(super) async fn front_pages(
        self: &Arc<Self>,
        segment: SegmentId,
        frame: FrameNumber,
        pages: u32,
    ) -> Vec<(u32, Stored)> {
        let here = |disk: &Arc<_>| Disks::may_have(disk, segment, frame, 0..1);
        let stored = if self.disk.as_ref().is_some_and(here) {
            let length = PageLength::Guess(PAGE_BYTES);
            self.stored_pages(segment, frame, 0..1, length).await
        } else {
            let fine = pages * (PAGE_BYTES / FINE_PAGE_BYTES) as u32;
            // What encryption adds to many pages would cost a request of its own.
            let wanted = 0..fine + u32::from(pages > 1);
            let length = PageLength::Guess(FINE_PAGE_BYTES);
            self.download(segment, frame, wanted, length).await
        };
        (0..).zip(stored).collect()
    }

    /// The stored pages `wanted` of a frame, in order, verified.
    pub(super) async fn stored_pages(
        self: &Arc<Self>,
        segment: SegmentId,
        frame: FrameNumber,
        wanted: Range<u32>,
        length: PageLength,
    ) -> Vec<Stored> {
        let mut pages: Vec<Option<Stored>> = vec![None; wanted.len()];
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
        }
        // What lies behind the frame's end is nowhere.
        let mut length = length;
        if let Some(Ok(here)) = pages.iter().flatten().next() {
            let (page_bytes, frame_bytes) = (here.codec.page_bytes(), here.frame_bytes);
            length = PageLength::Known(page_bytes);
            for (page, slot) in wanted.clone().zip(&mut pages) {
                if slot.is_none() && is_beyond(page, frame_bytes, page_bytes) {
                    *slot = Some(Err(Missed::Beyond));
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
            .map(|run| self.download(segment, frame, run.clone(), length));
        for (run, fetched) in runs.iter().zip(futures::future::join_all(fetches).await) {
            let at = (run.start - wanted.start) as usize;
            for (slot, page) in pages[at..].iter_mut().zip(fetched) {
                *slot = Some(page);
            }
        }
        pages
            .into_iter()
            .map(|page| page.unwrap_or(Err(Missed::Beyond)))
            .collect()
    }

    /// How a frame is encoded, from its first few hundred bytes: whoever reads in the middle of it needs no more of its first page.
    pub(super) async fn front(
        &self,
        segment: SegmentId,
        frame: FrameNumber,
    ) -> Result<Front, StoreError> {
        if let Some(disk) = &self.disk
            && disk.may_have(segment, frame, 0..1)
        {
            return Ok(Front::Untold);
        }
        let first = |bytes: u64| Part::Range(frame.start()..frame.start() + bytes);
        let (mut bytes, _) = self.part(segment, first(FRONT_BYTES), 0).await?;
        let Some((identity, codec, stored_bytes)) = peek(&bytes) else {
            return Ok(Front::Untold);
        };
        let own = PageIdentity {
            volume: self.volume,
            segment,
            frame,
        };
        // One that compaction has moved carries the name that it had before.
        if identity != own && self.origin_of(segment, frame).await? != Some(identity) {
            return Ok(Front::Untold);
        }
        if codec.is_plain() {
            return Ok(Front::Plain);
        }
        let whole = FrameHead::prelude_bytes(&bytes[PAGE_HEADER_BYTES..]);
        let whole = (PAGE_HEADER_BYTES + whole.unwrap_or_default()) as u64;
        if whole > FRONT_BYTES {
            (bytes, _) = self.part(segment, first(whole), 0).await?;
        }
        let front = bytes.get(PAGE_HEADER_BYTES..).unwrap_or_default();
        let key = self.encoder.key.as_deref();
        match FrameHead::parse_front(front, identity, codec, stored_bytes, key) {
            None => Ok(Front::Untold),
            Some(Ok(head)) => Ok(Front::Encoded(Arc::new(head))),
            Some(Err(fault)) => Err(self.undecodable(segment, frame, 0, &fault)),
        }
    }

    /// Fetches pages from the bucket. Bytes that fail verification are fetched once more: a flip on the way heals, one in the
    /// bucket does not.
    ///
    /// Shape: one item per page; if the length was a wrong guess and page 0 is wanted, as many of the frame's first pages as the
    /// bytes that were asked for have.
    async fn download(
        &self,
        segment: SegmentId,
        frame: FrameNumber,
        mut wanted: Range<u32>,
        length: PageLength,
    ) -> Vec<Stored> {
        let mut page_bytes = length.bytes();
        let guessed = matches!(length, PageLength::Guess(_));
        let metrics = self.bucket.metrics();
        metrics.misses.inc_by(wanted.len() as u64);
        let mut good: Vec<Option<Page>> = vec![None; wanted.len()];
        let mut faults: Vec<Option<PageFault>> = vec![None; wanted.len()];
        let mut frame_bytes = None;
        let own = frame.byte_range(wanted.clone(), page_bytes);
        let reach = match (wanted.start, &self.memory) {
            (0, Some(_)) => self.scans.reach(segment, own.clone()),
            // What would come along could not be kept, or is fetched by the readers of this frame.
            _ => own.clone(),
        };
        // Bad bytes of the own bucket, if there is another one to get good ones from.
        let mut bad_copy = false;
        for attempt in 0..self.attempts() {
            let or_error = |good: Vec<Option<Page>>, error: StoreError| {
                good.into_iter()
                    .map(|page| page.ok_or_else(|| Missed::Failed(error.clone())))
                    .collect()
            };
            let (bytes, from) = match self
                .part(segment, Part::Range(reach.clone()), attempt)
                .await
            {
                Ok(got) => got,
                Err(error) => return or_error(good, error),
            };
            if reach.end > own.end && (bytes.len() as u64) < reach.end - reach.start {
                self.scans.ended(&reach);
            }
            let mut origin = PageIdentity {
                volume: self.volume,
                segment,
                frame,
            };
            if guessed && wanted.start == 0 {
                let found = likely_page_bytes(&bytes, &origin, page_bytes, own.end - own.start);
                if found != page_bytes {
                    page_bytes = found;
                    wanted = 0..whole_pages(own.end - own.start, page_bytes);
                    good = vec![None; wanted.len()];
                    faults = vec![None; wanted.len()];
                }
            }
            let mut decoded = decode(&bytes, &origin, wanted.clone(), page_bytes);
            if guessed
                && wanted.start > 0
                && decoded.iter().all(Result::is_err)
                && let Ok(Front::Encoded(_)) = self.front(segment, frame).await
            {
                // Its pages are elsewhere.
                return vec![Err(Missed::Beyond); wanted.len()];
            }
            // A page by itself is kept in memory as it is: what came along with it must not stay there, too.
            let alone = wanted.len() == 1 && bytes.len() > PAGE_HEADER_BYTES + page_bytes;
            if let Some(moved) = moved_from(&decoded)
                && moved != origin
            {
                match self.origin_of(segment, frame).await {
                    Ok(Some(entry)) if entry == moved => {
                        origin = moved;
                        decoded = decode(&bytes, &origin, wanted.clone(), page_bytes);
                    }
                    Ok(_) => {}
                    Err(error) => return or_error(good, error),
                }
            }
            let frame_is = decoded.iter().flatten().next();
            let frame_is = frame_is.map(|page| (page.codec, page.frame_bytes));
            frame_bytes = frame_bytes.or(frame_is.map(|(_, bytes)| bytes));
            let beyond =
                |page: u32| frame_bytes.is_some_and(|bytes| is_beyond(page, bytes, page_bytes));
            let end = wanted
                .clone()
                .find(|page| beyond(*page))
                .unwrap_or(wanted.end);
            let whole = decoded[..(end - wanted.start) as usize]
                .iter()
                .all(Result::is_ok);
            for ((at, number), page) in wanted.clone().enumerate().zip(decoded) {
                match page {
                    Ok(mut page) => {
                        if alone {
                            page.data = Bytes::copy_from_slice(&page.data);
                        }
                        good[at] = Some(page);
                        faults[at] = None;
                    }
                    Err(fault) if good[at].is_none() && !beyond(number) => {
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
            if whole && end > wanted.start {
                let pages = wanted.start..end;
                self.keep_on_disk(segment, frame, pages, origin, &bytes, frame_is);
                self.harvest(segment, frame, end, &bytes, wanted.start, frame_is);
            }
            self.judge(
                segment,
                from,
                faults.iter().any(Option::is_some),
                &mut bad_copy,
            );
            let done = |(at, page)| good[at as usize].is_some() || beyond(page);
            if (0u32..).zip(wanted.clone()).all(done) {
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
            .zip(wanted)
            .map(|((page, fault), number)| match (page, fault) {
                (Some(page), _) => Ok(page),
                (None, _)
                    if frame_bytes.is_some_and(|bytes| is_beyond(number, bytes, page_bytes)) =>
                {
                    Err(Missed::Beyond)
                }
                (None, fault) => {
                    let detail = fault.map_or_else(|| "missing".to_owned(), |f| f.to_string());
                    Err(Missed::Failed(self.corrupt(&at, number, detail)))
                }
            })
            .collect()
    }

    /// How often bytes that fail verification are asked for.
    pub(super) fn attempts(&self) -> u32 {
        match self.second {
            Some(_) => 3,
            None => 2,
        }
    }

    /// Whether an answer verified says what the buckets hold.
    fn judge(&self, segment: SegmentId, from: Origin, bad: bool, bad_copy: &mut bool) {
        let Some(second) = &self.second else { return };
        match (from, bad) {
            (Origin::Own, true) => *bad_copy = true,
            (Origin::Second, true) => second.forget(segment),
            (Origin::Second, false) if *bad_copy => second.tell(CopyNews::Lost {
                segment,
                replace: true,
                asked: Instant::now(),
            }),
            _ => {}
        }
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

    pub(super) async fn frame_table(
        &self,
        segment: SegmentId,
    ) -> Result<Vec<FrameEntry>, StoreError> {
        let mut fault = None;
        for attempt in 0..self.attempts() {
            let tail_of = |length| self.part(segment, Part::Tail(length), attempt);
            let (mut tail, _) = tail_of(FOOTER_GUESS_BYTES).await?;
            let table = match decode_trailer(&tail) {
                Ok(trailer) => {
                    if trailer.footer_bytes > tail.len() as u64 {
                        (tail, _) = tail_of(trailer.footer_bytes).await?;
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
}

/// How many pages of `page_bytes` each `bytes` have, at least one.
fn whole_pages(bytes: u64, page_bytes: usize) -> u32 {
    (bytes / (PAGE_HEADER_BYTES + page_bytes) as u64).max(1) as u32
}

/// Stored bytes per page of the frame that `bytes` begin with: as its first page says if that is sound, otherwise what makes more
/// of the pages in the first `wanted` bytes sound, and `guess` if nothing does. One wrong bit in a header must not spoil others.
fn likely_page_bytes(bytes: &Bytes, origin: &PageIdentity, guess: usize, wanted: u64) -> usize {
    let is_sound =
        |page: &Result<Page, PageFault>| matches!(page, Ok(_) | Err(PageFault::Foreign { .. }));
    if is_sound(&take_page(&mut bytes.clone(), origin, 0)) {
        return page_bytes_at(bytes).unwrap_or(guess);
    }
    let sound = |page_bytes: usize| {
        let pages = decode(
            bytes,
            origin,
            0..whole_pages(wanted, page_bytes),
            page_bytes,
        );
        pages.iter().filter(|page| is_sound(page)).count() * page_bytes
    };
    let other = if guess == PAGE_BYTES {
        FINE_PAGE_BYTES
    } else {
        PAGE_BYTES
    };
    if sound(other) > sound(guess) {
        other
    } else {
        guess
    }
}

/// Whether a frame of `frame_bytes` stored bytes ends before page `page`.
fn is_beyond(page: u32, frame_bytes: u32, page_bytes: usize) -> bool {
    u64::from(page) * page_bytes as u64 >= u64::from(frame_bytes)
}

/// Verifies each of `pages` by itself; `bytes` begins with the first.
fn decode(
    bytes: &Bytes,
    origin: &PageIdentity,
    pages: Range<u32>,
    page_bytes: usize,
) -> Vec<Result<Page, PageFault>> {
    let stride = PAGE_HEADER_BYTES + page_bytes;
    pages
        .enumerate()
        .map(|(n, page)| {
            let mut rest = bytes.slice((n * stride).min(bytes.len())..);
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

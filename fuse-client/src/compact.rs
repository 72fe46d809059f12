//! Compaction: what still lives in sparse segments is copied into new ones, and the extents follow. The old segments then have
//! no live bytes, and are deleted as any others.
//!
//! Frames that are mostly alive are copied as they are, others by their live ranges; neighbours are read with one request, some
//! segments ahead. Nothing is locked: the cluster moves only what still lies where it was copied from.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use blockstore::segment::layout::PAGE_BYTES;
use blockstore::segment::object::FrameEntry;
use blockstore::{FrameNumber, FrameRange, Kind, SegmentBuilder, SegmentStore, StoreError};
use bytes::Bytes;
use futures::StreamExt;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::SegmentId;
use heliofs_proto::v1::{self, command::Op, maintain::Ask, maintained::Answer};
use meta_client::{ClientError, Session};
use tokio::sync::{Semaphore, mpsc};

use crate::write::pieces::FILE_PAGE_BYTES;
use crate::write::segment_ids::SegmentIds;

/// Moves in one command: what the cluster takes.
const MOVES: usize = 128;

/// A frame is copied as it is when more than this part of it lives; otherwise its live ranges become frames of their own. Not less
/// than what makes a segment sparse, or the copy would be sparse again.
const VERBATIM_PERCENT_MIN: u64 = 70;

/// A frame of which less lives than this is not read whole to copy that little, unless it is short.
const WHOLE_PERCENT_MIN: u64 = 25;
const WHOLE_BYTES: u64 = 256 << 10;

/// Segments that are read at the same time.
const READ_AHEAD: usize = 4;

/// Extents are asked for with a pause between the questions: the nodes have others to serve.
const FIND_PAUSE: Duration = Duration::from_millis(2);

/// Why a compaction ended early.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CompactError {
    /// The metadata can't be asked, or refused.
    #[error(transparent)]
    Meta(#[from] ClientError),
    /// The bucket can't take what was gathered.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The answer makes no sense.
    #[error("the cluster gave another answer than was asked for")]
    Answer,
    /// Another session has the lease now.
    #[error("another mount compacts this volume now")]
    LeaseLost,
}

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct Compacted {
    /// Segments that were looked at.
    pub segments: u64,
    /// Bytes that extents now find in new segments.
    pub moved_bytes: u64,
    /// New segments.
    pub written_segments: u64,
    /// Their length.
    pub written_bytes: u64,
    /// What could not be read, and stays where it is: (inode, extent, why).
    pub unreadable: Vec<(u64, v1::Extent, String)>,
}

/// Compacts segments of one volume.
pub struct Compactor<'a> {
    /// New segments are this session's.
    pub session: &'a Session,
    /// Where they are read and put.
    pub store: &'a SegmentStore,
    /// Ids for them.
    pub ids: &'a SegmentIds,
    /// Length at which a new segment is full.
    pub segment_bytes: u64,
    /// Bytes to write per second at most, on average over one [`Self::compact`]; 0: no limit.
    pub bytes_per_second: u64,
    /// Renew the compaction lease, and end when it is lost.
    pub leased: bool,
}

/// A stored extent that names a segment.
type Placed = (u64, v1::Extent);

/// A new segment that is being filled.
struct Filling {
    builder: SegmentBuilder,
    bytes: u64,
    moves: Vec<v1::Move>,
    /// What was copied along for the sake of [`aligned`]: counted as data it would keep the segment sparse.
    padding: u64,
}

/// What a frame of an old segment comes to.
enum Piece {
    /// The whole frame, encoded as it is.
    Verbatim(FrameEntry, Bytes),
    /// A range of its data.
    Range(Bytes),
}

/// What lives of a frame.
struct Frame {
    number: u32,
    /// In order of place.
    placed: Vec<Placed>,
    /// Parts of its data that live, merged.
    ranges: Vec<(u64, u64)>,
    /// What the segment's footer says of it.
    entry: Option<FrameEntry>,
    /// The frame as it is stored, if it was worth to be read whole and could be.
    encoded: Option<Bytes>,
}

impl Frame {
    fn live_bytes(&self) -> u64 {
        self.ranges.iter().map(|(from, to)| to - from).sum()
    }

    /// Whether more than this part of it lives.
    fn lives(&self, entry: &FrameEntry, percent: u64) -> bool {
        self.live_bytes() * 100 > u64::from(entry.decoded_bytes) * percent
    }
}

impl Compactor<'_> {
    /// All stored extents that name one of the segments.
    pub async fn find(&self, segments: &[u64]) -> Result<Vec<Placed>, CompactError> {
        let mut found = Vec::new();
        let mut from = (0, 0);
        loop {
            let ask = Ask::FindExtents(v1::FindExtents {
                segments: segments.to_vec(),
                from_ino: from.0,
                from_offset: from.1,
            });
            let Answer::Extents(page) = self.session.maintain(ask).await? else {
                return Err(CompactError::Answer);
            };
            let placed = page.extents.into_iter();
            found.extend(placed.filter_map(|placed| Some((placed.ino, placed.extent?))));
            if page.end {
                return Ok(found);
            }
            from = (page.next_ino, page.next_offset);
            tokio::time::sleep(FIND_PAUSE).await;
        }
    }

    /// Moves what lives in `segments` into new ones. What can't be read is passed over.
    ///
    /// Cancelling it at any moment loses nothing: at worst a new segment that nothing refers to is left for gc.
    /// Errors: see [`CompactError`]; what was moved before stays moved.
    pub async fn compact(&self, segments: &[u64]) -> Result<Compacted, CompactError> {
        let mut done = Compacted::default();
        let mut by_segment: BTreeMap<u64, BTreeMap<u32, Vec<Placed>>> = BTreeMap::new();
        for (ino, extent) in self.find(segments).await? {
            let frames = by_segment.entry(extent.segment).or_default();
            frames.entry(extent.frame).or_default().push((ino, extent));
        }
        let began = Instant::now();
        let mut filling = None;
        // A read holds its turn until it is used; none stands still in its middle while others are written.
        let turns = Semaphore::new(READ_AHEAD);
        let (sender, mut read) = mpsc::unbounded_channel();
        let reads = by_segment.into_iter().map(async |(segment, frames)| {
            let turn = turns.acquire().await;
            (self.read_segment(SegmentId(segment), frames).await, turn)
        });
        let produce = async {
            let mut reads = std::pin::pin!(futures::stream::iter(reads).buffered(READ_AHEAD));
            while let Some(segment) = reads.next().await {
                if sender.send(segment).is_err() {
                    break;
                }
            }
            drop(sender);
            Ok(())
        };
        let consume = async {
            while let Some(((segment, frames), turn)) = read.recv().await {
                done.segments += 1;
                for frame in frames {
                    self.frame(segment, frame, &mut filling, &mut done).await?;
                }
                drop(turn);
                if let Some(due) = (done.written_bytes * 1000).checked_div(self.bytes_per_second) {
                    tokio::time::sleep_until((began + Duration::from_millis(due)).into()).await;
                }
            }
            if let Some(filling) = filling.take() {
                self.finish(filling, &mut done).await?;
            }
            Ok::<_, CompactError>(())
        };
        futures::future::try_join(produce, consume).await?;
        Ok(done)
    }

    /// Reads those frames of a segment whole that are worth it.
    async fn read_segment(
        &self,
        segment: SegmentId,
        frames: BTreeMap<u32, Vec<Placed>>,
    ) -> (SegmentId, Vec<Frame>) {
        let table = match self.store.frame_table(segment).await {
            Ok(table) => table,
            Err(error) => {
                // Its data may be sound all the same: it is copied by ranges.
                tracing::debug!(segment = segment.0, %error, "no frame table");
                Vec::new()
            }
        };
        let mut frames: Vec<Frame> = frames
            .into_iter()
            .map(|(number, mut placed)| {
                placed.sort_unstable_by_key(|(_, extent)| (extent.frame_offset, extent.length));
                let frame = |entry: &FrameEntry| entry.frame;
                let at = table.binary_search_by_key(&FrameNumber(number), frame);
                Frame {
                    number,
                    ranges: union(&placed),
                    placed,
                    entry: at.ok().map(|at| table[at]),
                    encoded: None,
                }
            })
            .collect();
        let is_worth = |frame: &Frame| {
            frame.entry.filter(|entry| {
                u64::from(entry.stored_bytes) <= WHOLE_BYTES
                    || frame.lives(entry, WHOLE_PERCENT_MIN)
            })
        };
        let wanted: Vec<FrameEntry> = frames.iter().filter_map(is_worth).collect();
        let read = self.store.encoded_frames(segment, &wanted).await;
        let asked = frames.iter_mut().filter(|frame| is_worth(frame).is_some());
        for (frame, encoded) in asked.zip(read) {
            match encoded {
                Ok(encoded) => frame.encoded = Some(encoded),
                // Page by page there may be more to save.
                Err(error) => {
                    let frame = frame.number;
                    tracing::warn!(segment = segment.0, frame, %error, "a frame can't be read whole");
                }
            }
        }
        (segment, frames)
    }

    /// Copies what lives of one frame.
    async fn frame(
        &self,
        segment: SegmentId,
        frame: Frame,
        filling: &mut Option<Filling>,
        done: &mut Compacted,
    ) -> Result<(), CompactError> {
        let mut whole = None;
        if let (Some(entry), Some(encoded)) = (&frame.entry, &frame.encoded) {
            if frame.lives(entry, VERBATIM_PERCENT_MIN) {
                let piece = Piece::Verbatim(*entry, encoded.clone());
                return self
                    .add(
                        segment,
                        frame.number,
                        piece,
                        0,
                        &frame.placed,
                        filling,
                        done,
                    )
                    .await;
            }
            // A block that does not decode is found again below, by its range.
            whole = self
                .store
                .frame_data(segment, *entry, encoded.clone())
                .await
                .ok();
        }
        for (from, to) in &frame.ranges {
            let inside =
                |(_, extent): &&Placed| (*from..*to).contains(&u64::from(extent.frame_offset));
            let placed: Vec<Placed> = frame.placed.iter().filter(inside).cloned().collect();
            let (from, to) = (aligned(*from, *to), *to);
            let data = match &whole {
                Some(data) if to <= data.len() as u64 => {
                    let part = data.slice(from as usize..to as usize);
                    // Not a slice of much more: it stays in memory until the new segment is stored.
                    Ok(match part.len() * 2 < data.len() {
                        true => Bytes::copy_from_slice(&part),
                        false => part,
                    })
                }
                _ => self.range(segment, frame.number, from, to - from).await,
            };
            match data {
                Ok(data) => {
                    let piece = Piece::Range(data);
                    self.add(segment, frame.number, piece, from, &placed, filling, done)
                        .await?;
                }
                Err(error) if error.kind() == Kind::Unavailable => return Err(error.into()),
                // One by one.
                Err(_) => {
                    for one in &placed {
                        let (ino, extent) = one;
                        let from = u64::from(extent.frame_offset);
                        match self.range(segment, frame.number, from, extent.length).await {
                            Ok(data) => {
                                let piece = Piece::Range(data);
                                let one = std::slice::from_ref(one);
                                self.add(segment, frame.number, piece, from, one, filling, done)
                                    .await?;
                            }
                            Err(error) => {
                                done.unreadable
                                    .push((*ino, extent.clone(), error.to_string()));
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    async fn range(
        &self,
        segment: SegmentId,
        frame: u32,
        offset: u64,
        length: u64,
    ) -> Result<Bytes, StoreError> {
        let at = FrameRange {
            segment,
            frame: FrameNumber(frame),
            // Within a frame, as every extent is.
            offset: offset as u32,
            length: length as u32,
        };
        self.store.read(at).await
    }

    /// Adds a piece, whose first byte was at `base` of the old frame, to the new segment; `placed` lie within it.
    #[expect(
        clippy::too_many_arguments,
        reason = "where from, where to, and what for"
    )]
    async fn add(
        &self,
        segment: SegmentId,
        frame: u32,
        piece: Piece,
        base: u64,
        placed: &[Placed],
        filling: &mut Option<Filling>,
        done: &mut Compacted,
    ) -> Result<(), CompactError> {
        let bytes = match &piece {
            Piece::Verbatim(_, encoded) => encoded.len(),
            Piece::Range(data) => data.len(),
        } as u64;
        if let Some(full) = filling.take_if(|full| full.bytes + bytes > self.segment_bytes) {
            self.finish(full, done).await?;
        }
        let target = match filling {
            Some(filling) => filling,
            None => {
                let id = self.ids.next(self.session).await?;
                filling.insert(Filling {
                    builder: self.store.builder(id),
                    bytes: 0,
                    moves: Vec::new(),
                    padding: 0,
                })
            }
        };
        let padding = match (&piece, placed.first()) {
            (Piece::Range(_), Some((_, first))) => u64::from(first.frame_offset) - base,
            _ => 0,
        };
        let new_frame = match piece {
            Piece::Verbatim(entry, encoded) => target.builder.add_relocated(&entry, encoded)?,
            Piece::Range(data) => target.builder.add_frame(vec![data])?,
        };
        target.bytes += bytes;
        target.padding += padding;
        let to_segment = target.builder.id().0;
        target
            .moves
            .extend(placed.iter().map(|(ino, extent)| v1::Move {
                ino: *ino,
                offset: extent.offset,
                length: extent.length,
                from_segment: segment.0,
                from_frame: frame,
                from_frame_offset: extent.frame_offset,
                to_segment,
                to_frame: new_frame.0,
                to_frame_offset: extent.frame_offset - base as u32,
            }));
        Ok(())
    }

    /// Stores a new segment and lets the extents follow.
    async fn finish(&self, filling: Filling, done: &mut Compacted) -> Result<(), CompactError> {
        if self.leased {
            let ask = Ask::TakeSparse(v1::TakeSparse::default());
            match self.session.maintain(ask).await? {
                Answer::Sparse(sparse) if sparse.leased => {}
                Answer::Sparse(_) => return Err(CompactError::LeaseLost),
                _ => return Err(CompactError::Answer),
            }
        }
        let segment = filling.builder.finish();
        let (mut record, length) = (segment.record(), segment.length);
        record.data_bytes -= filling.padding;
        self.store.put(segment).await?;
        for moves in filling.moves.chunks(MOVES) {
            let op = Op::Relocate(v1::Relocate {
                segments: vec![record],
                moves: moves.to_vec(),
            });
            match self.session.mutate(v1::Caller::default(), op).await {
                Ok(reply) => done.moved_bytes += reply.value,
                // Everything that it was brought for had changed: it was freed, and the rest is left for another time.
                Err(ClientError::Verdict(FsError::SegmentFenced)) => break,
                Err(error) => return Err(error.into()),
            }
        }
        done.written_segments += 1;
        done.written_bytes += length;
        Ok(())
    }
}

/// A segment that was just brought looks sparse until all its extents are committed: it is left alone for so long.
const SETTLE: Duration = Duration::from_secs(1);

/// Segments that the leader is asked to leave out.
const TRIED_MAX: usize = 4096;

/// A sparse segment that is not met again is forgotten after this time.
const FORGET_AFTER: Duration = Duration::from_secs(20 * 60);

/// Which sparse segments this mount has met, since when, and which it has compacted already: some of those stay, since they
/// can't be read or are written to at the same time, and must not keep it busy.
#[derive(Debug)]
pub struct Sightings {
    /// Between two looks while there is something to do.
    pub settle: Duration,
    /// Whether the last look met some that are not old enough yet.
    pub unsettled: bool,
    retry: Duration,
    met: HashMap<u64, Sighting>,
}

#[derive(Debug)]
struct Sighting {
    since: Instant,
    tried: bool,
}

impl Sightings {
    /// For a mount that looks once every `pause`.
    pub fn new(pause: Duration) -> Self {
        Self {
            settle: SETTLE.min(pause),
            unsettled: false,
            retry: pause * 10,
            met: HashMap::new(),
        }
    }

    /// Those that were tried and are not to be tried yet; at most as many as the leader leaves out.
    pub fn tried(&self, now: Instant) -> Vec<u64> {
        let waits = |sighting: &Sighting| {
            sighting.tried && now.saturating_duration_since(sighting.since) < self.retry
        };
        let tried = self.met.iter().filter(|(_, sighting)| waits(sighting));
        tried.map(|(id, _)| *id).take(TRIED_MAX).collect()
    }

    /// Which of the sparse segments, met now, are to be compacted.
    pub fn choose(&mut self, now: Instant, sparse: impl Iterator<Item = u64>) -> Vec<u64> {
        let age = |sighting: &Sighting| now.saturating_duration_since(sighting.since);
        self.met.retain(|_, sighting| age(sighting) < FORGET_AFTER);
        self.unsettled = false;
        let mut chosen = Vec::new();
        for id in sparse {
            let first = Sighting {
                since: now,
                tried: false,
            };
            let sighting = self.met.entry(id).or_insert(first);
            let wait = if sighting.tried {
                self.retry
            } else {
                self.settle
            };
            self.unsettled |= !sighting.tried && age(sighting) < wait;
            if age(sighting) >= wait {
                chosen.push(id);
                *sighting = Sighting {
                    since: now,
                    tried: true,
                };
            }
        }
        chosen
    }

    /// What was chosen last was not compacted.
    pub fn clear(&mut self) {
        self.met.clear();
    }
}

/// The parts of a frame that extents name, merged; `placed` is in order of place.
fn union(placed: &[Placed]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for (_, extent) in placed {
        let from = u64::from(extent.frame_offset);
        let to = from + extent.length;
        match ranges.last_mut() {
            Some(last) if from <= last.1 => last.1 = last.1.max(to),
            _ => ranges.push((from, to)),
        }
    }
    ranges
}

/// Where a copy of a frame's bytes `from..to` begins: where it had better be read from one page ([`Frame::lead`] saw to that), it
/// stays where it is within that.
///
/// [`Frame::lead`]: crate::write::pieces::Frame::lead
fn aligned(from: u64, to: u64) -> u64 {
    match to - from > PAGE_BYTES as u64 {
        true => from - from % FILE_PAGE_BYTES,
        false => from,
    }
}

/// Segments of which at most `live_percent_max` lives, of those listed.
pub fn sparse(segments: &[v1::Segment], live_percent_max: u32) -> BTreeSet<u64> {
    segments
        .iter()
        .filter(|segment| {
            let live = u128::from(segment.live_bytes) * 100;
            live <= u128::from(segment.data_bytes) * u128::from(live_percent_max)
        })
        .map(|segment| segment.id)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparse_segment_is_compacted_when_it_has_settled_and_rarely_again() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut sightings = Sightings::new(Duration::from_secs(60));
        assert_eq!(sightings.choose(at(0), [1, 2].into_iter()), [0; 0]);
        assert!(sightings.unsettled);
        assert_eq!(sightings.choose(at(1), [1, 2, 3].into_iter()), [1, 2]);
        assert_eq!(sightings.choose(at(2), [1, 3].into_iter()), [3]);
        assert!(!sightings.unsettled);
        let mut tried = sightings.tried(at(2));
        tried.sort_unstable();
        assert_eq!(tried, [1, 2, 3]);
        assert_eq!(sightings.tried(at(700)), [0; 0]);
        // It could not be moved.
        assert_eq!(sightings.choose(at(600), [1].into_iter()), [0; 0]);
        assert_eq!(sightings.choose(at(601), [1].into_iter()), [1]);
        // The turn failed.
        sightings.clear();
        assert_eq!(sightings.choose(at(602), [1].into_iter()), [0; 0]);
        assert_eq!(sightings.choose(at(603), [1].into_iter()), [1]);
    }

    #[test]
    fn live_ranges_are_merged_and_gaps_are_kept() {
        let placed: Vec<Placed> = [(0, 10), (5, 2), (10, 5), (20, 1), (20, 4), (23, 9)]
            .into_iter()
            .map(|(frame_offset, length)| {
                let extent = v1::Extent {
                    frame_offset,
                    length,
                    ..v1::Extent::default()
                };
                (1, extent)
            })
            .collect();
        assert_eq!(union(&placed), [(0, 15), (20, 32)]);
    }
}

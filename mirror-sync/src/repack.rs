//! A segment that compaction wrote at the source is built here from what it was made of, which is in this region's bucket: only
//! its footer crosses the link, and frames that were encoded anew.
//!
//! A frame that was copied as it is keeps the name under which it was written first, in every footer that lists it; so the
//! footers of the old segments tell where its bytes are. Nothing of that is trusted: the result must have the checksum that the
//! metadata says, or the object is pulled whole.

use std::collections::HashMap;
use std::ops::Range;

use blockstore::segment::layout::{HEADER_BYTES, TRAILER_BYTES};
use blockstore::segment::object::{self, FrameEntry};
use blockstore::{Bucket, Kind, StoreError};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::stream;
use heliofs_proto::ids::{SegmentId, VolumeId};
use heliofs_proto::v1;

use crate::copy::{Buckets, is_whole};

/// Shorter objects are pulled: there is nothing to be gained.
const LENGTH_MIN: u64 = 64 << 10;

/// What is fetched of an object's end in the hope that it holds the footer: of some 250 frames.
const TAIL_BYTES: u64 = 8 << 10;

/// Bytes between two wanted parts that are read along: in the own bucket, and over the link, where they cost more.
const OWN_GAP: u64 = 256 << 10;
const LINK_GAP: u64 = 4 << 10;

/// Requests at once for one object.
const PARALLEL: usize = 8;

/// When more than this part of it would have to be pulled all the same, one request for all of it is better.
const PULLED_PERCENT_MAX: u64 = 75;

/// A part of the new object, and of which object it is a copy.
struct Piece {
    from: Range<u64>,
    to: u64,
}

/// The store is away. Anything else is this object's, and whoever pulls the whole one judges it.
fn is_for_later(error: &StoreError) -> bool {
    matches!(error.kind(), Kind::Retry | Kind::Unavailable)
}

/// The frame table of an object, and the length of its footer. `None`: it can't be read.
async fn footer(
    bucket: &Bucket,
    volume: VolumeId,
    segment: SegmentId,
    fetched: &mut u64,
) -> Result<Option<(Vec<FrameEntry>, Bytes)>, StoreError> {
    let name = segment.object_name();
    let mut length = TAIL_BYTES;
    loop {
        let tail = match bucket.get_tail(&name, length).await {
            Ok(tail) => tail,
            Err(error) if is_for_later(&error) => return Err(error),
            Err(_) => return Ok(None),
        };
        *fetched += tail.len() as u64;
        let Ok(trailer) = object::decode_trailer(&tail) else {
            return Ok(None);
        };
        let got = tail.len() as u64;
        if got < trailer.footer_bytes && length < trailer.footer_bytes {
            length = trailer.footer_bytes;
            continue;
        }
        let Ok(frames) = object::decode_footer(&tail, volume, segment) else {
            return Ok(None);
        };
        let footer = tail.slice((got - trailer.footer_bytes) as usize..);
        return Ok(Some((frames, footer)));
    }
}

/// Where frames are in the own bucket, by the name under which they were written first.
async fn own_frames(
    own: &Bucket,
    volume: VolumeId,
    made_of: &[u64],
) -> HashMap<(SegmentId, u32), (SegmentId, FrameEntry)> {
    let footers = made_of.iter().copied().map(SegmentId).map(async |segment| {
        let found = footer(own, volume, segment, &mut 0).await;
        (segment, found)
    });
    let mut footers = std::pin::pin!(stream::iter(footers).buffer_unordered(PARALLEL));
    let mut frames = HashMap::new();
    while let Some((segment, found)) = footers.next().await {
        match found {
            Ok(Some((table, _))) => {
                for entry in table {
                    let name = (entry.origin_segment, entry.origin_frame.0);
                    frames.insert(name, (segment, entry));
                }
            }
            Ok(None) => {}
            // Then it is pulled.
            Err(error) => {
                tracing::debug!(segment = segment.0, %error, "an old segment can't be read");
            }
        }
    }
    frames
}

/// Pieces that are fetched together.
fn runs(mut pieces: Vec<Piece>, gap: u64) -> Vec<Vec<Piece>> {
    pieces.sort_unstable_by_key(|piece| piece.from.start);
    let mut runs: Vec<Vec<Piece>> = Vec::new();
    for piece in pieces {
        match runs.last_mut() {
            Some(run)
                if run
                    .last()
                    .is_some_and(|last| piece.from.start <= last.from.end + gap) =>
            {
                run.push(piece);
            }
            _ => runs.push(vec![piece]),
        }
    }
    runs
}

/// One request for all pieces of a run: they, where the bytes begin in the object, and the bytes.
async fn fetch(
    bucket: &Bucket,
    name: &str,
    run: Vec<Piece>,
) -> (Vec<Piece>, u64, Result<Bytes, StoreError>) {
    let begin = run.first().map_or(0, |piece| piece.from.start);
    let end = run.iter().map(|piece| piece.from.end).max();
    let bytes = bucket.get_range(name, begin..end.unwrap_or(begin)).await;
    (run, begin, bytes)
}

/// Copies the pieces into `target`; how many bytes were read for that. `None`: they are not there.
async fn fill(
    bucket: &Bucket,
    segment: SegmentId,
    pieces: Vec<Piece>,
    gap: u64,
    target: &mut BytesMut,
) -> Result<Option<u64>, StoreError> {
    let name = segment.object_name();
    let fetches = runs(pieces, gap).into_iter();
    let fetches = fetches.map(|run| fetch(bucket, &name, run));
    let mut fetches = std::pin::pin!(stream::iter(fetches).buffer_unordered(PARALLEL));
    let mut read = 0;
    while let Some((run, begin, bytes)) = fetches.next().await {
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(error) if is_for_later(&error) => return Err(error),
            Err(_) => return Ok(None),
        };
        read += bytes.len() as u64;
        for piece in run {
            let within = (piece.from.start - begin) as usize..(piece.from.end - begin) as usize;
            let to = piece.to as usize..(piece.to + (piece.from.end - piece.from.start)) as usize;
            let (Some(source), Some(target)) = (bytes.get(within), target.get_mut(to)) else {
                return Ok(None);
            };
            target.copy_from_slice(source);
        }
    }
    Ok(Some(read))
}

/// The object of a task, built from what it was made of, with the checksum that it must have; `None`: it must be pulled whole.
/// Adds to `pulled` what crossed the link.
///
/// Errors: the second bucket can't be asked now.
pub(crate) async fn repack(
    buckets: &Buckets,
    task: &v1::CopyTask,
    pulled: &mut u64,
) -> Result<Option<Bytes>, StoreError> {
    let object = build(buckets, task, pulled).await?;
    Ok(object.filter(|object| {
        let whole = is_whole(task, object);
        if !whole {
            let segment = task.segment;
            tracing::warn!(
                segment,
                "built from others it has another checksum; it is pulled"
            );
        }
        whole
    }))
}

async fn build(
    buckets: &Buckets,
    task: &v1::CopyTask,
    pulled: &mut u64,
) -> Result<Option<Bytes>, StoreError> {
    if task.made_of.is_empty() || task.length < LENGTH_MIN {
        return Ok(None);
    }
    let (volume, segment) = (buckets.volume, SegmentId(task.segment));
    let own = own_frames(&buckets.own, volume, &task.made_of).await;
    if own.is_empty() {
        return Ok(None);
    }
    let Some((table, footer)) = footer(&buckets.second, volume, segment, pulled).await? else {
        return Ok(None);
    };
    let Some(footer_at) = task.length.checked_sub(footer.len() as u64) else {
        return Ok(None);
    };
    let mut here: HashMap<SegmentId, Vec<Piece>> = HashMap::new();
    let mut there = Vec::new();
    let mut to_pull = 0;
    for entry in &table {
        let length = entry.extent_bytes();
        let to = entry.frame.start();
        if to < HEADER_BYTES as u64 || to + length > footer_at {
            return Ok(None);
        }
        let same = own
            .get(&(entry.origin_segment, entry.origin_frame.0))
            .filter(|(_, known)| {
                known.stored_bytes == entry.stored_bytes && known.codec == entry.codec
            });
        match same {
            Some((segment, known)) => {
                let from = known.frame.start();
                let from = from..from + length;
                here.entry(*segment).or_default().push(Piece { from, to });
            }
            None => {
                to_pull += length;
                let from = to..to + length;
                there.push(Piece { from, to });
            }
        }
    }
    if to_pull * 100 > task.length * PULLED_PERCENT_MAX {
        return Ok(None);
    }
    let mut target = BytesMut::zeroed(task.length as usize);
    target[..HEADER_BYTES].copy_from_slice(&object::encode_header(volume, segment));
    target[footer_at as usize..].copy_from_slice(&footer);
    for (segment, pieces) in here {
        match fill(&buckets.own, segment, pieces, OWN_GAP, &mut target).await {
            Ok(Some(_)) => {}
            Ok(None) => return Ok(None),
            Err(error) => {
                tracing::debug!(segment = segment.0, %error, "an old segment can't be read");
                return Ok(None);
            }
        }
    }
    match fill(&buckets.second, segment, there, LINK_GAP, &mut target).await? {
        Some(read) => *pulled += read,
        None => return Ok(None),
    }
    Ok(Some(target.freeze()))
}

const _: () = assert!(TAIL_BYTES > TRAILER_BYTES as u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_fetched_together_wherever_they_go() {
        let piece = |from: u64, length: u64, to: u64| Piece {
            from: from..from + length,
            to,
        };
        let pieces = vec![
            piece(900, 50, 0),
            piece(100, 50, 500),
            piece(160, 40, 100),
            piece(420, 10, 700),
        ];
        let runs = runs(pieces, 16);
        let shown: Vec<Vec<(u64, u64)>> = runs
            .iter()
            .map(|run| {
                run.iter()
                    .map(|piece| (piece.from.start, piece.to))
                    .collect()
            })
            .collect();
        let expected: Vec<Vec<(u64, u64)>> = vec![
            vec![(100, 500), (160, 100)],
            vec![(420, 700)],
            vec![(900, 0)],
        ];
        assert_eq!(shown, expected);
    }
}

//! Whole frames of a segment, for compaction: many with one request.

use bytes::{Bytes, BytesMut};
use heliofs_proto::ids::SegmentId;

use super::fetch::Shared;
use super::second::Part;
use crate::segment::object::FrameEntry;
use crate::segment::page::take_pages;
use crate::{FrameRange, Kind, StoreError};

/// Bytes between two wanted frames that are fetched along rather than asked around.
const GAP_BYTES_MAX: u64 = 256 << 10;

/// Bytes of one request, unless a single frame is longer.
const RUN_BYTES_MAX: u64 = 8 << 20;

impl Shared {
    /// Frames as they are stored, each verified; neighbours share a request.
    pub(super) async fn encoded_frames(
        &self,
        segment: SegmentId,
        entries: &[FrameEntry],
    ) -> Vec<Result<Bytes, StoreError>> {
        let mut frames = Vec::with_capacity(entries.len());
        let mut away = None;
        for run in runs(entries) {
            if let Some(error) = &away {
                // It won't be there for the next ones either, and each would wait for the deadline.
                frames.extend(run.iter().map(|_| Err(StoreError::clone(error))));
                continue;
            }
            let from = place(&run[0]).start;
            let to = run.iter().map(|entry| place(entry).end).max();
            let part = Part::Range(from..to.unwrap_or(from));
            let together = match self.part(segment, part, 0).await {
                Ok((bytes, _)) => Some(bytes),
                Err(error) if error.kind() == Kind::Unavailable => {
                    frames.extend(run.iter().map(|_| Err(error.clone())));
                    away = Some(error);
                    continue;
                }
                // Each by itself tells what is wrong with it.
                Err(_) => None,
            };
            for entry in run {
                let verified = together.as_ref().and_then(|bytes| {
                    let place = place(entry);
                    let own = (place.start - from) as usize..(place.end - from) as usize;
                    let encoded = (own.end <= bytes.len()).then(|| bytes.slice(own))?;
                    self.is_frame(entry, &encoded).ok()?;
                    // Not a slice of much more, which would be kept as long.
                    Some(match encoded.len() * 2 < bytes.len() {
                        true => Bytes::copy_from_slice(&encoded),
                        false => encoded,
                    })
                });
                frames.push(match verified {
                    Some(encoded) => Ok(encoded),
                    None => self.encoded_frame(segment, entry).await,
                });
            }
        }
        frames
    }

    /// One frame as it is stored. Bytes that fail verification are fetched once more.
    async fn encoded_frame(
        &self,
        segment: SegmentId,
        entry: &FrameEntry,
    ) -> Result<Bytes, StoreError> {
        let mut fault = (0, String::new());
        for attempt in 0..self.attempts() {
            let (bytes, _) = self
                .part(segment, Part::Range(place(entry)), attempt)
                .await?;
            match self.is_frame(entry, &bytes) {
                Ok(()) => return Ok(bytes),
                Err(found) => fault = found,
            }
        }
        let (page, detail) = fault;
        Err(self.corrupt(&at(segment, entry), page, detail))
    }

    /// Whether every page of the frame is right, and nothing follows; the page that is not, and why.
    fn is_frame(&self, entry: &FrameEntry, encoded: &Bytes) -> Result<(), (u32, String)> {
        let pages = entry.pages();
        let mut rest = encoded.clone();
        match take_pages(&mut rest, &entry.identity(self.volume), 0, pages) {
            Ok(_) if rest.is_empty() => Ok(()),
            Ok(_) => Err((pages, "it has another length".to_owned())),
            Err((page, wrong)) => Err((page, wrong.to_string())),
        }
    }

    /// The data of a frame, as [`Self::encoded_frames`] gave it.
    pub(super) fn frame_data(
        &self,
        segment: SegmentId,
        entry: &FrameEntry,
        encoded: &Bytes,
    ) -> Result<Bytes, StoreError> {
        let at = at(segment, entry);
        let mut rest = encoded.clone();
        let pages = take_pages(&mut rest, &entry.identity(self.volume), 0, entry.pages())
            .map_err(|(page, fault)| self.corrupt(&at, page, fault.to_string()))?;
        let mut stored = BytesMut::with_capacity(entry.stored_bytes as usize);
        for page in &pages {
            stored.extend_from_slice(&page.data);
        }
        let Some(front) = pages.first().filter(|page| !page.codec.is_plain()) else {
            return Ok(stored.freeze());
        };
        let head = self.parse_head(segment, entry.frame, front)?;
        let blocks = 0..head.blocks();
        let within = head.stored_range(blocks.clone());
        let within = within.start as usize..within.end as usize;
        let mut data = BytesMut::with_capacity(entry.decoded_bytes as usize);
        for (block, decoded) in blocks.clone().zip(head.decode(blocks, &stored[within])) {
            let decoded =
                decoded.map_err(|fault| self.undecodable(segment, entry.frame, block, &fault))?;
            data.extend_from_slice(&decoded);
        }
        Ok(data.freeze())
    }
}

fn place(entry: &FrameEntry) -> std::ops::Range<u64> {
    let from = entry.frame.start();
    from..from + entry.extent_bytes()
}

fn at(segment: SegmentId, entry: &FrameEntry) -> FrameRange {
    FrameRange {
        segment,
        frame: entry.frame,
        offset: 0,
        length: 0,
    }
}

/// Frames, in order of place, that are fetched together.
fn runs(entries: &[FrameEntry]) -> impl Iterator<Item = &[FrameEntry]> {
    let mut begin = entries.first().map_or(0, |first| place(first).start);
    entries.chunk_by(move |last, next| {
        let (last, next) = (place(last), place(next));
        let together = next.start <= last.end + GAP_BYTES_MAX && next.end <= begin + RUN_BYTES_MAX;
        if !together {
            begin = next.start;
        }
        together
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FrameNumber;
    use crate::segment::layout::FRAME_ALIGN;
    use crate::segment::page::Codec;

    #[test]
    fn neighbours_are_fetched_together_up_to_a_length() {
        let entry = |start: u64, stored_bytes: u32| FrameEntry {
            frame: FrameNumber::at(start / FRAME_ALIGN * FRAME_ALIGN).unwrap(),
            stored_bytes,
            decoded_bytes: stored_bytes,
            codec: Codec::PLAIN,
            origin_segment: SegmentId(1),
            origin_frame: FrameNumber(1),
        };
        let frames = [
            entry(1 << 10, 64 << 10),
            entry(100 << 10, 64 << 10),
            // Too far away.
            entry(600 << 10, 7 << 20),
            entry((7 << 20) + (620 << 10), 300 << 10),
            // Too much.
            entry((8 << 20) + (100 << 10), 600 << 10),
            // Longer than a request should be.
            entry(10 << 20, 20 << 20),
            entry(31 << 20, 1),
        ];
        let lengths: Vec<usize> = runs(&frames).map(<[_]>::len).collect();
        assert_eq!(lengths, [2, 2, 1, 1, 1]);
        assert_eq!(runs(&[]).count(), 0);
    }
}

//! Builds a segment in memory, without copying the data and with one pass over it.

use bytes::{BufMut, Bytes, BytesMut};
use heliofs_proto::ids::{SegmentId, VolumeId};
use heliofs_proto::limits::FRAME_BYTES_MAX;
use heliofs_proto::v1;

use super::codec::FrameEncoder;
use super::layout::{FRAME_ALIGN, FrameNumber, PAGE_HEADER_BYTES, frame_extent_bytes};
use super::object::{self, FrameEntry};
use super::page::{Codec, PageIdentity};
use crate::StoreError;

/// A finished segment, ready to be put: immutable, its bytes shared with whoever gave them.
#[derive(Clone, Debug)]
pub struct EncodedSegment {
    /// The volume that it was built for.
    pub volume: VolumeId,
    /// Its name.
    pub id: SegmentId,
    /// The object's bytes, in order.
    pub chunks: Vec<Bytes>,
    /// Length of the object, bytes.
    pub length: u64,
    /// CRC32 of the object.
    pub checksum: u32,
    /// Sum of the decoded lengths of its frames.
    pub data_bytes: u64,
    /// Its frames, in order of place.
    pub frames: Vec<FrameEntry>,
    /// The data of those frames that are compressed or encrypted, for the caches.
    pub plain: Vec<(FrameNumber, Vec<Bytes>)>,
}

impl EncodedSegment {
    /// What metadata keeps about it; `live_bytes` is 0, the state machine counts those.
    pub fn record(&self) -> v1::Segment {
        v1::Segment {
            id: self.id.0,
            length: self.length,
            checksum: self.checksum,
            live_bytes: 0,
            data_bytes: self.data_bytes,
        }
    }

    /// The object in one piece; copies.
    pub fn to_bytes(&self) -> Bytes {
        let mut object = BytesMut::with_capacity(self.length as usize);
        for chunk in &self.chunks {
            object.put_slice(chunk);
        }
        object.freeze()
    }
}

/// Gathers frames into one segment. The checksums are computed as frames are added (20 to 100 µs per MiB).
#[derive(Debug)]
pub struct SegmentBuilder {
    volume: VolumeId,
    id: SegmentId,
    chunks: Vec<Bytes>,
    length: u64,
    checksum: crc32fast::Hasher,
    data_bytes: u64,
    frames: Vec<FrameEntry>,
    plain: Vec<(FrameNumber, Vec<Bytes>)>,
    encoder: FrameEncoder,
    /// As earlier releases wrote encoded frames.
    #[cfg(test)]
    pub(crate) coarse: bool,
}

impl SegmentBuilder {
    /// An empty segment `id` of `volume`, whose frames are stored as they are.
    pub fn new(volume: VolumeId, id: SegmentId) -> Self {
        Self::encoding(volume, id, FrameEncoder::default())
    }

    /// An empty segment `id` of `volume`, whose frames `encoder` encodes.
    pub fn encoding(volume: VolumeId, id: SegmentId, encoder: FrameEncoder) -> Self {
        let mut builder = Self {
            encoder,
            #[cfg(test)]
            coarse: false,
            plain: Vec::new(),
            volume,
            id,
            chunks: Vec::new(),
            length: 0,
            checksum: crc32fast::Hasher::new(),
            data_bytes: 0,
            frames: Vec::new(),
        };
        builder.append(object::encode_header(volume, id));
        builder
    }

    /// The segment's name.
    pub fn id(&self) -> SegmentId {
        self.id
    }

    /// Decoded bytes added so far.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Number of frames added so far.
    pub fn frames(&self) -> usize {
        self.frames.len()
    }

    /// Appends one frame whose data is `pieces` end to end; the pieces are kept, not copied. The extent that commits it names
    /// the returned number and offsets within the data.
    ///
    /// Errors: `Invalid` when the frame is empty or longer than [`FRAME_BYTES_MAX`], or the segment exceeds 64 GiB.
    pub fn add_frame(&mut self, pieces: Vec<Bytes>) -> Result<FrameNumber, StoreError> {
        let decoded: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        if decoded == 0 || decoded > FRAME_BYTES_MAX {
            return Err(StoreError::Invalid(format!(
                "a frame of {decoded} bytes; 1..={FRAME_BYTES_MAX} are allowed"
            )));
        }
        let frame = self.begin_frame(frame_extent_bytes(decoded, Codec::PLAIN.page_bytes()))?;
        let identity = PageIdentity {
            volume: self.volume,
            segment: self.id,
            frame,
        };
        let codec = self.encoder.codec();
        #[cfg(test)]
        let codec = Codec {
            fine: codec.fine && !self.coarse,
            ..codec
        };
        match self.encoder.encode(codec, &identity, &pieces)? {
            Some((codec, stored)) => {
                // Again, with the length that it really has.
                self.begin_frame(frame_extent_bytes(stored.len() as u64, codec.page_bytes()))?;
                self.append_pages(codec, identity, decoded, stored.len() as u64, vec![stored]);
                self.plain.push((frame, pieces));
            }
            None => {
                self.append_pages(Codec::PLAIN, identity, decoded, decoded, pieces);
            }
        }
        Ok(frame)
    }

    fn append_pages(
        &mut self,
        codec: Codec,
        identity: PageIdentity,
        decoded: u64,
        stored: u64,
        pieces: Vec<Bytes>,
    ) {
        let mut pieces = Pieces::new(pieces);
        let page_bytes = codec.page_bytes();
        for page in 0..stored.div_ceil(page_bytes as u64) as u32 {
            let mut left = page_bytes.min((stored - u64::from(page) * page_bytes as u64) as usize);
            let mut data = crc32fast::Hasher::new();
            let header_at = self.chunks.len();
            self.chunks.push(Bytes::new());
            while let Some(piece) = pieces.take(left) {
                data.update(&piece);
                left -= piece.len();
                self.length += piece.len() as u64;
                self.chunks.push(piece);
            }
            let header = identity.encode(codec, page, stored as u32, data.clone());
            // One pass over the data serves both sums: the object's is combined from those of its parts.
            self.checksum.update(&header);
            self.checksum.combine(&data);
            self.length += PAGE_HEADER_BYTES as u64;
            self.chunks[header_at] = Bytes::copy_from_slice(&header);
        }
        self.data_bytes += decoded;
        self.frames.push(FrameEntry {
            frame: identity.frame,
            stored_bytes: stored as u32,
            decoded_bytes: decoded as u32,
            codec,
            origin_segment: identity.segment,
            origin_frame: identity.frame,
        });
    }

    /// Appends a frame copied verbatim from another segment of the same volume (compaction): `entry` is its entry there,
    /// `encoded` its pages with their headers.
    ///
    /// Errors: `Invalid` when `encoded` does not have the length that `entry` implies.
    pub fn add_relocated(
        &mut self,
        entry: &FrameEntry,
        encoded: Bytes,
    ) -> Result<FrameNumber, StoreError> {
        if encoded.len() as u64 != entry.extent_bytes() || encoded.is_empty() {
            return Err(StoreError::Invalid(format!(
                "a frame of {} stored bytes cannot be {} bytes encoded",
                entry.stored_bytes,
                encoded.len()
            )));
        }
        let frame = self.begin_frame(encoded.len() as u64)?;
        self.append(encoded);
        self.data_bytes += u64::from(entry.decoded_bytes);
        self.frames.push(FrameEntry { frame, ..*entry });
        Ok(frame)
    }

    /// Ends the segment with its footer.
    pub fn finish(mut self) -> EncodedSegment {
        self.pad();
        let footer = object::encode_footer(
            self.volume,
            self.id,
            self.length,
            self.data_bytes,
            &self.frames,
        );
        self.append(footer);
        EncodedSegment {
            volume: self.volume,
            id: self.id,
            chunks: self.chunks,
            length: self.length,
            checksum: self.checksum.finalize(),
            data_bytes: self.data_bytes,
            frames: self.frames,
            plain: self.plain,
        }
    }

    /// Where a frame of `bytes`, page headers included, begins.
    fn begin_frame(&mut self, bytes: u64) -> Result<FrameNumber, StoreError> {
        let start = self.length.next_multiple_of(FRAME_ALIGN);
        let end = start + bytes;
        match (
            FrameNumber::at(start),
            FrameNumber::at(end.next_multiple_of(FRAME_ALIGN)),
        ) {
            (Some(frame), Some(_)) => {
                self.pad();
                Ok(frame)
            }
            _ => Err(StoreError::Invalid(format!(
                "segment {} would grow to {end} bytes, more than frame numbers can name",
                self.id
            ))),
        }
    }

    fn pad(&mut self) {
        let padding = self.length.next_multiple_of(FRAME_ALIGN) - self.length;
        if padding > 0 {
            self.append(Bytes::from_static(&[0; FRAME_ALIGN as usize]).slice(..padding as usize));
        }
    }

    fn append(&mut self, bytes: Bytes) {
        self.checksum.update(&bytes);
        self.length += bytes.len() as u64;
        self.chunks.push(bytes);
    }
}

/// Cuts a list of pieces at other places than it came in.
struct Pieces {
    pieces: std::vec::IntoIter<Bytes>,
    rest: Bytes,
}

impl Pieces {
    fn new(pieces: Vec<Bytes>) -> Self {
        Self {
            pieces: pieces.into_iter(),
            rest: Bytes::new(),
        }
    }

    /// 1..=max bytes; `None` when `max` is 0 or nothing is left.
    fn take(&mut self, max: usize) -> Option<Bytes> {
        if max == 0 {
            return None;
        }
        while self.rest.is_empty() {
            self.rest = self.pieces.next()?;
        }
        Some(self.rest.split_to(max.min(self.rest.len())))
    }
}

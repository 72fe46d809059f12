//! Extents: where a range of a file's bytes lies.

use bytes::Bytes;
use heliofs_proto::ids::SegmentId;
use heliofs_proto::v1;

use super::Record;
use crate::change::Corruption;
use crate::codec::{Reader, Writer};

/// Under (ino, offset).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentRecord {
    /// Bytes; at least 1.
    pub length: u64,
    /// seq of the command that wrote it; an erase record kills extents that are older than itself.
    pub seq: u64,
    /// Where the bytes are.
    pub data: ExtentData,
}

/// Where the bytes of an extent are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtentData {
    /// In the record itself.
    Inline(Bytes),
    /// In a frame of a segment.
    Segment {
        /// The object.
        segment: SegmentId,
        /// The frame's number in it.
        frame: u32,
        /// The first byte in the decoded frame.
        frame_offset: u32,
    },
}

impl ExtentRecord {
    /// The part of it that starts `skip` bytes in and is `length` bytes long; both lie inside it.
    #[must_use]
    pub fn part(&self, skip: u64, length: u64) -> Self {
        debug_assert!(length > 0 && skip + length <= self.length);
        let data = match &self.data {
            ExtentData::Inline(bytes) => {
                ExtentData::Inline(bytes.slice(skip as usize..(skip + length) as usize))
            }
            ExtentData::Segment {
                segment,
                frame,
                frame_offset,
            } => ExtentData::Segment {
                segment: *segment,
                frame: *frame,
                frame_offset: frame_offset + skip as u32,
            },
        };
        Self {
            length,
            seq: self.seq,
            data,
        }
    }

    /// As clients see it.
    pub fn extent(&self, offset: u64) -> v1::Extent {
        let (segment, frame, frame_offset, inline_bytes) = match &self.data {
            ExtentData::Inline(bytes) => (0, 0, 0, bytes.clone()),
            ExtentData::Segment {
                segment,
                frame,
                frame_offset,
            } => (segment.0, *frame, *frame_offset, Bytes::new()),
        };
        v1::Extent {
            offset,
            length: self.length,
            segment,
            frame,
            frame_offset,
            inline_bytes,
            seq: self.seq,
        }
    }
}

impl Record for ExtentRecord {
    fn encode(&self) -> Bytes {
        let mut w = Writer::record(1);
        w.varint(self.length).varint(self.seq);
        match &self.data {
            ExtentData::Inline(bytes) => w.u8(0).rest(bytes),
            ExtentData::Segment {
                segment,
                frame,
                frame_offset,
            } => w
                .u8(1)
                .varint(segment.0)
                .varint((*frame).into())
                .varint((*frame_offset).into()),
        };
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let mut r = Reader::record(key, value, 1)?;
        let length = r.varint()?;
        let seq = r.varint()?;
        let data = match r.u8()? {
            0 => ExtentData::Inline(r.rest()),
            1 => {
                let data = ExtentData::Segment {
                    segment: SegmentId(r.varint()?),
                    frame: r.varint32()?,
                    frame_offset: r.varint32()?,
                };
                r.end()?;
                data
            }
            _ => return Err(r.corrupt("unknown extent form")),
        };
        match &data {
            ExtentData::Inline(bytes) if bytes.len() as u64 != length => Err(Corruption::Record {
                key: key.to_vec(),
                why: "inline bytes differ from the length",
            }),
            _ => Ok(Self { length, seq, data }),
        }
    }
}

//! Segments, and who may commit which ids.

use bytes::Bytes;
use heliofs_proto::ids::SessionId;
use heliofs_proto::limits::SEGMENTS_PER_BLOCK;

use super::Record;
use crate::change::Corruption;
use crate::codec::{Reader, Writer};

/// Under a segment id: an object that extents reference. Removed when `live_bytes` reaches 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentRecord {
    /// Bytes of the whole object.
    pub length: u64,
    /// crc32 of the whole object.
    pub checksum: u32,
    /// Sum of the decoded lengths of its frames.
    pub data_bytes: u64,
    /// Bytes that extents reference; a range that two extents share counts twice.
    pub live_bytes: u64,
}

/// Under a block of segment ids: the session that may commit them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentBlockRecord {
    /// The block is closed when this session no longer exists.
    pub session: SessionId,
    /// A bit per id, lowest id first: a commit has brought it. An id whose bit is set and that has no record was freed and must
    /// never live again: its object is, or will be, deleted.
    pub brought: [u8; SEGMENTS_PER_BLOCK as usize / 8],
}

impl Record for SegmentRecord {
    fn encode(&self) -> Bytes {
        let mut w = Writer::record(1);
        w.varint(self.length)
            .u32(self.checksum)
            .varint(self.data_bytes)
            .varint(self.live_bytes);
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let mut r = Reader::record(key, value, 1)?;
        let record = Self {
            length: r.varint()?,
            checksum: r.u32()?,
            data_bytes: r.varint()?,
            live_bytes: r.varint()?,
        };
        r.end()?;
        Ok(record)
    }
}

impl Record for SegmentBlockRecord {
    fn encode(&self) -> Bytes {
        let mut w = Writer::record(1);
        w.varint(self.session.0).rest(&self.brought);
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let mut r = Reader::record(key, value, 1)?;
        let record = Self {
            session: SessionId(r.varint()?),
            brought: r
                .rest()
                .as_ref()
                .try_into()
                .map_err(|_| r.corrupt("block does not have one bit per id"))?,
        };
        Ok(record)
    }
}

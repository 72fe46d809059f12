//! Work that was decided and that drivers still have to finish.

use bytes::Bytes;
use heliofs_proto::ids::UnixNanos;

use super::Record;
use crate::change::Corruption;
use crate::codec::{Reader, Writer};

/// Under (ino, start): extents in [start, end) that are older than `seq` are dead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EraseRecord {
    /// First byte behind the range.
    pub end: u64,
    /// seq of the command that erased.
    pub seq: u64,
}

/// Under an ino: it has no name any more and lives until nobody has it open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrphanRecord {
    /// When it lost its last name.
    pub since: UnixNanos,
}

impl Record for EraseRecord {
    fn encode(&self) -> Bytes {
        let mut w = Writer::record(1);
        w.varint(self.end).varint(self.seq);
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let mut r = Reader::record(key, value, 1)?;
        let record = Self {
            end: r.varint()?,
            seq: r.varint()?,
        };
        r.end()?;
        Ok(record)
    }
}

impl Record for OrphanRecord {
    fn encode(&self) -> Bytes {
        let mut w = Writer::record(1);
        w.i64(self.since.0);
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let mut r = Reader::record(key, value, 1)?;
        let record = Self {
            since: UnixNanos(r.i64()?),
        };
        r.end()?;
        Ok(record)
    }
}

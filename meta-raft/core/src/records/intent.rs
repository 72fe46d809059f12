//! Work that was decided and that drivers still have to finish.

use bytes::Bytes;
use heliofs_proto::ids::UnixNanos;

use super::Record;
use crate::change::Corruption;
use crate::codec::{Reader, Writer};

/// Under an ino: ranges whose older extents are dead and not removed yet. One record per file, so that an erasure that swallows
/// any number of earlier ones changes one record. Removed when the last range is worked off.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct EraseRecord {
    /// Ascending, disjoint, none empty; `InodeRecord::erases` is their number.
    pub ranges: Vec<ErasedRange>,
}

/// Extents that begin in [start, end) and are older than `seq` are dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErasedRange {
    /// First byte.
    pub start: u64,
    /// First byte behind it.
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

/// Under (intent, ino): a directory that a tree removal still has to empty. The key says it all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoveTreeRecord;

impl Record for EraseRecord {
    fn encode(&self) -> Bytes {
        let mut w = Writer::record(1);
        w.varint(self.ranges.len() as u64);
        let mut before = 0;
        for range in &self.ranges {
            w.varint(range.start - before)
                .varint(range.end - range.start)
                .varint(range.seq);
            before = range.end;
        }
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let mut r = Reader::record(key, value, 1)?;
        let mut ranges = Vec::new();
        let mut before = 0u64;
        for _ in 0..r.varint()? {
            let bounds = (r.varint()?, r.varint()?);
            let start = before.checked_add(bounds.0);
            let end = start.and_then(|start| start.checked_add(bounds.1));
            let (Some(start), Some(end)) = (start, end) else {
                return Err(r.corrupt("an erased range overflows"));
            };
            before = end;
            let seq = r.varint()?;
            ranges.push(ErasedRange { start, end, seq });
        }
        r.end()?;
        Ok(Self { ranges })
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

impl Record for RemoveTreeRecord {
    fn encode(&self) -> Bytes {
        Writer::record(1).finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        Reader::record(key, value, 1)?.end()?;
        Ok(Self)
    }
}

//! Sessions: who may send mutations, and which replies are still kept.

use bytes::Bytes;

use super::Record;
use crate::change::Corruption;
use crate::codec::{Reader, Writer};
use crate::limits::INO_RANGES_MAX;

/// Under a session id. Replies with sequences from `acknowledged_below` on are kept under keys of their own.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct SessionRecord {
    /// The client holds the replies of all sequences below this one.
    pub acknowledged_below: u64,
    /// Inode numbers that were given to it and that it has not used, oldest first; none is empty.
    pub inos: Vec<std::ops::Range<u64>>,
}

impl Record for SessionRecord {
    fn encode(&self) -> Bytes {
        // Version 2 only where it says more: what was written below core level 5 stays as it is.
        let mut w = Writer::record(if self.inos.is_empty() { 1 } else { 2 });
        w.varint(self.acknowledged_below);
        if !self.inos.is_empty() {
            w.varint(self.inos.len() as u64);
            for range in &self.inos {
                w.varint(range.start).varint(range.end);
            }
        }
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let (version, mut r) = Reader::record_up_to(key, value, 2)?;
        let mut record = Self {
            acknowledged_below: r.varint()?,
            inos: Vec::new(),
        };
        if version == 2 {
            let count = r.varint()?;
            if count == 0 || count > INO_RANGES_MAX as u64 {
                return Err(r.corrupt("number of ranges"));
            }
            for _ in 0..count {
                let range = r.varint()?..r.varint()?;
                if range.is_empty() {
                    return Err(r.corrupt("an empty range"));
                }
                record.inos.push(range);
            }
        }
        r.end()?;
        Ok(record)
    }
}

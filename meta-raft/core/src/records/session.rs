//! Sessions: who may send mutations, and which replies are still kept.

use bytes::Bytes;

use super::Record;
use crate::change::Corruption;
use crate::codec::{Reader, Writer};

/// Under a session id. Replies with sequences from `acknowledged_below` on are kept under keys of their own.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct SessionRecord {
    /// The client holds the replies of all sequences below this one.
    pub acknowledged_below: u64,
}

impl Record for SessionRecord {
    fn encode(&self) -> Bytes {
        let mut w = Writer::record(1);
        w.varint(self.acknowledged_below);
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let mut r = Reader::record(key, value, 1)?;
        let record = Self {
            acknowledged_below: r.varint()?,
        };
        r.end()?;
        Ok(record)
    }
}

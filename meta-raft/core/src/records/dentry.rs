//! Directory entries: one record by name for lookups, one by cookie for listings.

use bytes::Bytes;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1::FileKind;

use super::{Record, kind};
use crate::change::Corruption;
use crate::codec::{Reader, Writer};

/// Under (parent, name).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameRecord {
    /// What the name means.
    pub ino: Ino,
    /// Its kind, so that a listing without attributes reads no inodes.
    pub kind: FileKind,
    /// Where the entry stands in listings.
    pub cookie: u64,
}

/// Under (parent, cookie).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CookieRecord {
    /// What the name means.
    pub ino: Ino,
    /// Its kind.
    pub kind: FileKind,
    /// The entry's name.
    pub name: Bytes,
}

impl Record for NameRecord {
    fn encode(&self) -> Bytes {
        let mut w = Writer::record(1);
        w.u8(self.kind as u8).varint(self.ino.0).varint(self.cookie);
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let mut r = Reader::record(key, value, 1)?;
        let byte = r.u8()?;
        let record = Self {
            kind: kind(&r, byte)?,
            ino: Ino(r.varint()?),
            cookie: r.varint()?,
        };
        r.end()?;
        Ok(record)
    }
}

impl Record for CookieRecord {
    fn encode(&self) -> Bytes {
        let mut w = Writer::record(1);
        w.u8(self.kind as u8).varint(self.ino.0).rest(&self.name);
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let mut r = Reader::record(key, value, 1)?;
        let byte = r.u8()?;
        Ok(Self {
            kind: kind(&r, byte)?,
            ino: Ino(r.varint()?),
            name: r.rest(),
        })
    }
}

//! Quotas: limits and usage, and how far counting has come.

use bytes::Bytes;
use heliofs_proto::ids::Ino;

use super::Record;
use crate::change::Corruption;
use crate::codec::{Reader, Writer};

/// Under (kind, id): limits and usage of what is charged to a directory, a user or a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct QuotaRecord {
    /// Bytes of extents; 0: unlimited.
    pub bytes_max: u64,
    /// Inodes; 0: unlimited.
    pub inodes_max: u64,
    /// Bytes of the extents of all inodes that are charged; a directory's: also of those charged to quotas below it.
    pub used_bytes: u64,
    /// Inodes that are charged.
    pub used_inodes: u64,
    /// A directory's: the directory whose quota encloses this one and is charged what this one is; 0: none.
    pub parent: Ino,
    /// A directory's: how far it is.
    pub state: QuotaState,
    /// While counting: what is below the directory was charged to this quota before (0: none).
    pub from: Ino,
}

/// How far a directory's quota is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum QuotaState {
    /// All below the directory is charged to it.
    #[default]
    Active = 0,
    /// What is below the directory is gone through, and charged to it.
    Counting = 1,
    /// It was taken back: what is below the directory is gone through, and charged to the enclosing quota.
    Removing = 2,
    /// It was taken back; what is still charged to it is not below the directory, and the record goes with it.
    Removed = 3,
}

impl QuotaRecord {
    /// Whether it limits anything.
    pub fn is_limited(&self) -> bool {
        self.bytes_max != 0 || self.inodes_max != 0
    }

    /// Whether a walk through the tree is under way.
    pub fn is_walked(&self) -> bool {
        matches!(self.state, QuotaState::Counting | QuotaState::Removing)
    }
}

/// Under (quota, directory): entries of the directory above `after` are still to be charged anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct QuotaWalkRecord {
    /// Cookie of the last entry that was looked at; 0: none.
    pub after: u64,
}

impl Record for QuotaRecord {
    fn encode(&self) -> Bytes {
        let mut w = Writer::record(1);
        w.varint(self.bytes_max)
            .varint(self.inodes_max)
            .varint(self.used_bytes)
            .varint(self.used_inodes)
            .varint(self.parent.0)
            .u8(self.state as u8)
            .varint(self.from.0);
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let mut r = Reader::record(key, value, 1)?;
        let record = Self {
            bytes_max: r.varint()?,
            inodes_max: r.varint()?,
            used_bytes: r.varint()?,
            used_inodes: r.varint()?,
            parent: Ino(r.varint()?),
            state: match r.u8()? {
                0 => QuotaState::Active,
                1 => QuotaState::Counting,
                2 => QuotaState::Removing,
                3 => QuotaState::Removed,
                _ => return Err(r.corrupt("unknown state of a quota")),
            },
            from: Ino(r.varint()?),
        };
        r.end()?;
        Ok(record)
    }
}

impl Record for QuotaWalkRecord {
    fn encode(&self) -> Bytes {
        let mut w = Writer::record(1);
        w.varint(self.after);
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let mut r = Reader::record(key, value, 1)?;
        let record = Self { after: r.varint()? };
        r.end()?;
        Ok(record)
    }
}

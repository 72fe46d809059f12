//! One of each per volume: head, settings, counters.

use bytes::Bytes;
use heliofs_proto::ids::{Epoch, Ino, Position, UnixNanos};
use heliofs_proto::v1::VolumeSettings;
use prost::Message;

use super::Record;
use crate::change::Corruption;
use crate::codec::{Reader, Writer};

/// How far the volume is.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct HeadRecord {
    /// Of the last command.
    pub position: Position,
    /// Of the last command; the next one is not earlier.
    pub time: UnixNanos,
    /// Every epoch and its first seq, oldest first.
    pub epochs: Vec<(Epoch, u64)>,
}

/// What commands obey.
#[derive(Clone, Debug, PartialEq)]
pub struct SettingsRecord(pub VolumeSettings);

/// The next ids, and what is used.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CountersRecord {
    /// Counter of the next inode.
    pub next_ino: u64,
    /// First id of the next block of segment ids, as a counter.
    pub next_segment: u64,
    /// Number of the next session.
    pub next_session: u64,
    /// Number of the next tree removal.
    pub next_intent: u64,
    /// Bytes of all extents of all inodes, orphans included.
    pub used_bytes: u64,
    /// Inodes, orphans included.
    pub used_inodes: u64,
    /// Segments with live bytes.
    pub segments: u64,
    /// What there is of quotas.
    pub quotas: QuotaCounters,
}

/// What there is of quotas: with none, commands look no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct QuotaCounters {
    /// Records of directories' quotas.
    pub directories: u64,
    /// Users and groups with limits.
    pub limited_owners: u64,
    /// Whether usage of users and groups is counted.
    pub accounting: Accounting,
    /// While it is being counted: inodes up to this one are.
    pub counted_to: Ino,
}

/// Whether usage of users and groups is counted: from their first limit on, until the last one is taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Accounting {
    /// It is not, and there are no records of it.
    #[default]
    Off = 0,
    /// Inodes are gone through, in the order of their numbers.
    Counting = 1,
    /// All of them are charged.
    On = 2,
    /// It is not any more; its records are being removed.
    Clearing = 3,
}

impl Record for HeadRecord {
    fn encode(&self) -> Bytes {
        let mut w = Writer::record(1);
        w.varint(self.position.epoch.0.into())
            .varint(self.position.seq)
            .i64(self.time.0);
        w.varint(self.epochs.len() as u64);
        for (epoch, first) in &self.epochs {
            w.varint(epoch.0.into()).varint(*first);
        }
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let mut r = Reader::record(key, value, 1)?;
        let position = Position {
            epoch: Epoch(r.varint32()?),
            seq: r.varint()?,
        };
        let time = UnixNanos(r.i64()?);
        let epochs = (0..r.varint()?)
            .map(|_| Ok((Epoch(r.varint32()?), r.varint()?)))
            .collect::<Result<_, Corruption>>()?;
        r.end()?;
        Ok(Self {
            position,
            time,
            epochs,
        })
    }
}

impl Record for SettingsRecord {
    fn encode(&self) -> Bytes {
        let mut w = Writer::record(1);
        w.rest(&self.0.encode_to_vec());
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let mut r = Reader::record(key, value, 1)?;
        let settings =
            VolumeSettings::decode(r.rest()).map_err(|_| r.corrupt("settings can't be decoded"))?;
        Ok(Self(settings))
    }
}

impl Record for CountersRecord {
    fn encode(&self) -> Bytes {
        let quotas = &self.quotas;
        // Version 2 only where it says more: what was written under core level 1 stays as it is.
        let charged = *quotas != QuotaCounters::default();
        let mut w = Writer::record(if charged { 2 } else { 1 });
        w.varint(self.next_ino)
            .varint(self.next_segment)
            .varint(self.next_session)
            .varint(self.next_intent)
            .varint(self.used_bytes)
            .varint(self.used_inodes)
            .varint(self.segments);
        if charged {
            w.varint(quotas.directories)
                .varint(quotas.limited_owners)
                .u8(quotas.accounting as u8)
                .varint(quotas.counted_to.0);
        }
        w.finish()
    }

    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption> {
        let (version, mut r) = Reader::record_up_to(key, value, 2)?;
        let mut record = Self {
            next_ino: r.varint()?,
            next_segment: r.varint()?,
            next_session: r.varint()?,
            next_intent: r.varint()?,
            used_bytes: r.varint()?,
            used_inodes: r.varint()?,
            segments: r.varint()?,
            quotas: QuotaCounters::default(),
        };
        if version == 2 {
            record.quotas = QuotaCounters {
                directories: r.varint()?,
                limited_owners: r.varint()?,
                accounting: match r.u8()? {
                    0 => Accounting::Off,
                    1 => Accounting::Counting,
                    2 => Accounting::On,
                    3 => Accounting::Clearing,
                    _ => return Err(r.corrupt("unknown state of accounting")),
                },
                counted_to: Ino(r.varint()?),
            };
        }
        r.end()?;
        Ok(record)
    }
}

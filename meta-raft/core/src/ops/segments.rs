//! Segments: ids for sessions, and what extents of a command add to and take from segments and counters.

use std::collections::BTreeMap;

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, SegmentId, SessionId};
use heliofs_proto::limits::{SEGMENTS_ALLOCATE_MAX, SEGMENTS_PER_BLOCK};
use heliofs_proto::v1;

use super::charge::Charges;
use crate::change::Corruption;
use crate::keys;
use crate::limits::{EXTENTS_PER_COMMAND_MAX, EXTENTS_WEIGHED_MAX, IN_PLACE_RECORDS_MAX};
use crate::records::{ExtentData, ExtentRecord, InodeRecord, SegmentBlockRecord, SegmentRecord};
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Gives the session consecutive fresh ids in whole blocks; `value` is the first.
///
/// Refused: `INVALID` for the system session and for a count that is no multiple of the block or too large; `NO_SPACE` when all
/// ids are used up.
pub(crate) fn allocate<V: View>(txn: &mut Txn<V>, op: &v1::SegmentsAllocate) -> OpResult {
    let count = u64::from(op.count);
    let whole = count > 0 && count.is_multiple_of(SEGMENTS_PER_BLOCK);
    if !whole || op.count > SEGMENTS_ALLOCATE_MAX || txn.session == SessionId::SYSTEM {
        return Err(FsError::Invalid.into());
    }
    let epoch = txn.epoch();
    let counters = txn.counters()?;
    // Block 0 is left out: id 0 means inline data.
    let first = counters.next_segment.max(SEGMENTS_PER_BLOCK);
    let end = first + count;
    counters.next_segment = end;
    let block = SegmentBlockRecord {
        session: txn.session,
        brought: [0; SEGMENTS_PER_BLOCK as usize / 8],
    };
    for counter in (first..end).step_by(SEGMENTS_PER_BLOCK as usize) {
        // The block's last id must exist too.
        SegmentId::new(epoch, counter + SEGMENTS_PER_BLOCK - 1).ok_or(FsError::NoSpace)?;
        let id = SegmentId::new(epoch, counter).ok_or(FsError::NoSpace)?;
        txn.put_fresh(keys::segment_block(txn.volume, id), &block);
    }
    let first = SegmentId::new(epoch, first).ok_or(FsError::NoSpace)?;
    Ok(v1::Reply {
        value: first.0,
        ..v1::Reply::default()
    })
}

/// What the extents that a command adds and removes come to. Written to segments and counters once, by [`Balance::settle`], so
/// that a segment whose extents only move is not freed on the way.
#[derive(Debug, Default)]
#[must_use = "an unsettled balance leaves counters wrong"]
pub(crate) struct Balance {
    segments: BTreeMap<SegmentId, i64>,
    brought: BTreeMap<SegmentId, SegmentRecord>,
    bytes: i64,
    removed: usize,
    /// Extents of live files that this command made dead and leaves to later steps: their bytes by inode and place.
    deferred: BTreeMap<(Ino, u64), u64>,
    /// Extents that were looked at for that.
    weighed: usize,
    grows: bool,
    charges: Charges,
}

impl Balance {
    /// Counts an extent that is being stored.
    pub(crate) fn add(
        &mut self,
        ino: Ino,
        inode: &mut InodeRecord,
        extent: &ExtentRecord,
    ) -> Result<(), Corruption> {
        self.count(ino, inode, extent, extent.length as i64)
    }

    /// Counts an extent that is being removed.
    pub(crate) fn remove(
        &mut self,
        ino: Ino,
        inode: &mut InodeRecord,
        extent: &ExtentRecord,
    ) -> Result<(), Corruption> {
        self.removed += 1;
        self.count(ino, inode, extent, -(extent.length as i64))
    }

    fn count(
        &mut self,
        ino: Ino,
        inode: &mut InodeRecord,
        extent: &ExtentRecord,
        bytes: i64,
    ) -> Result<(), Corruption> {
        if let ExtentData::Segment { segment, .. } = extent.data {
            *self.segments.entry(segment).or_default() += bytes;
        }
        self.bytes += bytes;
        self.charges.bytes(ino, inode, bytes);
        inode.allocated = moved(inode.allocated, bytes, || "an inode's allocated".to_owned())?;
        Ok(())
    }

    /// Notes an extent that stays and counts until a later step removes it, though nobody sees it any more.
    pub(crate) fn defer(
        &mut self,
        ino: Ino,
        inode: &InodeRecord,
        start: u64,
        extent: &ExtentRecord,
    ) {
        self.deferred.insert((ino, start), extent.length);
        self.charges.deferred(ino, inode, extent.length as i64);
    }

    /// What was deferred by this command is removed by it after all.
    pub(crate) fn undefer(&mut self, ino: Ino, inode: &InodeRecord, start: u64) {
        if let Some(bytes) = self.deferred.remove(&(ino, start)) {
            self.charges.deferred(ino, inode, -(bytes as i64));
        }
    }

    /// Of a command that may need more bytes than it gives back, so that it matters what is deferred.
    pub(crate) fn growing() -> Self {
        Self {
            grows: true,
            ..Self::default()
        }
    }

    /// How many more extents may be looked at to learn what is deferred.
    pub(crate) fn to_weigh(&self) -> usize {
        match self.grows {
            true => EXTENTS_WEIGHED_MAX.saturating_sub(self.weighed),
            false => 0,
        }
    }

    /// So many were looked at.
    pub(crate) fn weighed(&mut self, extents: usize) {
        self.weighed += extents;
    }

    /// A segment that gets its first references from this command. One that is left without any is freed.
    pub(crate) fn bring(&mut self, id: SegmentId, segment: SegmentRecord) {
        self.segments.entry(id).or_default();
        self.brought.insert(id, segment);
    }

    /// How many more extents this command may remove in place; each may change its segment's record as well.
    pub(crate) fn room<V: View>(&self, txn: &Txn<V>) -> usize {
        let set = txn.changed() + self.segments.len();
        let records = IN_PLACE_RECORDS_MAX.saturating_sub(set) / 2;
        records.min(EXTENTS_PER_COMMAND_MAX.saturating_sub(self.removed))
    }

    /// Writes segments and counters.
    ///
    /// Refused: `NO_SPACE` when the command needs more bytes than it gives back and the volume is full. Bytes of erased extents
    /// count as used until the steps of the erasure remove them, but for what this very command erases.
    pub(crate) fn settle<V: View>(mut self, txn: &mut Txn<V>) -> OpResult<()> {
        txn.charges.absorb(self.charges);
        let used = {
            let counters = txn.counters()?;
            let used = moved(counters.used_bytes, self.bytes, || "used bytes".to_owned())?;
            counters.used_bytes = used;
            used
        };
        let deferred: u64 = self.deferred.values().sum();
        if self.bytes > deferred as i64 {
            let capacity = txn.settings()?.capacity_bytes_max;
            if capacity != 0 && used.saturating_sub(deferred) > capacity {
                return Err(FsError::NoSpace.into());
            }
        }
        for (id, bytes) in self.segments {
            let key = keys::segment(txn.volume, id);
            let brought = self.brought.remove(&id);
            if brought.is_none() && bytes == 0 {
                continue;
            }
            let is_new = brought.is_some();
            let record = match brought {
                Some(record) => Some(record),
                None => txn.get(&key)?,
            };
            let mut record: SegmentRecord = record.ok_or_else(|| {
                let what = format!(
                    "volume {}: extents name segment {id}, which has no record",
                    txn.volume
                );
                Corruption::Contradiction(what)
            })?;
            record.live_bytes = moved(record.live_bytes, bytes, || {
                format!("live bytes of segment {id}")
            })?;
            match (record.live_bytes, is_new) {
                (0, true) => txn.free_segment(id),
                (0, false) => {
                    txn.remove(key)?;
                    txn.free_segment(id);
                    let segments = &mut txn.counters()?.segments;
                    *segments = moved(*segments, -1, || "segments".to_owned())?;
                }
                (_, true) => {
                    txn.put_fresh(key, &record);
                    txn.counters()?.segments += 1;
                }
                (_, false) => txn.put(key, &record)?,
            }
        }
        Ok(())
    }
}

/// Counts never wrap: a count that would is a contradiction.
pub(super) fn moved(count: u64, by: i64, what: impl FnOnce() -> String) -> Result<u64, Corruption> {
    count.checked_add_signed(by).ok_or_else(|| {
        Corruption::Contradiction(format!("{} would go from {count} by {by}", what()))
    })
}

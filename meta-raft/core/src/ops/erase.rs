//! Erasures that are too large for one command: the ranges that wait, and the step that works them off.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, VolumeId};
use heliofs_proto::v1;

use super::segments::Balance;
use crate::change::Corruption;
use crate::keys::{self, Tag};
use crate::limits::{CORE_LEVEL_GROWTH, ERASED_RANGES_MAX, EXTENTS_PER_STEP};
use crate::records::{EraseRecord, ErasedRange, ExtentRecord, InodeRecord, QuotaCounters, Record};
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Extents read at once while those that a command overwrites are weighed.
const WEIGHED_AT_ONCE: usize = 4096;

/// The erased ranges of one file.
///
/// A live extent that overlaps a range is never older than it: when the range was made, the extents that were alive then were
/// split at its edges. So the first byte of an extent tells whether it is dead, and what is cut off a live extent stays alive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Erased {
    ranges: Vec<ErasedRange>,
}

impl Erased {
    pub(crate) fn load(
        view: &impl View,
        volume: VolumeId,
        ino: Ino,
        inode: &InodeRecord,
    ) -> Result<Self, Corruption> {
        if inode.erases == 0 {
            return Ok(Self::default());
        }
        let key = keys::erase(volume, ino);
        let ranges = match view.get(&key)? {
            Some(value) => EraseRecord::decode(&key, &value)?.ranges,
            None => Vec::new(),
        };
        if ranges.len() != inode.erases as usize {
            let what = format!(
                "volume {volume}: inode {ino} counts {} erased ranges and has {}",
                inode.erases,
                ranges.len()
            );
            return Err(Corruption::Contradiction(what));
        }
        Ok(Self { ranges })
    }

    /// Writes the ranges and their number.
    fn store<V: View>(
        self,
        txn: &mut Txn<V>,
        ino: Ino,
        inode: &mut InodeRecord,
    ) -> Result<(), Corruption> {
        let key = keys::erase(txn.volume, ino);
        let before = inode.erases;
        inode.erases = self.ranges.len() as u32;
        if inode.erases > 0 {
            txn.put(
                key,
                &EraseRecord {
                    ranges: self.ranges,
                },
            )
        } else if before > 0 {
            txn.remove(key)
        } else {
            Ok(())
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether the stored extent that begins at `start` is dead.
    pub(crate) fn kills(&self, start: u64, extent: &ExtentRecord) -> bool {
        let index = self.ranges.partition_point(|range| range.end <= start);
        self.ranges
            .get(index)
            .is_some_and(|range| range.start <= start && extent.seq < range.seq)
    }

    /// Takes [from, to) out of the ranges.
    fn cut(&mut self, from: u64, to: u64) {
        let first = self.ranges.partition_point(|range| range.end <= from);
        let behind = self.ranges.partition_point(|range| range.start < to);
        if first >= behind {
            return;
        }
        let left = self.ranges[first];
        let right = self.ranges[behind - 1];
        let left = (left.start < from).then_some(ErasedRange { end: from, ..left });
        let right = (right.end > to).then_some(ErasedRange { start: to, ..right });
        self.ranges
            .splice(first..behind, left.into_iter().chain(right));
    }

    /// Makes everything in [from, to) that is older than `seq` dead; nothing there may be younger.
    fn add(&mut self, from: u64, to: u64, seq: u64) {
        self.cut(from, to);
        let index = self.ranges.partition_point(|range| range.end <= from);
        let mut new = ErasedRange {
            start: from,
            end: to,
            seq,
        };
        let mut replaced = index..index;
        // Neighbours of one command become one range: a commit of many adjacent extents leaves one.
        if let Some(right) = self.ranges.get(index)
            && (right.start, right.seq) == (to, seq)
        {
            new.end = right.end;
            replaced.end += 1;
        }
        if let Some(left) = index.checked_sub(1).map(|left| self.ranges[left])
            && (left.end, left.seq) == (from, seq)
        {
            new.start = left.start;
            replaced.start -= 1;
        }
        self.ranges.splice(replaced, [new]);
    }
}

/// Makes the stored extents that begin in [from, to) dead: at once if they are few, else as an erased range. No live extent may
/// reach over an edge. `BUSY` if the file has too many erased ranges.
pub(crate) fn erase_inner<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    mut erased: Erased,
    (from, to): (u64, u64),
    balance: &mut Balance,
) -> OpResult<()> {
    let room = balance.room(txn);
    let inner = txn.scan(
        &keys::extent(txn.volume, ino, from),
        &keys::extent(txn.volume, ino, to),
        room + 1,
    )?;
    let before = erased.clone();
    if inner.len() <= room {
        for (key, value) in inner {
            balance.undefer(ino, inode, offset_of(&key)?);
            balance.remove(ino, inode, &ExtentRecord::decode(&key, &value)?)?;
            txn.remove(key)?;
        }
        erased.cut(from, to);
    } else {
        weigh(txn, ino, inode, &erased, (from, to), balance)?;
        erased.add(from, to, txn.position.seq);
    }
    if erased.ranges.len() > ERASED_RANGES_MAX.max(before.ranges.len()) {
        return Err(FsError::Busy.into());
    }
    if erased != before {
        erased.store(txn, ino, inode)?;
    }
    Ok(())
}

/// Notes which live extents that begin in [from, to) are about to become dead, for the limits that the command could pass by what
/// it puts in their place.
fn weigh<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &InodeRecord,
    erased: &Erased,
    (from, to): (u64, u64),
    balance: &mut Balance,
) -> OpResult<()> {
    let settings = txn.settings()?;
    let limited =
        settings.capacity_bytes_max != 0 || txn.counters()?.quotas != QuotaCounters::default();
    if settings.core_level < CORE_LEVEL_GROWTH || !limited {
        return Ok(());
    }
    let end = keys::extent(txn.volume, ino, to);
    let mut cursor = keys::extent(txn.volume, ino, from);
    loop {
        let wanted = WEIGHED_AT_ONCE.min(balance.to_weigh());
        if wanted == 0 {
            return Ok(());
        }
        let page = txn.scan(&cursor, &end, wanted)?;
        balance.weighed(page.len());
        for (key, value) in &page {
            let start = offset_of(key)?;
            let extent = ExtentRecord::decode(key, value)?;
            if !erased.kills(start, &extent) {
                balance.defer(ino, inode, start, &extent);
            }
        }
        match page.last().filter(|_| page.len() == wanted) {
            Some((last, _)) => cursor = keys::after(last),
            None => return Ok(()),
        }
    }
}

/// Removes dead extents of a file, a bounded number of them; `done` when none is left, or the file is gone.
pub(crate) fn step<V: View>(txn: &mut Txn<V>, op: &v1::EraseStep) -> OpResult {
    let ino = Ino(op.ino);
    let Some(mut inode) = txn.get::<InodeRecord>(&keys::inode(txn.volume, ino))? else {
        return Ok(v1::Reply {
            done: true,
            ..v1::Reply::default()
        });
    };
    let mut erased = Erased::load(txn.view(), txn.volume, ino, &inode)?;
    if erased.is_empty() {
        return Ok(v1::Reply {
            done: true,
            ..v1::Reply::default()
        });
    }
    let mut balance = Balance::default();
    let mut examined = 0;
    // Live extents count too: a step's reads are bounded as its writes are.
    while let Some(range) = erased.ranges.first().copied()
        && examined < EXTENTS_PER_STEP
    {
        let wanted = EXTENTS_PER_STEP - examined;
        let page = txn.scan(
            &keys::extent(txn.volume, ino, range.start),
            &keys::extent(txn.volume, ino, range.end),
            wanted,
        )?;
        examined += page.len();
        let mut worked_off_to = range.end;
        if page.len() == wanted
            && let Some((key, _)) = page.last()
        {
            worked_off_to = offset_of(key)? + 1;
        }
        for (key, value) in page {
            let extent = ExtentRecord::decode(&key, &value)?;
            if extent.seq < range.seq {
                balance.remove(ino, &mut inode, &extent)?;
                txn.remove(key)?;
            }
        }
        erased.cut(range.start, worked_off_to);
    }
    let done = erased.is_empty();
    erased.store(txn, ino, &mut inode)?;
    balance.settle(txn)?;
    txn.put_inode(ino, &inode)?;
    Ok(v1::Reply {
        attr: Some(inode.attr(ino)),
        done,
        ..v1::Reply::default()
    })
}

/// The first byte of the extent under `key`.
pub(crate) fn offset_of(key: &[u8]) -> Result<u64, Corruption> {
    match (Tag::of(key), keys::number(key, 1)) {
        (Some(Tag::Extent), Some(offset)) => Ok(offset),
        _ => Err(Corruption::Record {
            key: key.to_vec(),
            why: "not the key of an extent",
        }),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::records::ExtentData;

    fn extent(seq: u64) -> ExtentRecord {
        ExtentRecord {
            length: 1,
            seq,
            data: ExtentData::Inline(Bytes::from_static(b"x")),
        }
    }

    proptest! {
        #[test]
        fn ranges_kill_what_each_byte_s_last_erasure_kills(
            steps in prop::collection::vec((0u64..30, 1u64..12, any::<bool>(), any::<bool>()), 1..20),
        ) {
            let mut erased = Erased::default();
            let mut bytes = [0u64; 64];
            let mut seq = 1;
            for (from, length, add, same_command) in steps {
                let range = from as usize..(from + length) as usize;
                // One command erases no byte twice.
                if !same_command || bytes[range.clone()].contains(&seq) {
                    seq += 1;
                }
                if add {
                    erased.add(from, from + length, seq);
                    bytes[range].fill(seq);
                } else {
                    erased.cut(from, from + length);
                    bytes[range].fill(0);
                }
                prop_assert!(erased.ranges.iter().all(|range| range.start < range.end));
                prop_assert!(erased.ranges.is_sorted_by(|left, right| left.end <= right.start));
                for (at, killed_below) in bytes.iter().enumerate() {
                    for seq in 0..=seq {
                        let dead = erased.kills(at as u64, &extent(seq));
                        prop_assert_eq!(dead, seq < *killed_below, "byte {}, seq {}", at, seq);
                    }
                }
            }
            let record = EraseRecord { ranges: erased.ranges };
            prop_assert_eq!(EraseRecord::decode(b"k", &record.encode()), Ok(record));
        }
    }
}

//! How many quotas lie in each other.

use std::collections::BTreeMap;

use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1::QuotaKind;

use super::charge;
use super::quota::number;
use crate::change::Corruption;
use crate::keys::{self, Tag};
use crate::limits::{CORE_LEVEL_GROWTH, QUOTA_DEPTH_MAX, TRASH_DEPTH_MAX};
use crate::records::{InodeRecord, QuotaRecord, QuotaState, Record};
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Quotas read at once when all are looked at.
const QUOTAS_READ_AT_ONCE: usize = 4096;

/// The number of quotas from `quota` outward; `TOO_BIG` if there is no room for one in it.
fn depth<V: View>(txn: &Txn<V>, mut quota: Ino) -> OpResult<usize> {
    for above in 0..QUOTA_DEPTH_MAX {
        if quota == Ino(0) {
            return Ok(above);
        }
        let record = charge::read(txn.view(), txn.volume, QuotaKind::Directory, quota.0)?;
        quota = record.parent;
    }
    Err(FsError::TooBig.into())
}

/// Refuses (`TOO_BIG`) to let the quota of directory `ino` lie in `quota` if more than [`QUOTA_DEPTH_MAX`] would then lie in each
/// other; below core level 4 those that `ino` encloses, or is going to, are not looked at. `BUSY` if it can't be told before what is
/// being counted is.
///
/// A directory with a quota of its own that is moved below `ino` while that is being counted is not found.
pub(super) fn refuse_depth<V: View>(txn: &mut Txn<V>, ino: Ino, quota: Ino) -> OpResult<()> {
    let above = depth(txn, quota)?;
    let few = txn.counters()?.quotas.directories < QUOTA_DEPTH_MAX as u64;
    if few || txn.settings()?.core_level < CORE_LEVEL_GROWTH {
        return Ok(());
    }
    let quotas = all_directories(txn)?;
    let mut is_below = BTreeMap::new();
    let mut below = 0;
    for start in quotas.keys() {
        let Some((steps, neighbour)) = steps_to(&quotas, *start, ino, quota) else {
            continue;
        };
        // Where a directory lies is known only by going there.
        let inside = match neighbour {
            None => true,
            Some(neighbour) => match is_below.get(&neighbour) {
                Some(inside) => *inside,
                None => {
                    let inside = lies_below(txn, neighbour, ino)?;
                    is_below.insert(neighbour, inside);
                    inside
                }
            },
        };
        if inside {
            below = below.max(steps);
        }
    }
    if above + below >= QUOTA_DEPTH_MAX {
        return Err(FsError::TooBig.into());
    }
    // Each quota that is being counted may come to lie between two of those.
    let counted = |(other, record): &(&Ino, &QuotaRecord)| {
        **other != ino && record.state == QuotaState::Counting
    };
    let between = quotas.iter().filter(counted).count();
    if below > 0 && above + below + between >= QUOTA_DEPTH_MAX {
        return Err(FsError::Busy.into());
    }
    Ok(())
}

/// How many quotas a chain has from `start` until it comes to that of directory `ino`; or until it comes to one that lies in
/// `quota`, and would lie in that of `ino` if its directory (returned, too) is below that one: counted like the other.
fn steps_to(
    quotas: &BTreeMap<Ino, QuotaRecord>,
    start: Ino,
    ino: Ino,
    quota: Ino,
) -> Option<(usize, Option<Ino>)> {
    let (mut at, mut steps) = (start, 0);
    // No chain is longer than that.
    while steps <= quotas.len() && at != ino {
        let record = quotas.get(&at)?;
        steps += 1;
        if record.parent == quota {
            return Some((steps, Some(at)));
        }
        at = record.parent;
    }
    (at == ino && start != ino).then_some((steps, None))
}

/// The quotas of directories.
fn all_directories<V: View>(txn: &Txn<V>) -> Result<BTreeMap<Ino, QuotaRecord>, Corruption> {
    let (mut from, to) = keys::number_range(txn.volume, Tag::Quota, QuotaKind::Directory as u64);
    let mut quotas = BTreeMap::new();
    loop {
        let page = txn.scan(&from, &to, QUOTAS_READ_AT_ONCE)?;
        for (key, value) in &page {
            quotas.insert(number(key, 1)?, QuotaRecord::decode(key, value)?);
        }
        match page.last().filter(|_| page.len() == QUOTAS_READ_AT_ONCE) {
            Some((last, _)) => from = keys::after(last),
            None => return Ok(quotas),
        }
    }
}

/// Whether a directory lies below another one.
fn lies_below<V: View>(txn: &Txn<V>, ino: Ino, above: Ino) -> OpResult<bool> {
    let mut at = ino;
    for _ in 0..TRASH_DEPTH_MAX {
        // One that is removed lies below nothing.
        let inode: Option<InodeRecord> = txn.get(&keys::inode(txn.volume, at))?;
        let Some(inode) = inode.filter(|inode| inode.nlink > 0) else {
            return Ok(false);
        };
        at = inode.parent;
        if at == above {
            return Ok(true);
        }
        if at == Ino::ROOT {
            return Ok(false);
        }
    }
    // Deeper than anything is looked at; counted, to be safe.
    Ok(true)
}

//! Quotas: set, taken back, counted; and what becomes of charges when names move.
//!
//! An inode carries the directory whose quota it is charged to (`InodeRecord::quota`), as it was made below it; quotas enclose
//! each other by `QuotaRecord::parent`. A quota that is set on a directory with content, or taken back, is a walk: directories
//! of the tree wait in `QuotaWalk` records, and each is charged anew before its entries are looked at, so that what is made in
//! it from then on is charged right.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{self, QuotaKind};

use super::quota_depth::refuse_depth;
use super::{charge, dir};
use crate::change::Corruption;
use crate::keys::{self, Tag};
use crate::limits::{
    CORE_LEVEL_GROWTH, CORE_LEVEL_QUOTAS, QUOTA_ENTRIES_PER_STEP, QUOTA_INODES_PER_STEP,
    QUOTAS_CLEARED_PER_STEP, TRASH_DEPTH_MAX,
};
use crate::records::{
    Accounting, CookieRecord, InodeRecord, QuotaRecord, QuotaState, QuotaWalkRecord, Record,
    SNAPSHOT,
};
use crate::txn::{OpError, OpResult, Txn};
use crate::view::View;

/// Sets or changes a quota. `done` is false while what is there is being counted.
///
/// Refused: `NOT_SUPPORTED` below core level 2; `INVALID` for the root, whose limits are the volume's, and for no limit at all;
/// `STALE`, `NOT_DIRECTORY`, `NOT_FOUND` as the directory is; `READ_ONLY` in a snapshot; `BUSY` while quotas around it are
/// being counted or taken back; `TOO_BIG` if too many quotas would lie in each other.
pub(crate) fn set<V: View>(txn: &mut Txn<V>, op: &v1::QuotaSet) -> OpResult {
    check_level(txn)?;
    match op.kind() {
        QuotaKind::Directory => set_directory(txn, op),
        QuotaKind::User | QuotaKind::Group => set_owner(txn, op),
        QuotaKind::Unspecified => Err(FsError::Invalid.into()),
    }
}

/// Takes a quota back. Refused: `NOT_FOUND` if there is none; else as [`set`].
pub(crate) fn remove<V: View>(txn: &mut Txn<V>, op: &v1::QuotaRemove) -> OpResult {
    check_level(txn)?;
    match op.kind() {
        QuotaKind::Directory => remove_directory(txn, Ino(op.id)),
        QuotaKind::User | QuotaKind::Group => {
            let key = keys::quota(txn.volume, op.kind(), op.id);
            let record: Option<QuotaRecord> = txn.get(&key)?;
            if !record.is_some_and(|record| record.is_limited()) {
                return Err(FsError::NotFound.into());
            }
            change_owner(txn, op.kind(), op.id, (Some(0), Some(0)))
        }
        QuotaKind::Unspecified => Err(FsError::Invalid.into()),
    }
}

fn check_level<V: View>(txn: &Txn<V>) -> OpResult<()> {
    // An older build answers just this to a command that it does not know.
    if txn.settings()?.core_level < CORE_LEVEL_QUOTAS {
        return Err(FsError::NotSupported.into());
    }
    Ok(())
}

// ---- users and groups

fn set_owner<V: View>(txn: &mut Txn<V>, op: &v1::QuotaSet) -> OpResult {
    if op.id > u32::MAX.into() || (op.bytes_max, op.inodes_max) == (None, None) {
        return Err(FsError::Invalid.into());
    }
    change_owner(txn, op.kind(), op.id, (op.bytes_max, op.inodes_max))
}

fn change_owner<V: View>(
    txn: &mut Txn<V>,
    kind: QuotaKind,
    id: u64,
    (bytes_max, inodes_max): (Option<u64>, Option<u64>),
) -> OpResult {
    if txn.counters()?.quotas.accounting == Accounting::Clearing {
        return Err(FsError::Busy.into());
    }
    let key = keys::quota(txn.volume, kind, id);
    let mut record: QuotaRecord = txn.get(&key)?.unwrap_or_default();
    let was_limited = record.is_limited();
    record.bytes_max = bytes_max.unwrap_or(record.bytes_max);
    record.inodes_max = inodes_max.unwrap_or(record.inodes_max);
    let limited = record.is_limited();
    let quotas = &mut txn.counters()?.quotas;
    match (was_limited, limited) {
        (false, true) => quotas.limited_owners += 1,
        (true, false) => quotas.limited_owners -= 1,
        _ => {}
    }
    if quotas.limited_owners == 0 {
        quotas.counted_to = Ino(0);
        quotas.accounting = match quotas.accounting {
            Accounting::Off => Accounting::Off,
            _ => Accounting::Clearing,
        };
    } else if quotas.accounting == Accounting::Off {
        quotas.accounting = Accounting::Counting;
    }
    let done = matches!(quotas.accounting, Accounting::Off | Accounting::On);
    charge::write(txn, kind, id, &record)?;
    Ok(v1::Reply {
        done,
        ..v1::Reply::default()
    })
}

fn step_owners<V: View>(txn: &mut Txn<V>) -> OpResult {
    let volume = txn.volume;
    let mut quotas = txn.counters()?.quotas;
    match quotas.accounting {
        Accounting::Off | Accounting::On => {}
        Accounting::Counting => {
            let (_, to) = keys::tag_range(volume, Tag::Inode);
            let from = keys::after(&keys::inode(volume, quotas.counted_to));
            let page = txn.scan(&from, &to, QUOTA_INODES_PER_STEP)?;
            if page.len() < QUOTA_INODES_PER_STEP {
                quotas.accounting = Accounting::On;
                quotas.counted_to = Ino(0);
            }
            for (key, value) in page {
                let ino = number(&key, 0)?;
                if quotas.accounting == Accounting::Counting {
                    quotas.counted_to = ino;
                }
                let inode = InodeRecord::decode(&key, &value)?;
                txn.charges.owned(ino, &inode, 1);
            }
        }
        Accounting::Clearing => {
            let (from, _) = keys::number_range(volume, Tag::Quota, QuotaKind::User as u64);
            let (_, to) = keys::number_range(volume, Tag::Quota, QuotaKind::Group as u64);
            let page = txn.scan(&from, &to, QUOTAS_CLEARED_PER_STEP)?;
            if page.len() < QUOTAS_CLEARED_PER_STEP {
                quotas.accounting = Accounting::Off;
            }
            for (key, _) in page {
                txn.remove(key)?;
            }
        }
    }
    txn.counters()?.quotas = quotas;
    Ok(v1::Reply {
        done: matches!(quotas.accounting, Accounting::Off | Accounting::On),
        ..v1::Reply::default()
    })
}

// ---- directories

fn set_directory<V: View>(txn: &mut Txn<V>, op: &v1::QuotaSet) -> OpResult {
    let ino = Ino(op.id);
    if ino == Ino::ROOT {
        return Err(FsError::Invalid.into());
    }
    let mut inode = dir::live_directory(txn, ino)?;
    if inode.is_snapshot() {
        return Err(FsError::ReadOnly.into());
    }
    let key = keys::quota(txn.volume, QuotaKind::Directory, ino.0);
    let before: Option<QuotaRecord> = txn.get(&key)?;
    let mut record = before.unwrap_or_default();
    let (bytes_max, inodes_max) = match record.state {
        QuotaState::Removing => return Err(FsError::Busy.into()),
        QuotaState::Removed => (0, 0),
        QuotaState::Active | QuotaState::Counting => (record.bytes_max, record.inodes_max),
    };
    record.bytes_max = op.bytes_max.unwrap_or(bytes_max);
    record.inodes_max = op.inodes_max.unwrap_or(inodes_max);
    if !record.is_limited() {
        return Err(FsError::Invalid.into());
    }
    let mut reply = v1::Reply {
        attr: Some(inode.attr(ino)),
        done: record.state == QuotaState::Active,
        ..v1::Reply::default()
    };
    if inode.quota == ino {
        txn.put(key, &record)?;
        return Ok(reply);
    }

    refuse_walks_above(txn, &inode)?;
    let from = inode.quota;
    refuse_depth(txn, ino, from)?;
    // Only what is on its way out, or in the trash, can be charged to what is left of an earlier quota.
    if is_charged_to(txn, from, ino)? {
        return Err(FsError::Busy.into());
    }
    match before {
        None => txn.counters()?.quotas.directories += 1,
        // What is left of an earlier one goes along with it.
        Some(left) if left.parent != from => {
            let (bytes, inodes) = (left.used_bytes, left.used_inodes);
            txn.charges.tree(left.parent, bytes, inodes, -1);
            txn.charges.tree(from, bytes, inodes, 1);
        }
        Some(_) => {}
    }
    record.parent = from;
    record.from = from;
    record.state = QuotaState::Counting;
    txn.put(key, &record)?;
    restamp(txn, ino, &mut inode, ino)?;
    walk(txn, ino, ino)?;
    reply.done = false;
    Ok(reply)
}

fn remove_directory<V: View>(txn: &mut Txn<V>, ino: Ino) -> OpResult {
    let key = keys::quota(txn.volume, QuotaKind::Directory, ino.0);
    let record: Option<QuotaRecord> = txn.get(&key)?;
    let Some(mut record) = record.filter(|record| record.state != QuotaState::Removed) else {
        return Err(FsError::NotFound.into());
    };
    if record.is_walked() {
        return Err(FsError::Busy.into());
    }
    (record.bytes_max, record.inodes_max) = (0, 0);
    let mut reply = v1::Reply::default();
    match txn.get::<InodeRecord>(&keys::inode(txn.volume, ino))? {
        Some(mut inode) => {
            // One that is on its way out has nothing above it.
            if inode.nlink > 0 {
                refuse_walks_above(txn, &inode)?;
            }
            record.state = QuotaState::Removing;
            txn.put(key, &record)?;
            restamp(txn, ino, &mut inode, record.parent)?;
            walk(txn, ino, ino)?;
        }
        None => {
            record.state = QuotaState::Removed;
            txn.put(key, &record)?;
            reply.done = true;
        }
    }
    Ok(reply)
}

/// Refuses (`BUSY`) while a tree that a directory lies in is being charged anew: its part of it is charged half to one quota
/// and half to the other.
fn refuse_walks_above<V: View>(txn: &mut Txn<V>, inode: &InodeRecord) -> OpResult<()> {
    if txn.counters()?.quotas.directories == 0 {
        return Ok(());
    }
    let mut at = inode.parent;
    for _ in 0..TRASH_DEPTH_MAX {
        if at == Ino::ROOT {
            return Ok(());
        }
        let state = charge::directory_state(txn, at)?;
        if matches!(state, Some(QuotaState::Counting | QuotaState::Removing)) {
            return Err(FsError::Busy.into());
        }
        let above = txn.named_inode(at)?;
        if above.nlink == 0 {
            return Ok(());
        }
        at = above.parent;
    }
    Err(FsError::Busy.into())
}

/// Whether what is charged to `quota` is charged to that of directory `ino` as well.
fn is_charged_to<V: View>(txn: &mut Txn<V>, quota: Ino, ino: Ino) -> Result<bool, Corruption> {
    let quotas = txn.counters()?.quotas.directories;
    let mut at = quota;
    for _ in 0..quotas {
        if at == ino || at == Ino(0) {
            break;
        }
        let record = charge::read(txn.view(), txn.volume, QuotaKind::Directory, at.0)?;
        at = record.parent;
    }
    Ok(at == ino)
}

/// Charges an inode to another quota, and writes it. A directory whose own quota is being taken back takes what is left of that
/// along.
fn restamp<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    to: Ino,
) -> Result<(), Corruption> {
    let from = inode.quota;
    txn.charges.tree(from, inode.allocated, 1, -1);
    txn.charges.tree(to, inode.allocated, 1, 1);
    if inode.is_directory() && ino != from && ino != to {
        let key = keys::quota(txn.volume, QuotaKind::Directory, ino.0);
        if let Some(mut own) = txn.get::<QuotaRecord>(&key)?
            && own.parent == from
            && !is_charged_to(txn, to, ino)?
        {
            enclose(txn, &mut own, to);
            txn.put(key, &own)?;
        }
    }
    inode.quota = to;
    // Clients see nothing of it.
    txn.put(keys::inode(txn.volume, ino), inode)
}

/// Lets a quota lie in another one.
fn enclose<V: View>(txn: &mut Txn<V>, record: &mut QuotaRecord, parent: Ino) {
    let (bytes, inodes) = (record.used_bytes, record.used_inodes);
    txn.charges.tree(record.parent, bytes, inodes, -1);
    txn.charges.tree(parent, bytes, inodes, 1);
    record.parent = parent;
}

/// The entries of a directory are to be charged anew.
fn walk<V: View>(txn: &mut Txn<V>, quota: Ino, ino: Ino) -> Result<(), Corruption> {
    txn.put(
        keys::quota_walk(txn.volume, quota, ino),
        &QuotaWalkRecord::default(),
    )
}

/// Goes on with a walk, or with counting for users and groups; `done` when there is nothing (left) to do.
pub(crate) fn step<V: View>(txn: &mut Txn<V>, op: &v1::QuotaStep) -> OpResult {
    if op.directory == 0 {
        return step_owners(txn);
    }
    let (volume, quota) = (txn.volume, Ino(op.directory));
    let key = keys::quota(volume, QuotaKind::Directory, quota.0);
    let record: Option<QuotaRecord> = txn.get(&key)?;
    let Some(mut record) = record.filter(QuotaRecord::is_walked) else {
        return Ok(v1::Reply {
            done: true,
            ..v1::Reply::default()
        });
    };
    let from = match record.state {
        QuotaState::Counting => record.from,
        _ => quota,
    };
    let (first, last) = keys::number_range(volume, Tag::QuotaWalk, quota.0);
    if let Some((pending, value)) = txn.scan(&first, &last, 1)?.pop() {
        walk_on(txn, quota, (pending, value), from)?;
    }
    let done = txn.scan(&first, &last, 1)?.is_empty();
    if done {
        // Read anew: it may have been enclosed by another one on the way.
        record = charge::read(txn.view(), volume, QuotaKind::Directory, quota.0)?;
        record.state = match record.state {
            QuotaState::Counting => QuotaState::Active,
            _ => QuotaState::Removed,
        };
        record.from = Ino(0);
        charge::write(txn, QuotaKind::Directory, quota.0, &record)?;
    }
    Ok(v1::Reply {
        done,
        ..v1::Reply::default()
    })
}

/// Looks at some entries of one directory of a walk: what is in it is charged as the directory is by now, which may have been
/// moved since it was charged anew itself.
fn walk_on<V: View>(
    txn: &mut Txn<V>,
    quota: Ino,
    (pending, value): (Bytes, Bytes),
    from: Ino,
) -> OpResult<()> {
    let volume = txn.volume;
    let at = number(&pending, 1)?;
    let dir: Option<InodeRecord> = txn.get(&keys::inode(volume, at))?;
    let Some(to) = dir.map(|dir| dir.quota).filter(|to| *to != from) else {
        return Ok(txn.remove(pending)?);
    };
    let mut cursor = QuotaWalkRecord::decode(&pending, &value)?;
    let (_, end) = keys::number_range(volume, Tag::Cookie, at.0);
    let begin = keys::after(&keys::cookie(volume, at, cursor.after));
    let page = txn.scan(&begin, &end, QUOTA_ENTRIES_PER_STEP)?;
    let whole = page.len() < QUOTA_ENTRIES_PER_STEP;
    for (key, value) in page {
        let entry = CookieRecord::decode(&key, &value)?;
        cursor.after = number(&key, 1)?.0;
        charge_anew(txn, quota, entry.ino, from, to)?;
    }
    match whole {
        true => txn.remove(pending)?,
        false => txn.put(pending, &cursor)?,
    }
    Ok(())
}

/// Charges what an entry names to `to`, if it was charged to `from`.
fn charge_anew<V: View>(
    txn: &mut Txn<V>,
    quota: Ino,
    ino: Ino,
    from: Ino,
    to: Ino,
) -> OpResult<()> {
    let mut inode = txn.named_inode(ino)?;
    if inode.quota == ino {
        // What is below it stays charged to its own quota.
        let key = keys::quota(txn.volume, QuotaKind::Directory, ino.0);
        let mut own = charge::read(txn.view(), txn.volume, QuotaKind::Directory, ino.0)?;
        if own.parent == from && !is_charged_to(txn, to, ino)? {
            enclose(txn, &mut own, to);
            txn.put(key, &own)?;
        }
    } else if inode.quota == from {
        restamp(txn, ino, &mut inode, to)?;
        if inode.is_directory() && inode.size > 0 {
            walk(txn, quota, ino)?;
        }
    }
    Ok(())
}

/// Lets an inode that is given a name in a directory charged to `into` be charged like that directory; the caller writes it.
/// `alone`: it has no other name.
///
/// A file, an empty directory and, unless trees are being gone through, a directory with a quota of its own are charged anew
/// at once; a directory with content only
/// while the tree that it moves into, or came from, is gone through anyway. Refused: `CROSS_DEVICE` for the rest, as in XFS with
/// project quotas: programs copy then.
pub(crate) fn adopt<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    into: Ino,
    alone: bool,
) -> OpResult<()> {
    if inode.is_snapshot() || into == SNAPSHOT {
        // What is charged to nobody stays so.
        return match inode.quota == into {
            true => Ok(()),
            false => Err(FsError::CrossDevice.into()),
        };
    }
    if inode.quota == ino {
        let key = keys::quota(txn.volume, QuotaKind::Directory, ino.0);
        let mut own = charge::read(txn.view(), txn.volume, QuotaKind::Directory, ino.0)?;
        if own.parent != into {
            // What is not gone through yet below it is charged to what encloses it now, and must not leave that: quotas could
            // come to enclose each other.
            // And what is on its way out, or in the trash, may still be charged to this very quota.
            if is_walking(txn)? || is_charged_to(txn, into, ino)? {
                return Err(FsError::CrossDevice.into());
            }
            match refuse_depth(txn, ino, into) {
                Err(OpError::Refused(_)) if txn.settings()?.core_level >= CORE_LEVEL_GROWTH => {
                    return Err(FsError::CrossDevice.into());
                }
                fits => fits?,
            }
            enclose(txn, &mut own, into);
            txn.put(key, &own)?;
        }
        return Ok(());
    }
    if inode.quota == into {
        return Ok(());
    }
    // What is left of an earlier quota of its own.
    if inode.is_directory() && is_charged_to(txn, into, ino)? {
        return Err(FsError::CrossDevice.into());
    }
    let full = inode.is_directory() && inode.size > 0;
    let movable = match inode.is_directory() {
        true => !full,
        false => alone,
    };
    if movable {
        return Ok(restamp(txn, ino, inode, into)?);
    }
    let Some(quota) = walk_between(txn, inode.quota, into)? else {
        return Err(FsError::CrossDevice.into());
    };
    restamp(txn, ino, inode, into)?;
    if full {
        walk(txn, quota, ino)?;
    }
    Ok(())
}

/// Whether any tree of the volume is being charged anew.
fn is_walking<V: View>(txn: &Txn<V>) -> Result<bool, Corruption> {
    let (from, to) = keys::tag_range(txn.volume, Tag::QuotaWalk);
    Ok(!txn.scan(&from, &to, 1)?.is_empty())
}

/// The quota whose walk charges what was charged to `from` to `to`, if there is one.
fn walk_between<V: View>(txn: &Txn<V>, from: Ino, to: Ino) -> Result<Option<Ino>, Corruption> {
    let read = |quota: Ino| charge::read(txn.view(), txn.volume, QuotaKind::Directory, quota.0);
    if to != Ino(0) {
        let target = read(to)?;
        if target.state == QuotaState::Counting && target.from == from {
            return Ok(Some(to));
        }
    }
    if from != Ino(0) {
        let source = read(from)?;
        if source.state == QuotaState::Removing && source.parent == to {
            return Ok(Some(from));
        }
    }
    Ok(None)
}

pub(super) fn number(key: &[u8], index: usize) -> Result<Ino, Corruption> {
    let number = keys::number(key, index).ok_or_else(|| Corruption::Record {
        key: key.to_vec(),
        why: "key is too short",
    })?;
    Ok(Ino(number))
}

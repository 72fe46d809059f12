//! What commands charge to quotas: gathered while a command is made, written once at its end.
//!
//! A directory's quota is found by `InodeRecord::quota` and the chain of enclosing quotas; a user's and a group's by the owner,
//! once its inode is counted (`QuotaCounters`). While a volume has no quotas, nothing is read or written for them.

use std::collections::BTreeMap;

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, SessionId, VolumeId};
use heliofs_proto::v1::{self, QuotaKind, command::Op};

use super::segments::moved;
use crate::change::Corruption;
use crate::keys;
use crate::records::{Accounting, InodeRecord, QuotaCounters, QuotaRecord, QuotaState, Record};
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Bytes and inodes that come or go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Delta {
    bytes: i64,
    inodes: i64,
    /// Bytes that the command takes out of sight and that a later one removes.
    deferred: i64,
}

#[derive(Clone, Copy, Debug)]
struct Charge {
    /// The directory whose quota it is; 0: none.
    tree: Ino,
    /// The inode, its user and its group; `None`: they are not concerned.
    owner: Option<(Ino, u32, u32)>,
    delta: Delta,
}

/// What a command charges. Dropped with its transaction when it is refused.
#[derive(Debug, Default)]
pub(crate) struct Charges {
    list: Vec<Charge>,
    /// The command made inodes of root's that nobody asked for: root's limits do not refuse it.
    unasked: bool,
}

impl Charges {
    fn push(&mut self, charge: Charge) {
        match self.list.last_mut() {
            Some(last) if (last.tree, last.owner) == (charge.tree, charge.owner) => {
                last.delta.bytes += charge.delta.bytes;
                last.delta.inodes += charge.delta.inodes;
                last.delta.deferred += charge.delta.deferred;
            }
            _ => self.list.push(charge),
        }
    }

    fn both(&mut self, ino: Ino, inode: &InodeRecord, delta: Delta) {
        if !inode.is_snapshot() {
            self.push(Charge {
                tree: inode.quota,
                owner: Some((ino, inode.uid, inode.gid)),
                delta,
            });
        }
    }

    /// Extents of an inode, which comes or goes with [`Charges::inode`].
    pub(crate) fn bytes(&mut self, ino: Ino, inode: &InodeRecord, bytes: i64) {
        let delta = Delta {
            bytes,
            ..Delta::default()
        };
        self.both(ino, inode, delta);
    }

    /// An inode itself, without its extents: 1 comes, -1 goes.
    pub(crate) fn inode(&mut self, ino: Ino, inode: &InodeRecord, inodes: i64) {
        let delta = Delta {
            inodes,
            ..Delta::default()
        };
        self.both(ino, inode, delta);
    }

    /// Extents of an inode that this command made invisible (or, negative, removed after all) and that still count.
    pub(crate) fn deferred(&mut self, ino: Ino, inode: &InodeRecord, deferred: i64) {
        let delta = Delta {
            deferred,
            ..Delta::default()
        };
        self.both(ino, inode, delta);
    }

    /// As [`Charges::inode`], for a new one of root's that no caller asked for.
    pub(crate) fn inode_unasked(&mut self, ino: Ino, inode: &InodeRecord) {
        self.unasked = true;
        self.inode(ino, inode, 1);
    }

    /// An inode with its extents comes to (1) or leaves (-1) its user and its group.
    pub(crate) fn owned(&mut self, ino: Ino, inode: &InodeRecord, sign: i64) {
        if !inode.is_snapshot() {
            self.push(Charge {
                tree: Ino(0),
                owner: Some((ino, inode.uid, inode.gid)),
                delta: Delta {
                    bytes: sign * inode.allocated as i64,
                    inodes: sign,
                    deferred: 0,
                },
            });
        }
    }

    /// This much comes to (1) or leaves (-1) the quota of a directory and those that enclose it.
    pub(crate) fn tree(&mut self, quota: Ino, bytes: u64, inodes: u64, sign: i64) {
        self.push(Charge {
            tree: quota,
            owner: None,
            delta: Delta {
                bytes: sign * bytes as i64,
                inodes: sign * inodes as i64,
                deferred: 0,
            },
        });
    }

    pub(crate) fn absorb(&mut self, other: Self) {
        for charge in other.list {
            self.push(charge);
        }
    }
}

/// Writes what a command charges, and says in its reply how much room is left.
///
/// Refused: `QUOTA_EXCEEDED` when a client's command needs more bytes or inodes than it gives back, or will have given back when
/// what it erased is worked off, and a limit is passed by that. What gives room back, and what the system does, is never refused.
pub(crate) fn settle<V: View>(
    txn: &mut Txn<V>,
    command: &v1::Command,
    mut reply: v1::Reply,
) -> OpResult {
    let charges = std::mem::take(&mut txn.charges);
    let tells_room = matches!(command.op, Some(Op::Create(_) | Op::Commit(_)));
    if charges.list.is_empty() && !tells_room {
        return Ok(reply);
    }
    let quotas = txn.counters()?.quotas;
    if quotas == QuotaCounters::default() {
        return Ok(reply);
    }
    let refuses = txn.session != SessionId::SYSTEM
        && matches!(
            command.op,
            Some(
                Op::Create(_)
                    | Op::Commit(_)
                    | Op::CopyRange(_)
                    | Op::SetAttr(_)
                    | Op::Rename(_)
                    | Op::Batch(_)
            )
        );
    let unasked = charges.unasked;
    let mut totals: BTreeMap<(QuotaKind, u64), (QuotaRecord, Delta)> = BTreeMap::new();
    for charge in charges.list {
        for (kind, id) in payers(&quotas, charge.owner) {
            add(txn, &mut totals, kind, id, charge.delta)?;
        }
        let mut at = charge.tree;
        let mut above = 0;
        while quotas.directories > 0 && at != Ino(0) {
            if above == quotas.directories {
                let what = format!("volume {}: the quotas above {at} form a circle", txn.volume);
                return Err(Corruption::Contradiction(what).into());
            }
            above += 1;
            let record = add(txn, &mut totals, QuotaKind::Directory, at.0, charge.delta)?;
            at = record.parent;
        }
    }
    for ((kind, id), (mut record, delta)) in totals {
        if (delta.bytes, delta.inodes) == (0, 0) {
            continue;
        }
        let what = || format!("usage of quota {kind:?} {id}");
        record.used_bytes = moved(record.used_bytes, delta.bytes, what)?;
        record.used_inodes = moved(record.used_inodes, delta.inodes, what)?;
        let exempt = unasked && kind != QuotaKind::Directory && id == 0;
        let passed = |delta: i64, used: u64, max: u64| delta > 0 && max != 0 && used > max;
        let used_then = record.used_bytes.saturating_add_signed(-delta.deferred);
        if refuses
            && !exempt
            && (passed(delta.bytes - delta.deferred, used_then, record.bytes_max)
                || passed(delta.inodes, record.used_inodes, record.inodes_max))
        {
            return Err(FsError::QuotaExceeded.into());
        }
        write(txn, kind, id, &record)?;
    }
    if tells_room {
        tell_room(txn, &mut reply)?;
    }
    Ok(reply)
}

/// Users and groups that are charged for an inode.
fn payers(
    quotas: &QuotaCounters,
    owner: Option<(Ino, u32, u32)>,
) -> impl Iterator<Item = (QuotaKind, u64)> + use<> {
    let quotas = *quotas;
    let owner = owner.filter(|(ino, ..)| is_counted(&quotas, *ino));
    owner.into_iter().flat_map(|(_, uid, gid)| {
        [
            (QuotaKind::User, uid.into()),
            (QuotaKind::Group, gid.into()),
        ]
    })
}

/// Whether an inode is charged to its user and its group.
pub(crate) fn is_counted(quotas: &QuotaCounters, ino: Ino) -> bool {
    match quotas.accounting {
        Accounting::Off | Accounting::Clearing => false,
        Accounting::Counting => ino <= quotas.counted_to,
        Accounting::On => true,
    }
}

fn add<V: View>(
    txn: &Txn<V>,
    totals: &mut BTreeMap<(QuotaKind, u64), (QuotaRecord, Delta)>,
    kind: QuotaKind,
    id: u64,
    delta: Delta,
) -> Result<QuotaRecord, Corruption> {
    let known = match totals.entry((kind, id)) {
        std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
        std::collections::btree_map::Entry::Vacant(entry) => {
            let record = read(txn.view(), txn.volume, kind, id)?;
            entry.insert((record, Delta::default()))
        }
    };
    known.1.bytes += delta.bytes;
    known.1.inodes += delta.inodes;
    known.1.deferred += delta.deferred;
    Ok(known.0)
}

/// A quota that something is charged to. That of a directory must exist; users and groups get theirs when they own something.
pub(crate) fn read(
    view: &impl View,
    volume: VolumeId,
    kind: QuotaKind,
    id: u64,
) -> Result<QuotaRecord, Corruption> {
    let key = keys::quota(volume, kind, id);
    match view.get(&key)? {
        Some(value) => QuotaRecord::decode(&key, &value),
        None if kind == QuotaKind::Directory => {
            let what = format!(
                "volume {volume}: something is charged to quota {id}, which does not exist"
            );
            Err(Corruption::Contradiction(what))
        }
        None => Ok(QuotaRecord::default()),
    }
}

/// Writes a quota, or removes it when it says nothing any more.
pub(super) fn write<V: View>(
    txn: &mut Txn<V>,
    kind: QuotaKind,
    id: u64,
    record: &QuotaRecord,
) -> Result<(), Corruption> {
    let key = keys::quota(txn.volume, kind, id);
    let empty = record.used_inodes == 0 && record.used_bytes == 0;
    let over = match kind {
        // Its own directory is charged to it: it is gone.
        QuotaKind::Directory => empty && !record.is_walked(),
        _ => empty && !record.is_limited(),
    };
    if !over {
        return txn.put(key, record);
    }
    if kind == QuotaKind::Directory && txn.exists(&key)? {
        let directories = &mut txn.counters()?.quotas.directories;
        *directories = moved(*directories, -1, || "quotas of directories".to_owned())?;
    }
    txn.remove(key)
}

fn tell_room<V: View>(txn: &mut Txn<V>, reply: &mut v1::Reply) -> OpResult<()> {
    let quotas = txn.counters()?.quotas;
    let volume = txn.volume;
    let view = txn.view();
    let told = |attr: &Option<v1::Attr>| match attr {
        Some(attr) => room(view, volume, &quotas, Ino(attr.ino)),
        None => Ok(None),
    };
    for file in &mut reply.files {
        file.quota_room = told(&file.attr)?;
    }
    if reply.files.is_empty() {
        reply.quota_room = told(&reply.attr)?;
    }
    Ok(())
}

/// Bytes that the tightest of an inode's quotas leaves; `None`: none limits it.
pub(crate) fn room(
    view: &impl View,
    volume: VolumeId,
    quotas: &QuotaCounters,
    ino: Ino,
) -> Result<Option<u64>, Corruption> {
    let key = keys::inode(volume, ino);
    let Some(value) = view.get(&key)? else {
        return Ok(None);
    };
    let inode = InodeRecord::decode(&key, &value)?;
    if inode.is_snapshot() {
        return Ok(None);
    }
    let mut tightest = None;
    let mut look = |record: &QuotaRecord| {
        if record.bytes_max != 0 {
            let left = record.bytes_max.saturating_sub(record.used_bytes);
            tightest = Some(tightest.map_or(left, |room: u64| room.min(left)));
        }
    };
    for (kind, id) in payers(quotas, Some((ino, inode.uid, inode.gid))) {
        look(&read(view, volume, kind, id)?);
    }
    let mut at = inode.quota;
    while quotas.directories > 0 && at != Ino(0) {
        let record = read(view, volume, QuotaKind::Directory, at.0)?;
        look(&record);
        at = record.parent;
    }
    Ok(tightest)
}

/// The state of a directory's quota; `None`: it has none.
pub(crate) fn directory_state<V: View>(
    txn: &Txn<V>,
    ino: Ino,
) -> Result<Option<QuotaState>, Corruption> {
    let record: Option<QuotaRecord> =
        txn.get(&keys::quota(txn.volume, QuotaKind::Directory, ino.0))?;
    Ok(record.map(|record| record.state))
}

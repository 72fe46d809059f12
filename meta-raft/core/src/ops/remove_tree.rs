//! rmr: a tree is detached at once and taken apart in steps.

use heliofs_proto::ids::Ino;
use heliofs_proto::v1;

use super::{dir, trash};
use crate::change::Corruption;
use crate::keys::{self, Tag};
use crate::limits::ENTRIES_PER_STEP;
use crate::records::{CookieRecord, InodeRecord, Record, RemoveTreeRecord};
use crate::txn::{OpError, OpResult, Txn};
use crate::view::View;

/// Detaches an entry. What needs no steps (a file, an empty directory) is removed as unlink and rmdir do; otherwise the reply
/// names the intent, and `done` is false.
pub(crate) fn begin<V: View>(txn: &mut Txn<V>, op: &v1::RemoveTree) -> OpResult {
    let parent = Ino(op.parent);
    trash::protect(txn, parent, &op.name)?;
    let mut dir = dir::live_directory(txn, parent)?;
    let entry = dir::existing_entry(txn, parent, &op.name)?;
    let mut inode = txn.named_inode(entry.ino)?;
    txn.changeable(&inode)?;
    dir::remove_entry(txn, parent, &mut dir, &op.name, &entry)?;
    txn.put_inode(parent, &dir)?;
    let mut reply = v1::Reply::default();
    let full = inode.is_directory() && inode.size > 0;
    if full && !inode.is_snapshot() && trash::keeps(txn, parent)? {
        // As it is: nothing needs to be taken apart before it expires.
        trash::take(txn, (parent, &op.name), entry.ino, &mut inode, &mut reply)?;
        reply.done = true;
    } else if full {
        let counters = txn.counters()?;
        reply.value = counters.next_intent;
        counters.next_intent += 1;
        detach(txn, reply.value, entry.ino, &mut inode)?;
    } else {
        let name = (parent, &op.name);
        dir::lose_name_or_keep(txn, name, entry.ino, &mut inode, &mut reply)?;
        reply.done = true;
    }
    // Read anew: the trash's own directory may have been made in it.
    reply.parent = Some(txn.inode(parent)?.attr(parent));
    reply.attr = Some(inode.attr(entry.ino));
    Ok(reply)
}

/// Makes a directory part of the intent. Without names it is empty for everybody from here on, and no orphan before it is empty.
fn detach<V: View>(
    txn: &mut Txn<V>,
    intent: u64,
    ino: Ino,
    inode: &mut InodeRecord,
) -> Result<(), Corruption> {
    inode.nlink = 0;
    inode.ctime = txn.time;
    txn.put_inode(ino, inode)?;
    txn.put(
        keys::remove_tree(txn.volume, intent, ino),
        &RemoveTreeRecord,
    )
}

/// Removes up to [`ENTRIES_PER_STEP`] entries of one directory of the intent; `done` if the intent has no directory left (or is
/// unknown).
pub(crate) fn step<V: View>(txn: &mut Txn<V>, op: &v1::RemoveTreeStep) -> OpResult {
    let volume = txn.volume;
    let (from, to) = keys::number_range(volume, Tag::RemoveTree, op.intent);
    let mut reply = v1::Reply::default();
    let Some((pending, _)) = txn.scan(&from, &to, 1)?.pop() else {
        reply.done = true;
        return Ok(reply);
    };
    let ino = number(&pending)?;
    let mut dir = txn.named_inode(ino)?;
    let (first, last) = keys::number_range(volume, Tag::Cookie, ino.0);
    for (key, value) in txn.scan(&first, &last, ENTRIES_PER_STEP)? {
        let by_cookie = CookieRecord::decode(&key, &value)?;
        let entry = txn.entry(ino, &by_cookie.name)?.ok_or_else(|| {
            let what = format!("volume {volume}: an entry of {ino} has a cookie and no name");
            OpError::Corrupt(Corruption::Contradiction(what))
        })?;
        // Links to a directory are not counted here: the directory has none itself.
        dir.size = dir.size.saturating_sub(by_cookie.name.len() as u64);
        txn.remove(keys::name(volume, ino, &by_cookie.name))?;
        txn.remove(key)?;
        txn.touch_entry(ino, by_cookie.name);
        let mut child = txn.named_inode(entry.ino)?;
        if child.is_directory() && child.size > 0 {
            detach(txn, op.intent, entry.ino, &mut child)?;
        } else {
            dir::lose_name(txn, entry.ino, &mut child)?;
        }
    }
    if dir.size == 0 {
        txn.remove(pending)?;
        dir::orphan(txn, ino, &mut dir)?;
    }
    dir::changed(txn, &mut dir);
    txn.put_inode(ino, &dir)?;
    reply.done = txn.scan(&from, &to, 1)?.is_empty();
    Ok(reply)
}

fn number(pending: &[u8]) -> Result<Ino, Corruption> {
    let ino = keys::number(pending, 1).ok_or_else(|| Corruption::Record {
        key: pending.to_vec(),
        why: "key is too short",
    })?;
    Ok(Ino(ino))
}

//! Changes that a mount has answered already: one after the other, up to the first that is refused.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, SessionId, UnixNanos};
use heliofs_proto::v1::{self, FileKind, change::Op};

use super::{create, link, rename, set_attr, unlink};
use crate::keys;
use crate::limits::{CHANGE_AGE_MAX, CHANGES_PER_BATCH_MAX, CORE_LEVEL_BATCHES};
use crate::records::InodeRecord;
use crate::txn::{OpError, OpResult, Txn};
use crate::view::View;

/// How far a batch came.
pub(crate) enum Ran {
    /// To its end.
    Whole(Box<v1::Reply>),
    /// The change of this index was refused. The transaction is spoilt.
    Stopped(usize, FsError),
}

/// The latest time that a change of the batch asks for.
pub(crate) fn latest(op: &v1::Batch) -> i64 {
    op.changes
        .iter()
        .map(|change| change.time)
        .max()
        .unwrap_or(0)
}

/// Makes the first `count` changes. Refused as a whole: `NOT_SUPPORTED` below core level 5, `INVALID` for the system session,
/// without changes and with too many.
pub(crate) fn run<V: View>(txn: &mut Txn<V>, op: &v1::Batch, count: usize) -> OpResult<Ran> {
    if txn.settings()?.core_level < CORE_LEVEL_BATCHES {
        return Err(FsError::NotSupported.into());
    }
    let changes = op.changes.len();
    if changes == 0 || changes > CHANGES_PER_BATCH_MAX || txn.session == SessionId::SYSTEM {
        return Err(FsError::Invalid.into());
    }
    let now = txn.time;
    let mut earliest = UnixNanos(now.0.saturating_sub(CHANGE_AGE_MAX));
    let mut reply = v1::Reply {
        deferrable: create::volume_may_defer(txn)?,
        ..v1::Reply::default()
    };
    for (index, change) in op.changes.iter().take(count).enumerate() {
        txn.caller = change.caller.unwrap_or_default();
        txn.time = match change.time {
            0 => now,
            time => UnixNanos(time).clamp(earliest, now),
        };
        earliest = txn.time;
        let done = not_before(txn, change).and_then(|last| {
            // Also where the mount's clock is behind the one by which the inode was changed last.
            txn.time = txn.time.max(last.min(now));
            make(txn, change)
        });
        let done = match done {
            Ok(done) => done,
            Err(OpError::Refused(error)) => return Ok(Ran::Stopped(index, error)),
            Err(corrupt) => return Err(corrupt),
        };
        if let Some(Op::Create(op)) = &change.op
            && op.kind() == FileKind::Directory
        {
            reply.deferrable &= done.deferrable;
        }
        if done.orphaned {
            let gone = match &change.op {
                Some(Op::Rename(_)) => done.replaced,
                _ => done.attr,
            };
            reply.orphans.extend(gone.map(|attr| attr.ino));
        }
        reply.forget.extend(done.forget);
    }
    reply.applied = count.min(changes) as u32;
    txn.time = now;
    Ok(Ran::Whole(Box::new(reply)))
}

fn make<V: View>(txn: &mut Txn<V>, change: &v1::Change) -> OpResult {
    match &change.op {
        Some(Op::Create(op)) => match create::create(txn, op)? {
            done if done.created => Ok(done),
            // The mount has answered that it made a file.
            _ => Err(FsError::Exists.into()),
        },
        Some(Op::Link(op)) => link::link(txn, op),
        Some(Op::Unlink(op)) => unlink::unlink(txn, op),
        Some(Op::Rename(op)) => rename::rename(txn, op),
        // Sizes are not changed ahead of the data.
        Some(Op::SetAttr(op)) if op.size.is_none() => set_attr::set_attr(txn, op),
        Some(Op::SetAttr(_)) | None => Err(FsError::NotSupported.into()),
    }
}

/// When an inode that the change concerns was changed last. Refused (`STALE`) if a name stands for another inode than it did when
/// the change was answered: a change that comes late must not hit what others have put there.
fn not_before<V: View>(txn: &Txn<V>, change: &v1::Change) -> OpResult<UnixNanos> {
    let named = |parent: u64, name: &[u8]| -> OpResult<Option<u64>> {
        Ok(txn.entry(Ino(parent), name)?.map(|entry| entry.ino.0))
    };
    let mut inos = [0; 4];
    match &change.op {
        Some(Op::Create(op)) => inos[0] = op.parent,
        Some(Op::Link(op)) => (inos[0], inos[1]) = (op.parent, op.ino),
        Some(Op::Unlink(op)) => {
            let found = named(op.parent, &op.name)?;
            as_expected(found, (change.ino != 0).then_some(change.ino))?;
            (inos[0], inos[1]) = (op.parent, found.unwrap_or(0));
        }
        Some(Op::Rename(op)) => {
            let found = named(op.parent, &op.name)?;
            as_expected(found, (change.ino != 0).then_some(change.ino))?;
            let replaced = named(op.new_parent, &op.new_name)?;
            as_expected(replaced.or(Some(0)), change.replaces)?;
            inos = [
                op.parent,
                op.new_parent,
                found.unwrap_or(0),
                replaced.unwrap_or(0),
            ];
        }
        Some(Op::SetAttr(op)) => inos[0] = op.ino,
        None => {}
    }
    let mut last = UnixNanos(i64::MIN);
    for ino in inos.into_iter().filter(|ino| *ino != 0) {
        let inode: Option<InodeRecord> = txn.get(&keys::inode(txn.volume, Ino(ino)))?;
        last = inode.map_or(last, |inode| last.max(inode.ctime));
    }
    Ok(last)
}

/// A name that stands for nothing is refused by the change itself.
fn as_expected(found: Option<u64>, expected: Option<u64>) -> Result<(), FsError> {
    match (found, expected) {
        (Some(found), Some(expected)) if found != expected => Err(FsError::Stale),
        _ => Ok(()),
    }
}

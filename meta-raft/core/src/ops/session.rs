//! Sessions begin and end.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{ClusterId, Ino, SessionId};
use heliofs_proto::v1;

use crate::keys::{self, Tag};
use crate::limits::{
    CORE_LEVEL_BATCHES, INO_RANGES_MAX, INOS_PER_RESERVATION_MAX, REPLIES_PER_SESSION_END,
};
use crate::records::SessionRecord;
use crate::txn::{OpError, OpResult, Txn};
use crate::view::View;

/// Gives out a session id that the volume never had before.
pub(crate) fn begin<V: View>(txn: &mut Txn<V>, op: &v1::SessionBegin) -> OpResult {
    if op.cluster_id == 0 {
        // Session 0 is the system.
        return Err(FsError::Invalid.into());
    }
    let counters = txn.counters()?;
    let number = u32::try_from(counters.next_session).map_err(|_| FsError::NoSpace)?;
    counters.next_session += 1;
    let session = SessionId::new(ClusterId(op.cluster_id), number);
    txn.put(
        keys::session(txn.volume, session),
        &SessionRecord::default(),
    )?;
    Ok(v1::Reply {
        value: session.0,
        ..v1::Reply::default()
    })
}

/// Ends a session for good, at once: its commands are refused, its segment ids fenced. `done` is false if cached replies are
/// left over; then the same command again drops more of them. A session that is unknown has ended.
///
/// Only the system ends sessions: the reply of a session's own command would have to be kept in what it removes.
pub(crate) fn end<V: View>(txn: &mut Txn<V>, op: &v1::SessionEnd) -> OpResult {
    if txn.session != SessionId::SYSTEM {
        return Err(FsError::NotPermitted.into());
    }
    let (volume, session) = (txn.volume, SessionId(op.session));
    txn.remove(keys::session(volume, session))?;
    let (from, to) = keys::number_range(volume, Tag::Reply, session.0);
    let replies = txn.scan(&from, &to, REPLIES_PER_SESSION_END + 1)?;
    let done = replies.len() <= REPLIES_PER_SESSION_END;
    for (key, _) in replies.into_iter().take(REPLIES_PER_SESSION_END) {
        txn.remove(key)?;
    }
    Ok(v1::Reply {
        done,
        ..v1::Reply::default()
    })
}

/// Gives the session consecutive fresh inode numbers; `value` is the first.
///
/// Refused: `NOT_SUPPORTED` below core level 5; `INVALID` for the system session and for a count of 0 or too large; `NO_SPACE`
/// when all numbers are used up.
pub(crate) fn reserve_inos<V: View>(txn: &mut Txn<V>, op: &v1::InosReserve) -> OpResult {
    if txn.settings()?.core_level < CORE_LEVEL_BATCHES {
        return Err(FsError::NotSupported.into());
    }
    if op.count == 0 || op.count > INOS_PER_RESERVATION_MAX || txn.session == SessionId::SYSTEM {
        return Err(FsError::Invalid.into());
    }
    let epoch = txn.epoch();
    let counters = txn.counters()?;
    let (first, last) = (
        counters.next_ino,
        counters.next_ino + u64::from(op.count) - 1,
    );
    let first = Ino::new(epoch, first).ok_or(FsError::NoSpace)?;
    let last = Ino::new(epoch, last).ok_or(FsError::NoSpace)?;
    counters.next_ino += u64::from(op.count);
    let key = keys::session(txn.volume, txn.session);
    let mut record: SessionRecord = txn.get(&key)?.unwrap_or_default();
    if record.inos.len() >= INO_RANGES_MAX {
        record.inos.remove(0);
    }
    record.inos.push(first.0..last.0 + 1);
    txn.put(key, &record)?;
    Ok(v1::Reply {
        value: first.0,
        ..v1::Reply::default()
    })
}

/// Takes a number out of those that the session reserved, and all below it in its range. Refused (`INVALID`): it is none of them.
pub(crate) fn take_ino<V: View>(txn: &mut Txn<V>, ino: Ino) -> Result<(), OpError> {
    let key = keys::session(txn.volume, txn.session);
    let record: Option<SessionRecord> = txn.get(&key)?;
    let mut record = record.ok_or(FsError::Invalid)?;
    let range = record.inos.iter_mut().find(|range| range.contains(&ino.0));
    range.ok_or(FsError::Invalid)?.start = ino.0 + 1;
    record.inos.retain(|range| !range.is_empty());
    txn.put(key, &record)?;
    Ok(())
}

//! Sessions begin and end.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{ClusterId, SessionId};
use heliofs_proto::v1;

use crate::keys::{self, Tag};
use crate::limits::REPLIES_PER_SESSION_END;
use crate::records::SessionRecord;
use crate::txn::{OpResult, Txn};
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

//! Control flow of one command: position, time, exactly-once, dispatch.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Epoch, Position, SegmentId, SessionId, UnixNanos, VolumeId};
use heliofs_proto::v1::{self, command::Op};
use prost::Message;

use crate::change::{Change, Corruption, Touched};
use crate::records::{HeadRecord, Record, SessionRecord, SettingsRecord};
use crate::txn::{Effects, OpError, OpResult, Txn};
use crate::view::View;
use crate::{keys, limits, ops};

/// What the proposer adds to a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The proposer's clock. The command's effective time is not before that of the command before it.
    pub time: UnixNanos,
}

/// What a command did.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// The position that the command took; `Position::START` if its volume does not exist.
    pub position: Position,
    /// Its effective time.
    pub time: UnixNanos,
    /// The answer. A refusal has `error` set.
    pub reply: v1::Reply,
    /// Records to write, in key order, each key once. Never empty for an existing volume: the head moves.
    pub changes: Vec<Change>,
    /// Segments that lost their last reference: to be put on this cluster's deletion queue.
    pub freed: Vec<SegmentId>,
    /// What clients may have cached and must drop.
    pub touched: Vec<Touched>,
}

/// Applies one committed command. The same view, stamp and command give the same result on every node and every run.
///
/// Every command of an existing volume takes the next position, a refused or repeated one too, so that positions can be counted
/// off the log. A repeated (session, sequence) returns the first reply, a refusal too, and changes only the head.
pub fn apply(view: &impl View, stamp: Stamp, command: &v1::Command) -> Result<Applied, Corruption> {
    let volume = VolumeId(command.volume);
    let head_key = keys::head(volume);
    let head = view
        .get(&head_key)?
        .map(|value| HeadRecord::decode(&head_key, &value))
        .transpose()?;
    let begins = matches!(command.op, Some(Op::VolumeInit(_)));
    let mut head = match head {
        Some(head) => head,
        None if begins => HeadRecord {
            epochs: vec![(Position::START.epoch, 1)],
            ..HeadRecord::default()
        },
        // The volume was destroyed while the command was on its way.
        None => {
            let reply = v1::Reply {
                error: FsError::Stale as i32,
                ..v1::Reply::default()
            };
            return Ok(Applied {
                position: Position::START,
                time: stamp.time,
                reply,
                changes: Vec::new(),
                freed: Vec::new(),
                touched: Vec::new(),
            });
        }
    };
    let level = check_core_level(view, volume)?;
    head.position = next_position(head.position, command);
    if head
        .epochs
        .last()
        .is_some_and(|(last, _)| *last < head.position.epoch)
    {
        head.epochs.push((head.position.epoch, head.position.seq));
    }
    head.time = head.time.max(stamp.time);
    if let Some(Op::Batch(batch)) = &command.op
        && level >= limits::CORE_LEVEL_BATCHES
    {
        // What a program was told stays true, as long as its machine's clock is about right.
        let most = stamp.time.0.saturating_add(limits::CHANGE_AHEAD_MAX);
        let told = ops::batch::latest(batch).min(most);
        head.time = head.time.max(UnixNanos(told));
    }

    let refused = |error: FsError| v1::Reply {
        position: Some(head.position.into()),
        error: error as i32,
        ..v1::Reply::default()
    };
    let mut txn = Txn::new(view, command, head.position, head.time);
    let reply = match once(&txn, command)? {
        Once::Refused(error) => refused(error),
        Once::Repeated(reply) => *reply,
        Once::First => {
            let fresh = || Txn::new(view, command, head.position, head.time);
            let done = match &command.op {
                Some(Op::Batch(batch)) => changes(&mut txn, batch, fresh),
                _ => dispatch(&mut txn, command),
            };
            let done = done.and_then(|reply| ops::charge::settle(&mut txn, command, reply));
            let reply = match done {
                Ok(mut reply) => {
                    reply.position = Some(head.position.into());
                    reply
                }
                Err(OpError::Corrupt(corruption)) => return Err(corruption),
                Err(OpError::Refused(error)) => {
                    // What the op changed before it refused is dropped with its transaction.
                    txn = Txn::new(view, command, head.position, head.time);
                    refused(error)
                }
            };
            remember(&mut txn, command, &reply)?;
            reply
        }
    };
    txn.put(head_key, &head)?;
    let Effects {
        changes,
        freed,
        touched,
    } = txn.finish()?;
    Ok(Applied {
        position: head.position,
        time: head.time,
        reply,
        changes,
        freed,
        touched,
    })
}

/// The position that a command of an existing volume takes when the volume is at `head`: the next one, or the first of the
/// epoch that it opens.
pub fn next_position(head: Position, command: &v1::Command) -> Position {
    let next = head.next();
    match &command.op {
        Some(Op::EpochBegin(begin)) if begin.epoch > head.epoch.0 => Position {
            epoch: Epoch(begin.epoch),
            ..next
        },
        _ => next,
    }
}

fn check_core_level(view: &impl View, volume: VolumeId) -> Result<u32, Corruption> {
    let key = keys::settings(volume);
    let Some(value) = view.get(&key)? else {
        return Ok(0);
    };
    let level = SettingsRecord::decode(&key, &value)?.0.core_level;
    if level > limits::core_level_known() {
        return Err(Corruption::UpgradeRequired {
            volume: volume.0,
            level,
            known: limits::core_level_known(),
        });
    }
    Ok(level)
}

/// A batch, up to the first change that is refused: what that one did before is dropped with the transaction, and those ahead of
/// it are made once more.
fn changes<V: View>(txn: &mut Txn<V>, batch: &v1::Batch, fresh: impl Fn() -> Txn<V>) -> OpResult {
    use ops::batch::{Ran, run};
    let (count, refused) = match run(txn, batch, batch.changes.len())? {
        Ran::Whole(reply) => return Ok(*reply),
        Ran::Stopped(count, refused) => (count, refused),
    };
    *txn = fresh();
    match run(txn, batch, count)? {
        Ran::Whole(mut reply) => {
            reply.refused = refused as i32;
            Ok(*reply)
        }
        Ran::Stopped(..) => {
            let what = format!("volume {}: a batch had two outcomes", txn.volume);
            Err(OpError::Corrupt(Corruption::Contradiction(what)))
        }
    }
}

/// What is known of a request before it is applied.
enum Once {
    /// It is new, or the system's.
    First,
    /// It was applied before, with this reply.
    Repeated(Box<v1::Reply>),
    /// It can't be told apart from what was applied before.
    Refused(FsError),
}

fn once<V: View>(txn: &Txn<V>, command: &v1::Command) -> Result<Once, Corruption> {
    if txn.session == SessionId::SYSTEM {
        return Ok(Once::First);
    }
    let session: Option<SessionRecord> = txn.get(&keys::session(txn.volume, txn.session))?;
    let Some(session) = session else {
        return Ok(Once::Refused(FsError::SessionGone));
    };
    if command.sequence < session.acknowledged_below {
        return Ok(Once::Refused(FsError::AlreadyAcknowledged));
    }
    let key = keys::reply(txn.volume, txn.session, command.sequence);
    let Some(value) = txn.get_bytes(&key)? else {
        return Ok(Once::First);
    };
    match v1::Reply::decode(value) {
        Ok(reply) => Ok(Once::Repeated(Box::new(reply))),
        Err(_) => Err(Corruption::Record {
            key: key.to_vec(),
            why: "reply can't be decoded",
        }),
    }
}

/// Keeps the reply for a repeated request, and drops those that the client has acknowledged.
///
/// Refusals are kept too: of two copies of a request the second may be refused and answered, and the first, late, must not take
/// effect then.
fn remember<V: View>(
    txn: &mut Txn<V>,
    command: &v1::Command,
    reply: &v1::Reply,
) -> Result<(), Corruption> {
    if txn.session == SessionId::SYSTEM {
        return Ok(());
    }
    let (volume, session) = (txn.volume, txn.session);
    let key = keys::session(volume, session);
    // `once` has seen it.
    let mut record: SessionRecord = txn.get(&key)?.unwrap_or_default();
    // Never past the request itself, whatever the client claims.
    let below = command.acknowledged_below.min(command.sequence);
    if below > record.acknowledged_below {
        // Bounded by the session's window; a client that jumps further than its window loses only cache entries that nobody asks for.
        let from = record
            .acknowledged_below
            .max(below.saturating_sub(limits::REPLIES_PER_COMMAND_MAX));
        for sequence in from..below {
            let key = keys::reply(volume, session, sequence);
            if txn.exists(&key)? {
                txn.remove(key)?;
            }
        }
        record.acknowledged_below = below;
        txn.put(key, &record)?;
    }
    txn.put_bytes(
        keys::reply(volume, session, command.sequence),
        Bytes::from(reply.encode_to_vec()),
    )
}

fn dispatch<V: View>(txn: &mut Txn<V>, command: &v1::Command) -> OpResult {
    let op = command.op.as_ref().ok_or(FsError::NotSupported)?;
    match op {
        Op::VolumeInit(op) => ops::volume::init(txn, op),
        Op::SettingsUpdate(op) => ops::volume::update_settings(txn, op),
        Op::SessionBegin(op) => ops::session::begin(txn, op),
        Op::SessionEnd(op) => ops::session::end(txn, op),
        Op::SegmentsAllocate(op) => ops::segments::allocate(txn, op),
        Op::InosReserve(op) => ops::session::reserve_inos(txn, op),
        // Of changes, not of one.
        Op::Batch(_) => Err(FsError::NotSupported.into()),
        Op::Create(op) => ops::create::create(txn, op),
        Op::Link(op) => ops::link::link(txn, op),
        Op::Unlink(op) => ops::unlink::unlink(txn, op),
        Op::Rename(op) => ops::rename::rename(txn, op),
        Op::SetAttr(op) => ops::set_attr::set_attr(txn, op),
        Op::SetXattr(op) => ops::xattr::set(txn, op),
        Op::RemoveXattr(op) => ops::xattr::remove(txn, op),
        Op::Commit(op) => ops::commit::commit(txn, op),
        Op::Fallocate(op) => ops::fallocate::fallocate(txn, op),
        Op::CopyRange(op) => ops::copy_range::copy_range(txn, op),
        Op::Relocate(op) => ops::relocate::relocate(txn, op),
        Op::Reap(op) => ops::reap::reap(txn, op),
        Op::EraseStep(op) => ops::erase::step(txn, op),
        Op::RemoveTree(op) => ops::remove_tree::begin(txn, op),
        Op::RemoveTreeStep(op) => ops::remove_tree::step(txn, op),
        Op::QuotaSet(op) => ops::quota::set(txn, op),
        Op::QuotaRemove(op) => ops::quota::remove(txn, op),
        Op::QuotaStep(op) => ops::quota::step(txn, op),
        Op::EpochBegin(op) => ops::volume::epoch_begin(txn, op),
    }
}

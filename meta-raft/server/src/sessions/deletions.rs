//! The deletion queue's other end: dead segments are leased to sessions, which delete them from the bucket.
//!
//! [`SegmentLeases`], which copy tasks use as well, is pure: time is an argument.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::{Duration, Instant};

use heliofs_proto::ids::{Epoch, SegmentId, UnixNanos};
use heliofs_proto::v1::{self, FsError, local_command, log_item::Item};
use meta_core::{Corruption, View, keys, query};

use super::Context;
use super::hub::VolumeSessions;
use super::reads::refusal;
use crate::proposer::{ProposeError, clock};
use crate::read_gate::ReadError;
use crate::store::Pin;

/// Segments leased, or reported done, in one request: bounds the entry that removes them.
const SEGMENTS_MAX: usize = 1000;

/// Why a request has no answer here.
pub(super) enum Failed {
    /// Another node leads, perhaps this one.
    Moved(String),
    /// No quorum, or no leader.
    Read(ReadError),
    /// The records can't be read.
    Corrupt(Corruption),
}

/// Takes reports of what is deleted, then leases more.
pub(super) async fn serve(
    ctx: &Context,
    volume: &VolumeSessions,
    session: u64,
    ask: v1::TakeDeletions,
) -> Result<v1::Response, Failed> {
    if ask.done.len() > SEGMENTS_MAX {
        return Ok(refusal(FsError::Invalid));
    }
    if !ask.done.is_empty() {
        let done = v1::DeletionsDone {
            volume: volume.id.0,
            segments: ask.done.clone(),
        };
        let op = Some(local_command::Op::DeletionsDone(done));
        let proposed = ctx
            .proposer
            .propose(Item::Local(v1::LocalCommand { op }))
            .await;
        match proposed {
            Ok(_) => {}
            Err(ProposeError::NotLeader { leader }) => {
                return Err(Failed::Moved(
                    leader.map_or_else(String::new, |at| at.address),
                ));
            }
            Err(ProposeError::Unknown | ProposeError::Fatal(_) | ProposeError::Fenced(_)) => {
                return Err(Failed::Moved(String::new()));
            }
        }
        volume.soft().deletions.done(&ask.done);
    }
    ctx.gate.linearizable().await.map_err(Failed::Read)?;
    let settings = ctx
        .state
        .snapshot_view(|view| query::settings(view, volume.id))
        .map_err(Failed::Corrupt)?
        .unwrap_or_default();
    let max = (ask.segments_max as usize).min(SEGMENTS_MAX);
    let leased = volume.soft().deletions.len();
    let (shown, unknown) = match shown(ctx, volume) {
        Shown::Latest => (None, false),
        Shown::Pinned(pin) => (Some(pin.position), false),
        Shown::Unknown => (None, true),
    };
    // The bucket of a volume that may be another cluster's by now is not ours to clean, either.
    if unknown || ctx.proposer.fences().shut(volume.id).is_some() {
        return Ok(v1::Response {
            body: Some(v1::response::Body::Deletions(v1::Deletions {
                segments: Vec::new(),
                waiting: ctx.state.deletions_waiting(volume.id),
                epoch: 0,
            })),
            ..Default::default()
        });
    }
    // Read before the candidates: what dies in a later one is asked about with an earlier one, and kept.
    let epoch = ctx
        .state
        .head(volume.id)
        .map_or(Epoch(0), |(at, _)| at.epoch);
    let candidates = ctx
        .state
        .deletions(
            volume.id,
            shown,
            freed_before(settings.deletion_grace_seconds),
            max + leased,
        )
        .map_err(|error| Failed::Corrupt(Corruption::Store(error.to_string())))?;
    let candidates = dead(ctx, volume, candidates)?;
    let segments = volume
        .soft()
        .deletions
        .take(session, candidates, max, Instant::now());
    let waiting = ctx
        .state
        .deletions_waiting(volume.id)
        .saturating_sub(segments.len() as u64);
    Ok(v1::Response {
        body: Some(v1::response::Body::Deletions(v1::Deletions {
            segments,
            waiting,
            epoch: epoch.0,
        })),
        ..Default::default()
    })
}

/// The oldest records that readers of a volume are shown.
pub(super) enum Shown {
    /// Those that are applied.
    Latest,
    /// Somebody is shown an older position: perhaps one of before the volume was loaded anew, so that what it refers to is neither
    /// in the records nor in the deletion queue.
    Pinned(Arc<Pin>),
    /// After a change of leader somebody may be shown what is not known here yet.
    Unknown,
}

/// What the volume's readers are shown.
pub(super) fn shown(ctx: &Context, volume: &VolumeSessions) -> Shown {
    match volume.soft().pin() {
        Some(pin) => Shown::Pinned(pin),
        None if ctx.state.is_dual(volume.id) && ctx.state.is_mirror(volume.id) => Shown::Unknown,
        None => Shown::Latest,
    }
}

/// Those of which the records know nothing: whatever went wrong before, an object that a file needs is not handed out.
fn dead(
    ctx: &Context,
    volume: &VolumeSessions,
    candidates: Vec<SegmentId>,
) -> Result<Vec<u64>, Failed> {
    ctx.state
        .snapshot_view(|view| {
            let mut dead = Vec::with_capacity(candidates.len());
            for segment in candidates {
                match view.get(&keys::segment(volume.id, segment))? {
                    None => dead.push(segment.0),
                    Some(_) => tracing::error!(
                        volume = %volume.id,
                        segment = segment.0,
                        "a live segment waits for deletion; its object stays"
                    ),
                }
            }
            Ok(dead)
        })
        .map_err(Failed::Corrupt)
}

/// What was freed before this moment may go. By this node's clock, which stamped most of the queue: a volume's own time
/// stands still while nothing changes.
fn freed_before(grace_seconds: u64) -> UnixNanos {
    let then = clock().saturating_sub(Duration::from_secs(grace_seconds));
    UnixNanos(i64::try_from(then.as_nanos()).unwrap_or(i64::MAX))
}

/// A session that took segments has this long to deal with them before others are given the same.
const LEASE: Duration = Duration::from_secs(60);

/// The leases of one volume.
#[derive(Default)]
pub struct SegmentLeases {
    leases: HashMap<u64, (u64, Instant)>,
}

impl SegmentLeases {
    /// Leases up to `max` of the candidates that are free.
    pub fn take(
        &mut self,
        session: u64,
        candidates: impl IntoIterator<Item = u64>,
        max: usize,
        now: Instant,
    ) -> Vec<u64> {
        self.leases.retain(|_, (_, until)| *until > now);
        let mut taken = Vec::new();
        for segment in candidates {
            if taken.len() >= max {
                break;
            }
            if let Entry::Vacant(free) = self.leases.entry(segment) {
                free.insert((session, now + LEASE));
                taken.push(segment);
            }
        }
        taken
    }

    /// Number of segments that are leased and may be in the way of candidates.
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Nothing is leased.
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// The session is still at work on these: they are its for as long again. What is not its own stays as it is.
    pub fn renew(&mut self, session: u64, segments: &[u64], now: Instant) {
        for segment in segments {
            if let Some((holder, until)) = self.leases.get_mut(segment)
                && *holder == session
            {
                *until = now + LEASE;
            }
        }
    }

    /// These are deleted.
    pub fn done<'a>(&mut self, segments: impl IntoIterator<Item = &'a u64>) {
        for segment in segments {
            self.leases.remove(segment);
        }
    }

    /// Sessions that have leases.
    pub fn holders(&self) -> usize {
        let holders = self.leases.values().map(|(holder, _)| holder);
        holders.collect::<std::collections::BTreeSet<_>>().len()
    }

    /// The session's leases are free again.
    pub fn end_session(&mut self, session: u64) {
        self.leases.retain(|_, (holder, _)| *holder != session);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_leased_to_one_session_until_done_ended_or_late() {
        let now = Instant::now();
        let mut leases = SegmentLeases::default();
        assert_eq!(leases.take(1, [10, 11, 12], 2, now), [10, 11]);
        assert_eq!(leases.take(2, [10, 11, 12], 2, now), [12]);
        leases.done(&[10]);
        assert_eq!(leases.len(), 2);
        leases.end_session(2);
        leases.renew(1, &[11], now + LEASE / 2);
        leases.renew(2, &[11], now + LEASE);
        assert_eq!(leases.take(3, [11], 1, now + LEASE), [0u64; 0], "renewed");
        leases.renew(1, &[11], now);
        assert_eq!(leases.take(3, [11, 12], 2, now), [12]);
        assert_eq!(leases.take(3, [11, 12], 2, now + LEASE), [11, 12]);
    }
}

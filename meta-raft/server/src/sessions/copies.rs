//! Copy tasks: segments that this region's bucket lacks are leased to sessions, which copy them from the other bucket.
//!
//! [`CopyLeases`] is pure: time is an argument.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use heliofs_proto::ids::{SegmentId, VolumeId};
use heliofs_proto::v1::{self, FsError, local_command, log_item::Item, response};
use meta_core::records::{Record, SegmentRecord};
use meta_core::{Corruption, View, keys};

use super::Context;
use super::deletions::{Failed, SegmentLeases};
use super::hub::VolumeSessions;
use super::reads::{Answer, refusal};
use crate::proposer::ProposeError;
use crate::store::State;

/// Segments leased, or reported, in one request: bounds the entry that notes them.
const SEGMENTS_MAX: usize = 1000;

/// Who checks both buckets has this long to report.
const CHECK_LEASE: Duration = Duration::from_secs(60);

/// The rate's bucket holds what may be copied in this time: tasks come in batches.
const BURST: Duration = Duration::from_secs(1);

fn store_error(error: std::io::Error) -> Failed {
    Failed::Corrupt(Corruption::Store(error.to_string()))
}

/// Takes a report, then leases more.
pub(super) async fn serve(
    ctx: &Context,
    volume: &VolumeSessions,
    session: u64,
    ask: v1::TakeCopies,
) -> Result<v1::Response, Failed> {
    let id = volume.id;
    let reported = ask.report.unwrap_or_default();
    let news = reported.stored.len() + reported.bad.len() + reported.lost.len();
    if !ctx.state.is_dual(id) {
        return Ok(refusal(FsError::NotSupported));
    }
    let own = ctx.state.volume(id).and_then(|record| record.storage);
    if own.is_none_or(|own| own.uuid != reported.bucket) {
        // It fills another bucket than the volume has now: what it copies would be copied again and again.
        return Ok(refusal(FsError::Stale));
    }
    if news > SEGMENTS_MAX || ask.wanted.len() > SEGMENTS_MAX {
        return Ok(refusal(FsError::Invalid));
    }
    if news > 0 || reported.pulled_bytes > 0 {
        let report = v1::CopyReport {
            volume: id.0,
            ..reported.clone()
        };
        let op = Some(local_command::Op::CopyReport(report));
        let item = Item::Local(v1::LocalCommand { op });
        match ctx.proposer.propose(item).await {
            Ok(_) => {}
            Err(ProposeError::NotLeader { leader }) => {
                let leader = leader.map_or_else(String::new, |at| at.address);
                return Err(Failed::Moved(leader));
            }
            Err(ProposeError::Unknown | ProposeError::Fatal(_) | ProposeError::Fenced(_)) => {
                return Err(Failed::Moved(String::new()));
            }
        }
        let bad = reported.bad.iter().map(|bad| &bad.segment);
        let done = reported.stored.iter().chain(bad);
        volume.soft().copies.segments.done(done);
    }
    volume
        .soft()
        .copies
        .segments
        .renew(session, &ask.working, Instant::now());
    let check = match ask.check {
        Some(check) => Some(take_check(ctx, volume, session, check, &reported.bucket).await?),
        None => None,
    };
    ctx.gate.linearizable().await.map_err(Failed::Read)?;
    let max = (ask.segments_max as usize).min(SEGMENTS_MAX);
    let leased = volume.soft().copies.segments.len();
    let mut candidates: Vec<(SegmentId, v1::MissingSegment)> = Vec::new();
    let wanted = ask.wanted.iter().copied().map(SegmentId);
    let pending = match max {
        0 => Vec::new(),
        _ => ctx.state.pending(id, max + leased).map_err(store_error)?,
    };
    for segment in wanted.chain(pending.into_iter().map(|(_, segment)| segment)) {
        let missing = ctx.state.missing(id, segment).map_err(store_error)?;
        candidates.extend(missing.map(|missing| (segment, missing)));
    }
    candidates.retain(|(_, missing)| missing.quarantine.is_empty());
    let rate = ctx
        .state
        .volume(id)
        .map_or(0, |record| record.copy_bytes_per_second);
    let taken = {
        let (now, mut soft) = (Instant::now(), volume.soft());
        // What reads have brought has crossed the link: it comes first, and the rate is not asked.
        let is_missing = |id: &u64| candidates.iter().any(|(missing, _)| missing.0 == *id);
        let brought = ask.wanted.iter().copied().filter(is_missing);
        let mut taken = soft.copies.segments.take(session, brought, max, now);
        let rest = candidates.iter().map(|(id, it)| (id.0, it.length));
        let room = max - taken.len();
        taken.extend(soft.copies.take(session, rest, room, rate, now));
        taken
    };
    let mut known: BTreeMap<u64, v1::MissingSegment> =
        candidates.into_iter().map(|(id, it)| (id.0, it)).collect();
    let tasks = ctx
        .state
        .snapshot_view(|view| {
            let mut tasks = Vec::with_capacity(taken.len());
            for segment in taken {
                let missing = known.remove(&segment).unwrap_or_default();
                tasks.extend(task(view, id, SegmentId(segment), &missing)?);
            }
            Ok(tasks)
        })
        .map_err(Failed::Corrupt)?;
    let waiting = ctx
        .state
        .copy_state(id)
        .map_or(0, |state| state.pending_segments)
        .saturating_sub(tasks.len() as u64);
    Ok(v1::Response {
        body: Some(response::Body::Copies(v1::Copies {
            tasks,
            waiting,
            check,
        })),
        ..Default::default()
    })
}

/// Notes what the holder of the lease on the check has done, and leases it if it is due or under way.
async fn take_check(
    ctx: &Context,
    volume: &VolumeSessions,
    session: u64,
    ask: v1::TakeCheck,
    bucket: &str,
) -> Result<v1::CheckLease, Failed> {
    let id = volume.id;
    let now = Instant::now();
    let known = |ctx: &Context| ctx.state.copy_state(id).unwrap_or_default();
    let status = ctx.mirrors.status(id).filter(|_| ctx.state.is_mirror(id));
    let following = status.is_some_and(|status| status.doing == "following");
    let refused = |state: v1::CopyState| v1::CheckLease {
        leased: false,
        state: state.check,
        following,
    };
    if ask.lost.len() > SEGMENTS_MAX {
        return Ok(refused(known(ctx)));
    }
    if let Some(report) = ask.report {
        if !volume.soft().copies.holds_check(session) {
            return Ok(refused(known(ctx)));
        }
        note_check(ctx, id, bucket, report, ask.lost).await?;
    }
    let state = known(ctx);
    let check = state.check.clone().unwrap_or_default();
    let due = i64::try_from(ask.interval_ms)
        .unwrap_or(i64::MAX)
        .saturating_mul(1_000_000);
    // Never: the bucket was filled by a release that did not check.
    let is_due = check.ended == 0 || check.ended.saturating_add(due) <= crate::proposer::now();
    if state.first_walk || !(check.under_way || is_due) {
        volume.soft().copies.end_check(session);
        return Ok(refused(state));
    }
    if !volume.soft().copies.take_check(session, now) {
        return Ok(refused(state));
    }
    if !check.under_way {
        let begin = v1::CheckReport {
            number: check.number + 1,
            ..v1::CheckReport::default()
        };
        note_check(ctx, id, bucket, begin, Vec::new()).await?;
    }
    Ok(v1::CheckLease {
        leased: true,
        state: known(ctx).check,
        following,
    })
}

async fn note_check(
    ctx: &Context,
    id: VolumeId,
    bucket: &str,
    check: v1::CheckReport,
    lost: Vec<v1::LostCopy>,
) -> Result<(), Failed> {
    let op = Some(local_command::Op::CopyReport(v1::CopyReport {
        volume: id.0,
        bucket: bucket.to_owned(),
        check: Some(check),
        lost,
        ..v1::CopyReport::default()
    }));
    let item = Item::Local(v1::LocalCommand { op });
    match ctx.proposer.propose(item).await {
        Ok(_) => Ok(()),
        Err(ProposeError::NotLeader { leader }) => {
            let leader = leader.map_or_else(String::new, |at| at.address);
            Err(Failed::Moved(leader))
        }
        Err(ProposeError::Unknown | ProposeError::Fatal(_) | ProposeError::Fenced(_)) => {
            Err(Failed::Moved(String::new()))
        }
    }
}

/// `None`: the segment was removed meanwhile.
fn task(
    view: &impl View,
    volume: VolumeId,
    segment: SegmentId,
    missing: &v1::MissingSegment,
) -> Result<Option<v1::CopyTask>, Corruption> {
    let key = keys::segment(volume, segment);
    let Some(value) = view.get(&key)? else {
        return Ok(None);
    };
    let record = SegmentRecord::decode(&key, &value)?;
    Ok(Some(v1::CopyTask {
        segment: segment.0,
        length: record.length,
        checksum: record.checksum,
        look: missing.look,
        replace: missing.replace,
        made_of: missing.made_of.clone(),
    }))
}

/// Says of the extents in these answers which of their segments are in the other bucket only.
pub(super) fn tell_elsewhere(
    state: &State,
    volume: VolumeId,
    answers: &mut [(u64, Answer)],
) -> Result<(), Corruption> {
    if !state.lacks_any(volume) {
        return Ok(());
    }
    let walk = state.copy_state(volume).unwrap_or_default();
    for (_, answer) in answers {
        let page = match &mut answer.response.body {
            Some(response::Body::Extents(page)) => Some(page),
            Some(response::Body::Opened(opened)) => opened.extents.as_mut(),
            _ => None,
        };
        let Some(page) = page else { continue };
        let mut segments: Vec<u64> = page.extents.iter().map(|extent| extent.segment).collect();
        segments.sort_unstable();
        segments.dedup();
        for segment in segments.into_iter().filter(|segment| *segment != 0) {
            let not_walked = walk.walk != 0 && walk.first_walk && segment > walk.walked;
            let missing = state.missing(volume, SegmentId(segment));
            let missing = missing.map_err(|error| Corruption::Store(error.to_string()))?;
            // One that may lie there is worth a look.
            if missing.is_some_and(|missing| !missing.look) || not_walked {
                page.elsewhere.push(segment);
            }
        }
    }
    Ok(())
}

/// Which segments are being copied by whom, and how fast tasks may be handed out.
#[derive(Default)]
pub struct CopyLeases {
    /// The leases.
    pub segments: SegmentLeases,
    /// When what was handed out is paid for.
    paid_at: Option<Instant>,
    /// Who checks both buckets, and until when nobody else does.
    check: Option<(u64, Instant)>,
}

impl CopyLeases {
    /// Takes or renews the lease on the check; `false`: another session has it.
    pub fn take_check(&mut self, session: u64, now: Instant) -> bool {
        if self
            .check
            .is_some_and(|(holder, until)| holder != session && until > now)
        {
            return false;
        }
        self.check = Some((session, now + CHECK_LEASE));
        true
    }

    /// Whether the session has the lease on the check: also when it is over, as long as nobody else has taken it.
    pub fn holds_check(&self, session: u64) -> bool {
        self.check.is_some_and(|(holder, _)| holder == session)
    }

    /// The lease on the check is free again if it was this session's.
    pub fn end_check(&mut self, session: u64) {
        self.check = self.check.filter(|(holder, _)| *holder != session);
    }

    /// All that the session has leased is free again.
    pub fn end_session(&mut self, session: u64) {
        self.segments.end_session(session);
        self.end_check(session);
    }

    /// Leases up to `max` of the candidates (id and bytes) that are free, no faster than `rate` bytes per second unless
    /// that is 0.
    pub fn take(
        &mut self,
        session: u64,
        candidates: impl IntoIterator<Item = (u64, u64)>,
        max: usize,
        rate: u64,
        now: Instant,
    ) -> Vec<u64> {
        let candidates: Vec<(u64, u64)> = candidates.into_iter().collect();
        if rate == 0 {
            let ids = candidates.into_iter().map(|(id, _)| id);
            return self.segments.take(session, ids, max, now);
        }
        let mut paid_at = self.paid_at.unwrap_or(now).max(now);
        let mut taken = Vec::new();
        for (id, bytes) in candidates {
            if taken.len() >= max || paid_at >= now + BURST {
                break;
            }
            let got = self.segments.take(session, [id], 1, now);
            if !got.is_empty() {
                paid_at += Duration::from_secs_f64(bytes as f64 / rate as f64);
            }
            taken.extend(got);
        }
        self.paid_at = Some(paid_at);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_session_checks_until_it_ends_or_is_late() {
        let now = Instant::now();
        let mut leases = CopyLeases::default();
        assert!(leases.take_check(1, now));
        assert!(!leases.take_check(2, now));
        assert!(leases.take_check(1, now + CHECK_LEASE / 2));
        assert!(!leases.take_check(2, now + CHECK_LEASE), "renewed");
        assert!(leases.take_check(2, now + CHECK_LEASE * 2));
        assert!(!leases.holds_check(1) && leases.holds_check(2));
        leases.end_session(2);
        assert!(leases.take_check(1, now));
    }

    #[test]
    fn tasks_are_handed_out_no_faster_than_the_rate() {
        let now = Instant::now();
        let mut leases = CopyLeases::default();
        let all = (1..=10).map(|id| (id, 100));
        assert_eq!(leases.take(1, all.clone(), 5, 0, now), [1, 2, 3, 4, 5]);
        // One second's worth of 200 bytes.
        assert_eq!(leases.take(1, all.clone(), 5, 200, now), [6, 7]);
        assert_eq!(leases.take(2, all.clone(), 5, 200, now), [0u64; 0]);
        let later = now + Duration::from_millis(500);
        assert_eq!(leases.take(2, all, 5, 200, later), [8]);
    }
}

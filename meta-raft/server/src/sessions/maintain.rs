//! What gc, fsck and compaction ask, and who compacts: one session per volume at a time.
//!
//! [`CompactionLease`] is pure: time is an argument.

use std::collections::{BTreeSet, BinaryHeap, HashMap, HashSet};
use std::time::{Duration, Instant};

use heliofs_proto::ids::{Ino, SegmentId, VolumeId};
use heliofs_proto::v1::{self, FsError, maintain::Ask, maintained::Answer};
use meta_core::query::{self, Claim, PAGE_MAX};
use meta_core::records::SegmentRecord;
use meta_core::{Corruption, View, invariants};

use super::Context;
use super::deletions::{self, Failed, Shown};
use super::hub::VolumeSessions;
use super::reads::refusal;

/// Segments looked at for one answer about sparse ones; the next question goes on behind them.
const SEGMENTS_EXAMINED_MAX: usize = 16 * PAGE_MAX;

/// A check holds its inodes and segments in memory, about 1 KiB for each: one of more than these is made in parts.
const CHECKED_AT_ONCE: u64 = 500_000;

/// Most parts of a check that a client may ask for: an answer takes a pass over the volume.
const PARTS_MAX: u32 = 1 << 20;

/// Contradictions told; the first ones tell where to look.
const PROBLEMS_MAX: usize = 1000;

/// Sparse segments in one answer, and how many may be left out of it.
const SPARSE_MAX: usize = 1024;
const EXCEPT_MAX: usize = 4096;

/// Answers at a position that no earlier acknowledged change is missing from.
pub(super) async fn serve(
    ctx: &Context,
    volume: &VolumeSessions,
    session: u64,
    ask: v1::Maintain,
) -> Result<v1::Response, Failed> {
    ctx.gate.linearizable().await.map_err(Failed::Read)?;
    let Some(ask) = ask.ask else {
        return Ok(refusal(FsError::Invalid));
    };
    let id = volume.id;
    let answer = match ask {
        Ask::ListSegments(ask) => {
            let max = (ask.segments_max as usize).min(PAGE_MAX);
            let after = SegmentId(ask.after);
            let found = ctx
                .state
                .snapshot_view(|view| query::segments(view, id, after, max))
                .map_err(Failed::Corrupt)?;
            Answer::Segments(v1::SegmentPage {
                end: found.len() < max,
                segments: found.into_iter().map(as_segment).collect(),
            })
        }
        Ask::CheckSegments(ask) => {
            if ask.ids.len() > PAGE_MAX {
                return Ok(refusal(FsError::Invalid));
            }
            let shown = deletions::shown(ctx, volume);
            let states = ask.ids.iter().map(|segment| {
                let segment = SegmentId(*segment);
                // The records before the queue: what leaves the records enters the queue in the same batch. The other way
                // round a segment that is freed in between would look leaked, and lose its time of grace.
                let claim = ctx
                    .state
                    .snapshot_view(|view| query::claim(view, id, segment))?;
                let waits = ctx
                    .state
                    .is_waiting_for_deletion(id, segment)
                    .map_err(|error| Corruption::Store(error.to_string()))?;
                Ok(match claim {
                    Claim::Live => v1::SegmentState::Live,
                    _ if waits => v1::SegmentState::Deleting,
                    Claim::Open => v1::SegmentState::Open,
                    Claim::Closed if is_shown(&shown, id, segment)? => v1::SegmentState::Deleting,
                    Claim::Closed => v1::SegmentState::Leaked,
                    Claim::Unknown => v1::SegmentState::Unknown,
                } as i32)
            });
            let states = states
                .collect::<Result<_, Corruption>>()
                .map_err(Failed::Corrupt)?;
            Answer::States(v1::SegmentStates { states })
        }
        Ask::FindExtents(ask) => {
            let wanted: BTreeSet<SegmentId> = ask.segments.iter().copied().map(SegmentId).collect();
            let from = (Ino(ask.from_ino), ask.from_offset);
            let placed = ctx
                .state
                .snapshot_view(|view| query::extents_of(view, id, from, &wanted))
                .map_err(Failed::Corrupt)?;
            let next = placed.next.unwrap_or_default();
            Answer::Extents(v1::PlacedExtents {
                end: placed.next.is_none(),
                next_ino: next.0.0,
                next_offset: next.1,
                extents: placed
                    .extents
                    .into_iter()
                    .map(|(ino, offset, extent)| v1::PlacedExtent {
                        ino: ino.0,
                        extent: Some(extent.extent(offset)),
                    })
                    .collect(),
            })
        }
        Ask::CheckRecords(ask) => {
            if ask.parts > PARTS_MAX || ask.part >= ask.parts.max(1) {
                return Ok(refusal(FsError::Invalid));
            }
            Answer::Records(check_records(ctx, volume, ask).await?)
        }
        Ask::ListQuotas(ask) => {
            let max = (ask.quotas_max as usize).min(PAGE_MAX);
            let after = (ask.after_kind(), ask.after_id);
            let quotas = ctx
                .state
                .snapshot_view(|view| query::quotas(view, id, after, max))
                .map_err(Failed::Corrupt)?;
            Answer::Quotas(v1::QuotaPage {
                end: quotas.len() < max,
                quotas,
            })
        }
        Ask::TakeSparse(ask) => Answer::Sparse(take_sparse(ctx, volume, session, ask).await?),
    };
    Ok(v1::Response {
        body: Some(v1::response::Body::Maintained(v1::Maintained {
            answer: Some(answer),
        })),
        ..Default::default()
    })
}

/// Whether a reader may be shown records that refer to a segment to which those of now don't.
fn is_shown(shown: &Shown, volume: VolumeId, segment: SegmentId) -> Result<bool, Corruption> {
    match shown {
        Shown::Latest => Ok(false),
        Shown::Pinned(pin) => Ok(query::claim(pin.view(), volume, segment)? == Claim::Live),
        Shown::Unknown => Ok(true),
    }
}

async fn check_records(
    ctx: &Context,
    volume: &VolumeSessions,
    ask: v1::CheckRecords,
) -> Result<v1::CheckedRecords, Failed> {
    let id = volume.id;
    let parts = match ask.parts {
        0 => {
            let counters = ctx
                .state
                .snapshot_view(|view| query::counters(view, id))
                .map_err(Failed::Corrupt)?;
            let held = counters.used_inodes.saturating_add(counters.segments);
            u32::try_from(held.div_ceil(CHECKED_AT_ONCE)).map_or(PARTS_MAX, |parts| parts.max(1))
        }
        parts => parts,
    };
    let part = invariants::Part {
        index: ask.part.into(),
        of: parts.into(),
    };
    let state = ctx.state.clone();
    let check = move || state.snapshot_view(|view| invariants::check_part(view, id, part));
    let checked = tokio::task::spawn_blocking(check)
        .await
        .map_err(|error| broken_off(&error))?;
    let mut problems = checked.err().unwrap_or_default();
    problems.truncate(PROBLEMS_MAX);
    Ok(v1::CheckedRecords { problems, parts })
}

fn broken_off(error: &tokio::task::JoinError) -> Failed {
    Failed::Corrupt(Corruption::Store(format!(
        "the search was broken off: {error}"
    )))
}

async fn take_sparse(
    ctx: &Context,
    volume: &VolumeSessions,
    session: u64,
    ask: v1::TakeSparse,
) -> Result<v1::SparseSegments, Failed> {
    let Some(after) = volume.soft().compaction.take(session, Instant::now()) else {
        return Ok(v1::SparseSegments::default());
    };
    let max = (ask.segments_max as usize).min(SPARSE_MAX);
    if max == 0 {
        return Ok(v1::SparseSegments {
            leased: true,
            ..v1::SparseSegments::default()
        });
    }
    let except: HashSet<u64> = ask.except.into_iter().take(EXCEPT_MAX).collect();
    let (state, id) = (ctx.state.clone(), volume.id);
    let search = move || {
        state.snapshot_view(|view| sparse(view, id, after, max, ask.live_percent_max, &except))
    };
    let (sparse, next) = tokio::task::spawn_blocking(search)
        .await
        .map_err(|error| broken_off(&error))?
        .map_err(Failed::Corrupt)?;
    volume.soft().compaction.go_on(session, next);
    Ok(sparse)
}

/// The sparsest of the segments behind `after`, and where to go on: at the front when all were seen.
fn sparse(
    view: &impl View,
    volume: heliofs_proto::ids::VolumeId,
    after: SegmentId,
    max: usize,
    live_percent_max: u32,
    except: &HashSet<u64>,
) -> Result<(v1::SparseSegments, SegmentId), Corruption> {
    let mut sparse = v1::SparseSegments {
        leased: true,
        ..v1::SparseSegments::default()
    };
    // The fullest is on top: it is the first to go when there are too many.
    let mut kept: BinaryHeap<(u32, SegmentId)> = BinaryHeap::new();
    let mut found: HashMap<SegmentId, SegmentRecord> = HashMap::new();
    let mut after = after;
    for _ in 0..SEGMENTS_EXAMINED_MAX / PAGE_MAX {
        let page = query::segments(view, volume, after, PAGE_MAX)?;
        let whole = page.len() == PAGE_MAX;
        for (id, record) in page {
            after = id;
            sparse.live_bytes = sparse.live_bytes.saturating_add(record.live_bytes);
            let live = u128::from(record.live_bytes) * 100;
            if live > u128::from(record.data_bytes) * u128::from(live_percent_max) {
                continue;
            }
            let dead = record.data_bytes.saturating_sub(record.live_bytes);
            sparse.dead_bytes = sparse.dead_bytes.saturating_add(dead);
            if except.contains(&id.0) {
                continue;
            }
            let permille =
                u128::from(record.live_bytes) * 1000 / u128::from(record.data_bytes.max(1));
            kept.push((u32::try_from(permille).unwrap_or(u32::MAX), id));
            found.insert(id, record);
            if kept.len() > max
                && let Some((_, fullest)) = kept.pop()
            {
                found.remove(&fullest);
            }
        }
        if !whole {
            after = SegmentId(0);
            break;
        }
    }
    sparse.segments = found.into_iter().map(as_segment).collect();
    sparse.segments.sort_unstable_by_key(|segment| segment.id);
    Ok((sparse, after))
}

fn as_segment((id, record): (SegmentId, SegmentRecord)) -> v1::Segment {
    v1::Segment {
        id: id.0,
        length: record.length,
        checksum: record.checksum,
        live_bytes: record.live_bytes,
        data_bytes: record.data_bytes,
    }
}

/// Who compacts has this long to ask again.
const LEASE: Duration = Duration::from_secs(60);

/// Which session compacts a volume, and how far the search for sparse segments has come.
#[derive(Debug, Default)]
pub struct CompactionLease {
    holder: Option<(u64, Instant)>,
    after: u64,
}

impl CompactionLease {
    /// Takes or renews the lease; where the search goes on. `None`: another session has it.
    pub fn take(&mut self, session: u64, now: Instant) -> Option<SegmentId> {
        match self.holder {
            Some((holder, until)) if holder != session && until > now => None,
            _ => {
                self.holder = Some((session, now + LEASE));
                Some(SegmentId(self.after))
            }
        }
    }

    /// The search of the holder has come so far.
    pub fn go_on(&mut self, session: u64, after: SegmentId) {
        if self.holder.is_some_and(|(holder, _)| holder == session) {
            self.after = after.0;
        }
    }

    /// The lease is free again if it was this session's.
    pub fn end_session(&mut self, session: u64) {
        if self.holder.is_some_and(|(holder, _)| holder == session) {
            self.holder = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_session_compacts_until_it_ends_or_is_late() {
        let now = Instant::now();
        let mut lease = CompactionLease::default();
        assert_eq!(lease.take(1, now), Some(SegmentId(0)));
        lease.go_on(1, SegmentId(7));
        lease.go_on(2, SegmentId(9));
        assert_eq!(lease.take(2, now), None);
        assert_eq!(lease.take(1, now + LEASE / 2), Some(SegmentId(7)));
        assert_eq!(lease.take(2, now + LEASE), None, "renewed");
        assert_eq!(lease.take(2, now + LEASE * 2), Some(SegmentId(7)));
        lease.end_session(2);
        assert_eq!(lease.take(1, now), Some(SegmentId(7)));
    }
}

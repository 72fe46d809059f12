//! What gc, fsck and compaction ask, and who compacts: one session per volume at a time.
//!
//! [`CompactionLease`] is pure: time is an argument.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use heliofs_proto::ids::{Ino, SegmentId};
use heliofs_proto::v1::{self, FsError, maintain::Ask, maintained::Answer};
use meta_core::query::{self, Claim, PAGE_MAX};
use meta_core::records::SegmentRecord;
use meta_core::{Corruption, View, invariants};

use super::Context;
use super::deletions::Failed;
use super::hub::VolumeSessions;
use super::reads::refusal;

/// Segments looked at for one answer about sparse ones; the next question goes on behind them.
const SEGMENTS_EXAMINED_MAX: usize = 16 * PAGE_MAX;

/// A check holds all records in memory, about 1 KiB per inode: more than this could take the node's.
const CHECKED_INODES_MAX: u64 = 1_000_000;

/// Contradictions told; the first ones tell where to look.
const PROBLEMS_MAX: usize = 1000;

/// Sparse segments in one answer.
const SPARSE_MAX: usize = 1024;

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
        Ask::CheckRecords(_) => Answer::Records(check_records(ctx, volume).await?),
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
        Ask::TakeSparse(ask) => Answer::Sparse(take_sparse(ctx, volume, session, ask)?),
    };
    Ok(v1::Response {
        body: Some(v1::response::Body::Maintained(v1::Maintained {
            answer: Some(answer),
        })),
        ..Default::default()
    })
}

async fn check_records(
    ctx: &Context,
    volume: &VolumeSessions,
) -> Result<v1::CheckedRecords, Failed> {
    let id = volume.id;
    let counters = ctx
        .state
        .snapshot_view(|view| query::counters(view, id))
        .map_err(Failed::Corrupt)?;
    if counters.used_inodes > CHECKED_INODES_MAX {
        return Ok(v1::CheckedRecords {
            skipped: true,
            ..v1::CheckedRecords::default()
        });
    }
    let state = ctx.state.clone();
    let check = move || state.snapshot_view(|view| invariants::check(view, id));
    let checked = tokio::task::spawn_blocking(check).await.map_err(|error| {
        Failed::Corrupt(Corruption::Store(format!(
            "the check was broken off: {error}"
        )))
    })?;
    let mut problems = checked.err().unwrap_or_default();
    problems.truncate(PROBLEMS_MAX);
    Ok(v1::CheckedRecords {
        problems,
        skipped: false,
    })
}

fn take_sparse(
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
            segments: Vec::new(),
        });
    }
    let (segments, next) = ctx
        .state
        .snapshot_view(|view| sparse(view, volume.id, after, max, ask.live_percent_max))
        .map_err(Failed::Corrupt)?;
    volume.soft().compaction.go_on(session, next);
    Ok(v1::SparseSegments {
        leased: true,
        segments,
    })
}

/// Sparse segments behind `after`, and where to go on: at the front when all were seen.
fn sparse(
    view: &impl View,
    volume: heliofs_proto::ids::VolumeId,
    after: SegmentId,
    max: usize,
    live_percent_max: u32,
) -> Result<(Vec<v1::Segment>, SegmentId), Corruption> {
    let (mut found, mut after) = (Vec::new(), after);
    for _ in 0..SEGMENTS_EXAMINED_MAX / PAGE_MAX {
        let page = query::segments(view, volume, after, PAGE_MAX)?;
        let whole = page.len() == PAGE_MAX;
        for (id, record) in page {
            after = id;
            let live = u128::from(record.live_bytes) * 100;
            if live <= u128::from(record.data_bytes) * u128::from(live_percent_max) {
                found.push(as_segment((id, record)));
                if found.len() == max {
                    return Ok((found, after));
                }
            }
        }
        if !whole {
            return Ok((found, SegmentId(0)));
        }
    }
    Ok((found, after))
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

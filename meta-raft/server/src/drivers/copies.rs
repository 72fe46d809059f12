//! Walks over the segments of a volume that has got a bucket of its own, or was loaded anew, to find what the bucket lacks.

use std::time::{Duration, Instant};

use heliofs_proto::ids::{SegmentId, VolumeId};
use heliofs_proto::v1::{self, local_command::Op, log_item::Item};
use meta_core::{Corruption, query};

use super::{Step, rest};
use crate::sessions::Context;

/// Segments in one proposal.
const SEGMENTS: usize = 1000;

/// How often volumes are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Runs until dropped.
pub(super) async fn run(ctx: Context) {
    loop {
        for volume in ctx.state.volumes() {
            loop {
                let began = Instant::now();
                let step = step(&ctx, VolumeId(volume.id))
                    .await
                    .unwrap_or_else(|found| {
                        ctx.damage.report("the segments of a volume", &found);
                        Step::Failed
                    });
                rest(step, began).await;
                if step != Step::More {
                    break;
                }
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn step(ctx: &Context, volume: VolumeId) -> Result<Step, Corruption> {
    let state = ctx.state.copy_state(volume).unwrap_or_default();
    if state.walk == 0 {
        return Ok(Step::Idle);
    }
    let after = SegmentId(state.walked);
    let found = ctx
        .state
        .snapshot_view(|view| query::segments(view, volume, after, SEGMENTS))?;
    let needed = v1::CopiesNeeded {
        volume: volume.0,
        walk: state.walk,
        last: found.len() < SEGMENTS,
        segments: found.into_iter().map(|(segment, _)| segment.0).collect(),
    };
    let op = Some(Op::CopiesNeeded(needed));
    let proposed = ctx
        .proposer
        .propose(Item::Local(v1::LocalCommand { op }))
        .await;
    Ok(match proposed {
        Ok(_) => Step::More,
        Err(error) => {
            tracing::debug!(%error, "a walk over the segments waits");
            Step::Failed
        }
    })
}

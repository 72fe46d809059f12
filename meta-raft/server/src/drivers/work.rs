//! Goes on with work that was too large for one command: erasures of ranges, removals of trees, counting for quotas.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{self, FsError, command::Op};
use meta_core::{Corruption, query};

use super::{Step, rest};
use crate::sessions::hub::VolumeSessions;
use crate::sessions::{self, Context};

/// Any commit may leave an erasure behind, few do: look at most this often.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Runs until dropped.
pub(super) async fn run(ctx: Context) {
    loop {
        ctx.hub.work_wanted().await;
        // Flags set from here on wake us again, so one look serves all that came before.
        tokio::time::sleep(LOOK_EVERY).await;
        let mut busy = true;
        while busy {
            busy = false;
            // One step per volume and turn, so that a large removal does not hold up other volumes' work.
            for volume in ctx.hub.volumes() {
                if !volume.work_wanted.swap(false, Ordering::AcqRel) {
                    continue;
                }
                let began = Instant::now();
                let step = step(&ctx, &volume).await.unwrap_or_else(|corruption| {
                    ctx.damage.report("erasures and removals", &corruption);
                    Step::Failed
                });
                if step != Step::Idle {
                    volume.work_wanted.store(true, Ordering::Release);
                    busy = true;
                }
                rest(step, began).await;
            }
        }
    }
}

/// One step of the first erasure, one of the first tree removal, and one each of counting for directories and for owners.
async fn step(ctx: &Context, volume: &VolumeSessions) -> Result<Step, Corruption> {
    if ctx.state.is_mirror(volume.id) {
        // The source's steps are replayed.
        return Ok(Step::Idle);
    }
    let (erase, intent, walks) = ctx.state.snapshot_view(|view| {
        let erase = query::erases(view, volume.id, Ino(0), 1)?;
        let intent = query::intents(view, volume.id, 0, 1)?;
        let walks = query::quota_walks(view, volume.id)?;
        Ok::<_, Corruption>((erase.first().copied(), intent.first().copied(), walks))
    })?;
    let mut step = Step::Idle;
    if let Some(ino) = erase {
        step = propose(ctx, volume, Op::EraseStep(v1::EraseStep { ino: ino.0 })).await;
    }
    if let Some(intent) = intent
        && step != Step::Failed
    {
        let op = Op::RemoveTreeStep(v1::RemoveTreeStep { intent: intent.id });
        step = propose(ctx, volume, op).await;
    }
    for directory in walks {
        if step != Step::Failed {
            let op = Op::QuotaStep(v1::QuotaStep {
                directory: directory.0,
            });
            step = propose(ctx, volume, op).await;
        }
    }
    Ok(step)
}

async fn propose(ctx: &Context, volume: &VolumeSessions, op: Op) -> Step {
    match sessions::propose(ctx, volume, op).await {
        Ok(reply) if reply.error() == FsError::None => Step::More,
        Ok(reply) => {
            tracing::warn!(volume = %volume.id, error = ?reply.error(), "a step was refused");
            Step::Failed
        }
        Err(error) => {
            tracing::debug!(volume = %volume.id, %error, "a step could not be proposed");
            Step::Failed
        }
    }
}

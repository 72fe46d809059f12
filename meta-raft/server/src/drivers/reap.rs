//! Reaps orphans that nobody has open.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::future::join_all;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{self, FsError, command::Op};
use meta_core::{Corruption, query};

use super::{Step, rest};
use crate::sessions::hub::VolumeSessions;
use crate::sessions::soft::Wake;
use crate::sessions::{self, Context};

/// Orphans with a Reap under way at once: they share an entry of the log. Small enough that one group of steps, each with
/// hundreds of records, does not hold up the apply task for long.
const UNDER_WAY_MAX: usize = 16;

/// Orphan records that one step of a search looks at.
const PAGE: usize = 512;

/// After a first orphan the reaper waits this long for others: they share the entries of the log.
const GATHER: Duration = Duration::from_millis(20);

/// Runs until dropped.
pub(super) async fn run(ctx: Context) {
    loop {
        ctx.hub.reap_wanted().await;
        tokio::time::sleep(GATHER).await;
        let mut failed = Vec::new();
        for volume in ctx.hub.volumes() {
            if volume.reap_wanted.swap(false, Ordering::AcqRel)
                && serve(&ctx, &volume).await == Step::Failed
            {
                failed.push(volume);
            }
        }
        if !failed.is_empty() {
            rest(Step::Failed, Instant::now()).await;
            for volume in failed {
                ctx.hub.wake(
                    &volume,
                    Wake {
                        reap: true,
                        work: false,
                    },
                );
            }
        }
    }
}

/// Reaps what can be reaped now.
async fn serve(ctx: &Context, volume: &VolumeSessions) -> Step {
    if ctx.state.is_mirror(volume.id) {
        // The source reaps.
        return Step::Idle;
    }
    if volume.soft().rests(Instant::now()) {
        // The expiry driver wakes us when the rest is over.
        return Step::Idle;
    }
    loop {
        let inos = match candidates(ctx, volume) {
            Ok(inos) if inos.is_empty() => return Step::Idle,
            Ok(inos) => inos,
            Err(corruption) => {
                ctx.damage.report("orphans", &corruption);
                return Step::Failed;
            }
        };
        let began = Instant::now();
        let steps = join_all(inos.iter().map(|ino| reap(ctx, volume, *ino))).await;
        if steps.contains(&Step::Failed) {
            return Step::Failed;
        }
        rest(Step::More, began).await;
    }
}

/// Some orphans that nobody holds; from now on nobody can open them. None: there are no others.
fn candidates(ctx: &Context, volume: &VolumeSessions) -> Result<Vec<u64>, Corruption> {
    loop {
        let after = {
            let mut soft = volume.soft();
            let inos = soft.begin_reaps(UNDER_WAY_MAX, Instant::now());
            match soft.orphan_search() {
                Some(after) if inos.is_empty() => after,
                _ => return Ok(inos),
            }
        };
        let page = ctx
            .state
            .snapshot_view(|view| query::orphans(view, volume.id, Ino(after), PAGE))?;
        let more = page.len() == PAGE;
        let inos = page.into_iter().map(|(ino, _)| ino.0);
        volume.soft().orphans_found(inos, more);
    }
}

/// One step for one orphan.
async fn reap(ctx: &Context, volume: &VolumeSessions, ino: u64) -> Step {
    let step = match sessions::propose(ctx, volume, Op::Reap(v1::Reap { ino })).await {
        Ok(reply) if reply.error() == FsError::None && reply.done => {
            volume.soft().end_reap(ino);
            return Step::More;
        }
        Ok(reply) if reply.error() == FsError::None => Step::More,
        Ok(reply) => {
            tracing::warn!(volume = %volume.id, ino, error = ?reply.error(), "a reap was refused");
            Step::Failed
        }
        Err(error) => {
            tracing::debug!(volume = %volume.id, ino, %error, "a reap could not be proposed");
            Step::Failed
        }
    };
    // It stays unopenable: part of it may be gone.
    volume.soft().reap_again(ino);
    step
}

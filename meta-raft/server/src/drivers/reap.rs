//! Reaps orphans that nobody has open.

use std::sync::atomic::Ordering;
use std::time::Instant;

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

/// Orphan records looked at together, and reaped before the next look: each look walks over the records that were removed before.
const PAGE: usize = 512;

/// Runs until dropped.
pub(super) async fn run(ctx: Context) {
    loop {
        ctx.hub.reap_wanted().await;
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
    if volume.soft().rests(Instant::now()) {
        // The expiry driver wakes us when the rest is over.
        return Step::Idle;
    }
    loop {
        let inos = match candidates(ctx, volume) {
            Ok(inos) if inos.is_empty() => return Step::Idle,
            Ok(inos) => inos,
            Err(corruption) => {
                tracing::error!(%corruption, volume = %volume.id, "orphans can't be read");
                return Step::Failed;
            }
        };
        for some in inos.chunks(UNDER_WAY_MAX) {
            let began = Instant::now();
            let steps = join_all(some.iter().map(|ino| reap(ctx, volume, *ino))).await;
            if steps.contains(&Step::Failed) {
                return Step::Failed;
            }
            rest(Step::More, began).await;
        }
    }
}

/// The first orphans that nobody holds; from now on nobody can open them.
fn candidates(ctx: &Context, volume: &VolumeSessions) -> Result<Vec<u64>, Corruption> {
    let mut free = Vec::new();
    let mut after = Ino(0);
    let now = Instant::now();
    let count = volume.soft().orphan_count();
    loop {
        let page = ctx
            .state
            .snapshot_view(|view| query::orphans(view, volume.id, after, PAGE))?;
        if page.is_empty() && after == Ino(0) {
            volume.soft().no_orphans(count);
        }
        {
            let mut soft = volume.soft();
            for (ino, _) in &page {
                if free.len() < PAGE && soft.begin_reap(ino.0, now) {
                    free.push(ino.0);
                }
            }
        }
        match page.last() {
            Some((last, _)) if page.len() == PAGE && free.len() < PAGE => after = *last,
            _ => return Ok(free),
        }
    }
}

/// One step for one orphan.
async fn reap(ctx: &Context, volume: &VolumeSessions, ino: u64) -> Step {
    match sessions::propose(ctx, volume, Op::Reap(v1::Reap { ino })).await {
        Ok(reply) if reply.error() == FsError::None => {
            if reply.done {
                volume.soft().end_reap(ino);
            }
            Step::More
        }
        Ok(reply) => {
            // Stays unopenable: part of it may be gone.
            tracing::warn!(volume = %volume.id, ino, error = ?reply.error(), "a reap was refused");
            Step::Failed
        }
        Err(error) => {
            tracing::debug!(volume = %volume.id, ino, %error, "a reap could not be proposed");
            Step::Failed
        }
    }
}

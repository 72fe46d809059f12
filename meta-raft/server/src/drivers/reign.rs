//! From the begin of a term to its end: soft state and drivers.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{beats, copies, expiry, pins, reap, trash, work};
use crate::leadership::Leadership;
use crate::sessions::Context;

/// Between two tries to read what the new leader must know.
const RETRY: Duration = Duration::from_millis(50);

/// Follows the leadership until `stop`.
pub async fn run(ctx: Context, stop: CancellationToken) {
    let mut leadership = ctx.leadership.clone();
    loop {
        let now = leadership.borrow_and_update().clone();
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            changed = leadership.changed() => if changed.is_err() { break },
            () = rule(&ctx, &now) => {}
        }
        // Whom the streams are sent to: by now the next leader may be known.
        let next = leadership.borrow().clone();
        ctx.hub.end(
            &next
                .other_leader()
                .map_or_else(String::new, |peer| peer.address.clone()),
        );
        if next == Leadership::Stopped {
            break;
        }
    }
    ctx.hub.end("");
}

/// Rules while polled; never ends by itself.
async fn rule(ctx: &Context, now: &Leadership) {
    let Some(term) = now.leading() else {
        return std::future::pending().await;
    };
    let began = Instant::now();
    // Everything that earlier leaders acknowledged must be in the records before they are read.
    while let Err(error) = ctx.gate.linearizable().await {
        tracing::debug!(term, %error, "a new leader can't read yet");
        tokio::time::sleep(RETRY).await;
    }
    if let Err(corruption) = ctx.hub.begin(term, began) {
        ctx.damage
            .report("what a new leader must know", &corruption);
        return std::future::pending().await;
    }
    tracing::info!(term, "this node leads");
    // Dropped with this future, and with it all drivers.
    let mut drivers = JoinSet::new();
    drivers.spawn(reap::run(ctx.clone()));
    drivers.spawn(work::run(ctx.clone()));
    drivers.spawn(trash::run(ctx.clone()));
    drivers.spawn(copies::run(ctx.clone()));
    drivers.spawn(pins::run(ctx.clone()));
    drivers.spawn(expiry::run(ctx.clone()));
    drivers.spawn(beats::run(ctx.clone()));
    loop {
        tokio::select! {
            () = ctx.hub.volumes_changed() => {
                if let Err(corruption) = ctx.hub.follow_volumes() {
                    ctx.damage.report("a volume's sessions", &corruption);
                }
            }
            Some(ended) = drivers.join_next() => {
                // They never end by themselves.
                tracing::error!(?ended, "a driver stopped; the next leader goes on with its work");
            }
        }
    }
}

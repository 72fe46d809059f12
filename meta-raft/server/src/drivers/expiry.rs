//! Ends sessions that were silent for longer than the session time-out, and grace periods.

use std::time::{Duration, Instant};

use crate::sessions::{self, Context};

/// Looks this often, or twenty times per time-out if that is more often.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A tick that is this late says that the process did not run, rather than that the clients were silent.
const STALL: Duration = Duration::from_secs(1);

/// Runs until dropped.
pub(super) async fn run(ctx: Context) {
    let timeout = ctx.hub.timings().timeout;
    let every = LOOK_EVERY.min(timeout / 20).max(Duration::from_millis(1));
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut looked = Instant::now();
    loop {
        ticks.tick().await;
        let stalled = looked.elapsed() > 2 * every + STALL;
        looked = Instant::now();
        if stalled {
            tracing::warn!("this process stood still; sessions get their time-out anew");
            ctx.hub
                .volumes()
                .iter()
                .for_each(|volume| volume.soft().excuse(looked));
        }
        for volume in ctx.hub.volumes() {
            let (wake, expired) = {
                let now = Instant::now();
                let mut soft = volume.soft();
                (soft.look(now), soft.expired(now, timeout))
            };
            ctx.hub.wake(&volume, wake);
            for session in expired {
                tracing::info!(session, volume = %volume.id, "a session was silent for too long");
                sessions::end_session(&ctx, &volume, session).await;
            }
        }
    }
}

//! Beats: the leader logs how far a volume is and its digest, so that every replica compares.

use std::sync::atomic::Ordering;
use std::time::Duration;

use heliofs_proto::v1::log_item::Item;

use crate::sessions::Context;

/// A volume that changed has a beat this often.
const EVERY: Duration = Duration::from_secs(1);

/// A volume that did not change has one in this many times: each beat is an entry on everybody's disk.
const IDLE_TIMES: u32 = 5;

/// Runs until dropped.
pub(super) async fn run(ctx: Context) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut tick: u32 = 0;
    loop {
        ticks.tick().await;
        tick = tick.wrapping_add(1);
        for volume in ctx.hub.volumes() {
            if ctx.state.is_mirror(volume.id) {
                // The source's digests are replayed.
                continue;
            }
            let Some(beat) = ctx.state.beat(volume.id) else {
                continue;
            };
            let seq = beat.position.map_or(0, |position| position.seq);
            let changed = volume.beaten.swap(seq, Ordering::Relaxed) != seq;
            if !changed && !tick.is_multiple_of(IDLE_TIMES) {
                continue;
            }
            if let Err(error) = ctx.proposer.propose(Item::Beat(beat)).await {
                // The lead is about to change; the next leader beats.
                tracing::debug!(%error, volume = %volume.id, "a beat could not be proposed");
            }
        }
    }
}

//! Moves forward what mounts see that read only what the region's own bucket has all of: the log says now and then that every
//! node holds the records as they are, and each position that has become complete is shown instead of the one before.

use std::time::Duration;

use heliofs_proto::v1::{self, log_item::Item};
use tokio_util::sync::CancellationToken;

use crate::sessions::Context;
use crate::store::State;

/// How often. An entry of the log each time, as long as the volume changes and copying keeps up.
const EVERY: Duration = Duration::from_millis(100);

/// Lets go of positions that are not needed any more, on every node, until cancelled.
pub async fn keep(state: State, cancel: CancellationToken) {
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        for volume in state.pinned_volumes() {
            if let Err(error) = state.advance_pins(volume) {
                tracing::warn!(%volume, %error, "what the bucket lacks can't be read");
            }
        }
    }
}

/// Runs until dropped.
pub(super) async fn run(ctx: Context) {
    loop {
        for volume in ctx.hub.volumes() {
            let id = volume.id;
            if !ctx.state.is_dual(id) {
                continue;
            }
            let complete = match ctx.state.advance_pins(id) {
                Ok(complete) => complete,
                Err(error) => {
                    tracing::warn!(volume = %id, %error, "what the bucket lacks can't be read");
                    continue;
                }
            };
            let shown = volume.soft().pin().map(|pin| pin.position);
            if let Some(pin) = complete
                && Some(pin.position) > shown
            {
                volume.soft().show(pin);
            }
            if !ctx.state.wants_pin(id) {
                continue;
            }
            let pin = v1::Replay {
                volume: id.0,
                pin: true,
                ..v1::Replay::default()
            };
            if let Err(error) = ctx.proposer.propose(Item::Replay(pin)).await {
                // The lead is about to change.
                tracing::debug!(volume = %id, %error, "a position is not held");
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}

//! Gives up slots of mirrors for which more log would have to be kept than they may have.

use std::time::Duration;

use heliofs_proto::v1::{self, local_command::Op, log_item::Item};
use tokio_util::sync::CancellationToken;

use crate::sessions::Context;
use crate::store::LogStore;

/// How often slots are looked at.
const EVERY: Duration = Duration::from_secs(1);

/// Looks at slots while this node leads.
pub struct SlotDriver {
    ctx: Context,
    log: LogStore,
}

/// Bytes of log from an entry on, about: entries count alike.
pub fn bytes_from(log: &LogStore, index: u64) -> u64 {
    let Some(last) = log.last() else { return 0 };
    let first = log.purged().map_or(0, |purged| purged.index + 1);
    let all = (last.index + 1).saturating_sub(first).max(1);
    let kept = (last.index + 1).saturating_sub(index).min(all);
    let bytes = u128::from(log.bytes()) * u128::from(kept) / u128::from(all);
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

impl SlotDriver {
    /// Over the node's parts.
    pub fn new(ctx: Context, log: LogStore) -> Self {
        Self { ctx, log }
    }

    /// Until cancelled.
    pub async fn run(self, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = ticks.tick() => {}
            }
            if self.ctx.leadership.borrow().leading().is_some()
                && let Err(error) = self.look().await
            {
                // The next leader looks, or we do a moment later.
                tracing::warn!(%error, "slots of mirrors could not be looked at");
            }
        }
    }

    async fn look(&self) -> Result<(), String> {
        for volume in self.ctx.state.volumes() {
            for slot in self.ctx.state.slots(volume.id.into()) {
                if !slot.invalid.is_empty() {
                    continue;
                }
                let index = self.ctx.state.slot_index(&slot);
                let Some(index) = index.map_err(|error| error.to_string())? else {
                    continue;
                };
                let kept = bytes_from(&self.log, index);
                if kept <= slot.log_bytes_max {
                    continue;
                }
                let why = format!(
                    "{kept} bytes of log would have to be kept, {} may be: the mirror must load the volume anew",
                    slot.log_bytes_max
                );
                let change = v1::SlotChange {
                    volume: slot.volume,
                    name: slot.name,
                    change: Some(v1::slot_change::Change::Invalidate(why)),
                };
                let item = Item::Local(v1::LocalCommand {
                    op: Some(Op::SlotChange(change)),
                });
                let proposed = self.ctx.proposer.propose(item).await;
                proposed.map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }
}

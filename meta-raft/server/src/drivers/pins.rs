//! Moves forward what mounts see that read only what the region's own bucket has all of: positions are pinned now and then, and
//! each that has become complete is shown instead of the one before.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use heliofs_proto::ids::VolumeId;

use crate::sessions::Context;
use crate::store::{Completeness, Pin};

/// How often.
const EVERY: Duration = Duration::from_millis(100);

/// Positions that wait to be complete. When copying is far behind, the newest is as old as the oldest took to be copied.
const CANDIDATES_MAX: usize = 8;

/// Runs until dropped.
pub(super) async fn run(ctx: Context) {
    let mut candidates: BTreeMap<VolumeId, VecDeque<Pin>> = BTreeMap::new();
    loop {
        tokio::time::sleep(EVERY).await;
        for volume in ctx.hub.volumes() {
            let id = volume.id;
            if !ctx.state.is_dual(id) {
                continue;
            }
            let waiting = candidates.entry(id).or_default();
            let shown = volume.soft().pin().map(|pin| pin.position);
            let newest = waiting.back().map(|pin| pin.position).or(shown);
            if waiting.len() < CANDIDATES_MAX {
                waiting.extend(ctx.state.pin(id, newest));
            }
            while let Some(oldest) = waiting.front() {
                match ctx.state.completeness(id, oldest.position) {
                    Ok(Completeness::Lacking) => break,
                    Ok(found) => {
                        let Some(pin) = waiting.pop_front() else {
                            break;
                        };
                        ctx.state.unwatch(id, pin.position);
                        if found == Completeness::Complete {
                            volume.soft().show(Arc::new(pin));
                        }
                    }
                    Err(error) => {
                        tracing::warn!(volume = %id, %error, "what the bucket lacks can't be read");
                        break;
                    }
                }
            }
        }
        candidates.retain(|id, _| ctx.state.is_dual(*id));
    }
}

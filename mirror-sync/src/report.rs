//! Tells the source how far a mirror is, and hears whether it may go on.

use std::time::{Duration, Instant};

use heliofs_proto::ids::{Position, UnixNanos, VolumeId};
use heliofs_proto::v1;
use meta_client::{Cluster, ClusterError};
use tokio::sync::watch;

use crate::target::Target;

/// How often.
const EVERY: Duration = Duration::from_secs(1);

/// What the source thinks of the slot.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum SlotNews {
    /// It is there.
    Kept {
        /// An operator stopped the mirror for a while.
        paused: bool,
        /// How far the source was.
        heard: Option<Heard>,
        /// What fences the source; `None`: it did not say.
        fence: Option<Box<v1::SourceFence>>,
    },
    /// It is not kept any more, or gone: the volume must be loaded anew.
    Lost(String),
}

/// How far the source said that it is, by its clock, and when it did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Heard {
    pub(crate) head: Position,
    pub(crate) clock: UnixNanos,
    pub(crate) at: Instant,
}

/// Reports until dropped.
pub(crate) async fn run(
    source: Cluster,
    target: &dyn Target,
    volume: VolumeId,
    slot: String,
    cluster_id: u32,
    news: watch::Sender<SlotNews>,
) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some((applied, _)) = target.head(volume) else {
            continue;
        };
        let applied = Some(v1::Position::from(applied));
        let report = v1::SlotReport {
            volume: volume.0,
            name: slot.clone(),
            applied,
            complete: Some(target.complete(volume).into()),
            oldest: applied,
            cluster_id,
        };
        let heard = match source.report_slot(report).await {
            Ok(kept) if kept.invalid.is_empty() => SlotNews::Kept {
                paused: kept.paused,
                // A source of an earlier release does not say.
                heard: kept.head.map(|head| Heard {
                    head: head.into(),
                    clock: UnixNanos(kept.now),
                    at: Instant::now(),
                }),
                fence: kept.fence.map(Box::new),
            },
            Ok(lost) => SlotNews::Lost(lost.invalid),
            Err(ClusterError::NotFound(why)) => SlotNews::Lost(why),
            Err(error) => {
                // The source is away; what it last said holds.
                tracing::debug!(%error, "the source could not be told how far the mirror is");
                continue;
            }
        };
        news.send_if_modified(|before| {
            let changed = *before != heard;
            *before = heard;
            changed
        });
    }
}

//! While this node leads, a follower for each volume that is to be mirrored.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use meta_client::{Cluster, Token};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::follow::{Follower, Names};
use crate::target::Target;

/// How often the source is asked for new volumes.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What is mirrored.
#[derive(Clone, Debug)]
pub struct MirrorConfig {
    /// META-URL of the source, without a volume: what the mirror's records say.
    pub url: String,
    /// (name at the source, name here). Empty: every volume of the source, under its own name.
    pub volumes: Vec<(String, String)>,
    /// The slot at the source; empty: made of the mirror's cluster id.
    pub slot: String,
    /// Bytes of log that the source keeps for this mirror at most, for slots that are made from here; 0: its default.
    pub log_bytes_max: u64,
}

/// Starts and ends followers.
pub struct Supervisor {
    source: Cluster,
    own: Token,
    target: Arc<dyn Target>,
    config: MirrorConfig,
}

impl Supervisor {
    /// Of `source` into `target`, the nodes of which know each other by the token `own`.
    pub fn new(source: Cluster, own: Token, target: Arc<dyn Target>, config: MirrorConfig) -> Self {
        Self {
            source,
            own,
            target,
            config,
        }
    }

    /// Until cancelled.
    pub async fn run(self, cancel: CancellationToken) {
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                () = self.target.leads() => {}
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                () = self.target.deposed() => tracing::info!("another node goes on with the mirrors"),
                () = self.rule() => {}
            }
        }
    }

    /// What is to be mirrored now, as far as is known.
    async fn wanted(&self) -> Vec<(String, String)> {
        if !self.config.volumes.is_empty() {
            return self.config.volumes.clone();
        }
        match self.source.list_volumes().await {
            Ok(volumes) => volumes
                .into_iter()
                .map(|volume| (volume.name.clone(), volume.name))
                .collect(),
            Err(error) => {
                // What is mirrored already goes on from what the mirror knows.
                tracing::debug!(%error, "the source's volumes can't be listed");
                let mirrors = self.target.mirrors().into_iter();
                mirrors
                    .filter_map(|volume| Some((volume.mirror?.volume, volume.name)))
                    .collect()
            }
        }
    }

    /// Followers live as long as this future.
    async fn rule(&self) {
        let mut followers = JoinSet::new();
        let mut running: BTreeMap<String, AbortHandle> = BTreeMap::new();
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                Some(ended) = followers.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        tracing::error!(%error, "a follower failed; it is started again");
                    }
                }
            }
            running.retain(|_, task| !task.is_finished());
            let Some(cluster) = self.target.cluster_id() else {
                continue;
            };
            for (source, local) in self.wanted().await {
                if running.contains_key(&local) || self.target.owns(&local) {
                    continue;
                }
                let names = Names {
                    url: self.config.url.clone(),
                    source,
                    local: local.clone(),
                    slot: match self.config.slot.as_str() {
                        "" => format!("mirror-{cluster:08x}"),
                        slot => slot.to_owned(),
                    },
                    log_bytes_max: self.config.log_bytes_max,
                };
                let follower = Follower::new(
                    self.source.clone(),
                    self.own.clone(),
                    self.target.clone(),
                    names,
                );
                running.insert(local, followers.spawn(follower.run()));
            }
        }
    }
}

//! [`Keeper`]: renews the markers of the volumes that this cluster writes, while this node leads.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use blockstore::object::register::Version;
use blockstore::object::{Register, Written};
use heliofs_proto::ids::VolumeId;
use heliofs_proto::v1::{self, local_command::Op, log_item::Item};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use super::marker::{Marker, Me, Stored, Verdict};
use super::{TURNS_PER_LEASE, lease, open, prefix};
use crate::target::{Standing, Target};

/// How often volumes are looked at that may have got, or lost, a fence store.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Before the next try after a failure.
const RETRY: Duration = Duration::from_millis(200);

/// Keeps markers; runs beside the node.
pub struct Keeper {
    target: Arc<dyn Target>,
}

/// One volume's.
struct One {
    target: Arc<dyn Target>,
    volume: VolumeId,
    register: Register,
    lease: Duration,
    /// The version that is known to name this cluster.
    version: Option<Version>,
}

impl Keeper {
    /// For the node behind `target`.
    pub fn new(target: Arc<dyn Target>) -> Self {
        Self { target }
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
                () = self.target.deposed() => {}
                () = self.rule() => {}
            }
        }
    }

    /// Tasks live as long as this future.
    async fn rule(&self) {
        let mut tasks = JoinSet::new();
        let mut running: BTreeMap<VolumeId, (v1::Volume, AbortHandle)> = BTreeMap::new();
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                Some(ended) = tasks.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        tracing::error!(%error, "the keeper of a marker failed; it is started again");
                    }
                }
            }
            let wanted: BTreeMap<VolumeId, v1::Volume> = self
                .target
                .fenced()
                .into_iter()
                .map(|volume| (VolumeId(volume.id), volume))
                .collect();
            running.retain(|id, (volume, task)| {
                let same = wanted.get(id).is_some_and(|now| now.fence == volume.fence);
                if !same {
                    task.abort();
                    self.target.stand(*id, None);
                }
                same && !task.is_finished()
            });
            for (id, volume) in wanted {
                if running.contains_key(&id) {
                    continue;
                }
                let Some(cluster) = self.target.cluster_id() else {
                    continue;
                };
                let task = tasks.spawn(keep(Arc::clone(&self.target), volume.clone(), cluster));
                running.insert(id, (volume, task));
            }
        }
    }
}

/// Renews one marker until dropped, or until the volume is another cluster's.
async fn keep(target: Arc<dyn Target>, volume: v1::Volume, cluster: u32) {
    let id = VolumeId(volume.id);
    let fence = volume.fence.clone().unwrap_or_default();
    let register = match open(&fence, prefix(&volume)) {
        Ok(register) => register,
        Err(error) => {
            target.stand(
                id,
                Some(Standing::Lapsed(format!("the fence store: {error}"))),
            );
            return tokio::time::sleep(lease(&fence)).await;
        }
    };
    let mut one = One {
        target,
        volume: id,
        register,
        lease: lease(&fence),
        version: None,
    };
    // What was held before this failed holds on: `until` says how long.
    let mut until: Option<Instant> = None;
    loop {
        let (begun, begun_wall) = (Instant::now(), SystemTime::now());
        let rest = match one.turn(cluster).await {
            Ok(()) => {
                if until.is_none_or(|until| until < begun) {
                    tracing::info!(volume = %id, marker = one.register.key(), "the volume may be changed: its marker is ours");
                }
                until = Some(begun + one.lease);
                one.target.stand(
                    id,
                    Some(Standing::Held {
                        until: begun + one.lease,
                        until_wall: begun_wall + one.lease,
                    }),
                );
                one.lease / TURNS_PER_LEASE
            }
            Err(Missed::Superseded { by, epoch }) => {
                one.superseded(&by, epoch).await;
                RETRY
            }
            Err(Missed::NotMine(why)) => {
                until = None;
                one.lapsed(why);
                RETRY.max(one.lease / TURNS_PER_LEASE)
            }
            Err(Missed::Raced) => RETRY / 4,
            Err(Missed::Unknown(why)) => {
                one.version = None;
                if until.is_none_or(|until| until <= Instant::now()) {
                    one.lapsed(format!("the fence store can't be reached: {why}"));
                }
                RETRY
            }
        };
        tokio::time::sleep(rest).await;
    }
}

/// Why a marker was not renewed.
enum Missed {
    Superseded {
        by: String,
        epoch: u32,
    },
    /// As things are it is not ours.
    NotMine(String),
    /// Somebody was faster: look again.
    Raced,
    /// No answer, or an error.
    Unknown(String),
}

impl One {
    /// Reads the marker unless its version is known, and renews it.
    async fn turn(&mut self, cluster: u32) -> Result<(), Missed> {
        let Some((head, _)) = self.target.head(self.volume) else {
            return Err(Missed::NotMine("the volume is not loaded".to_owned()));
        };
        let me = Me {
            volume: self.volume.0,
            cluster,
            epoch: head.epoch.0,
        };
        let version = match self.version.take() {
            Some(version) => version,
            None => self.look(me).await?,
        };
        let marker = Marker::new(me, &self.target.url(), self.lease);
        let written = self.register.write(marker.encode(), Some(&version)).await;
        match written.map_err(|error| Missed::Unknown(error.to_string()))? {
            Written::Done(version) => {
                self.version = Some(version);
                Ok(())
            }
            // Another leader of this cluster, whoever took it over, or a put of ours that we gave up.
            Written::Conflict => Err(Missed::Raced),
        }
    }

    /// The marker's version, if it is ours to renew.
    async fn look(&self, me: Me) -> Result<Version, Missed> {
        let found = self.register.read().await;
        let Some((bytes, version)) = found.map_err(|error| Missed::Unknown(error.to_string()))?
        else {
            return Err(Missed::NotMine(format!(
                "there is no marker `{}` in the fence store: `heliofs config --fence-store` makes it anew, if nothing is written \
                 in another region",
                self.register.key()
            )));
        };
        let marker = match Marker::decode(&bytes).map_err(Missed::NotMine)? {
            Stored::Marker(marker) => marker,
            // Who gave it up has taken the volume over before.
            Stored::GivenUp(last) if last.cluster != me.cluster && last.epoch > me.epoch => {
                return Err(Missed::Superseded {
                    by: last.url,
                    epoch: last.epoch,
                });
            }
            Stored::GivenUp(_) => {
                return Err(Missed::NotMine(format!(
                    "the marker `{}` was given up: `heliofs config --fence-store`, which was changing the fence store, did not end \
                 well; try it again",
                    self.register.key()
                )));
            }
        };
        match marker.judge(me) {
            Verdict::Mine => Ok(version),
            Verdict::Superseded { by, epoch } => Err(Missed::Superseded { by, epoch }),
            Verdict::NotMine(why) => Err(Missed::NotMine(why)),
        }
    }

    fn lapsed(&self, why: String) {
        tracing::warn!(volume = %self.volume, why, "the volume is read-only");
        self.target.stand(self.volume, Some(Standing::Lapsed(why)));
    }

    /// The volume is another cluster's for good: that is logged, so that it holds without the fence store too.
    async fn superseded(&self, by: &str, epoch: u32) {
        let why = format!(
            "the volume is written at {by} in epoch {epoch}: `heliofs mirror rejoin` makes this one its mirror"
        );
        tracing::error!(volume = %self.volume, why, "superseded");
        self.target.stand(self.volume, Some(Standing::Lost(why)));
        let demote = v1::VolumeDemote {
            volume: self.volume.0,
            successor: by.to_owned(),
            hand_over: false,
            ..v1::VolumeDemote::default()
        };
        let item = Item::Local(v1::LocalCommand {
            op: Some(Op::VolumeDemote(demote)),
        });
        if let Err(error) = self.target.propose(item).await {
            // It stays shut, and is tried again.
            tracing::warn!(volume = %self.volume, %error, "the demotion is not logged yet");
        }
    }
}

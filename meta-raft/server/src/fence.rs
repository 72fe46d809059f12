//! What this node may acknowledge of volumes that have a fence store.
//!
//! Whoever keeps the marker in the fence store ([`Fences::set`]) says until when it is this cluster's; a command is proposed,
//! and answered, only before that moment. The monotonic clock says so; it stands still while a machine is suspended, so the wall
//! clock must agree.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use heliofs_proto::ids::VolumeId;
use tokio::sync::watch;

/// A new leader needs two requests to the fence store before it may acknowledge anything: so long a command waits for that.
const BEGIN_WAIT: Duration = Duration::from_secs(5);

/// A command that was applied when the marker could not be renewed any more waits so long for it to be ours again. After that
/// its outcome is unknown, and whoever asks again learns it.
const ANSWER_WAIT: Duration = Duration::from_secs(30);

/// What is known of one volume's marker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is this cluster's until then.
    Held {
        /// By the monotonic clock.
        until: Instant,
        /// By the wall clock.
        until_wall: SystemTime,
    },
    /// It can't be renewed; it may be again.
    Lapsed(String),
    /// It is another cluster's.
    Lost(String),
}

#[derive(Default)]
struct Told {
    standings: BTreeMap<VolumeId, Standing>,
    /// Counts how often this node stopped to keep markers: who waits for an answer of an earlier time waits in vain.
    ended: u64,
}

impl Standing {
    /// Whether something may be acknowledged now.
    fn holds(&self) -> bool {
        match self {
            Self::Held { until, until_wall } => {
                Instant::now() < *until && SystemTime::now() < *until_wall
            }
            Self::Lapsed(_) | Self::Lost(_) => false,
        }
    }
}

/// The markers of all volumes, as this node knows them; cheap to clone.
#[derive(Clone)]
pub struct Fences {
    /// The volumes that are written here and have a fence store: nearly always none.
    fenced: Arc<ArcSwap<BTreeSet<VolumeId>>>,
    told: Arc<watch::Sender<Told>>,
}

/// Why a volume is not changed now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shut(pub String);

impl Fences {
    /// Over the set that the state keeps.
    pub(crate) fn new(fenced: Arc<ArcSwap<BTreeSet<VolumeId>>>) -> Self {
        Self {
            fenced,
            told: Arc::new(watch::Sender::new(Told::default())),
        }
    }

    /// Whether the volume is written here and has a fence store.
    pub fn is_fenced(&self, volume: VolumeId) -> bool {
        let fenced = self.fenced.load();
        !fenced.is_empty() && fenced.contains(&volume)
    }

    /// The keeper of the marker says how it stands.
    pub fn set(&self, volume: VolumeId, standing: Standing) {
        self.told.send_modify(|told| {
            told.standings.insert(volume, standing);
        });
    }

    /// This node keeps this marker no more.
    pub fn forget(&self, volume: VolumeId) {
        self.told.send_modify(|told| {
            told.standings.remove(&volume);
        });
    }

    /// This node leads no more.
    pub fn end(&self) {
        self.told.send_modify(|told| {
            told.standings.clear();
            told.ended += 1;
        });
    }

    /// Why the volume can't be changed now; `None`: it can, as far as the fence store goes.
    pub fn shut(&self, volume: VolumeId) -> Option<String> {
        if !self.is_fenced(volume) {
            return None;
        }
        match self.told.borrow().standings.get(&volume) {
            Some(standing) if standing.holds() => None,
            Some(Standing::Held { .. }) => Some(LATE.to_owned()),
            Some(Standing::Lapsed(why) | Standing::Lost(why)) => Some(why.clone()),
            None => Some(NEVER.to_owned()),
        }
    }

    /// Whether a command of the volume may be proposed; waits while that is not known yet. `true`: it has a fence store.
    pub(crate) async fn admit(&self, volume: VolumeId) -> Result<bool, Shut> {
        if !self.is_fenced(volume) {
            return Ok(false);
        }
        let begun = tokio::time::Instant::now();
        let mut told = self.told.subscribe();
        loop {
            {
                let told = told.borrow_and_update();
                match told.standings.get(&volume) {
                    Some(standing) if standing.holds() => return Ok(true),
                    Some(Standing::Held { .. }) => return Err(Shut(LATE.to_owned())),
                    Some(Standing::Lapsed(why) | Standing::Lost(why)) => {
                        return Err(Shut(why.clone()));
                    }
                    None => {}
                }
            }
            let changed = tokio::time::timeout_at(begun + BEGIN_WAIT, told.changed()).await;
            if !matches!(changed, Ok(Ok(()))) {
                return Err(Shut(NEVER.to_owned()));
            }
        }
    }

    /// Waits until what was applied may be answered. `false`: it may never be; its outcome is unknown.
    pub(crate) async fn may_answer(&self, volume: VolumeId) -> bool {
        let begun = tokio::time::Instant::now();
        let mut told = self.told.subscribe();
        let ended = told.borrow().ended;
        loop {
            {
                let told = told.borrow_and_update();
                if told.ended != ended {
                    return false;
                }
                match told.standings.get(&volume) {
                    Some(standing) if standing.holds() => return true,
                    Some(Standing::Lost(_)) => return false,
                    Some(Standing::Held { .. } | Standing::Lapsed(_)) | None => {}
                }
            }
            let changed = tokio::time::timeout_at(begun + ANSWER_WAIT, told.changed()).await;
            if !matches!(changed, Ok(Ok(()))) {
                return false;
            }
        }
    }
}

const LATE: &str = "the volume's marker in the fence store could not be renewed in time: it is read-only until it is";
const NEVER: &str = "the volume's marker in the fence store was not read yet";

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUME: VolumeId = VolumeId(1);

    fn fences() -> Fences {
        Fences::new(Arc::new(ArcSwap::from_pointee(BTreeSet::from([VOLUME]))))
    }

    fn held(millis: u64) -> Standing {
        let lasts = Duration::from_millis(millis);
        Standing::Held {
            until: Instant::now() + lasts,
            until_wall: SystemTime::now() + lasts,
        }
    }

    #[tokio::test]
    async fn a_lease_that_ended_while_the_machine_was_suspended_is_over() {
        let fences = fences();
        let resumed = Standing::Held {
            until: Instant::now() + Duration::from_secs(60),
            until_wall: SystemTime::now(),
        };
        fences.set(VOLUME, resumed);
        assert_eq!(fences.admit(VOLUME).await, Err(Shut(LATE.to_owned())));
        assert_eq!(fences.shut(VOLUME), Some(LATE.to_owned()));
    }

    #[tokio::test]
    async fn a_volume_without_a_fence_store_is_never_held_up() {
        let fences = fences();
        assert_eq!(fences.admit(VolumeId(2)).await, Ok(false));
        assert_eq!(fences.shut(VolumeId(2)), None);
    }

    #[tokio::test]
    async fn nothing_is_admitted_or_answered_outside_the_lease() {
        let fences = fences();
        fences.set(VOLUME, held(50));
        assert_eq!(fences.admit(VOLUME).await, Ok(true));
        assert!(fences.may_answer(VOLUME).await);
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert_eq!(fences.admit(VOLUME).await, Err(Shut(LATE.to_owned())));
        let waiting = tokio::spawn({
            let fences = fences.clone();
            async move { fences.may_answer(VOLUME).await }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!waiting.is_finished());
        fences.set(VOLUME, held(60_000));
        assert!(waiting.await.unwrap());
    }

    #[tokio::test]
    async fn a_lost_marker_answers_nobody_and_neither_does_a_lost_lead() {
        let fences = fences();
        fences.set(VOLUME, Standing::Lapsed("away".to_owned()));
        let first = tokio::spawn({
            let fences = fences.clone();
            async move { fences.may_answer(VOLUME).await }
        });
        tokio::task::yield_now().await;
        fences.set(VOLUME, Standing::Lost("theirs".to_owned()));
        assert!(!first.await.unwrap());
        assert_eq!(fences.admit(VOLUME).await, Err(Shut("theirs".to_owned())));
        fences.set(VOLUME, Standing::Lapsed("away".to_owned()));
        let second = tokio::spawn({
            let fences = fences.clone();
            async move { fences.may_answer(VOLUME).await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        fences.end();
        assert!(!second.await.unwrap());
    }

    #[tokio::test]
    async fn a_command_waits_for_a_new_leader_to_read_the_marker() {
        let fences = fences();
        let waiting = tokio::spawn({
            let fences = fences.clone();
            async move { fences.admit(VOLUME).await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished());
        fences.set(VOLUME, held(60_000));
        assert_eq!(waiting.await.unwrap(), Ok(true));
    }
}

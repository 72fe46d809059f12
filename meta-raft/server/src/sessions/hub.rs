//! All volumes' soft state on this node. It exists while the node leads: it is made when a term begins and dropped when the
//! lead is lost; on other nodes there is nothing.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use heliofs_proto::ids::{ClusterId, Position, SessionId, VolumeId};
use heliofs_proto::v1;
use meta_core::{Corruption, query};
use parking_lot::{Mutex, MutexGuard, RwLock};
use tokio::sync::{Notify, watch};

use super::grace::Grace;
use super::interest::StreamId;
use super::reads::{self, Answer};
use super::soft::{Soft, Telling, Wake};
use super::write_leases::Returned;
use crate::config::SessionTimings;
use crate::observer::{AppliedItem, ApplyObserver};
use crate::store::State;

/// Inodes per volume of which it is remembered who was told about them: about 100 bytes each.
const INODES_TOLD_MAX: NonZeroUsize = NonZeroUsize::new(500_000).expect("the number is not 0");

/// Sessions read from the records at once.
const SESSIONS_PAGE: usize = 1000;

/// One volume's soft state, and what waits for it.
pub struct VolumeSessions {
    /// The volume.
    pub id: VolumeId,
    /// Which load of a mirror this is the soft state of; 0: the volume is no mirror.
    load: u64,
    soft: Mutex<Soft>,
    /// Seq up to which effects are known to `soft`.
    seen: watch::Sender<u64>,
    /// No cache is live that this leader does not know of. Once true, true for the whole term.
    caches_known: AtomicBool,
    /// A session came back.
    returned: Notify,
    lease: Duration,
    /// There may be an orphan to reap.
    pub(crate) reap_wanted: AtomicBool,
    /// There may be erasures or tree removals to go on with.
    pub(crate) work_wanted: AtomicBool,
    /// Seq at the last beat.
    pub(crate) beaten: AtomicU64,
    /// Sessions that this leader began, of a mirror.
    admitted: AtomicU64,
}

impl VolumeSessions {
    /// The soft state. Held for moments only, never over a wait.
    pub fn soft(&self) -> MutexGuard<'_, Soft> {
        self.soft.lock()
    }

    /// A session of a mirror, which is soft state alone: nothing of it may be in the records, which are the source's. `session`
    /// is 0 for a new one.
    pub fn admit_to_mirror(&self, cluster: ClusterId, term: u64, session: u64) -> u64 {
        let mut soft = self.soft();
        let mut id = session;
        while id == 0 {
            // Terms differ, so that no two leaders give the same id, unless one gives more than 65,536.
            let number = self.admitted.fetch_add(1, Ordering::Relaxed) as u32;
            let candidate = SessionId::new(cluster, (term as u32) << 16 ^ number).0;
            if !soft.knows(candidate) {
                id = candidate;
            }
        }
        soft.admit(id, Instant::now());
        id
    }

    /// A session came back, with everything that it holds.
    pub fn returned(&self) {
        self.returned.notify_waiters();
    }

    /// Waits until a change can't be hidden from anybody by a cache that an earlier leader filled: until every session of the
    /// records came back (and dropped what it had cached), or their leases have run out.
    pub async fn caches_known(&self) {
        while !self.caches_known.load(Ordering::Acquire) {
            let returned = self.returned.notified();
            tokio::pin!(returned);
            // Before looking, so that nobody's return is missed.
            returned.as_mut().enable();
            let until = self.soft().caches_until(self.lease, Instant::now());
            match until {
                None => self.caches_known.store(true, Ordering::Release),
                Some(until) => {
                    // Either is a reason to look again.
                    tokio::time::timeout_at(until.into(), returned).await.ok();
                }
            }
        }
    }

    /// Queues the answers of reads that were made at `position`, each behind the invalidations of what the view showed. Returns
    /// those that can't be told, with what to wait for before they are read again: see [`super::soft::Soft::tell`].
    pub async fn tell(
        &self,
        (session, stream): (u64, StreamId),
        position: Position,
        answers: Vec<(u64, Answer)>,
        patient: bool,
    ) -> Vec<(u64, Vec<Returned>)> {
        let mut answers: VecDeque<_> = answers
            .into_iter()
            .map(|(id, answer)| {
                let response = v1::Response {
                    id,
                    ..answer.response
                };
                (id, Some(response), answer.told)
            })
            .collect();
        let mut leased = Vec::new();
        loop {
            {
                let mut soft = self.soft();
                while let Some((id, response, told)) = answers.front_mut() {
                    match soft.tell(stream, position, (&*told, patient), response) {
                        Telling::Told => {}
                        Telling::TooEarly => break,
                        Telling::Leased => {
                            let recalled = told
                                .iter()
                                .filter_map(|told| soft.recall(session, told.ino));
                            leased.push((*id, recalled.collect()));
                        }
                    }
                    answers.pop_front();
                }
            }
            if answers.is_empty() {
                return leased;
            }
            // The group is written and visible, and its effects are on their way to us.
            let mut seen = self.seen.subscribe();
            if seen.wait_for(|seen| *seen >= position.seq).await.is_err() {
                return leased;
            }
        }
    }
}

struct Shared {
    state: State,
    timings: SessionTimings,
    volumes: RwLock<HashMap<VolumeId, Arc<VolumeSessions>>>,
    /// The term this node leads with its soft state in place.
    reign: watch::Sender<Option<u64>>,
    streams: AtomicU64,
    reap: Notify,
    work: Notify,
    volumes_changed: Notify,
}

/// The soft state of all volumes; cheap to clone.
#[derive(Clone)]
pub struct Hub {
    shared: Arc<Shared>,
}

impl Hub {
    /// Empty, until a term begins.
    pub fn new(state: State, timings: SessionTimings) -> Self {
        Self {
            shared: Arc::new(Shared {
                state,
                timings,
                volumes: RwLock::default(),
                reign: watch::Sender::new(None),
                streams: AtomicU64::new(1),
                reap: Notify::new(),
                work: Notify::new(),
                volumes_changed: Notify::new(),
            }),
        }
    }

    /// What the apply task calls.
    pub fn observer(&self) -> Arc<dyn ApplyObserver> {
        self.shared.clone()
    }

    /// Leases and expiry.
    pub fn timings(&self) -> &SessionTimings {
        &self.shared.timings
    }

    /// The term that this node leads with its soft state in place; `None`: it does not lead, or not yet.
    pub fn reign(&self) -> watch::Receiver<Option<u64>> {
        self.shared.reign.subscribe()
    }

    /// Makes the soft state of all volumes for a term that began at `began`. Call after a linearizable read: the records
    /// must hold every session of earlier terms.
    pub fn begin(&self, term: u64, began: Instant) -> Result<(), Corruption> {
        for volume in self.shared.state.volumes() {
            let volume = self.make(VolumeId(volume.id), began)?;
            // Whatever earlier leaders left.
            self.wake(
                &volume,
                Wake {
                    reap: true,
                    work: true,
                },
            );
        }
        self.shared.reign.send_replace(Some(term));
        Ok(())
    }

    /// Drops all soft state: the lead is lost or the node stops. Streams are sent to `leader`, or away if it is empty.
    pub fn end(&self, leader: &str) {
        self.shared.end(leader);
    }

    /// The volume's soft state; made for a volume that was created in this term. `None`: no such volume, or no reign.
    pub fn volume(&self, id: VolumeId) -> Result<Option<Arc<VolumeSessions>>, Corruption> {
        if let Some(found) = self.shared.volumes.read().get(&id) {
            return Ok(Some(Arc::clone(found)));
        }
        if self.shared.reign.borrow().is_none() || self.shared.state.volume(id).is_none() {
            return Ok(None);
        }
        let made = self.make(id, Instant::now())?;
        if self.shared.reign.borrow().is_none() {
            // The lead was lost meanwhile, and all soft state with it.
            self.shared.volumes.write().remove(&id);
            return Ok(None);
        }
        Ok(Some(made))
    }

    fn make(&self, id: VolumeId, began: Instant) -> Result<Arc<VolumeSessions>, Corruption> {
        let state = &self.shared.state;
        let mirror = state.mirror(id);
        let known = match &mirror {
            // Those of the records are the source's, unless this was the source.
            Some(mirror) if !mirror.was_handed_over() => Vec::new(),
            _ => state.snapshot_view(|view| known_sessions(view, id))?,
        };
        let grace = Grace::new(known.iter().copied(), began, self.shared.timings.timeout);
        let mut soft = Soft::new(&known, grace, INODES_TOLD_MAX);
        soft.of_mirror(mirror.is_some());
        let made = Arc::new(VolumeSessions {
            id,
            load: mirror.map_or(0, |mirror| mirror.load),
            soft: Mutex::new(soft),
            seen: watch::Sender::new(0),
            caches_known: AtomicBool::new(false),
            returned: Notify::new(),
            lease: self.shared.timings.lease,
            reap_wanted: AtomicBool::new(false),
            work_wanted: AtomicBool::new(false),
            beaten: AtomicU64::new(0),
            admitted: AtomicU64::new(1),
        });
        let made = Arc::clone(self.shared.volumes.write().entry(id).or_insert(made));
        // From here on every command is seen. What was applied before is in the records, so that reads of up to this
        // position need not wait for its effects.
        let position = state.snapshot_view(|view| reads::position(view, id))?;
        if let Some(position) = position {
            made.soft().start_at(position);
            made.seen.send_if_modified(|seen| {
                let later = *seen < position.seq;
                *seen = position.seq.max(*seen);
                later
            });
        }
        Ok(made)
    }

    /// All volumes with soft state.
    pub fn volumes(&self) -> Vec<Arc<VolumeSessions>> {
        self.shared.volumes.read().values().cloned().collect()
    }

    /// Makes what is missing and drops volumes that were destroyed, with their sessions.
    pub fn follow_volumes(&self) -> Result<(), Corruption> {
        // Of mirrors those that are complete, with the number of their load.
        let now: HashMap<VolumeId, u64> = self
            .shared
            .state
            .volumes()
            .iter()
            .filter_map(|volume| match &volume.mirror {
                Some(mirror) if mirror.state() == v1::MirrorState::Loading => None,
                Some(mirror) => Some((VolumeId(volume.id), mirror.load)),
                None => Some((VolumeId(volume.id), 0)),
            })
            .collect();
        let gone: Vec<_> = {
            let mut volumes = self.shared.volumes.write();
            let gone: Vec<VolumeId> = volumes
                .values()
                .filter(|volume| now.get(&volume.id) != Some(&volume.load))
                .map(|volume| volume.id)
                .collect();
            gone.iter().filter_map(|id| volumes.remove(id)).collect()
        };
        for id in now.keys() {
            self.volume(*id)?;
        }
        for volume in gone {
            if volume.load == 0 && self.shared.state.volume(volume.id).is_none() {
                volume.soft().end_all();
            } else {
                // It comes back with other records, in which these sessions have nothing.
                volume.soft().move_all("");
            }
        }
        Ok(())
    }

    /// Waits until a volume was created, changed or destroyed.
    pub async fn volumes_changed(&self) {
        self.shared.volumes_changed.notified().await;
    }

    /// Waits until some volume may have an orphan to reap.
    pub async fn reap_wanted(&self) {
        self.shared.reap.notified().await;
    }

    /// Waits until some volume may have erasures or tree removals.
    pub async fn work_wanted(&self) {
        self.shared.work.notified().await;
    }

    /// Passes on what a change of a volume's soft state makes worth doing.
    pub fn wake(&self, volume: &VolumeSessions, wake: Wake) {
        self.shared.wake(volume, wake);
    }

    /// An id for a new stream.
    pub fn next_stream(&self) -> StreamId {
        self.shared.streams.fetch_add(1, Ordering::Relaxed)
    }

    /// What `heliofs status` shows of sessions.
    pub fn status(&self) -> Vec<v1::SessionStatus> {
        let now = Instant::now();
        let mut all: Vec<_> = self
            .volumes()
            .iter()
            .flat_map(|volume| volume.soft().status(volume.id.0, now))
            .collect();
        all.sort_unstable_by_key(|status| (status.volume, status.session));
        all
    }
}

/// The sessions of the records.
fn known_sessions(view: &impl meta_core::View, volume: VolumeId) -> Result<Vec<u64>, Corruption> {
    let mut known = Vec::new();
    let mut after = SessionId::SYSTEM;
    loop {
        let page = query::sessions(view, volume, after, SESSIONS_PAGE)?;
        known.extend(page.iter().map(|(id, _)| id.0));
        match page.last() {
            Some((last, _)) if page.len() == SESSIONS_PAGE => after = *last,
            _ => break,
        }
    }
    Ok(known)
}

impl Shared {
    fn wake(&self, volume: &VolumeSessions, wake: Wake) {
        if wake.reap && !volume.reap_wanted.swap(true, Ordering::AcqRel) {
            self.reap.notify_one();
        }
        if wake.work && !volume.work_wanted.swap(true, Ordering::AcqRel) {
            self.work.notify_one();
        }
    }

    fn end(&self, leader: &str) {
        self.reign.send_replace(None);
        let volumes = std::mem::take(&mut *self.volumes.write());
        for volume in volumes.into_values() {
            volume.soft().move_all(leader);
        }
    }
}

impl ApplyObserver for Shared {
    fn applied(&self, items: &[AppliedItem<'_>]) {
        let now = Instant::now();
        for run in items.chunk_by(|a, b| a.volume == b.volume) {
            let Some(first) = run.first() else { continue };
            let Some(volume) = self.volumes.read().get(&first.volume).cloned() else {
                continue;
            };
            let mut wake = Wake::default();
            let seen = {
                let mut soft = volume.soft();
                for item in run {
                    wake = wake.and(soft.applied(item, now));
                }
                soft.seen().seq
            };
            volume.seen.send_replace(seen);
            self.wake(&volume, wake);
        }
    }

    fn reset(&self) {
        // A leader never installs a snapshot; whoever does has no streams worth keeping.
        self.end("");
    }

    fn volumes_changed(&self) {
        self.volumes_changed.notify_one();
    }
}

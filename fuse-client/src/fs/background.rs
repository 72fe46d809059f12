//! What runs beside the operations: session events, the flusher, deletion of dead segments, compaction of sparse ones.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockstore::SegmentStore;
use heliofs_proto::ids::SegmentId;
use heliofs_proto::v1::{self, maintain::Ask, maintained::Answer};
use meta_client::{Event, Session};
use parking_lot::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio_util::sync::CancellationToken;

use super::Fs;
use crate::compact::{CompactError, Compacted, Compactor, Sightings};
use crate::inode::Inode;
use crate::options::CompactionOptions;
use crate::write::pack::Packer;
use crate::write::segment_ids::SegmentIds;

/// Dead segments leased at once.
const DELETIONS: u32 = 512;

/// Pause between two questions for dead segments: after some were found, and the longest when none are.
const DELETION_PAUSE_MIN: Duration = Duration::from_millis(500);
const DELETION_PAUSE_MAX: Duration = Duration::from_secs(10);

/// Abandoned segments deleted together.
const ABANDONED: usize = 64;

/// Sparse segments asked for at once.
const SPARSE: u32 = 256;

/// How often the volume's room is asked for.
const ROOM_EVERY: Duration = Duration::from_secs(1);

/// Pause between two attempts to begin a session anew.
pub(super) const RENEW_PAUSE: Duration = Duration::from_millis(500);

impl Fs {
    pub(crate) fn store(&self) -> &Arc<SegmentStore> {
        &self.store
    }

    pub(crate) fn segment_ids(&self) -> &SegmentIds {
        &self.segment_ids
    }

    pub(crate) fn upload_turns(&self) -> &tokio::sync::Semaphore {
        &self.upload_turns
    }

    pub(crate) fn packer(&self) -> &Packer {
        &self.packer
    }

    pub(crate) fn segment_bytes(&self) -> u64 {
        self.options.segment_bytes
    }

    pub(crate) fn read_ahead_bytes_max(&self) -> u64 {
        self.options.read_ahead_bytes_max
    }

    pub(crate) fn flush_age(&self) -> Duration {
        self.options.flush_age
    }

    pub(crate) fn dirty(&self) -> &Mutex<std::collections::HashMap<u64, Arc<Inode>>> {
        &self.dirty
    }

    pub(crate) fn stop_token(&self) -> CancellationToken {
        self.stop.clone()
    }

    pub(crate) fn abandoned(&self) -> UnboundedSender<SegmentId> {
        self.abandoned.clone()
    }

    pub(super) fn start_background(self: &Arc<Self>, unnamed: UnboundedReceiver<SegmentId>) {
        self.runtime.spawn(self.clone().run_events());
        self.runtime.spawn(self.clone().run_abandoned(unnamed));
        if !self.options.read_only {
            self.runtime.spawn(self.clone().run_flusher());
            self.runtime.spawn(self.clone().run_recalls());
            self.runtime.spawn(self.clone().run_ahead());
            self.runtime.spawn(self.clone().run_room());
        }
        // A mirror's mounts clean up its own bucket, from which nobody else deletes.
        if self.options.delete_segments
            && (!self.options.read_only || self.store.second_bucket().is_some())
        {
            self.runtime.spawn(self.clone().run_deletions());
        }
        if let Some(options) = self.options.compaction.clone()
            && !self.options.read_only
        {
            self.runtime.spawn(self.clone().run_compaction(options));
        }
    }

    /// Keeps in mind how full the volume is, while something is held back.
    async fn run_room(self: Arc<Self>) {
        let mut tick = tokio::time::interval(ROOM_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut known = false;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            if !known || !self.dirty.lock().is_empty() {
                known = self.look_for_room().await;
            }
        }
    }

    /// Ends the background. Call it after [`Fs::flush_all`].
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Follows the session; begins a new one when it is gone.
    async fn run_events(self: Arc<Self>) {
        loop {
            let session = self.session();
            let Some(mut events) = session.events() else {
                tracing::error!(
                    "somebody else took the session's events: a lost session will not be renewed"
                );
                return;
            };
            let why = loop {
                let event = tokio::select! {
                    () = self.stop.cancelled() => return,
                    event = events.recv() => event,
                };
                match event {
                    Some(Event::Gone(why)) => break why,
                    Some(Event::Disconnected) => {
                        tracing::warn!("the metadata leader is away; operations wait")
                    }
                    Some(Event::Reattached) => {
                        tracing::info!("attached to a metadata leader again")
                    }
                    Some(Event::LeaseLost) => {
                        tracing::info!("the lease ran out; caches are not used")
                    }
                    Some(Event::LeaseRegained | Event::Invalidate(_)) => {}
                    None => break "its tasks ended".to_owned(),
                }
            };
            if self.stop.is_cancelled() {
                return;
            }
            tracing::error!(%why, "the session is gone; beginning another one");
            let mut last = session;
            loop {
                let Some(renewed) = self.renew(&last).await else {
                    return;
                };
                match self.adopt(&renewed).await {
                    Ok(()) => break,
                    Err(why) => {
                        tracing::error!(%why, "the new session is gone, too; beginning another one");
                        last = renewed;
                    }
                }
            }
        }
    }

    async fn renew(&self, session: &Session) -> Option<Session> {
        loop {
            let renewed = tokio::select! {
                () = self.stop.cancelled() => return None,
                renewed = session.renew() => renewed,
            };
            match renewed {
                Ok(session) => return Some(session),
                Err(error) => tracing::warn!(%error, "no new session yet"),
            }
            tokio::select! {
                () = self.stop.cancelled() => return None,
                () = tokio::time::sleep(RENEW_PAUSE) => {}
            }
        }
    }

    /// Deletes segments that this mount has stored and that no commit will name: what they held was overwritten before.
    async fn run_abandoned(self: Arc<Self>, mut unnamed: UnboundedReceiver<SegmentId>) {
        let mut ids = Vec::new();
        loop {
            ids.clear();
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = unnamed.recv_many(&mut ids, ABANDONED) => {}
            }
            for (id, deleted) in self.store.delete(&ids).await {
                match deleted {
                    Ok(()) => self.metrics.deleted_segments.inc(),
                    // Left for gc.
                    Err(error) => {
                        tracing::warn!(segment = id.0, %error, "an abandoned segment could not be deleted");
                    }
                }
            }
        }
    }

    /// Deletes segments that nothing references any more.
    async fn run_deletions(self: Arc<Self>) {
        let mut done: Vec<SegmentId> = Vec::new();
        let mut pause = DELETION_PAUSE_MIN;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            let (taken, epoch) = match self.session().take_deletions(DELETIONS, &done).await {
                Ok(taken) => taken,
                Err(error) => {
                    tracing::debug!(%error, "no dead segments to be had");
                    pause = DELETION_PAUSE_MAX;
                    continue;
                }
            };
            done.clear();
            if taken.is_empty() {
                pause = (pause * 2).min(DELETION_PAUSE_MAX);
                continue;
            }
            if let Err(error) = self.store.check_epoch(epoch).await {
                // Leased again later.
                tracing::warn!(%error, "dead segments are left alone");
                pause = DELETION_PAUSE_MAX;
                continue;
            }
            pause = DELETION_PAUSE_MIN;
            for (id, deleted) in self.store.delete(&taken).await {
                match deleted {
                    Ok(()) => {
                        self.metrics.deleted_segments.inc();
                        done.push(id);
                    }
                    // It is leased again later.
                    Err(error) => {
                        tracing::warn!(segment = id.0, %error, "a dead segment could not be deleted")
                    }
                }
            }
        }
    }

    /// Copies what lives in sparse segments together, when it is this mount's turn.
    async fn run_compaction(self: Arc<Self>, options: CompactionOptions) {
        let mut sightings = Sightings::new(options.pause);
        let mut wait = options.pause;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            if self.session().welcome().mirror {
                // Its objects are the source's, which compacts them.
                continue;
            }
            let turn = self.compact_some(&options, &mut sightings);
            let compacted = tokio::select! {
                () = self.stop.cancelled() => return,
                compacted = turn => compacted,
            };
            wait = options.pause;
            match compacted {
                Ok(turn) => {
                    let done = &turn.done;
                    if done.written_segments > 0 {
                        tracing::info!(
                            segments = done.segments,
                            moved_bytes = done.moved_bytes,
                            written_bytes = done.written_bytes,
                            "compacted sparse segments"
                        );
                    }
                    // Each turn costs a pass over the extents: without a pause only as long as there is much to do.
                    let only_met = done.segments == 0 && sightings.unsettled;
                    let busy = done.moved_bytes > 0 || sightings.unsettled;
                    if only_met || turn.urgent && busy {
                        wait = sightings.settle;
                    }
                }
                Err(error) => {
                    // Left for the next turn, perhaps another mount's.
                    tracing::debug!(%error, "compaction ended early");
                    if !matches!(error, CompactError::Store(_)) {
                        sightings.clear();
                    }
                }
            }
        }
    }

    async fn compact_some(
        &self,
        options: &CompactionOptions,
        sightings: &mut Sightings,
    ) -> Result<Turn, CompactError> {
        let session = self.session();
        let ask = Ask::TakeSparse(v1::TakeSparse {
            segments_max: SPARSE,
            live_percent_max: options.live_percent_max,
            except: sightings.tried(Instant::now()),
        });
        let Answer::Sparse(sparse) = session.maintain(ask).await? else {
            return Err(CompactError::Answer);
        };
        let ids = sparse.segments.iter().map(|segment| segment.id);
        let chosen = sightings.choose(Instant::now(), ids);
        let mut turn = Turn {
            urgent: u128::from(sparse.dead_bytes) * 100
                > u128::from(sparse.live_bytes) * u128::from(options.urgent_dead_percent),
            done: Compacted::default(),
        };
        if chosen.is_empty() {
            return Ok(turn);
        }
        let compactor = Compactor {
            session: &session,
            store: &self.store,
            ids: &self.segment_ids,
            segment_bytes: self.options.segment_bytes,
            bytes_per_second: match turn.urgent {
                true => options.urgent_bytes_per_second,
                false => options.bytes_per_second,
            },
            leased: true,
        };
        turn.done = compactor.compact(&chosen).await?;
        Ok(turn)
    }
}

/// One turn at compacting.
struct Turn {
    done: Compacted,
    /// There was much to do.
    urgent: bool,
}

//! What runs beside the operations: session events, the flusher, deletion of dead segments, compaction of sparse ones.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockstore::SegmentStore;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, SegmentId};
use heliofs_proto::v1::{self, maintain::Ask, maintained::Answer};
use meta_client::{ClientError, Event, Session};
use parking_lot::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio_util::sync::CancellationToken;

use super::Fs;
use crate::compact::{CompactError, Compacted, Compactor, Sightings};
use crate::errno::Errno;
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
const RENEW_PAUSE: Duration = Duration::from_millis(500);

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

    /// Goes on with a new session: what is open or dirty here is opened there. Uncommitted data of files that nobody changed
    /// since is uploaded and committed again, under new segment ids. Locks and leases ended with the old session, so what others
    /// have written since stays, and ours is lost: whoever syncs or opens such a file learns it.
    ///
    /// Errors: the new session ended meanwhile; nothing is lost by that.
    async fn adopt(&self, session: &Session) -> Result<(), ClientError> {
        // Nobody opens or closes meanwhile: each handle is to be counted once.
        let _adoption = self.adoption.write().await;
        self.segment_ids.discard().await;
        let mut lost = Vec::new();
        for inode in self.coherence.inodes.all() {
            // Not while a flush is under way under the old session.
            let _changing = inode.changing.lock().await;
            let (opens, base) = {
                let mut state = inode.lock();
                state.forget();
                (state.handles + state.owed_releases, state.base_seq)
            };
            let mut changed = None;
            for _ in 0..opens {
                match self.open_again(session, inode.ino).await? {
                    Some(data_seq) if base == Some(data_seq) => {}
                    Some(_) => changed = Some("others have written to it since"),
                    None => changed = Some("it is gone"),
                }
            }
            let mut state = inode.lock();
            if changed == Some("it is gone") {
                state.lost = Some(Errno::STALE);
            }
            if state.pieces.is_empty() {
                continue;
            }
            state.batches.clear();
            match changed {
                None => {
                    tracing::info!(
                        ino = inode.ino,
                        bytes = state.pieces.bytes(),
                        "uncommitted data is uploaded again"
                    );
                    state.pieces.unsend_all();
                    state.retry = None;
                    state.failure = None;
                }
                Some(why) => {
                    drop(state);
                    lost.push((inode.clone(), why));
                }
            }
        }
        self.session.store(Arc::new(session.clone()));
        for (inode, why) in lost {
            let mut state = inode.lock();
            tracing::error!(
                ino = inode.ino,
                bytes = state.pieces.bytes(),
                why,
                "uncommitted data is lost"
            );
            if let Some(staging) = &self.staging {
                for record in std::mem::take(&mut state.records) {
                    staging.put_aside(record.path(), why);
                }
            }
            state.pieces.clear();
            state.lost = Some(Errno::STALE);
            drop(state);
            self.settle(&inode);
        }
        tracing::info!("a new session goes on");
        Ok(())
    }

    /// Opens a file once more, for as long as it takes. What identifies its content; `None`: it is gone.
    async fn open_again(&self, session: &Session, ino: u64) -> Result<Option<u64>, ClientError> {
        loop {
            match session.open(Ino(ino), 0, false).await {
                Ok((opened, _)) => {
                    return Ok(Some(opened.attr.map_or(0, |attr| attr.data_seq)));
                }
                Err(ClientError::Verdict(FsError::Stale | FsError::NotFound)) => return Ok(None),
                Err(gone @ ClientError::SessionGone(_)) => return Err(gone),
                Err(error) => {
                    tracing::warn!(ino, %error, "an open file could not be opened again yet");
                    if self.stop.is_cancelled() {
                        return Err(error);
                    }
                    tokio::time::sleep(RENEW_PAUSE).await;
                }
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
            let taken = match self.session().take_deletions(DELETIONS, &done).await {
                Ok((taken, _)) => taken,
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
            let turn = self.compact_some(&options, &mut sightings);
            let compacted = tokio::select! {
                () = self.stop.cancelled() => return,
                compacted = turn => compacted,
            };
            wait = options.pause;
            match compacted {
                Ok(done) => {
                    if done.written_segments > 0 {
                        tracing::info!(
                            segments = done.segments,
                            moved_bytes = done.moved_bytes,
                            written_bytes = done.written_bytes,
                            "compacted sparse segments"
                        );
                    }
                    // While there is something to do, it is done.
                    if done.moved_bytes > 0 || sightings.unsettled {
                        wait = sightings.settle;
                    }
                }
                Err(error) => {
                    // Left for the next turn, perhaps another mount's.
                    tracing::debug!(%error, "compaction ended early");
                    sightings.clear();
                }
            }
        }
    }

    async fn compact_some(
        &self,
        options: &CompactionOptions,
        sightings: &mut Sightings,
    ) -> Result<Compacted, CompactError> {
        let session = self.session();
        let ask = Ask::TakeSparse(v1::TakeSparse {
            segments_max: SPARSE,
            live_percent_max: options.live_percent_max,
        });
        let Answer::Sparse(sparse) = session.maintain(ask).await? else {
            return Err(CompactError::Answer);
        };
        let ids = sparse.segments.iter().map(|segment| segment.id);
        let chosen = sightings.choose(Instant::now(), ids);
        if chosen.is_empty() {
            return Ok(Compacted::default());
        }
        let dead = sparse.data_bytes.saturating_sub(sparse.live_bytes);
        let urgent = dead * 100 > sparse.live_bytes * options.urgent_dead_percent;
        let compactor = Compactor {
            session: &session,
            store: &self.store,
            ids: &self.segment_ids,
            segment_bytes: self.options.segment_bytes,
            bytes_per_second: if urgent { 0 } else { options.bytes_per_second },
            leased: true,
        };
        compactor.compact(&chosen).await
    }
}

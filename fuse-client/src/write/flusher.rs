//! What flushes without being asked by a program here: recalls of write leases, old data, data of closed files whose flush failed, and the oldest when memory runs short.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use heliofs_proto::ids::Ino;
use meta_client::{Recalled, Session};
use tokio::sync::Semaphore;

use super::stage::Stage;
use crate::errno::Errno;
use crate::fs::Fs;
use crate::inode::{Inode, InodeState};

/// How often it looks for old data.
const TICK: Duration = Duration::from_millis(250);

/// Groups of files flushed at once.
const PARALLEL: usize = 8;

/// Files in a group at most; they wait for each other.
const CHUNK_FILES_MAX: usize = 512;

/// Dirty files beyond which the oldest are flushed whatever their age.
const DIRTY_FILES_MAX: usize = 8192;

/// Recalls answered together.
const RECALLS_MAX: usize = 256;

/// Longest that somebody waits for a lease to be returned; well below the time that operations wait for an answer.
const RECALL_WAIT: Duration = Duration::from_secs(10);

/// Longest that somebody waits for a lease while the volume can't be changed. For data that is staged and that the bucket does not
/// take, see `--recall-wait`. Who waits gets an error before, and may try again.
const DRAIN_WAIT: Duration = Duration::from_secs(60);

/// First and longest pause between two attempts to store a file's data.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

impl InodeState {
    /// Sync has confirmed data that is staged only, and nothing says that the bucket will not take it.
    fn waits_for_the_bucket(&self) -> bool {
        !self.records.is_empty() && !self.pieces.is_empty() && self.failure.is_none()
    }

    /// The cluster took no change when its data was to be committed: a volume whose marker in a fence store can't be renewed is
    /// read-only until it can.
    fn waits_to_be_writable(&self) -> bool {
        !self.pieces.is_empty() && self.failure == Some(Errno::ROFS)
    }

    /// What others should see can't be stored now, and may be soon.
    fn is_worth_waiting(&self) -> bool {
        self.waits_for_the_bucket() || self.waits_to_be_writable()
    }
}

impl Fs {
    /// Runs until the file system stops.
    pub(crate) async fn run_flusher(self: Arc<Self>) {
        let stop = self.stop_token();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let turns = Arc::new(Semaphore::new(PARALLEL));
        let relief = Arc::new(Semaphore::new(1));
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
                () = self.coherence().budget.pressure() => {}
            }
            let budget = &self.coherence().budget;
            self.metrics()
                .buffered_bytes
                .set(i64::try_from(budget.used()).unwrap_or(i64::MAX));
            self.show_staged();
            self.begin_relief(&relief);
            // Under pressure every write wakes this up, and a look goes through all dirty files: not before something can be done
            // about them. Meanwhile memory can be freed by staging.
            let mut turn = loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    turn = Arc::clone(&turns).acquire_owned() => break turn.ok(),
                    _ = tick.tick() => {
                        self.show_staged();
                        self.begin_relief(&relief);
                    }
                }
            };
            for inodes in chunks(self.due(), self.segment_bytes()) {
                // Groups that are held up hold up no others; with all turns taken there is enough to do.
                let Some(turn) = turn
                    .take()
                    .or_else(|| Arc::clone(&turns).try_acquire_owned().ok())
                else {
                    break;
                };
                let group = Flushing::new(inodes);
                let fs = self.clone();
                self.runtime().spawn(async move {
                    fs.flush_in_background(group).await;
                    drop(turn);
                });
            }
        }
    }

    /// Frees memory by staging, if it runs short and nobody does so already.
    fn begin_relief(self: &Arc<Self>, relief: &Arc<Semaphore>) {
        if self.coherence().budget.is_pressed()
            && self.stages()
            && let Ok(turn) = Arc::clone(relief).try_acquire_owned()
        {
            let fs = self.clone();
            self.runtime().spawn(async move {
                fs.relieve().await;
                drop(turn);
            });
        }
    }

    /// The files to flush now, oldest data first, and how much each holds.
    fn due(&self) -> Vec<(Arc<Inode>, u64)> {
        let now = Instant::now();
        let flush_age = self.flush_age();
        let stages = self.stages();
        let mut waiting: Vec<(Reverse<Duration>, u64, Arc<Inode>)> = self
            .dirty()
            .lock()
            .values()
            .filter_map(|inode| {
                let state = inode.lock();
                if state.flushing {
                    return None;
                }
                let age = state.dirty_since.map_or(flush_age, |since| now - since);
                // What the bucket doesn't take now, or is to take later, can be staged meanwhile.
                let stage = stages && age >= flush_age && self.is_to_be_staged(&state, now);
                let retry = state.retry.is_none_or(|(at, _)| now >= at);
                let upload = retry && self.is_to_be_uploaded(inode, &state, age);
                (stage || upload).then(|| (Reverse(age), state.pieces.memory(), inode.clone()))
            })
            .collect();
        waiting.sort_by_key(|(age, _, inode)| (*age, inode.ino));
        let budget = &self.coherence().budget;
        // With a staging folder memory is freed by staging.
        let mut excess = if budget.is_pressed() && !stages {
            budget.used() / 2
        } else {
            0
        };
        let mut too_many = waiting.len().saturating_sub(DIRTY_FILES_MAX);
        waiting
            .into_iter()
            .filter(|(Reverse(age), bytes, _)| {
                let pressed = excess > 0 || too_many > 0;
                excess = excess.saturating_sub(*bytes);
                too_many = too_many.saturating_sub(1);
                pressed || *age >= flush_age
            })
            .map(|(_, bytes, inode)| (inode, bytes))
            .collect()
    }

    /// Whether something would not survive a crash, and it is time to stage it.
    fn is_to_be_staged(&self, state: &InodeState, now: Instant) -> bool {
        state
            .staged_at
            .is_none_or(|at| now - at >= self.flush_age())
            && state.pieces.has_unsafe()
    }

    /// Whether data of this age is to be stored, whatever its file's flush age says: staged data may wait longer.
    fn is_to_be_uploaded(&self, inode: &Inode, state: &InodeState, age: Duration) -> bool {
        let Some(staging) = self.staging() else {
            return true;
        };
        age >= staging.upload_delay()
            || state.pieces.has_unsafe() && !self.stages()
            // Nobody would ask here before he looks at the file.
            || !self.session.load().holds_write_lease(Ino(inode.ino))
    }

    async fn flush_in_background(self: &Arc<Self>, group: Flushing) {
        let mut inodes = group.0.clone();
        if self.stages() {
            for inode in &inodes {
                // What can't be staged is stored.
                let staged = self.stage(inode, Stage::Private).await;
                if let Err(error) = staged {
                    tracing::debug!(ino = inode.ino, %error, "not staged");
                }
            }
            let now = Instant::now();
            inodes.retain(|inode| {
                let state = inode.lock();
                let age = state.dirty_since.map_or(Duration::MAX, |since| now - since);
                state.retry.is_none_or(|(at, _)| now >= at)
                    && (self.is_to_be_uploaded(inode, &state, age) || state.pieces.has_unsafe())
            });
        }
        // What somebody is at is left to the next look: others would wait for it.
        inodes.retain(|inode| inode.changing.try_lock().is_ok());
        let flushed = self.flush_many(&inodes).await;
        for (inode, flushed) in inodes.iter().zip(flushed) {
            let mut state = inode.lock();
            let Err(error) = flushed else { continue };
            let pause = state
                .retry
                .map_or(RETRY_MIN, |(_, pause)| (pause * 2).min(RETRY_MAX));
            state.retry = Some((Instant::now() + pause, pause));
            tracing::warn!(ino = inode.ino, %error, ?pause, "data could not be stored yet");
        }
    }

    /// Others want to see what this mount has written under write leases: commits it, and returns the leases.
    pub(crate) async fn run_recalls(self: Arc<Self>) {
        let stop = self.stop_token();
        let Some(mut recalls) = self.coherence().recalls() else {
            tracing::error!("somebody else took the recalls: leases are not returned");
            return;
        };
        loop {
            let mut recalled = Vec::new();
            tokio::select! {
                () = stop.cancelled() => return,
                count = recalls.recv_many(&mut recalled, RECALLS_MAX) => if count == 0 {
                    return;
                }
            }
            recalled.sort_unstable();
            // Those without a number are of this mount's own making, and each of them counts.
            recalled.dedup_by(|again, recall| again == recall && recall.grant != 0);
            let directory = {
                let state = self.coherence().ahead.lock();
                move |recall: &Recalled| recall.grant == 0 || state.is_leased(recall.ino)
            };
            let (directories, files) = recalled.into_iter().partition(directory);
            self.return_directories(directories);
            self.answer_recalls(files);
        }
    }

    fn answer_recalls(self: &Arc<Self>, recalled: Vec<Recalled>) {
        let session = self.session();
        let mut dirty = Vec::new();
        for recall in recalled {
            let held = self.coherence().inodes.get(recall.ino).and_then(|inode| {
                let state = inode.lock();
                // What can't be stored now is known as such here; who waits sees what was stored before.
                let holds = !state.pieces.is_empty()
                    && (state.failure.is_none() || state.waits_to_be_writable());
                let bytes = state.pieces.bytes();
                let holds = holds || state.resuming;
                drop(state);
                holds.then_some((inode, bytes))
            });
            match held {
                Some((inode, bytes)) => dirty.push((inode, bytes, recall)),
                None => session.return_lease(recall),
            }
        }
        let sized = dirty
            .iter()
            .map(|(inode, bytes, _)| (inode.clone(), *bytes));
        let groups = chunks(sized.collect(), self.segment_bytes());
        let mut recalls = dirty.iter().map(|(_, _, recall)| *recall);
        for inodes in groups {
            let recalls: Vec<Recalled> = recalls.by_ref().take(inodes.len()).collect();
            let (fs, session) = (self.clone(), session.clone());
            self.runtime().spawn(async move {
                fs.give_up(&session, inodes, recalls).await;
            });
        }
    }

    /// Stores files that somebody waits for, and returns their leases; gives up waiting, not storing, when that takes too long.
    async fn give_up(
        self: &Arc<Self>,
        session: &Session,
        inodes: Vec<Arc<Inode>>,
        recalls: Vec<Recalled>,
    ) {
        let (fs, wanted) = (self.clone(), inodes.clone());
        let flush = self
            .runtime()
            .spawn(async move { fs.flush_many(&wanted).await });
        let flushed = match tokio::time::timeout(RECALL_WAIT, flush).await {
            Ok(Ok(flushed)) => flushed
                .into_iter()
                .map(|flushed| flushed.map_err(|error| error.to_string()))
                .collect(),
            Ok(Err(error)) => vec![Err(error.to_string()); inodes.len()],
            Err(_) => vec![Err("storing it takes too long".to_owned()); inodes.len()],
        };
        for ((inode, recall), flushed) in inodes.into_iter().zip(recalls).zip(flushed) {
            let Err(why) = flushed else {
                session.return_lease(recall);
                continue;
            };
            let mut state = inode.lock();
            if state.is_worth_waiting() {
                drop(state);
                let (fs, session) = (self.clone(), session.clone());
                self.runtime().spawn(async move {
                    fs.drain(&inode).await;
                    session.return_lease(recall);
                });
                continue;
            }
            if !state.pieces.is_empty() {
                tracing::warn!(
                    ino = inode.ino,
                    why,
                    "a write lease is returned without its data"
                );
                // As after a close that failed: here every later sync and open tries again, and says so if it fails.
                state.failure.get_or_insert(Errno::IO);
            }
            drop(state);
            session.return_lease(recall);
        }
    }

    /// Stores a file of which sync has confirmed more than the bucket has, for as long as the bucket takes anything of this
    /// mount, or one whose volume can't be changed now: meanwhile the lease is kept, and whoever wants to see the file waits. What
    /// is left then stays here, and is stored if nobody has changed the file by then.
    async fn drain(self: &Arc<Self>, inode: &Arc<Inode>) {
        let staged_longest = self
            .staging()
            .map_or(DRAIN_WAIT, |staging| staging.recall_wait());
        let (stop, mut uploaded, mut since) =
            (self.stop_token(), self.stored_bytes(), Instant::now());
        loop {
            let (fs, wanted) = (self.clone(), inode.clone());
            let mut flush = self.runtime().spawn(async move { fs.flush(&wanted).await });
            let mut failed = false;
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = &mut flush, if !failed => failed = true,
                    () = tokio::time::sleep(RETRY_MIN) => {}
                }
                if !inode.lock().is_worth_waiting() {
                    return;
                }
                // What is uploaded gets nobody further while nothing can be committed.
                let read_only = inode.lock().waits_to_be_writable();
                let now = self.stored_bytes();
                if now != uploaded && !read_only {
                    (uploaded, since) = (now, Instant::now());
                }
                let longest = match read_only {
                    true => DRAIN_WAIT,
                    false => staged_longest,
                };
                if since.elapsed() >= longest {
                    tracing::warn!(
                        ino = inode.ino,
                        bytes = inode.lock().pieces.bytes(),
                        "a write lease is returned although its data could not be stored: others see what was stored before"
                    );
                    return;
                }
                if failed {
                    break;
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RETRY_MIN) => {}
            }
        }
    }

    /// The mount ends and these files' data is not in the bucket: stages it. Returns those whose data is lost.
    pub(crate) async fn stage_all(self: &Arc<Self>, inos: Vec<u64>) -> Vec<u64> {
        let mut lost = Vec::new();
        let mut staged = 0;
        for ino in inos {
            let inode = self.dirty().lock().get(&ino).cloned();
            let safe = match &inode {
                Some(inode) => {
                    let staged = self.stage(inode, Stage::All).await.unwrap_or(false);
                    staged || !inode.lock().pieces.has_unsafe()
                }
                None => false,
            };
            match safe {
                true => staged += 1,
                false => lost.push(ino),
            }
        }
        if staged > 0
            && let Some(staging) = self.staging()
        {
            tracing::warn!(
                files = staged,
                directory = %staging.directory().display(),
                "the bucket has not taken everything; the next mount with this cache directory stores the rest"
            );
        }
        lost
    }

    /// Flushes everything; for unmount. Returns the inodes whose data is not stored.
    pub async fn flush_all(self: &Arc<Self>) -> Vec<u64> {
        if let Err(error) = self.settled_all(None).await {
            tracing::error!(%error, "changes that were answered are not known to have taken effect");
        }
        let all: Vec<Arc<Inode>> = self.dirty().lock().values().cloned().collect();
        let sized = all.into_iter().map(|inode| {
            let bytes = inode.lock().pieces.bytes();
            (inode, bytes)
        });
        let mut sized: Vec<_> = sized.collect();
        sized.sort_unstable_by_key(|(inode, _)| inode.ino);
        let failed = futures::stream::iter(chunks(sized, self.segment_bytes()))
            .map(|inodes| async move {
                let flushed = self.flush_many(&inodes).await;
                let outcomes = inodes.iter().zip(flushed);
                let failed = outcomes.filter(|(_, flushed)| flushed.is_err());
                failed.map(|(inode, _)| inode.ino).collect::<Vec<_>>()
            })
            .buffer_unordered(PARALLEL);
        failed.concat().await
    }
}

/// Files that the background is at. However that ends, they can be flushed again after it.
struct Flushing(Vec<Arc<Inode>>);

impl Flushing {
    fn new(inodes: Vec<Arc<Inode>>) -> Self {
        for inode in &inodes {
            inode.lock().flushing = true;
        }
        Self(inodes)
    }
}

impl Drop for Flushing {
    fn drop(&mut self) {
        for inode in &self.0 {
            inode.lock().flushing = false;
        }
    }
}

/// Cuts a list of files with their bytes into parts that are flushed together.
fn chunks(files: Vec<(Arc<Inode>, u64)>, segment_bytes: u64) -> Vec<Vec<Arc<Inode>>> {
    let mut chunks: Vec<Vec<Arc<Inode>>> = Vec::new();
    let mut left = 0;
    for (inode, bytes) in files {
        match chunks.last_mut() {
            Some(chunk) if left > 0 && chunk.len() < CHUNK_FILES_MAX => chunk.push(inode),
            _ => {
                left = segment_bytes;
                chunks.push(vec![inode]);
            }
        }
        left = left.saturating_sub(bytes);
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::super::budget::Budget;
    use super::*;

    #[test]
    fn a_flush_that_panics_leaves_its_files_to_the_next() {
        let inode = Arc::new(Inode::new(7, Arc::new(Budget::new(1))));
        let group = Flushing::new(vec![inode.clone()]);
        assert!(inode.lock().flushing);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            assert!(group.0.is_empty(), "the panic of this test");
        }));
        assert!(panicked.is_err());
        assert!(!inode.lock().flushing);
    }
}

//! What flushes without being asked by a program here: recalls of write leases, old data, data of closed files whose flush failed, and the oldest when memory runs short.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use meta_client::Recalled;
use tokio::sync::Semaphore;

use crate::errno::Errno;
use crate::fs::Fs;
use crate::inode::Inode;

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

/// First and longest pause between two attempts to store a file's data.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

impl Fs {
    /// Runs until the file system stops.
    pub(crate) async fn run_flusher(self: Arc<Self>) {
        let stop = self.stop_token();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let turns = Arc::new(Semaphore::new(PARALLEL));
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
            for inodes in chunks(self.due(), self.segment_bytes()) {
                // Groups that are held up hold up no others; with all turns taken there is enough to do.
                let Ok(turn) = Arc::clone(&turns).try_acquire_owned() else {
                    break;
                };
                for inode in &inodes {
                    inode.lock().flushing = true;
                }
                let fs = self.clone();
                self.runtime().spawn(async move {
                    fs.flush_in_background(inodes).await;
                    drop(turn);
                });
            }
        }
    }

    /// The files to flush now, oldest data first, and how much each holds.
    fn due(&self) -> Vec<(Arc<Inode>, u64)> {
        let now = Instant::now();
        let flush_age = self.flush_age();
        let mut waiting: Vec<(Reverse<Duration>, u64, Arc<Inode>)> = self
            .dirty()
            .lock()
            .values()
            .filter_map(|inode| {
                let state = inode.lock();
                if state.flushing || state.retry.is_some_and(|(at, _)| now < at) {
                    return None;
                }
                let age = state.dirty_since.map_or(flush_age, |since| now - since);
                Some((Reverse(age), state.pieces.bytes(), inode.clone()))
            })
            .collect();
        waiting.sort_by_key(|(age, _, inode)| (*age, inode.ino));
        let budget = &self.coherence().budget;
        let mut excess = if budget.is_pressed() {
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

    async fn flush_in_background(self: &Arc<Self>, mut inodes: Vec<Arc<Inode>>) {
        // What somebody is at is left to the next look: others would wait for it.
        inodes.retain(|inode| {
            let free = inode.changing.try_lock().is_ok();
            if !free {
                inode.lock().flushing = false;
            }
            free
        });
        let flushed = self.flush_many(&inodes).await;
        for (inode, flushed) in inodes.iter().zip(flushed) {
            let mut state = inode.lock();
            state.flushing = false;
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
            recalled.dedup();
            self.answer_recalls(recalled);
        }
    }

    fn answer_recalls(self: &Arc<Self>, recalled: Vec<Recalled>) {
        let session = self.session();
        let mut dirty = Vec::new();
        for recall in recalled {
            let held = self.coherence().inodes.get(recall.ino).and_then(|inode| {
                let state = inode.lock();
                // What can't be stored now is known as such here; who waits sees what was stored before.
                let holds = !state.pieces.is_empty() && state.failure.is_none();
                let bytes = state.pieces.bytes();
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
                fs.give_up(&inodes).await;
                for recall in recalls {
                    session.return_lease(recall);
                }
            });
        }
    }

    /// Stores files that somebody waits for; gives up waiting, not storing, when that takes too long.
    async fn give_up(self: &Arc<Self>, inodes: &[Arc<Inode>]) {
        let (fs, wanted) = (self.clone(), inodes.to_vec());
        let flush = self
            .runtime()
            .spawn(async move { fs.flush_many(&wanted).await });
        let why = match tokio::time::timeout(RECALL_WAIT, flush).await {
            Ok(Ok(flushed)) => {
                for (inode, flushed) in inodes.iter().zip(flushed) {
                    if let Err(error) = flushed {
                        tracing::warn!(ino = inode.ino, %error, "a write lease is returned without its data");
                    }
                }
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "storing it takes too long".to_owned(),
        };
        // As after a close that failed: here every later sync and open tries again, and says so if it fails.
        for inode in inodes {
            let mut state = inode.lock();
            if !state.pieces.is_empty() {
                tracing::warn!(
                    ino = inode.ino,
                    why,
                    "a write lease is returned without its data"
                );
                state.failure.get_or_insert(Errno::IO);
            }
        }
    }

    /// Flushes everything; for unmount. Returns the inodes whose data is not stored.
    pub async fn flush_all(self: &Arc<Self>) -> Vec<u64> {
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

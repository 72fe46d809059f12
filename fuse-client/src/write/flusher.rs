//! What flushes without being asked: old data, data of closed files whose flush failed, and the oldest when memory runs short.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;

use crate::fs::Fs;
use crate::inode::Inode;

/// How often it looks for old data.
const TICK: Duration = Duration::from_millis(250);

/// Files flushed at once.
const PARALLEL: usize = 16;

/// First and longest pause between two attempts to store a file's data.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

impl Fs {
    /// Runs until the file system stops.
    pub(crate) async fn run_flusher(self: Arc<Self>) {
        let stop = self.stop_token();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
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
            let due = self.due();
            futures::stream::iter(due)
                .for_each_concurrent(PARALLEL, |inode| self.flush_in_background(inode))
                .await;
        }
    }

    /// The files to flush now, oldest data first.
    fn due(&self) -> Vec<Arc<Inode>> {
        let now = Instant::now();
        let flush_age = self.flush_age();
        let mut waiting: Vec<(Reverse<Duration>, u64, Arc<Inode>)> = self
            .dirty()
            .lock()
            .values()
            .filter_map(|inode| {
                let state = inode.lock();
                if state.retry.is_some_and(|(at, _)| now < at) {
                    return None;
                }
                let age = state.dirty_since.map_or(flush_age, |since| now - since);
                Some((Reverse(age), state.pieces.bytes(), inode.clone()))
            })
            .collect();
        waiting.sort_by_key(|(age, _, _)| *age);
        let budget = &self.coherence().budget;
        let mut excess = if budget.is_pressed() {
            budget.used() / 2
        } else {
            0
        };
        waiting
            .into_iter()
            .filter(|(Reverse(age), bytes, _)| {
                let pressed = excess > 0;
                excess = excess.saturating_sub(*bytes);
                pressed || *age >= flush_age
            })
            .map(|(_, _, inode)| inode)
            .collect()
    }

    async fn flush_in_background(self: &Arc<Self>, inode: Arc<Inode>) {
        match self.flush(&inode).await {
            Ok(()) => self.settle(&inode),
            Err(error) => {
                let mut state = inode.lock();
                let pause = state
                    .retry
                    .map_or(RETRY_MIN, |(_, pause)| (pause * 2).min(RETRY_MAX));
                state.retry = Some((Instant::now() + pause, pause));
                tracing::warn!(ino = inode.ino, %error, ?pause, "data could not be stored yet");
            }
        }
    }

    /// Flushes everything; for unmount. Returns the inodes whose data is not stored.
    pub async fn flush_all(self: &Arc<Self>) -> Vec<u64> {
        let all: Vec<Arc<Inode>> = self.dirty().lock().values().cloned().collect();
        futures::stream::iter(all)
            .map(|inode| async move {
                let flushed = self.flush(&inode).await;
                flushed.is_err().then_some(inode.ino)
            })
            .buffer_unordered(PARALLEL)
            .filter_map(std::future::ready)
            .collect()
            .await
    }
}

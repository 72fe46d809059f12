//! Numbers for open files and directories, as the kernel passes them back.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::errno::{Errno, FsResult};

const SHARDS: usize = 16;

/// A table of handles.
#[derive(Debug)]
pub struct Handles<T> {
    next: AtomicU64,
    shards: Vec<Mutex<HashMap<u64, Arc<T>>>>,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self {
            next: AtomicU64::new(1),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
    }
}

impl<T> Handles<T> {
    fn shard(&self, number: u64) -> &Mutex<HashMap<u64, Arc<T>>> {
        &self.shards[(number % SHARDS as u64) as usize]
    }

    /// A number for `handle`.
    pub fn insert(&self, handle: Arc<T>) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.shard(number).lock().insert(number, handle);
        number
    }

    /// The handle of a number. `BADF` if there is none.
    pub fn get(&self, number: u64) -> FsResult<Arc<T>> {
        self.shard(number)
            .lock()
            .get(&number)
            .cloned()
            .ok_or(Errno::BADF)
    }

    /// Takes a handle away.
    pub fn remove(&self, number: u64) -> FsResult<Arc<T>> {
        self.shard(number).lock().remove(&number).ok_or(Errno::BADF)
    }

    /// Takes all of them away.
    pub fn drain(&self) -> Vec<Arc<T>> {
        self.shards
            .iter()
            .flat_map(|shard| {
                shard
                    .lock()
                    .drain()
                    .map(|(_, handle)| handle)
                    .collect::<Vec<_>>()
            })
            .collect()
    }
}

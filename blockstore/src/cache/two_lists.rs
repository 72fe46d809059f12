//! Least recently used, in two lists: what comes in is on probation, and a second use protects it. Protected entries may fill three
//! quarters, and fall back on probation when they are more. So a scan, which uses each entry once, cannot drive out what is used
//! often.

use std::hash::Hash;

use lru::LruCache;

/// Entries whose cost is counted; whoever holds them bounds it by removing [`TwoLists::first_out`].
#[derive(Debug)]
pub(super) struct TwoLists<K: Hash + Eq, V> {
    probation: LruCache<K, V>,
    protected: LruCache<K, V>,
    probation_bytes: u64,
    protected_bytes: u64,
    protected_bytes_max: u64,
    cost: fn(&V) -> u64,
}

impl<K: Hash + Eq + Copy, V> TwoLists<K, V> {
    /// Empty lists for whoever keeps at most `bytes_max`, by `cost`.
    pub(super) fn new(bytes_max: u64, cost: fn(&V) -> u64) -> Self {
        Self {
            probation: LruCache::unbounded(),
            protected: LruCache::unbounded(),
            probation_bytes: 0,
            protected_bytes: 0,
            protected_bytes_max: bytes_max / 4 * 3,
            cost,
        }
    }

    /// What all entries cost together.
    pub(super) fn bytes(&self) -> u64 {
        self.probation_bytes + self.protected_bytes
    }

    /// Whether the entry is here; no use of it.
    pub(super) fn contains(&self, key: &K) -> bool {
        self.protected.contains(key) || self.probation.contains(key)
    }

    /// The entry, if it is here; counts as a use.
    pub(super) fn get(&mut self, key: &K) -> Option<&V> {
        if let Some(value) = self.probation.pop(key) {
            let cost = (self.cost)(&value);
            self.probation_bytes -= cost;
            self.protected_bytes += cost;
            self.protected.put(*key, value);
            while self.protected_bytes > self.protected_bytes_max
                && self.protected.len() > 1
                && let Some((key, value)) = self.protected.pop_lru()
            {
                let cost = (self.cost)(&value);
                self.protected_bytes -= cost;
                self.probation_bytes += cost;
                self.probation.put(key, value);
            }
        }
        self.protected.get(key)
    }

    /// Adds an entry, or replaces its value where it is.
    pub(super) fn insert(&mut self, key: K, value: V) {
        let cost = (self.cost)(&value);
        let (list, bytes) = match self.protected.contains(&key) {
            true => (&mut self.protected, &mut self.protected_bytes),
            false => (&mut self.probation, &mut self.probation_bytes),
        };
        *bytes += cost;
        if let Some(old) = list.put(key, value) {
            *bytes -= (self.cost)(&old);
        }
    }

    /// Takes an entry out.
    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        if let Some(value) = self.probation.pop(key) {
            self.probation_bytes -= (self.cost)(&value);
            return Some(value);
        }
        let value = self.protected.pop(key)?;
        self.protected_bytes -= (self.cost)(&value);
        Some(value)
    }

    /// What is to go first when there is no room.
    pub(super) fn first_out(&self) -> Option<K> {
        let oldest = self.probation.peek_lru().map(|(key, _)| *key);
        oldest.or_else(|| self.protected.peek_lru().map(|(key, _)| *key))
    }
}

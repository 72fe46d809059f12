//! Reads of the replicated records.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use meta_core::{Corruption, View};
use rocksdb::{AsColumnFamilyRef, DB, DBAccess, ReadOptions, SnapshotWithThreadMode};

use super::halves::{self, Places};
use super::state::{Generation, REPLICATED};

fn failed(error: rocksdb::Error) -> Corruption {
    Corruption::Store(error.to_string())
}

/// The records as they are when each read is made. Keeps its state alive over a snapshot install.
#[derive(Clone)]
pub struct LiveView {
    pub(super) generation: Arc<Generation>,
    /// Of the task that applies, which may use [`super::emptied::Emptied`].
    pub(super) applies: bool,
}

/// A scan that takes this long walked over what was removed: worth remembering.
const LONG_SCAN: Duration = Duration::from_micros(200);

/// The records as they were at one moment.
pub struct SnapshotView<'a> {
    snapshot: SnapshotWithThreadMode<'a, DB>,
    db: &'a DB,
    /// Where the records were at that moment.
    places: Places,
}

impl<'a> SnapshotView<'a> {
    pub(super) fn new(generation: &'a Generation) -> Self {
        generation.halves.steady(|places| Self {
            snapshot: generation.db.snapshot(),
            db: &generation.db,
            places: places.clone(),
        })
    }
}

fn replicated(db: &DB) -> &impl AsColumnFamilyRef {
    db.cf_handle(REPLICATED)
        .expect("the column family is created when the state is opened")
}

fn bounded(from: &[u8], to: &[u8]) -> ReadOptions {
    let mut options = ReadOptions::default();
    options.set_iterate_lower_bound(from);
    options.set_iterate_upper_bound(to);
    options
}

/// From the one end of the options' bounds, or the other.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Ascending,
    Descending,
}

fn collect<D: DBAccess>(
    mut iterator: rocksdb::DBRawIteratorWithThreadMode<'_, D>,
    upper: bool,
    order: Order,
    records_max: usize,
) -> Result<Vec<(Bytes, Bytes)>, Corruption> {
    let mut found = Vec::new();
    match order {
        Order::Ascending => iterator.seek_to_first(),
        Order::Descending => iterator.seek_to_last(),
    }
    while found.len() < records_max
        && let Some((key, value)) = iterator.item()
    {
        let key = match upper {
            true => halves::lowered(key),
            false => Bytes::copy_from_slice(key),
        };
        found.push((key, Bytes::copy_from_slice(value)));
        if found.len() < records_max {
            match order {
                Order::Ascending => iterator.next(),
                Order::Descending => iterator.prev(),
            }
        }
    }
    iterator.status().map_err(failed)?;
    Ok(found)
}

impl LiveView {
    fn range(&self, from: &[u8], to: &[u8], order: Order, records_max: usize) -> Page {
        if from >= to || records_max == 0 {
            return Ok(Vec::new());
        }
        let db = &self.generation.db;
        self.generation.halves.steady(|places| {
            let (from, to, upper) = places.range(from, to);
            let iterator = db.raw_iterator_cf_opt(replicated(db), bounded(&from, &to));
            collect(iterator, upper, order, records_max)
        })
    }
}

impl SnapshotView<'_> {
    fn range(&self, from: &[u8], to: &[u8], order: Order, records_max: usize) -> Page {
        if from >= to || records_max == 0 {
            return Ok(Vec::new());
        }
        let (from, to, upper) = self.places.range(from, to);
        let iterator = self
            .snapshot
            .raw_iterator_cf_opt(replicated(self.db), bounded(&from, &to));
        collect(iterator, upper, order, records_max)
    }
}

type Page = Result<Vec<(Bytes, Bytes)>, Corruption>;

impl View for LiveView {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Corruption> {
        let db = &self.generation.db;
        let read = |places: &Places| db.get_pinned_cf(replicated(db), places.of(key));
        let value = self.generation.halves.steady(read).map_err(failed)?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn scan(&self, from: &[u8], to: &[u8], records_max: usize) -> Page {
        if !self.applies || records_max == 0 {
            return self.range(from, to, Order::Ascending, records_max);
        }
        let skip = self.generation.emptied.lock().skip(from);
        let start = skip.as_deref().unwrap_or(from);
        let began = Instant::now();
        let page = self.range(start, to, Order::Ascending, records_max)?;
        if began.elapsed() > LONG_SCAN {
            let first = page.first().map_or(to, |(key, _)| &key[..]);
            if from < first {
                let first = Bytes::copy_from_slice(first);
                self.generation.emptied.lock().learn(from, first);
            }
        }
        Ok(page)
    }

    fn scan_back(&self, from: &[u8], to: &[u8], records_max: usize) -> Page {
        self.range(from, to, Order::Descending, records_max)
    }
}

impl View for SnapshotView<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Corruption> {
        let value = self
            .snapshot
            .get_pinned_cf(replicated(self.db), self.places.of(key))
            .map_err(failed)?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn scan(&self, from: &[u8], to: &[u8], records_max: usize) -> Page {
        self.range(from, to, Order::Ascending, records_max)
    }

    fn scan_back(&self, from: &[u8], to: &[u8], records_max: usize) -> Page {
        self.range(from, to, Order::Descending, records_max)
    }
}

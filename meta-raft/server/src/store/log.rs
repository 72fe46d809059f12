//! The log: entries, vote, commit index, identity. Recent entries are in memory, so that replication and apply read no disk.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;

use bytes::Bytes;
use heliofs_proto::ids::NodeId;
use heliofs_proto::v1;
use openraft::storage::IOFlushed;
use parking_lot::Mutex;
use prost::Message;
use rocksdb::{
    DB, DBCompressionType, DBRecoveryMode, Direction, IteratorMode, Options, ReadOptions,
};
use tokio::sync::oneshot;

use super::identity::Identity;
use super::writer::{Job, Writer};
use super::{OpenError, io_error};
use crate::raft::types::{Entry, LogId, TypeConfig, Vote};
use crate::raft::wire::{entry_from_wire, log_id_from_wire, vote_from_wire};

pub(super) const VOTE: &[u8] = b"vote";
pub(super) const COMMITTED: &[u8] = b"committed";
pub(super) const PURGED: &[u8] = b"purged";
/// Index of the first entry ever, unless it is 0.
pub(super) const START: &[u8] = b"start";
const IDENTITY: &[u8] = b"identity";
/// Entries are `e` and the index, big endian.
const ENTRY: u8 = b'e';
const ENTRIES_END: &[u8] = b"f";

pub(super) fn entry_key(index: u64) -> [u8; 9] {
    let mut key = [ENTRY; 9];
    key[1..].copy_from_slice(&index.to_be_bytes());
    key
}

/// The end of the log, in memory. `entries` is consecutive and ends at `last`; what is not on disk yet is never dropped.
pub(super) struct Tail {
    entries: VecDeque<Entry>,
    bytes: usize,
    bytes_max: usize,
    /// Entries up to here are on disk.
    persisted: Option<u64>,
    /// Index of the first entry ever: 0, except in logs that openraft's suite makes.
    start: u64,
    last: Option<LogId>,
    purged: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
}

fn entry_bytes(entry: &Entry) -> usize {
    // An entry's own fields and allocations come on top of its data.
    const OVERHEAD: usize = 256;
    match &entry.payload {
        // Decoded and encoded form.
        openraft::EntryPayload::Normal(data) => OVERHEAD + 3 * data.bytes().len(),
        openraft::EntryPayload::Blank | openraft::EntryPayload::Membership(_) => OVERHEAD,
    }
}

/// About what an entry takes on disk.
fn stored_bytes(entry: &Entry) -> u64 {
    const OVERHEAD: u64 = 48;
    match &entry.payload {
        openraft::EntryPayload::Normal(data) => OVERHEAD + data.bytes().len() as u64,
        openraft::EntryPayload::Blank | openraft::EntryPayload::Membership(_) => OVERHEAD,
    }
}

impl Tail {
    pub(super) fn persisted(&mut self, index: u64) {
        self.persisted = self.persisted.max(Some(index));
    }

    pub(super) fn persisted_truncated(&mut self, keep: Option<u64>) {
        self.persisted = self.persisted.min(keep);
    }

    pub(super) fn evict(&mut self) {
        while self.bytes > self.bytes_max
            && let Some(first) = self.entries.front()
            && Some(first.log_id.index) <= self.persisted
        {
            self.pop_front();
        }
    }

    fn pop_front(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            self.bytes -= entry_bytes(&entry);
        }
    }

    fn push(&mut self, entry: Entry) {
        debug_assert!(
            self.last
                .is_none_or(|last| last.index + 1 == entry.log_id.index),
            "a hole after {:?}",
            self.last
        );
        self.last = Some(entry.log_id);
        self.bytes += entry_bytes(&entry);
        self.entries.push_back(entry);
    }

    fn truncate(&mut self, keep: Option<LogId>) {
        while let Some(entry) = self.entries.back()
            && Some(entry.log_id.index) > keep.map(|keep| keep.index)
        {
            self.bytes -= entry_bytes(entry);
            self.entries.pop_back();
        }
        // A truncation beyond the end changes nothing.
        self.last = self.last.min(keep);
    }

    /// Index of the first entry, if there is one.
    fn first(&self) -> u64 {
        self.purged.map_or(self.start, |purged| purged.index + 1)
    }

    fn first_in_memory(&self) -> u64 {
        match (self.entries.front(), self.last) {
            (Some(entry), _) => entry.log_id.index,
            (None, Some(last)) => last.index + 1,
            (None, None) => 0,
        }
    }

    fn slice(&self, from: u64, to: u64) -> impl Iterator<Item = &Entry> {
        let first = self.first_in_memory();
        let begin = usize::try_from(from.saturating_sub(first)).unwrap_or(usize::MAX);
        let count = usize::try_from(to.saturating_sub(from.max(first))).unwrap_or(usize::MAX);
        self.entries.iter().skip(begin).take(count)
    }
}

pub(super) struct Shared {
    pub tail: Mutex<Tail>,
}

struct Inner {
    db: Arc<DB>,
    shared: Arc<Shared>,
    /// Taken when the log is dropped, which ends the writer.
    jobs: Option<Sender<Job>>,
    identity: Identity,
    appended_bytes: AtomicU64,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.get_mut().take()
            && thread.join().is_err()
        {
            tracing::error!("the log's writer panicked");
        }
    }
}

/// The log of one node; cheap to clone.
#[derive(Clone)]
pub struct LogStore {
    inner: Arc<Inner>,
}

fn options(create: bool) -> Options {
    let mut options = Options::default();
    options.create_if_missing(create);
    // A record that was being written when the power went may be cut; anything else is damage and must not be skipped.
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_write_buffer_size(32 << 20);
    options.set_max_write_buffer_number(2);
    options.set_max_total_wal_size(128 << 20);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_max_background_jobs(2);
    options.set_keep_log_file_num(2);
    options.set_max_open_files(64);
    options
}

fn read_all() -> ReadOptions {
    let mut options = ReadOptions::default();
    options.fill_cache(false);
    options.set_verify_checksums(true);
    options.set_iterate_upper_bound(ENTRIES_END);
    options
}

fn decode_entry(value: &[u8]) -> Result<Entry, String> {
    let (crc, message) = value
        .split_first_chunk::<4>()
        .ok_or_else(|| "shorter than its checksum".to_owned())?;
    if crc32fast::hash(message) != u32::from_le_bytes(*crc) {
        return Err("checksum mismatch".to_owned());
    }
    let message = v1::RaftEntry::decode(Bytes::copy_from_slice(message))
        .map_err(|error| error.to_string())?;
    entry_from_wire(message).map_err(|error| error.to_string())
}

impl LogStore {
    /// Opens the log below `data_dir`, or makes one if the directory never had any, and checks every entry.
    ///
    /// `state_exists`: the directory holds a state, so there must be a log.
    pub fn open(
        data_dir: &Path,
        node: NodeId,
        cache_bytes: usize,
        state_exists: bool,
    ) -> Result<Self, OpenError> {
        std::fs::create_dir_all(data_dir).map_err(OpenError::io("create the data directory"))?;
        let known = Identity::read(data_dir)?;
        if let Some(known) = known {
            known.check(node)?;
        }
        let path = data_dir.join("log");
        let must_exist = known.is_some() || state_exists;
        if must_exist && !path.join("CURRENT").exists() {
            return Err(OpenError::Damaged("it is missing".to_owned()));
        }
        let db = DB::open(&options(!must_exist), &path).map_err(|error| match error.kind() {
            rocksdb::ErrorKind::Corruption => OpenError::Damaged(error.to_string()),
            _ if must_exist && !is_environment(&error) => OpenError::Damaged(error.to_string()),
            _ => OpenError::Io {
                what: "open the log".to_owned(),
                source: io_error(error),
            },
        })?;
        let identity = match get(&db, IDENTITY)? {
            Some(bytes) => Identity::decode(&bytes)?,
            None if must_exist => {
                return Err(OpenError::Damaged("it has lost its identity".to_owned()));
            }
            None => {
                let identity = Identity::fresh(node);
                let mut sync = rocksdb::WriteOptions::default();
                sync.set_sync(true);
                db.put_opt(IDENTITY, identity.encode(), &sync)
                    .map_err(|error| OpenError::io("write the identity")(io_error(error)))?;
                super::identity::sync_directory(data_dir)
                    .map_err(OpenError::io("sync the data directory"))?;
                identity
            }
        };
        identity.check(node)?;
        match known {
            None => identity.write(data_dir)?,
            Some(known) if known.store != identity.store => {
                return Err(OpenError::Damaged("it belongs to another disk".to_owned()));
            }
            Some(_) => {}
        }
        let (tail, bytes) = load(&db, cache_bytes)?;
        Self::start(db, tail, bytes, identity)
    }

    fn start(db: DB, tail: Tail, bytes: u64, identity: Identity) -> Result<Self, OpenError> {
        let db = Arc::new(db);
        let shared = Arc::new(Shared {
            tail: Mutex::new(tail),
        });
        let (jobs, receiver) = std::sync::mpsc::channel();
        let writer = Writer {
            db: db.clone(),
            shared: shared.clone(),
            jobs: receiver,
        };
        let thread = std::thread::Builder::new()
            .name(format!("log-{}", identity.node))
            .spawn(move || writer.run())
            .map_err(OpenError::io("start the log's writer"))?;
        Ok(Self {
            inner: Arc::new(Inner {
                db,
                shared,
                jobs: Some(jobs),
                identity,
                appended_bytes: AtomicU64::new(bytes),
                thread: Mutex::new(Some(thread)),
            }),
        })
    }

    /// Which node and disk this is.
    pub fn identity(&self) -> Identity {
        self.inner.identity
    }

    /// The last entry that was removed from the front.
    pub fn purged(&self) -> Option<LogId> {
        self.inner.shared.tail.lock().purged
    }

    /// The last entry, or the last that was removed if there is none.
    pub fn last(&self) -> Option<LogId> {
        self.inner.shared.tail.lock().last
    }

    /// The last vote given.
    pub fn vote(&self) -> Option<Vote> {
        self.inner.shared.tail.lock().vote
    }

    /// The commit index as last saved; lags a little behind.
    pub fn committed(&self) -> Option<LogId> {
        self.inner.shared.tail.lock().committed
    }

    /// Bytes of all entries, about.
    pub fn bytes(&self) -> u64 {
        self.inner.appended_bytes.load(Ordering::Relaxed)
    }

    fn job(&self, job: Job) -> std::io::Result<()> {
        let stopped = || std::io::Error::other("the log's writer has stopped");
        let jobs = self.inner.jobs.as_ref().ok_or_else(stopped)?;
        jobs.send(job).map_err(|_| stopped())
    }

    async fn done(
        &self,
        job: impl FnOnce(oneshot::Sender<std::io::Result<()>>) -> Job,
    ) -> std::io::Result<()> {
        let (done, wait) = oneshot::channel();
        self.job(job(done))?;
        wait.await
            .map_err(|_| std::io::Error::other("the log's writer has stopped"))?
    }

    /// Appends consecutive entries: readable at once, `flushed` is called when they are on disk.
    pub fn append(
        &self,
        entries: Vec<Entry>,
        flushed: IOFlushed<TypeConfig>,
    ) -> std::io::Result<()> {
        let bytes: u64 = entries.iter().map(stored_bytes).sum();
        self.inner
            .appended_bytes
            .fetch_add(bytes, Ordering::Relaxed);
        let start = {
            let mut tail = self.inner.shared.tail.lock();
            let first = entries.first().map(|entry| entry.log_id.index);
            let start = first.filter(|first| tail.last.is_none() && *first != tail.start);
            tail.start = start.unwrap_or(tail.start);
            for entry in &entries {
                tail.push(entry.clone());
            }
            start
        };
        self.job(Job::Append {
            entries,
            start,
            flushed,
        })
    }

    /// Gives a vote; durable on return.
    pub async fn save_vote(&self, vote: Vote) -> std::io::Result<()> {
        self.done(|done| Job::Vote(vote, done)).await?;
        self.inner.shared.tail.lock().vote = Some(vote);
        Ok(())
    }

    /// Remembers the commit index, at the next append or soon.
    pub fn save_committed(&self, committed: Option<LogId>) -> std::io::Result<()> {
        self.inner.shared.tail.lock().committed = committed;
        self.job(Job::Committed(committed))
    }

    /// Removes all entries after `keep`; durable on return.
    pub async fn truncate_after(&self, keep: Option<LogId>) -> std::io::Result<()> {
        let last = {
            let mut tail = self.inner.shared.tail.lock();
            let last = tail.last;
            tail.truncate(keep);
            last
        };
        let Some(last) = last else {
            return Ok(());
        };
        self.done(|done| Job::Truncate {
            keep: keep.map(|keep| keep.index),
            last: last.index,
            done,
        })
        .await
    }

    /// Removes all entries up to `upto`; durable on return. `upto` may lie beyond the last entry (after a snapshot).
    pub async fn purge(&self, upto: LogId) -> std::io::Result<()> {
        {
            let mut tail = self.inner.shared.tail.lock();
            let first = tail.first();
            let end = tail.last.map_or(0, |last| last.index + 1);
            // The entries that go are taken to be as large as the others.
            let before = end.saturating_sub(first).max(1);
            let after = end.saturating_sub(upto.index + 1);
            let bytes = u128::from(self.bytes()) * u128::from(after) / u128::from(before);
            self.inner
                .appended_bytes
                .store(u64::try_from(bytes).unwrap_or(u64::MAX), Ordering::Relaxed);
            while let Some(entry) = tail.entries.front()
                && entry.log_id.index <= upto.index
            {
                tail.pop_front();
            }
            tail.purged = tail.purged.max(Some(upto));
            tail.last = tail.last.max(Some(upto));
            tail.persisted = tail.persisted.max(Some(upto.index));
        }
        self.done(|done| Job::Purge { upto, done }).await?;
        Ok(())
    }

    /// Consecutive entries with `from <= index < to`, as many as fit into `bytes_max` and at least one if `from` exists.
    /// Entries that are purged or not yet appended are left out.
    pub async fn read(&self, from: u64, to: u64, bytes_max: usize) -> std::io::Result<Vec<Entry>> {
        let (from, disk_to) = {
            let tail = self.inner.shared.tail.lock();
            let from = from.max(tail.first());
            let to = to.min(tail.last.map_or(0, |last| last.index + 1));
            if from >= to {
                return Ok(Vec::new());
            }
            let first = tail.first_in_memory();
            if from >= first {
                let mut bytes = 0;
                let entries = tail.slice(from, to).take_while(|entry| {
                    let before = bytes;
                    bytes += entry_bytes(entry);
                    before == 0 || bytes <= bytes_max
                });
                return Ok(entries.cloned().collect());
            }
            (from, to.min(first))
        };
        let db = self.inner.db.clone();
        tokio::task::spawn_blocking(move || read_disk(&db, from, disk_to, bytes_max))
            .await
            .map_err(std::io::Error::other)?
    }

    /// All entries with `from <= index < to` that exist.
    pub async fn read_all(&self, from: u64, to: u64) -> std::io::Result<Vec<Entry>> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut next = from;
        while next < to {
            let page = self.read(next, to, usize::MAX).await?;
            let Some(last) = page.last() else {
                break;
            };
            next = last.log_id.index + 1;
            entries.extend(page);
        }
        Ok(entries)
    }

    /// Writes what waits and ends the writer; later writes fail.
    pub async fn stop(&self) -> std::io::Result<()> {
        let Some(thread) = self.inner.thread.lock().take() else {
            return Ok(());
        };
        let result = self.done(Job::Stop).await;
        tokio::task::spawn_blocking(move || thread.join())
            .await
            .map_err(std::io::Error::other)?
            .map_err(|_| std::io::Error::other("the log's writer panicked"))?;
        result
    }
}

/// Not the files' fault: permissions, another process, no space.
fn is_environment(error: &rocksdb::Error) -> bool {
    let text = error.to_string();
    matches!(error.kind(), rocksdb::ErrorKind::Busy)
        || text.contains("lock")
        || text.contains("No space")
        || text.contains("Permission denied")
}

fn get(db: &DB, key: &[u8]) -> Result<Option<Vec<u8>>, OpenError> {
    db.get(key)
        .map_err(|error| OpenError::Damaged(error.to_string()))
}

fn log_id(db: &DB, key: &'static [u8]) -> Result<Option<LogId>, OpenError> {
    let decode = |bytes: Vec<u8>| {
        v1::RaftLogId::decode(bytes.as_slice())
            .map(log_id_from_wire)
            .map_err(|error| OpenError::Damaged(error.to_string()))
    };
    get(db, key)?.map(decode).transpose()
}

/// Reads and checks the whole log; keeps its end in memory.
fn load(db: &DB, cache_bytes: usize) -> Result<(Tail, u64), OpenError> {
    let vote = match get(db, VOTE)? {
        None => None,
        Some(bytes) => {
            let damaged = |error: String| OpenError::Damaged(format!("the vote: {error}"));
            let vote = v1::RaftVote::decode(bytes.as_slice())
                .map_err(|error| damaged(error.to_string()))?;
            Some(vote_from_wire(Some(vote)).map_err(|error| damaged(error.to_string()))?)
        }
    };
    let purged = log_id(db, PURGED)?;
    let committed = log_id(db, COMMITTED)?;
    let start = match get(db, START)? {
        None => 0,
        Some(bytes) => {
            let bytes = bytes.as_slice().try_into();
            let bad = |error| OpenError::Damaged(format!("the first index: {error}"));
            u64::from_be_bytes(bytes.map_err(bad)?)
        }
    };
    let mut tail = Tail {
        entries: VecDeque::new(),
        bytes: 0,
        bytes_max: cache_bytes,
        persisted: purged.map(|purged| purged.index),
        start,
        last: purged,
        purged,
        vote,
        committed,
    };
    let mut total = 0;
    let mut expected = tail.first();
    let first = entry_key(expected);
    let mode = IteratorMode::From(&first, Direction::Forward);
    for item in db.iterator_opt(mode, read_all()) {
        let (key, value) = item.map_err(|error| OpenError::Damaged(error.to_string()))?;
        let index = key
            .get(1..)
            .and_then(|index| index.try_into().ok())
            .map(u64::from_be_bytes)
            .ok_or_else(|| OpenError::Damaged(format!("a key of {} bytes", key.len())))?;
        if index != expected {
            return Err(OpenError::Damaged(format!(
                "entry {expected} is missing, the next is {index}"
            )));
        }
        let entry = decode_entry(&value)
            .map_err(|why| OpenError::Damaged(format!("entry {index}: {why}")))?;
        if entry.log_id.index != index || tail.last.is_some_and(|last| last > entry.log_id) {
            return Err(OpenError::Damaged(format!(
                "entry {index} says {} after {:?}",
                entry.log_id, tail.last
            )));
        }
        total += stored_bytes(&entry);
        tail.push(entry);
        tail.persisted(index);
        tail.evict();
        expected = index + 1;
    }
    Ok((tail, total))
}

fn read_disk(db: &DB, from: u64, to: u64, bytes_max: usize) -> std::io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut bytes = 0;
    let key = entry_key(from);
    let mode = IteratorMode::From(&key, Direction::Forward);
    for (expected, item) in (from..to).zip(db.iterator_opt(mode, read_all())) {
        let (key, value) = item.map_err(io_error)?;
        if *key != entry_key(expected) {
            return Err(std::io::Error::other(format!(
                "log entry {expected} is missing"
            )));
        }
        let entry = decode_entry(&value)
            .map_err(|why| std::io::Error::other(format!("log entry {expected}: {why}")))?;
        bytes += entry_bytes(&entry);
        if !entries.is_empty() && bytes > bytes_max {
            break;
        }
        entries.push(entry);
    }
    Ok(entries)
}

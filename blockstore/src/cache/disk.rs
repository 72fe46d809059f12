//! The disk tier: an index in memory of run files, one thread that writes and evicts.
//!
//! The index is rebuilt from the file names at start, in the background. Readers verify; a file that fails is removed and its
//! pages come from the bucket. Only the writer thread adds and evicts, so budgets have one owner.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, TryLockError};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::SystemTime;

use bytes::Bytes;
use heliofs_proto::ids::{SegmentId, VolumeId};
use nix::sys::statvfs::statvfs;
use parking_lot::Mutex;

use super::disk_file::{self, Found, RunKey};
use super::two_lists::TwoLists;
use crate::metrics::Metrics;
use crate::segment::page::{Page, PageIdentity};
use crate::store::options::DiskCacheOptions;
use crate::{FrameNumber, StoreError};

/// Bytes that wait for the writer; what exceeds them is not cached. A slow disk must not cost memory or delay readers.
const PENDING_BYTES_MAX: u64 = 64 << 20;

/// Mounts that may share one cache directory.
const SLOTS_MAX: u32 = 64;

/// Files evicted at most per file written when the disk is short of space: the cache gives way, but not at a reader's cost.
const EVICTIONS_PER_WRITE_MAX: usize = 8;

/// The disk tier of one store.
#[derive(Debug)]
pub struct DiskTier {
    inner: Arc<Inner>,
    /// Taken when the tier is dropped, which ends the writer.
    jobs: Option<Sender<Job>>,
    writer: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    volume: VolumeId,
    options: DiskCacheOptions,
    index: Mutex<Index>,
    pending_bytes: AtomicU64,
    stopping: AtomicBool,
    /// Nothing could be written for lack of free space, the last time that it was tried.
    full: AtomicBool,
    metrics: Arc<Metrics>,
    /// Held as long as the slot is in use.
    _lock: File,
}

#[derive(Debug)]
struct Index {
    /// Runs by place; runs of one frame may overlap.
    runs: HashMap<SegmentId, BTreeMap<(FrameNumber, u32), u32>>,
    /// File lengths.
    files: TwoLists<RunKey, u64>,
    /// What the gauge, which tiers on several disks share, counts of them.
    shown_bytes: u64,
}

enum Job {
    Write {
        key: RunKey,
        origin: PageIdentity,
        raw: Bytes,
    },
    Forget(SegmentId),
    Flush(tokio::sync::oneshot::Sender<()>),
}

impl DiskTier {
    /// Opens or creates the cache of `volume` below the directory, in a slot of its own that a later start finds again.
    ///
    /// Errors: `Invalid` when the directory cannot be used.
    pub fn open(
        options: DiskCacheOptions,
        volume_name: &str,
        volume: VolumeId,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StoreError> {
        let invalid = |error: io::Error| {
            StoreError::Invalid(format!(
                "the cache directory `{}` cannot be used: {error}",
                options.directory.display()
            ))
        };
        let (directory, lock) = take_slot(&options.directory, volume_name).map_err(invalid)?;
        let inner = Arc::new(Inner {
            directory,
            volume,
            options: options.clone(),
            index: Mutex::new(Index {
                runs: HashMap::new(),
                files: TwoLists::new(options.bytes_max, |length| *length),
                shown_bytes: 0,
            }),
            pending_bytes: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            full: AtomicBool::new(false),
            metrics,
            _lock: lock,
        });
        let (jobs, queue) = channel();
        let writer = std::thread::Builder::new()
            .name("heliofs-cache".to_owned())
            .spawn({
                let inner = Arc::clone(&inner);
                move || inner.run(&queue)
            })
            .map_err(invalid)?;
        Ok(Self {
            inner,
            jobs: Some(jobs),
            writer: Some(writer),
        })
    }

    /// Those of `pages` that are here, verified; `None` for the others. Shape: one item per page, in order. Blocks on the disk.
    pub fn read(
        &self,
        segment: SegmentId,
        frame: FrameNumber,
        pages: Range<u32>,
    ) -> Vec<Option<Page>> {
        let mut found = vec![None; pages.len()];
        let mut page = pages.start;
        while page < pages.end {
            let Some(key) = self.inner.index.lock().find(segment, frame, page) else {
                page += 1;
                continue;
            };
            let part = page..pages.end.min(key.pages().end);
            match disk_file::read(&self.inner.directory, &key, self.inner.volume, part.clone()) {
                Found::Pages(read) => {
                    for (page, data) in part.clone().zip(read) {
                        found[(page - pages.start) as usize] = Some(data);
                    }
                }
                Found::Gone => self.inner.drop_run(&key),
                Found::Corrupt(detail) => {
                    tracing::warn!(?key, detail, "removed a corrupt cache file");
                    self.inner.metrics.corrupt_cache_files.inc();
                    self.inner.metrics.corrupt_pages.inc();
                    self.inner.drop_run(&key);
                    self.inner.remove_file(&key);
                }
            }
            page = part.end;
        }
        found
    }

    /// Whether any page of these may be here; cheap, so that a miss costs no thread.
    pub fn may_have(&self, segment: SegmentId, frame: FrameNumber, pages: Range<u32>) -> bool {
        let index = self.inner.index.lock();
        index.runs.contains_key(&segment)
            && pages
                .into_iter()
                .any(|page| index.peek(segment, frame, page).is_some())
    }

    /// Hands over pages `[first, first + count)` of a frame as they lie in the object; `origin` is the name in their headers.
    pub fn insert(
        &self,
        segment: SegmentId,
        frame: FrameNumber,
        first: u32,
        count: u32,
        origin: PageIdentity,
        raw: Bytes,
    ) {
        let bytes = raw.len() as u64;
        if self.inner.pending_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > PENDING_BYTES_MAX
        {
            self.inner.pending_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.inner.metrics.disk_writes_skipped.inc();
            return;
        }
        let key = RunKey {
            segment,
            frame,
            first,
            count,
        };
        self.send(Job::Write { key, origin, raw });
    }

    /// Removes what is cached of a deleted segment.
    pub fn forget(&self, segment: SegmentId) {
        self.send(Job::Forget(segment));
    }

    /// Waits until everything handed over before is written.
    pub async fn flush(&self) {
        let (done, waiting) = tokio::sync::oneshot::channel();
        self.send(Job::Flush(done));
        // An error means that the writer is gone, and with it everything that could be waited for.
        let _ended = waiting.await;
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs
            && jobs.send(job).is_err()
        {
            tracing::error!("the cache writer has died; the disk tier no longer fills");
        }
    }
}

impl Drop for DiskTier {
    fn drop(&mut self) {
        self.inner.stopping.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the cache writer panicked");
        }
    }
}

impl Index {
    fn show(&mut self, metrics: &Metrics) {
        let by = self.files.bytes() as i64 - self.shown_bytes as i64;
        self.shown_bytes = self.files.bytes();
        metrics.disk_bytes.add(by);
    }

    fn peek(&self, segment: SegmentId, frame: FrameNumber, page: u32) -> Option<RunKey> {
        let (&(found, first), &count) = self
            .runs
            .get(&segment)?
            .range(..=(frame, page))
            .next_back()?;
        (found == frame && page < first + count).then_some(RunKey {
            segment,
            frame,
            first,
            count,
        })
    }

    fn find(&mut self, segment: SegmentId, frame: FrameNumber, page: u32) -> Option<RunKey> {
        let key = self.peek(segment, frame, page)?;
        self.files.get(&key);
        Some(key)
    }

    fn add(&mut self, key: RunKey, length: u64) -> Option<RunKey> {
        let runs = self.runs.entry(key.segment).or_default();
        let replaced = runs
            .insert((key.frame, key.first), key.count)
            .filter(|old| *old != key.count);
        self.files.insert(key, length);
        // A run of another length from the same page: its file has another name and would be forgotten.
        replaced.map(|count| RunKey { count, ..key })
    }

    fn remove(&mut self, key: &RunKey) {
        self.files.remove(key);
        if let Some(runs) = self.runs.get_mut(&key.segment) {
            if runs.get(&(key.frame, key.first)) == Some(&key.count) {
                runs.remove(&(key.frame, key.first));
            }
            if runs.is_empty() {
                self.runs.remove(&key.segment);
            }
        }
    }
}

impl Inner {
    fn run(&self, queue: &Receiver<Job>) {
        if let Err(error) = self.scan() {
            tracing::warn!(directory = %self.directory.display(), %error, "the disk cache begins empty");
        }
        self.evict();
        while let Ok(job) = queue.recv() {
            if self.stopping.load(Ordering::Relaxed) {
                return;
            }
            match job {
                Job::Write { key, origin, raw } => {
                    self.write(&key, &origin, &raw);
                    self.pending_bytes
                        .fetch_sub(raw.len() as u64, Ordering::Relaxed);
                }
                Job::Forget(segment) => {
                    let runs = self
                        .index
                        .lock()
                        .runs
                        .get(&segment)
                        .cloned()
                        .unwrap_or_default();
                    for ((frame, first), count) in runs {
                        let key = RunKey {
                            segment,
                            frame,
                            first,
                            count,
                        };
                        self.drop_run(&key);
                        self.remove_file(&key);
                    }
                }
                Job::Flush(done) => {
                    // Whoever waited may have given up.
                    let _gone = done.send(());
                }
            }
        }
    }

    fn write(&self, key: &RunKey, origin: &PageIdentity, raw: &Bytes) {
        let covered = |run: RunKey| run.pages().end >= key.pages().end;
        if self
            .index
            .lock()
            .peek(key.segment, key.frame, key.first)
            .is_some_and(covered)
        {
            return;
        }
        for _ in 0..EVICTIONS_PER_WRITE_MAX {
            if self.space_left() {
                break;
            }
            if !self.evict_one() {
                self.metrics.disk_writes_skipped.inc();
                self.show_full(true);
                return;
            }
        }
        self.show_full(false);
        match disk_file::write(&self.directory, key, origin, raw) {
            Ok(length) => {
                let replaced = self.index.lock().add(*key, length);
                if let Some(replaced) = replaced {
                    self.drop_run(&replaced);
                    self.remove_file(&replaced);
                }
            }
            Err(error) => {
                tracing::warn!(?key, %error, "cannot write to the disk cache");
                self.metrics.disk_writes_skipped.inc();
            }
        }
        self.evict();
    }

    fn evict(&self) {
        while self.index.lock().files.bytes() > self.options.bytes_max && self.evict_one() {}
        self.index.lock().show(&self.metrics);
    }

    fn evict_one(&self) -> bool {
        let oldest = self.index.lock().files.first_out();
        let Some(key) = oldest else {
            return false;
        };
        self.drop_run(&key);
        self.remove_file(&key);
        true
    }

    fn drop_run(&self, key: &RunKey) {
        let mut index = self.index.lock();
        index.remove(key);
        index.show(&self.metrics);
    }

    fn remove_file(&self, key: &RunKey) {
        let path = key.path(&self.directory);
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove a cache file");
        }
    }

    /// Whether the file system has as much free space as the settings ask for. An unknown answer is no reason to stop.
    fn space_left(&self) -> bool {
        match statvfs(&self.directory) {
            Ok(stat) if stat.blocks() > 0 => {
                stat.blocks_available() as f64 / stat.blocks() as f64
                    >= self.options.free_space_ratio
            }
            _ => true,
        }
    }

    /// Says so when the disk has become too full for the cache, and when it is no more.
    fn show_full(&self, full: bool) {
        if self.full.swap(full, Ordering::Relaxed) == full {
            return;
        }
        let directory = self.directory.display();
        if full {
            self.metrics.disk_caches_full.inc();
            let ratio = self.options.free_space_ratio;
            tracing::warn!(%directory, free_space_ratio = ratio, "the disk is too full: nothing is cached on it");
        } else {
            self.metrics.disk_caches_full.dec();
            tracing::info!(%directory, "the disk has room again for the cache");
        }
    }

    /// Finds the files of an earlier run, oldest first, and removes what it left half written.
    fn scan(&self) -> io::Result<()> {
        let mut found: Vec<(SystemTime, RunKey, u64)> = Vec::new();
        for group in std::fs::read_dir(&self.directory)? {
            let group = group?;
            if !group.file_type()?.is_dir() {
                continue;
            }
            for file in std::fs::read_dir(group.path())? {
                if self.stopping.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let file = file?;
                let name = file.file_name();
                let Some(name) = name.to_str() else { continue };
                if name.ends_with(".tmp") {
                    std::fs::remove_file(file.path())?;
                } else if let Some(key) = RunKey::parse(name) {
                    let stat = file.metadata()?;
                    found.push((
                        stat.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                        key,
                        stat.len(),
                    ));
                }
            }
        }
        found.sort_unstable_by_key(|(modified, key, _)| (*modified, *key));
        for (_, key, length) in found {
            let replaced = self.index.lock().add(key, length);
            if let Some(replaced) = replaced {
                self.drop_run(&replaced);
                self.remove_file(&replaced);
            }
        }
        Ok(())
    }
}

/// The first free slot below `directory`, created if need be, and the lock that keeps it ours.
fn take_slot(directory: &Path, volume_name: &str) -> io::Result<(PathBuf, File)> {
    for slot in 0..SLOTS_MAX {
        let path = directory.join(format!("{volume_name}.{slot}"));
        std::fs::create_dir_all(&path)?;
        let lock = File::create(path.join("lock"))?;
        match lock.try_lock() {
            Ok(()) => return Ok((path, lock)),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Err(io::Error::other(format!(
        "all {SLOTS_MAX} slots of volume {volume_name} are in use"
    )))
}

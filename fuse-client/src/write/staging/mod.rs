//! The staging folder of a mount with writeback: what fsync confirmed and the bucket doesn't have yet.
//!
//! - this file: [`Staging`], the folder: written, read, emptied; one mount at a time
//! - [`record`]: one file's data, as it is staged
//! - [`look`]: what is in a folder, for whoever does not mount it
//! - [`notes`]: where commits of this folder's data have put what
//!
//! A record is on disk (file and directory synced) before anybody is told so, and goes once its bytes are committed, or
//! overwritten by bytes that are committed or in a later record. Of one inode records go in the order in which they came: were
//! an earlier one left behind alone, a crash would bring its bytes back over newer ones.

pub mod look;
pub mod notes;
pub mod record;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use blockstore::{EncodedSegment, SegmentStore, StoreError};
use bytes::{Bytes, BytesMut};
use heliofs_proto::ids::SegmentId;
use nix::sys::statvfs::statvfs;
use parking_lot::Mutex;

use notes::Notes;
pub use notes::Place;
pub use record::StagedRecord;
use record::{Frames, Header};

/// Data per frame of a record: what a small read of staged bytes loads.
pub const FRAME_BYTES: usize = 256 << 10;

/// Data in one record, bytes, but for its last piece: what resuming holds in memory.
pub const RECORD_BYTES_MAX: u64 = 32 << 20;

/// A look at who uses a folder is over by then.
const LOOK_LASTS: Duration = Duration::from_secs(1);

/// Left free on the disk in any case.
const FREE_BYTES_MIN: u64 = 64 << 20;

/// Records of a file that can't be read back, or that others have changed since.
const ASIDE: &str = "conflicts";

/// Notes beyond which those of files that have nothing staged any more are dropped.
const NOTES_MAX: usize = 1 << 16;

/// How a record's file is named.
const EXTENSION: &str = "staged";

/// How a staging folder is used.
#[derive(Clone, Debug)]
pub struct StagingOptions {
    /// Created if missing.
    pub directory: PathBuf,
    /// Stage what is written. Otherwise only what an earlier mount has left is stored.
    pub active: bool,
    /// Staging stops when less than this part of the file system is free, 0.0..=1.0.
    pub free_ratio: f64,
    /// Staged data is uploaded after this time at the latest, if nobody asks for it earlier.
    pub upload_delay: Duration,
    /// Longest that another mount waits for a file with staged data while the bucket takes nothing of this mount. Who waits gets an
    /// error before, and may try again.
    pub recall_wait: Duration,
}

/// Why a staging folder can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    /// Another mount uses it.
    #[error("the staging folder {} is used by another mount", .0.display())]
    Taken(PathBuf),
    /// The file system says no.
    #[error("the staging folder {} cannot be used: {error}", .directory.display())]
    Io {
        /// Where.
        directory: PathBuf,
        /// What it said.
        error: io::Error,
    },
}

/// A record in the folder.
#[derive(Debug)]
struct Listed {
    /// Unknown of those that an earlier mount has left, until they are read.
    ino: u64,
    /// On disk.
    bytes: u64,
    since: SystemTime,
}

/// See the module.
#[derive(Debug)]
pub struct Staging {
    options: StagingOptions,
    /// Held as long as the folder is in use.
    _lock: File,
    next: AtomicU64,
    records: Mutex<BTreeMap<u64, Listed>>,
    /// What they take.
    bytes: AtomicU64,
    notes: Mutex<Notes>,
    /// The last attempt to stage something failed, or found no room.
    refuses: AtomicBool,
}

/// A folder that was taken, and the records that were in it.
pub type Opened = (Arc<Staging>, Vec<PathBuf>);

/// Takes the lock of a folder. `heliofs staging` holds it for a moment to see whether anybody does.
fn locked(lock: &File) -> Result<(), TryLockError> {
    let until = Instant::now() + LOOK_LASTS;
    loop {
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(LOOK_LASTS / 20);
            }
            taken => return taken,
        }
    }
}

impl Staging {
    /// Takes the folder, and lists the records that are in it, in the order in which they were staged. `None` when it is not to
    /// be used actively and is missing, empty or in use.
    pub fn open(options: StagingOptions) -> Result<Option<Opened>, StagingError> {
        let directory = options.directory.clone();
        let failed = |error: io::Error| StagingError::Io {
            directory: directory.clone(),
            error,
        };
        if !options.active && !directory.exists() {
            return Ok(None);
        }
        fs::create_dir_all(&directory).map_err(failed)?;
        // Their names must outlive a power failure as what is in them does.
        for above in directory
            .ancestors()
            .take(3)
            .filter(|it| !it.as_os_str().is_empty())
        {
            File::open(above)
                .and_then(|it| it.sync_all())
                .map_err(failed)?;
        }
        let lock = File::create(directory.join("lock")).map_err(failed)?;
        match locked(&lock) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if !options.active => return Ok(None),
            Err(TryLockError::WouldBlock) => return Err(StagingError::Taken(directory)),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let mut found = BTreeMap::new();
        // Numbers of records that were put aside aren't given again either.
        let mut last = 0;
        for name in names(&directory.join(ASIDE)).map_err(failed)? {
            last = last.max(number_of(&name).unwrap_or(0));
        }
        for name in names(&directory).map_err(failed)? {
            if name.ends_with(".part") {
                fs::remove_file(directory.join(&name)).map_err(failed)?;
            } else if let Some(number) = number_of(&name) {
                found.insert(number, directory.join(&name));
                last = last.max(number);
            }
        }
        if !options.active && found.is_empty() {
            return Ok(None);
        }
        let mut records = BTreeMap::new();
        for (number, path) in &found {
            let stat = fs::metadata(path).map_err(failed)?;
            let since = stat.modified().unwrap_or_else(|_| SystemTime::now());
            let listed = Listed {
                ino: 0,
                bytes: stat.len(),
                since,
            };
            records.insert(*number, listed);
        }
        let notes = Notes::open(&directory.join("notes"), found.is_empty()).map_err(failed)?;
        let staging = Self {
            options,
            _lock: lock,
            next: AtomicU64::new(last + 1),
            bytes: AtomicU64::new(records.values().map(|listed| listed.bytes).sum()),
            records: Mutex::new(records),
            notes: Mutex::new(notes),
            refuses: AtomicBool::new(false),
        };
        Ok(Some((Arc::new(staging), found.into_values().collect())))
    }

    /// Whether what is written is to be staged.
    pub fn is_active(&self) -> bool {
        self.options.active
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.options.directory
    }

    /// See [`StagingOptions::upload_delay`].
    pub fn upload_delay(&self) -> Duration {
        self.options.upload_delay
    }

    /// Whether the last attempt to stage something failed.
    pub fn refuses(&self) -> bool {
        self.refuses.load(Ordering::Relaxed)
    }

    /// A record to be written.
    pub fn begin(&self, ino: u64) -> Arc<StagedRecord> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self
            .options
            .directory
            .join(format!("{number:016x}.{EXTENSION}"));
        Arc::new(StagedRecord::new(number, ino, path))
    }

    /// Writes a record; durable once it returns `Ok`. Blocks.
    pub fn write(
        &self,
        record: &StagedRecord,
        header: &Header,
        segment: &EncodedSegment,
    ) -> io::Result<()> {
        let written = self.try_write(record, header, segment);
        self.refuses.store(written.is_err(), Ordering::Relaxed);
        written
    }

    fn try_write(
        &self,
        record: &StagedRecord,
        header: &Header,
        segment: &EncodedSegment,
    ) -> io::Result<()> {
        let head = header.encode();
        let bytes = head.len() as u64 + segment.length;
        if !self.has_room(bytes)? {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        let part = record.path().with_extension("part");
        let write = || {
            let mut file = io::BufWriter::with_capacity(1 << 20, File::create(&part)?);
            file.write_all(&head)?;
            for chunk in &segment.chunks {
                file.write_all(chunk)?;
            }
            file.into_inner()
                .map_err(io::IntoInnerError::into_error)?
                .sync_all()?;
            fs::rename(&part, record.path())?;
            // The name is to survive a power failure, too.
            File::open(&self.options.directory)?.sync_all()
        };
        if let Err(error) = write() {
            for path in [part.as_path(), record.path()] {
                if let Err(left) = fs::remove_file(path)
                    && left.kind() != io::ErrorKind::NotFound
                {
                    tracing::warn!(path = %path.display(), error = %left, "not removed");
                }
            }
            return Err(error);
        }
        let listed = Listed {
            ino: record.ino(),
            bytes,
            since: SystemTime::now(),
        };
        self.records.lock().insert(record.number(), listed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        record.written(Frames {
            base: head.len() as u64,
            entries: segment.frames.clone(),
        });
        Ok(())
    }

    fn has_room(&self, bytes: u64) -> io::Result<bool> {
        let stat = statvfs(&self.options.directory)?;
        let block = stat.fragment_size();
        let free = stat.blocks_available() * block;
        let reserve = (stat.blocks() * block) as f64 * self.options.free_ratio;
        Ok(free >= bytes + FREE_BYTES_MIN.max(reserve as u64))
    }

    /// Reads a record that an earlier mount has left, and checks every byte of it. Blocks.
    pub fn read(
        &self,
        path: &Path,
        store: &SegmentStore,
    ) -> Result<(Header, Arc<StagedRecord>), String> {
        let (header, record) = read_record(path, store)?;
        if let Some(listed) = self.records.lock().get_mut(&record.number()) {
            listed.ino = header.ino;
        }
        Ok((header, Arc::new(record)))
    }

    /// Bytes `[offset, offset + length)` of a record's data, verified. Blocks.
    ///
    /// Errors: `NotFound`, when the record is not needed any more; `Corrupt`, or `Invalid` when the file can't be read.
    pub fn load(
        &self,
        store: &SegmentStore,
        record: &StagedRecord,
        offset: u64,
        length: usize,
    ) -> Result<Bytes, StoreError> {
        let loaded = load(store, record, offset, length);
        if loaded.is_err() && record.is_removed() {
            // Stored meanwhile: whoever asks finds the bytes where the file's extents say.
            return Err(StoreError::NotFound {
                key: record.path().display().to_string(),
            });
        }
        if let Err(error) = &loaded
            && record.damage()
        {
            let path = record.path();
            tracing::error!(ino = record.ino(), path = %path.display(), %error, "staged data can't be read back");
        }
        loaded
    }

    /// The records' bytes are safe elsewhere. In their order; on disk when it returns, as far as this process is concerned.
    pub fn remove(&self, records: &[Arc<StagedRecord>]) {
        for record in records {
            record.remove();
            if let Err(error) = fs::remove_file(record.path())
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::error!(path = %record.path().display(), %error, "a staged record was not removed");
            }
            self.unlist(record.number());
        }
    }

    /// Keeps a record for a person to look at: it can't be read, or stored without overwriting what is newer.
    pub fn put_aside(&self, path: &Path, why: &str) {
        let aside = self.options.directory.join(ASIDE);
        let name = path.file_name().unwrap_or_default();
        let kept = aside.join(name);
        match fs::create_dir_all(&aside).and_then(|()| fs::rename(path, &kept)) {
            Ok(()) => {
                tracing::error!(path = %kept.display(), why, "staged data was not stored; it is kept aside");
            }
            Err(error) => {
                tracing::error!(path = %path.display(), why, %error, "staged data was not stored; it stays where it is");
            }
        }
        if let Some(number) = number_of(&name.to_string_lossy()) {
            self.unlist(number);
        }
    }

    fn unlist(&self, number: u64) {
        let mut records = self.records.lock();
        if let Some(listed) = records.remove(&number) {
            self.bytes.fetch_sub(listed.bytes, Ordering::Relaxed);
        }
        if records.is_empty() {
            // Under the lock: no record comes in between whose notes would be lost.
            self.notes.lock().clear();
        }
    }

    /// Where commits of these inodes are about to put what: after a crash they are known by it. Blocks.
    pub fn note(&self, commits: &[(u64, Place)]) -> io::Result<()> {
        let mut notes = self.notes.lock();
        if notes.len() >= NOTES_MAX {
            drop(notes);
            let records = self.records.lock();
            let staged: HashSet<u64> = records.values().map(|listed| listed.ino).collect();
            notes = self.notes.lock();
            notes.keep(|ino| staged.contains(&ino))?;
        }
        notes.propose(commits)
    }

    /// Commits of these inodes were answered, and what identifies their content since. Blocks.
    pub fn note_answers(&self, commits: &[(u64, u64)]) -> io::Result<()> {
        self.notes.lock().reach(commits)
    }

    /// Whether a commit of this folder's data, whose answer is not known, was to put bytes of this inode there.
    pub fn may_have_placed(&self, ino: u64, place: Place) -> bool {
        self.notes.lock().is_proposed(ino, place)
    }

    /// Whether the last commit of this folder's data to this inode has led to this `data_seq`.
    pub fn has_led_to(&self, ino: u64, data_seq: u64) -> bool {
        self.notes.lock().is_reached(ino, data_seq)
    }

    /// See [`StagingOptions::recall_wait`].
    pub fn recall_wait(&self) -> Duration {
        self.options.recall_wait
    }

    /// Bytes on disk, records, and since when the oldest is there.
    pub fn usage(&self) -> (u64, usize, Option<SystemTime>) {
        let records = self.records.lock();
        let oldest = records.values().map(|listed| listed.since).min();
        (self.bytes(), records.len(), oldest)
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

fn read_record(path: &Path, store: &SegmentStore) -> Result<(Header, StagedRecord), String> {
    let number = path
        .file_name()
        .and_then(|name| number_of(&name.to_string_lossy()));
    let number = number.ok_or_else(|| "its name is no record's".to_owned())?;
    let mut file = File::open(path).map_err(|error| error.to_string())?;
    let header = Header::read(&mut file)?;
    if header.number != number {
        return Err(format!("it is record {}", header.number));
    }
    let base = file.stream_position().map_err(|error| error.to_string())?;
    let mut object = Vec::new();
    file.seek(SeekFrom::Start(base))
        .and_then(|_| file.read_to_end(&mut object))
        .map_err(|error| error.to_string())?;
    let entries = store
        .check(&Bytes::from(object), SegmentId(number))
        .map_err(|fault| fault.to_string())?;
    let staged: u64 = header.ranges.iter().map(|(_, length)| length).sum();
    let framed: u64 = entries
        .iter()
        .map(|entry| u64::from(entry.decoded_bytes))
        .sum();
    if staged != framed {
        return Err(format!("{framed} bytes in frames, {staged} in ranges"));
    }
    let record = StagedRecord::new(number, header.ino, path.to_owned());
    record.written(Frames { base, entries });
    Ok((header, record))
}

fn load(
    store: &SegmentStore,
    record: &StagedRecord,
    offset: u64,
    length: usize,
) -> Result<Bytes, StoreError> {
    let unread = |detail: String| {
        StoreError::Invalid(format!(
            "staged record {}: {detail}",
            record.path().display()
        ))
    };
    let Some(frames) = record.frames() else {
        return Err(unread("it is not written".to_owned()));
    };
    let file = File::open(record.path()).map_err(|error| unread(error.to_string()))?;
    let end = offset + length as u64;
    let mut at = 0;
    let mut data = BytesMut::with_capacity(length);
    for entry in &frames.entries {
        let range = at..at + u64::from(entry.decoded_bytes);
        at = range.end;
        if range.end <= offset || range.start >= end {
            continue;
        }
        let mut stored = vec![0; entry.extent_bytes() as usize];
        file.read_exact_at(&mut stored, frames.base + entry.frame.start())
            .map_err(|error| unread(error.to_string()))?;
        let decoded = store.decode(entry, &Bytes::from(stored))?;
        let from = (offset.max(range.start) - range.start) as usize;
        let to = (end.min(range.end) - range.start) as usize;
        let part = decoded.get(from..to);
        data.extend_from_slice(part.ok_or_else(|| unread("a frame is too short".to_owned()))?);
    }
    if data.len() != length {
        return Err(unread("it is shorter than it should be".to_owned()));
    }
    Ok(data.freeze())
}

/// Names in a directory; none when it is missing.
fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn number_of(name: &str) -> Option<u64> {
    let (number, extension) = name.split_once('.')?;
    (extension == EXTENSION && number.len() == 16)
        .then(|| u64::from_str_radix(number, 16).ok())
        .flatten()
}

//! The state: what the log has led to. Without a WAL: after a crash the log is applied again from the last flush.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use heliofs_proto::ids::{ClusterId, Position, SegmentId, UnixNanos, VolumeId};
use heliofs_proto::v1;
use meta_core::{Sums, query};
use parking_lot::Mutex;
use prost::Message;
use rocksdb::checkpoint::Checkpoint;
use rocksdb::properties::LIVE_SST_FILES_SIZE;
use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, BottommostLevelCompaction, Cache, ColumnFamily,
    ColumnFamilyDescriptor, CompactOptions, DB, DBCompressionType, FlushOptions, IteratorMode,
    Options, ReadOptions, WriteBatch, WriteOptions,
};

use super::digests::Digest;
use super::directory::{StateDirectory, sync_tree};
use super::emptied::Emptied;
use super::halves::{self, Halves};
use super::identity::sync_directory;
use super::local::{self, Place};
use super::pins::Pins;
use super::view::{LiveView, SnapshotView};
use super::{OpenError, io_error};
use crate::config::CacheSizes;
use crate::levels;
use crate::raft::types::{LogId, StoredMembership};
use crate::raft::wire;

pub(super) const REPLICATED: &str = "replicated";
pub(super) const LOCAL: &str = "local";

/// Key and value.
type Record = (Box<[u8]>, Box<[u8]>);

/// One opened `state-<n>`.
pub(super) struct Generation {
    pub db: DB,
    number: u64,
    /// Of the apply task.
    pub emptied: Mutex<Emptied>,
    /// Where the records lie.
    pub halves: Halves,
}

impl Generation {
    fn new(db: DB, number: u64) -> Result<Self, OpenError> {
        let mut generation = Self {
            db,
            number,
            emptied: Mutex::default(),
            halves: Halves::default(),
        };
        let mut upper = BTreeSet::new();
        let (from, to) = local::uppers();
        for item in generation.local_range(from, to) {
            let (key, _) = item.map_err(|error| bad("halves", error))?;
            upper.extend(local::volume_of(&key));
        }
        generation.halves = Halves::new(upper);
        Ok(generation)
    }

    pub(super) fn replicated(&self) -> &ColumnFamily {
        self.db
            .cf_handle(REPLICATED)
            .expect("the column family is created when the state is opened")
    }

    pub(super) fn local(&self) -> &ColumnFamily {
        self.db
            .cf_handle(LOCAL)
            .expect("the column family is created when the state is opened")
    }

    fn local_get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, OpenError> {
        self.db
            .get_cf(self.local(), key)
            .map_err(|error| OpenError::State(error.to_string()))
    }

    pub(super) fn local_range(
        &self,
        from: Vec<u8>,
        to: Vec<u8>,
    ) -> impl Iterator<Item = Result<Record, rocksdb::Error>> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(from);
        options.set_iterate_upper_bound(to);
        self.db
            .iterator_cf_opt(self.local(), options, IteratorMode::Start)
    }
}

/// What the apply task keeps in memory beside the records; changed as a group is applied.
#[derive(Default)]
pub(super) struct Memory {
    pub applied: Option<LogId>,
    pub membership: StoredMembership,
    pub cluster: Option<ClusterId>,
    pub next_volume: u32,
    /// What a build must know to go on from here.
    pub level: u32,
    pub volumes: BTreeMap<VolumeId, Known>,
}

impl Memory {
    /// Whether some volume's own bucket lacks something.
    pub(super) fn lacks_any(&self) -> bool {
        self.volumes.values().any(Known::lacks_any)
    }
}

impl Memory {
    /// The volumes that are written here and have a fence store.
    fn fenced(&self) -> BTreeSet<VolumeId> {
        let fenced = self.volumes.iter();
        let fenced = fenced
            .filter(|(_, known)| known.record.fence.is_some() && known.record.mirror.is_none());
        fenced.map(|(volume, _)| *volume).collect()
    }
}

impl Known {
    /// Whether the region's own bucket lacks anything.
    pub(super) fn lacks_any(&self) -> bool {
        let copies = &self.copies;
        self.record.second.is_some()
            && (copies.pending_segments > 0 || copies.quarantined_segments > 0 || copies.walk != 0)
    }
}

/// A volume.
pub(super) struct Known {
    pub record: v1::Volume,
    pub digest: Digest,
    pub waiting: u64,
    /// Entry of the last place written.
    pub placed: Option<u64>,
    /// What is kept for mirrors, by their names.
    pub slots: BTreeMap<String, v1::MirrorSlot>,
    /// How far this region's bucket is.
    pub copies: v1::CopyState,
    /// A copy that is being loaded.
    pub incoming: Option<Incoming>,
    /// See [`State::loaded`].
    pub loaded: u64,
    /// Positions that are pinned on this node; `false`: something of it was removed before it was copied.
    pub watched: BTreeMap<Position, bool>,
}

/// A copy that is being loaded beside what is served.
pub(super) struct Incoming {
    pub record: v1::MirrorIncoming,
    /// Of what has arrived.
    pub sums: Sums,
}

struct Inner {
    directory: StateDirectory,
    cache: Cache,
    sizes: CacheSizes,
    live: ArcSwap<Generation>,
    memory: Mutex<Memory>,
    /// Index after the last flush's entry, so that 0 means nothing.
    flushed: AtomicU64,
    /// Numbers the checkpoints of this process.
    checkpoints: AtomicU64,
    /// Some region's own bucket lacks something: readers of most nodes need not take the lock to learn that none does.
    lacking: AtomicBool,
    /// Volumes that are written here and have a fence store.
    fenced: Arc<ArcSwap<BTreeSet<VolumeId>>>,
    /// Positions that are held; locked before `memory`, if both are.
    pins: Mutex<Pins>,
}

/// The state of one node; cheap to clone.
#[derive(Clone)]
pub struct State {
    inner: Arc<Inner>,
}

/// Blocks of records, and partitions of indexes and filters, before compression.
const BLOCK_BYTES: usize = 8 << 10;

fn options(sizes: &CacheSizes, cache: &Cache) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    // Inside the cache's budget: memory must not grow with the number of files.
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    // In partitions of one block. A whole file's filter is megabytes: more than a shard of the cache may hold, and then every
    // read of a record reads and verifies it from the file.
    table.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    table.set_partition_filters(true);
    table.set_metadata_block_size(BLOCK_BYTES);
    table.set_pin_top_level_index_and_filter(true);
    table.set_bloom_filter(10.0, false);
    table.set_whole_key_filtering(true);
    table.set_optimize_filters_for_memory(true);
    table.set_block_size(BLOCK_BYTES);
    table.set_format_version(5);
    let mut options = Options::default();
    options.set_block_based_table_factory(&table);
    options.set_write_buffer_size(sizes.write_buffer_bytes);
    options.set_max_write_buffer_number(2);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_level_compaction_dynamic_level_bytes(true);
    options
}

fn db_options(create: bool) -> Options {
    let mut options = Options::default();
    options.create_if_missing(create);
    options.create_missing_column_families(true);
    // A flush takes both families or neither, so that records and applied index always agree.
    options.set_atomic_flush(true);
    options.set_max_background_jobs(2);
    options.set_max_open_files(256);
    options.set_keep_log_file_num(2);
    options
}

fn open_db(path: &Path, sizes: &CacheSizes, cache: &Cache, create: bool) -> Result<DB, OpenError> {
    let families = [REPLICATED, LOCAL, rocksdb::DEFAULT_COLUMN_FAMILY_NAME]
        .map(|name| ColumnFamilyDescriptor::new(name, options(sizes, cache)));
    DB::open_cf_descriptors(&db_options(create), path, families)
        .map_err(|error| OpenError::State(error.to_string()))
}

impl State {
    /// Opens the live state below `data_dir`, or makes an empty one. Leftovers of a crash are removed.
    pub fn open(data_dir: &Path, sizes: &CacheSizes) -> Result<Self, OpenError> {
        let directory = StateDirectory::new(data_dir);
        let current = directory.current()?;
        directory
            .clean(current)
            .map_err(OpenError::io("remove leftovers of a crash"))?;
        let cache = Cache::new_lru_cache(sizes.block_cache_bytes);
        let number = current.unwrap_or(1);
        let db = open_db(&directory.path(number), sizes, &cache, current.is_none())?;
        if current.is_none() {
            sync_directory(&directory.path(number))
                .and_then(|()| directory.switch(number))
                .map_err(OpenError::io("create the state"))?;
        }
        let generation = Generation::new(db, number)?;
        let memory = load(&generation)?;
        halves::empty_unused(&generation, &memory.volumes)?;
        let flushed = memory.applied.map_or(0, |applied| applied.index + 1);
        let lacking = memory.lacks_any();
        let fenced = memory.fenced();
        Ok(Self {
            inner: Arc::new(Inner {
                directory,
                cache,
                sizes: sizes.clone(),
                live: ArcSwap::from_pointee(generation),
                memory: Mutex::new(memory),
                flushed: AtomicU64::new(flushed),
                checkpoints: AtomicU64::new(0),
                lacking: AtomicBool::new(lacking),
                fenced: Arc::new(ArcSwap::from_pointee(fenced)),
                pins: Mutex::default(),
            }),
        })
    }

    /// Whether `data_dir` has a state.
    pub fn exists(data_dir: &Path) -> Result<bool, OpenError> {
        StateDirectory::new(data_dir)
            .current()
            .map(|current| current.is_some())
    }

    pub(super) fn generation(&self) -> Arc<Generation> {
        self.inner.live.load_full()
    }

    pub(super) fn memory(&self) -> parking_lot::MutexGuard<'_, Memory> {
        self.inner.memory.lock()
    }

    pub(super) fn pins(&self) -> parking_lot::MutexGuard<'_, Pins> {
        self.inner.pins.lock()
    }

    pub(super) fn is_lacking(&self) -> bool {
        self.inner.lacking.load(Ordering::Acquire)
    }

    pub(super) fn set_lacking(&self, lacking: bool) {
        self.inner.lacking.store(lacking, Ordering::Release);
    }

    /// The volumes that are written here and have a fence store, kept up to date.
    pub(crate) fn fenced(&self) -> Arc<ArcSwap<BTreeSet<VolumeId>>> {
        Arc::clone(&self.inner.fenced)
    }

    /// Volumes have changed: whoever asks which have a fence store must not wait for a group to be applied.
    pub(super) fn set_fenced(&self, memory: &Memory) {
        self.inner.fenced.store(Arc::new(memory.fenced()));
    }

    /// The records as they are at each read: for single reads.
    pub fn view(&self) -> LiveView {
        LiveView {
            generation: self.generation(),
            applies: false,
        }
    }

    /// The records at one moment: for answers made of several reads.
    pub fn snapshot_view<R>(&self, read: impl FnOnce(&SnapshotView<'_>) -> R) -> R {
        let generation = self.generation();
        read(&SnapshotView::new(&generation))
    }

    /// The last applied entry, and the membership.
    pub fn applied(&self) -> (Option<LogId>, StoredMembership) {
        let memory = self.memory();
        (memory.applied, memory.membership.clone())
    }

    /// Index of the last entry whose effects a crash would not lose; `None`: none.
    pub fn flushed_index(&self) -> Option<u64> {
        self.inner.flushed.load(Ordering::Acquire).checked_sub(1)
    }

    /// The cluster's id, once it was formed.
    pub fn cluster_id(&self) -> Option<ClusterId> {
        self.memory().cluster
    }

    /// All volumes with name and storage (secrets included). Settings, position and usage are in the replicated records.
    pub fn volumes(&self) -> Vec<v1::Volume> {
        let memory = self.memory();
        memory
            .volumes
            .values()
            .map(|known| known.record.clone())
            .collect()
    }

    /// One volume.
    pub fn volume(&self, volume: VolumeId) -> Option<v1::Volume> {
        let memory = self.memory();
        memory
            .volumes
            .get(&volume)
            .map(|known| known.record.clone())
    }

    /// The volume of a name.
    pub fn volume_named(&self, name: &str) -> Option<v1::Volume> {
        let memory = self.memory();
        let found = memory
            .volumes
            .values()
            .find(|known| known.record.name == name);
        found.map(|known| known.record.clone())
    }

    /// Digest sums of a volume, and the position they are of.
    pub fn digest(&self, volume: VolumeId) -> Option<(Position, Sums)> {
        let memory = self.memory();
        let known = memory.volumes.get(&volume)?;
        Some((known.digest.position, known.digest.sums.clone()))
    }

    /// A beat for a volume: its position and the sum of its sums as this node has them.
    pub fn beat(&self, volume: VolumeId) -> Option<v1::Beat> {
        let memory = self.memory();
        let digest = &memory.volumes.get(&volume)?.digest;
        Some(v1::Beat {
            volume: volume.0,
            position: Some(digest.position.into()),
            digest: digest.total().to_le_bytes().to_vec().into(),
        })
    }

    /// The first position at which a beat did not agree with this node; `None`: all agreed.
    pub fn diverged(&self, volume: VolumeId) -> Option<Position> {
        self.memory().volumes.get(&volume)?.digest.diverged
    }

    /// How many beats agreed with this node since it started.
    pub fn beats_agreed(&self, volume: VolumeId) -> u64 {
        let memory = self.memory();
        memory
            .volumes
            .get(&volume)
            .map_or(0, |known| known.digest.agreed)
    }

    /// How far a volume is, and its time.
    pub fn head(&self, volume: VolumeId) -> Option<(Position, UnixNanos)> {
        let memory = self.memory();
        let digest = &memory.volumes.get(&volume)?.digest;
        Some((digest.position, digest.time))
    }

    /// The oldest `segments_max` segments of the deletion queue that lost their last reference before `freed_before`, and that no
    /// mirror, and nobody who is shown the records at `shown`, may still need.
    pub fn deletions(
        &self,
        volume: VolumeId,
        shown: Option<Position>,
        freed_before: UnixNanos,
        segments_max: usize,
    ) -> std::io::Result<Vec<SegmentId>> {
        let horizon = [self.slots_horizon(volume), shown]
            .into_iter()
            .flatten()
            .min();
        let generation = self.generation();
        let (from, to) = local::deletions_before(volume, freed_before);
        let mut segments = Vec::new();
        for item in generation.local_range(from, to).take(segments_max) {
            let (key, value) = item.map_err(io_error)?;
            // In the order of positions, too: a volume's time never goes back.
            if horizon.is_some_and(|horizon| local::decode_freed(&value) > horizon) {
                break;
            }
            segments.extend(local::deletion_segment(&key));
        }
        Ok(segments)
    }

    /// Whether a segment is in the volume's deletion queue.
    pub fn is_waiting_for_deletion(
        &self,
        volume: VolumeId,
        segment: SegmentId,
    ) -> std::io::Result<bool> {
        let generation = self.generation();
        let key = local::deletion_of(volume, segment);
        let found = generation.db.get_pinned_cf(generation.local(), key);
        Ok(found.map_err(io_error)?.is_some())
    }

    /// Length of a volume's deletion queue.
    pub fn deletions_waiting(&self, volume: VolumeId) -> u64 {
        let memory = self.memory();
        memory.volumes.get(&volume).map_or(0, |known| known.waiting)
    }

    /// The last known place in the log at or before the command `seq` of a volume; `None` when the log no longer reaches
    /// back to it.
    pub fn place(&self, volume: VolumeId, seq: u64) -> std::io::Result<Option<Place>> {
        let generation = self.generation();
        let (from, _) = local::places(volume);
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(from);
        options.set_iterate_upper_bound(local::place(volume, seq.saturating_add(1)));
        let mut found =
            generation
                .db
                .iterator_cf_opt(generation.local(), options, IteratorMode::End);
        match found.next() {
            None => Ok(None),
            Some(item) => {
                let (key, value) = item.map_err(io_error)?;
                Ok(Place::decode(&key, &value))
            }
        }
    }

    /// Forgets places of entries up to `index`, which are purged.
    pub fn forget_places(&self, index: u64) -> std::io::Result<()> {
        let generation = self.generation();
        let volumes: Vec<VolumeId> = self.memory().volumes.keys().copied().collect();
        let mut batch = WriteBatch::default();
        for volume in volumes {
            let (from, to) = local::places(volume);
            for item in generation.local_range(from, to) {
                let (key, value) = item.map_err(io_error)?;
                if Place::decode(&key, &value).is_some_and(|place| place.index > index) {
                    break;
                }
                batch.delete_cf(generation.local(), key);
            }
        }
        generation
            .db
            .write_opt(batch, &without_wal())
            .map_err(io_error)
    }

    /// Makes everything applied so far durable; returns the last index that is. Blocks.
    pub fn flush(&self) -> std::io::Result<Option<u64>> {
        let generation = self.generation();
        let applied = self.memory().applied;
        flush(&generation).map_err(io_error)?;
        if let Some(applied) = applied {
            self.inner
                .flushed
                .fetch_max(applied.index + 1, Ordering::AcqRel);
        }
        Ok(self.flushed_index())
    }

    /// Rewrites all records into as few bytes as they take; returns the bytes of the tables afterwards. Reads and writes go on
    /// meanwhile. Blocks, for minutes when the state is large.
    pub fn compact(&self) -> std::io::Result<u64> {
        self.flush()?;
        let generation = self.generation();
        let mut options = CompactOptions::default();
        // The last level, too: nothing else removes what was deleted long ago.
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        options.set_exclusive_manual_compaction(false);
        let mut bytes = 0;
        for family in [generation.replicated(), generation.local()] {
            let all = None::<&[u8]>;
            generation
                .db
                .compact_range_cf_opt(family, all, all, &options);
            let size = generation
                .db
                .property_int_value_cf(family, LIVE_SST_FILES_SIZE)
                .map_err(io_error)?;
            bytes += size.unwrap_or(0);
        }
        Ok(bytes)
    }

    /// A checkpoint of the state in a new directory below the data directory, and what it contains. Blocks.
    pub fn checkpoint(
        &self,
    ) -> Result<(std::path::PathBuf, Option<LogId>, StoredMembership), OpenError> {
        self.flush().map_err(OpenError::io("flush the state"))?;
        let generation = self.generation();
        let number = self.inner.checkpoints.fetch_add(1, Ordering::Relaxed);
        let path = self.inner.directory.snapshot_path(&number.to_string());
        if path.exists() {
            std::fs::remove_dir_all(&path).map_err(OpenError::io("remove an old snapshot"))?;
        }
        let failed = |error: rocksdb::Error| OpenError::State(error.to_string());
        Checkpoint::new(&generation.db)
            .and_then(|checkpoint| checkpoint.create_checkpoint(&path))
            .map_err(failed)?;
        // Groups may have been applied since the flush and be in it or not: only the checkpoint itself knows.
        let names = [REPLICATED, LOCAL, rocksdb::DEFAULT_COLUMN_FAMILY_NAME];
        let db =
            DB::open_cf_for_read_only(&Options::default(), &path, names, false).map_err(failed)?;
        let checkpoint = Generation::new(db, 0)?;
        let (applied, membership) = load_applied(&checkpoint)?;
        Ok((path, applied, membership))
    }

    /// The directory in which a received snapshot is built up; it becomes the state by [`State::install`].
    pub fn receiving(&self) -> std::io::Result<std::path::PathBuf> {
        let number = self.inner.directory.next_number()?;
        let path = self.inner.directory.path(number);
        std::fs::create_dir(&path)?;
        Ok(path)
    }

    /// Makes a received state the live one; `path` is from [`State::receiving`], or a checkpoint on the same file system, which
    /// is moved. Blocks.
    pub fn install(&self, path: &Path) -> Result<(), OpenError> {
        let directory = &self.inner.directory;
        let number = match directory.number(path) {
            Some(number) => number,
            None => {
                let target = self.receiving().map_err(OpenError::io("create a state"))?;
                std::fs::rename(path, &target).map_err(OpenError::io("take over a checkpoint"))?;
                directory
                    .number(&target)
                    .expect("a directory for receiving is a state's")
            }
        };
        let path = &directory.path(number);
        // Before it is opened: RocksDB then removes files that are of no use any more, and syncs by itself what it writes.
        sync_tree(path).map_err(OpenError::io("sync the received state"))?;
        let db = open_db(path, &self.inner.sizes, &self.inner.cache, false)?;
        let generation = Generation::new(db, number)?;
        let memory = load(&generation)?;
        halves::empty_unused(&generation, &memory.volumes)?;
        sync_directory(path)
            .and_then(|()| self.inner.directory.switch(number))
            .map_err(OpenError::io("switch to the received state"))?;
        let flushed = memory.applied.map_or(0, |applied| applied.index + 1);
        let old = {
            let mut live = self.memory();
            self.set_lacking(memory.lacks_any());
            self.set_fenced(&memory);
            *live = memory;
            self.inner.flushed.store(flushed, Ordering::Release);
            self.inner.live.swap(Arc::new(generation))
        };
        self.drop_all_pins();
        let old_path = self.inner.directory.path(old.number);
        drop(old);
        if let Err(error) = std::fs::remove_dir_all(&old_path) {
            // A reader still holds it, and RocksDB writes on: the next start removes what is left.
            tracing::warn!(path = %old_path.display(), %error, "the replaced state stays for now");
        }
        Ok(())
    }
}

pub(super) fn without_wal() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.disable_wal(true);
    options
}

fn flush(generation: &Generation) -> Result<(), rocksdb::Error> {
    let mut options = FlushOptions::default();
    options.set_wait(true);
    generation
        .db
        .flush_cfs_opt(&[generation.replicated(), generation.local()], &options)
}

fn bad(what: &str, error: impl std::fmt::Display) -> OpenError {
    OpenError::State(format!("{what}: {error}"))
}

fn load_applied(generation: &Generation) -> Result<(Option<LogId>, StoredMembership), OpenError> {
    let applied = match generation.local_get(local::APPLIED)? {
        None => None,
        Some(bytes) => Some(wire::log_id_from_wire(
            v1::RaftLogId::decode(bytes.as_slice()).map_err(|error| bad("applied", error))?,
        )),
    };
    let membership = match generation.local_get(local::MEMBERS)? {
        None => StoredMembership::default(),
        Some(bytes) => {
            let header = v1::SnapshotHeader::decode(bytes.as_slice())
                .map_err(|error| bad("membership", error))?;
            wire::stored_membership_from_wire(header.membership_log_id, header.membership)
                .map_err(|error| bad("membership", error))?
        }
    };
    Ok((applied, membership))
}

fn number(bytes: Option<Vec<u8>>, what: &str) -> Result<Option<u32>, OpenError> {
    bytes
        .map(|bytes| {
            let bytes = bytes.as_slice().try_into();
            bytes
                .map(u32::from_be_bytes)
                .map_err(|error| bad(what, error))
        })
        .transpose()
}

fn load(generation: &Generation) -> Result<Memory, OpenError> {
    let (applied, membership) = load_applied(generation)?;
    let cluster = number(generation.local_get(local::CLUSTER)?, "cluster id")?.map(ClusterId);
    let next_volume = number(generation.local_get(local::NEXT_VOLUME)?, "next volume")?;
    let level = number(generation.local_get(local::LEVEL)?, "level")?.unwrap_or(0);
    let known = levels::known();
    if level > known {
        return Err(OpenError::Upgrade { level, known });
    }
    let mut volumes = BTreeMap::new();
    let (from, to) = local::volumes();
    for item in generation.local_range(from, to) {
        let (_, value) = item.map_err(|error| bad("volumes", error))?;
        let record = v1::Volume::decode(value.as_ref()).map_err(|error| bad("a volume", error))?;
        let volume = VolumeId(record.id);
        let mut known = load_volume(generation, volume, record)?;
        // When it was loaded is not known any more: perhaps just now.
        known.loaded = applied.map_or(0, |applied| applied.index);
        volumes.insert(volume, known);
    }
    Ok(Memory {
        applied,
        membership,
        cluster,
        next_volume: next_volume.unwrap_or(1),
        level,
        volumes,
    })
}

fn load_sums(generation: &Generation, range: (Vec<u8>, Vec<u8>)) -> Result<Sums, OpenError> {
    let mut sums = Sums::default();
    for item in generation.local_range(range.0, range.1) {
        let (key, value) = item.map_err(|error| bad("digest sums", error))?;
        let (Some(bucket), Ok(sum)) = (key.last(), value.as_ref().try_into()) else {
            return Err(bad("digest sums", "a record of the wrong length"));
        };
        sums.set(*bucket, u128::from_le_bytes(sum));
    }
    Ok(sums)
}

fn load_volume(
    generation: &Generation,
    volume: VolumeId,
    record: v1::Volume,
) -> Result<Known, OpenError> {
    let sums = load_sums(generation, local::sums(volume))?;
    let incoming = match generation.local_get(&local::incoming(volume))? {
        None => None,
        Some(bytes) => Some(Incoming {
            record: v1::MirrorIncoming::decode(bytes.as_slice())
                .map_err(|error| bad("a copy that is being loaded", error))?,
            sums: load_sums(generation, local::incoming_sums(volume))?,
        }),
    };
    let waiting = match generation.local_get(&local::waiting(volume))? {
        None => 0,
        Some(bytes) => u64::from_be_bytes(
            bytes
                .as_slice()
                .try_into()
                .map_err(|error| bad("length of the deletion queue", error))?,
        ),
    };
    let mut slots = BTreeMap::new();
    let (from, to) = local::slots(volume);
    for item in generation.local_range(from, to) {
        let (_, value) = item.map_err(|error| bad("slots", error))?;
        let slot = v1::MirrorSlot::decode(value.as_ref()).map_err(|error| bad("a slot", error))?;
        slots.insert(slot.name.clone(), slot);
    }
    let copies = match generation.local_get(&local::copies(volume))? {
        None => v1::CopyState::default(),
        Some(bytes) => v1::CopyState::decode(bytes.as_slice())
            .map_err(|error| bad("state of the copies", error))?,
    };
    let mut placed = None;
    let (from, to) = local::places(volume);
    let mut options = ReadOptions::default();
    options.set_iterate_lower_bound(from);
    options.set_iterate_upper_bound(to);
    let mut last = generation
        .db
        .iterator_cf_opt(generation.local(), options, IteratorMode::End);
    if let Some(item) = last.next() {
        let (key, value) = item.map_err(|error| bad("places", error))?;
        placed = Place::decode(&key, &value).map(|place| place.index);
    }
    let head_key = meta_core::keys::head(volume);
    let value = generation
        .db
        .get_cf(
            generation.replicated(),
            generation.halves.places().of(&head_key),
        )
        .map_err(|error| bad("head", error))?;
    let mut records = BTreeMap::new();
    records.extend(value.map(|value| (head_key, value.into())));
    let head = query::head(&records, volume).map_err(|error| bad("head", error))?;
    let (position, time) = head.map_or((Position::START, UnixNanos(0)), |head| {
        (head.position, head.time)
    });
    Ok(Known {
        record,
        digest: Digest::new(position, time, sums),
        waiting,
        placed,
        slots,
        copies,
        incoming,
        loaded: 0,
        watched: BTreeMap::new(),
    })
}

//! The stores: openraft's suite, damage, crashes.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use heliofs_proto::ids::{NodeId, VolumeId};
use heliofs_proto::v1::{self, FileKind, command, local_command, log_item::Item};
use meta_server::config::CacheSizes;
use meta_server::observer::Observers;
use meta_server::raft::LogData;
use meta_server::raft::machine::StateMachine;
use meta_server::raft::types::{Entry, LogId, TypeConfig, Vote};
use meta_server::store::{LogStore, OpenError, State};
use openraft::EntryPayload;
use openraft::storage::IOFlushed;
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt;
use tempfile::TempDir;

const NODE: NodeId = NodeId(1);

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(
        &self,
    ) -> Result<(TempDir, LogStore, StateMachine), openraft::StorageError<TypeConfig>> {
        let dir = TempDir::new().unwrap();
        let log = LogStore::open(dir.path(), NODE, 1 << 20, false).unwrap();
        let state = State::open(dir.path(), &CacheSizes::default()).unwrap();
        Ok((dir, log, StateMachine::new(state, Observers::default())))
    }
}

#[test]
fn openrafts_own_suite_passes() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(Suite::test_all(Builder)).unwrap();
}

fn open_with_cache(dir: &Path, cache_bytes: usize) -> Result<LogStore, OpenError> {
    LogStore::open(dir, NODE, cache_bytes, false)
}

fn open(dir: &Path) -> Result<LogStore, OpenError> {
    open_with_cache(dir, 1 << 20)
}

fn entry(index: u64) -> Entry {
    let batch = v1::LogBatch {
        items: vec![v1::LogItem {
            time: i64::try_from(index).unwrap(),
            ..v1::LogItem::default()
        }],
    };
    Entry {
        log_id: log_id(index),
        payload: EntryPayload::Normal(LogData::new(batch)),
    }
}

fn log_id(index: u64) -> LogId {
    LogId {
        leader_id: 1.into(),
        index,
    }
}

async fn append(log: &LogStore, indexes: std::ops::Range<u64>) {
    for index in indexes {
        let (sender, flushed) = TypeConfig::oneshot();
        log.append(vec![entry(index)], IOFlushed::signal(sender))
            .unwrap();
        flushed.await.unwrap().unwrap();
    }
}

async fn indexes(log: &LogStore, from: u64, to: u64) -> Vec<u64> {
    let entries = log.read_all(from, to).await.unwrap();
    for read in &entries {
        assert_eq!(*read, entry(read.log_id.index));
    }
    entries.iter().map(|entry| entry.log_id.index).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_vote_and_commit_index_survive_a_restart() {
    let dir = TempDir::new().unwrap();
    let log = open(dir.path()).unwrap();
    let identity = log.identity();
    append(&log, 0..20).await;
    log.save_vote(Vote::new_committed(3, 1)).await.unwrap();
    log.save_committed(Some(log_id(7))).unwrap();
    log.truncate_after(Some(log_id(14))).await.unwrap();
    append(&log, 15..18).await;
    log.purge(log_id(4)).await.unwrap();
    drop(log);
    for cache in [1 << 20, 0] {
        let log = open_with_cache(dir.path(), cache).unwrap();
        assert_eq!(log.identity(), identity);
        assert_eq!(log.vote(), Some(Vote::new_committed(3, 1)));
        assert_eq!(log.committed(), Some(log_id(7)));
        assert_eq!(
            (log.purged(), log.last()),
            (Some(log_id(4)), Some(log_id(17)))
        );
        assert_eq!(indexes(&log, 0, 100).await, (5..18).collect::<Vec<_>>());
        assert_eq!(indexes(&log, 6, 9).await, [6, 7, 8]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_left_the_cache_is_read_from_disk() {
    let dir = TempDir::new().unwrap();
    // Room for a few entries only.
    let log = open_with_cache(dir.path(), 2_000).unwrap();
    append(&log, 0..100).await;
    assert_eq!(indexes(&log, 0, 100).await, (0..100).collect::<Vec<_>>());
    assert_eq!(indexes(&log, 40, 42).await, [40, 41]);
    assert_eq!(
        log.read(10, 100, 1).await.unwrap().len(),
        1,
        "never nothing"
    );
    log.truncate_after(Some(log_id(10))).await.unwrap();
    assert_eq!(indexes(&log, 5, 100).await, (5..11).collect::<Vec<_>>());
    append(&log, 11..13).await;
    assert_eq!(indexes(&log, 9, 100).await, [9, 10, 11, 12]);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_nodes_directory_is_refused() {
    let dir = TempDir::new().unwrap();
    drop(open(dir.path()).unwrap());
    let refused = LogStore::open(dir.path(), NodeId(2), 0, false);
    assert!(matches!(
        refused,
        Err(OpenError::WrongNode {
            found: 1,
            expected: 2
        })
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_log_is_refused() {
    let dir = TempDir::new().unwrap();
    drop(open(dir.path()).unwrap());
    std::fs::remove_dir_all(dir.path().join("log")).unwrap();
    assert!(matches!(open(dir.path()), Err(OpenError::Damaged(_))));
    // The identity file is gone as well, but a state is there.
    std::fs::remove_file(dir.path().join("IDENTITY")).unwrap();
    let refused = LogStore::open(dir.path(), NODE, 0, true);
    assert!(matches!(refused, Err(OpenError::Damaged(_))));
}

fn damaged(result: Result<LogStore, OpenError>) -> String {
    match result {
        Err(error @ OpenError::Damaged(_)) => {
            let text = error.to_string();
            assert!(text.contains("under a new id"), "{text}");
            text
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("a damaged log was opened"),
    }
}

fn key(index: u64) -> Vec<u8> {
    [b"e".as_slice(), &index.to_be_bytes()].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_with_a_flipped_bit_or_a_hole_is_refused() {
    let dir = TempDir::new().unwrap();
    let log = open(dir.path()).unwrap();
    append(&log, 0..10).await;
    drop(log);
    let raw = || rocksdb::DB::open(&rocksdb::Options::default(), dir.path().join("log")).unwrap();
    let db = raw();
    let sound = db.get(key(5)).unwrap().unwrap();
    let mut flipped = sound.clone();
    *flipped.last_mut().unwrap() ^= 1;
    db.put(key(5), flipped).unwrap();
    drop(db);
    assert!(damaged(open(dir.path())).contains("entry 5"));
    let db = raw();
    db.delete(key(5)).unwrap();
    drop(db);
    assert!(damaged(open(dir.path())).contains("entry 5 is missing"));
    let db = raw();
    db.put(key(5), sound).unwrap();
    drop(db);
    open(dir.path()).unwrap();
}

/// The write-ahead log that holds the entries.
fn wal(dir: &Path) -> std::path::PathBuf {
    let mut files: Vec<_> = std::fs::read_dir(dir.join("log"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .filter(|path| path.metadata().unwrap().len() > 0)
        .collect();
    files.sort();
    files.pop().expect("a WAL with entries")
}

/// The directory as a power loss would leave it: everything synced is there, nothing was closed.
fn crashed(dir: &Path) -> TempDir {
    let copy = TempDir::new().unwrap();
    copy_tree(dir, copy.path());
    copy
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_tail_is_cut_and_damage_before_it_is_refused() {
    let dir = TempDir::new().unwrap();
    let log = open(dir.path()).unwrap();
    append(&log, 0..50).await;

    let whole = crashed(dir.path());
    assert_eq!(open(whole.path()).unwrap().last(), Some(log_id(49)));

    // The last record was being written when the power went.
    let torn = crashed(dir.path());
    let path = wal(torn.path());
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
    let opened = open(torn.path()).unwrap();
    assert_eq!(opened.last(), Some(log_id(48)));
    assert_eq!(indexes(&opened, 0, 100).await, (0..49).collect::<Vec<_>>());

    // Rot: one bit in the middle. The entries behind it were acknowledged.
    let rotten = crashed(dir.path());
    let path = wal(rotten.path());
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&path, &bytes).unwrap();
    damaged(open(rotten.path()));
}

/// Set in the process that is to be killed: the directory it works in.
const VICTIM: &str = "HELIOFS_TEST_VICTIM";
/// Entries that the victim appends and applies as one group.
const GROUP: u64 = 3;
/// The victim ends by itself after so many groups, should nobody be left to kill it.
const VICTIM_GROUPS_MAX: u64 = 20_000;

/// The smallest buffers that RocksDB takes, so that the family of the records fills and is flushed every few groups, while the
/// local one is far from full.
fn small_buffers() -> CacheSizes {
    CacheSizes {
        write_buffer_bytes: 64 << 10,
        ..CacheSizes::default()
    }
}

/// Entry 0 makes the volume, the others have twenty creates with long names each.
fn filling(index: u64) -> Entry {
    let items = match index {
        0 => vec![Item::Local(v1::LocalCommand {
            op: Some(local_command::Op::VolumeCreate(v1::VolumeCreate {
                name: "v".to_owned(),
                settings: Some(v1::VolumeSettings::default()),
                ..v1::VolumeCreate::default()
            })),
        })],
        _ => (0..20)
            .map(|number| {
                Item::Command(v1::Command {
                    volume: 1,
                    op: Some(command::Op::Create(v1::Create {
                        parent: 1,
                        name: format!("{index}-{number}-{}", "x".repeat(200)).into(),
                        kind: FileKind::File.into(),
                        mode: 0o644,
                        exclusive: true,
                        ..v1::Create::default()
                    })),
                    ..v1::Command::default()
                })
            })
            .collect(),
    };
    let items = items.into_iter().map(|item| v1::LogItem {
        time: i64::try_from(index).unwrap(),
        item: Some(item),
        ..v1::LogItem::default()
    });
    let batch = v1::LogBatch {
        items: items.collect(),
    };
    Entry {
        log_id: log_id(index),
        payload: EntryPayload::Normal(LogData::new(batch)),
    }
}

/// As a node does: a group is in the log and synced, then it is applied; its end is told.
async fn victim(dir: &Path) {
    let log = open(dir).unwrap();
    let state = State::open(dir, &small_buffers()).unwrap();
    for group in 0..VICTIM_GROUPS_MAX {
        let entries: Vec<Entry> = (group * GROUP..(group + 1) * GROUP).map(filling).collect();
        let (sender, flushed) = TypeConfig::oneshot();
        log.append(entries.clone(), IOFlushed::signal(sender))
            .unwrap();
        flushed.await.unwrap().unwrap();
        state.apply(&entries).unwrap();
        println!("{}", (group + 1) * GROUP);
    }
}

/// A family's buffer was flushed, that is, written to a table file.
fn was_flushed(dir: &Path) -> bool {
    let state = match std::fs::read_dir(dir.join("state-1")) {
        Ok(state) => state,
        // It has not come so far.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return false,
        Err(error) => panic!("{error}"),
    };
    state
        .map(|entry| entry.unwrap().path())
        .any(|path| path.extension().is_some_and(|extension| extension == "sst"))
}

/// The state has no WAL: if one family were flushed without the other, records and applied index would no longer agree, and
/// applying the log again would apply some of it twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_with_one_familys_buffer_flushed_leaves_what_the_log_leads_to() {
    const NAME: &str = "a_kill_with_one_familys_buffer_flushed_leaves_what_the_log_leads_to";
    if let Some(dir) = std::env::var_os(VICTIM) {
        return victim(Path::new(&dir)).await;
    }
    let volume = VolumeId(1);
    let mut lost_and_found = 0;
    // Groups after the first flush; flushes then come every few groups, so these end at different distances from one.
    for groups_more in [0, 1, 2, 3, 5, 8, 13, 21] {
        let dir = TempDir::new().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME, "--nocapture"])
            .env(VICTIM, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let told = BufReader::new(child.stdout.take().unwrap()).lines();
        // What the test harness prints is not a number.
        let mut told = told.filter_map(|line| line.unwrap().trim().parse::<u64>().ok());
        let mut acknowledged = 0;
        while !was_flushed(dir.path()) {
            acknowledged = told.next().expect("the victim goes on until it is killed");
        }
        for _ in 0..groups_more {
            acknowledged = told.next().expect("the victim goes on until it is killed");
        }
        child.kill().unwrap();
        child.wait().unwrap();

        let log = open(dir.path()).unwrap();
        let last = log.last().unwrap().index;
        assert!(last + 1 >= acknowledged, "the log lost what it had synced");
        let state = State::open(dir.path(), &small_buffers()).unwrap();
        let flushed = state.applied().0.map(|log_id| log_id.index);
        lost_and_found += u64::from(flushed.is_some() && flushed < Some(last));
        let tail = log
            .read_all(flushed.map_or(0, |index| index + 1), last + 1)
            .await
            .unwrap();
        // Grouped otherwise than the first time.
        for entries in tail.chunks(7) {
            state.apply(entries).unwrap();
        }

        let elsewhere = TempDir::new().unwrap();
        let sound = State::open(elsewhere.path(), &CacheSizes::default()).unwrap();
        let all: Vec<Entry> = (0..=last).map(filling).collect();
        for entries in all.chunks(64) {
            sound.apply(entries).unwrap();
        }
        let (position, sums) = sound.digest(volume).unwrap();
        let (replayed_position, replayed_sums) = state.digest(volume).unwrap();
        assert_eq!(replayed_position, position, "flushed up to {flushed:?}");
        assert!(replayed_sums == sums, "flushed up to {flushed:?}");
        let recomputed = state.scrub(volume, |_| true).unwrap().unwrap().sums;
        assert!(recomputed == sums, "the sums are not those of the records");
        assert_eq!(state.applied().0, sound.applied().0);
    }
    assert!(
        lost_and_found > 0,
        "no kill came between a flush and the next: this proves nothing"
    );
}

/// A record that changed at rest, without anybody's applying it, as a bit that flips below all checksums would.
#[test]
fn a_scrub_finds_one_record_that_rotted() {
    let dir = TempDir::new().unwrap();
    let volume = VolumeId(1);
    let state = State::open(dir.path(), &CacheSizes::default()).unwrap();
    let all: Vec<Entry> = (0..200).map(filling).collect();
    for entries in all.chunks(64) {
        state.apply(entries).unwrap();
    }
    let sound = state.scrub(volume, |_| true).unwrap().unwrap();
    assert!(sound.differing.is_empty() && sound.records > 200);
    assert_eq!(sound.position, state.digest(volume).unwrap().0);
    state.flush().unwrap();
    drop(state);

    let current = std::fs::read_dir(dir.path()).unwrap();
    let current = current.map(|entry| entry.unwrap().path());
    let path = current
        .filter(|path| path.is_dir())
        .find(|path| {
            path.file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with("state-")
        })
        .unwrap();
    let options = rocksdb::Options::default();
    let families = ["replicated", "local", "default"];
    let db = rocksdb::DB::open_cf(&options, path, families).unwrap();
    let replicated = db.cf_handle("replicated").unwrap();
    let (from, _) = meta_core::keys::tag_range(volume, meta_core::keys::Tag::Inode);
    let mode = rocksdb::IteratorMode::From(&from, rocksdb::Direction::Forward);
    let (key, value) = db.iterator_cf(replicated, mode).nth(50).unwrap().unwrap();
    let mut rotten = value.to_vec();
    *rotten.last_mut().unwrap() ^= 1;
    db.put_cf(replicated, &key, rotten).unwrap();
    db.flush_cf(replicated).unwrap();
    drop(db);

    let state = State::open(dir.path(), &CacheSizes::default()).unwrap();
    let found = state.scrub(volume, |_| true).unwrap().unwrap();
    assert_eq!(found.differing, [meta_core::digest::bucket(&key)]);
    assert_eq!(state.rot(), []);
    state.note_rot(volume, &found);
    assert_eq!(state.diverged(volume), Some(found.position));
    let rot = state.rot();
    assert_eq!(
        (rot.len(), rot[0].volume, rot[0].records_min),
        (1, volume.0, 1)
    );
}

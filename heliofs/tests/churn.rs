//! Files that come, change, shrink, are cloned and go, until many times what lives was written: what is stored stays near what
//! lives, and nothing that lives is deleted.
//!
//! `make churn` runs it at a larger size (HELIOFS_CHURN_OPERATIONS, HELIOFS_CHURN_LIVE_MIB).

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::{Cluster, Mount, wait_for};

const BLOCK: usize = 8 << 10;
/// Blocks of a file at most; 12 on average.
const BLOCKS_MAX: usize = 24;
const THREADS: u64 = 4;

/// Stamps run this much faster than time, and so does the mounts' compaction.
const SPEED: u32 = 40;
/// The deletion grace, by the stamps.
const GRACE: &str = "10m";
/// One object more or less weighs when little lives: it may be sparse, and yet not sparse enough to be compacted.
const SEGMENT: u64 = 4 << 20;
/// A minute by the stamps.
const COMPACT_EVERY: &str = "1500ms";

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// The bytes of a block that was written once; 0 is a hole.
fn block(id: u64) -> Vec<u8> {
    if id == 0 {
        return vec![0; BLOCK];
    }
    let mut bytes = vec![0; BLOCK];
    StdRng::seed_from_u64(id).fill(&mut bytes[..]);
    bytes
}

/// One thread's files: the blocks that each must hold. Clones hold the same blocks.
struct Churn {
    random: StdRng,
    directory: PathBuf,
    files: Vec<Option<Vec<u64>>>,
    next: u64,
    written: u64,
}

impl Churn {
    fn new(directory: PathBuf, thread: u64, files: usize) -> Self {
        fs::create_dir(&directory).unwrap();
        Self {
            random: StdRng::seed_from_u64(thread),
            directory,
            files: vec![None; files],
            next: (thread + 1) << 40,
            written: 0,
        }
    }

    fn path(&self, file: usize) -> PathBuf {
        self.directory.join(format!("{file}"))
    }

    fn write(&mut self, file: usize, from: usize, count: usize) {
        let mut bytes = Vec::with_capacity(count * BLOCK);
        let path = self.path(file);
        let blocks = self.files[file].get_or_insert_default();
        blocks.resize(blocks.len().max(from + count), 0);
        for slot in &mut blocks[from..from + count] {
            *slot = self.next;
            self.next += 1;
            bytes.extend(block(*slot));
        }
        let opened = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        opened
            .unwrap()
            .write_all_at(&bytes, (from * BLOCK) as u64)
            .unwrap();
        self.written += bytes.len() as u64;
    }

    fn step(&mut self) {
        let file = self.random.random_range(0..self.files.len());
        let Some(blocks) = self.files[file].clone() else {
            let count = self.random.random_range(1..=BLOCKS_MAX);
            return self.write(file, 0, count);
        };
        let path = self.path(file);
        match self.random.random_range(0..100) {
            0..60 => {
                let from = self.random.random_range(0..=blocks.len());
                let count = self.random.random_range(1..=BLOCKS_MAX / 2);
                let from = from.min(BLOCKS_MAX - count);
                self.write(file, from, count);
            }
            60..75 => {
                let length = self.random.random_range(0..=blocks.len());
                let opened = File::options().write(true).open(path).unwrap();
                opened.set_len((length * BLOCK) as u64).unwrap();
                self.files[file].as_mut().unwrap().truncate(length);
            }
            75..90 => {
                fs::remove_file(path).unwrap();
                self.files[file] = None;
            }
            _ => {
                // By copy_file_range: the clone shares what it shows.
                let clone = self.random.random_range(0..self.files.len());
                if clone != file {
                    if self.files[clone].take().is_some() {
                        fs::remove_file(self.path(clone)).unwrap();
                    }
                    fs::copy(path, self.path(clone)).unwrap();
                    self.files[clone] = Some(blocks);
                }
            }
        }
    }

    fn check(&self, place: &Path) {
        for (file, blocks) in self.files.iter().enumerate() {
            let path = place.join(format!("{file}"));
            let Some(blocks) = blocks else {
                assert!(!path.exists(), "{}", path.display());
                continue;
            };
            let expected: Vec<u8> = blocks.iter().flat_map(|id| block(*id)).collect();
            assert!(fs::read(&path).unwrap() == expected, "{}", path.display());
        }
    }
}

#[test]
fn what_is_stored_stays_near_what_lives() {
    let operations = setting("HELIOFS_CHURN_OPERATIONS", 6_000);
    let live_bytes = setting("HELIOFS_CHURN_LIVE_MIB", 16) << 20;
    let speed = SPEED.to_string();
    let cluster = Cluster::with_dirs(1, |_, _| None, &["--stamp-speed", &speed]);
    cluster.format_file("churn", &["--trash-days", "0", "--deletion-grace", GRACE]);
    let volume = cluster.volume_url("churn");
    let flags = ["--compact-interval", COMPACT_EVERY, "--cache-size", "64M"];
    let mount = Mount::of(&cluster, "churn", &flags);
    // Some of the files are missing at any time, and some are clones of others.
    let files = live_bytes as usize / (BLOCKS_MAX / 2 * BLOCK) / THREADS as usize;
    let began = Instant::now();
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let mut churn = Churn::new(mount.join(format!("{thread}")), thread, files);
            std::thread::spawn(move || {
                for _ in 0..operations / THREADS {
                    churn.step();
                }
                churn
            })
        })
        .collect();
    let churns: Vec<Churn> = threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect();
    let took = began.elapsed();
    let written: u64 = churns.iter().map(|churn| churn.written).sum();
    let distinct: HashSet<u64> = churns
        .iter()
        .flat_map(|churn| churn.files.iter().flatten().flatten())
        .copied()
        .filter(|id| *id != 0)
        .collect();
    let live = distinct.len() as u64 * BLOCK as u64;

    // What became sparse last is compacted within a few looks of the mount.
    let gc = || cluster.run(&["gc", &volume, "--json"]).success().json();
    let kept = |gc: &serde_json::Value| gc["kept_bytes"].as_u64().unwrap();
    let at_once = gc();
    let mut last = at_once.clone();
    let settled = Instant::now();
    wait_for(
        "stored bytes near live bytes",
        Duration::from_secs(30),
        || {
            last = gc();
            (kept(&last) * 10 <= live * 15 + SEGMENT * 10).then_some(())
        },
    );
    println!(
        "{operations} operations in {took:.0?}, {} MiB written ({:.1} x what lives), {} MiB live; stored without the horizon: \
         {} MiB at once ({:.2} x), {} MiB {:.1?} later ({:.2} x), and {} MiB inside it",
        written >> 20,
        written as f64 / live as f64,
        live >> 20,
        kept(&at_once) >> 20,
        kept(&at_once) as f64 / live as f64,
        kept(&last) >> 20,
        settled.elapsed(),
        kept(&last) as f64 / live as f64,
        last["deleting_bytes"].as_u64().unwrap() >> 20,
    );

    // The load of a million operations is what the name says: a small one says little about what gathers.
    assert!(operations < 1_000_000 || written >= 20 * live);

    // Nothing reachable was deleted.
    let other = Mount::of(&cluster, "churn", &["--cache-size", "0", "--no-bgjob"]);
    for churn in &churns {
        churn.check(&other.join(churn.directory.strip_prefix(&mount.path).unwrap()));
    }
    cluster.run(&["fsck", &volume, "--level", "meta"]).success();
    cluster.run(&["fsck", &volume, "--level", "data"]).success();
    mount.unmount();
    other.unmount();
    // Ids of sessions that are over: what nobody has committed under them would be a leak.
    let gc = gc();
    assert_eq!(gc["leaked_bytes"], 0, "{gc}");
    assert_eq!(
        (&gc["unknown"], &gc["foreign"]),
        (&serde_json::json!([]), &serde_json::json!([]))
    );
}

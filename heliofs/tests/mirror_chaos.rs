//! What readers at a mirror see while nodes on both sides are killed and frozen, nodes and regions cut off from each other, and
//! buckets stand still, refuse, break off, lose answers and give wrong bytes: always a prefix of the source's history, never going
//! back, no file a mixture, no read that fails. What everybody did and saw is recorded, and checked at the end
//! (`jepsen/src/prefix.rs`).
//!
//! `HELIOFS_CHAOS_SECONDS` sets how long (40), `HELIOFS_CHAOS_SEED` which faults, `HELIOFS_CHAOS_HISTORY` where the record goes.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use heliofs_jepsen::{History, Kind, Op, Recorder, prefix};
use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::cluster::HELIOFS;
use support::mirror::{assert_mirror_equal, catch_up, give_s3_bucket, mirror_of, tree};
use support::{Cluster, Fault, FaultyS3, Lan, Mount, Process, Relay, S3, scratch};

const VOLUME: &str = "history";

/// Files that are replaced again and again.
const FILES: u64 = 12;

/// A reader's pace: with caches it would fill the record with thousands of reads a second.
const READ_EVERY: Duration = Duration::from_millis(1);

/// The file that the `version`-th write of the history replaces.
fn number(version: u64) -> u64 {
    (version.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) % FILES
}

/// What a file holds after a write: its version, and bytes that only this version has.
fn content(version: u64) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(version);
    let mut bytes = version.to_le_bytes().to_vec();
    let length = match version % 7 {
        0 => random.random_range(0..200),
        6 => random.random_range(1 << 20..5 << 20),
        _ => random.random_range(5_000..150_000),
    };
    let start = bytes.len();
    bytes.resize(start + length, 0);
    random.fill(&mut bytes[start..]);
    bytes
}

/// The history: one write after the other.
struct Writer {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Writer {
    fn start(root: PathBuf, history: Arc<Recorder>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let mut version = 0;
            while !stopped.load(Ordering::Relaxed) {
                version += 1;
                let file = number(version);
                let record = |kind, why| {
                    let op = Op::Write { file, version };
                    history.record("writer", kind, op, why).unwrap();
                };
                record(Kind::Invoke, None);
                match replace(&root, file, version) {
                    Ok(()) => record(Kind::Ok, None),
                    Err(error) => {
                        record(Kind::Info, Some(error.to_string()));
                        panic!("version {version}: {error}");
                    }
                }
            }
        });
        Self { stop, thread }
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

fn replace(root: &Path, file: u64, version: u64) -> std::io::Result<()> {
    let new = root.join("new");
    let mut written = File::create(&new)?;
    written.write_all(&content(version))?;
    written.sync_all()?;
    fs::rename(&new, root.join(file.to_string()))
}

/// Reads files in any order.
struct Reader {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

/// The version that a file holds, 0 if it does not exist; or why it can't be told.
fn read_version(path: &Path) -> Result<u64, String> {
    for _ in 0..50 {
        match fs::read(path) {
            Ok(bytes) => {
                let head = bytes.first_chunk();
                let version = head.map_or(0, |head| u64::from_le_bytes(*head));
                return match version {
                    0 => Err(format!("{} bytes without a version", bytes.len())),
                    _ if bytes == content(version) => Ok(version),
                    _ => Err(format!("a mixture of {version} and something else")),
                };
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
            // It was replaced, and its inode removed, between open and read.
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    Err("it is replaced faster than it can be read".to_owned())
}

impl Reader {
    fn start(name: &'static str, root: PathBuf, history: Arc<Recorder>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let mut random = StdRng::seed_from_u64(1);
            while !stopped.load(Ordering::Relaxed) {
                let file = random.random_range(0..FILES);
                let record = |kind, version, why| {
                    let op = Op::Read { file, version };
                    history.record(name, kind, op, why).unwrap();
                };
                record(Kind::Invoke, None, None);
                match read_version(&root.join(file.to_string())) {
                    Ok(version) => record(Kind::Ok, Some(version), None),
                    Err(why) => record(Kind::Fail, None, Some(why)),
                }
                thread::sleep(READ_EVERY);
            }
        });
        Self { stop, thread }
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

/// What may happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Nemesis {
    KillSourceNode,
    KillMirrorNode,
    KillMirrorLeader,
    FreezeSourceLeader,
    FreezeMirrorLeader,
    IsolateSourceLeader,
    CutLinks,
    FreezeSourceBucket,
    FreezeMirrorBucket,
    FaultySourceBucket(Fault),
    FaultyMirrorBucket(Fault),
    KillWorker,
}

impl Nemesis {
    const ALL: [Self; 18] = [
        Self::KillSourceNode,
        Self::KillMirrorNode,
        Self::KillMirrorLeader,
        Self::FreezeSourceLeader,
        Self::FreezeMirrorLeader,
        Self::IsolateSourceLeader,
        Self::CutLinks,
        Self::FreezeSourceBucket,
        Self::FreezeMirrorBucket,
        Self::FaultySourceBucket(Fault::SlowDown),
        Self::FaultySourceBucket(Fault::WrongBytes),
        Self::FaultySourceBucket(Fault::ShortBody),
        Self::FaultyMirrorBucket(Fault::SlowDown),
        Self::FaultyMirrorBucket(Fault::WrongBytes),
        Self::FaultyMirrorBucket(Fault::ShortBody),
        Self::FaultyMirrorBucket(Fault::Reset),
        Self::FaultyMirrorBucket(Fault::LostAnswer),
        Self::KillWorker,
    ];
}

/// Of requests to a faulty bucket, so many go wrong.
const FAULTS: f64 = 0.3;

/// Both regions, and what may happen to them.
struct World {
    history: Arc<Recorder>,
    source: Cluster,
    mirror: Cluster,
    /// The source's nodes are its hosts.
    lan: Lan,
    links: Vec<Relay>,
    /// The source's and the mirror's, and what the mirror's region reaches them through.
    buckets: [S3; 2],
    faulty: [FaultyS3; 2],
    worker: Process,
    worker_of: Box<dyn Fn() -> Process>,
    /// Packets that vanished.
    dropped: u64,
    /// How often readers had to go on at another node of the mirror.
    moved: u64,
}

fn pause(process: &Process, time: Duration) {
    process.signal(Signal::SIGSTOP);
    thread::sleep(time);
    process.signal(Signal::SIGCONT);
}

fn fail(bucket: &FaultyS3, fault: Fault, time: Duration) {
    bucket.set(Some((fault, FAULTS)));
    thread::sleep(time);
    bucket.set(None);
}

impl World {
    fn one_fault(&mut self, fault: Nemesis, random: &mut StdRng) {
        let time = Duration::from_millis(random.random_range(500..2500));
        let node = random.random_range(0..3);
        let what = format!("{fault:?} (node {node}, {time:?})");
        self.history
            .record("nemesis", Kind::Info, Op::Fault { what }, None)
            .unwrap();
        match fault {
            Nemesis::KillSourceNode | Nemesis::KillMirrorNode => {
                let cluster = match fault {
                    Nemesis::KillSourceNode => &mut self.source,
                    _ => &mut self.mirror,
                };
                cluster.kill_node(node);
                thread::sleep(time);
                cluster.start_node(node);
            }
            Nemesis::KillMirrorLeader => {
                let leader = self.mirror.leader();
                self.mirror.kill_node(leader);
                self.moved += u64::from(self.mirror.leader() != leader);
                thread::sleep(time);
                self.mirror.start_node(leader);
            }
            Nemesis::FreezeSourceLeader | Nemesis::FreezeMirrorLeader => {
                let cluster = match fault {
                    Nemesis::FreezeSourceLeader => &self.source,
                    _ => &self.mirror,
                };
                let leader = cluster.leader();
                pause(cluster.nodes[leader].process.as_ref().unwrap(), time);
            }
            Nemesis::IsolateSourceLeader => {
                self.lan.isolate(self.source.leader());
                thread::sleep(time);
                self.dropped += self.lan.dropped();
                self.lan.heal();
            }
            Nemesis::CutLinks => {
                for link in &self.links {
                    link.cut();
                }
                thread::sleep(time);
                for link in &self.links {
                    link.heal();
                }
            }
            Nemesis::FreezeSourceBucket => pause(&self.buckets[0].process, time),
            Nemesis::FreezeMirrorBucket => pause(&self.buckets[1].process, time),
            Nemesis::FaultySourceBucket(fault) => fail(&self.faulty[0], fault, time),
            Nemesis::FaultyMirrorBucket(fault) => fail(&self.faulty[1], fault, time),
            Nemesis::KillWorker => {
                self.worker.kill();
                self.worker = (self.worker_of)();
            }
        }
    }
}

#[test]
fn readers_at_a_mirror_see_a_prefix_whatever_happens() {
    let setting = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |value| value.parse().unwrap())
    };
    let seconds = setting("HELIOFS_CHAOS_SECONDS", 40);
    let seed = setting("HELIOFS_CHAOS_SEED", 1);
    let (theirs, ours) = (S3::start(), S3::start());
    let lan = Lan::new(3);
    let source = Cluster::in_lan(&lan, &[]);
    source.format_s3(VOLUME, &theirs, &[]);
    let trip = Duration::from_millis(10);
    let mut links: Vec<Relay> = source
        .nodes
        .iter()
        .map(|node| Relay::start(&node.address(), trip))
        .collect();
    let peers: Vec<String> = links.iter().map(Relay::address).collect();
    let mirror = mirror_of(&source, &format!("helio://{}", peers.join(",")), 3, &[]);
    let faulty = [&theirs, &ours].map(|bucket| FaultyS3::start(&bucket.url, seed));
    let bucket = Relay::start(faulty[0].url().trim_start_matches("http://"), trip);
    let theirs_from_here = theirs
        .bucket_url(VOLUME)
        .replace(&theirs.url, &format!("http://{}", bucket.address()));
    links.push(bucket);
    catch_up(&source, &mirror, VOLUME);
    let own = ours.bucket_url("ours").replace(&ours.url, &faulty[1].url());
    let url = mirror.volume_url(VOLUME);
    give_s3_bucket(&mirror, VOLUME, &ours, &own);
    let written = source.mount(VOLUME);
    let flags = ["--bucket2", &theirs_from_here];
    let latest = Mount::of(&mirror, VOLUME, &flags);
    let complete = Mount::of(
        &mirror,
        VOLUME,
        &[flags[0], flags[1], "--mirror-read", "complete"],
    );
    let logs = scratch();
    let (url_of_worker, token) = (url.clone(), mirror.token_file.clone());
    let far = theirs_from_here.clone();
    let count = AtomicU64::new(0);
    let worker_of = Box::new(move || {
        let log = logs.path().join(format!(
            "worker-{}.log",
            count.fetch_add(1, Ordering::Relaxed)
        ));
        Process::start("a worker", &log, Path::new(HELIOFS), |command| {
            command
                .args([
                    "mirror",
                    "worker",
                    &url_of_worker,
                    "--threads",
                    "4",
                    "--bucket2",
                    &far,
                ])
                .arg("--token-file")
                .arg(&token);
        })
    });
    let records = scratch();
    let path = std::env::var_os("HELIOFS_CHAOS_HISTORY")
        .map_or_else(|| records.path().join("history.jsonl"), PathBuf::from);
    let history = Arc::new(Recorder::create(&path).unwrap());
    let writer = Writer::start(written.path.clone(), history.clone());
    let readers = [
        Reader::start("latest", latest.path.clone(), history.clone()),
        Reader::start("complete", complete.path.clone(), history.clone()),
    ];
    let mut world = World {
        history: history.clone(),
        source,
        mirror,
        lan,
        links,
        buckets: [theirs, ours],
        faulty,
        dropped: 0,
        moved: 0,
        worker: worker_of(),
        worker_of,
    };
    let mut random = StdRng::seed_from_u64(seed);
    let until = Instant::now() + Duration::from_secs(seconds);
    // Each once before any comes again.
    let mut left: Vec<Nemesis> = Vec::new();
    let mut met = HashSet::new();
    while Instant::now() < until || met.len() < Nemesis::ALL.len() {
        if left.is_empty() {
            left = Nemesis::ALL.to_vec();
        }
        let fault = left.swap_remove(random.random_range(0..left.len()));
        met.insert(format!("{fault:?}"));
        world.one_fault(fault, &mut random);
        thread::sleep(Duration::from_millis(random.random_range(200..1500)));
    }
    assert!(world.dropped > 0, "cutting off a leader hit nothing");
    assert!(world.moved > 0, "no reader had to go to another node");
    for bucket in &world.faulty {
        let (requests, faults) = bucket.take_counts();
        assert!(faults > 0, "none of {requests} requests went wrong");
    }
    writer.end();
    let token = world
        .source
        .run(&["mirror", "token", &world.source.volume_url(VOLUME)])
        .success();
    world
        .mirror
        .run(&[
            "mirror",
            "wait",
            &url,
            token.out.trim(),
            "--data",
            "--timeout",
            "120s",
        ])
        .success();
    for reader in readers {
        reader.end();
    }
    let recorded = History::load(&path).unwrap();
    assert_eq!(recorded, history.history());
    let summary = prefix::check(&recorded).unwrap_or_else(|violation| {
        let kept = std::env::temp_dir().join("heliofs-chaos-history.jsonl");
        fs::copy(&path, &kept).unwrap();
        panic!("{violation}; the history is in {}", kept.display())
    });
    eprintln!("{summary:?}");
    for name in ["latest", "complete"] {
        let (reads, seen) = summary.readers[name];
        assert!(reads > 20 && seen > 0, "{name}: {reads} reads up to {seen}");
    }
    // The one moved forward all the while, and not only when everything was over.
    let shown: HashSet<u64> = recorded
        .events
        .iter()
        .filter(|event| event.process == "complete" && event.kind == Kind::Ok)
        .filter_map(|event| match &event.op {
            Op::Read { version, .. } => *version,
            _ => None,
        })
        .collect();
    assert!(shown.len() as u64 > 3 * FILES, "complete showed {shown:?}");
    assert_mirror_equal(&world.source, &world.mirror, VOLUME);
    let expected = tree(&written.path);
    let files: HashSet<u64> = (1..=summary.written).map(number).collect();
    assert_eq!(expected.len(), files.len());
    assert_eq!(tree(&latest.path), expected);
    assert_eq!(tree(&complete.path), expected);
    latest.unmount();
    complete.unmount();
    written.unmount();
}

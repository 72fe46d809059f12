//! What readers at a mirror see while nodes on both sides are killed and frozen, the link is cut and buckets stand still: always a
//! prefix of the source's history, never going back, no file a mixture, no read that fails.
//!
//! `HELIOFS_CHAOS_SECONDS` sets how long (40), `HELIOFS_CHAOS_SEED` which faults.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::cluster::HELIOFS;
use support::mirror::{assert_mirror_equal, catch_up, mirror_of, tree};
use support::{Cluster, Mount, Process, Relay, S3, scratch};

const VOLUME: &str = "history";

/// Files that are replaced again and again.
const FILES: u64 = 12;

/// The latest write of a file among the first `versions` of the history; 0: none.
fn latest(file: u64, versions: u64) -> u64 {
    (1..=versions)
        .rev()
        .find(|version| number(*version) == file)
        .unwrap_or(0)
}

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
    begun: Arc<AtomicU64>,
    thread: thread::JoinHandle<u64>,
}

impl Writer {
    fn start(root: PathBuf) -> Self {
        let (stop, begun) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, counter) = (stop.clone(), begun.clone());
        let thread = thread::spawn(move || {
            let mut version = 0;
            while !stopped.load(Ordering::Relaxed) {
                version += 1;
                counter.store(version, Ordering::SeqCst);
                let new = root.join("new");
                let mut file = File::create(&new).unwrap();
                file.write_all(&content(version)).unwrap();
                file.sync_all().unwrap();
                fs::rename(&new, root.join(number(version).to_string())).unwrap();
            }
            version
        });
        Self {
            stop,
            begun,
            thread,
        }
    }

    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// The prefix checker: reads files in any order; each must be as it was at a moment of the history that is not before anything
/// that this reader has seen.
struct Reader {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<(u64, u64)>,
}

fn read_version(path: &Path) -> u64 {
    for _ in 0..50 {
        match fs::read(path) {
            Ok(bytes) => {
                let version = bytes
                    .first_chunk()
                    .map_or(0, |head| u64::from_le_bytes(*head));
                assert!(version > 0, "{} has {} bytes", path.display(), bytes.len());
                assert!(bytes == content(version), "{} is a mixture", path.display());
                return version;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return 0,
            // It was replaced, and its inode removed, between open and read.
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) => {}
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }
    panic!("{} is replaced faster than it can be read", path.display());
}

impl Reader {
    fn start(name: &'static str, root: PathBuf, begun: Arc<AtomicU64>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let (mut seen, mut reads) = (0, 0);
            let mut random = StdRng::seed_from_u64(1);
            while !stopped.load(Ordering::Relaxed) {
                let file = random.random_range(0..FILES);
                let found = read_version(&root.join(file.to_string()));
                reads += 1;
                let least = latest(file, seen);
                assert!(
                    found >= least,
                    "{name}: file {file} is at version {found} after the history was seen up to {seen}, where it was at {least}"
                );
                assert!(
                    found == 0 || number(found) == file,
                    "{name}: another file's bytes"
                );
                assert!(
                    found <= begun.load(Ordering::SeqCst),
                    "{name}: from the future"
                );
                seen = seen.max(found);
            }
            (seen, reads)
        });
        Self { stop, thread }
    }

    /// How far it saw, and how often it read.
    fn end(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Both regions, and what may happen to them.
struct World {
    source: Cluster,
    mirror: Cluster,
    links: Vec<Relay>,
    buckets: Vec<S3>,
    worker: Process,
    worker_of: Box<dyn Fn() -> Process>,
}

fn pause(process: &Process, time: Duration) {
    process.signal(Signal::SIGSTOP);
    thread::sleep(time);
    process.signal(Signal::SIGCONT);
}

impl World {
    fn one_fault(&mut self, random: &mut StdRng) {
        let time = Duration::from_millis(random.random_range(500..2500));
        let node = random.random_range(0..3);
        let fault = random.random_range(0..8);
        eprintln!("fault {fault}, node {node}, {time:?}");
        match fault {
            0 | 1 => {
                let cluster = if fault == 0 {
                    &mut self.source
                } else {
                    &mut self.mirror
                };
                cluster.kill_node(node);
                thread::sleep(time);
                cluster.start_node(node);
            }
            2 | 3 => {
                let cluster = if fault == 2 {
                    &self.source
                } else {
                    &self.mirror
                };
                let leader = cluster.leader();
                pause(cluster.nodes[leader].process.as_ref().unwrap(), time);
            }
            4 => {
                for link in &self.links {
                    link.cut();
                }
                thread::sleep(time);
                for link in &self.links {
                    link.heal();
                }
            }
            5 | 6 => pause(&self.buckets[fault - 5].process, time),
            _ => {
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
    let source = Cluster::start();
    source.format_s3(VOLUME, &theirs, &[]);
    let trip = Duration::from_millis(10);
    let mut links: Vec<Relay> = source
        .nodes
        .iter()
        .map(|node| Relay::start(&node.address(), trip))
        .collect();
    let peers: Vec<String> = links.iter().map(Relay::address).collect();
    let mirror = mirror_of(&source, &format!("helio://{}", peers.join(",")), 3, &[]);
    let bucket = Relay::start(theirs.url.trim_start_matches("http://"), trip);
    let theirs_from_here = theirs
        .bucket_url(VOLUME)
        .replace(&theirs.url, &format!("http://{}", bucket.address()));
    links.push(bucket);
    catch_up(&source, &mirror, VOLUME);
    let url = mirror.volume_url(VOLUME);
    let own = ours.bucket_url("ours");
    mirror
        .run_with(&["mirror", "bucket", &url, "--bucket", &own], |command| {
            ours.keys(command)
        })
        .success();
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
    let writer = Writer::start(written.path.clone());
    let readers = [
        Reader::start("latest", latest.path.clone(), writer.begun.clone()),
        Reader::start("complete", complete.path.clone(), writer.begun.clone()),
    ];
    let mut world = World {
        source,
        mirror,
        links,
        buckets: vec![theirs, ours],
        worker: worker_of(),
        worker_of,
    };
    let mut random = StdRng::seed_from_u64(seed);
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        world.one_fault(&mut random);
        thread::sleep(Duration::from_millis(random.random_range(200..1500)));
    }
    let versions = writer.end();
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
    for (name, reader) in ["latest", "complete"].into_iter().zip(readers) {
        let (seen, reads) = reader.end();
        eprintln!("{name}: {reads} reads, the history seen up to {seen} of {versions}");
        assert!(reads > 20 && seen > 0, "{name}: {reads} reads up to {seen}");
    }
    assert_mirror_equal(&world.source, &world.mirror, VOLUME);
    let expected = tree(&written.path);
    assert_eq!(
        expected.len() as u64,
        (0..FILES)
            .filter(|file| self::latest(*file, versions) > 0)
            .count() as u64
    );
    assert_eq!(tree(&latest.path), expected);
    assert_eq!(tree(&complete.path), expected);
    latest.unmount();
    complete.unmount();
    written.unmount();
}

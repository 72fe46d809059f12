//! An S3 server on which one request in ten goes wrong, in each of the ways that real ones know: no wrong byte, no lost
//! acknowledged write, no operation that hangs.
//!
//! `make faults` (HELIOFS_FAULTS_SECONDS=60) gives each fault a minute, with fsx beside the load.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::{Cluster, Fault, FaultyS3, Mount, Process, S3, scratch, tools, wait_for};

/// Of requests that can be hit by the fault.
const RATE: f64 = 0.1;
/// … when there are seconds for it, not a minute: some fault must happen among few requests.
const RATE_SHORT: f64 = 0.3;

const THREADS: u64 = 4;
const FILES: usize = 6;
const FILE_BYTES_MAX: usize = 512 << 10;

/// `--io-timeout` of the mounts.
const IO_TIMEOUT: &str = "60s";

/// No operation may take longer: the time-out, twice for reads, and a margin for two busy cores.
const OPERATION_MAX: Duration = Duration::from_secs(150);

/// What one thread has done.
#[derive(Default)]
struct Done {
    operations: AtomicU64,
    /// Operations that failed with EIO, and were tried again until they succeeded.
    refused: AtomicU64,
    slowest_ms: AtomicU64,
}

/// Each thread's files, as they must be.
struct Load {
    random: StdRng,
    directory: PathBuf,
    model: Vec<Vec<u8>>,
    done: Arc<Done>,
    names: u64,
}

impl Load {
    fn new(directory: PathBuf, seed: u64, done: Arc<Done>) -> Self {
        fs::create_dir(&directory).unwrap();
        let load = Self {
            random: StdRng::seed_from_u64(seed),
            directory,
            model: vec![Vec::new(); FILES],
            done,
            names: 0,
        };
        for file in 0..FILES {
            File::create_new(load.path(file)).unwrap();
        }
        load
    }

    fn path(&self, file: usize) -> PathBuf {
        self.directory.join(format!("f{file}"))
    }

    /// Tries until it succeeds: an error says that nothing has happened, and that what was written before is kept.
    fn until_done<T>(&self, file: usize, mut step: impl FnMut() -> io::Result<T>) -> T {
        let deadline = Instant::now() + 4 * OPERATION_MAX;
        loop {
            let began = Instant::now();
            let outcome = step();
            let took = began.elapsed();
            assert!(took < OPERATION_MAX, "an operation took {took:?}");
            self.done
                .slowest_ms
                .fetch_max(took.as_millis() as u64, Ordering::Relaxed);
            match outcome {
                Ok(done) => return done,
                Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                    assert!(Instant::now() < deadline, "EIO again and again");
                    self.done.refused.fetch_add(1, Ordering::Relaxed);
                    // Stores what could not be stored; only then are there writes again.
                    if let Ok(file) = File::open(self.path(file)) {
                        file.sync_all().ok();
                    }
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn step(&mut self) {
        let file = self.random.random_range(0..FILES);
        let path = self.path(file);
        let open = || File::options().read(true).write(true).open(&path);
        match self.random.random_range(0..100) {
            0..40 => {
                let offset = self.random.random_range(0..FILE_BYTES_MAX - (64 << 10));
                let mut bytes = vec![0; self.random.random_range(1..64 << 10)];
                self.random.fill(&mut bytes[..]);
                self.until_done(file, || open()?.write_all_at(&bytes, offset as u64));
                let model = &mut self.model[file];
                model.resize(model.len().max(offset + bytes.len()), 0);
                model[offset..offset + bytes.len()].copy_from_slice(&bytes);
            }
            40..75 => self.check(file, &path),
            75..85 => {
                self.until_done(file, || open()?.sync_all());
            }
            85..92 => {
                let length = self.random.random_range(0..FILE_BYTES_MAX);
                self.until_done(file, || open()?.set_len(length as u64));
                self.model[file].resize(length, 0);
            }
            _ => {
                self.names += 1;
                let new = self.directory.join(format!("new-{}", self.names));
                let mut bytes = vec![0; self.random.random_range(1..100 << 10)];
                self.random.fill(&mut bytes[..]);
                self.until_done(file, || File::create(&new)?.write_all_at(&bytes, 0));
                self.until_done(file, || match fs::rename(&new, &path) {
                    // Its answer was lost, and it took effect.
                    Err(error) if error.kind() == io::ErrorKind::NotFound && !new.exists() => {
                        Ok(())
                    }
                    renamed => renamed,
                });
                self.model[file] = bytes;
            }
        }
        self.done.operations.fetch_add(1, Ordering::Relaxed);
    }

    fn check(&self, file: usize, path: &Path) {
        let read = self.until_done(file, || {
            let file = File::open(path)?;
            // From the mount, not from the kernel's pages.
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
            let mut bytes = vec![0; file.metadata()?.len() as usize];
            file.read_exact_at(&mut bytes, 0)?;
            Ok(bytes)
        });
        let model = &self.model[file];
        assert_eq!(read.len(), model.len(), "{}", path.display());
        let wrong = read
            .iter()
            .zip(model)
            .position(|(read, model)| read != model);
        assert_eq!(wrong, None, "{}", path.display());
    }
}

/// fsx over and over, until the time is over.
fn fsx(directory: &Path, until: Instant) -> u64 {
    let scratch = scratch();
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../.ci/fsx.toml");
    let program = tools().join("cargo/bin/fsx");
    assert!(
        program.exists(),
        "{} is missing: run .ci/setup suites",
        program.display()
    );
    let mut rounds = 0;
    while Instant::now() < until {
        let log = scratch.path().join("fsx.log");
        let mut process = Process::start("fsx", &log, &program, |command| {
            command
                .args(["-f", config, "-N", "300", "-S", &format!("{rounds}"), "-P"])
                .arg(scratch.path())
                .arg(directory.join(format!("fsx-{rounds}")));
        });
        let ended = process.wait(4 * OPERATION_MAX);
        assert!(ended.success(), "fsx: {ended}\n{}", process.log_tail());
        rounds += 1;
    }
    rounds
}

#[test]
fn no_fault_of_the_store_costs_a_byte_or_hangs() {
    let full = std::env::var("HELIOFS_FAULTS_SECONDS").ok();
    let seconds: u64 = full.as_ref().map_or(4, |seconds| seconds.parse().unwrap());
    let s3 = S3::start();
    let relay = FaultyS3::start(&s3.url, 1);
    let cluster = Cluster::with_dirs(1, |_, _| None, &["--session-timeout", "3s"]);
    // What is stored as it is, and what is compressed and encrypted, lies elsewhere and is read in other ways.
    let format = |name: &str, codec: &[&str]| {
        let (url, bucket) = (cluster.url(), format!("{}/{name}", relay.url()));
        let format = ["format", &url, name, "--storage", "s3", "--bucket", &bucket];
        let grace = ["--trash-days", "0", "--deletion-grace", "0s"];
        cluster
            .run_with(&[&format[..], &grace, codec].concat(), |command| {
                s3.keys(command)
            })
            .success();
    };
    let phrase = cluster.directory.join("phrase");
    fs::write(&phrase, "open sesame\n").unwrap();
    fs::set_permissions(&phrase, fs::Permissions::from_mode(0o600)).unwrap();
    let phrase = ["--passphrase-file", phrase.to_str().unwrap()];
    format("plain", &[]);
    format(
        "encoded",
        &[&["--encrypt", "--compress", "zstd"], &phrase[..]].concat(),
    );
    // Little is cached, so that reads reach the bucket.
    let flags = [
        "--cache-size",
        "0",
        "--buffer-size",
        "8M",
        "--io-timeout",
        IO_TIMEOUT,
    ];

    // Each fault with both in the long run, in turns in the short one.
    let both = |(number, fault)| [(number, fault, "plain"), (number + 100, fault, "encoded")];
    let rounds = (0u64..).zip(Fault::ALL).flat_map(both);
    let chosen = |(number, _, name): &(u64, Fault, &str)| {
        full.is_some() || (number % 2 == 1) == (*name == "encoded")
    };
    for (number, fault, name) in rounds.filter(chosen) {
        relay.set(None);
        let volume = cluster.volume_url(name);
        let flags = match name {
            "plain" => flags.to_vec(),
            _ => [&flags[..], &phrase].concat(),
        };
        let mut mount = Mount::of(&cluster, name, &flags);
        let place = mount.join(format!("{fault:?}"));
        fs::create_dir(&place).unwrap();
        relay.take_counts();
        // Reads from the bucket are few.
        let of_reads = matches!(fault, Fault::ShortBody | Fault::WrongBytes);
        let rate = if full.is_none() && of_reads {
            RATE_SHORT
        } else {
            RATE
        };
        relay.set(Some((fault, rate)));
        let until = Instant::now() + Duration::from_secs(seconds);
        let over = Arc::new(AtomicBool::new(false));
        let done: Vec<Arc<Done>> = (0..THREADS).map(|_| Arc::default()).collect();
        let threads: Vec<_> = (0..THREADS)
            .zip(&done)
            .map(|(thread, done)| {
                let place = place.join(format!("{thread}"));
                let (over, done) = (over.clone(), done.clone());
                std::thread::spawn(move || {
                    let mut load = Load::new(place, number * 100 + thread, done);
                    while !over.load(Ordering::Relaxed) {
                        load.step();
                    }
                    // From here on everything is acknowledged.
                    for file in 0..FILES {
                        let path = load.path(file);
                        load.until_done(file, || File::open(&path)?.sync_all());
                    }
                    load
                })
            })
            .collect();
        let mut rounds = 0;
        if full.is_some() {
            rounds = fsx(&place, until);
        }
        let mut listings = 0;
        while Instant::now() < until || (listings < 5 && fault == Fault::StaleListing) {
            if fault == Fault::StaleListing {
                // Who lists: what is deleted and what is held for missing must not depend on an old listing.
                let gc = cluster.run(&["gc", &volume, "--delete"]);
                assert_eq!(gc.code, 0, "{}", gc.err);
                let fsck = cluster.run(&["fsck", &volume, "--level", "exists"]);
                assert_eq!(fsck.code, 0, "{}\n{}", fsck.out, fsck.err);
                listings += 1;
            } else {
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        over.store(true, Ordering::Relaxed);
        wait_for("the end of the load", 4 * OPERATION_MAX, || {
            threads
                .iter()
                .all(|thread| thread.is_finished())
                .then_some(())
        });
        let loads: Vec<Load> = threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect();
        mount.process.kill();
        let (requests, faults) = relay.take_counts();
        relay.set(None);

        let other = Mount::of(&cluster, name, &flags);
        for load in &loads {
            let place = other.join(load.directory.strip_prefix(&mount.path).unwrap());
            for file in 0..FILES {
                load.check(file, &place.join(format!("f{file}")));
            }
        }
        other.unmount();
        cluster.run(&["fsck", &volume, "--level", "data"]).success();
        let sum = |count: fn(&Done) -> &AtomicU64| {
            let counts = done.iter().map(|done| count(done).load(Ordering::Relaxed));
            counts.sum::<u64>()
        };
        let slowest = done
            .iter()
            .map(|done| done.slowest_ms.load(Ordering::Relaxed))
            .max();
        println!(
            "{fault:?}, {name}: {} operations, {rounds} rounds of fsx, {requests} requests, {faults} faults, {} times EIO, slowest operation {} ms",
            sum(|done| &done.operations),
            sum(|done| &done.refused),
            slowest.unwrap_or(0),
        );
        assert!(
            faults > 0,
            "{fault:?}: nothing went wrong, which proves nothing"
        );
    }
}

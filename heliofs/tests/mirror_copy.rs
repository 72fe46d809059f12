//! A mirror with a bucket of its own: objects are copied into it by whoever has time, verified; reads prefer it, fall back to the
//! source's, and heal it; it says up to where it is complete.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use serde_json::Value;
use support::cluster::{HELIOFS, Ran};
use support::mirror::{
    catch_up, give_bucket, give_s3_bucket, mirror_of, mirror_status, token, tree, wait_complete,
    wait_for_status,
};
use support::{Cluster, Mount, Process, S3, scratch, wait_for};

/// Source and mirror, each of one node, with a directory each for their objects.
struct Regions {
    source: Cluster,
    mirror: Cluster,
    buckets: tempfile::TempDir,
}

const VOLUME: &str = "photos";

impl Regions {
    fn start(nodes: usize) -> Self {
        Self::with_flags(nodes, &[], &[])
    }

    fn with_flags(nodes: usize, source_flags: &[&str], mirror_flags: &[&str]) -> Self {
        let buckets = scratch();
        let source = Cluster::with_dirs(1, |_, _| None, source_flags);
        let regions = Self {
            mirror: mirror_of(&source, &source.url(), nodes, mirror_flags),
            source,
            buckets,
        };
        let bucket = regions.bucket("source");
        regions
            .source
            .run(&[
                "format",
                &regions.source.volume_url(VOLUME),
                "--bucket",
                bucket.to_str().unwrap(),
                "--deletion-grace",
                "0s",
            ])
            .success();
        catch_up(&regions.source, &regions.mirror, VOLUME);
        regions
    }

    fn bucket(&self, region: &str) -> PathBuf {
        self.buckets.path().join(region)
    }

    fn mirror_url(&self) -> String {
        self.mirror.volume_url(VOLUME)
    }

    fn give_bucket(&self, flags: &[&str]) -> Ran {
        give_bucket(&self.mirror, VOLUME, &self.bucket("mirror"), flags)
    }

    fn token(&self) -> String {
        token(&self.source, VOLUME)
    }

    /// Waits until the mirror's bucket has everything that the source has acknowledged.
    fn complete(&self) {
        let token = self.token();
        self.mirror
            .run(&[
                "mirror",
                "wait",
                &self.mirror_url(),
                &token,
                "--data",
                "--timeout",
                "120s",
            ])
            .success();
    }

    fn worker(&self, flags: &[&str]) -> Ran {
        let url = self.mirror_url();
        let mut all = vec!["mirror", "worker", &url, "--once", "--json"];
        all.extend(flags);
        self.mirror.run(&all)
    }

    fn copies(&self) -> Value {
        mirror_status(&self.mirror, VOLUME).unwrap()["bucket"].clone()
    }

    /// Objects of segments by name, in one region's bucket.
    fn objects(&self, region: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let root = self.bucket(region).join(VOLUME);
        let mut found = BTreeMap::new();
        for directory in fs::read_dir(&root).unwrap() {
            let directory = directory.unwrap().path();
            if !directory.is_dir() {
                continue;
            }
            for object in fs::read_dir(directory).unwrap() {
                let path = object.unwrap().path();
                // What a killed process had not finished writing.
                if path.to_string_lossy().contains('#') {
                    continue;
                }
                let bytes = fs::read(&path).unwrap();
                found.insert(path.strip_prefix(&root).unwrap().to_owned(), bytes);
            }
        }
        found
    }
}

/// Files whose bytes tell whose they are, of all sorts of sizes.
fn write_files(root: &Path, seed: u64, files: usize) {
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    for number in 0..files {
        let length = match number % 5 {
            0 => random.random_range(0..4096),
            4 => random.random_range(4 << 20..7 << 20),
            _ => random.random_range(5000..200_000),
        };
        let mut bytes = vec![0; length];
        random.fill(&mut bytes[..]);
        let mut file = File::create(root.join(format!("{seed}-{number}"))).unwrap();
        file.write_all(&bytes).unwrap();
        file.sync_all().unwrap();
    }
}

fn flip(object: &Path) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(object)
        .unwrap();
    let at = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
}

#[test]
fn a_complete_mirror_lives_on_without_the_source_region() {
    let (theirs, ours) = (S3::start(), S3::start());
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_s3(VOLUME, &theirs, &[]);
    let mirror = mirror_of(&source, &source.url(), 3, &[]);
    let written = source.mount(VOLUME);
    write_files(&written.path, 1, 20);
    catch_up(&source, &mirror, VOLUME);
    give_s3_bucket(&mirror, VOLUME, &ours, &ours.bucket_url("ours"));
    // A mount copies in the background, what was there and what comes.
    let seen = mirror.mount(VOLUME);
    write_files(&written.path, 2, 20);
    wait_complete(&source, &mirror, VOLUME);
    let status = mirror_status(&mirror, VOLUME).unwrap();
    assert_eq!(status["complete"], status["applied"], "{status}");
    assert_eq!(status["bucket"]["quarantined_segments"], 0, "{status}");
    let expected = tree(&written.path);
    assert_eq!(tree(&seen.path), expected);
    seen.unmount();
    written.unmount();
    drop(source);
    drop(theirs);
    // Nothing is cached, and the region that wrote it is gone.
    let fresh = mirror.mount(VOLUME);
    assert_eq!(tree(&fresh.path), expected);
    fresh.unmount();
}

#[test]
fn reads_fall_back_to_the_source_and_what_they_bring_becomes_the_copy() {
    let regions = Regions::start(1);
    let written = regions.source.mount(VOLUME);
    write_files(&written.path, 3, 15);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    regions.give_bucket(&[]).success();
    // One that copies nothing: every byte comes from the source's bucket.
    let idle = Mount::of(&regions.mirror, VOLUME, &["--no-bgjob"]);
    assert_eq!(tree(&idle.path), tree(&written.path));
    assert!(regions.objects("mirror").is_empty(), "nobody copies");
    let status = wait_for_status(&regions.mirror, VOLUME, "the walk", |status| {
        status["bucket"]["walking"] == false
    });
    assert!(
        status["bucket"]["pending_segments"].as_u64().unwrap() > 0,
        "{status}"
    );
    assert_eq!(status["complete"], "0:0", "{status}");
    // It counts what crossed the link nevertheless: all that is not inline.
    let sizes = fs::read_dir(&written.path)
        .unwrap()
        .map(|file| file.unwrap().metadata().unwrap().len());
    let data: u64 = sizes.filter(|size| *size > 4096).sum();
    let status = wait_for_status(
        &regions.mirror,
        VOLUME,
        "its reads being counted",
        |status| {
            let pulled = status["bucket"]["pulled_bytes"].as_u64();
            pulled.is_some_and(|pulled| pulled >= data)
        },
    );
    idle.unmount();
    let before = status["bucket"]["pulled_bytes"].as_u64().unwrap();
    // With tasks handed out at a byte a second what is there is what was read, and one that came first.
    let limit = [
        "mirror",
        "bucket",
        &regions.mirror_url(),
        "--copy-limit",
        "1",
    ];
    regions.mirror.run(&limit).success();
    let seen = Mount::of(&regions.mirror, VOLUME, &[]);
    assert_eq!(tree(&seen.path), tree(&written.path));
    regions.complete();
    let copies = regions.copies();
    let objects = regions.objects("source");
    assert_eq!(regions.objects("mirror"), objects);
    // Each object crossed the link once, but for that one, which a read may have met before it was copied.
    let bytes: usize = objects.values().map(Vec::len).sum();
    let largest = objects.values().map(Vec::len).max().unwrap();
    let pulled = copies["pulled_bytes"].as_u64().unwrap() - before;
    assert!(
        pulled >= bytes as u64 && pulled <= (bytes + largest) as u64,
        "{pulled} of {bytes}"
    );
    seen.unmount();
    written.unmount();
}

#[test]
fn workers_share_the_work_and_kills_lose_nothing() {
    let regions = Regions::start(3);
    let written = regions.source.mount(VOLUME);
    write_files(&written.path, 4, 40);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    regions.give_bucket(&[]).success();
    let logs = scratch();
    let start = |number: usize| {
        let log = logs.path().join(format!("worker-{number}.log"));
        Process::start(
            &format!("worker {number}"),
            &log,
            Path::new(HELIOFS),
            |command| {
                command
                    .args(["mirror", "worker", &regions.mirror_url(), "--threads", "2"])
                    // Slow enough to be killed in the middle.
                    .args(["--download-limit", "8M"])
                    .arg("--token-file")
                    .arg(&regions.mirror.token_file);
            },
        )
    };
    let mut workers: Vec<Process> = (0..2).map(start).collect();
    let total = regions.objects("source").len();
    for round in 0..3 {
        let done = total * (round + 1) / 5;
        wait_for("copies to be made", Duration::from_secs(60), || {
            let copies = regions.copies();
            (copies["copied_segments"].as_u64()? >= done as u64).then_some(())
        });
        workers[round % 2].kill();
        workers[round % 2] = start(2 + round);
    }
    // What the killed ones had leased is leased again after a minute at most, or when their sessions end.
    regions.complete();
    assert_eq!(regions.objects("mirror"), regions.objects("source"));
    let copies = regions.copies();
    assert_eq!(copies["lost_segments"], 0, "{copies}");
    // What a killed one had not reported was made again, and no more than that.
    let objects = regions.objects("source");
    let bytes: usize = objects.values().map(Vec::len).sum();
    let largest = objects.values().map(Vec::len).max().unwrap();
    let pulled = copies["pulled_bytes"].as_u64().unwrap();
    assert!(
        pulled <= (bytes + 3 * 2 * largest) as u64,
        "{pulled} of {bytes}"
    );
    drop(workers);
    let ran = regions.worker(&[]).success().json();
    assert_eq!(ran["copied_segments"], 0, "nothing is left to do: {ran}");
    written.unmount();
}

#[test]
fn bad_copies_heal_and_what_is_bad_at_the_source_is_in_nobodys_way() {
    let regions = Regions::start(1);
    let written = regions.source.mount(VOLUME);
    write_files(&written.path, 5, 25);
    let names: Vec<PathBuf> = regions.objects("source").into_keys().collect();
    // Before it is copied: nobody has it whole any more.
    let hopeless = regions.bucket("source").join(VOLUME).join(&names[0]);
    let whole = fs::read(&hopeless).unwrap();
    flip(&hopeless);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    regions.give_bucket(&[]).success();
    let url = regions.mirror_url();
    regions
        .mirror
        .run(&["mirror", "worker", &url, "--once"])
        .failure(4, "can't be had");
    let status = mirror_status(&regions.mirror, VOLUME).unwrap();
    assert_eq!(status["bucket"]["quarantined_segments"], 1, "{status}");
    assert_eq!(
        status["complete"], status["applied"],
        "quarantined ones are excepted: {status}"
    );
    let listed = regions
        .mirror
        .run(&["mirror", "status", &url, "--missing"])
        .success();
    assert!(listed.out.contains("checksum"), "{}", listed.out);
    // The source is repaired.
    fs::write(&hopeless, &whole).unwrap();
    regions
        .mirror
        .run(&["mirror", "bucket", &url, "--retry"])
        .success();
    regions.worker(&[]).success();
    assert_eq!(regions.copies()["quarantined_segments"], 0);
    assert_eq!(regions.objects("mirror"), regions.objects("source"));
    // Copies that rot, are cut short or vanish.
    for (number, name) in names.iter().enumerate() {
        let copy = regions.bucket("mirror").join(VOLUME).join(name);
        match number % 3 {
            0 => flip(&copy),
            1 => fs::remove_file(&copy).unwrap(),
            _ => File::options()
                .write(true)
                .open(&copy)
                .unwrap()
                .set_len(100)
                .unwrap(),
        }
    }
    let seen = Mount::of(&regions.mirror, VOLUME, &[]);
    assert_eq!(tree(&seen.path), tree(&written.path));
    wait_for("the copies to heal", Duration::from_secs(60), || {
        (regions.objects("mirror") == regions.objects("source")).then_some(())
    });
    // A read that was under way may have met one a second time.
    let lost = regions.copies()["lost_segments"].as_u64().unwrap();
    assert!(lost >= names.len() as u64, "{lost} of {}", names.len());
    seen.unmount();
    written.unmount();
}

#[test]
fn what_the_source_removes_goes_from_the_mirrors_bucket_too() {
    let regions = Regions::start(1);
    let written = regions.source.mount(VOLUME);
    regions.give_bucket(&[]).success();
    let seen = Mount::of(&regions.mirror, VOLUME, &[]);
    for round in 0..3 {
        write_files(&written.path, 6, 10);
        for number in (round % 2..10).step_by(2) {
            fs::remove_file(written.join(format!("6-{number}"))).unwrap();
        }
    }
    regions.complete();
    wait_for(
        "the same objects in both buckets",
        Duration::from_secs(90),
        || {
            let (ours, theirs) = (regions.objects("mirror"), regions.objects("source"));
            let only = |one: &BTreeMap<PathBuf, Vec<u8>>,
                        other: &BTreeMap<PathBuf, Vec<u8>>|
             -> Vec<PathBuf> {
                one.keys()
                    .filter(|name| !other.contains_key(*name))
                    .cloned()
                    .collect()
            };
            eprintln!(
                "here only: {:?}; there only: {:?}",
                only(&ours, &theirs),
                only(&theirs, &ours)
            );
            (ours == theirs).then_some(())
        },
    );
    assert_eq!(tree(&seen.path), tree(&written.path));
    seen.unmount();
    written.unmount();
}

#[test]
fn a_mirror_that_loads_anew_keeps_the_objects_it_has() {
    let regions = Regions::start(1);
    let written = regions.source.mount(VOLUME);
    write_files(&written.path, 7, 15);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    regions.give_bucket(&[]).success();
    regions.worker(&[]).success();
    let before = regions.copies()["pulled_bytes"].as_u64().unwrap();
    regions
        .mirror
        .run(&["mirror", "reload", &regions.mirror_url()])
        .success();
    wait_for_status(&regions.mirror, VOLUME, "the second load", |status| {
        status["loads"].as_u64().unwrap() >= 2 && status["state"] == "following"
    });
    write_files(&written.path, 8, 5);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    let ran = regions.worker(&[]).success().json();
    assert!(ran["found_segments"].as_u64().unwrap() > 0, "{ran}");
    regions.complete();
    let news = regions.objects("source");
    let copies = regions.copies();
    let pulled = copies["pulled_bytes"].as_u64().unwrap() - before;
    let all: usize = news.values().map(Vec::len).sum();
    assert!(
        pulled < all as u64 / 2,
        "{pulled} of {all} bytes were pulled again"
    );
    assert_eq!(regions.objects("mirror"), news);
    written.unmount();
}

/// Bytes below a directory, as the disk has them.
fn disk_bytes(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => disk_bytes(&entry.path()),
        // Removed meanwhile, perhaps.
        metadata => metadata.map_or(0, |metadata| metadata.blocks() * 512),
    });
    bytes.sum()
}

/// `HELIOFS_CAP_MIB=256` makes 2 GiB of log at the source meanwhile; with little, RocksDB's own room hides what the log takes, and
/// only the slot and the objects are checked.
#[test]
fn a_mirror_away_past_its_cap_costs_the_source_no_room_and_keeps_its_objects() {
    const FILE_BYTES: usize = 4000;
    const THREADS: u64 = 4;
    let cap = std::env::var("HELIOFS_CAP_MIB").map_or(1, |mib| mib.parse::<u64>().unwrap()) << 20;
    let settings = scratch();
    let config = settings.path().join("meta.toml");
    let kept = cap >> 12;
    let text = format!("[log]\nentries_min = 50\nentries_max = 100000\nbytes_max = \"{kept}K\"\n");
    fs::write(&config, text).unwrap();
    let source_flags = ["--config", config.to_str().unwrap()];
    let cap_text = cap.to_string();
    let mirror_flags = ["--mirror-log-cap", &cap_text, "--mirror-name", "east"];
    let mut regions = Regions::with_flags(1, &source_flags, &mirror_flags);
    let written = regions.source.mount(VOLUME);
    write_files(&written.path, 21, 15);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    regions.give_bucket(&[]).success();
    regions.worker(&[]).success();
    regions.complete();
    let first = regions.objects("mirror");
    assert!(first.len() > 3);
    let pulled = regions.copies()["pulled_bytes"].as_u64().unwrap();

    regions.mirror.stop_node(0);
    let writes = 8 * cap / FILE_BYTES as u64 / THREADS;
    let writers: Vec<_> = (0..THREADS)
        .map(|thread| {
            let directory = written.join(format!("churn-{thread}"));
            fs::create_dir(&directory).unwrap();
            std::thread::spawn(move || {
                for n in 0..writes {
                    let mut file = File::create(directory.join(format!("{}", n % 50))).unwrap();
                    file.write_all(&[n as u8; FILE_BYTES]).unwrap();
                    file.sync_all().unwrap();
                }
            })
        })
        .collect();
    let (log, mut most) = (regions.source.nodes[0].data_dir.join("log"), 0);
    assert!(disk_bytes(&log) > 0, "no log in {}", log.display());
    while !writers.iter().all(std::thread::JoinHandle::is_finished) {
        most = most.max(disk_bytes(&log));
        std::thread::sleep(Duration::from_millis(200));
    }
    for writer in writers {
        writer.join().unwrap();
    }
    // RocksDB's write buffers and files that wait for compaction come on top.
    let room = 2 * cap + (64 << 20);
    println!(
        "{} MiB of log at most while {} MiB were written; the mirror's cap is {} MiB",
        most >> 20,
        (8 * cap) >> 20,
        cap >> 20
    );
    assert!(most < room, "{most} bytes of log; the cap is {cap}");
    let url = regions.source.volume_url(VOLUME);
    let slot = wait_for("giving the slot up", Duration::from_secs(30), || {
        let slots = regions.source.run(&["mirror", "list", &url, "--json"]);
        Some(slots.success().json()[0].clone()).filter(|slot| slot["state"] == "invalid")
    });
    assert!(slot["why"].as_str().unwrap().contains("log"), "{slot}");

    regions.mirror.start_node(0);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    assert_eq!(mirror_status(&regions.mirror, VOLUME).unwrap()["loads"], 2);
    let ran = regions.worker(&[]).success().json();
    assert!(ran["found_segments"].as_u64().unwrap() > 0, "{ran}");
    regions.complete();
    let now = regions.objects("mirror");
    for (name, object) in &first {
        assert!(now.get(name) == Some(object), "{} is lost", name.display());
    }
    assert_eq!(now, regions.objects("source"));
    let again = regions.copies()["pulled_bytes"].as_u64().unwrap() - pulled;
    let held: usize = first.values().map(Vec::len).sum();
    assert!(
        again < held as u64 / 4,
        "{again} bytes were pulled again of {held}"
    );
    let seen = regions.mirror.mount(VOLUME);
    assert_eq!(tree(&seen.path), tree(&written.path));
    seen.unmount();
    written.unmount();
}

#[test]
fn a_promoted_mirror_writes_into_its_own_bucket_and_failback_copies_differences_only() {
    let regions = Regions::start(1);
    let written = regions.source.mount(VOLUME);
    write_files(&written.path, 9, 15);
    regions.give_bucket(&[]).success();
    catch_up(&regions.source, &regions.mirror, VOLUME);
    regions.worker(&[]).success();
    // Not copied when the mirror is promoted: it comes from the source's bucket all the same.
    write_files(&written.path, 10, 5);
    let expected = tree(&written.path);
    written.unmount();
    catch_up(&regions.source, &regions.mirror, VOLUME);
    let url = regions.mirror_url();
    regions
        .mirror
        .run(&[
            "mirror",
            "promote",
            &url,
            "--source-token-file",
            regions.source.token_file.to_str().unwrap(),
        ])
        .success();
    let now = Mount::of(&regions.mirror, VOLUME, &[]);
    assert_eq!(tree(&now.path), expected);
    let theirs = regions.objects("source");
    write_files(&now.path, 11, 10);
    assert_eq!(regions.objects("source"), theirs, "nothing new goes there");
    let expected = tree(&now.path);
    wait_for(
        "the last objects to be copied",
        Duration::from_secs(90),
        || {
            let ours = regions.objects("mirror");
            theirs
                .keys()
                .all(|name| ours.contains_key(name))
                .then_some(())
        },
    );
    now.unmount();
    let again = Mount::of(&regions.mirror, VOLUME, &[]);
    assert_eq!(tree(&again.path), expected);
    again.unmount();
}

#[test]
fn bad_ways_to_give_a_bucket_are_refused() {
    let regions = Regions::start(1);
    let (url, theirs) = (regions.mirror_url(), regions.bucket("source"));
    regions
        .mirror
        .run(&["mirror", "bucket", &url])
        .failure(2, "nothing to change");
    give_bucket(&regions.mirror, VOLUME, &theirs, &[]).failure(1, "is the source's bucket");
    regions
        .mirror
        .run(&["mirror", "worker", &url, "--once"])
        .failure(1, "has no bucket of its own");
    give_bucket(&regions.source, VOLUME, &theirs, &[]).failure(1, "is no mirror");
    let point = scratch();
    regions
        .mirror
        .run(&[
            "mount",
            &url,
            point.path().to_str().unwrap(),
            "--bucket2",
            "/x",
        ])
        .failure(2, "this volume has one bucket");
    // What was filled in advance by a plain copy of the objects is taken over and needs nothing to be pulled.
    let written = regions.source.mount(VOLUME);
    write_files(&written.path, 12, 10);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    let copied = Command::new("cp")
        .arg("-r")
        .args([regions.bucket("source"), regions.bucket("mirror")])
        .status()
        .unwrap();
    assert!(copied.success());
    regions.give_bucket(&[]).success();
    let ran = regions.worker(&[]).success().json();
    assert_eq!(ran["pulled_bytes"], 0, "{ran}");
    regions.give_bucket(&[]).success();
    written.unmount();
}

/// `HELIOFS_TOKEN_TRIALS` trials, else 50: what was written before a token was taken is at the mirror, in its own bucket, when
/// the token was waited for with `--data`.
#[test]
fn a_token_waited_for_with_data_means_every_byte() {
    let trials = std::env::var("HELIOFS_TOKEN_TRIALS").map_or(50, |trials| trials.parse().unwrap());
    let regions = Regions::start(1);
    regions.give_bucket(&[]).success();
    let written = regions.source.mount(VOLUME);
    let copier = Mount::of(&regions.mirror, VOLUME, &[]);
    let seed =
        std::env::var("HELIOFS_SEED").map_or_else(|_| rand::random(), |text| text.parse().unwrap());
    println!("HELIOFS_SEED={seed}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    for trial in 0..trials {
        for _ in 0..random.random_range(1..6) {
            let path = written.join(format!("f{}", random.random_range(0..20)));
            match random.random_range(0..4) {
                0 => {
                    fs::remove_file(&path).ok();
                }
                _ => {
                    let mut bytes = vec![0; random.random_range(1..600_000)];
                    random.fill(&mut bytes[..]);
                    let mut file = File::create(&path).unwrap();
                    file.write_all(&bytes).unwrap();
                    file.sync_all().unwrap();
                }
            }
        }
        regions.complete();
        // The source's bucket is out of reach for this mount: every byte must be in the mirror's.
        let away = regions.bucket("away");
        fs::rename(regions.bucket("source"), &away).unwrap();
        fs::create_dir(regions.bucket("source")).unwrap();
        let fresh = (trial % 10 == 0).then(|| Mount::of(&regions.mirror, VOLUME, &["--no-bgjob"]));
        let seen = fresh.as_ref().map_or(&copier.path, |mount| &mount.path);
        let at_mirror = tree(seen);
        if let Some(fresh) = fresh {
            fresh.unmount();
        }
        fs::remove_dir(regions.bucket("source")).unwrap();
        fs::rename(&away, regions.bucket("source")).unwrap();
        assert_eq!(at_mirror, tree(&written.path), "trial {trial}");
    }
    copier.unmount();
    written.unmount();
}

/// Cut apart, both regions are written to. What the old one acknowledged is never seen in the new epoch; it is exported when the
/// old one comes back, which then pulls only what it lacks.
#[test]
fn an_old_source_that_lived_on_exports_its_tail_and_rejoins() {
    let mut regions = Regions::start(1);
    regions.give_bucket(&[]).success();
    let written = regions.source.mount(VOLUME);
    write_files(&written.path, 20, 15);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    regions.worker(&[]).success();
    // As if nobody could reach the source: its address is another's.
    regions
        .mirror
        .run(&[
            "mirror",
            "promote",
            &regions.mirror_url(),
            "--force",
            "--i-know-the-source-is-dead",
        ])
        .failure(1, "the source answers");
    let [nobody] = support::free_ports(1)[..] else {
        panic!("one port")
    };
    let nobody = format!("helio://127.0.0.1:{nobody}");
    let url = regions.mirror_url();
    let force = [
        "mirror",
        "promote",
        &url,
        "--force",
        "--i-know-the-source-is-dead",
        "--source",
        &nobody,
    ];
    regions.mirror.run(&force).success();
    let late = 4;
    for number in 0..late {
        let mut file = File::create(written.join(format!("late-{number}"))).unwrap();
        file.write_all(&vec![7; 50_000]).unwrap();
        file.sync_all().unwrap();
    }
    let now = Mount::of(&regions.mirror, VOLUME, &[]);
    write_files(&now.path, 21, 6);
    let expected = tree(&now.path);
    assert!(
        !expected
            .keys()
            .any(|path| path.to_str().unwrap().starts_with("late"))
    );
    let mut written = written;
    written.process.kill();
    drop(written);

    let token = regions.mirror.token_file.to_str().unwrap().to_owned();
    let flags = [
        "--mirror-of",
        &regions.mirror.url(),
        "--mirror-token-file",
        &token,
    ];
    regions.source.flags = flags.map(str::to_owned).to_vec();
    regions.source.stop_node(0);
    regions.source.start_node(0);
    let old = regions.source.volume_url(VOLUME);
    let export = regions.bucket("tail.json");
    let rejoin = [
        "mirror",
        "rejoin",
        &old,
        "--of",
        &regions.mirror.volume_url(VOLUME),
        "--of-token-file",
        &token,
        "--export",
        export.to_str().unwrap(),
        "--json",
    ];
    let said = regions.source.run(&rejoin).success().json();
    let tail = fs::read_to_string(&export).unwrap();
    let entries: Vec<Value> = tail
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(said["divergent_entries"], entries.len(), "{said}");
    for number in 0..late {
        let name = format!("late-{number}");
        let found = entries
            .iter()
            .filter(|entry| entry["op"] == "create" && entry["fields"]["name"] == name.as_str());
        assert_eq!(found.count(), 1, "{name} in {tail}");
    }
    assert_eq!(
        entries
            .iter()
            .filter(|entry| entry["op"] == "create")
            .count(),
        late
    );
    let first: u64 = entries[0]["position"].as_str().unwrap()[2..]
        .parse()
        .unwrap();
    for (at, entry) in entries.iter().enumerate() {
        assert_eq!(
            entry["position"],
            format!("0:{}", first + at as u64),
            "no gaps"
        );
    }
    // It is what the new one is, and writes down nothing of its own any more.
    let head = regions.mirror.run(&["mirror", "token", &url]).success();
    wait_for_status(
        &regions.source,
        VOLUME,
        "the old source's following",
        |status| status["doing"] == "following" && status["applied"] == head.out.trim(),
    );
    let before: BTreeMap<PathBuf, Vec<u8>> = regions.objects("source");
    let worker = regions
        .source
        .run(&["mirror", "worker", &old, "--once", "--json"])
        .success()
        .json();
    assert!(worker["found_segments"].as_u64().unwrap() > 0, "{worker}");
    let pulled = worker["pulled_bytes"].as_u64().unwrap();
    let after = regions.objects("source");
    let news: usize = after
        .iter()
        .filter(|(name, _)| !before.contains_key(*name))
        .map(|(_, bytes)| bytes.len())
        .sum();
    assert_eq!(pulled, news as u64, "only differences are pulled: {worker}");
    let seen = Mount::of(&regions.source, VOLUME, &["--no-bgjob"]);
    assert_eq!(tree(&seen.path), expected);
    assert_eq!(
        File::create(seen.join("x")).unwrap_err().raw_os_error(),
        Some(30),
        "read-only"
    );
    seen.unmount();
    now.unmount();
}

/// With `--mirror-read complete` a mount shows the volume as it was when the region's own bucket had all of it, moves forward with
/// that and never back, also across a change of leader.
#[test]
fn a_mount_that_reads_what_is_complete_needs_nothing_from_the_source() {
    let mut regions = Regions::start(3);
    let written = regions.source.mount(VOLUME);
    write_files(&written.path, 30, 15);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    regions.give_bucket(&[]).success();
    regions.worker(&[]).success();
    let complete = ["--mirror-read", "complete", "--no-bgjob"];
    let seen = Mount::of(&regions.mirror, VOLUME, &complete);
    let before = tree(&written.path);
    assert_eq!(tree(&seen.path), before);
    // Nobody copies what comes now.
    write_files(&written.path, 31, 8);
    fs::remove_file(written.join("30-1")).unwrap();
    let mut rewritten = File::create(written.join("30-2")).unwrap();
    rewritten.write_all(&[1; 100_000]).unwrap();
    rewritten.sync_all().unwrap();
    drop(rewritten);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    let latest = Mount::of(&regions.mirror, VOLUME, &["--no-bgjob"]);
    let after = tree(&written.path);
    assert_eq!(tree(&latest.path), after);
    latest.unmount();
    // What needs no object is shown up to the first command that does.
    let mut shown = tree(&seen.path);
    shown.retain(|path, file| {
        let new = path.to_str().unwrap().starts_with("31-");
        if new {
            let bytes = file.rsplit(' ').nth(3).unwrap();
            assert!(
                bytes.parse::<u64>().unwrap() <= 4096,
                "{path:?} is shown: {file}"
            );
        }
        !new
    });
    assert_eq!(shown, before, "what is not copied is not shown");
    regions.worker(&[]).success();
    wait_for("the new state to be shown", Duration::from_secs(30), || {
        (tree(&seen.path) == after).then_some(())
    });
    let away = regions.bucket("away");
    fs::rename(regions.bucket("source"), &away).unwrap();
    fs::create_dir(regions.bucket("source")).unwrap();
    let leader = regions.mirror.leader();
    regions.mirror.kill_node(leader);
    assert_eq!(tree(&seen.path), after, "by another leader");
    let fresh = Mount::of(&regions.mirror, VOLUME, &complete);
    assert_eq!(
        tree(&fresh.path),
        after,
        "with the source's bucket out of reach"
    );
    fresh.unmount();
    fs::remove_dir(regions.bucket("source")).unwrap();
    fs::rename(&away, regions.bucket("source")).unwrap();
    seen.unmount();
    written.unmount();
}

#[test]
fn a_change_of_leader_while_copies_wait_shows_no_less() {
    let mut regions = Regions::start(3);
    let written = regions.source.mount(VOLUME);
    write_files(&written.path, 50, 12);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    regions.give_bucket(&[]).success();
    regions.worker(&[]).success();
    let complete = ["--mirror-read", "complete", "--no-bgjob"];
    let seen = Mount::of(&regions.mirror, VOLUME, &complete);
    wait_for("what is complete", Duration::from_secs(30), || {
        (tree(&seen.path) == tree(&written.path)).then_some(())
    });
    let shown = tree(&seen.path);
    // Nobody copies what comes now; without it nothing later can be shown.
    // (Not cut before: that would be a change that needs no object, and may be shown.)
    let mut rewritten = File::options()
        .write(true)
        .open(written.join("50-1"))
        .unwrap();
    rewritten.write_all(&[7; 200_000]).unwrap();
    rewritten.sync_all().unwrap();
    drop(rewritten);
    write_files(&written.path, 51, 6);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    assert!(regions.copies()["pending_segments"].as_u64().unwrap() > 0);
    for _ in 0..2 {
        let leader = regions.mirror.leader();
        regions.mirror.kill_node(leader);
        let began = std::time::Instant::now();
        // Whoever leads next serves it, to mounts that are there and to new ones.
        let fresh = Mount::of(&regions.mirror, VOLUME, &complete);
        for mount in [&seen, &fresh] {
            let mut now = tree(&mount.path);
            // What needs no object may be shown meanwhile, up to the first command that does.
            now.retain(|path, _| shown.contains_key(path));
            assert_eq!(now, shown);
        }
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "{:?}",
            began.elapsed()
        );
        fresh.unmount();
        regions.mirror.start_node(leader);
        catch_up(&regions.source, &regions.mirror, VOLUME);
    }
    assert!(regions.copies()["pending_segments"].as_u64().unwrap() > 0);
    regions.worker(&[]).success();
    wait_for("the new state to be shown", Duration::from_secs(30), || {
        (tree(&seen.path) == tree(&written.path)).then_some(())
    });
    seen.unmount();
    written.unmount();
}

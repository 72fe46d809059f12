//! Space is given back and nothing else is: gc, compaction and fsck against real mounts and a bucket that one can look into.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use support::cluster::HELIOFS;
use support::{Cluster, Mount, Process, Ran, scratch, wait_for};

fn content(length: usize, seed: u32) -> Vec<u8> {
    (0..length as u32)
        .map(|n| ((n ^ seed << 20).wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

fn objects(bucket: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(bucket).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(
                fs::read_dir(entry.path())
                    .unwrap()
                    .map(|file| file.unwrap().path()),
            );
        }
    }
    found.sort();
    found
}

/// Objects may go while they are counted.
fn stored_bytes(bucket: &Path) -> u64 {
    let lengths = objects(bucket).into_iter();
    lengths
        .filter_map(|object| Some(object.metadata().ok()?.len()))
        .sum()
}

fn segments_of(cluster: &Cluster, volume: &str, path: &str) -> Vec<u64> {
    let info = cluster.run(&["info", &cluster.volume_url(volume), path, "--json"]);
    let info = info.success().json();
    let extents = info[0]["extents"].as_array().unwrap();
    extents
        .iter()
        .map(|extent| extent["segment"].as_u64().unwrap())
        .collect()
}

fn object_path(bucket: &Path, segment: u64) -> PathBuf {
    bucket.join(format!("{:02x}/{segment:016x}", segment & 0xff))
}

fn plant(bucket: &Path, segment: u64) -> PathBuf {
    let path = object_path(bucket, segment);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, b"left behind").unwrap();
    path
}

fn fsck(cluster: &Cluster, volume: &str, more: &[&str]) -> Ran {
    let url = cluster.volume_url(volume);
    let mut arguments = vec!["fsck", &url, "--json"];
    arguments.extend(more);
    cluster.run(&arguments)
}

#[test]
fn gc_deletes_leaks_and_nothing_that_may_still_be_needed() {
    let mut cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("leaky", &[]);
    let bucket = cluster.directory.join("bucket/leaky");
    let mount = cluster.mount("leaky");
    fs::write(mount.join("kept"), content(100_000, 1)).unwrap();
    mount.unmount();
    let kept = segments_of(&cluster, "leaky", "/kept")[0];
    let mount = cluster.mount("leaky");
    fs::write(mount.join("second"), content(100_000, 2)).unwrap();
    let second = segments_of(&cluster, "leaky", "/second")[0];

    // Of a session that is over; of one that lives; of nobody; no segment at all.
    let leak = plant(&bucket, kept + 50);
    let open = plant(&bucket, second + 50);
    let unknown = plant(&bucket, kept + (1 << 40));
    let foreign = bucket.join("ab/notes.txt");
    fs::create_dir_all(foreign.parent().unwrap()).unwrap();
    fs::write(&foreign, "mine").unwrap();
    let url = cluster.volume_url("leaky");
    let dry = cluster.run(&["gc", &url, "--json"]).success().json();
    assert_eq!(dry["leaks"].as_array().unwrap().len(), 1, "{dry}");
    assert_eq!(
        (&dry["live"], &dry["open"]),
        (&2.into(), &1.into()),
        "{dry}"
    );
    assert_eq!(dry["unknown"].as_array().unwrap().len(), 1, "{dry}");
    assert_eq!(dry["foreign"][0], "ab/notes.txt", "{dry}");
    assert!(leak.exists(), "nothing is deleted unless asked for");

    // Another volume's bucket, or no metadata: nothing is deleted.
    let marker = bucket.join(".heliofs-volume");
    let own = fs::read_to_string(&marker).unwrap();
    fs::write(&marker, own.replace("\"uuid\":\"", "\"uuid\":\"0")).unwrap();
    cluster
        .run(&["gc", &url, "--delete"])
        .failure(1, "belongs to the volume");
    fs::remove_file(&marker).unwrap();
    cluster
        .run(&["gc", &url, "--delete"])
        .failure(1, "marker object is missing");
    fs::write(&marker, own).unwrap();
    assert!(leak.exists());

    let done = cluster
        .run(&["gc", &url, "--delete", "--json"])
        .success()
        .json();
    assert_eq!(done["deleted"], 1, "{done}");
    assert!(!leak.exists() && open.exists() && unknown.exists() && foreign.exists());
    // What waits in the deletion queue is the queue's affair.
    fs::remove_file(mount.join("kept")).unwrap();
    wait_for("the queue", Duration::from_secs(30), || {
        let shown = cluster
            .run(&["gc", &url, "--delete", "--json"])
            .success()
            .json();
        (shown["deleting"] == 1).then_some(())
    });
    assert!(
        object_path(&bucket, kept).exists(),
        "within its time of grace"
    );
    assert_eq!(fs::read(mount.join("second")).unwrap(), content(100_000, 2));
    mount.unmount();
    // Its session being over, what it never committed is a leak too.
    wait_for("the end of the session", Duration::from_secs(30), || {
        cluster.run(&["gc", &url, "--delete"]).success();
        (!open.exists()).then_some(())
    });
    let again = plant(&bucket, second + 60);
    cluster.kill_node(0);
    let refused = cluster.run(&["gc", &url, "--delete"]);
    assert_eq!(refused.code, 1, "{}", refused.err);
    assert!(again.exists());
    cluster.start_node(0);
    cluster.run(&["gc", &url, "--delete"]).success();
    assert!(!again.exists());
    let mount = cluster.mount("leaky");
    assert_eq!(fs::read(mount.join("second")).unwrap(), content(100_000, 2));
    mount.unmount();
    fsck(&cluster, "leaky", &["--level", "data"]).success();
}

#[test]
fn fsck_finds_what_is_missing_or_damaged_names_the_files_and_saves_what_it_can() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("sick", &["--compress", "lz4"]);
    let bucket = cluster.directory.join("bucket/sick");
    let cache = cluster.directory.join("cache");
    let mount = Mount::with_cache(&cluster, "sick", Some(&cache), &[]);
    fs::create_dir(mount.join("dir")).unwrap();
    let names = ["gone", "flipped", "short", "dir/sound"];
    for (seed, name) in (1..).zip(names) {
        // Synced one by one: each in a segment of its own.
        let file = fs::File::create(mount.join(name)).unwrap();
        file.write_all_at(&content(300_000, seed), 0).unwrap();
        file.sync_all().unwrap();
    }
    mount.unmount();
    for level in ["meta", "exists", "data"] {
        let shown = fsck(&cluster, "sick", &["--level", level]).success().json();
        assert_eq!(shown["damages"].as_array().unwrap().len(), 0, "{shown}");
        assert_eq!(shown["problems"].as_array().unwrap().len(), 0, "{shown}");
    }
    let object = |name: &str| {
        let segments = segments_of(&cluster, "sick", &format!("/{name}"));
        object_path(&bucket, segments[0])
    };
    let (gone, flipped, short) = (object("gone"), object("flipped"), object("short"));
    let saved: Vec<Vec<u8>> = [&gone, &flipped, &short]
        .map(|path| fs::read(path).unwrap())
        .into();
    fs::remove_file(&gone).unwrap();
    let mut bytes = saved[1].clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&flipped, bytes).unwrap();
    fs::write(&short, &saved[2][..1000]).unwrap();

    fsck(&cluster, "sick", &["--level", "meta"]).success();
    let files = |ran: &Ran| {
        let mut found: Vec<String> = Vec::new();
        for damage in ran.json()["damages"].as_array().unwrap() {
            let files = damage["files"].as_array().unwrap();
            found.extend(files.iter().map(|file| file.as_str().unwrap().to_owned()));
        }
        found.sort();
        found
    };
    let ran = fsck(&cluster, "sick", &[]);
    assert_eq!(ran.code, 4, "{}", ran.err);
    assert_eq!(files(&ran), ["/gone", "/short"]);
    let ran = fsck(&cluster, "sick", &["--level", "data"]);
    assert_eq!(ran.code, 4, "{}", ran.err);
    assert_eq!(files(&ran), ["/flipped", "/gone", "/short"]);
    // Behind a segment there is less to look at; below a sound directory nothing is wrong.
    let last = objects(&bucket).len();
    let after = format!("{:016x}", segments_of(&cluster, "sick", "/short")[0]);
    let rest = fsck(&cluster, "sick", &["--level", "data", "--from", &after])
        .success()
        .json();
    assert!(rest["segments"].as_u64().unwrap() < last as u64, "{rest}");
    let sound = cluster.run(&[
        "fsck",
        &cluster.volume_url("sick"),
        "/dir",
        "--level",
        "data",
    ]);
    sound.success();
    let ran = cluster.run(&[
        "fsck",
        &cluster.volume_url("sick"),
        "/flipped",
        "/dir",
        "--level",
        "data",
    ]);
    assert_eq!(ran.code, 4, "{}", ran.err);

    // Without a copy nothing can be saved of an object that is gone; the cache of this machine has one.
    let ran = fsck(&cluster, "sick", &["--repair"]);
    assert_eq!(ran.code, 4, "{}", ran.err);
    let cache = cache.to_str().unwrap();
    let repair = ["--level", "data", "--repair", "--cache-dir", cache];
    let ran = fsck(&cluster, "sick", &repair);
    assert_eq!(ran.code, 0, "{} {}", ran.out, ran.err);
    assert!(ran.json()["repaired_bytes"].as_u64().unwrap() > 0);
    fsck(&cluster, "sick", &["--level", "data"]).success();
    let mount = Mount::of(&cluster, "sick", &[]);
    for (seed, name) in (1..).zip(names) {
        assert!(
            fs::read(mount.join(name)).unwrap() == content(300_000, seed),
            "{name}"
        );
    }
    mount.unmount();
}

#[test]
fn sparse_segments_are_compacted_under_readers_and_writers() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("churned", &["--deletion-grace", "0s", "--compress", "lz4"]);
    let bucket = cluster.directory.join("bucket/churned");
    let compacting = ["--compact-interval", "500ms"];
    let mount = Mount::of(&cluster, "churned", &compacting);
    // Nothing of the reader's comes from a cache, and it knows extents that compaction outdates.
    let reader = Mount::of(
        &cluster,
        "churned",
        &["--cache-size", "0", "--buffer-size", "1M"],
    );

    const FILE: usize = 8 << 20;
    const PIECE: usize = 64 << 10;
    let mut files: Vec<Vec<u8>> = (0..4).map(|seed| content(FILE, seed)).collect();
    for (n, data) in files.iter().enumerate() {
        fs::write(mount.join(format!("f{n}")), data).unwrap();
    }
    let constant = content(FILE, 77);
    fs::write(mount.join("constant"), &constant).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = fs::File::open(reader.join("constant")).unwrap();
            let mut buffer = vec![0; 200_000];
            let mut at = 0;
            while !stop.load(Ordering::Relaxed) {
                at = (at + 777_777) % (FILE - buffer.len());
                file.read_exact_at(&mut buffer, at as u64).unwrap();
                assert!(buffer == constant[at..at + buffer.len()], "at {at}");
            }
        });
        // Four parts out of five of each segment are overwritten, in small pieces, several times.
        let mut state = 7u64;
        for round in 0..6u32 {
            for (n, data) in files.iter_mut().enumerate() {
                let path = mount.join(format!("f{n}"));
                let file = fs::OpenOptions::new().write(true).open(path).unwrap();
                for piece in 0..FILE / PIECE {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    if (state >> 33).is_multiple_of(5) {
                        continue;
                    }
                    let range = piece * PIECE..(piece + 1) * PIECE;
                    let new = content(PIECE, round * 1000 + piece as u32);
                    data[range.clone()].copy_from_slice(&new);
                    file.write_all_at(&new, range.start as u64).unwrap();
                }
                file.sync_all().unwrap();
            }
            // The file that is read is made of fragments of segments, too.
            let copy = fs::File::create(mount.join("scratch")).unwrap();
            copy.write_all_at(&constant[..FILE / 2], 0).unwrap();
            copy.sync_all().unwrap();
            fs::remove_file(mount.join("scratch")).unwrap();
        }
        // Small files share segments; of each segment's a few stay.
        let small = mount.join("small");
        fs::create_dir(&small).unwrap();
        for n in 0..800usize {
            let name = small.join(format!("{n}"));
            fs::write(&name, content(5000 + n * 40, n as u32)).unwrap();
            if n % 4 != 0 && n > 100 {
                fs::remove_file(small.join(format!("{}", n - 100))).ok();
            }
        }
        let live = || cluster.volume("churned")["used_bytes"].as_u64().unwrap();
        wait_for("compaction", Duration::from_secs(120), || {
            (stored_bytes(&bucket) * 2 <= live() * 3).then_some(())
        });
        stop.store(true, Ordering::Relaxed);
    });
    let log = mount.process.log() + &reader.process.log();
    assert!(log.contains("compacted sparse segments"), "{log}");
    for place in [&mount, &reader] {
        for (n, data) in files.iter().enumerate() {
            assert!(
                fs::read(place.join(format!("f{n}"))).unwrap() == *data,
                "f{n}"
            );
        }
        let mut left = 0;
        for entry in fs::read_dir(place.join("small")).unwrap() {
            let path = entry.unwrap().path();
            let n: usize = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            assert!(
                fs::read(&path).unwrap() == content(5000 + n * 40, n as u32),
                "{n}"
            );
            left += 1;
        }
        assert!(left > 200 && left < 400, "{left} small files");
    }
    mount.unmount();
    reader.unmount();
    fsck(&cluster, "churned", &["--level", "data"]).success();
    let url = cluster.volume_url("churned");
    let found = cluster.run(&["gc", &url, "--json"]).success().json();
    assert_eq!(found["leaks"].as_array().unwrap().len(), 0, "{found}");
}

#[test]
fn compaction_by_hand_while_files_are_written() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("handy", &["--deletion-grace", "0s"]);
    let mount = Mount::of(&cluster, "handy", &["--no-bgjob"]);
    let deleter = Mount::of(&cluster, "handy", &["--compact-interval", "1h"]);
    let mut data = content(4 << 20, 1);
    fs::write(mount.join("f"), &data).unwrap();
    let file = fs::OpenOptions::new()
        .write(true)
        .open(mount.join("f"))
        .unwrap();
    for round in 0..10u32 {
        for piece in 0..60usize {
            let at = piece * 65_536 + 1000;
            let new = content(50_000, round * 100 + piece as u32);
            data[at..at + new.len()].copy_from_slice(&new);
            file.write_all_at(&new, at as u64).unwrap();
        }
        let url = cluster.volume_url("handy");
        let ran = cluster.run(&["compact", &url, "--live-percent", "99", "--json"]);
        ran.success();
        file.sync_all().unwrap();
        assert!(fs::read(mount.join("f")).unwrap() == data, "round {round}");
    }
    drop(file);
    mount.unmount();
    assert!(fs::read(deleter.join("f")).unwrap() == data);
    let bucket = cluster.directory.join("bucket/handy");
    cluster
        .run(&["compact", &cluster.volume_url("handy")])
        .success();
    wait_for("the deletions", Duration::from_secs(60), || {
        (stored_bytes(&bucket) < 6 << 20).then_some(())
    });
    assert!(fs::read(deleter.join("f")).unwrap() == data);
    deleter.unmount();
    fsck(&cluster, "handy", &["--level", "data"]).success();
}

#[test]
fn what_was_uploaded_and_overwritten_before_a_commit_leaves_nothing() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("hasty", &["--deletion-grace", "0s"]);
    let bucket = cluster.directory.join("bucket/hasty");
    let mount = cluster.mount("hasty");
    let last = content(12 << 20, 9);
    let file = fs::File::create(mount.join("f")).unwrap();
    for round in 0..10 {
        file.set_len(0).unwrap();
        // Full segments leave at once; no commit names them before they are cut off.
        file.write_all_at(&content(12 << 20, round), 0).unwrap();
    }
    file.set_len(0).unwrap();
    file.write_all_at(&last, 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    for n in 0..20 {
        fs::write(mount.join(format!("short-lived-{n}")), content(5 << 20, n)).unwrap();
        fs::remove_file(mount.join(format!("short-lived-{n}"))).unwrap();
    }
    wait_for("nothing but the file", Duration::from_secs(60), || {
        (stored_bytes(&bucket) < 13 << 20).then_some(())
    });
    assert!(fs::read(mount.join("f")).unwrap() == last);
    let url = cluster.volume_url("hasty");
    let found = cluster.run(&["gc", &url, "--json"]).success().json();
    assert_eq!(
        (&found["open"], found["leaks"].as_array().unwrap().len()),
        (&0.into(), 0),
        "{found}"
    );
    mount.unmount();
    fsck(&cluster, "hasty", &["--level", "data"]).success();
}

#[test]
fn an_interrupted_check_says_how_to_go_on() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("long", &[]);
    let mount = cluster.mount("long");
    for number in 0..3 {
        fs::write(mount.join(format!("f{number}")), content(5 << 20, number)).unwrap();
    }
    mount.unmount();
    let log = scratch();
    let url = cluster.volume_url("long");
    // A segment a minute, so that nearly all of the time it waits for the next one's turn.
    let mut check = Process::start("fsck", &log.path().join("log"), Path::new(HELIOFS), |it| {
        it.args(["fsck", &url, "--level", "data", "--limit", "64K"])
            .arg("--token-file")
            .arg(&cluster.token_file);
    });
    wait_for("SIGINT to be caught", Duration::from_secs(30), || {
        let status = fs::read_to_string(format!("/proc/{}/status", check.pid())).ok()?;
        let caught = status
            .lines()
            .find_map(|line| line.strip_prefix("SigCgt:"))?;
        let caught = u64::from_str_radix(caught.trim(), 16).ok()?;
        (caught & 1 << (Signal::SIGINT as u64 - 1) != 0).then_some(())
    });
    check.signal(Signal::SIGINT);
    let ended = check.wait(Duration::from_secs(10));
    let said = check.log();
    assert_eq!(ended.code(), Some(1), "{said}");
    let (_, from) = said
        .split_once("interrupted; go on with --from ")
        .unwrap_or_else(|| panic!("{said}"));
    let from = from.split_whitespace().next().unwrap();
    let rest = fsck(&cluster, "long", &["--level", "data", "--from", from]);
    rest.success();
}

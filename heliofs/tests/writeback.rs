//! Mounts with `--writeback`: what fsync confirmed is on local disk, and gets into the bucket whatever happens to the mount.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::cluster::HELIOFS;
use support::{Cluster, Disk, LostReplies, Mount, scratch, wait_for};

/// Far longer than anything here takes.
const SOON: Duration = Duration::from_secs(60);

/// Nothing is uploaded by itself within a test.
const HELD: &[&str] = &["--writeback", "--upload-delay", "1h"];

fn content(number: usize, length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (at * 7 + at / 256 + number * 31) as u8)
        .collect()
}

struct Writeback {
    cluster: Cluster,
    cache: tempfile::TempDir,
    volume: &'static str,
}

impl Writeback {
    fn new(volume: &'static str, format: &[&str]) -> Self {
        let cluster = Cluster::with_dirs(1, |_, _| None, &["--session-timeout", "3s"]);
        cluster.format_file(volume, &[&["--trash-days", "0"], format].concat());
        Self {
            cluster,
            cache: scratch(),
            volume,
        }
    }

    fn mount(&self, flags: &[&str]) -> Mount {
        Mount::with_cache(&self.cluster, self.volume, Some(self.cache.path()), flags)
    }

    fn other(&self) -> Mount {
        Mount::of(&self.cluster, self.volume, &[])
    }

    fn bucket(&self) -> PathBuf {
        self.cluster.directory.join("bucket")
    }

    /// The bucket can't be reached until the guard goes.
    fn bucket_down(&self) -> Down {
        let down = Down {
            bucket: self.bucket(),
            away: self.cluster.directory.join("bucket-away"),
        };
        fs::rename(&down.bucket, &down.away).unwrap();
        fs::write(&down.bucket, b"not a directory").unwrap();
        down
    }

    /// Nothing can be stored until the guard goes, in a bucket without objects, whose marker can be read.
    fn uploads_refused(&self) -> Refused {
        let places = |bucket: &Path| -> Option<PathBuf> {
            let below = fs::read_dir(bucket).unwrap().map(|it| it.unwrap().path());
            let own = |path: &PathBuf| path.join(".heliofs-volume").exists();
            below.chain([bucket.to_owned()]).find(own)
        };
        let folder = places(&self.bucket()).unwrap();
        let files: Vec<_> = (0..256).map(|n| folder.join(format!("{n:02x}"))).collect();
        for file in &files {
            fs::write(file, b"not a directory").unwrap();
        }
        Refused { files }
    }

    /// Files of the staging folder that end like this.
    fn staged(&self, below: &str) -> Vec<PathBuf> {
        let volume = fs::read_dir(self.cache.path()).unwrap().next();
        let folder = volume.unwrap().unwrap().path().join("staging").join(below);
        let Ok(entries) = fs::read_dir(folder) else {
            return Vec::new();
        };
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.extension().is_some_and(|is| is == "staged"));
        paths.sort();
        paths
    }
}

struct Refused {
    files: Vec<PathBuf>,
}

impl Drop for Refused {
    fn drop(&mut self) {
        for file in &self.files {
            fs::remove_file(file).unwrap();
        }
    }
}

struct Down {
    bucket: PathBuf,
    away: PathBuf,
}

impl Drop for Down {
    fn drop(&mut self) {
        fs::remove_file(&self.bucket).unwrap();
        fs::rename(&self.away, &self.bucket).unwrap();
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> File {
    let mut file = File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
    file
}

/// The kernel's pages are not what is to be looked at.
fn read_anew(path: &Path) -> Vec<u8> {
    let file = File::open(path).unwrap();
    nix::fcntl::posix_fadvise(
        &file,
        0,
        0,
        nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
    )
    .unwrap();
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn what_fsync_confirmed_in_a_large_copy_survives_sigkill() {
    for (volume, format, flags) in [
        (
            "plain",
            &[][..],
            &["--writeback", "--buffer-size", "64M"][..],
        ),
        ("held", &["--compress", "lz4"][..], HELD),
    ] {
        let set = Writeback::new(volume, format);
        let mut mount = set.mount(flags);
        let confirmed = Mutex::new(Vec::new());
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (mount, confirmed, over) = (&mount.path, &confirmed, &over);
                scope.spawn(move || {
                    for number in 0.. {
                        if over.load(Ordering::Relaxed) {
                            return;
                        }
                        let length = [700, 20_000, 300_000, 6_000_000][number % 4] + number;
                        let name = format!("{thread}-{number}");
                        let bytes = content(thread * 1000 + number, length);
                        // From the kill on everything fails.
                        let copied = File::create(mount.join(&name)).and_then(|mut file| {
                            file.write_all(&bytes)?;
                            if number % 3 != 0 {
                                file.sync_all()?;
                                confirmed.lock().unwrap().push((name, bytes));
                            }
                            Ok(())
                        });
                        if copied.is_err() {
                            return;
                        }
                    }
                });
            }
            wait_for("a part of the copy", SOON, || {
                (confirmed.lock().unwrap().len() > 150).then_some(())
            });
            mount.process.kill();
            over.store(true, Ordering::Relaxed);
        });
        drop(mount);
        let confirmed = confirmed.into_inner().unwrap();
        let mount = set.mount(&["--writeback"]);
        for (name, bytes) in &confirmed {
            assert!(read_anew(&mount.join(name)) == *bytes, "{volume}: {name}");
        }
        // Others see it, too, and once it is stored nothing is left.
        let other = set.other();
        for (name, bytes) in &confirmed {
            assert!(
                fs::read(other.join(name)).unwrap() == *bytes,
                "{volume}: {name}"
            );
        }
        flush_and_unmount(mount);
        assert!(set.staged("").is_empty(), "{volume}");
        assert!(set.staged("conflicts").is_empty(), "{volume}");
    }
}

fn flush_and_unmount(mut mount: Mount) {
    let mut command = Command::new(HELIOFS);
    command.arg("umount").arg("--flush").arg(&mount.path);
    let ran = support::cluster::run(&mut command);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(mount.process.wait(SOON).success());
}

/// Several are on their way at once, so that neighbours may change places.
#[test]
fn after_a_crash_what_was_staged_first_is_stored_first() {
    const FILES: usize = 40;
    let set = Writeback::new("order", &[]);
    let mut mount = set.mount(HELD);
    let path = |mount: &Mount, number: usize| mount.join(format!("f{number}"));
    // Not in the order of their inodes.
    for number in 0..FILES {
        File::create(path(&mount, number)).unwrap();
    }
    let written: Vec<usize> = (0..FILES).rev().collect();
    let mut inodes = Vec::new();
    for number in &written {
        write_synced(&path(&mount, *number), &content(*number, 4 << 20));
        inodes.push(fs::metadata(path(&mount, *number)).unwrap().ino());
    }
    mount.process.kill();
    drop(mount);

    let mount = set.mount(&["--writeback"]);
    wait_for("the data to be stored", SOON, || {
        set.staged("").is_empty().then_some(())
    });
    let log = set
        .cluster
        .run(&["changelog", &set.cluster.volume_url(set.volume), "--json"])
        .success()
        .out;
    let mut stored = Vec::new();
    for entry in log.lines() {
        let entry: serde_json::Value = serde_json::from_str(entry).unwrap();
        for file in entry["fields"]["files"].as_array().into_iter().flatten() {
            let inode = file["inode"].as_u64().unwrap();
            if !stored.contains(&inode) {
                stored.push(inode);
            }
        }
    }
    assert_eq!(stored.len(), FILES);
    for inode in &inodes[..FILES / 4] {
        assert!(
            stored[..FILES / 2].contains(inode),
            "written {inodes:?}, stored {stored:?}"
        );
    }
    drop(mount);
}

#[test]
fn without_a_bucket_fsync_is_quick_and_the_data_follows() {
    let set = Writeback::new("down", &[]);
    let mount = set.mount(&["--writeback", "--io-timeout", "2s", "--buffer-size", "32M"]);
    let other = set.other();
    let down = set.bucket_down();
    let began = Instant::now();
    // More than the mount has memory for.
    for number in 0..40 {
        write_synced(&mount.join(format!("f{number}")), &content(number, 2 << 20));
    }
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "{:?}",
        began.elapsed()
    );
    for number in 0..40 {
        let read = read_anew(&mount.join(format!("f{number}")));
        assert!(read == content(number, 2 << 20), "file {number}");
    }
    // Written over while the first version waits.
    let file = File::options().write(true).open(mount.join("f0")).unwrap();
    file.write_all_at(b"second", 1000).unwrap();
    file.sync_all().unwrap();
    assert!(!set.staged("").is_empty());
    drop(down);
    wait_for("the data to be stored", SOON, || {
        set.staged("").is_empty().then_some(())
    });
    let mut expected = content(0, 2 << 20);
    expected[1000..1006].copy_from_slice(b"second");
    assert!(fs::read(other.join("f0")).unwrap() == expected);
    for number in 1..40 {
        let read = fs::read(other.join(format!("f{number}"))).unwrap();
        assert!(read == content(number, 2 << 20), "file {number}");
    }
}

#[test]
fn umount_flush_waits_for_the_bucket_and_a_plain_one_leaves_it_to_the_next_mount() {
    let set = Writeback::new("ending", &[]);
    let flags = ["--writeback", "--io-timeout", "1s"];
    let mount = set.mount(&flags);
    let down = set.bucket_down();
    fs::write(mount.join("unsynced"), content(1, 100_000)).unwrap();
    write_synced(&mount.join("synced"), &content(2, 100_000));
    mount.unmount();
    assert!(!set.staged("").is_empty());

    drop(down);
    let mount = set.mount(&flags);
    let other = set.other();
    assert!(fs::read(other.join("unsynced")).unwrap() == content(1, 100_000));
    assert!(fs::read(other.join("synced")).unwrap() == content(2, 100_000));
    let down = set.bucket_down();
    write_synced(&mount.join("waited for"), &content(3, 100_000));
    let (mut mount, path) = {
        let path = mount.path.clone();
        (mount, path)
    };
    // Not by the shell that starts the other processes: that one waits for each.
    let mut waiting = Command::new(HELIOFS)
        .args(["umount", "--flush"])
        .arg(path)
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert!(waiting.try_wait().unwrap().is_none(), "it has not waited");
    assert!(mount.process.ended().is_none());
    drop(down);
    assert!(waiting.wait().unwrap().success());
    assert!(mount.process.wait(SOON).success());
    assert!(set.staged("").is_empty());
    assert!(fs::read(other.join("waited for")).unwrap() == content(3, 100_000));
}

#[test]
fn others_see_what_is_staged_and_other_changes_come_after_it() {
    let set = Writeback::new("others", &[]);
    let mount = set.mount(HELD);
    let other = set.other();
    for name in [
        "opened", "stated", "cut", "emptied", "replaced", "copied", "grown",
    ] {
        write_synced(&mount.join(name), &content(1, 100_000));
    }
    assert_eq!(set.staged("").len(), 7);
    assert!(fs::read(other.join("opened")).unwrap() == content(1, 100_000));
    assert_eq!(fs::metadata(other.join("stated")).unwrap().len(), 100_000);
    assert_eq!(set.staged("").len(), 5, "what others saw is in the bucket");

    nix::unistd::truncate(&mount.join("cut"), 5000).unwrap();
    write_synced(&mount.join("emptied"), &content(2, 50_000));
    write_synced(&mount.join("new"), &content(3, 70_000));
    fs::rename(mount.join("new"), mount.join("replaced")).unwrap();
    let copied = File::options()
        .read(true)
        .write(true)
        .open(mount.join("copied"))
        .unwrap();
    nix::fcntl::fallocate(
        &copied,
        nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
            | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE,
        0,
        4096,
    )
    .unwrap();
    let grown = File::options()
        .append(true)
        .open(mount.join("grown"))
        .unwrap();
    (&grown).write_all(&content(4, 10_000)).unwrap();
    grown.sync_all().unwrap();

    // And so it is after a crash.
    let mut mount = mount;
    mount.process.kill();
    drop(mount);
    let mount = set.mount(HELD);
    for at in [&mount, &other] {
        assert!(fs::read(at.join("cut")).unwrap() == content(1, 100_000)[..5000]);
        assert!(fs::read(at.join("emptied")).unwrap() == content(2, 50_000));
        assert!(fs::read(at.join("replaced")).unwrap() == content(3, 70_000));
        let mut punched = content(1, 100_000);
        punched[..4096].fill(0);
        assert!(fs::read(at.join("copied")).unwrap() == punched);
        let grown = [content(1, 100_000), content(4, 10_000)].concat();
        assert!(fs::read(at.join("grown")).unwrap() == grown);
    }
    flush_and_unmount(mount);
    assert!(set.staged("").is_empty() && set.staged("conflicts").is_empty());
}

#[test]
fn a_crash_between_commits_brings_back_nothing_old() {
    let set = Writeback::new("between", &[]);
    let mount = set.mount(HELD);
    let other = set.other();
    let file = write_synced(&mount.join("file"), &content(1, 200_000));
    // Stored, since somebody looks; then again held back.
    assert_eq!(fs::metadata(other.join("file")).unwrap().len(), 200_000);
    drop(file);
    wait_for("the lease to be had again", SOON, || {
        let file = File::options()
            .write(true)
            .open(mount.join("file"))
            .unwrap();
        file.write_all_at(b"second", 0).unwrap();
        file.sync_all().unwrap();
        (!set.staged("").is_empty()).then_some(())
    });
    let file = File::options()
        .write(true)
        .open(mount.join("file"))
        .unwrap();
    file.write_all_at(b"SECOND", 100_000).unwrap();
    file.sync_all().unwrap();
    // Confirmed by nobody; what lies below it was.
    file.write_all_at(b"third", 100_000).unwrap();
    let mut mount = mount;
    mount.process.kill();
    drop((mount, file));
    let mount = set.mount(&["--writeback"]);
    let mut expected = content(1, 200_000);
    expected[..6].copy_from_slice(b"second");
    expected[100_000..100_006].copy_from_slice(b"SECOND");
    let read = fs::read(other.join("file")).unwrap();
    assert!(
        read == expected,
        "{:?} {:?}",
        &read[..6],
        &read[100_000..100_006]
    );
    flush_and_unmount(mount);
    assert!(set.staged("conflicts").is_empty());
}

#[test]
fn what_others_changed_meanwhile_is_not_overwritten_and_nothing_is_thrown_away() {
    let set = Writeback::new("conflict", &[]);
    let mut mount = set.mount(HELD);
    for name in ["changed", "removed", "kept"] {
        write_synced(&mount.join(name), &content(1, 100_000));
    }
    mount.process.kill();
    drop(mount);
    let other = set.other();
    // Between the crash and the next mount others see what was stored before.
    assert_eq!(fs::read(other.join("kept")).unwrap(), b"");
    fs::write(other.join("changed"), b"newer").unwrap();
    File::open(other.join("changed"))
        .unwrap()
        .sync_all()
        .unwrap();
    fs::remove_file(other.join("removed")).unwrap();
    let mount = set.mount(HELD);
    assert_eq!(fs::read(mount.join("changed")).unwrap(), b"newer");
    assert!(!mount.join("removed").exists());
    assert!(fs::read(other.join("kept")).unwrap() == content(1, 100_000));
    assert_eq!(set.staged("conflicts").len(), 2);
    let log = mount.process.log();
    assert!(
        log.contains("kept aside") && log.contains("changed by others"),
        "{log}"
    );
}

#[test]
fn a_damaged_record_is_put_aside_and_the_rest_is_stored() {
    let set = Writeback::new("damaged", &[]);
    let mut mount = set.mount(HELD);
    for number in 0..3 {
        write_synced(&mount.join(format!("f{number}")), &content(number, 100_000));
    }
    mount.process.kill();
    drop(mount);
    let records = set.staged("");
    assert_eq!(records.len(), 3);
    let mut bytes = fs::read(&records[1]).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&records[1], bytes).unwrap();
    let mount = set.mount(HELD);
    assert!(fs::read(mount.join("f0")).unwrap() == content(0, 100_000));
    assert_eq!(fs::read(mount.join("f1")).unwrap(), b"");
    assert!(fs::read(mount.join("f2")).unwrap() == content(2, 100_000));
    assert_eq!(set.staged("conflicts").len(), 1);
    assert!(mount.process.log().contains("it is damaged"));
}

#[test]
fn a_full_staging_disk_leaves_it_to_the_bucket() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("full", &["--trash-days", "0"]);
    // 64 MiB stay free in any case.
    let disk = Disk::new(112);
    let flags = [HELD, &["--cache-size", "0"]].concat();
    let mount = Mount::with_cache(&cluster, "full", Some(disk.path()), &flags);
    for number in 0..20 {
        write_synced(&mount.join(format!("f{number}")), &content(number, 2 << 20));
    }
    let mut other = Mount::of(&cluster, "full", &[]);
    for number in 0..20 {
        let read = fs::read(other.join(format!("f{number}"))).unwrap();
        assert!(read == content(number, 2 << 20), "file {number}");
    }
    assert!(mount.process.log().contains("not staged"));
    other.process.kill();
    mount.unmount();
}

#[test]
fn a_staging_folder_is_one_mounts() {
    let set = Writeback::new("shared", &[]);
    let _mount = set.mount(HELD);
    let scratch = scratch();
    let place = scratch.path().join("mnt");
    fs::create_dir(&place).unwrap();
    let mut command = Command::new(HELIOFS);
    command
        .args(["mount", &set.cluster.url(), "shared"])
        .arg(&place)
        .arg("--cache-dir")
        .arg(set.cache.path())
        .arg("--token-file")
        .arg(&set.cluster.token_file)
        .arg("--writeback");
    let ran = support::cluster::run(&mut command);
    assert_ne!(ran.code, 0);
    assert!(ran.err.contains("used by another mount"), "{}", ran.err);
}

#[test]
fn who_wants_to_see_staged_data_waits_while_the_bucket_is_away() {
    let set = Writeback::new("recalled", &[]);
    let mount = set.mount(&[HELD, &["--io-timeout", "2s"]].concat());
    let other = set.other();
    let file = write_synced(&mount.join("file"), &content(1, 300_000));
    let down = set.bucket_down();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(other.join("file")));
        // Longer than a mount without staged data would keep others waiting; shorter than the reader waits for an answer.
        std::thread::sleep(Duration::from_secs(14));
        assert!(!reader.is_finished(), "it has not waited");
        drop(down);
        assert!(reader.join().unwrap().unwrap() == content(1, 300_000));
    });
    file.write_all_at(b"more", 0).unwrap();
    file.sync_all().unwrap();
    let log = mount.process.log();
    assert!(!log.contains("returned without its data"), "{log}");
    assert!(set.staged("conflicts").is_empty());
}

#[test]
fn what_was_taken_over_beside_another_mount_does_not_lie_over_its_newer_data() {
    let set = Writeback::new("beside", &[]);
    let mut mount = set.mount(HELD);
    for name in ["written", "read"] {
        write_synced(&mount.join(name), &content(1, 100_000));
    }
    mount.process.kill();
    drop(mount);
    let other = set.other();
    // Open elsewhere: the next mount can't have the write leases.
    let written = File::options()
        .write(true)
        .open(other.join("written"))
        .unwrap();
    let _read = File::open(other.join("read")).unwrap();
    let down = set.uploads_refused();
    let mount = set.mount(&["--writeback", "--io-timeout", "1s"]);
    assert!(read_anew(&mount.join("written")) == content(1, 100_000));
    // Small enough to need no bucket.
    written.write_all_at(b"newer", 0).unwrap();
    written.sync_all().unwrap();
    drop(down);
    wait_for("what fits to be stored", SOON, || {
        (fs::read(other.join("read")).unwrap() == content(1, 100_000)).then_some(())
    });
    wait_for("what doesn't to be put aside", SOON, || {
        (set.staged("conflicts").len() == 1).then_some(())
    });
    look_at_what_was_kept_aside(&set);
    assert_eq!(fs::read(other.join("written")).unwrap(), b"newer");
    assert_eq!(fs::read(mount.join("written")).unwrap(), b"newer");
    assert!(set.staged("").is_empty());
}

#[test]
fn what_is_synced_later_does_not_carry_older_staged_data_over_that_of_others() {
    let set = Writeback::new("carried", &[]);
    let mut mount = set.mount(HELD);
    write_synced(&mount.join("written"), &content(1, 100_000));
    mount.process.kill();
    drop(mount);
    let other = set.other();
    let theirs = File::options()
        .write(true)
        .open(other.join("written"))
        .unwrap();
    let down = set.uploads_refused();
    // Takes over what is staged, without the lease.
    let mount = set.mount(&["--writeback", "--io-timeout", "1s"]);
    theirs.write_all_at(b"newer", 0).unwrap();
    theirs.sync_all().unwrap();
    drop(theirs);
    // Alone with the file now, as far as the leases go.
    let ours = File::options()
        .write(true)
        .open(mount.join("written"))
        .unwrap();
    ours.write_all_at(b"late", 50_000).unwrap();
    assert!(ours.sync_all().is_err(), "it can't be stored anywhere");
    drop(down);
    wait_for("the older data to be put aside", SOON, || {
        (set.staged("conflicts").len() == 1).then_some(())
    });
    let now = fs::read(other.join("written")).unwrap();
    assert!(now.starts_with(b"newer"), "overwritten by older data");
    drop(ours);
    assert!(fs::read(mount.join("written")).unwrap() == now);
}

/// The record of `written`, of 100,000 bytes.
fn look_at_what_was_kept_aside(set: &Writeback) {
    let cache = set.cache.path().to_str().unwrap();
    let url = set.cluster.volume_url(set.volume);
    let run = |arguments: &[&str]| set.cluster.run(&[&["staging"], arguments].concat());
    let listed = run(&["ls", cache, "--volume", &url, "--json"])
        .success()
        .json();
    let [record] = listed.as_array().unwrap().as_slice() else {
        panic!("{listed}");
    };
    assert_eq!(record["kept_aside"], true, "{record}");
    assert_eq!(record["path"], "/written");
    assert_eq!(record["bytes"], 100_000);
    assert_eq!(record["ranges"], serde_json::json!([[0, 100_000]]));
    let number = record["record"].as_str().unwrap();
    let to = set.cluster.directory.join("exported");
    let to = to.to_str().unwrap();
    run(&["export", cache, number, to, "--volume", &url]).success();
    assert!(fs::read(to).unwrap() == content(1, 100_000));
    run(&["export", cache, number, to, "--volume", &url]).failure(1, "exists");
    run(&["rm", cache, number]).failure(2, "must be confirmed");
    run(&["rm", cache, "00ff", "--yes"]).failure(1, "no record 00ff");
    run(&["rm", cache, number, "--yes"]).success();
    let listed = run(&["ls", cache, "--json"]).success().json();
    assert_eq!(listed, serde_json::json!([]));
}

/// Files in a bucket that is a directory.
fn objects(bucket: &Path) -> usize {
    let entries = fs::read_dir(bucket).unwrap();
    let counts = entries.map(|entry| {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => objects(&entry.path()),
            false => 1,
        }
    });
    counts.sum()
}

/// Attempts to lose the answer to a commit: it may be on its way at the wrong moment.
const ATTEMPTS: usize = 8;

/// Stages a file and stops the mount when its commit was sent and before it hears of it, does something through another mount if
/// the commit took effect, and lets the mount go on, which has lost its session by then. `None`: the commit was not sent.
fn with_an_answer_lost<T>(
    set: &Writeback,
    (mount, other): (&Mount, &Mount),
    name: &str,
    act: impl FnOnce() -> T,
) -> Option<(File, T)> {
    let whole = content(1, 300_000);
    let sessions = || mount.process.log().matches("a new session goes on").count();
    let file = write_synced(&mount.join(name), &whole);
    let (before, known) = (objects(&set.bucket()), sessions());
    let lost = LostReplies::from_port(set.cluster.nodes[0].port);
    // The upload needs no answer of the server's, and the commit is sent right after it.
    wait_for("the upload", SOON, || {
        (objects(&set.bucket()) > before).then_some(())
    });
    wait_for("an answer to be lost", SOON, || {
        (lost.dropped() > 5).then_some(())
    });
    mount.process.signal(Signal::SIGSTOP);
    drop(lost);
    let stored = fs::read(other.join(name)).unwrap() == whole;
    let acted = stored.then(act);
    mount.process.signal(Signal::SIGCONT);
    wait_for("a new session", SOON, || (sessions() > known).then_some(()));
    acted.map(|acted| (file, acted))
}

#[test]
fn a_commit_whose_answer_got_lost_with_the_session_is_known_as_one_s_own() {
    let set = Writeback::new("unanswered", &[]);
    let mount = set.mount(&["--writeback", "--upload-delay", "3s"]);
    let other = set.other();
    let whole = content(1, 300_000);
    // Segment ids are at hand from now on.
    write_synced(&mount.join("first"), &whole);
    assert!(fs::read(other.join("first")).unwrap() == whole);
    let hit = (0..ATTEMPTS).find_map(|attempt| {
        let name = format!("file-{attempt}");
        let (file, ()) = with_an_answer_lost(&set, (&mount, &other), &name, || ())?;
        Some((file, name))
    });
    let (file, name) = hit.expect("a commit took effect");
    file.write_all_at(b"again", 0).unwrap();
    file.sync_all().unwrap();
    let expected = [b"again", &whole[5..]].concat();
    assert!(fs::read(other.join(name)).unwrap() == expected);
    assert!(set.staged("conflicts").is_empty());
}

#[test]
fn a_file_that_several_mounts_have_open_is_stored_by_fsync() {
    let set = Writeback::new("several", &[]);
    let mount = set.mount(&[HELD, &["--io-timeout", "1s"]].concat());
    let other = set.other();
    fs::write(other.join("file"), content(1, 50_000)).unwrap();
    let _theirs = File::open(other.join("file")).unwrap();
    let file = File::options()
        .write(true)
        .open(mount.join("file"))
        .unwrap();
    file.write_all_at(&content(2, 50_000), 0).unwrap();
    let down = set.bucket_down();
    let refused = file.sync_all().expect_err("it is not in the bucket");
    assert_eq!(refused.raw_os_error(), Some(libc::EIO));
    drop(down);
    file.sync_all().unwrap();
    assert!(set.staged("").is_empty());
    assert!(fs::read(other.join("file")).unwrap() == content(2, 50_000));
}

/// Lets a file show at 0 what it shows at `from`, by sharing the data: the library copies with copy_file_range.
fn copy_within(path: &Path, from: u64, length: u64) {
    let mut source = File::open(path).unwrap();
    source.seek(SeekFrom::Start(from)).unwrap();
    let mut target = File::options().write(true).open(path).unwrap();
    let copied = std::io::copy(&mut source.take(length), &mut target).unwrap();
    assert_eq!(copied, length);
    target.sync_all().unwrap();
}

#[test]
fn what_others_put_together_from_one_s_own_segments_is_theirs() {
    let set = Writeback::new("shared", &[]);
    let whole = content(1, 300_000);
    let mut mount = set.mount(HELD);
    // Keeps the folder's notes alive.
    write_synced(&mount.join("keeper"), &whole);
    let names = ["copied", "cloned", "kept"];
    {
        let other = set.other();
        for name in names {
            write_synced(&mount.join(name), &whole);
            assert!(fs::read(other.join(name)).unwrap() == whole);
        }
        other.unmount();
    }
    // Staged over what the bucket has by now.
    for name in names {
        let file = File::options().write(true).open(mount.join(name)).unwrap();
        file.write_all_at(b"staged", 0).unwrap();
        file.sync_all().unwrap();
    }
    assert_eq!(set.staged("").len(), 4);
    mount.process.kill();
    drop(mount);

    let other = set.other();
    copy_within(&other.join("copied"), 200_000, 100_000);
    // From a copy that has everything where it was.
    let path = |name| other.join(name).to_str().unwrap().to_owned();
    let cluster = &set.cluster;
    cluster
        .run(&["clone", &path("cloned"), &path("backup")])
        .success();
    let status = Command::new("cp")
        .args(["--reflink=auto", "--sparse=never"])
        .args([path("backup"), path("cloned")])
        .status();
    assert!(status.unwrap().success());
    File::open(other.join("cloned"))
        .unwrap()
        .sync_all()
        .unwrap();
    let copied = [&whole[200_000..], &whole[100_000..]].concat();
    let staged = [b"staged", &whole[6..]].concat();

    let mount = set.mount(&["--writeback"]);
    for (name, expected) in [("copied", &copied), ("cloned", &whole), ("kept", &staged)] {
        assert!(read_anew(&mount.join(name)) == *expected, "{name}");
    }
    wait_for("the rest to be stored", SOON, || {
        set.staged("").is_empty().then_some(())
    });
    assert_eq!(set.staged("conflicts").len(), 2);
    for (name, expected) in [("copied", &copied), ("cloned", &whole), ("kept", &staged)] {
        assert!(read_anew(&other.join(name)) == *expected, "{name}");
    }
}

#[test]
fn a_commit_that_others_built_on_while_its_answer_was_lost_is_not_repeated() {
    let set = Writeback::new("built-on", &[]);
    let mount = set.mount(&["--writeback", "--upload-delay", "3s"]);
    let other = set.other();
    let whole = content(1, 300_000);
    write_synced(&mount.join("first"), &whole);
    assert!(fs::read(other.join("first")).unwrap() == whole);
    let expected = [&whole[200_000..], &whole[100_000..]].concat();
    let hit = (0..ATTEMPTS).any(|attempt| {
        let name = format!("file-{attempt}");
        let copy = || copy_within(&other.join(&name), 200_000, 100_000);
        let lost = with_an_answer_lost(&set, (&mount, &other), &name, copy);
        let Some((file, ())) = lost else {
            return false;
        };
        // The answer may have come after all, when the mount went on.
        let synced = file.sync_all();
        drop(file);
        assert!(read_anew(&other.join(&name)) == expected, "{synced:?}");
        assert!(read_anew(&mount.join(&name)) == expected, "{synced:?}");
        synced.is_err_and(|error| error.raw_os_error() == Some(libc::ESTALE))
    });
    assert!(hit, "an answer was lost, and the file changed meanwhile");
    assert_eq!(set.staged("conflicts").len(), 1);
}

#[test]
fn staged_data_that_the_bucket_does_not_take_is_waited_for_so_long() {
    let set = Writeback::new("given-up", &[]);
    let flags = ["--io-timeout", "1s", "--recall-wait", "5s"];
    let mount = set.mount(&[HELD, &flags].concat());
    let (before, after) = (content(1, 300_000), content(2, 400_000));
    let path = mount.join("file");
    {
        let other = set.other();
        write_synced(&path, &before);
        assert!(fs::read(other.join("file")).unwrap() == before);
        other.unmount();
    }
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&after, 0).unwrap();
    file.sync_all().unwrap();
    let other = set.other();
    let staged = set.staged("");
    assert_eq!(staged.len(), 1);
    let down = set.bucket_down();
    let asked = Instant::now();
    let seen = fs::metadata(other.join("file")).unwrap().len();
    assert_eq!(seen, before.len() as u64, "what was stored before");
    assert!(asked.elapsed() >= Duration::from_secs(5), "{asked:?}");
    let log = mount.process.log();
    assert!(
        log.contains("although its data could not be stored"),
        "{log}"
    );
    // It is still there, and seen here.
    assert_eq!(set.staged(""), staged);
    assert!(read_anew(&path) == after);
    // Without the lease it is the bucket that sync asks, each time.
    file.write_all_at(b"more", 0).unwrap();
    for _ in 0..2 {
        let error = file.sync_all().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
    drop(down);
    wait_for("the bucket to take it", SOON, || file.sync_all().ok());
    let expected = [b"more", &after[4..]].concat();
    wait_for("it to be seen", SOON, || {
        (read_anew(&other.join("file")) == expected).then_some(())
    });
    wait_for("the records to go", SOON, || {
        set.staged("").is_empty().then_some(())
    });
    assert!(set.staged("conflicts").is_empty());
}

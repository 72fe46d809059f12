//! Snapshots: whole, read-only for everybody, and removed without a trace.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use support::{Cluster, wait_for};

fn erofs<T: std::fmt::Debug>(outcome: std::io::Result<T>) {
    let error = outcome.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{error}");
}

#[test]
fn a_snapshot_keeps_what_was_there_and_nobody_changes_it() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("kept", &["--deletion-grace", "0s", "--trash-days", "3"]);
    let mount = cluster.mount("kept");
    let work = mount.join("work");
    fs::create_dir_all(work.join("deep")).unwrap();
    let large: Vec<u8> = (0..6_000_000u32).map(|n| (n >> 4) as u8).collect();
    fs::write(work.join("large"), &large).unwrap();
    fs::write(work.join("deep/small"), "small").unwrap();
    fs::set_permissions(work.join("deep/small"), fs::Permissions::from_mode(0o640)).unwrap();
    chown(work.join("deep/small"), Some(1234), Some(567)).unwrap();
    fs::hard_link(work.join("deep/small"), work.join("linked")).unwrap();
    symlink("deep/small", work.join("link")).unwrap();
    let url = cluster.volume_url("kept");
    let place = work.to_str().unwrap();
    // A quota that the copies would not fit into: they are charged to nobody.
    cluster
        .run(&["quota", "set", place, "--uid", "1234", "--inodes", "1"])
        .success();

    let made = cluster
        .run(&["snapshot", "create", place, "--name", "monday", "--json"])
        .success()
        .json();
    assert_eq!(made["path"], "/.snapshots/monday");
    assert_eq!(made["entries"], 6, "{made}");
    cluster
        .run(&["snapshot", "create", place, "--name", "monday"])
        .failure(1, "exists already");

    // The source lives on.
    fs::write(work.join("large"), "new").unwrap();
    fs::remove_dir_all(work.join("deep")).unwrap();
    let kept = mount.join(".snapshots/monday");
    assert!(fs::read(kept.join("large")).unwrap() == large);
    assert_eq!(fs::read(kept.join("linked")).unwrap(), b"small");
    let attributes = fs::metadata(kept.join("deep/small")).unwrap();
    assert_eq!(attributes.permissions().mode() & 0o7777, 0o640);
    assert_eq!(
        (attributes.uid(), attributes.gid(), attributes.nlink()),
        (1234, 567, 2)
    );
    assert_eq!(
        fs::read_link(kept.join("link")).unwrap(),
        Path::new("deep/small")
    );

    // Root is nobody here, too.
    erofs(fs::write(kept.join("large"), "x"));
    erofs(
        fs::OpenOptions::new()
            .append(true)
            .open(kept.join("deep/small")),
    );
    erofs(fs::write(kept.join("new"), "x"));
    erofs(fs::create_dir(mount.join(".snapshots/mine")));
    erofs(fs::remove_file(kept.join("link")));
    erofs(fs::rename(kept.join("large"), mount.join("large")));
    erofs(fs::rename(mount.join(".snapshots"), mount.join("old")));
    erofs(fs::hard_link(kept.join("large"), mount.join("large")));
    erofs(fs::set_permissions(
        &kept,
        fs::Permissions::from_mode(0o777),
    ));
    erofs(
        fs::File::open(kept.join("large"))
            .unwrap()
            .set_modified(std::time::UNIX_EPOCH),
    );
    erofs(fs::remove_dir_all(&kept));
    cluster
        .run(&["rmr", kept.to_str().unwrap()])
        .failure(1, "Read-only file system");

    // From there it can be had back; then it is charged to whom it belongs.
    let back = mount.join("back");
    let clone = ["clone", kept.to_str().unwrap(), back.to_str().unwrap()];
    cluster.run(&clone).failure(1, "Disk quota exceeded");
    cluster
        .run(&["quota", "rm", place, "--uid", "1234"])
        .success();
    cluster.run(&clone).success();
    fs::write(back.join("deep/small"), "changed").unwrap();
    assert_eq!(fs::read(kept.join("deep/small")).unwrap(), b"small");

    let root = cluster
        .run(&["snapshot", "create", &url, "/", "--name", "all", "--json"])
        .success()
        .json();
    assert!(root["entries"].as_u64().unwrap() > 6, "{root}");
    assert!(!mount.join(".snapshots/all/.snapshots").exists());
    assert!(!mount.join(".snapshots/all/.trash").exists());
    let listed = cluster
        .run(&["snapshot", "ls", &url, "--sizes", "--json"])
        .success()
        .json();
    let names: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|it| (it["name"].as_str().unwrap(), it["source"].as_str().unwrap()))
        .collect();
    assert_eq!(names, [("monday", "/work"), ("all", "/")]);

    // Removed for good, also of a volume with a trash; then nothing of it is left in the bucket.
    cluster
        .run(&["snapshot", "rm", &url, "monday", "all"])
        .success();
    assert!(!kept.exists());
    cluster
        .run(&["snapshot", "rm", &url, "monday"])
        .failure(1, "no snapshot `monday`");
    fs::remove_dir_all(&back).unwrap();
    fs::remove_dir_all(mount.join(".trash")).unwrap_err();
    let checked = cluster.run(&["fsck", &url, "--level", "data"]);
    checked.success();
    wait_for("the removal", Duration::from_secs(30), || {
        let status = cluster.volume("kept");
        // Root, work with three entries, .snapshots, and the trash with what was removed from both trees.
        (status["used_inodes"].as_u64()? <= 20).then_some(())
    });
}

struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn files_in_a_snapshot_taken_beside_writers_are_whole() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("busy", &[]);
    let mount = cluster.mount("busy");
    let work = mount.join("work");
    fs::create_dir(&work).unwrap();
    let content = |round: u64| format!("{round:08}").repeat(4000);
    for n in 0..40 {
        fs::write(work.join(format!("f{n}")), content(0)).unwrap();
    }
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                for n in 0..40 {
                    // As programs replace files: whole, by rename.
                    let part = work.join(".part");
                    let mut file = fs::File::create(&part).unwrap();
                    file.write_all(content(round).as_bytes()).unwrap();
                    drop(file);
                    fs::rename(&part, work.join(format!("f{n}"))).unwrap();
                }
                rounds.store(round, Ordering::Relaxed);
            }
        });
        // Also when an assertion fails.
        let _end = OnDrop(&stop);
        for n in 0..6 {
            let name = format!("s{n}");
            let before = rounds.load(Ordering::Relaxed);
            let made = cluster.run(&[
                "snapshot",
                "create",
                work.to_str().unwrap(),
                "--name",
                &name,
            ]);
            // A file that is replaced just then is seen before or after; the temporary one may be seen, too.
            made.success();
            let after = rounds.load(Ordering::Relaxed) + 1;
            let kept = mount.join(".snapshots").join(&name);
            for file in 0..40 {
                let text = fs::read_to_string(kept.join(format!("f{file}"))).unwrap();
                let round: u64 = text[..8].parse().unwrap();
                assert!(
                    (before..=after).contains(&round),
                    "{before} {round} {after}"
                );
                assert!(text == content(round), "f{file} of {name} is a mixture");
            }
        }
    });
    // They stay as they are.
    let first = mount.join(".snapshots/s0/f7");
    let before = fs::read(&first).unwrap();
    fs::write(work.join("f7"), "later").unwrap();
    assert_eq!(fs::read(&first).unwrap(), before);
    let url = cluster.volume_url("busy");
    cluster.run(&["fsck", &url, "--level", "data"]).success();
}

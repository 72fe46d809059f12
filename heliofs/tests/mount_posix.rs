//! What other file systems on object storage get wrong about times and renames, one test each, on real mounts. (Setuid bits,
//! listings beside renames and deadlocks of locks are in `fs_posix.rs` and `fs_locks.rs`.)

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use support::{Cluster, Mount};

fn one(volume: &str) -> (Mount, Cluster) {
    let cluster = Cluster::start();
    cluster.format_file(volume, &[]);
    (cluster.mount(volume), cluster)
}

#[test]
fn setting_and_removing_an_extended_attribute_changes_ctime() {
    let (mount, _cluster) = one("xattr-ctime");
    let path = mount.join("file");
    fs::write(&path, "x").unwrap();
    let mut before = ctime(&path);
    for arguments in [&["-n", "user.a", "-v", "1"][..], &["-x", "user.a"]] {
        let status = Command::new("setfattr")
            .args(arguments)
            .arg(&path)
            .status()
            .unwrap();
        assert!(status.success(), "{arguments:?}");
        let after = ctime(&path);
        assert!(
            after > before,
            "{arguments:?}: ctime {before:?} → {after:?}"
        );
        before = after;
    }
}

fn ctime(path: &Path) -> (i64, i64) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.ctime(), metadata.ctime_nsec())
}

fn mtime(path: &Path) -> (i64, i64) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.mtime(), metadata.mtime_nsec())
}

#[test]
fn a_file_that_was_renamed_over_can_still_be_used() {
    let (mount, cluster) = one("rename-over");
    let other = cluster.mount("rename-over");
    for renamer in [&mount, &other] {
        fs::write(mount.join("old"), vec![1; 50_000]).unwrap();
        let open = File::options()
            .read(true)
            .write(true)
            .open(mount.join("old"))
            .unwrap();
        fs::write(renamer.join("new"), "new").unwrap();
        fs::rename(renamer.join("new"), renamer.join("old")).unwrap();
        assert_eq!(fs::read(mount.join("old")).unwrap(), b"new");
        support::wait_for("nlink 0", Duration::from_secs(2), || {
            (open.metadata().unwrap().nlink() == 0).then_some(())
        });
        assert_eq!(open.metadata().unwrap().size(), 50_000);
        open.write_all_at(&[2; 10], 49_995).unwrap();
        open.sync_all().unwrap();
        let mut tail = [0; 15];
        open.read_exact_at(&mut tail, 49_990).unwrap();
        assert_eq!(tail, [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]);
    }
}

#[test]
fn times_before_1970_are_kept_to_the_nanosecond() {
    let (mount, cluster) = one("old-times");
    let path = mount.join("file");
    let time = UNIX_EPOCH - Duration::new(600_000_000, 123_456_789);
    File::create(&path)
        .unwrap()
        .set_times(fs::FileTimes::new().set_modified(time).set_accessed(time))
        .unwrap();
    for path in [path, cluster.mount("old-times").join("file")] {
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.modified().unwrap(), time);
        assert_eq!(metadata.accessed().unwrap(), time);
    }
}

#[test]
fn every_change_of_a_directory_changes_its_mtime() {
    let (mount, _cluster) = one("dir-mtime");
    let dir = mount.join("d");
    fs::create_dir(&dir).unwrap();
    let mut before = mtime(&dir);
    let mut changed = |what: &str| {
        let after = mtime(&dir);
        assert!(after > before, "{what}: mtime {before:?} → {after:?}");
        before = after;
    };
    for turn in 0..20 {
        File::create_new(dir.join("a")).unwrap();
        changed(&format!("create {turn}"));
        fs::rename(dir.join("a"), dir.join("b")).unwrap();
        changed(&format!("rename {turn}"));
        fs::remove_file(dir.join("b")).unwrap();
        changed(&format!("unlink {turn}"));
    }
}

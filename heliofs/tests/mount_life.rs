//! A mount's life: where it may be mounted, what is left when its process dies, how it ends.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::cluster::{HELIOFS, run};
use support::mount::is_mounted;
use support::{Cluster, Mount, wait_for};

fn cluster(volume: &str) -> Cluster {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file(volume, &[]);
    cluster
}

#[test]
fn bad_mount_points_are_refused_with_advice() {
    let cluster = cluster("places");
    let scratch = support::scratch();
    let attempt = |place: &std::path::Path| {
        cluster.run(&["mount", &cluster.url(), "places", place.to_str().unwrap()])
    };
    let missing = attempt(&scratch.path().join("missing"));
    assert_ne!(missing.code, 0);
    assert!(
        missing.err.contains("does not exist") && missing.err.contains("mkdir"),
        "{}",
        missing.err
    );
    let file = scratch.path().join("file");
    fs::write(&file, b"x").unwrap();
    let not_a_directory = attempt(&file);
    assert!(
        not_a_directory.err.contains("not a directory"),
        "{}",
        not_a_directory.err
    );
    let full = attempt(scratch.path());
    assert!(full.err.contains("not empty"), "{}", full.err);
    assert!(!is_mounted(scratch.path()));
}

#[test]
fn a_mount_shows_sensible_names_and_numbers() {
    let cluster = cluster("names");
    let mount = cluster.mount("names");
    let line = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = line
        .lines()
        .find(|line| line.contains(mount.path.to_str().unwrap()))
        .unwrap()
        .to_owned();
    assert!(line.contains("fuse.heliofs heliofs:names"), "{line}");
    assert!(
        line.contains("allow_other") && line.contains("default_permissions"),
        "{line}"
    );
    let df = Command::new("df")
        .args(["--output=source,fstype,size,used"])
        .arg(&mount.path)
        .output()
        .unwrap();
    let df = String::from_utf8(df.stdout).unwrap();
    assert!(
        df.contains("heliofs:names") && df.contains("fuse.heliofs"),
        "{df}"
    );
    let root = fs::metadata(&mount.path).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::ino(&root), 1);
    mount.unmount();
}

#[test]
fn a_mount_whose_process_was_killed_is_replaced_and_synced_data_is_there() {
    let cluster = cluster("killed");
    let mut mount = Mount::of(&cluster, "killed", &[]);
    let synced = vec![7u8; 3 << 20];
    let mut file = File::create_new(mount.join("synced")).unwrap();
    file.write_all(&synced).unwrap();
    file.sync_all().unwrap();
    file.write_all(&vec![8u8; 5 << 20]).unwrap();
    mount.process.kill();
    let error = fs::metadata(&mount.path).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(107),
        "a dead mount answers ENOTCONN"
    );
    drop(file);
    let began = Instant::now();
    // The same place again: what is dead is detached first.
    let again = cluster.run(&[
        "mount",
        "-d",
        "--cache-size",
        "0",
        "--log-file",
        cluster.directory.join("again.log").to_str().unwrap(),
        &cluster.url(),
        "killed",
        mount.path.to_str().unwrap(),
    ]);
    again.success();
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    let found = fs::read(mount.join("synced")).unwrap();
    assert!(found.starts_with(&synced), "what was synced is there");
    assert!(
        found[synced.len()..].iter().all(|byte| *byte == 8),
        "and what follows is what was written"
    );
    run(Command::new(HELIOFS).arg("umount").arg(&mount.path)).success();
}

#[test]
fn a_signal_ends_a_mount_with_everything_stored() {
    let cluster = cluster("signal");
    let mut mount = cluster.mount("signal");
    fs::write(mount.join("file"), vec![3u8; 10 << 20]).unwrap();
    mount.process.signal(Signal::SIGTERM);
    let status = mount.process.wait(Duration::from_secs(30));
    assert!(status.success(), "{status}: {}", mount.process.log_tail());
    assert!(!is_mounted(&mount.path));
    let mount = cluster.mount("signal");
    assert_eq!(fs::read(mount.join("file")).unwrap(), vec![3u8; 10 << 20]);
}

#[test]
fn a_mount_in_use_is_not_unmounted() {
    let cluster = cluster("busy");
    let mount = cluster.mount("busy");
    let file = File::create_new(mount.join("open")).unwrap();
    let ran = run(Command::new(HELIOFS).arg("umount").arg(&mount.path));
    ran.failure(1, "in use");
    assert!(is_mounted(&mount.path));
    drop(file);
    // The kernel lets go of the file a moment after its last close.
    wait_for("an unmount", Duration::from_secs(10), || {
        (run(Command::new(HELIOFS).arg("umount").arg(&mount.path)).code == 0).then_some(())
    });
}

#[test]
fn a_read_only_mount_changes_nothing() {
    let cluster = cluster("readonly");
    let mount = cluster.mount("readonly");
    fs::write(mount.join("file"), b"x").unwrap();
    let frozen = Mount::of(&cluster, "readonly", &["--read-only"]);
    assert_eq!(fs::read(frozen.join("file")).unwrap(), b"x");
    for refused in [
        fs::write(frozen.join("file"), b"y"),
        fs::write(frozen.join("new"), b"y"),
        fs::remove_file(frozen.join("file")),
        fs::create_dir(frozen.join("dir")),
        fs::rename(frozen.join("file"), frozen.join("other")),
    ] {
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(30));
    }
    assert_eq!(fs::read(mount.join("file")).unwrap(), b"x");
}

//! fsync and close tell the truth about the bucket.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::IntoRawFd;
use std::time::{Duration, Instant};

use support::Cluster;

/// How long the bucket is tried before an error is given.
const IO_TIMEOUT: Duration = Duration::from_secs(2);
/// The same with room for a slow machine, and still far below the default: a mount that ignores the option fails.
const BOUND: Duration = Duration::from_secs(15);

#[test]
fn without_a_bucket_fsync_fails_again_and_again_until_the_data_is_stored() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("truth", &[]);
    let io_timeout = format!("{}s", IO_TIMEOUT.as_secs());
    let mount = support::Mount::of(&cluster, "truth", &["--io-timeout", &io_timeout]);
    let path = mount.join("file");
    let mut file = File::create_new(&path).unwrap();
    file.write_all(&vec![1u8; 100_000]).unwrap();
    file.sync_all().unwrap();

    // The bucket is gone: a file lies where its directory was.
    let bucket = cluster.directory.join("bucket");
    let away = cluster.directory.join("bucket-away");
    fs::rename(&bucket, &away).unwrap();
    fs::write(&bucket, b"not a directory").unwrap();
    file.write_all(&vec![2u8; 100_000]).unwrap();
    for attempt in 0..2 {
        let began = Instant::now();
        let error = file.sync_all().expect_err("an fsync that stored nothing");
        assert_eq!(error.raw_os_error(), Some(5), "attempt {attempt}");
        // The upload that a write began in the background may have been trying for a while.
        assert!(
            began.elapsed() < BOUND,
            "attempt {attempt} took {:?}",
            began.elapsed()
        );
    }
    // close(2) of another descriptor says it, too. Only the number is given away: nothing else closes it.
    let other = file.try_clone().unwrap().into_raw_fd();
    let closed = nix::unistd::close(other);
    assert_eq!(closed, Err(nix::errno::Errno::EIO));
    assert_eq!(
        fs::read(&path)
            .expect_err("an open that hides lost data")
            .raw_os_error(),
        Some(5)
    );
    // What is only in the metadata goes on.
    fs::create_dir(mount.join("dir")).unwrap();
    fs::write(mount.join("small"), b"inline").unwrap();
    assert_eq!(fs::read(mount.join("small")).unwrap(), b"inline");

    fs::remove_file(&bucket).unwrap();
    fs::rename(&away, &bucket).unwrap();
    file.sync_all().expect("the bucket is back");
    drop(file);
    mount.unmount();
    let mount = cluster.mount("truth");
    let found = fs::read(mount.join("file")).unwrap();
    assert_eq!(found.len(), 200_000);
    assert!(
        found[..100_000].iter().all(|byte| *byte == 1)
            && found[100_000..].iter().all(|byte| *byte == 2)
    );
}

#[test]
fn a_full_volume_says_so_and_takes_data_again_after_a_removal() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("full", &["--capacity", "16M", "--deletion-grace", "0s"]);
    let mount = cluster.mount("full");
    fs::write(mount.join("first"), vec![1u8; 12 << 20]).unwrap();
    let mut second = File::create_new(mount.join("second")).unwrap();
    let refused = second
        .write_all(&vec![2u8; 8 << 20])
        .and_then(|()| second.sync_all());
    assert_eq!(
        refused
            .expect_err("more than the volume holds")
            .raw_os_error(),
        Some(28)
    );
    fs::remove_file(mount.join("first")).unwrap();
    let began = Instant::now();
    while let Err(error) = second.sync_all() {
        assert_eq!(error.raw_os_error(), Some(28));
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "the space of a removed file does not come back"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(second);
    assert!(
        fs::read(mount.join("second"))
            .unwrap()
            .iter()
            .all(|byte| *byte == 2)
    );
}

#[test]
fn a_large_file_is_stored_while_it_is_written() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("large", &[]);
    // A buffer far smaller than the file: the writer waits for uploads instead of failing.
    let mount = support::Mount::of(
        &cluster,
        "large",
        &["--buffer-size", "16M", "--cache-size", "0"],
    );
    let mut file = File::create_new(mount.join("large")).unwrap();
    for part in 0..100u32 {
        file.write_all(&part.to_le_bytes().repeat(256 << 10))
            .unwrap();
    }
    drop(file);
    let found = fs::read(mount.join("large")).unwrap();
    assert_eq!(found.len(), 100 << 20);
    for (part, bytes) in (0u32..).zip(found.chunks(1 << 20)) {
        assert!(bytes == part.to_le_bytes().repeat(256 << 10), "MiB {part}");
    }
}

//! Two mounts of one volume: what one does, the other sees.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, Instant};

use support::{Cluster, Mount, wait_for};

/// Half of the lease: what is seen within it was pushed, not timed out.
const PUSHED: Duration = Duration::from_millis(500);

struct Two {
    a: Mount,
    b: Mount,
    _cluster: Cluster,
}

fn two(volume: &str) -> Two {
    let cluster = Cluster::start();
    cluster.format_file(volume, &[]);
    Two {
        a: cluster.mount(volume),
        b: cluster.mount(volume),
        _cluster: cluster,
    }
}

#[test]
fn an_open_sees_the_last_close_of_the_other_mount() {
    let two = two("close-to-open");
    for turn in 0..50usize {
        let (writer, reader) = if turn % 2 == 0 {
            (&two.a, &two.b)
        } else {
            (&two.b, &two.a)
        };
        // Inline, and in segments.
        let text = vec![turn as u8; if turn % 3 == 0 { 100 } else { 30_000 + turn }];
        fs::write(writer.join("file"), &text).unwrap();
        assert!(
            fs::read(reader.join("file")).unwrap() == text,
            "turn {turn}: an older version was read"
        );
    }
}

#[test]
fn what_one_mount_changes_is_pushed_to_the_other() {
    let two = two("pushed");
    let (a, b) = (&two.a, &two.b);
    fs::create_dir(a.join("dir")).unwrap();
    // Each step is looked at before, so that the other mount has something cached to be wrong about.
    let sees = |what: &str, look: &dyn Fn() -> bool| {
        let began = Instant::now();
        wait_for(what, PUSHED, || look().then_some(()));
        assert!(
            began.elapsed() <= PUSHED,
            "{what} took {:?}",
            began.elapsed()
        );
    };
    sees("the directory", &|| b.join("dir").is_dir());
    assert!(!b.join("dir/new").exists());
    File::create_new(a.join("dir/new")).unwrap();
    sees("a new name", &|| b.join("dir/new").exists());
    assert_eq!(fs::read_dir(b.join("dir")).unwrap().count(), 1);
    fs::set_permissions(a.join("dir/new"), fs::Permissions::from_mode(0o604)).unwrap();
    sees("a chmod", &|| {
        fs::metadata(b.join("dir/new")).unwrap().mode() & 0o777 == 0o604
    });
    fs::rename(a.join("dir/new"), a.join("dir/renamed")).unwrap();
    sees("a rename", &|| {
        !b.join("dir/new").exists() && b.join("dir/renamed").exists()
    });
    let mut file = File::options()
        .append(true)
        .open(a.join("dir/renamed"))
        .unwrap();
    file.write_all(&[1; 5000]).unwrap();
    file.sync_all().unwrap();
    sees("a new size", &|| {
        fs::metadata(b.join("dir/renamed")).unwrap().len() == 5000
    });
    fs::remove_file(a.join("dir/renamed")).unwrap();
    sees("an unlink", &|| !b.join("dir/renamed").exists());
    sees("an empty directory", &|| {
        fs::read_dir(b.join("dir")).unwrap().count() == 0
    });
    fs::remove_dir(b.join("dir")).unwrap();
    sees("a rmdir", &|| !a.join("dir").exists());
}

#[test]
fn appends_from_two_mounts_do_not_overwrite_each_other_when_locked() {
    let two = two("locked");
    File::create_new(two.a.join("log")).unwrap();
    std::thread::scope(|scope| {
        for (name, mount) in [(b'a', &two.a), (b'b', &two.b)] {
            scope.spawn(move || {
                for _ in 0..50 {
                    let mut file = File::options()
                        .append(true)
                        .open(mount.join("log"))
                        .unwrap();
                    file.lock().unwrap();
                    file.write_all(&[name; 64]).unwrap();
                    file.sync_all().unwrap();
                    file.unlock().unwrap();
                }
            });
        }
    });
    let text = fs::read(two.b.join("log")).unwrap();
    assert_eq!(text.len(), 100 * 64);
    for record in text.chunks(64) {
        assert!(
            record.iter().all(|byte| *byte == record[0]),
            "a record is torn"
        );
    }
}

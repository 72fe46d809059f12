//! What other file systems on object storage get wrong (CHAOS.md, class 17), one test each, on real mounts.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use support::{Cluster, Mount};

const NOBODY: u32 = 65534;

fn one(volume: &str) -> (Mount, Cluster) {
    let cluster = Cluster::start();
    cluster.format_file(volume, &[]);
    (cluster.mount(volume), cluster)
}

/// Runs a shell command as an unprivileged user in `dir`.
fn as_nobody(dir: &Path, script: &str) {
    let status = Command::new("sh")
        .args(["-c", script])
        .current_dir(dir)
        .uid(NOBODY)
        .gid(NOBODY)
        .status()
        .unwrap();
    assert!(status.success(), "{script}: {status}");
}

#[test]
fn whatever_an_unprivileged_user_does_to_content_clears_setuid_and_setgid() {
    let (mount, _cluster) = one("suid");
    let dir = mount.join("d");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(dir.join("source"), [1; 9000]).unwrap();
    for (name, script) in [
        ("write", "printf x >> write"),
        ("overwrite", "printf x 1<> overwrite"),
        ("truncate", "truncate -s 10 truncate"),
        ("fallocate", "fallocate -l 20000 fallocate"),
        ("keep-size", "fallocate -n -l 20000 keep-size"),
        ("punch", "fallocate -p -o 0 -l 100 punch"),
        ("zero", "fallocate -z -o 0 -l 100 zero"),
    ] {
        let path = dir.join(name);
        fs::write(&path, [2; 5000]).unwrap();
        chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o6777);
        as_nobody(&dir, script);
        let mode = fs::metadata(&path).unwrap().mode() & 0o7777;
        assert_eq!(mode, 0o777, "{name} left {mode:o}");
    }
}

#[test]
fn setting_and_removing_an_extended_attribute_changes_ctime() {
    let (mount, _cluster) = one("xattr-ctime");
    let path = mount.join("file");
    fs::write(&path, "x").unwrap();
    let mut before = ctime(&path);
    for arguments in [&["-n", "user.a", "-v", "1"][..], &["-x", "user.a"]] {
        let status = Command::new("setfattr").args(arguments).arg(&path).status().unwrap();
        assert!(status.success(), "{arguments:?}");
        let after = ctime(&path);
        assert!(after > before, "{arguments:?}: ctime {before:?} → {after:?}");
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
fn a_listing_beside_renames_shows_every_entry_that_stays_exactly_once() {
    let (mount, cluster) = one("readdir-rename");
    let other = cluster.mount("readdir-rename");
    let dir = mount.join("d");
    fs::create_dir(&dir).unwrap();
    let stay: BTreeSet<String> = (0..300).map(|number| format!("stays-{number}")).collect();
    for (number, name) in stay.iter().enumerate() {
        File::create_new(dir.join(name)).unwrap();
        if number % 10 == 0 {
            File::create_new(dir.join(format!("moves-{number}"))).unwrap();
        }
    }
    let stop = AtomicBool::new(false);
    let renames = std::thread::scope(|scope| {
        let renamer = scope.spawn(|| {
            let mut renames = 0;
            while !stop.load(Ordering::Relaxed) {
                for number in (0..300).step_by(10) {
                    let [from, to] = ["moves", "moved"].map(|name| dir.join(format!("{name}-{number}")));
                    fs::rename(&from, &to).unwrap();
                    fs::rename(&to, &from).unwrap();
                    renames += 2;
                }
            }
            renames
        });
        for turn in 0..40 {
            let dir = if turn % 2 == 0 { dir.clone() } else { other.join("d") };
            let mut seen = BTreeSet::new();
            let mut movers = 0;
            for entry in fs::read_dir(dir).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                movers += usize::from(name.starts_with("mov"));
                assert!(seen.insert(name.clone()), "{name} is shown twice");
            }
            assert!(stay.is_subset(&seen), "missing: {:?}", stay.difference(&seen).collect::<Vec<_>>());
            assert_eq!(movers, 30, "an entry that is renamed is shown once, under either name");
        }
        stop.store(true, Ordering::Relaxed);
        renamer.join().unwrap()
    });
    assert!(renames > 100, "{renames} renames ran beside the listings");
}

#[test]
fn a_file_that_was_renamed_over_can_still_be_used() {
    let (mount, cluster) = one("rename-over");
    let other = cluster.mount("rename-over");
    for renamer in [&mount, &other] {
        fs::write(mount.join("old"), vec![1; 50_000]).unwrap();
        let open = File::options().read(true).write(true).open(mount.join("old")).unwrap();
        fs::write(renamer.join("new"), "new").unwrap();
        fs::rename(renamer.join("new"), renamer.join("old")).unwrap();
        assert_eq!(fs::read(mount.join("old")).unwrap(), b"new");
        support::wait_for("nlink 0", Duration::from_secs(2), || (open.metadata().unwrap().nlink() == 0).then_some(()));
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
    File::create(&path).unwrap().set_times(fs::FileTimes::new().set_modified(time).set_accessed(time)).unwrap();
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

/// A process of its own with fcntl locks: the kernel's lock owner is the process.
struct Locker {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<std::process::ChildStdout>,
}

impl Locker {
    fn on(file: &Path) -> Self {
        const PROGRAM: &str = "
import errno, fcntl, sys
file = open(sys.argv[1], 'r+b', buffering=0)
for line in sys.stdin:
    start = int(line)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX, 10, start)
        print('granted', flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
";
        let mut child = Command::new("python3")
            .args(["-c", PROGRAM])
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let ask = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self { child, ask, answers }
    }

    fn ask(&mut self, start: u64) {
        writeln!(self.ask, "{start}").unwrap();
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn a_circle_of_fcntl_locks_across_mounts_is_a_deadlock() {
    let (mount, cluster) = one("edeadlk");
    let other = cluster.mount("edeadlk");
    fs::write(mount.join("file"), [0; 100]).unwrap();
    let mut a = Locker::on(&mount.join("file"));
    let mut b = Locker::on(&other.join("file"));
    a.ask(0);
    assert_eq!(a.answer(), "granted");
    b.ask(50);
    assert_eq!(b.answer(), "granted");
    // Whichever request reaches the server second closes the circle, and is told; then the other is granted what it waits for.
    a.ask(50);
    b.ask(0);
    let (sender, answers) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for (name, locker) in [("a", &mut a), ("b", &mut b)] {
            let sender = sender.clone();
            scope.spawn(move || {
                let answer = locker.answer();
                let refused = answer == "EDEADLK";
                sender.send((name, answer)).unwrap();
                if refused {
                    // Ends the process's locks.
                    locker.child.kill().unwrap();
                }
            });
        }
        let first = answers.recv_timeout(Duration::from_secs(10)).expect("the deadlock is noticed");
        assert_eq!(first.1, "EDEADLK", "{first:?}");
        let second = answers.recv_timeout(Duration::from_secs(10)).expect("the other goes on");
        assert_eq!(second.1, "granted", "{second:?}");
    });
}

#[test]
fn a_sparse_file_of_a_tebibyte_with_ten_thousand_extents_reads_back_right() {
    const TIB: u64 = 1 << 40;
    let (mount, cluster) = one("sparse");
    let path = mount.join("sparse");
    let file = File::create_new(&path).unwrap();
    file.set_len(TIB).unwrap();
    // Multiples of an odd number modulo 2^28 pages of 4 KiB: spread out and all different.
    let place = |number: u64| number.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (TIB / 4096) * 4096;
    let content = |number: u64| number.to_le_bytes().repeat(8);
    for number in 0..10_000 {
        file.write_all_at(&content(number), place(number)).unwrap();
    }
    drop(file);
    mount.unmount();
    let again = cluster.mount("sparse");
    let file = File::open(again.join("sparse")).unwrap();
    assert_eq!(file.metadata().unwrap().size(), TIB);
    let mut read = [0; 128];
    for number in 0..10_000 {
        file.read_exact_at(&mut read, place(number)).unwrap();
        assert_eq!(read[..64], content(number), "extent {number}");
        assert_eq!(read[64..], [0; 64], "behind extent {number}");
    }
    // st_blocks counts what is stored, not the holes.
    let stored = file.metadata().unwrap().blocks() * 512;
    assert!((640_000..2 << 20).contains(&stored), "{stored} bytes");
}

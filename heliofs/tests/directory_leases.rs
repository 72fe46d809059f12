//! Changes that a mount answers ahead of the cluster: seen by everybody who looks, in the order in which they were made, and there
//! after any crash once they were synced.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::{Cluster, Mount, wait_for};

fn volume(name: &str, nodes: usize) -> Cluster {
    let cluster = Cluster::with_dirs(nodes, |_, _| None, &[]);
    cluster.format_file(name, &["--trash-days", "0"]);
    cluster
}

fn ahead(cluster: &Cluster, volume: &str) -> Mount {
    Mount::of(cluster, volume, &["--dir-ahead"])
}

/// What a mount knows of directories that it has looked into before is corrected by what is pushed to it, which takes a moment on
/// a busy machine.
fn soon<T>(what: &str, mut look: impl FnMut() -> std::io::Result<T>) -> T {
    wait_for(what, Duration::from_secs(2), || match look() {
        Ok(seen) => Some(seen),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::NotFound, "{what}");
            None
        }
    })
}

/// Commands of this name in the volume's history.
fn commands(cluster: &Cluster, volume: &str, name: &str) -> usize {
    let log = cluster.run(&["changelog", &cluster.url(), volume, "--json"]);
    let quoted = format!("\"{name}\"");
    log.success()
        .out
        .lines()
        .filter(|line| line.contains(&quoted))
        .count()
}

fn sync_directory(path: &Path) {
    File::open(path).unwrap().sync_all().unwrap();
}

fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// What a program sees of a tree, by path.
fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    fn walk(root: &Path, below: &Path, all: &mut BTreeMap<PathBuf, String>) {
        let directory = root.join(below);
        let mut names = 0;
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            let path = below.join(entry.file_name());
            let full = root.join(&path);
            let attr = fs::symlink_metadata(&full).unwrap();
            let listed = entry.metadata().unwrap();
            assert_eq!(listed.ino(), attr.ino(), "{path:?}");
            names += entry.file_name().len() as u64;
            let times = (
                attr.mtime(),
                attr.mtime_nsec(),
                attr.ctime(),
                attr.ctime_nsec(),
            );
            let what = if attr.is_dir() {
                walk(root, &path, all);
                format!("directory of {} bytes", attr.size())
            } else if attr.is_symlink() {
                format!("link to {:?}", fs::read_link(&full).unwrap())
            } else {
                format!("file {:?}", String::from_utf8(fs::read(&full).unwrap()))
            };
            let shown = format!(
                "{what} #{} {:o} x{} {}:{} {times:?}",
                attr.ino(),
                attr.mode(),
                attr.nlink(),
                attr.uid(),
                attr.gid()
            );
            all.insert(path, shown);
        }
        assert_eq!(
            fs::symlink_metadata(&directory).unwrap().size(),
            names,
            "{below:?}"
        );
    }
    let mut all = BTreeMap::new();
    walk(root, Path::new(""), &mut all);
    all
}

#[test]
fn bursts_of_changes_are_seen_at_once_by_another_mount() {
    let cluster = volume("bursts", 3);
    let (a, b) = (ahead(&cluster, "bursts"), ahead(&cluster, "bursts"));
    for round in 0..8 {
        let top = format!("d{round}");
        fs::create_dir(a.join(&top)).unwrap();
        let mut expected = Vec::new();
        for n in 0..120 {
            let path = a.join(&top).join(format!("f{n}"));
            if n % 3 == 0 {
                fs::create_dir(&path).unwrap();
                fs::write(path.join("inner"), format!("{n}")).unwrap();
            } else {
                fs::write(&path, format!("{n}")).unwrap();
            }
            match n % 5 {
                0 => {
                    fs::rename(&path, a.join(&top).join(format!("r{n}"))).unwrap();
                    expected.push(format!("r{n}"));
                }
                1 if n % 3 != 0 => fs::remove_file(&path).unwrap(),
                _ => expected.push(format!("f{n}")),
            }
        }
        expected.sort();
        match round % 4 {
            0 => {
                let last = expected.last().unwrap();
                fs::symlink_metadata(b.join(&top).join(last)).unwrap();
            }
            1 => {
                let gone = fs::symlink_metadata(b.join(&top).join("f1"));
                assert_eq!(gone.unwrap_err().kind(), ErrorKind::NotFound);
            }
            2 => assert_eq!(
                fs::read_to_string(b.join(&top).join("f3/inner")).unwrap(),
                "3"
            ),
            _ => {}
        }
        assert_eq!(names(&b.join(&top)), expected, "round {round}");
        assert_eq!(names(&a.join(&top)), expected, "round {round}");
        assert_eq!(tree(&a.join(&top)), tree(&b.join(&top)), "round {round}");
        // What one mount has looked into, both change by turns.
        fs::write(b.join(&top).join("of b"), "b").unwrap();
        assert_eq!(fs::read_to_string(a.join(&top).join("of b")).unwrap(), "b");
        fs::remove_file(a.join(&top).join("of b")).unwrap();
        // What the kernel there has looked up is pushed to it.
        wait_for("the removal", Duration::from_millis(500), || {
            (!b.join(&top).join("of b").exists()).then_some(())
        });
    }
    assert!(
        commands(&cluster, "bursts", "batch") > 10,
        "nothing was answered ahead"
    );
    a.unmount();
    b.unmount();
    cluster.assert_replicas_equal("bursts");
}

/// One of the directories that there are.
fn directory(rng: &mut StdRng, model: &BTreeMap<PathBuf, Option<String>>) -> PathBuf {
    let all: Vec<_> = model.iter().filter(|(_, what)| what.is_none()).collect();
    match rng.random_range(0..=all.len()) {
        0 => PathBuf::new(),
        n => all[n - 1].0.clone(),
    }
}

fn anything(rng: &mut StdRng, model: &BTreeMap<PathBuf, Option<String>>) -> Option<PathBuf> {
    let at = rng.random_range(0..model.len().max(1));
    model.keys().nth(at).cloned()
}

/// One change through a mount, and the same of the model: paths with the contents of files, `None` for directories.
fn change(rng: &mut StdRng, root: &Path, model: &mut BTreeMap<PathBuf, Option<String>>, n: usize) {
    let name = format!("n{}", rng.random_range(0..40));
    let path = directory(rng, model).join(name);
    let full = root.join(&path);
    let is_empty = |model: &BTreeMap<PathBuf, Option<String>>, path: &Path| {
        !model
            .keys()
            .any(|other| other != path && other.starts_with(path))
    };
    match rng.random_range(0..100) {
        0..25 => match fs::create_dir(&full) {
            Ok(()) => assert!(model.insert(path, None).is_none()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::AlreadyExists);
                assert!(model.contains_key(&path), "{path:?}");
            }
        },
        25..55 => {
            let opened = OpenOptions::new().write(true).create_new(true).open(&full);
            match opened {
                Ok(mut file) => {
                    let text = if n.is_multiple_of(3) {
                        String::new()
                    } else {
                        format!("{n}")
                    };
                    file.write_all(text.as_bytes()).unwrap();
                    assert!(model.insert(path, Some(text)).is_none());
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
                    assert!(model.contains_key(&path), "{path:?}");
                }
            }
        }
        55..70 => {
            let Some(path) = anything(rng, model) else {
                return;
            };
            let full = root.join(&path);
            if model[&path].is_some() {
                soon("what the other has made", || fs::remove_file(&full));
                model.remove(&path);
            } else if is_empty(model, &path) {
                fs::remove_dir(full).unwrap();
                model.remove(&path);
            } else {
                let refused = fs::remove_dir(full).unwrap_err();
                assert_eq!(refused.raw_os_error(), Some(libc::ENOTEMPTY), "{path:?}");
            }
        }
        70..90 => {
            let Some(from) = anything(rng, model) else {
                return;
            };
            if path.starts_with(&from) || from.starts_with(&path) {
                return;
            }
            let fits = match (&model[&from], model.get(&path)) {
                (_, None) => true,
                (Some(_), Some(Some(_))) => true,
                (None, Some(None)) => is_empty(model, &path),
                _ => false,
            };
            let renamed = fs::rename(root.join(&from), &full);
            assert_eq!(renamed.is_ok(), fits, "{from:?} to {path:?}: {renamed:?}");
            if fits {
                let moved: Vec<_> = model
                    .keys()
                    .filter(|p| p.starts_with(&from))
                    .cloned()
                    .collect();
                model.remove(&path);
                for old in moved {
                    let what = model.remove(&old).unwrap();
                    let new = match old.strip_prefix(&from).unwrap() {
                        rest if rest.as_os_str().is_empty() => path.clone(),
                        rest => path.join(rest),
                    };
                    model.insert(new, what);
                }
            }
        }
        90..95 => {
            let Some(path) = anything(rng, model) else {
                return;
            };
            let mode = 0o700 | rng.random_range(0..0o100);
            fs::set_permissions(root.join(&path), Permissions::from_mode(mode)).unwrap();
            let now = fs::metadata(root.join(&path)).unwrap();
            if now.mode() & 0o7777 != mode {
                std::thread::sleep(Duration::from_millis(20));
                let second = fs::metadata(root.join(&path)).unwrap();
                std::thread::sleep(Duration::from_millis(1500));
                let third = fs::metadata(root.join(&path)).unwrap();
                panic!("{n} {root:?} {path:?} {mode:o}: {now:?} then {second:?} then {third:?}");
            }
        }
        _ => {
            let Some(path) = anything(rng, model) else {
                return;
            };
            if let Some(text) = model.get_mut(&path).unwrap() {
                let mut file = OpenOptions::new()
                    .append(true)
                    .open(root.join(&path))
                    .unwrap();
                file.write_all(b"+").unwrap();
                text.push('+');
            }
        }
    }
}

#[test]
fn whatever_two_mounts_do_by_turns_both_see_the_same() {
    let cluster = volume("turns", 1);
    let (a, b) = (ahead(&cluster, "turns"), ahead(&cluster, "turns"));
    let seed = rand::random::<u64>();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 0..12 {
        let top = format!("top{round}");
        fs::create_dir(a.join(&top)).unwrap();
        let mut model = BTreeMap::new();
        let mut n = 0;
        for turn in 0..14 {
            // Long bursts of one mount first, so that it holds much.
            let (mount, other) = match turn % 3 {
                2 => (&b, &a),
                _ => (&a, &b),
            };
            for _ in 0..rng.random_range(1..60) {
                n += 1;
                change(&mut rng, &mount.join(&top), &mut model, n);
            }
            match rng.random_range(0..3) {
                // The other one is asked for a few things, or for none.
                0 => {
                    for _ in 0..4 {
                        let Some(path) = anything(&mut rng, &model) else {
                            continue;
                        };
                        let seen = soon("what the other has made", || {
                            fs::symlink_metadata(other.join(&top).join(&path))
                        });
                        assert_eq!(
                            seen.is_dir(),
                            model[&path].is_none(),
                            "seed {seed}: {path:?}"
                        );
                        let absent = other.join(&top).join(path).join("missing");
                        assert!(fs::symlink_metadata(absent).is_err());
                    }
                }
                1 => continue,
                _ => {}
            }
            let (seen, own) = (tree(&other.join(&top)), tree(&mount.join(&top)));
            let paths: Vec<_> = seen.keys().collect();
            assert_eq!(
                paths,
                model.keys().collect::<Vec<_>>(),
                "seed {seed}, turn {turn}"
            );
            for (path, text) in &model {
                if let Some(text) = text {
                    let read = fs::read_to_string(other.join(&top).join(path)).unwrap();
                    assert_eq!(&read, text, "seed {seed}, turn {turn}: {path:?}");
                }
            }
            assert_eq!(seen, own, "seed {seed}, turn {turn}");
        }
    }
    assert!(
        commands(&cluster, "turns", "batch") > 20,
        "nothing was answered ahead"
    );
    a.unmount();
    b.unmount();
}

/// Others move and remove the directories in which somebody creates: what was created is where they were moved to.
#[test]
fn what_others_move_or_remove_loses_nothing() {
    let cluster = volume("moved", 3);
    let (a, b) = (ahead(&cluster, "moved"), ahead(&cluster, "moved"));
    for round in 0..30 {
        let (old, new) = (format!("old{round}"), format!("new{round}"));
        fs::create_dir(a.join(&old)).unwrap();
        let directory = File::open(a.join(&old)).unwrap();
        let stop = AtomicBool::new(false);
        let created = std::thread::scope(|scope| {
            let creator = scope.spawn(|| {
                let mut created = Vec::new();
                for n in 0.. {
                    let name = format!("f{n}");
                    let made = nix::fcntl::openat(
                        &directory,
                        name.as_str(),
                        nix::fcntl::OFlag::O_CREAT
                            | nix::fcntl::OFlag::O_EXCL
                            | nix::fcntl::OFlag::O_WRONLY,
                        nix::sys::stat::Mode::from_bits_truncate(0o644),
                    );
                    match made {
                        Ok(_) => created.push(name),
                        // It was removed before the first.
                        Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ESTALE) => break,
                        Err(error) => panic!("round {round}: {error}"),
                    }
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
                created
            });
            std::thread::sleep(Duration::from_micros(round * 200));
            match round % 3 {
                0 => fs::rename(b.join(&old), b.join(&new)).unwrap(),
                1 => match fs::remove_dir(b.join(&old)) {
                    Ok(()) => {}
                    Err(error) => {
                        assert_eq!(error.raw_os_error(), Some(libc::ENOTEMPTY));
                        fs::rename(b.join(&old), b.join(&new)).unwrap();
                    }
                },
                _ => {
                    fs::create_dir(b.join(&new)).unwrap();
                    fs::rename(b.join(&old), b.join(&new)).unwrap();
                }
            }
            stop.store(true, Ordering::Relaxed);
            creator.join().unwrap()
        });
        directory.sync_all().unwrap();
        if b.join(&new).exists() {
            let mut expected = created;
            expected.sort();
            assert_eq!(names(&b.join(&new)), expected, "round {round}");
        } else {
            assert!(
                created.is_empty(),
                "round {round}: what was created is gone"
            );
        }
    }
    a.unmount();
    b.unmount();
}

#[test]
fn a_killed_leader_loses_and_repeats_nothing() {
    let mut cluster = volume("leader", 3);
    let mount = ahead(&cluster, "leader");
    fs::create_dir(mount.join("d")).unwrap();
    for round in 0..3 {
        let top = mount.join("d").join(format!("{round}"));
        fs::create_dir(&top).unwrap();
        let leader = cluster.leader();
        let mut expected = Vec::new();
        for n in 0..600 {
            let path = top.join(format!("f{n}"));
            fs::write(&path, "").unwrap();
            if n % 4 == 0 {
                fs::rename(&path, top.join(format!("r{n}"))).unwrap();
                expected.push(format!("r{n}"));
            } else {
                expected.push(format!("f{n}"));
            }
            if n == 300 {
                cluster.kill_node(leader);
            }
        }
        sync_directory(&top);
        cluster.start_node(leader);
        expected.sort();
        assert_eq!(names(&top), expected);
        let other = ahead(&cluster, "leader");
        assert_eq!(names(&other.join(format!("d/{round}"))), expected);
        assert_eq!(tree(&top), tree(&other.join(format!("d/{round}"))));
    }
    mount.unmount();
    cluster.assert_replicas_equal("leader");
}

/// Names `f0`, `f1`, … and how many there are, without gaps.
fn prefix(path: &Path) -> usize {
    let found = names(path);
    for n in 0..found.len() {
        assert!(
            found.contains(&format!("f{n}")),
            "{n} of {} is missing",
            found.len()
        );
    }
    found.len()
}

#[test]
fn of_a_killed_mount_a_prefix_is_left_and_everything_that_was_synced() {
    let cluster = volume("killed", 1);
    let other = ahead(&cluster, "killed");
    for round in 0..4 {
        let mut mount = ahead(&cluster, "killed");
        let top = mount.join(format!("d{round}"));
        fs::create_dir(&top).unwrap();
        let synced = 100 + round * 37;
        for n in 0..synced {
            File::create(top.join(format!("f{n}"))).unwrap();
        }
        if round % 2 == 0 {
            sync_directory(&top);
        } else {
            File::open(top.join("f0")).unwrap().sync_all().unwrap();
        }
        let mut last = synced;
        for n in synced..synced + 200 + round * 31 {
            File::create(top.join(format!("f{n}"))).unwrap();
            last = n + 1;
        }
        mount.process.kill();
        let left = prefix(&other.join(format!("d{round}")));
        assert!(
            (synced..=last).contains(&left),
            "{left} of {last} are left, {synced} were synced"
        );
    }
    other.unmount();
}

#[test]
fn links_attributes_and_directories_that_are_in_use_go_the_usual_way() {
    let cluster = volume("usual", 1);
    let (a, b) = (ahead(&cluster, "usual"), ahead(&cluster, "usual"));
    let top = a.join("d");
    fs::create_dir(&top).unwrap();
    fs::write(top.join("one"), "1").unwrap();
    fs::hard_link(top.join("one"), top.join("two")).unwrap();
    assert_eq!(fs::metadata(top.join("one")).unwrap().nlink(), 2);
    fs::create_dir(top.join("sub")).unwrap();
    fs::write(top.join("sub/x"), "x").unwrap();
    fs::rename(top.join("sub/x"), top.join("x")).unwrap();
    fs::rename(&top, a.join("e")).unwrap();
    let top = a.join("e");
    symlink("target", top.join("link")).unwrap();
    assert_eq!(
        fs::read_link(top.join("link")).unwrap(),
        Path::new("target")
    );
    let held = File::create(top.join("held")).unwrap();
    fs::remove_file(top.join("held")).unwrap();
    (&held).write_all(b"still here").unwrap();
    held.sync_all().unwrap();
    assert_eq!(
        (
            held.metadata().unwrap().nlink(),
            held.metadata().unwrap().len()
        ),
        (0, 10)
    );
    let replaced = File::create(top.join("replaced")).unwrap();
    fs::write(top.join("new"), "new").unwrap();
    fs::rename(top.join("new"), top.join("replaced")).unwrap();
    assert_eq!(replaced.metadata().unwrap().nlink(), 0);
    assert_eq!(fs::read_to_string(top.join("replaced")).unwrap(), "new");
    drop((held, replaced));
    fs::create_dir(top.join("gone")).unwrap();
    let gone = File::open(top.join("gone")).unwrap();
    fs::remove_dir(top.join("gone")).unwrap();
    assert!(File::create(top.join("gone/x")).is_err());
    gone.sync_all().unwrap();
    drop(gone);
    assert_eq!(tree(&top), tree(&b.join("e")));
    assert_eq!(
        names(&b.join("e")),
        ["link", "one", "replaced", "sub", "two", "x"]
    );
    fs::remove_dir_all(b.join("e")).unwrap();
    assert_eq!(names(&a.path), Vec::<String>::new());
    a.unmount();
    b.unmount();
}

#[test]
fn without_the_option_or_with_a_trash_every_change_waits_for_the_cluster() {
    let cluster = volume("sync", 1);
    let mount = cluster.mount("sync");
    fs::create_dir(mount.join("d")).unwrap();
    for n in 0..20 {
        File::create(mount.join(format!("d/f{n}"))).unwrap();
    }
    assert_eq!(commands(&cluster, "sync", "batch"), 0);
    mount.unmount();
    cluster.format_file("trash", &["--trash-days", "1"]);
    let mount = ahead(&cluster, "trash");
    fs::create_dir(mount.join("d")).unwrap();
    for n in 0..20 {
        File::create(mount.join(format!("d/f{n}"))).unwrap();
        fs::remove_file(mount.join(format!("d/f{n}"))).unwrap();
    }
    assert_eq!(commands(&cluster, "trash", "batch"), 0);
    mount.unmount();
}

/// A mount that was away when others were let in by a new leader: what it had answered must not come after what they have seen.
#[test]
fn who_comes_late_to_a_new_leader_changes_nothing_behind_others_backs() {
    let mut cluster = volume("late", 3);
    let (a, b) = (ahead(&cluster, "late"), ahead(&cluster, "late"));
    let top = a.join("d");
    fs::create_dir(&top).unwrap();
    fs::write(top.join("before"), "x").unwrap();
    sync_directory(&top);
    let leader = cluster.leader();
    cluster.kill_node(leader);
    // Within its lease the mount goes on; whether it does is its own affair.
    let answered = fs::create_dir(top.join("ahead"));
    a.process.signal(Signal::SIGSTOP);
    // Another one is let in without it.
    let seen = names(&b.join("d"));
    fs::create_dir(b.join("d/others")).unwrap();
    a.process.signal(Signal::SIGCONT);
    let synced = File::open(&top).and_then(|top| top.sync_all());
    println!("answered: {answered:?}, seen by others: {seen:?}, synced: {synced:?}");
    let mut expected = seen.clone();
    expected.push("others".to_owned());
    expected.sort();
    expected.dedup();
    wait_for("the same names everywhere", Duration::from_secs(30), || {
        (names(&b.join("d")) == names(&top)).then_some(())
    });
    assert_eq!(names(&b.join("d")), expected);
    // What was answered and is not there was not confirmed.
    if answered.is_ok() && !expected.contains(&"ahead".to_owned()) {
        synced.expect_err("an fsync that confirms what is lost");
    }
}

/// `rmr` of a tree in which a mount is at work takes along what is below, and nothing else.
#[test]
fn a_tree_that_is_removed_takes_nothing_else_along() {
    let cluster = volume("removed", 1);
    let (a, other) = (ahead(&cluster, "removed"), ahead(&cluster, "removed"));
    for name in ["goes", "stays"] {
        fs::create_dir(a.join(name)).unwrap();
    }
    let over = AtomicBool::new(false);
    let made = std::thread::scope(|scope| {
        let busy = |name: &'static str| {
            let (root, over) = (a.join(name), &over);
            move || {
                let mut made = Vec::new();
                for n in 0.. {
                    let below = root.join(format!("{n}"));
                    let file = below.join("file");
                    let step = fs::create_dir(&below).and_then(|()| fs::write(&file, "x"));
                    match step {
                        Ok(()) => made.push(file),
                        Err(_) if name == "goes" => break,
                        Err(error) => panic!("{error}"),
                    }
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                }
                made
            }
        };
        let stays = scope.spawn(busy("stays"));
        let goes = scope.spawn(busy("goes"));
        wait_for("some work", Duration::from_secs(30), || {
            (names(&other.path).len() == 2).then_some(())
        });
        let url = cluster.volume_url("removed");
        cluster.run(&["rmr", &url, "/goes"]).success();
        over.store(true, Ordering::Relaxed);
        goes.join().unwrap();
        stays.join().unwrap()
    });
    sync_directory(&a.join("stays"));
    assert!(made.len() > 1);
    for file in &made {
        assert_eq!(fs::read(file).unwrap(), b"x", "{}", file.display());
    }
    wait_for("the tree to be gone", Duration::from_secs(30), || {
        (names(&other.path) == ["stays"]).then_some(())
    });
}

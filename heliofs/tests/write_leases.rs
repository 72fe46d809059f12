//! Deferred close: data that waits in a mount is seen by everybody who asks for it, and by nobody too late.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::{Cluster, LostReplies, Mount, Relay, S3, wait_for};

/// Nothing is stored by itself within a test.
const NEVER: &str = "60s";

/// Far below [`NEVER`].
const SOON: Duration = Duration::from_secs(20);

fn content(number: usize, length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + number * 31) as u8).collect()
}

fn objects(bucket: &Path) -> usize {
    fn count(dir: &Path) -> usize {
        let entries = fs::read_dir(dir).unwrap();
        let sizes = entries.map(|entry| {
            let entry = entry.unwrap();
            match entry.file_type().unwrap().is_dir() {
                true => count(&entry.path()),
                false => 1,
            }
        });
        sizes.sum()
    }
    count(bucket)
}

struct Two {
    cluster: Cluster,
    a: Mount,
    b: Mount,
    /// Objects of an empty volume.
    markers: usize,
}

impl Two {
    fn new(volume: &str, nodes: usize, flags: &[&str], node_flags: &[&str]) -> Self {
        let cluster = Cluster::with_dirs(nodes, |_, _| None, node_flags);
        cluster.format_file(volume, &["--trash-days", "0"]);
        let a = Mount::of(&cluster, volume, flags);
        let b = Mount::of(&cluster, volume, flags);
        let mut two = Self {
            cluster,
            a,
            b,
            markers: 0,
        };
        two.markers = two.segments();
        two
    }

    fn segments(&self) -> usize {
        objects(&self.cluster.directory.join("bucket")) - self.markers
    }
}

#[test]
fn what_waits_after_close_is_seen_by_open_stat_listing_and_truncation() {
    let two = Two::new("seen", 1, &["--flush-age", NEVER], &[]);
    let (a, b) = (&two.a, &two.b);
    let long = content(1, 300_000);
    for name in ["opened", "stated", "listed", "cut", "dated", "renamed"] {
        fs::write(a.join(name), &long).unwrap();
    }
    fs::write(a.join("small"), b"inline").unwrap();
    assert_eq!(two.segments(), 0, "close has waited for the bucket");
    assert_eq!(fs::metadata(a.join("stated")).unwrap().len(), 300_000);

    assert!(fs::read(b.join("opened")).unwrap() == long);
    assert_eq!(fs::read(b.join("small")).unwrap(), b"inline");
    assert_eq!(fs::metadata(b.join("stated")).unwrap().len(), 300_000);
    assert!(two.segments() < 6, "what nobody asked for was stored");

    // A time that is set later counts, whatever is stored after it.
    let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    File::open(b.join("dated"))
        .unwrap()
        .set_modified(old)
        .unwrap();
    let cut = nix::unistd::truncate(&b.join("cut"), 10);
    cut.unwrap();
    for entry in fs::read_dir(b.path.as_path()).unwrap() {
        let entry = entry.unwrap();
        let length = entry.metadata().unwrap().len();
        let expected = match entry.file_name().to_str().unwrap() {
            "small" => 6,
            "cut" => 10,
            _ => 300_000,
        };
        assert_eq!(length, expected, "{:?}", entry.file_name());
    }
    let Two { a, b, cluster, .. } = two;
    a.unmount();
    assert!(fs::read(b.join("cut")).unwrap() == long[..10]);
    assert_eq!(fs::metadata(b.join("dated")).unwrap().mtime(), 1_000_000);
    assert!(fs::read(b.join("listed")).unwrap() == long);
    drop((b, cluster));
}

#[test]
fn two_mounts_that_take_turns_see_each_others_every_close() {
    let two = Two::new("turns", 3, &["--flush-age", NEVER], &[]);
    for turn in 0..200usize {
        let (writer, reader) = match turn % 2 {
            0 => (&two.a, &two.b),
            _ => (&two.b, &two.a),
        };
        // Old files and new ones, inline and not.
        let name = format!("file-{}", turn % 7);
        let text = content(turn, [100, 30_000, 5_000][turn % 3] + turn);
        fs::write(writer.join(&name), &text).unwrap();
        if turn % 2 == 0 {
            // Pushed, and not because the kernel's second is over.
            wait_for("the new size", Duration::from_millis(500), || {
                let size = fs::metadata(reader.join(&name)).unwrap().len();
                (size == text.len() as u64).then_some(())
            });
        }
        assert!(
            fs::read(reader.join(&name)).unwrap() == text,
            "turn {turn}: an older version was read"
        );
    }
}

#[test]
fn small_files_share_objects() {
    let two = Two::new("shared", 1, &[], &[]);
    const FILES: usize = 600;
    for number in 0..FILES {
        fs::write(two.a.join(format!("f{number}")), content(number, 16_384)).unwrap();
    }
    let Two {
        a,
        b,
        cluster,
        markers,
    } = two;
    a.unmount();
    let segments = objects(&cluster.directory.join("bucket")) - markers;
    assert!(
        (1..=FILES / 100).contains(&segments),
        "{FILES} files in {segments} objects"
    );
    for number in 0..FILES {
        let read = fs::read(b.join(format!("f{number}"))).unwrap();
        assert!(read == content(number, 16_384), "file {number}");
    }
}

#[test]
fn those_who_wait_share_objects() {
    const THREADS: usize = 16;
    const EACH: usize = 20;
    let cluster = Cluster::with_dirs(1, |_, _| None, &["--session-timeout", "3s"]);
    // A bucket as far away as they are: on the same machine each would have its object before the next one comes.
    let s3 = S3::start();
    let link = Relay::start(
        s3.url.trim_start_matches("http://"),
        Duration::from_millis(20),
    );
    let (url, bucket) = (cluster.url(), format!("http://{}/waiters", link.address()));
    let format = [
        "format",
        &url,
        "waiters",
        "--storage",
        "s3",
        "--bucket",
        &bucket,
    ];
    cluster
        .run_with(&format, |command| s3.keys(command))
        .success();
    let address = format!("127.0.0.1:{}", support::free_ports(1)[0]);
    let flags = ["--close-sync", "--metrics", &address];
    let (mut a, b) = (
        Mount::of(&cluster, "waiters", &flags),
        cluster.mount("waiters"),
    );
    let puts = || support::metric(&address, "heliofs_blockstore_puts_total");
    let before = puts();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let a = &a;
            scope.spawn(move || {
                for number in 0..EACH {
                    let path = a.join(format!("{thread}-{number}"));
                    fs::write(path, content(number, 8_000)).unwrap();
                }
            });
        }
    });
    let (closes, puts) = ((THREADS * EACH) as u64, puts() - before);
    println!("{closes} closes took {puts} objects");
    assert!(
        (1..=closes / 2).contains(&puts),
        "{closes} closes took {puts} objects"
    );
    // With --close-sync a close is as good as an fsync.
    a.process.kill();
    for thread in 0..THREADS {
        for number in 0..EACH {
            let read = fs::read(b.join(format!("{thread}-{number}"))).unwrap();
            assert!(read == content(number, 8_000));
        }
    }
}

#[test]
fn what_fsync_or_a_replacing_rename_confirmed_survives_the_mount() {
    let two = Two::new(
        "survives",
        1,
        &["--flush-age", NEVER],
        &["--session-timeout", "3s"],
    );
    let Two { mut a, b, .. } = two;
    let mut synced = File::create_new(a.join("synced")).unwrap();
    synced.write_all(&content(1, 50_000)).unwrap();
    synced.sync_all().unwrap();
    fs::write(a.join("config"), b"old").unwrap();
    File::open(a.join("config")).unwrap().sync_all().unwrap();
    fs::write(a.join("config.new"), content(2, 9_000)).unwrap();
    fs::rename(a.join("config.new"), a.join("config")).unwrap();
    a.process.kill();
    assert!(fs::read(b.join("synced")).unwrap() == content(1, 50_000));
    assert!(fs::read(b.join("config")).unwrap() == content(2, 9_000));
}

#[test]
fn leases_outlive_the_leader() {
    let mut two = Two::new("failover", 3, &["--flush-age", NEVER], &[]);
    for number in 0..20 {
        fs::write(two.a.join(format!("f{number}")), content(number, 20_000)).unwrap();
    }
    let leader = two.cluster.leader();
    two.cluster.kill_node(leader);
    for number in 0..20 {
        let read = fs::read(two.b.join(format!("f{number}"))).unwrap();
        assert!(read == content(number, 20_000), "file {number}");
    }
}

#[test]
fn a_mount_that_lost_its_session_stores_what_nobody_has_changed_since() {
    let two = Two::new(
        "expired",
        1,
        &["--flush-age", "2s"],
        &["--session-timeout", "3s"],
    );
    let (a, b) = (&two.a, &two.b);
    for name in ["kept", "changed"] {
        let file = File::create_new(a.join(name)).unwrap();
        file.write_all_at(&content(1, 40_000), 0).unwrap();
        file.sync_all().unwrap();
        file.write_all_at(&content(2, 40_000), 40_000).unwrap();
    }
    a.process.signal(Signal::SIGSTOP);
    // Waits until the silent mount's session is over.
    let read = fs::read(b.join("changed")).unwrap();
    assert!(
        read == content(1, 40_000),
        "what fsync confirmed, and no more"
    );
    let other = File::options().write(true).open(b.join("changed")).unwrap();
    other.write_all_at(b"theirs", 0).unwrap();
    other.sync_all().unwrap();
    a.process.signal(Signal::SIGCONT);

    let whole = [content(1, 40_000), content(2, 40_000)].concat();
    wait_for("the data to be stored again", SOON, || {
        (fs::read(b.join("kept")).unwrap() == whole).then_some(())
    });
    let mut changed = content(1, 40_000);
    changed[..6].copy_from_slice(b"theirs");
    assert!(fs::read(b.join("changed")).unwrap() == changed);
    // The mount that was away goes on.
    fs::write(a.join("after"), b"again").unwrap();
    assert_eq!(fs::read(b.join("after")).unwrap(), b"again");
    assert!(fs::read(a.join("kept")).unwrap() == whole);
    // What others have overtaken is lost, and whoever looks there is told every time, though it was closed long ago.
    for _ in 0..3 {
        let told = File::open(a.join("changed")).expect_err("an open that hides lost data");
        assert_eq!(told.raw_os_error(), Some(libc::ESTALE));
    }
    assert!(fs::read(b.join("changed")).unwrap() == changed);
    // Until it is written anew.
    fs::write(a.join("changed"), b"anew").unwrap();
    assert_eq!(fs::read(a.join("changed")).unwrap(), b"anew");
    assert_eq!(fs::read(b.join("changed")).unwrap(), b"anew");
}

/// The ports from which a process is connected to another.
fn ports_to(pid: i32, port: u16) -> Vec<u16> {
    let mut listing = Command::new("ss");
    listing.args(["-Htnp", "state", "established", &format!("dport = :{port}")]);
    let shown = support::cluster::run(&mut listing).success().out;
    let of_it = shown
        .lines()
        .filter(|line| line.contains(&format!("pid={pid},")));
    let local = of_it.map(|line| line.split_whitespace().nth(2).unwrap());
    local
        .map(|address| address.rsplit(':').next().unwrap().parse().unwrap())
        .collect()
}

#[test]
fn a_mount_that_was_stopped_between_put_and_commit_stores_its_data_again() {
    let two = Two::new(
        "between",
        1,
        &["--flush-age", NEVER],
        &["--session-timeout", "3s"],
    );
    let (a, b) = (&two.a, &two.b);
    let path = a.join("file");
    let file = File::create_new(&path).unwrap();
    file.write_all_at(&content(1, 40_000), 0).unwrap();
    file.sync_all().unwrap();
    let before = two.segments();

    // The bucket takes what the mount sends, and the cluster hears nothing of it.
    let node: u16 = two.cluster.nodes[0]
        .address()
        .rsplit(':')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let ports = ports_to(a.process.pid().as_raw(), node);
    assert!(!ports.is_empty(), "no connection to the node");
    let cut: Vec<LostReplies> = ports.into_iter().map(LostReplies::from_port).collect();
    file.write_all_at(&content(2, 40_000), 40_000).unwrap();
    let synced = std::thread::spawn(move || file.sync_all());
    wait_for("the object", SOON, || {
        (two.segments() > before).then_some(())
    });
    a.process.signal(Signal::SIGSTOP);
    wait_for("the end of the session", SOON, || {
        let status = two.cluster.status();
        (status["mounts"].as_array().unwrap().len() == 1).then_some(())
    });
    // What was stored and never committed is nobody's any more.
    let volume = two.cluster.volume_url("between");
    wait_for("gc", SOON, || {
        two.cluster.run(&["gc", &volume, "--delete"]).success();
        (two.segments() == before).then_some(())
    });
    assert!(!synced.is_finished());
    assert!(cut.iter().map(LostReplies::dropped).sum::<u64>() > 0);
    assert!(fs::read(b.join("file")).unwrap() == content(1, 40_000));
    drop(cut);
    a.process.signal(Signal::SIGCONT);
    synced.join().unwrap().expect("fsync in the new session");

    let whole = [content(1, 40_000), content(2, 40_000)].concat();
    assert!(fs::read(b.join("file")).unwrap() == whole);
    assert!(fs::read(&path).unwrap() == whole);
    two.cluster
        .run(&["fsck", &volume, "--level", "data"])
        .success();
    let Two {
        cluster, mut a, b, ..
    } = two;
    a.process.kill();
    b.unmount();
    assert!(fs::read(cluster.mount("between").join("file")).unwrap() == whole);
}

#[test]
fn without_a_bucket_others_are_not_held_up_and_the_writer_learns_it() {
    let two = Two::new(
        "down",
        1,
        &["--flush-age", NEVER, "--io-timeout", "2s"],
        &[],
    );
    let (a, b) = (&two.a, &two.b);
    fs::write(a.join("file"), content(1, 100_000)).unwrap();
    let bucket = two.cluster.directory.join("bucket");
    let away = two.cluster.directory.join("bucket-away");
    fs::rename(&bucket, &away).unwrap();
    fs::write(&bucket, b"not a directory").unwrap();

    // Below the time that operations wait for an answer, after which they fail.
    let began = Instant::now();
    assert_eq!(fs::metadata(b.join("file")).unwrap().len(), 0);
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    let refused = File::open(a.join("file")).expect_err("an open that hides lost data");
    assert_eq!(refused.raw_os_error(), Some(libc::EIO));

    fs::remove_file(&bucket).unwrap();
    fs::rename(&away, &bucket).unwrap();
    File::open(a.join("file")).unwrap();
    assert!(fs::read(b.join("file")).unwrap() == content(1, 100_000));
}

//! A leader dies under load: no error reaches a program, no byte differs, nothing takes effect twice.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::{Cluster, Load, LostReplies, S3, wait_for};

#[test]
fn leaders_killed_under_load_cost_no_error_and_no_byte() {
    let s3 = S3::start();
    let mut cluster = Cluster::start();
    cluster.format_s3("load", &s3, &[]);
    let mount = cluster.mount("load");
    let load = Load::start(&mount.path, 4);
    load.wait_for_more(50, Duration::from_secs(60));
    for _ in 0..2 {
        let leader = cluster.leader();
        cluster.kill_node(leader);
        load.wait_for_more(50, Duration::from_secs(30));
        cluster.start_node(leader);
        load.wait_for_more(20, Duration::from_secs(30));
    }
    let acknowledged = load.stop();
    acknowledged.assert_no_errors();
    assert!(
        acknowledged.longest < Duration::from_secs(10),
        "a file took {:?}",
        acknowledged.longest
    );
    acknowledged.verify(&mount.path);
    mount.unmount();
    // Nothing cached.
    let mount = cluster.mount("load");
    acknowledged.verify(&mount.path);
    mount.unmount();
    cluster.assert_replicas_equal("load");
}

#[test]
fn a_leader_whose_process_died_is_replaced_long_before_the_timers_would() {
    // Timers that alone would take at least 35 s.
    let flags = ["--election-min", "15s", "--election-max", "20s"];
    let mut cluster = Cluster::with_dirs(3, |_, _| None, &flags);
    cluster.format_file("departed", &[]);
    let mount = cluster.mount("departed");
    for round in 0..3 {
        fs::write(mount.join("before"), "x").unwrap();
        let leader = cluster.leader();
        let killed = Instant::now();
        cluster.kill_node(leader);
        fs::write(mount.join(format!("after-{round}")), "x").unwrap();
        let waited = killed.elapsed();
        assert!(waited < Duration::from_secs(10), "a write took {waited:?}");
        cluster.start_node(leader);
        // In the next round its log must be as good as the other's: only both together are a majority.
        wait_for("the node's return", Duration::from_secs(60), || {
            let status = cluster.status();
            let nodes = status["nodes"].as_array()?.clone();
            let index = |node: &serde_json::Value, name: &str| node[name].as_u64();
            let committed = nodes
                .iter()
                .filter_map(|node| index(node, "committed_index"))
                .max();
            let caught_up = nodes
                .iter()
                .all(|node| index(node, "last_log_index") >= committed);
            (caught_up && status["leader"].is_u64()).then_some(())
        });
    }
    mount.unmount();
}

#[test]
fn an_open_unlinked_file_survives_a_leader_kill_and_is_reaped_after_its_close() {
    let mut cluster = Cluster::with_dirs(3, |_, _| None, &["--session-timeout", "4s"]);
    cluster.format_file("orphans", &[]);
    let mount = cluster.mount("orphans");
    let inodes = |cluster: &Cluster| cluster.volume("orphans")["used_inodes"].as_u64().unwrap();
    let before = inodes(&cluster);
    let path = mount.join("file");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let text = vec![7u8; 100_000];
    file.write_all(&text).unwrap();
    file.sync_all().unwrap();
    fs::remove_file(&path).unwrap();

    let leader = cluster.leader();
    cluster.kill_node(leader);
    cluster.leader();
    // Longer than the session's time-out: the new leader must know of the open.
    let until = Instant::now() + Duration::from_secs(6);
    while Instant::now() < until {
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        std::thread::sleep(Duration::from_millis(200));
    }
    file.write_all(b"more").unwrap();
    file.sync_all().unwrap();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    let mut found = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut found).unwrap();
    assert_eq!(found.len(), text.len() + 4);
    assert!(found.starts_with(&text) && found.ends_with(b"more"));
    assert_eq!(
        inodes(&cluster),
        before + 1,
        "the inode is counted while it is open"
    );
    drop(file);
    wait_for("the reaping", Duration::from_secs(20), || {
        (inodes(&cluster) == before).then_some(())
    });

    // One whose mount dies is reaped with its session.
    let mut mount = mount;
    let file = File::create_new(mount.join("second")).unwrap();
    fs::remove_file(mount.join("second")).unwrap();
    wait_for("the orphan", Duration::from_secs(5), || {
        (inodes(&cluster) == before + 1).then_some(())
    });
    mount.process.kill();
    drop(file);
    wait_for("the reaping", Duration::from_secs(30), || {
        (inodes(&cluster) == before).then_some(())
    });
}

/// Whatever one's own earlier attempt did must not come back as EEXIST or ENOENT.
fn exactly_once_loop(directory: &Path, stop: &AtomicBool, done: &AtomicU64) -> Result<(), String> {
    fs::create_dir_all(directory).map_err(|error| format!("the directory: {error}"))?;
    let at = |name: &str| directory.join(name);
    for turn in 0.. {
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let say = |what: &'static str| {
            move |error: std::io::Error| format!("turn {turn}: {what}: {error}")
        };
        drop(File::create_new(at("a")).map_err(say("create a"))?);
        fs::hard_link(at("a"), at("b")).map_err(say("link a b"))?;
        let links = fs::metadata(at("a")).map_err(say("stat a"))?.nlink();
        if links != 2 {
            return Err(format!("turn {turn}: {links} links after one link"));
        }
        fs::rename(at("b"), at("c")).map_err(say("rename b c"))?;
        fs::create_dir(at("d")).map_err(say("mkdir d"))?;
        fs::rename(at("a"), at("d/a")).map_err(say("rename a d/a"))?;
        fs::remove_file(at("c")).map_err(say("unlink c"))?;
        fs::remove_file(at("d/a")).map_err(say("unlink d/a"))?;
        fs::remove_dir(at("d")).map_err(say("rmdir d"))?;
        let mut log = OpenOptions::new()
            .append(true)
            .create(true)
            .open(at("log"))
            .map_err(say("open log"))?;
        log.write_all(&[b'x'; 8])
            .and_then(|()| log.sync_all())
            .map_err(say("append"))?;
        let length = log.metadata().map_err(say("stat log"))?.len();
        if length != 8 * (turn + 1) {
            return Err(format!("turn {turn}: the log has {length} bytes"));
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

#[test]
fn a_retried_mutation_takes_effect_once_across_leader_changes() {
    let mut cluster = Cluster::start();
    cluster.format_file("once", &[]);
    let mount = cluster.mount("once");
    let stop = AtomicBool::new(false);
    let done = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|thread| {
                let directory = mount.join(format!("thread-{thread}"));
                let (stop, done) = (&stop, &done);
                scope.spawn(move || {
                    let result = exactly_once_loop(&directory, stop, done);
                    // One failure is enough; the faults need not go on.
                    stop.fetch_or(result.is_err(), Ordering::Relaxed);
                    result
                })
            })
            .collect();
        let progress = |turns: u64| {
            let goal = done.load(Ordering::Relaxed) + turns;
            wait_for("progress", Duration::from_secs(40), || {
                (done.load(Ordering::Relaxed) >= goal || stop.load(Ordering::Relaxed)).then_some(())
            });
        };
        progress(20);
        for round in 0..4 {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let leader = cluster.leader();
            // Commands arrive and are committed, replies are lost: the client can't know.
            let lost = LostReplies::from_port(cluster.nodes[leader].port);
            wait_for("replies being lost", Duration::from_secs(10), || {
                (lost.dropped() > 0).then_some(())
            });
            std::thread::sleep(Duration::from_millis(300));
            if round % 2 == 0 {
                cluster.kill_node(leader);
            } else {
                // Long enough for the client and the peers to give up on it.
                std::thread::sleep(Duration::from_secs(6));
            }
            drop(lost);
            progress(20);
            if round % 2 == 0 {
                cluster.start_node(leader);
            }
        }
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            if let Err(error) = worker.join().unwrap() {
                panic!("{error}");
            }
        }
    });
    mount.unmount();
    cluster.assert_replicas_equal("once");
}

#[test]
fn the_leader_hands_over_when_it_is_told_to_and_when_it_stops() {
    let mut cluster = Cluster::start();
    cluster.format_file("handover", &[]);
    let mount = cluster.mount("handover");
    let load = Load::start(&mount.path, 2);
    load.wait_for_more(20, Duration::from_secs(30));
    let follower = cluster.follower();
    let id = cluster.nodes[follower].id.to_string();
    cluster
        .run(&["raft", "transfer", &cluster.url(), &id])
        .success();
    assert_eq!(cluster.leader(), follower);
    load.wait_for_more(20, Duration::from_secs(30));
    cluster.stop_node(follower);
    assert_ne!(cluster.leader(), follower);
    load.wait_for_more(20, Duration::from_secs(30));
    let acknowledged = load.stop();
    acknowledged.assert_no_errors();
    acknowledged.verify(&mount.path);
    cluster.start_node(follower);
    mount.unmount();
    cluster.assert_replicas_equal("handover");
}

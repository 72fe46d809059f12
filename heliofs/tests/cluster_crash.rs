//! Nodes crash: killed, without power, with damaged disks. Nothing acknowledged is lost, and damage is never served.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use support::{Cluster, Disk, Load, wait_for};

/// While no node runs, the mount waits; what it can't finish within its deadline it reports, so errors are allowed here, lies are
/// not.
#[test]
fn all_nodes_killed_at_once_lose_nothing_acknowledged() {
    let mut cluster = Cluster::start();
    cluster.format_file("crash", &[]);
    let mount = cluster.mount("crash");
    let load = Load::start(&mount.path, 4);
    load.wait_for_more(100, Duration::from_secs(60));
    for index in 0..3 {
        cluster.nodes[index]
            .process
            .as_ref()
            .unwrap()
            .signal(nix::sys::signal::Signal::SIGKILL);
    }
    for index in 0..3 {
        cluster.kill_node(index);
    }
    for index in 0..3 {
        cluster.spawn_node(index);
    }
    cluster.leader();
    load.wait_for_more(50, Duration::from_secs(60));
    let acknowledged = load.stop();
    acknowledged.assert_no_errors();
    mount.unmount();
    let mount = cluster.mount("crash");
    acknowledged.verify(&mount.path);
    mount.unmount();
    cluster.assert_replicas_equal("crash");
}

/// Power of nodes goes, as offsets from the leader, and comes back. `stand_still`: the machines go with it.
fn power_loss_of(victims: &[usize], stand_still: bool) {
    let disks: Vec<_> = (0..3).map(|_| Disk::new(384)).collect();
    let place = |id: u64, _: &Path| Some(disks[id as usize - 1].path().join("node"));
    let mut cluster = Cluster::with_dirs(3, place, &[]);
    cluster.format_file("power", &[]);
    let mount = cluster.mount("power");
    let leader = cluster.leader();
    let victims: Vec<_> = victims.iter().map(|offset| (leader + offset) % 3).collect();
    let load = Load::start(&mount.path, 4);
    load.wait_for_more(150, Duration::from_secs(60));
    // A machine without power does not go on running. A process that does may be told by its dying disk that something is synced
    // which is not, see `Disk::lose_power`: on a majority, that loses an acknowledged write.
    for victim in victims.iter().filter(|_| stand_still) {
        cluster.nodes[*victim].process.as_ref().unwrap().freeze();
    }
    for victim in &victims {
        disks[*victim].lose_power();
    }
    for victim in &victims {
        cluster.kill_node(*victim);
    }
    for victim in &victims {
        disks[*victim].restore_power();
        cluster.spawn_node(*victim);
    }
    cluster.leader();
    load.wait_for_more(50, Duration::from_secs(60));
    let acknowledged = load.stop();
    acknowledged.assert_no_errors();
    mount.unmount();
    let mount = cluster.mount("power");
    acknowledged.verify(&mount.path);
    mount.unmount();
    // One whose disk lied is behind what it has acknowledged: Raft can't go on with it, and the leader says so.
    let lied = (0..3).any(|index| {
        let log = cluster.nodes[index].process.as_ref().unwrap().log();
        log.contains("the node lost entries of the log that it had acknowledged")
    });
    if stand_still || !lied {
        assert!(
            !lied,
            "a node that stood still lost what it had acknowledged"
        );
        cluster.assert_replicas_equal("power");
    }
    drop(cluster);
}

#[test]
fn power_loss_of_the_leader_loses_nothing_acknowledged() {
    power_loss_of(&[0], true);
}

#[test]
fn power_loss_of_two_nodes_loses_nothing_acknowledged() {
    power_loss_of(&[0, 1], true);
}

#[test]
fn power_loss_of_all_nodes_loses_nothing_acknowledged() {
    power_loss_of(&[0, 1, 2], true);
}

/// The node goes on for a moment, and what its disk tells it may be wrong: the others have it.
#[test]
fn a_disk_that_dies_under_a_running_follower_loses_nothing_acknowledged() {
    power_loss_of(&[1], false);
}

/// What the tests above rest on: of a process that stands still when the power goes, the disk has everything that was synced.
#[test]
fn a_disk_without_power_has_what_a_frozen_process_had_synced() {
    let writer = "import os, sys\n\
        fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n\
        told = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)\n\
        n = 0\n\
        while True:\n\
        \x20   os.write(fd, n.to_bytes(8, 'big') * 100); os.fdatasync(fd); n += 1\n\
        \x20   os.pwrite(told, n.to_bytes(8, 'big'), 0)\n";
    let disk = Disk::new(64);
    let elsewhere = support::scratch();
    let script = elsewhere.path().join("writer.py");
    fs::write(&script, writer).unwrap();
    let told = elsewhere.path().join("told");
    for round in 0..10u32 {
        let path = disk.path().join(format!("log-{round}"));
        let log = elsewhere.path().join("writer.log");
        let mut process =
            support::Process::start("writer", &log, Path::new("python3"), |command| {
                command.args([&script, &path, &told]);
            });
        let count = || {
            let bytes = fs::read(&told).ok()?;
            Some(u64::from_be_bytes(bytes.try_into().ok()?))
        };
        wait_for("synced appends", Duration::from_secs(30), || {
            count().filter(|count| *count > u64::from(round))
        });
        process.freeze();
        disk.lose_power();
        process.kill();
        let synced = count().unwrap();
        fs::remove_file(&told).unwrap();
        disk.restore_power();
        let found = fs::read(&path).unwrap();
        assert!(
            found.len() as u64 >= synced * 800,
            "{synced} synced, {} bytes found",
            found.len()
        );
        for (n, entry) in (0..synced).zip(found.chunks_exact(800)) {
            assert!(
                entry.chunks(8).all(|word| word == n.to_be_bytes()),
                "entry {n} of {synced}"
            );
        }
    }
}

/// RocksDB's write-ahead logs of a node's log, oldest first.
fn write_ahead_logs(data_dir: &Path) -> Vec<PathBuf> {
    let mut logs: Vec<_> = fs::read_dir(data_dir.join("log"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .filter(|path| fs::metadata(path).unwrap().len() > 0)
        .collect();
    logs.sort();
    assert!(!logs.is_empty(), "{} holds no log", data_dir.display());
    logs
}

/// What a crash leaves of a record that was being written: its beginning. Nobody was told that it is durable.
#[test]
fn a_torn_last_record_is_cut_off_and_the_node_catches_up() {
    let mut cluster = Cluster::start();
    cluster.format_file("torn", &[]);
    let mount = cluster.mount("torn");
    let load = Load::start(&mount.path, 2);
    load.wait_for_more(100, Duration::from_secs(60));
    let victim = cluster.follower();
    cluster.kill_node(victim);
    let newest = write_ahead_logs(&cluster.nodes[victim].data_dir)
        .pop()
        .unwrap();
    // A header that promises 4,000 bytes, and fewer.
    let mut torn = vec![0x17, 0x2a, 0x9c, 0x44, 0xa0, 0x0f, 1];
    torn.extend([0x5a; 300]);
    OpenOptions::new()
        .append(true)
        .open(&newest)
        .unwrap()
        .write_all(&torn)
        .unwrap();
    load.wait_for_more(20, Duration::from_secs(30));
    cluster.start_node(victim);
    let acknowledged = load.stop();
    acknowledged.assert_no_errors();
    acknowledged.verify(&mount.path);
    mount.unmount();
    cluster.assert_replicas_equal("torn");
}

/// A disk that lied: what was acknowledged as synced is gone from the end of one log. It can't be told from a torn write, so the
/// node starts; that costs no acknowledged write as long as it is the only one.
#[test]
fn a_cut_end_of_one_log_costs_no_acknowledged_write() {
    let mut cluster = Cluster::start();
    cluster.format_file("cut", &[]);
    let mount = cluster.mount("cut");
    let load = Load::start(&mount.path, 2);
    load.wait_for_more(100, Duration::from_secs(60));
    let victim = cluster.follower();
    cluster.kill_node(victim);
    let newest = write_ahead_logs(&cluster.nodes[victim].data_dir)
        .pop()
        .unwrap();
    let length = fs::metadata(&newest).unwrap().len();
    OpenOptions::new()
        .write(true)
        .open(&newest)
        .unwrap()
        .set_len(length - 5)
        .unwrap();
    cluster.start_node(victim);
    load.wait_for_more(20, Duration::from_secs(30));
    // Whoever leads next: the node that forgot only if it was told again meanwhile.
    let leader = cluster.leader();
    assert_ne!(leader, victim);
    cluster.kill_node(leader);
    load.wait_for_more(20, Duration::from_secs(30));
    cluster.start_node(leader);
    let acknowledged = load.stop();
    acknowledged.assert_no_errors();
    acknowledged.verify(&mount.path);
    mount.unmount();
    cluster.assert_replicas_equal("cut");
}

#[test]
fn a_flipped_bit_in_the_middle_of_a_log_is_refused() {
    let mut cluster = Cluster::start();
    cluster.format_file("flipped", &[]);
    let mount = cluster.mount("flipped");
    let load = Load::start(&mount.path, 2);
    load.wait_for_more(100, Duration::from_secs(60));
    let victim = cluster.follower();
    cluster.kill_node(victim);
    let log = write_ahead_logs(&cluster.nodes[victim].data_dir)
        .pop()
        .unwrap();
    let length = fs::metadata(&log).unwrap().len();
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&log)
        .unwrap();
    let mut byte = [0];
    file.seek(SeekFrom::Start(length / 2)).unwrap();
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::Start(length / 2)).unwrap();
    file.write_all(&[byte[0] ^ 0x10]).unwrap();
    file.sync_all().unwrap();

    cluster.spawn_node(victim);
    let id = cluster.nodes[victim].id.to_string();
    let process = cluster.nodes[victim].process.as_mut().unwrap();
    let status = process.wait(Duration::from_secs(60));
    assert_eq!(status.code(), Some(1), "{}", process.log_tail());
    let log = process.log();
    assert!(log.contains("error: "), "no clear error: {log}");
    assert!(log.contains("new id"), "it does not say what to do: {log}");
    cluster.nodes[victim].process = None;

    // The others serve; the damaged node is replaced under a new id.
    load.wait_for_more(20, Duration::from_secs(30));
    let acknowledged = load.stop();
    acknowledged.assert_no_errors();
    cluster
        .run(&["raft", "remove", &cluster.url(), &id])
        .success();
    fs::remove_dir_all(&cluster.nodes[victim].data_dir).unwrap();
    cluster.nodes[victim].id = 9;
    cluster.start_node(victim);
    let address = format!("127.0.0.1:{}", cluster.nodes[victim].port);
    let leader = cluster.leader();
    let leader = format!("helio://127.0.0.1:{}", cluster.nodes[leader].port);
    cluster
        .run(&["raft", "add", &leader, "9", &address])
        .success();
    cluster.assert_replicas_equal("flipped");
    acknowledged.verify(&mount.path);
    mount.unmount();
}

#[test]
fn an_id_with_an_empty_disk_is_refused() {
    let mut cluster = Cluster::start();
    let victim = cluster.follower();
    cluster.kill_node(victim);
    fs::remove_dir_all(&cluster.nodes[victim].data_dir).unwrap();
    cluster.start_node(victim);
    let (id, port) = (
        cluster.nodes[victim].id.to_string(),
        cluster.nodes[victim].port,
    );
    let leader = cluster.leader();
    assert_ne!(leader, victim);
    let leader = format!("helio://127.0.0.1:{}", cluster.nodes[leader].port);
    // It must not vote or follow as the node that it pretends to be…
    let own = format!("helio://127.0.0.1:{port}");
    for _ in 0..20 {
        let status = cluster
            .run(&["raft", "status", &own, "--json"])
            .success()
            .json();
        let nodes = status["nodes"].as_array().unwrap();
        let this = nodes
            .iter()
            .find(|node| {
                node["address"]
                    .as_str()
                    .unwrap()
                    .ends_with(&port.to_string())
            })
            .unwrap();
        assert_eq!(this["role"], "unformed", "{this}");
        std::thread::sleep(Duration::from_millis(100));
    }
    // … nor be added under the same id.
    let address = format!("127.0.0.1:{port}");
    cluster
        .run(&["raft", "add", &leader, &id, &address])
        .failure(1, "new id");
}

#[test]
fn a_full_disk_on_one_node_does_not_stop_the_cluster() {
    let disk = Disk::new(256);
    let place = |id: u64, _: &Path| (id == 1).then(|| disk.path().join("node"));
    let mut cluster = Cluster::with_dirs(3, place, &[]);
    cluster.format_file("full", &[]);
    // The worst case: the full node leads.
    if cluster.leader() != 0 {
        cluster
            .run(&["raft", "transfer", &cluster.url(), "1"])
            .success();
    }
    let mount = cluster.mount("full");
    let load = Load::start(&mount.path, 4);
    load.wait_for_more(50, Duration::from_secs(60));
    let filler = disk.fill();
    let probe =
        File::create(disk.path().join("probe")).and_then(|mut file| file.write_all(&[1; 1 << 20]));
    assert!(probe.is_err(), "the disk is not full");
    // RocksDB's write-ahead log was given its place in advance; large values use it up.
    let script = "import os, sys; [os.setxattr(sys.argv[1], 'user.large', os.urandom(60000)) for _ in range(20)]";
    File::create_new(mount.join("large")).unwrap();
    wait_for(
        "the full disk being noticed",
        Duration::from_secs(120),
        || {
            let large = mount.join("large");
            support::cluster::run(std::process::Command::new("python3").args([
                "-c",
                script,
                large.to_str().unwrap(),
            ]))
            .success();
            (cluster.leader() != 0).then_some(())
        },
    );
    load.wait_for_more(100, Duration::from_secs(60));
    let acknowledged = load.stop();
    acknowledged.assert_no_errors();
    acknowledged.verify(&mount.path);

    fs::remove_file(filler).unwrap();
    let _ = fs::remove_file(disk.path().join("probe"));
    cluster.kill_node(0);
    cluster.start_node(0);
    mount.unmount();
    cluster.assert_replicas_equal("full");
    drop(cluster);
}

/// A disk that neither writes nor says so: of the leader, of a follower.
fn a_disk_hangs(of_leader: bool) {
    let disk = Disk::new(384);
    let place = |id: u64, _: &Path| (id == 1).then(|| disk.path().join("node"));
    let cluster = Cluster::with_dirs(3, place, &[]);
    cluster.format_file("hangs", &[]);
    let to = if of_leader { 1 } else { 2 };
    if cluster.leader() != to - 1 {
        cluster
            .run(&["raft", "transfer", &cluster.url(), &to.to_string()])
            .success();
    }
    let mount = cluster.mount("hangs");
    let load = Load::start(&mount.path, 4);
    load.wait_for_more(100, Duration::from_secs(60));
    disk.hang();
    // Longer than whatever the node may have had in memory lasts.
    for _ in 0..10 {
        load.wait_for_more(200, Duration::from_secs(30));
    }
    disk.thaw();
    load.wait_for_more(200, Duration::from_secs(60));
    let acknowledged = load.stop();
    acknowledged.assert_no_errors();
    acknowledged.verify(&mount.path);
    mount.unmount();
    cluster.assert_replicas_equal("hangs");
    println!("the longest operation took {:?}", acknowledged.longest);
    drop(cluster);
}

#[test]
fn a_disk_of_the_leader_that_hangs_does_not_stop_the_cluster() {
    a_disk_hangs(true);
}

#[test]
fn a_disk_of_a_follower_that_hangs_does_not_stop_the_cluster() {
    a_disk_hangs(false);
}

#[test]
fn a_dead_mount_is_cleared_away_and_its_synced_data_is_there() {
    let cluster = Cluster::start();
    cluster.format_file("dead", &[]);
    let mut mount = cluster.mount("dead");
    let load = Load::start(&mount.path, 2);
    load.wait_for_more(30, Duration::from_secs(30));
    mount.process.kill();
    let acknowledged = load.stop();
    assert!(!acknowledged.errors.is_empty(), "a dead mount serves");
    // At the same place, without an umount in between.
    let again = cluster.run(&[
        "mount",
        &cluster.url(),
        "dead",
        mount.path.to_str().unwrap(),
        "-d",
        "--cache-size",
        "0",
        "--log-file",
        cluster.directory.join("again.log").to_str().unwrap(),
    ]);
    again.success();
    acknowledged.verify(&mount.path);
    cluster
        .run(&["umount", mount.path.to_str().unwrap()])
        .success();
    wait_for("the end of the mount", Duration::from_secs(10), || {
        (!support::mount::is_mounted(&mount.path)).then_some(())
    });
}

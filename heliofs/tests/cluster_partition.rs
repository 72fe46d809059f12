//! Links between nodes are cut: what openraft got wrong before (by its issue numbers) and what we build on it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use support::{Cluster, Lan, Load, wait_for};

/// Quick elections, with room for two busy cores.
const TIMINGS: [&str; 6] = [
    "--heartbeat",
    "100ms",
    "--election-min",
    "500ms",
    "--election-max",
    "1s",
];

/// A majority that is connected elects and writes within this time, on a machine that does other things, too.
const PROGRESS: Duration = Duration::from_secs(20);

/// What node `index` says of itself.
fn seen_by(cluster: &Cluster, index: usize) -> Value {
    let ran = cluster.run(&["raft", "status", &cluster.nodes[index].url(), "--json"]);
    let status = ran.success().json();
    let id = cluster.nodes[index].id;
    let nodes = status["nodes"].as_array().unwrap();
    nodes
        .iter()
        .find(|node| node["node"] == id)
        .unwrap_or_else(|| panic!("node {id} is not in {status}"))
        .clone()
}

/// A metadata change through these nodes only; whether it was acknowledged.
fn changes(cluster: &Cluster, nodes: &[usize], volume: &str, trash_days: u32) -> bool {
    let url = format!("{}/{volume}", cluster.url_of(nodes));
    cluster
        .run(&["config", &url, "--trash-days", &trash_days.to_string()])
        .code
        == 0
}

/// openraft #2080: five voters; the old leader reaches one node only, which two others reach. Those three are a majority, but the
/// heartbeats of the old leader kept the one between them from voting.
#[test]
fn a_majority_elects_another_leader_although_one_of_it_still_hears_the_old_one() {
    let lan = Lan::new(5);
    let cluster = Cluster::in_lan(&lan, &TIMINGS);
    cluster.format_file("bridge", &[]);
    let old = cluster.leader();
    let others: Vec<usize> = (0..5).filter(|node| *node != old).collect();
    let [a, b, bridge, isolated] = others[..] else {
        panic!("five nodes");
    };
    for other in [a, b] {
        lan.cut(old, other);
    }
    lan.isolate(isolated);
    let began = Instant::now();
    let majority = [a, b, bridge];
    wait_for("a write through the majority", PROGRESS, || {
        changes(&cluster, &majority, "bridge", 3).then_some(())
    });
    println!("{:?} until a write", began.elapsed());
    let leader = wait_for("the majority's leader", PROGRESS, || {
        majority
            .into_iter()
            .find(|node| seen_by(&cluster, *node)["role"] == "leader")
    });
    assert_ne!(leader, old);
    assert!(lan.dropped() > 0, "the cut links carried nothing");

    lan.heal();
    cluster.assert_replicas_equal("bridge");
    assert!(
        changes(&cluster, &[old], "bridge", 4),
        "the old leader follows"
    );
}

/// openraft #1898 and #1747: a leader that lost its quorum must not take writes nor answer reads from what it has. #1761: a write
/// that waits in its log while a snapshot replaces that part of the log ended the node.
#[test]
fn a_leader_that_is_cut_off_promises_nothing_and_comes_back_by_snapshot() {
    let lan = Lan::new(3);
    let settings = support::scratch();
    let file = settings.path().join("meta.toml");
    fs::write(&file, "[log]\nentries_min = 10\nentries_max = 50\n").unwrap();
    let flags = [&TIMINGS[..], &["--config", file.to_str().unwrap()]].concat();
    let mut cluster = Cluster::in_lan(&lan, &flags);
    cluster.format_file("cut", &[]);
    let mount = cluster.mount("cut");
    fs::write(mount.join("before"), "text").unwrap();
    let old = cluster.leader();
    let rest: Vec<usize> = (0..3).filter(|node| *node != old).collect();

    // The mount's session is with the old leader, which it still reaches: what it sends now waits there in vain.
    lan.isolate(old);
    let began = Instant::now();
    fs::write(mount.join("during"), "text").expect("operations wait through a failover");
    println!("{:?} until a write", began.elapsed());
    assert!(began.elapsed() < PROGRESS, "took {:?}", began.elapsed());
    let stranded = seen_by(&cluster, old)["last_log_index"].as_u64().unwrap();

    // The others go on until their logs no longer reach back to where it left.
    let mut number = 0;
    wait_for(
        "a log trimmed beyond the old leader's",
        Duration::from_secs(60),
        || {
            for _ in 0..50 {
                fs::create_dir(mount.join(format!("dir-{number}"))).unwrap();
                number += 1;
            }
            rest.iter()
                .all(|node| seen_by(&cluster, *node)["purged_index"].as_u64() > Some(stranded))
                .then_some(())
        },
    );
    let alone = format!("{}/cut", cluster.nodes[old].url());
    // At the same time: both try for as long as a command does.
    let (read, changed) = std::thread::scope(|scope| {
        let read = scope.spawn(|| cluster.run(&["info", &alone, "/during"]));
        let changed = changes(&cluster, &[old], "cut", 5);
        (read.join().unwrap(), changed)
    });
    assert_ne!(
        read.code, 0,
        "a leader without a quorum answered: {}",
        read.out
    );
    assert!(
        !read.err.contains("no such file"),
        "it answered: {}",
        read.err
    );
    assert!(!changed, "a leader without a quorum took a write");
    assert!(lan.dropped() > 0, "the cut links carried nothing");

    lan.heal();
    wait_for("the old leader's return", PROGRESS, || {
        let purged = seen_by(&cluster, old)["purged_index"].as_u64();
        (purged > Some(stranded)).then_some(())
    });
    cluster.assert_replicas_equal("cut");
    let process = cluster.nodes[old].process.as_mut().unwrap();
    assert!(process.ended().is_none(), "{}", process.log_tail());
    assert!(process.log().contains("installed a snapshot"));
    assert!(seen_by(&cluster, old)["fatal"].is_null());
    // It takes part again: with it alone beside one other there is a majority.
    let gone = rest[0];
    cluster.kill_node(gone);
    fs::write(mount.join("after"), "text").unwrap();
    assert_eq!(fs::read_to_string(mount.join("during")).unwrap(), "text");
    mount.unmount();
}

/// openraft #1802: with five voters whose logs are at different places the commit index could pass what a majority had.
#[test]
fn five_voters_with_uneven_logs_commit_only_what_a_majority_has() {
    let lan = Lan::new(5);
    let mut cluster = Cluster::in_lan(&lan, &TIMINGS);
    cluster.format_file("uneven", &[]);
    let mount = cluster.mount("uneven");
    let load = Load::start(&mount.path, 2);
    for _ in 0..3 {
        let leader = cluster.leader();
        let others: Vec<usize> = (0..5).filter(|node| *node != leader).collect();
        let freeze = |cluster: &Cluster, node: usize, signal: Signal| {
            cluster.nodes[node].process.as_ref().unwrap().signal(signal);
        };
        // Each is behind by another length; two at a time, so that writes go on.
        freeze(&cluster, others[0], Signal::SIGSTOP);
        load.wait_for_more(5, PROGRESS);
        lan.cut(leader, others[1]);
        load.wait_for_more(5, PROGRESS);
        freeze(&cluster, others[0], Signal::SIGCONT);
        lan.heal();
        freeze(&cluster, others[2], Signal::SIGSTOP);
        load.wait_for_more(5, PROGRESS);
        freeze(&cluster, others[2], Signal::SIGCONT);
        // Whoever leads next must have everything.
        let leader = cluster.leader();
        cluster.kill_node(leader);
        load.wait_for_more(5, PROGRESS);
        cluster.start_node(leader);
    }
    let acknowledged = load.stop();
    acknowledged.assert_no_errors();
    acknowledged.verify(&mount.path);
    cluster.assert_replicas_equal("uneven");

    // Two of five are no majority, however far the others are.
    let leader = cluster.leader();
    let frozen: Vec<usize> = (0..5).filter(|node| *node != leader).take(3).collect();
    for node in &frozen {
        cluster.nodes[*node]
            .process
            .as_ref()
            .unwrap()
            .signal(Signal::SIGSTOP);
    }
    let path = mount.join("needs-a-majority");
    let writing = std::thread::spawn(move || fs::create_dir(path));
    let began = Instant::now();
    wait_for("three seconds without an answer", PROGRESS, || {
        assert!(!writing.is_finished(), "two of five acknowledged a write");
        (began.elapsed() > Duration::from_secs(3)).then_some(())
    });
    for node in &frozen {
        cluster.nodes[*node]
            .process
            .as_ref()
            .unwrap()
            .signal(Signal::SIGCONT);
    }
    writing.join().unwrap().expect("it waited for the majority");
    mount.unmount();
}

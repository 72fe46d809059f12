//! What one create costs beside fsync; printed, and bounded loosely so that a stall is a failure.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::io::Write;
use std::time::{Duration, Instant};

use heliofs_proto::ids::NodeId;
use heliofs_proto::v1::{self, FileKind, command, local_command, log_item::Item};
use meta_server::proposer::{LocalReply, Proposed};
use meta_server::{Node, NodeConfig};
use tempfile::TempDir;

const ROUNDS: usize = 500;

fn quantile(sorted: &[Duration], q: f64) -> Duration {
    sorted[((sorted.len() - 1) as f64 * q) as usize]
}

fn report(name: &str, mut times: Vec<Duration>) -> Duration {
    times.sort();
    let p50 = quantile(&times, 0.5);
    println!("{name}: p50 {p50:?}, p99 {:?}", quantile(&times, 0.99));
    p50
}

fn fsync_times(dir: &TempDir) -> Vec<Duration> {
    let mut file = std::fs::File::create(dir.path().join("probe")).unwrap();
    let probe = |_| {
        let begin = Instant::now();
        file.write_all(&[7; 4096]).unwrap();
        file.sync_data().unwrap();
        begin.elapsed()
    };
    (0..ROUNDS).map(probe).collect()
}

fn create(volume: u32, name: String) -> Item {
    Item::Command(v1::Command {
        volume,
        op: Some(command::Op::Create(v1::Create {
            parent: 1,
            name: name.into(),
            kind: FileKind::File.into(),
            mode: 0o644,
            ..v1::Create::default()
        })),
        ..v1::Command::default()
    })
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: wants the machine for itself"]
async fn one_thread_creates_on_three_nodes() {
    let dir =
        TempDir::new_in(std::env::var("HELIOFS_BENCH_DIR").unwrap_or("/tmp".to_owned())).unwrap();
    let mut nodes = Vec::new();
    for id in 1..=3 {
        let config = NodeConfig::new(NodeId(id), dir.path().join(id.to_string()), "token");
        nodes.push(Node::start(config).await.unwrap());
    }
    let leader = &nodes[0];
    leader.raft().init().await.unwrap();
    for node in &nodes[1..] {
        let (id, store) = (node.context().node_id, node.context().store_uuid);
        let address = node.local_addr().to_string();
        leader
            .raft()
            .add_known_node(id, &address, store)
            .await
            .unwrap();
    }
    let proposer = leader.context().proposer.clone();
    let create_volume = v1::VolumeCreate {
        name: "v".to_owned(),
        settings: Some(v1::VolumeSettings::default()),
        ..v1::VolumeCreate::default()
    };
    let op = Some(local_command::Op::VolumeCreate(create_volume));
    let volume = match proposer
        .propose(Item::Local(v1::LocalCommand { op }))
        .await
        .unwrap()
    {
        Proposed::Local(LocalReply::VolumeCreated(volume)) => volume.0,
        other => panic!("{other:?}"),
    };

    let fsync = report("fsync", fsync_times(&dir));
    let mut times = Vec::new();
    for n in 0..ROUNDS {
        let begin = Instant::now();
        proposer
            .propose(create(volume, format!("one {n}")))
            .await
            .unwrap();
        times.push(begin.elapsed());
    }
    let one = report("create, 1 at a time", times);
    println!("  minus 3 fsync: {:?}", one.saturating_sub(3 * fsync));

    for width in [4, 40, 400] {
        let begin = Instant::now();
        let tasks = (0..width).map(|task| {
            let proposer = proposer.clone();
            tokio::spawn(async move {
                for n in 0..ROUNDS {
                    let item = create(volume, format!("{width} {task} {n}"));
                    proposer.propose(item).await.unwrap();
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
        let rate = (width * ROUNDS) as f64 / begin.elapsed().as_secs_f64();
        println!("create, {width} at a time: {rate:.0}/s");
    }

    let reads = leader.context().reads.clone();
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        reads.linearizable().await.unwrap();
        times.push(begin.elapsed());
    }
    report("linearizable read on the leader", times);
    let reads = nodes[1].context().reads.clone();
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        reads.linearizable().await.unwrap();
        times.push(begin.elapsed());
    }
    report("linearizable read on a follower", times);
    assert!(one < Duration::from_millis(100));
}

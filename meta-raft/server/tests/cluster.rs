//! Three nodes in one process: elections, restarts, snapshots, identity, digests.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{ClusterId, NodeId, Position, VolumeId};
use heliofs_proto::v1::{self, FileKind, command, local_command, log_item::Item};
use meta_core::query;
use meta_server::config::{LogRetention, NodeConfig, RaftTimings};
use meta_server::proposer::{LocalReply, ProposeError, Proposed};
use meta_server::raft::admin::{AdminError, Joining};
use meta_server::store::OpenError;
use meta_server::{Node, StartError};
use tempfile::TempDir;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

fn config(id: u64, dir: &Path) -> NodeConfig {
    let mut config = NodeConfig::new(NodeId(id), dir, "test token");
    config.raft = RaftTimings {
        heartbeat: Duration::from_millis(50),
        election_min: Duration::from_millis(300),
        election_max: Duration::from_millis(600),
        ..RaftTimings::default()
    };
    config.log = LogRetention {
        check_every: Duration::from_millis(100),
        ..LogRetention::default()
    };
    config
}

/// A cluster whose nodes can be stopped and started again at the same address.
struct Cluster {
    dir: TempDir,
    nodes: BTreeMap<u64, Node>,
    configs: BTreeMap<u64, NodeConfig>,
}

impl Cluster {
    async fn new(size: u64, adjust: impl Fn(&mut NodeConfig)) -> Self {
        // `RUST_LOG=info` shows what the nodes do.
        let log = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer();
        // Another test of this process may have been first.
        log.try_init().ok();
        let dir = TempDir::new().unwrap();
        let mut cluster = Self {
            dir,
            nodes: BTreeMap::new(),
            configs: BTreeMap::new(),
        };
        for id in 1..=size {
            let mut config = config(id, &cluster.data_dir(id));
            adjust(&mut config);
            cluster.configs.insert(id, config);
            cluster.start(id).await;
        }
        cluster.nodes[&1].raft().init().await.unwrap();
        for id in 2..=size {
            cluster.add(id).await;
        }
        cluster
    }

    fn data_dir(&self, id: u64) -> PathBuf {
        self.dir.path().join(id.to_string())
    }

    async fn start(&mut self, id: u64) {
        let node = Node::start(self.configs[&id].clone()).await.unwrap();
        // The next start listens where the members expect it.
        self.configs.get_mut(&id).unwrap().listen = node.local_addr();
        self.nodes.insert(id, node);
    }

    async fn add(&self, id: u64) {
        let address = self.nodes[&id].local_addr().to_string();
        let leader = self.leader().await;
        while leader.raft().add_node(NodeId(id), &address).await.unwrap() != Joining::Votes {}
    }

    async fn stop(&mut self, id: u64) {
        self.nodes.remove(&id).unwrap().shutdown().await.unwrap();
    }

    async fn leader(&self) -> &Node {
        let search = async {
            loop {
                for node in self.nodes.values() {
                    if node.context().leadership.borrow().leading().is_some()
                        && node.context().reads.linearizable().await.is_ok()
                    {
                        return node;
                    }
                }
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, search).await.expect("nobody leads")
    }

    async fn leader_id(&self) -> u64 {
        self.leader().await.context().node_id.0
    }

    /// Proposes until a leader takes it; every command here may be repeated.
    async fn propose(&self, item: Item) -> Proposed {
        let attempts = async {
            loop {
                match self
                    .leader()
                    .await
                    .context()
                    .proposer
                    .propose(item.clone())
                    .await
                {
                    Ok(proposed) => return proposed,
                    Err(ProposeError::NotLeader { .. } | ProposeError::Unknown) => {}
                    Err(error @ (ProposeError::Fatal(_) | ProposeError::Fenced(_))) => {
                        panic!("{error}")
                    }
                }
            }
        };
        timeout(SOON, attempts).await.expect("not committed")
    }

    async fn volume(&self, name: &str) -> VolumeId {
        let create = v1::VolumeCreate {
            name: name.to_owned(),
            settings: Some(v1::VolumeSettings::default()),
            ..v1::VolumeCreate::default()
        };
        let op = Some(local_command::Op::VolumeCreate(create));
        match self.propose(Item::Local(v1::LocalCommand { op })).await {
            Proposed::Local(LocalReply::VolumeCreated(id) | LocalReply::VolumeExists(id)) => id,
            other => panic!("{other:?}"),
        }
    }

    async fn create(&self, volume: VolumeId, name: &str) -> v1::Reply {
        match self.propose(create(volume, name)).await {
            Proposed::Reply(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until all running nodes have applied the same entry, and compares their digests.
    async fn all_equal(&self, volume: VolumeId) -> Position {
        let leader = self.leader().await;
        let (target, sums) = leader.context().state.digest(volume).unwrap();
        for (id, node) in &self.nodes {
            let reached = async {
                loop {
                    node.context().reads.linearizable().await.ok();
                    let found = node.context().state.digest(volume);
                    if let Some((position, found)) = found
                        && position >= target
                    {
                        return (position, found);
                    }
                    tokio::task::yield_now().await;
                }
            };
            let (position, found) = timeout(SOON, reached).await.expect("does not catch up");
            assert_eq!(position, target, "nobody writes meanwhile");
            assert!(found == sums, "node {id} differs");
            let recomputed = node
                .context()
                .state
                .scrub(volume, |_| true)
                .unwrap()
                .unwrap()
                .sums;
            assert!(
                recomputed == sums,
                "node {id}: sums are not those of its records"
            );
        }
        target
    }
}

fn create(volume: VolumeId, name: &str) -> Item {
    Item::Command(v1::Command {
        volume: volume.0,
        op: Some(command::Op::Create(v1::Create {
            parent: 1,
            name: name.to_owned().into(),
            kind: FileKind::File.into(),
            mode: 0o644,
            exclusive: true,
            ..v1::Create::default()
        })),
        ..v1::Command::default()
    })
}

fn exists(node: &Node, volume: VolumeId, name: &str) -> bool {
    let found = query::lookup(
        &node.context().state.view(),
        volume,
        heliofs_proto::ids::Ino::ROOT,
        name.as_bytes(),
    );
    match found {
        Ok(_) => true,
        Err(query::QueryError::Refused(FsError::NotFound)) => false,
        Err(other) => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_survive_the_leaders_end_and_a_restart_of_all() {
    let mut cluster = Cluster::new(3, |_| {}).await;
    let volume = cluster.volume("v").await;
    assert_eq!(volume, VolumeId(1));
    for n in 0..50 {
        let reply = cluster.create(volume, &format!("before {n}")).await;
        assert_eq!(reply.error(), FsError::None);
    }
    let before = cluster.all_equal(volume).await;
    assert_eq!(
        before.seq, 51,
        "one position per command, the volume's first included"
    );

    let leader = cluster.leader_id().await;
    cluster.stop(leader).await;
    assert_eq!(
        cluster.create(volume, "meanwhile").await.error(),
        FsError::None
    );
    cluster.start(leader).await;
    cluster.all_equal(volume).await;

    let cluster_id = cluster.leader().await.context().state.cluster_id();
    assert!(cluster_id.is_some_and(|id| id != ClusterId(0)));
    for id in 1..=3 {
        cluster.stop(id).await;
    }
    for id in 1..=3 {
        cluster.start(id).await;
    }
    let after = cluster.all_equal(volume).await;
    assert_eq!(after.seq, 52);
    for node in cluster.nodes.values() {
        assert!(exists(node, volume, "meanwhile") && exists(node, volume, "before 49"));
        assert!(!exists(node, volume, "never"));
        assert_eq!(node.context().state.cluster_id(), cluster_id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_proposals_share_entries_and_all_are_answered_in_order() {
    let cluster = Cluster::new(1, |_| {}).await;
    let volume = cluster.volume("v").await;
    let node = cluster.leader().await;
    let entries_before = node.context().log.last().unwrap().index;
    let proposals = (0..500).map(|n| {
        let proposer = node.context().proposer.clone();
        tokio::spawn(async move { proposer.propose(create(volume, &n.to_string())).await })
    });
    let mut seqs = Vec::new();
    for proposal in proposals.collect::<Vec<_>>() {
        match proposal.await.unwrap().unwrap() {
            Proposed::Reply(reply) => {
                assert_eq!(reply.error(), FsError::None);
                seqs.push(reply.position.unwrap().seq);
            }
            other => panic!("{other:?}"),
        }
    }
    seqs.sort_unstable();
    assert_eq!(seqs, (2..502).collect::<Vec<_>>());
    let entries = node.context().log.last().unwrap().index - entries_before;
    assert!(
        entries < 400,
        "{entries} entries for 500 commands: nothing was grouped"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_the_log_left_behind_gets_a_snapshot() {
    let mut cluster = Cluster::new(3, |config| {
        config.log.entries_min = 5;
        config.log.entries_max = 20;
    })
    .await;
    let volume = cluster.volume("v").await;
    cluster.create(volume, "first").await;
    let lagging = (1..=3).find(|id| *id != 1).unwrap();
    if cluster.leader_id().await == lagging {
        cluster
            .leader()
            .await
            .raft()
            .transfer(NodeId(1))
            .await
            .unwrap();
    }
    let last_of_lagging = cluster.nodes[&lagging].context().log.last().unwrap().index;
    cluster.stop(lagging).await;
    for n in 0..200 {
        cluster.create(volume, &format!("while away {n}")).await;
    }
    let purged = async {
        loop {
            let leader = cluster.leader().await;
            if leader.context().log.purged().map(|id| id.index) > Some(last_of_lagging) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(SOON, purged).await.expect("the log is not trimmed");
    cluster.start(lagging).await;
    cluster.all_equal(volume).await;
    let node = &cluster.nodes[&lagging];
    assert!(exists(node, volume, "while away 199") && exists(node, volume, "first"));
    let purged = node.context().log.purged().map(|id| id.index);
    assert!(
        purged > Some(last_of_lagging),
        "it came by log, not by snapshot"
    );
    // Only the live state is left, and the pointer names it.
    let states = std::fs::read_dir(cluster.data_dir(lagging)).unwrap();
    let states: Vec<_> = states
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("state-") || name.starts_with("snapshot-"))
        .collect();
    let pointer = std::fs::read_to_string(cluster.data_dir(lagging).join("CURRENT_STATE")).unwrap();
    assert_eq!(states, [pointer.trim()]);
    assert_ne!(pointer.trim(), "state-1");

    // And it goes on from there, also after a restart.
    cluster.create(volume, "afterwards").await;
    cluster.stop(lagging).await;
    cluster.start(lagging).await;
    cluster.all_equal(volume).await;
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_loses_no_applied_command_though_the_state_was_not_flushed() {
    let mut cluster = Cluster::new(1, |_| {}).await;
    let volume = cluster.volume("v").await;
    for n in 0..20 {
        cluster.create(volume, &format!("flushed {n}")).await;
    }
    cluster.leader().await.raft().snapshot().await.unwrap();
    let flushed = cluster.nodes[&1].context().state.flushed_index().unwrap();
    for n in 0..30 {
        cluster.create(volume, &format!("in memory {n}")).await;
    }
    let (position, sums) = cluster.nodes[&1].context().state.digest(volume).unwrap();
    // What kill -9 leaves: the files as they are now. What is only in a write buffer is gone.
    let crashed = cluster.dir.path().join("crashed");
    copy_tree(&cluster.data_dir(1), &crashed);
    let state = meta_server::store::State::open(&crashed, &Default::default()).unwrap();
    assert_eq!(
        state.applied().0.unwrap().index,
        flushed,
        "the test would prove nothing"
    );
    drop(state);

    cluster.stop(1).await;
    cluster.configs.get_mut(&1).unwrap().data_dir = crashed;
    cluster.start(1).await;
    assert_eq!(cluster.all_equal(volume).await, position);
    let (_, replayed) = cluster.nodes[&1].context().state.digest(volume).unwrap();
    assert!(replayed == sums);
    assert!(exists(&cluster.nodes[&1], volume, "in memory 29"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_with_another_disk_is_refused() {
    let mut cluster = Cluster::new(3, |_| {}).await;
    let volume = cluster.volume("v").await;
    let gone = if cluster.leader_id().await == 3 { 2 } else { 3 };
    cluster.stop(gone).await;
    std::fs::remove_dir_all(cluster.data_dir(gone)).unwrap();
    cluster.start(gone).await;
    for n in 0..20 {
        cluster.create(volume, &n.to_string()).await;
    }
    let impostor = &cluster.nodes[&gone];
    assert_eq!(impostor.context().log.last(), None, "it must get nothing");
    assert_eq!(
        impostor.context().log.vote(),
        None,
        "and not be asked for votes"
    );
    let refused = cluster
        .leader()
        .await
        .raft()
        .add_node(NodeId(gone), &impostor.local_addr().to_string())
        .await;
    match refused {
        Err(AdminError::Refused(why)) => assert!(why.contains("under a new id"), "{why}"),
        other => panic!("{other:?}"),
    }

    // Replaced as the message says.
    cluster.stop(gone).await;
    std::fs::remove_dir_all(cluster.data_dir(gone)).unwrap();
    cluster.configs.insert(4, config(4, &cluster.data_dir(4)));
    cluster.start(4).await;
    cluster
        .leader()
        .await
        .raft()
        .remove_node(NodeId(gone))
        .await
        .unwrap();
    cluster.add(4).await;
    cluster.all_equal(volume).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_log_keeps_the_node_from_starting() {
    let mut cluster = Cluster::new(1, |_| {}).await;
    cluster.volume("v").await;
    cluster.stop(1).await;
    let path = cluster.data_dir(1).join("log");
    let db = rocksdb::DB::open(&rocksdb::Options::default(), path).unwrap();
    let key = [b"e".as_slice(), &1u64.to_be_bytes()].concat();
    let mut value = db.get(&key).unwrap().expect("entry 1");
    value[5] ^= 1;
    db.put(&key, value).unwrap();
    drop(db);
    match Node::start(cluster.configs[&1].clone()).await {
        Err(StartError::Open(OpenError::Damaged(_))) => {}
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it started"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lead_moves_on_request_and_a_follower_reads_what_was_acknowledged() {
    let cluster = Cluster::new(3, |_| {}).await;
    let volume = cluster.volume("v").await;
    for target in [2, 3, 1] {
        cluster
            .leader()
            .await
            .raft()
            .transfer(NodeId(target))
            .await
            .unwrap();
        assert_eq!(cluster.leader_id().await, target);
        let name = format!("under {target}");
        cluster.create(volume, &name).await;
        for node in cluster.nodes.values() {
            node.context().reads.linearizable().await.unwrap();
            assert!(exists(node, volume, &name));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_beat_is_noticed_by_every_replica() {
    let cluster = Cluster::new(3, |_| {}).await;
    let volume = cluster.volume("v").await;
    cluster.create(volume, "a").await;
    let beat = cluster.leader().await.context().state.beat(volume).unwrap();
    cluster.propose(Item::Beat(beat.clone())).await;
    cluster.all_equal(volume).await;
    for node in cluster.nodes.values() {
        node.context().reads.linearizable().await.unwrap();
        assert_eq!(node.context().state.diverged(volume), None);
        // The driver of beats may have added some.
        assert!(node.context().state.beats_agreed(volume) >= 1);
    }
    let mut wrong = beat.clone();
    wrong.digest = vec![0; 16].into();
    cluster.propose(Item::Beat(wrong)).await;
    for node in cluster.nodes.values() {
        node.context().reads.linearizable().await.unwrap();
        assert_eq!(
            node.context()
                .state
                .diverged(volume)
                .map(v1::Position::from),
            beat.position
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_created_once_and_leave_nothing_when_destroyed() {
    use meta_core::View;
    let cluster = Cluster::new(1, |_| {}).await;
    let first = cluster.volume("a").await;
    assert_eq!(cluster.volume("a").await, first);
    let second = cluster.volume("b").await;
    cluster.create(first, "x").await;
    cluster.create(second, "y").await;
    let destroy = v1::VolumeDestroy { volume: first.0 };
    let op = Some(local_command::Op::VolumeDestroy(destroy));
    let item = Item::Local(v1::LocalCommand { op });
    assert_eq!(
        cluster.propose(item.clone()).await,
        Proposed::Local(LocalReply::Done)
    );
    assert_eq!(
        cluster.propose(item).await,
        Proposed::Local(LocalReply::NoSuchVolume)
    );
    assert_eq!(cluster.create(first, "z").await.error(), FsError::Stale);
    let state = &cluster.nodes[&1].context().state;
    let (from, to) = meta_core::keys::volume_range(first);
    assert!(state.view().scan(&from, &to, 10).unwrap().is_empty());
    assert_eq!(state.volumes().len(), 1);
    assert_eq!(
        cluster.volume("a").await,
        VolumeId(3),
        "ids are never used again"
    );
    cluster.all_equal(second).await;
}

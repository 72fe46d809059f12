//! The client's sessions against three real nodes in this process, reached through relays that lose what is under way.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, NodeId, Position};
use heliofs_proto::v1;
use heliofs_proto::v1::command::Op;
use meta_client::changelog::ChangelogItem;
use meta_client::{
    ClientError, Cluster, ClusterOptions, Event, Session, SessionOptions, Token, Watcher,
};
use meta_server::{Node, NodeConfig};
use rand::Rng;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const TOKEN: &str = "a-token-for-tests-only";
const VOLUME: &str = "photos";

/// Passes bytes on to a node, and can cut every connection at once: what is under way in either direction is lost.
struct Relay {
    address: String,
    target: watch::Sender<Option<String>>,
    cuts: watch::Sender<u64>,
}

impl Relay {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (target, to) = watch::channel(None);
        let (cuts, _) = watch::channel(0);
        let cutter = cuts.clone();
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let target: Option<String> = to.borrow().clone();
                let mut cut = cutter.subscribe();
                tokio::spawn(async move {
                    let Some(target) = target else { return };
                    let Ok(node) = TcpStream::connect(target).await else {
                        return;
                    };
                    client.set_nodelay(true).unwrap();
                    node.set_nodelay(true).unwrap();
                    let (mut client, mut node) = (client, node);
                    tokio::select! {
                        // Either end may go at any moment; that is what a relay is for.
                        _ = tokio::io::copy_bidirectional(&mut client, &mut node) => {}
                        _ = cut.changed() => {}
                    }
                    node.shutdown().await.ok();
                });
            }
        });
        Self {
            address,
            target,
            cuts,
        }
    }

    fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

struct Nodes {
    nodes: Vec<Option<Node>>,
    relays: Vec<Relay>,
    _dir: tempfile::TempDir,
}

impl Nodes {
    /// Three voters and one volume.
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (mut nodes, mut relays) = (Vec::new(), Vec::new());
        for id in 1..=3 {
            let relay = Relay::start().await;
            let mut config = NodeConfig::new(NodeId(id), dir.path().join(id.to_string()), TOKEN);
            config.advertise = Some(relay.address.clone());
            config.raft.heartbeat = Duration::from_millis(100);
            config.raft.election_min = Duration::from_millis(400);
            config.raft.election_max = Duration::from_millis(800);
            config.cache.write_buffer_bytes = 4 << 20;
            config.cache.block_cache_bytes = 16 << 20;
            let node = Node::start(config).await.unwrap();
            relay
                .target
                .send_replace(Some(node.local_addr().to_string()));
            nodes.push(Some(node));
            relays.push(relay);
        }
        let nodes = Self {
            nodes,
            relays,
            _dir: dir,
        };
        let first = vec![nodes.relays[0].address.clone()];
        let cluster = Cluster::new(first, Token::new(TOKEN).unwrap(), Default::default());
        cluster.init_cluster().await.unwrap();
        for id in [2, 3] {
            let address = &nodes.relays[id - 1].address;
            let node = NodeId(id as u64);
            cluster.add_node(node, address, |_| {}).await.unwrap();
        }
        let volume = v1::VolumeCreate {
            name: VOLUME.into(),
            storage: Some(v1::StorageConfig {
                storage: "memory".into(),
                ..Default::default()
            }),
            settings: None,
        };
        let volume = cluster.create_volume(volume).await.unwrap();
        assert_eq!(volume.name, VOLUME);
        nodes
    }

    fn cluster(&self) -> Cluster {
        let peers = self.relays.iter().map(|relay| relay.address.clone());
        let options = ClusterOptions::default();
        Cluster::new(peers.collect(), Token::new(TOKEN).unwrap(), options)
    }

    async fn session(&self, watcher: Option<Arc<dyn Watcher>>) -> Session {
        let options = SessionOptions {
            volume: VOLUME.into(),
            host: "here".into(),
            build: "test".into(),
            watcher,
            ..Default::default()
        };
        Session::attach(self.cluster(), options).await.unwrap()
    }

    /// The node that leads, by index.
    async fn leader(&self) -> usize {
        let begun = Instant::now();
        loop {
            for (index, node) in self.nodes.iter().enumerate() {
                let Some(node) = node else { continue };
                if node.context().leadership.borrow().leading().is_some() {
                    return index;
                }
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "nobody leads");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn transfer(&self) {
        let from = self.leader().await;
        let to = (from + 1) % self.nodes.len();
        let cluster = self.cluster();
        cluster.transfer(NodeId(to as u64 + 1)).await.unwrap();
        let begun = Instant::now();
        while self.leader().await == from {
            assert!(begun.elapsed() < Duration::from_secs(20), "it still leads");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn stop(self) {
        for node in self.nodes.into_iter().flatten() {
            node.shutdown().await.unwrap();
        }
    }
}

fn caller() -> v1::Caller {
    v1::Caller::default()
}

fn file(name: &str) -> v1::Create {
    v1::Create {
        parent: Ino::ROOT.0,
        name: Bytes::copy_from_slice(name.as_bytes()),
        kind: v1::FileKind::File.into(),
        mode: 0o644,
        exclusive: true,
        ..Default::default()
    }
}

fn unlink(name: &str) -> Op {
    Op::Unlink(v1::Unlink {
        parent: Ino::ROOT.0,
        name: Bytes::copy_from_slice(name.as_bytes()),
        directory: false,
    })
}

fn rename(from: &str, to: &str) -> Op {
    Op::Rename(v1::Rename {
        parent: Ino::ROOT.0,
        name: Bytes::copy_from_slice(from.as_bytes()),
        new_parent: Ino::ROOT.0,
        new_name: Bytes::copy_from_slice(to.as_bytes()),
        no_replace: true,
        exchange: false,
    })
}

async fn names(session: &Session) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut after = 0;
    loop {
        let (page, _) = session
            .read_dir(Ino::ROOT, after, 500, false)
            .await
            .unwrap();
        for entry in &page.entries {
            let name = String::from_utf8(entry.name.to_vec()).unwrap();
            assert!(names.insert(name), "an entry came twice");
        }
        match page.entries.last() {
            Some(last) if !page.end => after = last.cookie,
            _ => return names,
        }
    }
}

/// Creates, renames and unlinks, each of which would fail if it were applied twice, while connections are cut and the lead
/// moves: each takes effect once, and nobody sees an error. The changelog, followed meanwhile, has no gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mutations_take_effect_once_across_cuts_and_leader_changes() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let nodes = Nodes::start().await;
    let session = nodes.session(None).await;
    let follower = {
        let mut changes = nodes.cluster().follow(VOLUME, Position::START, true);
        tokio::spawn(async move {
            let mut creates = 0;
            loop {
                let item = changes.next().await.unwrap().unwrap();
                let ChangelogItem::Entry(entry) = item else {
                    continue;
                };
                match entry.command.and_then(|command| command.op) {
                    Some(Op::Create(create)) if create.name == "the end" => {
                        return (creates, changes.position());
                    }
                    Some(Op::Create(_)) => creates += 1,
                    _ => {}
                }
            }
        })
    };
    const WRITERS: usize = 16;
    let (stop, stopped) = watch::channel(false);
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let session = session.clone();
            let stopped = stopped.clone();
            tokio::spawn(async move {
                let mut kept = Vec::new();
                let mut index = 0;
                while !*stopped.borrow() {
                    let (made, moved) =
                        (format!("{writer}-{index}"), format!("{writer}-{index}-m"));
                    let create = Op::Create(file(&made));
                    session.mutate(caller(), create).await.unwrap();
                    session
                        .mutate(caller(), rename(&made, &moved))
                        .await
                        .unwrap();
                    if index % 2 == 0 {
                        session.mutate(caller(), unlink(&moved)).await.unwrap();
                    } else {
                        kept.push(moved);
                    }
                    index += 1;
                }
                (index, kept)
            })
        })
        .collect();
    let mut rng: rand::rngs::StdRng = rand::SeedableRng::seed_from_u64(seed);
    for round in 0..12 {
        tokio::time::sleep(Duration::from_millis(rng.random_range(50..250))).await;
        if round % 4 == 3 {
            nodes.transfer().await;
        } else {
            nodes.relays[nodes.leader().await].cut();
        }
    }
    stop.send_replace(true);
    let (mut made, mut kept) = (0, BTreeSet::new());
    for writer in writers {
        let (count, names) = writer.await.unwrap();
        made += count;
        kept.extend(names);
    }
    assert!(made > WRITERS, "hardly anything was done: {made}");
    assert_eq!(names(&session).await, kept);
    let end = Op::Create(file("the end"));
    let reply = session.mutate(caller(), end).await.unwrap();
    let (creates, position) = tokio::time::timeout(Duration::from_secs(20), follower)
        .await
        .expect("the changelog came to its end")
        .unwrap();
    // A create that was resent after it was applied is in the history again, as a command that changed nothing.
    assert!(creates >= made, "{creates} creates for {made} files");
    assert_eq!(position, reply.position.map(Position::from).unwrap());
    println!("{made} files, {creates} creates in the changelog");
    session.detach().await;
    nodes.stop().await;
}

/// The leader stops for good: the session goes on with another one, and nobody sees an error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_outlives_its_leader() {
    let mut nodes = Nodes::start().await;
    let session = nodes.session(None).await;
    let id = session.id();
    let mut events = session.events().unwrap();
    // An open file without a name, and a lock: soft state that only this session can tell the new leader of.
    let reply = session.create_open(caller(), file("held")).await.unwrap();
    let ino = Ino(reply.attr.unwrap().ino);
    session.mutate(caller(), unlink("held")).await.unwrap();
    let lock = v1::Lock {
        ino: Ino::ROOT.0,
        owner: 1,
        kind: v1::LockKind::Write.into(),
        start: 0,
        end: 9,
        ..Default::default()
    };
    session.lock(lock).await.unwrap();
    let leader = nodes.leader().await;
    let writer = {
        let session = session.clone();
        tokio::spawn(async move {
            let mut pause = Duration::ZERO;
            for index in 0..400 {
                let begun = Instant::now();
                let create = Op::Create(file(&format!("f{index}")));
                session.mutate(caller(), create).await.unwrap();
                pause = pause.max(begun.elapsed());
            }
            pause
        })
    };
    nodes.relays[leader].target.send_replace(None);
    nodes.relays[leader].cut();
    nodes.nodes[leader]
        .take()
        .unwrap()
        .shutdown()
        .await
        .unwrap();
    let pause = writer.await.unwrap();
    println!("longest pause {pause:?}");
    assert!(pause < Duration::from_secs(15), "{pause:?}");
    assert_ne!(nodes.leader().await, leader);
    assert_eq!(session.id(), id);
    let mut resumed = false;
    while let Ok(event) = events.try_recv() {
        resumed |= event == Event::Reattached;
    }
    assert!(resumed);
    assert_eq!(session.get_attr(ino).await.unwrap().0.nlink, 0);
    let other = nodes.session(None).await;
    let taken = v1::Lock { owner: 2, ..lock };
    let refused = other.lock(taken).await.unwrap_err();
    assert_eq!(refused, ClientError::Verdict(FsError::WouldBlock));
    // The last close lets it go; a reap follows.
    session.release(ino);
    let begun = Instant::now();
    while other.get_attr(ino).await.is_ok() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "it was never reaped"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    other.detach().await;
    session.detach().await;
    nodes.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blocking_lock_is_granted_cancelled_and_released_with_its_session() {
    let nodes = Nodes::start().await;
    let (first, second) = (nodes.session(None).await, nodes.session(None).await);
    let lock = |owner| v1::Lock {
        ino: Ino::ROOT.0,
        owner,
        kind: v1::LockKind::Write.into(),
        start: 0,
        end: u64::MAX,
        wait: true,
        ..Default::default()
    };
    first.lock(lock(1)).await.unwrap();
    let cancelled = tokio::time::timeout(Duration::from_millis(200), second.lock(lock(2)));
    assert!(cancelled.await.is_err(), "it is held");
    let waiting = {
        let second = second.clone();
        tokio::spawn(async move { second.lock(lock(3)).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    first.release_locks(Ino::ROOT, 1, false).await.unwrap();
    // Granted to the one that waits, not to the one that gave up.
    waiting.await.unwrap().unwrap();
    let conflict = first.test_lock(lock(1)).await.unwrap();
    assert_eq!(conflict.unwrap().start, 0);
    // A session that ends lets go.
    let waiting = {
        let first = first.clone();
        tokio::spawn(async move { first.lock(lock(1)).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    second.detach().await;
    waiting.await.unwrap().unwrap();
    let cluster = nodes.cluster();
    let status = cluster.status_all().await;
    assert_eq!(status.len(), 3);
    let sessions = status
        .into_iter()
        .map(|(_, status)| status.unwrap().sessions.len());
    assert_eq!(sessions.max(), Some(1), "the detached session is gone");
    first.detach().await;
    nodes.stop().await;
}

/// Names of entries that the server said have changed.
#[derive(Default)]
struct Heard {
    names: Mutex<BTreeSet<String>>,
}

impl Watcher for Heard {
    fn invalidated(&self, invalidation: &v1::Invalidation) {
        let mut names = self.names.lock().unwrap();
        for name in &invalidation.names {
            names.insert(String::from_utf8_lossy(name).into_owned());
        }
    }

    fn forget_all(&self) {}

    fn recalled(&self, _: meta_client::Recalled) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_sessions_change_is_heard_of_and_the_lease_lives() {
    let nodes = Nodes::start().await;
    let heard = Arc::new(Heard::default());
    let reader = nodes.session(Some(heard.clone())).await;
    let writer = nodes.session(None).await;
    let absent = reader.try_lookup(Ino::ROOT, Bytes::from_static(b"x"));
    let (attr, position) = absent.await.unwrap();
    assert!(attr.is_none());
    assert!(reader.cacheable(reader.cache_ticket(), position));
    let op = Op::Create(file("x"));
    let reply = writer.mutate(caller(), op).await.unwrap();
    let begun = Instant::now();
    while !heard.names.lock().unwrap().contains("x") {
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "never told of `x`"
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(reader.last_invalidation_seq() >= reply.position.unwrap().seq);
    assert!(!reader.cacheable(reader.cache_ticket(), position));
    let begun = Instant::now();
    while !reader.lease_valid() {
        assert!(begun.elapsed() < Duration::from_secs(5), "no pong");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for _ in 0..30 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(
            reader.lease_valid(),
            "a lease is kept alive while all is well"
        );
    }
    let missing = SessionOptions {
        volume: "nothing".into(),
        ..Default::default()
    };
    let error = Session::attach(nodes.cluster(), missing)
        .await
        .err()
        .unwrap();
    assert!(error.to_string().contains("heliofs format"), "{error}");
    let wrong = Token::new("not-the-token-of-this-cluster").unwrap();
    let stranger = Cluster::new(nodes.cluster().peers(), wrong, ClusterOptions::default());
    let error = stranger.list_volumes().await.unwrap_err();
    assert!(
        error.to_string().contains("refused the cluster token"),
        "{error}"
    );
    reader.detach().await;
    writer.detach().await;
    nodes.stop().await;
}

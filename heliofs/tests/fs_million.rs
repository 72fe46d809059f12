//! A directory of a million entries.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use heliofs_proto::v1::{self, command::Op};
use meta_client::{ClusterOptions, Session, SessionOptions, Token};
use support::Cluster;

const ENTRIES: usize = 1_000_000;
/// Creates under way: enough to fill the log's entries.
const CREATES_AT_ONCE: usize = 400;

/// Names are numbers, so that which ones were seen is one bit each.
fn name(number: usize) -> String {
    format!("{number:07}")
}

/// Creates the entries of the directory `parent` through a session, without a mount's round trips.
async fn fill(cluster: &Cluster, volume: &str, parent: u64) {
    let token = fs::read_to_string(&cluster.token_file).unwrap();
    let peers = cluster.nodes.iter().map(support::cluster::Node::address);
    let client = meta_client::Cluster::new(
        peers.collect(),
        Token::new(token.trim()).unwrap(),
        ClusterOptions::default(),
    );
    let options = SessionOptions {
        volume: volume.to_owned(),
        host: "test".into(),
        ..SessionOptions::default()
    };
    let session = Session::attach(client, options).await.unwrap();
    stream::iter(0..ENTRIES)
        .map(|number| {
            let create = v1::Create {
                parent,
                name: Bytes::from(name(number)),
                kind: v1::FileKind::File.into(),
                mode: 0o644,
                exclusive: true,
                ..v1::Create::default()
            };
            let session = &session;
            async move {
                let made = session
                    .mutate(v1::Caller::default(), Op::Create(create))
                    .await?;
                // A create opens the file, too.
                session.release(made.attr.unwrap().ino.into());
                Ok::<_, meta_client::ClientError>(())
            }
        })
        .buffer_unordered(CREATES_AT_ONCE)
        .try_collect::<()>()
        .await
        .unwrap();
    session.detach().await;
}

/// Lists the directory; every one of the million exactly once, whatever else comes and goes beside them.
fn list(directory: &std::path::Path) -> usize {
    let mut seen = vec![false; ENTRIES];
    let mut others = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let found = entry.unwrap().file_name();
        let text = std::str::from_utf8(found.as_bytes()).unwrap();
        match text.parse::<usize>() {
            Ok(number) => {
                assert!(!seen[number], "{text} came twice");
                seen[number] = true;
            }
            Err(_) => others += 1,
        }
    }
    let missing = seen.iter().filter(|seen| !**seen).count();
    assert_eq!(missing, 0, "entries were not listed");
    others
}

#[test]
fn a_million_entries_are_listed_each_once_also_while_others_come_and_go() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("million", &[]);
    let mount = cluster.mount("million");
    let directory = mount.join("large");
    fs::create_dir(&directory).unwrap();
    let parent = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&directory).unwrap());
    let began = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(fill(&cluster, "million", parent));
    println!("{:?} to create", began.elapsed());

    let began = Instant::now();
    assert_eq!(list(&directory), 0);
    println!("{:?} to list", began.elapsed());

    // Through another mount: changes of one's own are ordered by the kernel's lock on the directory.
    let other = cluster.mount("million");
    let stop = AtomicBool::new(false);
    let changed = std::thread::scope(|scope| {
        let churn = scope.spawn(|| {
            let mut rounds = 0;
            let directory = other.join("large");
            while !stop.load(Ordering::Relaxed) {
                for number in 0..10 {
                    fs::write(directory.join(format!("other-{number}")), "").unwrap();
                }
                for number in 0..10 {
                    fs::remove_file(directory.join(format!("other-{number}"))).unwrap();
                }
                rounds += 1;
            }
            rounds
        });
        let began = Instant::now();
        list(&directory);
        println!("{:?} to list beside changes", began.elapsed());
        stop.store(true, Ordering::Relaxed);
        churn.join().unwrap()
    });
    assert!(changed > 0, "nothing changed meanwhile");
    // The middle and both ends are found by name, and the count is what was made.
    for number in [0, ENTRIES / 2, ENTRIES - 1] {
        assert!(directory.join(name(number)).exists());
    }
    // What was removed counts until it is reaped.
    support::wait_for("the others' reaping", Duration::from_secs(20), || {
        (cluster.volume("million")["used_inodes"] == ENTRIES + 2).then_some(())
    });
    other.unmount();
    mount.unmount();
}

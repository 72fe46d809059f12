//! A node of an earlier release meets what it does not know: it stops and says so, and goes on when it is upgraded. Nothing
//! diverges.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use support::mirror::{assert_mirror_equal, catch_up, mirror_of, wait_for_status};
use support::{Cluster, Relay, S3, wait_for};

/// What makes a node take itself for one of the release before.
const OLDER: [&str; 2] = ["--pretend-core-level", "2"];

fn with(flags: &[String], more: &[&str]) -> Vec<String> {
    let more = more.iter().map(|flag| (*flag).to_owned());
    flags.iter().cloned().chain(more).collect()
}

/// Stops a node and starts it as one of the release before, or of this one.
fn restart(cluster: &mut Cluster, node: usize, older: bool) {
    cluster.stop_node(node);
    let flags = cluster.flags.clone();
    if older {
        cluster.flags = with(&flags, &OLDER);
    }
    cluster.start_node(node);
    cluster.flags = flags;
}

/// Committed when it returns, and not only held here under a write lease.
fn put(path: &Path) {
    let mut file = File::create_new(path).unwrap();
    file.write_all(b"x").unwrap();
    file.sync_all().unwrap();
}

fn raise(cluster: &Cluster, volume: &str) -> support::Ran {
    cluster.run(&["config", &cluster.volume_url(volume), "--core-level", "3"])
}

#[test]
fn a_member_of_an_earlier_release_stops_at_what_it_does_not_know() {
    let mut cluster = Cluster::start();
    let older = cluster.follower();
    restart(&mut cluster, older, true);
    cluster.format_file("rolled", &[]);
    assert_eq!(cluster.volume("rolled")["core_level"], 2);
    let mount = cluster.mount("rolled");
    put(&mount.join("before"));
    cluster.assert_replicas_equal("rolled");
    // Not before all know it, nor while one can't be asked.
    raise(&cluster, "rolled").failure(1, "not all metadata nodes know core level 3");
    cluster.stop_node(older);
    raise(&cluster, "rolled").failure(1, "not all metadata nodes know core level 3");
    cluster.start_node(older);
    raise(&cluster, "rolled").success();
    cluster.assert_replicas_equal("rolled");
    // Somebody rolls one node back all the same.
    cluster.stop_node(older);
    let flags = cluster.flags.clone();
    cluster.flags = with(&flags, &OLDER);
    cluster.spawn_node(older);
    cluster.flags = flags;
    put(&mount.join("beyond"));
    let process = cluster.nodes[older].process.as_mut().unwrap();
    let ended = wait_for("the older node's end", Duration::from_secs(60), || {
        process.ended()
    });
    assert!(!ended.success(), "{ended}");
    let log = process.log();
    assert!(
        log.contains("is at core level 3, this build knows 2: upgrade this node"),
        "{log}"
    );
    assert!(!log.contains("disk is damaged"), "{log}");
    // The others go on, and it does when it is upgraded.
    for number in 0..20 {
        put(&mount.join(format!("after-{number}")));
    }
    cluster.start_node(older);
    cluster.assert_replicas_equal("rolled");
    assert_eq!(fs::read(mount.join("after-19")).unwrap(), b"x");
    mount.unmount();
}

#[test]
fn a_mirror_of_an_earlier_release_waits_at_the_position_before() {
    let mut source = Cluster::with_dirs(1, |_, _| None, &OLDER);
    source.format_file("rolled", &[]);
    source.flags.clear();
    restart(&mut source, 0, false);
    let mut mirror = mirror_of(&source, &source.url(), 1, &OLDER);
    let mount = source.mount("rolled");
    put(&mount.join("before"));
    assert_mirror_equal(&source, &mirror, "rolled");
    raise(&source, "rolled").success();
    put(&mount.join("beyond"));
    let waits = wait_for_status(&mirror, "rolled", "the mirror's halt", |status| {
        status["doing"] == "upgrade"
    });
    let detail = waits["detail"].as_str().unwrap();
    assert!(
        detail.contains("works with core level 3, this build knows 2"),
        "{waits}"
    );
    // Where it waits it shows what was before, and goes no further.
    let at = waits["applied"].clone();
    for number in 0..20 {
        put(&mount.join(format!("after-{number}")));
    }
    let seen = mirror.mount("rolled");
    assert_eq!(fs::read(seen.join("before")).unwrap(), b"x");
    assert!(!seen.join("beyond").exists());
    seen.unmount();
    let later = wait_for_status(&mirror, "rolled", "the same", |status| {
        status["doing"] == "upgrade"
    });
    assert_eq!(later["applied"], at, "{later}");
    // One that loads the volume anew does not begin, either.
    let mut flags = OLDER.to_vec();
    flags.extend(["--mirror-name", "second"]);
    let fresh = mirror_of(&source, &source.url(), 1, &flags);
    wait_for("its refusal", Duration::from_secs(60), || {
        let log = fresh.nodes[0].process.as_ref().unwrap().log();
        log.contains("the source works with core level 3, this build knows 2")
            .then_some(())
    });
    let volumes = fresh.status()["volumes"].clone();
    assert_eq!(volumes.as_array().unwrap().len(), 0, "{volumes}");
    mirror.flags.truncate(4);
    restart(&mut mirror, 0, false);
    catch_up(&source, &mirror, "rolled");
    assert_mirror_equal(&source, &mirror, "rolled");
    let seen = mirror.mount("rolled");
    assert_eq!(fs::read(seen.join("after-19")).unwrap(), b"x");
    seen.unmount();
    mount.unmount();
}

#[test]
fn a_mirror_loads_copies_with_nodes_only_that_know_how() {
    let source = Cluster::with_dirs(1, |_, _| None, &OLDER);
    source.format_file("rolled", &[]);
    let link = Relay::start(&source.nodes[0].address(), Duration::ZERO);
    link.cut();
    let through = format!("helio://{}", link.address());
    let mut mirror = mirror_of(&source, &through, 3, &[]);
    let older = mirror.follower();
    restart(&mut mirror, older, true);
    link.heal();
    let address = mirror.nodes[older].address();
    let says = format!("upgrade node {address} of this mirror");
    wait_for(
        "the wait for the older node",
        Duration::from_secs(60),
        || {
            let mut logs = mirror.nodes.iter().map(|node| {
                let process = node.process.as_ref();
                process.unwrap().log()
            });
            logs.any(|log| log.contains(&says)).then_some(())
        },
    );
    let volumes = mirror.status()["volumes"].clone();
    assert_eq!(volumes.as_array().unwrap().len(), 0, "{volumes}");
    // Without it the others go on; it stops where it meets what they did, and where it has met it before.
    mirror.stop_node(older);
    catch_up(&source, &mirror, "rolled");
    let flags = mirror.flags.clone();
    for meets in ["log entry", "the state is of level 1"] {
        mirror.flags = with(&flags, &OLDER);
        mirror.spawn_node(older);
        mirror.flags.clone_from(&flags);
        let process = mirror.nodes[older].process.as_mut().unwrap();
        let ended = wait_for("the older node's end", Duration::from_secs(60), || {
            process.ended()
        });
        assert!(!ended.success(), "{ended}");
        let log = process.log();
        assert!(log.contains(meets), "{log}");
        assert!(
            log.contains("level 1, this build knows 0: upgrade this node"),
            "{log}"
        );
        mirror.start_node(older);
        assert_mirror_equal(&source, &mirror, "rolled");
        mirror.stop_node(older);
    }
    mirror.start_node(older);
    assert_mirror_equal(&source, &mirror, "rolled");
}

#[test]
fn a_volume_gets_a_fence_store_only_where_every_node_knows_them() {
    let s3 = S3::start();
    let fence = s3.bucket_url("fence");
    let mut cluster = Cluster::start();
    cluster.format_file("mixed", &[]);
    let older = cluster.follower();
    restart(&mut cluster, older, true);
    let url = cluster.volume_url("mixed");
    let config = ["config", &url, "--fence-store", &fence];
    let give = |cluster: &Cluster| cluster.run_with(&config, |command| s3.keys(command));
    give(&cluster).failure(1, "is of an earlier release");
    let url = cluster.url();
    let bucket = cluster.directory.join("bucket");
    let bucket = bucket.to_str().unwrap();
    let format = [
        "format",
        &url,
        "other",
        "--bucket",
        bucket,
        "--fence-store",
        &fence,
    ];
    cluster
        .run_with(&format, |command| s3.keys(command))
        .failure(1, "is of an earlier release");
    let status = cluster.status();
    let volumes = status["volumes"].as_array().unwrap();
    assert_eq!(volumes.len(), 1, "nothing was made: {status}");
    cluster.stop_node(older);
    give(&cluster).failure(1, "does not answer");
    cluster.start_node(older);
    give(&cluster).success();
    assert_eq!(cluster.volume("mixed")["fence_store"], fence.as_str());
}

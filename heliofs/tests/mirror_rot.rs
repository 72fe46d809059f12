//! A record of a mirror that rots at rest is found by the node that has it, also by one that does not lead, and whoever looks at
//! the mirror is told.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use support::cluster::Node;
use support::load::Load;
use support::mirror::{assert_mirror_equal, catch_up, mirror_of, wait_for_status};
use support::{Cluster, Relay, wait_for};

const MARKER: &[u8] = b"there is one record that holds these bytes";

/// Flips one bit of one record of a node that does not run.
fn flip(node: &Node) {
    let live = fs::read_to_string(node.data_dir.join("CURRENT_STATE")).unwrap();
    let options = rocksdb::Options::default();
    let families = ["replicated", "local", "default"];
    let path = node.data_dir.join(live.trim());
    let db = rocksdb::DB::open_cf(&options, path, families).unwrap();
    let replicated = db.cf_handle("replicated").unwrap();
    let mut records = db.iterator_cf(replicated, rocksdb::IteratorMode::Start);
    let (key, value, at) = records
        .find_map(|record| {
            let (key, value) = record.unwrap();
            let at = value.windows(MARKER.len()).position(|it| it == MARKER)?;
            Some((key, value, at))
        })
        .unwrap();
    let mut rotten = value.to_vec();
    rotten[at] ^= 1;
    db.put_cf(replicated, &key, rotten).unwrap();
    db.flush_cf(replicated).unwrap();
}

#[test]
fn a_flipped_bit_on_a_follower_is_found_by_itself_and_shown() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file("rots", &[]);
    let mount = source.mount("rots");
    let mut file = File::create(mount.join("file")).unwrap();
    file.write_all(MARKER).unwrap();
    file.sync_all().unwrap();
    drop(file);
    for n in 0..50 {
        fs::write(mount.join(format!("other-{n}")), "x").unwrap();
    }
    let mut mirror = mirror_of(&source, &source.url(), 3, &["--scrub-interval", "500ms"]);
    catch_up(&source, &mirror, "rots");
    let far = mirror.volume_url("rots");
    let status = |mirror: &Cluster| mirror.run(&["mirror", "status", &far, "--json"]);
    let well = status(&mirror).success().json();
    assert_eq!(well[0]["rotten"], serde_json::json!([]), "{well}");

    let leader = mirror.leader();
    let follower = (leader + 1) % 3;
    mirror.stop_node(follower);
    flip(&mirror.nodes[follower]);
    mirror.start_node(follower);
    let found = wait_for("the scrub", Duration::from_secs(60), || {
        let ran = status(&mirror);
        (ran.code == 4).then(|| ran.json()[0].clone())
    });
    let rotten = found["rotten"].as_array().unwrap();
    assert_eq!(rotten.len(), 1, "{found}");
    assert_eq!(rotten[0]["node"], mirror.nodes[follower].id, "{found}");
    assert_eq!(rotten[0]["records_min"], 1, "{found}");
    // The mirror goes on: whoever leads has good records.
    assert_eq!(found["state"], "following", "{found}");
    let plain = mirror.run(&["mirror", "status", &far]);
    let plain = plain.failure(4, "a record of rots is not what was applied");
    let named = format!("node {} at", mirror.nodes[follower].id);
    assert!(plain.out.contains(&named), "{plain:?}");
    // As does a copy that is loaded anew, on every node.
    mirror.run(&["mirror", "reload", &far]).success();
    wait_for("sound records", Duration::from_secs(60), || {
        (status(&mirror).code == 0).then_some(())
    });
    assert_mirror_equal(&source, &mirror, "rots");
    mount.unmount();
}

/// A volume with the record that will rot; the inode that it is of.
fn with_marker(source: &Cluster, volume: &str) -> (support::Mount, u64) {
    source.format_file(volume, &[]);
    let mount = source.mount(volume);
    let mut file = File::create(mount.join("file")).unwrap();
    file.write_all(MARKER).unwrap();
    file.sync_all().unwrap();
    let inode = file.metadata().unwrap().ino();
    (mount, inode)
}

/// The record that differs, and no other.
fn assert_named(found: &serde_json::Value, inode: u64) {
    assert_eq!(found["differ"], 1, "{found}");
    let named = &found["differences"][0];
    let record = format!("extent of inode {inode} at 0");
    assert_eq!(named["record"], record, "{found}");
    assert_eq!(named["how"], "another value", "{found}");
}

#[test]
fn verify_compares_at_one_position_under_load_and_names_what_differs() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    let (mount, inode) = with_marker(&source, "busy");
    let mut mirror = mirror_of(&source, &source.url(), 1, &[]);
    catch_up(&source, &mirror, "busy");
    // From here the mirror is milliseconds away, in each of which the source goes on: luck does not help.
    let link = Relay::start(&mirror.nodes[0].address(), Duration::from_millis(20));
    let far = format!("helio://{}/busy", link.address());
    let verify =
        |mirror: &Cluster| mirror.run(&["mirror", "verify", &far, "--timeout", "30s", "--json"]);
    let seq = |found: &serde_json::Value| {
        let position = found["position"].as_str().unwrap();
        let (_, seq) = position.split_once(':').unwrap();
        seq.parse::<u64>().unwrap()
    };
    let load = Load::start(&mount.path, 8);
    let begun = std::time::Instant::now();
    let mut positions = Vec::new();
    for _ in 0..6 {
        let found = verify(&mirror).success().json();
        assert_eq!(found["differ"], 0, "{found}");
        assert_eq!(found["mirror_position"], found["position"], "{found}");
        assert_eq!(found["index"], found["position"], "{found}");
        assert_eq!(found["index_is"], "compared", "{found}");
        positions.push((begun.elapsed(), seq(&found)));
    }
    let (first, last) = (positions[0], positions[5]);
    let rate = (last.1 - first.1) as f64 / (last.0 - first.0).as_secs_f64();
    assert!(rate > 100.0, "{rate} mutations/s: {positions:?}");
    // What was held goes on while the load does.
    wait_for_status(&mirror, "busy", "a mirror close behind", |status| {
        status["state"] == "following" && status["lag_ms"].as_u64().unwrap() < 2000
    });
    let acknowledged = load.stop();
    assert!(acknowledged.errors.is_empty(), "{:?}", acknowledged.errors);
    catch_up(&source, &mirror, "busy");

    // Rot that no scrub has met yet.
    mirror.stop_node(0);
    flip(&mirror.nodes[0]);
    mirror.start_node(0);
    catch_up(&source, &mirror, "busy");
    let ran = verify(&mirror);
    assert_eq!(ran.code, 2, "{ran:?}");
    let found = ran.json();
    assert_named(&found, inode);
    assert_eq!(found["index"], found["position"], "{found}");
    assert_eq!(found["index_is"], "compared", "{found}");
    mount.unmount();
}

#[test]
fn a_leader_that_finds_its_own_rot_stops_and_verify_names_the_record() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    let (mount, inode) = with_marker(&source, "rots");
    let mut mirror = mirror_of(&source, &source.url(), 1, &["--scrub-interval", "500ms"]);
    catch_up(&source, &mirror, "rots");
    mirror.stop_node(0);
    flip(&mirror.nodes[0]);
    mirror.start_node(0);
    let far = mirror.volume_url("rots");
    let status = wait_for("the mirror's stop", Duration::from_secs(60), || {
        let ran = mirror.run(&["mirror", "status", &far, "--json"]);
        // Somebody's records are rotten, so it does not end with 0.
        let status = (ran.code == 4).then(|| ran.json()[0].clone())?;
        (status["state"] == "stopped" && status["doing"] == "stopped").then_some(status)
    });
    let detail = status["detail"].as_str().unwrap();
    assert!(detail.contains("is not the source's"), "{status}");
    let found = mirror.run(&["mirror", "verify", &far, "--json"]);
    assert_eq!(found.code, 2, "{found:?}");
    let found = found.json();
    let named = found["differences"].as_array().unwrap();
    let record = format!("extent of inode {inode} at 0");
    assert!(named.iter().any(|it| it["record"] == record), "{found}");
    assert_eq!(found["index_is"], "diverged", "{found}");
    assert_eq!(found["index"], status["diverged_at"], "{found}");
    let told = mirror.run(&["mirror", "verify", &far]);
    let index = found["index"].as_str().unwrap();
    let told = told.failure(2, &format!("from position {index} on"));
    assert!(told.out.contains(&record), "{told:?}");
    // It stays stopped: what the source writes now is not applied.
    fs::write(mount.join("later"), "x").unwrap();
    let wait = [
        "mirror",
        "wait",
        &far,
        &support::mirror::token(&source, "rots"),
        "--timeout",
        "3s",
    ];
    mirror.run(&wait).failure(1, "");
    // Until it is loaded anew.
    mirror.run(&["mirror", "reload", &far]).success();
    assert_mirror_equal(&source, &mirror, "rots");
    mount.unmount();
}

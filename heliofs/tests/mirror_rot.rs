//! A record of a mirror that rots at rest is found by the node that has it, also by one that does not lead, and whoever looks at
//! the mirror is told.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::time::Duration;

use support::cluster::Node;
use support::mirror::{assert_mirror_equal, catch_up, mirror_of};
use support::{Cluster, wait_for};

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

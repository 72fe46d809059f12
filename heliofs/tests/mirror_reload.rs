//! A mirror that must load a volume again serves what it has until the new copy is whole, whoever dies meanwhile.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::{RngCore, SeedableRng};
use serde_json::Value;
use support::mirror::{
    assert_mirror_equal, catch_up, give_bucket, mirror_of, mirror_status, tree, wait_complete,
    wait_for_status,
};
use support::{Cluster, Load, Mount, Relay, S3, scratch, wait_for};

const VOLUME: &str = "again";

/// With [`SMALL_BYTES`] more than the link lets through before it is cut, in metadata that can't be packed; and what it lets through
/// is more than one frame of a copy.
const SMALL_FILES: u32 = 1500;
const SMALL_BYTES: usize = 3000;

fn write_synced(path: &Path, bytes: &[u8]) {
    let mut file = File::create_new(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
}

/// Loses the slot, and cuts the link in the middle of the copy that follows from that.
fn break_a_load(source: &Cluster, mirror: &Cluster, link: &Relay) -> Value {
    link.cut_after(3_600_000);
    let url = source.volume_url(VOLUME);
    source.run(&["mirror", "delete", &url, "east"]).success();
    wait_for("the cut", Duration::from_secs(60), || {
        link.is_cut().then_some(())
    });
    wait_for_status(mirror, VOLUME, "a load by halves", |status| {
        status["loading"] == true && status["doing"] != "loading"
    })
}

#[test]
fn a_source_that_dies_while_a_copy_is_loaded_costs_nothing_that_was_there() {
    let (theirs, ours) = (S3::start(), scratch());
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_s3(VOLUME, &theirs, &[]);
    let link = Relay::start(&source.nodes[0].address(), Duration::ZERO);
    let through = format!("helio://{}", link.address());
    let mut mirror = mirror_of(&source, &through, 3, &["--mirror-name", "east"]);
    let mount = source.mount(VOLUME);
    let mut rng = rand::rngs::SmallRng::seed_from_u64(1);
    for n in 0..SMALL_FILES {
        let mut bytes = vec![0; SMALL_BYTES];
        rng.fill_bytes(&mut bytes);
        fs::write(mount.join(format!("small-{n}")), &bytes).unwrap();
    }
    for n in 0..SMALL_FILES {
        let file = File::open(mount.join(format!("small-{n}"))).unwrap();
        file.sync_all().unwrap();
    }
    for n in 0..4 {
        write_synced(&mount.join(format!("large-{n}")), &vec![n; 300_000]);
    }
    catch_up(&source, &mirror, VOLUME);
    let far = mirror.volume_url(VOLUME);
    give_bucket(&mirror, VOLUME, &ours.path().join("bucket"), &[]).success();
    mirror.run(&["mirror", "worker", &far, "--once"]).success();
    wait_complete(&source, &mirror, VOLUME);

    let expected = tree(&mount.path);
    let latest = Mount::of(&mirror, VOLUME, &[]);
    let complete = Mount::of(&mirror, VOLUME, &["--mirror-read", "complete"]);
    assert_eq!(tree(&latest.path), expected);
    assert_eq!(tree(&complete.path), expected);
    let serves = |mirror: &Cluster, expected: &BTreeMap<PathBuf, String>| {
        assert_eq!(&tree(&latest.path), expected);
        assert_eq!(&tree(&complete.path), expected);
        for flags in [&[][..], &["--mirror-read", "complete"]] {
            let fresh = Mount::of(mirror, VOLUME, flags);
            assert_eq!(&tree(&fresh.path), expected, "{flags:?}");
            fresh.unmount();
        }
    };
    // What the mirror must not show before it has all of it.
    write_synced(&mount.join("late"), b"late");
    catch_up(&source, &mirror, VOLUME);
    let expected_late = tree(&mount.path);
    wait_for("the late file", Duration::from_secs(30), || {
        complete.join("late").exists().then_some(())
    });
    let broken = break_a_load(&source, &mirror, &link);
    assert_eq!(broken["loads"], 1, "{broken}");
    assert!(broken["loaded_records"].as_u64().unwrap() > 0, "{broken}");
    write_synced(&mount.join("unseen"), b"unseen");
    serves(&mirror, &expected_late);
    // Whoever leads next goes on serving, and begins anew when the source is back.
    let leader = mirror.leader();
    mirror.kill_node(leader);
    serves(&mirror, &expected_late);
    mirror.start_node(leader);
    link.heal();
    wait_for_status(&mirror, VOLUME, "the new copy", |status| {
        status["loads"].as_u64() > Some(1) && status["doing"] == "following"
    });
    assert_mirror_equal(&source, &mirror, VOLUME);
    let all = tree(&mount.path);
    assert_ne!(all, expected_late);
    wait_for("the new file", Duration::from_secs(30), || {
        let there = |mount: &Mount| mount.join("unseen").exists();
        (there(&latest) && there(&complete)).then_some(())
    });
    serves(&mirror, &all);

    // Again, and this time nobody comes back.
    let broken = break_a_load(&source, &mirror, &link);
    let promote = [
        "mirror",
        "promote",
        &far,
        "--force",
        "--i-know-the-source-is-dead",
        "--json",
    ];
    let promoted = mirror.run(&promote).success().json();
    assert_eq!(promoted["last_position"], broken["applied"], "{promoted}");
    let now = mirror.mount(VOLUME);
    assert_eq!(tree(&now.path), all);
    write_synced(&now.join("new"), &[9; 200_000]);
    assert_eq!(fs::read(latest.join("new")).unwrap(), vec![9; 200_000]);
    mirror.assert_replicas_equal(VOLUME);
    now.unmount();
    latest.unmount();
    complete.unmount();
    mount.unmount();
}

/// What waited for deletion is not known any more after a load; readers may be shown what refers to it all the same.
#[test]
fn gc_after_a_reload_leaves_what_readers_are_still_shown() {
    let buckets = scratch();
    let theirs = buckets.path().join("theirs");
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    let url = source.volume_url(VOLUME);
    let bucket = theirs.to_str().unwrap();
    let format = ["format", &url, "--bucket", bucket, "--deletion-grace", "0s"];
    source.run(&format).success();
    let mirror = mirror_of(&source, &source.url(), 1, &["--mirror-name", "east"]);
    let mount = source.mount(VOLUME);
    write_synced(&mount.join("old"), &[1; 300_000]);
    write_synced(&mount.join("stays"), &[2; 300_000]);
    catch_up(&source, &mirror, VOLUME);
    give_bucket(&mirror, VOLUME, &buckets.path().join("ours"), &[]).success();
    let far = mirror.volume_url(VOLUME);
    mirror.run(&["mirror", "worker", &far, "--once"]).success();
    wait_complete(&source, &mirror, VOLUME);
    let flags = ["--mirror-read", "complete", "--no-bgjob"];
    let complete = Mount::of(&mirror, VOLUME, &flags);
    wait_for("the old file", Duration::from_secs(30), || {
        complete.join("old").exists().then_some(())
    });
    // Nobody copies it, so that nothing later is shown.
    write_synced(&mount.join("new"), &[3; 300_000]);
    fs::remove_file(mount.join("old")).unwrap();
    catch_up(&source, &mirror, VOLUME);
    source.run(&["mirror", "delete", &url, "east"]).success();
    wait_for_status(&mirror, VOLUME, "the new copy", |status| {
        status["loads"].as_u64() > Some(1) && status["doing"] == "following"
    });
    let gc = || {
        mirror
            .run(&["gc", &far, "--delete", "--json"])
            .success()
            .json()
    };
    let found = gc();
    assert_eq!(found["deleted"], 0, "{found}");
    assert_eq!(found["deleting"], 1, "{found}");
    let away = buckets.path().join("away");
    fs::rename(&theirs, &away).unwrap();
    fs::create_dir(&theirs).unwrap();
    let fresh = Mount::of(&mirror, VOLUME, &flags);
    for shown in [&complete, &fresh] {
        assert_eq!(fs::read(shown.join("old")).unwrap(), vec![1; 300_000]);
        // Its name came with a command that needs no object.
        let length = fs::metadata(shown.join("new")).map_or(0, |new| new.len());
        assert_eq!(length, 0);
    }
    fs::remove_dir(&theirs).unwrap();
    fs::rename(&away, &theirs).unwrap();
    // Once nobody is shown it any more it goes, and nothing else does.
    mirror.run(&["mirror", "worker", &far, "--once"]).success();
    wait_complete(&source, &mirror, VOLUME);
    // Freed before the load it is a leak for gc; freed after it, it waits for whoever deletes.
    let cleaner = Mount::of(&mirror, VOLUME, &[]);
    wait_for("its end", Duration::from_secs(30), || {
        (gc()["objects"] == 2).then_some(())
    });
    cleaner.unmount();
    fs::rename(&theirs, &away).unwrap();
    fs::create_dir(&theirs).unwrap();
    let last = Mount::of(&mirror, VOLUME, &flags);
    for (name, byte) in [("stays", 2), ("new", 3)] {
        assert_eq!(fs::read(last.join(name)).unwrap(), vec![byte; 300_000]);
    }
    fs::remove_dir(&theirs).unwrap();
    fs::rename(&away, &theirs).unwrap();
    for mount in [complete, fresh, last, mount] {
        mount.unmount();
    }
}

#[test]
fn a_mirror_that_was_to_be_loaded_anew_when_its_source_died_is_promoted_as_any_other() {
    let mut source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file(VOLUME, &[]);
    let mirror = mirror_of(&source, &source.url(), 1, &[]);
    let mount = source.mount(VOLUME);
    write_synced(&mount.join("file"), b"here");
    let at = catch_up(&source, &mirror, VOLUME);
    mount.unmount();
    source.kill_node(0);
    let far = mirror.volume_url(VOLUME);
    mirror.run(&["mirror", "reload", &far]).success();
    wait_for_status(&mirror, VOLUME, "the order to load", |status| {
        status["state"] == "stopped"
    });
    let promote = ["mirror", "promote", &far, "--force"];
    let promote = [&promote[..], &["--i-know-the-source-is-dead", "--json"]].concat();
    let promoted = mirror.run(&promote).success().json();
    let now = mirror.mount(VOLUME);
    assert_eq!(fs::read(now.join("file")).unwrap(), b"here", "{at}");
    write_synced(&now.join("new"), b"new");
    assert!(
        promoted["first_position"]
            .as_str()
            .unwrap()
            .starts_with("1:")
    );
    now.unmount();
}

#[test]
fn a_mirror_that_can_t_keep_up_with_its_cap_says_so_and_does_not_load_without_end() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file(VOLUME, &[]);
    let mount = source.mount(VOLUME);
    write_synced(&mount.join("first"), b"first");
    let flags = ["--mirror-log-cap", "16K", "--mirror-name", "east"];
    let mut mirror = mirror_of(&source, &source.url(), 1, &flags);
    let load = Load::start(&mount.path, 3);
    let refused = wait_for_status(&mirror, VOLUME, "its giving up", |status| {
        status["doing"] == "refused"
    });
    let why = refused["detail"].as_str().unwrap();
    assert!(why.contains("larger --mirror-log-cap"), "{refused}");
    assert!(why.contains("16384 bytes"), "{refused}");
    assert_eq!(refused["state"], "following", "{refused}");
    // It rests, and serves what it has.
    let loads = refused["loads"].as_u64().unwrap();
    assert!(loads >= 2, "{refused}");
    let seen = mirror.mount(VOLUME);
    assert_eq!(fs::read(seen.join("first")).unwrap(), b"first");
    load.wait_for_more(300, Duration::from_secs(60));
    let later = mirror_status(&mirror, VOLUME).unwrap();
    assert_eq!(later["loads"], loads, "{later}");
    assert_eq!(later["applied"], refused["applied"], "{later}");
    assert_eq!(
        tree(&seen.path).get(Path::new("first")).map(|_| ()),
        Some(())
    );
    // With a larger one it goes on by itself, while the source is written to as before.
    let cap = mirror.flags.iter().position(|flag| flag == "16K").unwrap();
    "64M".clone_into(&mut mirror.flags[cap]);
    mirror.stop_node(0);
    mirror.start_node(0);
    wait_for_status(&mirror, VOLUME, "its following", |status| {
        status["doing"] == "following" && status["loads"].as_u64() > Some(loads)
    });
    load.wait_for_more(300, Duration::from_secs(60));
    let written = load.stop();
    written.assert_no_errors();
    assert_mirror_equal(&source, &mirror, VOLUME);
    let after = mirror_status(&mirror, VOLUME).unwrap();
    assert_eq!(after["loads"], loads + 1, "{after}");
    written.verify(&seen.path);
    seen.unmount();
    mount.unmount();
}

//! A promotion by force tells the truth: what is known to be lost, up to when the source was heard of, and which files have lost
//! their data with the source's bucket; the old source names every lost entry when it comes back.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::mirror::{catch_up, give_bucket, mirror_of, mirror_status, token, wait_for_status};
use support::{Cluster, Load, Mount, Relay, S3, scratch, wait_for};

const VOLUME: &str = "dies";
const EIO: i32 = 5;

/// The number behind the epoch of a position.
fn seq(position: &Value) -> u64 {
    let (_, seq) = position.as_str().unwrap().split_once(':').unwrap();
    seq.trim().parse().unwrap()
}

/// Where the source is.
fn head(source: &Cluster) -> Value {
    token(source, VOLUME).into()
}

fn write_synced(path: &Path, byte: u8, length: usize) {
    let mut file = File::create_new(path).unwrap();
    file.write_all(&vec![byte; length]).unwrap();
    file.sync_all().unwrap();
}

/// The region's machines stop, all at once.
fn kill(source: &mut Cluster, mut mount: Mount) {
    source.kill_node(0);
    mount.process.kill();
}

fn promote(mirror: &Cluster, flags: &[&str]) -> support::Ran {
    let url = mirror.volume_url(VOLUME);
    let mut all = vec!["mirror", "promote", &url, "--force"];
    all.push("--i-know-the-source-is-dead");
    all.extend(flags);
    mirror.run(&all).success()
}

/// The old source comes back; how many of the entries that it exports are at or before `end`. None is left out before.
fn rejoin(source: &mut Cluster, mirror: &Cluster, last: u64, end: u64) -> u64 {
    let entries = exported(source, mirror, last);
    // Started again, it may have ended sessions of those who died with it: these come later.
    let before = entries.iter().filter(|it| seq(&it["position"]) <= end);
    before.count() as u64
}

/// The old source comes back; all entries that it exports, without a gap after `last`.
fn exported(source: &mut Cluster, mirror: &Cluster, last: u64) -> Vec<Value> {
    source.start_node(0);
    let file = source.directory.join("tail.json");
    let said = source.run(&[
        "mirror",
        "rejoin",
        &source.volume_url(VOLUME),
        "--of",
        &mirror.volume_url(VOLUME),
        "--export",
        file.to_str().unwrap(),
        "--json",
    ]);
    let said = said.success().json();
    let tail = fs::read_to_string(file).unwrap();
    let entries: Vec<Value> = tail
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(said["divergent_entries"], entries.len(), "{said}");
    for (entry, number) in entries.iter().zip(last + 1..) {
        assert_eq!(entry["position"], format!("0:{number}"), "{entry}");
    }
    entries
}

#[test]
fn what_a_paused_mirror_had_heard_of_is_counted_exactly() {
    let mut source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file(VOLUME, &[]);
    let mirror = mirror_of(&source, &source.url(), 1, &["--mirror-name", "east"]);
    let mount = source.mount(VOLUME);
    write_synced(&mount.join("before"), 1, 30_000);
    fs::create_dir(mount.join("below")).unwrap();
    write_synced(&mount.join("below/cut"), 2, 30_000);
    catch_up(&source, &mirror, VOLUME);
    let here = source.volume_url(VOLUME);
    source.run(&["mirror", "pause", &here, "east"]).success();
    wait_for_status(&mirror, VOLUME, "the pause", |status| {
        status["doing"] == "paused"
    });
    // What was there before is changed, under its old name and under another one.
    let open = |name: &str| {
        let mut open = File::options();
        open.write(true).open(mount.join(name)).unwrap()
    };
    let mut file = open("before");
    file.write_all(&[9; 20_000]).unwrap();
    file.sync_all().unwrap();
    let file = open("below/cut");
    file.set_len(100).unwrap();
    file.sync_all().unwrap();
    fs::rename(mount.join("below/cut"), mount.join("below/moved")).unwrap();
    let load = Load::start(&mount.path, 2);
    load.wait_for_more(30, Duration::from_secs(60));
    let lost = load.stop();
    lost.assert_no_errors();
    // It takes nothing, and hears how much that is.
    let end = wait_for(
        "the mirror's hearing of all",
        Duration::from_secs(30),
        || {
            let end = head(&source);
            let status = mirror_status(&mirror, VOLUME)?;
            (status["source_head"] == end).then_some(end)
        },
    );
    kill(&mut source, mount);
    let status = mirror_status(&mirror, VOLUME).unwrap();
    let (end, last) = (seq(&end), seq(&status["applied"]));
    let real = end - last;
    assert!(real > 60, "{status}");
    let said = promote(&mirror, &[]);
    let expected = format!("at least {real} entries");
    assert!(said.out.contains(&expected), "{expected}: {}", said.out);
    assert!(said.out.contains("it was last heard of at"), "{}", said.out);
    let tail = exported(&mut source, &mirror, last);
    let before = tail.iter().filter(|it| seq(&it["position"]) <= end);
    assert_eq!(before.count() as u64, real);
    // An overwrite and a truncation say of which files they are: as these are called at the end of the tail.
    let overwrites = |entry: &Value| {
        let files = entry["fields"]["files"].as_array();
        entry["op"] == "commit"
            && files.is_some_and(|files| {
                files
                    .iter()
                    .any(|file| file["path"] == "/before" && file["inode"].is_u64())
            })
    };
    assert!(tail.iter().any(overwrites), "{tail:?}");
    let truncates = |entry: &Value| {
        let fields = &entry["fields"];
        entry["op"] == "set-attr" && fields["path"] == "/below/moved" && fields["size"] == 100
    };
    assert!(tail.iter().any(truncates), "{tail:?}");
    let arrived = |path: &Path| {
        let name = path.file_name().unwrap().to_str().unwrap();
        let directory = format!("/{}", path.parent().unwrap().display());
        let mut entries = tail.iter().map(|entry| &entry["fields"]);
        entries.any(|it| it["new_name"] == name && it["new_parent_path"] == directory.as_str())
    };
    for path in lost.files.keys() {
        assert!(arrived(path), "{}: {tail:?}", path.display());
    }
    let now = mirror.mount(VOLUME);
    assert_eq!(fs::read(now.join("before")).unwrap(), vec![1; 30_000]);
    for path in lost.files.keys() {
        assert!(!now.join(path).exists(), "{} is back", path.display());
    }
    now.unmount();
}

#[test]
fn what_nobody_heard_of_is_not_called_nothing_and_its_files_are_named() {
    let (theirs, ours) = (S3::start(), scratch());
    let mut source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_s3(VOLUME, &theirs, &[]);
    let link = Relay::start(&source.nodes[0].address(), Duration::ZERO);
    let through = format!("helio://{}", link.address());
    let mirror = mirror_of(&source, &through, 1, &[]);
    let mount = source.mount(VOLUME);
    write_synced(&mount.join("copied"), 1, 300_000);
    catch_up(&source, &mirror, VOLUME);
    let far = mirror.volume_url(VOLUME);
    give_bucket(&mirror, VOLUME, &ours.path().join("bucket"), &[]).success();
    mirror.run(&["mirror", "worker", &far, "--once"]).success();
    // Nobody copies what comes now.
    write_synced(&mount.join("there-only"), 2, 300_000);
    catch_up(&source, &mirror, VOLUME);
    let seen = Mount::of(&mirror, VOLUME, &["--no-bgjob", "--io-timeout", "3s"]);
    assert_eq!(fs::read(seen.join("copied")).unwrap(), vec![1; 300_000]);
    let of_source = sessions(&source);
    assert!(!of_source.is_empty());
    // The source goes on, and nobody hears of it.
    link.cut();
    let load = Load::start(&mount.path, 2);
    load.wait_for_more(20, Duration::from_secs(60));
    let lost = load.stop();
    lost.assert_no_errors();
    let end = seq(&head(&source));
    kill(&mut source, mount);
    drop(theirs);
    let said = promote(&mirror, &["--json"]).json();
    let last = seq(&said["last_position"]);
    let known = said["lost_entries_known"].as_u64().unwrap();
    assert_eq!(seq(&said["source_known_up_to"]), last + known, "{said}");
    assert!(said["source_silent_ms"].as_u64().unwrap() > 0, "{said}");
    assert!(said["source_last_heard"].is_string(), "{said}");
    assert!(said["objects_at_source_only"].as_u64().unwrap() > 0);
    assert_eq!(said["incomplete_files"], 1, "{said}");
    let names = serde_json::json!(["/there-only"]);
    assert_eq!(said["incomplete_file_names"], names, "{said}");
    assert!(said["seconds"].as_f64().unwrap() < 30.0, "{said}");
    println!("forced, with the whole region dead: {} s", said["seconds"]);
    // What is here is served, by a mount that was there as well; sessions of the source are over.

    assert_eq!(fs::read(seen.join("copied")).unwrap(), vec![1; 300_000]);
    assert_eq!(seen.join("there-only").metadata().unwrap().len(), 300_000);
    for path in lost.files.keys() {
        assert!(!seen.join(path).exists(), "{} is here", path.display());
    }
    wait_for("the end of old sessions", Duration::from_secs(20), || {
        let left = sessions(&mirror);
        let over = of_source.iter().all(|session| !left.contains(session));
        over.then_some(())
    });
    // What went with the source's bucket fails, and does not hang.
    for _ in 0..2 {
        let began = Instant::now();
        let error = fs::read(seen.join("there-only")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(EIO), "{error}");
        let took = began.elapsed();
        assert!(took < Duration::from_secs(25), "{took:?}");
    }
    let checked = mirror.run(&["fsck", &far]);
    let checked = checked.failure(4, "damaged");
    assert!(checked.out.contains("there-only"), "{}", checked.out);
    assert!(!checked.out.contains("/copied"), "{}", checked.out);
    let now = Mount::of(&mirror, VOLUME, &["--io-timeout", "3s"]);
    write_synced(&now.join("new"), 3, 200_000);
    assert_eq!(fs::read(now.join("new")).unwrap(), vec![3; 200_000]);
    let real = rejoin(&mut source, &mirror, last, end);
    assert_eq!(real, end - last);
    assert!(
        real > 40 && real >= known,
        "{real} of which {known} were known"
    );
    seen.unmount();
    now.unmount();
}

#[test]
fn a_mirror_that_never_heard_of_its_source_says_that_the_loss_is_not_known() {
    let mut source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file(VOLUME, &[]);
    let mut mirror = mirror_of(&source, &source.url(), 1, &[]);
    catch_up(&source, &mirror, VOLUME);
    let mount = source.mount(VOLUME);
    kill(&mut source, mount);
    mirror.stop_node(0);
    mirror.start_node(0);
    wait_for("the mirror", Duration::from_secs(30), || {
        mirror_status(&mirror, VOLUME)
    });
    let said = promote(&mirror, &["--json"]).json();
    assert!(said["lost_entries_known"].is_null(), "{said}");
    assert!(said["source_known_up_to"].is_null(), "{said}");
}

#[test]
#[ignore = "once in three runs its mount stood still and could not be ended: to be looked into"]
fn a_source_that_is_killed_under_load_has_lost_what_is_printed_and_less_than_a_second_s_work_more()
{
    let mut source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file(VOLUME, &[]);
    let mirror = mirror_of(&source, &source.url(), 1, &[]);
    let mut mount = source.mount(VOLUME);
    catch_up(&source, &mirror, VOLUME);
    let load = Load::start(&mount.path, 4);
    load.wait_for_more(20, Duration::from_secs(60));
    let (first, begun) = (seq(&head(&source)), Instant::now());
    load.wait_for_more(100, Duration::from_secs(60));
    let (end, took) = (seq(&head(&source)), begun.elapsed());
    let rate = (end - first) as f64 / took.as_secs_f64();
    // In the midst of it.
    source.kill_node(0);
    mount.process.kill();
    load.stop();
    drop(mount);
    let said = promote(&mirror, &["--json"]).json();
    let last = seq(&said["last_position"]);
    let known = said["lost_entries_known"].as_u64().unwrap();
    assert!(
        last + rate as u64 >= end,
        "{said}: it was at {end}, with the link up"
    );
    let tail = exported(&mut source, &mirror, last);
    let all = tail.len() as u64;
    // Those of mounts; what the source ended by itself when it was started again is no loss.
    let of_mounts = tail.iter().filter(|it| it["session"] != "0000000000000000");
    let of_mounts = of_mounts.count() as u64;
    println!(
        "at least {known} entries were lost, and in truth {of_mounts} of mounts, {all} in all, at {rate:.0} entries/s"
    );
    assert!(known <= all, "{said}: {all} in truth");
    let more = of_mounts.saturating_sub(known);
    assert!(
        more as f64 <= rate,
        "{said}: {of_mounts} in truth, at {rate} entries/s"
    );
}

#[test]
fn all_volumes_are_promoted_by_one_command_and_one_that_fails_keeps_no_other_from_it() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    let mirror = mirror_of(&source, &source.url(), 1, &["--mirror-name", "east"]);
    for volume in ["one", "two", "three"] {
        source.format_file(volume, &[]);
    }
    for volume in ["one", "two", "three"] {
        catch_up(&source, &mirror, volume);
    }
    let two = source.volume_url("two");
    source.run(&["mirror", "pause", &two, "east"]).success();
    wait_for_status(&mirror, "two", "the pause", |status| {
        status["doing"] == "paused"
    });
    let far = mirror.url();
    let ran = mirror.run(&["mirror", "promote", &far, "--json"]);
    let said = ran.json();
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.err.contains("1 of 3 volumes were not promoted"),
        "{ran:?}"
    );
    let of = |volume: &str| {
        let mut each = said.as_array().unwrap().iter();
        each.find(|it| it["volume"] == volume).unwrap().clone()
    };
    for volume in ["one", "three"] {
        let promoted = of(volume);
        assert_eq!(promoted["promoted"], true, "{said}");
        assert_eq!(promoted["lost_entries_known"], 0, "{said}");
        let now = mirror.mount(volume);
        write_synced(&now.join("new"), 1, 9_000);
        now.unmount();
    }
    assert_eq!(of("two")["promoted"], false, "{said}");
    let why = of("two")["error"].as_str().unwrap().to_owned();
    assert!(why.contains("does not follow its source"), "{said}");
    // The others are no mirrors any more: it is tried again alone.
    source.run(&["mirror", "resume", &two, "east"]).success();
    wait_for_status(&mirror, "two", "the mirror", |status| {
        status["doing"] == "following"
    });
    let again = mirror.run(&["mirror", "promote", &far]).success();
    assert!(again.out.contains("two"), "{}", again.out);
    assert!(!again.out.contains("three"), "{}", again.out);
    mirror
        .run(&["mirror", "promote", &far])
        .failure(1, "mirrors no volume");
}

#[test]
fn by_force_all_volumes_come_at_once_and_the_files_that_are_not_complete_are_named() {
    let volumes = ["left", "right"];
    let ours = scratch();
    let mut source = Cluster::with_dirs(1, |_, _| None, &[]);
    for volume in volumes {
        source.format_file(volume, &["--trash-days", "0"]);
    }
    let mirror = mirror_of(&source, &source.url(), 1, &[]);
    for volume in volumes {
        let mut mount = source.mount(volume);
        write_synced(&mount.join("copied"), 1, 300_000);
        catch_up(&source, &mirror, volume);
        give_bucket(&mirror, volume, &ours.path().join(volume), &[]).success();
        let far = mirror.volume_url(volume);
        mirror.run(&["mirror", "worker", &far, "--once"]).success();
        // Nobody copies what comes now.
        let more = if volume == "left" { 3 } else { 30 };
        fs::create_dir(mount.join("dir")).unwrap();
        for n in 0..more {
            write_synced(&mount.join(format!("dir/{volume}-{n:02}")), 2, 90_000);
        }
        write_synced(&mount.join("inline"), 3, 100);
        write_synced(&mount.join("gone"), 4, 300_000);
        fs::remove_file(mount.join("gone")).unwrap();
        write_synced(&mount.join("cut"), 5, 300_000);
        let cut = File::options().write(true).open(mount.join("cut")).unwrap();
        cut.set_len(0).unwrap();
        cut.sync_all().unwrap();
        catch_up(&source, &mirror, volume);
        mount.process.kill();
    }
    source.kill_node(0);
    let began = Instant::now();
    let far = mirror.url();
    let ask = [
        "mirror",
        "promote",
        &far,
        "--force",
        "--i-know-the-source-is-dead",
    ];
    let said = mirror.run(&ask).success().out;
    let took = began.elapsed();
    println!("two volumes by force: {took:?}\n{said}");
    assert!(took < Duration::from_secs(30), "{took:?}");
    assert!(said.contains("3 files are not complete here:"), "{said}");
    assert!(said.contains("30 files are not complete here:"), "{said}");
    let named: Vec<&str> = said
        .lines()
        .filter_map(|line| line.strip_prefix("  /"))
        .collect();
    let mut wanted: Vec<String> = (0..3).map(|n| format!("dir/left-{n:02}")).collect();
    // The first twenty, and where the others are named.
    wanted.extend((0..20).map(|n| format!("dir/right-{n:02}")));
    assert_eq!(named, wanted, "{said}");
    assert!(said.contains("and 10 more: `heliofs fsck`"), "{said}");
    for volume in volumes {
        let rows = said
            .lines()
            .filter(|line| line.starts_with(volume) && line.contains("at least"));
        assert_eq!(rows.count(), 1, "{said}");
        let now = Mount::of(&mirror, volume, &["--no-bgjob"]);
        write_synced(&now.join("new"), 1, 9_000);
        now.unmount();
    }
}

/// Ids of the sessions that a cluster knows.
fn sessions(cluster: &Cluster) -> Vec<String> {
    let status = cluster.status();
    let mounts = status["mounts"].as_array().unwrap().iter();
    mounts
        .map(|mount| mount["session"].as_str().unwrap().to_owned())
        .collect()
}

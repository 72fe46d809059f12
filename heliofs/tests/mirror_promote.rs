//! A mirror becomes the volume: planned without loss, by force when the source is dead; and back again.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use support::cluster::HELIOFS;
use support::mirror::{assert_mirror_equal, catch_up, mirror_of, mirror_status, wait_for_status};
use support::{Clocked, Cluster, Load, Mount, Process, Relay, wait_for};

#[test]
fn a_planned_promotion_loses_nothing_and_can_be_undone_the_same_way() {
    let mut source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file("moves", &["--deletion-grace", "0s"]);
    let mount = source.mount("moves");
    let load = Load::start(&mount.path, 2);
    load.wait_for_more(30, Duration::from_secs(60));
    // One that was mirrored under another name keeps its objects' prefix.
    let flags = ["--mirror-volume", "moves=moved", "--mirror-name", "east"];
    let mut mirror = mirror_of(&source, &source.url(), 1, &flags);
    wait_for_status(&mirror, "moved", "following", |status| {
        status["doing"] == "following"
    });
    load.wait_for_more(30, Duration::from_secs(60));
    let far = mirror.volume_url("moved");
    // Under load.
    let promoted = mirror
        .run(&["mirror", "promote", &far, "--json"])
        .success()
        .json();
    assert_eq!(promoted["lost_entries_known"], 0);
    assert!(promoted["seconds"].as_f64().unwrap() < 5.0, "{promoted}");
    let first = promoted["first_position"].as_str().unwrap().to_owned();
    assert!(first.starts_with("1:"), "{promoted}");
    // The writers learn that they may not write any more.
    wait_for(
        "refusals at the old source",
        Duration::from_secs(30),
        || {
            let refused = File::create(mount.join("late")).err()?;
            (refused.raw_os_error() == Some(30)).then_some(())
        },
    );
    let acknowledged = load.stop();
    assert!(
        acknowledged
            .errors
            .iter()
            .any(|error| error.contains("os error 30")),
        "{:?}",
        acknowledged.errors.first()
    );
    let moved = mirror.mount("moved");
    acknowledged.verify(&moved.path);
    let mut file = File::create(moved.join("new")).unwrap();
    file.write_all(&[5; 100_000]).unwrap();
    file.sync_all().unwrap();
    drop(file);
    fs::create_dir(moved.join("directory")).unwrap();
    mirror.assert_replicas_equal("moved");
    let left = mirror_status(&source, "moves").unwrap();
    assert_eq!(left["doing"], "handed-over", "{left}");
    assert!(
        left["detail"].as_str().unwrap().contains("demoted at"),
        "{left}"
    );
    // A second promotion finds no mirror.
    let again = mirror.run(&["mirror", "promote", &far]);
    assert_ne!(again.code, 0, "{again:?}");
    // Restarted, it stays what it is, though its flags still say what it mirrors.
    moved.unmount();
    mirror.stop_node(0);
    mirror.start_node(0);
    let moved = mirror.mount("moved");
    fs::write(moved.join("after-restart"), "x").unwrap();
    File::open(moved.join("after-restart"))
        .unwrap()
        .sync_all()
        .unwrap();

    // The old source mirrors the new one, from a copy, and takes over again.
    // Its mount holds what it was never told to be stored.
    let mut mount = mount;
    mount.process.kill();
    drop(mount);
    let flags = [
        "--mirror-of",
        &mirror.url(),
        "--mirror-volume",
        "moved=moves",
    ];
    source.flags = flags.map(str::to_owned).to_vec();
    source.stop_node(0);
    source.start_node(0);
    let back = source.volume_url("moves");
    source.run(&["mirror", "reload", &back]).success();
    assert_back(&source, &mirror);
    let returned = source
        .run(&["mirror", "promote", &back, "--json"])
        .success()
        .json();
    assert!(
        returned["first_position"]
            .as_str()
            .unwrap()
            .starts_with("2:"),
        "{returned}"
    );
    let mount = source.mount("moves");
    acknowledged.verify(&mount.path);
    assert_eq!(fs::read(mount.join("new")).unwrap(), vec![5; 100_000]);
    fs::remove_file(mount.join("new")).unwrap();
    fs::write(mount.join("third"), "x").unwrap();
    mount.unmount();
    moved.unmount();
}

/// The old source has the records of the new one.
fn assert_back(source: &Cluster, mirror: &Cluster) {
    let token = mirror
        .run(&["mirror", "token", &mirror.volume_url("moved")])
        .success();
    wait_for_status(source, "moves", "mirroring back", |status| {
        status["doing"] == "following" && status["applied"] == token.out.trim()
    });
    source
        .run(&[
            "mirror",
            "verify",
            &source.volume_url("moves"),
            "--source",
            &mirror.url(),
        ])
        .success();
}

#[test]
fn a_forced_promotion_needs_a_dead_source_and_says_so() {
    let mut source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file("dies", &[]);
    let mount = source.mount("dies");
    let load = Load::start(&mount.path, 2);
    load.wait_for_more(30, Duration::from_secs(60));
    let acknowledged = load.stop();
    let mirror = mirror_of(&source, &source.url(), 3, &[]);
    catch_up(&source, &mirror, "dies");
    assert_mirror_equal(&source, &mirror, "dies");
    let far = mirror.volume_url("dies");
    mirror
        .run(&["mirror", "promote", &far, "--force"])
        .failure(2, "--i-know-the-source-is-dead");
    let force = [
        "mirror",
        "promote",
        &far,
        "--force",
        "--i-know-the-source-is-dead",
        "--json",
    ];
    let alive = mirror.run(&force);
    assert!(alive.err.contains("the source answers"), "{alive:?}");
    let mut mount = mount;
    mount.process.kill();
    source.kill_node(0);
    // Planned, it can't be done without the source.
    let planned = mirror.run(&["mirror", "promote", &far]);
    assert!(planned.err.contains("--force"), "{planned:?}");
    let promoted = mirror.run(&force).success().json();
    assert_eq!(promoted["lost_entries_known"], 0, "{promoted}");
    assert!(promoted["seconds"].as_f64().unwrap() < 30.0, "{promoted}");
    let moved = mirror.mount("dies");
    acknowledged.verify(&moved.path);
    let load = Load::start(&moved.path.join("writer-0"), 2);
    load.wait_for_more(20, Duration::from_secs(60));
    let later = load.stop();
    later.assert_no_errors();
    later.verify(&moved.path.join("writer-0"));
    mirror.assert_replicas_equal("dies");
    moved.unmount();
}

#[test]
fn a_mirror_that_does_not_get_there_is_not_promoted_and_the_source_is_written_again() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file("stays", &["--deletion-grace", "0s"]);
    let mount = source.mount("stays");
    let write = |name: &str| {
        let mut file = File::create(mount.join(name))?;
        file.write_all(name.as_bytes())?;
        file.sync_all()
    };
    write("first").unwrap();
    let relay = Relay::start(&source.nodes[0].address(), Duration::ZERO);
    let far_source = format!("helio://{}", relay.address());
    let mirror = mirror_of(&source, &far_source, 1, &[]);
    let third = mirror_of(&mirror, &mirror.url(), 1, &[]);
    catch_up(&source, &mirror, "stays");
    let (near, far) = (source.volume_url("stays"), mirror.volume_url("stays"));
    wait_for("the mirror's mirror", Duration::from_secs(60), || {
        let token = source.run(&["mirror", "token", &near]).success();
        let url = third.volume_url("stays");
        let ran = third.run(&["mirror", "wait", &url, token.out.trim(), "--timeout", "20s"]);
        (ran.code == 0).then_some(())
    });
    // What is not written at a mirror is not the mirror's to hand over.
    let chained = third.run(&["mirror", "promote", &third.volume_url("stays")]);
    chained.failure(1, "is a mirror of");
    write("after-the-chain").unwrap();

    // Cut off, it can't get the last entries: the source gives up and takes the volume back.
    relay.cut();
    write("not-at-the-mirror").unwrap();
    let promote = ["mirror", "promote", &far, "--source", &near, "--timeout"];
    let token = source.token_file.to_str().unwrap();
    let late = mirror.run(&[&promote[..], &["2s", "--source-token-file", token]].concat());
    late.failure(1, "the source is written again");
    wait_for("the source's next change", Duration::from_secs(30), || {
        write("again").ok()
    });
    let epoch = |region: &Cluster| {
        let volume = region.volume("stays");
        let position = volume["position"].as_str().unwrap();
        let (epoch, _) = position.split_once(':').unwrap();
        epoch.parse::<u32>().unwrap()
    };
    assert_eq!(epoch(&source), 0);

    // Killed in between, the command leaves a source that its own META-URL makes writable.
    let log = source.directory.join("killed.log");
    relay.heal();
    catch_up(&source, &mirror, "stays");
    relay.cut();
    write("not-there-either").unwrap();
    let mut killed = Process::start("promote", &log, Path::new(HELIOFS), |command| {
        let tokens = [&mirror.token_file, &source.token_file];
        command.args(promote).arg("60s");
        command.arg("--token-file").arg(tokens[0]);
        command.arg("--source-token-file").arg(tokens[1]);
    });
    wait_for("the hand-over", Duration::from_secs(30), || {
        let refused = File::create(mount.join("refused")).err()?;
        (refused.raw_os_error() == Some(30)).then_some(())
    });
    killed.kill();
    source.run(&["mirror", "promote", &near]).success();
    wait_for("the source's next change", Duration::from_secs(30), || {
        write("once-more").ok()
    });
    assert_eq!(epoch(&source), 0);
    relay.heal();
    catch_up(&source, &mirror, "stays");
    mirror
        .run(&[&promote[..5], &["--source-token-file", token]].concat())
        .success();
    assert_eq!(epoch(&mirror), 1);
    // Now it is written there, and does not come back by the same command.
    let back = source.run(&["mirror", "promote", &near]);
    back.failure(1, "is written there");
    let moved = mirror.mount("stays");
    for name in [
        "first",
        "after-the-chain",
        "not-at-the-mirror",
        "again",
        "not-there-either",
        "once-more",
    ] {
        assert_eq!(fs::read_to_string(moved.join(name)).unwrap(), name);
    }
    moved.unmount();
    mount.unmount();
}

#[test]
fn a_source_that_lives_on_deletes_nothing_that_the_later_epoch_refers_to() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file("shared", &["--deletion-grace", "0s", "--trash-days", "0"]);
    let mount = source.mount("shared");
    let content = vec![7; 300_000];
    for name in ["kept", "probe"] {
        let mut file = File::create(mount.join(name)).unwrap();
        file.write_all(&content).unwrap();
        file.sync_all().unwrap();
    }
    let relay = Relay::start(&source.nodes[0].address(), Duration::ZERO);
    let far_source = format!("helio://{}", relay.address());
    let mirror = mirror_of(&source, &far_source, 1, &["--mirror-name", "far"]);
    catch_up(&source, &mirror, "shared");
    // Nothing of the source is heard of, though it is alive, and somebody swears that it is dead.
    relay.cut();
    let far = mirror.volume_url("shared");
    let force = [
        "mirror",
        "promote",
        &far,
        "--force",
        "--i-know-the-source-is-dead",
    ];
    mirror.run(&force).success();
    // The source gives up on its mirror, and would delete what its own files do not refer to any more.
    let near = source.volume_url("shared");
    source.run(&["mirror", "delete", &near, "far"]).success();
    fs::remove_file(mount.join("kept")).unwrap();
    wait_for(
        "the mount to meet the epoch",
        Duration::from_secs(60),
        || {
            let log = mount.process.log();
            log.contains("is written in epoch 1 in another region")
                .then_some(())
        },
    );
    let moved = mirror.mount("shared");
    assert!(fs::read(moved.join("kept")).unwrap() == content);
    // Where it is written, what dies is deleted.
    let bucket = source.directory.join("bucket/shared");
    let objects = || {
        let below = fs::read_dir(&bucket)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let groups = below.filter(|path| path.is_dir());
        groups
            .map(|path| fs::read_dir(path).unwrap().count())
            .sum::<usize>()
    };
    let before = objects();
    assert!(before >= 2, "{before}");
    fs::remove_file(moved.join("kept")).unwrap();
    fs::remove_file(moved.join("probe")).unwrap();
    wait_for("deletions", Duration::from_secs(60), || {
        (objects() < before).then_some(())
    });
    moved.unmount();
    mount.unmount();
}

#[test]
fn a_mount_that_follows_takes_changes_once_the_mirror_is_promoted() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file("follows", &[]);
    let here = source.mount("follows");
    fs::write(here.join("old"), vec![3; 50_000]).unwrap();
    File::open(here.join("old")).unwrap().sync_all().unwrap();
    let mirror = mirror_of(&source, &source.url(), 1, &[]);
    catch_up(&source, &mirror, "follows");
    let flags = ["--follow-promotion", "--compact-interval", "500ms"];
    let there = Mount::of(&mirror, "follows", &flags);
    assert_eq!(fs::read(there.join("old")).unwrap(), vec![3; 50_000]);
    let refused = |outcome: std::io::Result<()>| {
        let error = outcome.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(30), "{error}");
    };
    let open = || File::options().write(true).open(there.join("old"));
    refused(fs::write(there.join("new"), "x"));
    refused(fs::create_dir(there.join("directory")));
    refused(fs::rename(there.join("old"), there.join("other")));
    refused(fs::remove_file(there.join("old")));
    refused(open().map(drop));
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    refused(fs::set_permissions(there.join("old"), mode));
    // One that is open stays open.
    let reading = File::open(there.join("old")).unwrap();
    mirror
        .run(&["mirror", "promote", &mirror.volume_url("follows")])
        .success();
    wait_for("the mount's first change", Duration::from_secs(30), || {
        fs::write(there.join("new"), "x").ok()
    });
    let mut file = open().unwrap();
    file.write_all(&[4; 20_000]).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let mut start = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&reading, &mut start, 0).unwrap();
    assert_eq!(start, [4; 4]);
    fs::rename(there.join("old"), there.join("renamed")).unwrap();
    let fresh = mirror.mount("follows");
    assert_eq!(fs::read(fresh.join("new")).unwrap(), b"x");
    let mut content = vec![4; 20_000];
    content.extend(vec![3; 30_000]);
    assert_eq!(fs::read(fresh.join("renamed")).unwrap(), content);
    drop(reading);
    // It does what a mount of a source does in the background, too.
    let sparse = File::create_new(there.join("sparse")).unwrap();
    for length in [3_000_000, 2_500_000] {
        let bytes = vec![8; length];
        std::os::unix::fs::FileExt::write_all_at(&sparse, &bytes, 0).unwrap();
        sparse.sync_all().unwrap();
    }
    drop(sparse);
    wait_for("a compaction", Duration::from_secs(60), || {
        let log = there.process.log();
        log.contains("compacted sparse segments").then_some(())
    });
    assert_eq!(fs::read(there.join("sparse")).unwrap(), vec![8; 3_000_000]);
    fresh.unmount();
    there.unmount();
}

#[test]
fn of_two_who_promote_and_take_back_in_the_same_moment_one_is_refused() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file("both", &[]);
    let mount = source.mount("both");
    // Every question to the other region takes its time: there are moments between them.
    let link = Relay::start(&source.nodes[0].address(), Duration::from_millis(50));
    let through = format!("helio://{}", link.address());
    let mirror = mirror_of(&source, &through, 1, &[]);
    catch_up(&source, &mirror, "both");
    let (near, far) = (source.volume_url("both"), mirror.volume_url("both"));
    let (mut promoted, mut refused) = (0, 0);
    for round in 0..6 {
        wait_for_status(&mirror, "both", "its following", |status| {
            status["doing"] == "following"
        });
        // The other operator does not give up until one of them has it; at last there is none.
        let (one, taken_back) = std::thread::scope(|scope| {
            let one = scope.spawn(|| mirror.run(&["mirror", "promote", &far]));
            let mut taken_back = false;
            while round < 5 && !taken_back && !one.is_finished() {
                taken_back = source.run(&["mirror", "promote", &near]).code == 0;
            }
            (one.join().unwrap(), taken_back)
        });
        let there = mirror.volume("both");
        let is_promoted = there["position"].as_str().unwrap().starts_with("1:");
        assert_eq!(one.code == 0, is_promoted, "{one:?} {there}");
        assert!(!(is_promoted && taken_back), "both were told yes: {one:?}");
        let name = format!("round-{round}");
        let write = || {
            let mut file = File::create_new(mount.join(&name))?;
            file.write_all(b"x")?;
            file.sync_all()
        };
        if is_promoted {
            let written = write();
            assert_eq!(written.unwrap_err().raw_os_error(), Some(30));
            promoted += 1;
            break;
        }
        refused += 1;
        wait_for(
            "the source's next change",
            Duration::from_secs(30),
            || match write() {
                Err(error) if error.raw_os_error() == Some(17) => Some(()),
                other => other.ok(),
            },
        );
        catch_up(&source, &mirror, "both");
    }
    println!("{refused} promotions were refused, {promoted} was not");
    assert_eq!(promoted, 1, "whoever promotes at last must succeed");
    // It is over: nobody takes the volume back.
    let back = source.run(&["mirror", "promote", &near]);
    back.failure(1, "is written there");
    let mut mount = mount;
    mount.process.kill();
}

/// A planned promotion may keep both regions from writing for as long; set, a longer one fails.
const PAUSE_MAX_MS: &str = "HELIOFS_PAUSE_MAX_MS";

#[test]
fn three_nodes_hand_over_to_three_far_away_under_load_and_nothing_is_lost() {
    let source = Cluster::start();
    source.format_file("far", &[]);
    let mount = source.mount("far");
    // A round trip of 100 ms.
    let links: Vec<Relay> = source
        .nodes
        .iter()
        .map(|node| Relay::start(&node.address(), Duration::from_millis(50)))
        .collect();
    let peers: Vec<String> = links.iter().map(Relay::address).collect();
    let through = format!("helio://{}", peers.join(","));
    let mirror = mirror_of(&source, &through, 3, &[]);
    let load = Load::start(&mount.path, 2);
    load.wait_for_more(30, Duration::from_secs(60));
    catch_up(&source, &mirror, "far");
    let there = Mount::of(&mirror, "far", &["--follow-promotion"]);
    let (before, after) = (
        Clocked::start(&mount.path, "source"),
        Clocked::start(&there.path, "mirror"),
    );
    load.wait_for_more(100, Duration::from_secs(60));
    let begun = Instant::now();
    let far = mirror.volume_url("far");
    let promoted = mirror.run(&["mirror", "promote", &far, "--json"]);
    let promoted = promoted.success().json();
    assert_eq!(promoted["lost_entries_known"], 0, "{promoted}");
    wait_for("changes at the mirror", Duration::from_secs(60), || {
        fs::read_dir(&there.path)
            .unwrap()
            .any(|entry| {
                entry
                    .unwrap()
                    .file_name()
                    .to_string_lossy()
                    .starts_with("mirror-")
            })
            .then_some(())
    });
    wait_for("refusals at the source", Duration::from_secs(30), || {
        let refused = File::create(mount.join("late")).err()?;
        (refused.raw_os_error() == Some(30)).then_some(())
    });
    let (before, after, written) = (before.stop(), after.stop(), load.stop());
    let last_here = before.acknowledged.last().unwrap().1;
    let first_there = after.acknowledged.first().unwrap().1;
    assert!(last_here < first_there, "both regions acknowledged");
    assert!(after.others.is_empty(), "{:?}", after.others);
    // What was acknowledged at the source is at the mirror, all of it.
    written.verify(&there.path);
    for (file, _) in before.acknowledged.iter().chain(&after.acknowledged) {
        assert_eq!(fs::read(there.join(file)).unwrap(), file.as_bytes());
    }
    mirror.assert_replicas_equal("far");
    let pause = first_there - last_here;
    println!(
        "planned promotion, three nodes each, 100 ms apart: {} ms without writes, the command took {promoted_seconds} s, {:.1} s until the first write at the mirror",
        pause.as_millis(),
        (first_there - begun).as_secs_f64(),
        promoted_seconds = promoted["seconds"],
    );
    if let Ok(max) = std::env::var(PAUSE_MAX_MS) {
        let max = Duration::from_millis(max.parse().unwrap());
        assert!(pause <= max, "{pause:?} without writes, more than {max:?}");
    }
    there.unmount();
    let mut mount = mount;
    // It holds what it was never told to be stored.
    mount.process.kill();
}

//! Who may write a volume when both regions live and can't hear each other: with a fence store one of them, at any moment;
//! without one nothing of the old history is ever seen in the new.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use heliofs_proto::v1;
use meta_client::{ClusterOptions, MetaUrl};
use mirror_sync::fence::{self, How, marker::Me};
use support::cluster::HELIOFS;
use support::mirror::{catch_up, mirror_of, mirror_status, wait_for_status};
use support::{Clocked, Cluster, Load, Process, Relay, S3, wait_for};

const EROFS: i32 = 30;

/// Whether a file can be created now.
fn refused(root: &Path) -> bool {
    match File::create(root.join("probe")) {
        Ok(_) => false,
        Err(error) => error.raw_os_error() == Some(EROFS),
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

fn s3_relay(s3: &S3) -> Relay {
    Relay::start(s3.url.trim_start_matches("http://"), Duration::ZERO)
}

fn format_fenced(cluster: &Cluster, name: &str, s3: &S3, fence: &str, lease: &str) {
    let bucket = cluster.directory.join("bucket");
    let url = cluster.url();
    let all = [
        "format",
        &url,
        name,
        "--storage",
        "file",
        "--bucket",
        bucket.to_str().unwrap(),
        "--fence-store",
        fence,
        "--fence-lease",
        lease,
    ];
    cluster.run_with(&all, |command| s3.keys(command)).success();
}

#[test]
fn of_two_regions_that_are_cut_apart_only_one_acknowledges() {
    let s3 = S3::start();
    let (to_fence, direct) = (s3_relay(&s3), format!("{}/fence", s3.url));
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    let fence = format!("http://{}/fence", to_fence.address());
    format_fenced(&source, "fenced", &s3, &fence, "2s");
    let link = Relay::start(&source.nodes[0].address(), Duration::ZERO);
    let through = format!("helio://{}", link.address());
    let mirror = mirror_of(&source, &through, 1, &[]);
    catch_up(&source, &mirror, "fenced");
    let far = mirror.volume_url("fenced");
    let here = source.mount("fenced");
    let there = mirror.mount("fenced");
    let before = Clocked::start(&here.path, "source");
    // The mirror has some of it, and then the link is gone.
    wait_for_status(&mirror, "fenced", "entries of the writer", |status| {
        let applied = status["applied"].as_str().unwrap();
        applied
            .split(':')
            .next_back()
            .unwrap()
            .parse::<u64>()
            .unwrap()
            > 60
    });
    link.cut();
    let promote = [
        "mirror",
        "promote",
        &far,
        "--force",
        "--fence-store",
        &direct,
        "--fence-lease",
        "2s",
        "--json",
    ];
    // The source lives, and is not in the fence store's way: it stays the source.
    let alive = mirror.run_with(&promote, |command| s3.keys(command));
    assert_ne!(alive.code, 0, "{alive:?}");
    assert!(alive.err.contains("it is alive"), "{alive:?}");
    // Now the source can reach nobody but its mounts.
    to_fence.cut();
    let after = Clocked::start(&there.path, "mirror");
    let of_source = sessions(&source);
    assert!(!of_source.is_empty());
    let promoted = mirror.run_with(&promote, |command| s3.keys(command));
    let promoted = promoted.success().json();
    assert_eq!(promoted["fenced"], true, "{promoted}");
    assert!(promoted["lease_waited_ms"].as_u64().unwrap() >= 2000);
    assert!(promoted["seconds"].as_f64().unwrap() < 30.0, "{promoted}");
    // A mount of the mirror was made to read only: the new source is mounted to be written.
    let refused_there = after.stop();
    assert_eq!(refused_there.acknowledged.len(), 0);
    let written = mirror.mount("fenced");
    let after = Clocked::start(&written.path, "mirror");
    // Sessions of the source are over long before the time-out of 30 s.
    wait_for(
        "the end of the source's sessions",
        Duration::from_secs(10),
        || {
            let left = sessions(&mirror);
            let over = of_source.iter().all(|session| !left.contains(session));
            over.then_some(())
        },
    );
    std::thread::sleep(Duration::from_secs(3));
    to_fence.heal();
    // Whether it has heard by now or not: it may neither do without its fence store nor take another one.
    let here_url = source.volume_url("fenced");
    let other = format!("{}/other-fence", s3.url);
    for store in ["none", other.as_str()] {
        let config = ["config", &here_url, "--fence-store", store];
        let refused = source.run_with(&config, |command| s3.keys(command));
        assert_eq!(refused.code, 1, "{refused:?}");
        let why = ["has been taken over by the cluster at", "is a mirror"];
        assert!(
            why.iter().any(|why| refused.err.contains(why)),
            "{refused:?}"
        );
    }
    // It hears who has taken over, and that is in its log.
    let told = wait_for_status(&source, "fenced", "the source's demotion", |status| {
        status["state"] == "stopped"
    });
    assert!(
        told["detail"].as_str().unwrap().contains(&mirror.url()),
        "{told}"
    );
    assert!(refused(&here.path), "a superseded source took a change");
    std::thread::sleep(Duration::from_secs(1));
    let (before, after) = (before.stop(), after.stop());
    assert!(after.others.is_empty(), "{:?}", after.others);
    assert!(!before.refused.is_empty() && !after.acknowledged.is_empty());
    let last_here = before.acknowledged.last().unwrap().1;
    let first_there = after.acknowledged.first().unwrap().1;
    assert!(
        last_here < first_there,
        "both regions acknowledged within {:?}",
        last_here - first_there
    );
    // What only the old source has is named, each, and nowhere to be seen.
    link.heal();
    let lost: Vec<&String> = before
        .acknowledged
        .iter()
        .map(|(file, _)| file)
        .filter(|file| !written.join(file.as_str()).exists())
        .collect();
    assert!(!lost.is_empty(), "it wrote while the link was cut");
    drop(here);
    let exported = rejoin(&source, &mirror, "fenced");
    for file in lost {
        assert!(
            exported.contains(&format!("\"{file}\"")),
            "{file} was acknowledged, is lost and is not exported"
        );
    }
    for (file, _) in &after.acknowledged {
        assert_eq!(fs::read(written.join(file)).unwrap(), file.as_bytes());
    }
    assert_eq!(mirror_status(&mirror, "fenced"), None, "it is the source");
}

/// The old source becomes a mirror of the new one; what it exported.
fn rejoin(source: &Cluster, mirror: &Cluster, volume: &str) -> String {
    let file = source.directory.join("tail.json");
    source
        .run(&[
            "mirror",
            "rejoin",
            &source.volume_url(volume),
            "--of",
            &mirror.volume_url(volume),
            "--export",
            file.to_str().unwrap(),
        ])
        .success();
    fs::read_to_string(file).unwrap()
}

#[test]
fn a_fence_store_that_is_away_makes_a_volume_read_only_until_it_is_back() {
    let s3 = S3::start();
    let to_fence = s3_relay(&s3);
    let mut source = Cluster::start();
    let fence = format!("http://{}/fence", to_fence.address());
    format_fenced(&source, "fenced", &s3, &fence, "5s");
    let mount = source.mount("fenced");
    let load = Load::start(&mount.path, 2);
    load.wait_for_more(20, Duration::from_secs(60));
    // The next leader renews the marker before it acknowledges anything, and nobody is refused.
    let leader = source.leader();
    source.kill_node(leader);
    load.wait_for_more(20, Duration::from_secs(60));
    let through_failover = load.stop();
    through_failover.assert_no_errors();
    source.start_node(leader);

    let cut = Instant::now();
    to_fence.cut();
    wait_for("the first refusal", Duration::from_secs(30), || {
        refused(&mount.path).then_some(())
    });
    // A lease, and what a request may take.
    assert!(
        cut.elapsed() < Duration::from_secs(12),
        "{:?}",
        cut.elapsed()
    );
    let told = wait_for("the reason", Duration::from_secs(10), || {
        let told = source.volume("fenced")["read_only_because"].clone();
        told.as_str().map(str::to_owned)
    });
    assert!(told.contains("fence store"), "{told}");
    through_failover.verify(&mount.path);
    // A leader that never held it does not write either.
    let leader = source.leader();
    source.kill_node(leader);
    wait_for(
        "refusals by the next leader",
        Duration::from_secs(60),
        || refused(&mount.path).then_some(()),
    );
    to_fence.heal();
    wait_for("writing again", Duration::from_secs(30), || {
        fs::write(mount.join("again"), "x").ok()
    });
    let load = Load::start(&mount.path.join("writer-0"), 1);
    load.wait_for_more(10, Duration::from_secs(60));
    load.stop().assert_no_errors();
    // Without one it is as any other volume.
    source
        .run(&[
            "config",
            &source.volume_url("fenced"),
            "--fence-store",
            "none",
        ])
        .success();
    to_fence.cut();
    std::thread::sleep(Duration::from_secs(6));
    fs::write(mount.join("unfenced"), "x").unwrap();
}

#[test]
fn a_planned_promotion_hands_the_marker_over_at_once() {
    let s3 = S3::start();
    let mut source = Cluster::with_dirs(1, |_, _| None, &[]);
    let fence = format!("{}/fence", s3.url);
    format_fenced(&source, "fenced", &s3, &fence, "10s");
    // The marker of another volume of this name is not taken.
    let other = Cluster::with_dirs(1, |_, _| None, &[]);
    let bucket = other.directory.join("bucket");
    let url = other.url();
    let all = [
        "format",
        &url,
        "fenced",
        "--bucket",
        bucket.to_str().unwrap(),
        "--fence-store",
        &fence,
    ];
    let taken = other.run_with(&all, |command| s3.keys(command));
    assert!(taken.err.contains("has taken over already"), "{taken:?}");
    let mirror = mirror_of(&source, &source.url(), 1, &[]);
    catch_up(&source, &mirror, "fenced");
    let here = source.mount("fenced");
    let load = Load::start(&here.path, 2);
    load.wait_for_more(20, Duration::from_secs(60));
    let far = mirror.volume_url("fenced");
    let promoted = mirror.run(&["mirror", "promote", &far, "--json"]);
    let promoted = promoted.success().json();
    assert_eq!(promoted["fenced"], true, "{promoted}");
    assert!(promoted["seconds"].as_f64().unwrap() < 5.0, "{promoted}");
    wait_for("a refusal", Duration::from_secs(30), || {
        refused(&here.path).then_some(())
    });
    let acknowledged = load.stop();
    let there = mirror.mount("fenced");
    acknowledged.verify(&there.path);
    fs::write(there.join("new"), "x").unwrap();
    assert_eq!(mirror.volume("fenced")["fence_store"], fence.as_str());
    drop(here);
    // And back again.
    let flags = ["--mirror-of", &mirror.url()];
    source.flags = flags.map(str::to_owned).to_vec();
    source.stop_node(0);
    source.start_node(0);
    let back = source.volume_url("fenced");
    source.run(&["mirror", "reload", &back]).success();
    catch_up(&mirror, &source, "fenced");
    let returned = source.run(&["mirror", "promote", &back, "--json"]);
    assert_eq!(returned.success().json()["fenced"], true);
    let here = source.mount("fenced");
    wait_for(
        "writing at the first source",
        Duration::from_secs(30),
        || fs::write(here.join("third"), "x").ok(),
    );
    assert!(refused(&there.path));
}

/// How the library asks a cluster.
fn ask(cluster: &Cluster) -> meta_client::Cluster {
    let url: MetaUrl = cluster.url().parse().unwrap();
    let token = fs::read_to_string(&cluster.token_file).unwrap();
    let token = meta_client::Token::new(token.trim()).unwrap();
    meta_client::Cluster::new(url.peers, token, ClusterOptions::default())
}

/// The part of a promotion that comes right before the last: the marker names the mirror.
fn take_marker_for(mirror: &Cluster, source: &Cluster, volume: &str, epoch: u32) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let record: v1::Volume = ask(source).get_volume(volume).await.unwrap();
        let store = record.fence.clone().unwrap();
        let register = fence::open(&store, fence::prefix(&record)).unwrap();
        let me = Me {
            volume: record.id,
            cluster: ask(mirror).status().await.unwrap().cluster_id,
            epoch,
        };
        let lease = fence::lease(&store);
        let url = mirror.url();
        let taken = fence::take_over(&register, me, &url, lease, How::Demoted);
        taken.await.unwrap();
    });
}

#[test]
fn a_planned_promotion_that_came_to_nothing_is_undone_with_or_without_the_marker() {
    let s3 = S3::start();
    let mut source = Cluster::with_dirs(1, |_, _| None, &[]);
    let store = format!("{}/fence", s3.url);
    format_fenced(&source, "fenced", &s3, &store, "2s");
    let link = Relay::start(&source.nodes[0].address(), Duration::ZERO);
    let through = format!("helio://{}", link.address());
    let mut mirror = mirror_of(&source, &through, 1, &["--mirror-name", "east"]);
    let here = source.mount("fenced");
    let write = |name: &str| {
        let mut file = File::create_new(here.join(name))?;
        file.write_all(name.as_bytes())?;
        file.sync_all()
    };
    let writes_again = |name: &str| {
        wait_for("the source's next change", Duration::from_secs(30), || {
            // Of one that was refused for the moment the name may be there.
            write(name)
                .ok()
                .or_else(|| fs::remove_file(here.join(name)).ok().and(None))
        });
    };
    write("first").unwrap();
    catch_up(&source, &mirror, "fenced");
    let (near, far) = (source.volume_url("fenced"), mirror.volume_url("fenced"));
    let epoch = |region: &Cluster| {
        let volume = region.volume("fenced");
        let (epoch, _) = volume["position"]
            .as_str()
            .unwrap()
            .split_once(':')
            .unwrap();
        epoch.parse::<u32>().unwrap()
    };
    let promote = ["mirror", "promote", &far, "--source", &near, "--timeout"];
    let source_token = source.token_file.to_str().unwrap().to_owned();

    let follows = |mirror: &Cluster| {
        wait_for_status(mirror, "fenced", "its following", |status| {
            status["doing"] == "following"
        });
    };
    // The mirror does not get there, and has not touched the marker: the same epoch goes on under it.
    follows(&mirror);
    link.cut();
    write("not-at-the-mirror").unwrap();
    let late = [&promote[..], &["2s", "--source-token-file", &source_token]].concat();
    let late = mirror.run_with(&late, |command| s3.keys(command));
    late.failure(1, "the source is written again");
    writes_again("after-the-first");
    assert_eq!(epoch(&source), 0);
    link.heal();
    catch_up(&source, &mirror, "fenced");

    // It has taken the marker, and then everything stops.
    follows(&mirror);
    link.cut();
    write("not-there-either").unwrap();
    let log = source.directory.join("killed.log");
    let mut killed = Process::start("promote", &log, Path::new(HELIOFS), |command| {
        command.args(promote).arg("60s");
        command.arg("--token-file").arg(&mirror.token_file);
        command.arg("--source-token-file").arg(&source.token_file);
        s3.keys(command);
    });
    wait_for("the hand-over", Duration::from_secs(30), || {
        refused(&here.path).then_some(())
    });
    killed.kill();
    take_marker_for(&mirror, &source, "fenced", 1);
    let back = ["mirror", "promote", &near];
    // From a mirror that nobody can ask, nothing is taken.
    mirror.stop_node(0);
    let nobody = source.run_with(&back, |command| s3.keys(command));
    assert_ne!(nobody.code, 0, "{nobody:?}");
    assert!(refused(&here.path));
    mirror.start_node(0);
    source.run_with(&back, |command| s3.keys(command)).success();
    // Behind the epoch that the mirror may believe in.
    assert_eq!(epoch(&source), 2);
    writes_again("after-the-second");

    // The mirror has not met that epoch, and hears of it: paused, it takes nothing.
    source.run(&["mirror", "pause", &near, "east"]).success();
    mirror.stop_node(0);
    link.heal();
    mirror.start_node(0);
    let paused = wait_for_status(&mirror, "fenced", "the source's epoch", |status| {
        let head = status["source_head"].as_str();
        status["doing"] == "paused" && head.is_some_and(|head| head.starts_with("2:"))
    });
    assert!(
        paused["applied"].as_str().unwrap().starts_with("0:"),
        "{paused}"
    );
    // By force, and without the marker, which would tell: never in an epoch that is the source's.
    source.kill_node(0);
    let force = ["--force", "--i-know-the-source-is-dead", "--json"];
    let promoted = mirror.run(&[&["mirror", "promote", &far], &force[..]].concat());
    let promoted = promoted.success().json();
    assert_eq!(promoted["last_position"], paused["applied"], "{promoted}");
    let first = promoted["first_position"].as_str().unwrap();
    assert!(first.starts_with("3:"), "{promoted}");
    let there = mirror.mount("fenced");
    assert_eq!(fs::read(there.join("first")).unwrap(), b"first");
    assert!(!there.join("after-the-second").exists());
    fs::write(there.join("new"), "x").unwrap();
    there.unmount();
    drop(here);
}

#[test]
fn without_a_fence_store_each_divergent_change_is_exported_and_none_is_merged() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file("parts", &[]);
    let link = Relay::start(&source.nodes[0].address(), Duration::ZERO);
    let through = format!("helio://{}", link.address());
    let mirror = mirror_of(&source, &through, 1, &[]);
    catch_up(&source, &mirror, "parts");
    let here = source.mount("parts");
    fs::write(here.join("shared"), "before").unwrap();
    File::open(here.join("shared")).unwrap().sync_all().unwrap();
    catch_up(&source, &mirror, "parts");
    link.cut();
    let far = mirror.volume_url("parts");
    mirror
        .run(&[
            "mirror",
            "promote",
            &far,
            "--force",
            "--i-know-the-source-is-dead",
        ])
        .success();
    let there = mirror.mount("parts");
    let (one, two) = (
        Clocked::start(&here.path, "old"),
        Clocked::start(&there.path, "new"),
    );
    std::thread::sleep(Duration::from_secs(2));
    let (one, two) = (one.stop(), two.stop());
    assert!(one.acknowledged.len() > 5 && two.acknowledged.len() > 5);
    link.heal();
    drop(here);
    let exported = rejoin(&source, &mirror, "parts");
    for (file, _) in &one.acknowledged {
        assert!(exported.contains(&format!("\"{file}\"")), "{file}");
        assert!(!there.join(file).exists(), "{file} was merged");
    }
    for (file, _) in &two.acknowledged {
        assert!(!exported.contains(&format!("\"{file}\"")), "{file}");
        assert_eq!(fs::read(there.join(file)).unwrap(), file.as_bytes());
    }
    assert_eq!(fs::read(there.join("shared")).unwrap(), b"before");
}

/// Whoever changes the fence store leaves nothing behind that a mirror could be promoted by, and the mirror learns of it.
#[test]
fn a_fence_store_that_was_changed_fences_no_more() {
    let s3 = S3::start();
    let mut source = Cluster::with_dirs(1, |_, _| None, &[]);
    let (first, second) = (format!("{}/fence", s3.url), format!("{}/fence-two", s3.url));
    format_fenced(&source, "fenced", &s3, &first, "2s");
    let link = Relay::start(&source.nodes[0].address(), Duration::ZERO);
    let through = format!("helio://{}", link.address());
    let mirror = mirror_of(&source, &through, 1, &[]);
    catch_up(&source, &mirror, "fenced");
    assert_eq!(mirror.volume("fenced")["fence_store"], first.as_str());
    let here = source.mount("fenced");
    let load = Load::start(&here.path, 1);
    load.wait_for_more(5, Duration::from_secs(60));
    let change = |cluster: &Cluster, store: &str| {
        let url = cluster.volume_url("fenced");
        let config = [
            "config",
            &url,
            "--fence-store",
            store,
            "--fence-lease",
            "2s",
        ];
        let ran = cluster.run_with(&config, |command| s3.keys(command));
        ran.success();
    };
    change(&source, &second);
    // It is written again as soon as the new marker is kept.
    wait_for("writing", Duration::from_secs(30), || {
        fs::write(here.join("changed"), "x").ok()
    });
    let known = |store: Option<&str>| {
        wait_for(
            "the mirror's hearing of it",
            Duration::from_secs(30),
            || {
                let volume = mirror.volume("fenced");
                (volume["fence_store"].as_str() == store).then_some(())
            },
        );
    };
    known(Some(&second));
    change(&source, "none");
    known(None);
    change(&source, &second);
    known(Some(&second));
    load.stop();
    catch_up(&source, &mirror, "fenced");
    // Somebody who believes in the first one, while the source lives on.
    link.cut();
    let far = mirror.volume_url("fenced");
    let promote = ["mirror", "promote", &far, "--force", "--json"];
    let mut by_first = promote.to_vec();
    by_first.extend(["--fence-store", &first, "--fence-lease", "2s"]);
    let refused = mirror.run_with(&by_first, |command| s3.keys(command));
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.err.contains("there is no marker"), "{refused:?}");
    fs::write(here.join("still"), "x").unwrap();
    // By the one that it has, once the source is dead.
    source.kill_node(0);
    drop(here);
    let promoted = mirror.run(&promote).success().json();
    assert_eq!(promoted["fenced"], true, "{promoted}");
    let there = mirror.mount("fenced");
    fs::write(there.join("new"), "x").unwrap();
    // What was given up can be used again.
    change(&mirror, &first);
    wait_for("writing", Duration::from_secs(30), || {
        fs::write(there.join("again"), "x").ok()
    });
    there.unmount();
}

/// Data that waits under a write lease while the fence store is away is kept, and so is the lease: whoever looks at the file
/// waits for it, and does not see the file without it.
#[test]
fn a_lease_is_not_returned_without_its_data_while_the_volume_is_read_only() {
    let s3 = S3::start();
    let to_fence = s3_relay(&s3);
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    let fence = format!("http://{}/fence", to_fence.address());
    format_fenced(&source, "fenced", &s3, &fence, "2s");
    let never = ["--flush-age", "60s"];
    let (one, two) = (
        support::Mount::of(&source, "fenced", &never),
        support::Mount::of(&source, "fenced", &never),
    );
    let content = vec![6; 200_000];
    fs::write(one.join("kept"), &content).unwrap();
    to_fence.cut();
    wait_for("the first refusal", Duration::from_secs(30), || {
        refused(&two.path).then_some(())
    });
    let path = two.join("kept");
    let reader = std::thread::spawn(move || (fs::read(path), Instant::now()));
    // Longer than a flush that is refused takes, and shorter than anybody gives up.
    std::thread::sleep(Duration::from_secs(5));
    assert!(!reader.is_finished(), "it saw the file without its data");
    let healed = Instant::now();
    to_fence.heal();
    let (read, at) = reader.join().unwrap();
    assert!(read.unwrap() == content, "it saw something else");
    assert!(at > healed);
    let file = File::open(one.join("kept")).unwrap();
    file.sync_all().unwrap();
    assert_eq!(fs::read(one.join("kept")).unwrap(), content);
}

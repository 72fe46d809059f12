//! A mirror cluster follows its source: whatever is killed, cut or far behind, its records are the source's, and it is read-only.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{self, command::Op};
use meta_client::{ClientError, MetaUrl, Session, SessionOptions, Token};
use rand::{Rng, SeedableRng};
use support::mirror::{
    assert_mirror_equal, catch_up, mirror_of, mirror_status, tree, wait_for_status,
};
use support::{Cluster, Load, Relay, S3, wait_for};

#[test]
fn nodes_killed_on_both_sides_cost_no_entry() {
    let s3 = S3::start();
    let mut source = Cluster::start();
    source.format_s3("load", &s3, &[]);
    let mount = source.mount("load");
    let load = Load::start(&mount.path, 3);
    load.wait_for_more(30, Duration::from_secs(60));
    // It begins while the source goes on writing.
    let mut mirror = mirror_of(&source, &source.url(), 3, &[]);
    // Nodes of the mirror are still joining: the first attempt may be broken off.
    let begun = wait_for_status(&mirror, "load", "the first load", |status| {
        status["state"] == "following"
    });
    let seen = mirror.mount("load");
    for round in 0..2 {
        load.wait_for_more(20, Duration::from_secs(30));
        let leader = mirror.leader();
        mirror.kill_node(leader);
        load.wait_for_more(20, Duration::from_secs(30));
        mirror.start_node(leader);
        let leader = source.leader();
        source.kill_node(leader);
        load.wait_for_more(20, Duration::from_secs(30));
        source.start_node(leader);
        if round == 1 {
            for node in 0..3 {
                mirror.stop_node(node);
            }
            load.wait_for_more(20, Duration::from_secs(30));
            for node in 0..3 {
                mirror.spawn_node(node);
            }
        }
    }
    let acknowledged = load.stop();
    acknowledged.assert_no_errors();
    assert_mirror_equal(&source, &mirror, "load");
    let status = mirror_status(&mirror, "load").unwrap();
    assert_eq!(
        status["loads"], begun["loads"],
        "nothing was worth loading anew: {status}"
    );
    // A mount that was there all the time, and one that begins now.
    acknowledged.verify(&seen.path);
    seen.unmount();
    let fresh = mirror.mount("load");
    acknowledged.verify(&fresh.path);
    assert_eq!(tree(&fresh.path), tree(&mount.path));
    fresh.unmount();
    mount.unmount();
}

/// One of each kind that a client can ask for.
fn mutations(file: Ino) -> Vec<Op> {
    let name = || bytes::Bytes::from_static(b"file");
    vec![
        Op::Create(v1::Create {
            parent: 1,
            name: "new".into(),
            kind: v1::FileKind::File.into(),
            mode: 0o600,
            ..Default::default()
        }),
        Op::Link(v1::Link {
            ino: file.0,
            parent: 1,
            name: "link".into(),
        }),
        Op::Unlink(v1::Unlink {
            parent: 1,
            name: name(),
            directory: false,
        }),
        Op::Rename(v1::Rename {
            parent: 1,
            name: name(),
            new_parent: 1,
            new_name: "other".into(),
            ..Default::default()
        }),
        Op::SetAttr(v1::SetAttr {
            ino: file.0,
            mode: Some(0o600),
            ..Default::default()
        }),
        Op::SetXattr(v1::SetXattr {
            ino: file.0,
            name: "user.x".into(),
            value: "x".into(),
            ..Default::default()
        }),
        Op::RemoveXattr(v1::RemoveXattr {
            ino: file.0,
            name: "user.x".into(),
        }),
        Op::Commit(v1::Commit {
            files: vec![v1::FileCommit {
                ino: file.0,
                size_min: 9,
                ..Default::default()
            }],
            ..Default::default()
        }),
        Op::Fallocate(v1::Fallocate {
            ino: file.0,
            length: 4096,
            ..Default::default()
        }),
        Op::CopyRange(v1::CopyRange {
            source: file.0,
            target: file.0,
            target_offset: 4096,
            length: 4,
            ..Default::default()
        }),
        Op::SegmentsAllocate(v1::SegmentsAllocate { count: 256 }),
        Op::RemoveTree(v1::RemoveTree {
            parent: 1,
            name: "dir".into(),
        }),
    ]
}

#[test]
fn every_kind_of_write_is_refused_by_the_kernel_and_by_the_server() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file("quiet", &[]);
    let mount = source.mount("quiet");
    fs::write(mount.join("file"), "text").unwrap();
    fs::create_dir(mount.join("dir")).unwrap();
    fs::write(mount.join("dir/inner"), vec![b'x'; 50_000]).unwrap();
    File::open(mount.join("dir/inner"))
        .unwrap()
        .sync_all()
        .unwrap();
    File::open(mount.join("file")).unwrap().sync_all().unwrap();
    let mirror = mirror_of(
        &source,
        &source.url(),
        1,
        &["--mirror-volume", "quiet=far-away"],
    );
    let token = source.run(&["mirror", "token", &source.volume_url("quiet")]);
    let token = token.success().out.trim().to_owned();
    wait_for_status(&mirror, "far-away", "the mirror", |status| {
        status["applied"] == token.as_str() && status["state"] == "following"
    });
    let seen = mirror.mount("far-away");
    assert_eq!(fs::read_to_string(seen.join("file")).unwrap(), "text");

    let refused = |what: &str, outcome: std::io::Result<()>| {
        let error = outcome.expect_err(what).raw_os_error();
        assert_eq!(error, Some(30), "{what}");
    };
    refused("create", File::create(seen.join("new")).map(drop));
    refused("write", fs::write(seen.join("file"), "x"));
    refused("mkdir", fs::create_dir(seen.join("new")));
    refused("unlink", fs::remove_file(seen.join("file")));
    refused("rmdir", fs::remove_dir(seen.join("dir")));
    refused("rename", fs::rename(seen.join("file"), seen.join("b")));
    refused("link", fs::hard_link(seen.join("file"), seen.join("b")));
    refused("symlink", symlink("x", seen.join("b")));
    let mode = fs::Permissions::from_mode(0o600);
    refused("chmod", fs::set_permissions(seen.join("file"), mode));
    let append = File::options().append(true).open(seen.join("file"));
    refused("append", append.map(drop));
    let rmr = mirror.run(&["rmr", seen.join("dir").to_str().unwrap()]);
    assert_ne!(rmr.code, 0, "{rmr:?}");
    let url = mirror.volume_url("far-away");
    let config = mirror.run(&["config", &url, "--capacity", "1G"]);
    config.failure(1, "is a mirror");
    // What would delete objects by what the mirror knows.
    for command in ["gc", "compact"] {
        mirror.run(&[command, &url]).failure(1, "is a mirror");
    }
    let repair = mirror.run(&["fsck", &url, "--repair"]);
    repair.failure(1, "is a mirror");
    mirror.run(&["fsck", &url]).success();

    // Past the kernel.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let url: MetaUrl = mirror.volume_url("far-away").parse().unwrap();
        let token = Token::from_file(&mirror.token_file).unwrap();
        let cluster = meta_client::Cluster::from_url(&url, token);
        let session = Session::attach(
            cluster,
            SessionOptions {
                volume: "far-away".to_owned(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
        assert!(session.welcome().mirror);
        let (file, _) = session
            .lookup(Ino::ROOT, bytes::Bytes::from_static(b"file"))
            .await
            .unwrap();
        for op in mutations(Ino(file.ino)) {
            let refused = session.mutate(v1::Caller::default(), op.clone()).await;
            let read_only = ClientError::Verdict(FsError::ReadOnly);
            assert_eq!(refused.expect_err("a mirror changed"), read_only, "{op:?}");
        }
        session.detach().await;
    });
    let status = mirror_status(&mirror, "far-away").unwrap();
    assert_eq!(status["applied"], token.as_str(), "nothing took a position");
    // The mirror itself proposed nothing: its records are still the source's.
    let verify = mirror.run(&[
        "mirror",
        "verify",
        &url,
        "--source",
        &source.url(),
        "--json",
    ]);
    assert_eq!(verify.success().json()["differ"], 0);
    seen.unmount();
    // Destroying a mirror leaves the source and its objects alone. It is mirrored again, since the nodes are told to.
    mirror.run(&["destroy", &url, "--yes"]).success();
    wait_for_status(&mirror, "far-away", "another mirror", |status| {
        status["applied"] == token.as_str() && status["doing"] == "following"
    });
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    let fresh = source.mount("quiet");
    assert_eq!(fs::read(fresh.join("dir/inner")).unwrap(), [b'x'; 50_000]);
    fresh.unmount();
    mount.unmount();
}

#[test]
fn a_cut_link_shows_in_the_lag_and_costs_nothing_but_time() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file("cut", &[]);
    let mount = source.mount("cut");
    let relay = Relay::start(&source.nodes[0].address(), Duration::from_millis(25));
    let url = format!("helio://{}", relay.address());
    let mut mirror = mirror_of(&source, &url, 1, &[]);
    wait_for_status(&mirror, "cut", "the first load", |status| {
        status["doing"] == "following"
    });
    // An idle source is known to be idle.
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        let status = mirror_status(&mirror, "cut").unwrap();
        assert!(status["lag_ms"].as_u64().unwrap() < 2500, "{status}");
    }
    let load = Load::start(&mount.path, 2);
    load.wait_for_more(20, Duration::from_secs(30));
    let cut_at = Instant::now();
    relay.cut();
    let during = wait_for_status(&mirror, "cut", "noticing the cut", |status| {
        status["doing"] == "cut-off"
    });
    let cut_for = u64::try_from(cut_at.elapsed().as_millis()).unwrap();
    let lag = during["lag_ms"].as_u64().unwrap();
    assert!(
        lag + 1500 >= cut_for,
        "{lag} ms after {cut_for} ms: {during}"
    );
    // Also when whoever leads the mirror has never heard of the source.
    mirror.stop_node(0);
    mirror.start_node(0);
    let during = wait_for_status(&mirror, "cut", "trying again", |status| {
        status["doing"] == "retrying"
    });
    let lag = during["lag_ms"].as_u64().unwrap();
    assert!(
        lag + 1500 >= cut_for,
        "{lag} ms after {cut_for} ms: {during}"
    );
    load.wait_for_more(20, Duration::from_secs(30));
    wait_for("tries during the cut", Duration::from_secs(30), || {
        (relay.refused() > 0).then_some(())
    });
    relay.heal();
    load.wait_for_more(20, Duration::from_secs(30));
    load.stop().assert_no_errors();
    assert_mirror_equal(&source, &mirror, "cut");
    let after = wait_for_status(&mirror, "cut", "a small lag", |status| {
        status["doing"] == "following" && status["lag_ms"].as_u64() < Some(2500)
    });
    assert_eq!(after["loads"], 1, "{after}");
    assert!(after["diverged_at"].is_null(), "{after}");
    mount.unmount();
}

#[test]
fn a_mirror_that_was_away_past_its_cap_loads_anew_and_one_that_was_not_does_not() {
    let settings = support::scratch();
    let config = settings.path().join("meta.toml");
    let text = "[log]\nentries_min = 50\nentries_max = 100\nbytes_max = \"200K\"\n";
    fs::write(&config, text).unwrap();
    let mut source = Cluster::with_dirs(1, |_, _| None, &["--config", config.to_str().unwrap()]);
    source.format_file("away", &[]);
    let mount = source.mount("away");
    fs::write(mount.join("first"), "x").unwrap();
    let flags = ["--mirror-log-cap", "1M", "--mirror-name", "east"];
    let mut mirror = mirror_of(&source, &source.url(), 1, &flags);
    catch_up(&source, &mirror, "away");
    let slots = |source: &Cluster| {
        let ran = source.run(&["mirror", "list", &source.volume_url("away"), "--json"]);
        ran.success().json()[0].clone()
    };
    let purged = |source: &Cluster| {
        let status = source.run(&["raft", "status", &source.url(), "--json"]);
        status.success().json()["nodes"][0]["purged_index"].as_u64()
    };
    let write = |name: &str, files: u32| {
        for n in 0..files {
            let mut file = File::create(mount.join(format!("{name}-{n}"))).unwrap();
            file.write_all(&[7; 900]).unwrap();
            file.sync_all().unwrap();
        }
    };
    // Within the cap: the log is kept far above its own caps.
    mirror.stop_node(0);
    let before = purged(&source);
    write("kept", 250);
    std::thread::sleep(Duration::from_secs(5));
    let kept = slots(&source);
    assert_eq!(kept["state"], "kept", "{kept}");
    assert!(kept["log_bytes"].as_u64().unwrap() > 200_000, "{kept}");
    source.stop_node(0);
    source.start_node(0);
    mirror.start_node(0);
    assert_mirror_equal(&source, &mirror, "away");
    assert_eq!(mirror_status(&mirror, "away").unwrap()["loads"], 1);
    // The log goes once it is not needed.
    wait_for("trimming", Duration::from_secs(30), || {
        (purged(&source) > before).then_some(())
    });
    // Past it.
    mirror.stop_node(0);
    write("lost", 1200);
    let lost = wait_for("giving the slot up", Duration::from_secs(30), || {
        Some(slots(&source)).filter(|slot| slot["state"] == "invalid")
    });
    assert!(
        lost["why"].as_str().unwrap().contains("bytes of log"),
        "{lost}"
    );
    mirror.start_node(0);
    assert_mirror_equal(&source, &mirror, "away");
    assert_eq!(mirror_status(&mirror, "away").unwrap()["loads"], 2);
    assert_eq!(slots(&source)["state"], "kept");
    // By hand.
    mirror
        .run(&["mirror", "reload", &mirror.volume_url("away")])
        .success();
    wait_for_status(&mirror, "away", "another load", |status| {
        status["loads"].as_u64() > Some(2) && status["doing"] == "following"
    });
    assert_mirror_equal(&source, &mirror, "away");
    mount.unmount();
}

#[test]
fn a_paused_mirror_waits_and_goes_on() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file("pause", &[]);
    let mount = source.mount("pause");
    let mirror = mirror_of(&source, &source.url(), 1, &["--mirror-name", "west"]);
    catch_up(&source, &mirror, "pause");
    let url = source.volume_url("pause");
    source.run(&["mirror", "pause", &url, "west"]).success();
    let paused = wait_for_status(&mirror, "pause", "the pause", |status| {
        status["doing"] == "paused"
    });
    fs::write(mount.join("file"), "x").unwrap();
    File::open(mount.join("file")).unwrap().sync_all().unwrap();
    let token = source.run(&["mirror", "token", &url]).success();
    let far = mirror.volume_url("pause");
    mirror
        .run(&["mirror", "wait", &far, token.out.trim(), "--timeout", "2s"])
        .failure(1, "has not reached");
    assert_eq!(
        mirror_status(&mirror, "pause").unwrap()["applied"],
        paused["applied"]
    );
    source.run(&["mirror", "resume", &url, "west"]).success();
    assert_mirror_equal(&source, &mirror, "pause");
    source.run(&["mirror", "delete", &url, "west"]).success();
    let again = source.run(&["mirror", "pause", &url, "nobody"]);
    again.failure(1, "has no slot");
    mount.unmount();
}

/// One random change below `root`; everything is synced when it returns.
fn change(root: &Path, rng: &mut impl Rng) {
    let name = |rng: &mut dyn rand::RngCore| {
        root.join(format!(
            "d{}/f{}",
            rng.random_range(0..4),
            rng.random_range(0..12)
        ))
    };
    let path = name(rng);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    match rng.random_range(0..6) {
        0 | 1 => {
            let mut file = File::create(&path).unwrap();
            let size = [0, 500, 9_000, 200_000][rng.random_range(0..4)];
            let mut text = vec![0u8; size];
            rng.fill(&mut text[..]);
            file.write_all(&text).unwrap();
            file.sync_all().unwrap();
        }
        2 => {
            if let Ok(file) = File::options().write(true).open(&path) {
                file.write_all_at(b"in place", rng.random_range(0..5_000))
                    .unwrap();
                file.sync_all().unwrap();
            }
        }
        3 => {
            let other = name(rng);
            if path.exists() {
                fs::create_dir_all(other.parent().unwrap()).unwrap();
                fs::rename(&path, other).unwrap();
            }
        }
        4 => {
            if path.exists() {
                fs::remove_file(&path).unwrap();
            }
        }
        _ => {
            if path.exists() {
                let mode = fs::Permissions::from_mode(rng.random_range(0o400..0o777));
                fs::set_permissions(&path, mode).unwrap();
            }
        }
    }
}

#[test]
fn a_tree_is_equal_at_the_mirror_once_its_token_was_waited_for() {
    let trials = std::env::var("HELIOFS_TRIALS").map_or(50, |text| text.parse().unwrap());
    let seed =
        std::env::var("HELIOFS_SEED").map_or_else(|_| rand::random(), |text| text.parse().unwrap());
    println!("HELIOFS_SEED={seed}");
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let s3 = S3::start();
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_s3("token", &s3, &[]);
    let mount = source.mount("token");
    let relay = Relay::start(&source.nodes[0].address(), Duration::from_millis(20));
    let url = format!("helio://{}", relay.address());
    let mirror = mirror_of(&source, &url, 1, &[]);
    catch_up(&source, &mirror, "token");
    let seen = mirror.mount("token");
    for trial in 0..trials {
        for _ in 0..rng.random_range(1..12) {
            change(&mount.path, &mut rng);
        }
        let token = catch_up(&source, &mirror, "token");
        assert_eq!(
            tree(&seen.path),
            tree(&mount.path),
            "trial {trial}, token {token}"
        );
    }
    seen.unmount();
    mount.unmount();
}

#[test]
fn the_changelog_is_packed_on_its_way() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_file("packed", &[]);
    let mount = source.mount("packed");
    let relay = Relay::start(&source.nodes[0].address(), Duration::ZERO);
    let url = format!("helio://{}", relay.address());
    let mirror = mirror_of(&source, &url, 1, &[]);
    catch_up(&source, &mirror, "packed");
    let before = (mirror_status(&mirror, "packed").unwrap(), relay.passed());
    for number in 0..1500 {
        fs::write(mount.join(format!("a-name-of-some-length-{number}")), "x").unwrap();
    }
    File::open(&mount.path).unwrap().sync_all().unwrap();
    assert_mirror_equal(&source, &mirror, "packed");
    let after = mirror_status(&mirror, "packed").unwrap();
    let passed = relay.passed() - before.1;
    let grown = |key: &str| after[key].as_u64().unwrap() - before.0[key].as_u64().unwrap();
    let (plain, received) = (grown("stream_plain_bytes"), grown("stream_bytes"));
    assert!(plain > 100_000, "{after}");
    assert!(received * 2 < plain, "{received} bytes of {plain}");
    // What the link saw: reports of the slot and comparisons are on it, too.
    assert!(passed < plain, "{passed} bytes for {plain}");
}

//! What programs are promised: `--json` on every command, one object on standard error when it fails, help for everything.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use support::cluster::{HELIOFS, run};
use support::mount::is_mounted;
use support::{Cluster, Process, wait_for};

/// All that can be typed, as the help says; commands that have others below them are not among them.
fn commands(below: &[&str]) -> Vec<String> {
    let help = run(Command::new(HELIOFS).args(below).arg("--help")).success();
    let Some((_, listed)) = help.out.split_once("\nCommands:\n") else {
        return vec![below.join(" ")];
    };
    listed
        .lines()
        .take_while(|line| !line.is_empty())
        // Texts that go on in the next line are indented further.
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| !["help", "version"].contains(name))
        .flat_map(|name| commands(&[below, &[name]].concat()))
        .collect()
}

#[test]
fn every_command_explains_itself_and_refuses_nonsense_as_json() {
    let commands = commands(&[]);
    for known in [
        "mount",
        "auth",
        "fsck",
        "raft status",
        "mirror promote",
        "quota set",
    ] {
        assert!(
            commands.iter().any(|command| command == known),
            "{commands:?}"
        );
    }
    for command in commands {
        let words: Vec<&str> = command.split(' ').collect();
        let help = run(Command::new(HELIOFS).args(&words).arg("--help")).success();
        assert!(help.out.contains("Usage: "), "{command}: {}", help.out);
        assert!(help.out.contains("--json"), "{command}: {}", help.out);
        let refused = run(Command::new(HELIOFS)
            .args(&words)
            .args(["--json", "--nonsense"]));
        assert_eq!(refused.code, 2, "{command}: {}", refused.err);
        let error: Value = serde_json::from_str(&refused.err)
            .unwrap_or_else(|error| panic!("{command}: {error}: {}", refused.err));
        assert!(
            error["error"].as_str().unwrap().contains("--nonsense"),
            "{error}"
        );
        assert_eq!(error["code"], 2);
        assert!(error["hint"].is_string(), "{error}");
    }
    let version = run(Command::new(HELIOFS).args(["version", "--json"]))
        .success()
        .json();
    assert!(version["version"].is_string() && version["wire_version"].is_u64());
}

#[test]
fn a_clusters_life_is_told_in_json() {
    let scratch = support::scratch();
    let token = scratch.path().join("token");
    let mut cluster = Cluster::with_dirs(1, |_, _| None, &["--json"]);
    fs::copy(&cluster.token_file, &token).unwrap();
    let log = cluster.nodes[0].process.as_ref().unwrap().log();
    let ready: Value = log
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .find(|line: &Value| line["ready"].is_object())
        .unwrap_or_else(|| panic!("no ready line in {log}"));
    assert_eq!(ready["ready"]["node"], 1);
    assert_eq!(ready["ready"]["listen"], cluster.nodes[0].address());

    // A second node comes, leads, and goes.
    let port = support::free_ports(1)[0];
    let address = format!("127.0.0.1:{port}");
    let second = Process::start(
        "node 2",
        &scratch.path().join("node-2.log"),
        HELIOFS.as_ref(),
        |command| {
            command
                .args(["meta", "--id", "2", "--listen", &address, "--data-dir"])
                .arg(scratch.path().join("node-2"))
                .arg("--token-file")
                .arg(&token);
        },
    );
    wait_for("its ready line", Duration::from_secs(30), || {
        second.log().contains("ready: node 2").then_some(())
    });
    let url = cluster.url();
    let said = |arguments: &[&str]| -> Value {
        let ran = cluster.run(&[arguments, &["--json"]].concat()).success();
        assert_eq!(ran.err, "", "{arguments:?} says more than its answer");
        ran.json()
    };
    assert_eq!(
        said(&["raft", "add", &url, "2", &address]),
        json!({ "node": 2, "address": address })
    );
    let both = format!("{url},{address}");
    assert_eq!(
        said(&["raft", "transfer", &both, "2"]),
        json!({ "leader": 2 })
    );
    wait_for("node 2's lead", Duration::from_secs(20), || {
        (said(&["raft", "status", &both])["leader"] == 2).then_some(())
    });
    assert_eq!(
        said(&["raft", "transfer", &both, "1"]),
        json!({ "leader": 1 })
    );
    assert_eq!(said(&["raft", "remove", &both, "2"]), json!({ "node": 2 }));
    let status = said(&["raft", "status", &url]);
    assert_eq!(status["leader"], 1);
    assert!(status["term"].as_u64() > Some(1) && status["cluster_id"].is_u64());
    drop(second);

    let bucket = cluster.directory.join("bucket");
    let made = said(&[
        "format",
        &url,
        "json",
        "--bucket",
        bucket.to_str().unwrap(),
        "--capacity",
        "1G",
        "--inodes",
        "1000",
        "--deletion-grace",
        "90s",
        "--trash-days",
        "2",
    ]);
    assert_eq!(made["name"], "json", "{made}");
    let volume = cluster.volume_url("json");
    let config = said(&["config", &volume, "--inodes", "2000"]);
    assert_eq!(
        (
            &config["capacity_bytes"],
            &config["inodes"],
            &config["deletion_grace_seconds"]
        ),
        (&json!(1 << 30), &json!(2000), &json!(90))
    );
    assert_eq!(config["trash_days"], 2);
    assert!(
        said(&["raft", "snapshot", &url])["applied_index"].as_u64() > Some(0),
        "a snapshot has an index"
    );
    let digest = said(&["raft", "digest", &volume]);
    assert_eq!(digest.as_array().unwrap().len(), 1, "{digest}");

    // A mount in the background, seen by status, looked into, emptied.
    support::need_root_and_fuse();
    let point = cluster.directory.join("mnt");
    fs::create_dir(&point).unwrap();
    let at = |below: &str| point.join(below).to_str().unwrap().to_owned();
    let shown = at("").trim_end_matches('/').to_owned();
    let log_file = cluster.directory.join("mount.log");
    let mounted = said(&[
        "mount",
        &volume,
        &shown,
        "-d",
        "-o",
        "cache-size=0,io-timeout=5s",
        "--log-file",
        log_file.to_str().unwrap(),
    ]);
    assert!(mounted["pid"].is_u64(), "{mounted}");
    fs::create_dir_all(at("tree/deep")).unwrap();
    fs::write(at("tree/large"), vec![1; 100_000]).unwrap();
    fs::write(at("tree/deep/small"), "text").unwrap();
    let sum = said(&["info", "-r", &at("tree")]);
    let below = &sum[0]["summary"];
    // With the directory itself, as du counts.
    assert_eq!(
        (&below["files"], &below["directories"]),
        (&json!(2), &json!(2))
    );
    assert_eq!(below["allocated_bytes"], 100_004, "{sum}");
    let status = said(&["status", &url, "json"]);
    assert_eq!(status["mounts"][0]["mount_point"], shown.as_str());
    assert_eq!(status["volumes"].as_array().unwrap().len(), 1);
    // By path in the volume, without a mount.
    assert_eq!(
        said(&["rmr", &volume, "/tree/deep"])["removed"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(said(&["rmr", &at("tree")])["removed"], json!([at("tree")]));
    let refused = cluster.run(&["rmr", &shown, "--json"]);
    assert_eq!(refused.code, 2, "{}", refused.err);
    assert!(
        refused.err.contains("root of the volume"),
        "{}",
        refused.err
    );
    let refused = cluster.run(&["info", &at("tree"), "--json"]);
    let error: Value = serde_json::from_str(&refused.err).unwrap();
    assert_eq!((refused.code, &error["code"]), (1, &json!(1)), "{error}");
    assert_eq!(said(&["umount", &shown]), json!({ "unmounted": shown }));
    assert!(!is_mounted(&point));

    assert_eq!(said(&["destroy", &volume, "--yes"])["destroyed"], "json");
    cluster.stop_node(0);
}

#[test]
fn a_followed_changelog_tells_what_happens_meanwhile() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("followed", &[]);
    let volume = cluster.volume_url("followed");
    let log = cluster.directory.join("changelog.log");
    let follower = Process::start("changelog --follow", &log, HELIOFS.as_ref(), |command| {
        command
            .args(["changelog", &volume, "--follow", "--json", "--from", "0:2"])
            .arg("--token-file")
            .arg(&cluster.token_file);
    });
    let mount = cluster.mount("followed");
    fs::write(mount.join("file"), "text").unwrap();
    fs::rename(mount.join("file"), mount.join("other")).unwrap();
    let told = wait_for("the rename's entry", Duration::from_secs(20), || {
        let lines: Vec<Value> = follower
            .log()
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .filter(|line: &Value| line["op"].is_string())
            .collect();
        let is_there = lines.iter().any(|line| line["op"] == "rename");
        is_there.then_some(lines)
    });
    assert_eq!(told[0]["position"], "0:2", "it begins where it was told to");
    let at = |op: &str| told.iter().position(|line| line["op"] == op);
    assert!(at("create").unwrap() < at("rename").unwrap());
    mount.unmount();
}

#[test]
fn umount_lazy_and_by_force_do_what_they_say() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("umounts", &[]);
    // Lazy: hidden at once, served until the last file is closed.
    let mut mount = cluster.mount("umounts");
    fs::write(mount.join("file"), "text").unwrap();
    let mut held = fs::File::open(mount.join("file")).unwrap();
    let path = mount.path.to_str().unwrap().to_owned();
    let busy = cluster.run(&["umount", &path]).failure(1, "is in use");
    assert!(busy.err.contains("hint: "), "{}", busy.err);
    cluster.run(&["umount", "--lazy", &path]).success();
    assert!(!is_mounted(&mount.path));
    let mut text = String::new();
    std::io::Read::read_to_string(&mut held, &mut text).unwrap();
    assert_eq!(text, "text");
    drop(held);
    assert!(mount.process.wait(Duration::from_secs(30)).success());

    // By force: ends although the process that serves it hangs.
    let mut mount = cluster.mount("umounts");
    let path = mount.path.to_str().unwrap().to_owned();
    mount.process.signal(nix::sys::signal::Signal::SIGSTOP);
    let ran = cluster.run(&["umount", "--force", "--lazy", "--timeout", "2s", &path]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(!is_mounted(&mount.path));
    mount.process.signal(nix::sys::signal::Signal::SIGCONT);
    mount.process.wait(Duration::from_secs(30));
}

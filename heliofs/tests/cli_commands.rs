//! The commands on a real cluster, as a user types them.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::process::Command;
use std::time::Duration;

use support::cluster::{HELIOFS, run};
use support::mount::is_mounted;
use support::{Cluster, Process, S3, wait_for};

#[test]
fn a_volume_from_format_to_destroy() {
    let s3 = S3::start();
    let cluster = Cluster::start();
    cluster.format_s3("life", &s3, &["--capacity", "1G", "--deletion-grace", "0s"]);
    let url = cluster.volume_url("life");
    let volume = cluster.volume("life");
    assert_eq!(volume["capacity_bytes"], 1 << 30);
    assert!(
        !cluster
            .status()
            .to_string()
            .contains(support::s3::SECRET_KEY),
        "status shows the secret key"
    );

    let mount = cluster.mount("life");
    fs::create_dir_all(mount.join("tree/deep")).unwrap();
    fs::write(mount.join("tree/deep/large"), vec![1; 300_000]).unwrap();
    fs::write(mount.join("tree/small"), "text").unwrap();

    let info = cluster
        .run(&[
            "info",
            mount.join("tree/deep/large").to_str().unwrap(),
            "--json",
        ])
        .success()
        .json();
    assert_eq!(info[0]["size"], 300_000);
    assert!(
        info[0]["extents"][0]["object"]
            .as_str()
            .unwrap()
            .starts_with("life/"),
        "{info}"
    );
    let by_url = cluster
        .run(&["info", &url, "/tree/small", "--json"])
        .success()
        .json();
    assert_eq!(by_url[0]["extents"][0]["object"], "inline");
    cluster
        .run(&["info", &url, "/tree/none"])
        .failure(1, "no such file");

    let status = cluster.status();
    assert_eq!(
        status["mounts"][0]["mount_point"],
        mount.path.to_str().unwrap()
    );
    assert_eq!(status["nodes"].as_array().unwrap().len(), 3);
    let shown = cluster.run(&["status", &cluster.url()]).success().out;
    assert!(
        shown.contains("leader") && shown.contains("life"),
        "{shown}"
    );

    cluster
        .run(&["rmr", mount.join("tree").to_str().unwrap()])
        .success();
    wait_for("the tree's end", Duration::from_secs(2), || {
        (!mount.join("tree").exists()).then_some(())
    });

    let log = cluster.run(&["changelog", &url, "--json"]).success().out;
    let ops: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(ops[0]["op"], "volume-init");
    assert!(
        ops.iter()
            .any(|op| op["op"] == "create" && op["fields"]["name"] == "deep")
    );
    assert!(ops.iter().any(|op| op["op"] == "remove-tree"));
    for (number, op) in ops.iter().enumerate() {
        let seq = op["position"].as_str().unwrap().split(':').nth(1).unwrap();
        assert_eq!(
            seq.parse::<usize>().unwrap(),
            number + 1,
            "positions have no gaps"
        );
    }
    let one = cluster
        .run(&["changelog", &url, "--from", "0:3", "-n", "1", "--json"])
        .success();
    assert_eq!(one.json()["position"], "0:3");

    cluster
        .run(&["config", &url, "--trash-days", "3"])
        .success();
    assert_eq!(
        cluster.run(&["config", &url, "--json"]).success().json()["trash_days"],
        3
    );

    cluster
        .run(&["destroy", &url, "--yes"])
        .failure(1, "is mounted");
    mount.unmount();
    cluster.run(&["destroy", &url]).failure(2, "confirmed");
    cluster.run(&["destroy", &url, "--yes"]).success();
    assert!(cluster.status()["volumes"].as_array().unwrap().is_empty());
    // The name and the bucket are free again.
    cluster.format_s3("life", &s3, &[]);
}

#[test]
fn a_background_mount_is_there_when_the_command_returns_and_gone_after_umount() {
    support::need_root_and_fuse();
    let cluster = Cluster::start();
    cluster.format_file("background", &[]);
    let point = cluster.directory.join("mnt");
    fs::create_dir(&point).unwrap();
    let (url, log) = (
        cluster.volume_url("background"),
        cluster.directory.join("mount.log"),
    );
    let arguments = [
        "mount",
        &url,
        point.to_str().unwrap(),
        "-d",
        "--cache-size",
        "0",
        "--json",
        "--log-file",
        log.to_str().unwrap(),
    ];
    let ready = cluster.run(&arguments).success().json();
    assert!(is_mounted(&point));
    fs::write(point.join("file"), "text").unwrap();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts
        .lines()
        .find(|line| line.contains(point.to_str().unwrap()))
        .unwrap();
    assert!(
        line.contains("heliofs"),
        "df and mount show no sensible name: {line}"
    );
    cluster
        .run(&["mount", &url, point.to_str().unwrap()])
        .failure(1, "not empty");
    cluster.run(&["umount", point.to_str().unwrap()]).success();
    assert!(!is_mounted(&point));
    let pid = ready["pid"].as_u64().unwrap();
    // A process that has ended has no command line, whether or not its parent has looked at it.
    let command_line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    assert_eq!(command_line, "", "umount returned before the process ended");
    assert!(fs::metadata(&log).unwrap().len() > 0, "nothing was logged");

    // As mount(8) calls the fstab helper.
    let helper = cluster.directory.join("mount.heliofs");
    std::os::unix::fs::symlink(HELIOFS, &helper).unwrap();
    let options = format!(
        "rw,_netdev,cache-size=0,token-file={}",
        cluster.token_file.display()
    );
    let mut command = Command::new(&helper);
    command.args([&url, point.to_str().unwrap(), "-o", &options]);
    run(&mut command).success();
    assert_eq!(fs::read_to_string(point.join("file")).unwrap(), "text");
    cluster.run(&["umount", point.to_str().unwrap()]).success();
}

#[test]
fn a_read_only_mount_refuses_changes() {
    let cluster = Cluster::start();
    cluster.format_file("readonly", &[]);
    let writer = cluster.mount("readonly");
    fs::write(writer.join("file"), "text").unwrap();
    let reader = support::Mount::of(&cluster, "readonly", &["--read-only"]);
    assert_eq!(fs::read_to_string(reader.join("file")).unwrap(), "text");
    for refused in [
        fs::write(reader.join("file"), "x"),
        fs::create_dir(reader.join("d")),
        fs::remove_file(reader.join("file")),
    ] {
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EROFS));
    }
}

#[test]
fn up_needs_nothing_and_keeps_what_was_written() {
    support::need_root_and_fuse();
    let scratch = support::scratch();
    let (data, point) = (scratch.path().join("data"), scratch.path().join("mnt"));
    let start = |name: &str| {
        let log = scratch.path().join(name);
        let process = Process::start("up", &log, HELIOFS.as_ref(), |command| {
            command
                .arg("up")
                .arg("--data-dir")
                .arg(&data)
                .arg("--mount")
                .arg(&point);
        });
        wait_for("the mount", Duration::from_secs(30), || {
            is_mounted(&point).then_some(())
        });
        wait_for("its word", Duration::from_secs(5), || {
            process.log().contains("is mounted at").then_some(())
        });
        process
    };
    let stop = |mut process: Process| {
        process.signal(nix::sys::signal::Signal::SIGINT);
        let status = process.wait(Duration::from_secs(30));
        assert!(status.success(), "{status}: {}", process.log_tail());
        assert!(!is_mounted(&point));
    };
    let process = start("first");
    fs::write(point.join("file"), vec![9; 100_000]).unwrap();
    stop(process);
    let process = start("second");
    assert_eq!(fs::read(point.join("file")).unwrap(), vec![9; 100_000]);
    stop(process);
}

#[test]
fn metrics_and_readiness_are_served() {
    let cluster = Cluster::start();
    cluster.format_file("metrics", &[]);
    let port = support::free_ports(1)[0];
    let address = format!("127.0.0.1:{port}");
    let mount = support::Mount::of(&cluster, "metrics", &["--metrics", &address]);
    fs::write(mount.join("file"), vec![1; 100_000]).unwrap();
    let get = |path: &str| {
        run(Command::new("curl").args(["-s", "-f", &format!("http://{address}{path}")]))
    };
    assert!(get("/metrics").success().out.contains("heliofs_"));
    wait_for("readiness", Duration::from_secs(5), || {
        (get("/ready").code == 0).then_some(())
    });
    drop(mount);

    let dir = cluster.directory.join("alone");
    let port = support::free_ports(2);
    let (listen, metrics) = (
        format!("127.0.0.1:{}", port[0]),
        format!("127.0.0.1:{}", port[1]),
    );
    let log = cluster.directory.join("alone.log");
    let mut node = Process::start("a lone node", &log, HELIOFS.as_ref(), |command| {
        command.args([
            "meta",
            "--id",
            "7",
            "--init",
            "--listen",
            &listen,
            "--metrics",
            &metrics,
        ]);
        command
            .arg("--data-dir")
            .arg(&dir)
            .arg("--token-file")
            .arg(&cluster.token_file);
    });
    wait_for("its ready line", Duration::from_secs(30), || {
        node.log().contains("ready: node 7").then_some(())
    });
    let get = |path: &str| {
        run(Command::new("curl").args(["-s", "-f", &format!("http://{metrics}{path}")]))
    };
    get("/ready").success();
    assert!(
        get("/metrics")
            .success()
            .out
            .contains("heliofs_meta_leader_bool 1")
    );
    node.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(node.wait(Duration::from_secs(20)).success());
}

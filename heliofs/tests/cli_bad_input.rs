//! Bad input gets a clear error that says what to do, and changes nothing.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::io::Write;
use std::process::Command;
use std::time::Duration;

use support::cluster::{HELIOFS, run};
use support::{Cluster, S3, wait_for};

fn hinted(ran: &support::Ran) {
    assert!(ran.err.contains("hint: "), "no hint: {}", ran.err);
}

#[test]
fn unreachable_peers_and_wrong_tokens_are_named() {
    let port = support::free_ports(1)[0];
    let nobody = format!("helio://127.0.0.1:{port}");
    let mut command = Command::new(HELIOFS);
    command
        .args(["status", &nobody])
        .env("HELIOFS_TOKEN", "0123456789abcdef");
    hinted(&run(&mut command).failure(1, "no metadata node answered"));

    let mut command = Command::new(HELIOFS);
    command
        .args(["status", &nobody])
        .env_remove("HELIOFS_TOKEN")
        .env("HOME", "/nonexistent")
        .env_remove("XDG_CONFIG_HOME")
        .env_remove("HELIOFS_TOKEN_FILE");
    hinted(&run(&mut command).failure(1, "token"));

    let cluster = Cluster::start();
    let mut command = Command::new(HELIOFS);
    command
        .args(["status", &cluster.url()])
        .env("HELIOFS_TOKEN", "another-token-of-some-length");
    hinted(&run(&mut command).failure(1, "refused the cluster token"));
    // JSON for programs, on standard error.
    let mut command = Command::new(HELIOFS);
    command
        .args(["--json", "status", &cluster.url()])
        .env("HELIOFS_TOKEN", "another-token-of-some-length");
    let ran = run(&mut command);
    let error: serde_json::Value = serde_json::from_str(&ran.err).unwrap();
    assert!(error["error"].as_str().unwrap().contains("refused"));

    cluster
        .run(&["status", "redis://x"])
        .failure(2, "redis://x");
    let point = cluster.directory.join("mnt");
    fs::create_dir(&point).unwrap();
    hinted(
        &cluster
            .run(&["mount", &cluster.url(), "missing", point.to_str().unwrap()])
            .failure(1, "no volume `missing`"),
    );
    cluster
        .run(&["info", "/usr"])
        .failure(1, "not in a mount of heliofs");
}

#[test]
fn a_token_file_that_others_can_read_is_refused() {
    let directory = support::scratch();
    let token = directory.path().join("token");
    fs::write(&token, "0123456789abcdef").unwrap();
    let mut command = Command::new(HELIOFS);
    command
        .args(["status", "helio://127.0.0.1:1", "--token-file"])
        .arg(&token);
    hinted(&run(&mut command).failure(1, "can be read by others"));
}

#[test]
fn a_name_is_formatted_once_and_a_bucket_belongs_to_one_volume() {
    let cluster = Cluster::start();
    let bucket = cluster.directory.join("bucket");
    let bucket = bucket.to_str().unwrap();
    let format = |cluster: &Cluster, more: &[&str]| {
        let url = cluster.url();
        let mut arguments = vec!["format", &url, "photos", "--bucket", bucket];
        arguments.extend(more);
        cluster.run(&arguments)
    };
    format(&cluster, &["--capacity", "1G"]).success();
    hinted(&format(&cluster, &[]).failure(1, "a volume `photos` already"));
    // Another cluster, the same bucket and name.
    let other = Cluster::start();
    hinted(&format(&other, &[]).failure(1, "another volume"));
    assert!(
        other.status()["volumes"].as_array().unwrap().is_empty(),
        "a refused format left a volume"
    );
    for name in [
        "a",
        "-xy",
        "xy-",
        "a/b",
        "ä-b",
        "a b",
        "Photos",
        "my_photos",
    ] {
        let url = cluster.url();
        hinted(&cluster.run(&["format", &url, "--", name]).failure(2, name));
    }
    // The first one is untouched.
    let mount = cluster.mount("photos");
    fs::write(mount.join("file"), "text").unwrap();
    mount.unmount();
    // What is left of a cluster that is gone can be taken over, on request.
    format(&other, &["--force"]).success();
}

#[test]
fn wrong_keys_of_a_bucket_are_noticed_before_a_volume_exists() {
    let s3 = S3::start();
    let cluster = Cluster::start();
    let url = cluster.url();
    let bucket = s3.bucket_url("keys");
    let format = [
        "format",
        &url,
        "keys",
        "--storage",
        "s3",
        "--bucket",
        &bucket,
    ];
    let wrong = cluster.run_with(&format, |command| {
        command
            .env("ACCESS_KEY", "test-access")
            .env("SECRET_KEY", "wrong");
    });
    hinted(&wrong.failure(1, "key"));
    let half = cluster.run_with(&format, |command| {
        command
            .env("ACCESS_KEY", "test-access")
            .env_remove("SECRET_KEY");
    });
    hinted(&half.failure(2, "without a secret key"));
    hinted(
        &cluster
            .run(&["format", &url, "keys", "--storage", "s3"])
            .failure(2, "--bucket"),
    );
    let nobody = format!("http://127.0.0.1:{}/keys", support::free_ports(1)[0]);
    let gone = [
        "format",
        &url,
        "keys",
        "--storage",
        "s3",
        "--bucket",
        &nobody,
    ];
    hinted(
        &cluster
            .run_with(&gone, |command| s3.keys(command))
            .failure(1, "127.0.0.1"),
    );
    assert!(cluster.status()["volumes"].as_array().unwrap().is_empty());
    cluster
        .run_with(&format, |command| s3.keys(command))
        .success();
    let mount = cluster.mount("keys");
    fs::write(mount.join("file"), vec![3; 50_000]).unwrap();
    assert_eq!(fs::read(mount.join("file")).unwrap(), vec![3; 50_000]);
    mount.unmount();
}

#[test]
fn a_mount_point_must_be_an_empty_directory() {
    let cluster = Cluster::start();
    cluster.format_file("points", &[]);
    let url = cluster.volume_url("points");
    let at = |name: &str| cluster.directory.join(name).to_str().unwrap().to_owned();
    hinted(
        &cluster
            .run(&["mount", &url, &at("missing")])
            .failure(1, "does not exist"),
    );
    fs::create_dir(at("full")).unwrap();
    fs::write(at("full/file"), "").unwrap();
    hinted(
        &cluster
            .run(&["mount", &url, &at("full"), "-d"])
            .failure(1, "not empty"),
    );
    cluster
        .run(&["mount", &url, &at("full/file")])
        .failure(1, "not a directory");
    cluster
        .run(&["umount", &at("full")])
        .failure(1, "not a mount point");
    cluster
        .run(&["mount", &url, &at("full"), "-o", "colour=red"])
        .failure(2, "unknown option");
}

#[test]
fn quotas_refuse_what_goes_beyond_them_and_nothing_is_lost() {
    let cluster = Cluster::start();
    cluster.format_file(
        "quota",
        &[
            "--capacity",
            "1M",
            "--inodes",
            "10",
            "--deletion-grace",
            "0s",
        ],
    );
    let mount = cluster.mount("quota");
    let text = vec![5; 300_000];
    fs::write(mount.join("first"), &text).unwrap();
    let too_much = fs::File::create(mount.join("second")).and_then(|mut file| {
        file.write_all(&vec![6; 2_000_000])?;
        file.sync_all()
    });
    assert_eq!(too_much.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(fs::read(mount.join("first")).unwrap(), text);
    let _ = fs::remove_file(mount.join("second"));
    let refused = (0..20).find_map(|n| fs::write(mount.join(format!("inode-{n}")), "").err());
    assert_eq!(
        refused.expect("the inode limit holds").raw_os_error(),
        Some(libc::ENOSPC)
    );
    // More room is there at once.
    cluster
        .run(&[
            "config",
            &cluster.volume_url("quota"),
            "--capacity",
            "10M",
            "--inodes",
            "0",
        ])
        .success();
    wait_for("more room", Duration::from_secs(5), || {
        fs::write(mount.join("third"), vec![7; 2_000_000]).ok()
    });
    assert_eq!(fs::read(mount.join("first")).unwrap(), text);
    mount.unmount();
}

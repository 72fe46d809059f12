//! Quotas of directories, users and groups, as programs and operators meet them.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use serde_json::Value;
use support::{Cluster, wait_for};

const EDQUOT: &str = "Disk quota exceeded";
const MIB: u64 = 1 << 20;

/// What dd says when it writes `mib` MiB and waits until they are stored.
fn dd(path: &Path, mib: u64) -> Result<(), String> {
    let ran = Command::new("dd")
        .args(["if=/dev/urandom", "bs=1M", "conv=fsync"])
        .arg(format!("count={mib}"))
        .arg(format!("of={}", path.display()))
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    match ran.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&ran.stderr).into_owned()),
    }
}

fn quota(cluster: &Cluster, arguments: &[&str]) -> Value {
    let mut all = vec!["quota"];
    all.extend(arguments);
    all.push("--json");
    cluster.run(&all).success().json()
}

/// One quota, once `ready` says so of it.
fn wait_for_quota(cluster: &Cluster, of: &[&str], ready: impl Fn(&Value) -> bool) -> Value {
    let mut get = vec!["get"];
    get.extend(of);
    wait_for("the quota", Duration::from_secs(30), || {
        Some(quota(cluster, &get)).filter(|quota| ready(quota))
    })
}

fn used(quota: &Value) -> (u64, u64) {
    let number = |name: &str| quota[name].as_u64().unwrap();
    (number("used_bytes"), number("used_inodes"))
}

#[test]
fn a_directory_s_quota_counts_what_is_there_refuses_more_and_outlives_the_leader() {
    let mut cluster = Cluster::start();
    cluster.format_file("limited", &["--deletion-grace", "0s"]);
    let mount = cluster.mount("limited");
    let team = mount.join("team");
    fs::create_dir_all(team.join("deep/er")).unwrap();
    for n in 0..700 {
        fs::write(team.join(format!("deep/er/n{n}")), "x").unwrap();
    }
    dd(&team.join("before"), 3).unwrap();
    fs::write(mount.join("outside"), "x").unwrap();

    let place = team.to_str().unwrap();
    quota(
        &cluster,
        &["set", place, "--capacity", "10M", "--inodes", "710"],
    );
    // The directory itself counts; what was closed just now is stored within a second.
    let counted = wait_for_quota(&cluster, &[place], |quota| {
        quota["state"] == "ready" && used(quota) == (3 * MIB + 700, 704)
    });
    assert_eq!(counted["name"], "/team");

    // The program is told, and what fits, fits.
    let error = dd(&team.join("too-much"), 12).unwrap_err();
    assert!(error.contains(EDQUOT), "{error}");
    fs::remove_file(team.join("too-much")).unwrap();
    wait_for_quota(&cluster, &[place], |quota| {
        used(quota) == (3 * MIB + 700, 704)
    });
    dd(&team.join("fits"), 6).unwrap();
    dd(&mount.join("elsewhere"), 12).unwrap();
    // Overwriting needs no more room.
    dd(&team.join("fits"), 6).unwrap();

    // df shows the quota inside it, and the volume outside.
    let shown = statvfs(&team.join("deep")).unwrap();
    assert_eq!(shown.blocks() * shown.fragment_size(), 10 * MIB);
    assert_eq!(shown.files(), 710);
    assert!(statvfs(&mount.path).unwrap().files() > 1000);

    // Inodes.
    for n in 0..5 {
        fs::create_dir(team.join(format!("d{n}"))).unwrap();
    }
    let error = fs::create_dir(team.join("one-too-many")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EDQUOT));

    // The leader dies in between; nothing is forgotten and nothing counted twice.
    let leader = cluster.leader();
    cluster.kill_node(leader);
    fs::remove_dir(team.join("d0")).unwrap();
    fs::remove_file(team.join("fits")).unwrap();
    let freed = |quota: &Value| used(quota) == (3 * MIB + 700, 708);
    wait_for_quota(&cluster, &[place], freed);
    dd(&team.join("again"), 6).unwrap();
    let error = dd(&team.join("over"), 4).unwrap_err();
    assert!(error.contains(EDQUOT), "{error}");
    fs::remove_file(team.join("over")).unwrap();
    cluster.start_node(leader);

    // Below what is used: allowed, growth is refused.
    quota(&cluster, &["set", place, "--capacity", "1M"]);
    assert!(dd(&team.join("more"), 1).unwrap_err().contains(EDQUOT));
    fs::remove_file(team.join("more")).unwrap();
    fs::remove_file(team.join("again")).unwrap();

    cluster.run(&["quota", "rm", place]).success();
    dd(&team.join("free"), 12).unwrap();
    wait_for("the walk back", Duration::from_secs(30), || {
        let listed = quota(&cluster, &["list", place]);
        listed.as_array().unwrap().is_empty().then_some(())
    });
    let checked = cluster.run(&["fsck", &cluster.volume_url("limited"), "--level", "data"]);
    checked.success();
    mount.unmount();
    cluster.assert_replicas_equal("limited");
}

#[test]
fn nested_quotas_are_charged_together_and_a_tree_moves_by_copying() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("nested", &[]);
    let mount = cluster.mount("nested");
    let outer = mount.join("outer");
    let inner = outer.join("inner");
    fs::create_dir_all(inner.join("tree")).unwrap();
    fs::write(inner.join("tree/file"), "0123456789").unwrap();
    fs::create_dir(mount.join("other")).unwrap();
    let url = cluster.volume_url("nested");
    quota(
        &cluster,
        &["set", &url, "--path", "/outer", "--capacity", "4M"],
    );
    let ready = |quota: &Value| quota["state"] == "ready";
    wait_for_quota(&cluster, &[&url, "--path", "/outer"], ready);
    quota(
        &cluster,
        &["set", &url, "--path", "/outer/inner", "--capacity", "8M"],
    );
    let of_inner = [url.as_str(), "--path", "/outer/inner"];
    wait_for_quota(&cluster, &of_inner, |quota| {
        quota["state"] == "ready" && used(quota) == (10, 3)
    });

    // The outer one is the tighter one.
    let error = dd(&inner.join("large"), 6).unwrap_err();
    assert!(error.contains(EDQUOT), "{error}");
    fs::remove_file(inner.join("large")).unwrap();

    // A directory with content stays with its quota; mv copies it.
    let (from, to) = (inner.join("tree"), mount.join("other/tree"));
    let error = fs::rename(&from, &to).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::CrossesDevices);
    let moved = Command::new("mv").arg(&from).arg(&to).status();
    assert!(moved.unwrap().success());
    assert_eq!(fs::read(to.join("file")).unwrap(), b"0123456789");
    wait_for_quota(&cluster, &of_inner, |quota| used(quota) == (0, 1));
    // A file is charged anew, a link to the other side is refused.
    fs::rename(to.join("file"), inner.join("file")).unwrap();
    wait_for_quota(&cluster, &of_inner, |quota| used(quota) == (10, 2));
    let error = fs::hard_link(inner.join("file"), mount.join("link")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::CrossesDevices);

    // With its own quota the directory moves, and takes along what it is charged.
    fs::rename(&inner, mount.join("moved")).unwrap();
    let of_outer = [url.as_str(), "--path", "/outer"];
    wait_for_quota(&cluster, &of_outer, |quota| used(quota) == (0, 1));
    dd(&mount.join("moved/large"), 6).unwrap();
    let checked = cluster.run(&["fsck", &url, "--level", "meta"]);
    checked.success();
}

#[test]
fn users_and_groups_are_charged_for_what_they_own() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("owned", &[]);
    let mount = cluster.mount("owned");
    let theirs = mount.join("theirs");
    fs::create_dir(&theirs).unwrap();
    for n in 0..600 {
        let path = theirs.join(format!("n{n}"));
        fs::write(&path, "0123456789").unwrap();
        chown(&path, Some(4000), Some(5000)).unwrap();
    }
    let place = mount.path.to_str().unwrap();
    let user = [place, "--uid", "4000"];
    quota(
        &cluster,
        &["set", place, "--uid", "4000", "--capacity", "2M"],
    );
    wait_for_quota(&cluster, &user, |quota| {
        quota["state"] == "ready" && used(quota) == (6000, 600)
    });

    // root's file becomes theirs only as long as there is room.
    let large = mount.join("large");
    dd(&large, 3).unwrap();
    let error = chown(&large, Some(4000), None).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EDQUOT));
    dd(&mount.join("small"), 1).unwrap();
    chown(mount.join("small"), Some(4000), Some(5000)).unwrap();
    // Whoever writes, the owner is charged.
    let error = dd(&theirs.join("n1"), 3).unwrap_err();
    assert!(error.contains(EDQUOT), "{error}");
    fs::remove_file(theirs.join("n1")).unwrap();

    quota(
        &cluster,
        &["set", place, "--gid", "5000", "--inodes", "600"],
    );
    let error = chown(&large, None, Some(5000)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EDQUOT));
    let listed = quota(&cluster, &["list", place]);
    let names: Vec<&str> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|quota| quota["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["user 4000", "group 5000"]);

    cluster
        .run(&["quota", "rm", place, "--gid", "5000"])
        .success();
    cluster
        .run(&["quota", "rm", place, "--uid", "4000"])
        .success();
    chown(&large, Some(4000), Some(5000)).unwrap();
    cluster
        .run(&["quota", "get", place, "--uid", "4000"])
        .failure(1, "has no quota");
    cluster
        .run(&["quota", "set", place, "--path", "/", "--capacity", "1G"])
        .failure(2, "heliofs config");
    let url = cluster.volume_url("owned");
    cluster.run(&["fsck", &url, "--level", "meta"]).success();
}

#[test]
fn a_tree_comes_back_from_the_trash_across_quotas() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("back", &["--trash-days", "1"]);
    let mount = cluster.mount("back");
    let tree = mount.join("team/tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    let large = vec![3u8; 5_000_000];
    fs::write(tree.join("sub/large"), &large).unwrap();
    fs::hard_link(tree.join("sub/large"), tree.join("again")).unwrap();
    fs::write(mount.join("team/file"), "0123456789").unwrap();
    chown(tree.join("sub"), Some(4000), Some(5000)).unwrap();
    let remove = |path: &Path| {
        cluster.run(&["rmr", path.to_str().unwrap()]).success();
    };
    remove(&tree);
    remove(&mount.join("team/file"));
    // What is removed then lies outside of the quota, and where it goes back to is inside.
    let team = mount.join("team");
    let place = team.to_str().unwrap();
    quota(&cluster, &["set", place, "--capacity", "1M"]);
    let ready = |quota: &Value| quota["state"] == "ready";
    wait_for_quota(&cluster, &[place], ready);
    let url = cluster.volume_url("back");
    // The quota holds for what comes back; a file moves alone.
    let ran = cluster.run(&["restore", &url, "--put-back"]);
    ran.failure(1, "1 things could not be restored");
    assert_eq!(fs::read(team.join("file")).unwrap(), b"0123456789");
    assert_eq!(fs::read_dir(&team).unwrap().count(), 1, "no half of a copy");
    quota(&cluster, &["set", place, "--capacity", "8M"]);
    cluster.run(&["restore", &url, "--put-back"]).success();
    assert!(fs::read(tree.join("again")).unwrap() == large);
    let (one, other) = (tree.join("again"), tree.join("sub/large"));
    let number = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    assert_eq!(number(&one), number(&other), "still one file");
    let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(tree.join("sub")).unwrap());
    assert_eq!(owner, 4000);
    wait_for_quota(&cluster, &[place], |quota| used(quota) == (5_000_010, 5));
    let left = cluster.run(&["restore", &url, "--json"]).success().json();
    assert_eq!(left.as_array().unwrap().len(), 0, "{left}");
    cluster.run(&["fsck", &url, "--level", "data"]).success();
    mount.unmount();
}

#[test]
fn a_fragmented_file_is_overwritten_under_a_full_quota() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("full", &[]);
    let mount = cluster.mount("full");
    let team = mount.join("team");
    fs::create_dir(&team).unwrap();
    let path = team.join("fragmented");
    // As random writers leave it: every other page in a commit of its own.
    let file = fs::File::create(&path).unwrap();
    let (page, pages) = (4096u64, 1500u64);
    for round in 0..2 {
        for at in (round..pages).step_by(2) {
            file.write_all_at(&vec![round as u8; page as usize], at * page)
                .unwrap();
        }
        file.sync_all().unwrap();
    }
    let place = team.to_str().unwrap();
    let bytes = (page * pages).to_string();
    quota(&cluster, &["set", place, "--capacity", &bytes]);
    let ready = |quota: &Value| quota["state"] == "ready" && used(quota) == (page * pages, 2);
    wait_for_quota(&cluster, &[place], ready);
    let whole = vec![7u8; (page * pages) as usize];
    for _ in 0..3 {
        file.write_all_at(&whole, 0).unwrap();
        file.sync_all().unwrap();
    }
    assert!(fs::read(&path).unwrap() == whole);
    let error = fs::write(team.join("more"), vec![1u8; 8192])
        .and_then(|()| fs::File::open(team.join("more"))?.sync_all())
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EDQUOT));
    fs::remove_file(team.join("more")).unwrap();
    wait_for_quota(&cluster, &[place], ready);
    drop(file);
    mount.unmount();
}

//! Snapshots and quotas as a mirror shows them: those of the source, and nobody changes them there.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::chown;
use std::path::Path;
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use serde_json::Value;
use support::mirror::{assert_mirror_equal, catch_up, mirror_of, tree};
use support::{Cluster, wait_for};

fn json(cluster: &Cluster, arguments: &[&str]) -> Value {
    let all = [arguments, &["--json"]].concat();
    cluster.run(&all).success().json()
}

/// Writes and waits until it is stored, or says why not.
fn stored(path: &Path, bytes: usize) -> std::io::Result<()> {
    let mut file = fs::File::create(path)?;
    std::io::Write::write_all(&mut file, &vec![7; bytes])?;
    file.sync_all()
}

fn over<T: std::fmt::Debug>(result: std::io::Result<T>) {
    assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EDQUOT));
}

fn read_only<T: std::fmt::Debug>(result: std::io::Result<T>) {
    assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
}

#[test]
fn a_mirror_shows_the_source_s_snapshots_and_quotas_and_changes_none() {
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    let mirror = mirror_of(&source, &source.url(), 1, &[]);
    source.format_file("views", &[]);
    let (url, seen_url) = (source.volume_url("views"), mirror.volume_url("views"));
    let mount = source.mount("views");
    let team = mount.join("team");
    fs::create_dir_all(team.join("deep")).unwrap();
    stored(&team.join("large"), 900_000).unwrap();
    stored(&team.join("deep/small"), 50).unwrap();
    fs::write(mount.join("theirs"), "x").unwrap();
    chown(mount.join("theirs"), Some(4000), Some(5000)).unwrap();
    let at_source = |arguments: &[&str]| json(&source, arguments);
    let at_mirror = |arguments: &[&str]| json(&mirror, arguments);

    at_source(&["snapshot", "create", &url, "/team", "--name", "monday"]);
    fs::write(team.join("deep/small"), "after the snapshot").unwrap();
    fs::remove_file(team.join("large")).unwrap();
    stored(&team.join("more"), 300_000).unwrap();
    let of_team = ["--path", "/team"];
    let set = |of: &[&str], limits: &[&str]| {
        let all = [&["quota", "set", &url], of, limits].concat();
        at_source(&all);
    };
    set(&of_team, &["--capacity", "400K", "--inodes", "5"]);
    set(&["--uid", "4000"], &["--inodes", "1"]);
    wait_for("the walks", Duration::from_secs(30), || {
        let all = at_source(&["quota", "list", &url]);
        let ready = |quota: &Value| quota["state"] == "ready";
        all.as_array().unwrap().iter().all(ready).then_some(())
    });
    // Both are reached.
    over(stored(&team.join("more"), 500_000));
    stored(&team.join("more"), 300_000).unwrap();
    fs::write(team.join("last"), "").unwrap();
    over(fs::write(team.join("one-too-many"), ""));
    fs::write(mount.join("root-s"), "x").unwrap();
    over(chown(mount.join("root-s"), Some(4000), None));

    catch_up(&source, &mirror, "views");
    let seen = mirror.mount("views");
    let kept = ".snapshots/monday";
    let expected = tree(&mount.join(kept));
    assert_eq!(expected.len(), 3, "{expected:?}");
    assert_eq!(tree(&seen.join(kept)), expected);
    assert_eq!(
        fs::read(seen.join(kept).join("large")).unwrap(),
        [7; 900_000]
    );
    assert_eq!(
        fs::read(seen.join(kept).join("deep/small")).unwrap(),
        [7; 50]
    );
    assert_eq!(tree(&seen.join("team")), tree(&team));

    let snapshots = at_source(&["snapshot", "ls", &url, "--sizes"]);
    assert_eq!(snapshots[0]["name"], "monday");
    assert_eq!(
        at_mirror(&["snapshot", "ls", &seen_url, "--sizes"]),
        snapshots
    );
    let quotas = at_source(&["quota", "list", &url]);
    assert_eq!(quotas.as_array().unwrap().len(), 2, "{quotas}");
    assert_eq!(at_mirror(&["quota", "list", &seen_url]), quotas);
    let get = |url: &'_ str| ["quota", "get", url, "--path", "/team"].map(str::to_owned);
    let (theirs, ours) = (get(&url), get(&seen_url));
    let theirs = at_source(&theirs.each_ref().map(String::as_str));
    assert_eq!(theirs["used_inodes"], 5, "{theirs}");
    assert_eq!(theirs["used_bytes"], 300_000 + 18, "{theirs}");
    assert_eq!(at_mirror(&ours.each_ref().map(String::as_str)), theirs);
    // By a path in the mirror's mount, too, and as df shows it.
    let place = seen.join("team");
    let place = place.to_str().unwrap();
    assert_eq!(at_mirror(&["quota", "get", place]), theirs);
    let shown = statvfs(place).unwrap();
    assert_eq!(shown.blocks() * shown.fragment_size(), 400 << 10);
    assert_eq!(shown.files(), 5);

    // What would change it is refused, by the kernel and by the server.
    read_only(fs::write(seen.join(kept).join("deep/small"), "x"));
    read_only(fs::remove_dir_all(seen.join(kept).join("deep")));
    read_only(fs::write(seen.join("team/last"), "x"));
    let refused = [
        vec![
            "quota", "set", &seen_url, "--path", "/team", "--inodes", "9",
        ],
        vec!["quota", "rm", &seen_url, "--path", "/team"],
        vec!["snapshot", "create", &seen_url, "/team", "--name", "mine"],
        vec!["snapshot", "rm", &seen_url, "monday"],
    ];
    for arguments in refused {
        let ran = mirror.run(&arguments);
        assert_eq!(ran.code, 1, "{arguments:?}: {ran:?}");
        assert!(
            ran.err.to_lowercase().contains("read-only"),
            "{arguments:?}: {ran:?}"
        );
    }

    // What changes at the source is seen: a removed snapshot and a raised limit.
    source.run(&["snapshot", "rm", &url, "monday"]).success();
    set(&of_team, &["--capacity", "2M", "--inodes", "9"]);
    stored(&team.join("one-more"), 500_000).unwrap();
    assert_mirror_equal(&source, &mirror, "views");
    assert_eq!(
        at_mirror(&["snapshot", "ls", &seen_url]),
        Value::Array(vec![])
    );
    let list = at_source(&["quota", "list", &url]);
    assert_eq!(at_mirror(&["quota", "list", &seen_url]), list);
    wait_for("the snapshot to go", Duration::from_secs(10), || {
        (!seen.join(kept).exists()).then_some(())
    });
    seen.unmount();
    mount.unmount();
}

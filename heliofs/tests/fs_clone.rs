//! Clones share data, keep everything about files, and live on by themselves.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use support::Cluster;
use support::cluster::run;

fn objects(bucket: &Path) -> usize {
    let groups = fs::read_dir(bucket)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let groups = groups.filter(|path| path.is_dir());
    groups
        .map(|group| fs::read_dir(group).unwrap().count())
        .sum()
}

/// Names, kinds, modes, owners, times, targets, attributes and contents, as one text.
fn describe(directory: &Path) -> String {
    let script = "cd \"$0\" && find . -printf '%p %y %m %U:%G %n %s %T@ %l\\n' | sort && \
                  find . -type f -print0 | sort -z | xargs -0 sha256sum && \
                  getfattr -R -d -m - . 2>/dev/null | sort";
    run(Command::new("sh").args(["-c", script]).arg(directory))
        .success()
        .out
}

#[test]
fn a_clone_is_the_same_shares_the_data_and_lives_by_itself() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("twins", &["--deletion-grace", "0s"]);
    let bucket = cluster.directory.join("bucket/twins");
    let mount = cluster.mount("twins");
    let source = mount.join("source");
    fs::create_dir_all(source.join("deep/er")).unwrap();
    let large: Vec<u8> = (0..9_000_000u32).map(|n| (n >> 5) as u8).collect();
    fs::write(source.join("large"), &large).unwrap();
    fs::write(source.join("deep/small"), "small").unwrap();
    fs::hard_link(source.join("deep/small"), source.join("deep/er/linked")).unwrap();
    symlink("../large", source.join("deep/link")).unwrap();
    let sparse = fs::File::create(source.join("deep/er/sparse")).unwrap();
    sparse.write_all_at(b"end", 5_000_000).unwrap();
    sparse.set_len(7_000_000).unwrap();
    drop(sparse);
    for n in 0..300 {
        fs::write(source.join(format!("deep/n{n}")), format!("{n}")).unwrap();
    }
    let setfattr = Command::new("setfattr")
        .args(["-n", "user.colour", "-v", "blue"])
        .arg(source.join("large"))
        .status();
    assert!(setfattr.unwrap().success());
    fs::set_permissions(
        source.join("deep/small"),
        fs::Permissions::from_mode(0o4751),
    )
    .unwrap();
    std::os::unix::fs::chown(source.join("deep/n5"), Some(1234), Some(567)).unwrap();
    fs::set_permissions(source.join("deep/er"), fs::Permissions::from_mode(0o2770)).unwrap();

    let target = mount.join("target");
    let paths = [source.to_str().unwrap(), target.to_str().unwrap()];
    let ran = cluster
        .run(&["clone", paths[0], paths[1], "--json"])
        .success()
        .json();
    assert_eq!(ran["entries"].as_u64().unwrap(), 308, "{ran}");
    let (original, copy) = (describe(&source), describe(&target));
    let differing = original.lines().zip(copy.lines()).filter(|(a, b)| a != b);
    assert_eq!(differing.collect::<Vec<_>>(), []);
    assert_eq!(original.lines().count(), copy.lines().count());
    let before = objects(&bucket);
    let linked = fs::metadata(target.join("deep/er/linked")).unwrap().ino();
    assert_eq!(
        linked,
        fs::metadata(target.join("deep/small")).unwrap().ino()
    );
    cluster
        .run(&["clone", paths[0], paths[1]])
        .failure(1, "exists already");
    // By URL, and a single file.
    let url = cluster.volume_url("twins");
    cluster
        .run(&["clone", &url, "/source/large", "/copy"])
        .success();
    assert_eq!(objects(&bucket), before, "no object was written");
    assert!(fs::read(mount.join("copy")).unwrap() == large);

    // Each on its own from here on.
    let file = fs::OpenOptions::new()
        .write(true)
        .open(target.join("large"))
        .unwrap();
    file.write_all_at(b"changed", 4_500_000).unwrap();
    file.sync_all().unwrap();
    drop(file);
    assert!(fs::read(source.join("large")).unwrap() == large);
    fs::remove_dir_all(&source).unwrap();
    let mut changed = large.clone();
    changed[4_500_000..4_500_007].copy_from_slice(b"changed");
    assert!(fs::read(target.join("large")).unwrap() == changed);
    assert_eq!(fs::read(target.join("deep/small")).unwrap(), b"small");
    mount.unmount();
    cluster
        .run(&["compact", &url, "--live-percent", "99"])
        .success();
    cluster.run(&["fsck", &url, "--level", "data"]).success();
    let found = cluster.run(&["gc", &url, "--json"]).success().json();
    assert_eq!(found["leaks"].as_array().unwrap().len(), 0, "{found}");
    let mount = cluster.mount("twins");
    assert!(fs::read(mount.join("target/large")).unwrap() == changed);
    assert!(fs::read(mount.join("copy")).unwrap() == large);
    mount.unmount();
}

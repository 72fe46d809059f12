//! The trash: what is removed is kept for a while, comes back where it was, and goes when its days are over.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use support::{Cluster, wait_for};

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Everything in all hours of the trash.
fn trashed(trash: &Path) -> Vec<PathBuf> {
    let hours = fs::read_dir(trash).unwrap();
    let mut found: Vec<PathBuf> = hours
        .flat_map(|hour| fs::read_dir(hour.unwrap().path()).unwrap())
        .map(|entry| entry.unwrap().path())
        .collect();
    found.sort();
    found
}

#[test]
fn what_is_removed_is_kept_comes_back_and_expires() {
    let mut cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("tidy", &["--trash-days", "1", "--deletion-grace", "0s"]);
    let mount = cluster.mount("tidy");
    let other = cluster.mount("tidy");
    let large = vec![7u8; 300_000];
    fs::create_dir_all(mount.join("a/b")).unwrap();
    fs::write(mount.join("a/b/large"), &large).unwrap();
    fs::write(mount.join("a/small"), "small").unwrap();
    fs::write(mount.join("once"), "old").unwrap();
    fs::write(mount.join("twice"), "new").unwrap();
    assert_eq!(names(&mount.path), ["a", "once", "twice"]);
    assert_eq!(names(&other.path), ["a", "once", "twice"]);

    fs::remove_dir_all(mount.join("a")).unwrap();
    fs::rename(mount.join("twice"), mount.join("once")).unwrap();
    // Both see it at once, the one that removed and the other, though both had listed the root.
    for place in [&mount, &other] {
        assert_eq!(names(&place.path), [".trash", "once"]);
        let kept = trashed(&place.join(".trash"));
        let kept: Vec<String> = kept
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
            .collect();
        for name in ["-a", "-b", "-large", "-small", "-once"] {
            assert!(
                kept.iter().any(|kept| kept.ends_with(name)),
                "{name}: {kept:?}"
            );
        }
        assert_eq!(kept.len(), 5, "{kept:?}");
    }
    assert_eq!(fs::read(mount.join("once")).unwrap(), b"new");
    let refused = fs::remove_dir_all(mount.join(".trash"));
    assert!(refused.is_err(), "the trash itself stays");
    // It was emptied by that, for good, but for what was removed since.
    assert_eq!(trashed(&mount.join(".trash")), Vec::<PathBuf>::new());

    fs::create_dir_all(mount.join("a/b")).unwrap();
    fs::write(mount.join("a/b/large"), &large).unwrap();
    fs::write(mount.join("a/small"), "small").unwrap();
    fs::remove_dir_all(mount.join("a")).unwrap();
    fs::write(mount.join("gone"), "gone").unwrap();
    fs::remove_file(mount.join("gone")).unwrap();
    fs::write(mount.join("gone"), "again").unwrap();
    let url = cluster.volume_url("tidy");
    let listed = cluster.run(&["restore", &url, "--json"]).success().json();
    assert_eq!(listed.as_array().unwrap().len(), 5, "{listed}");
    assert_eq!(names(&mount.path), [".trash", "gone", "once"], "only shown");
    let ran = cluster.run(&["restore", &url, "--put-back"]);
    ran.failure(1, "1 things could not be restored");
    for place in [&mount, &other] {
        assert_eq!(names(&place.path), [".trash", "a", "gone", "once"]);
        assert_eq!(names(&place.join("a")), ["b", "small"]);
        assert!(fs::read(place.join("a/b/large")).unwrap() == large);
        assert_eq!(fs::read(place.join("gone")).unwrap(), b"again");
    }
    assert_eq!(trashed(&mount.join(".trash")).len(), 1);
    // rmr moves the whole tree.
    let path = mount.join("a");
    cluster.run(&["rmr", path.to_str().unwrap()]).success();
    assert_eq!(names(&mount.path), [".trash", "gone", "once"]);
    assert_eq!(trashed(&mount.join(".trash")).len(), 2);

    // An hour long past, as if it had been made then: the next look removes it and nothing else.
    let old = mount.join(".trash/2020-02-29-23");
    fs::create_dir(&old).unwrap();
    fs::write(old.join("1-99-x"), &large).unwrap();
    fs::create_dir(mount.join(".trash/notes")).unwrap();
    cluster.stop_node(0);
    cluster.start_node(0);
    wait_for("the old hour to go", Duration::from_secs(60), || {
        let names = names(&mount.join(".trash"));
        (!names.contains(&"2020-02-29-23".to_owned())).then_some(())
    });
    assert!(names(&mount.join(".trash")).contains(&"notes".to_owned()));
    assert_eq!(trashed(&mount.join(".trash")).len(), 2);
    mount.unmount();
    other.unmount();
    cluster.run(&["fsck", &url, "--level", "data"]).success();
}

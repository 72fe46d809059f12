//! Damage outside the metadata: cache files and objects that are not what was stored give an error or the right bytes, never
//! others.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use support::{Cluster, Mount};

/// Several pages and a part of one.
fn content(seed: u8) -> Vec<u8> {
    (0..500_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed)
        .collect()
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(files_below(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

/// What is cached: files of pages, not locks.
fn cached(directory: &Path) -> Vec<PathBuf> {
    let is_run = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.matches('-').count() == 3
    };
    files_below(directory).into_iter().filter(is_run).collect()
}

/// The object that holds the file's data.
fn object_of(cluster: &Cluster, volume: &str, path: &str) -> PathBuf {
    let info = cluster
        .run(&["info", &cluster.volume_url(volume), path, "--json"])
        .success()
        .json();
    let extents = info[0]["extents"].as_array().unwrap();
    assert_eq!(extents.len(), 1, "{info}");
    let key = extents[0]["object"].as_str().unwrap();
    let object = cluster.directory.join("bucket").join(key);
    assert!(object.exists(), "{} is not there", object.display());
    object
}

fn flip_a_bit_in_the_middle(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_corrupt_cache_file_is_replaced_from_the_bucket() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("cached", &[]);
    let cache = cluster.directory.join("cache");
    let text = content(1);
    let mount = Mount::with_cache(&cluster, "cached", Some(&cache), &[]);
    fs::write(mount.join("file"), &text).unwrap();
    assert_eq!(fs::read(mount.join("file")).unwrap(), text);
    mount.unmount();
    let damaged = cached(&cache);
    assert!(!damaged.is_empty(), "nothing was cached");
    for path in &damaged {
        flip_a_bit_in_the_middle(path);
    }

    let address = format!("127.0.0.1:{}", support::free_ports(1)[0]);
    let mount = Mount::with_cache(&cluster, "cached", Some(&cache), &["--metrics", &address]);
    // What lies in the cache is found in the background.
    support::wait_for("the cache to be found", Duration::from_secs(20), || {
        (support::metric(&address, "heliofs_blockstore_disk_cache_bytes") > 0).then_some(())
    });
    assert_eq!(fs::read(mount.join("file")).unwrap(), text);
    assert!(support::metric(&address, "heliofs_blockstore_corrupt_cache_files_total") > 0);
    assert!(mount.process.log().contains("corrupt cache file"));
    mount.unmount();

    // Healed: the cache alone has it all.
    let object = object_of(&cluster, "cached", "/file");
    fs::remove_file(&object).unwrap();
    let mount = Mount::with_cache(&cluster, "cached", Some(&cache), &[]);
    assert_eq!(fs::read(mount.join("file")).unwrap(), text);
    mount.unmount();
}

#[test]
fn a_damaged_object_is_an_error_that_is_logged_and_never_other_bytes() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("objects", &[]);
    // An object for each: files that are stored together share one.
    let mount = Mount::of(&cluster, "objects", &["--close-sync"]);
    for (name, seed) in [("truncated", 1), ("flipped", 2), ("gone", 3), ("sound", 4)] {
        fs::write(mount.join(name), content(seed)).unwrap();
    }
    mount.unmount();
    let object = |name: &str| object_of(&cluster, "objects", &format!("/{name}"));
    let truncated = object("truncated");
    let bytes = fs::read(&truncated).unwrap();
    fs::write(&truncated, &bytes[..bytes.len() / 2]).unwrap();
    flip_a_bit_in_the_middle(&object("flipped"));
    fs::remove_file(object("gone")).unwrap();

    let mount = Mount::of(
        &cluster,
        "objects",
        &["--cache-size", "0", "--io-timeout", "2s"],
    );
    for name in ["truncated", "flipped", "gone"] {
        let refused = fs::read(mount.join(name)).expect_err(name);
        assert_eq!(refused.raw_os_error(), Some(libc::EIO), "{name}");
    }
    assert_eq!(fs::read(mount.join("sound")).unwrap(), content(4));
    // A page before the damage is sound and may be had; what is given is what was stored.
    for (name, seed) in [("truncated", 1), ("flipped", 2)] {
        let mut page = vec![0; 4096];
        let file = fs::File::open(mount.join(name)).unwrap();
        if file.read_exact_at(&mut page, 0).is_ok() {
            assert_eq!(page, content(seed)[..4096], "{name}");
        }
    }
    let log = mount.process.log();
    assert!(log.contains("corrupt data"), "{log}");
    // One more time alone, since paths are asked for one at a time: the line names volume, segment, page and path.
    support::wait_for("the path", std::time::Duration::from_secs(30), || {
        assert!(fs::read(mount.join("flipped")).is_err());
        let log = mount.process.log();
        let named = |line: &str| {
            let words = [
                "read failed",
                "path=\"/flipped\"",
                "volume 1 segment",
                "page",
            ];
            words.iter().all(|word| line.contains(word))
        };
        log.lines().any(named).then_some(())
    });
    mount.unmount();
}

#[test]
fn another_volumes_bucket_or_an_empty_one_is_not_mounted() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("first", &[]);
    cluster.format_file("second", &[]);
    let bucket = cluster.directory.join("bucket");
    let point = cluster.directory.join("mnt");
    fs::create_dir(&point).unwrap();
    let mount = |name: &str| {
        cluster.run(&[
            "mount",
            &cluster.url(),
            name,
            point.to_str().unwrap(),
            "--cache-size",
            "0",
        ])
    };
    let marker = |name: &str| bucket.join(name).join(".heliofs-volume");
    let own = fs::read(marker("first")).unwrap();
    fs::copy(marker("second"), marker("first")).unwrap();
    let refused = mount("first").failure(1, "belongs to the volume with uuid");
    assert!(refused.err.contains("hint: "), "{}", refused.err);
    fs::remove_file(marker("first")).unwrap();
    let refused = mount("first").failure(1, "its marker object is missing");
    assert!(refused.err.contains("hint: "), "{}", refused.err);
    assert!(!support::mount::is_mounted(&point));
    fs::write(marker("first"), own).unwrap();
    let mounted = cluster.mount("first");
    fs::write(mounted.join("file"), content(1)).unwrap();
    mounted.unmount();
}

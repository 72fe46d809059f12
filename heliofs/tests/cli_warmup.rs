//! warmup fills caches; objbench measures a store and leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;

use support::{Cluster, Mount, S3};

#[test]
fn what_was_warmed_up_is_read_without_the_bucket() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    cluster.format_file("warm", &["--compress", "lz4"]);
    let bucket = cluster.directory.join("bucket/warm");
    let data: Vec<u8> = (0..6_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 25) as u8)
        .collect();
    let mount = cluster.mount("warm");
    fs::create_dir_all(mount.join("dir/deep")).unwrap();
    fs::write(mount.join("dir/large"), &data).unwrap();
    fs::hard_link(mount.join("dir/large"), mount.join("dir/deep/again")).unwrap();
    for n in 0..50 {
        fs::write(
            mount.join(format!("dir/deep/{n}")),
            &data[n * 1000..n * 1000 + 9000],
        )
        .unwrap();
    }
    mount.unmount();

    // Two disks, so to speak.
    let caches = [
        cluster.directory.join("cache-1"),
        cluster.directory.join("cache-2"),
    ];
    let both = format!("{}:{}", caches[0].display(), caches[1].display());
    let flags = ["--io-timeout", "2s", "--no-bgjob"];
    let mount = Mount::with_cache(&cluster, "warm", Some(both.as_ref()), &flags);
    let path = mount.join("dir");
    let ran = cluster
        .run(&["warmup", path.to_str().unwrap(), "--json"])
        .success()
        .json();
    assert_eq!(ran["files"], 51, "{ran}");
    assert_eq!(ran["bytes"], 6_000_000 + 50 * 9000, "{ran}");
    assert!(caches.iter().all(|cache| cache.exists()));
    let away = bucket.with_extension("away");
    fs::rename(&bucket, &away).unwrap();
    assert!(fs::read(mount.join("dir/large")).unwrap() == data);
    for n in 0..50 {
        let read = fs::read(mount.join(format!("dir/deep/{n}"))).unwrap();
        assert!(read == data[n * 1000..n * 1000 + 9000], "{n}");
    }
    fs::rename(&away, &bucket).unwrap();
    mount.unmount();
    let elsewhere = cluster.directory.to_str().unwrap().to_owned();
    cluster
        .run(&["warmup", &elsewhere])
        .failure(1, "not in a mount");
}

#[test]
fn a_store_is_measured_and_left_clean() {
    let cluster = Cluster::with_dirs(1, |_, _| None, &[]);
    let s3 = S3::start();
    // Makes the bucket.
    cluster.format_s3("bench", &s3, &[]);
    let url = s3.bucket_url("bench");
    let few = [
        "--objects",
        "4",
        "--small-objects",
        "20",
        "--block-size",
        "256K",
        "--json",
    ];
    let mut arguments = vec!["objbench", &url];
    arguments.extend(few);
    let ran = cluster
        .run_with(&arguments, |command| s3.keys(command))
        .success()
        .json();
    assert_eq!(ran["conditional_put"], true, "{ran}");
    let measured = ran["measured"].as_array().unwrap();
    assert_eq!(measured.len(), 6, "{ran}");
    assert!(
        measured
            .iter()
            .all(|it| it["requests"].as_u64().unwrap() > 0),
        "{ran}"
    );

    let directory = cluster.directory.join("plain");
    fs::create_dir(&directory).unwrap();
    let mut arguments = vec!["objbench", directory.to_str().unwrap(), "--storage", "file"];
    arguments.extend(few);
    cluster.run(&arguments).success();
    let left: Vec<_> = walk(&directory);
    assert!(left.is_empty(), "{left:?}");
}

fn walk(directory: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => files.extend(walk(&entry.path())),
            false => files.push(entry.path()),
        }
    }
    files
}

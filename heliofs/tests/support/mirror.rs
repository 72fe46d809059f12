//! A mirror cluster of another cluster, and how the two compare.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::{Cluster, Ran, S3, wait_for};

/// Nodes that mirror `source`, which they reach at `url`.
pub fn mirror_of(source: &Cluster, url: &str, nodes: usize, flags: &[&str]) -> Cluster {
    let token = source.token_file.to_str().unwrap();
    let mut all = vec!["--mirror-of", url, "--mirror-token-file", token];
    all.extend(flags);
    Cluster::with_dirs(nodes, |_, _| None, &all)
}

/// Gives a volume of the mirror a bucket of its own, in a directory.
pub fn give_bucket(mirror: &Cluster, volume: &str, bucket: &Path, flags: &[&str]) -> Ran {
    let (url, bucket) = (mirror.volume_url(volume), bucket.to_str().unwrap());
    let mut ask = vec![
        "mirror",
        "bucket",
        &url,
        "--storage",
        "file",
        "--bucket",
        bucket,
    ];
    ask.extend(flags);
    mirror.run(&ask)
}

/// The same, in one of an S3 server.
pub fn give_s3_bucket(mirror: &Cluster, volume: &str, s3: &S3, bucket: &str) {
    let url = mirror.volume_url(volume);
    let ask = ["mirror", "bucket", &url, "--bucket", bucket];
    mirror.run_with(&ask, |command| s3.keys(command)).success();
}

/// Where the source is.
pub fn token(source: &Cluster, volume: &str) -> String {
    let token = source.run(&["mirror", "token", &source.volume_url(volume)]);
    token.success().out.trim().to_owned()
}

/// Waits until the mirror's own bucket has everything that the source has now.
pub fn wait_complete(source: &Cluster, mirror: &Cluster, volume: &str) {
    let (url, token) = (mirror.volume_url(volume), token(source, volume));
    mirror
        .run(&["mirror", "wait", &url, &token, "--data", "--timeout", "60s"])
        .success();
}

/// What `heliofs mirror status` says of a volume; `None` while nobody can say.
pub fn mirror_status(mirror: &Cluster, volume: &str) -> Option<Value> {
    let ran = mirror.run(&["mirror", "status", &mirror.volume_url(volume), "--json"]);
    (ran.code == 0).then(|| ran.json()[0].clone())
}

/// Waits until the mirror's status is as wanted; the status.
pub fn wait_for_status(
    mirror: &Cluster,
    volume: &str,
    what: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Value {
    let mut last = None;
    wait_for(what, Duration::from_secs(60), || {
        last = mirror_status(mirror, volume).or(last.take());
        last.clone().filter(&wanted)
    })
}

/// Takes a token at the source and waits for it at the mirror.
pub fn catch_up(source: &Cluster, mirror: &Cluster, volume: &str) -> String {
    let token = token(source, volume);
    // Until the volume is loaded for the first time there is nothing to wait at.
    wait_for(
        "the mirror's reaching the source",
        Duration::from_secs(120),
        || {
            let url = mirror.volume_url(volume);
            let ran = mirror.run(&["mirror", "wait", &url, &token, "--timeout", "30s"]);
            (ran.code == 0).then_some(())
        },
    );
    token
}

/// Source and mirror have equal records, and so have all nodes of each.
pub fn assert_mirror_equal(source: &Cluster, mirror: &Cluster, volume: &str) {
    catch_up(source, mirror, volume);
    mirror
        .run(&[
            "mirror",
            "verify",
            &mirror.volume_url(volume),
            "--source",
            &source.url(),
        ])
        .success();
    source.assert_replicas_equal(volume);
    mirror.assert_replicas_equal(volume);
    let status = mirror_status(mirror, volume).unwrap();
    assert_eq!(status["state"], "following", "{status}");
}

/// Everything that can be seen of a tree: paths, kinds, modes, owners, times and contents.
pub fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let content = if meta.is_dir() {
                open.push(path.clone());
                String::new()
            } else if meta.is_symlink() {
                fs::read_link(&path).unwrap().to_string_lossy().into_owned()
            } else {
                let bytes = fs::read(&path).unwrap();
                format!("{} bytes, crc {:08x}", bytes.len(), crc(&bytes))
            };
            let line = format!(
                "{:o} {}:{} {} {}.{} {content}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.size(),
                meta.mtime(),
                meta.mtime_nsec(),
            );
            found.insert(path.strip_prefix(root).unwrap().to_owned(), line);
        }
    }
    found
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

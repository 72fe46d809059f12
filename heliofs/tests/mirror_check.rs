//! Both buckets of a mirrored volume are checked against the metadata now and then: what one has lost comes back from the other,
//! and nothing that was removed does.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use support::cluster::HELIOFS;
use support::mirror::{catch_up, give_bucket, mirror_of, mirror_status, tree, wait_complete};
use support::{Cluster, Mount, Process, S3, scratch, wait_for};

const VOLUME: &str = "photos";

/// Objects of segments below a volume's directory.
fn objects(bucket: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for directory in fs::read_dir(bucket.join(VOLUME)).unwrap() {
        let directory = directory.unwrap().path();
        if directory.is_dir() {
            let names = fs::read_dir(&directory).unwrap();
            found.extend(names.map(|name| {
                let path = name.unwrap().path();
                path.strip_prefix(bucket).unwrap().to_owned()
            }));
        }
    }
    found
}

/// Files that are segments of their own, one by one.
fn write_files(root: &Path, prefix: &str, count: usize) {
    for number in 0..count {
        let mut file = File::create(root.join(format!("{prefix}-{number}"))).unwrap();
        file.write_all(&vec![number as u8; 40_000 + number])
            .unwrap();
        file.sync_all().unwrap();
    }
}

fn check(mirror: &Cluster) -> Value {
    mirror_status(mirror, VOLUME).unwrap()["bucket"]["check"].clone()
}

/// Waits for the end of another check; what it came to.
fn next_check(mirror: &Cluster) -> Value {
    let before = check(mirror)["checks"].as_u64().unwrap_or(0);
    wait_for("a check", Duration::from_secs(60), || {
        let now = check(mirror);
        (now["checks"].as_u64().unwrap_or(0) > before).then(|| now["last"].clone())
    })
}

fn worker(mirror: &Cluster, flags: &[&str]) -> Process {
    let log = mirror.directory.join("worker.log");
    Process::start("a worker", &log, Path::new(HELIOFS), |command| {
        command
            .args(["mirror", "worker", &mirror.volume_url(VOLUME)])
            .args(flags)
            .env("HELIOFS_TOKEN_FILE", &mirror.token_file);
    })
}

struct Regions {
    source: Cluster,
    mirror: Cluster,
    here: PathBuf,
    there: PathBuf,
    mount: Mount,
    _buckets: tempfile::TempDir,
}

/// Two regions with a directory each for their objects, both complete; nobody copies or checks.
fn regions() -> Regions {
    let buckets = scratch();
    let (here, there) = (buckets.path().join("source"), buckets.path().join("mirror"));
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    let url = source.volume_url(VOLUME);
    let bucket = here.to_str().unwrap();
    source
        .run(&["format", &url, "--bucket", bucket, "--deletion-grace", "0s"])
        .success();
    let mirror = mirror_of(&source, &source.url(), 1, &[]);
    catch_up(&source, &mirror, VOLUME);
    give_bucket(&mirror, VOLUME, &there, &[]).success();
    let mount = source.mount(VOLUME);
    write_files(&mount.path, "kept", 24);
    let mut copying = worker(&mirror, &["--sync-interval", "0s"]);
    wait_complete(&source, &mirror, VOLUME);
    copying.kill();
    Regions {
        source,
        mirror,
        here,
        there,
        mount,
        _buckets: buckets,
    }
}

#[test]
fn what_either_bucket_lost_comes_back_from_the_other_and_what_was_removed_does_not() {
    let regions = regions();
    let (source, mirror) = (&regions.source, &regions.mirror);
    let whole = objects(&regions.here);
    assert_eq!(objects(&regions.there), whole);
    assert!(whole.len() > 20, "{}", whole.len());
    // Removed at the source, and gone from its bucket.
    write_files(&regions.mount.path, "removed", 5);
    let removed: Vec<PathBuf> = objects(&regions.here).difference(&whole).cloned().collect();
    assert!(!removed.is_empty());
    let mut copying = worker(mirror, &["--sync-interval", "0s"]);
    wait_complete(source, mirror, VOLUME);
    copying.kill();
    for number in 0..5 {
        fs::remove_file(regions.mount.join(format!("removed-{number}"))).unwrap();
    }
    wait_for("deletion at the source", Duration::from_secs(60), || {
        (objects(&regions.here) == whole).then_some(())
    });
    let all: Vec<&PathBuf> = whole.iter().collect();
    // Lost here, lost there, cut short here, cut short there.
    for name in &all[..4] {
        fs::remove_file(regions.here.join(name)).unwrap();
    }
    for name in &all[4..7] {
        fs::remove_file(regions.there.join(name)).unwrap();
    }
    let cut = |bucket: &Path, name: &Path| {
        let file = File::options().write(true).open(bucket.join(name)).unwrap();
        file.set_len(1000).unwrap();
    };
    cut(&regions.here, all[7]);
    cut(&regions.there, all[8]);
    let mut checking = worker(mirror, &["--sync-interval", "1s"]);
    let found = next_check(mirror);
    assert_eq!(found["source_lost"], 5, "{found}");
    assert_eq!(found["source_healed"], 5, "{found}");
    assert_eq!(found["own_lost"], 4, "{found}");
    assert_eq!(found["segments"], whole.len(), "{found}");
    assert_eq!(found["reason"], "", "{found}");
    wait_complete(source, mirror, VOLUME);
    wait_for("whole buckets", Duration::from_secs(30), || {
        let same = |bucket: &Path| {
            let other = if bucket == regions.here {
                &regions.there
            } else {
                &regions.here
            };
            objects(bucket) == whole
                && whole.iter().all(|name| {
                    fs::read(bucket.join(name)).unwrap() == fs::read(other.join(name)).unwrap()
                })
        };
        (same(&regions.here) && same(&regions.there)).then_some(())
    });
    let clean = next_check(mirror);
    assert_eq!(
        (&clean["source_lost"], &clean["own_lost"]),
        (&Value::from(0), &Value::from(0))
    );
    for name in removed {
        assert!(
            !regions.here.join(&name).exists(),
            "{} is back",
            name.display()
        );
    }
    let url = source.volume_url(VOLUME);
    source.run(&["fsck", &url, "--level", "data"]).success();
    checking.kill();
}

#[test]
fn an_emptied_source_bucket_is_filled_from_the_mirrors_and_readers_notice_nothing() {
    let regions = regions();
    let (source, mirror) = (&regions.source, &regions.mirror);
    let wanted = tree(&regions.mount.path);
    let whole = objects(&regions.here);
    let complete = Mount::of(
        mirror,
        VOLUME,
        &["--mirror-read", "complete", "--sync-interval", "0s"],
    );
    fs::remove_dir_all(regions.here.join(VOLUME)).unwrap();
    assert_eq!(tree(&complete.path), wanted);
    let url = source.volume_url(VOLUME);
    let damaged = source.run(&["fsck", &url]);
    assert_ne!(damaged.code, 0, "{damaged:?}");
    let from = regions.there.to_str().unwrap();
    let repaired = source.run(&["fsck", &url, "--repair", "--bucket2", from, "--json"]);
    let repaired = repaired.success().json();
    assert_eq!(
        repaired["damages"].as_array().unwrap().len(),
        whole.len(),
        "{repaired}"
    );
    assert_eq!(objects(&regions.here), whole);
    source.run(&["fsck", &url, "--level", "data"]).success();
    let mount = source.mount(VOLUME);
    assert_eq!(tree(&mount.path), wanted);
    // What the other bucket does not have either is told, and nothing is made up.
    let name = whole.first().unwrap();
    fs::remove_file(regions.here.join(name)).unwrap();
    fs::remove_file(regions.there.join(name)).unwrap();
    let lost = source.run(&["fsck", &url, "--repair", "--bucket2", from]);
    assert_eq!(lost.code, 4, "{lost:?}");
}

#[test]
fn a_source_bucket_that_lost_its_marker_too_is_filled_if_it_is_known_to_be_the_one() {
    let regions = regions();
    let (source, mirror) = (&regions.source, &regions.mirror);
    let whole = objects(&regions.here);
    fs::remove_dir_all(regions.here.join(VOLUME)).unwrap();
    fs::create_dir(regions.here.join(VOLUME)).unwrap();
    // Somebody else's word for where it is may be wrong.
    let word = regions.here.to_str().unwrap().to_owned() + "/";
    let flags = ["--sync-interval", "1s", "--bucket2", &word];
    let mut told = worker(mirror, &flags);
    let found = next_check(mirror);
    let why = found["reason"].as_str().unwrap();
    assert!(why.contains("nothing is put into it"), "{found}");
    assert!(why.contains("fsck --repair"), "{found}");
    assert_eq!(found["source_healed"], 0, "{found}");
    assert_eq!(objects(&regions.here), BTreeSet::new());
    told.kill();
    let mut checking = worker(mirror, &["--sync-interval", "1s"]);
    wait_for("the objects", Duration::from_secs(60), || {
        (objects(&regions.here) == whole).then_some(())
    });
    let found = next_check(mirror);
    assert_eq!(found["reason"], "", "{found}");
    checking.kill();
    // New mounts of the source look for the marker.
    let url = source.volume_url(VOLUME);
    source.run(&["fsck", &url, "--level", "data"]).success();
    let mount = source.mount(VOLUME);
    assert_eq!(tree(&mount.path), tree(&regions.mount.path));
    mount.unmount();
    // One of another volume stays as it is.
    let marker = regions.here.join(VOLUME).join(".heliofs-volume");
    let text = fs::read_to_string(&marker).unwrap();
    let another = text.replace(|c: char| c.is_ascii_digit(), "0");
    assert_ne!(another, text);
    fs::write(&marker, &another).unwrap();
    fs::remove_file(regions.here.join(whole.first().unwrap())).unwrap();
    let refused = mirror.run(&["mirror", "worker", &mirror.volume_url(VOLUME), "--once"]);
    refused.failure(1, "the second bucket is not the source's");
    assert_eq!(fs::read_to_string(&marker).unwrap(), another);
}

#[test]
fn keys_that_may_only_read_report_what_the_source_lost() {
    let s3 = S3::start();
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_s3(VOLUME, &s3, &[]);
    let mirror = mirror_of(&source, &source.url(), 1, &[]);
    catch_up(&source, &mirror, VOLUME);
    let own = mirror.directory.join("own");
    give_bucket(&mirror, VOLUME, &own, &[]).success();
    let mount = source.mount(VOLUME);
    write_files(&mount.path, "kept", 6);
    let reader = [
        "--access-key2",
        "test-reader",
        "--secret-key2",
        "test-reader-key",
    ];
    let mut flags = reader.to_vec();
    flags.extend(["--sync-interval", "0s"]);
    let mut copying = worker(&mirror, &flags);
    wait_complete(&source, &mirror, VOLUME);
    copying.kill();
    let lost = objects(&own).first().unwrap().clone();
    let status = support::cluster::run(
        std::process::Command::new("curl")
            .args([
                "-sf",
                "-X",
                "DELETE",
                "--aws-sigv4",
                "aws:amz:us-east-1:s3",
                "-u",
            ])
            .arg(format!(
                "{}:{}",
                support::s3::ACCESS_KEY,
                support::s3::SECRET_KEY
            ))
            .args(["-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD"])
            .arg(format!("{}/{}", s3.bucket_url(VOLUME), lost.display())),
    );
    assert_eq!(status.code, 0, "{status:?}");
    fs::remove_file(own.join(objects(&own).last().unwrap())).unwrap();
    let mut flags = reader.to_vec();
    flags.extend(["--sync-interval", "1s"]);
    let _checking = worker(&mirror, &flags);
    let found = next_check(&mirror);
    assert_eq!(found["source_lost"], 1, "{found}");
    assert_eq!(found["source_healed"], 0, "{found}");
    assert_eq!(found["own_lost"], 1, "{found}");
    let why = found["reason"].as_str().unwrap();
    assert!(why.contains("can't be put back"), "{found}");
    wait_complete(&source, &mirror, VOLUME);
}

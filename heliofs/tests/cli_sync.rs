//! `heliofs sync` between local trees and an S3 server that we did not write.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use support::cluster::{HELIOFS, run};
use support::mirror::{catch_up, mirror_of};
use support::s3::{ACCESS_KEY, SECRET_KEY};
use support::{Cluster, Process, Ran, S3, scratch, wait_for};

fn keys(command: &mut Command) {
    command
        .env("HELIOFS_ACCESS_KEY", ACCESS_KEY)
        .env("HELIOFS_SECRET_KEY", SECRET_KEY);
}

/// `heliofs sync` with the server's keys.
fn sync(arguments: &[&str]) -> Ran {
    let mut command = Command::new(HELIOFS);
    keys(command.arg("sync").args(arguments));
    run(&mut command)
}

/// The summary of a run that must succeed.
fn summary(arguments: &[&str]) -> Value {
    let mut all = vec!["--json"];
    all.extend(arguments);
    let ran = sync(&all).success();
    assert_eq!(ran.err, "");
    ran.json()
}

/// found, copied, skipped, deleted; nothing failed.
fn counts(summary: &Value) -> [u64; 4] {
    assert_eq!(summary["failed"], 0, "{summary}");
    assert_eq!(summary["lost"], 0, "{summary}");
    ["found", "copied", "skipped", "deleted"].map(|name| summary[name].as_u64().unwrap())
}

/// Every file below `root`, hidden ones and leftovers too.
fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                let key = path.strip_prefix(root).unwrap().to_str().unwrap();
                found.insert(key.to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    found
}

fn write(root: &Path, key: &str, bytes: &[u8]) {
    let path = root.join(key);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn noise(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Names whose order differs between servers, an empty file, and one that is stored in parts.
fn fill(root: &Path) -> usize {
    let names = [
        "d/a",
        "d/b/c",
        "d-x",
        "d-x.y/z",
        "d.txt",
        "d0",
        "e/f-x",
        "e/f/g",
        "e/f.h",
        "größe/日本 語",
        "plus+and %41 & more",
        "volume/.heliofs",
    ];
    for (seed, name) in (1..).zip(names) {
        write(root, name, &noise(100 + seed as usize, seed));
    }
    write(root, "empty", b"");
    write(root, "large", &noise(20_000_003, 99));
    names.len() + 2
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_tree_goes_to_a_bucket_and_back_and_then_only_what_differs() {
    let s3 = S3::start();
    let scratch = scratch();
    let (tree, back) = (scratch.path().join("tree"), scratch.path().join("back"));
    let all = fill(&tree) as u64;
    let bucket = s3.bucket_url("first/deep/prefix");
    let tree_text = format!("{}/", tree.display());

    let first = summary(&[&tree_text, &bucket, "--check-new"]);
    assert_eq!(counts(&first), [all, all, 0, 0]);
    assert_eq!(first["checked"], all);
    let bytes: usize = files(&tree).values().map(Vec::len).sum();
    assert_eq!(first["copied_bytes"], bytes);
    assert_eq!(counts(&summary(&[&tree_text, &bucket])), [all, 0, all, 0]);

    // From bucket to bucket, and from there to another tree.
    let second = s3.bucket_url("second");
    assert_eq!(counts(&summary(&[&bucket, &second])), [all, all, 0, 0]);
    let ran = summary(&[&second, text(&back)]);
    assert_eq!(counts(&ran), [all, all, 0, 0]);
    assert!(files(&tree) == files(&back));
    // A copy has the time of its source, so nothing is newer.
    let ran = summary(&[&second, text(&back), "--update"]);
    assert_eq!(counts(&ran), [all, 0, all, 0]);

    // One is longer, one is new, one is gone; one has other bytes of the same length, which only its time tells.
    write(&tree, "d.txt", b"longer than before, or shorter");
    write(&tree, "d/new", b"new");
    fs::remove_file(tree.join("e/f/g")).unwrap();
    let changed = noise(101, 1234);
    write(&tree, "d/a", &changed);
    let later = SystemTime::now() + Duration::from_secs(60);
    let file = fs::File::options().write(true).open(tree.join("d/a"));
    file.unwrap().set_modified(later).unwrap();
    let ran = summary(&[&tree_text, &bucket]);
    assert_eq!(counts(&ran), [all, 2, all - 2, 0]);
    let ran = summary(&[&tree_text, &bucket, "--update", "--delete-dst"]);
    assert_eq!(counts(&ran), [all, 1, all - 1, 1]);
    let again = scratch.path().join("again");
    summary(&[&bucket, text(&again)]);
    assert!(files(&tree) == files(&again));

    // Only what is there already; only what is not; and the source's are deleted when the destination has them.
    write(&tree, "only/here", b"x");
    write(&tree, "d0", b"another length");
    let ran = summary(&[&tree_text, &bucket, "--existing"]);
    assert_eq!(counts(&ran), [all + 1, 1, all, 0]);
    write(&tree, "d0", b"and yet another length");
    let ran = summary(&[&tree_text, &bucket, "--ignore-existing"]);
    assert_eq!(counts(&ran), [all + 1, 1, all, 0]);
    let before = files(&tree);
    let ran = summary(&[&tree_text, &bucket, "--delete-src"]);
    assert_eq!(ran["deleted"], all + 1, "{ran}");
    assert!(files(&tree).is_empty());
    summary(&[&bucket, text(&again), "--delete-dst", "--force-update"]);
    assert!(before == files(&again));
}

#[test]
fn patterns_ranges_and_limits_choose_and_a_dry_run_only_says() {
    let s3 = S3::start();
    let scratch = scratch();
    let tree = scratch.path().join("tree");
    for key in [
        "a.rs",
        "a.tmp",
        "src/b.rs",
        "src/b.tmp",
        "target/c.rs",
        "z/keep.tmp",
    ] {
        write(&tree, key, key.as_bytes());
    }
    symlink("a.rs", tree.join("link")).unwrap();
    symlink("src", tree.join("loop")).unwrap();
    symlink("nowhere", tree.join("src/broken")).unwrap();
    let bucket = s3.bucket_url("chosen");
    let chosen = [
        "--include",
        "keep.tmp",
        "--exclude",
        "*.tmp",
        "--exclude",
        "/target/",
    ];

    // The bucket must exist to be looked at.
    summary(&[text(&tree), &bucket, "--limit", "0"]);
    let mut dry = vec![text(&tree), &bucket, "--dry-run"];
    dry.extend(chosen);
    let said = sync(&dry).success();
    assert_eq!(
        said.out.lines().collect::<Vec<_>>(),
        [
            "copy a.rs",
            "copy link",
            "copy src/b.rs",
            "copy z/keep.tmp",
            "dry run: copied 4 of 4 objects (26 B), skipped 0, ignored 2"
        ],
    );
    assert!(
        said.err
            .contains("loop: ignored: a symbolic link to a directory")
    );
    assert!(
        said.err
            .contains("src/broken: ignored: a symbolic link to nothing")
    );

    let mut really = vec![text(&tree), bucket.as_str()];
    really.extend(chosen);
    let ran = summary(&really);
    assert_eq!(counts(&ran), [4, 4, 0, 0]);
    assert_eq!(ran["ignored"], 2);
    let copy = scratch.path().join("copy");
    summary(&[&bucket, text(&copy)]);
    assert_eq!(
        files(&copy).into_keys().collect::<Vec<_>>(),
        ["a.rs", "link", "src/b.rs", "z/keep.tmp"]
    );
    assert_eq!(files(&copy)["link"], b"a.rs");

    // What is excluded is not deleted either.
    write(&copy, "extra.tmp", b"x");
    write(&copy, "extra.rs", b"x");
    let mut delete = vec![bucket.as_str(), text(&copy), "--delete-dst"];
    delete.extend(chosen);
    let mut dry = delete.clone();
    dry.push("--dry");
    let said = sync(&dry).success();
    assert!(
        said.out.starts_with("delete at DST extra.rs\n"),
        "{}",
        said.out
    );
    assert!(copy.join("extra.rs").exists());
    assert_eq!(counts(&summary(&delete)), [4, 0, 4, 1]);
    assert!(copy.join("extra.tmp").exists() && !copy.join("extra.rs").exists());

    // Both ends belong to a range.
    let part = scratch.path().join("part");
    let range = ["--start", "a.tmp", "--end", "src/b.rs"];
    let mut arguments = vec![text(&tree), text(&part)];
    arguments.extend(range);
    assert_eq!(counts(&summary(&arguments)), [3, 3, 0, 0]);
    assert_eq!(
        files(&part).into_keys().collect::<Vec<_>>(),
        ["a.tmp", "link", "src/b.rs"]
    );
    // The same of a bucket, which has no a.tmp.
    let part = scratch.path().join("part-of-bucket");
    let mut arguments = vec![bucket.as_str(), text(&part)];
    arguments.extend(range);
    assert_eq!(counts(&summary(&arguments)), [2, 2, 0, 0]);
    assert_eq!(
        files(&part).into_keys().collect::<Vec<_>>(),
        ["link", "src/b.rs"]
    );
    let limited = scratch.path().join("limited");
    let ran = summary(&[&bucket, text(&limited), "--limit", "2"]);
    assert_eq!(counts(&ran), [2, 2, 0, 0]);
}

#[test]
fn single_objects_are_copied_by_their_names() {
    let s3 = S3::start();
    let scratch = scratch();
    write(scratch.path(), "file", b"content");
    let file = scratch.path().join("file");
    let bucket = s3.bucket_url("single");
    assert_eq!(
        counts(&summary(&[text(&file), &format!("{bucket}/x/y")])),
        [1, 1, 0, 0]
    );
    assert_eq!(
        counts(&summary(&[text(&file), &format!("{bucket}/x/")])),
        [1, 1, 0, 0]
    );
    assert_eq!(counts(&summary(&[text(&file), &bucket])), [1, 1, 0, 0]);
    let tree = scratch.path().join("tree");
    summary(&[&bucket, text(&tree)]);
    assert_eq!(
        files(&tree).into_keys().collect::<Vec<_>>(),
        ["file", "x/file", "x/y"]
    );
    let out = scratch.path().join("out/deep");
    assert_eq!(
        counts(&summary(&[&format!("{bucket}/x/y"), text(&out)])),
        [1, 1, 0, 0]
    );
    assert_eq!(fs::read(&out).unwrap(), b"content");

    // What consoles put where people want an empty directory is left alone, and does not hinder what lies below it.
    let empty =
        "x-amz-content-sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    for key in ["alone/", "x/"] {
        let mut command = Command::new("curl");
        command.args(["-sf", "-X", "PUT", "--aws-sigv4", "aws:amz:us-east-1:s3"]);
        command.args(["--user", &format!("{ACCESS_KEY}:{SECRET_KEY}"), "-H", empty]);
        run(command.arg(format!("{bucket}/{key}"))).success();
    }
    let again = scratch.path().join("again");
    assert_eq!(counts(&summary(&[&bucket, text(&again)])), [5, 3, 2, 0]);
    assert!(files(&again) == files(&tree));
    let ran = summary(&[text(&tree), &bucket, "--delete-dst"]);
    assert_eq!(counts(&ran), [3, 0, 3, 0]);
}

#[test]
fn a_killed_run_goes_on_where_it_was() {
    let s3 = S3::start();
    let scratch = scratch();
    let tree = scratch.path().join("tree");
    for n in 0..60 {
        write(
            &tree,
            &format!("dir-{}/{n:02}", n % 7),
            &noise(400_000, n + 1),
        );
    }
    let bucket = s3.bucket_url("killed");
    let copy = scratch.path().join("copy");
    // To a bucket, and from it to a directory.
    for (from, to) in [(text(&tree), bucket.as_str()), (&bucket, text(&copy))] {
        let checkpoint = scratch.path().join("checkpoint");
        let flags = [
            from,
            to,
            "--threads",
            "3",
            "--checkpoint",
            text(&checkpoint),
        ];
        let log = scratch.path().join("sync.log");
        let mut process = Process::start("sync", &log, HELIOFS.as_ref(), |command| {
            keys(command.arg("sync").args(flags).args(["--bwlimit", "2M"]));
        });
        let done = wait_for("a third of the run", Duration::from_secs(60), || {
            assert!(process.ended().is_none(), "{}", process.log_tail());
            let state: Value = serde_json::from_slice(&fs::read(&checkpoint).ok()?).unwrap();
            let done = state["done"].as_str()?.to_owned();
            (done.as_str() > "dir-2").then_some(done)
        });
        process.kill();
        // Another run does not take it for its own.
        sync(&[from, to, "--update", "--checkpoint", text(&checkpoint)])
            .failure(2, "checkpoint of another run");
        let state: Value = serde_json::from_slice(&fs::read(&checkpoint).unwrap()).unwrap();
        assert!(state["done"].as_str().unwrap() >= done.as_str(), "{state}");
        let left = files(&tree)
            .into_keys()
            .filter(|key| key.as_str() > state["done"].as_str().unwrap())
            .count() as u64;
        assert!((5..50).contains(&left), "{left}");
        let ran = summary(&flags);
        let [found, copied, skipped, deleted] = counts(&ran);
        assert_eq!((found, deleted), (left, 0), "{ran}");
        // Those that had been finished beyond the checkpoint are not copied again.
        assert!(
            copied + skipped == left && copied > 0 && skipped < left,
            "{ran}"
        );
        assert!(!checkpoint.exists());
    }
    // And nothing of what was being written stays.
    assert!(files(&tree) == files(&copy));
}

#[test]
fn a_damaged_copy_is_found_when_all_is_compared() {
    let s3 = S3::start();
    let scratch = scratch();
    let (tree, copy) = (scratch.path().join("tree"), scratch.path().join("copy"));
    let all = fill(&tree) as u64;
    let bucket = s3.bucket_url("damaged");
    summary(&[text(&tree), &bucket]);
    // One byte near the end of what is stored in parts, and one of a small one, at the bucket.
    for (key, at) in [("large", 19_999_999), ("d/b/c", 0)] {
        let mut bytes = fs::read(tree.join(key)).unwrap();
        bytes[at] ^= 1;
        write(scratch.path(), "damage", &bytes);
        let damage = scratch.path().join("damage");
        let ran = summary(&[text(&damage), &format!("{bucket}/{key}"), "--force-update"]);
        assert_eq!(counts(&ran), [1, 1, 0, 0]);
    }
    assert_eq!(counts(&summary(&[text(&tree), &bucket])), [all, 0, all, 0]);
    let ran = summary(&[text(&tree), &bucket, "--check-all"]);
    assert_eq!(ran["checked"], all, "{ran}");
    assert_eq!(counts(&ran), [all, 2, all - 2, 0]);
    summary(&[&bucket, text(&copy)]);
    assert!(files(&tree) == files(&copy));
    // And at a directory.
    let mut bytes = fs::read(copy.join("large")).unwrap();
    bytes[8 << 20] ^= 128;
    fs::write(copy.join("large"), bytes).unwrap();
    let ran = summary(&[&bucket, text(&copy), "--check-all"]);
    assert_eq!(counts(&ran), [all, 1, all - 1, 0]);
    assert!(files(&tree) == files(&copy));
}

#[test]
fn what_cannot_work_is_said_clearly() {
    let s3 = S3::start();
    let scratch = scratch();
    let tree = scratch.path().join("tree");
    write(&tree, "a/b", b"1");
    write(&tree, "c", b"2");
    let bucket = s3.bucket_url("errors");
    summary(&[text(&tree), &bucket]);

    let wrong = |arguments: &[&str], names: [&str; 2]| {
        let mut command = Command::new(HELIOFS);
        command.arg("sync").args(arguments);
        command.env(names[0], ACCESS_KEY).env(names[1], "wrong");
        run(&mut command)
    };
    let out = scratch.path().join("out");
    let first = ["HELIOFS_ACCESS_KEY", "HELIOFS_SECRET_KEY"];
    let second = ["HELIOFS_ACCESS_KEY2", "HELIOFS_SECRET_KEY2"];
    let ran = wrong(&[&bucket, text(&out)], first).failure(1, "SRC");
    assert!(
        ran.err.contains("hint: ") && ran.err.contains("--access-key "),
        "{}",
        ran.err
    );
    let ran = wrong(&[text(&tree), &bucket], second).failure(1, "DST");
    assert!(ran.err.contains("--access-key2 "), "{}", ran.err);
    sync(&[&bucket, text(&out), "--access-key2", "x"]).failure(2, "belong together");

    let nowhere = scratch.path().join("nowhere");
    sync(&[text(&nowhere), &bucket]).failure(1, "No such file");
    sync(&[&s3.bucket_url("nobody"), text(&out)]).failure(1, "cannot list SRC");
    sync(&[&format!("{bucket}/nobody/"), text(&out)]).failure(1, "nothing lies below");
    assert!(!out.exists());
    sync(&["ftp://host/x", text(&out)]).failure(2, "ftp://");
    sync(&[text(&tree), text(&tree.join("a"))]).failure(2, "lie in each other");
    sync(&[&bucket, &format!("{bucket}/x")]).failure(2, "lie in each other");
    sync(&[text(&tree), &bucket, "--exclude", "[x"]).failure(2, "no pattern");
    let empty = scratch.path().join("empty");
    fs::create_dir(&empty).unwrap();
    sync(&[text(&empty), &bucket, "--delete-dst"]).failure(1, "is empty");

    // One object cannot be stored; it is named, the other is copied, and the run failed. A checkpoint stays before it.
    write(&out, "a", b"a file where a directory is needed");
    let checkpoint = scratch.path().join("checkpoint");
    let flags = [text(&tree), text(&out), "--checkpoint", text(&checkpoint)];
    let ran = sync(&flags).failure(1, "1 objects could not be synchronised");
    assert!(ran.err.contains("a/b: failed: DST: "), "{}", ran.err);
    assert_eq!(fs::read(out.join("c")).unwrap(), b"2");
    let mut json = flags.to_vec();
    json.push("--json");
    let ran = sync(&json);
    assert_eq!(ran.code, 1);
    assert_eq!(ran.json()["failures"][0]["key"], "a/b");
    fs::remove_file(out.join("a")).unwrap();
    assert_eq!(counts(&summary(&flags)), [2, 1, 1, 0]);
    assert!(files(&out) == files(&tree) && !checkpoint.exists());
}

#[test]
fn a_mirrors_bucket_is_filled_in_advance() {
    let s3 = S3::start();
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_s3("photos", &s3, &[]);
    let mirror = mirror_of(&source, &source.url(), 1, &[]);
    let mount = source.mount("photos");
    for n in 0..20 {
        write(&mount.path, &format!("dir/{n}"), &noise(300_000, n + 1));
    }
    mount.unmount();
    catch_up(&source, &mirror, "photos");
    let own = s3.bucket_url("photos-mirror");
    let ran = summary(&[
        &format!("{}/photos/", s3.bucket_url("photos")),
        &format!("{own}/photos/"),
    ]);
    let [found, copied, ..] = counts(&ran);
    assert!(found > 1 && copied == found, "{ran}");
    let url = mirror.volume_url("photos");
    mirror
        .run_with(&["mirror", "bucket", &url, "--bucket", &own], |command| {
            s3.keys(command);
        })
        .success();
    let ran = mirror
        .run_with(&["mirror", "worker", &url, "--once", "--json"], keys)
        .success()
        .json();
    assert_eq!(ran["pulled_bytes"], 0, "{ran}");
    assert_eq!(ran["bad_segments"], 0, "{ran}");
    assert!(ran["found_segments"].as_u64().unwrap() > 0, "{ran}");
}

//! What compaction writes at the source is built at the mirror from what the mirror has; hardly anything crosses the link.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rand::{Rng, SeedableRng};
use serde_json::Value;
use support::mirror::{catch_up, give_bucket, mirror_of, mirror_status, tree};
use support::{Cluster, Mount, scratch};

const VOLUME: &str = "photos";
const FILES: usize = 320;
const WRITERS: usize = 8;

struct Regions {
    source: Cluster,
    mirror: Cluster,
    buckets: tempfile::TempDir,
}

impl Regions {
    fn start(format: &[&str]) -> Self {
        let buckets = scratch();
        let source = Cluster::with_dirs(1, |_, _| None, &[]);
        let mirror = mirror_of(&source, &source.url(), 1, &[]);
        let url = source.volume_url(VOLUME);
        let theirs = buckets.path().join("source");
        let mut all = vec!["format", &url, "--bucket", theirs.to_str().unwrap()];
        // What dies is to be deleted as soon as it may.
        all.extend(["--deletion-grace", "0s"]);
        all.extend(format);
        source.run(&all).success();
        catch_up(&source, &mirror, VOLUME);
        give_bucket(&mirror, VOLUME, &buckets.path().join("mirror"), &[]).success();
        Self {
            source,
            mirror,
            buckets,
        }
    }

    fn path(&self, region: &str, object: &Path) -> PathBuf {
        self.buckets.path().join(region).join(VOLUME).join(object)
    }

    /// Objects of segments by name.
    fn objects(&self, region: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let root = self.path(region, Path::new(""));
        let mut found = BTreeMap::new();
        for directory in fs::read_dir(&root).unwrap() {
            let directory = directory.unwrap().path();
            if directory.is_dir() {
                for object in fs::read_dir(directory).unwrap() {
                    let path = object.unwrap().path();
                    let name = path.strip_prefix(&root).unwrap().to_owned();
                    found.insert(name, fs::read(&path).unwrap());
                }
            }
        }
        found
    }

    /// Compacts at the source; the objects that this brought.
    fn compact(&self, flags: &[&str]) -> BTreeMap<PathBuf, Vec<u8>> {
        let before = self.objects("source");
        let url = self.source.volume_url(VOLUME);
        let mut all = vec!["compact", &url];
        all.extend(flags);
        self.source.run(&all).success();
        let mut new = self.objects("source");
        new.retain(|name, _| !before.contains_key(name));
        catch_up(&self.source, &self.mirror, VOLUME);
        new
    }

    fn copy(&self) -> Value {
        let url = self.mirror.volume_url(VOLUME);
        let ran = self
            .mirror
            .run(&["mirror", "worker", &url, "--once", "--json"]);
        ran.success().json()
    }

    fn assert_copied(&self, new: &BTreeMap<PathBuf, Vec<u8>>) {
        for (name, bytes) in new {
            let copy = fs::read(self.path("mirror", name)).unwrap();
            assert!(copy == *bytes, "{} differs", name.display());
        }
        let status = mirror_status(&self.mirror, VOLUME).unwrap();
        assert_eq!(status["complete"], status["applied"], "{status}");
        assert_eq!(status["bucket"]["quarantined_segments"], 0, "{status}");
        assert_eq!(status["bucket"]["lost_segments"], 0, "{status}");
    }
}

/// Many files, some of which share each segment.
fn write_files(root: &Path) {
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            scope.spawn(move || {
                for number in (writer..FILES).step_by(WRITERS) {
                    let mut random = rand::rngs::StdRng::seed_from_u64(number as u64);
                    let mut bytes = vec![0; random.random_range(30_000..90_000)];
                    random.fill(&mut bytes[..]);
                    let mut file = File::create(root.join(format!("{number}"))).unwrap();
                    file.write_all(&bytes).unwrap();
                }
            });
        }
    });
}

fn total(objects: &BTreeMap<PathBuf, Vec<u8>>) -> u64 {
    objects.values().map(|bytes| bytes.len() as u64).sum()
}

fn repack(format: &[&str], mount_flags: &[&str]) {
    let regions = Regions::start(format);
    let mut flags = vec!["--no-bgjob", "--flush-age", "60s"];
    flags.extend(mount_flags);
    let written = Mount::of(&regions.source, VOLUME, &flags);
    write_files(&written.path);
    // What is stored at the end shares segments, however fast that is.
    written.unmount();
    let written = Mount::of(&regions.source, VOLUME, &flags);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    let first = regions.copy();
    assert_eq!(first["repacked_segments"], 0, "{first}");
    // Two of three go; of one that stays nearly all is rewritten, so that what is left of it gets a frame of its own.
    for number in (0..FILES).filter(|number| number % 3 != 0) {
        fs::remove_file(written.join(format!("{number}"))).unwrap();
    }
    let rewritten = File::options().write(true).open(written.join("0")).unwrap();
    rewritten.write_all_at(&[7; 25_000], 0).unwrap();
    rewritten.sync_all().unwrap();
    drop(rewritten);
    catch_up(&regions.source, &regions.mirror, VOLUME);
    regions.copy();
    let new = regions.compact(mount_flags);
    let bytes = total(&new);
    // How much of it is sparse depends on where segments were cut, which is a matter of time.
    assert!(bytes > 512 << 10, "{bytes} bytes in {} segments", new.len());
    let copied = regions.copy();
    assert_eq!(copied["copied_bytes"], bytes, "{copied}");
    assert_eq!(copied["repacked_segments"], new.len(), "{copied}");
    let pulled = copied["pulled_bytes"].as_u64().unwrap();
    assert!(
        pulled > 0 && pulled * 10 < bytes,
        "{pulled} bytes pulled of {bytes}"
    );
    regions.assert_copied(&new);
    // What was moved is moved again: its frames have names of segments that are long gone.
    for number in (0..FILES).filter(|number| number % 6 == 3) {
        fs::remove_file(written.join(format!("{number}"))).unwrap();
    }
    let again = regions.compact(mount_flags);
    let bytes = total(&again);
    assert!(
        bytes > 300 << 10,
        "{bytes} bytes in {} segments",
        again.len()
    );
    // One of those that it is made of has rotted.
    let rotten = regions.path("mirror", new.keys().next().unwrap());
    let whole = fs::read(&rotten).unwrap();
    let mut bad = whole.clone();
    // Every page, whichever of its frames are still needed.
    for at in (100..bad.len() - 5000).step_by(10_000) {
        bad[at] ^= 0x40;
    }
    fs::write(&rotten, &bad).unwrap();
    let copied = regions.copy();
    assert_eq!(copied["copied_bytes"], bytes, "{copied}");
    assert_eq!(copied["bad_segments"], 0, "{copied}");
    let repacked = copied["repacked_segments"].as_u64().unwrap();
    assert!(repacked < again.len() as u64, "{copied}");
    let status = mirror_status(&regions.mirror, VOLUME).unwrap();
    assert_eq!(status["bucket"]["quarantined_segments"], 0, "{status}");
    for (name, bytes) in &again {
        let copy = fs::read(regions.path("mirror", name)).unwrap();
        assert!(copy == *bytes, "{} differs", name.display());
    }
    // All of it can be read with the source's bucket out of reach.
    let expected = tree(&written.path);
    written.unmount();
    let theirs = regions.buckets.path().join("source");
    fs::rename(&theirs, regions.buckets.path().join("away")).unwrap();
    fs::create_dir(&theirs).unwrap();
    let mut flags = vec!["--no-bgjob", "--flush-age", "60s"];
    flags.extend(mount_flags);
    let seen = Mount::of(&regions.mirror, VOLUME, &flags);
    assert_eq!(tree(&seen.path), expected);
    seen.unmount();
}

#[test]
fn a_compacted_segment_is_built_from_what_the_mirror_has() {
    repack(&[], &[]);
}

#[test]
fn so_it_is_in_an_encrypted_volume_without_its_key() {
    let scratch = scratch();
    let passphrase = scratch.path().join("passphrase");
    fs::write(&passphrase, "correct horse battery staple\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(&passphrase, mode).unwrap();
    let passphrase = passphrase.to_str().unwrap();
    let flags = ["--passphrase-file", passphrase];
    repack(&["--encrypt", "--passphrase-file", passphrase], &flags);
}

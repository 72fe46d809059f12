//! Names that were saved with `heliofs auth`, and what is given beside them: how a mirror with a bucket of its own is mounted.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::cluster::{HELIOFS, run};
use support::mirror::{catch_up, give_bucket, mirror_of, tree};
use support::mount::is_mounted;
use support::{Cluster, Ran, S3, scratch};

const VOLUME: &str = "photos";
const READER: [&str; 2] = ["test-reader", "test-reader-key"];

/// A user's machine: a home, and nothing of others' in the environment.
struct Home {
    directory: tempfile::TempDir,
}

impl Home {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(HELIOFS);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("HELIOFS_") {
                command.env_remove(name);
            }
        }
        command
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("XDG_STATE_HOME")
            .env("HOME", self.directory.path())
            .args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        run(&mut self.command(arguments))
    }

    fn mount_point(&self) -> PathBuf {
        let point = self.directory.path().join("mnt");
        fs::create_dir_all(&point).unwrap();
        point
    }

    /// In the background, with an empty cache; what is seen, and that it ends.
    fn mounted(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
        let point = self.mount_point();
        let cache = tempfile::tempdir_in(self.directory.path()).unwrap();
        let flags = [
            "-d",
            "--no-bgjob",
            "--cache-dir",
            cache.path().to_str().unwrap(),
            point.to_str().unwrap(),
        ];
        let mut command = self.command(&["mount"]);
        command.args(arguments).args(flags);
        command.envs(environment.iter().copied());
        run(&mut command)
    }

    fn unmount(&self) {
        let point = self.mount_point();
        self.run(&["umount", point.to_str().unwrap()]).success();
        assert!(!is_mounted(&point));
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_name_stands_for_the_url_the_token_and_the_keys_of_both_buckets() {
    support::need_root_and_fuse();
    let s3 = S3::start();
    let source = Cluster::with_dirs(1, |_, _| None, &[]);
    source.format_s3(VOLUME, &s3, &[]);
    let mirror = mirror_of(&source, &source.url(), 1, &[]);
    catch_up(&source, &mirror, VOLUME);
    give_bucket(&mirror, VOLUME, &mirror.directory.join("own"), &[]).success();
    let written = source.mount(VOLUME);
    for number in 0..4 {
        fs::write(written.join(format!("f{number}")), vec![number; 50_000]).unwrap();
    }
    let expected = tree(&written.path);
    written.unmount();
    catch_up(&source, &mirror, VOLUME);

    let home = Home {
        directory: scratch(),
    };
    let url = mirror.volume_url(VOLUME);
    let secret = fs::read_to_string(&mirror.token_file).unwrap();
    let token = secret.trim();
    let point = home.mount_point();
    let [access, key] = READER;
    let said = home
        .run(&[
            "auth",
            "pictures",
            "--meta",
            &url,
            "--token",
            token,
            "--access-key2",
            access,
            "--secret-key2",
            key,
        ])
        .success();
    assert!(
        !said.out.contains(token) && !said.out.contains(key),
        "{}",
        said.out
    );
    let saved = home.directory.path().join(".config/heliofs/auth");
    assert_eq!(mode(&saved.join("pictures.json")), 0o600);
    assert_eq!(mode(&saved.join("pictures.token")), 0o600);
    let listed = home.run(&["auth", "--json"]).success().json();
    assert_eq!(listed[0]["name"], "pictures");
    assert!(!listed.to_string().contains(key), "{listed}");

    // By its name alone.
    home.mounted(&["pictures"], &[]).success();
    assert_eq!(tree(&point), expected);
    let shown = home.run(&["info", point.join("f1").to_str().unwrap(), "--json"]);
    assert_eq!(shown.success().json()[0]["size"], 50_000);
    home.unmount();
    let status = home.run(&["mirror", "status", "pictures", "--json"]);
    assert_eq!(status.success().json()[0]["state"], "following");

    // All on the command line, which then counts.
    let wrong = "0".repeat(token.len());
    home.mounted(&["pictures", "--token", &wrong], &[])
        .failure(1, "token");
    home.run(&["auth", "pictures", "--delete"]).success();
    assert!(!saved.join("pictures.json").exists() && !saved.join("pictures.token").exists());
    home.mounted(&["pictures"], &[]).failure(1, "");
    let keys = [
        "--token",
        token,
        "--access-key2",
        access,
        "--secret-key2",
        key,
    ];
    home.mounted(&[&[&url[..]], &keys[..]].concat(), &[])
        .success();
    assert_eq!(tree(&point), expected);
    home.unmount();

    // The flag counts, whatever the environment says.
    let environment = [
        ("HELIOFS_TOKEN_FILE", "/nowhere"),
        ("HELIOFS_TOKEN", &wrong),
    ];
    let all = [&[&url[..]], &keys[..]].concat();
    home.mounted(&all, &environment).success();
    home.unmount();

    // From the environment; without the keys of the second bucket nothing is seen of what lies there only.
    let environment = [
        ("HELIOFS_TOKEN", token),
        ("HELIOFS_ACCESS_KEY2", access),
        ("HELIOFS_SECRET_KEY2", key),
    ];
    home.mounted(&[&url], &environment).success();
    assert_eq!(tree(&point), expected);
    home.unmount();
    home.mounted(&[&url], &environment[..2])
        .failure(2, "belong together");
}

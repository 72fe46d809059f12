//! A mounted volume, served by a process of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};

use super::cluster::HELIOFS;
use super::{Cluster, Process, need_root_and_fuse, scratch, wait_for};

pub struct Mount {
    /// Where it is mounted.
    pub path: PathBuf,
    /// The process that serves it.
    pub process: Process,
    _scratch: tempfile::TempDir,
}

impl Mount {
    /// Mounts with an empty cache.
    pub fn of(cluster: &Cluster, volume: &str, flags: &[&str]) -> Self {
        Self::with_cache(cluster, volume, None, flags)
    }

    /// Mounts with the disk cache in a directory that outlives the mount; `None`: one of its own.
    pub fn with_cache(
        cluster: &Cluster,
        volume: &str,
        cache: Option<&Path>,
        flags: &[&str],
    ) -> Self {
        need_root_and_fuse();
        let scratch = scratch();
        let path = scratch.path().join("mnt");
        std::fs::create_dir(&path).unwrap();
        let log = scratch.path().join("mount.log");
        // Any test can be run with it.
        let ahead =
            std::env::var_os("HELIOFS_TEST_DIR_AHEAD").is_some() && !flags.contains(&"--dir-ahead");
        let mut process = Process::start(
            &format!("mount of {volume}"),
            &log,
            Path::new(HELIOFS),
            |command| {
                command
                    .args(["mount", &cluster.url(), volume])
                    .arg(&path)
                    .arg("--cache-dir")
                    .arg(cache.map_or_else(|| scratch.path().join("cache"), Path::to_owned))
                    // Tests of the cache must not depend on how full this machine's disk is.
                    .args(["--free-space-ratio", "0"])
                    .arg("--token-file")
                    .arg(&cluster.token_file)
                    .args(flags);
                if ahead {
                    command.arg("--dir-ahead");
                }
            },
        );
        wait_for("the mount", Duration::from_secs(60), || {
            if let Some(status) = process.ended() {
                panic!(
                    "the mount ended ({status}) instead of serving:\n{}",
                    process.log_tail()
                );
            }
            is_mounted(&path).then_some(())
        });
        Self {
            path,
            process,
            _scratch: scratch,
        }
    }

    pub fn join(&self, below: impl AsRef<Path>) -> PathBuf {
        self.path.join(below)
    }

    /// As a user does; the process ends well.
    pub fn unmount(mut self) {
        let ran = super::cluster::run(Command::new(HELIOFS).arg("umount").arg(&self.path));
        assert_eq!(ran.code, 0, "{}", ran.err);
        let status = self.process.wait(Duration::from_secs(60));
        assert!(
            status.success(),
            "the mount ended with {status}:\n{}",
            self.process.log_tail()
        );
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // The process first: what it serves then fails instead of hanging.
        if self.process.ended().is_none() {
            self.process.kill();
        }
        if is_mounted(&self.path) {
            let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        }
    }
}

/// Whether something is mounted exactly there; never touches the mount itself, which may hang.
pub fn is_mounted(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts
        .lines()
        .any(|line| line.split(' ').nth(4) == path.to_str())
}

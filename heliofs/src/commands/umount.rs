//! `heliofs umount`: unmounts, and waits until the mount's process has stored everything and ended.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use serde_json::json;

use crate::failure::{Failure, Outcome, While};
use crate::{mounts, output};

/// What to unmount.
#[derive(Args)]
pub(crate) struct Options {
    /// Where it is mounted.
    mount_point: PathBuf,
    /// Aborts what hangs; data that was not synced is lost.
    #[arg(short, long)]
    force: bool,
    /// Hides it now and ends it when the last file is closed.
    #[arg(short, long)]
    lazy: bool,
    /// Waits until everything is in the bucket, for as long as --timeout says. Without it a mount with --writeback tries, and
    /// leaves what the bucket doesn't take on its disk for the next mount.
    #[arg(long, conflicts_with_all = ["force", "lazy"])]
    flush: bool,
    /// How long to wait for the mount's process to end.
    #[arg(long, value_parser = crate::units::parse_duration, default_value = "60s", value_name = "TIME")]
    timeout: Duration,
}

/// Tells a mount that its end has to wait until everything is stored; for as long as this lives.
struct Marker(PathBuf);

impl Marker {
    fn leave(note: &mounts::MountNote) -> Outcome<Self> {
        let path = note.flush_marker();
        std::fs::write(&path, []).while_(format_args!("write {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Marker {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "not removed");
        }
    }
}

/// How often the process is looked at while it ends.
const POLL: Duration = Duration::from_millis(20);

pub(crate) fn run(options: &Options, json: bool) -> Outcome {
    // A mount whose process died can't be resolved through itself: only its parent is.
    let mount_point = mounts::resolve(&options.mount_point)
        .while_(format_args!("find {}", options.mount_point.display()))?;
    let notes: Vec<_> = mounts::all()?
        .into_iter()
        .filter(|note| note.mount_point == mount_point)
        .collect();
    let markers: Vec<Marker> = match options.flush {
        true => notes.iter().map(Marker::leave).collect::<Outcome<_>>()?,
        false => Vec::new(),
    };
    unmount(&mount_point, options)?;
    // A lazy one may go on for as long as a file is open.
    if !options.lazy {
        for note in &notes {
            let deadline = Instant::now() + options.timeout;
            while note.alive() {
                if Instant::now() >= deadline {
                    return Err(Failure::new(format!(
                        "{} is unmounted, but process {} has not ended within {:?}",
                        mount_point.display(),
                        note.pid,
                        options.timeout
                    ))
                    .hint("it may still be storing data: see its log"));
                }
                std::thread::sleep(POLL);
            }
        }
    }
    drop(markers);
    if json {
        return output::print_json(&json!({ "unmounted": mount_point }));
    }
    Ok(())
}

fn unmount(mount_point: &Path, options: &Options) -> Outcome {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    flags.set(MntFlags::MNT_FORCE, options.force);
    flags.set(MntFlags::MNT_DETACH, options.lazy);
    let shown = mount_point.display();
    match umount2(mount_point, flags) {
        Ok(()) => Ok(()),
        Err(Errno::EPERM) => with_fusermount(mount_point, options.lazy || options.force),
        Err(Errno::EBUSY) => Err(Failure::new(format!("{shown} is in use")).hint(format!(
            "`fuser -vm {shown}` shows by whom; --lazy unmounts once it is free"
        ))),
        Err(Errno::EINVAL) => Err(Failure::new(format!("{shown} is not a mount point"))),
        Err(Errno::ENOENT) => Err(Failure::new(format!("{shown} does not exist"))),
        Err(errno) => Err(errno).while_(format_args!("unmount {shown}")),
    }
}

/// Users other than root unmount their own with the setuid helper.
fn with_fusermount(mount_point: &Path, lazy: bool) -> Outcome {
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if lazy {
        command.arg("-z");
    }
    let output = command
        .arg("--")
        .arg(mount_point)
        .output()
        .map_err(|error| {
            Failure::new(format!("cannot run fusermount3: {error}"))
                .hint("install the package fuse3")
        })?;
    if output.status.success() {
        return Ok(());
    }
    Err(Failure::new(format!(
        "cannot unmount {}: {}",
        mount_point.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}

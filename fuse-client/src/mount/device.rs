//! The connection to the kernel.
//!
//! Root mounts by itself: fuser would show the type `fuse`, and `mount`, `df -t` and fstab know volumes by `fuse.heliofs`.
//! Whoever may not mount goes through fuser and the setuid helper `fusermount3`.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use fuser::{Config, MountOption, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::SUBTYPE;
use crate::fuse::Adapter;

/// Mounts, and shakes hands with the kernel.
pub(super) fn connect(
    adapter: Adapter,
    mount_point: &Path,
    config: &Config,
) -> io::Result<Session<Adapter>> {
    match mount_as_root(mount_point, config)? {
        Some(device) => {
            let session = Session::from_fd(adapter, device, config.acl, config.clone());
            if session.is_err() {
                clear(mount_point, true);
            }
            session
        }
        None => Session::new(adapter, mount_point, config),
    }
}

/// `None`: not permitted.
fn mount_as_root(mount_point: &Path, config: &Config) -> io::Result<Option<OwnedFd>> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(None);
    }
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")?;
    let mut flags = MsFlags::empty();
    let mut source = SUBTYPE;
    // rootmode: a directory; its permissions come from the root inode.
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={}",
        device.as_raw_fd(),
        nix::unistd::getuid(),
        nix::unistd::getgid()
    );
    for option in &config.mount_options {
        match option {
            MountOption::FSName(name) => source = name,
            MountOption::DefaultPermissions => data.push_str(",default_permissions"),
            MountOption::RO => flags |= MsFlags::MS_RDONLY,
            MountOption::NoDev => flags |= MsFlags::MS_NODEV,
            MountOption::NoSuid => flags |= MsFlags::MS_NOSUID,
            MountOption::NoExec => flags |= MsFlags::MS_NOEXEC,
            MountOption::NoAtime => flags |= MsFlags::MS_NOATIME,
            _ => {}
        }
    }
    if config.acl != SessionACL::Owner {
        data.push_str(",allow_other");
    }
    let kind = format!("fuse.{SUBTYPE}");
    match mount(
        Some(source),
        mount_point,
        Some(kind.as_str()),
        flags,
        Some(data.as_str()),
    ) {
        Ok(()) => Ok(Some(OwnedFd::from(device))),
        // Root of a container that may not mount.
        Err(Errno::EPERM) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The connection ended. If it broke, the mount is still there and answers nothing: it is detached.
pub(super) fn clear(mount_point: &Path, broke: bool) {
    if broke && let Err(error) = umount2(mount_point, MntFlags::MNT_DETACH) {
        tracing::warn!(mount_point = %mount_point.display(), %error, "the dead mount stays");
    }
}

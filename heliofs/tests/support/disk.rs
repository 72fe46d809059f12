//! A disk of our own: ext4 on a loop device. It can lose power, and it can be full.
//!
//! Power loss is EXT4_IOC_SHUTDOWN with NOLOGFLUSH: from then on every write fails, and what was not synced is not there after
//! the next mount (docs of the ioctl: fs/ext4/ioctl.c; proven in the project's chaos notes, N6).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, umount2};

use super::scratch;

pub struct Disk {
    image: PathBuf,
    path: PathBuf,
    _scratch: tempfile::TempDir,
}

fn must(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

impl Disk {
    /// A new, empty one.
    pub fn new(mib: u64) -> Self {
        super::need_root_and_fuse();
        let scratch = scratch();
        let image = scratch.path().join("image");
        let path = scratch.path().join("disk");
        fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
        fs::create_dir(&path).unwrap();
        must(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image));
        let disk = Self { image, path, _scratch: scratch };
        disk.mount();
        disk
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn mount(&self) {
        // The journal is committed every 300 s unless somebody syncs: what survives was synced.
        must(
            Command::new("mount")
                .args(["-t", "ext4", "-o", "loop,commit=300"])
                .arg(&self.image)
                .arg(&self.path),
        );
    }

    /// From now on every write fails, and nothing that was not synced will be seen again.
    pub fn lose_power(&self) {
        let script = "import fcntl, os, struct, sys\n\
                      fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587D, struct.pack('I', 2))";
        must(Command::new("python3").args(["-c", script]).arg(&self.path));
        let probe = fs::write(self.path.join("probe"), "x");
        assert!(probe.is_err(), "the disk still takes writes: the power loss did not happen");
    }

    /// Power is back. Whoever used the disk must have ended.
    pub fn restore_power(&self) {
        umount2(&self.path, MntFlags::empty()).expect("nobody uses a disk that lost power");
        self.mount();
    }

    /// Takes what is free, but for `kib_left`; returns the file that took it.
    pub fn fill(&self, kib_left: u64) -> PathBuf {
        let filler = self.path.join("filler");
        let stat = nix::sys::statvfs::statvfs(&self.path).unwrap();
        // Root may use the reserved blocks too.
        let free = stat.blocks_free() * stat.fragment_size();
        let length = free.saturating_sub(kib_left << 10);
        must(Command::new("fallocate").args(["-l", &length.to_string()]).arg(&filler));
        filler
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

//! A disk of our own: ext4 on a loop device. It can lose power, it can be full, and it can hang.
//!
//! Power loss is EXT4_IOC_SHUTDOWN with NOLOGFLUSH: from then on every write fails, and what was not synced is not there after
//! the next mount (docs of the ioctl: fs/ext4/ioctl.c; proven in the project's chaos notes, N6).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, umount2};

use super::cluster::run;
use super::scratch;

pub struct Disk {
    image: PathBuf,
    path: PathBuf,
    _scratch: tempfile::TempDir,
}

fn must(command: &mut Command) {
    run(command).success();
}

impl Disk {
    /// A new, empty one.
    pub fn new(mib: u64) -> Self {
        super::need_root_and_fuse();
        let scratch = scratch();
        let image = scratch.path().join("image");
        let path = scratch.path().join("disk");
        fs::File::create(&image)
            .unwrap()
            .set_len(mib << 20)
            .unwrap();
        fs::create_dir(&path).unwrap();
        must(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image));
        let disk = Self {
            image,
            path,
            _scratch: scratch,
        };
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

    /// From now on every write fails, and nothing that was not synced will be seen again. Freeze whoever uses it first: an
    /// fdatasync that is under way meanwhile may return 0 although its data is lost (Linux 6.18, measured: in 40 of 300 rounds
    /// the last append that a running process had been told is synced was gone, and in 0 of 300 when the process was stopped
    /// before. The journal's abort begins the very commit that it then drops, and the waiter does not look for the abort).
    pub fn lose_power(&self) {
        let script = "import fcntl, os, struct, sys; \
                      fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587D, struct.pack('I', 2))";
        must(Command::new("python3").args(["-c", script]).arg(&self.path));
        let probe = fs::write(self.path.join("probe"), "x");
        assert!(
            probe.is_err(),
            "the disk still takes writes: the power loss did not happen"
        );
    }

    /// Power is back. Whoever used the disk must have ended.
    pub fn restore_power(&self) {
        umount2(&self.path, MntFlags::empty()).expect("nobody uses a disk that lost power");
        self.mount();
    }

    /// Takes everything that is free; returns the file that took it.
    pub fn fill(&self) -> PathBuf {
        let filler = self.path.join("filler");
        let file = fs::File::create(&filler).unwrap();
        let mut length = 0i64;
        for step in [16 << 20, 1 << 20, 64 << 10, 4 << 10] {
            while nix::fcntl::posix_fallocate(&file, length, step).is_ok() {
                length += step;
            }
        }
        assert!(length > 0, "the disk was full before");
        filler
    }

    /// Whoever writes waits, without an error, until [`Disk::thaw`]; reads go on.
    pub fn hang(&self) {
        must(Command::new("fsfreeze").arg("--freeze").arg(&self.path));
    }

    pub fn thaw(&self) {
        must(Command::new("fsfreeze").arg("--unfreeze").arg(&self.path));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A frozen one can't be unmounted, and whoever waits for it can't be killed. Fails if it is not.
        let mut thaw = Command::new("fsfreeze");
        let _ = thaw.arg("--unfreeze").arg(&self.path).output();
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

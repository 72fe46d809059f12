//! `heliofs warmup`: reads files through a mount, so that they lie in its caches.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use clap::Args;
use indicatif::ProgressBar;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use parking_lot::Mutex;
use serde_json::json;

use crate::failure::{Failure, Outcome, While};
use crate::units::show_size;
use crate::{mounts, output, progress};

/// Bytes per read: a segment's worth.
const READ: usize = 4 << 20;

/// Files that could not be read which are named.
const SHOWN: usize = 10;

/// What to read.
#[derive(Args)]
pub(crate) struct Options {
    /// Files and directories in mounts.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Files read at once.
    #[arg(long, default_value_t = 16, value_name = "N")]
    threads: usize,
}

pub(crate) fn run(options: &Options, json: bool) -> Outcome {
    let mut files = Vec::new();
    for path in &options.paths {
        // Elsewhere there is no cache of ours to warm.
        mounts::containing(path)?;
        collect(path, &mut files)?;
    }
    let bytes = files.iter().map(|(_, length)| length).sum();
    let bar = progress::bar("warmup", bytes, true, json);
    let work = Work {
        files,
        next: AtomicUsize::new(0),
        bytes: AtomicU64::new(0),
        failed: Mutex::default(),
        bar,
    };
    std::thread::scope(|scope| {
        for _ in 0..options.threads.clamp(1, 256) {
            scope.spawn(|| work.some());
        }
    });
    work.bar.finish_and_clear();
    let (bytes, failed) = (work.bytes.into_inner(), work.failed.into_inner());
    let files = work.files.len() - failed.len();
    if json {
        output::print_json(&json!({ "files": files, "bytes": bytes, "failed": failed }))?;
    } else {
        output::line(format_args!("read {files} files with {}", show_size(bytes)))?;
        for failure in failed.iter().take(SHOWN) {
            output::line(failure)?;
        }
    }
    match failed.len() {
        0 => Ok(()),
        count => Err(Failure::new(format!("{count} files could not be read"))),
    }
}

/// Regular files at and below a path with their lengths, each inode once; links are not followed.
fn collect(path: &Path, files: &mut Vec<(PathBuf, u64)>) -> Outcome {
    let mut seen = HashSet::new();
    let mut open = vec![path.to_owned()];
    while let Some(path) = open.pop() {
        let doing = || format!("look at {}", path.display());
        let stat = std::fs::symlink_metadata(&path).while_(doing())?;
        if stat.is_dir() {
            for entry in std::fs::read_dir(&path).while_(doing())? {
                open.push(entry.while_(doing())?.path());
            }
        } else if stat.is_file() && seen.insert(stat.ino()) {
            files.push((path, stat.len()));
        }
    }
    Ok(())
}

struct Work {
    files: Vec<(PathBuf, u64)>,
    next: AtomicUsize,
    bytes: AtomicU64,
    failed: Mutex<Vec<String>>,
    bar: ProgressBar,
}

impl Work {
    fn some(&self) {
        let mut buffer = vec![0; READ];
        while let Some((path, _)) = self.files.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = self.file(path, &mut buffer) {
                self.failed
                    .lock()
                    .push(format!("{}: {error}", path.display()));
            }
        }
    }

    fn file(&self, path: &Path, buffer: &mut [u8]) -> std::io::Result<()> {
        let file = File::open(path)?;
        let mut at = 0;
        loop {
            let read = file.read_at(buffer, at)?;
            if read == 0 {
                break;
            }
            at += read as u64;
            self.bytes.fetch_add(read as u64, Ordering::Relaxed);
            self.bar.inc(read as u64);
        }
        // The mount's caches are meant, not the kernel's, which has others to serve. It is only advice.
        posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).ok();
        Ok(())
    }
}

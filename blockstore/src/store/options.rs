//! Settings of a segment store: values only.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::KeyOpener;
use crate::object::RateLimit;

/// How a [`crate::SegmentStore`] behaves. `Default` suits a mount.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// A put, read or delete that did not succeed within this time fails with `Unavailable`.
    pub deadline: Duration,
    /// One request is given up and tried again after this time.
    pub attempt_timeout: Duration,
    /// Puts in flight; more wait.
    pub uploads_max: usize,
    /// Gets in flight; more wait.
    pub downloads_max: usize,
    /// Budget of the memory tier, bytes; 0 turns it off.
    pub memory_cache_bytes: u64,
    /// The disk tier; `None` turns it off.
    pub disk_cache: Option<DiskCacheOptions>,
    /// Whether segments that this store has put go into the caches: their writer often reads them back.
    pub cache_uploads: bool,
    /// Bytes that prefetches may have in flight; what exceeds it is not fetched ahead.
    pub prefetch_bytes_max: u64,
    /// Bytes per second to the bucket; 0: no limit.
    pub upload_bytes_per_second: u64,
    /// Bytes per second from the bucket; 0: no limit.
    pub download_bytes_per_second: u64,
    /// Instead of the above: a limit that several buckets share.
    pub download_budget: Option<Arc<RateLimit>>,
    /// A read that has no answer after this time (and a second per 4 MiB) is asked for once more, and the first answer taken.
    pub hedge_after: Option<Duration>,
    /// Opens the volume's key when the volume is encrypted.
    pub opener: Option<KeyOpener>,
    /// Where metrics are registered.
    pub registry: Option<prometheus::Registry>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            attempt_timeout: Duration::from_secs(10),
            uploads_max: 20,
            downloads_max: 64,
            memory_cache_bytes: 256 << 20,
            disk_cache: None,
            cache_uploads: true,
            prefetch_bytes_max: 64 << 20,
            upload_bytes_per_second: 0,
            download_bytes_per_second: 0,
            download_budget: None,
            hedge_after: None,
            opener: None,
            registry: None,
        }
    }
}

/// The disk tier.
#[derive(Clone, Debug)]
pub struct DiskCacheOptions {
    /// Created if missing. Several mounts may name the same directory: each takes a slot of its own below it.
    pub directory: PathBuf,
    /// On other disks, in the same manner; segments are spread over all.
    pub more_directories: Vec<PathBuf>,
    /// Budget of all together, bytes.
    pub bytes_max: u64,
    /// The cache shrinks when less than this part of the file system is free, 0.0..=1.0.
    pub free_space_ratio: f64,
}

impl DiskCacheOptions {
    /// A cache of up to `bytes_max` bytes below `directory` that leaves a tenth of the disk free.
    pub fn new(directory: impl Into<PathBuf>, bytes_max: u64) -> Self {
        Self {
            directory: directory.into(),
            more_directories: Vec::new(),
            bytes_max,
            free_space_ratio: 0.1,
        }
    }

    /// As it is, with more directories.
    #[must_use]
    pub fn and(self, more_directories: Vec<PathBuf>) -> Self {
        Self {
            more_directories,
            ..self
        }
    }
}

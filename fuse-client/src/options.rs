//! Settings of a mount: values only.

use std::path::PathBuf;
use std::time::Duration;

use crate::write::staging::StagingOptions;

/// When reading a file updates its access time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AtimePolicy {
    /// Never.
    #[default]
    Off,
    /// When it is not newer than the last change, or older than a day; in the background.
    Relative,
    /// At the first read of each open file; in the background.
    Strict,
}

/// How the file system behaves below the kernel's view.
#[derive(Clone, Debug)]
pub struct FsOptions {
    /// Refuse every change.
    pub read_only: bool,
    /// Refuse every change while the volume is a mirror, and none once it is promoted.
    pub follow_promotion: bool,
    /// See [`AtimePolicy`].
    pub atime: AtimePolicy,
    /// Bytes per segment that large writes fill; the volume's setting.
    pub segment_bytes: u64,
    /// Uncommitted data is committed after this time, whether or not anybody asks.
    pub flush_age: Duration,
    /// close returns at once while the session holds the file's write lease; otherwise it waits until the data is committed.
    pub defer_close: bool,
    /// Largest read-ahead window of an open file, bytes; 0 turns read-ahead off. Below it the link to the bucket decides.
    pub read_ahead_bytes_max: u64,
    /// Whether this mount deletes dead segments from the bucket.
    pub delete_segments: bool,
    /// Where what fsync confirms is staged; `None`: nowhere.
    pub staging: Option<StagingOptions>,
    /// How this mount takes its turn at compacting sparse segments; `None`: it does not.
    pub compaction: Option<CompactionOptions>,
}

/// Compaction in the background.
#[derive(Clone, Debug)]
pub struct CompactionOptions {
    /// Between two looks for sparse segments, when there is nothing to do.
    pub pause: Duration,
    /// A segment is sparse when at most this part of its data lives. All others being fuller, what is stored stays below
    /// 100 / 70 of what lives.
    pub live_percent_max: u32,
    /// Bytes written per second at most, unless it is urgent.
    pub bytes_per_second: u64,
    /// … and when it is.
    pub urgent_bytes_per_second: u64,
    /// It is urgent when what is dead in sparse segments is more than this part of what lives in all.
    pub urgent_dead_percent: u64,
}

impl Default for CompactionOptions {
    fn default() -> Self {
        Self {
            pause: Duration::from_secs(60),
            live_percent_max: 70,
            bytes_per_second: 32 << 20,
            urgent_bytes_per_second: 256 << 20,
            urgent_dead_percent: 20,
        }
    }
}

impl Default for FsOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            follow_promotion: false,
            atime: AtimePolicy::Off,
            segment_bytes: 4 << 20,
            flush_age: Duration::from_secs(1),
            defer_close: true,
            read_ahead_bytes_max: 32 << 20,
            delete_segments: true,
            staging: None,
            compaction: Some(CompactionOptions::default()),
        }
    }
}

/// How a volume is mounted.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// The volume's name, shown by `df` and `mount` as `heliofs:NAME`.
    pub volume: String,
    /// Below the kernel's view.
    pub fs: FsOptions,
    /// Everybody may use the mount, as permissions say; otherwise only the user who mounted it.
    pub allow_other: bool,
    /// Mount over a directory that is not empty.
    pub nonempty: bool,
    /// Event loops; 0: as many as processors, within 2..=8.
    pub threads: usize,
    /// Device files work.
    pub dev: bool,
    /// Setuid and setgid work.
    pub suid: bool,
    /// Programs may be run.
    pub exec: bool,
    /// The kernel's own read-ahead, KiB; needs root, otherwise the kernel's default stays.
    pub kernel_read_ahead_kib: u32,
    /// If this file exists when the mount ends, the end waits until everything is in the bucket, however long that takes. Without
    /// it, what the bucket doesn't take may stay staged.
    pub flush_marker: Option<PathBuf>,
    /// Where metrics are registered.
    pub registry: Option<prometheus::Registry>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            volume: String::new(),
            fs: FsOptions::default(),
            allow_other: true,
            nonempty: false,
            threads: 0,
            dev: true,
            suid: true,
            exec: true,
            kernel_read_ahead_kib: 1024,
            flush_marker: None,
            registry: None,
        }
    }
}

//! What a mount counts.

use std::time::Instant;

use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
};

/// Every operation that the kernel may ask for; the label `op`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Op {
    Lookup,
    GetAttr,
    SetAttr,
    ReadLink,
    MkNod,
    MkDir,
    Unlink,
    RmDir,
    SymLink,
    Rename,
    Link,
    Open,
    Read,
    Write,
    Flush,
    Release,
    Fsync,
    OpenDir,
    ReadDir,
    ReleaseDir,
    FsyncDir,
    StatFs,
    SetXattr,
    GetXattr,
    ListXattr,
    RemoveXattr,
    Create,
    GetLock,
    SetLock,
    Fallocate,
    Lseek,
    CopyFileRange,
}

impl Op {
    const ALL: [Self; 32] = [
        Self::Lookup,
        Self::GetAttr,
        Self::SetAttr,
        Self::ReadLink,
        Self::MkNod,
        Self::MkDir,
        Self::Unlink,
        Self::RmDir,
        Self::SymLink,
        Self::Rename,
        Self::Link,
        Self::Open,
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Release,
        Self::Fsync,
        Self::OpenDir,
        Self::ReadDir,
        Self::ReleaseDir,
        Self::FsyncDir,
        Self::StatFs,
        Self::SetXattr,
        Self::GetXattr,
        Self::ListXattr,
        Self::RemoveXattr,
        Self::Create,
        Self::GetLock,
        Self::SetLock,
        Self::Fallocate,
        Self::Lseek,
        Self::CopyFileRange,
    ];

    /// The label's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::GetAttr => "getattr",
            Self::SetAttr => "setattr",
            Self::ReadLink => "readlink",
            Self::MkNod => "mknod",
            Self::MkDir => "mkdir",
            Self::Unlink => "unlink",
            Self::RmDir => "rmdir",
            Self::SymLink => "symlink",
            Self::Rename => "rename",
            Self::Link => "link",
            Self::Open => "open",
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Release => "release",
            Self::Fsync => "fsync",
            Self::OpenDir => "opendir",
            Self::ReadDir => "readdir",
            Self::ReleaseDir => "releasedir",
            Self::FsyncDir => "fsyncdir",
            Self::StatFs => "statfs",
            Self::SetXattr => "setxattr",
            Self::GetXattr => "getxattr",
            Self::ListXattr => "listxattr",
            Self::RemoveXattr => "removexattr",
            Self::Create => "create",
            Self::GetLock => "getlk",
            Self::SetLock => "setlk",
            Self::Fallocate => "fallocate",
            Self::Lseek => "lseek",
            Self::CopyFileRange => "copy_file_range",
        }
    }
}

/// See the module. One instance per mount.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Time from the kernel's request to the answer, by operation.
    seconds: Vec<prometheus::Histogram>,
    /// Answers that were errors, by operation. ENOENT of lookups and the like count too.
    errors: Vec<IntCounter>,
    /// Bytes that programs read.
    pub read_bytes: IntCounter,
    /// Bytes that programs wrote.
    pub written_bytes: IntCounter,
    /// Lookups and attributes that the cache answered.
    pub cache_hits: IntCounter,
    /// Those that took a round trip.
    pub cache_misses: IntCounter,
    /// Flushes that failed; their data waits for the next one.
    pub flush_failures: IntCounter,
    /// Uncommitted bytes in memory.
    pub buffered_bytes: IntGauge,
    /// What is staged and not in the bucket yet, on disk.
    pub staged_bytes: IntGauge,
    /// Records of it; one or more per file.
    pub staged_files: IntGauge,
    /// For how long the oldest of it has been waiting.
    pub staged_oldest_seconds: IntGauge,
    /// Dead segments that this mount deleted from the bucket.
    pub deleted_segments: IntCounter,
    /// Changes of names and attributes that were answered ahead of the cluster.
    pub ahead_changes: IntCounter,
    /// Batches in which those took effect.
    pub ahead_batches: IntCounter,
    /// Those of them that did not, and will not.
    pub ahead_lost: IntCounter,
}

impl Metrics {
    /// Registers with `registry`, if any. Two mounts of one process need registries (or label sets) of their own.
    ///
    /// Errors: a metric of the same name is registered already.
    pub fn new(volume: &str, registry: Option<&Registry>) -> Result<Self, prometheus::Error> {
        let labelled = |name: &str, help: &str| Opts::new(name, help).const_label("volume", volume);
        let seconds = HistogramVec::new(
            HistogramOpts::from(labelled(
                "heliofs_fuse_op_seconds",
                "Time from the kernel's request to the answer",
            ))
            .buckets(prometheus::exponential_buckets(5e-6, 2.0, 22)?),
            &["op"],
        )?;
        let errors = IntCounterVec::new(
            labelled("heliofs_fuse_errors_total", "Answers that were errors"),
            &["op"],
        )?;
        let counter = |name: &str, help: &str| IntCounter::with_opts(labelled(name, help));
        let gauge = |name: &str, help: &str| IntGauge::with_opts(labelled(name, help));
        let metrics = Self {
            seconds: Op::ALL
                .iter()
                .map(|op| seconds.with_label_values(&[op.name()]))
                .collect(),
            errors: Op::ALL
                .iter()
                .map(|op| errors.with_label_values(&[op.name()]))
                .collect(),
            read_bytes: counter("heliofs_fuse_read_bytes_total", "Bytes that programs read")?,
            written_bytes: counter(
                "heliofs_fuse_written_bytes_total",
                "Bytes that programs wrote",
            )?,
            cache_hits: counter(
                "heliofs_fuse_cache_hits_total",
                "Questions that the cache answered",
            )?,
            cache_misses: counter(
                "heliofs_fuse_cache_misses_total",
                "Questions that took a round trip",
            )?,
            flush_failures: counter("heliofs_fuse_flush_failures_total", "Flushes that failed")?,
            buffered_bytes: gauge("heliofs_fuse_buffered_bytes", "Uncommitted bytes in memory")?,
            staged_bytes: gauge(
                "heliofs_fuse_staged_bytes",
                "Staged on local disk and not in the bucket yet",
            )?,
            staged_files: gauge(
                "heliofs_fuse_staged_files",
                "Files of staged data on local disk",
            )?,
            staged_oldest_seconds: gauge(
                "heliofs_fuse_staged_oldest_seconds",
                "Age of the oldest staged data",
            )?,
            deleted_segments: counter(
                "heliofs_fuse_deleted_segments_total",
                "Dead segments deleted from the bucket",
            )?,
            ahead_changes: counter(
                "heliofs_fuse_ahead_changes_total",
                "Changes answered ahead of the cluster",
            )?,
            ahead_batches: counter(
                "heliofs_fuse_ahead_batches_total",
                "Batches of changes that were answered ahead",
            )?,
            ahead_lost: counter(
                "heliofs_fuse_ahead_lost_total",
                "Changes that were answered ahead and lost",
            )?,
        };
        if let Some(registry) = registry {
            registry.register(Box::new(seconds))?;
            registry.register(Box::new(errors))?;
            for counter in [
                &metrics.read_bytes,
                &metrics.written_bytes,
                &metrics.cache_hits,
                &metrics.cache_misses,
                &metrics.flush_failures,
                &metrics.deleted_segments,
                &metrics.ahead_changes,
                &metrics.ahead_batches,
                &metrics.ahead_lost,
            ] {
                registry.register(Box::new(counter.clone()))?;
            }
            for gauge in [
                &metrics.buffered_bytes,
                &metrics.staged_bytes,
                &metrics.staged_files,
                &metrics.staged_oldest_seconds,
            ] {
                registry.register(Box::new(gauge.clone()))?;
            }
        }
        Ok(metrics)
    }

    /// An operation that began at `since` ended.
    pub fn ended(&self, op: Op, since: Instant, failed: bool) {
        self.seconds[op as usize].observe(since.elapsed().as_secs_f64());
        if failed {
            self.errors[op as usize].inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_its_own_place() {
        for (place, op) in Op::ALL.iter().enumerate() {
            assert_eq!(*op as usize, place, "{}", op.name());
        }
        let registry = Registry::new();
        let metrics = Metrics::new("v", Some(&registry)).unwrap();
        metrics.ended(Op::CopyFileRange, Instant::now(), true);
        assert!(
            registry
                .gather()
                .iter()
                .any(|family| family.name() == "heliofs_fuse_errors_total")
        );
        assert!(Metrics::new("v", Some(&registry)).is_err());
    }
}

//! What the block store counts. Names: `heliofs_blockstore_<name>_<unit>`; the volume's name is a constant label.

use prometheus::{IntCounter, IntGauge, Opts, Registry};

/// Counters of one [`crate::SegmentStore`].
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Objects stored.
    pub puts: IntCounter,
    /// Bytes of objects stored.
    pub put_bytes: IntCounter,
    /// Ranges read from the bucket.
    pub gets: IntCounter,
    /// Reads that were slow and asked for a second time.
    pub hedged_gets: IntCounter,
    /// Bytes read from the bucket.
    pub get_bytes: IntCounter,
    /// Objects deleted.
    pub deletes: IntCounter,
    /// Attempts that failed and were tried again.
    pub retries: IntCounter,
    /// Operations that failed for good.
    pub failures: IntCounter,
    /// Pages found in memory.
    pub memory_hits: IntCounter,
    /// Pages found on disk.
    pub disk_hits: IntCounter,
    /// Pages that another reader was fetching already.
    pub shared_fetches: IntCounter,
    /// Pages that had to come from the bucket.
    pub misses: IntCounter,
    /// Pages that failed verification, wherever they came from.
    pub corrupt_pages: IntCounter,
    /// Cache files removed because they failed verification.
    pub corrupt_cache_files: IntCounter,
    /// Bytes asked for ahead.
    pub prefetched_bytes: IntCounter,
    /// Bytes that were not fetched ahead because the budget was used up.
    pub prefetch_skipped_bytes: IntCounter,
    /// Bytes in the memory tier.
    pub memory_bytes: IntGauge,
    /// Bytes in the disk tier.
    pub disk_bytes: IntGauge,
    /// Cache entries that were not written because the writer was behind, or the disk too full.
    pub disk_writes_skipped: IntCounter,
    /// Cache directories on disks with less free space than must stay free, to which nothing is written.
    pub disk_caches_full: IntGauge,
}

impl Metrics {
    /// Counters with the label `volume`, registered with `registry` if there is one. A second store of the same volume in one
    /// registry counts for itself, unregistered, with a warning.
    pub fn new(volume_name: &str, registry: Option<&Registry>) -> Self {
        let opts = |name: &str, help: &str| {
            Opts::new(format!("heliofs_blockstore_{name}"), help).const_label("volume", volume_name)
        };
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::with_opts(opts(name, help))
                .expect("names are literals that prometheus accepts");
            register(registry, Box::new(counter.clone()), name);
            counter
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::with_opts(opts(name, help))
                .expect("names are literals that prometheus accepts");
            register(registry, Box::new(gauge.clone()), name);
            gauge
        };
        Self {
            puts: counter("puts_total", "objects stored"),
            put_bytes: counter("put_bytes_total", "bytes of objects stored"),
            gets: counter("gets_total", "ranges read from the bucket"),
            hedged_gets: counter("hedged_gets_total", "slow reads asked for twice"),
            get_bytes: counter("get_bytes_total", "bytes read from the bucket"),
            deletes: counter("deletes_total", "objects deleted"),
            retries: counter("retries_total", "attempts that failed and were tried again"),
            failures: counter("failures_total", "operations that failed for good"),
            memory_hits: counter("memory_hit_pages_total", "pages found in memory"),
            disk_hits: counter("disk_hit_pages_total", "pages found on disk"),
            shared_fetches: counter(
                "shared_fetch_pages_total",
                "pages that another reader was fetching already",
            ),
            misses: counter("miss_pages_total", "pages that had to come from the bucket"),
            corrupt_pages: counter("corrupt_pages_total", "pages that failed verification"),
            corrupt_cache_files: counter(
                "corrupt_cache_files_total",
                "cache files that failed verification and were removed",
            ),
            prefetched_bytes: counter("prefetched_bytes_total", "bytes asked for ahead"),
            prefetch_skipped_bytes: counter(
                "prefetch_skipped_bytes_total",
                "bytes not fetched ahead for lack of budget",
            ),
            memory_bytes: gauge("memory_cache_bytes", "bytes in the memory tier"),
            disk_bytes: gauge("disk_cache_bytes", "bytes in the disk tier"),
            disk_writes_skipped: counter(
                "disk_cache_writes_skipped_total",
                "cache entries not written because the writer was behind, or the disk too full",
            ),
            disk_caches_full: gauge(
                "disk_caches_full",
                "cache directories whose disks have less free space than must stay free",
            ),
        }
    }
}

fn register(registry: Option<&Registry>, metric: Box<dyn prometheus::core::Collector>, name: &str) {
    if let Some(registry) = registry
        && let Err(error) = registry.register(metric)
    {
        tracing::warn!(name, %error, "metric is not registered");
    }
}

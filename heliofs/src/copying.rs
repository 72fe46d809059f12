//! Copying objects of a mirror into its own bucket, in a mount or in a worker.

use std::sync::Arc;
use std::time::Duration;

use blockstore::{Bucket, CopyNews, SegmentStore, StoreError, StoreOptions};
use fuse_client::fs::Fs;
use heliofs_proto::ids::SegmentId;
use heliofs_proto::v1::StorageConfig;
use meta_client::Session;
use mirror_sync::check::Checker;
use mirror_sync::copy::{Buckets, Copier, CopyProgress, Host, report_reads};
use parking_lot::Mutex;
use prometheus::{IntGauge, Opts, Registry};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::failure::{Failure, Outcome};

/// Objects that a mount copies at once, beside what it is for.
pub(crate) const MOUNT_PARALLEL: usize = 8;

/// Counters of a copier: `heliofs_mirror_copy_…`.
pub(crate) struct CopyMetrics {
    segments: IntGauge,
    bytes: IntGauge,
    pulled: IntGauge,
    bad: IntGauge,
    waiting: IntGauge,
}

impl CopyMetrics {
    /// In `registry`, for one volume.
    pub(crate) fn new(registry: &Registry, volume: &str) -> Self {
        let gauge = |name: &str, help: &str| {
            let opts = Opts::new(format!("heliofs_mirror_copy_{name}"), help)
                .const_label("volume", volume);
            let gauge =
                IntGauge::with_opts(opts).expect("names are literals that prometheus accepts");
            if let Err(error) = registry.register(Box::new(gauge.clone())) {
                tracing::warn!(name, %error, "a metric is not shown");
            }
            gauge
        };
        Self {
            segments: gauge("segments_total", "Segments copied into the region's bucket"),
            bytes: gauge("bytes_total", "Bytes copied into the region's bucket"),
            pulled: gauge("pulled_bytes_total", "Bytes read from the source region"),
            bad: gauge("bad_segments_total", "Segments that could not be had"),
            waiting: gauge(
                "waiting_segments",
                "Missing segments that others copy, or that wait",
            ),
        }
    }

    /// As it is now.
    pub(crate) fn show(&self, progress: &CopyProgress) {
        let set =
            |gauge: &IntGauge, value: u64| gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        set(&self.segments, progress.copied_segments);
        set(&self.bytes, progress.copied_bytes);
        set(&self.pulled, progress.pulled_bytes);
        set(&self.bad, progress.bad_segments);
        set(&self.waiting, progress.waiting);
    }
}

/// A mount that copies.
struct MountHost {
    fs: Arc<Fs>,
    store: Arc<SegmentStore>,
    metrics: CopyMetrics,
}

impl Host for MountHost {
    fn session(&self) -> Session {
        self.fs.session()
    }

    fn copied(&self, segment: SegmentId) {
        self.store.note_here(segment);
    }

    fn progress(&self, progress: &CopyProgress) {
        self.metrics.show(progress);
    }

    fn read_bytes(&self) -> u64 {
        self.store.second_read_bytes()
    }
}

/// Both buckets, opened for copying: apart from those that reads wait for.
pub(crate) fn open(
    session: &Session,
    storage: &StorageConfig,
    second: &StorageConfig,
    options: &StoreOptions,
) -> Outcome<Buckets> {
    let welcome = session.welcome();
    let prefix = &welcome.prefix;
    let recorded = welcome.second.as_ref();
    let options = StoreOptions {
        registry: None,
        hedge_after: None,
        ..options.clone()
    };
    Ok(Buckets {
        volume: session.volume_id(),
        own: Bucket::open(storage, prefix, &options)?,
        second: Bucket::open(second, prefix, &options)?,
        own_uuid: storage.uuid.clone(),
        second_uuid: second.uuid.clone(),
        second_recorded: recorded.is_some_and(|recorded| recorded.bucket == second.bucket),
    })
}

/// Whoever is to be served does not wait longer than this for a source region that may be gone.
const SECOND_WITHIN: Duration = Duration::from_secs(3);

/// Whether the second bucket is the source's. One that can't be asked now, or was emptied, may be: copiers ask again before they
/// believe that it lacks something.
///
/// Errors: it is another volume's.
pub(crate) async fn check_second(bucket: &Bucket, uuid: &str) -> Outcome {
    match tokio::time::timeout(SECOND_WITHIN, bucket.check_marker(uuid)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error @ StoreError::AlreadyExists { .. })) => Err(Failure::new(format!(
            "the second bucket is not the source's: {error}"
        ))
        .hint("--bucket2 says where the source's bucket is, seen from here")),
        Ok(Err(error)) => {
            tracing::warn!(%error, "the source's bucket can't be read now");
            Ok(())
        }
        Err(_) => {
            tracing::warn!("the source's bucket does not answer now");
            Ok(())
        }
    }
}

/// Starts the copier of a mount, and its checks of both buckets every `interval` unless that is 0; they live as long as the
/// process.
pub(crate) fn start(
    (buckets, checked): (Buckets, Buckets),
    interval: Duration,
    fs: Arc<Fs>,
    store: Arc<SegmentStore>,
    news: mpsc::Receiver<CopyNews>,
    metrics: CopyMetrics,
) {
    let host = Arc::new(MountHost { fs, store, metrics });
    let copier = Copier::new(buckets, host.clone(), MOUNT_PARALLEL);
    tokio::spawn(copier.run(Some(news), CancellationToken::new()));
    if !interval.is_zero() {
        let checker = Checker::new(checked, host, interval);
        tokio::spawn(checker.run(CancellationToken::new()));
    }
}

/// A mount that copies nothing counts what its reads bring from the source region nevertheless, as long as the process lives.
/// `bucket`: the uuid of this region's.
pub(crate) fn count(bucket: String, fs: Arc<Fs>, store: Arc<SegmentStore>, metrics: CopyMetrics) {
    let host = Arc::new(MountHost { fs, store, metrics });
    tokio::spawn(report_reads(bucket, host, CancellationToken::new()));
}

/// A worker: a session, renewed when it ends, and what was done.
pub(crate) struct WorkerHost {
    /// The session now.
    pub(crate) session: Mutex<Session>,
    /// What was done last.
    pub(crate) progress: Mutex<CopyProgress>,
    /// The same, for /metrics.
    pub(crate) metrics: CopyMetrics,
}

impl Host for WorkerHost {
    fn session(&self) -> Session {
        self.session.lock().clone()
    }

    fn copied(&self, _: SegmentId) {}

    fn read_bytes(&self) -> u64 {
        // Its reads are copies, which count themselves.
        0
    }

    fn progress(&self, progress: &CopyProgress) {
        self.metrics.show(progress);
        *self.progress.lock() = progress.clone();
    }
}

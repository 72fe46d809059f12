//! [`Bucket`]: the objects below one volume's prefix, every operation bounded in time and number.

use std::collections::HashSet;
use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use heliofs_proto::v1::StorageConfig;
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::attempts::Patience;
use super::backend::{self, Backend};
use super::fault::{Fault, as_error, classify};
use super::link::Link;
use super::rate::RateLimit;
use crate::metrics::Metrics;
use crate::{Kind, StoreError, StoreOptions};

/// A request that is slow may be hedged this much later for its length.
const HEDGE_BYTES_PER_SECOND: u64 = 4 << 20;
/// One request of so many may be hedged.
const HEDGE_EVERY: u64 = 10;

/// The objects below `<prefix>/<volume name>/` of a bucket.
///
/// Every operation is tried again, with backoff and jitter, until `StoreOptions::deadline` (plus one second per MiB that it
/// moves) has passed, and waits at most as long for its turn before that.
pub struct Bucket {
    backend: Backend,
    prefix: Path,
    volume_name: String,
    patience: Patience,
    uploads: Semaphore,
    downloads: Semaphore,
    upload_limit: Option<RateLimit>,
    download_limit: Option<Arc<RateLimit>>,
    hedge_after: Option<Duration>,
    link: Mutex<Link>,
    /// `file` only: directories whose own names are durable up to the bucket's.
    durable_directories: Mutex<HashSet<PathBuf>>,
    /// The server has said that it does not know conditional puts.
    unconditional: AtomicBool,
    metrics: Arc<Metrics>,
}

/// A request for bytes; given up, it has brought none.
struct Sent<'a> {
    link: &'a Mutex<Link>,
    at: Instant,
    bytes: u64,
}

impl<'a> Sent<'a> {
    fn now(link: &'a Mutex<Link>) -> Self {
        let at = Instant::now();
        link.lock().begin(at);
        Self { link, at, bytes: 0 }
    }
}

impl Drop for Sent<'_> {
    fn drop(&mut self) {
        self.link.lock().end(self.at, Instant::now(), self.bytes);
    }
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bucket({} {})", self.backend.store, self.prefix)
    }
}

impl Bucket {
    /// Opens the bucket of `config` for volume `volume_name`. Sends nothing.
    ///
    /// Errors: `Invalid`.
    pub fn open(
        config: &StorageConfig,
        volume_name: &str,
        options: &StoreOptions,
    ) -> Result<Self, StoreError> {
        let metrics = Arc::new(Metrics::new(volume_name, options.registry.as_ref()));
        Self::over(
            backend::open(config, options)?,
            volume_name,
            options,
            metrics,
        )
    }

    /// As [`Bucket::open`], of another region: counted apart from the volume's own.
    pub fn open_second(
        config: &StorageConfig,
        volume_name: &str,
        options: &StoreOptions,
    ) -> Result<Self, StoreError> {
        let counted_as = format!("{volume_name} (second bucket)");
        let metrics = Arc::new(Metrics::new(&counted_as, options.registry.as_ref()));
        Self::over(
            backend::open(config, options)?,
            volume_name,
            options,
            metrics,
        )
    }

    /// As [`Bucket::open`], over any object store; for tests and for decorators.
    pub fn over_store(
        store: Arc<dyn ObjectStore>,
        volume_name: &str,
        options: &StoreOptions,
    ) -> Result<Self, StoreError> {
        let backend = Backend {
            store,
            prefix: Path::default(),
            directory: None,
        };
        let metrics = Arc::new(Metrics::new(volume_name, options.registry.as_ref()));
        Self::over(backend, volume_name, options, metrics)
    }

    fn over(
        backend: Backend,
        volume_name: &str,
        options: &StoreOptions,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StoreError> {
        if volume_name.is_empty() || volume_name.contains('/') {
            return Err(StoreError::Invalid(format!(
                "`{volume_name}` is no name of a volume"
            )));
        }
        let prefix = backend.prefix.clone().join(volume_name);
        Ok(Self {
            backend,
            prefix,
            volume_name: volume_name.to_owned(),
            patience: Patience::new(options),
            uploads: Semaphore::new(options.uploads_max.max(1)),
            downloads: Semaphore::new(options.downloads_max.max(1)),
            upload_limit: RateLimit::new(options.upload_bytes_per_second),
            download_limit: match &options.download_budget {
                Some(budget) => Some(Arc::clone(budget)),
                None => RateLimit::new(options.download_bytes_per_second).map(Arc::new),
            },
            hedge_after: options.hedge_after,
            link: Mutex::default(),
            durable_directories: Mutex::default(),
            unconditional: AtomicBool::new(false),
            metrics,
        })
    }

    /// The name of the volume whose prefix it is.
    pub fn volume_name(&self) -> &str {
        &self.volume_name
    }

    /// What has been counted.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The whole key of object `name`.
    pub fn key(&self, name: &str) -> String {
        self.path(name).to_string()
    }

    fn path(&self, name: &str) -> Path {
        name.split('/')
            .fold(self.prefix.clone(), |path, part| path.join(part))
    }

    /// Stores an object that must not exist yet. Durable once it returns `Ok`. If an object lies there already, it is compared:
    /// the same length and CRC32 mean that an earlier attempt succeeded whose acknowledgement was lost.
    ///
    /// Errors: `AlreadyExists` (other bytes), `Denied`, `Unavailable` (may or may not be stored).
    pub async fn put_new(
        &self,
        name: &str,
        payload: PutPayload,
        checksum: u32,
    ) -> Result<(), StoreError> {
        let path = self.path(name);
        let length = payload.content_length() as u64;
        let _turn = self.turn("put", path.as_ref(), &self.uploads).await?;
        if let Some(limit) = &self.upload_limit {
            limit.admit(length).await;
        }
        let stored = self
            .attempts("put", path.as_ref(), length, || {
                let payload = payload.clone();
                let path = &path;
                async move {
                    let mode = match self.unconditional.load(Ordering::Relaxed) {
                        true => PutMode::Overwrite,
                        false => PutMode::Create,
                    };
                    let options = PutOptions::from(mode);
                    match self
                        .backend
                        .store
                        .put_opts(path, payload.clone(), options)
                        .await
                    {
                        Ok(_) => Ok(()),
                        Err(error) => match classify("put", path.as_ref(), error) {
                            Fault::NoConditions => {
                                tracing::warn!(
                                    store = %self.backend.store,
                                    "the store knows no conditional puts; going on without"
                                );
                                self.unconditional.store(true, Ordering::Relaxed);
                                let error = match self.backend.store.put(path, payload).await {
                                    Ok(_) => return Ok(()),
                                    Err(error) => error,
                                };
                                Err(as_error("put", path.as_ref(), error))
                            }
                            Fault::Error(error) => Err(error),
                            Fault::OutOfRange => Err(StoreError::Invalid(
                                "a put was answered with 416".to_owned(),
                            )),
                        },
                    }
                }
            })
            .await;
        match stored {
            Err(error) if error.kind() == Kind::AlreadyExists => {
                self.settle(name, length, checksum, error).await?
            }
            other => other?,
        }
        self.sync_directories(name).await?;
        self.metrics.puts.inc();
        self.metrics.put_bytes.inc_by(length);
        Ok(())
    }

    /// An object lies there already: ours, of an earlier attempt, or another's?
    async fn settle(
        &self,
        name: &str,
        length: u64,
        checksum: u32,
        exists: StoreError,
    ) -> Result<(), StoreError> {
        let found = self.get(name).await?;
        if found.len() as u64 != length || crc32fast::hash(&found) != checksum {
            self.metrics.failures.inc();
            return Err(exists);
        }
        // The earlier attempt may have failed between link and fsync.
        self.sync_file(name).await
    }

    /// `file` only: makes an object durable that another attempt has linked.
    async fn sync_file(&self, name: &str) -> Result<(), StoreError> {
        let Some(directory) = &self.backend.directory else {
            return Ok(());
        };
        let path = directory.join(self.key(name));
        let parent = path.parent().unwrap_or(directory).to_owned();
        self.sync(name, vec![path, parent]).await
    }

    /// `file` only: makes the names of the directories above an object durable. Of two puts that need the same new directory one
    /// creates it, and the other must not be acknowledged before the directory's name is on disk.
    async fn sync_directories(&self, name: &str) -> Result<(), StoreError> {
        let Some(directory) = &self.backend.directory else {
            return Ok(());
        };
        let path = directory.join(self.key(name));
        let Some(parent) = path.parent().map(std::path::Path::to_owned) else {
            return Ok(());
        };
        if self.durable_directories.lock().contains(&parent) {
            return Ok(());
        }
        let above = parent.ancestors().skip(1);
        let above = above
            .take_while(|path| path.starts_with(directory))
            .map(Into::into)
            .collect();
        self.sync(name, above).await?;
        self.durable_directories.lock().insert(parent);
        Ok(())
    }

    async fn sync(&self, name: &str, paths: Vec<PathBuf>) -> Result<(), StoreError> {
        let synced = tokio::task::spawn_blocking(move || {
            paths
                .iter()
                .try_for_each(|path| std::fs::File::open(path)?.sync_all())
        })
        .await;
        synced
            .map_err(std::io::Error::other)
            .flatten()
            .map_err(|error| StoreError::Unavailable {
                operation: "put",
                key: self.key(name),
                waited: Duration::ZERO,
                attempts: 1,
                detail: format!("fsync: {error}"),
            })
    }

    /// Stores an object, replacing what lies there. Durable once it returns `Ok`.
    pub async fn put(&self, name: &str, bytes: Bytes) -> Result<(), StoreError> {
        let path = self.path(name);
        let _turn = self.turn("put", path.as_ref(), &self.uploads).await?;
        self.attempts("put", path.as_ref(), bytes.len() as u64, || {
            let payload = PutPayload::from_bytes(bytes.clone());
            let path = &path;
            async move {
                match self.backend.store.put(path, payload).await {
                    Ok(_) => Ok(()),
                    Err(error) => Err(as_error("put", path.as_ref(), error)),
                }
            }
        })
        .await?;
        self.sync_directories(name).await
    }

    /// Bytes `range` of an object; fewer when it ends before, none when it ends before the range begins.
    ///
    /// Errors: `NotFound`, `Denied`, `Unavailable`.
    pub async fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let expected = range.end - range.start;
        self.fetch(name, Some(GetRange::Bounded(range)), expected)
            .await
    }

    /// The last `length` bytes of an object; all of it when it is shorter.
    ///
    /// Errors: `NotFound`, `Denied`, `Unavailable`.
    pub async fn get_tail(&self, name: &str, length: u64) -> Result<Bytes, StoreError> {
        self.fetch(name, Some(GetRange::Suffix(length)), length)
            .await
    }

    /// A whole object.
    ///
    /// Errors: `NotFound`, `Denied`, `Unavailable`.
    pub async fn get(&self, name: &str) -> Result<Bytes, StoreError> {
        self.fetch(name, None, 64 << 20).await
    }

    /// A whole object of about `length` bytes, which say how long it may take.
    ///
    /// Errors: `NotFound`, `Denied`, `Unavailable`.
    pub async fn get_about(&self, name: &str, length: u64) -> Result<Bytes, StoreError> {
        self.fetch(name, None, length).await
    }

    async fn fetch(
        &self,
        name: &str,
        range: Option<GetRange>,
        length: u64,
    ) -> Result<Bytes, StoreError> {
        let path = self.path(name);
        let _turn = self.turn("get", path.as_ref(), &self.downloads).await?;
        if let Some(limit) = &self.download_limit {
            // How much it is, the answer tells: what came before is waited for.
            limit.admit(0).await;
        }
        let bytes = self
            .attempts("get", path.as_ref(), length, || {
                self.hedged(length, || {
                    self.get_once(
                        &path,
                        GetOptions {
                            range: range.clone(),
                            ..Default::default()
                        },
                    )
                })
            })
            .await?;
        self.metrics.gets.inc();
        self.metrics.get_bytes.inc_by(bytes.len() as u64);
        if let Some(limit) = &self.download_limit {
            limit.charge(bytes.len() as u64);
        }
        Ok(bytes)
    }

    /// Asks a second time when the first request takes long, and takes what comes first. At most one in
    /// [`HEDGE_EVERY`] requests: a store that is slow for all must not get twice the load.
    async fn hedged<F>(&self, length: u64, request: impl Fn() -> F) -> Result<Bytes, StoreError>
    where
        F: Future<Output = Result<Bytes, StoreError>>,
    {
        let Some(after) = self.hedge_after else {
            return request().await;
        };
        let after = after + Duration::from_secs(length / HEDGE_BYTES_PER_SECOND);
        let first = request();
        tokio::pin!(first);
        tokio::select! {
            answer = &mut first => return answer,
            () = tokio::time::sleep(after) => {}
        }
        let metrics = &self.metrics;
        if metrics.hedged_gets.get() * HEDGE_EVERY > metrics.gets.get() + HEDGE_EVERY {
            return first.await;
        }
        metrics.hedged_gets.inc();
        let second = request();
        tokio::pin!(second);
        // An error of one leaves the other to be waited for.
        tokio::select! {
            answer = &mut first => match answer {
                Ok(bytes) => Ok(bytes),
                Err(_) => second.await,
            },
            answer = &mut second => match answer {
                Ok(bytes) => Ok(bytes),
                Err(_) => first.await,
            },
        }
    }

    /// Bytes that are under way when the link to the bucket is used to the full, as far as reads have shown.
    pub fn link_holds(&self) -> Option<u64> {
        self.link.lock().holds()
    }

    async fn get_once(&self, path: &Path, options: GetOptions) -> Result<Bytes, StoreError> {
        let mut sent = Sent::now(&self.link);
        let bytes = match self.backend.store.get_opts(path, options).await {
            Ok(found) => {
                let promised = found.range.end - found.range.start;
                self.link.lock().answered(sent.at.elapsed());
                let bytes = found.bytes().await;
                sent.bytes = bytes.as_ref().map_or(0, |bytes| bytes.len() as u64);
                // A body cut short by the connection is not always an error of the client's.
                match bytes {
                    Ok(bytes) if (bytes.len() as u64) < promised => {
                        return Err(StoreError::Retry {
                            operation: "get",
                            key: path.to_string(),
                            detail: format!(
                                "the body ended after {} of {promised} bytes",
                                bytes.len()
                            ),
                        });
                    }
                    other => other,
                }
            }
            Err(error) => Err(error),
        };
        match bytes.map_err(|error| classify("get", path.as_ref(), error)) {
            Ok(bytes) => Ok(bytes),
            Err(Fault::OutOfRange) => Ok(Bytes::new()),
            Err(Fault::Error(error)) => Err(error),
            Err(Fault::NoConditions) => {
                Err(StoreError::Invalid("get is not implemented".to_owned()))
            }
        }
    }

    /// Deletes an object; one that does not exist is deleted already.
    pub async fn delete(&self, name: &str) -> Result<(), StoreError> {
        let path = self.path(name);
        let _turn = self.turn("delete", path.as_ref(), &self.uploads).await?;
        let deleted = self
            .attempts("delete", path.as_ref(), 0, || async {
                match self.backend.store.delete(&path).await {
                    Ok(()) => Ok(()),
                    Err(error) => Err(as_error("delete", path.as_ref(), error)),
                }
            })
            .await;
        match deleted {
            Err(StoreError::NotFound { .. }) => Ok(()),
            other => {
                self.metrics.deletes.inc_by(u64::from(other.is_ok()));
                other
            }
        }
    }

    /// Names and lengths of all objects below the volume's prefix that lie below `directory` (`""`: all). For `destroy` and
    /// fsck; never the truth about what is alive.
    pub async fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        let below = match directory {
            "" => self.prefix.clone(),
            directory => self.path(directory),
        };
        let strip = self.prefix.as_ref().len() + 1;
        self.attempts("list", below.as_ref(), 0, || async {
            self.backend
                .store
                .list(Some(&below))
                .map_ok(|meta| {
                    (
                        meta.location.as_ref().get(strip..).unwrap_or("").to_owned(),
                        meta.size,
                    )
                })
                .try_collect()
                .await
                .map_err(|error| as_error("list", below.as_ref(), error))
        })
        .await
    }

    /// Deletes every object below the volume's prefix, the marker last; returns how many there were. For `destroy`.
    pub async fn delete_all(&self) -> Result<u64, StoreError> {
        let names = self.list("").await?;
        let (markers, objects): (Vec<_>, Vec<_>) = names
            .into_iter()
            .partition(|(name, _)| super::marker::is_about_the_bucket(name));
        let mut deleted = 0;
        for names in [objects, markers] {
            let mut deletions = futures::stream::iter(names)
                .map(|(name, _)| async move { self.delete(&name).await })
                .buffer_unordered(16);
            while let Some(result) = deletions.next().await {
                result?;
                deleted += 1;
            }
        }
        Ok(deleted)
    }

    async fn turn<'a>(
        &self,
        operation: &'static str,
        key: &str,
        turns: &'a Semaphore,
    ) -> Result<SemaphorePermit<'a>, StoreError> {
        let waiting = tokio::time::timeout(self.patience.deadline, turns.acquire());
        match waiting.await {
            Ok(permit) => Ok(permit.expect("nobody closes this semaphore")),
            Err(_) => {
                self.metrics.failures.inc();
                Err(StoreError::Unavailable {
                    operation,
                    key: key.to_owned(),
                    waited: self.patience.deadline,
                    attempts: 0,
                    detail: "others before it are waiting for the store".to_owned(),
                })
            }
        }
    }

    /// See [`Patience::attempts`].
    async fn attempts<T, F, Fut>(
        &self,
        operation: &'static str,
        key: &str,
        bytes: u64,
        attempt: F,
    ) -> Result<T, StoreError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, StoreError>>,
    {
        self.patience
            .attempts(&self.metrics, operation, key, bytes, attempt)
            .await
    }
}

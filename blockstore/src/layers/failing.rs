//! An object store that fails as real ones do, driven by a seed.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    Result,
};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// How often what goes wrong; each is a probability per request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    /// The request fails and has no effect.
    pub error: f64,
    /// A put or delete takes effect, but fails.
    pub lost_ack: f64,
    /// A body is shorter than announced.
    pub short_body: f64,
    /// A body that claims to be whole is cut.
    pub cut_body: f64,
    /// One bit of a body is flipped.
    pub flipped_bit: f64,
    /// A get has no answer, ever.
    pub stuck: f64,
}

/// The decorator.
#[derive(Debug)]
pub struct FailingStore {
    inner: Arc<dyn ObjectStore>,
    rates: Mutex<Rates>,
    random: Mutex<StdRng>,
    /// Every request fails.
    down: AtomicBool,
    /// Conditional puts are answered with "not implemented".
    no_conditions: AtomicBool,
    faults: AtomicU64,
    gets: AtomicU64,
    got_bytes: AtomicU64,
}

impl FailingStore {
    /// Fails `inner` at `rates`, the same way each time for the same seed and order of requests.
    pub fn new(inner: Arc<dyn ObjectStore>, seed: u64, rates: Rates) -> Self {
        Self {
            inner,
            rates: Mutex::new(rates),
            random: Mutex::new(StdRng::seed_from_u64(seed)),
            down: AtomicBool::new(false),
            no_conditions: AtomicBool::new(false),
            faults: AtomicU64::new(0),
            gets: AtomicU64::new(0),
            got_bytes: AtomicU64::new(0),
        }
    }

    /// Changes the rates from now on.
    pub fn set_rates(&self, rates: Rates) {
        *self.rates.lock() = rates;
    }

    /// Whether every request fails.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    /// Whether conditional puts are unknown to this store.
    pub fn set_no_conditions(&self, unknown: bool) {
        self.no_conditions.store(unknown, Ordering::SeqCst);
    }

    /// How many faults were injected: a run without any proves nothing.
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::SeqCst)
    }

    /// Gets that reached the store, and the bytes that it gave.
    pub fn gets(&self) -> (u64, u64) {
        (
            self.gets.load(Ordering::SeqCst),
            self.got_bytes.load(Ordering::SeqCst),
        )
    }

    fn chance(&self, rate: impl Fn(&Rates) -> f64) -> bool {
        let rate = rate(&self.rates.lock());
        let hit = rate > 0.0 && self.random.lock().random_bool(rate);
        self.faults.fetch_add(u64::from(hit), Ordering::SeqCst);
        hit
    }

    fn enter(&self) -> Result<()> {
        if self.down.load(Ordering::SeqCst) || self.chance(|rates| rates.error) {
            return Err(injected("503 injected"));
        }
        Ok(())
    }
}

fn injected(text: &'static str) -> Error {
    Error::Generic {
        store: "failing",
        source: text.into(),
    }
}

impl fmt::Display for FailingStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Failing({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for FailingStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        self.enter()?;
        if self.no_conditions.load(Ordering::SeqCst) && opts.mode == PutMode::Create {
            return Err(Error::NotImplemented {
                operation: "conditional put".to_owned(),
                implementer: self.to_string(),
            });
        }
        let stored = self.inner.put_opts(location, payload, opts).await?;
        if self.chance(|rates| rates.lost_ack) {
            return Err(injected("the connection was reset after the request"));
        }
        Ok(stored)
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.enter()?;
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.enter()?;
        if self.chance(|rates| rates.stuck) {
            return std::future::pending().await;
        }
        let head = options.head;
        let found = self.inner.get_opts(location, options).await?;
        if head {
            return Ok(found);
        }
        let (meta, mut range, attributes, extensions) = (
            found.meta.clone(),
            found.range.clone(),
            found.attributes.clone(),
            found.extensions.clone(),
        );
        let mut body = found.bytes().await?.to_vec();
        self.gets.fetch_add(1, Ordering::SeqCst);
        self.got_bytes
            .fetch_add(body.len() as u64, Ordering::SeqCst);
        if !body.is_empty() {
            if self.chance(|rates| rates.flipped_bit) {
                let bit = self.random.lock().random_range(0..body.len() * 8);
                body[bit / 8] ^= 1 << (bit % 8);
            }
            if self.chance(|rates| rates.short_body) {
                let length = self.random.lock().random_range(0..body.len());
                body.truncate(length);
            } else if self.chance(|rates| rates.cut_body) {
                let length = self.random.lock().random_range(0..body.len());
                body.truncate(length);
                range.end = range.start + length as u64;
            }
        }
        let body = futures::stream::once(async move { Ok(Bytes::from(body)) }).boxed();
        Ok(GetResult {
            payload: GetResultPayload::Stream(body),
            meta,
            range,
            attributes,
            extensions,
        })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        if let Err(error) = self.enter() {
            return futures::stream::once(async move { Err(error) }).boxed();
        }
        let lost = self.chance(|rates| rates.lost_ack);
        self.inner
            .delete_stream(locations)
            .map(move |deleted| match lost {
                true => Err(injected("the connection was reset after the request")),
                false => deleted,
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.enter() {
            Ok(()) => self.inner.list(prefix),
            Err(error) => futures::stream::once(async move { Err(error) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.enter()?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.enter()?;
        self.inner.copy_opts(from, to, options).await
    }
}

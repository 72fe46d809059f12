//! A second bucket, of the region that the volume is mirrored from: what this region's own bucket lacks is read from there.
//!
//! Whoever opens the store is told what reads find out: objects that they brought and that may become the copy, and objects
//! that the own bucket was believed to hold.

use std::future::Future;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use heliofs_proto::ids::SegmentId;
use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::{OnceCell, mpsc};

use super::fetch::Shared;
use crate::object::Bucket;
use crate::{Kind, StoreError};

/// Segments that are known to be in the second bucket only.
const ELSEWHERE_MAX: usize = 1 << 16;

/// After this time a segment may have been copied by others.
const ELSEWHERE_FOR: Duration = Duration::from_secs(30);

/// Whole objects that reads brought, kept for the next reads of the same: bytes, about.
const PULLED_BYTES: u64 = 64 << 20;

/// The bucket that should have it has this long, and a second more for each MiB, before the other one is asked, too.
const PATIENCE: Duration = Duration::from_secs(3);

/// News that wait; more are dropped: the copy is made without them.
const NEWS_MAX: usize = 16;

/// What reads through two buckets find out.
#[derive(Debug)]
pub enum CopyNews {
    /// A read brought the whole object from the second bucket; unverified.
    Pulled {
        /// Which.
        segment: SegmentId,
        /// All its bytes.
        object: Bytes,
    },
    /// The own bucket was believed to hold it.
    Lost {
        /// Which.
        segment: SegmentId,
        /// A bad object lies there.
        replace: bool,
        /// When the own bucket was asked.
        asked: Instant,
    },
}

/// Where bytes came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Origin {
    Own,
    Second,
}

/// A part of an object.
#[derive(Clone, Debug)]
pub(super) enum Part {
    Range(Range<u64>),
    Tail(u64),
}

impl Part {
    async fn get(&self, bucket: &Bucket, name: &str) -> Result<Bytes, StoreError> {
        match self {
            Self::Range(range) => bucket.get_range(name, range.clone()).await,
            Self::Tail(length) => bucket.get_tail(name, *length).await,
        }
    }

    fn length(&self) -> u64 {
        match self {
            Self::Range(range) => range.end - range.start,
            Self::Tail(length) => *length,
        }
    }

    fn of(&self, whole: &Bytes) -> Bytes {
        let length = whole.len();
        let within = |at: u64| usize::try_from(at).unwrap_or(length).min(length);
        match self {
            Self::Range(range) => whole.slice(within(range.start)..within(range.end)),
            Self::Tail(tail) => whole.slice(length - within(*tail)..),
        }
    }
}

/// The second bucket.
#[derive(Debug)]
pub(super) struct Second {
    bucket: Bucket,
    elsewhere: Mutex<LruCache<SegmentId, Instant>>,
    pulled: Mutex<LruCache<SegmentId, Arc<OnceCell<Bytes>>>>,
    news: mpsc::Sender<CopyNews>,
    segment_bytes: u64,
    /// Bytes that came from the bucket.
    read_bytes: AtomicU64,
}

impl Second {
    /// `segment_bytes`: about the length of an object.
    pub(super) fn new(bucket: Bucket, segment_bytes: u64) -> (Self, mpsc::Receiver<CopyNews>) {
        let (news, heard) = mpsc::channel(NEWS_MAX);
        let kept = (PULLED_BYTES / segment_bytes.max(1)).clamp(1, 1024) as usize;
        let size = |entries: usize| NonZeroUsize::new(entries).expect("at least 1");
        let second = Self {
            bucket,
            elsewhere: Mutex::new(LruCache::new(size(ELSEWHERE_MAX))),
            pulled: Mutex::new(LruCache::new(size(kept))),
            news,
            segment_bytes,
            read_bytes: AtomicU64::new(0),
        };
        (second, heard)
    }

    pub(super) fn bucket(&self) -> &Bucket {
        &self.bucket
    }

    pub(super) fn note_elsewhere(&self, segments: &[u64]) {
        if segments.is_empty() {
            return;
        }
        let until = Instant::now() + ELSEWHERE_FOR;
        let mut elsewhere = self.elsewhere.lock();
        for segment in segments {
            elsewhere.put(SegmentId(*segment), until);
        }
    }

    pub(super) fn note_here(&self, segment: SegmentId) {
        self.elsewhere.lock().pop(&segment);
        self.pulled.lock().pop(&segment);
    }

    fn is_elsewhere(&self, segment: SegmentId) -> bool {
        let mut elsewhere = self.elsewhere.lock();
        match elsewhere.get(&segment) {
            Some(until) if *until > Instant::now() => true,
            Some(_) => {
                elsewhere.pop(&segment);
                false
            }
            None => false,
        }
    }

    pub(super) fn tell(&self, news: CopyNews) {
        // Full: what is lost is met again, and what was pulled is pulled again.
        self.news.try_send(news).ok();
    }

    /// Somebody makes copies: a read brings the whole object, once for all who want parts of it, and it becomes the copy.
    fn copies(&self) -> bool {
        !self.news.is_closed()
    }

    async fn get(&self, segment: SegmentId, part: &Part) -> Result<Bytes, StoreError> {
        let name = segment.object_name();
        if !self.copies() {
            return self.counted(part.get(&self.bucket, &name).await);
        }
        let cell = {
            let mut pulled = self.pulled.lock();
            Arc::clone(pulled.get_or_insert(segment, Arc::default))
        };
        let whole = cell
            .get_or_try_init(|| async {
                let object = self.bucket.get_about(&name, self.segment_bytes).await;
                let object = self.counted(object)?;
                self.tell(CopyNews::Pulled {
                    segment,
                    object: object.clone(),
                });
                Ok(object)
            })
            .await?;
        Ok(part.of(whole))
    }

    fn counted(&self, answer: Result<Bytes, StoreError>) -> Result<Bytes, StoreError> {
        if let Ok(bytes) = &answer {
            self.read_bytes
                .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        answer
    }

    /// Bytes that came from the bucket.
    pub(super) fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    /// What was pulled turned out to be bad: the next read asks again.
    pub(super) fn forget(&self, segment: SegmentId) {
        self.pulled.lock().pop(&segment);
    }
}

/// What to say when neither bucket gave an answer. What the own bucket was believed to hold and does not have is gone, as far as
/// can be told: whoever reads asks where the data is now.
fn both(own: StoreError, second: StoreError, elsewhere: bool) -> StoreError {
    match own.kind() {
        Kind::NotFound if elsewhere => second,
        _ => own,
    }
}

/// How the one that was asked first, and the other, answered; `None`: it was not waited for.
type Answers = (
    Option<Result<Bytes, StoreError>>,
    Option<Result<Bytes, StoreError>>,
);

/// Asks `first`; when it fails, or after `patience`, `then` too. Ends with the first good answer.
async fn ask(
    first: impl Future<Output = Result<Bytes, StoreError>>,
    then: impl Future<Output = Result<Bytes, StoreError>>,
    patience: Duration,
) -> Answers {
    tokio::pin!(first, then);
    match tokio::time::timeout(patience, &mut first).await {
        Ok(Ok(bytes)) => return (Some(Ok(bytes)), None),
        Ok(Err(error)) => return (Some(Err(error)), Some(then.await)),
        Err(_) => {}
    }
    tokio::select! {
        answer = &mut first => match answer {
            Ok(bytes) => (Some(Ok(bytes)), None),
            Err(error) => (Some(Err(error)), Some(then.await)),
        },
        answer = &mut then => match answer {
            Ok(bytes) => (None, Some(Ok(bytes))),
            Err(error) => (Some(first.await), Some(Err(error))),
        },
    }
}

impl Shared {
    /// A part of an object, from the bucket that has it; `attempt` counts from 0, and every other one asks the other bucket
    /// first: bytes that failed verification are asked for elsewhere.
    pub(super) async fn part(
        &self,
        segment: SegmentId,
        part: Part,
        attempt: u32,
    ) -> Result<(Bytes, Origin), StoreError> {
        let name = segment.object_name();
        let asked = Instant::now();
        let own = || part.get(&self.bucket, &name);
        let Some(second) = &self.second else {
            return Ok((own().await?, Origin::Own));
        };
        let elsewhere = second.is_elsewhere(segment);
        let patience = PATIENCE + Duration::from_secs(part.length() >> 20);
        if elsewhere != (attempt % 2 == 1) {
            let (there, here) = ask(second.get(segment, &part), own(), patience).await;
            return match (there, here) {
                (Some(Ok(bytes)), _) => Ok((bytes, Origin::Second)),
                (_, Some(Ok(bytes))) => {
                    second.note_here(segment);
                    Ok((bytes, Origin::Own))
                }
                (Some(Err(failed)), Some(Err(error))) => Err(both(error, failed, elsewhere)),
                (Some(Err(error)), None) | (None, Some(Err(error))) => Err(error),
                (None, None) => Err(nobody()),
            };
        }
        let (here, there) = ask(own(), second.get(segment, &part), patience).await;
        match (here, there) {
            (Some(Ok(bytes)), _) => Ok((bytes, Origin::Own)),
            (here, Some(Ok(bytes))) => {
                let gone = matches!(&here, Some(Err(error)) if error.kind() == Kind::NotFound);
                if gone && !elsewhere {
                    second.tell(CopyNews::Lost {
                        segment,
                        replace: false,
                        asked,
                    });
                }
                Ok((bytes, Origin::Second))
            }
            (Some(Err(error)), Some(Err(failed))) => Err(both(error, failed, elsewhere)),
            (Some(Err(error)), None) | (None, Some(Err(error))) => Err(error),
            (None, None) => Err(nobody()),
        }
    }
}

/// [`ask`] ends with an answer of one at least.
fn nobody() -> StoreError {
    StoreError::Invalid("neither bucket was asked".to_owned())
}

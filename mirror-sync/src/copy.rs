//! Copies objects from the source region's bucket into this region's: tasks are leased from the mirror's leader, pulled,
//! verified, uploaded and reported in batches. Any number of copiers share the work; each mount of the mirror is one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use blockstore::{Bucket, CopyNews, Kind, StoreError};
use bytes::Bytes;
use heliofs_proto::ids::{SegmentId, VolumeId};
use heliofs_proto::v1;
use meta_client::{ClientError, Session};
use object_store::PutPayload;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::repack::repack;

/// Before the leader is asked again when it had nothing, and when it could not be asked.
const IDLE: Duration = Duration::from_millis(250);
const FAILED: Duration = Duration::from_secs(1);
/// Longest pause after copies that failed.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// A report waits this long for more to report, or until it is this long.
const REPORT_AFTER: Duration = Duration::from_millis(200);
const REPORT_MAX: usize = 256;

/// What is under way for long is said this often to be: a third of a lease, after which others would be given the same.
const RENEW: Duration = Duration::from_secs(20);

/// A read that began before an object was stored has ended after this time.
const READS_TAKE: Duration = Duration::from_secs(30);

/// Segments stored lately that are remembered.
const STORED_MAX: usize = 1 << 14;

/// An object that the second bucket does not have is asked for this often, at least [`ABSENT_PAUSE`] apart, before that counts.
const ABSENT_MAX: u32 = 3;
const ABSENT_PAUSE: Duration = Duration::from_millis(500);

/// Dead objects deleted at once, and the pause when there are none.
const DELETIONS: u32 = 512;
const DELETION_PAUSE: Duration = Duration::from_secs(5);

/// Two buckets of one volume.
#[derive(Debug)]
pub struct Buckets {
    /// Whose objects are in them.
    pub volume: VolumeId,
    /// This region's.
    pub own: Bucket,
    /// The source region's.
    pub second: Bucket,
    /// `StorageConfig.uuid` of each: reports name the one, and the other's marker tells whether it is what it should be.
    pub own_uuid: String,
    /// See `own_uuid`.
    pub second_uuid: String,
    /// The source region's is where the metadata says that it is, and not where somebody else says.
    pub second_recorded: bool,
}

/// What a copier has done.
#[derive(Clone, Debug, Default)]
pub struct CopyProgress {
    /// Segments that are in this region's bucket now, and their bytes.
    pub copied_segments: u64,
    /// Bytes of them.
    pub copied_bytes: u64,
    /// Bytes that came from the source region.
    pub pulled_bytes: u64,
    /// Segments that were found in this region's bucket already.
    pub found_segments: u64,
    /// Segments of those copied that were built from what they were made of, which was in this region's bucket.
    pub repacked_segments: u64,
    /// Segments that could not be had.
    pub bad_segments: u64,
    /// Missing segments that were leased to others, or waited, when the leader was last asked.
    pub waiting: u64,
    /// Tasks that this copier has under way.
    pub under_way: u64,
}

/// Where a copier gets its sessions from, and whom it tells.
pub trait Host: Send + Sync + 'static {
    /// The session that tasks are leased to.
    fn session(&self) -> Session;

    /// A segment is in this region's bucket now.
    fn copied(&self, segment: SegmentId);

    /// Something was done.
    fn progress(&self, progress: &CopyProgress);

    /// Bytes that reads of this process have brought from the source region so far.
    fn read_bytes(&self) -> u64;
}

/// One copier.
pub struct Copier {
    buckets: Arc<Buckets>,
    host: Arc<dyn Host>,
    parallel: usize,
    report: v1::CopyReport,
    report_since: Option<Instant>,
    wanted: Vec<SegmentId>,
    pulled: BTreeMap<SegmentId, Bytes>,
    progress: CopyProgress,
    /// When segments were stored.
    stored_at: BTreeMap<u64, Instant>,
    /// Of what reads have brought, this much is counted.
    read_bytes: u64,
    /// Segments that are queued or under way here.
    under_way: BTreeSet<u64>,
    /// Before more is asked for after something failed; longer each time.
    pause: Duration,
}

/// Where a stored object came from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whence {
    /// It was there.
    Found,
    /// It was pulled, here or by a read.
    Pulled,
    /// It was built from others that were there.
    Repacked,
}

/// How a task ended.
enum Ended {
    Stored(Whence),
    Bad(String),
    /// Left for later, or for others: its lease runs out.
    Later(StoreError),
}

struct Done {
    task: v1::CopyTask,
    ended: Ended,
    pulled: u64,
}

impl Copier {
    /// A copier that has up to `parallel` objects under way.
    pub fn new(buckets: Buckets, host: Arc<dyn Host>, parallel: usize) -> Self {
        let bucket = buckets.own_uuid.clone();
        Self {
            buckets: Arc::new(buckets),
            host,
            parallel: parallel.max(1),
            report: v1::CopyReport {
                bucket,
                ..v1::CopyReport::default()
            },
            pause: IDLE,
            under_way: BTreeSet::new(),
            report_since: None,
            wanted: Vec::new(),
            pulled: BTreeMap::new(),
            progress: CopyProgress::default(),
            read_bytes: 0,
            stored_at: BTreeMap::new(),
        }
    }

    /// Copies until cancelled; what is under way then is left to others. `news`: what reads of this process find out.
    pub async fn run(
        mut self,
        mut news: Option<mpsc::Receiver<CopyNews>>,
        stop: CancellationToken,
    ) {
        let mut under_way: JoinSet<Done> = JoinSet::new();
        let mut queue: VecDeque<v1::CopyTask> = VecDeque::new();
        let mut ask_at = Instant::now();
        let mut renew_at = Instant::now() + RENEW;
        loop {
            let room = (self.parallel * 2).saturating_sub(queue.len() + under_way.len());
            self.count_reads();
            let now = Instant::now();
            let hungry = room >= self.parallel && (now >= ask_at || !self.wanted.is_empty());
            if self.under_way.is_empty() {
                renew_at = now + RENEW;
            }
            let renew = now >= renew_at;
            if hungry || renew || self.report_is_due(now) {
                renew_at = now + RENEW;
                match self.ask(if hungry { room } else { 0 }).await {
                    Ok(tasks) if hungry => {
                        ask_at = match tasks.is_empty() {
                            true => Instant::now() + IDLE,
                            false => Instant::now(),
                        };
                        // A lease that ran out while its task waited here comes again.
                        let news = tasks
                            .into_iter()
                            .filter(|task| self.under_way.insert(task.segment));
                        queue.extend(news);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tracing::debug!(%error, "no copy tasks to be had");
                        ask_at = Instant::now() + FAILED;
                        self.report_since = self.report_since.map(|_| ask_at);
                    }
                }
            }
            while under_way.len() < self.parallel
                && let Some(task) = self.next_task(&mut queue)
            {
                let object = self.pulled.remove(&SegmentId(task.segment));
                under_way.spawn(copy(Arc::clone(&self.buckets), task, object));
            }
            self.progress.under_way = under_way.len() as u64;
            self.host.progress(&self.progress);
            let report_at = self.report_since.map(|since| since + REPORT_AFTER);
            // Without room for more there is nothing to ask for.
            let can_ask = self.parallel * 2 >= queue.len() + under_way.len() + self.parallel;
            let next = match report_at {
                Some(at) if can_ask => at.min(ask_at),
                Some(at) => at,
                None if can_ask => ask_at,
                None => renew_at,
            };
            let next = match self.under_way.is_empty() {
                true => next,
                false => next.min(renew_at),
            };
            tokio::select! {
                () = stop.cancelled() => break,
                Some(done) = under_way.join_next(), if !under_way.is_empty() => match done {
                    Ok(done) => {
                        self.under_way.remove(&done.task.segment);
                        self.pulled.remove(&SegmentId(done.task.segment));
                        if self.take(done) {
                            self.pause = IDLE;
                        } else {
                            // The store is away, or refuses: not one task after the other.
                            self.pause = (self.pause * 2).min(PAUSE_MAX);
                            ask_at = ask_at.max(Instant::now() + self.pause);
                        }
                    }
                    Err(error) => {
                        tracing::error!(%error, "a copy failed; its lease runs out");
                        self.under_way.clear();
                    }
                },
                heard = hear(&mut news) => self.hear(heard),
                () = tokio::time::sleep_until(next) => {}
            }
        }
        under_way.abort_all();
        self.count_reads();
        if let Err(error) = self.ask(0).await {
            // Others find these objects in the bucket.
            tracing::debug!(%error, "the last copies could not be reported");
        }
    }

    /// The next one to begin: whose object a read has brought, else the oldest.
    fn next_task(&self, queue: &mut VecDeque<v1::CopyTask>) -> Option<v1::CopyTask> {
        let brought = |task: &v1::CopyTask| self.pulled.contains_key(&SegmentId(task.segment));
        let at = queue.iter().position(brought).unwrap_or(0);
        queue.remove(at)
    }

    fn report_is_due(&self, now: Instant) -> bool {
        let news = self.report.stored.len() + self.report.bad.len() + self.report.lost.len();
        news >= REPORT_MAX
            || self
                .report_since
                .is_some_and(|since| now >= since + REPORT_AFTER)
    }

    async fn ask(&mut self, max: usize) -> Result<Vec<v1::CopyTask>, ClientError> {
        let empty = v1::CopyReport {
            bucket: self.report.bucket.clone(),
            ..v1::CopyReport::default()
        };
        let report = std::mem::replace(&mut self.report, empty);
        // Without room for them they would be refused, and their bytes lost.
        let wanted: Vec<_> = self.wanted.drain(..max.min(self.wanted.len())).collect();
        let stored: Vec<u64> = report.stored.clone();
        let working = self.under_way.iter().copied().collect();
        let session = self.host.session();
        match session
            .take_copies(report.clone(), max as u32, &wanted, working)
            .await
        {
            Ok(copies) => {
                self.report_since = None;
                for segment in stored {
                    self.host.copied(SegmentId(segment));
                }
                self.progress.waiting = copies.waiting;
                // What somebody else copies, or is copied already, needs no object of ours.
                for segment in wanted {
                    let ours = self.under_way.contains(&segment.0)
                        || copies.tasks.iter().any(|task| task.segment == segment.0);
                    if !ours {
                        self.pulled.remove(&segment);
                    }
                }
                Ok(copies.tasks)
            }
            Err(error) => {
                // Reported again: nothing that is reported twice counts twice, but for the bytes.
                self.report = report;
                self.wanted.extend(wanted);
                Err(error)
            }
        }
    }

    fn hear(&mut self, news: CopyNews) {
        match news {
            CopyNews::Pulled { segment, object } => {
                if self.pulled.len() < self.parallel * 2 {
                    self.pulled.insert(segment, object);
                    // One that waits here is leased to us already.
                    if !self.under_way.contains(&segment.0) {
                        self.wanted.push(segment);
                    }
                }
            }
            // Who looked for it before it was stored here, and found it in the other bucket after.
            CopyNews::Lost { segment, asked, .. } if self.is_newer(segment.0, asked) => {}
            CopyNews::Lost {
                segment, replace, ..
            } => {
                self.report.lost.push(v1::LostCopy {
                    segment: segment.0,
                    replace,
                });
                self.report_since.get_or_insert_with(Instant::now);
            }
        }
    }

    /// Whether this copier has stored it since.
    fn is_newer(&self, segment: u64, asked: std::time::Instant) -> bool {
        let stored = self.stored_at.get(&segment);
        stored.is_some_and(|stored| stored.into_std() > asked)
    }

    fn note_stored(&mut self, segment: u64) {
        if self.stored_at.len() >= STORED_MAX {
            self.stored_at.retain(|_, at| at.elapsed() < READS_TAKE);
        }
        if self.stored_at.len() < STORED_MAX {
            self.stored_at.insert(segment, Instant::now());
        }
    }

    fn count_reads(&mut self) {
        let read = self.host.read_bytes();
        let before = std::mem::replace(&mut self.read_bytes, read);
        self.count_pulled(read - before);
    }

    fn count_pulled(&mut self, bytes: u64) {
        if bytes > 0 {
            self.progress.pulled_bytes += bytes;
            self.report.pulled_bytes += bytes;
            self.report_since.get_or_insert_with(Instant::now);
        }
    }

    /// Takes in how a task ended; `false`: it is left for later.
    fn take(&mut self, done: Done) -> bool {
        let Done {
            task,
            ended,
            pulled,
        } = done;
        self.count_pulled(pulled);
        match ended {
            Ended::Stored(whence) => {
                self.progress.copied_segments += 1;
                self.progress.copied_bytes += task.length;
                self.progress.found_segments += u64::from(whence == Whence::Found);
                self.progress.repacked_segments += u64::from(whence == Whence::Repacked);
                self.report.stored.push(task.segment);
                self.note_stored(task.segment);
                // Who found it missing looked before.
                let before = |lost: &v1::LostCopy| lost.segment != task.segment || lost.replace;
                self.report.lost.retain(before);
            }
            Ended::Bad(reason) => {
                tracing::error!(segment = task.segment, reason, "a segment can't be copied");
                self.progress.bad_segments += 1;
                self.report.bad.push(v1::BadCopy {
                    segment: task.segment,
                    reason,
                });
            }
            Ended::Later(error) => {
                tracing::warn!(segment = task.segment, %error, "a segment could not be copied now");
                return false;
            }
        }
        self.report_since.get_or_insert_with(Instant::now);
        true
    }
}

/// The next news; never, without any.
async fn hear(news: &mut Option<mpsc::Receiver<CopyNews>>) -> CopyNews {
    if let Some(receiver) = news {
        if let Some(heard) = receiver.recv().await {
            return heard;
        }
        *news = None;
    }
    std::future::pending().await
}

pub(crate) fn is_whole(task: &v1::CopyTask, object: &Bytes) -> bool {
    object.len() as u64 == task.length && crc32fast::hash(object) == task.checksum
}

async fn copy(buckets: Arc<Buckets>, task: v1::CopyTask, object: Option<Bytes>) -> Done {
    let mut pulled = 0;
    let ended = match copied(&buckets, &task, object, &mut pulled).await {
        Ok(ended) => ended,
        Err(error) => Ended::Later(error),
    };
    Done {
        task,
        ended,
        pulled,
    }
}

async fn copied(
    buckets: &Buckets,
    task: &v1::CopyTask,
    object: Option<Bytes>,
    pulled: &mut u64,
) -> Result<Ended, StoreError> {
    let name = SegmentId(task.segment).object_name();
    let mut replace = task.replace;
    if task.look {
        match buckets.own.get_about(&name, task.length).await {
            Ok(there) if is_whole(task, &there) => return Ok(Ended::Stored(Whence::Found)),
            Ok(_) => replace = true,
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let mut whence = Whence::Pulled;
    let object = match object.filter(|object| is_whole(task, object)) {
        Some(object) => object,
        None => match repack(buckets, task, pulled).await? {
            Some(object) => {
                whence = Whence::Repacked;
                object
            }
            None => match pull(buckets, task, &name, pulled).await? {
                Ok(object) => object,
                Err(reason) => return Ok(Ended::Bad(reason)),
            },
        },
    };
    if replace {
        buckets.own.put(&name, object).await?;
        return Ok(Ended::Stored(whence));
    }
    let payload = PutPayload::from_bytes(object.clone());
    match buckets.own.put_new(&name, payload, task.checksum).await {
        Ok(()) => {}
        // Half of an object, or rot: metadata says what it must be.
        Err(error) if error.kind() == Kind::AlreadyExists => {
            buckets.own.put(&name, object).await?;
        }
        Err(error) => return Err(error),
    }
    Ok(Ended::Stored(whence))
}

/// The whole object, verified; or why the second bucket does not have it.
async fn pull(
    buckets: &Buckets,
    task: &v1::CopyTask,
    name: &str,
    pulled: &mut u64,
) -> Result<Result<Bytes, String>, StoreError> {
    let mut reason = String::new();
    for attempt in 0..ABSENT_MAX {
        if attempt > 0 {
            tokio::time::sleep(ABSENT_PAUSE).await;
        }
        match buckets.second.get_about(name, task.length).await {
            Ok(object) => {
                *pulled += object.len() as u64;
                if is_whole(task, &object) {
                    return Ok(Ok(object));
                }
                reason = format!(
                    "the source's object is {} bytes with checksum {:08x}, and not {} with {:08x}",
                    object.len(),
                    crc32fast::hash(&object),
                    task.length,
                    task.checksum
                );
            }
            Err(error) if error.kind() == Kind::NotFound => {
                "the source's bucket does not have it".clone_into(&mut reason);
            }
            // This object alone (archived, forbidden), if the marker can be read.
            Err(error) if error.kind() == Kind::Denied => {
                reason = format!("the source's bucket does not give it: {error}");
            }
            Err(error) => return Err(error),
        }
    }
    // Of another bucket, or of one that was emptied, or that gives nothing, nothing can be said.
    buckets.second.check_marker(&buckets.second_uuid).await?;
    Ok(Err(reason))
}

/// Says what reads of this process bring from the source region, until cancelled: for hosts that copy nothing. `bucket`: the
/// uuid of this region's.
pub async fn report_reads(bucket: String, host: Arc<dyn Host>, stop: CancellationToken) {
    let mut reported = 0;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(FAILED) => {}
        }
        let read = host.read_bytes();
        if read == reported {
            continue;
        }
        let report = v1::CopyReport {
            bucket: bucket.clone(),
            pulled_bytes: read - reported,
            ..v1::CopyReport::default()
        };
        match host.session().take_copies(report, 0, &[], Vec::new()).await {
            Ok(_) => reported = read,
            Err(error) => tracing::debug!(%error, "what reads have pulled is not reported yet"),
        }
    }
}

/// Deletes what died from this region's bucket, until cancelled: for hosts that are no mounts, which do so themselves.
pub async fn delete_dead(own: Bucket, host: Arc<dyn Host>, stop: CancellationToken) {
    let mut done: Vec<SegmentId> = Vec::new();
    loop {
        let taken = host.session().take_deletions(DELETIONS, &done).await;
        let pause = match taken {
            Ok((taken, _)) if taken.is_empty() => {
                done.clear();
                DELETION_PAUSE
            }
            Ok((taken, epoch)) => {
                done.clear();
                if let Err(error) = own.check_epoch(epoch).await {
                    tracing::warn!(%error, "dead segments are left alone");
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(DELETION_PAUSE) => continue,
                    }
                }
                for segment in &taken {
                    match own.delete(&segment.object_name()).await {
                        Ok(()) => done.push(*segment),
                        // It is leased again later.
                        Err(error) => {
                            tracing::warn!(segment = segment.0, %error, "a dead segment could not be deleted");
                        }
                    }
                }
                Duration::ZERO
            }
            Err(error) => {
                tracing::debug!(%error, "no dead segments to be had");
                DELETION_PAUSE
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

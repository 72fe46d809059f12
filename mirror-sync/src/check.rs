//! The check of both buckets against the records, now and then: what this region's bucket lacks is copied again, what the
//! source's has lost is put back from ours, if our keys may write there. Who checks holds a lease of the mirror's leader.
//!
//! Nothing is resurrected. The source deletes an object only after its mirrors have applied that nobody needs it, so that one
//! which is live here and missing there was lost there, as long as this mirror's slot is kept: while it follows. What is put
//! back is looked up again afterwards, and taken away if it was freed meanwhile.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockstore::{Bucket, Kind, StoreError};
use bytes::Bytes;
use heliofs_proto::ids::SegmentId;
use heliofs_proto::v1::{self, SegmentState, maintain::Ask, maintained::Answer};
use meta_client::ClientError;
use object_store::PutPayload;
use tokio_util::sync::CancellationToken;

use crate::copy::{Buckets, Host};

/// Objects are named so that so many listings show all.
const GROUPS: u32 = 256;

/// The leader is asked this often whether a check is due: ten times an interval, within these.
const ASK_MIN: Duration = Duration::from_millis(200);
const ASK_MAX: Duration = Duration::from_secs(60);

/// Progress is reported after so many groups without news; well within a lease.
const GROUPS_PER_REPORT: u32 = 16;

/// While objects are put back, after so many.
const HEALED_PER_REPORT: usize = 16;

/// Segments per question, and per report.
const PAGE: u32 = 4096;
const LOST_MAX: usize = 500;

/// The lease lasts three times as long.
const RENEW_EVERY: Duration = Duration::from_secs(20);

/// Why a check does not go on; another turn goes on where it was, here or elsewhere.
#[derive(Debug, thiserror::Error)]
enum Stopped {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("this region's bucket: {0}")]
    Own(#[from] StoreError),
    #[error("another one checks")]
    Lease,
    #[error("the cluster gave another answer than was asked for")]
    Answer,
}

/// What became of an object that the source's bucket lacks.
enum Healed {
    /// It is there again.
    Yes,
    /// It was freed meanwhile: it need not be there.
    Freed,
    /// It is not.
    No(String),
    /// Nothing can be put back now.
    Never(String),
}

/// Checks for as long as it runs, when it is due and nobody else does.
pub struct Checker {
    buckets: Buckets,
    host: Arc<dyn Host>,
    interval: Duration,
}

/// One check under way.
struct Check<'a> {
    checker: &'a Checker,
    number: u64,
    counts: v1::CheckCounts,
    lost: Vec<v1::LostCopy>,
    /// What is in the source's bucket can be told, and put back.
    source: bool,
    /// When the lease was renewed last by a question of its own.
    renewed: Instant,
}

impl Checker {
    /// A check every `interval`, counted over all who check this volume.
    pub fn new(buckets: Buckets, host: Arc<dyn Host>, interval: Duration) -> Self {
        Self {
            buckets,
            host,
            interval,
        }
    }

    /// Until cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let pause = (self.interval / 10).clamp(ASK_MIN, ASK_MAX);
        let checks = async {
            loop {
                tokio::time::sleep(pause).await;
                if let Err(error) = self.turn().await {
                    tracing::debug!(%error, "the check of the buckets waits");
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = checks => {}
        }
    }

    async fn ask(
        &self,
        report: Option<v1::CheckReport>,
        lost: Vec<v1::LostCopy>,
    ) -> Result<v1::CheckLease, Stopped> {
        let ask = v1::TakeCheck {
            interval_ms: u64::try_from(self.interval.as_millis()).unwrap_or(u64::MAX),
            report,
            lost,
        };
        let session = self.host.session();
        Ok(session.take_check(&self.buckets.own_uuid, ask).await?)
    }

    /// One whole check, or what is left of it, if it is due.
    async fn turn(&self) -> Result<(), Stopped> {
        let lease = self.ask(None, Vec::new()).await?;
        let state = match lease.state {
            Some(state) if lease.leased => state,
            _ => return Ok(()),
        };
        tracing::info!(
            number = state.number,
            groups = state.groups,
            "checking both buckets"
        );
        let mut check = Check {
            checker: self,
            number: state.number,
            counts: state.now.unwrap_or_default(),
            lost: Vec::new(),
            source: true,
            renewed: Instant::now(),
        };
        check.look_at_source(lease.following).await;
        let live = check.live().await?;
        for group in state.groups..GROUPS {
            let segments = live.get(&(group as u8)).map_or(&[][..], Vec::as_slice);
            if !segments.is_empty() {
                check.group(group, segments).await?;
            }
            let last = group + 1 == GROUPS;
            if last || !check.lost.is_empty() || group % GROUPS_PER_REPORT == 0 {
                check.report(group + 1, last).await?;
            }
        }
        tracing::info!(number = check.number, counts = ?check.counts, "both buckets are checked");
        Ok(())
    }

    async fn is_live(&self, segment: u64) -> Result<bool, Stopped> {
        let ask = Ask::CheckSegments(v1::CheckSegments { ids: vec![segment] });
        match self.host.session().maintain(ask).await? {
            Answer::States(states) => Ok(states.states == [SegmentState::Live as i32]),
            _ => Err(Stopped::Answer),
        }
    }
}

/// Names and lengths of a group's objects.
async fn listed(bucket: &Bucket, group: u32) -> Result<BTreeMap<String, u64>, StoreError> {
    Ok(bucket
        .list(&format!("{group:02x}"))
        .await?
        .into_iter()
        .collect())
}

/// What is there instead of the object: nothing, or something of another length; `None`: it is there. A listing may be older than
/// the object, so it is asked for.
async fn wrong(
    bucket: &Bucket,
    listed: &BTreeMap<String, u64>,
    segment: &v1::Segment,
) -> Result<Option<bool>, StoreError> {
    let name = SegmentId(segment.id).object_name();
    if listed.get(&name) == Some(&segment.length) {
        return Ok(None);
    }
    let end = segment.length.saturating_sub(1)..segment.length + 1;
    match bucket.get_range(&name, end).await {
        Ok(end) if end.len() == 1 => Ok(None),
        Ok(_) => Ok(Some(true)),
        Err(error) if error.kind() == Kind::NotFound => Ok(Some(false)),
        Err(error) => Err(error),
    }
}

impl Check<'_> {
    /// All segments that extents refer to, by group.
    async fn live(&mut self) -> Result<HashMap<u8, Vec<v1::Segment>>, Stopped> {
        let session = self.checker.host.session();
        let mut live: HashMap<u8, Vec<v1::Segment>> = HashMap::new();
        let mut after = 0;
        loop {
            self.renew().await?;
            let ask = Ask::ListSegments(v1::ListSegments {
                after,
                segments_max: PAGE,
            });
            let Answer::Segments(page) = session.maintain(ask).await? else {
                return Err(Stopped::Answer);
            };
            after = page.segments.last().map_or(after, |segment| segment.id);
            for segment in page.segments {
                live.entry(segment.id as u8).or_default().push(segment);
            }
            if page.end {
                return Ok(live);
            }
        }
    }

    /// Renews the lease, when it is time to.
    async fn renew(&mut self) -> Result<(), Stopped> {
        if self.renewed.elapsed() < RENEW_EVERY {
            return Ok(());
        }
        let lease = self.checker.ask(None, Vec::new()).await?;
        self.renewed = Instant::now();
        match lease.leased {
            true => Ok(()),
            false => Err(Stopped::Lease),
        }
    }

    /// Whether the source's bucket is to be looked at.
    async fn look_at_source(&mut self, following: bool) {
        let why = match following {
            false => {
                "the mirror does not follow its source now: what is missing there may not be needed"
                    .to_owned()
            }
            true => match self.marked().await {
                Ok(()) => {
                    self.counts.reason.clear();
                    return;
                }
                Err(why) => why,
            },
        };
        self.without_source(why);
    }

    /// Whether the source's bucket has the marker of the volume's. One that lost it gets it back, if it is known to be the right
    /// bucket: it is where the source's own metadata says, and nobody else has claimed it.
    async fn marked(&self) -> Result<(), String> {
        let Buckets {
            second,
            second_uuid,
            second_recorded,
            ..
        } = &self.checker.buckets;
        let missing = match second.check_marker(second_uuid).await {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == Kind::NotFound => error,
            Err(error) => return Err(format!("the source's bucket: {error}")),
        };
        if !second_recorded {
            return Err(format!(
                "the bucket that --bucket2 names has lost the marker of the source's, or is another one ({missing}): nothing is put \
                 into it; `heliofs fsck --repair` at the source makes a lost marker anew"
            ));
        }
        // A volume that is destroyed goes from the metadata first.
        let lease = self.checker.ask(None, Vec::new()).await;
        if !lease.is_ok_and(|lease| lease.leased && lease.following) {
            return Err("the mirror does not follow its source any more".to_owned());
        }
        match second.claim_marker(second_uuid).await {
            Ok(()) => {
                tracing::warn!("the source's bucket had lost its marker: it was made anew");
                Ok(())
            }
            Err(error) => Err(format!(
                "the source's bucket has lost its marker, which can't be put back: {error}"
            )),
        }
    }

    /// The source's bucket is left as it is from here on.
    fn without_source(&mut self, why: String) {
        tracing::warn!(why, "the source's bucket is not checked");
        self.counts.reason = why;
        self.source = false;
    }

    async fn group(&mut self, group: u32, segments: &[v1::Segment]) -> Result<(), Stopped> {
        let buckets = &self.checker.buckets;
        self.counts.segments += segments.len() as u64;
        let own = listed(&buckets.own, group).await?;
        for segment in segments {
            self.renew().await?;
            if let Some(replace) = wrong(&buckets.own, &own, segment).await? {
                // The leader knows whether it is missed already, or was freed.
                self.lost.push(v1::LostCopy {
                    segment: segment.id,
                    replace,
                });
            }
        }
        if !self.source {
            return Ok(());
        }
        let second = match listed(&buckets.second, group).await {
            Ok(second) => second,
            Err(error) => {
                self.without_source(format!("the source's bucket: {error}"));
                return Ok(());
            }
        };
        let mut healed = 0;
        for segment in segments {
            self.renew().await?;
            let replace = match wrong(&buckets.second, &second, segment).await {
                Ok(None) => continue,
                Ok(Some(replace)) => replace,
                Err(error) => {
                    self.without_source(format!("the source's bucket: {error}"));
                    return Ok(());
                }
            };
            match self.heal(segment, replace).await? {
                Healed::Freed => continue,
                Healed::Yes => self.counts.source_healed += 1,
                Healed::No(why) => self.counts.reason = why,
                Healed::Never(why) => {
                    self.counts.source_lost += 1;
                    self.without_source(why);
                    return Ok(());
                }
            }
            self.counts.source_lost += 1;
            healed += 1;
            if healed % HEALED_PER_REPORT == 0 {
                self.report(group, false).await?;
            }
        }
        Ok(())
    }

    /// Puts an object back into the source's bucket, from this region's.
    async fn heal(&self, segment: &v1::Segment, replace: bool) -> Result<Healed, Stopped> {
        let checker = self.checker;
        if !checker.is_live(segment.id).await? {
            return Ok(Healed::Freed);
        }
        let name = SegmentId(segment.id).object_name();
        let object = match checker.buckets.own.get_about(&name, segment.length).await {
            Ok(object) => object,
            Err(error) if error.kind() == Kind::NotFound => {
                return Ok(Healed::No(format!("{name} is in neither bucket")));
            }
            Err(error) => return Err(error.into()),
        };
        let whole =
            object.len() as u64 == segment.length && crc32fast::hash(&object) == segment.checksum;
        if !whole {
            return Ok(Healed::No(format!(
                "{name} is missing at the source, and bad here"
            )));
        }
        let second = &checker.buckets.second;
        let put = match replace {
            true => second.put(&name, object).await,
            false => put_new(second, &name, object, segment.checksum).await,
        };
        match put {
            Ok(()) => {}
            Err(error) if error.kind() == Kind::Denied => {
                return Ok(Healed::Never(format!(
                    "objects can't be put back into the source's bucket with these keys: {error}"
                )));
            }
            Err(error) => return Ok(Healed::No(format!("the source's bucket: {error}"))),
        }
        // Only a mirror that follows knows what lives there. What is not known to be dead stays: at worst gc finds it.
        if !checker.ask(None, Vec::new()).await?.following {
            return Ok(Healed::No(format!(
                "{name} was put back while the mirror did not follow its source"
            )));
        }
        if checker.is_live(segment.id).await? {
            tracing::warn!(
                segment = segment.id,
                "an object was put back into the source's bucket"
            );
            return Ok(Healed::Yes);
        }
        // Whoever deletes there may have been before us.
        match second.delete(&name).await {
            Ok(()) => Ok(Healed::Freed),
            Err(error) => Ok(Healed::No(format!("the source's bucket: {error}"))),
        }
    }

    /// Says what was found.
    async fn report(&mut self, groups: u32, last: bool) -> Result<(), Stopped> {
        loop {
            let rest = self.lost.split_off(self.lost.len().min(LOST_MAX));
            let lost = std::mem::replace(&mut self.lost, rest);
            let done = self.lost.is_empty();
            let report = v1::CheckReport {
                number: self.number,
                // What is not said yet is looked for again if this is the last that is heard of us.
                groups: if done { groups } else { 0 },
                counts: Some(self.counts.clone()),
                done: last && done,
            };
            let lease = self.checker.ask(Some(report), lost).await?;
            if done {
                return match lease.leased || last {
                    true => Ok(()),
                    false => Err(Stopped::Lease),
                };
            }
        }
    }
}

async fn put_new(
    bucket: &Bucket,
    name: &str,
    object: Bytes,
    checksum: u32,
) -> Result<(), StoreError> {
    let payload = PutPayload::from_bytes(object);
    bucket.put_new(name, payload, checksum).await
}

//! One volume's follower, on the mirror's leader: a slot at the source, a load if needed, then entry after entry.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesOrdered;
use heliofs_proto::ids::{Position, UnixNanos, VolumeId};
use heliofs_proto::v1::{self, MirrorState, local_command::Op, log_item::Item};
use meta_client::changelog::Traffic;
use meta_client::{Cluster, ClusterError};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::bootstrap::unexpected;
use crate::lag::Lag;
use crate::overruns::Overruns;
use crate::plan::{Plan, UpgradeMe};
use crate::report::{self, SlotNews};
use crate::target::{Answered, Target, TargetError};

/// Proposals under way at once: one is written while the one before is applied.
const PROPOSALS_MAX: usize = 3;

/// Frames that wait; beyond them the source is not read, and its stream's windows fill.
const FRAMES_MAX: usize = 8;

/// How often a follower says how it is.
const SAY_EVERY: Duration = Duration::from_millis(100);

/// Before another try.
const RETRY: Duration = Duration::from_millis(500);

/// Before another look at what only an operator, an upgrade or the source can change.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// The same trouble is logged again after this time.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// Without a word from the source for this long, it counts as cut off; beats come every second.
const CUT_OFF: Duration = Duration::from_secs(5);

/// Why a follower does not go on as it was.
#[derive(Debug)]
pub(crate) enum Failed {
    /// Worth another try at once.
    Retry(String),
    /// The log of the source no longer reaches back, or the slot was lost: load anew.
    Load(String),
    /// Going on would diverge: stop for good.
    Diverges(String),
    /// A newer build must go on.
    Upgrade(String),
    /// As things are it can't begin.
    Refused(String),
    /// Another node leads.
    Deposed,
}

impl Failed {
    pub(crate) fn retry(why: impl Into<String>) -> Self {
        Self::Retry(why.into())
    }
}

impl From<ClusterError> for Failed {
    fn from(error: ClusterError) -> Self {
        match error {
            ClusterError::Trimmed(why) => Self::Load(why),
            // Not loaded by itself: perhaps it is the source that lost something, and what is here is the last copy of it.
            ClusterError::OtherHistory(why) => Self::Refused(format!(
                "source: {why}; if its history is the right one, `heliofs mirror reload` takes it"
            )),
            error @ (ClusterError::NotFound(_) | ClusterError::TokenRefused { .. }) => {
                Self::Refused(format!("source: {error}"))
            }
            error @ (ClusterError::NoNode { .. }
            | ClusterError::NoLeader { .. }
            | ClusterError::Unknown { .. }
            | ClusterError::Invalid(_)) => Self::Retry(format!("source: {error}")),
        }
    }
}

impl From<TargetError> for Failed {
    fn from(error: TargetError) -> Self {
        match error {
            TargetError::NotLeader | TargetError::Stopped(_) => Self::Deposed,
            TargetError::Unknown => Self::Retry(error.to_string()),
        }
    }
}

/// What is mirrored under which names.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    /// META-URL of the source, without a volume.
    pub(crate) url: String,
    /// The volume there.
    pub(crate) source: String,
    /// The volume here.
    pub(crate) local: String,
    /// The slot there.
    pub(crate) slot: String,
    /// Bytes of log that a new slot may keep; 0: the source's default.
    pub(crate) log_bytes_max: u64,
}

/// One volume's follower.
pub(crate) struct Follower {
    pub(crate) source: Cluster,
    pub(crate) target: Arc<dyn Target>,
    pub(crate) names: Names,
    pub(crate) says: v1::MirrorStatus,
    pub(crate) loads: u64,
    lag: Lag,
    overruns: Overruns,
}

impl Follower {
    pub(crate) fn new(source: Cluster, target: Arc<dyn Target>, names: Names) -> Self {
        Self {
            source,
            target,
            names,
            says: v1::MirrorStatus::default(),
            loads: 0,
            lag: Lag::default(),
            overruns: Overruns::default(),
        }
    }

    /// Runs until dropped, or until another node leads.
    pub(crate) async fn run(mut self) {
        let mut must_load = false;
        // The last trouble that was logged.
        let mut told: Option<(&'static str, String, Instant)> = None;
        loop {
            let failed = match self.turn(must_load).await {
                Err(failed) => failed,
                Ok(never) => match never {},
            };
            must_load = false;
            let (doing, why, rest) = match failed {
                Failed::Deposed => return,
                Failed::Retry(why) => ("retrying", why, RETRY),
                Failed::Load(why) => {
                    must_load = true;
                    ("loading", why, RETRY)
                }
                Failed::Upgrade(why) => ("upgrade", why, LOOK_AGAIN),
                Failed::Refused(why) => ("refused", why, LOOK_AGAIN),
                Failed::Diverges(why) => {
                    self.stop(&why).await;
                    ("stopped", why, LOOK_AGAIN)
                }
            };
            // What stays as it is is tried again every second or two.
            let again = told.as_ref().is_some_and(|(last, reason, at)| {
                *last == doing && *reason == why && at.elapsed() < TELL_AGAIN
            });
            if !again {
                tracing::warn!(volume = self.names.local, why, "the mirror is {doing}");
                told = Some((doing, why.clone(), Instant::now()));
            }
            self.say(doing, why);
            let until = Instant::now() + rest;
            while Instant::now() < until {
                tokio::time::sleep(SAY_EVERY).await;
                self.say_again();
            }
        }
    }

    pub(crate) fn found(&self) -> Option<v1::Volume> {
        let mut mirrors = self.target.mirrors().into_iter();
        mirrors.find(|volume| volume.name == self.names.local)
    }

    /// From wherever the volume is until something fails.
    async fn turn(&mut self, must_load: bool) -> Result<std::convert::Infallible, Failed> {
        let cluster_id = self.target.cluster_id();
        let cluster_id =
            cluster_id.ok_or_else(|| Failed::retry("the mirror's cluster is not formed"))?;
        if self.target.owns(&self.names.local) {
            tracing::info!(
                volume = self.names.local,
                "it is written here: not mirrored"
            );
            return Err(Failed::Deposed);
        }
        let local = self.found();
        let mirror = local.as_ref().and_then(|volume| volume.mirror.as_ref());
        if let Some(mirror) = mirror {
            self.says.volume = local.as_ref().map_or(0, |volume| volume.id);
            // One that is loaded anew takes its source from our settings.
            if mirror.state() == MirrorState::Following && mirror.volume != self.names.source {
                return Err(Failed::Refused(format!(
                    "`{}` mirrors `{}` of {}",
                    self.names.local, mirror.volume, mirror.source
                )));
            }
            if mirror.state() == MirrorState::Stopped && !mirror.reload {
                self.says.doing = "stopped".to_owned();
                self.says.detail.clone_from(&mirror.reason);
                return Err(Failed::Diverges(mirror.reason.clone()));
            }
        }
        if let (Some(mirror), Some(local)) = (mirror, &local)
            && mirror.was_handed_over()
        {
            self.has_taken_over(local).await?;
        }
        let following = mirror.filter(|mirror| mirror.state() == MirrorState::Following);
        if let (Some(mirror), Some(local)) = (following, &local) {
            self.is_of_this_history(local, mirror).await?;
        }
        let slot = self.slot(cluster_id, false).await?;
        let lost = !slot.invalid.is_empty();
        // By another leader, or by this one before the source went away.
        let broken_off = mirror.is_some_and(|mirror| mirror.loading != 0);
        let volume = if must_load || following.is_none() || lost || broken_off {
            if lost || must_load {
                if following.is_some()
                    && let Some(rest) = self.overruns.must_load(Instant::now())
                {
                    return Err(Failed::Refused(overrun(&slot, rest)));
                }
                self.slot(cluster_id, true).await?;
            }
            let volume = self.load().await?;
            // What was heard before may be of another history.
            self.lag = Lag::default();
            self.overruns.loaded(Instant::now());
            volume
        } else {
            VolumeId(slot.volume)
        };
        self.says.volume = volume.0;
        self.follow(volume, slot.paused, cluster_id).await
    }

    /// Whether the source is still what was loaded, or came after it: what else answers under its name must not replace what
    /// may be the last copy.
    async fn is_of_this_history(
        &self,
        local: &v1::Volume,
        mirror: &v1::MirrorOf,
    ) -> Result<(), Failed> {
        let theirs = self.source.get_volume(&self.names.source).await?;
        let why = if theirs.id != local.id {
            format!("has id {} and not {}", theirs.id, local.id)
        } else {
            let ours = self.head(VolumeId(local.id))?.0.epoch.0;
            let epoch = theirs.position.map_or(0, |position| position.epoch);
            if mirror.source_cluster == 0 || epoch != mirror.source_epoch || epoch != ours {
                // Of an earlier release, or promoted since: the list of epochs tells.
                return Ok(());
            }
            match self.source.status().await?.cluster_id {
                id if id == mirror.source_cluster => return Ok(()),
                id => format!(
                    "is of cluster {id:08x} and not of {:08x}, and was not promoted there",
                    mirror.source_cluster
                ),
            }
        };
        Err(Failed::Refused(format!(
            "source: the volume `{}` of {} {why}: it is not what was mirrored; if it is the right one, `heliofs mirror reload` \
             takes it",
            self.names.source, self.names.url
        )))
    }

    /// Whether the source is the successor of this volume, which was written here, and not a mirror of it that lacks the end.
    async fn has_taken_over(&self, local: &v1::Volume) -> Result<(), Failed> {
        let theirs = self.source.get_volume(&self.names.source).await?;
        let ours = self.head(VolumeId(local.id))?.0.epoch.0;
        let epoch = theirs.position.map_or(0, |position| position.epoch);
        if theirs.id == local.id && epoch > ours {
            return Ok(());
        }
        Err(Failed::Refused(format!(
            "source: the volume `{}` of {} was not promoted after this one was handed over: what was written here last is perhaps only here; `heliofs mirror \
             promote` there, or here, comes first",
            self.names.source, self.names.url
        )))
    }

    async fn slot(&self, cluster_id: u32, reset: bool) -> Result<v1::MirrorSlot, Failed> {
        let ask = v1::CreateSlotRequest {
            volume: self.names.source.clone(),
            mirror: self.names.slot.clone(),
            log_bytes_max: self.names.log_bytes_max,
            cluster_id,
            reset,
        };
        Ok(self.source.create_slot(ask).await?)
    }

    async fn follow(
        &mut self,
        volume: VolumeId,
        paused: bool,
        cluster_id: u32,
    ) -> Result<std::convert::Infallible, Failed> {
        let (news, heard) = watch::channel(SlotNews::Kept {
            paused,
            heard: None,
            fence: None,
        });
        let (source, target) = (self.source.clone(), self.target.clone());
        let slot = self.names.slot.clone();
        let reports = report::run(source, target.as_ref(), volume, slot, cluster_id, news);
        tokio::select! {
            failed = self.replay(volume, heard) => failed,
            () = reports => Err(Failed::retry("reports ended")),
        }
    }

    /// Frames in, proposals out.
    async fn replay(
        &mut self,
        volume: VolumeId,
        mut news: watch::Receiver<SlotNews>,
    ) -> Result<std::convert::Infallible, Failed> {
        let load = self
            .found()
            .and_then(|found| found.mirror)
            .map_or(0, |m| m.load);
        let mut under_way: FuturesOrdered<BoxFuture<'static, Proposed>> = FuturesOrdered::new();
        let outcome = self.pump(volume, load, &mut news, &mut under_way).await;
        // What is proposed must be settled before anything else is: the next turn begins where the log does.
        while under_way.next().await.is_some() {}
        outcome
    }

    async fn pump(
        &mut self,
        volume: VolumeId,
        load: u64,
        news: &mut watch::Receiver<SlotNews>,
        under_way: &mut FuturesOrdered<BoxFuture<'static, Proposed>>,
    ) -> Result<std::convert::Infallible, Failed> {
        let (after, time) = self.head(volume)?;
        self.lag.applied(after, time);
        let mut reader: Option<Reader> = None;
        let mut plan = Plan::new(volume);
        let mut beyond: Option<UpgradeMe> = None;
        let mut ticks = tokio::time::interval(SAY_EVERY);
        let mut waiting: VecDeque<v1::ChangelogFrame> = VecDeque::new();
        loop {
            let slot = news.borrow_and_update().clone();
            let paused = match slot {
                SlotNews::Kept {
                    paused,
                    heard,
                    fence,
                } => {
                    if let Some(fence) = fence {
                        self.refresh_fence(volume, *fence).await?;
                    }
                    if let Some(heard) = heard {
                        self.lag.told(heard.head, heard.clock, heard.at, paused);
                    }
                    paused
                }
                SlotNews::Lost(why) => return Err(Failed::Load(why)),
            };
            if paused && reader.is_some() {
                // What has arrived is dropped; it comes again.
                reader = None;
                waiting.clear();
                plan = Plan::new(volume);
            }
            if !paused && reader.is_none() && under_way.is_empty() {
                let after = self.head(volume)?.0;
                reader = Some(Reader::start(&self.source, &self.names.source, after));
            }
            while let Some(frame) = waiting.pop_front() {
                self.heard(&frame);
                if beyond.is_none()
                    && let Err(upgrade) = plan.take(frame)
                {
                    beyond = Some(upgrade);
                }
            }
            // Everything that waits here was committed at the source before whoever holds asks it how far it is.
            let limit = self.target.replay_limit(volume);
            while under_way.len() < PROPOSALS_MAX
                && let Some(replay) = plan.pop(limit)
            {
                self.says.proposals += 1;
                let target = self.target.clone();
                under_way.push_back(Box::pin(async move {
                    let entries = replay.entries.len();
                    let answer = target.propose(Item::Replay(replay)).await;
                    Proposed { entries, answer }
                }));
            }
            if let Some(UpgradeMe(why)) = &beyond
                && plan.is_empty()
                && under_way.is_empty()
            {
                return Err(Failed::Upgrade(why.clone()));
            }
            let room = beyond.is_none() && !plan.is_full();
            tokio::select! {
                Some(proposed) = under_way.next(), if !under_way.is_empty() => {
                    self.settle(volume, proposed)?;
                }
                frame = next(&mut reader), if room => {
                    waiting.push_back(frame?);
                    // What came meanwhile shares a proposal.
                    if let Some(reader) = &mut reader {
                        while waiting.len() < FRAMES_MAX && let Ok(Ok(frame)) = reader.frames.try_recv() {
                            waiting.push_back(frame);
                        }
                        self.says.peer.clone_from(&reader.peer.borrow());
                        let traffic = *reader.traffic.borrow();
                        self.says.stream_bytes = traffic.received;
                        self.says.stream_plain_bytes = traffic.plain;
                    }
                }
                _ = ticks.tick() => self.look(volume, load, paused)?,
                changed = news.changed() => if changed.is_err() {
                    return Err(Failed::retry("reports ended"));
                },
            }
        }
    }

    /// The source may have got another fence store, or none, after the volume was loaded: a promotion must ask the right one.
    async fn refresh_fence(&self, volume: VolumeId, fence: v1::SourceFence) -> Result<(), Failed> {
        let Some(known) = self.found() else {
            return Ok(());
        };
        if known.fence == fence.store {
            return Ok(());
        }
        tracing::info!(
            volume = self.names.local,
            "the source has another fence store"
        );
        let changed = Op::VolumeFence(v1::VolumeFence {
            volume: volume.0,
            fence: fence.store,
            of_source: true,
        });
        let item = Item::Local(v1::LocalCommand { op: Some(changed) });
        match self.target.propose(item).await? {
            Answered::Done => Ok(()),
            Answered::Refused(why) => Err(Failed::retry(why)),
            other => Err(unexpected(&other)),
        }
    }

    fn heard(&mut self, frame: &v1::ChangelogFrame) {
        if let Some(head) = &frame.head {
            let position = head.position.map(Position::from).unwrap_or_default();
            self.lag
                .heard(position, UnixNanos(head.now), Instant::now());
        }
    }

    pub(crate) fn head(&self, volume: VolumeId) -> Result<(Position, UnixNanos), Failed> {
        let head = self.target.head(volume);
        head.ok_or_else(|| Failed::retry("the volume is gone from the mirror"))
    }

    fn settle(&mut self, volume: VolumeId, proposed: Proposed) -> Result<(), Failed> {
        match proposed.answer? {
            Answered::Replayed(_) => {
                self.says.replayed += proposed.entries as u64;
                let (applied, time) = self.head(volume)?;
                self.lag.applied(applied, time);
                Ok(())
            }
            // The state has noted why, or somebody loads the volume anew: the next turn sees which.
            Answered::Refused(why) => Err(Failed::retry(why)),
            other => Err(unexpected(&other)),
        }
    }

    /// Now and then: is all as it should be?
    fn look(&mut self, volume: VolumeId, load: u64, paused: bool) -> Result<(), Failed> {
        let mirror = self.found().and_then(|found| found.mirror);
        if mirror.is_none_or(|m| m.load != load || m.state() != MirrorState::Following) {
            return Err(Failed::retry("the volume is loaded anew"));
        }
        if let Some(position) = self.target.diverged(volume) {
            return Err(Failed::Diverges(format!(
                "the digest at position {position} is not the source's: the records of this mirror's leader differ; see \
                 `heliofs mirror verify`, and load anew with `heliofs mirror reload`"
            )));
        }
        let (applied, time) = self.head(volume)?;
        self.lag.applied(applied, time);
        self.overruns
            .at(Instant::now(), applied, self.lag.source_head());
        let silence = self.lag.silence(Instant::now());
        match (paused, silence) {
            (true, _) => self.say("paused", "by an operator at the source"),
            (false, None) => self.say("starting", "not heard of the source yet"),
            (false, Some(silence)) if silence > CUT_OFF => {
                let why = format!("the source was not heard of for {} s", silence.as_secs());
                self.say("cut-off", why);
            }
            (false, Some(_)) => self.say("following", ""),
        }
        Ok(())
    }

    async fn stop(&self, why: &str) {
        let stopped = self.found().and_then(|found| found.mirror);
        if stopped.is_none_or(|mirror| mirror.state() != MirrorState::Following) {
            return;
        }
        let stop = Op::MirrorStop(v1::MirrorStop {
            volume: self.says.volume,
            reason: why.to_owned(),
            reload: false,
        });
        let item = Item::Local(v1::LocalCommand { op: Some(stop) });
        if let Err(error) = self.target.propose(item).await {
            // The next leader meets the same.
            tracing::warn!(%error, "that the mirror stops could not be noted");
        }
    }

    pub(crate) fn say(&mut self, doing: &str, detail: impl Into<String>) {
        doing.clone_into(&mut self.says.doing);
        self.says.detail = detail.into();
        self.say_again();
    }

    pub(crate) fn say_again(&mut self) {
        if self.says.volume == 0 {
            return;
        }
        let now = Instant::now();
        let volume = VolumeId(self.says.volume);
        let (applied, time) = self.target.head(volume).unwrap_or_default();
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.says.source_head = self.lag.source_head().map(Into::into);
        self.says.lag_entries = self.lag.entries(applied);
        // A leader that has not heard of the source yet knows when what it shows was committed, by the source's clock, and no more.
        let age = self.lag.age(now).unwrap_or_else(|| since(time));
        self.says.lag_ms = millis(age);
        self.says.contact_ms = self.lag.contact(now).map(millis);
        self.target.publish(self.says.clone());
    }
}

/// What an operator reads when copies come too late.
fn overrun(slot: &v1::MirrorSlot, rest: Duration) -> String {
    format!(
        "the source wrote more than its log may keep for this mirror ({} bytes) while a copy was loaded or soon after, more than \
         once: it needs a larger --mirror-log-cap; what was loaded is served, and another copy is loaded within {} min",
        slot.log_bytes_max,
        rest.as_secs() / 60 + 1
    )
}

/// From a time of the source's clock until now by ours.
fn since(time: UnixNanos) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let then = Duration::from_nanos(time.0.max(0).unsigned_abs());
    now.unwrap_or_default().saturating_sub(then)
}

/// A proposal's end.
struct Proposed {
    entries: usize,
    answer: Result<Answered, TargetError>,
}

/// Reads the changelog in a task of its own: a search for a replica must not begin anew at every tick.
struct Reader {
    frames: mpsc::Receiver<Result<v1::ChangelogFrame, ClusterError>>,
    peer: watch::Receiver<String>,
    traffic: watch::Receiver<Traffic>,
    stop: CancellationToken,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Reader {
    fn start(source: &Cluster, volume: &str, after: Position) -> Self {
        let (sender, frames) = mpsc::channel(FRAMES_MAX);
        let (peer_sender, peer) = watch::channel(String::new());
        let (traffic_sender, traffic) = watch::channel(Traffic::default());
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let mut follower = source.follow(volume, after, true);
        tokio::spawn(async move {
            let read = async {
                loop {
                    let frame = match follower.next_frame().await {
                        Ok(Some(frame)) => Ok(frame),
                        Ok(None) => return,
                        // Nobody answers: this is what mirrors are for. Everything else is for the follower to judge.
                        Err(
                            error @ (ClusterError::NoNode { .. } | ClusterError::NoLeader { .. }),
                        ) => {
                            tracing::debug!(%error, "the source is away");
                            continue;
                        }
                        Err(error) => Err(error),
                    };
                    // Nobody needs to be woken for it.
                    traffic_sender.send_replace(follower.traffic());
                    peer_sender.send_if_modified(|peer| {
                        let now = follower.peer().unwrap_or_default();
                        let changed = peer != now;
                        now.clone_into(peer);
                        changed
                    });
                    let ends = frame.is_err();
                    if sender.send(frame).await.is_err() || ends {
                        return;
                    }
                }
            };
            tokio::select! {
                () = stopped.cancelled() => {}
                () = read => {}
            }
        });
        Self {
            frames,
            peer,
            traffic,
            stop,
        }
    }
}

/// The next frame; never, without a reader.
async fn next(reader: &mut Option<Reader>) -> Result<v1::ChangelogFrame, Failed> {
    match reader {
        None => std::future::pending().await,
        Some(reader) => match reader.frames.recv().await {
            Some(Ok(frame)) => Ok(frame),
            Some(Err(ClusterError::Invalid(why))) => {
                Err(Failed::Diverges(format!("the source's changelog: {why}")))
            }
            Some(Err(error)) => Err(error.into()),
            None => Err(Failed::retry("the source ended the changelog")),
        },
    }
}

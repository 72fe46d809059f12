//! Calls about mirrors: slots at the source; status, waiting and reloading at the mirror.

use std::time::Duration;

use heliofs_proto::ids::{Position, SegmentId, SessionId, VolumeId};
use heliofs_proto::v1::{self, change_slot_request, local_command::Op, slot_change};
use tokio::time::Instant;
use tonic::{Response, Status};

use super::admin::{AdminService, Answer, no_volume, unexpected};
use super::status;
use crate::changelog::{not_of_this_history, other_epoch};
use crate::drivers::slots::bytes_from;
use crate::proposer::{LocalReply, now};
use crate::sessions::Context;

/// While a bucket is waited for it is looked at this often.
const COPIES_LOOK: Duration = Duration::from_millis(50);

/// One wait lasts at most this long; clients ask again.
const WAIT_MAX: Duration = Duration::from_secs(4);

/// Sessions read from the records at once.
const SESSIONS_PAGE: usize = 1000;

/// Missing segments looked at for one answer.
const LISTED_MAX: usize = 4096;

fn no_slot(volume: &str, mirror: &str) -> Status {
    Status::not_found(format!("volume `{volume}` has no slot `{mirror}`"))
}

impl AdminService {
    fn leads(&self) -> Result<(), Status> {
        let now = self.ctx.leadership.borrow();
        match now.leading() {
            Some(_) => Ok(()),
            None => Err(status::not_leader(now.other_leader())),
        }
    }

    async fn named_now(&self, name: &str) -> Result<v1::Volume, Status> {
        self.current().await?;
        self.named(name)
    }

    pub(super) async fn slot_created(&self, ask: v1::CreateSlotRequest) -> Answer<v1::MirrorSlot> {
        super::admin::check_name(&ask.mirror)?;
        let volume = self.named_now(&ask.volume).await?;
        let create = v1::SlotCreate {
            slot: Some(v1::MirrorSlot {
                volume: volume.id,
                name: ask.mirror.clone(),
                log_bytes_max: ask.log_bytes_max,
                cluster_id: ask.cluster_id,
                ..Default::default()
            }),
            reset: ask.reset,
        };
        match self.propose_local(Op::SlotCreate(create)).await? {
            LocalReply::Slot(slot, created) => {
                if created {
                    tracing::info!(volume = ask.volume, mirror = ask.mirror, "a slot was made");
                }
                Ok(Response::new(*slot))
            }
            LocalReply::NoSuchVolume => Err(no_volume(ask.volume)),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn slots_listed(
        &self,
        ask: v1::ListSlotsRequest,
    ) -> Answer<v1::ListSlotsResponse> {
        self.current().await?;
        let volumes = match ask.volume.as_str() {
            "" => self.ctx.state.volumes(),
            name => vec![self.named(name)?],
        };
        let now = now();
        let mut slots = Vec::new();
        for volume in volumes {
            let id = VolumeId(volume.id);
            let head = self.ctx.state.head(id).map(|(head, _)| head.into());
            for slot in self.ctx.state.slots(id) {
                let index = match slot.invalid.is_empty() {
                    true => self.ctx.state.slot_index(&slot),
                    false => Ok(None),
                };
                let index = index.map_err(|error| Status::internal(error.to_string()))?;
                slots.push(v1::SlotStatus {
                    volume: volume.name.clone(),
                    head,
                    log_bytes: index.map_or(0, |index| bytes_from(&self.log, index)),
                    silent_ms: u64::try_from((now - slot.reported) / 1_000_000).unwrap_or(0),
                    slot: Some(slot),
                });
            }
        }
        Ok(Response::new(v1::ListSlotsResponse { slots }))
    }

    pub(super) async fn slot_changed(
        &self,
        ask: v1::ChangeSlotRequest,
    ) -> Answer<v1::ChangeSlotResponse> {
        let volume = self.named_now(&ask.volume).await?;
        let change = match ask.change {
            Some(change_slot_request::Change::Pause(pause)) => slot_change::Change::Pause(pause),
            Some(change_slot_request::Change::Delete(_)) => slot_change::Change::Delete(true),
            None => return Err(Status::invalid_argument("no change is named")),
        };
        let change = v1::SlotChange {
            volume: volume.id,
            name: ask.mirror.clone(),
            change: Some(change),
        };
        match self.propose_local(Op::SlotChange(change)).await? {
            LocalReply::Slot(..) | LocalReply::Done => Ok(Response::new(v1::ChangeSlotResponse {})),
            LocalReply::NoSuchVolume => Err(no_volume(ask.volume)),
            LocalReply::NoSuchSlot => Err(no_slot(&ask.volume, &ask.mirror)),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn slot_reported(&self, report: v1::SlotReport) -> Answer<v1::MirrorSlot> {
        let (volume, mirror) = (report.volume, report.name.clone());
        match self.propose_local(Op::SlotReport(report)).await? {
            LocalReply::Slot(slot, _) => {
                let head = self.ctx.state.head(VolumeId(slot.volume));
                let volume = self.ctx.state.volume(VolumeId(slot.volume));
                Ok(Response::new(v1::MirrorSlot {
                    fence: volume.map(|volume| v1::SourceFence {
                        store: volume.fence,
                    }),
                    head: head.map(|(head, _)| head.into()),
                    now: now(),
                    ..*slot
                }))
            }
            LocalReply::NoSuchVolume => Err(no_volume(volume)),
            LocalReply::NoSuchSlot => Err(no_slot(&volume.to_string(), &mirror)),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn mirrors_shown(
        &self,
        ask: v1::MirrorStatusRequest,
    ) -> Answer<v1::MirrorStatusResponse> {
        self.current().await?;
        self.leads()?;
        let volumes = match ask.volume.as_str() {
            "" => self.ctx.state.volumes(),
            name => vec![self.named(name)?],
        };
        let mirrors = volumes.into_iter().filter_map(|volume| {
            let id = VolumeId(volume.id);
            if volume.mirror.is_none() && volume.second.is_none() {
                return None;
            }
            let said = |doing: &str, detail: &str| v1::MirrorStatus {
                doing: doing.to_owned(),
                detail: detail.to_owned(),
                ..Default::default()
            };
            let told = match &volume.mirror {
                Some(mirror) if mirror.was_handed_over() => said("handed-over", &mirror.reason),
                Some(_) => self.ctx.mirrors.status(id).unwrap_or_else(|| {
                    said(
                        "starting",
                        "no node follows it yet: they must run with --mirror-of",
                    )
                }),
                // It is written here, and its bucket may still lack something.
                None => said("promoted", ""),
            };
            let (applied, time) = self.ctx.state.head(id).unwrap_or_default();
            // Records that can't be read are told by whoever reads them.
            let sessions = self.ctx.hub.volume(id).ok().flatten();
            let (leased, copiers) = sessions.map_or((0, 0), |sessions| {
                let soft = sessions.soft();
                (soft.copies.segments.len(), soft.copies.segments.holders())
            });
            Some(v1::MirrorStatus {
                volume: volume.id,
                name: volume.name,
                mirror: volume.mirror,
                applied: Some(applied.into()),
                applied_time: time.0,
                complete: self.ctx.state.complete(id).ok().map(Into::into),
                copies: self.ctx.state.copy_state(id),
                copies_leased: leased as u64,
                copiers: copiers as u64,
                digests_agreed: self.ctx.state.beats_agreed(id),
                diverged: self.ctx.state.diverged(id).map(Into::into),
                ..told
            })
        });
        let mirrors: Vec<_> = mirrors.collect();
        if mirrors.is_empty() && !ask.volume.is_empty() {
            return Err(Status::failed_precondition(format!(
                "volume `{}` is no mirror",
                ask.volume
            )));
        }
        Ok(Response::new(v1::MirrorStatusResponse { mirrors }))
    }

    /// Waits for a position on the leader, which is where reads are answered.
    pub(super) async fn position_awaited(
        &self,
        ask: v1::MirrorWaitRequest,
    ) -> Answer<v1::MirrorWaitResponse> {
        let volume = self.named_now(&ask.volume).await?;
        self.leads()?;
        let id = VolumeId(volume.id);
        let wanted = ask.position.map(Position::from).unwrap_or_default();
        let wait = Duration::from_millis(ask.wait_ms.into()).min(WAIT_MAX);
        let until = Instant::now() + wait;
        let mut rung = self.applies.subscribe();
        loop {
            rung.borrow_and_update();
            self.of_this_history(id, wanted)?;
            let loading = self
                .ctx
                .state
                .mirror(id)
                .is_some_and(|mirror| mirror.state() == v1::MirrorState::Loading);
            let applied = self
                .ctx
                .state
                .head(id)
                .map_or(Position::START, |(head, _)| head);
            let complete = match ask.data {
                true => self.ctx.state.complete(id),
                false => Ok(applied),
            };
            let complete = complete.map_err(|error| Status::internal(error.to_string()))?;
            let reached = !loading && applied >= wanted && complete >= wanted;
            // Copies are reported without a command of the volume, which alone would ring.
            let look_at = match ask.data {
                true => until.min(Instant::now() + COPIES_LOOK),
                false => until,
            };
            let late = !reached
                && match tokio::time::timeout_at(look_at, rung.changed()).await {
                    Ok(Ok(())) => false,
                    Ok(Err(_)) => true,
                    Err(_) => look_at >= until,
                };
            if reached || late {
                return Ok(Response::new(v1::MirrorWaitResponse {
                    reached,
                    applied: Some(applied.into()),
                    complete: Some(complete.into()),
                }));
            }
        }
    }

    /// Errors: `ABORTED` for a position behind which another epoch began: what it names was lost, and will not come.
    fn of_this_history(&self, id: VolumeId, wanted: Position) -> Result<(), Status> {
        let head = self
            .ctx
            .state
            .snapshot_view(|view| meta_core::query::head(view, id))
            .map_err(|found| status::corrupt(&self.ctx.damage, "a volume's epochs", &found))?;
        let epochs = head.map_or_else(Vec::new, |head| head.epochs);
        match other_epoch(&epochs, wanted) {
            Some((epoch, first)) => Err(not_of_this_history(wanted, *epoch, *first)),
            None => Ok(()),
        }
    }

    pub(super) async fn demoted(
        &self,
        ask: v1::DemoteVolumeRequest,
    ) -> Answer<v1::DemoteVolumeResponse> {
        let volume = self.named_now(&ask.volume).await?;
        if ask.undo
            && !volume
                .mirror
                .as_ref()
                .is_none_or(v1::MirrorOf::was_handed_over)
        {
            return Err(Status::failed_precondition(format!(
                "volume `{}` is a mirror: there is nothing to take back",
                ask.volume
            )));
        }
        if ask.undo && volume.mirror.as_ref().is_some_and(|mirror| mirror.sealed) {
            return Err(Status::failed_precondition(format!(
                "volume `{}` was handed over for good",
                ask.volume
            )));
        }
        if ask.seal
            && !volume
                .mirror
                .as_ref()
                .is_some_and(v1::MirrorOf::was_handed_over)
        {
            return Err(Status::failed_precondition(format!(
                "volume `{}` is not handed over: somebody has taken it back",
                ask.volume
            )));
        }
        let sessions = self.ctx.hub.volume(VolumeId(volume.id)).ok().flatten();
        if let Some(sessions) = &sessions
            && !ask.undo
            && !ask.seal
        {
            // What mounts have answered belongs to the history that ends here.
            let recalled = sessions.soft().stop_directories();
            for returned in recalled {
                // An error is how the wait ends.
                returned.await.ok();
            }
        }
        let demote = v1::VolumeDemote {
            volume: volume.id,
            successor: ask.successor,
            hand_over: ask.hand_over,
            undo: ask.undo,
            at: ask.at,
            seal: ask.seal,
        };
        let demoted = self.propose_local(Op::VolumeDemote(demote)).await;
        if let Some(sessions) = &sessions
            && (ask.undo || demoted.is_err())
        {
            sessions.soft().grant_directories_again();
        }
        match demoted? {
            LocalReply::Replayed(position) => {
                let done = match (ask.undo, ask.seal) {
                    (true, _) => "taken back",
                    (false, true) => "handed over for good",
                    (false, false) => "demoted",
                };
                tracing::warn!(volume = ask.volume, %position, "the volume was {done}");
                Ok(Response::new(v1::DemoteVolumeResponse {
                    position: Some(position.into()),
                }))
            }
            LocalReply::NoSuchVolume => Err(no_volume(ask.volume)),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn promoted(
        &self,
        ask: v1::PromoteMirrorRequest,
    ) -> Answer<v1::PromoteMirrorResponse> {
        let volume = self.named_now(&ask.volume).await?;
        let head = self.ctx.state.head(VolumeId(volume.id));
        let (head, _) = head.ok_or_else(|| no_volume(&ask.volume))?;
        let at = ask.at.map_or(head, Position::from);
        let promote = v1::MirrorPromote {
            volume: volume.id,
            at: Some(at.into()),
            epoch: match ask.epoch {
                0 => at.epoch.0 + 1,
                epoch => epoch,
            },
            fence: ask.fence,
        };
        match self.propose_local(Op::MirrorPromote(promote)).await? {
            LocalReply::Replayed(position) => {
                tracing::warn!(volume = ask.volume, %position, "the mirror was promoted");
                if ask.forced {
                    // Not here: each of them is an entry of the log, and whoever asked waits only so long.
                    let (ctx, id) = (self.ctx.clone(), VolumeId(volume.id));
                    tokio::spawn(async move { end_sessions_of_the_source(&ctx, id).await });
                }
                Ok(Response::new(v1::PromoteMirrorResponse {
                    position: Some(position.into()),
                }))
            }
            LocalReply::NoSuchVolume => Err(no_volume(ask.volume)),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn bucket_set(
        &self,
        ask: v1::SetBucketRequest,
    ) -> Answer<v1::SetBucketResponse> {
        let volume = self.named_now(&ask.volume).await?;
        let set = v1::SecondBucket {
            volume: volume.id,
            own: ask.own,
            copy_bytes_per_second: ask.copy_bytes_per_second,
            retry: ask.retry,
            emptied: ask.emptied,
        };
        match self.propose_local(Op::SecondBucket(set)).await? {
            LocalReply::Done => Ok(Response::new(v1::SetBucketResponse {})),
            LocalReply::NoSuchVolume => Err(no_volume(ask.volume)),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn missing_listed(
        &self,
        ask: v1::ListMissingRequest,
    ) -> Answer<v1::ListMissingResponse> {
        let volume = self.named_now(&ask.volume).await?;
        let max = match ask.segments_max as usize {
            0 => LISTED_MAX,
            max => max.min(LISTED_MAX),
        };
        let after = SegmentId(ask.after);
        let found = self
            .ctx
            .state
            .all_missing(VolumeId(volume.id), after, max)
            .map_err(|error| Status::internal(error.to_string()))?;
        let end = found.len() < max;
        let wanted =
            |missing: &v1::MissingSegment| !ask.quarantined || !missing.quarantine.is_empty();
        let missing = found
            .into_iter()
            .map(|(segment, missing)| v1::ListedMissing {
                segment: segment.0,
                missing: Some(missing),
            })
            .collect::<Vec<_>>();
        let after = missing.last().map_or(ask.after, |last| last.segment);
        let mut missing = missing;
        missing.retain(|listed| listed.missing.as_ref().is_some_and(wanted));
        Ok(Response::new(v1::ListMissingResponse {
            missing,
            end,
            after,
        }))
    }

    pub(super) async fn reload(
        &self,
        ask: v1::MirrorReloadRequest,
    ) -> Answer<v1::MirrorReloadResponse> {
        let volume = self.named_now(&ask.volume).await?;
        let Some(mirror) = volume.mirror else {
            return Err(Status::failed_precondition(format!(
                "volume `{}` is no mirror",
                ask.volume
            )));
        };
        // A load that broke off goes on with the same source only: that another one is right must be said.
        if mirror.state() == v1::MirrorState::Loading || mirror.reload {
            return Ok(Response::new(v1::MirrorReloadResponse {}));
        }
        // What was applied is served until the source sends a copy.
        let stop = v1::MirrorStop {
            volume: volume.id,
            reason: "to be loaded anew, as an operator asked".to_owned(),
            reload: true,
        };
        match self.propose_local(Op::MirrorStop(stop)).await? {
            LocalReply::Done => Ok(Response::new(v1::MirrorReloadResponse {})),
            other => Err(unexpected(&other)),
        }
    }
}

/// Nobody of the source comes back for what it was not told: its clients get EIO for it, and ESTALE for what they hold.
/// Whatever is left here when the lead is lost ends with the session time-out.
async fn end_sessions_of_the_source(ctx: &Context, id: VolumeId) {
    let own = ctx.state.cluster_id();
    let mut after = SessionId::SYSTEM;
    loop {
        let page = ctx
            .state
            .snapshot_view(|view| meta_core::query::sessions(view, id, after, SESSIONS_PAGE));
        let page = match page {
            Ok(page) => page,
            Err(found) => {
                ctx.damage.report("sessions of the source", &found);
                return;
            }
        };
        let Some((last, _)) = page.last() else { return };
        after = *last;
        for (session, _) in page {
            if Some(session.cluster()) == own {
                continue;
            }
            match ctx.hub.volume(id) {
                Ok(Some(volume)) => {
                    crate::sessions::end_session(ctx, &volume, session.0).await;
                }
                Ok(None) => return,
                Err(found) => {
                    ctx.damage.report("sessions of the source", &found);
                    return;
                }
            }
        }
    }
}

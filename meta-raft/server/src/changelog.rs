//! The changelog: the Raft log projected to one volume's commands, with positions and effective times, from any replica.

use std::sync::Arc;
use std::time::Duration;

use heliofs_proto::ids::{Epoch, Position, UnixNanos, VolumeId};
use heliofs_proto::packing::{self, Packer};
use heliofs_proto::v1::{self, changelog_server::Changelog, local_command, log_item::Item};
use meta_core::query;
use openraft::EntryPayload;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::damage::Damage;
use crate::grpc::status;
use crate::node::NodeContext;
use crate::observer::{AppliedItem, ApplyObserver};
use crate::raft::purge::LogHolds;
use crate::raft::types::Entry;
use crate::sessions::Context;
use crate::store::group::{sealed, volume_init};
use crate::store::local::Place;
use crate::store::{LogStore, State};

/// How often an idle volume's follower hears from us.
const BEAT_EVERY: Duration = Duration::from_secs(1);

/// Bytes of log read at once.
const READ_BYTES: usize = 1 << 20;

/// Entries sent in one frame; with [`READ_BYTES`] this keeps frames well below the largest message.
const FRAME_ENTRIES_MAX: usize = 1000;

/// Frames that wait for a slow follower.
const FRAMES_MAX: usize = 4;

/// Says that something was applied; cheap to clone.
#[derive(Clone, Default)]
pub struct Applies {
    shared: Arc<Bell>,
}

struct Bell {
    rung: watch::Sender<()>,
}

impl Default for Bell {
    fn default() -> Self {
        Self {
            rung: watch::Sender::new(()),
        }
    }
}

impl Applies {
    /// What the apply task calls.
    pub fn observer(&self) -> Arc<dyn ApplyObserver> {
        self.shared.clone()
    }

    /// Changes whenever something was applied.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.shared.rung.subscribe()
    }
}

impl ApplyObserver for Bell {
    fn applied(&self, _: &[AppliedItem<'_>]) {
        self.rung.send_replace(());
    }

    fn reset(&self) {
        self.rung.send_replace(());
    }

    fn volumes_changed(&self) {
        self.rung.send_replace(());
    }
}

/// The service.
#[derive(Clone)]
pub struct ChangelogService {
    ctx: Context,
    log: LogStore,
    holds: LogHolds,
    applies: Applies,
    cancel: CancellationToken,
}

impl ChangelogService {
    /// Over the node's parts.
    pub fn new(ctx: Context, node: &NodeContext, applies: Applies) -> Self {
        Self {
            ctx,
            log: node.log.clone(),
            holds: node.log_holds.clone(),
            applies,
            cancel: node.cancel.clone(),
        }
    }

    async fn volume(&self, name: &str) -> Result<v1::Volume, Status> {
        if let Some(found) = self.ctx.state.volume_named(name) {
            return Ok(found);
        }
        // Perhaps this replica has not heard of it yet.
        self.ctx.gate.linearizable().await.map_err(status::read)?;
        let found = self.ctx.state.volume_named(name);
        found.ok_or_else(|| Status::not_found(format!("no volume `{name}` in this cluster")))
    }

    /// A volume that is complete here.
    async fn served(&self, name: &str) -> Result<v1::Volume, Status> {
        let record = self.volume(name).await?;
        match &record.mirror {
            Some(mirror) if mirror.state() == v1::MirrorState::Loading => Err(Status::unavailable(
                format!("volume `{name}` is a mirror that is being loaded"),
            )),
            _ => Ok(record),
        }
    }

    /// Where to begin reading. Errors: `OUT_OF_RANGE` before what the log has; `ABORTED` after what there is, and for positions
    /// of another history.
    async fn place(&self, volume: VolumeId, after: Position) -> Result<Place, Status> {
        let head = || {
            self.ctx
                .state
                .head(volume)
                .map_or(Position::START, |(position, _)| position)
        };
        if after > head() {
            self.ctx.gate.linearizable().await.map_err(status::read)?;
        }
        let at = head();
        if after > at {
            return Err(Status::aborted(format!(
                "position {after} lies in the future: the volume is at {at}"
            )));
        }
        let epochs = self
            .ctx
            .state
            .snapshot_view(|view| query::head(view, volume))
            .map_err(|found| status::corrupt(&self.ctx.damage, "a volume's epochs", &found))?
            .map_or_else(Vec::new, |head| head.epochs);
        if let Some((epoch, first)) = other_epoch(&epochs, after) {
            return Err(not_of_this_history(after, *epoch, *first));
        }
        if let Some(next) = self.ctx.state.next_place(volume)
            && next.seq == after.seq + 1
        {
            // Nothing is missing, wherever the last command is in the log.
            return Ok(next);
        }
        let place = self
            .ctx
            .state
            .place(volume, after.seq + 1)
            .map_err(|error| Status::internal(error.to_string()))?;
        let purged = self.log.purged().map(|purged| purged.index);
        place
            .filter(|place| purged.is_none_or(|purged| place.index > purged))
            .ok_or_else(|| trimmed(after))
    }
}

/// The epoch that began where `position`, of an earlier one, says that something else was.
pub(crate) fn other_epoch(epochs: &[(Epoch, u64)], position: Position) -> Option<&(Epoch, u64)> {
    let mut epochs = epochs.iter();
    epochs.find(|(epoch, first)| *epoch > position.epoch && *first <= position.seq)
}

pub(crate) fn not_of_this_history(position: Position, epoch: Epoch, first: u64) -> Status {
    Status::aborted(format!(
        "position {position} is not of this history: epoch {epoch} began at {first}"
    ))
}

/// Sends a volume's records until all are sent or nobody listens. Blocks.
fn copy(
    state: &State,
    damage: &Damage,
    mut record: v1::Volume,
    frames: &mpsc::Sender<Result<v1::CopyFrame, Status>>,
    packer: Option<Packer>,
) {
    let volume = VolumeId(record.id);
    let counters = state.snapshot_view(|view| query::counters(view, volume));
    // As they are now, and not as the volume was created: an older build must see a level that it does not know before it begins.
    match state.snapshot_view(|view| query::settings(view, volume)) {
        Ok(settings) => record.settings = settings.or(record.settings),
        Err(found) => {
            let status = status::corrupt(damage, "a volume that is copied", &found);
            frames.blocking_send(Err(status)).ok();
            return;
        }
    }
    let inodes = counters.map_or(0, |counters| counters.used_inodes);
    let packer = std::cell::RefCell::new(packer);
    let send = |frame: v1::CopyFrame| {
        let frame = match packer.borrow_mut().as_mut() {
            None => Ok(frame),
            Some(packer) => packer
                .pack(&frame)
                .map_err(unpackable)
                .map(|packed| v1::CopyFrame {
                    packed,
                    ..Default::default()
                }),
        };
        let whole = frame.is_ok();
        frames.blocking_send(frame).is_ok() && whole
    };
    let begin = |position: Position| {
        send(v1::CopyFrame {
            begin: Some(v1::CopyBegin {
                position: Some(position.into()),
                volume: Some(record),
                // An inode, its two entries, and about one extent with its segment.
                records_about: inodes * 4,
            }),
            ..Default::default()
        })
    };
    let page = |records| {
        send(v1::CopyFrame {
            records,
            ..Default::default()
        })
    };
    match state.copy(volume, begin, page) {
        Ok(None) => {}
        Ok(Some(copied)) => {
            let end = v1::CopyEnd {
                digest: copied.digest.to_le_bytes().to_vec().into(),
                head: copied.head,
                records: copied.records,
            };
            send(v1::CopyFrame {
                end: Some(end),
                ..Default::default()
            });
        }
        Err(found) => {
            let status = status::corrupt(damage, "a volume that is copied", &found);
            frames.blocking_send(Err(status)).ok();
        }
    }
}

/// What packs a stream for whom can unpack it.
fn packer(packing: &str) -> Result<Option<Packer>, Status> {
    match packing {
        packing::ZSTD => Packer::new().map(Some).map_err(unpackable),
        _ => Ok(None),
    }
}

fn unpackable(error: std::io::Error) -> Status {
    Status::internal(format!("a frame can't be packed: {error}"))
}

fn trimmed(after: Position) -> Status {
    Status::out_of_range(format!(
        "this node's log no longer reaches back to position {after}: begin with a copy of the volume as it is now"
    ))
}

#[tonic::async_trait]
impl Changelog for ChangelogService {
    type CopyStream = ReceiverStream<Result<v1::CopyFrame, Status>>;

    async fn copy(
        &self,
        request: Request<v1::CopyRequest>,
    ) -> Result<Response<Self::CopyStream>, Status> {
        let v1::CopyRequest {
            volume: name,
            packing,
        } = request.into_inner();
        let packer = packer(&packing)?;
        // Not older than what anybody was told, so that a slot made before is not older either.
        self.ctx.gate.linearizable().await.map_err(status::read)?;
        let record = self.served(&name).await?;
        let (frames, receiver) = mpsc::channel(FRAMES_MAX);
        let (state, damage) = (self.ctx.state.clone(), self.ctx.damage.clone());
        tokio::task::spawn_blocking(move || copy(&state, &damage, record, &frames, packer));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type FollowStream = ReceiverStream<Result<v1::ChangelogFrame, Status>>;

    async fn follow(
        &self,
        request: Request<v1::FollowRequest>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let v1::FollowRequest {
            volume,
            after,
            follow,
            packing,
        } = request.into_inner();
        let packer = packer(&packing)?;
        let record = self.served(&volume).await?;
        let id = VolumeId(record.id);
        let after = after.map(Position::from).unwrap_or_default();
        if !follow {
            // The end is what is committed now, not what this replica has heard of.
            self.ctx.gate.linearizable().await.map_err(status::read)?;
        }
        let place = self.place(id, after).await?;
        let (frames, receiver) = mpsc::channel(FRAMES_MAX);
        let follower = Follower {
            state: self.ctx.state.clone(),
            log: self.log.clone(),
            holds: self.holds.clone(),
            rung: self.applies.shared.rung.subscribe(),
            next_index: place.index,
            projection: Projection::new(id, record.name, place, after),
            follow,
            frames,
            packer,
        };
        let cancel = self.cancel.clone();
        tokio::spawn(async move {
            let frames = follower.frames.clone();
            tokio::select! {
                () = cancel.cancelled() => {
                    let stopping = Status::unavailable("the node is stopping");
                    frames.try_send(Err(stopping)).ok();
                }
                ended = follower.run() => if let Err(status) = ended {
                    // A follower that is gone needs no reason.
                    frames.send(Err(status)).await.ok();
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// One follower's task.
struct Follower {
    state: State,
    log: LogStore,
    holds: LogHolds,
    rung: watch::Receiver<()>,
    next_index: u64,
    projection: Projection,
    follow: bool,
    frames: mpsc::Sender<Result<v1::ChangelogFrame, Status>>,
    packer: Option<Packer>,
}

impl Follower {
    /// Until the follower is gone, the end is reached (without `follow`), or the log has a gap.
    async fn run(mut self) -> Result<(), Status> {
        let hold = self.holds.hold(self.next_index);
        loop {
            self.rung.borrow_and_update();
            let applied = self.state.applied().0.map_or(0, |applied| applied.index);
            while self.next_index <= applied {
                if !self.read(applied).await? {
                    return Ok(());
                }
                hold.advance(self.next_index);
            }
            if !self.follow {
                return Ok(());
            }
            let waited = tokio::time::timeout(BEAT_EVERY, self.rung.changed());
            let waited = tokio::select! {
                waited = waited => waited,
                () = self.frames.closed() => return Ok(()),
            };
            match waited {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(Status::unavailable("the node is stopping")),
                Err(_) => {
                    if !self.beat().await? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Sends what the next entries hold. `false`: the follower is gone.
    async fn read(&mut self, applied: u64) -> Result<bool, Status> {
        let entries = self
            .log
            .read(self.next_index, applied + 1, READ_BYTES)
            .await
            .map_err(|error| Status::internal(format!("the log can't be read: {error}")))?;
        if entries.first().map(|entry| entry.log_id.index) != Some(self.next_index) {
            return Err(trimmed(self.projection.last()));
        }
        let mut found = Found::default();
        // All of them are applied.
        self.projection.loaded = self.state.loaded(self.projection.volume);
        for entry in &entries {
            self.projection.entry(entry, &mut found)?;
            self.next_index = entry.log_id.index + 1;
        }
        while !found.entries.is_empty() || !found.digests.is_empty() {
            let rest = found
                .entries
                .split_off(found.entries.len().min(FRAME_ENTRIES_MAX));
            let entries = std::mem::replace(&mut found.entries, rest);
            let frame = v1::ChangelogFrame {
                entries,
                beat: None,
                // With the last entries: what they are of comes before.
                digests: match found.entries.is_empty() {
                    true => std::mem::take(&mut found.digests),
                    false => Vec::new(),
                },
                head: self.head(),
                ..Default::default()
            };
            if !self.send(frame).await? {
                return Ok(false);
            }
        }
        if self.projection.reloaded {
            return Err(Status::unavailable("the mirror is loaded anew"));
        }
        if self.projection.destroyed {
            return Err(Status::not_found("the volume was destroyed"));
        }
        Ok(true)
    }

    /// How far this replica is, and when that was.
    fn head(&self) -> Option<v1::ChangelogHead> {
        let now = crate::proposer::now();
        let (position, _) = self.state.head(self.projection.volume)?;
        Some(v1::ChangelogHead {
            position: Some(position.into()),
            now,
        })
    }

    /// Says that nothing happened. `false`: the follower is gone.
    async fn beat(&mut self) -> Result<bool, Status> {
        let (Some(beat), Some((position, time))) = (
            self.state.beat(self.projection.volume),
            self.state.head(self.projection.volume),
        ) else {
            return Ok(true);
        };
        if beat.position.map(Position::from) != Some(position) || position != self.projection.last()
        {
            // Something has just happened: it is sent as what it is.
            return Ok(true);
        }
        let beat = v1::ChangelogBeat {
            position: beat.position,
            time: time.0,
            digest: beat.digest,
        };
        let frame = v1::ChangelogFrame {
            beat: Some(beat),
            head: self.head(),
            ..Default::default()
        };
        self.send(frame).await
    }

    /// `false`: the follower is gone.
    async fn send(&mut self, frame: v1::ChangelogFrame) -> Result<bool, Status> {
        let frame = match &mut self.packer {
            None => frame,
            Some(packer) => v1::ChangelogFrame {
                packed: packer.pack(&frame).map_err(unpackable)?,
                ..Default::default()
            },
        };
        Ok(self.frames.send(Ok(frame)).await.is_ok())
    }
}

/// What log entries hold of one volume.
#[derive(Default)]
struct Found {
    entries: Vec<v1::ChangelogEntry>,
    digests: Vec<v1::Beat>,
}

/// Which entries of the log are whose commands, and under which positions. Pure.
struct Projection {
    volume: VolumeId,
    name: String,
    /// Of the next command.
    next: Position,
    /// Of the last command.
    time: UnixNanos,
    after: Position,
    /// The volume is a mirror here: what is replayed counts, and commands don't.
    mirrored: bool,
    destroyed: bool,
    /// The last entry that may have put a copy in the place of the records: ends of loads behind it were refused.
    loaded: u64,
    /// It is loaded anew: positions do not go on from here.
    reloaded: bool,
}

impl Projection {
    /// From the entry `place.index` on; commands up to `after` are counted and not told.
    fn new(volume: VolumeId, name: String, place: Place, after: Position) -> Self {
        let next = Position {
            epoch: place.epoch,
            seq: place.seq,
        };
        Self {
            volume,
            name,
            next,
            time: place.time_before,
            after,
            mirrored: place.mirrored,
            destroyed: false,
            loaded: 0,
            reloaded: false,
        }
    }

    /// The last command met.
    fn met(&self) -> Position {
        Position {
            epoch: self.next.epoch,
            seq: self.next.seq.saturating_sub(1),
        }
    }

    /// The last command met, or that which the reader has.
    fn last(&self) -> Position {
        self.met().max(self.after)
    }

    fn entry(&mut self, entry: &Entry, found: &mut Found) -> Result<(), Status> {
        let EntryPayload::Normal(data) = &entry.payload else {
            return Ok(());
        };
        let batch = data.batch().map_err(|error| {
            let index = entry.log_id.index;
            Status::data_loss(format!("log entry {index} can't be decoded: {error}"))
        })?;
        self.batch(entry.log_id.index, batch, found);
        Ok(())
    }

    fn batch(&mut self, index: u64, batch: &v1::LogBatch, found: &mut Found) {
        for item in &batch.items {
            let born = self.next.seq > 1;
            match &item.item {
                Some(Item::Command(command))
                    if command.volume == self.volume.0 && born && !self.mirrored =>
                {
                    self.command(item.time, command.clone(), found);
                }
                Some(Item::Replay(replay)) if replay.volume == self.volume.0 && self.mirrored => {
                    self.replay(replay, found);
                }
                Some(Item::Local(v1::LocalCommand {
                    op: Some(local_command::Op::VolumeDemote(demote)),
                })) if demote.volume == self.volume.0 && demote.seal => {
                    let here = demote.at.map(Position::from) == Some(self.met());
                    if here && self.mirrored {
                        self.command(item.time, sealed(self.volume), found);
                    }
                }
                Some(Item::Local(v1::LocalCommand {
                    op: Some(local_command::Op::VolumeDemote(demote)),
                })) if demote.volume == self.volume.0 => {
                    let undone = demote.undo && demote.at.map(Position::from) == Some(self.met());
                    self.mirrored = !undone && (self.mirrored || !demote.undo);
                }
                Some(Item::Local(v1::LocalCommand {
                    op: Some(local_command::Op::MirrorPromote(promote)),
                })) if promote.volume == self.volume.0 && self.mirrored => {
                    self.promote(item.time, promote.clone(), found);
                }
                Some(Item::Local(v1::LocalCommand {
                    op: Some(local_command::Op::MirrorLoadEnd(end)),
                })) if end.volume == self.volume.0 && index <= self.loaded => {
                    self.reloaded = true;
                    return;
                }
                Some(Item::Beat(beat)) if beat.volume == self.volume.0 && born => {
                    found.digests.push(beat.clone());
                }
                // A volume's first command is not in the log as such: it follows from its creation.
                Some(Item::Local(v1::LocalCommand {
                    op: Some(local_command::Op::VolumeCreate(create)),
                })) if create.name == self.name && !born => {
                    self.command(item.time, volume_init(self.volume, create), found);
                }
                Some(Item::Local(v1::LocalCommand {
                    op: Some(local_command::Op::VolumeDestroy(destroy)),
                })) if destroy.volume == self.volume.0 => {
                    self.destroyed = true;
                    return;
                }
                _ => {}
            }
        }
    }

    /// What a mirror replays is what it has to tell; like the state, it takes each position once.
    fn replay(&mut self, replay: &v1::Replay, found: &mut Found) {
        for entry in &replay.entries {
            if let Some(command) = &entry.command
                && entry.position.map(Position::from)
                    == Some(meta_core::next_position(self.met(), command))
            {
                self.command(entry.time, command.clone(), found);
            }
        }
        found.digests.extend(replay.beats.iter().cloned());
    }

    /// Like the state: only at just this position, and into a later epoch.
    fn promote(&mut self, time: i64, promote: v1::MirrorPromote, found: &mut Found) {
        let at = promote.at.map(Position::from).unwrap_or_default();
        if at != self.met() || promote.epoch <= at.epoch.0 {
            return;
        }
        self.mirrored = false;
        let begin = v1::Command {
            volume: self.volume.0,
            op: Some(v1::command::Op::EpochBegin(v1::EpochBegin {
                epoch: promote.epoch,
            })),
            ..v1::Command::default()
        };
        self.command(time, begin, found);
    }

    fn command(&mut self, time: i64, command: v1::Command, found: &mut Found) {
        self.next = meta_core::next_position(self.met(), &command);
        self.time = self.time.max(UnixNanos(time));
        if self.next > self.after {
            found.entries.push(v1::ChangelogEntry {
                position: Some(self.next.into()),
                time: self.time.0,
                command: Some(command),
            });
        }
        self.next = self.next.next();
    }
}

#[cfg(test)]
mod tests {
    use heliofs_proto::ids::Epoch;

    use super::*;

    fn command(volume: u32, sequence: u64, time: i64) -> v1::LogItem {
        let command = v1::Command {
            volume,
            sequence,
            ..Default::default()
        };
        v1::LogItem {
            time,
            item: Some(Item::Command(command)),
            ..Default::default()
        }
    }

    fn local(op: local_command::Op, time: i64) -> v1::LogItem {
        v1::LogItem {
            time,
            item: Some(Item::Local(v1::LocalCommand { op: Some(op) })),
            ..Default::default()
        }
    }

    fn projection(seq: u64, time: i64, after: u64) -> Projection {
        let epoch = Epoch(0);
        let place = Place {
            seq,
            epoch,
            index: 9,
            time_before: UnixNanos(time),
            mirrored: false,
        };
        let after = Position { epoch, seq: after };
        Projection::new(VolumeId(3), "vol".into(), place, after)
    }

    fn told(projection: &mut Projection, items: Vec<v1::LogItem>) -> Vec<(u64, i64, u64)> {
        let mut found = Found::default();
        projection.batch(9, &v1::LogBatch { items }, &mut found);
        found
            .entries
            .iter()
            .map(|entry| {
                let sequence = entry.command.as_ref().unwrap().sequence;
                (entry.position.unwrap().seq, entry.time, sequence)
            })
            .collect()
    }

    #[test]
    fn commands_of_the_volume_are_numbered_and_times_do_not_go_back() {
        let mut projection = projection(10, 100, 10);
        let items = vec![
            command(3, 1, 90),
            command(4, 7, 200),
            command(3, 2, 95),
            command(3, 3, 150),
            command(3, 4, 120),
        ];
        assert_eq!(
            told(&mut projection, items),
            [(11, 100, 2), (12, 150, 3), (13, 150, 4)]
        );
        assert_eq!(projection.last().seq, 13);
    }

    #[test]
    fn a_volume_begins_with_its_creation_and_ends_with_its_destruction() {
        let create = |name: &str| {
            local_command::Op::VolumeCreate(v1::VolumeCreate {
                name: name.into(),
                ..Default::default()
            })
        };
        let destroy = local_command::Op::VolumeDestroy(v1::VolumeDestroy { volume: 3 });
        let mut projection = projection(1, 0, 0);
        let items = vec![
            // Refused when it was applied: the volume did not exist.
            command(3, 5, 1),
            local(create("other"), 2),
            local(create("vol"), 3),
            local(create("vol"), 4),
            command(3, 6, 5),
            local(destroy, 6),
            command(3, 7, 7),
        ];
        assert_eq!(told(&mut projection, items), [(1, 3, 0), (2, 5, 6)]);
        assert!(projection.destroyed);
    }

    #[test]
    fn a_promotion_opens_an_epoch_and_a_demotion_ends_what_commands_do() {
        let mut projection = projection(10, 100, 9);
        let promote = |seq, epoch| {
            local_command::Op::MirrorPromote(v1::MirrorPromote {
                fence: None,
                volume: 3,
                at: Some(v1::Position { epoch: 0, seq }),
                epoch,
            })
        };
        let replay = |seq| v1::LogItem {
            time: 0,
            level: 0,
            item: Some(Item::Replay(v1::Replay {
                pin: false,
                volume: 3,
                entries: vec![v1::ChangelogEntry {
                    position: Some(v1::Position { epoch: 0, seq }),
                    time: 150,
                    command: Some(v1::Command {
                        volume: 3,
                        sequence: seq,
                        ..Default::default()
                    }),
                }],
                beats: Vec::new(),
            })),
        };
        let demote = local_command::Op::VolumeDemote(v1::VolumeDemote {
            volume: 3,
            ..Default::default()
        });
        let items = vec![
            command(3, 1, 110),
            local(demote, 111),
            // Refused when it was applied.
            command(3, 2, 112),
            replay(11),
            replay(11),
            replay(13),
            // At another position, into no later epoch, and then so that it takes effect.
            local(promote(10, 1), 113),
            local(promote(11, 0), 114),
            local(promote(11, 4), 115),
            replay(13),
            command(3, 5, 160),
        ];
        assert_eq!(
            told(&mut projection, items),
            [(10, 110, 1), (11, 150, 11), (12, 150, 0), (13, 160, 5)]
        );
        assert_eq!(projection.last().epoch, Epoch(4));
    }

    #[test]
    fn a_load_that_was_refused_ends_no_reader_and_one_that_was_whole_does() {
        for (loaded, ends) in [(0, false), (8, false), (9, true), (12, true)] {
            let mut projection = projection(10, 100, 9);
            projection.loaded = loaded;
            let end = |volume| {
                let end = v1::MirrorLoadEnd {
                    volume,
                    ..Default::default()
                };
                local(local_command::Op::MirrorLoadEnd(end), 111)
            };
            let items = vec![command(3, 1, 110), end(4), end(3), command(3, 2, 112)];
            let told = told(&mut projection, items);
            assert_eq!(projection.reloaded, ends, "{loaded}");
            assert_eq!(told.len(), if ends { 1 } else { 2 }, "{loaded}");
        }
    }

    #[test]
    fn of_an_undo_and_a_seal_at_one_position_the_first_counts() {
        let demote = |undo, seal| {
            local_command::Op::VolumeDemote(v1::VolumeDemote {
                volume: 3,
                undo,
                seal,
                at: (undo || seal).then_some(v1::Position { epoch: 0, seq: 10 }),
                ..Default::default()
            })
        };
        let handed_over = || {
            vec![
                command(3, 1, 110),
                local(demote(false, false), 111),
                command(3, 2, 112),
            ]
        };
        let mut told_to = projection(10, 100, 9);
        let mut items = handed_over();
        items.push(local(demote(false, true), 113));
        items.push(local(demote(false, true), 114));
        items.push(local(demote(true, false), 115));
        items.push(command(3, 3, 116));
        assert_eq!(told(&mut told_to, items), [(10, 110, 1), (11, 113, 0)]);
        let mut told_to = projection(10, 100, 9);
        let mut items = handed_over();
        items.push(local(demote(true, false), 113));
        items.push(local(demote(false, true), 114));
        items.push(command(3, 3, 116));
        assert_eq!(told(&mut told_to, items), [(10, 110, 1), (11, 116, 3)]);
    }

    #[test]
    fn a_demotion_that_is_undone_where_it_was_leaves_the_history_as_it_is() {
        let mut projection = projection(10, 100, 9);
        let demote = |undo, seq| {
            local_command::Op::VolumeDemote(v1::VolumeDemote {
                volume: 3,
                undo,
                at: undo.then_some(v1::Position { epoch: 0, seq }),
                ..Default::default()
            })
        };
        let items = vec![
            command(3, 1, 110),
            local(demote(false, 0), 111),
            command(3, 2, 112),
            // Of another hand-over: refused.
            local(demote(true, 9), 113),
            command(3, 3, 114),
            local(demote(true, 10), 115),
            command(3, 4, 116),
        ];
        assert_eq!(told(&mut projection, items), [(10, 110, 1), (11, 116, 4)]);
    }
}

//! One applied group: any number of log entries, one overlay, one write batch.

mod copies;
mod mirror;
mod slots;

pub use mirror::sealed;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{ClusterId, Position, SegmentId, SessionId, UnixNanos, VolumeId};
use heliofs_proto::v1::{self, local_command::Op, log_item::Item};
use meta_core::{Corruption, Overlay, Stamp};
use openraft::EntryPayload;
use prost::Message;
use rocksdb::WriteBatch;

use super::digests::Digest;
use super::local::{self, Place};
use super::state::{Generation, Known, Memory, State, without_wal};
use super::view::LiveView;
use crate::levels;
use crate::observer::AppliedItem;
use crate::proposer::{LocalReply, Proposed};
use crate::raft::types::{Entry, StoredMembership};
use crate::raft::wire;

/// A volume's place in the log is recorded at most once in this many entries: a changelog reader that starts in between
/// skips that many entries at most.
const ENTRIES_PER_PLACE: u64 = 64;

/// Mode of a new volume's root, as `mkdir` of a shared directory would have it.
const ROOT_MODE: u32 = 0o777;

/// A volume's first command: it follows from the volume's creation and is in the log only as that.
pub fn volume_init(volume: VolumeId, create: &v1::VolumeCreate) -> v1::Command {
    v1::Command {
        volume: volume.0,
        op: Some(v1::command::Op::VolumeInit(v1::VolumeInit {
            settings: create.settings,
            root_uid: 0,
            root_gid: 0,
            root_mode: ROOT_MODE,
        })),
        ..v1::Command::default()
    }
}

/// Why a group can't be applied: the node must stop.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The records or the log make no sense.
    #[error(transparent)]
    Corruption(#[from] Corruption),
    /// An entry can't be decoded.
    #[error("log entry {index} can't be decoded: {source}")]
    Entry {
        /// Which.
        index: u64,
        /// Why.
        source: prost::DecodeError,
    },
    /// An entry is beyond this build.
    #[error("log entry {index} is of level {level}, this build knows {known}: upgrade this node")]
    Upgrade {
        /// Which.
        index: u64,
        /// What it needs.
        level: u32,
        /// What this build knows.
        known: u32,
    },
    /// The write failed.
    #[error("the state can't be written: {0}")]
    Write(rocksdb::Error),
}

/// What a group did: for observers first, then for waiters.
pub struct AppliedGroup<'a> {
    /// Every replicated command, in log order.
    pub items: Vec<AppliedItem<'a>>,
    /// Per entry, what its items answered.
    pub entries: Vec<Vec<Outcome>>,
    /// A volume was created, changed or destroyed.
    pub volumes_changed: bool,
}

/// What one log item answered.
pub enum Outcome {
    /// The reply of `items[n]`.
    Item(usize),
    /// A refusal that took no position, or a local command's answer.
    Other(Box<Proposed>),
}

impl Outcome {
    fn local(reply: LocalReply) -> Self {
        Self::Other(Box::new(Proposed::Local(reply)))
    }
}

impl AppliedGroup<'_> {
    /// The answers of each entry, in order. Takes the replies out of `items`.
    pub fn replies(&mut self) -> Vec<Vec<Proposed>> {
        let entries = std::mem::take(&mut self.entries);
        let items = &mut self.items;
        entries
            .into_iter()
            .map(|outcomes| {
                let reply = |outcome| match outcome {
                    Outcome::Item(index) => {
                        let item: &mut AppliedItem<'_> = &mut items[index];
                        Proposed::Reply(std::mem::take(&mut item.reply))
                    }
                    Outcome::Other(reply) => *reply,
                };
                outcomes.into_iter().map(reply).collect()
            })
            .collect()
    }
}

/// Whether an entry must be a group of its own: it puts a volume's records elsewhere, and reads of the same group would still see
/// those of before; or it begins to, and what the same group destroys goes last.
pub fn stands_alone(entry: &Entry) -> bool {
    let EntryPayload::Normal(data) = &entry.payload else {
        return false;
    };
    // What can't be decoded is reported when it is applied.
    data.batch().is_ok_and(|batch| {
        batch.items.iter().any(|item| {
            matches!(
                &item.item,
                Some(Item::Local(v1::LocalCommand {
                    op: Some(Op::MirrorLoadBegin(_) | Op::MirrorLoadEnd(_))
                }))
            )
        })
    })
}

/// The volumes of which the records are to be held as they are after this entry, which must end its group.
pub fn pinned(entry: &Entry) -> Vec<VolumeId> {
    let EntryPayload::Normal(data) = &entry.payload else {
        return Vec::new();
    };
    let Ok(batch) = data.batch() else {
        return Vec::new();
    };
    let volumes = batch.items.iter().filter_map(|item| match &item.item {
        Some(Item::Replay(replay)) if replay.pin => Some(VolumeId(replay.volume)),
        _ => None,
    });
    volumes.collect()
}

struct Group<'g, 'e> {
    generation: &'g Generation,
    memory: &'g mut Memory,
    overlay: Overlay<LiveView>,
    batch: WriteBatch,
    /// Sums to write: (volume, bucket).
    sums: BTreeSet<(VolumeId, u8)>,
    destroyed: BTreeSet<VolumeId>,
    /// Loaded: the records are those in the other half from now on.
    swapped: BTreeSet<VolumeId>,
    queues_changed: BTreeSet<VolumeId>,
    /// Freed in this group and not in the store yet.
    freed: BTreeMap<(VolumeId, SegmentId), UnixNanos>,
    /// Taken off the deletion queue in this group.
    unqueued: BTreeSet<(VolumeId, SegmentId)>,
    missing: copies::Missing,
    copies_changed: BTreeSet<VolumeId>,
    items: Vec<AppliedItem<'e>>,
    volumes_changed: bool,
}

impl State {
    /// Applies entries that follow the last applied one, and writes what they change as one batch. Only one task may call
    /// this. After an error the node must stop: memory is ahead of the store.
    pub fn apply<'e>(&self, entries: &'e [Entry]) -> Result<AppliedGroup<'e>, ApplyError> {
        let generation = self.generation();
        let mut memory = self.memory();
        let mut group = Group {
            overlay: Overlay::new(LiveView {
                generation: generation.clone(),
                applies: true,
            }),
            generation: &generation,
            memory: &mut memory,
            batch: WriteBatch::default(),
            sums: BTreeSet::new(),
            destroyed: BTreeSet::new(),
            swapped: BTreeSet::new(),
            queues_changed: BTreeSet::new(),
            freed: BTreeMap::new(),
            unqueued: BTreeSet::new(),
            missing: copies::Missing::new(),
            copies_changed: BTreeSet::new(),
            items: Vec::new(),
            volumes_changed: false,
        };
        let mut outcomes = Vec::with_capacity(entries.len());
        for entry in entries {
            outcomes.push(group.entry(entry)?);
        }
        let copies_changed = !group.copies_changed.is_empty() || group.volumes_changed;
        let (items, volumes_changed) = group.write(entries)?;
        if copies_changed {
            self.set_lacking(memory.lacks_any());
        }
        if volumes_changed {
            self.set_fenced(&memory);
        }
        Ok(AppliedGroup {
            items,
            entries: outcomes,
            volumes_changed,
        })
    }
}

impl<'e> Group<'_, 'e> {
    fn entry(&mut self, entry: &'e Entry) -> Result<Vec<Outcome>, ApplyError> {
        let index = entry.log_id.index;
        let batch = match &entry.payload {
            EntryPayload::Blank => return Ok(Vec::new()),
            EntryPayload::Membership(membership) => {
                let stored = StoredMembership::new(Some(entry.log_id), membership.clone());
                let header = v1::SnapshotHeader {
                    membership_log_id: Some(wire::log_id_to_wire(entry.log_id)),
                    membership: Some(wire::membership_to_wire(membership)),
                    ..v1::SnapshotHeader::default()
                };
                self.put_local(local::MEMBERS, &header.encode_to_vec());
                self.memory.membership = stored;
                return Ok(Vec::new());
            }
            EntryPayload::Normal(data) => data
                .batch()
                .map_err(|source| ApplyError::Entry { index, source })?,
        };
        let mut outcomes = Vec::with_capacity(batch.items.len());
        for item in &batch.items {
            self.expect_known(index, item.level)?;
            let time = UnixNanos(item.time);
            outcomes.push(match &item.item {
                Some(Item::Command(command)) => match self.read_only(command) {
                    Some(refusal) => refusal,
                    None => self.command(index, time, Cow::Borrowed(command))?,
                },
                Some(Item::Replay(replay)) => Outcome::local(self.replay(index, replay)?),
                Some(Item::Beat(beat)) => {
                    let volume = VolumeId(beat.volume);
                    if let Some(known) = self.memory.volumes.get_mut(&volume) {
                        known.digest.compare(volume, beat);
                    }
                    Outcome::local(LocalReply::Done)
                }
                Some(Item::Local(command)) => {
                    Outcome::local(self.local_command(index, time, command)?)
                }
                None => Outcome::local(LocalReply::Invalid(
                    "the item is of a kind that this build does not know".to_owned(),
                )),
            });
        }
        Ok(outcomes)
    }

    /// What this build does not know ends here; what it does is noted, for builds that the state may meet later.
    fn expect_known(&mut self, index: u64, level: u32) -> Result<(), ApplyError> {
        if level <= self.memory.level {
            return Ok(());
        }
        let known = levels::known();
        if level > known {
            return Err(ApplyError::Upgrade {
                index,
                level,
                known,
            });
        }
        self.memory.level = level;
        self.put_local(local::LEVEL, &level.to_be_bytes());
        Ok(())
    }

    fn put_local(&mut self, key: &[u8], value: &[u8]) {
        self.batch.put_cf(self.generation.local(), key, value);
    }

    fn command(
        &mut self,
        index: u64,
        time: UnixNanos,
        command: Cow<'e, v1::Command>,
    ) -> Result<Outcome, ApplyError> {
        let volume = VolumeId(command.volume);
        let Some(known) = self.memory.volumes.get_mut(&volume) else {
            // Never existed, or was destroyed while the command was on its way.
            let reply = v1::Reply {
                error: FsError::Stale.into(),
                ..v1::Reply::default()
            };
            return Ok(Outcome::Other(Box::new(Proposed::Reply(reply))));
        };
        let applied = meta_core::apply(&self.overlay, Stamp { time }, &command)?;
        if applied.position == Position::START {
            return Ok(Outcome::Other(Box::new(Proposed::Reply(applied.reply))));
        }
        // A reader that begins at a promotion must see it: its epoch is not the log's to tell.
        let opens_epoch = matches!(command.op, Some(v1::command::Op::EpochBegin(_)));
        let due = known
            .placed
            .is_none_or(|placed| index >= placed + ENTRIES_PER_PLACE);
        if due && !(opens_epoch && known.record.mirror.is_none()) {
            known.placed = Some(index);
            let place = Place {
                seq: applied.position.seq,
                epoch: applied.position.epoch,
                index,
                time_before: known.digest.time,
                mirrored: known.record.mirror.is_some(),
            };
            self.batch.put_cf(
                self.generation.local(),
                local::place(volume, place.seq),
                place.encode(),
            );
        }
        let sums = &mut self.sums;
        known
            .digest
            .absorb(applied.position, applied.time, &applied.changes, |bucket| {
                sums.insert((volume, bucket));
            });
        // What a mirror's source stored is in the source's bucket; what is written here is in ours.
        let copied = known.record.mirror.is_some() && known.record.second.is_some();
        self.overlay.absorb(&applied.changes);
        if copied {
            self.note_segments(volume, &applied.changes, applied.position)?;
            if let Some(v1::command::Op::Relocate(relocate)) = &command.op {
                self.note_relocated(volume, relocate)?;
            }
        }
        for segment in applied.freed {
            self.free(volume, segment, applied.time, applied.position)?;
        }
        self.items.push(AppliedItem {
            volume,
            session: SessionId(command.session),
            position: applied.position,
            time: applied.time,
            command,
            reply: applied.reply,
            touched: applied.touched,
        });
        Ok(Outcome::Item(self.items.len() - 1))
    }

    fn free(
        &mut self,
        volume: VolumeId,
        segment: SegmentId,
        at: UnixNanos,
        position: Position,
    ) -> Result<(), ApplyError> {
        let elsewhere = match self.is_dual(volume) {
            true => self.freed_before_copied(volume, segment, position)?,
            false => self.in_anothers_bucket(volume),
        };
        if !elsewhere {
            self.queue_deletion(volume, segment, at, position)?;
        }
        Ok(())
    }

    fn queue_deletion(
        &mut self,
        volume: VolumeId,
        segment: SegmentId,
        at: UnixNanos,
        position: Position,
    ) -> Result<(), ApplyError> {
        if self.queued_at(volume, segment)?.is_some() {
            return Ok(());
        }
        self.unqueued.remove(&(volume, segment));
        let local = self.generation.local();
        self.batch.put_cf(
            local,
            local::deletion(volume, at, segment),
            local::encode_freed(position),
        );
        self.batch.put_cf(
            local,
            local::deletion_of(volume, segment),
            at.0.to_be_bytes(),
        );
        self.freed.insert((volume, segment), at);
        if let Some(known) = self.memory.volumes.get_mut(&volume) {
            known.waiting += 1;
        }
        self.queues_changed.insert(volume);
        Ok(())
    }

    /// Since when a segment is in the deletion queue.
    fn queued_at(
        &self,
        volume: VolumeId,
        segment: SegmentId,
    ) -> Result<Option<UnixNanos>, ApplyError> {
        if let Some(at) = self.freed.get(&(volume, segment)) {
            return Ok(Some(*at));
        }
        if self.unqueued.contains(&(volume, segment)) || self.swapped.contains(&volume) {
            return Ok(None);
        }
        let of = local::deletion_of(volume, segment);
        let found = self.generation.db.get_cf(self.generation.local(), of);
        let found = found.map_err(ApplyError::Write)?;
        Ok(found
            .and_then(|bytes| bytes.as_slice().try_into().ok())
            .map(|bytes| UnixNanos(i64::from_be_bytes(bytes))))
    }

    fn local_command(
        &mut self,
        index: u64,
        time: UnixNanos,
        command: &v1::LocalCommand,
    ) -> Result<LocalReply, ApplyError> {
        Ok(match &command.op {
            Some(Op::ClusterInit(init)) => self.cluster_init(init),
            Some(Op::VolumeCreate(create)) => self.volume_create(index, time, create)?,
            Some(Op::VolumeUpdate(update)) => self.volume_update(update),
            Some(Op::VolumeFence(fence)) => self.volume_fence(fence),
            Some(Op::VolumeDestroy(destroy)) => self.volume_destroy(VolumeId(destroy.volume)),
            Some(Op::DeletionsDone(done)) => self.deletions_done(done)?,
            Some(Op::MirrorLoadBegin(begin)) => self.load_begin(begin),
            Some(Op::MirrorLoad(load)) => self.load(load),
            Some(Op::MirrorLoadEnd(end)) => self.load_end(index, end),
            Some(Op::MirrorStop(stop)) => self.mirror_stop(stop),
            Some(Op::VolumeDemote(demote)) => self.demote(index, time, demote)?,
            Some(Op::MirrorPromote(promote)) => self.promote(index, time, promote)?,
            Some(Op::SlotCreate(create)) => self.slot_create(time, create),
            Some(Op::SlotReport(report)) => self.slot_report(time, report),
            Some(Op::SlotChange(change)) => self.slot_change(change),
            Some(Op::SecondBucket(ask)) => self.second_bucket(ask),
            Some(Op::CopiesNeeded(needed)) => self.copies_needed(time, needed)?,
            Some(Op::CopyReport(report)) => self.copy_report(time, report)?,
            None => LocalReply::Invalid("this build does not know the command".to_owned()),
        })
    }

    fn cluster_init(&mut self, init: &v1::ClusterInit) -> LocalReply {
        // The first one counts: a retried init must not change what session ids were made of.
        if let Some(cluster) = self.memory.cluster {
            return LocalReply::Cluster(cluster);
        }
        if init.cluster_id == 0 {
            return LocalReply::Invalid("a cluster's id is not 0".to_owned());
        }
        let cluster = ClusterId(init.cluster_id);
        self.memory.cluster = Some(cluster);
        self.put_local(local::CLUSTER, &cluster.0.to_be_bytes());
        LocalReply::Cluster(cluster)
    }

    fn put_volume(&mut self, record: &v1::Volume) {
        let key = local::volume(VolumeId(record.id));
        self.put_local(&key, &record.encode_to_vec());
        self.volumes_changed = true;
    }

    fn volume_create(
        &mut self,
        index: u64,
        time: UnixNanos,
        create: &v1::VolumeCreate,
    ) -> Result<LocalReply, ApplyError> {
        let mut volumes = self.memory.volumes.iter();
        if let Some((volume, _)) = volumes.find(|(_, known)| known.record.name == create.name) {
            return Ok(LocalReply::VolumeExists(*volume));
        }
        if create.name.is_empty() {
            return Ok(LocalReply::Invalid("a volume needs a name".to_owned()));
        }
        let volume = VolumeId(self.memory.next_volume);
        let record = v1::Volume {
            id: volume.0,
            name: create.name.clone(),
            storage: create.storage.clone(),
            settings: create.settings,
            ..v1::Volume::default()
        };
        let init = volume_init(volume, create);
        let known = Known {
            record: record.clone(),
            digest: Digest::default(),
            waiting: 0,
            placed: None,
            slots: BTreeMap::new(),
            copies: v1::CopyState::default(),
            incoming: None,
            loaded: 0,
            watched: BTreeMap::new(),
        };
        self.memory.volumes.insert(volume, known);
        let outcome = self.command(index, time, Cow::Owned(init))?;
        if let Some(why) = self.init_refused(&outcome) {
            self.memory.volumes.remove(&volume);
            return Ok(LocalReply::Invalid(why));
        }
        self.memory.next_volume += 1;
        let next = self.memory.next_volume.to_be_bytes();
        self.put_local(local::NEXT_VOLUME, &next);
        self.put_volume(&record);
        Ok(LocalReply::VolumeCreated(volume))
    }

    /// Why the core refused the volume's first command, if it did.
    fn init_refused(&mut self, outcome: &Outcome) -> Option<String> {
        let Outcome::Item(item) = outcome else {
            return Some("the volume can't be initialised".to_owned());
        };
        let error = self.items[*item].reply.error();
        if error == FsError::None {
            return None;
        }
        // The refused command moved a head that nobody must ever see.
        let volume = self.items.pop()?.volume;
        self.forget(volume);
        Some(format!("the settings are refused: {error:?}"))
    }

    fn volume_update(&mut self, update: &v1::VolumeUpdate) -> LocalReply {
        let Some(known) = self.memory.volumes.get_mut(&VolumeId(update.volume)) else {
            return LocalReply::NoSuchVolume;
        };
        known.record.storage.clone_from(&update.storage);
        let record = known.record.clone();
        self.put_volume(&record);
        LocalReply::Done
    }

    fn volume_fence(&mut self, fence: &v1::VolumeFence) -> LocalReply {
        let Some(known) = self.memory.volumes.get_mut(&VolumeId(fence.volume)) else {
            return LocalReply::NoSuchVolume;
        };
        if fence.of_source && known.record.mirror.is_none() {
            // It was promoted meanwhile: what fences it was said then.
            return LocalReply::Done;
        }
        known.record.fence.clone_from(&fence.fence);
        let record = known.record.clone();
        self.put_volume(&record);
        LocalReply::Done
    }

    fn volume_destroy(&mut self, volume: VolumeId) -> LocalReply {
        if self.memory.volumes.remove(&volume).is_none() {
            return LocalReply::NoSuchVolume;
        }
        self.forget(volume);
        self.volumes_changed = true;
        LocalReply::Done
    }

    /// Nothing of the volume is to be written; what is stored is removed with the batch.
    fn forget(&mut self, volume: VolumeId) {
        self.destroyed.insert(volume);
        self.sums.retain(|(of, _)| *of != volume);
        self.queues_changed.remove(&volume);
        self.freed.retain(|(of, _), _| *of != volume);
        self.missing.retain(|(of, _), _| *of != volume);
        self.unqueued.retain(|(of, _)| *of != volume);
        self.copies_changed.remove(&volume);
    }

    fn deletions_done(&mut self, done: &v1::DeletionsDone) -> Result<LocalReply, ApplyError> {
        let volume = VolumeId(done.volume);
        if !self.memory.volumes.contains_key(&volume) {
            return Ok(LocalReply::NoSuchVolume);
        }
        let local = self.generation.local();
        let mut removed: BTreeSet<SegmentId> = BTreeSet::new();
        for segment in done.segments.iter().copied().map(SegmentId) {
            let of = local::deletion_of(volume, segment);
            let freed_at = self.queued_at(volume, segment)?;
            self.freed.remove(&(volume, segment));
            self.unqueued.insert((volume, segment));
            // Reported twice, by the lessee of an expired lease and by its successor: counts once.
            let Some(freed_at) = freed_at else {
                continue;
            };
            if removed.insert(segment) {
                self.batch
                    .delete_cf(local, local::deletion(volume, freed_at, segment));
                self.batch.delete_cf(local, of);
            }
        }
        let count = removed.len() as u64;
        if let Some(known) = self.memory.volumes.get_mut(&volume) {
            known.waiting = known.waiting.saturating_sub(count);
        }
        self.queues_changed.insert(volume);
        Ok(LocalReply::DeletionsDone(count))
    }

    fn write(mut self, entries: &[Entry]) -> Result<(Vec<AppliedItem<'e>>, bool), ApplyError> {
        let Some(last) = entries.last() else {
            return Ok((self.items, false));
        };
        let replicated = self.generation.replicated();
        let local = self.generation.local();
        let places = self.generation.halves.places();
        let mut emptied = self.generation.emptied.lock();
        for change in self.overlay.into_changes() {
            if let Some(volume) = change.key.first_chunk() {
                let volume = VolumeId(u32::from_be_bytes(*volume));
                if self.destroyed.contains(&volume) {
                    continue;
                }
            }
            match change.new {
                Some(new) => {
                    if !emptied.is_empty() {
                        emptied.written(&change.key);
                    }
                    self.batch.put_cf(replicated, places.of(&change.key), &new);
                }
                None => self.batch.delete_cf(replicated, places.of(&change.key)),
            }
        }
        if !self.swapped.is_empty() {
            emptied.forget();
        }
        drop(emptied);
        for (volume, bucket) in self.sums {
            if let Some(known) = self.memory.volumes.get(&volume) {
                let sum = known.digest.sums.get(bucket);
                self.batch
                    .put_cf(local, local::sum(volume, bucket), sum.to_le_bytes());
            }
        }
        for volume in self.queues_changed {
            if let Some(known) = self.memory.volumes.get(&volume) {
                let waiting = known.waiting.to_be_bytes();
                self.batch.put_cf(local, local::waiting(volume), waiting);
            }
        }
        for volume in self.copies_changed {
            if let Some(known) = self.memory.volumes.get(&volume) {
                let state = known.copies.encode_to_vec();
                self.batch.put_cf(local, local::copies(volume), state);
            }
        }
        for volume in self.destroyed.iter().copied() {
            for (from, to) in places.both(volume) {
                self.batch.delete_range_cf(replicated, from, to);
            }
            for (from, to) in local::all_of(volume) {
                self.batch.delete_range_cf(local, from, to);
            }
        }
        let applied = wire::log_id_to_wire(last.log_id).encode_to_vec();
        self.batch.put_cf(local, local::APPLIED, applied);
        self.generation
            .db
            .write_opt(self.batch, &without_wal())
            .map_err(ApplyError::Write)?;
        self.generation.halves.set(&self.swapped, &self.destroyed);
        if !self.swapped.is_empty() {
            // Not before: whoever looked where the records are finds them there. After a crash in between it is done when the state
            // is opened.
            let mut left = WriteBatch::default();
            for volume in self.swapped {
                let [(from, to), _] = places.both(volume);
                left.delete_range_cf(replicated, from, to);
            }
            let written = self.generation.db.write_opt(left, &without_wal());
            written.map_err(ApplyError::Write)?;
        }
        self.memory.applied = Some(last.log_id);
        Ok((self.items, self.volumes_changed))
    }
}

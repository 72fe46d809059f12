//! A volume that is a mirror: it is loaded, then entries of the source's changelog are replayed, each once and in order.

use std::borrow::Cow;
use std::collections::BTreeMap;

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Position, UnixNanos, VolumeId};
use heliofs_proto::v1::{self, MirrorState};
use meta_core::records::{HeadRecord, Record};
use meta_core::{Sums, keys};
use prost::Message;

use super::{ApplyError, Group, Outcome};
use crate::proposer::{LocalReply, Proposed};
use crate::store::digests::Digest;
use crate::store::state::{Incoming, Known};
use crate::store::{halves, local};

fn invalid(why: impl Into<String>) -> LocalReply {
    LocalReply::Invalid(why.into())
}

impl<'e> Group<'_, 'e> {
    /// The refusal of a command whose volume is a mirror: it takes no position, since positions are the source's.
    pub(super) fn read_only(&self, command: &v1::Command) -> Option<Outcome> {
        let known = self.memory.volumes.get(&VolumeId(command.volume))?;
        known.record.mirror.as_ref()?;
        let reply = v1::Reply {
            error: FsError::ReadOnly.into(),
            position: Some(known.digest.position.into()),
            ..v1::Reply::default()
        };
        Some(Outcome::Other(Box::new(Proposed::Reply(reply))))
    }

    /// The volume's objects are in a bucket from which another region deletes.
    pub(super) fn in_anothers_bucket(&self, volume: VolumeId) -> bool {
        let known = self.memory.volumes.get(&volume);
        known.is_some_and(|known| known.record.mirror.is_some())
    }

    /// Applies what follows the volume's position; what it has is passed over; a gap stops the mirror.
    pub(super) fn replay(
        &mut self,
        index: u64,
        replay: &'e v1::Replay,
    ) -> Result<LocalReply, ApplyError> {
        let volume = VolumeId(replay.volume);
        if self.swapped.contains(&volume) {
            return Ok(invalid("the volume was loaded in this very entry"));
        }
        for entry in &replay.entries {
            let Some(known) = self.memory.volumes.get(&volume) else {
                return Ok(LocalReply::NoSuchVolume);
            };
            let state = known.record.mirror.as_ref().map(v1::MirrorOf::state);
            if state != Some(MirrorState::Following) {
                return Ok(invalid("the volume is no mirror that follows"));
            }
            let head = known.digest.position;
            let position = entry.position.map(Position::from).unwrap_or_default();
            if position.seq <= head.seq {
                // Proposed twice, by a leader and by its successor.
                continue;
            }
            let Some(command) = &entry.command else {
                let why = format!("entry {position} holds no command");
                return Ok(self.stop_mirror(volume, why));
            };
            if position != meta_core::next_position(head, command) {
                let why = format!("entry {position} came after {head}: entries are missing");
                return Ok(self.stop_mirror(volume, why));
            }
            if command.volume != volume.0 {
                let why = format!("entry {position} is of volume {}", command.volume);
                return Ok(self.stop_mirror(volume, why));
            }
            // Its answer was the source's to give.
            self.command(index, UnixNanos(entry.time), Cow::Borrowed(command))?;
        }
        let Some(known) = self.memory.volumes.get_mut(&volume) else {
            return Ok(LocalReply::NoSuchVolume);
        };
        for beat in &replay.beats {
            known.digest.compare(volume, beat);
        }
        Ok(LocalReply::Replayed(known.digest.position))
    }

    fn stop_mirror(&mut self, volume: VolumeId, why: String) -> LocalReply {
        let Some(known) = self.memory.volumes.get_mut(&volume) else {
            return LocalReply::NoSuchVolume;
        };
        let Some(mirror) = &mut known.record.mirror else {
            return invalid("the volume is no mirror");
        };
        if mirror.state() == MirrorState::Loading {
            return invalid("the volume is being loaded");
        }
        tracing::error!(%volume, why, "the mirror of this volume stops");
        mirror.set_state(MirrorState::Stopped);
        mirror.followed = false;
        mirror.reason.clone_from(&why);
        let record = known.record.clone();
        self.put_volume(&record);
        invalid(why)
    }

    pub(super) fn mirror_stop(&mut self, stop: &v1::MirrorStop) -> LocalReply {
        let volume = VolumeId(stop.volume);
        let known = self.memory.volumes.get(&volume);
        let mirror = known.and_then(|known| known.record.mirror.as_ref());
        let followed = mirror.is_some_and(|it| it.state() == MirrorState::Following || it.followed);
        match self.stop_mirror(volume, stop.reason.clone()) {
            LocalReply::Invalid(why) if why == stop.reason => {}
            other => return other,
        }
        if stop.reload
            && let Some(known) = self.memory.volumes.get_mut(&volume)
            && let Some(mirror) = &mut known.record.mirror
        {
            mirror.reload = true;
            mirror.followed = followed;
            let record = known.record.clone();
            self.put_volume(&record);
        }
        LocalReply::Done
    }

    /// What was handed over is not taken back any more: an undo names the position before.
    fn seal(
        &mut self,
        index: u64,
        time: UnixNanos,
        demote: &v1::VolumeDemote,
    ) -> Result<LocalReply, ApplyError> {
        let volume = VolumeId(demote.volume);
        let Some(known) = self.memory.volumes.get_mut(&volume) else {
            return Ok(LocalReply::NoSuchVolume);
        };
        let position = known.digest.position;
        let at = demote.at.map(Position::from).unwrap_or_default();
        let handed_over = |mirror: &&mut v1::MirrorOf| mirror.was_handed_over();
        let Some(mirror) = known.record.mirror.as_mut().filter(handed_over) else {
            return Ok(invalid("the volume was taken back"));
        };
        let same = mirror.source == demote.successor;
        let other = format!("the volume was handed over to {}", mirror.source);
        if at != position {
            return Ok(match same && mirror.sealed && at < position {
                // Asked twice.
                true => LocalReply::Replayed(position),
                false => invalid(format!("{other} at {position}")),
            });
        }
        if same {
            mirror.sealed = true;
            let record = known.record.clone();
            self.put_volume(&record);
        }
        // Whoever reads the log knows the position and not to whom the volume was handed over: it is taken either way.
        self.command(index, time, Cow::Owned(sealed(volume)))?;
        if !same {
            return Ok(invalid(other));
        }
        let known = self.memory.volumes.get(&volume);
        Ok(LocalReply::Replayed(
            known.map_or(position, |known| known.digest.position),
        ))
    }

    /// No command of the volume takes effect from here on; the answer is the position that it stays at.
    pub(super) fn demote(
        &mut self,
        index: u64,
        time: UnixNanos,
        demote: &v1::VolumeDemote,
    ) -> Result<LocalReply, ApplyError> {
        match demote.seal {
            true => self.seal(index, time, demote),
            false => Ok(self.hand_over(demote)),
        }
    }

    fn hand_over(&mut self, demote: &v1::VolumeDemote) -> LocalReply {
        let volume = VolumeId(demote.volume);
        let Some(known) = self.memory.volumes.get_mut(&volume) else {
            return LocalReply::NoSuchVolume;
        };
        let position = known.digest.position;
        match &known.record.mirror {
            None if demote.undo => return LocalReply::Replayed(position),
            None => {}
            Some(mirror) if demote.undo => {
                let at = demote.at.map(Position::from).unwrap_or_default();
                let same = mirror.source == demote.successor && at == position;
                if !mirror.was_handed_over() || !same {
                    return invalid(format!(
                        "the volume was not handed over to {} at {at}: there is nothing to take back",
                        demote.successor
                    ));
                }
                if mirror.prefix != known.record.name {
                    known.record.prefix.clone_from(&mirror.prefix);
                }
                known.record.mirror = None;
                let record = known.record.clone();
                self.drop_incoming(volume);
                self.put_volume(&record);
                return LocalReply::Replayed(position);
            }
            Some(mirror) if mirror.was_handed_over() && mirror.source == demote.successor => {
                return LocalReply::Replayed(position);
            }
            Some(mirror) if demote.hand_over => {
                let who = match mirror.was_handed_over() {
                    true => "was handed over to",
                    false => "is a mirror of",
                };
                return invalid(format!(
                    "the volume {who} {}/{}: it is not this cluster's to hand over",
                    mirror.source, mirror.volume
                ));
            }
            // It is not written here: that is all that is asked for.
            Some(_) => return LocalReply::Replayed(position),
        }
        let prefix = match known.record.prefix.as_str() {
            "" => known.record.name.clone(),
            prefix => prefix.to_owned(),
        };
        known.record.mirror = Some(v1::MirrorOf {
            source: demote.successor.clone(),
            volume: known.record.name.clone(),
            prefix,
            state: MirrorState::Stopped.into(),
            reason: format!(
                "demoted at {position}: it is written at {}",
                demote.successor
            ),
            handed_over: true,
            // Sessions of the time before are told to come back.
            load: 1,
            ..v1::MirrorOf::default()
        });
        let record = known.record.clone();
        self.put_volume(&record);
        LocalReply::Replayed(position)
    }

    /// The mirror becomes the volume: a new epoch, in which commands take effect.
    pub(super) fn promote(
        &mut self,
        index: u64,
        time: UnixNanos,
        promote: &v1::MirrorPromote,
    ) -> Result<LocalReply, ApplyError> {
        let volume = VolumeId(promote.volume);
        if self.swapped.contains(&volume) {
            return Ok(invalid("the volume was loaded in this very entry"));
        }
        let Some(known) = self.memory.volumes.get_mut(&volume) else {
            return Ok(LocalReply::NoSuchVolume);
        };
        let at = promote.at.map(Position::from).unwrap_or_default();
        let head = known.digest.position;
        // What a changelog reader sees decides alone, so that it can tell whether this took effect.
        if head != at || promote.epoch <= head.epoch.0 {
            return Ok(invalid(format!("the mirror is at {head} and not at {at}")));
        }
        let Some(mirror) = known
            .record
            .mirror
            .take_if(|m| m.state() != MirrorState::Loading)
        else {
            return Ok(invalid("the volume is no mirror, or is being loaded"));
        };
        if mirror.prefix != known.record.name {
            known.record.prefix = mirror.prefix;
        }
        known.record.fence.clone_from(&promote.fence);
        let record = known.record.clone();
        // A copy that is not whole is of a source that is not followed any more.
        self.drop_incoming(volume);
        self.put_volume(&record);
        let begin = v1::Command {
            volume: volume.0,
            op: Some(v1::command::Op::EpochBegin(v1::EpochBegin {
                epoch: promote.epoch,
            })),
            ..v1::Command::default()
        };
        self.command(index, time, Cow::Owned(begin))?;
        let known = self.memory.volumes.get(&volume);
        Ok(LocalReply::Replayed(
            known.map_or(head, |known| known.digest.position),
        ))
    }

    /// From here on parts of a copy may arrive; what is served stays until the copy is whole.
    pub(super) fn load_begin(&mut self, begin: &v1::MirrorLoadBegin) -> LocalReply {
        let volume = VolumeId(begin.volume);
        let Some(mirror) = &begin.mirror else {
            return invalid("a mirror needs a source");
        };
        if volume.0 == 0 || begin.name.is_empty() {
            return invalid("a mirror needs the volume's id and a name");
        }
        if !halves::has_halves(volume) {
            return invalid(format!("volume id {volume} is too large to be mirrored"));
        }
        if self.destroyed.contains(&volume) || self.swapped.contains(&volume) {
            // By the same entry: its records are removed behind everything else that the group writes.
            return invalid("the volume has just been destroyed or loaded: ask again");
        }
        if let Some(other) = self.named_so(begin) {
            return LocalReply::VolumeExists(other);
        }
        let before = self.memory.volumes.get(&volume);
        let load = match before.map(|known| known.record.mirror.as_ref()) {
            None => 1,
            Some(Some(known)) => known.load.max(known.loading) + 1,
            Some(None) => {
                return invalid(format!(
                    "volume {volume} exists in this cluster and is no mirror: a mirrored volume keeps its id, so that this one \
                     would have to be destroyed first"
                ));
            }
        };
        self.drop_incoming(volume);
        let incoming = Incoming {
            record: v1::MirrorIncoming {
                load,
                parts: 0,
                begin: Some(begin.clone()),
            },
            sums: Sums::default(),
        };
        self.put_local(&local::incoming(volume), &incoming.record.encode_to_vec());
        let known = self.memory.volumes.entry(volume).or_insert_with(|| Known {
            record: v1::Volume {
                id: volume.0,
                name: begin.name.clone(),
                storage: begin.storage.clone(),
                settings: begin.settings,
                mirror: Some(v1::MirrorOf {
                    state: MirrorState::Loading.into(),
                    reason: String::new(),
                    load: 0,
                    shared: true,
                    ..mirror.clone()
                }),
                ..v1::Volume::default()
            },
            digest: Digest::default(),
            waiting: 0,
            placed: None,
            slots: BTreeMap::new(),
            copies: v1::CopyState::default(),
            incoming: None,
            loaded: 0,
            watched: BTreeMap::new(),
        });
        known.incoming = Some(incoming);
        if let Some(mirror) = &mut known.record.mirror {
            mirror.loading = load;
        }
        let record = known.record.clone();
        if self.memory.next_volume <= volume.0 {
            self.memory.next_volume = volume.0 + 1;
            let next = self.memory.next_volume.to_be_bytes();
            self.put_local(local::NEXT_VOLUME, &next);
        }
        self.put_volume(&record);
        LocalReply::Load(load)
    }

    /// Another volume that has the name of one that is loaded.
    fn named_so(&self, begin: &v1::MirrorLoadBegin) -> Option<VolumeId> {
        let mut others = self.memory.volumes.iter();
        others
            .find(|(id, known)| id.0 != begin.volume && known.record.name == begin.name)
            .map(|(id, _)| *id)
    }

    /// What has arrived of a copy goes, and so does whatever else lies in the half that is not in use.
    fn drop_incoming(&mut self, volume: VolumeId) {
        let [_, (from, to)] = self.generation.halves.places().both(volume);
        let replicated = self.generation.replicated();
        self.batch.delete_range_cf(replicated, from, to);
        let local = self.generation.local();
        self.batch.delete_cf(local, local::incoming(volume));
        let (from, to) = local::incoming_sums(volume);
        self.batch.delete_range_cf(local, from, to);
        if let Some(known) = self.memory.volumes.get_mut(&volume) {
            known.incoming = None;
        }
    }

    /// The copy of a load that is under way, or why there is none.
    fn loading(&mut self, volume: VolumeId, load: u64) -> Result<&mut Incoming, LocalReply> {
        let known = self.memory.volumes.get_mut(&volume);
        let known = known.ok_or(LocalReply::NoSuchVolume)?;
        let incoming = known.incoming.as_mut();
        incoming
            .filter(|incoming| incoming.record.load == load)
            .ok_or_else(|| invalid(format!("load {load} is not under way")))
    }

    pub(super) fn load(&mut self, load: &v1::MirrorLoad) -> LocalReply {
        let volume = VolumeId(load.volume);
        let incoming = match self.loading(volume, load.load) {
            Ok(incoming) => incoming,
            Err(refusal) => return refusal,
        };
        if load.part != incoming.record.parts {
            let parts = incoming.record.parts;
            return invalid(format!("part {} came instead of {parts}", load.part));
        }
        let (from, to) = keys::volume_range(volume);
        let head = keys::head(volume);
        let fits =
            |record: &v1::StoredRecord| from <= record.key && record.key < to && record.key != head;
        if !load.records.iter().all(fits) {
            return invalid("a record of another volume, or the head, which comes last");
        }
        incoming.record.parts += 1;
        let mut summed = BTreeMap::new();
        for record in &load.records {
            incoming.sums.add(&record.key, &record.value);
            let bucket = meta_core::digest::bucket(&record.key);
            summed.insert(bucket, incoming.sums.get(bucket));
        }
        let record = incoming.record.encode_to_vec();
        // Not `put_volume`: nothing that anybody watches has changed.
        self.put_local(&local::incoming(volume), &record);
        for (bucket, sum) in summed {
            self.put_local(&local::incoming_sum(volume, bucket), &sum.to_le_bytes());
        }
        let places = self.generation.halves.places();
        let replicated = self.generation.replicated();
        for record in &load.records {
            let key = places.beside(&record.key);
            self.batch.put_cf(replicated, key, &record.value);
        }
        LocalReply::Done
    }

    /// The copy takes the place of what was served. The entry stands alone in its group (see [`super::stands_alone`]).
    pub(super) fn load_end(&mut self, index: u64, end: &v1::MirrorLoadEnd) -> LocalReply {
        let volume = VolumeId(end.volume);
        let incoming = match self.loading(volume, end.load) {
            Ok(incoming) => incoming,
            Err(refusal) => return refusal,
        };
        let sums = incoming.sums.clone();
        if end.digest != sums.total().to_le_bytes()[..] {
            return invalid("the records that arrived are not those that were sent");
        }
        let key = keys::head(volume);
        let head = match HeadRecord::decode(&key, &end.head) {
            Ok(head) => head,
            Err(error) => return invalid(format!("the head that arrived: {error}")),
        };
        let begin = incoming.record.begin.clone().unwrap_or_default();
        if let Some(other) = self.named_so(&begin) {
            return LocalReply::VolumeExists(other);
        }
        let Some(before) = self.memory.volumes.remove(&volume) else {
            return LocalReply::NoSuchVolume;
        };
        let record = loaded(&before, &begin, end.load, &head);
        let mut slots = before.slots;
        for slot in slots.values_mut() {
            // Its own mirrors have another history, or other places of it.
            "the volume was loaded anew".clone_into(&mut slot.invalid);
            self.put_local(&local::slot(volume, &slot.name), &slot.encode_to_vec());
        }
        let families = self.generation.local();
        for (from, to) in [
            local::places(volume),
            local::all_pending(volume),
            local::all_missing(volume),
            local::all_deletions(volume),
            local::all_deletions_of(volume),
            local::incoming_sums(volume),
        ] {
            self.batch.delete_range_cf(families, from, to);
        }
        self.batch.delete_cf(families, local::incoming(volume));
        let places = self.generation.halves.places();
        match places.is_upper(&key) {
            true => self.batch.delete_cf(families, local::upper(volume)),
            false => self.put_local(&local::upper(volume), &[]),
        }
        let replicated = self.generation.replicated();
        self.batch
            .put_cf(replicated, places.beside(&key), &end.head);
        let known = Known {
            record: record.clone(),
            digest: Digest::new(head.position, head.time, sums),
            // What waited for deletion may live in the history that was loaded; `gc` finds what does not.
            waiting: 0,
            placed: None,
            slots,
            // What the bucket has is found out again.
            copies: v1::CopyState {
                pending_segments: 0,
                pending_bytes: 0,
                quarantined_segments: 0,
                gaps: Vec::new(),
                ..before.copies
            },
            incoming: None,
            loaded: index,
            watched: BTreeMap::new(),
        };
        self.memory.volumes.insert(volume, known);
        self.swapped.insert(volume);
        self.queues_changed.insert(volume);
        self.copies_changed.insert(volume);
        self.sums
            .extend((0..=u8::MAX).map(|bucket| (volume, bucket)));
        self.put_volume(&record);
        self.walk_after_load(volume);
        LocalReply::Replayed(head.position)
    }
}

/// The command that a final hand-over takes a position with: it opens no epoch, and changes nothing but how far the volume is.
pub fn sealed(volume: VolumeId) -> v1::Command {
    v1::Command {
        volume: volume.0,
        op: Some(v1::command::Op::EpochBegin(v1::EpochBegin { epoch: 0 })),
        ..v1::Command::default()
    }
}

/// The record of a volume of which a copy was loaded.
fn loaded(before: &Known, begin: &v1::MirrorLoadBegin, load: u64, head: &HeadRecord) -> v1::Volume {
    let (storage, second) = buckets(&before.record, begin);
    let was = before.record.mirror.clone().unwrap_or_default();
    let shared = match &begin.storage {
        None => was.shared,
        Some(_) => second.is_none(),
    };
    // What was shown before is a part of what is shown now.
    let at = before.digest.position;
    let goes_on = was.load > 0
        && at <= head.position
        && crate::changelog::other_epoch(&head.epochs, at).is_none();
    v1::Volume {
        id: begin.volume,
        name: begin.name.clone(),
        storage,
        copy_bytes_per_second: before.record.copy_bytes_per_second,
        settings: begin.settings,
        mirror: Some(v1::MirrorOf {
            state: MirrorState::Following.into(),
            reason: String::new(),
            load,
            loading: 0,
            history_since: match goes_on {
                true => was.history_since,
                false => load,
            },
            shared,
            ..begin.mirror.clone().unwrap_or_default()
        }),
        second,
        // What is loaded anew on demand, without a word of the source, keeps what is known.
        fence: match (&begin.storage, was.load) {
            (None, 1..) => before.record.fence.clone(),
            _ => begin.fence.clone(),
        },
        ..v1::Volume::default()
    }
}

/// The bucket of this region and the other one, when a volume is loaded; without a storage of the source they stay as they are. Who has a bucket keeps it, also a source that was
/// demoted and becomes the mirror of its successor, if that writes into another one.
fn buckets(
    before: &v1::Volume,
    begin: &v1::MirrorLoadBegin,
) -> (Option<v1::StorageConfig>, Option<v1::StorageConfig>) {
    let theirs = begin.storage.clone();
    let ours = before.storage.clone();
    if theirs.is_none() {
        // What is loaded says where its objects are.
        return (ours, before.second.clone());
    }
    let uuid = |storage: &Option<v1::StorageConfig>| {
        storage
            .as_ref()
            .map(|storage| storage.uuid.clone())
            .unwrap_or_default()
    };
    let shared = before.mirror.as_ref().is_some_and(|mirror| mirror.shared);
    if shared || ours.is_none() || uuid(&ours) == uuid(&theirs) {
        (theirs, None)
    } else {
        (ours, theirs)
    }
}

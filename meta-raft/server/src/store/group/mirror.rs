//! A volume that is a mirror: it is loaded, then entries of the source's changelog are replayed, each once and in order.

use std::borrow::Cow;
use std::collections::BTreeMap;

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Position, UnixNanos, VolumeId};
use heliofs_proto::v1::{self, MirrorState};
use meta_core::records::{HeadRecord, Record};
use meta_core::{Change, keys};

use super::{ApplyError, Group, Outcome};
use crate::proposer::{LocalReply, Proposed};
use crate::store::digests::Digest;
use crate::store::state::Known;

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
        mirror.reason.clone_from(&why);
        let record = known.record.clone();
        self.put_volume(&record);
        invalid(why)
    }

    pub(super) fn mirror_stop(&mut self, stop: &v1::MirrorStop) -> LocalReply {
        let volume = VolumeId(stop.volume);
        match self.stop_mirror(volume, stop.reason.clone()) {
            LocalReply::Invalid(why) if why == stop.reason => {}
            other => return other,
        }
        if stop.reload
            && let Some(known) = self.memory.volumes.get_mut(&volume)
            && let Some(mirror) = &mut known.record.mirror
        {
            mirror.reload = true;
            let record = known.record.clone();
            self.put_volume(&record);
        }
        LocalReply::Done
    }

    /// No command of the volume takes effect from here on; the answer is the position that it stays at.
    pub(super) fn demote(&mut self, demote: &v1::VolumeDemote) -> LocalReply {
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

    /// The entry stands alone in its group (see [`super::stands_alone`]).
    pub(super) fn load_begin(&mut self, begin: &v1::MirrorLoadBegin) -> LocalReply {
        let volume = VolumeId(begin.volume);
        let Some(mirror) = &begin.mirror else {
            return invalid("a mirror needs a source");
        };
        if volume.0 == 0 || begin.name.is_empty() {
            return invalid("a mirror needs the volume's id and a name");
        }
        let mut others = self.memory.volumes.iter();
        if let Some((other, _)) =
            others.find(|(id, known)| **id != volume && known.record.name == begin.name)
        {
            return LocalReply::VolumeExists(*other);
        }
        let before = self.memory.volumes.get(&volume);
        let load = match before.map(|known| known.record.mirror.as_ref()) {
            None => 1,
            Some(Some(known)) => known.load + 1,
            Some(None) => {
                return invalid(format!(
                    "volume {volume} exists in this cluster and is no mirror: a mirrored volume keeps its id, so that this one \
                     would have to be destroyed first"
                ));
            }
        };
        let (storage, second) = buckets(before.map(|known| &known.record), begin);
        let shared = match (&begin.storage, before) {
            (None, Some(known)) => known.record.mirror.as_ref().is_some_and(|it| it.shared),
            _ => second.is_none(),
        };
        let record = v1::Volume {
            id: volume.0,
            name: begin.name.clone(),
            storage,
            copy_bytes_per_second: before.map_or(0, |known| known.record.copy_bytes_per_second),
            settings: begin.settings,
            mirror: Some(v1::MirrorOf {
                state: MirrorState::Loading.into(),
                reason: String::new(),
                load,
                parts: 0,
                shared,
                ..mirror.clone()
            }),
            second,
            // What is loaded anew on demand, without a word of the source, keeps what is known.
            fence: match (&begin.storage, before) {
                (None, Some(known)) => known.record.fence.clone(),
                _ => begin.fence.clone(),
            },
            ..v1::Volume::default()
        };
        let known = Known {
            record: record.clone(),
            digest: Digest::default(),
            // What waited for deletion may live in the history that is loaded; `gc` finds what does not.
            waiting: 0,
            placed: None,
            // Its own mirrors have another history, or other places of it.
            slots: before.map_or_else(BTreeMap::new, |known| {
                let mut slots = known.slots.clone();
                for slot in slots.values_mut() {
                    "the volume was loaded anew".clone_into(&mut slot.invalid);
                }
                slots
            }),
            // What the bucket has is found out again when the records are there.
            copies: before.map_or_else(v1::CopyState::default, |known| v1::CopyState {
                pending_segments: 0,
                pending_bytes: 0,
                quarantined_segments: 0,
                gaps: Vec::new(),
                ..known.copies.clone()
            }),
            watched: BTreeMap::new(),
        };
        let slots: Vec<v1::MirrorSlot> = known.slots.values().cloned().collect();
        self.memory.volumes.insert(volume, known);
        for slot in &slots {
            self.put_local(
                &crate::store::local::slot(volume, &slot.name),
                &prost::Message::encode_to_vec(slot),
            );
        }
        self.wiped.insert(volume);
        self.queues_changed.insert(volume);
        self.copies_changed.insert(volume);
        self.sums.retain(|(of, _)| *of != volume);
        if self.memory.next_volume <= volume.0 {
            self.memory.next_volume = volume.0 + 1;
            let next = self.memory.next_volume.to_be_bytes();
            self.put_local(crate::store::local::NEXT_VOLUME, &next);
        }
        self.put_volume(&record);
        LocalReply::Load(load)
    }

    /// The mirror of a load that is under way, or why there is none.
    fn loading(&mut self, volume: VolumeId, load: u64) -> Result<&mut Known, LocalReply> {
        let known = self.memory.volumes.get_mut(&volume);
        let known = known.ok_or(LocalReply::NoSuchVolume)?;
        let mirror = known.record.mirror.as_ref();
        if mirror.is_some_and(|m| m.state() == MirrorState::Loading && m.load == load) {
            Ok(known)
        } else {
            Err(invalid(format!("load {load} is not under way")))
        }
    }

    pub(super) fn load(&mut self, load: &v1::MirrorLoad) -> LocalReply {
        let volume = VolumeId(load.volume);
        let known = match self.loading(volume, load.load) {
            Ok(known) => known,
            Err(refusal) => return refusal,
        };
        let mirror = known.record.mirror.get_or_insert_default();
        if load.part != mirror.parts {
            let why = format!("part {} came instead of {}", load.part, mirror.parts);
            return invalid(why);
        }
        let (from, to) = keys::volume_range(volume);
        let head = keys::head(volume);
        let fits =
            |record: &v1::StoredRecord| from <= record.key && record.key < to && record.key != head;
        if !load.records.iter().all(fits) {
            return invalid("a record of another volume, or the head, which comes last");
        }
        mirror.parts += 1;
        let record = known.record.clone();
        let changes: Vec<Change> = load
            .records
            .iter()
            .map(|record| Change {
                key: Bytes::clone(&record.key),
                old: None,
                new: Some(Bytes::clone(&record.value)),
            })
            .collect();
        let (position, time) = (known.digest.position, known.digest.time);
        let mut summed = Vec::with_capacity(changes.len());
        known.digest.absorb(position, time, &changes, |bucket| {
            summed.push((volume, bucket));
        });
        self.sums.extend(summed);
        self.overlay.absorb(&changes);
        // Not `put_volume`: nothing that anybody watches has changed.
        self.put_local(
            &crate::store::local::volume(volume),
            &prost::Message::encode_to_vec(&record),
        );
        LocalReply::Done
    }

    pub(super) fn load_end(&mut self, end: &v1::MirrorLoadEnd) -> LocalReply {
        let volume = VolumeId(end.volume);
        let known = match self.loading(volume, end.load) {
            Ok(known) => known,
            Err(refusal) => return refusal,
        };
        let mine = known.digest.total().to_le_bytes();
        if end.digest != mine[..] {
            return invalid("the records that arrived are not those that were sent");
        }
        let key = keys::head(volume);
        let head = match HeadRecord::decode(&key, &end.head) {
            Ok(head) => head,
            Err(error) => return invalid(format!("the head that arrived: {error}")),
        };
        let sums = known.digest.sums.clone();
        known.digest = Digest::new(head.position, head.time, sums);
        let mirror = known.record.mirror.get_or_insert_default();
        mirror.set_state(MirrorState::Following);
        let record = known.record.clone();
        self.overlay.absorb(&[Change {
            key,
            old: None,
            new: Some(end.head.clone()),
        }]);
        self.put_volume(&record);
        self.walk_after_load(volume);
        LocalReply::Replayed(head.position)
    }
}

/// The bucket of this region and the other one, when a volume is loaded; without a storage of the source they stay as they are. Who has a bucket keeps it, also a source that was
/// demoted and becomes the mirror of its successor, if that writes into another one.
fn buckets(
    before: Option<&v1::Volume>,
    begin: &v1::MirrorLoadBegin,
) -> (Option<v1::StorageConfig>, Option<v1::StorageConfig>) {
    let theirs = begin.storage.clone();
    let Some(before) = before else {
        return (theirs, None);
    };
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

//! Slots: what a source keeps for mirrors of its volumes.

use heliofs_proto::ids::{Position, UnixNanos, VolumeId};
use heliofs_proto::v1::{self, slot_change::Change};
use prost::Message;

use super::Group;
use crate::proposer::LocalReply;
use crate::store::local;

/// Log that is kept for a mirror at most, if nobody said how much.
const LOG_BYTES_MAX: u64 = 1 << 30;

impl Group<'_, '_> {
    fn put_slot(&mut self, slot: &v1::MirrorSlot) {
        let volume = VolumeId(slot.volume);
        self.put_local(&local::slot(volume, &slot.name), &slot.encode_to_vec());
        if let Some(known) = self.memory.volumes.get_mut(&volume) {
            known.slots.insert(slot.name.clone(), slot.clone());
        }
    }

    /// From here on log and segments are kept. One that exists stays as it is, unless it is to begin anew; it then keeps
    /// its cap if none is named.
    pub(super) fn slot_create(&mut self, time: UnixNanos, create: &v1::SlotCreate) -> LocalReply {
        let Some(asked) = &create.slot else {
            return LocalReply::Invalid("a slot needs a name".to_owned());
        };
        let Some(known) = self.memory.volumes.get(&VolumeId(asked.volume)) else {
            return LocalReply::NoSuchVolume;
        };
        let before = known.slots.get(&asked.name);
        if let Some(before) = before
            && !create.reset
        {
            return LocalReply::Slot(Box::new(before.clone()), false);
        }
        let now = Some(v1::Position::from(known.digest.position));
        let slot = v1::MirrorSlot {
            applied: now,
            complete: now,
            oldest: now,
            paused: before.is_some_and(|before| before.paused),
            log_bytes_max: match (asked.log_bytes_max, before) {
                (0, Some(before)) => before.log_bytes_max,
                (0, None) => LOG_BYTES_MAX,
                (bytes, _) => bytes,
            },
            invalid: String::new(),
            created: time.0,
            reported: time.0,
            ..asked.clone()
        };
        self.put_slot(&slot);
        LocalReply::Slot(Box::new(slot), true)
    }

    /// A mirror says how far it is. Positions never go back: a report may arrive late.
    pub(super) fn slot_report(&mut self, time: UnixNanos, report: &v1::SlotReport) -> LocalReply {
        let Some(known) = self.memory.volumes.get(&VolumeId(report.volume)) else {
            return LocalReply::NoSuchVolume;
        };
        let Some(mut slot) = known.slots.get(&report.name).cloned() else {
            return LocalReply::NoSuchSlot;
        };
        let later = |old: &mut Option<v1::Position>, new: Option<v1::Position>| {
            let latest = old.map(Position::from).max(new.map(Position::from));
            *old = latest.map(Into::into);
        };
        later(&mut slot.applied, report.applied);
        later(&mut slot.complete, report.complete);
        later(&mut slot.oldest, report.oldest);
        slot.reported = slot.reported.max(time.0);
        slot.cluster_id = report.cluster_id;
        self.put_slot(&slot);
        LocalReply::Slot(Box::new(slot), false)
    }

    pub(super) fn slot_change(&mut self, change: &v1::SlotChange) -> LocalReply {
        let volume = VolumeId(change.volume);
        let Some(known) = self.memory.volumes.get_mut(&volume) else {
            return LocalReply::NoSuchVolume;
        };
        let Some(mut slot) = known.slots.get(&change.name).cloned() else {
            return LocalReply::NoSuchSlot;
        };
        match &change.change {
            Some(Change::Pause(pause)) => slot.paused = *pause,
            Some(Change::Invalidate(why)) => {
                if slot.invalid.is_empty() {
                    tracing::warn!(%volume, slot = slot.name, why, "a mirror's slot is no longer kept");
                    slot.invalid.clone_from(why);
                }
            }
            Some(Change::Delete(_)) => {
                known.slots.remove(&change.name);
                let key = local::slot(volume, &change.name);
                self.batch.delete_cf(self.generation.local(), key);
                return LocalReply::Done;
            }
            None => {
                return LocalReply::Invalid("this build does not know the change".to_owned());
            }
        }
        self.put_slot(&slot);
        LocalReply::Slot(Box::new(slot), false)
    }
}

//! What the state knows of mirrors: slots of the volumes that have some, and which volumes are mirrors themselves.

use heliofs_proto::ids::{Position, VolumeId};
use heliofs_proto::v1;
use meta_core::{Corruption, Sums, View, keys};

use super::local::Place;
use super::state::State;

/// Records read at once while a volume is copied.
const PAGE: usize = 1024;

impl State {
    /// What makes the volume a mirror; `None`: it is none, or does not exist.
    pub fn mirror(&self, volume: VolumeId) -> Option<v1::MirrorOf> {
        self.memory().volumes.get(&volume)?.record.mirror.clone()
    }

    /// Whether the volume is a mirror: its history comes from elsewhere.
    pub fn is_mirror(&self, volume: VolumeId) -> bool {
        let memory = self.memory();
        let known = memory.volumes.get(&volume);
        known.is_some_and(|known| known.record.mirror.is_some())
    }

    /// The log entry at which a copy last took the place of the volume's records, or, if this is not known, the one that this node
    /// had applied when it started; 0: none did.
    pub fn loaded(&self, volume: VolumeId) -> u64 {
        let memory = self.memory();
        memory.volumes.get(&volume).map_or(0, |known| known.loaded)
    }

    /// The slots of a volume, by name.
    pub fn slots(&self, volume: VolumeId) -> Vec<v1::MirrorSlot> {
        let memory = self.memory();
        let known = memory.volumes.get(&volume);
        known.map_or_else(Vec::new, |known| known.slots.values().cloned().collect())
    }

    /// The oldest position that a mirror's readers may use; `None`: no mirror keeps anything.
    pub fn slots_horizon(&self, volume: VolumeId) -> Option<Position> {
        let memory = self.memory();
        let slots = memory.volumes.get(&volume)?.slots.values();
        slots
            .filter(|slot| slot.invalid.is_empty())
            .map(|slot| slot.oldest.map(Position::from).unwrap_or_default())
            .min()
    }

    /// The first log entry that a slot still needs; `None`: it has everything that was applied here.
    pub fn slot_index(&self, slot: &v1::MirrorSlot) -> std::io::Result<Option<u64>> {
        let volume = VolumeId(slot.volume);
        let oldest = slot.oldest.map(Position::from).unwrap_or_default();
        if self
            .head(volume)
            .is_none_or(|(head, _)| oldest.seq >= head.seq)
        {
            return Ok(None);
        }
        let place = self.place(volume, oldest.seq + 1)?;
        Ok(place.map(|place| place.index))
    }

    /// The first log entry that some slot still needs.
    pub fn slots_index(&self) -> std::io::Result<Option<u64>> {
        let slots: Vec<v1::MirrorSlot> = {
            let memory = self.memory();
            let slots = memory
                .volumes
                .values()
                .flat_map(|known| known.slots.values());
            slots
                .filter(|slot| slot.invalid.is_empty())
                .cloned()
                .collect()
        };
        let mut first = None;
        for slot in &slots {
            let index = self.slot_index(slot)?;
            first = [first, index].into_iter().flatten().min();
        }
        Ok(first)
    }

    /// Where the next command of a volume will be at the earliest: for readers who have everything.
    pub fn next_place(&self, volume: VolumeId) -> Option<Place> {
        let memory = self.memory();
        let known = memory.volumes.get(&volume)?;
        let digest = &known.digest;
        let applied = memory.applied?;
        Some(Place {
            seq: digest.position.seq + 1,
            epoch: digest.position.epoch,
            index: applied.index + 1,
            time_before: digest.time,
            mirrored: known.record.mirror.is_some(),
        })
    }

    /// Hands all records of a volume at one moment to `send`, a page at a time, the head left out; returns the head, the sums of
    /// what was sent and how many that were. `begin` is told the position first. Blocks; ends early when either says so.
    ///
    /// Errors: records that can't be read, or no such volume (also while it is being loaded).
    pub fn copy(
        &self,
        volume: VolumeId,
        begin: impl FnOnce(Position) -> bool,
        mut send: impl FnMut(Vec<v1::StoredRecord>) -> bool,
    ) -> Result<Option<Copied>, Corruption> {
        self.snapshot_view(|view| {
            let head_key = keys::head(volume);
            let Some(head) = view.get(&head_key)? else {
                return Err(Corruption::Contradiction(format!(
                    "volume {volume} has no head"
                )));
            };
            let position =
                meta_core::query::head(view, volume)?.map_or(Position::START, |head| head.position);
            if !begin(position) {
                return Ok(None);
            }
            let mut sums = Sums::default();
            let mut records = 0;
            let (mut from, to) = keys::volume_range(volume);
            loop {
                let page = view.scan(&from, &to, PAGE)?;
                let Some((last, _)) = page.last() else { break };
                from = keys::after(last);
                let mut batch = Vec::with_capacity(page.len());
                for (key, value) in page {
                    if key == head_key {
                        continue;
                    }
                    sums.add(&key, &value);
                    batch.push(v1::StoredRecord { key, value });
                }
                records += batch.len() as u64;
                if !send(batch) {
                    return Ok(None);
                }
            }
            Ok(Some(Copied {
                head,
                digest: sums.total(),
                records,
            }))
        })
    }
}

/// What a copy came to.
pub struct Copied {
    /// The head record.
    pub head: bytes::Bytes,
    /// The sum of the digest sums of all records.
    pub digest: u128,
    /// How many records were sent.
    pub records: u64,
}

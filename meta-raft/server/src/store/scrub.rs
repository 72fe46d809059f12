//! Recomputes a volume's digest sums from its records and compares them with the sums that were kept as changes were applied:
//! records that rotted at rest differ.

use heliofs_proto::ids::{Position, VolumeId};
use heliofs_proto::v1;
use meta_core::{Corruption, Sums, View, keys, query};

use super::state::State;
use super::view::SnapshotView;

/// Records read at once.
const PAGE: usize = 1024;

/// What a pass over a volume's records came to.
pub struct Scrubbed {
    /// The position that the records are of.
    pub position: Position,
    /// The sums of the records.
    pub sums: Sums,
    /// How many records were read.
    pub records: u64,
    /// Sums, of 256, that are not those that were kept.
    pub differing: Vec<u8>,
    /// Which load of a mirrored volume the records are of.
    load: u64,
}

/// Which load of a mirrored volume is served.
fn load_of(record: &v1::Volume) -> u64 {
    record.mirror.as_ref().map_or(0, |mirror| mirror.load)
}

impl State {
    /// Reads all records of a volume as they are at one moment. `pace` is told how many were read since it was last called; the
    /// pass ends early, with `None`, when it says `false` or there is no such volume. Blocks.
    ///
    /// Errors: a record can't be read.
    pub fn scrub(
        &self,
        volume: VolumeId,
        mut pace: impl FnMut(usize) -> bool,
    ) -> Result<Option<Scrubbed>, Corruption> {
        let generation;
        let (view, kept, load) = {
            // Groups are applied, and received states switched to, under this lock: sums and records are of one moment.
            let memory = self.memory();
            generation = self.generation();
            let Some(known) = memory.volumes.get(&volume) else {
                return Ok(None);
            };
            let sums = known.digest.sums.clone();
            (SnapshotView::new(&generation), sums, load_of(&known.record))
        };
        let mut sums = Sums::default();
        let mut records = 0;
        let (mut from, to) = keys::volume_range(volume);
        loop {
            let page = view.scan(&from, &to, PAGE)?;
            for (key, value) in &page {
                sums.add(key, value);
            }
            records += page.len() as u64;
            match page.last() {
                Some((key, _)) if page.len() == PAGE => from = keys::after(key),
                _ => break,
            }
            if !pace(page.len()) {
                return Ok(None);
            }
        }
        let head = query::head(&view, volume)?;
        Ok(Some(Scrubbed {
            position: head.map_or(Position::START, |head| head.position),
            differing: (0..=u8::MAX)
                .filter(|bucket| sums.get(*bucket) != kept.get(*bucket))
                .collect(),
            sums,
            records,
            load,
        }))
    }

    /// A scrub found that this node's records of a volume are not what they should be.
    pub fn note_rot(&self, volume: VolumeId, scrubbed: &Scrubbed) {
        let sums = u32::try_from(scrubbed.differing.len()).unwrap_or(u32::MAX);
        if let Some(known) = self.memory().volumes.get_mut(&volume)
            // What was wrong may have been replaced meanwhile.
            && load_of(&known.record) == scrubbed.load
        {
            known.digest.diverged.get_or_insert(scrubbed.position);
            known.digest.rotted = known.digest.rotted.max(sums);
        }
    }

    /// What is known to be wrong with this node's records.
    pub fn rot(&self) -> Vec<v1::Rot> {
        let memory = self.memory();
        let wrong = memory.volumes.iter().filter_map(|(volume, known)| {
            Some(v1::Rot {
                volume: volume.0,
                name: known.record.name.clone(),
                position: Some(known.digest.diverged?.into()),
                records_min: known.digest.rotted,
            })
        });
        wrong.collect()
    }
}

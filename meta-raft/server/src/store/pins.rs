//! Records of a volume held as they were at one position, for readers that want what the region's own bucket has all of.

use std::sync::Arc;

use heliofs_proto::ids::{Position, VolumeId};
use self_cell::self_cell;

use super::state::{Generation, State};
use super::view::SnapshotView;

self_cell!(
    /// A snapshot, and the database that it is of.
    struct Held {
        owner: Arc<Generation>,
        #[covariant]
        dependent: SnapshotView,
    }
);

/// The records of one volume at one position.
pub struct Pin {
    held: Held,
    /// Of the volume.
    pub position: Position,
}

impl std::fmt::Debug for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pin({})", self.position)
    }
}

impl Pin {
    /// The records.
    pub fn view(&self) -> &SnapshotView<'_> {
        self.held.borrow_dependent()
    }
}

/// Whether the region's bucket has everything that a pinned position refers to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Completeness {
    /// It has.
    Complete,
    /// Something is to be copied.
    Lacking,
    /// Something was removed before it was copied, or nobody watches the position any more.
    Never,
}

impl State {
    /// Holds the records as they are now, and watches from now on whether all that they refer to is copied. `None`: the volume
    /// has one bucket, or is at `known`.
    pub fn pin(&self, volume: VolumeId, known: Option<Position>) -> Option<Pin> {
        // Groups are applied, and received states switched to, under this lock.
        let mut memory = self.memory();
        let of = memory.volumes.get_mut(&volume)?;
        let position = of.digest.position;
        of.record.second.as_ref()?;
        if known == Some(position) {
            return None;
        }
        of.watched.insert(position, true);
        let held = Held::new(self.generation(), |generation| {
            SnapshotView::new(generation)
        });
        Some(Pin { held, position })
    }

    /// Whether all that a pinned position refers to is in the region's bucket.
    pub fn completeness(
        &self,
        volume: VolumeId,
        position: Position,
    ) -> std::io::Result<Completeness> {
        // The oldest first: what is freed afterwards is noted with the position.
        let oldest = self.pending(volume, 1)?.first().map(|(since, _)| *since);
        let memory = self.memory();
        let Some(known) = memory.volumes.get(&volume) else {
            return Ok(Completeness::Never);
        };
        let copies = &known.copies;
        Ok(match known.watched.get(&position) {
            None | Some(false) => Completeness::Never,
            Some(true) if copies.walk != 0 && copies.first_walk => Completeness::Lacking,
            Some(true) if oldest.is_some_and(|since| since <= position) => Completeness::Lacking,
            Some(true) => Completeness::Complete,
        })
    }

    /// Nobody asks for this position any more.
    pub fn unwatch(&self, volume: VolumeId, position: Position) {
        if let Some(known) = self.memory().volumes.get_mut(&volume) {
            known.watched.remove(&position);
        }
    }
}

//! Records of a volume held as they were at one position, for readers that want what the region's own bucket has all of.
//!
//! All nodes of a cluster hold the same positions, those at which an entry of the log says so: which of them is complete follows
//! from the log, too. So whoever leads next shows nothing older than what was shown before.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use heliofs_proto::ids::{Position, VolumeId};
use heliofs_proto::v1;
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
    /// Which load of a mirror it is of; 0: it is none.
    load: u64,
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

/// Positions of one volume that wait to be complete. When copying is far behind, the newest is as old as the oldest took to be
/// copied.
const WAITING_MAX: usize = 8;

/// What is held of one volume.
#[derive(Default)]
struct Line {
    /// In order of their positions.
    waiting: VecDeque<Pin>,
    /// The newest that was found complete.
    complete: Option<Arc<Pin>>,
}

/// What is held of all volumes.
#[derive(Default)]
pub(super) struct Pins {
    lines: BTreeMap<VolumeId, Line>,
}

/// Whether the region's bucket has everything that a pinned position refers to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Completeness {
    /// It has.
    Complete,
    /// Something is to be copied.
    Lacking,
    /// Something was removed before it was copied, or nobody watches the position any more.
    Never,
}

impl State {
    /// Holds the records as they are now, and watches from now on whether all that they refer to is copied. `None`: the volume
    /// has one bucket, is being loaded, or is at `known`.
    fn pin(&self, volume: VolumeId, known: Option<Position>) -> Option<Pin> {
        // Groups are applied, and received states switched to, under this lock.
        let mut memory = self.memory();
        let of = memory.volumes.get_mut(&volume)?;
        let position = of.digest.position;
        of.record.second.as_ref()?;
        let mirror = of.record.mirror.as_ref();
        if mirror.is_some_and(|mirror| mirror.state() == v1::MirrorState::Loading) {
            return None;
        }
        if known >= Some(position) {
            return None;
        }
        let mirror_load = mirror.map_or(0, |mirror| mirror.load);
        of.watched.insert(position, true);
        let held = Held::new(self.generation(), |generation| {
            SnapshotView::new(generation)
        });
        Some(Pin {
            held,
            position,
            load: mirror_load,
        })
    }

    /// Whether all that a pinned position refers to is in the region's bucket.
    fn completeness(&self, volume: VolumeId, position: Position) -> std::io::Result<Completeness> {
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
    fn unwatch(&self, volume: VolumeId, position: Position) {
        if let Some(known) = self.memory().volumes.get_mut(&volume) {
            known.watched.remove(&position);
        }
    }

    /// Holds the records as they are now: the log says so. For the apply task, between two groups.
    pub(crate) fn hold_pin(&self, volume: VolumeId) -> std::io::Result<()> {
        let waiting = |pins: &Pins| {
            let line = pins.lines.get(&volume);
            let newest = line.and_then(|line| line.waiting.back().or(line.complete.as_deref()));
            let newest = newest.map(|pin| pin.position);
            (line.map_or(0, |line| line.waiting.len()), newest)
        };
        let (mut count, mut newest) = waiting(&self.pins());
        if count >= 2 * WAITING_MAX {
            self.advance_pins(volume)?;
            (count, newest) = waiting(&self.pins());
        }
        if count >= 2 * WAITING_MAX {
            // The leader would have waited. Without what it showed, a later position must be complete before anything is.
            self.drop_pins(volume);
            newest = None;
        }
        if let Some(pin) = self.pin(volume, newest) {
            let mut pins = self.pins();
            pins.lines.entry(volume).or_default().waiting.push_back(pin);
        }
        Ok(())
    }

    /// Whether a leader should have another position held: there is a newer one, and not too many wait.
    pub fn wants_pin(&self, volume: VolumeId) -> bool {
        let head = self.head(volume).map(|(head, _)| head);
        let pins = self.pins();
        let Some(line) = pins.lines.get(&volume) else {
            return head.is_some();
        };
        let newest = line.waiting.back().or(line.complete.as_deref());
        line.waiting.len() < WAITING_MAX && newest.map(|pin| pin.position) < head
    }

    /// Lets go of what is not needed any more; the newest position that is complete.
    pub fn advance_pins(&self, volume: VolumeId) -> std::io::Result<Option<Arc<Pin>>> {
        // The load of the records, and the oldest one whose positions are of the same history.
        let loads = {
            let memory = self.memory();
            let of = memory.volumes.get(&volume);
            of.filter(|of| of.record.second.is_some()).map(|of| {
                let mirror = of.record.mirror.as_ref();
                mirror.map_or((0, 0), |mirror| (mirror.load, mirror.history_since))
            })
        };
        let mut gone = Vec::new();
        let mut pins = self.pins();
        let Some(line) = pins.lines.get_mut(&volume) else {
            return Ok(None);
        };
        let load = loads.map(|(load, _)| load);
        // Of another history, or of a volume that has one bucket.
        line.complete.take_if(|pin| {
            !loads.is_some_and(|(load, since)| since <= pin.load && pin.load <= load)
        });
        while let Some(oldest) = line.waiting.front() {
            let found = match Some(oldest.load) == load {
                true => self.completeness(volume, oldest.position)?,
                false => Completeness::Never,
            };
            if found == Completeness::Lacking {
                break;
            }
            let Some(pin) = line.waiting.pop_front() else {
                break;
            };
            gone.push(pin.position);
            if found == Completeness::Complete {
                line.complete = Some(Arc::new(pin));
            }
        }
        let complete = line.complete.clone();
        drop(pins);
        for position in gone {
            self.unwatch(volume, position);
        }
        Ok(complete)
    }

    /// The volumes of which something is held.
    pub(crate) fn pinned_volumes(&self) -> Vec<VolumeId> {
        self.pins().lines.keys().copied().collect()
    }

    fn drop_pins(&self, volume: VolumeId) {
        let line = self.pins().lines.remove(&volume);
        for pin in line.into_iter().flat_map(|line| line.waiting) {
            self.unwatch(volume, pin.position);
        }
    }

    /// What is held on this node says nothing any more: it has taken over another's state.
    pub(super) fn drop_all_pins(&self) {
        self.pins().lines.clear();
    }
}

//! Mirrors that are kept at a position for a moment, so that a copy can be opened at just that one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use heliofs_proto::ids::{Position, VolumeId};
use parking_lot::Mutex;

/// A hold that nobody ends is over after this time: the mirror must not stay behind because of somebody who is gone.
const HOLD_MAX: Duration = Duration::from_secs(5);

/// The holds of this node's followers; cheap to clone.
#[derive(Clone, Default)]
pub struct ReplayHolds {
    shared: Arc<Mutex<Holds>>,
}

#[derive(Default)]
struct Holds {
    last: u64,
    open: BTreeMap<u64, Hold>,
}

struct Hold {
    volume: VolumeId,
    limit: Position,
    until: Instant,
}

/// A hold; over when it is dropped.
pub struct Held {
    holds: ReplayHolds,
    id: u64,
    until: Instant,
}

impl Held {
    /// What it is called.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// When it is over, whatever happens.
    pub fn until(&self) -> Instant {
        self.until
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.holds.end(self.id);
    }
}

impl ReplayHolds {
    /// From now on nothing of the volume is proposed.
    pub fn hold(&self, volume: VolumeId) -> Held {
        let until = Instant::now() + HOLD_MAX;
        let mut holds = self.shared.lock();
        holds.last += 1;
        let id = holds.last;
        let hold = Hold {
            volume,
            limit: Position::START,
            until,
        };
        holds.open.insert(id, hold);
        Held {
            holds: self.clone(),
            id,
            until,
        }
    }

    /// The volume may come up to `limit`. When the hold is over; `None`: it is already.
    pub fn advance(&self, id: u64, volume: VolumeId, limit: Position) -> Option<Instant> {
        let mut holds = self.shared.lock();
        let hold = holds.open.get_mut(&id)?;
        if hold.volume != volume || hold.until <= Instant::now() {
            return None;
        }
        hold.limit = limit;
        Some(hold.until)
    }

    /// It is over.
    pub fn end(&self, id: u64) {
        self.shared.lock().open.remove(&id);
    }

    /// The last position of the volume that may be proposed now; `None`: any.
    pub fn limit(&self, volume: VolumeId) -> Option<Position> {
        let now = Instant::now();
        let holds = self.shared.lock();
        let open = holds.open.values();
        open.filter(|hold| hold.volume == volume && hold.until > now)
            .map(|hold| hold.limit)
            .min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_of_several_holds_counts_and_each_ends() {
        let holds = ReplayHolds::default();
        let (volume, other) = (VolumeId(1), VolumeId(2));
        let at = |seq| Position {
            seq,
            ..Position::START
        };
        assert_eq!(holds.limit(volume), None);
        let (one, two) = (holds.hold(volume), holds.hold(volume));
        assert_eq!(holds.limit(volume), Some(Position::START));
        assert_eq!(holds.limit(other), None);
        assert!(holds.advance(one.id(), other, at(9)).is_none());
        assert_eq!(holds.advance(one.id(), volume, at(9)), Some(one.until()));
        assert_eq!(holds.limit(volume), Some(Position::START));
        assert!(holds.advance(two.id(), volume, at(7)).is_some());
        assert_eq!(holds.limit(volume), Some(at(7)));
        // By whoever opened its copy; its stream ends later.
        holds.end(two.id());
        assert_eq!(holds.limit(volume), Some(at(9)));
        assert!(holds.advance(two.id(), volume, at(8)).is_none());
        drop(two);
        drop(one);
        assert_eq!(holds.limit(volume), None);
    }
}

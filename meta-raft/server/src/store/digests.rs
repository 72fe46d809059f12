//! The digest of each volume as this node has it, and whether beats agreed with it.

use std::collections::VecDeque;

use heliofs_proto::ids::{Position, UnixNanos, VolumeId};
use heliofs_proto::v1;
use meta_core::{Change, Sums};

/// How many totals are kept to compare late beats with.
const HISTORY: usize = 10_000;

/// One volume's digest.
#[derive(Debug, Default)]
pub struct Digest {
    /// After this position.
    pub position: Position,
    /// The volume's time after this position.
    pub time: UnixNanos,
    /// The 256 sums.
    pub sums: Sums,
    total: u128,
    history: VecDeque<(Position, u128)>,
    /// The first beat that disagreed.
    pub diverged: Option<Position>,
    /// Sums that a scrub found to be others than those that were kept: at least as many records are wrong.
    pub rotted: u32,
    /// Beats that agreed.
    pub agreed: u64,
}

impl Digest {
    /// As read from the store.
    pub fn new(position: Position, time: UnixNanos, sums: Sums) -> Self {
        let total = sums.total();
        Self {
            position,
            time,
            sums,
            total,
            history: VecDeque::from([(position, total)]),
            diverged: None,
            rotted: 0,
            agreed: 0,
        }
    }

    /// Takes in the changes of the command at `position`; calls `touched` with each sum that changed.
    pub fn absorb(
        &mut self,
        position: Position,
        time: UnixNanos,
        changes: &[Change],
        mut touched: impl FnMut(u8),
    ) {
        for change in changes {
            // Each sum's part of the total is taken out before and put in after: cheaper than summing up all 256.
            let bucket = meta_core::digest::bucket(&change.key);
            let before = self.sums.get(bucket);
            if let Some(bucket) = self.sums.absorb(change) {
                let after = self.sums.get(bucket);
                self.total = self.total.wrapping_sub(before).wrapping_add(after);
                touched(bucket);
            }
        }
        self.position = position;
        self.time = time;
        if self.history.len() >= HISTORY {
            self.history.pop_front();
        }
        self.history.push_back((position, self.total));
    }

    /// Compares with what the proposer had; loud if it differs.
    pub fn compare(&mut self, volume: VolumeId, beat: &v1::Beat) {
        let Some(position) = beat.position.map(Position::from) else {
            return;
        };
        let Ok(found) = self
            .history
            .binary_search_by_key(&position, |(position, _)| *position)
        else {
            // From before this node's start, or older than the history.
            return;
        };
        let mine = self.history[found].1;
        if beat.digest.as_ref() == mine.to_le_bytes() {
            self.agreed += 1;
        } else if self.diverged.is_none() {
            self.diverged = Some(position);
            tracing::error!(
                %volume, %position,
                mine = %format_args!("{mine:032x}"),
                theirs = %format_args!("{:02x?}", beat.digest),
                "this replica's records differ from the leader's: it must be replaced; compare `heliofs fsck --digest`"
            );
        }
    }

    /// The sum of all sums.
    pub fn total(&self) -> u128 {
        self.total
    }
}

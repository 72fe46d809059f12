//! Trims the log: openraft's own trimming is off, since it knows neither changelog readers nor when the state was flushed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::types::Raft;
use crate::config::LogRetention;
use crate::store::{LogStore, State};

/// A flush and a checkpoint must be done by then, or are tried again.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(120);
/// Readers hold the log back until it is this many times its cap; then they must begin anew.
const CAPS_HELD: u64 = 2;

/// Log entries that readers still need.
#[derive(Clone, Default)]
pub struct LogHolds {
    held: Arc<Mutex<Held>>,
}

#[derive(Default)]
struct Held {
    next: u64,
    indexes: BTreeMap<u64, u64>,
}

/// Keeps entries from an index on, within the caps; until dropped.
pub struct LogHold {
    holds: LogHolds,
    token: u64,
}

impl LogHolds {
    /// Keeps entries from `index` on.
    pub fn hold(&self, index: u64) -> LogHold {
        let mut held = self.held.lock();
        let token = held.next;
        held.next += 1;
        held.indexes.insert(token, index);
        LogHold {
            holds: self.clone(),
            token,
        }
    }

    fn oldest(&self) -> Option<u64> {
        self.held.lock().indexes.values().min().copied()
    }
}

impl LogHold {
    /// Entries before `index` are no longer needed.
    pub fn advance(&self, index: u64) {
        self.holds.held.lock().indexes.insert(self.token, index);
    }
}

impl Drop for LogHold {
    fn drop(&mut self) {
        self.holds.held.lock().indexes.remove(&self.token);
    }
}

/// How the log lies: what [`purge_upto`] decides from.
#[derive(Clone, Copy, Debug)]
struct Extent {
    /// Entries.
    entries: u64,
    bytes: u64,
    /// Index of the last entry that was applied.
    applied: u64,
    oldest_held: Option<u64>,
    /// The first entry that a mirror's slot needs. Slots have caps of their own, past which they are invalidated.
    slots: Option<u64>,
}

/// Up to which index the log should be trimmed; `None`: it is short enough.
fn purge_upto(retention: &LogRetention, log: Extent) -> Option<u64> {
    if log.entries <= retention.entries_max && log.bytes <= retention.bytes_max {
        return None;
    }
    // Half the bytes' cap, so that the next trimming is not due at once.
    let by_bytes = match log.bytes {
        0 => u64::MAX,
        bytes => {
            let keep =
                u128::from(log.entries) * u128::from(retention.bytes_max / 2) / u128::from(bytes);
            u64::try_from(keep).unwrap_or(u64::MAX)
        }
    };
    let keep = retention.entries_min.min(by_bytes).max(1);
    let mut upto = log.applied.checked_sub(keep)?;
    if let Some(slots) = log.slots {
        upto = upto.min(slots.checked_sub(1)?);
    }
    let over = log.entries > CAPS_HELD * retention.entries_max
        || log.bytes > CAPS_HELD.saturating_mul(retention.bytes_max);
    match log.oldest_held {
        Some(held) if !over => held.checked_sub(1).map(|before| upto.min(before)),
        _ => Some(upto),
    }
}

/// Looks at the log now and then, and trims it when it is above its caps.
pub struct PurgeDriver {
    /// openraft.
    pub raft: Raft,
    /// What is trimmed.
    pub log: LogStore,
    /// What must hold the effects of what is trimmed.
    pub state: State,
    /// The caps.
    pub retention: LogRetention,
    /// Readers.
    pub holds: LogHolds,
}

impl PurgeDriver {
    /// Until cancelled. A failure is logged and tried again: the log only grows meanwhile.
    pub async fn run(self, cancel: CancellationToken) {
        let mut tick = tokio::time::interval(self.retention.check_every);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = tick.tick() => {}
            }
            if let Err(error) = self.look().await {
                tracing::warn!(%error, "the log is not trimmed");
            }
        }
    }

    async fn look(&self) -> Result<(), String> {
        let (Some(last), (Some(applied), _)) = (self.log.last(), self.state.applied()) else {
            return Ok(());
        };
        let purged = self.log.purged().map_or(0, |purged| purged.index + 1);
        let extent = Extent {
            entries: (last.index + 1).saturating_sub(purged),
            bytes: self.log.bytes(),
            applied: applied.index,
            oldest_held: self.holds.oldest(),
            slots: self
                .state
                .slots_index()
                .map_err(|error| error.to_string())?,
        };
        let Some(upto) = purge_upto(&self.retention, extent) else {
            return Ok(());
        };
        if upto < purged {
            return Ok(());
        }
        // openraft trims only what a snapshot holds; taking one flushes the state.
        self.raft
            .trigger()
            .snapshot()
            .await
            .map_err(|error| error.to_string())?;
        let metrics = self
            .raft
            .wait(Some(SNAPSHOT_TIMEOUT))
            .metrics(
                |metrics| metrics.snapshot.map(|snapshot| snapshot.index) >= Some(upto),
                "state flushed",
            )
            .await
            .map_err(|error| error.to_string())?;
        debug_assert!(self.state.flushed_index() >= Some(upto), "{metrics}");
        self.raft
            .trigger()
            .purge_log(upto)
            .await
            .map_err(|error| error.to_string())?;
        let state = self.state.clone();
        tokio::task::spawn_blocking(move || state.forget_places(upto))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())?;
        tracing::info!(upto, ?extent, "trimmed the log");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(entries: u64, bytes: u64) -> Extent {
        Extent {
            entries,
            bytes,
            applied: 1_000,
            oldest_held: None,
            slots: None,
        }
    }

    #[test]
    fn the_log_is_trimmed_above_its_caps_and_not_below_what_readers_need() {
        let retention = LogRetention {
            entries_min: 100,
            entries_max: 500,
            bytes_max: 10_000,
            ..LogRetention::default()
        };
        assert_eq!(purge_upto(&retention, extent(500, 10_000)), None);
        assert_eq!(purge_upto(&retention, extent(501, 10)), Some(900));
        // 1,000 entries of 20 bytes: 5,000 bytes are 250 entries, but no more than entries_min are asked for.
        assert_eq!(purge_upto(&retention, extent(400, 10_001)), Some(900));
        // Large entries: 50 of them are half the cap.
        assert_eq!(purge_upto(&retention, extent(200, 20_000)), Some(950));
        let mut held = extent(501, 10);
        held.oldest_held = Some(700);
        assert_eq!(purge_upto(&retention, held), Some(699));
        held.entries = 1_001;
        assert_eq!(
            purge_upto(&retention, held),
            Some(900),
            "past the cap nobody holds it back"
        );
        held.slots = Some(800);
        assert_eq!(
            purge_upto(&retention, held),
            Some(799),
            "but for slots, which have caps of their own"
        );
    }

    #[test]
    fn a_hold_ends_when_it_is_dropped() {
        let holds = LogHolds::default();
        let a = holds.hold(5);
        let b = holds.hold(7);
        assert_eq!(holds.oldest(), Some(5));
        a.advance(9);
        assert_eq!(holds.oldest(), Some(7));
        drop(b);
        assert_eq!(holds.oldest(), Some(9));
    }
}

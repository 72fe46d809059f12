//! Work that was decided and that drivers still have to propose: reaping, erasing, tree removals, counting for quotas.

use heliofs_proto::ids::{Ino, VolumeId};

use super::{PAGE_MAX, key_number};
use crate::change::Corruption;
use crate::keys::{self, Tag};
use crate::records::{Accounting, OrphanRecord, Record};
use crate::view::View;

/// Orphans with inode numbers above `after`, ascending, at most `max` of them (and at most [`PAGE_MAX`]).
pub fn orphans(
    view: &impl View,
    volume: VolumeId,
    after: Ino,
    max: usize,
) -> Result<Vec<(Ino, OrphanRecord)>, Corruption> {
    let (_, to) = keys::tag_range(volume, Tag::Orphan);
    let from = keys::after(&keys::orphan(volume, after));
    view.scan(&from, &to, max.min(PAGE_MAX))?
        .iter()
        .map(|(key, value)| Ok((Ino(key_number(key, 0)?), OrphanRecord::decode(key, value)?)))
        .collect()
}

/// Inodes above `after` that have erased ranges to be worked off, ascending, at most `max` of them (and at most [`PAGE_MAX`]).
pub fn erases(
    view: &impl View,
    volume: VolumeId,
    after: Ino,
    max: usize,
) -> Result<Vec<Ino>, Corruption> {
    let (_, to) = keys::tag_range(volume, Tag::Erase);
    let from = keys::after(&keys::erase(volume, after));
    view.scan(&from, &to, max.min(PAGE_MAX))?
        .iter()
        .map(|(key, _)| Ok(Ino(key_number(key, 0)?)))
        .collect()
}

/// A tree removal that is not finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intent {
    /// Its number, for `RemoveTreeStep`.
    pub id: u64,
    /// A directory that it still has to empty.
    pub ino: Ino,
}

/// Tree removals with ids above `after` (0 starts), ascending, each once, at most `max` of them (and at most [`PAGE_MAX`]).
pub fn intents(
    view: &impl View,
    volume: VolumeId,
    after: u64,
    max: usize,
) -> Result<Vec<Intent>, Corruption> {
    let (_, to) = keys::tag_range(volume, Tag::RemoveTree);
    let mut intents = Vec::new();
    let mut last = after;
    while intents.len() < max.min(PAGE_MAX) {
        let (_, from) = keys::number_range(volume, Tag::RemoveTree, last);
        let Some((key, _)) = view.scan(&from, &to, 1)?.pop() else {
            break;
        };
        let (id, ino) = (key_number(&key, 0)?, Ino(key_number(&key, 1)?));
        intents.push(Intent { id, ino });
        last = id;
    }
    Ok(intents)
}

/// What `QuotaStep` has to be proposed for: the first directory whose quota is being counted or taken back, and `Ino(0)` while
/// usage of users and groups is being counted or forgotten.
pub fn quota_walks(view: &impl View, volume: VolumeId) -> Result<Vec<Ino>, Corruption> {
    let quotas = super::counters(view, volume)?.quotas;
    let mut walks = Vec::new();
    if quotas.directories > 0 {
        let (from, to) = keys::tag_range(volume, Tag::QuotaWalk);
        if let Some((key, _)) = view.scan(&from, &to, 1)?.pop() {
            walks.push(Ino(key_number(&key, 0)?));
        }
    }
    if matches!(
        quotas.accounting,
        Accounting::Counting | Accounting::Clearing
    ) {
        walks.push(Ino(0));
    }
    Ok(walks)
}

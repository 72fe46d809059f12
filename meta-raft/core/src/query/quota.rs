//! Quotas: what there is of them, and the room that they leave.

use heliofs_proto::ids::{Ino, VolumeId};
use heliofs_proto::v1::{self, QuotaKind};

use super::{PAGE_MAX, get, key_number};
use crate::change::Corruption;
use crate::keys::{self, Tag};
use crate::ops::charge;
use crate::records::{
    Accounting, CountersRecord, InodeRecord, QuotaCounters, QuotaRecord, QuotaState, Record,
};
use crate::view::View;

/// Quotas behind `after` (kind and id), in their order, at most `max` of them (and at most [`PAGE_MAX`]); those of users and
/// groups without limits, too.
pub fn quotas(
    view: &impl View,
    volume: VolumeId,
    after: (QuotaKind, u64),
    max: usize,
) -> Result<Vec<v1::Quota>, Corruption> {
    let counters: CountersRecord = get(view, &keys::counters(volume))?.unwrap_or_default();
    let counting = !matches!(counters.quotas.accounting, Accounting::On);
    let (_, to) = keys::tag_range(volume, Tag::Quota);
    let from = keys::after(&keys::quota(volume, after.0, after.1));
    view.scan(&from, &to, max.min(PAGE_MAX))?
        .iter()
        .map(|(key, value)| {
            let record = QuotaRecord::decode(key, value)?;
            let kind = i32::try_from(key_number(key, 0)?).unwrap_or_default();
            let kind = QuotaKind::try_from(kind).unwrap_or_default();
            Ok(v1::Quota {
                kind: kind as i32,
                id: key_number(key, 1)?,
                bytes_max: record.bytes_max,
                inodes_max: record.inodes_max,
                used_bytes: record.used_bytes,
                used_inodes: record.used_inodes,
                parent: record.parent.0,
                counting: match kind {
                    QuotaKind::Directory => record.is_walked(),
                    _ => counting,
                },
                removed: matches!(record.state, QuotaState::Removing | QuotaState::Removed),
            })
        })
        .collect()
}

/// Bytes that the tightest of an inode's quotas leaves; `None`: none limits it.
pub fn quota_room(view: &impl View, volume: VolumeId, ino: Ino) -> Result<Option<u64>, Corruption> {
    let counters: CountersRecord = get(view, &keys::counters(volume))?.unwrap_or_default();
    if counters.quotas == QuotaCounters::default() {
        return Ok(None);
    }
    charge::room(view, volume, &counters.quotas, ino)
}

/// Usage and limits of the innermost directory quota with limits that an inode is charged to.
pub(super) fn enclosing(
    view: &impl View,
    volume: VolumeId,
    quotas: &QuotaCounters,
    ino: Ino,
) -> Result<Option<v1::StatFsReply>, Corruption> {
    if quotas.directories == 0 {
        return Ok(None);
    }
    let inode: Option<InodeRecord> = get(view, &keys::inode(volume, ino))?;
    let Some(inode) = inode.filter(|inode| !inode.is_snapshot()) else {
        return Ok(None);
    };
    let mut at = inode.quota;
    while at != Ino(0) {
        let record = charge::read(view, volume, QuotaKind::Directory, at.0)?;
        if record.is_limited() {
            return Ok(Some(v1::StatFsReply {
                used_bytes: record.used_bytes,
                used_inodes: record.used_inodes,
                capacity_bytes_max: record.bytes_max,
                inodes_max: record.inodes_max,
            }));
        }
        at = record.parent;
    }
    Ok(None)
}

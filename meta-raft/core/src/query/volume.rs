//! The volume as a whole: how far it is, what it obeys, what is used, who writes to it.

use heliofs_proto::ids::{Ino, SegmentId, SessionId, VolumeId};
use heliofs_proto::v1;

use super::{PAGE_MAX, get, key_number, quota};
use crate::change::Corruption;
use crate::keys::{self, Tag};
use crate::records::{
    CountersRecord, HeadRecord, Record, SegmentRecord, SessionRecord, SettingsRecord,
};
use crate::view::View;

/// Position, time and epochs of the volume; `None` if it does not exist.
pub fn head(view: &impl View, volume: VolumeId) -> Result<Option<HeadRecord>, Corruption> {
    get(view, &keys::head(volume))
}

/// What the volume's commands obey; `None` if it does not exist.
pub fn settings(
    view: &impl View,
    volume: VolumeId,
) -> Result<Option<v1::VolumeSettings>, Corruption> {
    let record: Option<SettingsRecord> = get(view, &keys::settings(volume))?;
    Ok(record.map(|record| record.0))
}

/// Next ids and usage; zeros if the volume does not exist.
pub fn counters(view: &impl View, volume: VolumeId) -> Result<CountersRecord, Corruption> {
    Ok(get(view, &keys::counters(volume))?.unwrap_or_default())
}

/// Usage and limits of the innermost directory quota with limits that `ino` is charged to; without one, and for inode 0: the
/// volume's. Zeros if the volume does not exist.
pub fn stat_fs(
    view: &impl View,
    volume: VolumeId,
    ino: Ino,
) -> Result<v1::StatFsReply, Corruption> {
    let counters = counters(view, volume)?;
    let settings = settings(view, volume)?.unwrap_or_default();
    if ino != Ino(0)
        && let Some(quota) = quota::enclosing(view, volume, &counters.quotas, ino)?
    {
        return Ok(quota);
    }
    Ok(v1::StatFsReply {
        used_bytes: counters.used_bytes,
        used_inodes: counters.used_inodes,
        capacity_bytes_max: settings.capacity_bytes_max,
        inodes_max: settings.inodes_max,
    })
}

/// Sessions with ids above `after`, ascending, at most `max` of them (and at most [`PAGE_MAX`]).
pub fn sessions(
    view: &impl View,
    volume: VolumeId,
    after: SessionId,
    max: usize,
) -> Result<Vec<(SessionId, SessionRecord)>, Corruption> {
    let (_, to) = keys::tag_range(volume, Tag::Session);
    let from = keys::after(&keys::session(volume, after));
    view.scan(&from, &to, max.min(PAGE_MAX))?
        .iter()
        .map(|(key, value)| {
            Ok((
                SessionId(key_number(key, 0)?),
                SessionRecord::decode(key, value)?,
            ))
        })
        .collect()
}

/// A segment that extents reference; `None` if there is none of that id (any more).
pub fn segment(
    view: &impl View,
    volume: VolumeId,
    segment: SegmentId,
) -> Result<Option<SegmentRecord>, Corruption> {
    get(view, &keys::segment(volume, segment))
}

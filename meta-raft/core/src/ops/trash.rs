//! The trash: what loses its last name is kept below `/.trash` for `trash_days`, by the hour of its removal.
//!
//! `/.trash/2026-11-22-07/<parent>-<inode>-<name>`: ordinary directories and entries, root's alone, which rename takes out again and unlink
//! removes for good. A driver removes hours that are over.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, UnixNanos};
use heliofs_proto::limits::NAME_BYTES_MAX;
use heliofs_proto::v1;

use super::{create, dir};
use crate::limits::TRASH_DEPTH_MAX;
use crate::records::InodeRecord;
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// The trash's name in the root.
pub const NAME: &[u8] = b".trash";

/// Nobody but root looks at what others have removed.
const MODE: u32 = 0o700;

/// Refuses (`NOT_PERMITTED`) to make, remove or rename the trash itself while the volume has one.
pub(crate) fn protect<V: View>(txn: &mut Txn<V>, parent: Ino, name: &[u8]) -> OpResult<()> {
    if parent == Ino::ROOT && name == NAME && txn.settings()?.trash_days > 0 {
        return Err(FsError::NotPermitted.into());
    }
    Ok(())
}

/// Whether what loses its last name in `parent` goes to the trash.
///
/// Not what is in the trash already; and not when there is no room for the directories that it needs: removing must work in a
/// full volume.
pub(crate) fn keeps<V: View>(txn: &mut Txn<V>, parent: Ino) -> OpResult<bool> {
    let settings = txn.settings()?;
    if settings.trash_days == 0 {
        return Ok(false);
    }
    let inodes_max = settings.inodes_max;
    if inodes_max != 0 && txn.counters()?.used_inodes + 2 > inodes_max {
        return Ok(false);
    }
    let Some(entry) = txn.entry(Ino::ROOT, NAME)? else {
        return Ok(true);
    };
    let trash = txn.named_inode(entry.ino)?;
    if !trash.is_directory() || trash.uid != 0 {
        // Somebody's own, from a time when the volume had no trash: what others remove is not handed to him.
        return Ok(false);
    }
    let mut at = parent;
    for _ in 0..TRASH_DEPTH_MAX {
        if at == entry.ino {
            return Ok(false);
        }
        if at == Ino::ROOT {
            return Ok(true);
        }
        let inode = txn.named_inode(at)?;
        if inode.nlink == 0 {
            return Ok(false);
        }
        at = inode.parent;
    }
    Ok(true)
}

/// Gives an inode, whose entry `name` of `parent` was just removed, its place in the trash, and writes it. The directories that
/// changed by it are named in the reply.
pub(crate) fn take<V: View>(
    txn: &mut Txn<V>,
    (parent, name): (Ino, &Bytes),
    ino: Ino,
    inode: &mut InodeRecord,
    reply: &mut v1::Reply,
) -> OpResult<()> {
    let (trash, made) = directory(txn, Ino::ROOT, &Bytes::from_static(NAME))?;
    if made {
        reply.forget.push(Ino::ROOT.0);
    }
    let hour = Bytes::from(hour_name(txn.time));
    let (hour, made) = directory(txn, trash, &hour)?;
    if made {
        reply.forget.push(trash.0);
    }
    reply.forget.push(hour.0);
    let mut kept = format!("{}-{}-", parent.0, ino.0).into_bytes();
    let room = NAME_BYTES_MAX - kept.len();
    kept.extend_from_slice(&name[..name.len().min(room)]);
    let mut dir = txn.directory(hour)?;
    dir::add_entry(txn, hour, &mut dir, &Bytes::from(kept), ino, inode.kind)?;
    txn.put_inode(hour, &dir)?;
    inode.parent = hour;
    inode.ctime = txn.time;
    txn.put_inode(ino, inode)?;
    Ok(())
}

/// A directory of the trash; whether it had to be made.
fn directory<V: View>(txn: &mut Txn<V>, parent: Ino, name: &Bytes) -> OpResult<(Ino, bool)> {
    if let Some(entry) = txn.entry(parent, name)? {
        txn.directory(entry.ino)?;
        return Ok((entry.ino, false));
    }
    let ino = create::plain_directory(txn, parent, name, MODE)?;
    Ok((ino, true))
}

/// `2026-11-22-07`, UTC.
pub fn hour_name(time: UnixNanos) -> String {
    let hours = time.0.div_euclid(3_600_000_000_000);
    let (days, hour) = (hours.div_euclid(24), hours.rem_euclid(24));
    // Howard Hinnant's civil_from_days: years begin in March, eras are 400 years.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}-{hour:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_are_named_as_a_calendar_does() {
        for (seconds, name) in [
            (0, "1970-01-01-00"),
            (951_782_399, "2000-02-28-23"),
            (951_782_400, "2000-02-29-00"),
            (4_107_542_399, "2100-02-28-23"),
            (4_107_542_400, "2100-03-01-00"),
            (1_795_330_800, "2026-11-22-07"),
            (-1, "1969-12-31-23"),
        ] {
            assert_eq!(hour_name(UnixNanos(seconds * 1_000_000_000)), name);
        }
    }
}

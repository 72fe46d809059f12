//! Reap: removes a file without names that nobody has open.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1;

use super::segments::Balance;
use crate::change::Corruption;
use crate::keys::{self, Tag};
use crate::limits::EXTENTS_PER_STEP;
use crate::records::{ExtentRecord, InodeRecord, Record};
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Removes up to [`EXTENTS_PER_STEP`] extents and attributes of an orphan, and the orphan itself once it has none left: then, and
/// if it was gone already, `done`.
///
/// Refused: `INVALID` for an inode that is no orphan.
pub(crate) fn reap<V: View>(txn: &mut Txn<V>, op: &v1::Reap) -> OpResult {
    let (volume, ino) = (txn.volume, Ino(op.ino));
    let orphan = keys::orphan(volume, ino);
    let is_orphan = txn.exists(&orphan)?;
    let Some(mut inode) = txn.get::<InodeRecord>(&keys::inode(volume, ino))? else {
        if is_orphan {
            let what = format!("volume {volume}: orphan {ino} has no inode");
            return Err(Corruption::Contradiction(what).into());
        }
        return Ok(v1::Reply {
            done: true,
            ..v1::Reply::default()
        });
    };
    if !is_orphan {
        return Err(FsError::Invalid.into());
    }

    let mut room = EXTENTS_PER_STEP;
    let mut balance = Balance::default();
    let (from, to) = keys::number_range(volume, Tag::Extent, ino.0);
    // One more than may go, to know whether it is the last step.
    let page = txn.scan(&from, &to, room + 1)?;
    let mut done = page.len() <= room;
    for (key, value) in page.into_iter().take(room) {
        room -= 1;
        balance.remove(ino, &mut inode, &ExtentRecord::decode(&key, &value)?)?;
        txn.remove(key)?;
    }
    balance.settle(txn)?;

    let (from, to) = keys::number_range(volume, Tag::Xattr, ino.0);
    let page = txn.scan(&from, &to, room + 1)?;
    done &= page.len() <= room;
    for (key, _) in page.into_iter().take(room) {
        txn.remove(key)?;
    }

    if done {
        if inode.allocated != 0 {
            let what = format!(
                "volume {volume}: inode {ino} has no extents and {} bytes allocated",
                inode.allocated
            );
            return Err(Corruption::Contradiction(what).into());
        }
        txn.remove(keys::symlink(volume, ino))?;
        txn.remove(keys::erase(volume, ino))?;
        txn.remove(keys::inode(volume, ino))?;
        txn.remove(orphan)?;
        txn.charges.inode(ino, &inode, -1);
        let counters = txn.counters()?;
        counters.used_inodes = counters.used_inodes.checked_sub(1).ok_or_else(|| {
            Corruption::Contradiction(format!("volume {volume} counts no inodes and has {ino}"))
        })?;
        txn.touch(ino, true, true, true);
    } else {
        txn.put_inode(ino, &inode)?;
    }
    Ok(v1::Reply {
        done,
        ..v1::Reply::default()
    })
}

//! The volume's beginning and its settings.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Epoch, Ino, SessionId};
use heliofs_proto::limits::SEGMENTS_PER_BLOCK;
use heliofs_proto::v1::{self, FileKind};

use super::dir;
use crate::change::Corruption;
use crate::keys;
use crate::limits::core_level_known;
use crate::records::{CountersRecord, InodeRecord, QuotaCounters, SettingsRecord};
use crate::txn::{OpResult, Txn};
use crate::view::View;

/// Creates the root directory. Errors: `EXISTS` if the volume was begun before.
pub(crate) fn init<V: View>(txn: &mut Txn<V>, op: &v1::VolumeInit) -> OpResult {
    let volume = txn.volume;
    if txn.exists(&keys::settings(volume))? {
        return Err(FsError::Exists.into());
    }
    let mut settings = op.settings.unwrap_or_default();
    // Not this build's newest: the outcome must not depend on the build.
    settings.core_level = settings.core_level.max(1);
    check_level(txn, settings.core_level)?;
    txn.put(keys::settings(volume), &SettingsRecord(settings))?;
    *txn.counters()? = CountersRecord {
        // 1 is the root.
        next_ino: 2,
        // 0 names no segment.
        next_segment: SEGMENTS_PER_BLOCK,
        // 0 is the system.
        next_session: 1,
        next_intent: 1,
        used_bytes: 0,
        used_inodes: 1,
        segments: 0,
        quotas: QuotaCounters::default(),
    };
    let root = InodeRecord {
        kind: FileKind::Directory,
        mode: op.root_mode & 0o7777,
        nlink: 2,
        uid: op.root_uid,
        gid: op.root_gid,
        size: 0,
        allocated: 0,
        atime: txn.time,
        mtime: txn.time,
        ctime: txn.time,
        btime: txn.time,
        rdev: 0,
        data_seq: txn.position.seq,
        parent: Ino::ROOT,
        flags: 0,
        next_cookie: dir::COOKIE_FIRST,
        erases: 0,
        quota: Ino(0),
    };
    txn.put_inode(Ino::ROOT, &root)?;
    Ok(v1::Reply {
        attr: Some(root.attr(Ino::ROOT)),
        created: true,
        ..v1::Reply::default()
    })
}

/// Replaces the settings. Errors: `INVALID` if the core level falls.
pub(crate) fn update_settings<V: View>(txn: &mut Txn<V>, op: &v1::SettingsUpdate) -> OpResult {
    let settings = op.settings.ok_or(FsError::Invalid)?;
    if settings.core_level < txn.settings()?.core_level {
        return Err(FsError::Invalid.into());
    }
    check_level(txn, settings.core_level)?;
    txn.put(keys::settings(txn.volume), &SettingsRecord(settings))?;
    Ok(v1::Reply::default())
}

/// A build that does not know a level stops. It must not refuse: a newer build would not, and the two would go separate ways.
/// Proposers ask all nodes what they know before they propose.
fn check_level<V: View>(txn: &Txn<V>, level: u32) -> Result<(), Corruption> {
    if level > core_level_known() {
        return Err(Corruption::UpgradeRequired {
            volume: txn.volume.0,
            level,
            known: core_level_known(),
        });
    }
    Ok(())
}

/// Opens an epoch: the position that the command took is its first, and the head lists it. Refused: `INVALID` for an epoch that
/// is not above the last (it then took a position of the last), `NOT_PERMITTED` to sessions.
pub(crate) fn epoch_begin<V: View>(txn: &mut Txn<V>, op: &v1::EpochBegin) -> OpResult {
    if txn.session != SessionId::SYSTEM {
        return Err(FsError::NotPermitted.into());
    }
    // Ids hold 16 bits of it.
    if txn.position.epoch != Epoch(op.epoch) || op.epoch > u32::from(u16::MAX) {
        return Err(FsError::Invalid.into());
    }
    Ok(v1::Reply::default())
}

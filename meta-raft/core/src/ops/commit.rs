//! Commit: uploaded data becomes the content of files.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, SegmentId, UnixNanos};
use heliofs_proto::limits::{
    COMMIT_EXTENTS_MAX, COMMIT_FILES_MAX, FILE_BYTES_MAX, FRAME_BYTES_MAX, INLINE_BYTES_MAX,
    SEGMENTS_PER_BLOCK,
};
use heliofs_proto::v1;

use super::segments::Balance;
use super::{extents, privileges};
use crate::keys;
use crate::limits::CORE_LEVEL_CONDITIONS;
use crate::records::{ExtentData, ExtentRecord, InodeRecord, SegmentBlockRecord, SegmentRecord};
use crate::txn::{OpError, OpResult, Txn};
use crate::view::View;

/// Publishes segments and extents of several files.
///
/// Each file has its own verdict in `files`: `STALE` if it is gone, `IS_DIRECTORY` or `INVALID` if it has no content or the
/// extents make no sense, `CHANGED` if its content is not the one that the commit was made for, `SEGMENT_FENCED` if they name a segment that this session may not commit or that was freed,
/// `FILE_TOO_LARGE`, `READ_ONLY` in a snapshot. A segment that the commit brings and that nothing references in the end is freed at once.
///
/// Refused as a whole: `INVALID` when there is too much of anything, a file comes twice or a segment contradicts its record;
/// `NO_SPACE`; `BUSY` if too many erasures of a file wait; the first file's verdict if no file can be committed and none is
/// gone. (If one is gone, its data must go too, so the command stands, with `error` set.)
pub(crate) fn commit<V: View>(txn: &mut Txn<V>, op: &v1::Commit) -> OpResult {
    let extents_count: usize = op.files.iter().map(|file| file.extents.len()).sum();
    if op.files.is_empty()
        || op.files.len() > COMMIT_FILES_MAX
        || extents_count > COMMIT_EXTENTS_MAX
        || op.segments.len() > COMMIT_EXTENTS_MAX
    {
        return Err(FsError::Invalid.into());
    }
    // A second time would have to overwrite extents of the same age.
    let mut seen = BTreeSet::new();
    if !op.files.iter().all(|file| seen.insert(file.ino)) {
        return Err(FsError::Invalid.into());
    }

    let mut balance = Balance::growing();
    let extents = op.files.iter().flat_map(|file| &file.extents);
    let ids = extents.map(|extent| SegmentId(extent.segment));
    let named = Named::read(txn, &op.segments, ids, &mut balance)?;
    let mut files = Vec::with_capacity(op.files.len());
    for file in &op.files {
        let committed = match check(txn, file, &named) {
            Ok((inode, extents)) => v1::CommittedFile {
                error: FsError::None as i32,
                attr: Some(commit_file(txn, file, inode, extents, &mut balance)?),
                quota_room: None,
            },
            Err(OpError::Refused(error)) => v1::CommittedFile {
                error: error as i32,
                attr: None,
                quota_room: None,
            },
            Err(corrupt @ OpError::Corrupt(_)) => return Err(corrupt),
        };
        files.push(committed);
    }
    let verdict = |error: FsError| move |file: &v1::CommittedFile| file.error == error as i32;
    if !files.iter().any(verdict(FsError::None)) && !files.iter().any(verdict(FsError::Stale)) {
        return Err(files[0].error().into());
    }
    balance.settle(txn)?;
    Ok(v1::Reply {
        error: files[0].error,
        attr: files[0].attr,
        files,
        ..v1::Reply::default()
    })
}

/// What a commit may do to a segment that its extents name.
pub(super) struct Named(BTreeSet<SegmentId>);

impl Named {
    /// Whether extents may name the segment.
    pub(super) fn admits(&self, id: SegmentId) -> bool {
        self.0.contains(&id)
    }

    /// Decides once per segment, listed or named by an extent (0 is none), and brings those that are new.
    pub(super) fn read<V: View>(
        txn: &mut Txn<V>,
        segments: &[v1::Segment],
        named: impl Iterator<Item = SegmentId>,
        balance: &mut Balance,
    ) -> OpResult<Self> {
        let mut listed = BTreeMap::new();
        for segment in segments {
            let record = SegmentRecord {
                length: segment.length,
                checksum: segment.checksum,
                data_bytes: segment.data_bytes,
                live_bytes: 0,
            };
            let same = |other: &SegmentRecord| *other == record;
            let agrees = listed.get(&SegmentId(segment.id)).is_none_or(same);
            if segment.id == 0 || !agrees {
                return Err(FsError::Invalid.into());
            }
            listed.insert(SegmentId(segment.id), record);
        }
        let mut ids: BTreeSet<SegmentId> = named.filter(|id| id.0 != 0).collect();
        ids.extend(listed.keys());

        let mut admitted = BTreeSet::new();
        // The ids are in order, so that those of one block come one after the other.
        let mut block: Option<(Bytes, Option<SegmentBlockRecord>)> = None;
        for id in ids {
            let key = keys::segment_block(txn.volume, id);
            if block.as_ref().is_none_or(|(current, _)| *current != key) {
                let record = txn.get(&key)?;
                block = Some((key.clone(), record));
            }
            let Some((_, Some(owner))) = &mut block else {
                continue;
            };
            if owner.session != txn.session {
                continue;
            }
            let stored: Option<SegmentRecord> = txn.get(&keys::segment(txn.volume, id))?;
            let bit = (id.0 % SEGMENTS_PER_BLOCK) as usize;
            let brought = owner.brought[bit / 8] & 1 << (bit % 8) != 0;
            match (stored, listed.remove(&id)) {
                (Some(stored), Some(listed))
                    if (stored.length, stored.checksum) != (listed.length, listed.checksum) =>
                {
                    return Err(FsError::Invalid.into());
                }
                (Some(_), _) => {}
                // Brought before and without a record: freed, and its object may be deleted any moment.
                (None, Some(record)) if !brought => {
                    owner.brought[bit / 8] |= 1 << (bit % 8);
                    txn.put(key, owner)?;
                    balance.bring(id, record);
                }
                (None, _) => continue,
            }
            admitted.insert(id);
        }
        Ok(Self(admitted))
    }
}

/// The file and its new extents, if they can be committed. Changes nothing.
fn check<V: View>(
    txn: &Txn<V>,
    file: &v1::FileCommit,
    named: &Named,
) -> OpResult<(InodeRecord, Vec<(u64, ExtentRecord)>)> {
    let inode = txn.inode(Ino(file.ino))?;
    extents::regular(&inode)?;
    txn.changeable(&inode)?;
    if file.size_min > FILE_BYTES_MAX {
        return Err(FsError::FileTooLarge.into());
    }
    let (mut free_from, mut fenced) = (0, false);
    let mut records = Vec::with_capacity(file.extents.len());
    for extent in &file.extents {
        let end = extent.offset.checked_add(extent.length);
        let end = end.filter(|end| *end <= FILE_BYTES_MAX);
        let end = end.ok_or(FsError::Invalid)?;
        if extent.length == 0 || extent.offset < free_from {
            return Err(FsError::Invalid.into());
        }
        free_from = end;
        let inline_bytes = extent.inline_bytes.len();
        let data = if extent.segment == 0 {
            if inline_bytes > INLINE_BYTES_MAX || inline_bytes as u64 != extent.length {
                return Err(FsError::Invalid.into());
            }
            ExtentData::Inline(extent.inline_bytes.clone())
        } else {
            // Also bounds the length of any extent, which reads rely on.
            let frame_end = u64::from(extent.frame_offset).checked_add(extent.length);
            if inline_bytes > 0 || frame_end.is_none_or(|end| end > FRAME_BYTES_MAX) {
                return Err(FsError::Invalid.into());
            }
            fenced |= !named.admits(SegmentId(extent.segment));
            ExtentData::Segment {
                segment: SegmentId(extent.segment),
                frame: extent.frame,
                frame_offset: extent.frame_offset,
            }
        };
        let record = ExtentRecord {
            length: extent.length,
            seq: txn.position.seq,
            data,
        };
        records.push((extent.offset, record));
    }
    if file.base_seq.is_some_and(|base| base != inode.data_seq)
        && txn.settings()?.core_level >= CORE_LEVEL_CONDITIONS
    {
        return Err(FsError::Changed.into());
    }
    // Last: whoever is told so uploads again, which helps only if all else is in order.
    if fenced {
        return Err(FsError::SegmentFenced.into());
    }
    Ok((inode, records))
}

fn commit_file<V: View>(
    txn: &mut Txn<V>,
    file: &v1::FileCommit,
    mut inode: InodeRecord,
    records: Vec<(u64, ExtentRecord)>,
    balance: &mut Balance,
) -> OpResult<v1::Attr> {
    let ino = Ino(file.ino);
    let size_before = inode.size;
    let writes = !records.is_empty();
    let fresh = inode.allocated == 0;
    for (offset, record) in records {
        if fresh {
            extents::write_fresh(txn, ino, &mut inode, offset, &record, balance)?;
        } else {
            extents::write(txn, ino, &mut inode, offset, &record, balance)?;
        }
    }
    inode.size = inode.size.max(file.size_min);
    if writes || inode.size != size_before {
        extents::content_changed(txn, ino, &mut inode);
        privileges::drop_capability(txn, ino, &mut inode)?;
    }
    if file.kill_suidgid {
        privileges::kill_suidgid(&mut inode);
    }
    // When the write was made, not when it is committed: nobody could see the file in between without asking for the commit.
    let written = match UnixNanos(file.mtime) {
        UnixNanos(0) => txn.time,
        written => written.min(txn.time),
    };
    inode.mtime = mtime(inode.mtime, written, txn.time);
    inode.ctime = match file.kill_suidgid {
        true => txn.time,
        false => inode.ctime.max(written),
    };
    txn.put_inode(ino, &inode)?;
    Ok(inode.attr(ino))
}

/// The time of the write, which is not later than the command's. Somebody else's change in between stays visible, so that mtime
/// does not go back; only a time in the future, which somebody set by hand, is replaced as any write replaces it.
fn mtime(current: UnixNanos, written: UnixNanos, now: UnixNanos) -> UnixNanos {
    if current <= now {
        written.max(current)
    } else {
        written
    }
}

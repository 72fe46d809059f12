//! Content: write, sync, fallocate, copy_file_range, seek. Reads are in [`crate::read::gather`].

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use heliofs_proto::ids::Ino;
use heliofs_proto::limits::FILE_BYTES_MAX;
use heliofs_proto::v1;
use heliofs_proto::v1::command::Op;

use super::file::FileHandle;
use super::{Caller, Changed, Fs};
use crate::errno::{Errno, FsResult};
use crate::inode::{Inode, Privileges};
use crate::write::stage::Stage;

/// Extents per request when a seek walks through them.
const SEEK_EXTENTS: u32 = 512;

/// How a write is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WriteHow {
    /// File offset; of an append: where the kernel believes that the file ends.
    pub offset: u64,
    /// O_APPEND: at the end of the file, wherever that is by now.
    pub append: bool,
    /// Clear setuid and setgid, since the caller is not privileged.
    pub kill_suidgid: bool,
}

/// What fallocate does to a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allocation {
    /// The file's length stays.
    pub keep_size: bool,
    /// The range reads as zeros and takes no space.
    pub punch_hole: bool,
    /// The range reads as zeros.
    pub zero_range: bool,
}

impl Allocation {
    /// From fallocate's mode. `NOTSUP` for modes that move data or that nobody knows.
    pub fn from_mode(mode: i32) -> FsResult<Self> {
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
        if mode & !(KEEP | PUNCH | ZERO) != 0 || mode & (PUNCH | ZERO) == PUNCH | ZERO {
            return Err(Errno::NOTSUP);
        }
        if mode & PUNCH != 0 && mode & KEEP == 0 {
            return Err(Errno::NOTSUP);
        }
        Ok(Self {
            keep_size: mode & KEEP != 0,
            punch_hole: mode & PUNCH != 0,
            zero_range: mode & ZERO != 0,
        })
    }
}

/// Where a seek goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seek {
    /// To the next data.
    Data,
    /// To the next hole; the end of the file is one.
    Hole,
}

impl Fs {
    /// Buffers a write if that needs no waiting: `None` when the buffer is full, something must be cleared first, or the end of
    /// an appended file isn't known.
    pub fn try_write(
        self: &Arc<Self>,
        file: &FileHandle,
        how: WriteHow,
        data: &[u8],
    ) -> Option<FsResult<u32>> {
        self.buffer(&file.inode, how, data, false)
    }

    fn buffer(
        self: &Arc<Self>,
        inode: &Arc<Inode>,
        how: WriteHow,
        data: &[u8],
        cleared: bool,
    ) -> Option<FsResult<u32>> {
        let Ok(length) = u32::try_from(data.len()) else {
            return Some(Err(Errno::INVAL));
        };
        if let Err(error) = self.writable() {
            return Some(Err(error));
        }
        let (first, moved) = {
            let mut state = inode.lock();
            if let Some(error) = state.lost {
                return Some(Err(error));
            }
            // While data can't be stored, more of it would only be lost as well; sync and close try again.
            if let Some(error) = state.failure {
                return Some(Err(error));
            }
            if state.privileges != Privileges::None && !cleared {
                return None;
            }
            if !self.coherence.budget.has_room(data.len() as u64) {
                return None;
            }
            if how.append && state.content.is_none() {
                return None;
            }
            let offset = if how.append { state.size() } else { how.offset };
            let end = offset.checked_add(data.len() as u64);
            if end.is_none_or(|end| end > FILE_BYTES_MAX) {
                return Some(Err(Errno::FBIG));
            }
            let first = state.pieces.is_empty();
            let segment_bytes = self.options.segment_bytes;
            let filled = state.pieces.write(offset, data, segment_bytes as usize);
            state.mtime = Some(self.clock.now());
            if first {
                state.dirty_since = Some(Instant::now());
            }
            if filled as u64 >= segment_bytes {
                self.seal(inode, &mut state, true);
            }
            (first, offset != how.offset)
        };
        if first {
            self.dirty.lock().insert(inode.ino, inode.clone());
        }
        if moved {
            // Another mount has appended. The kernel put the bytes where it believed the end to be.
            self.coherence.tell_pages(inode.ino);
        }
        self.metrics.written_bytes.inc_by(u64::from(length));
        Some(Ok(length))
    }

    /// Writes; waits while the buffer is full.
    pub async fn write(
        self: &Arc<Self>,
        file: &FileHandle,
        how: WriteHow,
        data: Bytes,
        caller: Caller,
    ) -> FsResult<u32> {
        let inode = &file.inode;
        loop {
            let privileges = inode.lock().privileges;
            if privileges == Privileges::Unknown {
                let attr = self.get_attr(inode.ino).await?;
                inode.lock().saw(&attr.attr, attr.at, true);
            }
            if inode.lock().privileges == Privileges::Some {
                self.drop_privileges(inode, how.kill_suidgid, caller)
                    .await?;
            }
            if how.append && inode.lock().content.is_none() {
                self.fetch_extents(inode, 0).await?;
            }
            if let Some(written) = self.buffer(inode, how, &data, true) {
                return written;
            }
            self.coherence.budget.wait(data.len() as u64).await;
        }
    }

    /// fsync: once this is `Ok`, everything that was written before is stored and committed, or staged.
    pub async fn sync(self: &Arc<Self>, file: &FileHandle) -> FsResult<()> {
        self.settled_all(Some(file.inode.ino)).await?;
        if self.stage(&file.inode, Stage::Private).await? {
            return Ok(());
        }
        loop {
            let session = self.session();
            let flushed = self.flush(&file.inode).await;
            // A session that ended says nothing of the data: the next one stores it again.
            if flushed.is_ok() || !self.renewed(&session).await {
                return flushed;
            }
        }
    }

    /// fallocate.
    pub async fn fallocate(
        self: &Arc<Self>,
        file: &FileHandle,
        (offset, length): (u64, u64),
        how: Allocation,
        caller: Caller,
    ) -> FsResult<()> {
        self.writable()?;
        let inode = &file.inode;
        let changing = inode.changing.lock().await;
        let _staging = inode.staging.lock().await;
        self.flush_locked(inode).await?;
        let op = Op::Fallocate(v1::Fallocate {
            ino: inode.ino,
            offset,
            length,
            keep_size: how.keep_size,
            punch_hole: how.punch_hole,
            zero_range: how.zero_range,
            kill_suidgid: caller.uid != 0,
        });
        let changed = self.mutate(caller, op).await?;
        self.content_replaced(inode, &changed)?;
        drop(changing);
        Ok(())
    }

    /// The content changed in a way that only the server can tell.
    fn content_replaced(&self, inode: &Inode, changed: &Changed) -> FsResult<()> {
        let attr = changed.reply.attr.ok_or(Errno::IO)?;
        let before = {
            let mut state = inode.lock();
            state.moved(&attr, changed.at, |content| content.extents.clear())
        };
        if let Some(before) = before {
            self.coherence
                .cache
                .pages_moved(inode.ino, before, attr.data_seq);
        }
        Ok(())
    }

    /// copy_file_range by sharing extents. Answers how many bytes were copied, which may be fewer than asked for.
    pub async fn copy_range(
        self: &Arc<Self>,
        (source, source_offset): (&FileHandle, u64),
        (target, target_offset): (&FileHandle, u64),
        length: u64,
        caller: Caller,
    ) -> FsResult<u32> {
        self.writable()?;
        let (source, target) = (&source.inode, &target.inode);
        // The answer has 32 bits, and whole pages keep the kernel's copies aligned.
        let length = length.min(u64::from(u32::MAX) & !0xfff);
        let same = source.ino == target.ino;
        if same && source_offset.abs_diff(target_offset) < length {
            return Err(Errno::INVAL);
        }
        // In the order of their numbers, so that two copies in opposite directions don't wait for each other.
        let (first, second) = if source.ino <= target.ino {
            (source, target)
        } else {
            (target, source)
        };
        let _first = first.changing.lock().await;
        let _second = match same {
            true => None,
            false => Some(second.changing.lock().await),
        };
        let _staging = target.staging.lock().await;
        self.flush_locked(source).await?;
        if !same {
            self.flush_locked(target).await?;
        }
        let op = Op::CopyRange(v1::CopyRange {
            source: source.ino,
            source_offset,
            target: target.ino,
            target_offset,
            length,
            kill_suidgid: caller.uid != 0,
        });
        let changed = self.mutate(caller, op).await?;
        self.content_replaced(target, &changed)?;
        u32::try_from(changed.reply.value).map_err(|_| Errno::IO)
    }

    /// lseek with SEEK_DATA or SEEK_HOLE. `NXIO` at and behind the end, and for data when only a hole follows.
    pub async fn seek(
        self: &Arc<Self>,
        file: &FileHandle,
        offset: u64,
        seek: Seek,
    ) -> FsResult<u64> {
        let inode = &file.inode;
        self.flush(inode).await?;
        self.settled(&[inode.ino]).await?;
        let mut at = offset;
        loop {
            let session = self.session();
            let (page, _) = session
                .get_extents(Ino(inode.ino), at, u64::MAX - at, SEEK_EXTENTS)
                .await?;
            let size = page.attr.ok_or(Errno::IO)?.size;
            if offset >= size {
                return Err(Errno::NXIO);
            }
            for extent in &page.extents {
                let end = extent.offset.saturating_add(extent.length);
                match seek {
                    Seek::Data if extent.offset < size => return Ok(extent.offset.max(offset)),
                    Seek::Data => return Err(Errno::NXIO),
                    Seek::Hole if extent.offset > at => return Ok(at.min(size)),
                    Seek::Hole => at = at.max(end),
                }
            }
            let complete_to = page.complete_to.max(at);
            match seek {
                Seek::Data if complete_to >= size => return Err(Errno::NXIO),
                Seek::Hole if complete_to > at || at >= size => return Ok(at.min(size)),
                Seek::Data | Seek::Hole => at = complete_to,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_of_fallocate_that_move_data_are_refused() {
        let keep = libc::FALLOC_FL_KEEP_SIZE;
        assert!(Allocation::from_mode(0).is_ok());
        assert!(Allocation::from_mode(keep).unwrap().keep_size);
        assert!(
            Allocation::from_mode(libc::FALLOC_FL_PUNCH_HOLE | keep)
                .unwrap()
                .punch_hole
        );
        assert!(
            Allocation::from_mode(libc::FALLOC_FL_ZERO_RANGE)
                .unwrap()
                .zero_range
        );
        assert_eq!(
            Allocation::from_mode(libc::FALLOC_FL_COLLAPSE_RANGE),
            Err(Errno::NOTSUP)
        );
        assert_eq!(
            Allocation::from_mode(libc::FALLOC_FL_PUNCH_HOLE),
            Err(Errno::NOTSUP)
        );
    }
}

//! Reads: a file's bytes from the buffer, the metadata and the bucket.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockstore::{Kind, StoreError};
use bytes::{Bytes, BytesMut};
use futures::future::try_join_all;
use heliofs_proto::ids::Ino;

use super::extents::{Part, Source};
use crate::errno::{Errno, FsResult};
use crate::fs::Fs;
use crate::fs::file::FileHandle;
use crate::inode::{Inode, InodeState};
use crate::write::pieces::{Held, Seen};

/// Extents per request when a part of the file isn't known.
const PAGE_EXTENTS: u32 = 1024;

/// Attempts to get an answer that is not older than what is known already; every one waits for the newest position.
const FETCHES_MAX: usize = 16;

/// What a read needs.
enum Plan {
    /// Fetch extents from this offset on.
    Fetch(u64),
    /// These parts, over which the buffered bytes lie.
    Read {
        range: Range<u64>,
        size: u64,
        parts: Vec<Part>,
        buffered: Vec<(u64, Held)>,
    },
}

fn plan(state: &InodeState, offset: u64, length: u64) -> Plan {
    let Some(content) = &state.content else {
        return Plan::Fetch(offset);
    };
    let size = content.size.max(state.pieces.end());
    let end = offset.saturating_add(length).min(size);
    let range = offset..end.max(offset);
    let mut buffered = Vec::new();
    let mut bare = Vec::new();
    let mut at = range.start;
    state.pieces.visit(range.clone(), |from, seen| {
        if at < from {
            bare.push(at..from);
        }
        at = from + seen.len() as u64;
        let held = match seen {
            Seen::Bytes(bytes) => Bytes::copy_from_slice(bytes).into(),
            Seen::Staged(held) => held,
        };
        buffered.push((from, held));
    });
    if at < range.end {
        bare.push(at..range.end);
    }
    let mut parts = Vec::new();
    for bare in bare {
        // Behind the committed end there is only what is buffered, and zeros.
        let committed = bare.start.min(content.size)..bare.end.min(content.size);
        match content.extents.plan(committed) {
            Ok(found) => parts.extend(found),
            Err(unknown) => return Plan::Fetch(unknown),
        }
    }
    Plan::Read {
        range,
        size,
        parts,
        buffered,
    }
}

impl Fs {
    /// Logs a read that failed, with the file's path if the metadata can tell it. At most one path is asked for at a time: a
    /// bucket that is down fails many reads.
    fn report_unreadable(self: &Arc<Self>, ino: u64, offset: u64, error: &StoreError) {
        if self.naming.swap(true, Ordering::AcqRel) {
            tracing::error!(ino, offset, %error, "read failed");
            return;
        }
        let (fs, error) = (Arc::clone(self), error.clone());
        self.runtime().spawn(async move {
            let path = fs.session().path_of(Ino(ino)).await.ok().flatten();
            let path = path.as_deref().unwrap_or("unknown");
            tracing::error!(ino, path, offset, %error, "read failed");
            fs.naming.store(false, Ordering::Release);
        });
    }

    /// Reads up to `length` bytes from `offset`; holes read as zeros, the end of the file shortens the result.
    ///
    /// Errors: `IO` when the bytes can't be had or are not what was written; `STALE` when the inode is gone.
    pub async fn read(
        self: &Arc<Self>,
        file: &FileHandle,
        offset: u64,
        length: u64,
    ) -> FsResult<Bytes> {
        let mut refreshed = false;
        loop {
            let session = self.session();
            let planned = self.plan_read(&file.inode, offset, length).await;
            let (range, size, parts, buffered) = match planned {
                Ok(planned) => planned,
                Err(_) if self.renewed(&session).await => continue,
                Err(error) => return Err(error),
            };
            self.read_ahead(file, &range, size);
            match self.gather(&range, &parts, &buffered).await {
                Err(error) if error.kind() == Kind::NotFound && !refreshed => {
                    // Compaction may have moved the bytes; what we know may be outdated.
                    refreshed = true;
                    file.inode.lock().forget();
                }
                Err(error) => {
                    self.report_unreadable(file.inode.ino, offset, &error);
                    return Err(error.into());
                }
                Ok(bytes) => {
                    self.metrics().read_bytes.inc_by(bytes.len() as u64);
                    self.touch_atime(file);
                    return Ok(bytes);
                }
            }
        }
    }

    async fn plan_read(
        &self,
        inode: &Inode,
        offset: u64,
        length: u64,
    ) -> FsResult<(Range<u64>, u64, Vec<Part>, Vec<(u64, Held)>)> {
        // A read over many small extents takes many pages; only those that bring nothing new are counted.
        let mut unknown_from = 0;
        let mut in_vain = 0;
        while in_vain < FETCHES_MAX {
            let planned = plan(&inode.lock(), offset, length);
            match planned {
                Plan::Read {
                    range,
                    size,
                    parts,
                    buffered,
                } => return Ok((range, size, parts, buffered)),
                Plan::Fetch(from) => {
                    match from > unknown_from {
                        true => in_vain = 0,
                        false => in_vain += 1,
                    }
                    unknown_from = unknown_from.max(from);
                    self.fetch_extents(inode, from).await?;
                }
            }
        }
        tracing::error!(ino = inode.ino, offset, "the file's extents keep changing");
        Err(Errno::IO)
    }

    /// Asks the server for a page of extents from `from` on; an answer that is older than what is known is dropped.
    pub(crate) async fn fetch_extents(&self, inode: &Inode, from: u64) -> FsResult<()> {
        self.settled(&[inode.ino]).await?;
        let session = self.session();
        let (page, at) = session
            .get_extents(Ino(inode.ino), from, u64::MAX - from, PAGE_EXTENTS)
            .await?;
        let attr = page.attr.ok_or(Errno::IO)?;
        self.store().note_elsewhere(&page.elsewhere);
        let mut state = inode.lock();
        state.learn(&attr, at, from..page.complete_to, &page.extents);
        Ok(())
    }

    async fn gather(
        &self,
        range: &Range<u64>,
        parts: &[Part],
        buffered: &[(u64, Held)],
    ) -> Result<Bytes, StoreError> {
        let length = range.end - range.start;
        // One piece is the answer as it is.
        match (parts, buffered) {
            ([], [(_, held)]) if held.len() as u64 == length => return self.load(held).await,
            ([part], []) if part.length == length => match &part.source {
                Source::Inline(bytes) => return Ok(bytes.clone()),
                Source::Frame(frame) => return self.store().read(*frame).await,
                Source::Hole => {}
            },
            _ => {}
        }
        let frames = parts.iter().filter_map(|part| match &part.source {
            Source::Frame(frame) => Some((part.offset, *frame)),
            Source::Hole | Source::Inline(_) => None,
        });
        let fetched = try_join_all(frames.map(|(offset, frame)| async move {
            Ok::<_, StoreError>((offset, self.store().read(frame).await?))
        }))
        .await?;
        let loaded = try_join_all(buffered.iter().map(|(offset, held)| async move {
            Ok::<_, StoreError>((*offset, self.load(held).await?))
        }))
        .await?;
        let mut target = BytesMut::zeroed(length as usize);
        let mut place = |offset: u64, bytes: &[u8]| {
            let from = (offset - range.start) as usize;
            target[from..from + bytes.len()].copy_from_slice(bytes);
        };
        for part in parts {
            if let Source::Inline(bytes) = &part.source {
                place(part.offset, bytes);
            }
        }
        for (offset, bytes) in fetched.iter().chain(&loaded) {
            place(*offset, bytes);
        }
        Ok(target.freeze())
    }

    /// Fetches ahead of a sequential or strided reader, as far as the extents are known.
    fn read_ahead(&self, file: &FileHandle, range: &Range<u64>, size: u64) {
        let length = range.end - range.start;
        let most = self.read_ahead_bytes_max();
        let ahead = {
            let mut window = file.read_ahead.lock();
            window.limit(self.store().read_ahead_bytes().min(most));
            window.read(range.start, length, size)
        };
        if ahead.is_empty() {
            return;
        }
        let frames: Vec<_> = match &file.inode.lock().content {
            Some(content) => ahead
                .into_iter()
                .flat_map(|ahead| {
                    let end = ahead.end.min(content.size).max(ahead.start);
                    content.extents.plan(ahead.start..end).unwrap_or_default()
                })
                .filter_map(|part| match part.source {
                    Source::Frame(frame) => Some(frame),
                    Source::Hole | Source::Inline(_) => None,
                })
                .collect(),
            None => return,
        };
        if !frames.is_empty() {
            self.store().prefetch(frames);
        }
    }
}

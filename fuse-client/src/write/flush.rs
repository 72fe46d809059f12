//! Flush: uploads what is left of a file's buffered data and commits everything, in order.
//!
//! Upload first, commit after. Data leaves the buffer only when its commit was answered; when anything fails it stays, the
//! caller gets an error, and so does everybody who asks later, until a flush succeeds.

use std::sync::Arc;

use heliofs_proto::error::FsError;
use heliofs_proto::limits::COMMIT_EXTENTS_MAX;
use heliofs_proto::v1;
use heliofs_proto::v1::command::Op;
use meta_client::ClientError;

use super::pieces::{Frame, SentPiece};
use crate::errno::{Errno, FsResult};
use crate::fs::{Caller, Fs};
use crate::inode::{Batch, Inode};

/// Times that a flush uploads again because its segment ids were closed.
const FENCED_MAX: usize = 3;

/// Why a commit has no success.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refused {
    /// The segment ids were closed or the segments freed: upload again under new ids.
    Fenced,
    /// For this reason.
    Failed(Errno),
}

/// What one commit publishes.
#[derive(Default)]
struct Group {
    segments: Vec<v1::Segment>,
    extents: Vec<v1::Extent>,
    pieces: Vec<(u64, Vec<SentPiece>)>,
}

/// Where a batch's frames ended up.
enum Placed {
    Segment(v1::Segment, Vec<blockstore::FrameNumber>),
    Inline(Arc<Vec<Frame>>),
}

impl Placed {
    fn extent(&self, piece: &SentPiece) -> v1::Extent {
        let mut extent = v1::Extent {
            offset: piece.offset,
            length: piece.length,
            ..v1::Extent::default()
        };
        match self {
            Self::Segment(segment, frames) => {
                extent.segment = segment.id;
                extent.frame = frames[piece.sent.frame].0;
                extent.frame_offset = piece.sent.frame_offset;
            }
            Self::Inline(frames) => {
                let bytes: Vec<u8> = frames[piece.sent.frame].pieces.concat();
                let from = piece.sent.frame_offset as usize;
                extent.inline_bytes =
                    bytes::Bytes::from(bytes).slice(from..from + piece.length as usize);
            }
        }
        extent
    }
}

impl Fs {
    /// Stores and commits everything that was written to `inode` before the call.
    pub async fn flush(self: &Arc<Self>, inode: &Arc<Inode>) -> FsResult<()> {
        {
            let state = inode.lock();
            if state.pieces.is_empty() {
                return state.lost.map_or(Ok(()), Err);
            }
        }
        let changing = inode.changing.lock().await;
        let flushed = self.flush_locked(inode).await;
        drop(changing);
        self.settle(inode);
        flushed
    }

    /// As [`Fs::flush`], for a caller that holds `changing`, and that calls [`Fs::settle`] when it has let go.
    pub(crate) async fn flush_locked(self: &Arc<Self>, inode: &Arc<Inode>) -> FsResult<()> {
        for _ in 0..FENCED_MAX {
            let last = {
                let mut state = inode.lock();
                if let Some(lost) = state.lost {
                    return Err(lost);
                }
                self.seal(inode, &mut state, false);
                state.next_batch - 1
            };
            match self.commit_sealed(inode, last).await {
                Err(Refused::Fenced) => self.segment_ids().discard().await,
                Err(Refused::Failed(error)) => {
                    self.metrics().flush_failures.inc();
                    return Err(error);
                }
                Ok(()) => {
                    inode.lock().failure = None;
                    return Ok(());
                }
            }
        }
        tracing::error!(ino = inode.ino, "segment ids were refused again and again");
        inode.lock().failure = Some(Errno::IO);
        Err(Errno::IO)
    }

    /// Commits the batches up to `last`, waiting for their uploads. The caller holds `changing`.
    pub(crate) async fn commit_sealed(&self, inode: &Inode, last: u64) -> Result<(), Refused> {
        let batches: Vec<(u64, Batch)> = {
            let state = inode.lock();
            state
                .batches
                .range(..=last)
                .map(|(&number, batch)| (number, batch.clone()))
                .collect()
        };
        let mut group = Group::default();
        for (number, batch) in batches {
            let placed = match placed(batch).await {
                Ok(placed) => placed,
                Err(error) => {
                    // What was uploaded before it is published all the same.
                    let published = self.publish(inode, &mut group).await;
                    let mut state = inode.lock();
                    state.pieces.unsend(number);
                    state.batches.remove(&number);
                    state.failure = Some(error);
                    drop(state);
                    published?;
                    return Err(Refused::Failed(error));
                }
            };
            let pieces = {
                let mut state = inode.lock();
                let pieces = state.pieces.of_batch(number);
                if pieces.is_empty() {
                    // All of it was overwritten or cut off since; nothing ever named its segment.
                    state.batches.remove(&number);
                }
                pieces
            };
            for part in pieces.chunks(COMMIT_EXTENTS_MAX) {
                if group.extents.len() + part.len() > COMMIT_EXTENTS_MAX {
                    self.publish(inode, &mut group).await?;
                }
                if let Placed::Segment(segment, _) = &placed {
                    group.segments.push(*segment);
                }
                group
                    .extents
                    .extend(part.iter().map(|piece| placed.extent(piece)));
                group.pieces.push((number, part.to_vec()));
            }
        }
        self.publish(inode, &mut group).await
    }

    /// Proposes one commit and takes what it published out of the buffer.
    async fn publish(&self, inode: &Inode, group: &mut Group) -> Result<(), Refused> {
        let mut group = std::mem::take(group);
        if group.extents.is_empty() {
            return Ok(());
        }
        group.extents.sort_unstable_by_key(|extent| extent.offset);
        let size_min = group
            .extents
            .iter()
            .map(|extent| extent.offset + extent.length)
            .max();
        let mtime = inode.lock().mtime;
        let op = Op::Commit(v1::Commit {
            segments: group.segments,
            files: vec![v1::FileCommit {
                ino: inode.ino,
                extents: group.extents.clone(),
                size_min: size_min.unwrap_or(0),
                mtime: mtime.unwrap_or(0),
                // Cleared at once when the write was made.
                kill_suidgid: false,
            }],
        });
        let changed = match self.try_mutate(Caller::default(), op).await {
            Ok(changed) => changed,
            Err(error) => return Err(self.refused(inode, &group.pieces, &error)),
        };
        let Some(attr) = changed.reply.attr else {
            return Err(Refused::Failed(Errno::IO));
        };
        let mut state = inode.lock();
        let before = state.moved(&attr, changed.at, |content| {
            for extent in &group.extents {
                content.extents.overlay(extent);
            }
        });
        for (batch, pieces) in &group.pieces {
            state.pieces.commit(*batch, pieces);
            if state.pieces.of_batch(*batch).is_empty() {
                state.batches.remove(batch);
            }
        }
        if state.pieces.is_empty() {
            state.mtime = None;
            state.dirty_since = None;
            state.retry = None;
        }
        drop(state);
        match before {
            Some(before) => self
                .coherence()
                .cache
                .pages_moved(inode.ino, before, attr.data_seq),
            None => self
                .coherence()
                .cache
                .pages_moved(inode.ino, u64::MAX, attr.data_seq),
        }
        Ok(())
    }

    fn refused(
        &self,
        inode: &Inode,
        pieces: &[(u64, Vec<SentPiece>)],
        error: &ClientError,
    ) -> Refused {
        let mut state = inode.lock();
        match error {
            ClientError::Verdict(FsError::SegmentFenced) => {
                for (batch, _) in pieces {
                    state.pieces.unsend(*batch);
                    state.batches.remove(batch);
                }
                Refused::Fenced
            }
            ClientError::Verdict(FsError::Stale | FsError::NotFound) => {
                // The inode is gone (its last name was removed elsewhere and nobody had it open any more).
                tracing::warn!(
                    ino = inode.ino,
                    "the file is gone; what was written to it is lost"
                );
                state.pieces.clear();
                state.batches.clear();
                state.lost = Some(Errno::STALE);
                Refused::Failed(Errno::STALE)
            }
            ClientError::SessionGone(why) => {
                // Locks and leases ended with the session: others may have written since.
                tracing::warn!(ino = inode.ino, %why, "the session is over; uncommitted data is lost");
                state.pieces.clear();
                state.batches.clear();
                state.lost = Some(Errno::IO);
                Refused::Failed(Errno::IO)
            }
            // What was uploaded stays: the same commit is proposed again by the next flush.
            ClientError::Verdict(_)
            | ClientError::Unavailable { .. }
            | ClientError::Unknown { .. }
            | ClientError::Invalid(_) => {
                tracing::warn!(ino = inode.ino, %error, "commit failed");
                let errno = Errno::from(error.clone());
                state.failure = Some(errno);
                Refused::Failed(errno)
            }
        }
    }

    /// After a flush: an inode whose data is safe or lost is no longer dirty, and its closed handles are taken back at the
    /// server.
    pub(crate) fn settle(&self, inode: &Inode) {
        {
            let mut dirty = self.dirty().lock();
            let mut state = inode.lock();
            if !state.pieces.is_empty() {
                return;
            }
            state.failure = None;
            state.dirty_since = None;
            dirty.remove(&inode.ino);
        }
        let owed = self.coherence().inodes.settled(inode);
        let session = self.session();
        for _ in 0..owed {
            session.release(heliofs_proto::ids::Ino(inode.ino));
        }
    }
}

async fn placed(batch: Batch) -> Result<Placed, Errno> {
    match batch {
        Batch::Inline(frames) => Ok(Placed::Inline(frames)),
        Batch::Segment(mut done) => {
            // An upload that vanished without a word (a panic in it) counts as failed.
            let uploaded = match done.wait_for(Option::is_some).await {
                Ok(uploaded) => uploaded.clone(),
                Err(_) => None,
            };
            match uploaded.as_deref() {
                Some(Ok((segment, frames))) => Ok(Placed::Segment(*segment, frames.clone())),
                Some(Err(error)) => Err(*error),
                None => Err(Errno::IO),
            }
        }
    }
}

//! Flush: uploads what is left of files' buffered data and commits everything, in order.
//!
//! Upload first, commit after. Data leaves the buffer only when its commit was answered; when anything fails it stays, the
//! caller gets an error, and so does everybody who asks later, until a flush succeeds. Files that are flushed together share
//! segments ([`super::pack`]) and commits.

use std::collections::HashSet;
use std::sync::Arc;

use heliofs_proto::error::FsError;
use heliofs_proto::limits::{COMMIT_EXTENTS_MAX, COMMIT_FILES_MAX};
use heliofs_proto::v1;
use heliofs_proto::v1::command::Op;
use meta_client::ClientError;

use super::conflict::Overtaken;
use super::pieces::{Frame, SentPiece, concat};
use super::staging::{Place, StagedRecord};
use super::stored::Stored;
use crate::errno::{Errno, FsResult};
use crate::fs::Fs;
use crate::inode::{Batch, Inode};

/// Times that a flush uploads again because its segment ids were closed.
const FENCED_MAX: usize = 3;

/// Inline data in one commit, bytes: as much as others gladly wait behind.
const COMMIT_INLINE_BYTES_MAX: usize = 256 << 10;

/// Why a commit has no success.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refused {
    /// The segment ids were closed or the segments freed: upload again under new ids.
    Fenced,
    /// The content was changed, by an earlier commit of this mount whose answer never came: once more, over that.
    Again,
    /// For this reason.
    Failed(Errno),
}

/// One file's share of a commit.
struct FilePart<'a> {
    inode: &'a Arc<Inode>,
    extents: Vec<v1::Extent>,
    pieces: Vec<(u64, Vec<SentPiece>)>,
}

/// What one commit publishes.
#[derive(Default)]
struct Group<'a> {
    segments: Vec<v1::Segment>,
    files: Vec<FilePart<'a>>,
    extents: usize,
    inline_bytes: usize,
}

impl<'a> Group<'a> {
    fn has_room(&self, inode: &Inode, extents: usize, inline_bytes: usize) -> bool {
        let joins = self
            .files
            .last()
            .is_some_and(|file| file.inode.ino == inode.ino);
        self.extents + extents <= COMMIT_EXTENTS_MAX
            && self.inline_bytes + inline_bytes <= COMMIT_INLINE_BYTES_MAX
            && (joins || self.files.len() < COMMIT_FILES_MAX)
    }

    fn add(&mut self, inode: &'a Arc<Inode>, number: u64, placed: &Placed, part: &[SentPiece]) {
        if let Placed::Segment(segment, _) = placed
            && !self.segments.iter().any(|known| known.id == segment.id())
        {
            self.segments.push(segment.name());
        }
        let extents: Vec<_> = part.iter().map(|piece| placed.extent(piece)).collect();
        self.extents += extents.len();
        self.inline_bytes += extents
            .iter()
            .map(|extent| extent.inline_bytes.len())
            .sum::<usize>();
        match self.files.last_mut() {
            Some(file) if file.inode.ino == inode.ino => {
                file.extents.extend(extents);
                file.pieces.push((number, part.to_vec()));
            }
            _ => self.files.push(FilePart {
                inode,
                extents,
                pieces: vec![(number, part.to_vec())],
            }),
        }
    }
}

/// Where a batch's frames ended up.
enum Placed {
    /// For each frame its number and [`Frame::lead`].
    Segment(Arc<Stored>, Vec<(blockstore::FrameNumber, u32)>),
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
                let (frame, lead) = frames[piece.sent.frame];
                extent.segment = segment.id();
                extent.frame = frame.0;
                extent.frame_offset = lead + piece.sent.frame_offset;
            }
            Self::Inline(frames) => {
                let bytes = concat(&frames[piece.sent.frame].pieces);
                let from = piece.sent.frame_offset as usize;
                extent.inline_bytes =
                    bytes::Bytes::from(bytes).slice(from..from + piece.length as usize);
            }
        }
        extent
    }

    fn inline_bytes(&self, part: &[SentPiece]) -> usize {
        match self {
            Self::Segment(..) => 0,
            Self::Inline(_) => part.iter().map(|piece| piece.length as usize).sum(),
        }
    }
}

/// A file that is committed together with others, and what became of it.
struct Flushed<'a> {
    inode: &'a Arc<Inode>,
    /// The last batch to be committed.
    last: u64,
    outcome: Result<(), Refused>,
    /// Staged records over which something was written that is committed now, unless more was written over that.
    hidden: Vec<Arc<StagedRecord>>,
    overwrites: u64,
}

impl<'a> Flushed<'a> {
    fn new(inode: &'a Arc<Inode>, last: u64) -> Self {
        Self {
            inode,
            last,
            outcome: Ok(()),
            hidden: Vec::new(),
            overwrites: 0,
        }
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

    /// As [`Fs::flush`] for several files, which share segments and commits. Outcomes in the order of `inodes`, in which
    /// nobody comes twice.
    pub(crate) async fn flush_many(self: &Arc<Self>, inodes: &[Arc<Inode>]) -> Vec<FsResult<()>> {
        // In the order of their numbers, as everybody takes several.
        let mut order: Vec<&Arc<Inode>> = inodes.iter().collect();
        order.sort_unstable_by_key(|inode| inode.ino);
        let mut changing = Vec::with_capacity(order.len());
        for inode in order {
            changing.push(inode.changing.lock().await);
        }
        let flushed = self.flush_all_locked(inodes).await;
        drop(changing);
        for inode in inodes {
            self.settle(inode);
        }
        flushed
    }

    /// As [`Fs::flush`], for a caller that holds `changing`, and that calls [`Fs::settle`] when it has let go.
    pub(crate) async fn flush_locked(self: &Arc<Self>, inode: &Arc<Inode>) -> FsResult<()> {
        let flushed = self.flush_all_locked(std::slice::from_ref(inode)).await;
        flushed.into_iter().next().unwrap_or(Ok(()))
    }

    async fn flush_all_locked(self: &Arc<Self>, inodes: &[Arc<Inode>]) -> Vec<FsResult<()>> {
        let mut outcomes: Vec<Option<FsResult<()>>> = vec![None; inodes.len()];
        for _ in 0..FENCED_MAX {
            let mut under_way = Vec::new();
            let mut places = Vec::new();
            for (place, inode) in inodes.iter().enumerate() {
                if outcomes[place].is_some() {
                    continue;
                }
                let mut state = inode.lock();
                if let Some(lost) = state.lost {
                    outcomes[place] = Some(Err(lost));
                    continue;
                }
                self.seal(inode, &mut state, false);
                places.push(place);
                under_way.push(Flushed {
                    hidden: state.pieces.take_hidden(),
                    overwrites: state.pieces.overwrites(),
                    ..Flushed::new(inode, state.next_batch - 1)
                });
            }
            if under_way.is_empty() {
                break;
            }
            self.pack();
            self.commit_sealed(&mut under_way).await;
            let (mut fenced, mut again) = (false, false);
            for (place, flushed) in places.into_iter().zip(under_way) {
                let mut state = flushed.inode.lock();
                if flushed.outcome.is_err() || flushed.overwrites != state.pieces.overwrites() {
                    state.pieces.hide(flushed.hidden);
                } else {
                    drop(flushed.hidden);
                }
                self.remove_loose_records(&mut state);
                drop(state);
                match flushed.outcome {
                    Ok(()) => {
                        flushed.inode.lock().failure = None;
                        outcomes[place] = Some(Ok(()));
                    }
                    Err(Refused::Failed(error)) => {
                        self.metrics().flush_failures.inc();
                        outcomes[place] = Some(Err(error));
                    }
                    Err(Refused::Fenced) => fenced = true,
                    Err(Refused::Again) => again = true,
                }
            }
            if fenced {
                self.segment_ids().discard().await;
            } else if !again {
                break;
            }
        }
        let outcomes = inodes.iter().zip(outcomes).map(|(inode, outcome)| {
            outcome.unwrap_or_else(|| {
                tracing::error!(ino = inode.ino, "commits were refused again and again");
                inode.lock().failure = Some(Errno::IO);
                Err(Errno::IO)
            })
        });
        outcomes.collect()
    }

    /// Commits one file's batches up to `last`. The caller holds `changing`.
    pub(crate) async fn commit_up_to(&self, inode: &Arc<Inode>, last: u64) -> Result<(), Refused> {
        let mut one = [Flushed::new(inode, last)];
        self.commit_sealed(&mut one).await;
        let [one] = one;
        one.outcome
    }

    /// Commits sealed batches, waiting for their uploads. The caller holds `changing` of every file.
    async fn commit_sealed(&self, files: &mut [Flushed<'_>]) {
        let mut group = Group::default();
        // Files of `files` from here on have parts in `group`.
        let mut first = 0;
        for at in 0..files.len() {
            let inode = files[at].inode;
            let batches: Vec<(u64, Batch)> = {
                let state = inode.lock();
                let sealed = state.batches.range(..=files[at].last);
                sealed
                    .map(|(&number, batch)| (number, batch.clone()))
                    .collect()
            };
            for (number, batch) in batches {
                let placed = match placed(batch).await {
                    Ok(placed) => placed,
                    Err(error) => {
                        // What was uploaded before it is published all the same.
                        let mut state = inode.lock();
                        state.pieces.unsend(number);
                        state.batches.remove(&number);
                        if !self.goes_on_without_the_bucket(&state) {
                            state.failure = Some(error);
                        }
                        files[at].outcome = Err(Refused::Failed(error));
                        break;
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
                    let inline_bytes = placed.inline_bytes(part);
                    if !group.has_room(inode, part.len(), inline_bytes) {
                        self.publish(&mut group, &mut files[first..=at]).await;
                        first = at;
                    }
                    if files[at].outcome.is_err() {
                        break;
                    }
                    group.add(inode, number, &placed, part);
                }
                if files[at].outcome.is_err() {
                    break;
                }
            }
        }
        self.publish(&mut group, &mut files[first..]).await;
    }

    /// Proposes one commit and takes what it published out of the buffers. Files that were refused say so in `files`.
    async fn publish(&self, group: &mut Group<'_>, files: &mut [Flushed<'_>]) {
        let mut group = std::mem::take(group);
        if group.files.is_empty() {
            return;
        }
        let commits = group.files.iter_mut().map(|file| {
            file.extents.sort_unstable_by_key(|extent| extent.offset);
            let ends = file
                .extents
                .iter()
                .map(|extent| extent.offset + extent.length);
            let state = file.inode.lock();
            v1::FileCommit {
                ino: file.inode.ino,
                extents: file.extents.clone(),
                size_min: ends.max().unwrap_or(0),
                mtime: state.mtime.unwrap_or(0),
                // Cleared at once when the write was made.
                kill_suidgid: false,
                // What was staged may have waited for long, and leases can be lost meanwhile.
                base_seq: state.staged_base,
            }
        });
        let op = Op::Commit(v1::Commit {
            files: commits.collect(),
            segments: group.segments.clone(),
        });
        for part in &group.files {
            let places = part.extents.iter().filter_map(Place::of);
            part.inode.lock().proposed.extend(places);
        }
        let noted = self.note_commit(&group.files).await;
        let committed = self.commit(op).await;
        if let Ok((reply, _)) = &committed
            && reply.files.is_empty()
            && group.files.len() > 1
        {
            // Refused as a whole, say for lack of room or quota: one by one, what can be committed is.
            for file in group.files {
                // Not those of the others: what a commit brings and nothing names is freed at once.
                let named = |segment: &v1::Segment| {
                    file.extents
                        .iter()
                        .any(|extent| extent.segment == segment.id)
                };
                let segments = group.segments.iter().filter(|one| named(one));
                let mut alone = Group {
                    segments: segments.copied().collect(),
                    files: vec![file],
                    ..Group::default()
                };
                Box::pin(self.publish(&mut alone, files)).await;
            }
            return;
        }
        if let Ok((reply, _)) = &committed {
            self.note_answers(&noted, &reply.files).await;
        }
        for (at, part) in group.files.iter().enumerate() {
            let verdict = match &committed {
                Err(error) => Err(error.clone()),
                Ok((reply, position)) => match reply.files.get(at) {
                    Some(file) if file.error() == FsError::None => {
                        part.inode.lock().quota_room = file.quota_room.unwrap_or(u64::MAX);
                        file.attr.map(|attr| (attr, *position)).ok_or_else(|| {
                            ClientError::Invalid("a committed file without attributes".to_owned())
                        })
                    }
                    Some(file) => Err(ClientError::Verdict(file.error())),
                    None => Err(ClientError::Verdict(reply.error())),
                },
            };
            let outcome = match verdict {
                Ok((attr, position)) => {
                    self.committed(part, &attr, position);
                    continue;
                }
                Err(ClientError::Verdict(FsError::Changed)) => {
                    Err(self.overtaken(part.inode).await)
                }
                Err(error) => Err(self.refused(part.inode, &part.pieces, &error)),
            };
            let file = files
                .iter_mut()
                .find(|file| file.inode.ino == part.inode.ino);
            if let Some(file) = file {
                file.outcome = outcome;
            }
        }
    }

    /// Before a commit of staged data is proposed: after a crash it must be known as this mount's own. Returns the inodes that this
    /// was noted for.
    async fn note_commit(&self, files: &[FilePart<'_>]) -> HashSet<u64> {
        let Some(staging) = self.staging() else {
            return HashSet::new();
        };
        let mut inos = HashSet::new();
        let mut commits = Vec::new();
        for file in files {
            // One may be on its way.
            if !staging.is_active() && file.inode.lock().records.is_empty() {
                continue;
            }
            inos.insert(file.inode.ino);
            let places: HashSet<Place> = file.extents.iter().filter_map(Place::of).collect();
            commits.extend(places.into_iter().map(|place| (file.inode.ino, place)));
        }
        if commits.is_empty() {
            return inos;
        }
        let staging = Arc::clone(staging);
        let noted = self
            .runtime()
            .spawn_blocking(move || staging.note(&commits));
        match noted.await {
            Ok(Ok(())) => {}
            // What is staged after this commit would be put aside after a crash: no reason to hold up the commit.
            Ok(Err(error)) => tracing::error!(%error, "the staging folder takes no notes"),
            Err(error) => tracing::error!(%error, "the staging folder takes no notes"),
        }
        inos
    }

    /// What commits that were noted have led to: from now on others' copies of what they brought can't be taken for them.
    async fn note_answers(&self, noted: &HashSet<u64>, files: &[v1::CommittedFile]) {
        let attrs = files.iter().filter_map(|file| file.attr);
        let answers: Vec<(u64, u64)> = attrs
            .filter(|attr| noted.contains(&attr.ino))
            .map(|attr| (attr.ino, attr.data_seq))
            .collect();
        let Some(staging) = self.staging().filter(|_| !answers.is_empty()).cloned() else {
            return;
        };
        let done = self
            .runtime()
            .spawn_blocking(move || staging.note_answers(&answers));
        match done.await {
            Ok(Ok(())) => {}
            // The places decide after a crash.
            Ok(Err(error)) => tracing::warn!(%error, "the staging folder takes no notes"),
            Err(error) => tracing::warn!(%error, "the staging folder takes no notes"),
        }
    }

    /// A file's part of a commit took effect.
    fn committed(&self, part: &FilePart<'_>, attr: &v1::Attr, at: heliofs_proto::ids::Position) {
        let inode = part.inode;
        let mut state = inode.lock();
        state.proposed.clear();
        let before = state.moved(attr, at, |content| {
            for extent in &part.extents {
                content.extents.overlay(extent);
            }
        });
        for (batch, pieces) in &part.pieces {
            // Of a record that is being written now, too.
            let has_records = !state.records.is_empty() || inode.staging.try_lock().is_err();
            if state.pieces.commit(*batch, pieces) && has_records {
                state.committed_beside = true;
            }
            if state.pieces.of_batch(*batch).is_empty() {
                state.batches.remove(batch);
            }
        }
        if state.pieces.is_empty() {
            state.mtime = None;
            state.dirty_since = None;
            state.retry = None;
        }
        self.remove_loose_records(&mut state);
        drop(state);
        self.coherence()
            .cache
            .pages_moved(inode.ino, before.unwrap_or(u64::MAX), attr.data_seq);
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
                drop(state);
                self.give_over(inode, Overtaken::Gone);
                Refused::Failed(Errno::STALE)
            }
            // What was uploaded stays: the same commit is proposed again by the next flush. When the session is over, the next
            // one decides (`Fs::adopt`).
            ClientError::SessionGone(_)
            | ClientError::Verdict(_)
            | ClientError::Unavailable { .. }
            | ClientError::Unknown { .. }
            | ClientError::Invalid(_) => {
                tracing::warn!(ino = inode.ino, %error, "commit failed");
                let errno = Errno::from(error.clone());
                // A verdict (no space, say) is for programs to know; the rest passes.
                if matches!(error, ClientError::Verdict(_))
                    || !self.goes_on_without_the_bucket(&state)
                {
                    state.failure = Some(errno);
                }
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
            if dirty.get(&inode.ino).is_some_and(|known| inode.is(known)) {
                dirty.remove(&inode.ino);
            }
            drop(dirty);
            self.remove_loose_records(&mut state);
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
                Some(Ok((segment, frames))) => {
                    Ok(Placed::Segment(Arc::clone(segment), frames.clone()))
                }
                Some(Err(error)) => Err(*error),
                None => Err(Errno::IO),
            }
        }
    }
}

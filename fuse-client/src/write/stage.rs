//! Into the staging folder, and back from there.

use std::sync::Arc;
use std::time::Instant;

use blockstore::StoreError;
use bytes::Bytes;
use futures::StreamExt;
use heliofs_proto::ids::{Ino, SegmentId};
use heliofs_proto::limits::INLINE_BYTES_MAX;

use super::pieces::Held;
use super::staging::record::Header;
use super::staging::{FRAME_BYTES, RECORD_BYTES_MAX, StagedRecord, Staging};
use crate::errno::FsResult;
use crate::fs::Fs;
use crate::inode::{Inode, InodeState};

/// Attempts to learn what identifies a file's content while others change it.
const BASES_MAX: usize = 4;

/// Files staged at once to free memory.
const RELIEVED: usize = 4;

/// Whose data is staged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// Files that nobody else can look at without asking this mount, and that are too large to lie in the metadata.
    Private,
    /// Whatever can be: the mount is about to end.
    All,
}

/// How staging a file goes on.
enum Next {
    /// All of it is staged, or stored.
    Done,
    /// It must be flushed instead.
    Refused,
    /// What identifies the file's content must be asked for.
    Learn,
    /// This record is to be written.
    Write(Arc<StagedRecord>, Header, Vec<(u64, Bytes)>),
}

/// Staging of one file, from the first record to the last.
#[derive(Default)]
struct Pass {
    begun: bool,
    /// Records that those of this pass replace.
    hidden: Vec<Arc<StagedRecord>>,
    overwrites: u64,
}

impl Fs {
    /// The staging folder, also when it is used only to store what an earlier mount has left.
    pub(crate) fn staging(&self) -> Option<&Arc<Staging>> {
        self.staging.as_ref()
    }

    /// Whether what is written is staged, and the last attempt succeeded.
    pub(crate) fn stages(&self) -> bool {
        self.staging
            .as_ref()
            .is_some_and(|staging| staging.is_active() && !staging.refuses())
    }

    /// A bucket that can't be reached is no failure of this file: its data is staged, or will be within the flush age, and sync
    /// succeeds.
    pub(crate) fn goes_on_without_the_bucket(&self, state: &InodeState) -> bool {
        self.stages() && !state.records.iter().any(|record| record.is_damaged())
    }

    /// Removes records that are not needed any more. Under the inode's lock, so that of one file an earlier one never outlives a
    /// later one.
    pub(crate) fn remove_loose_records(&self, state: &mut InodeState) {
        if let Some(staging) = &self.staging {
            staging.remove(&state.loose_records());
        }
    }

    /// Stages what was written to `inode` before the call. True once all of it would survive the end of this mount; false when
    /// it must be flushed instead.
    ///
    /// Errors: the file's data was lost before.
    pub(crate) async fn stage(
        self: &Arc<Self>,
        inode: &Arc<Inode>,
        whose: Stage,
    ) -> FsResult<bool> {
        let Some(staging) = self.staging.as_ref().filter(|staging| staging.is_active()) else {
            return Ok(false);
        };
        let _turn = inode.staging.lock().await;
        let mut pass = Pass::default();
        let mut rewritten = 0;
        for _ in 0..BASES_MAX {
            loop {
                match self.next_record(staging, inode, whose, &mut pass)? {
                    Next::Done => return Ok(true),
                    Next::Refused => return Ok(false),
                    Next::Learn => break,
                    Next::Write(record, header, parts) => {
                        let base_seq = header.base_seq;
                        let written = self.write_record(staging, &record, header, parts).await;
                        let mut state = inode.lock();
                        if let Err(why) = written {
                            tracing::warn!(
                                ino = inode.ino,
                                why,
                                "not staged: the bucket has to take it"
                            );
                            state.pieces.unassign(&record);
                            state.pieces.hide(pass.hidden);
                            return Ok(false);
                        }
                        let known = state.content.as_ref().map(|content| content.data_seq);
                        let moved = known.or(state.base_seq) != Some(base_seq);
                        if moved {
                            // Something was committed meanwhile: after a crash nobody could tell that the record belongs to it.
                            state.pieces.unassign(&record);
                            staging.remove(&[record]);
                            rewritten += 1;
                            if rewritten < BASES_MAX {
                                continue;
                            }
                            state.pieces.hide(pass.hidden);
                            return Ok(false);
                        }
                        state.records.push_back(record);
                        state.staged_base.get_or_insert(base_seq);
                    }
                }
            }
            if let Err(error) = self.fetch_extents(inode, 0).await {
                tracing::warn!(ino = inode.ino, %error, "not staged");
                break;
            }
        }
        inode.lock().pieces.hide(pass.hidden);
        Ok(false)
    }

    /// The next record of a file that is being staged.
    fn next_record(
        &self,
        staging: &Staging,
        inode: &Inode,
        whose: Stage,
        pass: &mut Pass,
    ) -> FsResult<Next> {
        let mut state = inode.lock();
        if let Some(lost) = state.lost {
            return Err(lost);
        }
        if state.pieces.is_empty() {
            pass.hidden.clear();
            self.remove_loose_records(&mut state);
            return Ok(Next::Done);
        }
        if state.records.is_empty() {
            state.committed_beside = false;
        }
        if state.committed_beside {
            state.pieces.hide(std::mem::take(&mut pass.hidden));
            return Ok(Next::Refused);
        }
        let private = state.failure.is_none()
            && state.size() > INLINE_BYTES_MAX as u64
            && self.session.load().holds_write_lease(Ino(inode.ino));
        if whose == Stage::Private && !private {
            state.pieces.hide(std::mem::take(&mut pass.hidden));
            return Ok(Next::Refused);
        }
        let known = state.content.as_ref().map(|content| content.data_seq);
        let Some(base_seq) = known.or(state.base_seq) else {
            return Ok(Next::Learn);
        };
        if state.staged_base.is_some_and(|base| base != base_seq) {
            // Others have changed the file since earlier records were staged: those are not for what it is now. The commit, which
            // depends on their base, finds out whose data stays.
            state.pieces.hide(std::mem::take(&mut pass.hidden));
            return Ok(Next::Refused);
        }
        if !pass.begun {
            // What is written from here on is not waited for.
            state.pieces.freeze_open();
            *pass = Pass {
                begun: true,
                hidden: state.pieces.take_hidden(),
                overwrites: state.pieces.overwrites(),
            };
        }
        let record = staging.begin(inode.ino);
        let parts = state.pieces.assign(&record, RECORD_BYTES_MAX);
        if parts.is_empty() {
            // All of it is in records; also what was written over earlier ones, unless that was overwritten in its turn.
            let hidden = std::mem::take(&mut pass.hidden);
            if pass.overwrites != state.pieces.overwrites() {
                state.pieces.hide(hidden);
            }
            self.remove_loose_records(&mut state);
            state.staged_at = Some(Instant::now());
            return Ok(Next::Done);
        }
        let header = Header {
            volume: self.volume.0,
            epoch: self.epoch(),
            ino: inode.ino,
            number: record.number(),
            base_seq,
            mtime: state.mtime.unwrap_or(0),
            ranges: parts
                .iter()
                .map(|(offset, bytes)| (*offset, bytes.len() as u64))
                .collect(),
        };
        Ok(Next::Write(record, header, parts))
    }

    async fn write_record(
        &self,
        staging: &Arc<Staging>,
        record: &Arc<StagedRecord>,
        header: Header,
        parts: Vec<(u64, Bytes)>,
    ) -> Result<(), String> {
        let frames = frames(parts.into_iter().map(|(_, bytes)| bytes));
        let id = SegmentId(record.number());
        let (segment, _) = self
            .store()
            .build(id, frames)
            .await
            .map_err(|error| error.to_string())?;
        let (staging, record) = (Arc::clone(staging), Arc::clone(record));
        self.runtime()
            .spawn_blocking(move || staging.write(&record, &header, &segment))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())
    }

    /// The bytes of a piece, wherever they are.
    pub(crate) async fn load(&self, held: &Held) -> Result<Bytes, StoreError> {
        if let Some(bytes) = held.bytes() {
            return Ok(bytes.clone());
        }
        let missing = |what: &str| StoreError::Invalid(format!("staged data: {what}"));
        let (Some(staging), Some(at)) = (&self.staging, held.place()) else {
            return Err(missing("there is no staging folder"));
        };
        let (staging, at, store) = (Arc::clone(staging), at.clone(), Arc::clone(self.store()));
        let length = held.len();
        self.runtime()
            .spawn_blocking(move || staging.load(&store, &at.record, at.offset, length))
            .await
            .map_err(|error| missing(&error.to_string()))?
    }

    /// Memory runs short: stages the oldest data and leaves it to the disk.
    pub(crate) async fn relieve(self: &Arc<Self>) {
        let mut dirty: Vec<Arc<Inode>> = self.dirty().lock().values().cloned().collect();
        dirty.sort_by_cached_key(|inode| inode.lock().dirty_since);
        futures::stream::iter(dirty)
            .for_each_concurrent(RELIEVED, |inode| async move {
                if !self.coherence().budget.is_pressed() {
                    return;
                }
                // What could not be staged is flushed by the flusher.
                if let Ok(true) = self.stage(&inode, Stage::Private).await {
                    inode.lock().pieces.release();
                }
            })
            .await;
    }

    /// Shows what is staged in the metrics.
    pub(crate) fn show_staged(&self) {
        let Some(staging) = &self.staging else {
            return;
        };
        let (bytes, files, oldest) = staging.usage();
        let age = oldest.and_then(|oldest| oldest.elapsed().ok());
        let metrics = self.metrics();
        metrics
            .staged_bytes
            .set(i64::try_from(bytes).unwrap_or(i64::MAX));
        metrics.staged_files.set(files as i64);
        metrics
            .staged_oldest_seconds
            .set(age.map_or(0, |age| age.as_secs() as i64));
    }
}

/// Cuts bytes into frames.
fn frames(parts: impl Iterator<Item = Bytes>) -> Vec<Vec<Bytes>> {
    let mut frames: Vec<Vec<Bytes>> = Vec::new();
    let mut room = 0;
    for mut bytes in parts {
        while !bytes.is_empty() {
            if room == 0 {
                frames.push(Vec::new());
                room = FRAME_BYTES;
            }
            let part = bytes.split_to(bytes.len().min(room));
            room -= part.len();
            if let Some(frame) = frames.last_mut() {
                frame.push(part);
            }
        }
    }
    frames
}

//! Buffered bytes into the bucket: what fills a segment has it for itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use heliofs_proto::limits::{COMMIT_EXTENTS_MAX, INLINE_BYTES_MAX};
use tokio::sync::watch;

use super::pieces::{FILE_PAGE_BYTES, Frame, Held};
use super::stored::Stored;
use crate::errno::Errno;
use crate::fs::Fs;
use crate::inode::{Batch, Inode, InodeState, Uploaded};

/// Uploaded batches that wait for a commit before one is made without anybody asking: their bytes stay in memory until then.
const COMMIT_BATCHES: usize = 8;

/// What leads a frame.
static ZEROS: [u8; FILE_PAGE_BYTES as usize] = [0; FILE_PAGE_BYTES as usize];

impl Fs {
    /// Freezes what is not on its way yet (`full_only`: only full runs). What fills a segment is uploaded at once, the rest waits
    /// for [`Fs::pack`].
    pub(crate) fn seal(
        self: &Arc<Self>,
        inode: &Arc<Inode>,
        state: &mut InodeState,
        full_only: bool,
    ) {
        if !state.pieces.has_unsent() {
            return;
        }
        // What is staged comes from there: first the flusher stages it, and memory is free again.
        if full_only && self.stages() {
            return;
        }
        let inline = !full_only && state.size() <= INLINE_BYTES_MAX as u64;
        let InodeState {
            pieces, next_batch, ..
        } = state;
        let frozen = pieces.freeze(self.segment_bytes(), COMMIT_EXTENTS_MAX, full_only, || {
            let batch = *next_batch;
            *next_batch += 1;
            batch
        });
        for (number, mut frames) in frozen {
            let bytes: u64 = frames.iter().map(|frame| frame.length).sum();
            let inline = inline && frames.iter().all(Frame::is_in_memory);
            if bytes >= self.segment_bytes() {
                // It may wait for long until it is its turn.
                let pieces = frames.iter_mut().flat_map(|frame| &mut frame.pieces);
                pieces.for_each(Held::release);
            }
            let memory: u64 = frames.iter().map(Frame::memory).sum();
            let batch = if inline {
                Batch::Inline(Arc::new(frames))
            } else if bytes < self.segment_bytes() {
                let memory = self.coherence().budget.upload(memory);
                Batch::Segment(self.packer().add(frames, memory))
            } else {
                let memory = self.coherence().budget.upload(memory);
                let (sender, receiver) = watch::channel(None);
                let (fs, inode) = (self.clone(), inode.clone());
                self.runtime().spawn(async move {
                    // Before its bytes are copied into a segment, and some may not be wanted any more by then.
                    let turn = fs.upload_turns().acquire().await;
                    if turn.is_err() || sender.is_closed() {
                        return;
                    }
                    let uploaded = fs.upload(frames).await;
                    drop((turn, memory));
                    let stored = uploaded.is_ok();
                    // Nobody listens when the batch was dropped with its inode.
                    sender.send_replace(Some(Arc::new(uploaded)));
                    if stored {
                        fs.commit_when_many(&inode).await;
                    }
                });
                Batch::Segment(receiver)
            };
            state.batches.insert(number, batch);
        }
    }

    pub(super) async fn upload(&self, frames: Vec<Frame>) -> Uploaded {
        let session = self.session();
        let id = self.segment_ids().next(&session).await.map_err(|error| {
            tracing::warn!(%error, "no segment id");
            Errno::from(error)
        })?;
        let mut loaded = Vec::with_capacity(frames.len());
        let leads: Vec<u32> = frames.iter().map(Frame::lead).collect();
        for (frame, &lead) in frames.into_iter().zip(&leads) {
            let mut pieces = Vec::with_capacity(frame.pieces.len() + 1);
            if lead > 0 {
                pieces.push(Bytes::from_static(&ZEROS[..lead as usize]));
            }
            for held in frame.pieces {
                pieces.push(self.load(&held).await?);
            }
            loaded.push(pieces);
        }
        let (segment, numbers) = self.store().build(id, loaded).await?;
        let (mut record, bytes) = (segment.record(), segment.length);
        record.data_bytes -= leads.iter().map(|lead| u64::from(*lead)).sum::<u64>();
        self.store().put(segment).await.map_err(|error| {
            tracing::warn!(segment = id.0, %error, "upload failed");
            Errno::from(error)
        })?;
        self.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
        let frames = numbers.into_iter().zip(leads).collect();
        Ok((Arc::new(Stored::new(record, self.abandoned())), frames))
    }

    /// Bytes of segments that this mount has stored: as long as they grow, the bucket takes what it is given.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.stored_bytes.load(Ordering::Relaxed)
    }

    /// Commits uploaded batches in the background once enough of them wait.
    async fn commit_when_many(self: &Arc<Self>, inode: &Arc<Inode>) {
        let last = {
            let mut state = inode.lock();
            if state.commit_scheduled {
                return;
            }
            let uploaded = state
                .batches
                .iter()
                .take_while(|(_, batch)| match batch {
                    Batch::Segment(done) => done.borrow().as_ref().is_some_and(|done| done.is_ok()),
                    Batch::Inline(_) => true,
                })
                .map(|(&number, _)| number)
                .collect::<Vec<_>>();
            match uploaded.last() {
                Some(&last) if uploaded.len() >= COMMIT_BATCHES => {
                    state.commit_scheduled = true;
                    last
                }
                _ => return,
            }
        };
        let changing = inode.changing.lock().await;
        inode.lock().commit_scheduled = false;
        if let Err(refused) = self.commit_up_to(inode, last).await {
            tracing::warn!(
                ino = inode.ino,
                ?refused,
                "commit failed; the next flush tries again"
            );
        }
        drop(changing);
        self.settle(inode);
    }
}

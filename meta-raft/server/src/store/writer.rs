//! The thread that writes the log: what queued up while it synced becomes the next batch and the next sync.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use openraft::storage::IOFlushed;
use prost::Message;
use rocksdb::{DB, WriteBatch, WriteOptions};
use tokio::sync::oneshot;

use super::io_error;
use super::log::{COMMITTED, PURGED, START, Shared, VOTE, entry_key};
use crate::raft::types::{Entry, LogId, TypeConfig, Vote};
use crate::raft::wire::{entry_to_wire, log_id_to_wire, vote_to_wire};

/// Larger batches would make the first waiter of the next one wait too long.
const BATCH_BYTES_MAX: usize = 4 << 20;
/// How long a commit index waits for an append to travel with.
const COMMITTED_DELAY_MAX: Duration = Duration::from_millis(20);

type Done = oneshot::Sender<std::io::Result<()>>;

/// One write to the log; they take effect in the order in which they were sent.
pub(super) enum Job {
    Append {
        entries: Vec<Entry>,
        /// Set when the log begins with these entries and not at 0.
        start: Option<u64>,
        flushed: IOFlushed<TypeConfig>,
    },
    Vote(Vote, Done),
    /// Removes entries above the index, up to the last one that exists.
    Truncate {
        keep: Option<u64>,
        last: u64,
        done: Done,
    },
    Purge {
        upto: LogId,
        done: Done,
    },
    Committed(Option<LogId>),
    Stop(Done),
}

enum Completion {
    Appended(u64, IOFlushed<TypeConfig>),
    Truncated(Option<u64>, Done),
    Done(Done),
}

pub(super) struct Writer {
    pub db: Arc<DB>,
    pub shared: Arc<Shared>,
    pub jobs: Receiver<Job>,
}

struct Batch {
    batch: WriteBatch,
    sync: bool,
    bytes: usize,
    buffer: Vec<u8>,
    completions: Vec<Completion>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    stop: Option<Done>,
}

impl Writer {
    /// Runs until told to stop or until all senders are gone.
    pub(super) fn run(self) {
        let mut batch = Batch {
            batch: WriteBatch::default(),
            sync: false,
            bytes: 0,
            buffer: Vec::new(),
            completions: Vec::new(),
            committed: None,
            purged: None,
            stop: None,
        };
        // After a failed write RocksDB's state is not known: nothing may be acknowledged any more.
        let mut failed: Option<std::io::ErrorKind> = None;
        loop {
            let job = if batch.committed.is_some() {
                match self.jobs.recv_timeout(COMMITTED_DELAY_MAX) {
                    Ok(job) => Some(job),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            } else {
                match self.jobs.recv() {
                    Ok(job) => Some(job),
                    Err(_) => return,
                }
            };
            if let Some(job) = job {
                batch.add(job);
                while batch.bytes < BATCH_BYTES_MAX && batch.stop.is_none() {
                    let Ok(job) = self.jobs.try_recv() else {
                        break;
                    };
                    batch.add(job);
                }
                if !batch.sync && batch.stop.is_none() {
                    // A commit index alone: it may wait for company.
                    continue;
                }
            }
            if batch.write(&self, &mut failed) {
                return;
            }
        }
    }
}

impl Batch {
    fn add(&mut self, job: Job) {
        match job {
            Job::Append {
                entries,
                start,
                flushed,
            } => {
                if let Some(start) = start {
                    self.batch.put(START, start.to_be_bytes());
                }
                let Some(last) = entries.last().map(|entry| entry.log_id.index) else {
                    flushed.io_completed(Ok(()));
                    return;
                };
                for entry in &entries {
                    self.buffer.clear();
                    encode_entry(entry, &mut self.buffer);
                    self.batch.put(entry_key(entry.log_id.index), &self.buffer);
                    self.bytes += self.buffer.len();
                }
                self.sync = true;
                self.completions.push(Completion::Appended(last, flushed));
            }
            Job::Vote(vote, done) => {
                self.batch.put(VOTE, vote_to_wire(&vote).encode_to_vec());
                self.sync = true;
                self.completions.push(Completion::Done(done));
            }
            Job::Truncate { keep, last, done } => {
                // One by one and within one batch: a range tombstone would also cover the entries that take their place.
                for index in keep.map_or(0, |keep| keep + 1)..=last {
                    self.batch.delete(entry_key(index));
                }
                self.sync = true;
                self.completions.push(Completion::Truncated(keep, done));
            }
            Job::Purge { upto, done } => {
                self.batch.put(PURGED, log_id_to_wire(upto).encode_to_vec());
                self.batch
                    .delete_range(entry_key(0), entry_key(upto.index + 1));
                self.purged = Some(upto);
                self.sync = true;
                self.completions.push(Completion::Done(done));
            }
            Job::Committed(committed) => self.committed = committed,
            Job::Stop(done) => self.stop = Some(done),
        }
    }

    /// Writes and answers; true: stop.
    fn write(&mut self, writer: &Writer, failed: &mut Option<std::io::ErrorKind>) -> bool {
        if let Some(committed) = self.committed.take() {
            self.batch
                .put(COMMITTED, log_id_to_wire(committed).encode_to_vec());
        }
        let mut options = WriteOptions::default();
        options.set_sync(self.sync || self.stop.is_some());
        let batch = std::mem::take(&mut self.batch);
        let result = match failed {
            Some(kind) => Err(std::io::Error::new(
                *kind,
                "an earlier write of the log failed",
            )),
            None => writer.db.write_opt(batch, &options).map_err(io_error),
        };
        if let Err(error) = &result
            && failed.is_none()
        {
            tracing::error!(%error, "the log can't be written; this node stops taking part");
            *failed = Some(error.kind());
        }
        self.sync = false;
        self.bytes = 0;
        let again = || match &result {
            Ok(()) => Ok(()),
            Err(error) => Err(std::io::Error::new(error.kind(), error.to_string())),
        };
        // The cache learns what is on disk before anybody is told, so that it may drop what was acknowledged.
        if result.is_ok() {
            let mut tail = writer.shared.tail.lock();
            for completion in &self.completions {
                match completion {
                    Completion::Appended(last, _) => tail.persisted(*last),
                    Completion::Truncated(keep, _) => tail.persisted_truncated(*keep),
                    Completion::Done(_) => {}
                }
            }
            tail.evict();
        }
        for completion in self.completions.drain(..) {
            match completion {
                Completion::Appended(_, flushed) => flushed.io_completed(again()),
                Completion::Truncated(_, done) | Completion::Done(done) => {
                    // A caller that is gone was dropped with the runtime.
                    done.send(again()).ok();
                }
            }
        }
        if let Some(upto) = self.purged.take()
            && result.is_ok()
        {
            // Whole files go at once instead of waiting for a compaction.
            if let Err(error) = writer
                .db
                .delete_file_in_range(entry_key(0), entry_key(upto.index))
            {
                tracing::warn!(%error, "files of the purged log stay until the next compaction");
            }
        }
        match self.stop.take() {
            Some(done) => {
                done.send(again()).ok();
                true
            }
            None => false,
        }
    }
}

/// CRC32 of what follows (4 bytes, little endian), then the entry as protobuf.
fn encode_entry(entry: &Entry, buffer: &mut Vec<u8>) {
    let message = entry_to_wire(entry);
    buffer.reserve(4 + message.encoded_len());
    buffer.extend_from_slice(&[0; 4]);
    message.encode(buffer).expect("a vector grows as needed");
    let crc = crc32fast::hash(&buffer[4..]);
    buffer[..4].copy_from_slice(&crc.to_le_bytes());
}

//! openraft's log storage over the log store.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};

use futures::Stream;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader};

use super::types::{Entry, LogId, TypeConfig, Vote};
use crate::store::LogStore;

/// Entries in one append to a follower, in bytes of memory: about one batch of the proposer.
const REPLICATION_BYTES_MAX: usize = 2 << 20;
/// Entries handed to the apply task at a time.
const APPLY_BYTES_MAX: usize = 8 << 20;

fn bounds(range: impl RangeBounds<u64>) -> (u64, u64) {
    let from = match range.start_bound() {
        Bound::Included(from) => *from,
        Bound::Excluded(before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let to = match range.end_bound() {
        Bound::Included(last) => last.saturating_add(1),
        Bound::Excluded(to) => *to,
        Bound::Unbounded => u64::MAX,
    };
    (from, to)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        let (from, to) = bounds(range);
        self.read_all(from, to).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.vote())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.read(start, end, REPLICATION_BYTES_MAX).await
    }

    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = io::Result<Entry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (from, to) = bounds(range);
        let log = self.clone();
        // Page by page: after a restart the range may be the whole log.
        futures::stream::unfold(
            (log, from, to, Vec::new().into_iter()),
            |(log, mut next, to, mut page)| async move {
                if let Some(entry) = page.next() {
                    return Some((Ok(entry), (log, next, to, page)));
                }
                if next >= to {
                    return None;
                }
                match log.read(next, to, APPLY_BYTES_MAX).await {
                    Ok(entries) => {
                        next = match entries.last() {
                            Some(last) => last.log_id.index + 1,
                            None => to,
                        };
                        page = entries.into_iter();
                        page.next().map(|entry| (Ok(entry), (log, next, to, page)))
                    }
                    Err(error) => Some((Err(error), (log, to, to, page))),
                }
            },
        )
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        Ok(LogState {
            last_purged_log_id: self.purged(),
            last_log_id: self.last(),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        LogStore::save_vote(self, *vote).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        LogStore::save_committed(self, committed)
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.committed())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        LogStore::append(self, entries.into_iter().collect(), callback)
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> io::Result<()> {
        LogStore::truncate_after(self, last_log_id).await
    }

    async fn purge(&mut self, log_id: LogId) -> io::Result<()> {
        LogStore::purge(self, log_id).await
    }
}

//! Counts what lies below a directory, a page at a time, so that nobody waits behind it.

use std::collections::HashSet;

use heliofs_proto::ids::{Ino, VolumeId};
use heliofs_proto::v1::{self, FileKind};
use meta_core::query::{self, QueryError};
use meta_core::{Corruption, View};

use super::reads::refusal;
use crate::store::State;

/// Entries looked at before others get the thread.
const ENTRIES_PER_TURN: usize = 256;

/// Walks and answers; `STALE` when the inode is gone.
pub(super) async fn walk(
    state: &State,
    volume: VolumeId,
    ino: u64,
) -> Result<v1::Response, Corruption> {
    let attr = match state.snapshot_view(|view| query::get_attr(view, volume, Ino(ino))) {
        Ok(attr) => attr,
        Err(QueryError::Refused(error)) => return Ok(refusal(error)),
        Err(QueryError::Corrupt(corruption)) => return Err(corruption),
    };
    let mut count = Count::default();
    count.reply.size_bytes = attr.size;
    count.reply.allocated_bytes = attr.allocated;
    if attr.kind() == FileKind::Directory {
        count.reply.directories = 1;
        count.open.push((Ino(ino), 0));
    } else {
        count.reply.files = 1;
    }
    while state.snapshot_view(|view| count.turn(view, volume))? {
        tokio::task::yield_now().await;
    }
    Ok(v1::Response {
        body: Some(v1::response::Body::Summary(count.reply)),
        ..Default::default()
    })
}

#[derive(Default)]
struct Count {
    reply: v1::SummaryReply,
    /// Directories to go through, with the cookie of the last entry seen.
    open: Vec<(Ino, u64)>,
    /// Files with several names that were counted.
    linked: HashSet<Ino>,
}

impl Count {
    /// `false`: nothing is left.
    fn turn(&mut self, view: &impl View, volume: VolumeId) -> Result<bool, Corruption> {
        let Some((dir, after)) = self.open.pop() else {
            return Ok(false);
        };
        let children = query::children(view, volume, dir, after, ENTRIES_PER_TURN)?;
        if let Some(last) = children.last()
            && children.len() == ENTRIES_PER_TURN
        {
            self.open.push((dir, last.cookie));
        }
        for child in children {
            let directory = child.kind == FileKind::Directory;
            if directory {
                self.reply.directories += 1;
                self.open.push((child.ino, 0));
            } else if child.nlink > 1 && !self.linked.insert(child.ino) {
                continue;
            } else {
                self.reply.files += 1;
            }
            self.reply.size_bytes = self.reply.size_bytes.saturating_add(child.size);
            self.reply.allocated_bytes = self.reply.allocated_bytes.saturating_add(child.allocated);
        }
        Ok(true)
    }
}

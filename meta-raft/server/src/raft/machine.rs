//! openraft's state machine over the state store.

use std::io;
use std::time::Instant;

use futures::{FutureExt, Stream, StreamExt};
use openraft::OptionalSend;
use openraft::storage::{
    ApplyResponder, EntryResponder, RaftSnapshotBuilder, RaftStateMachine, Snapshot,
};

use super::snapshot::SnapshotData;
use super::types::{BatchReply, Entry, LogId, SnapshotMeta, StoredMembership, TypeConfig};
use crate::observer::Observers;
use crate::store::State;
use crate::store::group::{pinned, stands_alone};

/// Entries applied as one group at most: bounds memory when a long log is applied again.
const GROUP_ENTRIES_MAX: usize = 512;

/// Bytes of entries at which a group is full: tens of milliseconds of work. Whoever waits for the state, or for the thread that
/// applies, waits that long; above it groups gain nothing.
const GROUP_BYTES_MAX: usize = 128 << 10;

/// About how much work an entry is.
fn bytes(entry: &Entry) -> usize {
    match &entry.payload {
        openraft::EntryPayload::Normal(data) => data.bytes().len(),
        openraft::EntryPayload::Blank | openraft::EntryPayload::Membership(_) => 0,
    }
}

/// Applies the log to the state.
pub struct StateMachine {
    state: State,
    observers: Observers,
    current: Option<(SnapshotMeta, SnapshotData)>,
}

impl StateMachine {
    /// Over an opened state.
    pub fn new(state: State, observers: Observers) -> Self {
        Self {
            state,
            observers,
            current: None,
        }
    }

    fn apply_group(
        &self,
        entries: &[Entry],
        responders: Vec<Option<ApplyResponder<TypeConfig>>>,
    ) -> io::Result<()> {
        let began = Instant::now();
        let mut group = self.state.apply(entries).map_err(|error| {
            tracing::error!(%error, "this node stops: going on would spread the damage");
            io::Error::other(error)
        })?;
        let spent = began.elapsed();
        if !group.items.is_empty() {
            self.observers
                .each(|observer| observer.applied(&group.items));
        }
        if group.volumes_changed {
            self.observers.each(|observer| observer.volumes_changed());
        }
        self.observers.each(|observer| observer.took(spent));
        for (replies, responder) in group.replies().into_iter().zip(responders) {
            if let Some(responder) = responder {
                responder.send(BatchReply(replies));
            }
        }
        Ok(())
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok(self.state.applied())
    }

    async fn apply<Strm>(&mut self, entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        let mut entries = entries.fuse();
        let mut group: Vec<Entry> = Vec::new();
        let mut responders = Vec::new();
        while let Some(first) = entries.next().await {
            let mut next = Some(first);
            let mut group_bytes = 0;
            while let Some(item) = next.take() {
                let (entry, responder) = item?;
                let alone = stands_alone(&entry);
                let pins = pinned(&entry);
                if alone && !group.is_empty() {
                    self.apply_group(&group, std::mem::take(&mut responders))?;
                    group.clear();
                }
                group_bytes += bytes(&entry);
                group.push(entry);
                responders.push(responder);
                if !pins.is_empty() {
                    self.apply_group(&group, std::mem::take(&mut responders))?;
                    group.clear();
                    for volume in pins {
                        self.state.hold_pin(volume)?;
                    }
                } else if !alone && group.len() < GROUP_ENTRIES_MAX && group_bytes < GROUP_BYTES_MAX
                {
                    // What can be had without waiting joins the group.
                    next = entries.next().now_or_never().flatten();
                }
            }
            if !group.is_empty() {
                self.apply_group(&group, std::mem::take(&mut responders))?;
                group.clear();
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder {
            state: self.state.clone(),
        }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> io::Result<()> {
        let state = self.state.clone();
        let installed = snapshot.clone();
        tokio::task::spawn_blocking(move || state.install(installed.path()))
            .await
            .map_err(io::Error::other)?
            .map_err(io::Error::other)?;
        snapshot.keep();
        let (applied, _) = self.state.applied();
        if applied != meta.last_log_id {
            return Err(io::Error::other(format!(
                "the snapshot said to end at {:?} and ends at {applied:?}",
                meta.last_log_id
            )));
        }
        self.current = None;
        tracing::info!(?applied, "installed a snapshot");
        self.observers.each(|observer| observer.reset());
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> io::Result<
        Option<
            Snapshot<
                openraft::alias::CommittedLeaderIdOf<TypeConfig>,
                u64,
                super::RaftPeer,
                SnapshotData,
            >,
        >,
    > {
        let mut builder = self.get_snapshot_builder().await;
        // The state itself is persistent, so any checkpoint of it is the current snapshot.
        match self.state.applied() {
            (None, _) => Ok(None),
            (Some(_), _) => builder.build_snapshot().await.map(Some),
        }
    }
}

/// Makes checkpoints.
pub struct SnapshotBuilder {
    state: State,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(
        &mut self,
    ) -> io::Result<
        Snapshot<
            openraft::alias::CommittedLeaderIdOf<TypeConfig>,
            u64,
            super::RaftPeer,
            SnapshotData,
        >,
    > {
        let state = self.state.clone();
        let (path, last_log_id, last_membership) =
            tokio::task::spawn_blocking(move || state.checkpoint())
                .await
                .map_err(io::Error::other)?
                .map_err(io::Error::other)?;
        Ok(Snapshot {
            meta: SnapshotMeta {
                last_log_id,
                last_membership,
            },
            snapshot: SnapshotData::temporary(path),
        })
    }
}

//! Changes that are answered ahead of the cluster: trying to, waiting for them, sending them, giving leases back. What is known
//! and what may be answered is [`crate::ahead`]'s matter.

use std::sync::Arc;
use std::time::Duration;

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, Position};
use heliofs_proto::v1::{self, change, command::Op};
use meta_client::{ClientError, Recalled, Session, Watcher};

use super::Fs;
use crate::ahead::{Plan, Queued, State};
use crate::errno::{Errno, FsResult};
use crate::inode::Inode;

/// Changes that travel together.
const BATCH: usize = 64;

/// How long a change waits for others to travel with, unless somebody waits for it.
const GATHER: Duration = Duration::from_millis(2);

/// Inode numbers reserved at once, and how few are left when more are.
const INOS: u32 = 4096;
const INOS_LOW: u64 = 2048;

/// An operation waits no longer than this for changes to take effect: as long as for an answer.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(30);

/// Dirty files of a directory that is given back are stored within this time.
const STORE_MAX: Duration = Duration::from_secs(10);

/// Nothing is answered ahead while this lives.
struct Frozen<'a>(&'a Fs);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let ahead = &self.0.coherence.ahead;
        ahead.lock().thaw();
        ahead.wake();
    }
}

/// Somebody waits for changes to be settled while this lives.
struct Waiting<'a>(&'a Fs);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.coherence.ahead.lock().waits(-1);
    }
}

impl Fs {
    /// Tries an operation on what is known ahead, as often as it has to wait; `None`: it goes the usual way.
    pub(super) async fn ahead<T>(
        &self,
        mut plan: impl FnMut(&mut State) -> Plan<T>,
    ) -> FsResult<Option<T>> {
        let ahead = &self.coherence.ahead;
        let give_up = tokio::time::Instant::now() + WAIT_MAX;
        loop {
            let (planned, queued, answered) = {
                let mut state = ahead.lock();
                let mark = state.mark();
                let planned = match state.is_idle() || !self.trusted() {
                    true => Plan::Usual,
                    false => plan(&mut state),
                };
                let answered = state.mark() - mark;
                let queued = match answered {
                    0 => 0,
                    _ => state.queued(),
                };
                (planned, queued, answered)
            };
            if answered > 0 {
                self.metrics.ahead_changes.inc_by(answered);
            }
            let mut moved = match planned {
                Plan::Answered(answer) => {
                    // Who sends knows of those in between.
                    if queued == 1 || queued == BATCH {
                        ahead.work.notify_one();
                    }
                    return Ok(Some(answer));
                }
                Plan::Usual => return Ok(None),
                Plan::Wait => ahead.watch(),
            };
            ahead.work.notify_one();
            // What moved since the look is seen by another one soon.
            let again = tokio::time::timeout(Duration::from_millis(5), moved.changed());
            if again.await.is_err() && tokio::time::Instant::now() > give_up {
                return Err(Errno::IO);
            }
        }
    }

    /// Waits until the changes up to `mark` have an outcome.
    async fn settle_up_to(&self, mark: u64) {
        let ahead = &self.coherence.ahead;
        let mut moved = ahead.watch();
        {
            let mut state = ahead.lock();
            if state.has_settled(mark) {
                return;
            }
            state.waits(1);
        }
        let _waiting = Waiting(self);
        ahead.work.notify_one();
        while !ahead.lock().has_settled(mark) {
            if moved.changed().await.is_err() {
                return;
            }
        }
    }

    async fn settle_soon(&self, mark: u64) -> FsResult<()> {
        if mark == 0 {
            return Ok(());
        }
        let settled = tokio::time::timeout(WAIT_MAX, self.settle_up_to(mark));
        settled.await.map_err(|_| Errno::IO)
    }

    /// Waits until what was answered about these inodes, and about names in them, has taken effect: for questions to the cluster.
    pub(crate) async fn settled(&self, inos: &[u64]) -> FsResult<()> {
        let mark = self.coherence.ahead.lock().mark_of(inos);
        self.settle_soon(mark).await
    }

    /// Waits until everything that was answered has taken effect. Errors: what was answered about `ino`, or about names in it,
    /// has not and will not.
    pub async fn settled_all(&self, ino: Option<u64>) -> FsResult<()> {
        let mark = self.coherence.ahead.lock().mark();
        self.settle_soon(mark).await?;
        match ino.and_then(|ino| self.coherence.ahead.lock().failure(ino)) {
            Some(errno) => Err(errno),
            None => Ok(()),
        }
    }

    /// Before something is proposed in the usual way: gives back what is leased of the directories whose names it changes, and
    /// waits until all that was answered before has taken effect (data: what was answered about its files).
    pub(super) async fn make_way(&self, op: &Op) -> FsResult<()> {
        let (leased, inos, mark) = {
            let mut state = self.coherence.ahead.lock();
            if state.is_idle() {
                return Ok(());
            }
            let (mut directories, inos) = named(op);
            if let Op::Link(op) = op {
                // It is to have more than one name.
                directories.extend(state.parent_of(op.ino));
            }
            let removes =
                matches!(op, Op::Rename(_)) || matches!(op, Op::Unlink(op) if op.directory);
            if removes {
                directories.extend(self.moved_directories(op));
            }
            if let Some(errno) = directories.iter().find_map(|ino| state.failure_once(*ino)) {
                return Err(errno);
            }
            // Changes of names take effect in the order in which they are answered, wherever they are. Data has its own order.
            let mark = match op {
                Op::Commit(_) => state.mark_of(&inos),
                _ => state.mark(),
            };
            (state.in_the_way(&directories), inos, mark)
        };
        if !leased.is_empty() {
            self.give_back(&leased).await?;
        }
        self.settle_soon(mark).await?;
        self.coherence.ahead.lock().ask_about(&inos);
        Ok(())
    }

    /// Inodes that the names of a rename or a rmdir stand for, as far as known.
    fn moved_directories(&self, op: &Op) -> Vec<u64> {
        let names: Vec<(u64, &[u8])> = match op {
            Op::Unlink(op) => vec![(op.parent, &op.name)],
            Op::Rename(op) => vec![(op.parent, &op.name), (op.new_parent, &op.new_name)],
            _ => Vec::new(),
        };
        let known = names
            .into_iter()
            .map(|(parent, name)| self.coherence.cache.lookup(parent, name));
        known
            .filter_map(|found| match found {
                crate::meta_cache::Found::Attr(attr, _) => Some(attr.ino),
                _ => None,
            })
            .collect()
    }

    /// After a change in the usual way: what it changed of leased directories is not known ahead.
    pub(super) async fn made_way(&self, reply: &v1::Reply) {
        let attrs = [
            &reply.attr,
            &reply.parent,
            &reply.new_parent,
            &reply.replaced,
        ];
        let inos: Vec<u64> = attrs.into_iter().flatten().map(|attr| attr.ino).collect();
        let leased = {
            let state = self.coherence.ahead.lock();
            if state.is_idle() {
                return;
            }
            state.in_the_way(&inos)
        };
        if !leased.is_empty()
            && let Err(error) = self.give_back(&leased).await
        {
            tracing::warn!(%error, "a changed directory could not be given back");
        }
    }

    /// Gives leases of directories back.
    async fn give_back(&self, directories: &[u64]) -> FsResult<()> {
        let ahead = &self.coherence.ahead;
        let mark = {
            let mut state = ahead.lock();
            state.freeze();
            state.mark()
        };
        let frozen = Frozen(self);
        self.settle_soon(mark).await?;
        {
            let mut state = ahead.lock();
            directories.iter().for_each(|ino| state.dropped(*ino));
        }
        let session = self.session();
        for ino in directories {
            session.return_directory(Ino(*ino));
        }
        drop(frozen);
        Ok(())
    }

    /// Leases of directories that are wanted back, or (without a grant's number) are not to be used any more, for which
    /// everything is frozen already. Inode 0: all of them.
    pub(crate) fn return_directories(self: &Arc<Self>, recalled: Vec<Recalled>) {
        if recalled.is_empty() {
            return;
        }
        let frozen = recalled.iter().filter(|recall| recall.grant == 0).count();
        let mark = {
            let mut state = self.coherence.ahead.lock();
            state.freeze();
            state.mark()
        };
        let fs = self.clone();
        self.runtime.spawn(async move {
            let _frozen = Frozen(&fs);
            let _before: Vec<_> = (0..frozen).map(|_| Frozen(&fs)).collect();
            let stop = fs.stop_token();
            tokio::select! {
                () = fs.settle_up_to(mark) => {}
                () = stop.cancelled() => return,
            }
            let directories: Vec<u64> = match recalled.iter().any(|recall| recall.ino == 0) {
                true => fs.coherence.ahead.lock().leased(),
                false => recalled.iter().map(|recall| recall.ino).collect(),
            };
            fs.store_unleased(&directories).await;
            {
                let mut state = fs.coherence.ahead.lock();
                directories.iter().for_each(|ino| state.dropped(*ino));
            }
            let session = fs.session();
            for ino in directories {
                session.return_directory(Ino(ino));
            }
            for recall in recalled.iter().filter(|recall| recall.grant != 0) {
                session.return_lease(*recall);
            }
        });
    }

    /// Stores files that are closed and not committed, and of which this mount does not have the write lease: until now nobody
    /// could see them.
    async fn store_unleased(self: &Arc<Self>, directories: &[u64]) {
        if self.dirty.lock().is_empty() {
            return;
        }
        let session = self.session();
        let inos: Vec<u64> = {
            let state = self.coherence.ahead.lock();
            directories
                .iter()
                .flat_map(|ino| state.inos_in(*ino))
                .collect()
        };
        let dirty: Vec<Arc<Inode>> = {
            let dirty = self.dirty.lock();
            let inodes = inos.iter().filter_map(|ino| dirty.get(ino));
            let unleased = inodes.filter(|inode| !session.holds_write_lease(Ino(inode.ino)));
            unleased.cloned().collect()
        };
        if dirty.is_empty() {
            return;
        }
        let stored = tokio::time::timeout(STORE_MAX, self.flush_many(&dirty)).await;
        match stored {
            Ok(outcomes) => {
                for (inode, outcome) in dirty.iter().zip(outcomes) {
                    if let Err(error) = outcome {
                        tracing::warn!(ino = inode.ino, %error, "a file that others may see now is not stored yet");
                    }
                }
            }
            Err(_) => tracing::warn!("files that others may see now are not stored yet"),
        }
    }

    /// A directory was made in the usual way, by `session`: from here on its names are this mount's, if the lease came with it
    /// and nothing has happened in it yet.
    pub(super) fn directory_made(&self, session: &Session, attr: &v1::Attr, at: Position) {
        let ino = Ino(attr.ino);
        let ahead = &self.coherence.ahead;
        {
            let mut state = ahead.lock();
            if !session.holds_directory(ino) {
                return;
            }
            let untouched =
                matches!(self.coherence.cache.attr(attr.ino), Some((_, known)) if known == at);
            if untouched && session.id() == self.session().id() {
                state.granted(session.id(), *attr, at);
                ahead.work.notify_one();
                return;
            }
        }
        session.return_directory(ino);
    }

    /// Sends what was answered ahead, until the mount ends.
    pub(super) async fn run_ahead(self: Arc<Self>) {
        let ahead = &self.coherence.ahead;
        let stop = self.stop_token();
        loop {
            if ahead.lock().needs_inos(INOS_LOW) {
                self.reserve_inos().await;
            }
            let due = ahead.lock().due(BATCH, GATHER);
            match due {
                Ok(None) => {
                    let changes = ahead.lock().take(BATCH);
                    self.send_changes(changes).await;
                }
                Ok(Some(at)) => tokio::select! {
                    () = tokio::time::sleep_until(at.into()) => {
                        let changes = ahead.lock().take(BATCH);
                        self.send_changes(changes).await;
                    }
                    () = ahead.work.notified() => {}
                    () = stop.cancelled() => return,
                },
                Err(()) => tokio::select! {
                    () = ahead.work.notified() => {}
                    () = stop.cancelled() => return,
                },
            }
        }
    }

    async fn reserve_inos(&self) {
        let session = self.session();
        let op = Op::InosReserve(v1::InosReserve { count: INOS });
        match session.mutate(v1::Caller::default(), op).await {
            Ok(reply) => {
                let inos = reply.value..reply.value + u64::from(INOS);
                self.coherence.ahead.lock().reserved(session.id(), inos);
            }
            Err(error) => {
                tracing::warn!(%error, "no inode numbers could be reserved: changes wait for the cluster");
                self.coherence.ahead.lock().forget_inos();
                self.coherence.return_all_directories();
            }
        }
        self.coherence.ahead.wake();
    }

    async fn send_changes(self: &Arc<Self>, changes: Vec<Queued>) {
        if changes.is_empty() {
            return;
        }
        let session = self.session();
        if self.coherence.ahead.lock().session() != Some(session.id()) {
            // Another session can't know what it may do.
            return self.changes_failed(&session, &changes, Errno::IO);
        }
        let generation = self.coherence.cache.generation();
        let sent = changes.iter().map(|queued| queued.change.clone()).collect();
        let reply = match session.batch(sent).await {
            Ok(reply) => reply,
            Err(error) => {
                tracing::error!(%error, "changes that were answered did not take effect, as far as is known");
                let errno = match error {
                    ClientError::Verdict(verdict) => verdict.into(),
                    _ => Errno::IO,
                };
                return self.changes_failed(&session, &changes, errno);
            }
        };
        let at = reply.position.map(Position::from).unwrap_or_default();
        self.saw_epoch(at);
        if reply.error() != FsError::None {
            return self.changes_failed(&session, &changes, reply.error().into());
        }
        self.metrics.ahead_batches.inc();
        let (done, refused) = changes.split_at((reply.applied as usize).min(changes.len()));
        self.forget_changed(done, at);
        let known = {
            let mut state = self.coherence.ahead.lock();
            let (known, made) = state.took_effect(done, at);
            for ino in made {
                // Without a lease of its own it is this mount's only as long as the directory that names it is.
                if !session.holds_directory(Ino(ino)) {
                    state.freeze();
                    self.coherence.return_directory(ino);
                }
            }
            for ino in state.surplus() {
                state.freeze();
                self.coherence.return_directory(ino);
            }
            known
        };
        let cache = &self.coherence.cache;
        for attr in &known {
            cache.put_attr(generation, attr, at);
            if attr.kind() == v1::FileKind::File {
                cache.keep_pages(attr.ino, attr.data_seq);
            }
        }
        for queued in done {
            if let Some(change::Op::Unlink(op)) = &queued.change.op
                && op.directory
            {
                queued
                    .inos
                    .iter()
                    .for_each(|ino| session.return_directory(Ino(*ino)));
            }
        }
        if !refused.is_empty() {
            let why = reply.refused();
            tracing::error!(?why, change = ?refused[0].change, "the cluster refuses a change that was answered");
            self.changes_failed(&session, refused, reply.refused().into());
        } else if !reply.deferrable {
            self.coherence.return_all_directories();
        }
        self.coherence.ahead.wake();
        for ino in &reply.orphans {
            self.orphaned(*ino);
        }
    }

    /// What the caches know from before these changes is outdated; files that they made have a content now.
    fn forget_changed(&self, changes: &[Queued], at: Position) {
        let cache = &self.coherence.cache;
        let mut directories: Vec<u64> = changes.iter().flat_map(Queued::parents).collect();
        directories.sort_unstable();
        directories.dedup();
        for ino in directories {
            cache.invalidate(&v1::Invalidation {
                position: Some(at.into()),
                ino,
                attr: true,
                all_names: true,
                ..v1::Invalidation::default()
            });
            self.coherence.name_changed(ino, None, at);
        }
        for queued in changes {
            for ino in &queued.inos {
                cache.attr_changed(*ino, at);
            }
            if let Some(change::Op::Create(op)) = &queued.change.op
                && let Some(inode) = self.coherence.inodes.get(op.ino)
                && let Some(content) = &mut inode.lock().content
                && content.data_seq == 0
            {
                content.data_seq = at.seq;
            }
        }
    }

    /// These changes, and whatever was answered after them, did not take effect.
    fn changes_failed(&self, session: &Session, changes: &[Queued], errno: Errno) {
        let (leased, behind) = {
            let mut state = self.coherence.ahead.lock();
            let behind = state.queued();
            (state.failed(changes, errno), behind)
        };
        let lost = changes.len() + behind;
        self.metrics.ahead_lost.inc_by(lost as u64);
        if behind > 0 {
            tracing::error!(behind, "nor did what was answered after them");
        }
        for queued in changes {
            tracing::error!(change = ?queued.change.op, %errno, "a change that was answered did not take effect");
        }
        for ino in leased {
            session.return_directory(Ino(ino));
        }
        self.coherence.forget_all();
        self.coherence.ahead.wake();
    }
}

/// The directories whose names, or which, a command changes; and whatever else it is about.
fn named(op: &Op) -> (Vec<u64>, Vec<u64>) {
    match op {
        Op::Create(op) => (vec![op.parent], vec![]),
        Op::Link(op) => (vec![op.parent], vec![op.ino]),
        Op::Unlink(op) => (vec![op.parent], vec![]),
        Op::Rename(op) => (vec![op.parent, op.new_parent], vec![]),
        Op::SetAttr(op) => (vec![op.ino], vec![op.ino]),
        Op::SetXattr(op) => (vec![op.ino], vec![op.ino]),
        Op::RemoveXattr(op) => (vec![op.ino], vec![op.ino]),
        Op::Commit(op) => (vec![], op.files.iter().map(|file| file.ino).collect()),
        Op::Fallocate(op) => (vec![], vec![op.ino]),
        Op::CopyRange(op) => (vec![], vec![op.source, op.target]),
        _ => (vec![], vec![]),
    }
}

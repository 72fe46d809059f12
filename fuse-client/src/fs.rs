//! The file system on a session and a segment store, without FUSE.
//!
//! - this file: [`Fs`], its parts, and how answers reach the caches
//! - [`attr`]: getattr, setattr; [`namespace`]: lookup and everything that makes, moves or removes names; [`dir`]: listings
//! - [`file`]: open, close; [`data`]: read, write, sync, truncate, fallocate, copy, seek
//! - [`xattr`]: extended attributes and ACLs; [`lock`]: fcntl and flock locks
//! - `ahead`: changes that are answered before the cluster has them
//! - [`background`]: what runs beside: session events, deletion of dead segments
//!
//! Operations wait through failovers within the session's deadline.

mod adopt;
mod ahead;
pub mod attr;
pub mod background;
pub mod data;
pub mod dir;
pub mod file;
pub mod lock;
pub mod namespace;
pub mod xattr;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use arc_swap::ArcSwap;
use blockstore::SegmentStore;
use heliofs_proto::ids::{Position, SegmentId, VolumeId};
use heliofs_proto::v1;
use meta_client::{ClientError, Session, Watcher};
use parking_lot::Mutex;
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::coherence::Coherence;
use crate::errno::{Errno, FsResult};
use crate::handles::Handles;
use crate::inode::Inode;
use crate::meta_cache::Generation;
use crate::metrics::Metrics;
use crate::options::FsOptions;
use crate::write::pack::Packer;
use crate::write::segment_ids::SegmentIds;
use crate::write::staging::Staging;
use dir::DirHandle;
use file::FileHandle;

/// How long the kernel may keep attributes and names at most: the lease.
pub const KERNEL_LIFETIME_MAX: Duration = Duration::from_secs(1);

/// Full segments built and uploaded at once; more wait with their bytes where they are.
const UPLOADS_MAX: usize = 16;

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Caller {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Thread, in the mount's process name space; 0 if it lies outside.
    pub pid: u32,
}

impl From<Caller> for v1::Caller {
    fn from(caller: Caller) -> Self {
        Self {
            uid: caller.uid,
            gid: caller.gid,
            pid: caller.pid,
            snapshot: false,
        }
    }
}

/// Attributes as an operation answers them.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// With uncommitted data shown.
    pub attr: v1::Attr,
    /// The volume's position that they reflect.
    pub at: Position,
    /// The cache's generation when they were asked for.
    pub generation: Generation,
}

/// See the module. Shared by `Arc`.
pub struct Fs {
    pub(crate) session: ArcSwap<Session>,
    pub(crate) volume: VolumeId,
    store: Arc<SegmentStore>,
    coherence: Arc<Coherence>,
    options: FsOptions,
    metrics: Metrics,
    clock: Clock,
    segment_ids: SegmentIds,
    /// Takes segments that were stored and that no commit will name.
    abandoned: UnboundedSender<SegmentId>,
    packer: Packer,
    /// Segments that are built and uploaded at once.
    upload_turns: tokio::sync::Semaphore,
    /// Not while a new session takes over: what is open then must be counted exactly.
    adoption: tokio::sync::RwLock<()>,
    /// Rung when a new session has taken over.
    renewals: tokio::sync::Notify,
    /// Bytes that the volume's limit leaves, when last asked; 0 before.
    room: AtomicU64,
    files: Handles<FileHandle>,
    dirs: Handles<DirHandle>,
    /// Inodes with uncommitted data.
    dirty: Mutex<HashMap<u64, Arc<Inode>>>,
    runtime: tokio::runtime::Handle,
    /// With writeback, or when an earlier mount has left something there.
    pub(crate) staging: Option<Arc<Staging>>,
    /// The volume's, as far as known.
    pub(crate) epoch: AtomicU64,
    /// Bytes of segments stored so far.
    pub(crate) stored_bytes: AtomicU64,
    /// Ends the background.
    stop: CancellationToken,
    /// The path of a file that could not be read is being asked for.
    pub(crate) naming: AtomicBool,
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fs")
            .field("volume", &self.volume)
            .finish_non_exhaustive()
    }
}

impl Fs {
    /// A file system on `session`, which must have `coherence` as its watcher, and `store`. Its background runs on `runtime`.
    pub fn start(
        runtime: &tokio::runtime::Handle,
        session: Session,
        coherence: Arc<Coherence>,
        store: Arc<SegmentStore>,
        staging: Option<Arc<Staging>>,
        options: FsOptions,
        metrics: Metrics,
    ) -> Arc<Self> {
        let (abandoned, unnamed) = tokio::sync::mpsc::unbounded_channel();
        let fs = Arc::new(Self {
            abandoned,
            volume: session.volume_id(),
            session: ArcSwap::from_pointee(session),
            store,
            coherence,
            options,
            metrics,
            clock: Clock::default(),
            segment_ids: SegmentIds::default(),
            packer: Packer::default(),
            upload_turns: tokio::sync::Semaphore::new(UPLOADS_MAX),
            adoption: tokio::sync::RwLock::new(()),
            renewals: tokio::sync::Notify::new(),
            room: AtomicU64::new(0),
            files: Handles::default(),
            dirs: Handles::default(),
            dirty: Mutex::default(),
            staging,
            epoch: AtomicU64::new(0),
            stored_bytes: AtomicU64::new(0),
            runtime: runtime.clone(),
            stop: CancellationToken::new(),
            naming: AtomicBool::new(false),
        });
        fs.start_background(unnamed);
        fs
    }

    /// The session in use; another one after it was lost.
    pub fn session(&self) -> Session {
        Session::clone(&self.session.load())
    }

    /// What is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Caches and notices.
    pub fn coherence(&self) -> &Arc<Coherence> {
        &self.coherence
    }

    /// Where tasks run.
    pub fn runtime(&self) -> &tokio::runtime::Handle {
        &self.runtime
    }

    /// Cached answers may be used.
    fn trusted(&self) -> bool {
        self.session.load().lease_valid()
    }

    /// How long the kernel may keep an answer about `ino` (and that `name` in a parent names it) that reflects `entry`'s
    /// position. Call it under [`Coherence::gate`], and answer the kernel under it.
    pub fn kernel_lifetime(
        &self,
        ino: u64,
        at: Position,
        generation: Generation,
        name: Option<(u64, &[u8])>,
    ) -> Duration {
        let cache = &self.coherence.cache;
        if generation == cache.generation() && cache.is_fresh(ino, at, name) {
            let session = self.session.load();
            if session.lease_left().is_zero() {
                return Duration::ZERO;
            }
            // Before the lease is read: whoever takes it back makes the kernel forget what is noted by then.
            self.coherence.kernel_told(ino, name);
            session.lease_left().min(KERNEL_LIFETIME_MAX)
        } else {
            Duration::ZERO
        }
    }

    /// Keeps attributes that the server told, wherever they are of use.
    fn saw(&self, generation: Generation, attr: &v1::Attr, at: Position) {
        self.saw_as(generation, attr, at, false);
    }

    fn saw_as(&self, generation: Generation, attr: &v1::Attr, at: Position, own_content: bool) {
        self.clock.saw(attr.ctime);
        self.coherence.cache.put_attr(generation, attr, at);
        if attr.kind() == v1::FileKind::File
            && let Some(inode) = self.coherence.inodes.get(attr.ino)
        {
            inode.lock().saw(attr, at, own_content);
        }
    }

    /// Attributes as this mount shows them: with uncommitted data, and with what was answered ahead.
    fn show(&self, mut attr: v1::Attr) -> v1::Attr {
        if let Some(ahead) = self.coherence.ahead.lock().known(attr.ino) {
            attr = ahead;
        }
        if attr.kind() == v1::FileKind::File
            && let Some(inode) = self.coherence.inodes.get(attr.ino)
        {
            inode.lock().overlay(&mut attr);
        }
        attr
    }

    /// Proposes a change and keeps every attribute that the reply tells.
    async fn mutate(&self, caller: Caller, op: v1::command::Op) -> FsResult<Changed> {
        use v1::command::Op;
        self.writable()?;
        let generation = self.coherence.cache.generation();
        let own_content = match &op {
            Op::Fallocate(_) | Op::CopyRange(_) => true,
            Op::SetAttr(change) => change.size.is_some(),
            _ => false,
        };
        self.make_way(&op).await?;
        let reply = self.session().mutate(caller.into(), op).await?;
        self.made_way(&reply).await;
        Ok(self.absorb(generation, reply, own_content))
    }

    /// Proposes a commit. What it says about each file is in the reply, unless it is refused as a whole.
    pub(crate) async fn commit(
        &self,
        op: v1::command::Op,
    ) -> Result<(v1::Reply, Position), ClientError> {
        let generation = self.coherence.cache.generation();
        let caller = Caller::default().into();
        if let Err(errno) = self.make_way(&op).await {
            // The next flush tries again.
            return Err(ClientError::Unavailable {
                waited: ahead::WAIT_MAX,
                detail: format!("what was answered before has not taken effect: {errno}"),
            });
        }
        let reply = self.session().mutate_raw(caller, op).await?;
        let at = reply.position.map(Position::from).unwrap_or_default();
        self.saw_epoch(at);
        for attr in reply.files.iter().filter_map(|file| file.attr.as_ref()) {
            self.saw_as(generation, attr, at, true);
        }
        Ok((reply, at))
    }

    /// Keeps every attribute that a reply tells.
    fn absorb(&self, generation: Generation, reply: v1::Reply, own_content: bool) -> Changed {
        let at = reply.position.map(Position::from).unwrap_or_default();
        for attr in [
            &reply.attr,
            &reply.parent,
            &reply.new_parent,
            &reply.replaced,
        ]
        .into_iter()
        .flatten()
        {
            self.saw_as(generation, attr, at, own_content);
        }
        self.coherence.ahead.lock().saw(at);
        for ino in &reply.forget {
            // As if somebody else had changed it: what the command did there is not in the reply.
            self.coherence.invalidated(&v1::Invalidation {
                position: reply.position,
                ino: *ino,
                attr: true,
                all_names: true,
                ..v1::Invalidation::default()
            });
        }
        Changed {
            reply,
            at,
            generation,
        }
    }

    fn writable(&self) -> FsResult<()> {
        let waits = self.options.follow_promotion && self.session().welcome().mirror;
        if self.options.read_only || waits {
            return Err(Errno::ROFS);
        }
        Ok(())
    }
}

/// A change that took effect.
pub(crate) struct Changed {
    pub(crate) reply: v1::Reply,
    pub(crate) at: Position,
    generation: Generation,
}

impl Changed {
    /// The inode that the change was about, as this mount shows it.
    fn entry(&self, fs: &Fs) -> FsResult<Entry> {
        let attr = self.reply.attr.ok_or_else(|| {
            tracing::error!(reply = ?self.reply, "a reply without attributes");
            Errno::IO
        })?;
        Ok(Entry {
            attr: fs.show(attr),
            at: self.at,
            generation: self.generation,
        })
    }
}

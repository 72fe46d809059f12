//! One client's session with the leader of a volume: a long-lived stream that survives reconnects and failovers.
//!
//! - this file: [`Session`], its options and events
//! - `calls`: reads, opens and locks, typed; mutations
//! - `state`: what is unanswered, queued, open and locked, under one mutex; pure but for the clock it is handed
//! - `wire`: the outgoing frames, built from everything queued at the moment they are polled
//! - `driver`: reads frames, reconnects; `clock`: pings, deadlines, lost leases
//! - [`window`], [`lease`], [`locks`], `opens`, `pulse` (pings): pure parts
//!
//! **Order.** Frames are taken in the order of the wire by one task. Of one frame, invalidations come before responses. A
//! response that follows an invalidation on the wire is completed after [`Watcher::invalidated`] returned. The other way
//! round nothing is promised: a caller may wake up with a response after later invalidations were delivered, which is why
//! it asks [`Session::cacheable`] under its cache's lock before it caches.

mod calls;
mod clock;
mod driver;
pub mod lease;
pub mod locks;
mod opens;
mod pulse;
mod state;
#[cfg(test)]
mod tests;
pub mod window;
mod wire;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use heliofs_proto::ids::{Ino, Position, SessionId, VolumeId};
use heliofs_proto::v1;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::cluster::Cluster;
use crate::error::AttachError;
pub use calls::position_of;
use driver::{Driver, Shared};

/// How a session presents itself, and how long its operations wait.
#[derive(Clone)]
pub struct SessionOptions {
    /// The volume's name.
    pub volume: String,
    /// This machine's name, for `heliofs status`.
    pub host: String,
    /// Where the volume is mounted; empty for commands.
    pub mount_point: String,
    /// The build, for `heliofs status`.
    pub build: String,
    /// The process.
    pub pid: u32,
    /// The session never mutates.
    pub read_only: bool,
    /// A command's session, not a mount's.
    pub short_lived: bool,
    /// An operation without an answer for this long fails. A blocking lock waits without bound.
    pub op_deadline: Duration,
    /// For tokens per volume; empty.
    pub volume_token: Bytes,
    /// Told of invalidations before later responses are completed. With a watcher, [`Event::Invalidate`] is not sent.
    pub watcher: Option<Arc<dyn Watcher>>,
    /// Ask for write leases with opens for writing and creates. Recalls go to the watcher.
    pub takes_leases: bool,
    /// Take write leases of directories with their making. Recalls go to the watcher, too.
    pub takes_directories: bool,
    /// At a mirror with a bucket of its own: read only what that bucket has all of.
    pub complete: bool,
}

impl Default for SessionOptions {
    /// Operations wait for up to 30 s, everything else is empty.
    fn default() -> Self {
        Self {
            volume: String::new(),
            host: String::new(),
            mount_point: String::new(),
            build: String::new(),
            pid: std::process::id(),
            read_only: false,
            short_lived: false,
            op_deadline: Duration::from_secs(30),
            volume_token: Bytes::new(),
            watcher: None,
            takes_leases: false,
            takes_directories: false,
            complete: false,
        }
    }
}

/// A write lease that the server wants back.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Recalled {
    /// The file.
    pub ino: u64,
    /// Which of its grants.
    pub grant: u64,
}

impl From<v1::WriteLease> for Recalled {
    fn from(lease: v1::WriteLease) -> Self {
        Self {
            ino: lease.ino,
            grant: lease.grant,
        }
    }
}

/// A cache that must not outlive what the server said. Called on the task that reads the stream: must not block, must not
/// call the session, and hands notifications of the kernel to another thread.
pub trait Watcher: Send + Sync {
    /// Another session changed something. [`Session::cacheable`] already knows of it when this is called.
    fn invalidated(&self, invalidation: &v1::Invalidation);

    /// Forget everything: the server no longer remembers what this session was told (the stream was resumed, perhaps with
    /// another leader), the lease was lost, or the session is gone. Comes before any later response or renewed lease.
    fn forget_all(&self);

    /// The write lease of a file is wanted back: commit what was written under it, then call [`Session::return_lease`].
    /// Somebody waits.
    fn recalled(&self, recall: Recalled);
}

/// What happens to a session besides answers. Events are for acting on, not for ordering: see [`Watcher`].
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Another session changed something (only without a [`Watcher`]).
    Invalidate(v1::Invalidation),
    /// The stream broke; it is being resumed, and operations wait.
    Disconnected,
    /// The lease ran out: cached answers can't be trusted. Comes once per loss.
    LeaseLost,
    /// The lease is live: for the first time, or again after a loss.
    LeaseRegained,
    /// The stream was resumed. What was cached before may have changed without notice.
    Reattached,
    /// The session ended for the reason given; all operations fail from now on. The last event.
    Gone(String),
}

/// Taken before a request; tells later whether its answer may be cached. See [`Session::cacheable`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CacheTicket {
    generation: u64,
}

/// A cheap handle on one session. When the last one is dropped the stream ends without a farewell, and the server ends the
/// session after its time-out; [`Session::detach`] is the graceful way.
#[derive(Clone)]
pub struct Session {
    handle: Arc<Handle>,
}

/// Ends the tasks when the last handle is gone; the tasks themselves hold only [`Shared`].
struct Handle {
    shared: Arc<Shared>,
    stop: CancellationToken,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Session {
    /// Begins a session on the volume's leader, waiting for one through elections as long as the cluster's options say.
    ///
    /// Errors: no node, no leader, refused token, no such volume. Needs a tokio runtime, which also runs its tasks.
    pub async fn attach(cluster: Cluster, options: SessionOptions) -> Result<Self, AttachError> {
        let stop = CancellationToken::new();
        let shared = Driver::start(cluster, options, stop.clone()).await?;
        Ok(Self {
            handle: Arc::new(Handle { shared, stop }),
        })
    }

    /// A new session with the same cluster and options: for the owner of one that is gone. The old one's opens and locks are
    /// not carried over.
    pub async fn renew(&self) -> Result<Self, AttachError> {
        let shared = self.shared();
        Self::attach(shared.cluster.clone(), shared.options.clone()).await
    }

    /// Ends the session: what is queued is sent, the server releases opens and locks and ends the stream. Waits for that, a
    /// second at most; operations of other handles fail from now on.
    pub async fn detach(&self) {
        self.shared().begin_detach();
        let ended = self.shared().ended.cancelled();
        if tokio::time::timeout(Duration::from_secs(1), ended)
            .await
            .is_err()
        {
            tracing::debug!("the server did not end the stream in time; the session will expire");
        }
        self.handle.stop.cancel();
        self.shared().end("detached");
    }

    /// What the server said when the stream was last attached: lease, time-out, peers, storage, settings.
    pub fn welcome(&self) -> Arc<v1::Welcome> {
        self.shared().state.lock().welcome.clone()
    }

    /// The session's id; does not change on reconnect.
    pub fn id(&self) -> SessionId {
        SessionId(self.welcome().session)
    }

    /// The volume's id.
    pub fn volume_id(&self) -> VolumeId {
        VolumeId(self.welcome().volume_id)
    }

    /// Where the volume's objects are, with the keys that open the bucket.
    pub fn storage(&self) -> v1::StorageConfig {
        self.welcome().storage.clone().unwrap_or_default()
    }

    /// The volume's settings as of the last attach.
    pub fn settings(&self) -> v1::VolumeSettings {
        self.welcome().settings.unwrap_or_default()
    }

    /// The cluster that the session talks to.
    pub fn cluster(&self) -> &Cluster {
        &self.shared().cluster
    }

    /// Whether cached answers may be used: a ping that was answered after a quorum confirmed the leader was sent less than
    /// one lease ago. False until the first pong after attach. Cheap: one atomic load and one look at the clock.
    pub fn lease_valid(&self) -> bool {
        self.shared().lease.valid()
    }

    /// How much longer [`Session::lease_valid`] holds without another pong: what a cached answer may be passed on for.
    pub fn lease_left(&self) -> Duration {
        self.shared().lease.left()
    }

    /// Whether the session has ended; why, when it has.
    pub fn gone(&self) -> Option<String> {
        self.shared().state.lock().gone().map(str::to_owned)
    }

    /// Events from now on. Taken once; a second call returns `None`. Unbounded: without a [`Watcher`] whoever takes it must
    /// keep reading.
    pub fn events(&self) -> Option<mpsc::UnboundedReceiver<Event>> {
        let mut events = self.shared().events.lock();
        if events.is_some() {
            return None;
        }
        let (sender, receiver) = mpsc::unbounded_channel();
        *events = Some(sender);
        Some(receiver)
    }

    /// The greatest `seq` of the invalidations delivered so far. A reply whose position is below it must not be cached.
    pub fn last_invalidation_seq(&self) -> u64 {
        self.shared().invalidated_seq.load(Ordering::Acquire)
    }

    /// Take before a request whose answer is to be cached.
    pub fn cache_ticket(&self) -> CacheTicket {
        CacheTicket {
            generation: self.shared().generation.load(Ordering::Acquire),
        }
    }

    /// Whether an answer at `position`, to a request made after `ticket` was taken, may be cached: no later invalidation was
    /// delivered and nothing made the session forget what it knew.
    ///
    /// Call it while holding the lock that [`Watcher::invalidated`] and [`Watcher::forget_all`] take: both move what this
    /// looks at *before* they are called, so that either this says no, or they find the new entry.
    pub fn cacheable(&self, ticket: CacheTicket, position: Position) -> bool {
        ticket == self.cache_ticket() && position.seq >= self.last_invalidation_seq()
    }

    /// Whether this session holds the file's write lease, so that whoever wants to see what was written asks here first. False
    /// while the leader has not been heard for a lease.
    pub fn holds_write_lease(&self, ino: Ino) -> bool {
        self.lease_valid() && self.shared().state.lock().holds_lease(ino.0)
    }

    /// Whether this session holds the write lease of a directory that it made, and nobody wants it back. For as long as the
    /// lease of the session is valid ([`Session::lease_valid`]), nobody else sees what is in it.
    pub fn holds_directory(&self, ino: Ino) -> bool {
        self.shared().state.lock().holds_directory(ino.0)
    }

    /// Returns the write lease of a directory, wanted back or not: all changes that were answered under it have taken effect, or
    /// can't.
    pub fn return_directory(&self, ino: Ino) {
        self.shared().return_directory(ino.0);
    }

    /// Answers a recall: everything that was written under the lease is committed, or can't be.
    pub fn return_lease(&self, recall: Recalled) {
        self.shared().return_lease(recall);
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }
}

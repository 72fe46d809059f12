//! Keeps this mount's caches and the kernel's in step with other mounts.
//!
//! The session calls [`Coherence`] with every invalidation before it completes later answers. The caches are corrected at
//! once; the kernel is told by threads of its own, since the kernel may hold a lock that the request in hand needs until that
//! request is answered (telling it on a request thread would be a deadlock).
//!
//! **The gate.** An answer that was checked against the cache and is being written to the kernel must not overtake the
//! kernel's invalidation. Answers are checked and written under the gate's read lock; a notifier passes the gate's write lock
//! before it tells the kernel, so that every answer that was checked too early has been written by then.
//!
//! **The kernel's share.** The kernel goes by what it was told for at most [`KERNEL_LIFETIME_MAX`], asking nobody. When the
//! session's stream breaks, pushes are missed, so it is told to forget what it was told within that time; what changes after the
//! session is back is pushed to it, told on the new stream or not.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use bytes::Bytes;
use fuser::{INodeNo, Notifier};
use heliofs_proto::ids::Position;
use heliofs_proto::v1;
use meta_client::{Recalled, Watcher};
use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard};
use tokio::sync::{mpsc, watch};

use crate::ahead::Ahead;
use crate::fs::KERNEL_LIFETIME_MAX;
use crate::fs::dir::DirHandle;
use crate::inode::InodeTable;
use crate::meta_cache::MetaCache;
use crate::write::budget::Budget;

/// Threads that tell the kernel: one may wait for a directory's lock while a request in it is under way.
const NOTIFIERS: usize = 4;

/// What the kernel is to forget.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Notice {
    Attr(u64),
    Pages(u64),
    Entry(u64, Bytes),
}

impl Notice {
    fn ino(&self) -> u64 {
        match self {
            Self::Attr(ino) | Self::Pages(ino) | Self::Entry(ino, _) => *ino,
        }
    }
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Notice>,
    /// The same as `waiting`: a notice that waits is not queued twice.
    known: HashSet<Notice>,
    /// Notices that were ever queued.
    queued: u64,
    closed: bool,
}

struct Lane {
    queue: Mutex<Queue>,
    filled: Condvar,
    /// Notices that the kernel was told; the greatest number once the lane is closed.
    told: watch::Sender<u64>,
}

impl Default for Lane {
    fn default() -> Self {
        Self {
            queue: Mutex::default(),
            filled: Condvar::new(),
            told: watch::Sender::new(0),
        }
    }
}

/// Notices kept of what the kernel was told, per span of [`KERNEL_LIFETIME_MAX`]; what is told beyond runs out by itself.
const TOLD_MAX: usize = 1 << 17;

/// What the kernel was told and may still go by.
struct Told {
    /// Told since `turned`.
    now: Vec<Notice>,
    /// Told in the span before.
    before: Vec<Notice>,
    turned: Instant,
}

impl Told {
    fn new(now: Instant) -> Self {
        Self {
            now: Vec::new(),
            before: Vec::new(),
            turned: now,
        }
    }

    fn push(&mut self, notice: Notice, now: Instant) {
        let age = now.saturating_duration_since(self.turned);
        if age >= KERNEL_LIFETIME_MAX {
            self.before = std::mem::take(&mut self.now);
            if age >= KERNEL_LIFETIME_MAX * 2 {
                self.before.clear();
            }
            self.turned = now;
        }
        if self.now.len() < TOLD_MAX {
            self.now.push(notice);
        }
    }

    fn take(&mut self) -> impl Iterator<Item = Notice> + use<> {
        let before = std::mem::take(&mut self.before);
        before.into_iter().chain(std::mem::take(&mut self.now))
    }
}

/// See the module. Made before the session, which it watches.
pub struct Coherence {
    /// Attributes and names.
    pub cache: MetaCache,
    /// Open and dirty inodes.
    pub inodes: InodeTable,
    /// Directories that are this mount's alone.
    pub ahead: Ahead,
    /// Memory for uncommitted data.
    pub budget: Arc<Budget>,
    open_dirs: Mutex<HashMap<u64, Vec<Weak<DirHandle>>>>,
    lanes: Vec<Lane>,
    gate: RwLock<()>,
    told: Mutex<Told>,
    recalled: mpsc::UnboundedSender<Recalled>,
    recalls: Mutex<Option<mpsc::UnboundedReceiver<Recalled>>>,
}

impl std::fmt::Debug for Coherence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coherence").finish_non_exhaustive()
    }
}

impl Coherence {
    /// Caches for one mount: at most `inodes_max` inodes and `names_max` names, and `buffer_bytes_max` bytes of uncommitted
    /// data.
    pub fn new(inodes_max: usize, names_max: usize, buffer_bytes_max: u64) -> Arc<Self> {
        let budget = Arc::new(Budget::new(buffer_bytes_max));
        let (recalled, recalls) = mpsc::unbounded_channel();
        Arc::new(Self {
            cache: MetaCache::new(inodes_max, names_max),
            inodes: InodeTable::new(budget.clone()),
            ahead: Ahead::default(),
            budget,
            open_dirs: Mutex::default(),
            lanes: (0..NOTIFIERS).map(|_| Lane::default()).collect(),
            gate: RwLock::new(()),
            told: Mutex::new(Told::new(Instant::now())),
            recalled,
            recalls: Mutex::new(Some(recalls)),
        })
    }

    /// Held while an answer is checked and written to the kernel.
    pub fn gate(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read()
    }

    /// Write leases that are wanted back. Taken once; a second call returns `None`.
    pub(crate) fn recalls(&self) -> Option<mpsc::UnboundedReceiver<Recalled>> {
        self.recalls.lock().take()
    }

    /// A directory's lease is not to be used any more; [`Ahead`] is frozen for that already.
    pub(crate) fn return_directory(&self, ino: u64) {
        // Without a receiver the mount is going, and the lease goes with the session.
        let _: Result<(), _> = self.recalled.send(Recalled { ino, grant: 0 });
    }

    /// As [`Coherence::return_directory`], of all directories.
    pub(crate) fn return_all_directories(&self) {
        if self.ahead.suspend() {
            self.return_directory(0);
        }
    }

    /// The kernel is about to be told `ino`'s attributes (0: none), and that `name` in a parent names it. Under the gate.
    pub fn kernel_told(&self, ino: u64, name: Option<(u64, &[u8])>) {
        let now = Instant::now();
        let mut told = self.told.lock();
        if ino != 0 {
            told.push(Notice::Attr(ino), now);
        }
        if let Some((parent, name)) = name {
            told.push(Notice::Entry(parent, Bytes::copy_from_slice(name)), now);
        }
    }

    /// A directory was opened here: its buffered entries must follow changes.
    pub fn dir_opened(&self, handle: &Arc<DirHandle>) {
        self.open_dirs
            .lock()
            .entry(handle.ino)
            .or_default()
            .push(Arc::downgrade(handle));
    }

    /// A directory handle is about to go.
    pub fn dir_closed(&self, handle: &Arc<DirHandle>) {
        let mut dirs = self.open_dirs.lock();
        if let Some(handles) = dirs.get_mut(&handle.ino) {
            let gone = Arc::downgrade(handle);
            handles.retain(|known| !known.ptr_eq(&gone) && known.strong_count() > 0);
            if handles.is_empty() {
                dirs.remove(&handle.ino);
            }
        }
    }

    /// A name changed at `at` (`None`: any of them).
    pub fn name_changed(&self, parent: u64, name: Option<&Bytes>, at: Position) {
        let handles: Vec<_> = match self.open_dirs.lock().get(&parent) {
            Some(handles) => handles.iter().filter_map(Weak::upgrade).collect(),
            None => return,
        };
        for handle in handles {
            handle.changed(name, at);
        }
    }

    /// The kernel's attributes of `ino` are outdated by something that this mount did on its own.
    pub fn tell_attr(&self, ino: u64) {
        self.tell(Notice::Attr(ino));
    }

    /// The kernel's pages of `ino` are outdated by something that this mount did on its own.
    pub fn tell_pages(&self, ino: u64) {
        self.tell(Notice::Pages(ino));
    }

    fn tell(&self, notice: Notice) {
        let lane = &self.lanes[(notice.ino() % NOTIFIERS as u64) as usize];
        let mut queue = lane.queue.lock();
        if !queue.closed && queue.known.insert(notice.clone()) {
            queue.queued += 1;
            queue.waiting.push_back(notice);
            lane.filled.notify_one();
        }
    }

    /// Waits until the kernel knows everything about `ino` that was to be told before the call. Not for operations during which
    /// the kernel holds a lock of the inode.
    pub async fn kernel_knows(&self, ino: u64) {
        let lane = &self.lanes[(ino % NOTIFIERS as u64) as usize];
        let queued = lane.queue.lock().queued;
        let mut told = lane.told.subscribe();
        // The sender lives as long as the lane.
        let _ = told.wait_for(|told| *told >= queued).await;
    }

    /// Starts the threads that tell the kernel; they end after [`Coherence::close`].
    pub fn start_notifiers(
        self: &Arc<Self>,
        notifier: &Notifier,
    ) -> std::io::Result<Vec<JoinHandle<()>>> {
        (0..NOTIFIERS)
            .map(|lane| {
                let (coherence, notifier) = (self.clone(), notifier.clone());
                std::thread::Builder::new()
                    .name(format!("heliofs-tell-{lane}"))
                    .spawn(move || coherence.run_lane(lane, &notifier))
            })
            .collect()
    }

    /// Ends the notifier threads; later notices are dropped.
    pub fn close(&self) {
        for lane in &self.lanes {
            let mut queue = lane.queue.lock();
            queue.closed = true;
            queue.waiting.clear();
            queue.known.clear();
            lane.told.send_replace(u64::MAX);
            lane.filled.notify_all();
        }
    }

    fn run_lane(&self, lane: usize, notifier: &Notifier) {
        let lane = &self.lanes[lane];
        loop {
            let notice = {
                let mut queue = lane.queue.lock();
                loop {
                    if queue.closed {
                        return;
                    }
                    if let Some(notice) = queue.waiting.pop_front() {
                        queue.known.remove(&notice);
                        break notice;
                    }
                    lane.filled.wait(&mut queue);
                }
            };
            // Answers that were checked before the cache was corrected are written now; see the module.
            drop(self.gate.write());
            let told = match &notice {
                Notice::Attr(ino) => notifier.inval_inode(INodeNo(*ino), -1, 0),
                Notice::Pages(ino) => notifier.inval_inode(INodeNo(*ino), 0, 0),
                Notice::Entry(parent, name) => {
                    notifier.inval_entry(INodeNo(*parent), OsStr::from_bytes(name))
                }
            };
            if let Err(error) = told {
                // The entry is in use as a mount point or a working directory, or the mount is going: it expires by itself.
                tracing::debug!(?notice, %error, "the kernel did not take an invalidation");
            }
            lane.told.send_modify(|told| *told = told.saturating_add(1));
        }
    }
}

impl Watcher for Coherence {
    fn invalidated(&self, invalidation: &v1::Invalidation) {
        let at: Position = invalidation
            .position
            .map(Position::from)
            .unwrap_or_default();
        self.cache.invalidate(invalidation);
        let ino = invalidation.ino;
        if let Some(directory) = self.ahead.outdated(ino) {
            // From here on the server does not tell what becomes of it.
            self.return_directory(directory);
        }
        if invalidation.content
            && let Some(inode) = self.inodes.get(ino)
        {
            inode.lock().invalidate_content(at);
        }
        if invalidation.attr
            && let Some(inode) = self.inodes.get(ino)
        {
            inode.lock().privileges = crate::inode::Privileges::Unknown;
        }
        if invalidation.all_names {
            self.name_changed(ino, None, at);
        }
        for name in &invalidation.names {
            self.name_changed(ino, Some(name), at);
            self.tell(Notice::Entry(ino, name.clone()));
        }
        if invalidation.content {
            self.tell(Notice::Pages(ino));
        } else if invalidation.attr || invalidation.xattr || invalidation.all_names {
            // Also makes the kernel forget cached ACLs.
            self.tell(Notice::Attr(ino));
        }
    }

    fn recalled(&self, recall: Recalled) {
        // Without a receiver the mount is going, and the lease goes with the session.
        let _: Result<(), _> = self.recalled.send(recall);
    }

    fn forget_all(&self) {
        self.return_all_directories();
        self.cache.forget_all();
        for inode in self.inodes.all() {
            inode.lock().forget();
            self.tell(Notice::Pages(inode.ino));
        }
        let dirs: Vec<_> = self
            .open_dirs
            .lock()
            .values()
            .flatten()
            .filter_map(Weak::upgrade)
            .collect();
        for dir in dirs {
            dir.forget();
        }
        // The lease is gone by now, so that nothing is added behind this that would last.
        let told = self.told.lock().take();
        for notice in told {
            self.tell(notice);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn waiting(coherence: &Coherence) -> HashSet<Notice> {
        let lanes = coherence.lanes.iter();
        lanes
            .flat_map(|lane| lane.queue.lock().known.clone())
            .collect()
    }

    #[test]
    fn a_broken_stream_makes_the_kernel_forget_what_it_was_told() {
        let coherence = Coherence::new(10, 10, 1 << 20);
        coherence.kernel_told(7, Some((1, b"a")));
        coherence.kernel_told(0, Some((1, b"missing")));
        coherence.forget_all();
        let expected = HashSet::from([
            Notice::Attr(7),
            Notice::Entry(1, Bytes::from_static(b"a")),
            Notice::Entry(1, Bytes::from_static(b"missing")),
        ]);
        assert_eq!(waiting(&coherence), expected);
    }

    #[test]
    fn what_ran_out_in_the_kernel_is_not_kept() {
        let base = Instant::now();
        let at = |ms| base + Duration::from_millis(ms);
        let mut told = Told::new(base);
        told.push(Notice::Attr(1), at(100));
        told.push(Notice::Attr(2), at(1100));
        assert_eq!(told.before, [Notice::Attr(1)], "it may last until 1100");
        told.push(Notice::Attr(3), at(2200));
        assert_eq!(told.before, [Notice::Attr(2)]);
        told.push(Notice::Attr(4), at(9000));
        let left: Vec<_> = told.take().collect();
        assert_eq!(left, [Notice::Attr(4)]);
    }
}

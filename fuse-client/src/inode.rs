//! An inode that this mount has open or holds uncommitted data of.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockstore::FrameNumber;
use heliofs_proto::ids::Position;
use heliofs_proto::v1;
use lru::LruCache;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use crate::errno::Errno;
use crate::read::extents::ExtentMap;
use crate::write::budget::Budget;
use crate::write::pieces::{Frame, Pieces};
use crate::write::staging::{Place, StagedRecord};
use crate::write::stored::Stored;

/// See the module.
#[derive(Debug)]
pub struct Inode {
    /// Its number.
    pub ino: u64,
    state: Mutex<InodeState>,
    /// Held by whoever changes committed content (commit, truncate, fallocate, copy): one at a time, in order.
    pub changing: tokio::sync::Mutex<()>,
    /// Held by whoever stages its data: records come in order.
    pub staging: tokio::sync::Mutex<()>,
    budget: Arc<Budget>,
}

/// What the file's content is, as far as the server told.
#[derive(Debug)]
pub struct Content {
    /// Bytes.
    pub size: u64,
    /// Identifies the content.
    pub data_seq: u64,
    /// Where the bytes are.
    pub extents: ExtentMap,
}

/// Whether a write must clear something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Privileges {
    /// The attributes must be fetched before the next write.
    Unknown,
    /// Neither setuid, setgid nor capabilities.
    None,
    /// Some of them are set: see the attributes.
    Some,
}

/// An upload's result: the segment and its frames, in the order of the batch, each with its [`Frame::lead`].
///
/// [`Frame::lead`]: crate::write::pieces::Frame::lead
pub type Uploaded = Result<(Arc<Stored>, Vec<(FrameNumber, u32)>), Errno>;

/// Frozen data on its way.
#[derive(Debug, Clone)]
pub enum Batch {
    /// Into a segment of its own; `None` while the upload runs.
    Segment(watch::Receiver<Option<Arc<Uploaded>>>),
    /// Into the metadata, since the file is small: nothing to upload.
    Inline(Arc<Vec<Frame>>),
}

/// The mutable part.
#[derive(Debug)]
pub struct InodeState {
    /// File handles of this mount.
    pub handles: u32,
    /// Written and not committed.
    pub pieces: Pieces,
    /// Frozen parts of `pieces`, in the order in which they must be committed.
    pub batches: BTreeMap<u64, Batch>,
    /// The next batch's number.
    pub next_batch: u64,
    /// `None`: must be fetched.
    pub content: Option<Content>,
    /// What identified the content when it was last known, unless somebody else changed it since.
    pub base_seq: Option<u64>,
    /// Answers about the content that are older than this are stale.
    pub content_floor: Position,
    /// The newest size that the server told, for files whose content isn't known; a hint.
    pub size_hint: u64,
    /// When the newest uncommitted write was made, nanoseconds since 1970.
    pub mtime: Option<i64>,
    /// When the oldest uncommitted write was made.
    pub dirty_since: Option<Instant>,
    /// The last flush failed; its data is still here, and the next flush tries again.
    pub failure: Option<Errno>,
    /// Data was lost for good: every flush and open says so, until the file is opened with O_TRUNC.
    pub lost: Option<Errno>,
    /// … but all of it is kept aside: after the last close opens show what others wrote.
    pub kept_aside: bool,
    /// It has no name any more: once nobody here has it open, what is not stored yet can be forgotten.
    pub unlinked: bool,
    /// What a write must clear.
    pub privileges: Privileges,
    /// A commit of uploaded batches is scheduled.
    pub commit_scheduled: bool,
    /// Handles that were closed while data was not safe yet: opens at the server to be taken back after it is.
    pub owed_releases: u32,
    /// The background is at it.
    pub flushing: bool,
    /// Bytes that the file's tightest quota left when the server last told; `u64::MAX`: none limits it.
    pub quota_room: u64,
    /// After a failed flush: when the background tries again, and how long it waits after that.
    pub retry: Option<(Instant, Duration)>,
    /// Records of the staging folder that hold bytes of it, in the order in which they go.
    pub records: VecDeque<Arc<StagedRecord>>,
    /// Bytes were committed that no record has, over bytes of records: those alone would bring back what was before.
    pub committed_beside: bool,
    /// What identifies the content that the records' bytes belong over, as far as this mount's own changes have taken it: they
    /// are committed over nothing else. `None` without records.
    pub staged_base: Option<u64>,
    /// Where commits that are not known to be answered were to put bytes.
    pub proposed: HashSet<Place>,
    /// An earlier mount's records are being taken over.
    pub resuming: bool,
    /// When something was staged last.
    pub staged_at: Option<Instant>,
}

impl Inode {
    /// An inode without handles and data.
    pub fn new(ino: u64, budget: Arc<Budget>) -> Self {
        Self {
            ino,
            state: Mutex::new(InodeState {
                handles: 0,
                pieces: Pieces::default(),
                batches: BTreeMap::new(),
                next_batch: 1,
                content: None,
                base_seq: None,
                content_floor: Position::START,
                size_hint: 0,
                mtime: None,
                dirty_since: None,
                failure: None,
                lost: None,
                kept_aside: false,
                unlinked: false,
                privileges: Privileges::Unknown,
                commit_scheduled: false,
                owed_releases: 0,
                flushing: false,
                retry: None,
                quota_room: u64::MAX,
                records: VecDeque::new(),
                committed_beside: false,
                staged_base: None,
                proposed: HashSet::new(),
                resuming: false,
                staged_at: None,
            }),
            changing: tokio::sync::Mutex::new(()),
            staging: tokio::sync::Mutex::new(()),
            budget,
        }
    }

    /// Whether this is the same inode of this mount, not another one of its number.
    pub fn is(&self, other: &Arc<Self>) -> bool {
        std::ptr::eq(self, Arc::as_ptr(other))
    }

    /// Locks the state; memory that pieces gain or lose meanwhile is accounted for when the guard goes.
    pub fn lock(&self) -> StateGuard<'_> {
        let state = self.state.lock();
        StateGuard {
            memory: state.pieces.memory(),
            state,
            budget: &self.budget,
        }
    }
}

impl Drop for Inode {
    fn drop(&mut self) {
        let left = self.state.get_mut().pieces.memory();
        if left > 0 {
            self.budget.moved(left, 0);
        }
    }
}

/// See [`Inode::lock`].
pub struct StateGuard<'a> {
    state: MutexGuard<'a, InodeState>,
    budget: &'a Budget,
    memory: u64,
}

impl std::ops::Deref for StateGuard<'_> {
    type Target = InodeState;

    fn deref(&self) -> &InodeState {
        &self.state
    }
}

impl std::ops::DerefMut for StateGuard<'_> {
    fn deref_mut(&mut self) -> &mut InodeState {
        &mut self.state
    }
}

impl Drop for StateGuard<'_> {
    fn drop(&mut self) {
        let after = self.state.pieces.memory();
        if after != self.memory {
            self.budget.moved(self.memory, after);
        }
    }
}

impl InodeState {
    /// The file's size as this mount sees it: what the server has, and what was written over it.
    pub fn size(&self) -> u64 {
        let committed = match &self.content {
            Some(content) => content.size,
            None => self.size_hint,
        };
        committed.max(self.pieces.end())
    }

    /// Takes out records that are not needed any more, oldest first: nothing of them is uncommitted, and what was written over
    /// them is safe. The caller removes them before the file's content changes in another way than by a commit.
    pub fn loose_records(&mut self) -> Vec<Arc<StagedRecord>> {
        if self.pieces.is_empty() {
            self.pieces.take_hidden();
            self.staged_base = None;
            return self.records.drain(..).collect();
        }
        let mut loose = Vec::new();
        // Pieces, uploads and the list of hidden ones hold references of their own.
        while let Some(record) = self.records.front()
            && Arc::strong_count(record) == 1
        {
            loose.extend(self.records.pop_front());
        }
        if self.records.is_empty() {
            self.staged_base = None;
        }
        loose
    }

    /// Forgets uploads of which every byte was overwritten or cut off since: nothing will name them.
    pub fn drop_empty_batches(&mut self) {
        let pieces = &self.pieces;
        self.batches
            .retain(|number, _| !pieces.of_batch(*number).is_empty());
    }

    /// Shows what is not committed yet in attributes that the server gave.
    pub fn overlay(&self, attr: &mut v1::Attr) {
        if self.pieces.is_empty() {
            return;
        }
        attr.size = attr.size.max(self.pieces.end());
        attr.allocated = attr.allocated.saturating_add(self.pieces.bytes());
        if let Some(mtime) = self.mtime {
            attr.mtime = mtime;
            attr.ctime = attr.ctime.max(mtime);
        }
    }

    /// The server told `attr` as of `at`. `own_content`: in the reply to a change of the content by this mount, whose extents
    /// the caller takes care of.
    pub fn saw(&mut self, attr: &v1::Attr, at: Position, own_content: bool) {
        let capability = v1::AttrFlag::Capability as u32;
        self.privileges = if attr.mode & 0o6000 != 0 || attr.flags & capability != 0 {
            Privileges::Some
        } else {
            Privileges::None
        };
        if at < self.content_floor {
            return;
        }
        self.size_hint = attr.size;
        if own_content {
            return;
        }
        if self
            .content
            .as_ref()
            .is_some_and(|content| content.data_seq < attr.data_seq)
        {
            self.content = None;
            self.base_seq = None;
            self.content_floor = at;
        }
    }

    /// Takes extents that the server gave with `attr` as of `at`; false when they are older than what is known.
    pub fn learn(
        &mut self,
        attr: &v1::Attr,
        at: Position,
        range: std::ops::Range<u64>,
        extents: &[v1::Extent],
    ) -> bool {
        if at < self.content_floor {
            return false;
        }
        self.size_hint = attr.size;
        match &mut self.content {
            Some(content) if content.data_seq == attr.data_seq => {}
            Some(content) if content.data_seq > attr.data_seq => return false,
            _ => {
                self.content = Some(Content {
                    size: attr.size,
                    data_seq: attr.data_seq,
                    extents: ExtentMap::default(),
                });
            }
        }
        if let Some(content) = &mut self.content {
            content.extents.insert_page(range, extents);
        }
        true
    }

    /// A change by this mount took the content to `attr` at `at`; `edit` makes the same change to the extents that are known.
    /// Returns what identified the content before.
    pub fn moved(
        &mut self,
        attr: &v1::Attr,
        at: Position,
        edit: impl FnOnce(&mut Content),
    ) -> Option<u64> {
        // Also if another answer told of it earlier.
        self.staged_base = self.staged_base.map(|base| base.max(attr.data_seq));
        if at < self.content_floor {
            return None;
        }
        self.content_floor = at;
        self.size_hint = attr.size;
        if self.base_seq.is_some() {
            self.base_seq = Some(attr.data_seq);
        }
        let content = self.content.as_mut()?;
        let before = content.data_seq;
        edit(content);
        content.size = attr.size;
        content.data_seq = attr.data_seq;
        Some(before)
    }

    /// Another mount changed the content at `at`.
    pub fn invalidate_content(&mut self, at: Position) {
        self.content_floor = self.content_floor.max(at);
        // Even if it is newer: the server no longer remembers that we know.
        self.content = None;
        self.base_seq = None;
    }

    /// Everything that the server told may be outdated.
    pub fn forget(&mut self) {
        if let Some(content) = self.content.take() {
            self.base_seq = Some(content.data_seq);
        }
    }
}

/// Inodes that are open or dirty, by number.
#[derive(Debug)]
pub struct InodeTable {
    shards: Vec<Mutex<HashMap<u64, Arc<Inode>>>>,
    budget: Arc<Budget>,
    /// [`InodeState::lost`] of inodes that have left the table: whoever opens the file later is told as well.
    lost: Mutex<LruCache<u64, Errno>>,
}

/// Files whose data was lost that are remembered after their last close.
const LOST_MAX: NonZeroUsize = NonZeroUsize::new(65_536).expect("the number is not 0");

const SHARDS: usize = 16;

impl InodeTable {
    /// Takes this very inode out; that its data was lost stays. Another one of its number may be in there by now: while this one
    /// was being flushed, its last handle was closed and the file opened again.
    fn leave(&self, shard: &mut HashMap<u64, Arc<Inode>>, inode: &Inode, lost: Option<Errno>) {
        if !shard.get(&inode.ino).is_some_and(|known| inode.is(known)) {
            return;
        }
        shard.remove(&inode.ino);
        if let Some(error) = lost {
            self.lost.lock().put(inode.ino, error);
        }
    }

    /// An empty table whose inodes share `budget`.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            budget,
            lost: Mutex::new(LruCache::new(LOST_MAX)),
        }
    }

    fn shard(&self, ino: u64) -> &Mutex<HashMap<u64, Arc<Inode>>> {
        &self.shards[(ino % SHARDS as u64) as usize]
    }

    /// The inode, if it is open or dirty.
    pub fn get(&self, ino: u64) -> Option<Arc<Inode>> {
        self.shard(ino).lock().get(&ino).cloned()
    }

    /// The inode with one more handle.
    pub fn acquire(&self, ino: u64) -> Arc<Inode> {
        let mut shard = self.shard(ino).lock();
        let inode = shard.entry(ino).or_insert_with(|| {
            let inode = Inode::new(ino, self.budget.clone());
            inode.lock().lost = self.lost.lock().pop(&ino);
            Arc::new(inode)
        });
        inode.lock().handles += 1;
        inode.clone()
    }

    /// Takes a handle back. True when its open at the server can be taken back, too; otherwise the flush of what is not safe
    /// yet owes that.
    pub fn release(&self, inode: &Inode) -> bool {
        let mut shard = self.shard(inode.ino).lock();
        let mut state = inode.lock();
        state.handles -= 1;
        let safe = state.pieces.is_empty();
        if !safe {
            state.owed_releases += 1;
        } else if state.handles == 0 {
            let lost = state.lost.filter(|_| !state.kept_aside);
            drop(state);
            self.leave(&mut shard, inode, lost);
        }
        safe
    }

    /// Takes back a handle whose open failed at the server.
    pub fn abandon(&self, inode: &Inode) {
        let mut shard = self.shard(inode.ino).lock();
        let mut state = inode.lock();
        state.handles -= 1;
        if state.handles == 0 && state.pieces.is_empty() {
            let lost = state.lost.filter(|_| !state.kept_aside);
            drop(state);
            self.leave(&mut shard, inode, lost);
        }
    }

    /// Its data is safe, or lost: an inode without handles leaves the table. Returns the opens to be taken back.
    pub fn settled(&self, inode: &Inode) -> u32 {
        let mut shard = self.shard(inode.ino).lock();
        let mut state = inode.lock();
        if !state.pieces.is_empty() {
            return 0;
        }
        let owed = std::mem::take(&mut state.owed_releases);
        if state.handles == 0 {
            let lost = state.lost.filter(|_| !state.kept_aside);
            drop(state);
            self.leave(&mut shard, inode, lost);
        }
        owed
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Inode>> {
        let mut all = Vec::new();
        for shard in &self.shards {
            all.extend(shard.lock().values().cloned());
        }
        all
    }
}

//! Directories that this mount has the write lease of: what is in them, and the changes that were answered ahead of the cluster.
//!
//! A leased directory was made by this mount, and nobody else has seen what is in it (docs/plans/4-directory-leases.md). So all
//! of its names are known here, whatever becomes of them is decided here, and programs are answered at once. The changes wait in
//! [`State::queue`], leave in batches, one batch at a time, and take effect in the order in which they were answered.
//!
//! Pure but for the clock that is handed in: sending, waiting and giving leases back are `fs/ahead.rs`.
//!
//! An inode in here has exactly one name, in a leased directory (or is a leased directory). Its attributes are known here
//! ([`Node::attr`]) until something is proposed about it in the usual way; from then on they are asked for in the usual way.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::time::Instant;

use bytes::Bytes;
use heliofs_proto::ids::{Position, SessionId};
use heliofs_proto::v1::{self, FileKind, change::Op};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use crate::errno::Errno;
use crate::fs::Caller;
use crate::fs::namespace::NewNode;

mod changes;
#[cfg(test)]
mod tests;

/// Changes that wait to be sent; beyond it programs wait.
const QUEUE_MAX: usize = 2048;

/// Leased directories, and names in all of them, beyond which those that were longest not used are given back.
const DIRECTORIES_MAX: usize = 4096;
const NAMES_MAX: usize = 300_000;

/// What an operation is to do.
#[derive(Debug)]
pub enum Plan<T> {
    /// It is answered.
    Answered(T),
    /// Wait until something has changed here, then try again.
    Wait,
    /// It goes the usual way.
    Usual,
}

/// A change that was answered.
#[derive(Clone, Debug)]
pub struct Queued {
    /// From 1, in the order of the answers.
    pub number: u64,
    /// What is sent.
    pub change: v1::Change,
    /// The inodes that it is about, beside the directories that it names.
    pub inos: Vec<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    ino: u64,
    kind: FileKind,
}

#[derive(Debug, Default)]
struct Directory {
    names: HashMap<Bytes, Entry>,
    /// When it was last used, by [`State::uses`].
    used: u64,
}

#[derive(Debug)]
struct Node {
    /// `None`: asked for in the usual way.
    attr: Option<v1::Attr>,
    /// The leased directory that names it; 0: the one that does is not leased.
    parent: u64,
}

/// What came of a deferred change, for whoever asks later.
#[derive(Clone, Copy, Debug)]
struct Failure {
    errno: Errno,
    /// An operation was refused because of it.
    told: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct State {
    directories: HashMap<u64, Directory>,
    nodes: HashMap<u64, Node>,
    /// Names in all of them.
    names: usize,
    uses: u64,
    /// Answered and not sent.
    queue: VecDeque<Queued>,
    /// When the first of them was answered.
    since: Option<Instant>,
    /// Changes that were ever answered, and those of them of which the outcome is known.
    answered: u64,
    settled: u64,
    /// The last change that is about an inode, or about names in a directory.
    pending: HashMap<u64, u64>,
    /// How many wait for changes to be settled: then they are not held back to be gathered.
    waiting: usize,
    /// Leases are being given back: meanwhile nothing is answered here.
    frozen: usize,
    /// Inode numbers to be used.
    inos: VecDeque<Range<u64>>,
    /// The session that the leases and the numbers belong to.
    session: Option<SessionId>,
    /// The last change's time.
    time: i64,
    /// Everything that this mount was told reflects this position or an earlier one.
    at: Position,
    failures: HashMap<u64, Failure>,
}

/// The state, and what wakes those who wait for it to change.
#[derive(Debug)]
pub struct Ahead {
    state: Mutex<State>,
    /// Counts changes that somebody may wait for.
    moved: watch::Sender<u64>,
    /// Rung when there is something to send.
    pub(crate) work: tokio::sync::Notify,
}

impl Default for Ahead {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            moved: watch::Sender::new(0),
            work: tokio::sync::Notify::new(),
        }
    }
}

impl Ahead {
    /// Locks the state.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Hears of changes from here on: take it before looking at the state.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.moved.subscribe()
    }

    /// Wakes whoever waits for the state to change.
    pub fn wake(&self) {
        self.moved
            .send_modify(|moved| *moved = moved.wrapping_add(1));
    }

    /// From here on nothing is answered here; whoever calls gives the leases back and then calls [`State::thaw`]. `false`: there
    /// are none.
    pub fn suspend(&self) -> bool {
        let mut state = self.lock();
        let any = !state.directories.is_empty();
        if any {
            state.freeze();
        }
        any
    }

    /// The leased directory to be given back when somebody else's change of `ino` becomes known; frozen for that.
    pub fn outdated(&self, ino: u64) -> Option<u64> {
        let mut state = self.lock();
        let directory = match state.directories.contains_key(&ino) {
            true => ino,
            // Attributes that are asked for in the usual way change in the usual way, too.
            false => {
                state
                    .nodes
                    .get(&ino)
                    .filter(|node| node.attr.is_some())?
                    .parent
            }
        };
        state.freeze();
        Some(directory)
    }
}

/// What became of a listed entry since it was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Listed {
    /// Nothing.
    Same,
    /// The name, or the inode, is still in the directory, but not together.
    Moved,
    /// Neither is.
    Gone,
}

impl State {
    /// Whether nothing is leased, and nothing under way: the usual way is the only one.
    pub fn is_idle(&self) -> bool {
        self.directories.is_empty() && self.pending.is_empty() && self.failures.is_empty()
    }

    /// Whether this mount has the directory's write lease.
    pub fn is_leased(&self, ino: u64) -> bool {
        self.directories.contains_key(&ino)
    }

    /// Whether changes about the inode are under way.
    pub fn is_pending(&self, ino: u64) -> bool {
        self.pending.contains_key(&ino)
    }

    /// The position that answers of now reflect.
    pub fn at(&self) -> Position {
        self.at
    }

    /// An answer reflects this position.
    pub fn saw(&mut self, at: Position) {
        self.at = self.at.max(at);
    }

    // ---- leases

    /// The session granted the lease of a directory that it has just made, with these attributes, as of `at`.
    pub fn granted(&mut self, session: SessionId, attr: v1::Attr, at: Position) {
        if self.session != Some(session) {
            self.session = Some(session);
            self.inos.clear();
        }
        self.saw(at);
        let ino = attr.ino;
        self.directories.insert(ino, Directory::default());
        let node = Node {
            attr: Some(attr),
            parent: 0,
        };
        self.nodes.insert(ino, node);
        self.use_directory(ino);
    }

    /// The session that leases and numbers belong to.
    pub fn session(&self) -> Option<SessionId> {
        self.session
    }

    fn use_directory(&mut self, ino: u64) {
        self.uses += 1;
        let uses = self.uses;
        if let Some(directory) = self.directories.get_mut(&ino) {
            directory.used = uses;
        }
    }

    /// From here on nothing is answered here, until as many [`State::thaw`].
    pub fn freeze(&mut self) {
        self.frozen += 1;
    }

    /// See [`State::freeze`]; then wake those who wait.
    pub fn thaw(&mut self) {
        self.frozen = self.frozen.saturating_sub(1);
    }

    /// The directory is not leased any more. Nothing about it may be under way.
    pub fn dropped(&mut self, ino: u64) {
        let Some(directory) = self.directories.remove(&ino) else {
            return;
        };
        self.names -= directory.names.len();
        for entry in directory.names.values() {
            match self.directories.contains_key(&entry.ino) {
                true => {
                    if let Some(node) = self.nodes.get_mut(&entry.ino) {
                        node.parent = 0;
                    }
                }
                false => drop(self.nodes.remove(&entry.ino)),
            }
        }
        match self.nodes.get_mut(&ino) {
            Some(node) if node.parent != 0 => node.attr = None,
            _ => drop(self.nodes.remove(&ino)),
        }
    }

    /// Leased directories.
    pub fn leased(&self) -> Vec<u64> {
        self.directories.keys().copied().collect()
    }

    /// What is named in a leased directory.
    pub fn inos_in(&self, ino: u64) -> Vec<u64> {
        let directory = self.directories.get(&ino);
        let names = directory.into_iter().flat_map(|known| known.names.values());
        names.map(|entry| entry.ino).collect()
    }

    /// Directories to be given back, since there are too many, or too much in them.
    pub fn surplus(&self) -> Vec<u64> {
        if self.directories.len() <= DIRECTORIES_MAX && self.names <= NAMES_MAX {
            return Vec::new();
        }
        let mut all: Vec<_> = self
            .directories
            .iter()
            .map(|(ino, d)| (d.used, *ino))
            .collect();
        all.sort_unstable();
        let (mut directories, mut names) = (all.len(), self.names);
        let mut surplus = Vec::new();
        for (_, ino) in all {
            if directories <= DIRECTORIES_MAX * 3 / 4 && names <= NAMES_MAX * 3 / 4 {
                break;
            }
            directories -= 1;
            names -= self.directories[&ino].names.len();
            surplus.push(ino);
        }
        surplus
    }

    // ---- what is under way

    /// Numbers for new inodes are running out.
    pub fn needs_inos(&self, least: u64) -> bool {
        let left = self.inos.iter().map(|range| range.end - range.start);
        !self.directories.is_empty() && left.sum::<u64>() < least
    }

    /// The session reserved numbers.
    pub fn reserved(&mut self, session: SessionId, inos: Range<u64>) {
        if self.session == Some(session) {
            self.inos.push_back(inos);
        }
    }

    /// All changes that were answered so far have an outcome.
    pub fn is_settled(&self) -> bool {
        self.settled == self.answered
    }

    /// Changes that were answered and not sent.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// What has to be settled for everything that was answered until now to be.
    pub fn mark(&self) -> u64 {
        self.answered
    }

    /// As [`State::mark`], for what concerns these inodes; 0: nothing does.
    pub fn mark_of(&self, inos: &[u64]) -> u64 {
        if self.pending.is_empty() {
            return 0;
        }
        let marks = inos.iter().filter_map(|ino| self.pending.get(ino));
        marks.max().copied().unwrap_or(0)
    }

    /// Whether the outcome of the changes up to `mark` is known.
    pub fn has_settled(&self, mark: u64) -> bool {
        self.settled >= mark
    }

    /// Somebody waits for changes to be settled (1), or does no longer (-1).
    pub fn waits(&mut self, change: isize) {
        self.waiting = self.waiting.saturating_add_signed(change);
    }

    /// When what is queued is to be sent at the latest; `None`: at once. Nothing is queued: `Err`.
    #[expect(clippy::result_unit_err, reason = "there is nothing to say")]
    pub fn due(&self, batch: usize, gather: std::time::Duration) -> Result<Option<Instant>, ()> {
        match self.since {
            _ if self.queue.is_empty() => Err(()),
            Some(since) if self.waiting == 0 && self.queue.len() < batch => {
                Ok(Some(since + gather))
            }
            _ => Ok(None),
        }
    }

    /// Takes up to `count` changes to be sent.
    pub fn take(&mut self, count: usize) -> Vec<Queued> {
        let count = count.min(self.queue.len());
        let taken = self.queue.drain(..count).collect();
        self.since = (!self.queue.is_empty()).then(Instant::now);
        taken
    }

    /// Changes took effect at `at`, in the order in which they were taken. Returns attributes that are known now, and
    /// directories that were made by them and still are.
    pub fn took_effect(&mut self, changes: &[Queued], at: Position) -> (Vec<v1::Attr>, Vec<u64>) {
        self.saw(at);
        let (mut known, mut made) = (Vec::new(), Vec::new());
        for queued in changes {
            self.settled = self.settled.max(queued.number);
            if let Some(Op::Create(create)) = &queued.change.op {
                if let Some(attr) = self.attr_mut(create.ino) {
                    attr.data_seq = at.seq;
                }
                if self.is_leased(create.ino) {
                    made.push(create.ino);
                }
            }
        }
        for queued in changes {
            for ino in queued.all_inos() {
                if self.pending.get(&ino) == Some(&queued.number) {
                    self.pending.remove(&ino);
                    known.extend(self.nodes.get(&ino).and_then(|node| node.attr));
                }
            }
        }
        (known, made)
    }

    fn attr_mut(&mut self, ino: u64) -> Option<&mut v1::Attr> {
        self.nodes.get_mut(&ino)?.attr.as_mut()
    }

    /// These changes, and all that were answered after them, did not take effect. Whatever was known here is forgotten. Returns
    /// the directories that were leased.
    pub fn failed(&mut self, changes: &[Queued], errno: Errno) -> Vec<u64> {
        let lost: Vec<Queued> = self.queue.drain(..).collect();
        for queued in changes.iter().chain(&lost) {
            let concerned: HashSet<u64> = queued.all_inos().collect();
            for ino in concerned {
                let failure = Failure { errno, told: false };
                self.failures.insert(ino, failure);
            }
        }
        let leased = self.leased();
        self.directories.clear();
        self.nodes.clear();
        self.names = 0;
        self.pending.clear();
        self.inos.clear();
        self.since = None;
        self.settled = self.answered;
        leased
    }

    /// Inodes and directories of which answered changes were lost, and those of which it isn't known yet.
    pub fn lost(&self) -> Vec<u64> {
        let known = self.failures.keys();
        known.chain(self.pending.keys()).copied().collect()
    }

    /// The numbers that were reserved may not be what the cluster knows.
    pub fn forget_inos(&mut self) {
        self.inos.clear();
    }

    /// What became of changes of this inode, or of names in this directory, that were answered and could not be made. For fsync,
    /// which says so every time.
    pub fn failure(&self, ino: u64) -> Option<Errno> {
        self.failures.get(&ino).map(|failure| failure.errno)
    }

    /// As [`State::failure`], for operations in a directory: said once.
    pub fn failure_once(&mut self, ino: u64) -> Option<Errno> {
        let failure = self.failures.get_mut(&ino)?;
        (!std::mem::replace(&mut failure.told, true)).then_some(failure.errno)
    }

    // ---- what is known

    /// The inode's attributes, if they are known here, as of [`State::at`].
    pub fn attr(&self, ino: u64) -> Plan<v1::Attr> {
        match self.nodes.get(&ino) {
            Some(_) if self.frozen > 0 => Plan::Wait,
            Some(Node {
                attr: Some(attr), ..
            }) => Plan::Answered(*attr),
            _ => Plan::Usual,
        }
    }

    /// As [`State::attr`], also while leases are being given back: nothing else is true before that is done.
    pub fn known(&self, ino: u64) -> Option<v1::Attr> {
        self.nodes.get(&ino)?.attr
    }

    /// What a leased directory's name stands for; the attributes are `None` when they are asked for in the usual way.
    pub fn lookup(&mut self, parent: u64, name: &[u8]) -> Plan<Option<(u64, Option<v1::Attr>)>> {
        let Some(directory) = self.directories.get(&parent) else {
            return Plan::Usual;
        };
        if self.frozen > 0 {
            return Plan::Wait;
        }
        let found = directory.names.get(name).map(|entry| entry.ino);
        self.use_directory(parent);
        Plan::Answered(found.map(|ino| {
            let node = self.nodes.get(&ino);
            (ino, node.and_then(|node| node.attr))
        }))
    }

    /// Of an entry of a leased directory's listing: what became of it, and its attributes as far as they are known here. `None`:
    /// the directory is not leased.
    pub fn listed(&self, parent: u64, name: &[u8], ino: u64) -> Option<(Listed, Option<v1::Attr>)> {
        let entry = self.directories.get(&parent)?.names.get(name);
        let node = self.nodes.get(&ino);
        let listed = match entry {
            Some(entry) if entry.ino == ino => Listed::Same,
            // Another file took the name, or it has another name now, which the page may not have.
            Some(_) => Listed::Moved,
            None if node.is_some_and(|node| node.parent == parent) => Listed::Moved,
            None => Listed::Gone,
        };
        Some((listed, node.and_then(|node| node.attr)))
    }

    /// Something is proposed about these in the usual way: from here on their attributes are asked for in the usual way.
    pub fn ask_about(&mut self, inos: &[u64]) {
        for ino in inos {
            if !self.directories.contains_key(ino)
                && let Some(node) = self.nodes.get_mut(ino)
            {
                node.attr = None;
            }
        }
    }

    /// The leased directories that have to be given back before something is proposed in the usual way that changes names in
    /// these directories, or the directories.
    pub fn in_the_way(&self, directories: &[u64]) -> Vec<u64> {
        let leased = directories.iter().filter(|ino| self.is_leased(**ino));
        leased.copied().collect()
    }

    /// The leased directory that names this inode.
    pub fn parent_of(&self, ino: u64) -> Option<u64> {
        let parent = self.nodes.get(&ino)?.parent;
        (parent != 0).then_some(parent)
    }
}

impl Queued {
    /// Everything that it is about.
    fn all_inos(&self) -> impl Iterator<Item = u64> {
        let parents = match &self.change.op {
            Some(Op::Create(op)) => [op.parent, 0],
            Some(Op::Link(op)) => [op.parent, 0],
            Some(Op::Unlink(op)) => [op.parent, 0],
            Some(Op::Rename(op)) => [op.parent, op.new_parent],
            Some(Op::SetAttr(_)) | None => [0, 0],
        };
        let parents = parents.into_iter().filter(|ino| *ino != 0);
        parents.chain(self.inos.iter().copied())
    }

    /// The directories whose names it changes.
    pub fn parents(&self) -> impl Iterator<Item = u64> {
        let own = self.inos.len();
        let all = self.all_inos().count();
        self.all_inos().take(all - own)
    }
}

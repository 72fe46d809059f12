//! The mount's cache of attributes and directory entries.
//!
//! Trusted only while the session's lease is valid ([`crate::fs::Fs`] asks) and as long as nobody invalidated the thing.
//! Every answer carries the volume's position that it reflects, so that newer knowledge is never replaced by older, whatever
//! the order in which replies and invalidations arrive: a thing that was invalidated at a position stays unknown until an
//! answer at that position or a later one. When the server may have forgotten what it told us, [`MetaCache::forget_all`]
//! empties everything and starts a new generation; answers to questions of an older generation are not kept.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bytes::Bytes;
use heliofs_proto::ids::Position;
use heliofs_proto::v1;
use lru::LruCache;
use parking_lot::Mutex;

/// Locks are per shard of inodes, so that event loops don't wait for each other.
const SHARDS: usize = 16;

/// Entries of one directory that a prefetch fetches at once.
pub const PREFETCH_ENTRIES: u32 = 512;

/// Misses in one directory before its entries are fetched ahead.
const PREFETCH_MISSES: u32 = 2;

/// Hits that one prefetched page must have earned before the next page is worth fetching.
const PREFETCH_HITS: u32 = 64;

/// Which forgetting the question was asked under; taken before the question.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Generation(u64);

/// What the cache knows about a name.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// It exists and its attributes are known, at the least of the two positions.
    Attr(v1::Attr, Position),
    /// It does not exist, as of this position.
    Absent(Position),
    /// Not known. `prefetch`: the directory's entries after this cookie should be fetched.
    Unknown {
        /// Cookie to go on from.
        prefetch: Option<u64>,
    },
}

/// Attributes with the position that they reflect.
#[derive(Clone, Copy, Debug)]
struct Stamped {
    attr: v1::Attr,
    at: Position,
}

struct Node {
    /// What was known when the node was made: nothing older may be kept here.
    base: Position,
    attr: Option<Stamped>,
    /// Answers about attributes older than this are stale.
    attr_floor: Position,
    /// Names and values of extended attributes: `None` is absence.
    xattrs: HashMap<Bytes, Option<Bytes>>,
    xattr_floor: Position,
    /// The kernel's pages hold the content of this `data_seq`.
    pages: Option<u64>,
    dir: Option<Box<Dir>>,
}

#[derive(Default)]
struct Dir {
    entries: HashMap<Bytes, Dentry>,
    /// Answers about names older than this are stale.
    floor: Position,
    /// Names that are not in `entries` don't exist.
    complete: bool,
    /// Changes whenever knowledge was lost, so that a listing that began before can't make the directory complete.
    losses: u64,
    misses: u32,
    hits: u32,
    /// The cookie to prefetch after; `None`: everything was prefetched, or one is under way.
    prefetch_after: Option<u64>,
    prefetch_begun: bool,
}

#[derive(Clone, Copy, Debug)]
struct Dentry {
    /// 0: the name does not exist.
    ino: u64,
    at: Position,
    /// False: changed at `at`, not known how.
    valid: bool,
}

struct Shard {
    nodes: LruCache<u64, Node>,
    /// Whatever was evicted was at most at this position; answers that are older might be older than what was evicted.
    floor: Position,
}

/// See the module.
pub struct MetaCache {
    shards: Vec<Mutex<Shard>>,
    generation: AtomicU64,
    dentries: AtomicUsize,
    dentries_max: usize,
}

impl MetaCache {
    /// A cache of at most `inodes_max` inodes and `dentries_max` names.
    pub fn new(inodes_max: usize, dentries_max: usize) -> Self {
        let each = NonZeroUsize::new((inodes_max / SHARDS).max(64)).expect("at least 64");
        Self {
            shards: (0..SHARDS)
                .map(|_| {
                    Mutex::new(Shard {
                        nodes: LruCache::new(each),
                        floor: Position::START,
                    })
                })
                .collect(),
            generation: AtomicU64::new(0),
            dentries: AtomicUsize::new(0),
            dentries_max,
        }
    }

    fn shard(&self, ino: u64) -> &Mutex<Shard> {
        &self.shards[(ino % SHARDS as u64) as usize]
    }

    /// To be taken before a question is sent.
    pub fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::Acquire))
    }

    fn is_current(&self, generation: Generation) -> bool {
        self.generation() == generation
    }

    /// Attributes of `ino` and their position.
    pub fn attr(&self, ino: u64) -> Option<(v1::Attr, Position)> {
        let mut shard = self.shard(ino).lock();
        let stamped = shard.nodes.get(&ino)?.attr?;
        Some((stamped.attr, stamped.at))
    }

    /// Attributes of `ino` if they are newer than `at`, else `Ok(None)`; `Err` when those at `at` are known to be stale.
    pub fn newer_attr(&self, ino: u64, at: Position) -> Result<Option<v1::Attr>, Stale> {
        let shard = self.shard(ino).lock();
        let Some(node) = shard.nodes.peek(&ino) else {
            return if at < shard.floor {
                Err(Stale)
            } else {
                Ok(None)
            };
        };
        match node.attr {
            Some(stamped) if stamped.at >= at => Ok(Some(stamped.attr)),
            _ if at < node.attr_floor => Err(Stale),
            _ => Ok(None),
        }
    }

    /// Keeps attributes that an answer at `at` gave.
    pub fn put_attr(&self, generation: Generation, attr: &v1::Attr, at: Position) {
        let mut shard = self.shard(attr.ino).lock();
        if !self.is_current(generation) {
            return;
        }
        let node = match self.node(&mut shard, attr.ino, at) {
            Some(node) => node,
            None => return,
        };
        if at < node.attr_floor || node.attr.is_some_and(|known| known.at > at) {
            return;
        }
        node.attr = Some(Stamped { attr: *attr, at });
    }

    /// The node, made if it is missing and an answer at `at` is certainly not older than what was evicted.
    fn node<'a>(&self, shard: &'a mut Shard, ino: u64, at: Position) -> Option<&'a mut Node> {
        if !shard.nodes.contains(&ino) {
            if at < shard.floor {
                return None;
            }
            let node = Node::new(shard.floor);
            self.push(shard, ino, node);
        }
        shard.nodes.get_mut(&ino)
    }

    fn push(&self, shard: &mut Shard, ino: u64, node: Node) {
        if let Some((evicted, old)) = shard.nodes.push(ino, node)
            && evicted != ino
        {
            self.bury(shard, &old);
        }
    }

    /// Remembers how new an evicted node's knowledge was.
    fn bury(&self, shard: &mut Shard, node: &Node) {
        let mut floor = shard.floor.max(node.attr_floor).max(node.xattr_floor);
        if let Some(stamped) = node.attr {
            floor = floor.max(stamped.at);
        }
        if let Some(dir) = &node.dir {
            floor = floor.max(dir.newest());
            self.dentries
                .fetch_sub(dir.entries.len(), Ordering::Relaxed);
        }
        shard.floor = floor;
    }

    /// What is known about `name` in `parent`.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Found {
        let ino = {
            let mut shard = self.shard(parent).lock();
            let Some(dir) = shard
                .nodes
                .get_mut(&parent)
                .and_then(|node| node.dir.as_mut())
            else {
                return Found::Unknown { prefetch: None };
            };
            match dir.entries.get(name) {
                Some(dentry) if dentry.valid && dentry.ino == 0 => return Found::Absent(dentry.at),
                Some(dentry) if dentry.valid => {
                    let (ino, at) = (dentry.ino, dentry.at);
                    dir.misses = 0;
                    dir.hits += 1;
                    (ino, at)
                }
                Some(_) => return Found::Unknown { prefetch: None },
                None if dir.complete => return Found::Absent(dir.floor),
                None => {
                    return Found::Unknown {
                        prefetch: dir.missed(),
                    };
                }
            }
        };
        let (ino, at) = ino;
        match self.attr(ino) {
            Some((attr, attr_at)) => Found::Attr(attr, at.min(attr_at)),
            None => Found::Unknown { prefetch: None },
        }
    }

    /// Keeps that `name` in `parent` is `ino` (0: absent) as of `at`.
    pub fn put_name(
        &self,
        generation: Generation,
        parent: u64,
        name: &Bytes,
        ino: u64,
        at: Position,
    ) {
        let mut shard = self.shard(parent).lock();
        if !self.is_current(generation) {
            return;
        }
        self.put_name_locked(&mut shard, parent, name, ino, at);
        drop(shard);
        self.shrink();
    }

    fn put_name_locked(
        &self,
        shard: &mut Shard,
        parent: u64,
        name: &Bytes,
        ino: u64,
        at: Position,
    ) {
        let Some(node) = self.node(shard, parent, at) else {
            return;
        };
        let dir = node.directory();
        if at < dir.floor {
            return;
        }
        let dentry = Dentry {
            ino,
            at,
            valid: true,
        };
        match dir.entries.get_mut(name) {
            Some(known) if known.at > at => {}
            Some(known) => *known = dentry,
            None => {
                dir.entries.insert(name.clone(), dentry);
                self.dentries.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// `name` in `parent` changed at `at` in a way that the reply didn't tell.
    pub fn name_changed(&self, parent: u64, name: &Bytes, at: Position) {
        self.invalidate(&v1::Invalidation {
            position: Some(at.into()),
            ino: parent,
            names: vec![name.clone()],
            ..Default::default()
        });
    }

    /// This mount created `ino` as an empty directory at `at`: every name in it is known to be absent.
    pub fn put_new_directory(&self, generation: Generation, ino: u64, at: Position) {
        let mut shard = self.shard(ino).lock();
        if !self.is_current(generation) {
            return;
        }
        if let Some(node) = self.node(&mut shard, ino, at)
            && node.dir.is_none()
        {
            node.dir = Some(Box::new(Dir {
                complete: true,
                ..Default::default()
            }));
        }
    }

    /// Begins a listing of `ino` from its start; give the result to [`MetaCache::listed`] at its end.
    pub fn listing(&self, ino: u64) -> u64 {
        let mut shard = self.shard(ino).lock();
        if !shard.nodes.contains(&ino) {
            let node = Node::new(shard.floor);
            self.push(&mut shard, ino, node);
        }
        let node = shard.nodes.get_mut(&ino).expect("pushed above");
        node.directory().losses
    }

    /// Every page of a listing was put here: names that are not known don't exist, unless knowledge was lost meanwhile.
    pub fn listed(&self, generation: Generation, ino: u64, listing: u64) {
        let mut shard = self.shard(ino).lock();
        if !self.is_current(generation) {
            return;
        }
        if let Some(dir) = shard.nodes.get_mut(&ino).and_then(|node| node.dir.as_mut())
            && dir.losses == listing
        {
            dir.complete = true;
        }
    }

    /// A prefetch of `ino` ended; go on after `after` when misses ask for it, or never (`None`).
    pub fn prefetched(&self, ino: u64, after: Option<u64>) {
        let mut shard = self.shard(ino).lock();
        if let Some(dir) = shard.nodes.get_mut(&ino).and_then(|node| node.dir.as_mut()) {
            dir.prefetch_after = after;
            dir.hits = 0;
            dir.misses = 0;
        }
    }

    /// The value of an extended attribute (`Some(None)`: it isn't set), if known.
    pub fn xattr(&self, ino: u64, name: &[u8]) -> Option<Option<Bytes>> {
        let mut shard = self.shard(ino).lock();
        shard.nodes.get(&ino)?.xattrs.get(name).cloned()
    }

    /// Keeps the value of an extended attribute as of `at`.
    pub fn put_xattr(
        &self,
        generation: Generation,
        ino: u64,
        name: &Bytes,
        value: Option<Bytes>,
        at: Position,
    ) {
        let mut shard = self.shard(ino).lock();
        if !self.is_current(generation) {
            return;
        }
        if let Some(node) = self.node(&mut shard, ino, at)
            && at >= node.xattr_floor
        {
            node.xattrs.insert(name.clone(), value);
        }
    }

    /// This mount changed extended attributes of `ino` at `at`.
    pub fn xattrs_changed(&self, ino: u64, at: Position) {
        let mut shard = self.shard(ino).lock();
        if let Some(node) = shard.nodes.get_mut(&ino) {
            node.xattrs.clear();
            node.xattr_floor = node.xattr_floor.max(at);
        } else {
            shard.floor = shard.floor.max(at);
        }
    }

    /// The attributes of `ino` were changed by this mount at `at` in a way that the reply didn't tell.
    pub fn attr_changed(&self, ino: u64, at: Position) {
        let mut shard = self.shard(ino).lock();
        invalidate_attr(&mut shard, ino, at);
    }

    /// A file is opened at `data_seq`: whether the kernel's pages are still good. From now on they are of `data_seq`.
    pub fn keep_pages(&self, ino: u64, data_seq: u64) -> bool {
        let mut shard = self.shard(ino).lock();
        let Some(node) = shard.nodes.get_mut(&ino) else {
            return false;
        };
        node.pages.replace(data_seq) == Some(data_seq)
    }

    /// A change by this mount took the content from `before` to `after`; the kernel's pages followed it.
    pub fn pages_moved(&self, ino: u64, before: u64, after: u64) {
        let mut shard = self.shard(ino).lock();
        if let Some(node) = shard.nodes.get_mut(&ino) {
            node.pages = match node.pages {
                Some(seq) if seq == before => Some(after),
                _ => None,
            };
        }
    }

    /// Whether an answer about `ino` (and `name` in `parent`) at `at` is still the newest that is known: what it says may be
    /// given to the kernel with a lifetime.
    pub fn is_fresh(&self, ino: u64, at: Position, name: Option<(u64, &[u8])>) -> bool {
        if ino != 0 {
            let shard = self.shard(ino).lock();
            match shard.nodes.peek(&ino) {
                Some(node) if at < node.attr_floor => return false,
                Some(_) => {}
                None if at < shard.floor => return false,
                None => {}
            }
        }
        let Some((parent, name)) = name else {
            return true;
        };
        let shard = self.shard(parent).lock();
        match shard.nodes.peek(&parent).map(|node| &node.dir) {
            Some(Some(dir)) => {
                at >= dir.floor && dir.entries.get(name).is_none_or(|known| at >= known.at)
            }
            Some(None) => true,
            None => at >= shard.floor,
        }
    }

    /// Another session changed something.
    pub fn invalidate(&self, invalidation: &v1::Invalidation) {
        let at: Position = invalidation
            .position
            .map(Position::from)
            .unwrap_or_default();
        let ino = invalidation.ino;
        let mut shard = self.shard(ino).lock();
        if invalidation.attr || invalidation.content {
            invalidate_attr(&mut shard, ino, at);
        }
        let Some(node) = shard.nodes.get_mut(&ino) else {
            shard.floor = shard.floor.max(at);
            return;
        };
        if invalidation.xattr {
            node.xattrs.clear();
            node.xattr_floor = node.xattr_floor.max(at);
        }
        if invalidation.all_names || !invalidation.names.is_empty() {
            let dir = node.directory();
            if invalidation.all_names {
                self.dentries
                    .fetch_sub(dir.entries.len(), Ordering::Relaxed);
                dir.forget(at);
            }
            for name in &invalidation.names {
                let unknown = Dentry {
                    ino: 0,
                    at,
                    valid: false,
                };
                match dir.entries.get_mut(name) {
                    Some(known) if known.at < at => *known = unknown,
                    Some(_) => {}
                    None => {
                        dir.entries.insert(name.clone(), unknown);
                        self.dentries.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        }
        if invalidation.content {
            node.pages = None;
        }
    }

    /// Empties everything; answers to questions asked before are not kept. Nothing is known of the kernel's pages any more
    /// either, so that the next open of a file drops them.
    pub fn forget_all(&self) {
        // All shards are locked while the generation changes: a writer holds its shard's lock when it compares.
        let mut shards: Vec<_> = self.shards.iter().map(Mutex::lock).collect();
        self.generation.fetch_add(1, Ordering::AcqRel);
        for shard in &mut shards {
            shard.nodes.clear();
        }
        self.dentries.store(0, Ordering::Relaxed);
    }

    /// Drops the least recently used directories while there are too many names.
    fn shrink(&self) {
        if self.dentries.load(Ordering::Relaxed) <= self.dentries_max {
            return;
        }
        for shard in &self.shards {
            let mut shard = shard.lock();
            let mut freed = 0;
            let wanted = self
                .dentries
                .load(Ordering::Relaxed)
                .saturating_sub(self.dentries_max * 7 / 8);
            let victims: Vec<u64> = shard
                .nodes
                .iter()
                .rev()
                .filter(|(_, node)| node.dir.is_some())
                .map(|(&ino, _)| ino)
                .collect();
            for ino in victims {
                if freed >= wanted {
                    break;
                }
                if let Some(node) = shard.nodes.peek_mut(&ino)
                    && let Some(dir) = &mut node.dir
                {
                    freed += dir.entries.len();
                    let at = dir.newest();
                    dir.forget(at);
                }
            }
            self.dentries.fetch_sub(freed, Ordering::Relaxed);
            if self.dentries.load(Ordering::Relaxed) <= self.dentries_max {
                return;
            }
        }
    }
}

/// What the caller holds is older than what is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stale;

fn invalidate_attr(shard: &mut Shard, ino: u64, at: Position) {
    match shard.nodes.get_mut(&ino) {
        Some(node) => {
            node.attr_floor = node.attr_floor.max(at);
            // Even if it is newer: the server no longer remembers that we know.
            node.attr = None;
        }
        None => shard.floor = shard.floor.max(at),
    }
}

impl Node {
    fn new(base: Position) -> Self {
        Self {
            base,
            attr: None,
            attr_floor: base,
            xattrs: HashMap::new(),
            xattr_floor: base,
            pages: None,
            dir: None,
        }
    }

    fn directory(&mut self) -> &mut Dir {
        let base = self.base;
        self.dir.get_or_insert_with(|| {
            Box::new(Dir {
                floor: base,
                ..Default::default()
            })
        })
    }
}

impl Dir {
    fn newest(&self) -> Position {
        self.entries
            .values()
            .map(|dentry| dentry.at)
            .fold(self.floor, Position::max)
    }

    /// Drops all entries; answers older than `at` are stale.
    fn forget(&mut self, at: Position) {
        self.entries.clear();
        self.entries.shrink_to_fit();
        self.floor = self.floor.max(at);
        self.complete = false;
        self.losses += 1;
        self.prefetch_begun = false;
        self.misses = 0;
        self.hits = 0;
    }

    /// Counts a miss; says from where to prefetch when it is time to.
    fn missed(&mut self) -> Option<u64> {
        self.misses += 1;
        if self.misses < PREFETCH_MISSES {
            return None;
        }
        if !self.prefetch_begun {
            self.prefetch_begun = true;
            self.prefetch_after = None;
            return Some(0);
        }
        if self.hits < PREFETCH_HITS {
            return None;
        }
        self.prefetch_after.take()
    }
}

#[cfg(test)]
mod tests;

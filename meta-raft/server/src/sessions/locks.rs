//! The lock table: fcntl byte-range locks and flock of one volume, as POSIX and Linux define them. Pure: no clock, no I/O.
//!
//! A lock belongs to an owner of a session. fcntl locks of one owner split and merge; flock covers a whole file and lives in
//! a name space of its own. Requests that wait are granted first come, first served as soon as nothing conflicts; a fcntl
//! wait that would close a circle of owners is refused. Source: fcntl(2), flock(2), fs/locks.c.

use std::collections::{HashMap, HashSet, VecDeque};

use heliofs_proto::v1::{self, LockKind};

#[cfg(test)]
mod tests;

/// Most inodes that one session may have locks on, and most ranges on one inode: bounds the memory and the time that a
/// hostile client can take. Linux has no such bound, so it is far above what programs use.
pub const LOCKS_MAX: usize = 65536;

/// Whose lock it is: a session, and the kernel's lock owner within it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Owner {
    /// The session's id.
    pub session: u64,
    /// The kernel's lock owner.
    pub owner: u64,
}

/// A request that waits: which session asked, under which request id.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Ticket {
    /// The session's id.
    pub session: u64,
    /// The request's id on the session's stream.
    pub request: u64,
}

/// What became of a lock request.
#[derive(Clone, PartialEq, Debug)]
pub enum Verdict {
    /// Held (or given up, for an unlock).
    Granted,
    /// Waits in the queue under its ticket.
    Waits,
    /// Not granted, since this lock is in the way.
    Conflict(v1::Lock),
    /// Waiting would close a circle of owners that wait for each other.
    Deadlock,
    /// `start` is behind `end`, or the kind is unknown.
    Invalid,
    /// [`LOCKS_MAX`] is reached.
    TooMany,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Range {
    holder: Owner,
    /// Write, else read.
    write: bool,
    start: u64,
    /// Inclusive.
    end: u64,
    pid: u32,
}

impl Range {
    fn overlaps(&self, start: u64, end: u64) -> bool {
        self.start <= end && start <= self.end
    }

    fn conflicts(&self, with: &Self) -> bool {
        self.holder != with.holder
            && (self.write || with.write)
            && self.overlaps(with.start, with.end)
    }

    fn to_wire(self, ino: u64, flock: bool) -> v1::Lock {
        v1::Lock {
            ino,
            owner: self.holder.owner,
            kind: if self.write {
                LockKind::Write
            } else {
                LockKind::Read
            } as i32,
            start: self.start,
            end: self.end,
            flock,
            wait: false,
            pid: self.pid,
        }
    }
}

struct Waiter {
    ticket: Ticket,
    flock: bool,
    range: Range,
}

#[derive(Default)]
struct InodeLocks {
    /// Ascending by start.
    ranges: Vec<Range>,
    flocks: Vec<Range>,
    waiters: VecDeque<Waiter>,
}

impl InodeLocks {
    fn is_empty(&self) -> bool {
        self.ranges.is_empty() && self.flocks.is_empty() && self.waiters.is_empty()
    }

    fn space(&self, flock: bool) -> &[Range] {
        if flock { &self.flocks } else { &self.ranges }
    }

    fn first_conflict(&self, flock: bool, range: &Range) -> Option<&Range> {
        self.space(flock).iter().find(|held| held.conflicts(range))
    }

    /// Takes `[start, end]` out of what the holder has: whole ranges go, ranges that reach beyond are cut or split.
    fn cut(&mut self, holder: Owner, start: u64, end: u64) {
        let mut cut = Vec::new();
        self.ranges.retain(|held| {
            let hit = held.holder == holder && held.overlaps(start, end);
            if hit {
                if held.start < start {
                    cut.push(Range {
                        end: start - 1,
                        ..*held
                    });
                }
                if held.end > end {
                    cut.push(Range {
                        start: end + 1,
                        ..*held
                    });
                }
            }
            !hit
        });
        for piece in cut {
            self.insert(piece);
        }
    }

    fn insert(&mut self, range: Range) {
        let at = self
            .ranges
            .partition_point(|held| held.start <= range.start);
        self.ranges.insert(at, range);
    }

    /// Replaces whatever the holder had in the range, then joins it with neighbours of its kind.
    fn place(&mut self, flock: bool, mut range: Range) {
        if flock {
            self.flocks.retain(|held| held.holder != range.holder);
            self.flocks.push(range);
            return;
        }
        self.cut(range.holder, range.start, range.end);
        self.ranges.retain(|held| {
            let joins = held.holder == range.holder
                && held.write == range.write
                && (held.end.checked_add(1) == Some(range.start)
                    || range.end.checked_add(1) == Some(held.start));
            if joins {
                range.start = range.start.min(held.start);
                range.end = range.end.max(held.end);
            }
            !joins
        });
        self.insert(range);
    }

    fn release(&mut self, flock: bool, holder: Owner, start: u64, end: u64) {
        if flock {
            self.flocks.retain(|held| held.holder != holder);
        } else {
            self.cut(holder, start, end);
        }
    }

    /// Grants whatever no longer conflicts, in the order of arrival.
    fn wake(&mut self, granted: &mut Vec<Ticket>) {
        let mut at = 0;
        while at < self.waiters.len() {
            let waiter = &self.waiters[at];
            if self.first_conflict(waiter.flock, &waiter.range).is_some() {
                at += 1;
                continue;
            }
            if let Some(waiter) = self.waiters.remove(at) {
                self.place(waiter.flock, waiter.range);
                granted.push(waiter.ticket);
                // A grant may replace a stronger lock of the same owner (a downgrade by another thread of it), which can
                // free those before it in the queue.
                at = 0;
            }
        }
    }
}

/// All locks of one volume.
#[derive(Default)]
pub struct LockTable {
    inodes: HashMap<u64, InodeLocks>,
    /// Where a session holds or waits for something.
    by_session: HashMap<u64, HashSet<u64>>,
}

impl LockTable {
    /// Places, waits for or gives up a lock. Returns the verdict and the tickets of others that are granted by it.
    ///
    /// A flock request that is not granted at once gives up what the owner had, also one that does not wait (flock(2):
    /// converting a lock is not atomic). An fcntl request that is not granted leaves the owner's locks as they are.
    pub fn request(&mut self, ticket: Ticket, lock: &v1::Lock) -> (Verdict, Vec<Ticket>) {
        let mut granted = Vec::new();
        let Some((kind, range)) = parse(ticket.session, lock) else {
            return (Verdict::Invalid, granted);
        };
        if kind == LockKind::Unlock {
            if let Some(inode) = self.inodes.get_mut(&lock.ino) {
                inode.release(lock.flock, range.holder, range.start, range.end);
                inode.wake(&mut granted);
                self.tidy(lock.ino, ticket.session);
            }
            return (Verdict::Granted, granted);
        }
        if self.is_full(ticket.session, lock.ino) {
            return (Verdict::TooMany, granted);
        }
        let in_the_way = self
            .inodes
            .get(&lock.ino)
            .and_then(|inode| inode.first_conflict(lock.flock, &range))
            .copied();
        let circle = in_the_way.is_some()
            && lock.wait
            && !lock.flock
            && self.closes_a_circle(lock.ino, &range);
        let inode = self.inodes.entry(lock.ino).or_default();
        let verdict = match in_the_way {
            None => {
                inode.place(lock.flock, range);
                Verdict::Granted
            }
            Some(_) if circle => Verdict::Deadlock,
            Some(held) => {
                if lock.flock {
                    inode.flocks.retain(|held| held.holder != range.holder);
                }
                if lock.wait {
                    inode.waiters.push_back(Waiter {
                        ticket,
                        flock: lock.flock,
                        range,
                    });
                    Verdict::Waits
                } else {
                    Verdict::Conflict(held.to_wire(lock.ino, lock.flock))
                }
            }
        };
        // What was placed may be weaker than what it replaced, and a flock that was refused gave up what its owner had.
        inode.wake(&mut granted);
        self.by_session
            .entry(ticket.session)
            .or_default()
            .insert(lock.ino);
        self.tidy(lock.ino, ticket.session);
        (verdict, granted)
    }

    /// The first lock that would be in the way; `None` when the lock could be placed.
    pub fn test(&self, session: u64, lock: &v1::Lock) -> Option<v1::Lock> {
        let (_, range) = parse(session, lock)?;
        let held = self
            .inodes
            .get(&lock.ino)?
            .first_conflict(lock.flock, &range)?;
        Some(held.to_wire(lock.ino, lock.flock))
    }

    /// Puts a lock back that a session held under an earlier leader. `Err` names a lock that is in the way.
    pub fn reassert(&mut self, session: u64, lock: &v1::Lock) -> Result<(), Verdict> {
        let lock = v1::Lock {
            wait: false,
            ..*lock
        };
        match self.request(
            Ticket {
                session,
                request: 0,
            },
            &lock,
        ) {
            (Verdict::Granted, _) => Ok(()),
            (verdict, _) => Err(verdict),
        }
    }

    /// Gives up a waiting request. `true` when it was waiting.
    pub fn cancel(&mut self, ticket: Ticket) -> bool {
        let Some(inos) = self.by_session.get(&ticket.session) else {
            return false;
        };
        let found = inos.iter().copied().find(|ino| {
            self.inodes
                .get(ino)
                .is_some_and(|inode| inode.waiters.iter().any(|waiter| waiter.ticket == ticket))
        });
        let Some(ino) = found else { return false };
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.waiters.retain(|waiter| waiter.ticket != ticket);
        }
        // Nobody waits behind a waiter, only behind holders, so nobody is woken.
        self.tidy(ino, ticket.session);
        true
    }

    /// Drops all locks of an owner on an inode (close).
    pub fn release_owner(&mut self, ino: u64, holder: Owner, flock: bool) -> Vec<Ticket> {
        let mut granted = Vec::new();
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.release(flock, holder, 0, u64::MAX);
            inode.wake(&mut granted);
            self.tidy(ino, holder.session);
        }
        granted
    }

    /// Drops all that a session holds or waits for.
    pub fn end_session(&mut self, session: u64) -> Vec<Ticket> {
        let mut granted = Vec::new();
        for ino in self.by_session.remove(&session).unwrap_or_default() {
            if let Some(inode) = self.inodes.get_mut(&ino) {
                inode.ranges.retain(|held| held.holder.session != session);
                inode.flocks.retain(|held| held.holder.session != session);
                inode
                    .waiters
                    .retain(|waiter| waiter.ticket.session != session);
                inode.wake(&mut granted);
                if inode.is_empty() {
                    self.inodes.remove(&ino);
                }
            }
        }
        granted
    }

    /// Drops all that a session waits for: its stream is gone, and with it those who could be told.
    pub fn forget_waits(&mut self, session: u64) {
        let inos: Vec<u64> = self
            .by_session
            .get(&session)
            .into_iter()
            .flatten()
            .copied()
            .collect();
        for ino in inos {
            if let Some(inode) = self.inodes.get_mut(&ino) {
                inode
                    .waiters
                    .retain(|waiter| waiter.ticket.session != session);
            }
            self.tidy(ino, session);
        }
    }

    /// Number of locks that a session holds.
    pub fn held(&self, session: u64) -> usize {
        let Some(inos) = self.by_session.get(&session) else {
            return 0;
        };
        let of_session = |ranges: &[Range]| {
            ranges
                .iter()
                .filter(|range| range.holder.session == session)
                .count()
        };
        inos.iter()
            .filter_map(|ino| self.inodes.get(ino))
            .map(|inode| of_session(&inode.ranges) + of_session(&inode.flocks))
            .sum()
    }

    fn is_full(&self, session: u64, ino: u64) -> bool {
        let ranges = self.inodes.get(&ino).map_or(0, |inode| {
            inode.ranges.len() + inode.flocks.len() + inode.waiters.len()
        });
        let inos = self.by_session.get(&session).map_or(0, HashSet::len);
        ranges >= LOCKS_MAX || inos >= LOCKS_MAX
    }

    /// Forgets an inode without locks, and that the session has anything there when it has not.
    fn tidy(&mut self, ino: u64, session: u64) {
        let Some(inode) = self.inodes.get(&ino) else {
            return;
        };
        let has = inode
            .ranges
            .iter()
            .any(|held| held.holder.session == session)
            || inode
                .flocks
                .iter()
                .any(|held| held.holder.session == session)
            || inode
                .waiters
                .iter()
                .any(|waiter| waiter.ticket.session == session);
        if !has && let Some(inos) = self.by_session.get_mut(&session) {
            inos.remove(&ino);
            if inos.is_empty() {
                self.by_session.remove(&session);
            }
        }
        if inode.is_empty() {
            self.inodes.remove(&ino);
        }
    }

    /// Would an owner that waits for `range` wait, through others, for itself?
    fn closes_a_circle(&self, ino: u64, range: &Range) -> bool {
        let me = range.holder;
        let mut seen = HashSet::new();
        let mut open: Vec<Owner> = self.blockers(ino, range).collect();
        while let Some(owner) = open.pop() {
            if owner == me {
                return true;
            }
            if !seen.insert(owner) {
                continue;
            }
            for &ino in self.by_session.get(&owner.session).into_iter().flatten() {
                let Some(inode) = self.inodes.get(&ino) else {
                    continue;
                };
                for waiter in &inode.waiters {
                    if !waiter.flock && waiter.range.holder == owner {
                        open.extend(self.blockers(ino, &waiter.range));
                    }
                }
            }
        }
        false
    }

    /// Who holds what `range` conflicts with.
    fn blockers<'a>(&'a self, ino: u64, range: &'a Range) -> impl Iterator<Item = Owner> + 'a {
        self.inodes
            .get(&ino)
            .into_iter()
            .flat_map(|inode| inode.ranges.iter())
            .filter(move |held| held.conflicts(range))
            .map(|held| held.holder)
    }
}

fn parse(session: u64, lock: &v1::Lock) -> Option<(LockKind, Range)> {
    let kind = LockKind::try_from(lock.kind).ok()?;
    let (start, end) = if lock.flock {
        (0, u64::MAX)
    } else {
        (lock.start, lock.end)
    };
    (start <= end).then_some((
        kind,
        Range {
            holder: Owner {
                session,
                owner: lock.owner,
            },
            write: kind == LockKind::Write,
            start,
            end,
            pid: lock.pid,
        },
    ))
}

//! The locks that a session holds, as the replies of the leader tell; what it re-asserts after a reconnect.

use std::collections::BTreeMap;

use heliofs_proto::v1::{HeldLock, Lock, LockKind};

/// Locks of one owner on one inode live apart from all others; flock and fcntl have name spaces of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Holder {
    ino: u64,
    owner: u64,
    flock: bool,
}

impl Holder {
    fn of(lock: &Lock) -> Self {
        Self {
            ino: lock.ino,
            owner: lock.owner,
            flock: lock.flock,
        }
    }
}

/// A locked range, both ends inclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    start: u64,
    end: u64,
    write: bool,
    pid: u32,
}

/// Non-overlapping ranges per holder, ascending. A new lock replaces what its owner held in its range, as fcntl(2) says.
#[derive(Debug, Default)]
pub struct HeldLocks {
    holders: BTreeMap<Holder, Vec<Range>>,
}

/// flock covers the whole file, whatever range the message names.
fn span(lock: &Lock) -> (u64, u64) {
    if lock.flock {
        (0, u64::MAX)
    } else {
        (lock.start, lock.end)
    }
}

impl HeldLocks {
    /// The leader granted `lock` (or, with `LOCK_KIND_UNLOCK`, took the range back).
    pub fn granted(&mut self, lock: &Lock) {
        let (start, end) = span(lock);
        let holder = Holder::of(lock);
        let held = self.holders.remove(&holder).unwrap_or_default();
        let mut ranges = Vec::with_capacity(held.len() + 2);
        for range in held {
            if range.start < start {
                let end = range.end.min(start - 1);
                ranges.push(Range { end, ..range });
            }
            if range.end > end {
                let start = range.start.max(end + 1);
                ranges.push(Range { start, ..range });
            }
        }
        if lock.kind() != LockKind::Unlock {
            ranges.push(Range {
                start,
                end,
                write: lock.kind() == LockKind::Write,
                pid: lock.pid,
            });
        }
        ranges.sort_by_key(|range| range.start);
        if !ranges.is_empty() {
            self.holders.insert(holder, ranges);
        }
    }

    /// Everything of one owner on an inode is gone.
    pub fn released(&mut self, ino: u64, owner: u64, flock: bool) {
        self.holders.remove(&Holder { ino, owner, flock });
    }

    /// Whether the owner holds anything on the inode.
    pub fn any(&self, ino: u64, owner: u64, flock: bool) -> bool {
        self.holders.contains_key(&Holder { ino, owner, flock })
    }

    /// Number of holders.
    pub fn holders(&self) -> usize {
        self.holders.len()
    }

    /// The requests that bring the range of `lock`, which was granted to a caller that had given up, back to what is held
    /// here. Each only weakens a lock, so none can block. `lock` itself was not reported to [`HeldLocks::granted`].
    pub fn undo(&self, lock: &Lock) -> Vec<Lock> {
        let (start, end) = span(lock);
        let piece = |start, end, kind: LockKind, pid| Lock {
            start,
            end,
            kind: kind.into(),
            pid,
            wait: false,
            ..*lock
        };
        let mut requests = Vec::new();
        let mut next = Some(start);
        let held = self.holders.get(&Holder::of(lock));
        for range in held.map_or(&[][..], Vec::as_slice) {
            if range.end < start || range.start > end {
                continue;
            }
            let (from, to) = (range.start.max(start), range.end.min(end));
            if let Some(gap) = next
                && gap < from
            {
                requests.push(piece(gap, from - 1, LockKind::Unlock, lock.pid));
            }
            let kind = if range.write {
                LockKind::Write
            } else {
                LockKind::Read
            };
            requests.push(piece(from, to, kind, range.pid));
            next = to.checked_add(1);
        }
        if let Some(gap) = next
            && gap <= end
        {
            requests.push(piece(gap, end, LockKind::Unlock, lock.pid));
        }
        requests
    }

    /// All of them, for a hello.
    pub fn held(&self) -> Vec<HeldLock> {
        let lock = |holder: &Holder, range: &Range| HeldLock {
            lock: Some(Lock {
                ino: holder.ino,
                owner: holder.owner,
                kind: if range.write {
                    LockKind::Write.into()
                } else {
                    LockKind::Read.into()
                },
                start: range.start,
                end: range.end,
                flock: holder.flock,
                wait: false,
                pid: range.pid,
            }),
        };
        self.holders
            .iter()
            .flat_map(|(holder, ranges)| ranges.iter().map(move |range| lock(holder, range)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(kind: LockKind, start: u64, end: u64) -> Lock {
        Lock {
            ino: 1,
            owner: 7,
            kind: kind.into(),
            start,
            end,
            ..Default::default()
        }
    }

    fn held(locks: &HeldLocks) -> Vec<(u64, u64, LockKind)> {
        let lock = |held: HeldLock| {
            let lock = held.lock.unwrap();
            (lock.start, lock.end, lock.kind())
        };
        locks.held().into_iter().map(lock).collect()
    }

    #[test]
    fn a_lock_replaces_what_its_owner_held_in_its_range() {
        let mut locks = HeldLocks::default();
        locks.granted(&lock(LockKind::Read, 0, u64::MAX));
        locks.granted(&lock(LockKind::Write, 10, 19));
        locks.granted(&lock(LockKind::Unlock, 15, 29));
        assert_eq!(
            held(&locks),
            [
                (0, 9, LockKind::Read),
                (10, 14, LockKind::Write),
                (30, u64::MAX, LockKind::Read)
            ]
        );
        locks.granted(&lock(LockKind::Unlock, 0, u64::MAX));
        assert!(held(&locks).is_empty());
        assert!(!locks.any(1, 7, false));
    }

    #[test]
    fn a_grant_nobody_waits_for_is_taken_back_to_what_was_held() {
        let mut locks = HeldLocks::default();
        locks.granted(&lock(LockKind::Read, 10, 19));
        let undo: Vec<_> = locks
            .undo(&lock(LockKind::Write, 0, 29))
            .into_iter()
            .map(|lock| (lock.start, lock.end, lock.kind()))
            .collect();
        assert_eq!(
            undo,
            [
                (0, 9, LockKind::Unlock),
                (10, 19, LockKind::Read),
                (20, 29, LockKind::Unlock)
            ]
        );
        let whole = locks.undo(&lock(LockKind::Write, 20, u64::MAX));
        assert_eq!(whole.len(), 1);
    }

    #[test]
    fn flock_and_fcntl_do_not_meet() {
        let mut locks = HeldLocks::default();
        locks.granted(&lock(LockKind::Write, 0, 9));
        locks.granted(&Lock {
            flock: true,
            ..lock(LockKind::Read, 5, 5)
        });
        assert_eq!(
            held(&locks),
            [(0, 9, LockKind::Write), (0, u64::MAX, LockKind::Read)]
        );
        locks.released(1, 7, true);
        assert_eq!(held(&locks), [(0, 9, LockKind::Write)]);
    }
}

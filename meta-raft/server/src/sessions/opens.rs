//! Which sessions have which inodes open, so that an unlinked file lives until its last close. Pure: no clock, no I/O.
//!
//! A session's registration of an inode is one, however often it is asked for: the client counts its handles and releases
//! after the last. Besides there are pins: a file that a session just created stays until the session acknowledged the
//! reply, since the create counts as an open as soon as the session knows of it.

use std::collections::{BTreeMap, HashMap, HashSet};

use heliofs_proto::v1::FsError;

/// Most inodes that one session may have open; bounds the memory that a hostile client can take.
pub const OPENS_PER_SESSION_MAX: usize = 1 << 20;

#[derive(Default)]
struct SessionOpens {
    inos: HashSet<u64>,
    /// By sequence of the create, or of the batch.
    pins: BTreeMap<u64, Vec<u64>>,
}

/// An open that was registered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Registered {
    /// The session did not have it open before.
    pub first: bool,
    /// Somebody held the inode before: also without a name it is there.
    pub was_held: bool,
}

/// The opens of one volume.
#[derive(Default)]
pub struct Opens {
    /// How many registrations and pins hold an inode.
    holders: HashMap<u64, u32>,
    sessions: HashMap<u64, SessionOpens>,
    /// Inodes for which a reap is proposed: nobody can open them any more.
    reaping: HashSet<u64>,
}

impl Opens {
    /// Registers an open. Register first, read attributes after: what was not unlinked by then stays.
    ///
    /// Errors: `Stale` when the inode is being reaped, `NoSpace` above [`OPENS_PER_SESSION_MAX`].
    pub fn open(&mut self, session: u64, ino: u64) -> Result<Registered, FsError> {
        if self.reaping.contains(&ino) {
            return Err(FsError::Stale);
        }
        let was_held = self.is_held(ino);
        let opens = self.sessions.entry(session).or_default();
        if opens.inos.len() >= OPENS_PER_SESSION_MAX && !opens.inos.contains(&ino) {
            return Err(FsError::NoSpace);
        }
        let first = opens.inos.insert(ino);
        if first {
            *self.holders.entry(ino).or_default() += 1;
        }
        Ok(Registered { first, was_held })
    }

    /// Takes back the session's open. `true` when nobody holds the inode any more.
    pub fn release(&mut self, session: u64, ino: u64) -> bool {
        self.sessions
            .get_mut(&session)
            .is_some_and(|opens| opens.inos.remove(&ino))
            && drop_holder(&mut self.holders, ino)
    }

    /// A create by `session` under `sequence` was applied: holds the inode until the reply is acknowledged.
    pub fn pin(&mut self, session: u64, sequence: u64, ino: u64) {
        let opens = self.sessions.entry(session).or_default();
        let pinned = opens.pins.entry(sequence).or_default();
        if !pinned.contains(&ino) {
            pinned.push(ino);
            *self.holders.entry(ino).or_default() += 1;
        }
    }

    /// The session holds the replies of all sequences below `below`. Returns the inodes that nobody holds any more.
    pub fn acknowledge(&mut self, session: u64, below: u64) -> Vec<u64> {
        let Some(opens) = self.sessions.get_mut(&session) else {
            return Vec::new();
        };
        if opens
            .pins
            .first_key_value()
            .is_none_or(|(first, _)| *first >= below)
        {
            return Vec::new();
        }
        let kept = opens.pins.split_off(&below);
        let dropped = std::mem::replace(&mut opens.pins, kept);
        dropped
            .into_values()
            .flatten()
            .filter(|ino| drop_holder(&mut self.holders, *ino))
            .collect()
    }

    /// Replaces the session's opens by what it says it has open; pins stay. Returns the inodes that nobody holds any more.
    pub fn reassert(&mut self, session: u64, inos: &[u64]) -> Vec<u64> {
        let opens = self.sessions.entry(session).or_default();
        let before = std::mem::take(&mut opens.inos);
        for ino in inos.iter().take(OPENS_PER_SESSION_MAX) {
            // What is being reaped is lost: the session was away for longer than anybody waits.
            if !self.reaping.contains(ino) && opens.inos.insert(*ino) {
                *self.holders.entry(*ino).or_default() += 1;
            }
        }
        before
            .into_iter()
            .filter(|ino| drop_holder(&mut self.holders, *ino))
            .collect()
    }

    /// Drops all of a session. Returns the inodes that nobody holds any more.
    pub fn end_session(&mut self, session: u64) -> Vec<u64> {
        let opens = self.sessions.remove(&session).unwrap_or_default();
        opens
            .inos
            .into_iter()
            .chain(opens.pins.into_values().flatten())
            .filter(|ino| drop_holder(&mut self.holders, *ino))
            .collect()
    }

    /// Somebody has it open, or just created it.
    pub fn is_held(&self, ino: u64) -> bool {
        self.holders.contains_key(&ino)
    }

    /// No other session than `session` has it open, or just created it.
    pub fn is_alone(&self, session: u64, ino: u64) -> bool {
        let own = self.sessions.get(&session).map_or(0, |opens| {
            u32::from(opens.inos.contains(&ino))
                + opens
                    .pins
                    .values()
                    .flatten()
                    .filter(|pinned| **pinned == ino)
                    .count() as u32
        });
        self.holders.get(&ino).copied().unwrap_or(0) <= own
    }

    /// From now on nobody can open the inode. `false` when somebody holds it: it must not be reaped.
    pub fn begin_reap(&mut self, ino: u64) -> bool {
        let free = !self.is_held(ino);
        if free {
            self.reaping.insert(ino);
        }
        free
    }

    /// The reap is done.
    pub fn end_reap(&mut self, ino: u64) {
        self.reaping.remove(&ino);
    }

    /// Number of inodes that a session has open.
    pub fn count(&self, session: u64) -> usize {
        self.sessions
            .get(&session)
            .map_or(0, |opens| opens.inos.len())
    }

    /// Number of inodes that somebody holds.
    pub fn held(&self) -> usize {
        self.holders.len()
    }
}

/// `true` when nobody is left.
fn drop_holder(holders: &mut HashMap<u64, u32>, ino: u64) -> bool {
    let Some(count) = holders.get_mut(&ino) else {
        return true;
    };
    *count = count.saturating_sub(1);
    let gone = *count == 0;
    if gone {
        holders.remove(&ino);
    }
    gone
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_is_held_until_the_last_session_released_it() {
        let mut opens = Opens::default();
        assert_eq!(
            opens.open(1, 7),
            Ok(Registered {
                first: true,
                was_held: false
            })
        );
        assert_eq!(
            opens.open(1, 7),
            Ok(Registered {
                first: false,
                was_held: true
            })
        );
        assert_eq!(
            opens.open(2, 7),
            Ok(Registered {
                first: true,
                was_held: true
            })
        );
        assert!(!opens.release(1, 7));
        assert!(!opens.release(1, 7));
        assert!(!opens.begin_reap(7));
        assert!(opens.release(2, 7));
        assert!(opens.begin_reap(7));
        assert_eq!(opens.open(1, 7), Err(FsError::Stale));
        opens.end_reap(7);
        assert_eq!(opens.held(), 0);
    }

    #[test]
    fn one_is_alone_with_what_nobody_else_holds() {
        let mut opens = Opens::default();
        opens.pin(1, 5, 70);
        opens.open(1, 70).unwrap();
        assert!(opens.is_alone(1, 70));
        assert!(!opens.is_alone(2, 70));
        opens.open(2, 70).unwrap();
        assert!(!opens.is_alone(1, 70));
        opens.end_session(1);
        assert!(opens.is_alone(2, 70));
    }

    #[test]
    fn a_created_file_is_held_until_its_reply_is_acknowledged() {
        let mut opens = Opens::default();
        opens.pin(1, 5, 70);
        opens.pin(1, 6, 71);
        assert!(!opens.begin_reap(70));
        assert!(opens.acknowledge(1, 5).is_empty());
        assert_eq!(opens.acknowledge(1, 6), [70]);
        // The open that the reply registered outlives the acknowledgement.
        opens.open(1, 71).unwrap();
        assert!(opens.acknowledge(1, 7).is_empty());
        assert!(opens.release(1, 71));
        assert!(opens.end_session(1).is_empty());
    }

    #[test]
    fn a_resumed_session_replaces_its_opens_and_keeps_its_pins() {
        let mut opens = Opens::default();
        opens.open(1, 7).unwrap();
        opens.open(1, 8).unwrap();
        opens.pin(1, 3, 9);
        assert_eq!(opens.reassert(1, &[8, 8]), [7]);
        assert!(opens.is_held(9));
        assert!(opens.release(1, 8));
        assert!(opens.begin_reap(7));
        assert!(opens.reassert(1, &[7, 10]).is_empty());
        assert!(!opens.is_held(7));
        let mut freed = opens.end_session(1);
        freed.sort_unstable();
        assert_eq!(freed, [9, 10]);
        assert_eq!(opens.held(), 0);
    }
}

//! Write leases: which session may let close return before a file's data is committed. Pure: no clock, no I/O.
//!
//! A session that is alone with a file gets its lease with the open. Whoever else wants to see the file recalls the lease and
//! waits until the holder has committed what it has, or is gone.
//!
//! A directory's lease is granted with its making and never again: whoever holds it knows that nobody else has seen what is in it.

use std::collections::{HashMap, HashSet};

use heliofs_proto::v1;
use tokio::sync::oneshot;

/// Ends (without a value) when the lease that was waited for is over.
pub type Returned = oneshot::Receiver<()>;

struct Lease {
    session: u64,
    grant: u64,
    directory: bool,
    /// The holder was asked to return it, and who waits for that.
    recalled: Option<Vec<oneshot::Sender<()>>>,
}

/// A lease that is in the way.
#[derive(Debug)]
pub struct Recall {
    /// The session that is to be sent a recall of this grant, unless it was before.
    pub ask: Option<(u64, v1::WriteLease)>,
    /// What to wait for.
    pub returned: Returned,
}

/// Directories that one session holds leases of; beyond it none are granted.
pub const DIRECTORIES_MAX: usize = 8192;

/// The leases of one volume.
#[derive(Default)]
pub struct WriteLeases {
    leases: HashMap<u64, Lease>,
    /// How many of them are of directories, by session.
    directories: HashMap<u64, usize>,
    /// The greatest grant's number so far.
    grants: u64,
}

impl WriteLeases {
    /// Gives `ino`'s lease to `session`, which is alone with the file; false if it or another session holds one already. A
    /// recalled lease stays recalled.
    pub fn grant(&mut self, session: u64, ino: u64) -> bool {
        self.insert(session, ino, false)
    }

    /// Gives a directory's lease to the session that has just made it, unless it holds too many; false if not.
    pub fn grant_directory(&mut self, session: u64, ino: u64) -> bool {
        let held = self.directories.get(&session).copied().unwrap_or(0);
        held < DIRECTORIES_MAX && self.insert(session, ino, true)
    }

    fn insert(&mut self, session: u64, ino: u64, directory: bool) -> bool {
        if self.leases.contains_key(&ino) {
            return false;
        }
        self.grants += 1;
        let lease = Lease {
            session,
            grant: self.grants,
            directory,
            recalled: None,
        };
        self.leases.insert(ino, lease);
        if directory {
            *self.directories.entry(session).or_default() += 1;
        }
        true
    }

    fn remove(&mut self, ino: u64) {
        if let Some(lease) = self.leases.remove(&ino)
            && lease.directory
            && let Some(held) = self.directories.get_mut(&lease.session)
        {
            *held = held.saturating_sub(1);
        }
    }

    /// Whether another session than `session` holds the lease of this inode, which is a directory.
    pub fn is_directory_held_against(&self, session: u64, ino: u64) -> bool {
        let lease = self.leases.get(&ino);
        lease.is_some_and(|lease| lease.directory && lease.session != session)
    }

    /// Directories whose lease another session than `by` holds.
    pub fn directories_held_against(&self, by: u64) -> Vec<u64> {
        if self.no_directories_against(by) {
            return Vec::new();
        }
        let others = |(_, lease): &(&u64, &Lease)| lease.directory && lease.session != by;
        let others = self.leases.iter().filter(others);
        others.map(|(ino, _)| *ino).collect()
    }

    /// No session but `by` holds a directory's lease.
    pub fn no_directories_against(&self, by: u64) -> bool {
        let mut sessions = self.directories.iter();
        sessions.all(|(session, held)| *session == by || *held == 0)
    }

    /// The grant by which `session` may hold back data of `ino`; 0: none, or it was recalled.
    pub fn holds(&self, session: u64, ino: u64) -> u64 {
        let lease = self.leases.get(&ino);
        let held = lease.filter(|lease| lease.session == session && lease.recalled.is_none());
        held.map_or(0, |lease| lease.grant)
    }

    /// Whether a session other than `session` holds the lease, recalled or not.
    pub fn is_held_against(&self, session: u64, ino: u64) -> bool {
        self.leases
            .get(&ino)
            .is_some_and(|lease| lease.session != session)
    }

    /// Recalls `ino`'s lease for `by`. `None`: it is not in the way.
    pub fn recall(&mut self, by: u64, ino: u64) -> Option<Recall> {
        let lease = self.leases.get_mut(&ino)?;
        if lease.session == by {
            return None;
        }
        let (sender, returned) = oneshot::channel();
        let asked = lease.recalled.is_some();
        let waiters = lease.recalled.get_or_insert_default();
        // Those that gave up since (their streams ended) make room.
        waiters.retain(|waiter| !waiter.is_closed());
        waiters.push(sender);
        let grant = lease.grant;
        let ask = (!asked).then_some((lease.session, v1::WriteLease { ino, grant }));
        Some(Recall { ask, returned })
    }

    /// Files whose lease another session than `by` holds.
    pub fn held_against(&self, by: u64) -> Vec<u64> {
        let others = self.leases.iter().filter(|(_, lease)| lease.session != by);
        others.map(|(ino, _)| *ino).collect()
    }

    /// `session` released the file. Who waits for its lease goes on.
    pub fn end(&mut self, session: u64, ino: u64) {
        if self.is(session, ino, None) {
            self.remove(ino);
        }
    }

    /// `session` returns a lease. Who waits for it goes on. Nothing happens when it is not of the grant that is held now.
    pub fn give_back(&mut self, session: u64, lease: v1::WriteLease) {
        if self.is(session, lease.ino, Some(lease.grant)) {
            self.remove(lease.ino);
        }
    }

    fn is(&self, session: u64, ino: u64, grant: Option<u64>) -> bool {
        self.leases.get(&ino).is_some_and(|lease| {
            lease.session == session && grant.is_none_or(|grant| grant == lease.grant)
        })
    }

    /// A resumed session says which leases it holds: those that it does not name end. Returns those that go on as they were, and
    /// those that are to be recalled (again). `is_alone`: no other session has the file open.
    pub fn reassert(
        &mut self,
        session: u64,
        named: &[v1::WriteLease],
        is_alone: impl Fn(u64) -> bool,
    ) -> (Vec<u64>, Vec<v1::WriteLease>) {
        let inos: HashSet<u64> = named.iter().map(|lease| lease.ino).collect();
        self.leases
            .retain(|ino, lease| lease.session != session || lease.directory || inos.contains(ino));
        let (mut held, mut recalled) = (Vec::new(), Vec::new());
        for &named in named {
            // Numbers of an earlier leader go on, and none of them comes twice.
            self.grants = self.grants.max(named.grant);
            let alone = is_alone(named.ino);
            let lease = self.leases.entry(named.ino).or_insert(Lease {
                session,
                grant: named.grant,
                directory: false,
                // Somebody opened the file while the holder was away, and has seen what there was.
                recalled: (!alone).then(Vec::new),
            });
            if lease.session == session && lease.grant == named.grant && lease.recalled.is_none() {
                held.push(named.ino);
            } else {
                recalled.push(named);
            }
        }
        (held, recalled)
    }

    /// As [`WriteLeases::reassert`], of directories. None of them goes on: the session returns them all when what it has answered
    /// has taken effect, and until then others wait, also at a leader that has not granted them.
    pub fn reassert_directories(&mut self, session: u64, named: &[v1::WriteLease]) {
        let inos: HashSet<u64> = named.iter().map(|lease| lease.ino).collect();
        self.leases.retain(|ino, lease| {
            lease.session != session || !lease.directory || inos.contains(ino)
        });
        for named in named {
            self.grants = self.grants.max(named.grant);
            let lease = self.leases.entry(named.ino).or_insert(Lease {
                session,
                grant: named.grant,
                directory: true,
                recalled: None,
            });
            if lease.session == session && lease.directory {
                lease.grant = named.grant;
                lease.recalled.get_or_insert_default();
            }
        }
        let own = |lease: &&Lease| lease.directory && lease.session == session;
        let held = self.leases.values().filter(own).count();
        self.directories.insert(session, held);
    }

    /// Whether the session has leases of directories.
    pub fn holds_directories(&self, session: u64) -> bool {
        self.directories.get(&session).is_some_and(|held| *held > 0)
    }

    /// All of a session's leases end.
    pub fn end_session(&mut self, session: u64) {
        self.leases.retain(|_, lease| lease.session != session);
        self.directories.remove(&session);
    }

    /// Whether somebody waits for a lease of this session.
    pub fn is_waited_for(&self, session: u64) -> bool {
        let waits = |waiters: &Vec<oneshot::Sender<()>>| waiters.iter().any(|one| !one.is_closed());
        self.leases
            .values()
            .any(|lease| lease.session == session && lease.recalled.as_ref().is_some_and(waits))
    }

    /// Number of leases.
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Nobody holds any.
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_over(returned: &mut Returned) -> bool {
        matches!(
            returned.try_recv(),
            Err(oneshot::error::TryRecvError::Closed)
        )
    }

    fn lease(ino: u64, grant: u64) -> v1::WriteLease {
        v1::WriteLease { ino, grant }
    }

    #[test]
    fn the_holder_is_asked_once_and_everybody_waits_for_its_answer() {
        let mut leases = WriteLeases::default();
        assert!(leases.grant(1, 7));
        assert!(!leases.grant(2, 7) && !leases.grant(1, 7));
        assert_eq!((leases.holds(1, 7), leases.holds(2, 7)), (1, 0));
        assert!(leases.recall(1, 7).is_none(), "one's own is not in the way");
        let mut first = leases.recall(2, 7).unwrap();
        let mut second = leases.recall(3, 7).unwrap();
        assert_eq!((first.ask, second.ask), (Some((1, lease(7, 1))), None));
        assert!(leases.is_waited_for(1) && !leases.is_waited_for(2));
        assert_eq!(leases.holds(1, 7), 0, "from the recall on it is of no use");
        assert!(!leases.grant(1, 7), "nor is it granted again");
        leases.end(2, 7);
        leases.give_back(2, lease(7, 1));
        leases.give_back(1, lease(7, 9));
        assert!(!is_over(&mut first.returned), "only its holder ends it");
        leases.give_back(1, lease(7, 1));
        assert!(is_over(&mut first.returned) && is_over(&mut second.returned));
        assert!(leases.grant(1, 7));
        leases.give_back(1, lease(7, 1));
        assert_eq!(leases.holds(1, 7), 2, "an answer to an earlier recall");
        leases.end(1, 7);
        assert!(leases.is_empty());
    }

    #[test]
    fn a_session_that_ends_holds_nobody_up() {
        let mut leases = WriteLeases::default();
        assert!(leases.grant(1, 7) && leases.grant(1, 8) && leases.grant(2, 9));
        let mut waits = leases.recall(2, 8).unwrap().returned;
        leases.end_session(1);
        assert!(is_over(&mut waits));
        assert_eq!(leases.held_against(1), [9]);
    }

    #[test]
    fn directories_outlive_a_stream_only_to_be_returned() {
        let mut leases = WriteLeases::default();
        assert!(leases.grant_directory(1, 7) && leases.grant_directory(1, 8) && leases.grant(1, 9));
        assert_eq!(leases.directories_held_against(2).len(), 2);
        assert!(leases.no_directories_against(1) && leases.directories_held_against(1).is_empty());
        assert!(leases.is_directory_held_against(0, 7) && !leases.is_directory_held_against(0, 9));
        let mut dropped = leases.recall(2, 8).unwrap().returned;
        // 10 was granted by an earlier leader.
        leases.reassert_directories(1, &[lease(7, 1), lease(10, 40)]);
        assert!(is_over(&mut dropped));
        assert_eq!(leases.holds(1, 9), 3, "that is a file's");
        let mut waits: Vec<_> = [7, 10].map(|ino| leases.recall(2, ino).unwrap()).into();
        assert!(waits.iter().all(|wait| wait.ask.is_none()), "asked already");
        leases.reassert(1, &[lease(9, 3)], |_| true);
        assert!(waits.iter_mut().all(|wait| !is_over(&mut wait.returned)));
        leases.give_back(1, lease(7, 1));
        leases.give_back(1, lease(10, 40));
        assert!(waits.iter_mut().all(|wait| is_over(&mut wait.returned)));
        assert!(leases.no_directories_against(2));
    }

    #[test]
    fn a_session_holds_so_many_directories() {
        let mut leases = WriteLeases::default();
        let most = DIRECTORIES_MAX as u64;
        assert!((1..=most).all(|ino| leases.grant_directory(1, ino)));
        assert!(!leases.grant_directory(1, most + 1) && leases.grant_directory(2, most + 1));
        leases.give_back(1, lease(1, 1));
        assert!(leases.grant_directory(1, most + 2));
    }

    #[test]
    fn a_resumed_session_goes_on_with_what_it_names() {
        let mut leases = WriteLeases::default();
        assert!((6..=8).all(|ino| leases.grant(1, ino)));
        let mut kept = leases.recall(2, 7).unwrap().returned;
        let mut dropped = leases.recall(2, 8).unwrap().returned;
        // 9 was granted by an earlier leader, and 10 was opened by somebody else since.
        let named = [lease(6, 1), lease(7, 2), lease(9, 50), lease(10, 51)];
        let (held, recalled) = leases.reassert(1, &named, |ino| ino != 10);
        assert_eq!(held, [6, 9]);
        assert_eq!(recalled, [lease(7, 2), lease(10, 51)]);
        assert!(is_over(&mut dropped) && !is_over(&mut kept));
        assert_eq!((leases.holds(1, 9), leases.holds(1, 10)), (50, 0));
        leases.give_back(1, lease(7, 2));
        assert!(is_over(&mut kept));
        assert!(leases.grant(1, 7));
        assert_eq!(leases.holds(1, 7), 52);
    }
}

//! Write leases: which session may let close return before a file's data is committed. Pure: no clock, no I/O.
//!
//! A session that is alone with a file gets its lease with the open. Whoever else wants to see the file recalls the lease and
//! waits until the holder has committed what it has, or is gone.

use std::collections::HashMap;

use tokio::sync::oneshot;

/// Ends (without a value) when the lease that was waited for is over.
pub type Returned = oneshot::Receiver<()>;

struct Lease {
    session: u64,
    /// The holder was asked to return it, and who waits for that.
    recalled: Option<Vec<oneshot::Sender<()>>>,
}

/// A lease that is in the way.
#[derive(Debug)]
pub struct Recall {
    /// The session that is to be sent a recall, unless it was before.
    pub ask: Option<u64>,
    /// What to wait for.
    pub returned: Returned,
}

/// What a re-asserted lease becomes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reasserted {
    /// It goes on.
    Held,
    /// It goes on, and its recall must be sent again.
    Recalled,
}

/// The leases of one volume.
#[derive(Default)]
pub struct WriteLeases {
    leases: HashMap<u64, Lease>,
}

impl WriteLeases {
    /// Gives `ino`'s lease to `session`, which is alone with the file, unless another session still holds it. A recalled lease
    /// stays recalled.
    pub fn grant(&mut self, session: u64, ino: u64) {
        self.leases.entry(ino).or_insert(Lease {
            session,
            recalled: None,
        });
    }

    /// Whether `session` may go by `ino`'s lease: it is its, and was not recalled.
    pub fn holds(&self, session: u64, ino: u64) -> bool {
        self.leases
            .get(&ino)
            .is_some_and(|lease| lease.session == session && lease.recalled.is_none())
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
        let ask = lease.recalled.is_none().then_some(lease.session);
        let waiters = lease.recalled.get_or_insert_default();
        // Those that gave up since (their streams ended) make room.
        waiters.retain(|waiter| !waiter.is_closed());
        waiters.push(sender);
        Some(Recall { ask, returned })
    }

    /// Files whose lease another session than `by` holds.
    pub fn held_against(&self, by: u64) -> Vec<u64> {
        let others = self.leases.iter().filter(|(_, lease)| lease.session != by);
        others.map(|(ino, _)| *ino).collect()
    }

    /// `session` returns `ino`'s lease, or released the file. Who waits for it goes on.
    pub fn end(&mut self, session: u64, ino: u64) {
        if self
            .leases
            .get(&ino)
            .is_some_and(|lease| lease.session == session)
        {
            self.leases.remove(&ino);
        }
    }

    /// A resumed session says which leases it holds: those that it does not name end. Says what became of each that it names.
    /// `is_alone`: no other session has the file open.
    pub fn reassert(
        &mut self,
        session: u64,
        inos: &[u64],
        is_alone: impl Fn(u64) -> bool,
    ) -> Vec<(u64, Reasserted)> {
        let named: std::collections::HashSet<u64> = inos.iter().copied().collect();
        self.leases
            .retain(|ino, lease| lease.session != session || named.contains(ino));
        let mut outcome = Vec::with_capacity(inos.len());
        for &ino in inos {
            let alone = is_alone(ino);
            let lease = self.leases.entry(ino).or_insert(Lease {
                session,
                // Somebody opened the file while the holder was away, and has seen what there was.
                recalled: (!alone).then(Vec::new),
            });
            let held = lease.session == session && lease.recalled.is_none();
            outcome.push((
                ino,
                if held {
                    Reasserted::Held
                } else {
                    Reasserted::Recalled
                },
            ));
        }
        outcome
    }

    /// All of a session's leases end.
    pub fn end_session(&mut self, session: u64) {
        self.leases.retain(|_, lease| lease.session != session);
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

    #[test]
    fn the_holder_is_asked_once_and_everybody_waits_for_its_answer() {
        let mut leases = WriteLeases::default();
        leases.grant(1, 7);
        leases.grant(2, 7);
        assert!(leases.holds(1, 7) && !leases.holds(2, 7));
        assert!(leases.recall(1, 7).is_none(), "one's own is not in the way");
        let mut first = leases.recall(2, 7).unwrap();
        let mut second = leases.recall(3, 7).unwrap();
        assert_eq!((first.ask, second.ask), (Some(1), None));
        assert!(leases.is_waited_for(1) && !leases.is_waited_for(2));
        assert!(!leases.holds(1, 7), "from the recall on it is of no use");
        leases.grant(1, 7);
        assert!(!leases.holds(1, 7), "nor is it granted again");
        leases.end(2, 7);
        assert!(!is_over(&mut first.returned), "only its holder ends it");
        leases.end(1, 7);
        assert!(is_over(&mut first.returned) && is_over(&mut second.returned));
        leases.grant(2, 7);
        assert!(leases.holds(2, 7));
    }

    #[test]
    fn a_session_that_ends_holds_nobody_up() {
        let mut leases = WriteLeases::default();
        leases.grant(1, 7);
        leases.grant(1, 8);
        leases.grant(2, 9);
        let mut waits = leases.recall(2, 8).unwrap().returned;
        leases.end_session(1);
        assert!(is_over(&mut waits));
        assert_eq!(leases.len(), 1);
        assert!(leases.holds(2, 9));
    }

    #[test]
    fn a_resumed_session_goes_on_with_what_it_names() {
        let mut leases = WriteLeases::default();
        (6..=8).for_each(|ino| leases.grant(1, ino));
        let mut kept = leases.recall(2, 7).unwrap().returned;
        let mut dropped = leases.recall(2, 8).unwrap().returned;
        // 9 was granted by an earlier leader, and 10 was opened by somebody else since.
        let outcome = leases.reassert(1, &[6, 7, 9, 10], |ino| ino != 10);
        assert_eq!(
            outcome,
            [
                (6, Reasserted::Held),
                (7, Reasserted::Recalled),
                (9, Reasserted::Held),
                (10, Reasserted::Recalled),
            ]
        );
        assert!(is_over(&mut dropped) && !is_over(&mut kept));
        assert!(leases.holds(1, 9) && !leases.holds(1, 10));
        leases.end(1, 7);
        assert!(is_over(&mut kept));
    }
}

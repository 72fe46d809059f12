//! The inodes that a session has open. The server knows of each at most once, however often it is open here.

use std::collections::HashMap;

use heliofs_proto::v1;

use super::Recalled;

#[derive(Default)]
struct OpenInode {
    count: u32,
    lease: WriteLease,
    /// The server confirmed the registration.
    registered: bool,
    /// The unanswered request to register it.
    opening: Option<u64>,
}

/// Where this session stands with a file's write lease.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
enum WriteLease {
    #[default]
    None,
    /// By the grant of this number.
    Held(u64),
    /// It is to be returned; until then the server makes others wait.
    Recalled(u64),
}

/// What the last change makes necessary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Need {
    /// Ask the server to register the inode, and say under which request ([`Opens::opening`]).
    Register,
    /// Tell the server that it is no longer open.
    Release,
    /// Nothing.
    Nothing,
}

/// Counts per inode.
#[derive(Default)]
pub(super) struct Opens {
    inodes: HashMap<u64, OpenInode>,
}

impl Opens {
    /// One more open.
    pub(super) fn add(&mut self, ino: u64) -> Need {
        let open = self.inodes.entry(ino).or_default();
        open.count += 1;
        if open.registered || open.opening.is_some() {
            Need::Nothing
        } else {
            Need::Register
        }
    }

    /// Request `id` asks to register the inode.
    pub(super) fn opening(&mut self, ino: u64, id: u64) {
        if let Some(open) = self.inodes.get_mut(&ino) {
            open.opening = Some(id);
        }
    }

    /// Whether request `id` is the one that registers the inode.
    pub(super) fn is_opening(&self, ino: u64, id: u64) -> bool {
        let open = self.inodes.get(&ino);
        open.is_some_and(|open| open.opening == Some(id))
    }

    /// Request `id` to register the inode was answered, or given up (`!ok`).
    pub(super) fn opened(&mut self, ino: u64, id: u64, ok: bool) -> Need {
        match self.inodes.get_mut(&ino) {
            Some(open) if open.opening == Some(id) => {
                open.opening = None;
                open.registered = ok;
                Need::Nothing
            }
            // Registered by a later request, or about to be: a release would take that back.
            Some(_) => Need::Nothing,
            None if ok => Need::Release,
            None => Need::Nothing,
        }
    }

    /// A create of a regular file was answered, and with that the server registered the file. It stays so when the caller
    /// goes on to use it, or when it is open here anyway.
    pub(super) fn created(&mut self, ino: u64, used: bool) -> Need {
        if used {
            let open = self.inodes.entry(ino).or_default();
            open.count += 1;
            open.registered = true;
        } else if !self.inodes.contains_key(&ino) {
            return Need::Release;
        }
        Need::Nothing
    }

    /// One open of a file that the server does not know yet; it registers the file when it makes it ([`Opens::made`]).
    pub(super) fn expect(&mut self, ino: u64) {
        self.inodes.entry(ino).or_default().count += 1;
    }

    /// A batch that made the file was answered: the server registered it.
    pub(super) fn made(&mut self, ino: u64) -> Need {
        match self.inodes.get_mut(&ino) {
            Some(open) => {
                open.registered = true;
                Need::Nothing
            }
            None => Need::Release,
        }
    }

    /// One open less.
    pub(super) fn release(&mut self, ino: u64) -> Need {
        let Some(open) = self.inodes.get_mut(&ino) else {
            return Need::Nothing;
        };
        open.count -= 1;
        if open.count == 0 {
            self.inodes.remove(&ino);
            // Also when the registration isn't confirmed: it may be on its way. If it is unanswered then, `opened` finds no
            // count and asks for another release.
            Need::Release
        } else if open.registered || open.opening.is_some() {
            Need::Nothing
        } else {
            // The open that was to register the inode failed for its caller alone (its deadline); the others still need it.
            Need::Register
        }
    }

    /// The server granted the write lease with its answer to an open or a create.
    pub(super) fn lease_granted(&mut self, ino: u64, grant: u64) {
        if let Some(open) = self.inodes.get_mut(&ino) {
            open.lease = WriteLease::Held(grant);
        }
    }

    /// The server wants the lease back.
    pub(super) fn lease_recalled(&mut self, recall: Recalled) {
        if let Some(open) = self.inodes.get_mut(&recall.ino)
            && open.lease == WriteLease::Held(recall.grant)
        {
            open.lease = WriteLease::Recalled(recall.grant);
        }
    }

    /// Everything that was written under it is committed.
    pub(super) fn lease_returned(&mut self, recall: Recalled) {
        if let Some(open) = self.inodes.get_mut(&recall.ino)
            && open.lease == WriteLease::Recalled(recall.grant)
        {
            open.lease = WriteLease::None;
        }
    }

    /// Whether data may be kept back under the file's write lease.
    pub(super) fn holds_lease(&self, ino: u64) -> bool {
        let open = self.inodes.get(&ino);
        open.is_some_and(|open| matches!(open.lease, WriteLease::Held(_)))
    }

    /// Leases that this session did not return yet, ascending by inode.
    pub(super) fn leases(&self) -> Vec<v1::WriteLease> {
        let leased = |(ino, open): (&u64, &OpenInode)| match open.lease {
            WriteLease::Held(grant) | WriteLease::Recalled(grant) if open.registered => {
                Some(v1::WriteLease { ino: *ino, grant })
            }
            _ => None,
        };
        let mut leases: Vec<_> = self.inodes.iter().filter_map(leased).collect();
        leases.sort_unstable_by_key(|lease| lease.ino);
        leases
    }

    /// Whether the server is known to have it registered.
    pub(super) fn is_registered(&self, ino: u64) -> bool {
        self.inodes.get(&ino).is_some_and(|open| open.registered)
    }

    /// All that the server is known to have registered, ascending.
    pub(super) fn registered(&self) -> Vec<u64> {
        let registered = self.inodes.iter().filter(|(_, open)| open.registered);
        let mut inos: Vec<u64> = registered.map(|(ino, _)| *ino).collect();
        inos.sort_unstable();
        inos
    }

    /// The session is over.
    pub(super) fn clear(&mut self) {
        self.inodes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_made_later_is_registered_or_released_then() {
        let mut opens = Opens::default();
        opens.expect(7);
        opens.expect(8);
        assert!(opens.registered().is_empty());
        assert_eq!(opens.release(8), Need::Release);
        assert_eq!(
            (opens.made(7), opens.made(8)),
            (Need::Nothing, Need::Release)
        );
        assert_eq!(opens.registered(), [7]);
        assert_eq!(opens.release(7), Need::Release);
    }

    #[test]
    fn the_server_hears_of_the_first_open_and_of_the_last_release() {
        let mut opens = Opens::default();
        assert_eq!(opens.add(7), Need::Register);
        opens.opening(7, 1);
        assert_eq!(opens.add(7), Need::Nothing);
        assert!(opens.registered().is_empty(), "not before it was confirmed");
        assert_eq!(opens.opened(7, 1, true), Need::Nothing);
        assert_eq!(opens.registered(), [7]);
        assert_eq!(opens.release(7), Need::Nothing);
        assert_eq!(opens.release(7), Need::Release);
        assert_eq!(opens.release(7), Need::Nothing);
    }

    #[test]
    fn an_open_that_is_answered_after_its_release_is_released_again() {
        let mut opens = Opens::default();
        opens.add(7);
        opens.opening(7, 1);
        assert_eq!(opens.release(7), Need::Release);
        assert_eq!(opens.opened(7, 1, true), Need::Release);
        // Unless it was opened anew meanwhile.
        opens.add(8);
        opens.opening(8, 2);
        opens.release(8);
        assert_eq!(opens.add(8), Need::Register);
        opens.opening(8, 3);
        assert_eq!(opens.opened(8, 2, true), Need::Nothing);
        assert!(!opens.is_registered(8));
        assert_eq!(opens.opened(8, 3, true), Need::Nothing);
        assert!(opens.is_registered(8));
    }

    #[test]
    fn when_the_registering_open_fails_the_others_register_anew() {
        let mut opens = Opens::default();
        opens.add(7);
        opens.opening(7, 1);
        opens.add(7);
        assert_eq!(opens.opened(7, 1, false), Need::Nothing);
        assert_eq!(opens.release(7), Need::Register);
    }

    #[test]
    fn a_lease_lasts_until_its_recall_and_is_named_until_it_is_returned() {
        let mut opens = Opens::default();
        let recall = |grant| Recalled { ino: 7, grant };
        opens.created(7, true);
        assert!(!opens.holds_lease(7));
        opens.lease_granted(7, 1);
        assert!(opens.holds_lease(7));
        opens.lease_recalled(recall(1));
        assert!(!opens.holds_lease(7));
        let named = v1::WriteLease { ino: 7, grant: 1 };
        assert_eq!(opens.leases(), [named], "others wait for it");
        opens.lease_returned(recall(1));
        assert!(opens.leases().is_empty());
        opens.lease_granted(7, 2);
        // Of an earlier grant, which a release ended before the recall came.
        opens.lease_recalled(recall(1));
        opens.lease_returned(recall(1));
        assert!(opens.holds_lease(7));
        opens.release(7);
        assert!(!opens.holds_lease(7));
        opens.lease_granted(8, 3);
        assert!(!opens.holds_lease(8), "it is not open");
    }

    #[test]
    fn a_created_file_that_nobody_uses_is_released() {
        let mut opens = Opens::default();
        assert_eq!(opens.created(7, false), Need::Release);
        assert_eq!(opens.created(8, true), Need::Nothing);
        assert_eq!(opens.created(8, false), Need::Nothing, "it is open here");
        assert_eq!(opens.release(8), Need::Release);
    }
}

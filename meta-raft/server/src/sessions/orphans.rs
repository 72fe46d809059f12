//! Which orphans are worth a look by the reaper. Pure: no clock, no I/O.
//!
//! Orphans are named as they come into being, so that the reaper need not search the records, where those that it removed lately
//! are still in the way. What is not named here (orphans of earlier terms, of tree removals, beyond the bounds) is found by a
//! search from the first record to the last.

use std::collections::{BTreeSet, HashSet};

/// Most inodes in each set; a search finds the others.
const NAMED_MAX: usize = 1 << 16;

/// The orphans of one volume.
pub struct Orphans {
    /// Not looked at yet, or freed since. Ordered: neighbours lie close together in the records.
    candidates: BTreeSet<u64>,
    /// Somebody held them when they were looked at.
    held: HashSet<u64>,
    /// Held ones that did not fit.
    held_unnamed: bool,
    /// A search is under way and goes on after this inode.
    search: Option<u64>,
    /// Something came up that the search may have passed.
    search_again: bool,
}

impl Default for Orphans {
    /// At the begin of a term nothing is known: all records are searched.
    fn default() -> Self {
        Self {
            candidates: BTreeSet::new(),
            held: HashSet::new(),
            held_unnamed: false,
            search: Some(0),
            search_again: false,
        }
    }
}

impl Orphans {
    /// `ino` lost its last name.
    pub fn add(&mut self, ino: u64) {
        if self.candidates.len() < NAMED_MAX {
            self.candidates.insert(ino);
        } else {
            self.search_all();
        }
    }

    /// There are orphans that nobody named.
    pub fn search_all(&mut self) {
        if self.search.is_some() {
            self.search_again = true;
        } else {
            self.search = Some(0);
        }
    }

    /// Nobody holds these inodes any more. `true`: there may be an orphan among them.
    pub fn freed(&mut self, inos: &[u64]) -> bool {
        let mut any = false;
        for ino in inos {
            if self.held.remove(ino) {
                self.add(*ino);
                any = true;
            }
        }
        if self.held_unnamed && !inos.is_empty() {
            self.held_unnamed = false;
            self.search_all();
            any = true;
        }
        any
    }

    /// The next to look at.
    pub fn pop(&mut self) -> Option<u64> {
        self.candidates.pop_first()
    }

    /// Somebody holds it: it comes back with [`Orphans::freed`].
    pub fn hold(&mut self, ino: u64) {
        if self.held.len() < NAMED_MAX {
            self.held.insert(ino);
        } else {
            self.held_unnamed = true;
        }
    }

    /// Where the search goes on, if there is one: orphans above this inode.
    pub fn search_after(&self) -> Option<u64> {
        self.search
    }

    /// What the search found; `more`: there may be further ones.
    pub fn found(&mut self, inos: impl IntoIterator<Item = u64>, more: bool) {
        let mut last = None;
        for ino in inos {
            last = Some(ino);
            if !self.held.contains(&ino) {
                self.candidates.insert(ino);
            }
        }
        self.search = match (last, more) {
            (Some(last), true) => Some(last),
            _ if std::mem::take(&mut self.search_again) => Some(0),
            _ => None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(orphans: &mut Orphans) -> Vec<u64> {
        std::iter::from_fn(|| orphans.pop()).collect()
    }

    #[test]
    fn a_held_orphan_comes_back_once_it_is_freed() {
        let mut orphans = Orphans::default();
        orphans.found([], false);
        orphans.add(7);
        orphans.add(8);
        assert_eq!(drain(&mut orphans), [7, 8]);
        orphans.hold(7);
        assert!(!orphans.freed(&[8, 9]), "neither is a held orphan");
        assert!(orphans.freed(&[7]));
        assert_eq!(drain(&mut orphans), [7]);
        assert_eq!(orphans.search_after(), None);
    }

    #[test]
    fn a_search_ends_once_and_begins_again_when_something_may_have_been_passed() {
        let mut orphans = Orphans::default();
        assert_eq!(orphans.search_after(), Some(0));
        orphans.hold(4);
        orphans.found([3, 4, 5], true);
        assert_eq!(orphans.search_after(), Some(5));
        orphans.search_all();
        orphans.found([9], false);
        assert_eq!(
            orphans.search_after(),
            Some(0),
            "the search may have passed it"
        );
        orphans.found([], false);
        assert_eq!(orphans.search_after(), None);
        assert_eq!(
            drain(&mut orphans),
            [3, 5, 9],
            "held ones wait for their release"
        );
    }

    #[test]
    fn what_does_not_fit_is_searched_for() {
        let mut orphans = Orphans::default();
        orphans.found([], false);
        for ino in 0..=NAMED_MAX as u64 {
            orphans.add(ino);
        }
        assert_eq!(orphans.search_after(), Some(0));
        orphans.found([], false);
        for ino in drain(&mut orphans) {
            orphans.hold(ino);
        }
        orphans.hold(1 << 40);
        assert!(
            orphans.freed(&[1 << 50]),
            "it may be the one without a name"
        );
        assert_eq!(orphans.search_after(), Some(0));
    }
}

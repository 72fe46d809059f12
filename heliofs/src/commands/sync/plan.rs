//! What is done about each key: [`Rules`] and [`Progress`]. Pure.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use blockstore::object::PlainObject;
use serde::{Deserialize, Serialize};

/// What the flags say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rules {
    pub(crate) update: bool,
    pub(crate) force_update: bool,
    pub(crate) existing: bool,
    pub(crate) ignore_existing: bool,
    pub(crate) check_all: bool,
    pub(crate) delete_src: bool,
    pub(crate) delete_dst: bool,
}

/// A key and where it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Pair {
    Source(PlainObject),
    Both(PlainObject, PlainObject),
    Destination(PlainObject),
}

/// What is done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing.
    Skip,
    /// The source's object is stored at the destination.
    Copy,
    /// Both are read; copied if they differ.
    Check,
    /// Both are there and count as equal: the source's goes.
    DeleteSource,
    /// The source has none: the destination's goes.
    DeleteDestination,
}

impl Rules {
    /// What is done about `pair`.
    pub(crate) fn decide(&self, pair: &Pair) -> Step {
        match pair {
            Pair::Source(_) if self.existing => Step::Skip,
            Pair::Source(_) => Step::Copy,
            Pair::Destination(_) if self.delete_dst => Step::DeleteDestination,
            Pair::Destination(_) => Step::Skip,
            Pair::Both(..) if self.ignore_existing => Step::Skip,
            Pair::Both(source, destination) => {
                // Servers count in seconds, and a copy has the second of its source.
                let second = |object: &PlainObject| object.modified.div_euclid(1_000_000_000);
                let differ = source.bytes != destination.bytes;
                let copy = match (self.update, second(source).cmp(&second(destination))) {
                    _ if self.force_update => true,
                    (false, _) | (true, Ordering::Equal) => differ,
                    (true, Ordering::Greater) => true,
                    (true, Ordering::Less) => false,
                };
                match copy {
                    true => Step::Copy,
                    // Its bytes may differ since it was written to later: left alone, as without --check-all.
                    false if differ => Step::Skip,
                    false if self.check_all => Step::Check,
                    false if self.delete_src => Step::DeleteSource,
                    false => Step::Skip,
                }
            }
        }
    }
}

/// Which of two listings' heads comes first; `Equal`: both have the key. `None`: both are at their end.
pub(crate) fn first(source: Option<&str>, destination: Option<&str>) -> Option<Ordering> {
    match (source, destination) {
        (None, None) => None,
        (Some(_), None) => Some(Ordering::Less),
        (None, Some(_)) => Some(Ordering::Greater),
        (Some(source), Some(destination)) => Some(source.cmp(destination)),
    }
}

/// Up to which key everything is done, while keys are begun in order and end in any.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    begun: u64,
    /// The key that was begun last.
    last: Option<String>,
    /// What is being worked on: its number, and the key before it.
    open: BTreeMap<u64, Option<String>>,
    /// The key before the first that failed.
    failed: Option<(u64, Option<String>)>,
}

impl Progress {
    /// Everything up to `done` is done already.
    pub(crate) fn new(done: Option<String>) -> Self {
        Self {
            last: done,
            ..Self::default()
        }
    }

    /// Work on `key` begins; the number is for [`Progress::end`].
    pub(crate) fn begin(&mut self, key: &str) -> u64 {
        let number = self.begun;
        self.begun += 1;
        self.open.insert(number, self.last.replace(key.to_owned()));
        number
    }

    /// Nothing is to be done about `key`.
    pub(crate) fn pass(&mut self, key: &str) {
        self.last = Some(key.to_owned());
    }

    /// Work on a key ended.
    pub(crate) fn end(&mut self, number: u64, success: bool) {
        let Some(before) = self.open.remove(&number) else {
            return;
        };
        if !success
            && self
                .failed
                .as_ref()
                .is_none_or(|(first, _)| number < *first)
        {
            self.failed = Some((number, before));
        }
    }

    /// The last key up to which nothing is open and nothing has failed.
    pub(crate) fn done(&self) -> Option<&str> {
        let open = self.open.first_key_value();
        let failed = self
            .failed
            .as_ref()
            .map(|(number, before)| (number, before));
        let first = open
            .into_iter()
            .chain(failed)
            .min_by_key(|(number, _)| **number);
        match first {
            Some((_, before)) => before.as_deref(),
            None => self.last.as_deref(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(bytes: u64, second: i64) -> PlainObject {
        PlainObject {
            key: "k".to_owned(),
            bytes,
            modified: second * 1_000_000_000 + 7,
        }
    }

    fn both(source: (u64, i64), destination: (u64, i64)) -> Pair {
        Pair::Both(
            object(source.0, source.1),
            object(destination.0, destination.1),
        )
    }

    #[test]
    fn what_is_missing_or_has_another_length_is_copied() {
        let rules = Rules::default();
        assert_eq!(rules.decide(&Pair::Source(object(1, 1))), Step::Copy);
        assert_eq!(rules.decide(&both((1, 9), (1, 1))), Step::Skip);
        assert_eq!(rules.decide(&both((1, 1), (2, 9))), Step::Copy);
        assert_eq!(rules.decide(&Pair::Destination(object(1, 1))), Step::Skip);
    }

    #[test]
    fn update_copies_what_is_newer() {
        let rules = Rules {
            update: true,
            ..Rules::default()
        };
        assert_eq!(rules.decide(&both((1, 2), (1, 1))), Step::Copy);
        assert_eq!(rules.decide(&both((1, 1), (1, 1))), Step::Skip);
        assert_eq!(rules.decide(&both((1, 1), (2, 1))), Step::Copy);
        assert_eq!(rules.decide(&both((1, 1), (2, 2))), Step::Skip);
        let rules = Rules {
            force_update: true,
            ..rules
        };
        assert_eq!(rules.decide(&both((1, 1), (1, 9))), Step::Copy);
    }

    #[test]
    fn existing_and_ignore_existing_leave_the_other_side_alone() {
        let rules = Rules {
            existing: true,
            delete_src: true,
            ..Rules::default()
        };
        assert_eq!(rules.decide(&Pair::Source(object(1, 1))), Step::Skip);
        assert_eq!(rules.decide(&both((1, 1), (2, 1))), Step::Copy);
        assert_eq!(rules.decide(&both((1, 1), (1, 1))), Step::DeleteSource);
        let rules = Rules {
            ignore_existing: true,
            delete_src: true,
            ..Rules::default()
        };
        assert_eq!(rules.decide(&both((1, 1), (2, 1))), Step::Skip);
        assert_eq!(rules.decide(&both((1, 1), (1, 1))), Step::Skip);
    }

    #[test]
    fn nothing_is_deleted_at_the_source_that_differs() {
        let rules = Rules {
            update: true,
            delete_src: true,
            check_all: true,
            ..Rules::default()
        };
        assert_eq!(rules.decide(&both((1, 1), (2, 9))), Step::Skip);
        assert_eq!(rules.decide(&both((1, 1), (1, 9))), Step::Check);
    }

    #[test]
    fn listings_are_merged_in_order() {
        assert_eq!(first(Some("a"), Some("b")), Some(Ordering::Less));
        assert_eq!(first(Some("d-x"), Some("d/a")), Some(Ordering::Less));
        assert_eq!(first(Some("b"), Some("b")), Some(Ordering::Equal));
        assert_eq!(first(None, Some("b")), Some(Ordering::Greater));
        assert_eq!(first(None, None), None);
    }

    #[test]
    fn progress_stops_before_what_is_open_or_has_failed() {
        let mut progress = Progress::new(Some("0".to_owned()));
        assert_eq!(progress.done(), Some("0"));
        let a = progress.begin("a");
        progress.pass("b");
        let c = progress.begin("c");
        let d = progress.begin("d");
        assert_eq!(progress.done(), Some("0"));
        progress.end(c, true);
        assert_eq!(progress.done(), Some("0"));
        progress.end(a, true);
        assert_eq!(progress.done(), Some("c"));
        progress.end(d, false);
        let e = progress.begin("e");
        progress.end(e, false);
        progress.pass("f");
        assert_eq!(progress.done(), Some("c"));
    }

    #[test]
    fn nothing_done_is_no_key() {
        let mut progress = Progress::new(None);
        let a = progress.begin("a");
        assert_eq!(progress.done(), None);
        progress.end(a, true);
        assert_eq!(progress.done(), Some("a"));
    }
}

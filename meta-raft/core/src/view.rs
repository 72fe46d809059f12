//! The reads that ops need, and changes on top of them.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::change::{Change, Corruption};
use crate::keys;

/// Read access to replicated records.
pub trait View {
    /// The value under `key`; `None` if there is no record.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Corruption>;

    /// Up to `records_max` records with `from <= key < to`, in key order.
    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        records_max: usize,
    ) -> Result<Vec<(Bytes, Bytes)>, Corruption>;

    /// The last `records_max` records with `from <= key < to`, in descending key order.
    fn scan_back(
        &self,
        from: &[u8],
        to: &[u8],
        records_max: usize,
    ) -> Result<Vec<(Bytes, Bytes)>, Corruption>;
}

impl<V: View + ?Sized> View for &V {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Corruption> {
        (**self).get(key)
    }

    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        records_max: usize,
    ) -> Result<Vec<(Bytes, Bytes)>, Corruption> {
        (**self).scan(from, to, records_max)
    }

    fn scan_back(
        &self,
        from: &[u8],
        to: &[u8],
        records_max: usize,
    ) -> Result<Vec<(Bytes, Bytes)>, Corruption> {
        (**self).scan_back(from, to, records_max)
    }
}

/// Records in memory: tests, models and simulations.
impl View for BTreeMap<Bytes, Bytes> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Corruption> {
        Ok(BTreeMap::get(self, key).cloned())
    }

    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        records_max: usize,
    ) -> Result<Vec<(Bytes, Bytes)>, Corruption> {
        let records = self.range::<[u8], _>((
            std::ops::Bound::Included(from),
            std::ops::Bound::Excluded(to),
        ));
        Ok(records
            .take(records_max)
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect())
    }

    fn scan_back(
        &self,
        from: &[u8],
        to: &[u8],
        records_max: usize,
    ) -> Result<Vec<(Bytes, Bytes)>, Corruption> {
        let records = self.range::<[u8], _>((
            std::ops::Bound::Included(from),
            std::ops::Bound::Excluded(to),
        ));
        Ok(records
            .rev()
            .take(records_max)
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect())
    }
}

/// A view with changes on top that are not written yet. A group of commands is applied to one overlay, one after the other, and
/// written as one batch.
#[derive(Debug)]
pub struct Overlay<V> {
    base: V,
    changes: BTreeMap<Bytes, Slot>,
}

#[derive(Clone, Debug)]
struct Slot {
    old: Option<Bytes>,
    new: Option<Bytes>,
}

impl<V: View> Overlay<V> {
    /// No changes yet.
    pub fn new(base: V) -> Self {
        Self {
            base,
            changes: BTreeMap::new(),
        }
    }

    /// Adds or replaces (`Some`) or removes (`None`) a record.
    pub fn set(&mut self, key: Bytes, new: Option<Bytes>) -> Result<(), Corruption> {
        if let Some(slot) = self.changes.get_mut(&key) {
            slot.new = new;
            return Ok(());
        }
        let old = self.base.get(&key)?;
        self.changes.insert(key, Slot { old, new });
        Ok(())
    }

    /// Adds a record that the caller knows not to exist below this overlay (its key holds a fresh id): saves the read.
    pub fn insert_fresh(&mut self, key: Bytes, new: Bytes) {
        debug_assert!(matches!(self.base.get(&key), Ok(None)));
        self.changes.insert(
            key,
            Slot {
                old: None,
                new: Some(new),
            },
        );
    }

    /// Records that were set so far.
    pub fn changed(&self) -> usize {
        self.changes.len()
    }

    /// Takes over the changes of one command, which was applied to a view over this overlay.
    pub fn absorb(&mut self, changes: &[Change]) {
        for change in changes {
            match self.changes.get_mut(&change.key) {
                Some(slot) => slot.new = change.new.clone(),
                None => {
                    let slot = Slot {
                        old: change.old.clone(),
                        new: change.new.clone(),
                    };
                    self.changes.insert(change.key.clone(), slot);
                }
            }
        }
    }

    /// The net changes in key order; records that ended as they began are left out.
    pub fn into_changes(self) -> Vec<Change> {
        self.changes
            .into_iter()
            .filter(|(_, slot)| slot.old != slot.new)
            .map(|(key, Slot { old, new })| Change { key, old, new })
            .collect()
    }
}

impl<V: View> View for Overlay<V> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, Corruption> {
        match self.changes.get(key) {
            Some(slot) => Ok(slot.new.clone()),
            None => self.base.get(key),
        }
    }

    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        records_max: usize,
    ) -> Result<Vec<(Bytes, Bytes)>, Corruption> {
        use std::ops::Bound::{Excluded, Included};
        let mut found = Vec::new();
        let mut cursor = Bytes::copy_from_slice(from);
        // Removed records make a page of the base yield less than was asked for, so go on until the page is full.
        while found.len() < records_max && cursor[..] < *to {
            let wanted = records_max - found.len();
            let page = self.base.scan(&cursor, to, wanted)?;
            let last_page = page.len() < wanted;
            let until = match page.last() {
                Some((key, _)) if !last_page => keys::after(key),
                _ => Bytes::copy_from_slice(to),
            };
            let mut own = self
                .changes
                .range::<[u8], _>((Included(&cursor[..]), Excluded(&until[..])))
                .peekable();
            let mut base = page.into_iter().peekable();
            while found.len() < records_max {
                let own_first = match (own.peek(), base.peek()) {
                    (Some((own_key, _)), Some((base_key, _))) => {
                        if *own_key == base_key {
                            base.next();
                        } else if *own_key > base_key {
                            found.extend(base.next());
                            continue;
                        }
                        true
                    }
                    (own, _) => own.is_some(),
                };
                if own_first {
                    if let Some((key, Slot { new: Some(new), .. })) = own.next() {
                        found.push((key.clone(), new.clone()));
                    }
                } else if let Some(record) = base.next() {
                    found.push(record);
                } else {
                    break;
                }
            }
            if last_page {
                break;
            }
            cursor = until;
        }
        Ok(found)
    }

    fn scan_back(
        &self,
        from: &[u8],
        to: &[u8],
        records_max: usize,
    ) -> Result<Vec<(Bytes, Bytes)>, Corruption> {
        use std::ops::Bound::{Excluded, Included};
        let mut found = Vec::new();
        let mut cursor = Bytes::copy_from_slice(to);
        while found.len() < records_max && *from < cursor[..] {
            let wanted = records_max - found.len();
            let page = self.base.scan_back(from, &cursor, wanted)?;
            let last_page = page.len() < wanted;
            let until = match page.last() {
                Some((key, _)) if !last_page => key.clone(),
                _ => Bytes::copy_from_slice(from),
            };
            // Merged from the back, one by one: between two records of the base may lie everything that a group wrote.
            let mut own = self
                .changes
                .range::<[u8], _>((Included(&until[..]), Excluded(&cursor[..])))
                .rev()
                .peekable();
            let mut base = page.into_iter().peekable();
            while found.len() < records_max {
                let own_first = match (own.peek(), base.peek()) {
                    (Some((own_key, _)), Some((base_key, _))) => {
                        if *own_key == base_key {
                            // What both have is taken from the changes.
                            base.next();
                        }
                        // The next of the base, or what follows it, is smaller in any case.
                        base.peek().is_none_or(|(base_key, _)| *own_key > base_key)
                    }
                    (own, _) => own.is_some(),
                };
                if own_first {
                    if let Some((key, Slot { new: Some(new), .. })) = own.next() {
                        found.push((key.clone(), new.clone()));
                    }
                } else if let Some(record) = base.next() {
                    found.push(record);
                } else {
                    break;
                }
            }
            if last_page {
                break;
            }
            cursor = until;
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(number: u8) -> Bytes {
        Bytes::copy_from_slice(&[number])
    }

    proptest! {
        #[test]
        fn an_overlay_reads_as_if_its_changes_were_written(
            base in proptest::collection::btree_map(0u8..40, any::<u8>(), 0..30),
            changes in proptest::collection::vec((0u8..40, proptest::option::of(any::<u8>())), 0..40),
            from in 0u8..40, to in 0u8..41, records_max in 0usize..50,
        ) {
            let base: BTreeMap<Bytes, Bytes> = base.into_iter().map(|(k, v)| (bytes(k), bytes(v))).collect();
            let mut model = base.clone();
            let mut overlay = Overlay::new(base.clone());
            for (key, value) in changes {
                overlay.set(bytes(key), value.map(bytes)).unwrap();
                match value {
                    Some(value) => model.insert(bytes(key), bytes(value)),
                    None => model.remove(&bytes(key)),
                };
            }
            let range = (bytes(from), bytes(to.max(from)));
            prop_assert_eq!(
                overlay.scan(&range.0, &range.1, records_max).unwrap(),
                model.scan(&range.0, &range.1, records_max).unwrap()
            );
            prop_assert_eq!(
                overlay.scan_back(&range.0, &range.1, records_max).unwrap(),
                model.scan_back(&range.0, &range.1, records_max).unwrap()
            );
            let mut rewritten = base;
            for change in overlay.into_changes() {
                prop_assert_eq!(rewritten.get(&change.key), change.old.as_ref());
                match change.new {
                    Some(new) => rewritten.insert(change.key, new),
                    None => rewritten.remove(&change.key),
                };
            }
            prop_assert_eq!(rewritten, model);
        }
    }
}

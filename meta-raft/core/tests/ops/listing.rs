//! Listings in pages while names change between the pages.

use std::collections::BTreeMap;

use meta_core::query;
use proptest::prelude::*;

use super::*;

/// Entries that are there all the time are `stay0`, `stay1`, …; the others come, go and are renamed.
fn others() -> impl Strategy<Value = Op> {
    let name = || (0..6u8).prop_map(|number| format!("move{number}"));
    prop_oneof![
        name().prop_map(|name| create(ROOT, name)),
        name().prop_map(|name| unlink(ROOT, name, false)),
        (name(), name()).prop_map(|(from, to)| rename(ROOT, from, ROOT, to)),
        (0..8u8, name()).prop_map(|(stay, name)| exchange(format!("stay{stay}"), name)),
        (name(), 0..8u8).prop_map(|(name, stay)| rename(ROOT, name, ROOT, format!("stay{stay}"))),
    ]
}

fn exchange(name: String, new_name: String) -> Op {
    Op::Rename(v1::Rename {
        parent: ROOT,
        name: name.into(),
        new_parent: ROOT,
        new_name: new_name.into(),
        no_replace: false,
        exchange: true,
    })
}

proptest! {
    #[test]
    fn a_name_that_is_there_all_the_time_is_listed_exactly_once(
        before in proptest::collection::vec(others(), 0..20),
        between in proptest::collection::vec(proptest::collection::vec(others(), 0..5), 0..20),
        page_entries in 1u32..4,
    ) {
        let mut volume = Volume::new();
        for number in 0..8 {
            // Refused if a rename gave the name away before.
            drop(volume.run(create(ROOT, format!("stay{number}"))));
            for op in before.iter().skip(number).step_by(8) {
                drop(volume.run(op.clone()));
            }
        }
        let mut seen: BTreeMap<Bytes, u32> = BTreeMap::new();
        let mut between = between.into_iter();
        let mut after = 0;
        loop {
            let page = query::read_dir(&volume.records, VOLUME, Ino::ROOT, after, page_entries, false);
            let page = page.unwrap();
            for entry in &page.entries {
                *seen.entry(entry.name.clone()).or_default() += 1;
                prop_assert!(entry.cookie > after);
                after = entry.cookie;
            }
            if page.end {
                break;
            }
            for op in between.next().into_iter().flatten() {
                drop(volume.run(op));
            }
            volume.check();
        }
        for number in 0..8 {
            let name = Bytes::from(format!("stay{number}"));
            prop_assert_eq!(seen.get(&name), Some(&1), "{:?}", name);
        }
    }
}

#[test]
fn a_listing_ends_where_the_directory_ends() {
    let mut volume = Volume::new();
    for number in 0..4 {
        volume.run(create(ROOT, number.to_string())).unwrap();
    }
    let page = |after, max| {
        query::read_dir(&volume.records, VOLUME, Ino::ROOT, after, max, false).unwrap()
    };
    assert!(page(0, 4).end);
    assert!(!page(0, 3).end);
    assert_eq!(page(0, 3).entries.len(), 3);
    assert!(page(6, 3).end && page(6, 3).entries.is_empty());
    assert!(page(u64::MAX, 3).end);
}

//! Rules of the cache: order of positions, completeness, bounds.

use heliofs_proto::ids::Epoch;

use super::*;

fn at(seq: u64) -> Position {
    Position {
        epoch: Epoch(0),
        seq,
    }
}

fn attr(ino: u64, size: u64) -> v1::Attr {
    v1::Attr {
        ino,
        size,
        ..Default::default()
    }
}

fn name(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn cache() -> MetaCache {
    MetaCache::new(10_000, 10_000)
}

fn invalidation(ino: u64, seq: u64) -> v1::Invalidation {
    v1::Invalidation {
        position: Some(at(seq).into()),
        ino,
        ..Default::default()
    }
}

#[test]
fn a_newer_answer_is_not_replaced_by_an_older_one() {
    let cache = cache();
    let now = cache.generation();
    cache.put_attr(now, &attr(5, 100), at(7));
    cache.put_attr(now, &attr(5, 50), at(6));
    assert_eq!(cache.attr(5).unwrap().0.size, 100);
    cache.put_name(now, 1, &name("a"), 0, at(9));
    cache.put_name(now, 1, &name("a"), 5, at(8));
    assert_eq!(cache.lookup(1, b"a"), Found::Absent(at(9)));
}

#[test]
fn an_answer_older_than_an_invalidation_is_not_kept() {
    let cache = cache();
    let now = cache.generation();
    cache.put_attr(now, &attr(5, 1), at(3));
    cache.invalidate(&v1::Invalidation {
        attr: true,
        ..invalidation(5, 10)
    });
    assert!(cache.attr(5).is_none());
    assert!(!cache.is_fresh(5, at(9), None));
    cache.put_attr(now, &attr(5, 2), at(9));
    assert!(cache.attr(5).is_none());
    cache.put_attr(now, &attr(5, 3), at(10));
    assert_eq!(cache.attr(5).unwrap().0.size, 3);
}

#[test]
fn an_answer_that_overtook_its_invalidation_goes_too() {
    let cache = cache();
    let now = cache.generation();
    cache.put_attr(now, &attr(5, 3), at(12));
    cache.invalidate(&v1::Invalidation {
        attr: true,
        ..invalidation(5, 10)
    });
    // The server forgets that it told us when it sends an invalidation.
    assert!(cache.attr(5).is_none());
    assert!(cache.is_fresh(5, at(12), None));
}

#[test]
fn a_new_directory_answers_absent_names_until_another_mount_touches_them() {
    let cache = cache();
    let now = cache.generation();
    cache.put_new_directory(now, 9, at(4));
    assert!(matches!(cache.lookup(9, b"x"), Found::Absent(_)));
    cache.invalidate(&v1::Invalidation {
        names: vec![name("x")],
        ..invalidation(9, 6)
    });
    assert!(matches!(cache.lookup(9, b"x"), Found::Unknown { .. }));
    assert!(matches!(cache.lookup(9, b"y"), Found::Absent(_)));
    cache.put_name(now, 9, &name("x"), 0, at(5));
    assert!(matches!(cache.lookup(9, b"x"), Found::Unknown { .. }));
    cache.invalidate(&v1::Invalidation {
        all_names: true,
        ..invalidation(9, 7)
    });
    assert!(matches!(cache.lookup(9, b"y"), Found::Unknown { .. }));
}

#[test]
fn a_listing_makes_a_directory_complete_unless_knowledge_was_lost() {
    let cache = cache();
    let now = cache.generation();
    let listing = cache.listing(9);
    cache.put_name(now, 9, &name("a"), 5, at(2));
    cache.put_attr(now, &attr(5, 0), at(2));
    cache.listed(now, 9, listing);
    assert!(matches!(cache.lookup(9, b"b"), Found::Absent(_)));
    assert!(matches!(cache.lookup(9, b"a"), Found::Attr(..)));

    let listing = cache.listing(10);
    cache.invalidate(&v1::Invalidation {
        all_names: true,
        ..invalidation(10, 3)
    });
    cache.listed(now, 10, listing);
    assert!(matches!(cache.lookup(10, b"b"), Found::Unknown { .. }));
}

#[test]
fn forgetting_refuses_answers_to_older_questions() {
    let cache = cache();
    let before = cache.generation();
    cache.put_attr(before, &attr(5, 1), at(3));
    cache.keep_pages(5, 3);
    cache.forget_all();
    assert!(!cache.keep_pages(5, 3));
    assert!(cache.attr(5).is_none());
    cache.put_attr(before, &attr(5, 1), at(4));
    assert!(cache.attr(5).is_none());
    cache.put_attr(cache.generation(), &attr(5, 1), at(4));
    assert!(cache.attr(5).is_some());
}

#[test]
fn what_was_evicted_is_not_replaced_by_something_older() {
    let cache = MetaCache::new(0, 10_000);
    let now = cache.generation();
    cache.put_attr(now, &attr(16, 1), at(50));
    // 64 inodes per shard at least; these all lie in one shard.
    for number in 2..200u64 {
        cache.put_attr(now, &attr(number * 16, 1), at(60));
    }
    assert!(cache.attr(16).is_none());
    cache.put_attr(now, &attr(16, 0), at(40));
    assert!(cache.attr(16).is_none());
}

#[test]
fn pages_are_kept_only_while_the_content_is_what_they_were_read_from() {
    let cache = cache();
    let now = cache.generation();
    cache.put_attr(now, &attr(5, 1), at(3));
    assert!(!cache.keep_pages(5, 3));
    assert!(cache.keep_pages(5, 3));
    cache.pages_moved(5, 3, 8);
    assert!(cache.keep_pages(5, 8));
    cache.pages_moved(5, 7, 9);
    assert!(!cache.keep_pages(5, 9));
    cache.invalidate(&v1::Invalidation {
        content: true,
        ..invalidation(5, 11)
    });
    assert!(!cache.keep_pages(5, 9));
}

#[test]
fn misses_ask_for_a_prefetch_once_and_again_when_it_paid() {
    let cache = cache();
    let now = cache.generation();
    cache.put_name(now, 1, &name("a"), 5, at(1));
    assert_eq!(cache.lookup(1, b"x"), Found::Unknown { prefetch: None });
    assert_eq!(cache.lookup(1, b"y"), Found::Unknown { prefetch: Some(0) });
    assert_eq!(cache.lookup(1, b"z"), Found::Unknown { prefetch: None });
    cache.prefetched(1, Some(600));
    for _ in 0..PREFETCH_HITS {
        cache.lookup(1, b"a");
    }
    assert_eq!(cache.lookup(1, b"x"), Found::Unknown { prefetch: None });
    assert_eq!(
        cache.lookup(1, b"y"),
        Found::Unknown {
            prefetch: Some(600)
        }
    );
}

#[test]
fn too_many_names_drop_the_oldest_directories() {
    let cache = MetaCache::new(10_000, 100);
    let now = cache.generation();
    for dir in 1..40u64 {
        for entry in 0..10 {
            cache.put_name(now, dir, &name(&format!("n{entry}")), 1000, at(dir));
        }
    }
    assert!(cache.dentries.load(Ordering::Relaxed) <= 100);
    assert!(matches!(cache.lookup(1, b"n0"), Found::Unknown { .. }));
}

//! The store over one that fails, from seeds.

use std::time::Duration;

use object_store::ObjectStoreExt;
use object_store::path::Path;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;

use super::*;
use crate::Kind;
use crate::segment::layout::PAGE_BYTES;

#[tokio::test(start_paused = true)]
async fn reads_are_never_wrong_and_puts_end_stored_or_in_error() {
    let (mut faults, mut right, mut refused) = (0, 0, 0);
    for seed in 0..60 {
        let rates = Rates {
            error: 0.2,
            lost_ack: 0.2,
            short_body: 0.1,
            cut_body: 0.1,
            flipped_bit: 0.2,
            stuck: 0.0,
        };
        let rig = Rig::new(seed, rates);
        // Few attempts fit, so that some operations fail for good.
        let options = StoreOptions {
            deadline: Duration::from_millis(300 + 100 * (seed % 10)),
            cache_uploads: seed % 3 == 0,
            memory_cache_bytes: [0, 1 << 20, 64 << 20][seed as usize % 3],
            ..Default::default()
        };
        let store = rig.store(options);
        let mut put = Vec::new();
        for id in 1..=6 {
            let frames = [noise(3 * PAGE_BYTES + 99, id * 10), noise(777, id * 10 + 1)];
            let (built, numbers) = segment(id, &frames);
            let result = store.put(built.clone()).await;
            put.push((id, frames, numbers, built, result));
        }
        for (id, frames, numbers, _, _) in &put {
            for (data, number) in frames.iter().zip(numbers) {
                let length = data.len() * 3 / 4;
                match store.read(range(*id, *number, 50, length)).await {
                    Ok(read) => {
                        assert_eq!(read, data.slice(50..50 + length), "seed {seed}");
                        right += 1;
                    }
                    Err(_) => refused += 1,
                }
            }
        }
        rig.failing.set_rates(Rates::default());
        faults += rig.failing.faults();
        let quiet = rig.store(bare());
        for (id, frames, numbers, built, result) in &put {
            let stored = rig
                .memory
                .get(&Path::from(format!("vol/{}", SegmentId(*id).object_name())))
                .await;
            match (result, stored) {
                (Ok(()), Err(error)) => panic!("seed {seed}: acknowledged and lost: {error}"),
                (Err(_), Err(_)) => {}
                (_, Ok(stored)) => {
                    assert_eq!(
                        stored.bytes().await.unwrap(),
                        built.to_bytes(),
                        "seed {seed}"
                    );
                    let read = quiet.read(range(*id, numbers[0], 0, frames[0].len())).await;
                    assert_eq!(read.unwrap(), frames[0], "seed {seed}");
                }
            }
            // After the faults everything can be put.
            quiet.put(built.clone()).await.unwrap();
        }
    }
    println!("{faults} faults, {right} reads right, {refused} refused");
    assert!(faults > 500 && right > 300 && refused > 0);
}

#[tokio::test(start_paused = true)]
async fn a_read_without_an_answer_is_asked_for_twice_but_not_every_one() {
    let rig = Rig::new(3, Rates::default());
    let (built, numbers) = segment(1, &[noise(5000, 1)]);
    rig.store(bare()).put(built).await.unwrap();
    let options = StoreOptions {
        hedge_after: Some(Duration::from_secs(1)),
        attempt_timeout: Duration::from_secs(10),
        ..bare()
    };
    let store = rig.store(options);
    let read = || store.read(range(1, numbers[0], 0, 5000));
    for _ in 0..100 {
        assert_eq!(read().await.unwrap(), noise(5000, 1));
    }
    assert_eq!(store.metrics().hedged_gets.get(), 0);
    rig.failing.set_rates(Rates {
        stuck: 0.1,
        ..Rates::default()
    });
    let begin = tokio::time::Instant::now();
    for _ in 0..200 {
        assert_eq!(read().await.unwrap(), noise(5000, 1));
    }
    let hedged = store.metrics().hedged_gets.get();
    assert!((8..=32).contains(&hedged), "{hedged}");
    // A second each instead of the time-out of ten, but where both requests are stuck.
    assert!(
        begin.elapsed() < Duration::from_secs(hedged + 22),
        "{:?}",
        begin.elapsed()
    );
    // Where nothing answers, a tenth of the reads and no more asks twice.
    rig.failing.set_rates(Rates {
        stuck: 1.0,
        ..Rates::default()
    });
    for _ in 0..20 {
        assert_eq!(read().await.unwrap_err().kind(), Kind::Unavailable);
    }
    let more = store.metrics().hedged_gets.get();
    assert!(more <= 32, "{more}");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_down_gives_an_error_within_the_bound() {
    let rig = Rig::new(1, Rates::default());
    let store = rig.store(bare());
    rig.failing.set_down(true);
    let begin = Instant::now();
    let (built, numbers) = segment(1, &[noise(100, 1)]);
    let error = store.put(built.clone()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(
        begin.elapsed() > Duration::from_secs(20),
        "it did try: {:?}",
        begin.elapsed()
    );
    assert!(begin.elapsed() <= Duration::from_secs(31));
    assert!(store.metrics().retries.get() > 10);
    // And it goes on when the store comes back, without waiting for a timer of old.
    let waiting = {
        let store = Arc::clone(&store);
        tokio::spawn(async move { store.put(built).await })
    };
    tokio::time::sleep(Duration::from_secs(10)).await;
    rig.failing.set_down(false);
    let back = Instant::now();
    waiting.await.unwrap().unwrap();
    assert!(
        back.elapsed() <= Duration::from_secs(4),
        "{:?}",
        back.elapsed()
    );
    assert_eq!(
        store.read(range(1, numbers[0], 0, 100)).await.unwrap(),
        noise(100, 1)
    );
}

#[tokio::test]
async fn a_lost_acknowledgement_is_settled_and_other_bytes_are_not() {
    let rig = Rig::new(1, Rates::default());
    let store = rig.store(bare());
    let (built, _) = segment(1, &[noise(100_000, 1)]);
    rig.failing.set_rates(Rates {
        lost_ack: 1.0,
        ..Default::default()
    });
    store.put(built.clone()).await.unwrap();
    assert!(rig.failing.faults() > 0);
    let (other, _) = segment(1, &[noise(100_000, 2)]);
    let error = store.put(other).await.unwrap_err();
    assert_eq!(error.kind(), Kind::AlreadyExists, "{error}");
    let path = Path::from("vol/01/0000000000000001");
    let stored = rig.memory.get(&path).await.unwrap().bytes().await.unwrap();
    assert_eq!(stored, built.to_bytes(), "the first one stays");
}

#[tokio::test]
async fn a_store_without_conditional_puts_is_used_without() {
    let rig = Rig::new(1, Rates::default());
    rig.failing.set_no_conditions(true);
    let store = rig.store(bare());
    for _ in 0..2 {
        let (built, numbers) = segment(1, &[noise(100, 1)]);
        store.put(built).await.unwrap();
        assert_eq!(
            store.read(range(1, numbers[0], 0, 100)).await.unwrap(),
            noise(100, 1)
        );
    }
}

#[tokio::test]
async fn a_flipped_bit_in_the_bucket_costs_that_page_only_and_is_named() {
    let rig = Rig::new(1, Rates::default());
    let store = rig.store(bare());
    let data = noise(4 * PAGE_BYTES, 1);
    let (built, numbers) = segment(9, std::slice::from_ref(&data));
    let mut bad = built.to_bytes().to_vec();
    store.put(built).await.unwrap();
    let at = numbers[0].byte_range(2..3, PAGE_BYTES).start as usize + 5000;
    bad[at] ^= 4;
    let path = Path::from("vol/09/0000000000000009");
    rig.memory
        .put(&path, Bytes::from(bad).into())
        .await
        .unwrap();
    let error = store
        .read(range(9, numbers[0], 0, data.len()))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    let text = error.to_string();
    assert!(
        text.contains("volume 5") && text.contains("SegmentId(9)") && text.contains("page 2"),
        "{text}"
    );
    assert_eq!(rig.failing.gets().0, 2, "tried once more");
    for (page, right) in [(0, true), (1, true), (2, false), (3, true)] {
        let read = store
            .read(range(9, numbers[0], page * PAGE_BYTES, PAGE_BYTES))
            .await;
        assert_eq!(read.is_ok(), right, "page {page}");
    }
    let both = {
        let all = store.read(range(9, numbers[0], 0, data.len()));
        let part = store.read(range(9, numbers[0], 0, PAGE_BYTES));
        tokio::join!(all, part)
    };
    assert!(
        both.0.is_err() && both.1.is_ok(),
        "a shared fetch fails only whom it concerns"
    );
    assert!(store.metrics().corrupt_pages.get() >= 2);
}

#[tokio::test]
async fn a_flip_on_the_way_heals() {
    let rig = Rig::new(1, Rates::default());
    let store = rig.store(bare());
    let data = noise(4 * PAGE_BYTES, 1);
    let (built, numbers) = segment(9, std::slice::from_ref(&data));
    store.put(built).await.unwrap();
    let mut healed = 0;
    for _ in 0..200 {
        rig.failing.set_rates(Rates {
            flipped_bit: 0.3,
            ..Default::default()
        });
        if let Ok(read) = store.read(range(9, numbers[0], 0, data.len())).await {
            assert_eq!(read, data);
            healed += 1;
        }
    }
    assert!(healed > 150 && rig.failing.faults() > 40, "{healed}");
}

#[tokio::test]
async fn a_truncated_object_is_an_error() {
    let rig = Rig::new(1, Rates::default());
    let store = rig.store(bare());
    let data = noise(2 * PAGE_BYTES, 1);
    let (built, numbers) = segment(9, std::slice::from_ref(&data));
    let whole = built.to_bytes();
    let path = Path::from("vol/09/0000000000000009");
    for length in [0, 1, 64, 70, 96, 60_000, 65_632, 65_633, 131_199] {
        rig.memory
            .put(&path, whole.slice(..length).into())
            .await
            .unwrap();
        let error = store
            .read(range(9, numbers[0], 0, data.len()))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{length}: {error}");
    }
    rig.memory
        .put(&path, whole.slice(..131_200).into())
        .await
        .unwrap();
    assert_eq!(
        store
            .read(range(9, numbers[0], 0, data.len()))
            .await
            .unwrap(),
        data
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_readers_over_small_caches_and_a_failing_bucket_never_see_wrong_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(42, Rates::default());
    let options = StoreOptions {
        memory_cache_bytes: 1 << 20,
        disk_cache: Some(crate::DiskCacheOptions {
            free_space_ratio: 0.0,
            ..crate::DiskCacheOptions::new(directory.path(), 3 << 20)
        }),
        ..Default::default()
    };
    let store = rig.store(options);
    let mut segments = Vec::new();
    for id in 1..=8 {
        let frames = [
            noise(15 * PAGE_BYTES + 99, id * 10),
            noise(777, id * 10 + 1),
        ];
        let (built, numbers) = segment(id, &frames);
        store.put(built).await.unwrap();
        segments.push((id, frames, numbers));
    }
    let segments = Arc::new(segments);
    rig.failing.set_rates(Rates {
        error: 0.02,
        short_body: 0.02,
        cut_body: 0.02,
        flipped_bit: 0.05,
        ..Default::default()
    });
    let readers = (0..8).map(|reader| {
        let (store, segments) = (Arc::clone(&store), Arc::clone(&segments));
        tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(reader);
            let mut right = 0;
            for _ in 0..400 {
                let (id, frames, numbers) = &segments[random.random_range(0..segments.len())];
                let which = usize::from(random.random_bool(0.2));
                let data = &frames[which];
                let from = random.random_range(0..data.len());
                let to = random.random_range(from..=data.len());
                let at = range(*id, numbers[which], from, to - from);
                if random.random_bool(0.2) {
                    store.prefetch(vec![range(*id, numbers[0], 0, frames[0].len())]);
                }
                // A reader that goes away must not harm the others.
                if random.random_bool(0.1) {
                    let _cut_short =
                        tokio::time::timeout(Duration::from_micros(50), store.read(at)).await;
                    continue;
                }
                if let Ok(read) = store.read(at).await {
                    assert_eq!(read, data.slice(from..to));
                    right += 1;
                }
            }
            right
        })
    });
    let mut right = 0;
    for reader in futures::future::join_all(readers).await {
        right += reader.unwrap();
    }
    let metrics = store.metrics();
    println!(
        "{} faults, {right} right, {} memory hits, {} disk hits, {} shared, {} misses",
        rig.failing.faults(),
        metrics.memory_hits.get(),
        metrics.disk_hits.get(),
        metrics.shared_fetches.get(),
        metrics.misses.get()
    );
    assert!(right > 2000 && rig.failing.faults() > 20);
    assert!(
        metrics.memory_hits.get() > 0 && metrics.disk_hits.get() > 0 && metrics.misses.get() > 0
    );
    assert!(metrics.shared_fetches.get() > 0);
}

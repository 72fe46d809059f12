//! Put, read, delete without faults.

use futures::future::join_all;
use heliofs_proto::v1::StorageConfig;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::segment::layout::{PAGE_BYTES, PAGE_STRIDE};
use crate::{Kind, object::create_bucket};

async fn round_trips(store: &SegmentStore, seed: u64) {
    let frames = [
        noise(10, 1),
        noise(5 * PAGE_BYTES + 123, 2),
        noise(PAGE_BYTES, 3),
        noise(40_000, 4),
    ];
    let (built, numbers) = segment(77, &frames);
    let record = built.record();
    store.put(built).await.unwrap();
    assert_eq!(
        (record.id, record.data_bytes),
        (77, frames.iter().map(|f| f.len() as u64).sum())
    );
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..200 {
        let at = random.random_range(0..frames.len());
        let data = &frames[at];
        let from = random.random_range(0..data.len());
        let to = random.random_range(from..=data.len());
        let read = store
            .read(range(77, numbers[at], from, to - from))
            .await
            .unwrap();
        assert_eq!(read, data.slice(from..to));
    }
}

#[tokio::test]
async fn what_was_put_is_read_from_memory_storage() {
    let config = StorageConfig {
        storage: "memory".to_owned(),
        bucket: "path-round-trip".to_owned(),
        ..Default::default()
    };
    for options in [bare(), StoreOptions::default()] {
        round_trips(
            &SegmentStore::open(&config, "v", VOLUME, options).unwrap(),
            1,
        )
        .await;
    }
}

#[tokio::test]
async fn what_was_put_is_read_from_a_directory_and_lies_where_the_format_says() {
    let directory = tempfile::tempdir().unwrap();
    let config = StorageConfig {
        storage: "file".to_owned(),
        bucket: directory
            .path()
            .join("new/bucket")
            .to_str()
            .unwrap()
            .to_owned(),
        ..Default::default()
    };
    let error = SegmentStore::open(&config, "v", VOLUME, bare()).unwrap_err();
    assert!(error.to_string().contains("heliofs format"), "{error}");
    create_bucket(&config, &bare()).await.unwrap();
    let store = SegmentStore::open(&config, "v", VOLUME, bare()).unwrap();
    round_trips(&store, 2).await;
    assert!(
        directory
            .path()
            .join("new/bucket/v/4d/000000000000004d")
            .is_file()
    );
    // The same put again: an earlier acknowledgement may have been lost.
    round_trips(&store, 3).await;
    assert_eq!(store.bucket().delete_all().await.unwrap(), 1);
    let gone = store
        .read(range(77, FrameNumber(4), 0, 1))
        .await
        .unwrap_err();
    assert_eq!(gone.kind(), Kind::NotFound);
}

#[tokio::test]
async fn settings_that_cannot_work_are_refused_with_the_reason() {
    for (storage, bucket, want) in [
        ("file", "relative/path", "absolute"),
        ("ftp", "x", "unknown"),
        ("s3", "http://127.0.0.1:1", "BUCKET"),
    ] {
        let config = StorageConfig {
            storage: storage.to_owned(),
            bucket: bucket.to_owned(),
            ..Default::default()
        };
        let error = SegmentStore::open(&config, "v", VOLUME, bare()).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        assert!(error.to_string().contains(want), "{error}");
    }
}

#[tokio::test]
async fn a_cold_random_read_of_4_kib_fetches_at_most_128_kib() {
    let rig = Rig::new(1, Rates::default());
    let store = rig.store(bare());
    let data = noise(4 << 20, 1);
    let (built, numbers) = segment(1, std::slice::from_ref(&data));
    store.put(built).await.unwrap();
    for offset in [0, 4096, 100_000, 65_000, 3 << 20, (4 << 20) - 4096] {
        let (_, before) = rig.failing.gets();
        let read = store
            .read(range(1, numbers[0], offset, 4096))
            .await
            .unwrap();
        assert_eq!(read, data.slice(offset..offset + 4096));
        let fetched = rig.failing.gets().1 - before;
        // Two pages and their headers at most, one when the read is aligned.
        let pages = if offset % 4096 == 0 { 1 } else { 2 };
        let most = pages * PAGE_STRIDE as u64;
        assert!(fetched <= most, "{fetched} bytes for 4 KiB at {offset}");
    }
}

#[tokio::test]
async fn concurrent_readers_of_the_same_pages_share_one_fetch() {
    let rig = Rig::new(1, Rates::default());
    let options = StoreOptions {
        cache_uploads: false,
        ..Default::default()
    };
    let store = rig.store(options);
    let data = noise(1 << 20, 1);
    let (built, numbers) = segment(1, std::slice::from_ref(&data));
    store.put(built).await.unwrap();
    let reads = (0..20).map(|n| store.read(range(1, numbers[0], n * 1000, 890_000)));
    for (n, read) in join_all(reads).await.into_iter().enumerate() {
        assert_eq!(read.unwrap(), data.slice(n * 1000..n * 1000 + 890_000));
    }
    assert_eq!(rig.failing.gets().0, 1);
    assert!(store.metrics().shared_fetches.get() >= 19 * 14);
}

#[tokio::test]
async fn what_was_prefetched_is_read_without_another_get() {
    let rig = Rig::new(1, Rates::default());
    let options = StoreOptions {
        cache_uploads: false,
        ..Default::default()
    };
    let store = rig.store(options);
    let data = noise(2 << 20, 1);
    let (built, numbers) = segment(1, std::slice::from_ref(&data));
    store.put(built).await.unwrap();
    store.prefetch(vec![range(1, numbers[0], 0, 2 << 20)]);
    let read = store
        .read(range(1, numbers[0], 1 << 20, 1 << 20))
        .await
        .unwrap();
    assert_eq!(read, data.slice(1 << 20..));
    assert_eq!(rig.failing.gets().0, 1);
}

#[tokio::test]
async fn a_prefetch_beyond_the_budget_is_left_to_the_read() {
    let rig = Rig::new(1, Rates::default());
    let options = StoreOptions {
        prefetch_bytes_max: 1 << 20,
        ..Default::default()
    };
    let store = rig.store(options);
    store.prefetch(vec![range(1, FrameNumber(4), 0, 2 << 20)]);
    assert_eq!(store.metrics().prefetch_skipped_bytes.get(), 2 << 20);
}

#[tokio::test]
async fn small_frames_that_lie_together_come_with_one_get() {
    let rig = Rig::new(1, Rates::default());
    let options = StoreOptions {
        cache_uploads: false,
        ..Default::default()
    };
    let store = rig.store(options);
    let frames: Vec<Bytes> = (0..12).map(|n| noise(4000 + n, n as u64 + 1)).collect();
    let (built, numbers) = segment(1, &frames);
    store.put(built).await.unwrap();
    for (number, data) in numbers.iter().zip(&frames) {
        assert_eq!(
            store.read(range(1, *number, 0, data.len())).await.unwrap(),
            data
        );
    }
    assert_eq!(rig.failing.gets().0, 1);
}

#[tokio::test]
async fn an_extent_beyond_its_frame_is_an_error() {
    let rig = Rig::new(1, Rates::default());
    let store = rig.store(bare());
    let (built, numbers) = segment(1, &[noise(70_000, 1), noise(100, 2)]);
    store.put(built).await.unwrap();
    for (frame, offset, length) in [
        (0, 69_999, 2),
        (0, 0, 200_000),
        (1, 0, 101),
        (1, 65_536, 10),
    ] {
        let error = store
            .read(range(1, numbers[frame], offset, length))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    }
    let error = store
        .read(range(1, FrameNumber(5), 0, 10))
        .await
        .unwrap_err();
    assert_eq!(
        error.kind(),
        Kind::Corrupt,
        "no frame begins there: {error}"
    );
    let error = store
        .read(range(1, FrameNumber(u32::MAX), 0, 10))
        .await
        .unwrap_err();
    assert_eq!(
        error.kind(),
        Kind::Corrupt,
        "behind the object's end: {error}"
    );
    let error = store
        .read(range(1, numbers[0], 65 << 20, 10))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error}");
}

#[tokio::test]
async fn frames_that_compaction_moved_are_read_and_impostors_are_not() {
    let rig = Rig::new(1, Rates::default());
    let store = rig.store(bare());
    let data = [noise(50_000, 1), noise(3 * PAGE_BYTES, 2)];
    let (first, _) = segment(1, &data);
    let object = first.to_bytes();
    let mut builder = SegmentBuilder::new(VOLUME, SegmentId(2));
    let mut moved = Vec::new();
    for entry in first.frames.iter().rev() {
        let from = entry.frame.start() as usize;
        let pages = entry.pages() as usize;
        let encoded = object.slice(from..from + entry.stored_bytes as usize + 32 * pages);
        moved.push(builder.add_relocated(entry, encoded).unwrap());
    }
    store.put(builder.finish()).await.unwrap();
    let read = store.read(range(2, moved[0], 1000, 150_000)).await.unwrap();
    assert_eq!(read, data[1].slice(1000..151_000));
    let read = store.read(range(2, moved[1], 0, 50_000)).await.unwrap();
    assert_eq!(read, data[0]);
    // Segment 1's bytes under segment 3's name: sound pages, but not these.
    let path = Path::from("vol/03/0000000000000003");
    rig.memory
        .put(&path, PutPayload::from_bytes(object))
        .await
        .unwrap();
    let error = store
        .read(range(3, first.frames[0].frame, 0, 10))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
}

#[tokio::test]
async fn deleting_is_idempotent_and_answers_for_each() {
    let rig = Rig::new(1, Rates::default());
    let store = rig.store(bare());
    for id in 1..=40 {
        let (built, _) = segment(id, &[noise(10, id)]);
        store.put(built).await.unwrap();
    }
    let ids: Vec<SegmentId> = (1..=50).map(SegmentId).collect();
    for _ in 0..2 {
        let deleted = store.delete(&ids).await;
        assert_eq!(deleted.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ids);
        assert!(deleted.iter().all(|(_, result)| result.is_ok()));
    }
    let error = store
        .read(range(1, FrameNumber(4), 0, 10))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
}

#[tokio::test]
async fn a_prefix_belongs_to_one_volume() {
    let rig = Rig::new(1, Rates::default());
    let options = bare();
    let bucket = Bucket::over_store(Arc::clone(&rig.failing) as _, "vol", &options).unwrap();
    assert_eq!(
        bucket.check_marker("a").await.unwrap_err().kind(),
        Kind::NotFound
    );
    bucket.claim_marker("a").await.unwrap();
    bucket.claim_marker("a").await.unwrap();
    bucket.check_marker("a").await.unwrap();
    for error in [
        bucket.claim_marker("b").await.unwrap_err(),
        bucket.check_marker("b").await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), Kind::AlreadyExists);
        assert!(error.to_string().contains("uuid a"), "{error}");
    }
    let other = Bucket::over_store(Arc::clone(&rig.failing) as _, "vol2", &options).unwrap();
    other.claim_marker("b").await.unwrap();
}

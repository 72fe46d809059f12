//! The disk tier: kept over a restart, verified, bounded.

use std::path::{Path as FsPath, PathBuf};

use super::*;
use crate::DiskCacheOptions;
use crate::segment::layout::PAGE_BYTES;

fn options(directory: &FsPath, bytes_max: u64) -> StoreOptions {
    StoreOptions {
        memory_cache_bytes: 0,
        cache_uploads: false,
        disk_cache: Some(DiskCacheOptions {
            free_space_ratio: 0.0,
            ..DiskCacheOptions::new(directory, bytes_max)
        }),
        ..Default::default()
    }
}

fn files(directory: &FsPath) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()));
        } else if entry.file_name() != "lock" {
            found.push(entry.path());
        }
    }
    found
}

#[tokio::test]
async fn it_survives_a_restart_and_serves_while_the_bucket_is_down() {
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(1, Rates::default());
    let frames = [noise(3 * PAGE_BYTES + 5, 1), noise(200, 2)];
    let (built, numbers) = segment(1, &frames);
    let store = rig.store(options(directory.path(), 1 << 30));
    store.put(built).await.unwrap();
    for (number, data) in numbers.iter().zip(&frames) {
        assert_eq!(
            store.read(range(1, *number, 0, data.len())).await.unwrap(),
            data
        );
    }
    store.flush_cache().await;
    drop(store);
    rig.failing.set_down(true);
    let store = rig.store(options(directory.path(), 1 << 30));
    store.flush_cache().await;
    for (number, data) in numbers.iter().zip(&frames) {
        assert_eq!(
            store.read(range(1, *number, 0, data.len())).await.unwrap(),
            data
        );
        assert_eq!(
            store.read(range(1, *number, 100, 50)).await.unwrap(),
            data.slice(100..150)
        );
    }
    assert_eq!(store.metrics().disk_hits.get(), 4 + 1 + 1 + 1);
}

#[tokio::test]
async fn an_upload_is_read_back_from_the_cache() {
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(1, Rates::default());
    let frames = [noise(70 * PAGE_BYTES + 5, 1), noise(200, 2)];
    let (built, numbers) = segment(1, &frames);
    let with_uploads = StoreOptions {
        cache_uploads: true,
        ..options(directory.path(), 1 << 30)
    };
    let store = rig.store(with_uploads);
    store.put(built).await.unwrap();
    store.flush_cache().await;
    rig.failing.set_down(true);
    for (number, data) in numbers.iter().zip(&frames) {
        assert_eq!(
            store.read(range(1, *number, 0, data.len())).await.unwrap(),
            data
        );
    }
    assert_eq!(files(directory.path()).len(), 3);
}

#[tokio::test]
async fn a_damaged_file_is_removed_and_fetched_again() {
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(1, Rates::default());
    let data = noise(2 * PAGE_BYTES + 5, 1);
    let (built, numbers) = segment(1, std::slice::from_ref(&data));
    rig.store(bare()).put(built).await.unwrap();
    let store = rig.store(options(directory.path(), 1 << 30));
    let read = || store.read(range(1, numbers[0], 0, data.len()));
    assert_eq!(read().await.unwrap(), data);
    store.flush_cache().await;
    let [file] = &files(directory.path())[..] else {
        panic!("one run, one file")
    };
    let whole = std::fs::read(file).unwrap();
    let mut gets = rig.failing.gets().0;
    for at in [0, 9, 29, 40, 70, 70_000, whole.len() - 1] {
        let mut bad = whole.clone();
        bad[at] ^= 1;
        for bad in [&bad[..], &whole[..at]] {
            std::fs::write(file, bad).unwrap();
            assert_eq!(read().await.unwrap(), data, "byte {at}");
            gets += 1;
            assert_eq!(rig.failing.gets().0, gets, "from the bucket, byte {at}");
            store.flush_cache().await;
            assert_eq!(std::fs::read(file).unwrap(), whole, "written anew");
            assert_eq!(read().await.unwrap(), data);
            assert_eq!(rig.failing.gets().0, gets, "from the cache again");
        }
    }
    assert_eq!(store.metrics().corrupt_cache_files.get(), 14);
    // Removed by a person: a miss, nothing else.
    std::fs::remove_file(file).unwrap();
    assert_eq!(read().await.unwrap(), data);
}

#[tokio::test]
async fn a_file_under_anothers_name_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(1, Rates::default());
    let frames = [noise(5000, 1), noise(5000, 2)];
    for (id, data) in (1..).zip(&frames) {
        let (built, _) = segment(id, std::slice::from_ref(data));
        rig.store(bare()).put(built).await.unwrap();
    }
    let store = rig.store(options(directory.path(), 1 << 30));
    let frame = FrameNumber(4);
    for id in [1, 2] {
        store.read(range(id, frame, 0, 5000)).await.unwrap();
    }
    store.flush_cache().await;
    let found = files(directory.path());
    assert_eq!(found.len(), 2);
    std::fs::copy(&found[0], &found[1]).unwrap();
    for (id, data) in (1..).zip(&frames) {
        assert_eq!(store.read(range(id, frame, 0, 5000)).await.unwrap(), data);
    }
    assert_eq!(store.metrics().corrupt_cache_files.get(), 1);
}

#[tokio::test]
async fn it_keeps_to_its_budget_and_keeps_what_was_used_last() {
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(1, Rates::default());
    let budget = 10 * PAGE_BYTES as u64;
    let store = rig.store(options(directory.path(), budget));
    let frame = FrameNumber(4);
    for id in 1..=30 {
        let (built, _) = segment(id, &[noise(PAGE_BYTES, id)]);
        store.put(built).await.unwrap();
        store.read(range(id, frame, 0, PAGE_BYTES)).await.unwrap();
        store.flush_cache().await;
        store.read(range(1, frame, 0, PAGE_BYTES)).await.unwrap();
    }
    store.flush_cache().await;
    let found = files(directory.path());
    let bytes: u64 = found
        .iter()
        .map(|file| file.metadata().unwrap().len())
        .sum();
    assert!(bytes <= budget && bytes > budget / 2, "{bytes}");
    assert_eq!(store.metrics().disk_bytes.get() as u64, bytes);
    rig.failing.set_down(true);
    for id in [1, 30, 29, 25] {
        assert_eq!(
            store.read(range(id, frame, 0, PAGE_BYTES)).await.unwrap(),
            noise(PAGE_BYTES, id)
        );
    }
    rig.failing.set_down(false);
    drop(store);
    // A smaller budget holds at once after a restart.
    let store = rig.store(options(directory.path(), budget / 2));
    store.flush_cache().await;
    let bytes: u64 = files(directory.path())
        .iter()
        .map(|file| file.metadata().unwrap().len())
        .sum();
    assert!(bytes <= budget / 2);
    let gone: Vec<SegmentId> = (1..=30).map(SegmentId).collect();
    store.delete(&gone).await;
    store.flush_cache().await;
    assert_eq!(
        files(directory.path()).len(),
        0,
        "deleted segments leave the cache"
    );
}

#[tokio::test]
async fn one_scan_does_not_drive_out_what_is_used_often() {
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(1, Rates::default());
    let uncached = |options: StoreOptions| StoreOptions {
        memory_cache_bytes: 0,
        cache_uploads: false,
        ..options
    };
    let store = rig.store(uncached(options(directory.path(), 10 * PAGE_BYTES as u64)));
    let frame = FrameNumber(4);
    for id in 1..=40 {
        let (built, _) = segment(id, &[noise(PAGE_BYTES, id)]);
        store.put(built).await.unwrap();
    }
    let read = async |id| {
        let read = store.read(range(id, frame, 0, PAGE_BYTES)).await.unwrap();
        assert_eq!(read, noise(PAGE_BYTES, id));
        store.flush_cache().await;
    };
    for id in [1, 2, 3, 1, 2, 3] {
        read(id).await;
    }
    for id in 4..=40 {
        read(id).await;
    }
    let (before, _) = rig.failing.gets();
    for id in [1, 2, 3] {
        read(id).await;
    }
    assert_eq!(rig.failing.gets().0, before, "they are still on the disk");
}

#[tokio::test]
async fn several_directories_share_the_segments_and_the_budget() {
    let directories = [
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
    ];
    let rig = Rig::new(1, Rates::default());
    let several = |budget: u64| {
        let mut options = options(directories[0].path(), budget);
        let more = directories[1..].iter().map(|it| it.path().to_owned());
        options.disk_cache.as_mut().unwrap().more_directories = more.collect();
        options
    };
    let store = rig.store(several(1 << 30));
    for id in 1..=60 {
        let (built, _) = segment(id, &[noise(5000, id)]);
        store.put(built).await.unwrap();
        store
            .read(range(id, FrameNumber(4), 0, 5000))
            .await
            .unwrap();
    }
    store.flush_cache().await;
    let counts = directories.each_ref().map(|it| files(it.path()).len());
    assert_eq!(
        counts.iter().sum::<usize>(),
        60,
        "each on one disk: {counts:?}"
    );
    assert!(counts.iter().all(|count| *count > 8), "{counts:?}");
    let bytes = store.metrics().disk_bytes.get();
    assert!(bytes >= 60 * 5000, "all disks count: {bytes}");
    drop(store);
    rig.failing.set_down(true);
    let store = rig.store(several(1 << 30));
    store.flush_cache().await;
    for id in 1..=60 {
        let read = store.read(range(id, FrameNumber(4), 0, 5000)).await;
        assert_eq!(read.unwrap(), noise(5000, id));
    }
    drop(store);
    // A third of the budget each.
    let store = rig.store(several(3 * 5 * 5100));
    store.flush_cache().await;
    assert!(directories.iter().all(|it| files(it.path()).len() <= 5));
}

#[tokio::test]
async fn a_full_disk_turns_the_cache_off_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(1, Rates::default());
    let mut options = options(directory.path(), 1 << 30);
    // No file system is this empty.
    options.disk_cache.as_mut().unwrap().free_space_ratio = 1.0;
    let store = rig.store(options);
    let (built, numbers) = segment(1, &[noise(5000, 1)]);
    store.put(built).await.unwrap();
    for _ in 0..3 {
        assert_eq!(
            store.read(range(1, numbers[0], 0, 5000)).await.unwrap(),
            noise(5000, 1)
        );
        store.flush_cache().await;
    }
    assert_eq!(files(directory.path()).len(), 0);
    assert_eq!(store.metrics().disk_writes_skipped.get(), 3);
    assert_eq!(store.metrics().disk_caches_full.get(), 1, "said once");
}

#[tokio::test]
async fn two_mounts_share_a_directory_without_sharing_files() {
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(1, Rates::default());
    let stores = [
        rig.store(options(directory.path(), 1 << 30)),
        rig.store(options(directory.path(), 1 << 30)),
    ];
    let (built, numbers) = segment(1, &[noise(5000, 1)]);
    stores[0].put(built).await.unwrap();
    for store in &stores {
        assert_eq!(
            store.read(range(1, numbers[0], 0, 5000)).await.unwrap(),
            noise(5000, 1)
        );
        store.flush_cache().await;
    }
    assert_eq!(files(directory.path()).len(), 2);
}

//! Compressed and encrypted volumes: what is read is what was written, whatever range is asked for and whatever was damaged.

use std::collections::HashSet;
use std::sync::OnceLock;

use heliofs_proto::v1;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};
use proptest::prelude::*;

use super::*;
use crate::segment::codec::FrameEncoder;
use crate::segment::layout::{FINE_PAGE_BYTES, PAGE_BYTES};
use crate::segment::object::{FrameEntry, check_object};
use crate::segment::page::Compression;
use crate::{DiskCacheOptions, Kind, Passphrase, VolumeKey};

/// Words, so that it compresses; some pages of noise among them, so that not everything does.
fn prose(length: usize, seed: u64) -> Bytes {
    let noise = noise(length.max(8), seed);
    (0..length)
        .map(|at| match (at / PAGE_BYTES) % 3 {
            1 => noise[at],
            _ => b"segment frame page extent "[(at + noise[at / 64] as usize) % 26],
        })
        .collect()
}

/// One key for all tests: opening it is slow on purpose.
fn key() -> Arc<VolumeKey> {
    static KEY: OnceLock<Arc<VolumeKey>> = OnceLock::new();
    let create = || {
        let (key, _) = VolumeKey::create(&Passphrase::new("sesame".to_owned()).into()).unwrap();
        Arc::new(key)
    };
    Arc::clone(KEY.get_or_init(create))
}

fn encoders() -> Vec<FrameEncoder> {
    let mut encoders = Vec::new();
    for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
        for key in [None, Some(key())] {
            encoders.push(FrameEncoder { compression, key });
        }
    }
    encoders
}

fn over(rig: &Rig, encoder: &FrameEncoder, options: StoreOptions) -> Arc<SegmentStore> {
    let bucket = Bucket::over_store(Arc::clone(&rig.failing) as _, "vol", &options).unwrap();
    SegmentStore::encoding(bucket, VOLUME, encoder.clone(), options).unwrap()
}

async fn object(rig: &Rig, id: u64) -> Bytes {
    let name = format!("vol/{:02x}/{id:016x}", id & 0xff);
    let got = rig.memory.get(&Path::from(name)).await.unwrap();
    got.bytes().await.unwrap()
}

#[tokio::test]
async fn every_codec_reads_back_random_ranges_with_and_without_caches() {
    let lengths = [
        1,
        4096,
        PAGE_BYTES - 1,
        PAGE_BYTES,
        PAGE_BYTES + 1,
        40 * PAGE_BYTES + 321,
    ];
    let frames: Vec<Bytes> = lengths.iter().map(|n| prose(*n, *n as u64)).collect();
    let now_and_earlier = |encoder: FrameEncoder| [(encoder.clone(), false), (encoder, true)];
    for (encoder, coarse) in encoders().into_iter().flat_map(now_and_earlier) {
        let rig = Rig::new(1, Rates::default());
        let directory = tempfile::tempdir().unwrap();
        let disk = DiskCacheOptions {
            free_space_ratio: 0.0,
            ..DiskCacheOptions::new(directory.path(), 1 << 30)
        };
        let writer = over(&rig, &encoder, bare());
        let pieces =
            |data: &Bytes| vec![data.slice(..data.len() / 3), data.slice(data.len() / 3..)];
        let mut builder = writer.builder(SegmentId(1));
        builder.coarse = coarse;
        let add = |data| builder.add_frame(pieces(data)).unwrap();
        let numbers: Vec<FrameNumber> = frames.iter().map(add).collect();
        let built = builder.finish();
        let stored_bytes = built.length;
        writer.put(built).await.unwrap();
        if encoder.compression != Compression::None {
            let data: usize = lengths.iter().sum();
            assert!(
                stored_bytes < data as u64 * 3 / 4,
                "{encoder:?}: {stored_bytes} of {data}"
            );
        }
        let listed = check_object(&object(&rig, 1).await, VOLUME, SegmentId(1)).unwrap();
        for (entry, data) in listed.iter().zip(&frames) {
            assert_eq!(entry.decoded_bytes as usize, data.len());
            assert_eq!(entry.codec.fine, !coarse && !entry.codec.is_plain());
        }
        let cached = StoreOptions {
            disk_cache: Some(disk),
            memory_cache_bytes: 1 << 20,
            ..bare()
        };
        let readers = [
            over(&rig, &encoder, bare()),
            over(&rig, &encoder, cached),
            // Told nothing of compression: each frame says how it is encoded.
            over(
                &rig,
                &FrameEncoder {
                    compression: Compression::None,
                    ..encoder.clone()
                },
                bare(),
            ),
        ];
        let mut state = 99u64;
        let mut next = |below: usize| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        for round in 0..300 {
            let n = next(frames.len());
            let data = &frames[n];
            let offset = next(data.len());
            let most = if round % 10 == 0 { data.len() } else { 9000 };
            let length = 1 + next((data.len() - offset).min(most));
            for reader in &readers {
                let read = reader
                    .read(range(1, numbers[n], offset, length))
                    .await
                    .unwrap();
                assert_eq!(
                    read,
                    data.slice(offset..offset + length),
                    "{encoder:?} {coarse} {offset} {length}"
                );
            }
        }
        let beyond = readers[0]
            .read(range(1, numbers[5], lengths[5] - 1, 2))
            .await;
        assert_eq!(beyond.unwrap_err().kind(), Kind::Corrupt);
    }
}

#[tokio::test]
async fn a_random_read_of_a_large_frame_fetches_little_and_readers_share_it() {
    let encoder = FrameEncoder {
        compression: Compression::Zstd,
        key: Some(key()),
    };
    // What the test's own key encrypts and nothing compresses lies across the borders of pages.
    for data in [prose(64 * PAGE_BYTES, 3), noise(64 * PAGE_BYTES, 5)] {
        a_random_read_fetches_little(&encoder, data).await;
    }
}

async fn a_random_read_fetches_little(encoder: &FrameEncoder, data: Bytes) {
    let rig = Rig::new(1, Rates::default());
    let store = over(
        &rig,
        encoder,
        StoreOptions {
            cache_uploads: false,
            ..Default::default()
        },
    );
    let (built, numbers) = store
        .build(SegmentId(1), vec![vec![data.clone()]])
        .await
        .unwrap();
    store.put(built).await.unwrap();
    let read = |page: usize| store.read(range(1, numbers[0], page * PAGE_BYTES + 100, 4096));
    let (reads, bytes) = rig.failing.gets();
    let (one, two) = tokio::join!(read(40), read(40));
    assert_eq!(
        one.unwrap(),
        data.slice(40 * PAGE_BYTES + 100..40 * PAGE_BYTES + 4196)
    );
    assert_eq!(two.unwrap().len(), 4096);
    let (after, more) = rig.failing.gets();
    assert_eq!(
        after - reads,
        2,
        "the first page's beginning with the table, and the block"
    );
    assert!(
        more - bytes <= 3 * (FINE_PAGE_BYTES as u64 + 32) + 512,
        "{} bytes",
        more - bytes
    );
    let (reads, bytes) = rig.failing.gets();
    read(20).await.unwrap();
    let (after, more) = rig.failing.gets();
    assert_eq!(after - reads, 1, "the table is known");
    assert!(
        more - bytes <= 3 * (FINE_PAGE_BYTES as u64 + 32),
        "{} bytes",
        more - bytes
    );
}

#[tokio::test]
async fn uploads_come_back_from_memory_and_the_disk_holds_what_the_bucket_holds() {
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(1, Rates::default());
    let encoder = FrameEncoder {
        compression: Compression::None,
        key: Some(key()),
    };
    let secret = b"the quick brown fox jumps over the lazy dog";
    let data: Bytes = secret
        .iter()
        .copied()
        .cycle()
        .take(3 * PAGE_BYTES + 99)
        .collect();
    let options = StoreOptions {
        disk_cache: Some(DiskCacheOptions {
            free_space_ratio: 0.0,
            ..DiskCacheOptions::new(directory.path(), 1 << 30)
        }),
        ..Default::default()
    };
    let store = over(&rig, &encoder, options.clone());
    let small = Bytes::from_static(secret);
    let frames = vec![
        vec![data.slice(..70_000), data.slice(70_000..)],
        vec![small.clone()],
    ];
    let (built, numbers) = store.build(SegmentId(1), frames).await.unwrap();
    store.put(built).await.unwrap();
    rig.failing.set_down(true);
    assert_eq!(
        store
            .read(range(1, numbers[0], 0, data.len()))
            .await
            .unwrap(),
        data
    );
    assert_eq!(
        store
            .read(range(1, numbers[1], 0, small.len()))
            .await
            .unwrap(),
        small
    );
    store.flush_cache().await;
    drop(store);
    // After a restart from the disk alone, which needs the key as the bucket does.
    let store = over(&rig, &encoder, options.clone());
    store.flush_cache().await;
    assert_eq!(
        store
            .read(range(1, numbers[0], 0, data.len()))
            .await
            .unwrap(),
        data
    );
    drop(store);
    rig.failing.set_down(false);
    let mut everything = vec![object(&rig, 1).await.to_vec()];
    let mut directories = vec![directory.path().to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap().is_dir() {
                true => directories.push(entry.path()),
                false => everything.push(std::fs::read(entry.path()).unwrap()),
            }
        }
    }
    assert!(everything.len() >= 3);
    for bytes in &everything {
        assert!(
            !bytes.windows(8).any(|window| window == &secret[4..12]),
            "clear text"
        );
    }
    // Equal blocks do not look equal: nothing of 16 bytes comes twice behind the header.
    let stored = &everything[0][64 + 32 + 16..64 + 32 + PAGE_BYTES];
    let windows: HashSet<&[u8]> = stored.chunks_exact(16).collect();
    assert_eq!(windows.len(), stored.len() / 16);
}

#[tokio::test]
async fn another_key_or_none_is_told_apart_from_damage() {
    let rig = Rig::new(1, Rates::default());
    let encoder = FrameEncoder {
        compression: Compression::Lz4,
        key: Some(key()),
    };
    let data = prose(2 * PAGE_BYTES, 3);
    let store = over(&rig, &encoder, bare());
    let (built, numbers) = store
        .build(SegmentId(1), vec![vec![data.clone()]])
        .await
        .unwrap();
    store.put(built).await.unwrap();
    let (other, encryption) =
        VolumeKey::create(&Passphrase::new("other".to_owned()).into()).unwrap();
    let other = FrameEncoder {
        key: Some(Arc::new(other)),
        ..encoder
    };
    for (encoder, words) in [
        (other, "the key that was given is"),
        (FrameEncoder::default(), "no key was given"),
    ] {
        let error = over(&rig, &encoder, bare())
            .read(range(1, numbers[0], 0, 10))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Denied, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    // And a volume that is encrypted does not open without its passphrase.
    let config = v1::StorageConfig {
        storage: "memory".to_owned(),
        encryption: Some(encryption),
        ..Default::default()
    };
    let open = |passphrase: Option<&str>| {
        let options = StoreOptions {
            opener: passphrase.map(|text| Passphrase::new(text.to_owned()).into()),
            ..bare()
        };
        SegmentStore::open(&config, "vol", VOLUME, options).map(drop)
    };
    assert!(
        open(None)
            .unwrap_err()
            .to_string()
            .contains("no passphrase or key was given")
    );
    assert_eq!(open(Some("Other")).unwrap_err().kind(), Kind::Denied);
    open(Some("other")).unwrap();
}

#[tokio::test]
async fn a_reader_that_expects_no_codec_finds_it_from_the_middle_of_a_frame() {
    let rig = Rig::new(1, Rates::default());
    let encoder = FrameEncoder {
        compression: Compression::Zstd,
        key: None,
    };
    let data: Bytes = prose(30 * PAGE_BYTES, 0)
        .slice(..PAGE_BYTES)
        .repeat(30)
        .into();
    let store = over(&rig, &encoder, bare());
    let frames = vec![vec![data.clone()]];
    let (built, numbers) = store.build(SegmentId(1), frames).await.unwrap();
    assert!(built.length < 2 * PAGE_BYTES as u64);
    store.put(built).await.unwrap();
    let reader = over(&rig, &FrameEncoder::default(), bare());
    let at = range(1, numbers[0], 20 * PAGE_BYTES, 3 * PAGE_BYTES);
    let read = reader.read(at).await.unwrap();
    assert_eq!(read, data.slice(20 * PAGE_BYTES..23 * PAGE_BYTES));
}

/// Where the stored pages lie is another matter in encoded frames; looking for them is no sign of damage.
#[tokio::test]
async fn a_reader_that_expects_no_codec_calls_nothing_damaged() {
    let (words, random) = (prose(30 * PAGE_BYTES, 8), noise(30 * PAGE_BYTES, 8));
    for (data, coarse) in [(&words, false), (&random, false), (&words, true)] {
        let rig = Rig::new(1, Rates::default());
        let encoder = FrameEncoder {
            compression: Compression::None,
            key: Some(key()),
        };
        let store = over(&rig, &encoder, bare());
        let mut builder = store.builder(SegmentId(1));
        builder.coarse = coarse;
        let frame = builder.add_frame(vec![data.clone()]).unwrap();
        store.put(builder.finish()).await.unwrap();
        for page in [0, 1, 17, 29] {
            let reader = over(&rig, &encoder, bare());
            // As a mount that was started before the volume got its codec, or its key.
            reader.shared.expect_plain();
            let at = range(1, frame, page * PAGE_BYTES, PAGE_BYTES);
            let read = reader.read(at).await.unwrap();
            assert_eq!(read, data.slice(page * PAGE_BYTES..(page + 1) * PAGE_BYTES));
            let wrong = reader.shared.bucket.metrics().corrupt_pages.get();
            assert_eq!(wrong, 0, "page {page}, {coarse}");
        }
    }
}

#[tokio::test]
async fn a_frame_that_does_not_shrink_is_stored_as_it_is() {
    let rig = Rig::new(1, Rates::default());
    for compression in [Compression::Lz4, Compression::Zstd] {
        let store = over(
            &rig,
            &FrameEncoder {
                compression,
                key: None,
            },
            bare(),
        );
        let id = 1 + compression as u64;
        let (built, numbers) = store
            .build(SegmentId(id), vec![vec![noise(200_000, 1)]])
            .await
            .unwrap();
        assert!(built.frames[0].codec.is_plain());
        store.put(built).await.unwrap();
        let read = store
            .read(range(id, numbers[0], 150_000, 50_000))
            .await
            .unwrap();
        assert_eq!(read, noise(200_000, 1).slice(150_000..));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_byte_is_changed_no_codec_gives_wrong_bytes(
        which in 0usize..6,
        coarse: bool,
        lengths in prop::collection::vec(1usize..200_000, 1..4),
        places in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..4),
        resum in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let encoder = encoders().swap_remove(which);
            let rig = Rig::new(1, Rates::default());
            let store = over(&rig, &encoder, bare());
            let frames: Vec<Bytes> =
                lengths.iter().enumerate().map(|(n, length)| prose(*length, n as u64)).collect();
            let mut builder = store.builder(SegmentId(1));
            builder.coarse = coarse;
            let add = |data: &Bytes| builder.add_frame(vec![data.clone()]).unwrap();
            let numbers: Vec<FrameNumber> = frames.iter().map(add).collect();
            let built = builder.finish();
            store.put(built.clone()).await.unwrap();
            let mut bad = built.to_bytes().to_vec();
            for (place, mask) in places {
                let at = place.index(bad.len());
                bad[at] ^= mask;
            }
            // Somebody who can write to the bucket can make checksums right; only a key protects from him.
            if resum && encoder.key.is_some() {
                for entry in &built.frames {
                    resum_pages(&mut bad, entry);
                }
            }
            let path = Path::from("vol/01/0000000000000001");
            rig.memory.put(&path, PutPayload::from(bad)).await.unwrap();
            let readers = [over(&rig, &encoder, bare()), over(&rig, &FrameEncoder {
                compression: Compression::None, key: encoder.key.clone() }, bare())];
            for (number, data) in numbers.iter().zip(&frames) {
                for reader in &readers {
                    if let Ok(read) = reader.read(range(1, *number, 0, data.len())).await {
                        prop_assert_eq!(&read, data);
                    }
                    let (from, to) = (data.len() / 2, data.len());
                    if let Ok(read) = reader.read(range(1, *number, from, to - from)).await {
                        prop_assert_eq!(&read, &data.slice(from..to));
                    }
                }
            }
            Ok(())
        })?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn whatever_byte_of_a_cache_file_is_changed_the_reader_never_sees_it(
        which in 0usize..6,
        coarse: bool,
        lengths in prop::collection::vec(1usize..200_000, 1..4),
        places in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..8),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let encoder = encoders().swap_remove(which);
            let rig = Rig::new(1, Rates::default());
            let directory = tempfile::tempdir().unwrap();
            let options = || StoreOptions {
                disk_cache: Some(DiskCacheOptions {
                    free_space_ratio: 0.0,
                    ..DiskCacheOptions::new(directory.path(), 1 << 30)
                }),
                memory_cache_bytes: 0,
                cache_uploads: true,
                ..bare()
            };
            let store = over(&rig, &encoder, options());
            let frames: Vec<Bytes> =
                lengths.iter().enumerate().map(|(n, length)| prose(*length, n as u64)).collect();
            let mut builder = store.builder(SegmentId(1));
            builder.coarse = coarse;
            let add = |data: &Bytes| builder.add_frame(vec![data.clone()]).unwrap();
            let numbers: Vec<FrameNumber> = frames.iter().map(add).collect();
            store.put(builder.finish()).await.unwrap();
            store.flush_cache().await;
            drop(store);
            let mut cached = Vec::new();
            let mut directories = vec![directory.path().to_owned()];
            while let Some(directory) = directories.pop() {
                for entry in std::fs::read_dir(directory).unwrap() {
                    let entry = entry.unwrap();
                    match entry.file_type().unwrap().is_dir() {
                        true => directories.push(entry.path()),
                        false if entry.metadata().unwrap().len() > 0 => cached.push(entry.path()),
                        false => {}
                    }
                }
            }
            cached.sort();
            prop_assert_eq!(cached.len(), frames.len());
            for (n, (place, mask)) in places.into_iter().enumerate() {
                let file = &cached[n % cached.len()];
                let mut bytes = std::fs::read(file).unwrap();
                let at = place.index(bytes.len());
                bytes[at] ^= mask;
                std::fs::write(file, bytes).unwrap();
            }
            let store = over(&rig, &encoder, options());
            store.flush_cache().await;
            for (number, data) in numbers.iter().zip(&frames) {
                for from in [data.len() / 2, 0] {
                    let read = store.read(range(1, *number, from, data.len() - from)).await;
                    prop_assert_eq!(&read.unwrap(), &data.slice(from..));
                }
            }
            Ok(())
        })?;
    }
}

/// One wrong bit in the header of a frame's first page costs that page, whatever the bit says.
#[tokio::test]
async fn a_wrong_bit_in_a_first_header_costs_that_page_only() {
    for (encoder, coarse) in encoders()
        .into_iter()
        .flat_map(|it| [(it.clone(), false), (it, true)])
    {
        for mixed in [false, true] {
            let rig = Rig::new(1, Rates::default());
            let store = over(&rig, &encoder, bare());
            let data = noise(5 * PAGE_BYTES, 3);
            let mut builder = store.builder(SegmentId(1));
            builder.coarse = coarse;
            let frame = builder.add_frame(vec![data.clone()]).unwrap();
            let built = builder.finish();
            let entry = built.frames[0];
            let mut bad = built.to_bytes().to_vec();
            // The bit that says short pages.
            bad[entry.frame.start() as usize + 2] ^= 0x40;
            let path = Path::from("vol/01/0000000000000001");
            rig.memory.put(&path, PutPayload::from(bad)).await.unwrap();
            let reader = over(&rig, &encoder, bare());
            if mixed {
                reader.shared.expect_codecs();
            }
            let all = reader.read(range(1, frame, 0, data.len())).await;
            assert_eq!(all.unwrap_err().kind(), Kind::Corrupt);
            let wrong = reader.shared.bucket.metrics().corrupt_pages.get();
            assert!(
                (1..=2).contains(&wrong),
                "{encoder:?} {coarse} {mixed}: {wrong} pages"
            );
            if !entry.codec.is_plain() {
                continue;
            }
            // Without a codec nothing else is needed to read the others, also together with the bad one.
            for page in 1..5 {
                let at = range(1, frame, page * PAGE_BYTES, PAGE_BYTES);
                let read = over(&rig, &encoder, bare()).read(at).await.unwrap();
                assert_eq!(read, data.slice(page * PAGE_BYTES..(page + 1) * PAGE_BYTES));
            }
        }
    }
}

/// Compaction moves frames under other numbers; what it costs to find their blocks is one frame table more.
#[tokio::test]
async fn a_random_read_of_a_moved_frame_fetches_little() {
    let encoder = FrameEncoder {
        compression: Compression::Zstd,
        key: Some(key()),
    };
    for (codec, length) in [
        (encoder.clone(), 64),
        (FrameEncoder::default(), 64),
        (encoder, 900),
    ] {
        let rig = Rig::new(1, Rates::default());
        let store = over(&rig, &codec, bare());
        let data = noise(length * PAGE_BYTES, 5);
        let frames = vec![vec![data.clone()]];
        let (built, _) = store.build(SegmentId(1), frames).await.unwrap();
        let entry = built.frames[0];
        let from = entry.frame.start() as usize;
        let encoded = built
            .to_bytes()
            .slice(from..from + entry.extent_bytes() as usize);
        let mut builder = store.builder(SegmentId(2));
        builder
            .add_frame(vec![Bytes::from_static(b"before it")])
            .unwrap();
        let moved = builder.add_relocated(&entry, encoded).unwrap();
        store.put(builder.finish()).await.unwrap();
        let reader = over(&rig, &codec, bare());
        // As in a volume that has, or had, frames with a codec.
        reader.shared.expect_codecs();
        let mut most = 0;
        for page in [40, 41, length - 1] {
            let (_, before) = rig.failing.gets();
            let at = page * PAGE_BYTES + 8192;
            let read = reader.read(range(2, moved, at, 4096)).await.unwrap();
            assert_eq!(read, data.slice(at..at + 4096));
            most = most.max(rig.failing.gets().1 - before);
        }
        assert!(most <= 128 << 10, "{most} bytes, {length} pages");
    }
}

/// Gives each page of a frame the checksum that its bytes have now.
fn resum_pages(object: &mut [u8], entry: &FrameEntry) {
    let (mut at, mut left) = (entry.frame.start() as usize, entry.stored_bytes as usize);
    while left > 0 {
        let length = left.min(entry.codec.page_bytes());
        let mut sum = crc32fast::Hasher::new();
        sum.update(&object[at + 32..at + 32 + length]);
        sum.update(&object[at..at + 28]);
        object[at + 28..at + 32].copy_from_slice(&sum.finalize().to_le_bytes());
        at += 32 + length;
        left -= length;
    }
}

#[tokio::test]
async fn frames_that_compaction_moved_are_decrypted_where_they_lie_now() {
    let rig = Rig::new(1, Rates::default());
    let encoder = FrameEncoder {
        compression: Compression::Zstd,
        key: Some(key()),
    };
    let store = over(&rig, &encoder, bare());
    let data = [prose(300, 1), prose(5 * PAGE_BYTES, 2)];
    let frames = data.iter().map(|data| vec![data.clone()]).collect();
    let (built, _) = store.build(SegmentId(1), frames).await.unwrap();
    store.put(built).await.unwrap();
    let table = store.frame_table(SegmentId(1)).await.unwrap();
    let mut builder = store.builder(SegmentId(2));
    let mut moved = Vec::new();
    let encoded = store.encoded_frames(SegmentId(1), &table).await;
    for (entry, encoded) in table.iter().zip(encoded).rev() {
        let encoded = encoded.unwrap();
        moved.push(builder.add_relocated(entry, encoded.clone()).unwrap());
        let data_of = store
            .frame_data(SegmentId(1), *entry, encoded)
            .await
            .unwrap();
        assert_eq!(data_of, data[moved.len() % 2]);
    }
    store.put(builder.finish()).await.unwrap();
    store.delete(&[SegmentId(1)]).await;
    for (frame, data) in moved.iter().zip(data.iter().rev()) {
        let half = data.len() / 2;
        let read = store.read(range(2, *frame, half, data.len() - half)).await;
        assert_eq!(read.unwrap(), data.slice(half..));
        let read = store.read(range(2, *frame, 0, data.len())).await;
        assert_eq!(read.unwrap(), *data);
    }
}

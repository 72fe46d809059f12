//! Decoding of whatever bytes: no panic, and nothing but an error or data of the right length. `make fuzz` runs a million
//! rounds; `FUZZ_ITERATIONS` says how many otherwise. Seeds are round numbers, so that a failure names its round.

use std::sync::Arc;

use bytes::Bytes;
use heliofs_proto::ids::{SegmentId, VolumeId};

use super::codec::{FrameEncoder, FrameHead};
use super::layout::{PAGE_BYTES, PAGE_HEADER_BYTES, TRAILER_BYTES};
use super::object::{check_header, check_object, decode_footer, decode_trailer};
use super::page::{Compression, PageIdentity, take_page, take_pages};
use super::{EncodedSegment, SegmentBuilder};
use crate::{Passphrase, VolumeKey};

const VOLUME: VolumeId = VolumeId(3);
const SEGMENT: SegmentId = SegmentId(0x42);

/// splitmix64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// A change or several, of the kinds that find bugs: flips, extreme numbers, cuts, copies of one place to another.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            if bytes.is_empty() {
                return;
            }
            let at = self.below(bytes.len());
            match self.below(6) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
                2 => {
                    let number = [0u32, 1, 65_536, 1 << 31, u32::MAX][self.below(5)];
                    let end = (at + 4).min(bytes.len());
                    bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
                }
                3 => bytes.truncate(at),
                4 => {
                    let length = self.below(64).min(bytes.len() - at);
                    let to = self.below(bytes.len() - length + 1);
                    bytes.copy_within(at..at + length, to);
                }
                _ => bytes.insert(at, self.next() as u8),
            }
        }
    }
}

fn rounds() -> u64 {
    let rounds = std::env::var("FUZZ_ITERATIONS");
    rounds.map_or(20_000, |rounds| rounds.parse().expect("a number"))
}

fn encoders() -> Vec<FrameEncoder> {
    let (key, _) = VolumeKey::create(&Passphrase::new("fuzz".to_owned()).into()).unwrap();
    let key = Arc::new(key);
    let mut encoders = Vec::new();
    for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
        for key in [None, Some(Arc::clone(&key))] {
            encoders.push(FrameEncoder { compression, key });
        }
    }
    encoders
}

/// Small objects of every codec, some frames with two blocks.
fn corpus(encoders: &[FrameEncoder]) -> Vec<EncodedSegment> {
    encoders
        .iter()
        .map(|encoder| {
            let mut builder = SegmentBuilder::encoding(VOLUME, SEGMENT, encoder.clone());
            for length in [1, 300, PAGE_BYTES + 500] {
                let data: Vec<u8> = b"fuzz and more fuzz "
                    .iter()
                    .copied()
                    .cycle()
                    .take(length)
                    .collect();
                builder.add_frame(vec![Bytes::from(data)]).unwrap();
            }
            builder.finish()
        })
        .collect()
}

#[test]
fn objects_of_any_bytes_are_refused_or_read() {
    let encoders = encoders();
    let corpus: Vec<Vec<u8>> = corpus(&encoders)
        .iter()
        .map(|it| it.to_bytes().to_vec())
        .collect();
    // Those that are short for most rounds: a long one takes its time to sum.
    let short: Vec<&Vec<u8>> = corpus.iter().filter(|object| object.len() < 4096).collect();
    assert!(short.len() >= 2);
    for round in 0..rounds() {
        let random = &mut Random(round);
        let from = match round % 64 {
            0 => &corpus[random.below(corpus.len())],
            _ => short[random.below(short.len())],
        };
        let mut bytes = match round % 8 {
            0 => (0..random.below(300))
                .map(|_| random.next() as u8)
                .collect(),
            _ => from.clone(),
        };
        random.mutate(&mut bytes);
        // Half of the footers get a checksum that is right, so that what lies behind it is reached.
        if round % 2 == 0 && bytes.len() > TRAILER_BYTES {
            let end = bytes.len() - 12;
            if let Ok(trailer) = decode_trailer(&bytes)
                && let Some(from) = (bytes.len() as u64).checked_sub(trailer.footer_bytes)
            {
                let sum = crc32fast::hash(&bytes[from as usize..end]);
                bytes[end..end + 4].copy_from_slice(&sum.to_le_bytes());
            }
        }
        let object = Bytes::from(bytes);
        // What they answer is checked by the property tests; here they must answer at all.
        let _header = check_header(&object, VOLUME, SEGMENT);
        let _footer = decode_footer(&object, VOLUME, SEGMENT);
        let checked = check_object(&object, VOLUME, SEGMENT);
        if let Ok(frames) = checked {
            assert!(
                frames
                    .iter()
                    .all(|entry| entry.frame.start() < object.len() as u64)
            );
        }
    }
}

#[test]
fn pages_and_frames_of_any_bytes_are_refused_or_read() {
    let encoders = encoders();
    let corpus = corpus(&encoders);
    let objects: Vec<Bytes> = corpus.iter().map(EncodedSegment::to_bytes).collect();
    for round in 0..rounds() {
        let random = &mut Random(round);
        let which = random.below(corpus.len());
        let (segment, encoder) = (&corpus[which], &encoders[which]);
        // The long frame seldom: it is long.
        let entry = segment.frames[if round % 32 == 0 { 2 } else { random.below(2) }];
        let identity: PageIdentity = entry.identity(VOLUME);
        let from = entry.frame.start() as usize;
        let until =
            from + PAGE_HEADER_BYTES + (entry.stored_bytes as usize).min(entry.codec.page_bytes());
        let mut page = objects[which][from..until].to_vec();
        random.mutate(&mut page);
        if round % 2 == 0 && page.len() > PAGE_HEADER_BYTES {
            let mut sum = crc32fast::Hasher::new();
            sum.update(&page[PAGE_HEADER_BYTES..]);
            sum.update(&page[..28]);
            page[28..32].copy_from_slice(&sum.finalize().to_le_bytes());
        }
        let mut rest = Bytes::from(page.clone());
        let taken = take_page(&mut rest, &identity, 0);
        let mut rest = Bytes::from(page);
        let _several = take_pages(&mut rest, &identity, 0, 1 + random.below(5) as u32);
        let Ok(page) = taken else { continue };
        if page.codec.is_plain() {
            continue;
        }
        let key = encoder.key.as_deref();
        let parsed = FrameHead::parse(&page.data, identity, page.codec, page.frame_bytes, key);
        let Ok(head) = parsed else { continue };
        let blocks = 0..head.blocks();
        let range = head.stored_range(blocks.clone());
        assert_eq!(range.end, page.frame_bytes);
        // What the page does not have is whatever bytes, too.
        let mut stored = page.data.to_vec();
        if range.end as usize > stored.len() + (1 << 20) {
            continue;
        }
        stored.resize(range.end as usize, round as u8);
        for data in head
            .decode(blocks, &stored[range.start as usize..])
            .into_iter()
            .flatten()
        {
            assert!((1..=PAGE_BYTES).contains(&data.len()));
        }
    }
}

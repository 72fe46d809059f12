//! The format's promises: what was written is read; anything else is an error, never other bytes.

use bytes::Bytes;
use heliofs_proto::ids::{SegmentId, VolumeId};
use proptest::prelude::*;

use super::layout::{PAGE_BYTES, PAGE_STRIDE};
use super::object::{ObjectFault, check_header, check_object, decode_footer};
use super::page::{PageFault, PageIdentity, take_page, take_pages};
use super::{EncodedSegment, FrameNumber, SegmentBuilder};

const VOLUME: VolumeId = VolumeId(3);
const SEGMENT: SegmentId = SegmentId(0x1_0000_0000_0042);

fn noise(length: usize, seed: u64) -> Bytes {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// A segment with one frame per item, its data given in pieces that do not fall on page boundaries.
fn build(frames: &[Bytes]) -> (EncodedSegment, Vec<FrameNumber>) {
    let mut builder = SegmentBuilder::new(VOLUME, SEGMENT);
    let numbers = frames
        .iter()
        .map(|data| {
            let cut = data.len() / 3;
            let pieces = vec![data.slice(..cut), Bytes::new(), data.slice(cut..)];
            builder.add_frame(pieces).unwrap()
        })
        .collect();
    (builder.finish(), numbers)
}

fn identity(frame: FrameNumber) -> PageIdentity {
    PageIdentity {
        volume: VOLUME,
        segment: SEGMENT,
        frame,
    }
}

fn read_frame(object: &Bytes, frame: FrameNumber, length: usize) -> Result<Bytes, PageFault> {
    let from = (frame.start() as usize).min(object.len());
    let mut rest = object.slice(from..);
    let count = length.div_ceil(PAGE_BYTES) as u32;
    let pages = take_pages(&mut rest, &identity(frame), 0, count).map_err(|(_, fault)| fault)?;
    let data: Vec<u8> = pages.iter().flat_map(|page| page.data.to_vec()).collect();
    Ok(data.into())
}

#[test]
fn frames_of_every_awkward_length_come_back() {
    let lengths = [
        1,
        15,
        16,
        4096,
        PAGE_BYTES - 1,
        PAGE_BYTES,
        PAGE_BYTES + 1,
        5 * PAGE_BYTES + 77,
    ];
    let frames: Vec<Bytes> = lengths.iter().map(|n| noise(*n, *n as u64)).collect();
    let (segment, numbers) = build(&frames);
    let object = segment.to_bytes();
    assert_eq!(segment.length, object.len() as u64);
    assert_eq!(
        segment.checksum,
        crc32fast::hash(&object),
        "the combined checksum is the object's"
    );
    assert_eq!(segment.data_bytes, lengths.iter().sum::<usize>() as u64);
    let listed = check_object(&object, VOLUME, SEGMENT).unwrap();
    assert_eq!(listed, segment.frames);
    for (number, data) in numbers.iter().zip(&frames) {
        assert_eq!(read_frame(&object, *number, data.len()).unwrap(), data);
    }
}

#[test]
fn an_empty_segment_is_sound() {
    let (segment, _) = build(&[]);
    assert_eq!(
        check_object(&segment.to_bytes(), VOLUME, SEGMENT),
        Ok(vec![])
    );
}

#[test]
fn a_frame_without_bytes_or_with_too_many_is_refused() {
    let mut builder = SegmentBuilder::new(VOLUME, SEGMENT);
    assert!(builder.add_frame(vec![]).is_err());
    let huge = Bytes::from(vec![0; 1 << 20]);
    assert!(builder.add_frame(vec![huge; 65]).is_err());
    assert_eq!(
        check_object(&builder.finish().to_bytes(), VOLUME, SEGMENT),
        Ok(vec![])
    );
}

#[test]
fn every_flipped_bit_of_an_object_is_found_by_the_whole_check() {
    let (segment, _) = build(&[noise(100, 1), noise(33, 2)]);
    let object = segment.to_bytes();
    for bit in 0..object.len() * 8 {
        let mut bad = object.to_vec();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(
            check_object(&bad.into(), VOLUME, SEGMENT).is_err(),
            "bit {bit}"
        );
    }
}

#[test]
fn every_truncation_of_an_object_is_found_by_the_whole_check() {
    let (segment, _) = build(&[noise(100, 1), noise(33, 2)]);
    let object = segment.to_bytes();
    for length in 0..object.len() {
        assert!(
            check_object(&object.slice(..length), VOLUME, SEGMENT).is_err(),
            "{length}"
        );
    }
}

#[test]
fn misdirected_reads_fail_for_what_they_are() {
    let data = noise(3 * PAGE_BYTES, 9);
    let (segment, numbers) = build(&[data.clone(), data]);
    let object = segment.to_bytes();
    let at = |frame: FrameNumber, page: usize| {
        object.slice(frame.start() as usize + page * PAGE_STRIDE..)
    };
    let take =
        |mut bytes: Bytes, identity: PageIdentity, page| take_page(&mut bytes, &identity, page);
    let right = identity(numbers[0]);
    assert!(take(at(numbers[0], 1), right, 1).is_ok());
    let foreign = |result| matches!(result, Err(PageFault::Foreign { .. }));
    assert!(
        foreign(take(at(numbers[0], 2), right, 1)),
        "another page of the frame"
    );
    assert!(
        foreign(take(at(numbers[1], 1), right, 1)),
        "the same page of another frame"
    );
    let other = PageIdentity {
        segment: SegmentId(7),
        ..right
    };
    assert!(
        foreign(take(at(numbers[0], 1), other, 1)),
        "another segment"
    );
    let other = PageIdentity {
        volume: VolumeId(4),
        ..right
    };
    assert!(foreign(take(at(numbers[0], 1), other, 1)), "another volume");
    assert!(matches!(
        check_object(&object, VolumeId(4), SEGMENT),
        Err(ObjectFault::Misplaced { .. })
    ));
    assert!(matches!(
        check_header(&object, VOLUME, SegmentId(1)),
        Err(ObjectFault::Misplaced { .. })
    ));
}

#[test]
fn a_moved_frame_keeps_its_bytes_and_its_name() {
    let data = noise(PAGE_BYTES + 100, 4);
    let (first, _) = build(&[noise(10, 1), data.clone()]);
    let entry = first.frames[1];
    let from = entry.frame.start() as usize;
    let encoded = first.to_bytes().slice(from..from + data.len() + 2 * 32);
    let mut builder = SegmentBuilder::new(VOLUME, SegmentId(99));
    let number = builder.add_relocated(&entry, encoded.clone()).unwrap();
    assert!(builder.add_relocated(&entry, encoded.slice(1..)).is_err());
    let second = builder.finish();
    let object = second.to_bytes();
    let listed = check_object(&object, VOLUME, SegmentId(99)).unwrap();
    assert_eq!(
        (listed[0].frame, listed[0].origin_segment),
        (number, SEGMENT)
    );
    assert_eq!(second.checksum, crc32fast::hash(&object));
    assert!(
        object
            .windows(encoded.len())
            .any(|window| window == encoded),
        "verbatim"
    );
}

/// The bytes of format version 1; a change here is a new version.
#[test]
fn the_format_is_what_it_was() {
    let mut builder = SegmentBuilder::new(VolumeId(0x01020304), SegmentId(0x1112131415161718));
    builder.add_frame(vec![Bytes::from_static(b"abc")]).unwrap();
    let object = builder.finish().to_bytes();
    let hex: String = object.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, include_str!("golden.hex").trim());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_objects_give_an_error_or_the_right_bytes(
        lengths in prop::collection::vec(1usize..200_000, 1..5),
        places in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let frames: Vec<Bytes> =
            lengths.iter().enumerate().map(|(n, length)| noise(*length, n as u64 + 77)).collect();
        let (segment, numbers) = build(&frames);
        let whole = segment.to_bytes();
        let mut bad = whole.to_vec();
        for (place, mask) in places {
            let at = place.index(bad.len());
            bad[at] ^= mask;
        }
        if let Some(cut) = cut {
            let length = cut.index(bad.len());
            bad.truncate(length);
        }
        let bad = Bytes::from(bad);
        for (number, data) in numbers.iter().zip(&frames) {
            if let Ok(found) = read_frame(&bad, *number, data.len()) {
                prop_assert_eq!(&found, data);
            }
        }
        if let Ok(listed) = decode_footer(&bad, VOLUME, SEGMENT) {
            prop_assert_eq!(&listed, &segment.frames);
        }
        if bad != whole {
            prop_assert!(check_object(&bad, VOLUME, SEGMENT).is_err());
        }
    }

    #[test]
    fn any_bytes_are_decoded_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..500), page: u32) {
        let bytes = Bytes::from(bytes);
        let mut with_magic = b"hP\0\0".to_vec();
        with_magic.extend_from_slice(&bytes);
        for bytes in [bytes.clone(), with_magic.into()] {
            let mut rest = bytes.clone();
            prop_assert!(take_page(&mut rest, &identity(FrameNumber(page)), page).is_err());
            prop_assert_eq!(rest, bytes.clone());
            prop_assert!(check_object(&bytes, VOLUME, SEGMENT).is_err());
        }
    }
}

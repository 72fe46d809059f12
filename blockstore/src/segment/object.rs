//! Header and footer of the object, and the check of a whole one. Ranged reads need neither: they serve compaction, fsck and
//! frames that compaction has moved.

use bytes::{BufMut, Bytes, BytesMut};
use heliofs_proto::ids::{SegmentId, VolumeId};

use super::layout::{
    FRAME_ENTRY_BYTES, FrameNumber, HEADER_BYTES, TRAILER_BYTES, frame_extent_bytes,
};
use super::page::{Codec, PageFault, PageIdentity, take_pages};

/// The object's first bytes.
const HEADER_MAGIC: [u8; 8] = *b"HELIOSEG";
/// And its last.
const TRAILER_MAGIC: [u8; 8] = *b"GESOILEH";
/// The version of everything in docs/FORMAT.md's "Segment"; a reader refuses another.
const FORMAT_VERSION: u16 = 1;

/// One frame in the footer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameEntry {
    /// Its number in this segment.
    pub frame: FrameNumber,
    /// Encoded length, page headers not counted.
    pub stored_bytes: u32,
    /// Length of its data.
    pub decoded_bytes: u32,
    /// How it is encoded.
    pub codec: Codec,
    /// The segment that it was first written to; its pages carry that name.
    pub origin_segment: SegmentId,
    /// Its number there.
    pub origin_frame: FrameNumber,
}

impl FrameEntry {
    /// The name that its pages carry.
    pub fn identity(&self, volume: VolumeId) -> PageIdentity {
        PageIdentity {
            volume,
            segment: self.origin_segment,
            frame: self.origin_frame,
        }
    }

    /// Number of its pages.
    pub fn pages(&self) -> u32 {
        self.stored_bytes.div_ceil(self.codec.page_bytes() as u32)
    }

    /// Bytes that it occupies in the object, page headers included, alignment not.
    pub fn extent_bytes(&self) -> u64 {
        frame_extent_bytes(u64::from(self.stored_bytes), self.codec.page_bytes())
    }
}

/// Why bytes are not a segment.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ObjectFault {
    /// Too short to be one.
    #[error("{part} is cut off: {got} of {want} bytes")]
    Truncated {
        /// `header`, `trailer`, `frame table`
        part: &'static str,
        /// Bytes that are there.
        got: usize,
        /// Bytes that should be there.
        want: u64,
    },
    /// Not ours, or damaged.
    #[error("{part} does not begin or end as it should")]
    Magic {
        /// `header`, `trailer`
        part: &'static str,
    },
    /// Damaged.
    #[error("checksum of the {part} does not match")]
    Checksum {
        /// `header`, `footer`, `object`
        part: &'static str,
    },
    /// Written by another release.
    #[error("format version {0} is unknown to this release")]
    Version(u16),
    /// Another object lies under this name.
    #[error("this is segment {segment:?} of volume {volume}")]
    Misplaced {
        /// Whose it is.
        volume: VolumeId,
        /// And which.
        segment: SegmentId,
    },
    /// The footer contradicts itself or the object.
    #[error("the footer contradicts the object: {0}")]
    Impossible(&'static str),
    /// A page is wrong.
    #[error("frame {} page {page}: {fault}", frame.0)]
    Page {
        /// The frame's number in this object.
        frame: FrameNumber,
        /// Page within the frame.
        page: u32,
        /// What is wrong.
        fault: PageFault,
    },
}

/// The header of segment `id`.
pub fn encode_header(volume: VolumeId, id: SegmentId) -> Bytes {
    let mut header = BytesMut::with_capacity(HEADER_BYTES);
    header.put_slice(&HEADER_MAGIC);
    header.put_u16_le(FORMAT_VERSION);
    header.put_u16_le(0);
    header.put_u32_le(volume.0);
    header.put_u64_le(id.0);
    header.put_bytes(0, HEADER_BYTES - 4 - header.len());
    header.put_u32_le(crc32fast::hash(&header));
    header.freeze()
}

/// Checks the header at the front of `object`.
pub fn check_header(object: &[u8], volume: VolumeId, id: SegmentId) -> Result<(), ObjectFault> {
    let Some(header) = object.get(..HEADER_BYTES) else {
        return Err(ObjectFault::Truncated {
            part: "header",
            got: object.len(),
            want: HEADER_BYTES as u64,
        });
    };
    if header[..8] != HEADER_MAGIC {
        return Err(ObjectFault::Magic { part: "header" });
    }
    if crc32fast::hash(&header[..HEADER_BYTES - 4]) != u32_at(header, HEADER_BYTES - 4) {
        return Err(ObjectFault::Checksum { part: "header" });
    }
    check_version(u16::from_le_bytes([header[8], header[9]]))?;
    check_name(
        VolumeId(u32_at(header, 12)),
        SegmentId(u64_at(header, 16)),
        volume,
        id,
    )
}

/// The footer (frame table and trailer) of an object whose frames end at `length`, alignment included.
pub fn encode_footer(
    volume: VolumeId,
    id: SegmentId,
    length: u64,
    data_bytes: u64,
    frames: &[FrameEntry],
) -> Bytes {
    let mut footer = BytesMut::with_capacity(frames.len() * FRAME_ENTRY_BYTES + TRAILER_BYTES);
    for entry in frames {
        footer.put_u32_le(entry.frame.0);
        footer.put_u32_le(entry.stored_bytes);
        footer.put_u32_le(entry.decoded_bytes);
        footer.put_u8(entry.codec.byte());
        footer.put_bytes(0, 3);
        footer.put_u64_le(entry.origin_segment.0);
        footer.put_u32_le(entry.origin_frame.0);
        footer.put_u32_le(0);
    }
    footer.put_u64_le(id.0);
    footer.put_u32_le(volume.0);
    footer.put_u32_le(frames.len() as u32);
    footer.put_u64_le(length);
    footer.put_u64_le(data_bytes);
    footer.put_u16_le(FORMAT_VERSION);
    footer.put_u16_le(0);
    footer.put_u32_le(crc32fast::hash(&footer));
    footer.put_slice(&TRAILER_MAGIC);
    footer.freeze()
}

/// What the trailer says; believed only after [`decode_footer`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trailer {
    /// Length of frame table and trailer, bytes: the object's last so many.
    pub footer_bytes: u64,
}

/// Reads the trailer at the end of `tail`, the last bytes of an object, at least [`TRAILER_BYTES`].
pub fn decode_trailer(tail: &[u8]) -> Result<Trailer, ObjectFault> {
    let Some(at) = tail.len().checked_sub(TRAILER_BYTES) else {
        return Err(ObjectFault::Truncated {
            part: "trailer",
            got: tail.len(),
            want: TRAILER_BYTES as u64,
        });
    };
    let trailer = &tail[at..];
    if trailer[40..48] != TRAILER_MAGIC {
        return Err(ObjectFault::Magic { part: "trailer" });
    }
    check_version(u16::from_le_bytes([trailer[32], trailer[33]]))?;
    Ok(Trailer {
        footer_bytes: u64::from(u32_at(trailer, 12)) * FRAME_ENTRY_BYTES as u64
            + TRAILER_BYTES as u64,
    })
}

/// Reads the frame table from `tail`, the last bytes of the object, which hold the whole footer.
pub fn decode_footer(
    tail: &[u8],
    volume: VolumeId,
    id: SegmentId,
) -> Result<Vec<FrameEntry>, ObjectFault> {
    let want = decode_trailer(tail)?.footer_bytes;
    let Some(at) = (tail.len() as u64).checked_sub(want) else {
        return Err(ObjectFault::Truncated {
            part: "frame table",
            got: tail.len(),
            want,
        });
    };
    let footer = &tail[at as usize..];
    let (table, trailer) = footer.split_at(footer.len() - TRAILER_BYTES);
    if crc32fast::hash(&footer[..footer.len() - 12]) != u32_at(trailer, 36) {
        return Err(ObjectFault::Checksum { part: "footer" });
    }
    check_name(
        VolumeId(u32_at(trailer, 8)),
        SegmentId(u64_at(trailer, 0)),
        volume,
        id,
    )?;
    table
        .chunks_exact(FRAME_ENTRY_BYTES)
        .map(|entry| {
            Ok(FrameEntry {
                frame: FrameNumber(u32_at(entry, 0)),
                stored_bytes: u32_at(entry, 4),
                decoded_bytes: u32_at(entry, 8),
                codec: Codec::try_from(entry[12])
                    .map_err(|_| ObjectFault::Impossible("unknown codec"))?,
                origin_segment: SegmentId(u64_at(entry, 16)),
                origin_frame: FrameNumber(u32_at(entry, 24)),
            })
        })
        .collect()
}

/// Checks every byte of `object`: header, pages, paddings, footer; returns its frames.
pub fn check_object(
    object: &Bytes,
    volume: VolumeId,
    id: SegmentId,
) -> Result<Vec<FrameEntry>, ObjectFault> {
    check_header(object, volume, id)?;
    let frames = decode_footer(object, volume, id)?;
    let footer_at = object.len() as u64 - decode_trailer(object)?.footer_bytes;
    let trailer = &object[object.len() - TRAILER_BYTES..];
    if u64_at(trailer, 16) != footer_at {
        return Err(ObjectFault::Impossible(
            "the frame table is not where it should be",
        ));
    }
    let mut at = HEADER_BYTES as u64;
    let mut data_bytes = 0;
    for entry in &frames {
        zeros(object, at, entry.frame.start())?;
        let end = entry.frame.start() + entry.extent_bytes();
        if end > footer_at {
            return Err(ObjectFault::Impossible("a frame runs into the footer"));
        }
        let count = entry.pages();
        let mut rest = object.slice(entry.frame.start() as usize..end as usize);
        let pages =
            take_pages(&mut rest, &entry.identity(volume), 0, count).map_err(|(page, fault)| {
                ObjectFault::Page {
                    frame: entry.frame,
                    page,
                    fault,
                }
            })?;
        if pages
            .iter()
            .any(|page| page.frame_bytes != entry.stored_bytes || page.codec != entry.codec)
            || !rest.is_empty()
        {
            return Err(ObjectFault::Impossible(
                "a frame has another length or codec than its entry",
            ));
        }
        at = end;
        data_bytes += u64::from(entry.decoded_bytes);
    }
    zeros(object, at, footer_at)?;
    if u64_at(trailer, 24) != data_bytes {
        return Err(ObjectFault::Impossible(
            "the sum of the frames' lengths is another",
        ));
    }
    Ok(frames)
}

fn zeros(object: &[u8], from: u64, to: u64) -> Result<(), ObjectFault> {
    let gap = (from <= to)
        .then(|| object.get(from as usize..to as usize))
        .flatten()
        .ok_or(ObjectFault::Impossible("frames overlap"))?;
    if gap.len() >= super::layout::FRAME_ALIGN as usize || gap.iter().any(|byte| *byte != 0) {
        return Err(ObjectFault::Impossible("something lies between two frames"));
    }
    Ok(())
}

fn check_version(version: u16) -> Result<(), ObjectFault> {
    if version == FORMAT_VERSION {
        Ok(())
    } else {
        Err(ObjectFault::Version(version))
    }
}

fn check_name(
    found_volume: VolumeId,
    found: SegmentId,
    volume: VolumeId,
    id: SegmentId,
) -> Result<(), ObjectFault> {
    if (found_volume, found) == (volume, id) {
        Ok(())
    } else {
        Err(ObjectFault::Misplaced {
            volume: found_volume,
            segment: found,
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

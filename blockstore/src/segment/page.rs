//! The header in front of each page, and the check that a page is the one that was asked for.
//!
//! The header names volume, segment, frame and page, and its CRC32 covers them with the data: a ranged GET of any pages can
//! be verified by itself, and bytes of another place, object or volume are refused for what they are, not by luck.

use bytes::{Buf, Bytes};
use heliofs_proto::ids::{SegmentId, VolumeId};

use super::layout::{
    FINE_PAGE_BYTES, FrameNumber, PAGE_BYTES, PAGE_HEADER_BYTES, STORED_BYTES_MAX,
};

/// "hP": what every page header begins with.
const PAGE_MAGIC: [u8; 2] = *b"hP";

/// How a frame's data is compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
#[repr(u8)]
pub enum Compression {
    /// Not at all.
    #[default]
    None = 0,
    /// Fast, a third off text.
    Lz4 = 1,
    /// A half off text, at a third of the speed.
    Zstd = 2,
}

impl Compression {
    /// By its name in a volume's settings; an empty one means none.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "" | "none" => Some(Self::None),
            "lz4" => Some(Self::Lz4),
            "zstd" => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// How a frame's data is encoded: one byte of each of its page headers; numbers are never reused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
pub struct Codec {
    /// First compressed,
    pub compression: Compression,
    /// then encrypted with AES-256-GCM,
    pub encrypted: bool,
    /// and stored in pages of [`FINE_PAGE_BYTES`]; frames of earlier releases are not.
    pub fine: bool,
}

impl Codec {
    /// Stored bytes are the data.
    pub const PLAIN: Self = Self {
        compression: Compression::None,
        encrypted: false,
        fine: false,
    };

    /// The bit that says encrypted.
    const ENCRYPTED: u8 = 0x80;
    /// The bit that says short pages.
    const FINE: u8 = 0x40;

    /// Whether stored bytes are the data.
    pub fn is_plain(self) -> bool {
        self == Self::PLAIN
    }

    /// As it is stored.
    pub fn byte(self) -> u8 {
        let bit = |set: bool, bit: u8| if set { bit } else { 0 };
        self.compression as u8 | bit(self.encrypted, Self::ENCRYPTED) | bit(self.fine, Self::FINE)
    }

    /// Stored bytes of each page but the frame's last.
    pub fn page_bytes(self) -> usize {
        match self.fine {
            true => FINE_PAGE_BYTES,
            false => PAGE_BYTES,
        }
    }
}

/// Stored bytes of each page of the frame that `bytes`, a page's beginning, belongs to, if nothing was changed: what is read with
/// it must be verified. `None`: no page begins here.
pub fn page_bytes_at(bytes: &[u8]) -> Option<usize> {
    let header: &[u8; 3] = bytes.first_chunk()?;
    (header[..2] == PAGE_MAGIC).then(|| match header[2] & Codec::FINE {
        0 => PAGE_BYTES,
        _ => FINE_PAGE_BYTES,
    })
}

impl TryFrom<u8> for Codec {
    type Error = u8;

    fn try_from(byte: u8) -> Result<Self, u8> {
        let compression = match byte & !(Self::ENCRYPTED | Self::FINE) {
            0 => Compression::None,
            1 => Compression::Lz4,
            2 => Compression::Zstd,
            _ => return Err(byte),
        };
        // Plain pages are found without looking at a header, so they have one length.
        if byte == Self::FINE {
            return Err(byte);
        }
        Ok(Self {
            compression,
            encrypted: byte & Self::ENCRYPTED != 0,
            fine: byte & Self::FINE != 0,
        })
    }
}

/// Where a page was first written. Compaction moves a frame but not its identity.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct PageIdentity {
    /// Volume that the segment was built for.
    pub volume: VolumeId,
    /// Segment that the frame was first written to.
    pub segment: SegmentId,
    /// The frame's number there.
    pub frame: FrameNumber,
}

/// Why a page is not the one that was asked for.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PageFault {
    /// Fewer bytes than the page has.
    #[error("ends after {got} of {want} bytes")]
    Truncated {
        /// Bytes that are there.
        got: usize,
        /// Bytes that should be there.
        want: usize,
    },
    /// No page header at this place.
    #[error("no page begins here")]
    NoHeader,
    /// Header or data were changed.
    #[error("checksum is {actual:08x}, should be {expected:08x}")]
    Checksum {
        /// As stored.
        expected: u32,
        /// As computed.
        actual: u32,
    },
    /// A sound page of another place: misdirected, or moved by compaction.
    #[error(
        "holds page {page} of volume {} segment {:?} frame {}",
        identity.volume, identity.segment, identity.frame.0
    )]
    Foreign {
        /// Whose page it is.
        identity: PageIdentity,
        /// And which one.
        page: u32,
    },
    /// Written by a later release.
    #[error("codec {0} is unknown to this release; upgrade the mount")]
    UnknownCodec(u8),
    /// Sound, but its fields contradict each other.
    #[error("a frame of {stored_bytes} bytes has no page {page}")]
    Impossible {
        /// Length of the frame, stored bytes.
        stored_bytes: u32,
        /// Number of the page.
        page: u32,
    },
}

/// One verified page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Page {
    /// The name that it carries, which is the one that was asked for.
    pub identity: PageIdentity,
    /// How the frame is encoded.
    pub codec: Codec,
    /// Stored bytes of the whole frame, page headers not counted.
    pub frame_bytes: u32,
    /// Its stored bytes: [`Codec::page_bytes`], fewer only if it is the frame's last.
    pub data: Bytes,
}

impl PageIdentity {
    /// The header of page `page` of a frame of `stored_bytes`; `data` has digested the page's bytes and nothing else.
    pub fn encode(
        &self,
        codec: Codec,
        page: u32,
        stored_bytes: u32,
        mut data: crc32fast::Hasher,
    ) -> [u8; PAGE_HEADER_BYTES] {
        let mut header = [0; PAGE_HEADER_BYTES];
        header[0..2].copy_from_slice(&PAGE_MAGIC);
        header[2] = codec.byte();
        header[4..8].copy_from_slice(&self.volume.0.to_le_bytes());
        header[8..16].copy_from_slice(&self.segment.0.to_le_bytes());
        header[16..20].copy_from_slice(&self.frame.0.to_le_bytes());
        header[20..24].copy_from_slice(&page.to_le_bytes());
        header[24..28].copy_from_slice(&stored_bytes.to_le_bytes());
        data.update(&header[..28]);
        header[28..32].copy_from_slice(&data.finalize().to_le_bytes());
        header
    }
}

/// What the header of a frame's first page says: whose it is, its codec and its stored bytes. Its checksum is of the whole page:
/// nothing of it may be believed that is not checked in another way. `None`: there is no such header.
pub fn peek(bytes: &[u8]) -> Option<(PageIdentity, Codec, u32)> {
    let header: &[u8; PAGE_HEADER_BYTES] = bytes.first_chunk()?;
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
    let codec = Codec::try_from(header[2]).ok()?;
    let identity = PageIdentity {
        volume: VolumeId(word(4)),
        segment: SegmentId(u64::from(word(12)) << 32 | u64::from(word(8))),
        frame: FrameNumber(word(16)),
    };
    (header[..2] == PAGE_MAGIC && word(20) == 0).then_some((identity, codec, word(24)))
}

/// Takes page `page` of `identity` off the front of `bytes`. Any bytes are allowed; on a fault they are left as they were.
pub fn take_page(bytes: &mut Bytes, identity: &PageIdentity, page: u32) -> Result<Page, PageFault> {
    let Some(header) = bytes.get(..PAGE_HEADER_BYTES) else {
        return Err(PageFault::Truncated {
            got: bytes.len(),
            want: PAGE_HEADER_BYTES,
        });
    };
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
    let (found_page, stored_bytes, expected) = (word(20), word(24), word(28));
    // The length is not trusted before the checksum, but the checksum needs it: bounded, so that a flipped bit costs at most
    // one page of reading, and no frame is longer than this.
    let page_bytes = page_bytes_at(header).ok_or(PageFault::NoHeader)?;
    let begin = u64::from(found_page) * page_bytes as u64;
    if begin >= u64::from(stored_bytes) || u64::from(stored_bytes) > STORED_BYTES_MAX {
        return Err(PageFault::Impossible {
            stored_bytes,
            page: found_page,
        });
    }
    let length = page_bytes.min((u64::from(stored_bytes) - begin) as usize);
    let want = PAGE_HEADER_BYTES + length;
    let Some(data) = bytes.get(PAGE_HEADER_BYTES..want) else {
        return Err(PageFault::Truncated {
            got: bytes.len(),
            want,
        });
    };
    let mut sum = crc32fast::Hasher::new();
    sum.update(data);
    sum.update(&header[..28]);
    let actual = sum.finalize();
    if actual != expected {
        return Err(PageFault::Checksum { expected, actual });
    }
    let found = PageIdentity {
        volume: VolumeId(word(4)),
        segment: SegmentId(u64::from(word(12)) << 32 | u64::from(word(8))),
        frame: FrameNumber(word(16)),
    };
    if found != *identity || found_page != page {
        return Err(PageFault::Foreign {
            identity: found,
            page: found_page,
        });
    }
    // The fourth byte is reserved: a later release that gives it a meaning also gives it a codec number of its own.
    let codec = Codec::try_from(header[2]).map_err(PageFault::UnknownCodec)?;
    let data = bytes.slice(PAGE_HEADER_BYTES..want);
    bytes.advance(want);
    Ok(Page {
        identity: found,
        codec,
        frame_bytes: stored_bytes,
        data,
    })
}

/// Takes pages `first`, `first + 1`, … off the front of `bytes`, at most `count`, fewer when the frame ends before; at least
/// one. On a fault the page that has it is named.
pub fn take_pages(
    bytes: &mut Bytes,
    identity: &PageIdentity,
    first: u32,
    count: u32,
) -> Result<Vec<Page>, (u32, PageFault)> {
    let mut pages = Vec::with_capacity(count.min(1024) as usize);
    for page in first..first.saturating_add(count) {
        let taken = take_page(bytes, identity, page).map_err(|fault| (page, fault))?;
        let end = (u64::from(page) + 1) * taken.codec.page_bytes() as u64;
        let last = end >= u64::from(taken.frame_bytes);
        pages.push(taken);
        if last {
            break;
        }
    }
    Ok(pages)
}

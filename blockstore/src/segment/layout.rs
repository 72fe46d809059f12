//! Sizes and names of places within a segment.

use std::ops::Range;

use heliofs_proto::ids::SegmentId;
use heliofs_proto::limits::FRAME_BYTES_MAX;
use heliofs_proto::v1;

/// Data per page, as memory caches it, and stored bytes per page of a frame without a codec: the unit of checksum. Small enough
/// that a random read of 4 KiB costs little, large enough that the page headers stay below 0.05 %.
pub const PAGE_BYTES: usize = 64 << 10;

/// Stored bytes per page of a frame with a codec, whose pages of data lie across the borders of stored ones: a random read fetches
/// three of these, less than two of [`PAGE_BYTES`]. Frames of earlier releases have pages of [`PAGE_BYTES`].
pub const FINE_PAGE_BYTES: usize = 32 << 10;

/// The header in front of each page.
pub const PAGE_HEADER_BYTES: usize = 32;

/// From the start of one page's header to the next, in frames without a codec.
pub const PAGE_STRIDE: usize = PAGE_HEADER_BYTES + PAGE_BYTES;

/// Frames start at multiples of this, so that 32 bits name a place within 64 GiB.
pub const FRAME_ALIGN: u64 = 16;

/// Stored bytes of a frame at most: encryption and the table of blocks make a frame that does not compress 21 KiB longer.
pub const STORED_BYTES_MAX: u64 = FRAME_BYTES_MAX + (64 << 10);

/// The object's header; the first frame follows it.
pub const HEADER_BYTES: usize = 64;

/// One frame's entry of the footer.
pub const FRAME_ENTRY_BYTES: usize = 32;

/// The last bytes of the object.
pub const TRAILER_BYTES: usize = 48;

const _: () = assert!((PAGE_STRIDE as u64).is_multiple_of(FRAME_ALIGN));
const _: () = assert!((FINE_PAGE_BYTES as u64).is_multiple_of(FRAME_ALIGN));
const _: () = assert!((HEADER_BYTES as u64).is_multiple_of(FRAME_ALIGN));

/// A frame of a segment, as extents name it: the place of its first page header in the object, in units of
/// [`FRAME_ALIGN`] bytes. So a reader computes byte ranges without asking the footer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrameNumber(pub u32);

impl FrameNumber {
    /// Where its first page header begins, bytes from the start of the object.
    pub fn start(self) -> u64 {
        u64::from(self.0) * FRAME_ALIGN
    }

    /// The frame that begins at byte `start`; `None` when it is no multiple of [`FRAME_ALIGN`] or out of range.
    pub fn at(start: u64) -> Option<Self> {
        start
            .is_multiple_of(FRAME_ALIGN)
            .then(|| u32::try_from(start / FRAME_ALIGN).ok())
            .flatten()
            .map(Self)
    }

    /// Where pages `pages` of `page_bytes` each lie in the object if all of them are whole; the frame's last may be shorter.
    pub fn byte_range(self, pages: Range<u32>, page_bytes: usize) -> Range<u64> {
        let stride = (PAGE_HEADER_BYTES + page_bytes) as u64;
        let place = |page: u32| self.start() + u64::from(page) * stride;
        place(pages.start)..place(pages.end)
    }
}

impl From<u32> for FrameNumber {
    fn from(number: u32) -> Self {
        Self(number)
    }
}

/// Bytes `[offset, offset + length)` of a decoded frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FrameRange {
    /// The object.
    pub segment: SegmentId,
    /// The frame within it.
    pub frame: FrameNumber,
    /// First byte within the decoded frame.
    pub offset: u32,
    /// Number of bytes.
    pub length: u32,
}

impl FrameRange {
    /// The part of `extent` that lies in the file range `file`; `None` when they do not intersect, when the extent's bytes are
    /// inline, or when it is no extent of a valid frame.
    pub fn of_extent(extent: &v1::Extent, file: Range<u64>) -> Option<Self> {
        let end = extent.offset.checked_add(extent.length)?;
        let (from, to) = (file.start.max(extent.offset), file.end.min(end));
        if extent.segment == 0 || from >= to {
            return None;
        }
        let offset = u64::from(extent.frame_offset) + (from - extent.offset);
        (offset + (to - from) <= FRAME_BYTES_MAX).then(|| Self {
            segment: SegmentId(extent.segment),
            frame: FrameNumber(extent.frame),
            offset: offset as u32,
            length: (to - from) as u32,
        })
    }

    /// The pages of data that it touches; empty when it has no length.
    pub fn pages(&self) -> Range<u32> {
        if self.length == 0 {
            return 0..0;
        }
        let page = PAGE_BYTES as u64;
        let end = u64::from(self.offset) + u64::from(self.length);
        (u64::from(self.offset) / page) as u32..end.div_ceil(page) as u32
    }
}

/// Bytes that a frame of `stored` bytes in pages of `page_bytes` occupies, page headers included, alignment not.
pub fn frame_extent_bytes(stored: u64, page_bytes: usize) -> u64 {
    stored + stored.div_ceil(page_bytes as u64) * PAGE_HEADER_BYTES as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_an_extent_names_the_right_bytes() {
        let extent = v1::Extent {
            offset: 1000,
            length: 500,
            segment: 7,
            frame: 4,
            frame_offset: 65000,
            ..v1::Extent::default()
        };
        let part = FrameRange::of_extent(&extent, 1100..9999).unwrap();
        assert_eq!((part.offset, part.length), (65100, 400));
        assert_eq!(part.pages(), 0..1);
        let part = FrameRange::of_extent(&extent, 0..u64::MAX).unwrap();
        assert_eq!((part.offset, part.length), (65000, 500));
        assert_eq!(FrameRange::of_extent(&extent, 0..1000), None);
        assert_eq!(FrameRange::of_extent(&extent, 1500..1600), None);
    }

    #[test]
    fn places_of_frames_are_multiples_of_the_alignment() {
        assert_eq!(FrameNumber::at(64), Some(FrameNumber(4)));
        assert_eq!(FrameNumber::at(65), None);
        assert_eq!(FrameNumber::at(u64::from(u32::MAX) * 16 + 16), None);
        assert_eq!(
            FrameNumber(4).byte_range(1..2, PAGE_BYTES),
            64 + 65568..64 + 2 * 65568
        );
        assert_eq!(
            FrameNumber(4).byte_range(1..2, FINE_PAGE_BYTES),
            64 + 32800..64 + 2 * 32800
        );
    }
}

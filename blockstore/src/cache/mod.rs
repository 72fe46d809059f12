//! The cache tiers in front of the bucket.
//!
//! - [`memory`]: pages, by bytes
//! - [`disk`]: runs of pages as they lie in the object, verified whenever they are read, kept over a restart
//! - [`disks`]: several of them as one
//! - `disk_file`: one file of the disk tier
//! - `two_lists`: what both tiers evict first; one scan does not drive out what is used often

pub mod disk;
mod disk_file;
pub mod disks;
pub mod memory;
mod two_lists;

use heliofs_proto::ids::SegmentId;

use crate::FrameNumber;

/// Names a page: what the tiers hold. Segments are immutable, so an entry is never stale.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PageKey {
    /// The object.
    pub segment: SegmentId,
    /// The frame in it.
    pub frame: FrameNumber,
    /// The page of the frame.
    pub page: u32,
}

//! The immutable object format: header, frames of checksummed pages, footer. Pure; docs/FORMAT.md holds the byte maps.
//!
//! - [`layout`]: sizes, magics, and the names of places ([`FrameNumber`], [`FrameRange`])
//! - [`page`]: the header in front of each page, and its verification
//! - [`codec`]: compression and encryption of frames
//! - [`build`]: [`SegmentBuilder`] and [`EncodedSegment`]
//! - [`object`]: header and footer of the object, and the check of a whole one

pub mod build;
pub mod codec;
pub mod layout;
pub mod object;
pub mod page;

pub use build::{EncodedSegment, SegmentBuilder};
pub use layout::{FrameNumber, FrameRange};

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

//! Segments, object stores and cache tiers: how a file's bytes get into a bucket and back, verified.
//!
//! - [`segment`]: the immutable object format (docs/FORMAT.md holds the byte maps); pure
//! - [`keys`]: the key of an encrypted volume
//! - [`object`]: buckets behind one interface, with retries, time-outs and errors that say what to do
//! - [`store`]: [`SegmentStore`], which puts, reads and deletes segments through the cache tiers
//! - [`cache`]: the memory tier and the disk tier that survives a restart
//! - [`read`]: the read-ahead window (pure)
//! - `layers`: decorators of object stores; the failing one drives the tests
//! - [`metrics`]: what is counted
//!
//! A write: [`SegmentBuilder::add_frame`] per piece of data, [`SegmentBuilder::finish`], [`SegmentStore::put`], then the caller
//! commits extents that name (segment, frame, offset). A read: [`SegmentStore::read`] of such a range.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cache;
pub mod error;
pub mod keys;
#[cfg(any(test, feature = "failing"))]
pub mod layers;
pub mod metrics;
pub mod object;
pub mod read;
pub mod segment;
pub mod store;

pub use error::{Kind, StoreError};
pub use keys::{AgeKey, KeyOpener, Passphrase, RsaKey, VolumeKey};
pub use object::Bucket;
pub use read::window::{ReadAhead, ReadAheadOptions};
pub use segment::{EncodedSegment, FrameNumber, FrameRange, SegmentBuilder};
pub use store::options::{DiskCacheOptions, StoreOptions};
pub use store::{CopyNews, SegmentStore};

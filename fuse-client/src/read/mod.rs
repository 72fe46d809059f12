//! The read path.
//!
//! - [`extents`]: what is known of a file's extents (pure)
//! - [`gather`]: a read's bytes from buffer, metadata and bucket

pub mod extents;
pub mod gather;

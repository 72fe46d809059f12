//! What to read ahead.
//!
//! - [`window`]: the window of one open file; pure

pub mod window;

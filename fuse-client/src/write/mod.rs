//! The write path: buffered bytes, uploads, commits.
//!
//! - [`pieces`]: uncommitted bytes of one file (pure)
//! - [`budget`]: how much of them all files together may hold
//! - [`segment_ids`]: names for new segments
//! - [`upload`]: bytes into the bucket; [`pack`]: small ones of all files together
//! - [`staging`]: the folder on local disk of a mount with writeback; [`stage`]: into it, [`resume`]: out of it after a crash
//! - [`stored`]: segments that no commit has named yet
//! - [`flush`]: uploads what is left and commits everything in order
//! - [`flusher`]: what flushes by age and under pressure

pub mod budget;
pub(crate) mod conflict;
pub mod flush;
pub mod flusher;
pub mod pack;
pub mod pieces;
pub mod resume;
pub mod segment_ids;
pub mod stage;
pub mod staging;
pub mod stored;
pub mod upload;

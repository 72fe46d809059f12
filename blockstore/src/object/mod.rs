//! Buckets behind one interface: durable puts, ranged gets, deletes, with bounded retries and errors that say what to do.
//!
//! - [`backend`]: opens `file`, `s3` and `memory` from a `StorageConfig`
//! - [`s3`]: bucket URLs, and what only S3 has (create a bucket)
//! - [`bucket`]: [`Bucket`], the operations on one volume's objects
//! - [`marker`]: the object that says whose prefix this is
//! - [`register`]: [`Register`], an object that is changed by conditional puts only
//! - [`plain`]: [`PlainBucket`], objects under their own keys, whoever wrote them; [`listing`]: their names in order
//! - `link`: how much the way to it holds
//! - [`fault`]: what an error of `object_store` means; [`attempts`]: when it is tried again; [`rate`]: limits

mod attempts;
pub mod backend;
pub mod bucket;
pub mod fault;
mod link;
mod listing;
pub mod marker;
pub mod plain;
mod rate;
pub mod register;
pub mod s3;

pub use backend::create_bucket;
pub use bucket::Bucket;
pub use listing::From;
pub use plain::{PlainBucket, PlainObject};
pub use rate::RateLimit;
pub use register::{Register, Written};

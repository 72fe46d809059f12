//! Mirror regions: what a source commits is replayed into a cluster of its own, elsewhere.
//!
//! - [`target`]: what the mirror's own cluster must offer; its server does
//! - [`supervise`]: while this node leads, one follower per mirrored volume
//! - [`follow`]: one volume: slot, load if needed, then entry after entry; [`bootstrap`]: the load; [`report`]: how far it is,
//!   said to the source
//! - [`fence`]: the marker that names who may write a volume: kept, and taken over
//! - [`copy`]: objects into the region's own bucket, in a mount or a worker; `repack`: what compaction wrote, from what it was
//!   made of
//! - [`check`]: both buckets against the records, now and then
//! - [`plan`]: frames of the changelog to proposals, pure; [`lag`]: how old what is applied is, pure

pub mod bootstrap;
pub mod check;
pub mod copy;
pub mod fence;
pub mod follow;
pub mod lag;
mod overruns;
pub mod plan;
mod repack;
pub mod report;
pub mod supervise;
pub mod target;

pub use supervise::{MirrorConfig, Supervisor};
pub use target::{Answered, Standing, Target, TargetError};

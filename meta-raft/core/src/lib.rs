//! The deterministic file-system state machine of heliofs.
//!
//! [`apply`] takes a [`View`] of the records, the proposer's time and a command, and says what the reply is and which records
//! change. It has no clock, no chance, no I/O and no threads: the same view, stamp and command give the same result on every
//! node, in every mirror and in every test.
//!
//! - [`keys`]: the layout of keys; [`records`]: what lies under them
//! - [`mod@apply`]: control flow of one command; `ops/<op>.rs`: what each command does
//! - [`query`]: what clients and drivers read
//! - [`view`]: the reads that ops need, and [`view::Overlay`], changes on top of a view
//! - [`digest`]: the sums that replicas and mirrors compare

pub mod apply;
pub mod change;
pub mod codec;
pub mod digest;
pub mod invariants;
pub mod keys;
pub mod limits;
mod ops;
pub mod query;
pub mod records;
pub mod trash {
    //! How the trash names things.
    pub use crate::ops::trash::{NAME, hour_name};
}
mod txn;
pub mod view;

pub use apply::{Applied, Stamp, apply, next_position};
pub use change::{Change, Corruption, Touched};
pub use digest::Sums;
pub use view::{Overlay, View};

//! What programs did and saw while nodes were killed, frozen and cut off, recorded as Jepsen records it, and whether it could
//! have been so.
//!
//! - [`history`]: the record: one JSON line per event, written as it happens, so that it is there after a crash
//! - [`prefix`]: whether readers of a mirror saw a prefix of one writer's history, never going back
//!
//! Real processes and their faults are `heliofs/tests/support`; `heliofs/tests/mirror_chaos.rs` brings both together.

pub mod history;
pub mod prefix;

pub use history::{Event, History, Kind, Op, Recorder};

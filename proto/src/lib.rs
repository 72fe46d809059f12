//! Wire types and services of heliofs, and the ids and error codes that every part shares.
//!
//! - [`ids`]: a newtype for every id, and positions
//! - [`error`]: verdicts of the file system and how they map to errno
//! - [`limits`]: bounds that both ends of a connection rely on
//! - [`packing`]: streams of frames, compressed
//! - [`v1`]: messages and services, generated from `proto/heliofs/v1/*.proto`

pub mod error;
pub mod ids;
pub mod limits;
pub mod packing;

/// Messages and services of wire version 1, generated from the `.proto` files; their comments are the documentation.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]
pub mod v1 {
    tonic::include_proto!("heliofs.v1");
}

impl v1::MirrorOf {
    /// Whether the volume was written here and handed over to [`v1::MirrorOf::source`]. Nodes of earlier releases do not note
    /// that; but what is loaded from a source always has a slot there.
    pub fn was_handed_over(&self) -> bool {
        let demoted = self.state() == v1::MirrorState::Stopped && self.slot.is_empty();
        self.handed_over || demoted && !self.source.is_empty()
    }
}

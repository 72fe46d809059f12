//! Between regions nobody decides by a majority. A marker in a third bucket does: it names the epoch and the cluster that may
//! write a volume, and is changed by conditional puts alone.
//!
//! The writer's leader renews it ([`keep`]) and acknowledges nothing later than one lease after it *began* the last renewal
//! that succeeded, by its own monotonic clock. Who takes it over by force ([`take`]) watches it for one lease and a bit, by its
//! own monotonic clock, counted from when it *has read* it; a renewal in between starts the watch anew, and the put over the
//! version that was watched fails if there was one. So the two clocks need not agree on anything but how long a lease is, to
//! within [`take::DRIFT`].
//!
//! - [`marker`]: what it says, and what follows from that; pure

pub mod keep;
pub mod marker;
pub mod take;

use std::time::Duration;

use blockstore::StoreError;
use blockstore::object::Register;
use heliofs_proto::v1;

pub use keep::Keeper;
pub use marker::Marker;
pub use take::{How, TakeError, Taken, claim, give_up, holder, take_over};

/// The marker's name below the volume's prefix.
pub const NAME: &str = ".heliofs-fence";

/// A renewal that is slow may still be in time.
const TURNS_PER_LEASE: u32 = 5;

/// Opens the marker of a volume; each request may take a third of a lease.
///
/// Errors: `Invalid`.
pub fn open(fence: &v1::FenceStore, prefix: &str) -> Result<Register, StoreError> {
    let store = fence.store.clone().unwrap_or_default();
    Register::open(&store, prefix, NAME, lease(fence) / 3)
}

/// How long a renewal holds.
pub fn lease(fence: &v1::FenceStore) -> Duration {
    Duration::from_millis(fence.lease_ms.into())
}

/// The prefix of a volume's objects, wherever they are.
pub fn prefix(volume: &v1::Volume) -> &str {
    match &volume.mirror {
        Some(mirror) => &mirror.prefix,
        None if volume.prefix.is_empty() => &volume.name,
        None => &volume.prefix,
    }
}

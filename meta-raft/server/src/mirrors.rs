//! What the followers of mirrored volumes say of themselves: written by whoever follows, shown by `heliofs mirror status`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use heliofs_proto::ids::VolumeId;
use heliofs_proto::v1;
use parking_lot::Mutex;

use crate::replay_holds::ReplayHolds;

/// The last word of each follower on this node, and when it was said; cheap to clone.
#[derive(Clone, Default)]
pub struct MirrorBoard {
    told: Arc<Mutex<BTreeMap<VolumeId, (v1::MirrorStatus, Instant)>>>,
    holds: ReplayHolds,
}

impl MirrorBoard {
    /// A follower says how it is.
    pub fn publish(&self, status: v1::MirrorStatus) {
        let volume = VolumeId(status.volume);
        self.told.lock().insert(volume, (status, Instant::now()));
    }

    /// What was said of a volume. Lag and silence have grown since it was said.
    pub fn status(&self, volume: VolumeId) -> Option<v1::MirrorStatus> {
        let told = self.told.lock();
        let (status, at) = told.get(&volume)?;
        let since = u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
        Some(v1::MirrorStatus {
            lag_ms: status.lag_ms.saturating_add(since),
            contact_ms: status.contact_ms.map(|ms| ms.saturating_add(since)),
            ..status.clone()
        })
    }

    /// Where followers on this node must stop for a moment.
    pub fn holds(&self) -> &ReplayHolds {
        &self.holds
    }

    /// This node leads no more: what it knows grows old.
    pub fn clear(&self) {
        self.told.lock().clear();
    }
}

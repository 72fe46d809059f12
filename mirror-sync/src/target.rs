//! The mirror's own cluster, as a follower on its leader sees it.

use async_trait::async_trait;
use heliofs_proto::ids::{Position, UnixNanos, VolumeId};
use heliofs_proto::v1;

/// Why a proposal has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Another node leads: whatever is to be done, it does it.
    #[error("this node does not lead the mirror any more")]
    NotLeader,
    /// The proposal may take effect or not.
    #[error("the outcome of a proposal is not known: the lead may have been lost")]
    Unknown,
    /// The node has stopped.
    #[error("the mirror's node has stopped: {0}")]
    Stopped(String),
}

/// What applying a proposal answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answered {
    /// Done.
    Done,
    /// The volume is at this position.
    Replayed(Position),
    /// This load has begun.
    Load(u64),
    /// Another volume, of this id, has the name.
    NameTaken(VolumeId),
    /// It makes no sense as things are; why.
    Refused(String),
}

/// How the marker of a volume stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It names this cluster, and nobody else can have taken it before this moment, by both clocks.
    Held {
        /// By the monotonic clock.
        until: std::time::Instant,
        /// By the wall clock, which goes on while the machine is suspended.
        until_wall: std::time::SystemTime,
    },
    /// It can't be renewed; why.
    Lapsed(String),
    /// It names another cluster, under a higher epoch.
    Lost(String),
}

/// The cluster that a volume is mirrored into, or that writes volumes which are fenced. Everything but [`Target::propose`] answers at once, from this node.
#[async_trait]
pub trait Target: Send + Sync + 'static {
    /// Waits until this node leads.
    async fn leads(&self);

    /// Waits until this node does not lead.
    async fn deposed(&self);

    /// The id of the cluster; `None`: it was not formed.
    fn cluster_id(&self) -> Option<u32>;

    /// The volumes that are mirrors.
    fn mirrors(&self) -> Vec<v1::Volume>;

    /// The volumes that are written here and have a fence store, with its keys.
    fn fenced(&self) -> Vec<v1::Volume>;

    /// Says how the marker of a volume stands; `None`: this node keeps it no more.
    fn stand(&self, volume: VolumeId, standing: Option<Standing>);

    /// Addresses of the cluster's nodes.
    fn members(&self) -> Vec<String>;

    /// META-URL of the cluster.
    fn url(&self) -> String;

    /// Whether a volume of this name is written here: a promoted mirror is.
    fn owns(&self, name: &str) -> bool;

    /// How far a volume is, and its time there.
    fn head(&self, volume: VolumeId) -> Option<(Position, UnixNanos)>;

    /// The greatest position all of whose objects are in this region's bucket; with one bucket for both regions, how far it is.
    fn complete(&self, volume: VolumeId) -> Position;

    /// The first position at which a digest of the source did not agree.
    fn diverged(&self, volume: VolumeId) -> Option<Position>;

    /// Logs, commits and applies. The order of calls is the order in the log.
    async fn propose(&self, item: v1::log_item::Item) -> Result<Answered, TargetError>;

    /// Shows how a follower is.
    fn publish(&self, status: v1::MirrorStatus);
}

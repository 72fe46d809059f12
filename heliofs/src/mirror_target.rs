//! A metadata node as what a mirror is replayed into.

use std::sync::Arc;

use async_trait::async_trait;
use heliofs_proto::ids::{Position, UnixNanos, VolumeId};
use heliofs_proto::v1;
use meta_server::NodeContext;
use meta_server::fence;
use meta_server::proposer::{LocalReply, ProposeError, Proposed};
use mirror_sync::{Answered, Standing, Target, TargetError};

/// The node.
pub(crate) struct NodeTarget(pub(crate) Arc<NodeContext>);

impl NodeTarget {
    /// Waits until this node leads, or until it does not.
    async fn leading(&self, wanted: bool) {
        let mut leadership = self.0.leadership.clone();
        if leadership
            .wait_for(|now| now.leading().is_some() == wanted)
            .await
            .is_err()
            && wanted
        {
            // The node has stopped: it never will.
            std::future::pending::<()>().await;
        }
    }
}

#[async_trait]
impl Target for NodeTarget {
    async fn leads(&self) {
        self.leading(true).await;
        // What earlier leaders logged must be applied before anybody looks how far a volume is.
        while let Err(error) = self.0.reads.linearizable().await {
            tracing::debug!(%error, "a new leader can't read yet");
            if self.0.leadership.borrow().leading().is_none() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    async fn deposed(&self) {
        self.leading(false).await;
        self.0.mirrors.clear();
        self.0.fences.end();
    }

    fn cluster_id(&self) -> Option<u32> {
        self.0.state.cluster_id().map(|id| id.0)
    }

    fn mirrors(&self) -> Vec<v1::Volume> {
        let mut volumes = self.0.state.volumes();
        volumes.retain(|volume| volume.mirror.is_some());
        volumes
    }

    fn fenced(&self) -> Vec<v1::Volume> {
        let mut volumes = self.0.state.volumes();
        volumes.retain(|volume| volume.mirror.is_none() && volume.fence.is_some());
        volumes
    }

    fn stand(&self, volume: VolumeId, standing: Option<Standing>) {
        let fences = &self.0.fences;
        match standing {
            Some(Standing::Held { until, until_wall }) => {
                fences.set(volume, fence::Standing::Held { until, until_wall });
            }
            Some(Standing::Lapsed(why)) => fences.set(volume, fence::Standing::Lapsed(why)),
            Some(Standing::Lost(why)) => fences.set(volume, fence::Standing::Lost(why)),
            None => fences.forget(volume),
        }
    }

    fn members(&self) -> Vec<String> {
        let members = self.0.raft.members();
        members.into_iter().map(|peer| peer.address).collect()
    }

    fn url(&self) -> String {
        format!("helio://{}", self.members().join(","))
    }

    fn owns(&self, name: &str) -> bool {
        let volume = self.0.state.volume_named(name);
        volume.is_some_and(|volume| volume.mirror.is_none())
    }

    fn head(&self, volume: VolumeId) -> Option<(Position, UnixNanos)> {
        self.0.state.head(volume)
    }

    fn complete(&self, volume: VolumeId) -> Position {
        self.0.state.complete(volume).unwrap_or_else(|error| {
            tracing::warn!(%volume, %error, "what the bucket lacks can't be read");
            Position::START
        })
    }

    fn diverged(&self, volume: VolumeId) -> Option<Position> {
        self.0.state.diverged(volume)
    }

    async fn propose(&self, item: v1::log_item::Item) -> Result<Answered, TargetError> {
        let answer = self.0.proposer.propose(item).await;
        let answer = answer.map_err(|error| match error {
            ProposeError::NotLeader { .. } => TargetError::NotLeader,
            ProposeError::Unknown | ProposeError::Fenced(_) => TargetError::Unknown,
            ProposeError::Fatal(why) => TargetError::Stopped(why),
        })?;
        Ok(match answer {
            Proposed::Local(LocalReply::Done) => Answered::Done,
            Proposed::Local(LocalReply::Replayed(position)) => Answered::Replayed(position),
            Proposed::Local(LocalReply::Load(load)) => Answered::Load(load),
            Proposed::Local(LocalReply::VolumeExists(volume)) => Answered::NameTaken(volume),
            Proposed::Local(LocalReply::Invalid(why)) => Answered::Refused(why),
            Proposed::Local(LocalReply::NoSuchVolume) => {
                Answered::Refused("the volume is gone from the mirror".to_owned())
            }
            other => Answered::Refused(format!("unexpected answer {other:?}")),
        })
    }

    fn publish(&self, status: v1::MirrorStatus) {
        self.0.mirrors.publish(status);
    }
}

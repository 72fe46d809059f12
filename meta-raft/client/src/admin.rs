//! Calls for operators: status, membership, volumes. All need the cluster token only, no session.

use std::time::{Duration, Instant};

use futures::future::join_all;
use heliofs_proto::ids::{NodeId, VolumeId};
use heliofs_proto::v1;

use crate::cluster::{Answer, Cluster};
use crate::error::ClusterError;

/// Compacting reads and writes everything a node has.
const COMPACT_WAIT: Duration = Duration::from_secs(3600);

/// A node that is added and takes nothing for this long needs somebody to look at it. A snapshot, which counts when it is
/// installed, may take ten minutes.
const JOIN_STALLED: Duration = Duration::from_secs(900);

/// What a single attempt at `peer` failed of.
fn unanswered(peer: &str, answer: Answer) -> ClusterError {
    match answer {
        Answer::Refused(error) => error,
        Answer::Elsewhere(_, detail) | Answer::Unreachable(detail) | Answer::Broken(detail) => {
            ClusterError::NoNode {
                peers: peer.to_owned(),
                detail,
            }
        }
    }
}

macro_rules! call {
    ($self:expr, $method:ident, mutates = $mutates:literal, $body:expr) => {{
        let body = $body;
        $self
            .call(stringify!($method), $mutates, |mut client| {
                let request = $self.request(body.clone());
                async move { client.$method(request).await }
            })
            .await
    }};
}
pub(crate) use call;

impl Cluster {
    /// Status as the first node that answers sees it.
    pub async fn status(&self) -> Result<v1::StatusResponse, ClusterError> {
        call!(self, status, mutates = false, v1::StatusRequest {})
    }

    /// Status of one node, "host:port", in one attempt.
    pub async fn status_of(&self, peer: &str) -> Result<v1::StatusResponse, ClusterError> {
        let request = self.request(v1::StatusRequest {});
        let call = |mut client: v1::admin_client::AdminClient<_>| async move {
            client.status(request).await
        };
        self.call_peer(peer, call)
            .await
            .map_err(|answer| unanswered(peer, answer))
    }

    /// Status of every node, those included that only the cluster itself knows of: (address, status or why there is none).
    pub async fn status_all(&self) -> Vec<(String, Result<v1::StatusResponse, ClusterError>)> {
        self.status_all_within(Duration::MAX).await
    }

    /// As [`Self::status_all`]; a node that takes longer than `within` has no status.
    pub async fn status_all_within(
        &self,
        within: Duration,
    ) -> Vec<(String, Result<v1::StatusResponse, ClusterError>)> {
        let ask = |peers: Vec<String>| {
            join_all(peers.into_iter().map(|peer| async move {
                let status = tokio::time::timeout(within, self.status_of(&peer)).await;
                let status = status.unwrap_or_else(|_| {
                    Err(ClusterError::NoNode {
                        peers: peer.clone(),
                        detail: format!("no answer within {within:?}"),
                    })
                });
                (peer, status)
            }))
        };
        let mut all = ask(self.peers()).await;
        let mut more: Vec<String> = Vec::new();
        // A node is the same under another name when its id was already heard.
        let heard: Vec<u64> = all
            .iter()
            .filter_map(|(_, status)| Some(status.as_ref().ok()?.node))
            .collect();
        for (_, status) in &all {
            let Ok(status) = status else { continue };
            for node in &status.nodes {
                let known = all.iter().any(|(peer, _)| *peer == node.address);
                if !known && !heard.contains(&node.node) && !more.contains(&node.address) {
                    more.push(node.address.clone());
                }
            }
        }
        all.extend(ask(more).await);
        all
    }

    /// The core level that all nodes know: a higher one would stop those that do not. 1 while a node can't be asked.
    pub async fn core_level_of_all(&self) -> u32 {
        let all = self.status_all().await.into_iter();
        all.map(|(_, status)| status.map_or(1, |status| status.core_level_max.max(1)))
            .min()
            .unwrap_or(1)
    }

    /// Forms a cluster of the one node at the first peer; returns the cluster's id. Further nodes are added.
    pub async fn init_cluster(&self) -> Result<u32, ClusterError> {
        let reply = call!(
            self,
            init_cluster,
            mutates = true,
            v1::InitClusterRequest {}
        )?;
        Ok(reply.cluster_id)
    }

    /// Adds a node: as a learner, which catches up, then as a voter. `told`: how many entries of the log it lacks, now and then.
    ///
    /// Errors: `Invalid` when it takes nothing for a quarter of an hour; repeating it continues.
    pub async fn add_node(
        &self,
        node: NodeId,
        address: &str,
        mut told: impl FnMut(u64),
    ) -> Result<(), ClusterError> {
        let mut least = (u64::MAX, Instant::now());
        loop {
            let body = v1::AddNodeRequest {
                node: node.0,
                address: address.to_owned(),
            };
            let behind = call!(self, add_node, mutates = false, body)?.behind;
            if behind == 0 {
                return Ok(());
            }
            told(behind);
            if behind < least.0 {
                least = (behind, Instant::now());
            } else if least.1.elapsed() > JOIN_STALLED {
                return Err(ClusterError::Invalid(format!(
                    "node {} is a learner and {behind} entries behind, and has taken nothing for {JOIN_STALLED:?}: look at its log, \
                     then repeat this command, which continues",
                    node.0
                )));
            }
        }
    }

    /// Removes a node; its id is never used again.
    pub async fn remove_node(&self, node: NodeId) -> Result<(), ClusterError> {
        let body = v1::RemoveNodeRequest { node: node.0 };
        call!(self, remove_node, mutates = true, body).map(drop)
    }

    /// Makes a voter the leader.
    pub async fn transfer(&self, to: NodeId) -> Result<(), ClusterError> {
        let body = v1::TransferRequest { to: to.0 };
        let done: Result<(), _> = call!(self, transfer, mutates = true, body).map(drop);
        self.learn_leader(None);
        done
    }

    /// Takes a snapshot on the first node that answers; returns the log index that it covers.
    pub async fn snapshot(&self) -> Result<u64, ClusterError> {
        let taken = call!(self, snapshot, mutates = false, v1::SnapshotRequest {})?;
        Ok(taken.applied_index)
    }

    /// Flushes and compacts the state of the node at `peer`; returns which node that is and the bytes of its tables afterwards.
    /// `Unknown` if it takes longer than an attempt may: it goes on nevertheless.
    pub async fn compact(&self, peer: &str) -> Result<v1::Compacted, ClusterError> {
        let request = self.request(v1::CompactRequest {});
        let call = |mut client: v1::admin_client::AdminClient<_>| async move {
            client.compact(request).await
        };
        self.call_peer_within(peer, COMPACT_WAIT, call)
            .await
            .map_err(|answer| match answer {
                Answer::Broken(detail) => ClusterError::Unknown {
                    peer: peer.to_owned(),
                    call: "compact",
                    detail,
                },
                answer => unanswered(peer, answer),
            })
    }

    /// Creates a volume. `Invalid` when the name is taken.
    pub async fn create_volume(
        &self,
        volume: v1::VolumeCreate,
    ) -> Result<v1::Volume, ClusterError> {
        call!(self, create_volume, mutates = true, volume)
    }

    /// Changes a volume's settings, storage keys, or both; what is `None` stays.
    pub async fn update_volume(
        &self,
        update: v1::UpdateVolumeRequest,
    ) -> Result<v1::Volume, ClusterError> {
        call!(self, update_volume, mutates = true, update)
    }

    /// Removes a volume's metadata for good; its bucket is not touched.
    pub async fn destroy_volume(&self, volume: VolumeId) -> Result<(), ClusterError> {
        let body = v1::VolumeDestroy { volume: volume.0 };
        call!(self, destroy_volume, mutates = true, body).map(drop)
    }

    /// All volumes, without secrets.
    pub async fn list_volumes(&self) -> Result<Vec<v1::Volume>, ClusterError> {
        let reply = call!(
            self,
            list_volumes,
            mutates = false,
            v1::ListVolumesRequest {}
        )?;
        Ok(reply.volumes)
    }

    /// One volume, with the secrets of its storage. `NotFound` when there is none of that name.
    pub async fn get_volume(&self, name: &str) -> Result<v1::Volume, ClusterError> {
        let body = v1::GetVolumeRequest {
            name: name.to_owned(),
        };
        call!(self, get_volume, mutates = false, body)
    }

    /// Position and digest sums of a volume as the node at `peer` has them, in one attempt.
    pub async fn digest_of(
        &self,
        peer: &str,
        volume: VolumeId,
    ) -> Result<v1::DigestResponse, ClusterError> {
        let request = self.request(v1::DigestRequest { volume: volume.0 });
        let call = |mut client: v1::admin_client::AdminClient<_>| async move {
            client.digest(request).await
        };
        self.call_peer(peer, call)
            .await
            .map_err(|answer| unanswered(peer, answer))
    }
}

//! Forms, grows and shrinks the cluster, moves its leader, tells how it is.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use heliofs_proto::ids::{ClusterId, NodeId};
use heliofs_proto::v1::admin_client::AdminClient;
use heliofs_proto::v1::{self, local_command::Op, log_item::Item};
use meta_core::limits::{CORE_LEVEL_MAX, core_level_known};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, InitializeError, RaftError};
use openraft::{ChangeMembers, Instant, ServerState};
use tokio::sync::watch;

use super::network::Dialer;
use super::types::{Raft, RaftPeer, TypeConfig};
use super::wire;
use crate::auth::TokenBearer;
use crate::leadership::{Leadership, Peer};
use crate::proposer::{LocalReply, ProposeError, Proposed, Proposer, forwarded};
use crate::store::identity::Identity;
use crate::store::{LogStore, State};

/// Electing a leader among healthy nodes takes far less.
const LEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// A call that adds a node waits this long for it to catch up before it tells how far that is.
const JOIN_WAIT: Duration = Duration::from_secs(2);
/// One that lacks so few entries gets them while it becomes a voter.
const CAUGHT_UP: u64 = 1000;
/// A flush and a checkpoint.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(120);

/// Why an administrative request failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AdminError {
    /// Only the leader can do this.
    #[error("this node is not the leader")]
    NotLeader {
        /// Who leads, when known.
        leader: Option<Peer>,
    },
    /// The request makes no sense in the cluster's present state.
    #[error("{0}")]
    Refused(String),
    /// Another node or a quorum did not answer; the change may still take effect.
    #[error("{0}")]
    Unavailable(String),
}

/// How far a node is that is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joining {
    /// It is a voter.
    Votes,
    /// It gets what it lacks.
    CatchingUp {
        /// Entries of the log.
        behind: u64,
    },
}

/// Operations on the cluster; cheap to clone.
#[derive(Clone)]
pub struct RaftAdmin {
    pub(crate) raft: Raft,
    pub(crate) proposer: Proposer,
    pub(crate) dialer: Dialer,
    pub(crate) token: TokenBearer,
    pub(crate) identity: Identity,
    pub(crate) address: String,
    pub(crate) state: State,
    pub(crate) log: LogStore,
    pub(crate) leadership: watch::Receiver<Leadership>,
}

fn unavailable(error: impl std::fmt::Display) -> AdminError {
    AdminError::Unavailable(error.to_string())
}

impl From<ProposeError> for AdminError {
    fn from(error: ProposeError) -> Self {
        match error {
            ProposeError::NotLeader { leader } => Self::NotLeader { leader },
            ProposeError::Unknown | ProposeError::Fatal(_) | ProposeError::Fenced(_) => {
                unavailable(error)
            }
        }
    }
}

fn write_error(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> AdminError {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => AdminError::NotLeader {
            leader: forwarded(forward),
        },
        RaftError::APIError(
            error @ (ClientWriteError::ChangeMembershipError(_)
            | ClientWriteError::PreconditionFailed(_)),
        ) => AdminError::Refused(error.to_string()),
        error @ (RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))
        | RaftError::Fatal(_)) => unavailable(error),
    }
}

impl RaftAdmin {
    /// Forms a cluster of this node alone and gives it an id. Repeating a half-done init completes it.
    pub async fn init(&self) -> Result<ClusterId, AdminError> {
        let peer = RaftPeer {
            address: self.address.clone(),
            store: self.identity.store,
        };
        let members = BTreeMap::from([(self.identity.node, peer)]);
        match self.raft.initialize(members).await {
            Ok(()) => {}
            Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {
                if let Some(cluster) = self.state.cluster_id() {
                    return Err(AdminError::Refused(format!(
                        "this node is already part of cluster {cluster}"
                    )));
                }
            }
            Err(error) => return Err(unavailable(error)),
        }
        self.raft
            .wait(Some(LEADER_TIMEOUT))
            .current_leader(self.identity.node, "formed")
            .await
            .map_err(unavailable)?;
        // Session ids are made of it, so it must not be 0 nor that of another cluster.
        let cluster_id = rand::random::<u32>().max(1);
        let command = v1::LocalCommand {
            op: Some(Op::ClusterInit(v1::ClusterInit { cluster_id })),
        };
        match self.proposer.propose(Item::Local(command)).await? {
            Proposed::Local(LocalReply::Cluster(cluster)) => Ok(cluster),
            other => Err(unavailable(format!("unexpected answer {other:?}"))),
        }
    }

    fn member(&self, id: u64) -> Option<(RaftPeer, bool)> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let membership = &metrics.membership_config;
        let peer = membership.get_node(&id)?.clone();
        let voter = membership.voter_ids().any(|voter| voter == id);
        Some((peer, voter))
    }

    fn must_lead(&self) -> Result<(), AdminError> {
        let leadership = self.leadership.borrow();
        match leadership.leading() {
            Some(_) => Ok(()),
            None => Err(AdminError::NotLeader {
                leader: leadership.other_leader().cloned(),
            }),
        }
    }

    /// Adds the node at `address` (`host:port`): it becomes a learner, catches up, and then votes. Repeating it continues, and is
    /// needed until it votes.
    pub async fn add_node(&self, id: NodeId, address: &str) -> Result<Joining, AdminError> {
        self.must_lead()?;
        let found = self.ask(address).await?;
        if found.node != id.0 {
            return Err(AdminError::Refused(format!(
                "at {address} is node {}, not node {id}",
                found.node
            )));
        }
        let store = wire::store_from_wire(&found.store_uuid).map_err(unavailable)?;
        let mine = self.state.cluster_id();
        if found.cluster_id != 0 && Some(ClusterId(found.cluster_id)) != mine {
            return Err(AdminError::Refused(format!(
                "the node at {address} belongs to another cluster, {}",
                found.cluster_id
            )));
        }
        self.add_known_node(id, address, store).await
    }

    /// As [`RaftAdmin::add_node`], without asking the node which disk it has.
    pub async fn add_known_node(
        &self,
        id: NodeId,
        address: &str,
        store: [u8; 16],
    ) -> Result<Joining, AdminError> {
        self.must_lead()?;
        let peer = RaftPeer {
            address: address.to_owned(),
            store,
        };
        match self.member(id.0) {
            Some((known, _)) if known.store != store => {
                return Err(AdminError::Refused(format!(
                    "node {id} is bound to another disk: what that disk promised is lost with it, so an id is never used again; \
                     remove node {id} and add this one under a new id"
                )));
            }
            Some((known, _)) if known.address != address => {
                return Err(AdminError::Refused(format!(
                    "node {id} is a member already, at {}",
                    known.address
                )));
            }
            Some((_, true)) => return Ok(Joining::Votes),
            Some((_, false)) => {}
            None => {
                self.raft
                    .add_learner(id.0, peer, false)
                    .await
                    .map_err(write_error)?;
            }
        }
        let until = tokio::time::Instant::now() + JOIN_WAIT;
        let mut metrics = self.raft.metrics();
        loop {
            let behind = self.behind(id.0);
            if behind <= CAUGHT_UP {
                break;
            }
            match tokio::time::timeout_at(until, metrics.changed()).await {
                Ok(changed) => changed.map_err(unavailable)?,
                Err(_) => return Ok(Joining::CatchingUp { behind }),
            }
        }
        // In a task: of a caller that hangs up half-way a joint configuration would be left.
        let raft = self.raft.clone();
        let voters = ChangeMembers::AddVoterIds(BTreeSet::from([id.0]));
        tokio::spawn(async move { raft.change_membership(voters, true).await })
            .await
            .map_err(unavailable)?
            .map_err(write_error)?;
        Ok(Joining::Votes)
    }

    /// Entries of the leader's log that a member lacks.
    fn behind(&self, id: u64) -> u64 {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let last = metrics.last_log_index.map_or(0, |last| last + 1);
        let matched = metrics.replication.as_ref().and_then(|map| map.get(&id));
        let has = matched
            .and_then(|at| at.as_ref())
            .map_or(0, |at| at.index + 1);
        last.saturating_sub(has)
    }

    /// What the node at `address` says about itself.
    async fn ask(&self, address: &str) -> Result<v1::StatusResponse, AdminError> {
        let endpoint = self
            .dialer
            .endpoint(address)
            .map_err(|error| AdminError::Refused(format!("`{address}`: {error}")))?;
        let unreachable = |error: &dyn std::fmt::Display| {
            unavailable(format!("no answer from {address}: {error}"))
        };
        let channel = endpoint
            .connect()
            .await
            .map_err(|error| unreachable(&error))?;
        AdminClient::with_interceptor(channel, self.token.clone())
            .status(v1::StatusRequest {})
            .await
            .map(tonic::Response::into_inner)
            .map_err(|status| unreachable(&status))
    }

    /// Removes a node, voter or learner; it may be dead. Its id is never used again.
    pub async fn remove_node(&self, id: NodeId) -> Result<(), AdminError> {
        self.must_lead()?;
        let Some((_, voter)) = self.member(id.0) else {
            return Err(AdminError::Refused(format!("node {id} is not a member")));
        };
        let ids = BTreeSet::from([id.0]);
        let change = if voter {
            ChangeMembers::RemoveVoters(ids)
        } else {
            ChangeMembers::RemoveNodes(ids)
        };
        self.raft
            .change_membership(change, false)
            .await
            .map_err(write_error)?;
        Ok(())
    }

    /// Hands the lead to another voter and waits until it has it.
    pub async fn transfer(&self, to: NodeId) -> Result<(), AdminError> {
        self.must_lead()?;
        match self.member(to.0) {
            Some((_, true)) => {}
            Some((_, false)) => {
                return Err(AdminError::Refused(format!("node {to} does not vote")));
            }
            None => return Err(AdminError::Refused(format!("node {to} is not a member"))),
        }
        self.raft
            .trigger()
            .transfer_leader(to.0)
            .await
            .map_err(unavailable)?;
        self.raft
            .wait(Some(LEADER_TIMEOUT))
            .current_leader(to.0, "transferred")
            .await
            .map_err(|error| unavailable(format!("node {to} did not take the lead: {error}")))?;
        Ok(())
    }

    /// Flushes the state; returns the last index that is durable in it.
    pub async fn snapshot(&self) -> Result<u64, AdminError> {
        let Some(applied) = self.state.applied().0 else {
            return Ok(0);
        };
        self.raft.trigger().snapshot().await.map_err(unavailable)?;
        self.raft
            .wait(Some(SNAPSHOT_TIMEOUT))
            .metrics(
                |metrics| metrics.snapshot >= Some(applied),
                "snapshot taken",
            )
            .await
            .map_err(unavailable)?;
        Ok(self.state.flushed_index().unwrap_or(0))
    }

    /// Flushes and compacts this node's state; returns the bytes of its tables afterwards.
    pub async fn compact(&self) -> Result<u64, AdminError> {
        let state = self.state.clone();
        tokio::task::spawn_blocking(move || state.compact())
            .await
            .map_err(unavailable)?
            .map_err(unavailable)
    }

    /// This node's view of the cluster; `build` and `sessions` are for the caller to fill in.
    pub fn status(&self) -> v1::StatusResponse {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = &metrics.membership_config;
        let unformed = membership.nodes().next().is_none();
        let role = match (&metrics.running_state, metrics.state) {
            (Err(_), _) | (Ok(()), ServerState::Shutdown) => "shutdown",
            (Ok(()), _) if unformed => "unformed",
            (Ok(()), ServerState::Leader) => "leader",
            (Ok(()), ServerState::Follower) => "follower",
            (Ok(()), ServerState::Candidate) => "candidate",
            (Ok(()), ServerState::Learner) => "learner",
        };
        let leader = metrics.current_leader;
        let leader_address = leader
            .and_then(|leader| membership.get_node(&leader))
            .map_or_else(String::new, |peer| peer.address.clone());
        let index = |log_id: Option<super::types::LogId>| log_id.map_or(0, |log_id| log_id.index);
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let nodes = membership.nodes().map(|(id, peer)| {
            let matched = metrics.replication.as_ref().and_then(|map| map.get(id));
            let heard = metrics.heartbeat.as_ref().and_then(|map| map.get(id));
            v1::NodeStatus {
                node: *id,
                address: peer.address.clone(),
                voter: voters.contains(id),
                matched_index: index(matched.copied().flatten()),
                heard_ms_ago: heard
                    .and_then(|heard| heard.as_ref())
                    .map(|heard| u64::try_from(heard.elapsed().as_millis()).unwrap_or(u64::MAX)),
            }
        });
        v1::StatusResponse {
            node: self.identity.node,
            cluster_id: self.state.cluster_id().map_or(0, |cluster| cluster.0),
            role: role.to_owned(),
            core_level_max: core_level_known(),
            // Whoever pretends to be of an earlier release is of one without them.
            fences: core_level_known() == CORE_LEVEL_MAX,
            seals: core_level_known() == CORE_LEVEL_MAX,
            leader: leader.unwrap_or(0),
            leader_address,
            term: metrics.current_term,
            last_log_index: metrics.last_log_index.unwrap_or(0),
            committed_index: index(metrics.local_committed),
            applied_index: index(metrics.last_applied),
            purged_index: index(self.log.purged()),
            flushed_index: self.state.flushed_index().unwrap_or(0),
            snapshot_index: index(metrics.snapshot),
            nodes: nodes.collect(),
            store_uuid: self.identity.store.to_vec().into(),
            fatal: match &metrics.running_state {
                Ok(()) => String::new(),
                Err(fatal) => fatal.to_string(),
            },
            rot: self.state.rot(),
            ..v1::StatusResponse::default()
        }
    }

    /// Every member's address, as clients are told.
    pub fn members(&self) -> Vec<Peer> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let nodes = metrics.membership_config.nodes();
        nodes
            .map(|(id, peer)| Peer {
                id: NodeId(*id),
                address: peer.address.clone(),
            })
            .collect()
    }
}

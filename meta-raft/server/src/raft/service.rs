//! Calls from peers.

use std::pin::Pin;

use futures::{Stream, StreamExt};
use heliofs_proto::v1;
use heliofs_proto::v1::raft_transport_server::RaftTransport;
use openraft::Snapshot;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::raft::{StreamAppendError, TransferLeaderRequest};
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::departure::AppendEnds;
use super::network::{header, hex};
use super::snapshot::Receiver;
use super::types::{Raft, SnapshotMeta};
use super::wire::{self, BadMessage, VoteKind};
use crate::read_gate::{ReadError, ReadGate};
use crate::store::State;
use crate::store::identity::Identity;

/// Serves `RaftTransport`.
pub struct TransportService {
    raft: Raft,
    state: State,
    reads: ReadGate,
    identity: Identity,
    ends: AppendEnds,
    cancel: CancellationToken,
}

fn bad(error: BadMessage) -> Status {
    Status::invalid_argument(error.to_string())
}

fn stopped(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("raft has stopped: {error}"))
}

fn text<'m>(metadata: &'m MetadataMap, key: &'static str) -> Result<&'m str, Status> {
    metadata
        .get(key)
        .and_then(|value| value.to_str().ok())
        .ok_or_else(|| Status::invalid_argument(format!("the call lacks {key}")))
}

impl TransportService {
    /// Streams end when `cancel` does; `ends` is told of every append stream that ends.
    pub fn new(
        raft: Raft,
        state: State,
        reads: ReadGate,
        identity: Identity,
        ends: AppendEnds,
        cancel: CancellationToken,
    ) -> Self {
        Self {
            raft,
            state,
            reads,
            identity,
            ends,
            cancel,
        }
    }

    /// Refuses calls that mean another node or another disk, and callers whose id belongs to another disk.
    fn check(&self, metadata: &MetadataMap) -> Result<u64, Status> {
        let to = text(metadata, header::TO)?;
        if to != self.identity.node.to_string() {
            return Err(Status::failed_precondition(format!(
                "this is node {}, not node {to}",
                self.identity.node
            )));
        }
        if text(metadata, header::TO_STORE)? != hex(&self.identity.store) {
            let refusal = format!(
                "node {to} has another disk than the one that the cluster knows: it must not take the old one's place; remove \
                 node {to} and add this one under a new id"
            );
            tracing::error!("{refusal}");
            return Err(Status::permission_denied(refusal));
        }
        let from = text(metadata, header::FROM)?;
        let from: u64 = from
            .parse()
            .map_err(|_| Status::invalid_argument("heliofs-from is not a node id"))?;
        let store = text(metadata, header::STORE)?;
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        if let Some(peer) = metrics.membership_config.get_node(&from)
            && hex(&peer.store) != store
        {
            return Err(Status::permission_denied(format!(
                "node {from} is bound to another disk; add the caller under a new id"
            )));
        }
        Ok(from)
    }
}

#[tonic::async_trait]
impl RaftTransport for TransportService {
    type AppendStream = Pin<Box<dyn Stream<Item = Result<v1::AppendResponse, Status>> + Send>>;

    async fn vote(
        &self,
        request: Request<v1::VoteRequest>,
    ) -> Result<Response<v1::VoteResponse>, Status> {
        self.check(request.metadata())?;
        let (vote, kind) = wire::vote_request_from_wire(request.into_inner()).map_err(bad)?;
        let response = match kind {
            VoteKind::PreVote => self.raft.pre_vote(vote).await,
            VoteKind::Vote => self.raft.vote(vote).await,
        };
        let response = response.map_err(stopped)?;
        Ok(Response::new(wire::vote_response_to_wire(&response)))
    }

    async fn append(
        &self,
        request: Request<Streaming<v1::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let from = self.check(request.metadata())?;
        let end = self.ends.guard();
        let input = request.into_inner().map(move |message| {
            // Goes when the stream goes, whichever side ends it.
            let _end = &end;
            let message = message.map_err(|status| status.to_string())?;
            wire::append_request_from_wire(message).map_err(|error| error.to_string())
        });
        // openraft wants requests, not results: the first that can't be read ends the stream, and the peer opens another.
        let input = input.scan((), move |(), request| {
            let request = request
                .inspect_err(|error| tracing::debug!(%error, from, "an append stream ended"))
                .ok();
            futures::future::ready(request)
        });
        let answers = self.raft.stream_append(input).map(|answer| match answer {
            Ok(answer) => {
                if let Err(StreamAppendError::HigherVote(vote)) = &answer {
                    tracing::debug!(%vote, "refused an append of an older leader");
                }
                Ok(wire::append_response_to_wire(&answer))
            }
            Err(fatal) => Err(stopped(fatal)),
        });
        let ended = self.cancel.clone().cancelled_owned();
        Ok(Response::new(Box::pin(answers.take_until(ended))))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<v1::SnapshotChunk>>,
    ) -> Result<Response<v1::SnapshotResponse>, Status> {
        let from = self.check(request.metadata())?;
        let mut chunks = request.into_inner();
        let first = chunks.message().await?;
        let header = first
            .and_then(|chunk| chunk.header)
            .ok_or_else(|| Status::invalid_argument("a snapshot begins with its header"))?;
        let vote = wire::vote_from_wire(header.vote).map_err(bad)?;
        let meta = SnapshotMeta {
            last_log_id: header.last_log_id.map(wire::log_id_from_wire),
            last_membership: wire::stored_membership_from_wire(
                header.membership_log_id,
                header.membership,
            )
            .map_err(bad)?,
        };
        tracing::info!(from, last = ?meta.last_log_id, "receiving a snapshot");
        let disk = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::InvalidData => Status::data_loss(error.to_string()),
            _ => Status::internal(format!("the snapshot can't be written: {error}")),
        };
        let path = self.state.receiving().map_err(disk)?;
        let mut receiver = Receiver::new(path);
        while let Some(chunk) = chunks.message().await? {
            receiver = tokio::task::spawn_blocking(move || {
                receiver.chunk(&chunk)?;
                Ok(receiver)
            })
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(disk)?;
        }
        let snapshot = Snapshot {
            meta,
            snapshot: receiver.finish().map_err(disk)?,
        };
        let response = self
            .raft
            .install_full_snapshot(vote, snapshot)
            .await
            .map_err(stopped)?;
        Ok(Response::new(v1::SnapshotResponse {
            vote: Some(wire::vote_to_wire(&response.vote)),
        }))
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Result<Response<v1::TransferLeaderResponse>, Status> {
        self.check(request.metadata())?;
        let request = request.into_inner();
        let request = TransferLeaderRequest::new(
            wire::vote_from_wire(request.from).map_err(bad)?,
            request.to,
            request.last_log_id.map(wire::log_id_from_wire),
        );
        self.raft
            .handle_transfer_leader(request)
            .await
            .map_err(stopped)?
            .map_err(|refused| Status::aborted(refused.to_string()))?;
        Ok(Response::new(v1::TransferLeaderResponse {}))
    }

    async fn read_index(
        &self,
        request: Request<v1::ReadIndexRequest>,
    ) -> Result<Response<v1::ReadIndexResponse>, Status> {
        self.check(request.metadata())?;
        let log_id = self.reads.read_index().await.map_err(|error| match error {
            ReadError::NoLeader { .. } => Status::failed_precondition(error.to_string()),
            ReadError::NoQuorum | ReadError::Fatal(_) => Status::unavailable(error.to_string()),
        })?;
        Ok(Response::new(v1::ReadIndexResponse {
            read_log_id: Some(wire::log_id_to_wire(log_id)),
        }))
    }
}

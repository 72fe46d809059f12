//! Calls to peers.
//!
//! A peer has three connections: appends with entries, heartbeats and votes, snapshots. A large append or a snapshot thus never
//! holds up a heartbeat.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use heliofs_proto::limits::MESSAGE_BYTES_MAX;
use heliofs_proto::v1;
use heliofs_proto::v1::raft_transport_client::RaftTransportClient;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError,
    StreamAppendResult, TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, RaftNetworkV2, Snapshot};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::append_stream::AppendLink;
use super::snapshot::{self, SnapshotData};
use super::types::{LogId, RaftPeer, TypeConfig, Vote};
use super::wire;
use crate::auth::TokenBearer;
use crate::read_gate::ReadError;
use crate::store::identity::Identity;

/// Chunks of a snapshot that wait for the network.
const SNAPSHOT_CHUNKS_AHEAD: usize = 4;
/// Windows that hold a few of the largest appends, so that a round trip does not limit the rate.
const WINDOW_BYTES: u32 = 16 << 20;

/// Metadata keys of every call between nodes.
pub mod header {
    /// The caller's node id.
    pub const FROM: &str = "heliofs-from";
    /// The caller's store uuid, hex.
    pub const STORE: &str = "heliofs-store";
    /// The node id that the caller means to talk to.
    pub const TO: &str = "heliofs-to";
    /// The store uuid, hex, that the caller means to talk to: an id whose disk was replaced must not take its place.
    pub const TO_STORE: &str = "heliofs-to-store";
}

/// 16 bytes as 32 hex digits.
pub fn hex(bytes: &[u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(*bytes))
}

/// Adds the token and who talks to whom.
#[derive(Clone)]
pub struct PeerHeaders {
    token: TokenBearer,
    from: MetadataValue<Ascii>,
    store: MetadataValue<Ascii>,
    to: MetadataValue<Ascii>,
    to_store: MetadataValue<Ascii>,
}

impl Interceptor for PeerHeaders {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let mut request = self.token.call(request)?;
        let metadata = request.metadata_mut();
        metadata.insert(header::FROM, self.from.clone());
        metadata.insert(header::STORE, self.store.clone());
        metadata.insert(header::TO, self.to.clone());
        metadata.insert(header::TO_STORE, self.to_store.clone());
        Ok(request)
    }
}

/// A client for one peer.
pub type PeerClient = RaftTransportClient<InterceptedService<Channel, PeerHeaders>>;

/// What every call to a peer needs.
#[derive(Clone)]
pub struct Dialer {
    identity: Identity,
    token: TokenBearer,
    connect_timeout: Duration,
    /// No answer to an append for this long means that the connection is dead.
    idle_max: Duration,
}

impl Dialer {
    /// `patience` bounds how long a dead connection goes unnoticed.
    pub fn new(identity: Identity, token: TokenBearer, patience: Duration) -> Self {
        Self {
            identity,
            token,
            connect_timeout: patience / 2,
            idle_max: patience,
        }
    }

    /// The endpoint at `address` (`host:port`), with settings for many small frames.
    pub fn endpoint(&self, address: &str) -> Result<Endpoint, tonic::transport::Error> {
        Ok(Endpoint::from_shared(format!("http://{address}"))?
            .connect_timeout(self.connect_timeout)
            .tcp_nodelay(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .http2_keep_alive_interval(self.idle_max)
            .keep_alive_timeout(self.idle_max)
            .keep_alive_while_idle(true))
    }

    fn client(&self, target: u64, peer: &RaftPeer) -> Result<PeerClient, tonic::transport::Error> {
        let number = |number: u64| MetadataValue::from(number);
        let uuid = |store: &[u8; 16]| {
            MetadataValue::try_from(hex(store)).expect("hex digits are visible ASCII")
        };
        let headers = PeerHeaders {
            token: self.token.clone(),
            from: number(self.identity.node),
            store: uuid(&self.identity.store),
            to: number(target),
            to_store: uuid(&peer.store),
        };
        // Connects at the first call and again whenever the connection is lost.
        let channel = self.endpoint(&peer.address)?.connect_lazy();
        Ok(RaftTransportClient::with_interceptor(channel, headers)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX))
    }
}

/// Finds peers by id, for calls that openraft does not make.
#[derive(Clone)]
pub struct Peers {
    dialer: Dialer,
    state: crate::store::State,
    clients: Arc<parking_lot::Mutex<std::collections::HashMap<u64, (RaftPeer, PeerClient)>>>,
}

impl Peers {
    /// Addresses are looked up in the membership of `state`.
    pub fn new(dialer: Dialer, state: crate::store::State) -> Self {
        Self {
            dialer,
            state,
            clients: Arc::default(),
        }
    }

    /// A client for a member.
    fn client(&self, id: u64) -> Option<PeerClient> {
        let (_, membership) = self.state.applied();
        let peer = membership.get_node(&id)?;
        let mut clients = self.clients.lock();
        if let Some((known, client)) = clients.get(&id)
            && known == peer
        {
            return Some(client.clone());
        }
        let client = self.dialer.client(id, peer).ok()?;
        clients.insert(id, (peer.clone(), client.clone()));
        Some(client)
    }

    /// Asks the leader up to which entry a read must wait.
    pub(crate) async fn read_index(
        &self,
        leader: u64,
        within: Duration,
    ) -> Result<LogId, ReadError> {
        let none = || ReadError::NoLeader { leader: None };
        let mut client = self.client(leader).ok_or_else(none)?;
        let call = client.read_index(v1::ReadIndexRequest {});
        let response = tokio::time::timeout(within, call)
            .await
            .map_err(|_| ReadError::NoQuorum)?
            .map_err(|status| {
                tracing::debug!(%status, leader, "the leader did not answer a read");
                none()
            })?;
        let log_id = response.into_inner().read_log_id.ok_or_else(none)?;
        Ok(wire::log_id_from_wire(log_id))
    }
}

impl RaftNetworkFactory<TypeConfig> for Dialer {
    type Network = PeerNetwork;

    // Each network has a connection of its own: openraft makes one for replication, one for heartbeats, one for snapshots.
    async fn new_client(&mut self, target: u64, node: &RaftPeer) -> PeerNetwork {
        PeerNetwork {
            target,
            client: self.client(target, node).map_err(|error| error.to_string()),
            link: None,
            acknowledged: Arc::default(),
            idle_max: self.idle_max,
        }
    }
}

/// One connection to one peer.
pub struct PeerNetwork {
    target: u64,
    /// Or why its address can't be used.
    client: Result<PeerClient, String>,
    link: Option<AppendLink>,
    idle_max: Duration,
    acknowledged: Arc<Acknowledged>,
}

/// How far a peer has said in this term that its log is durable: the index behind it.
#[derive(Default)]
struct Acknowledged(AtomicU64);

impl Acknowledged {
    /// A peer that lost what it had acknowledged is left where it is by openraft, and rightly: what its disk promises is worth
    /// nothing. Somebody must hear of it.
    fn hear(&self, target: u64, answer: &StreamAppendResult<TypeConfig>) {
        match answer {
            Ok(Some(matching)) => {
                self.0.fetch_max(matching.index + 1, Ordering::Relaxed);
            }
            Err(StreamAppendError::Conflict(at)) if at.index < self.0.load(Ordering::Relaxed) => {
                let had = self.0.swap(0, Ordering::Relaxed);
                tracing::error!(
                    node = target,
                    lacks = at.index,
                    acknowledged_below = had,
                    "the node lost entries of the log that it had acknowledged: its disk confirmed a sync that was none. It can't \
                     take part any more: `heliofs raft remove` it, and add it under a new id, with an empty folder"
                );
            }
            Ok(None) | Err(_) => {}
        }
    }
}

/// What a failed call means for openraft: a peer that refuses or is away is left alone for a while.
pub(super) fn rpc_error(status: &Status) -> RPCError<TypeConfig> {
    match status.code() {
        tonic::Code::Cancelled | tonic::Code::DeadlineExceeded | tonic::Code::Aborted => {
            RPCError::Network(NetworkError::new(status))
        }
        _ => RPCError::Unreachable(Unreachable::new(status)),
    }
}

fn bad(error: impl ToString) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::from_string(error))
}

impl PeerNetwork {
    fn client(&self) -> Result<PeerClient, RPCError<TypeConfig>> {
        self.client
            .clone()
            .map_err(|error| RPCError::Unreachable(Unreachable::from_string(error)))
    }

    async fn any_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
        kind: wire::VoteKind,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut client = self.client()?;
        let request = wire::vote_request_to_wire(&rpc, kind);
        let response = tokio::time::timeout(option.soft_ttl(), client.vote(request))
            .await
            .map_err(|_| bad("no answer to a vote in time"))?
            .map_err(|status| rpc_error(&status))?;
        wire::vote_response_from_wire(response.into_inner()).map_err(bad)
    }

    async fn link(&mut self) -> Result<&mut AppendLink, RPCError<TypeConfig>> {
        // Answers that nobody waited for would be taken for those of the next requests.
        if self.link.as_ref().is_some_and(|link| !link.is_idle()) {
            self.link = None;
        }
        if self.link.is_none() {
            let open = AppendLink::open(self.client()?);
            let link = tokio::time::timeout(self.idle_max, open)
                .await
                .map_err(|_| bad("no append stream in time"))?
                .map_err(|status| rpc_error(&status))?;
            self.link = Some(link);
        }
        Ok(self.link.as_mut().expect("it was just made"))
    }
}

impl RaftNetworkV2<TypeConfig> for PeerNetwork {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        use futures::StreamExt;
        let input = Box::pin(futures::stream::once(async move { rpc }));
        let mut answers = self.stream_append(input, option).await?;
        match answers.next().await {
            Some(answer) => answer.map(AppendEntriesResponse::from),
            None => Err(bad("the append stream ended without an answer")),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<
        's,
        Result<
            BoxStream<'s, Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>>,
            RPCError<TypeConfig>,
        >,
    >
    where
        S: futures::Stream<Item = AppendEntriesRequest<TypeConfig>>
            + OptionalSend
            + Unpin
            + 'static,
    {
        Box::pin(async move {
            let (idle_max, target) = (self.idle_max, self.target);
            let acknowledged = Arc::clone(&self.acknowledged);
            let link = self.link().await?;
            let answers = link.run(input, idle_max).inspect(move |answer| {
                if let Ok(answer) = answer {
                    acknowledged.hear(target, answer);
                }
            });
            let answers: BoxStream<'s, _> = Box::pin(answers);
            Ok(answers)
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.any_vote(rpc, option, wire::VoteKind::Vote).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.any_vote(rpc, option, wire::VoteKind::PreVote).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot<
            openraft::alias::CommittedLeaderIdOf<TypeConfig>,
            u64,
            RaftPeer,
            SnapshotData,
        >,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let mut client = self.client().map_err(StreamingError::from)?;
        let header = snapshot::header(&vote, &snapshot.meta);
        let (sender, receiver) = mpsc::channel(SNAPSHOT_CHUNKS_AHEAD);
        let data = snapshot.snapshot;
        // Reading files blocks; the channel's bound keeps it in step with the network. A failure shows as a stream that ends
        // without its last chunk, which the receiver refuses.
        let reader = tokio::task::spawn_blocking(move || {
            snapshot::read_chunks(data.path(), header, |chunk| {
                sender.blocking_send(chunk).is_ok()
            })
        });
        let call = client.install_snapshot(ReceiverStream::new(receiver));
        let target = self.target;
        let response = tokio::select! {
            response = tokio::time::timeout(option.hard_ttl(), call) => response,
            closed = cancel => return Err(StreamingError::Closed(closed)),
        };
        match reader.await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::error!(%error, target, "a snapshot can't be read"),
            Err(error) => tracing::error!(%error, target, "reading a snapshot panicked"),
        }
        let response = response
            .map_err(|_| StreamingError::from(bad("the snapshot was not installed in time")))?
            .map_err(|status| StreamingError::from(rpc_error(&status)))?;
        let vote = wire::vote_from_wire(response.into_inner().vote)
            .map_err(|error| StreamingError::from(bad(error)))?;
        Ok(SnapshotResponse::new(vote))
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut client = self.client()?;
        let request = v1::TransferLeaderRequest {
            from: Some(wire::vote_to_wire(req.from_leader())),
            to: *req.to_node_id(),
            last_log_id: req.last_log_id().copied().map(wire::log_id_to_wire),
        };
        tokio::time::timeout(option.soft_ttl(), client.transfer_leader(request))
            .await
            .map_err(|_| bad("no answer to a transfer in time"))?
            .map_err(|status| rpc_error(&status))?;
        Ok(Ok(()))
    }
}

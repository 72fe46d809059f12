//! Starts and stops a node: stores, Raft, services, drivers.
//!
//! Start: log, state, Raft, client side, listener. Stop: hand over the lead, end what clients use, close the listener, stop Raft,
//! flush the state, stop the log's writer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use heliofs_proto::ids::NodeId;
use heliofs_proto::limits::MESSAGE_BYTES_MAX;
use heliofs_proto::v1::raft_transport_server::RaftTransportServer;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::{Config, ServerState, SnapshotPolicy};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::auth::{BadToken, TokenBearer, TokenCheck};
use crate::config::{NodeConfig, ReadMode};
use crate::damage::Damage;
use crate::fence::Fences;
use crate::leadership::{Leadership, Peer};
use crate::metrics::Shown;
use crate::mirrors::MirrorBoard;
use crate::observer::Observers;
use crate::proposer::Proposer;
use crate::raft::Raft;
use crate::raft::admin::RaftAdmin;
use crate::raft::departure::{AppendEnds, DepartureWatch};
use crate::raft::machine::StateMachine;
use crate::raft::network::{Dialer, Peers};
use crate::raft::purge::{LogHolds, PurgeDriver};
use crate::raft::service::TransportService;
use crate::read_gate::ReadGate;
use crate::store::{LogStore, OpenError, State};

/// HTTP/2 windows: several of the largest messages, so that flow control never stalls a stream of small frames.
const WINDOW_BYTES: u32 = 16 << 20;
/// How long tasks and calls may take to end at shutdown before they are cut off.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// A lead that nobody took within this time is lost by the shutdown itself.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The cluster token.
    #[error(transparent)]
    Token(#[from] BadToken),
    /// The settings contradict each other.
    #[error("settings: {0}")]
    Settings(String),
    /// The address can't be listened on.
    #[error("can't listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// Raft refused its stores.
    #[error("raft: {0}")]
    Raft(String),
    /// The directory was copied from another disk.
    #[error(
        "the cluster knows node {0} under another disk: this directory's log and state do not belong together; add this node under \
         a new id with an empty data directory"
    )]
    ForeignStore(NodeId),
}

/// What the parts of a node share.
pub struct NodeContext {
    /// The settings.
    pub config: NodeConfig,
    /// This node.
    pub node_id: NodeId,
    /// Binds the node id to this disk.
    pub store_uuid: [u8; 16],
    /// `host:port` that peers and clients are told.
    pub address: String,
    /// What was applied.
    pub state: State,
    /// The log, for the changelog.
    pub log: LogStore,
    /// Keeps log entries that a changelog reader still needs.
    pub log_holds: LogHolds,
    /// Proposes log items.
    pub proposer: Proposer,
    /// What the keeper of markers in fence stores says; nothing is written to a volume that has one until it does.
    pub fences: Fences,
    /// Makes reads linearizable.
    pub reads: ReadGate,
    /// Who leads.
    pub leadership: watch::Receiver<Leadership>,
    /// The cluster.
    pub raft: RaftAdmin,
    /// Who sees what is applied.
    pub observers: Observers,
    /// Where damaged records are reported.
    pub damage: Damage,
    /// What the followers of this node's mirrors say of themselves.
    pub mirrors: MirrorBoard,
    /// Checks the cluster token: wrap every service in it.
    pub token: TokenCheck,
    /// Ends all tasks and streams of this node.
    pub cancel: CancellationToken,
    /// Spawn tasks here, and end them on `cancel`: shutdown waits for them.
    pub tasks: TaskTracker,
}

/// A running node.
pub struct Node {
    context: Arc<NodeContext>,
    raft: Raft,
    shown: Shown,
    local_addr: SocketAddr,
    server: tokio::task::JoinHandle<()>,
    /// Ends the listener; later than `context.cancel`, so that clients are told first.
    close: CancellationToken,
}

fn raft_config(config: &NodeConfig) -> Result<Config, StartError> {
    let timings = &config.raft;
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let election_max = millis(timings.election_max);
    let config = Config {
        cluster_name: "heliofs".to_owned(),
        heartbeat_interval: millis(timings.heartbeat),
        election_timeout_min: millis(timings.election_min),
        election_timeout_max: election_max,
        install_snapshot_timeout: millis(timings.snapshot_timeout),
        // Trimming is ours (raft/purge.rs): the log is kept for changelog readers, and only what was flushed may go.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        // As long as the log reaches back, entries are cheaper than a snapshot.
        replication_lag_threshold: u64::MAX,
        enable_pre_vote: Some(true),
        // Without this a leader that lost its quorum keeps renewing followers' leases: a bridge partition blocks elections.
        quorum_loss_probe_interval: Some(2 * election_max),
        // A restarted leader may lack the latest commit index; it must win an election first.
        enable_leader_restore: Some(false),
        allow_log_reversion: Some(false),
        // Followers sync while the leader does.
        broadcast_submitted_on_append: Some(true),
        backoff: "50ms 100ms 200ms ..500ms".to_owned(),
        ..Config::default()
    };
    config
        .validate()
        .map_err(|error| StartError::Settings(error.to_string()))
}

impl Node {
    /// Opens the stores, starts Raft and serves. A node that belongs to no cluster yet waits to be formed or added.
    pub async fn start(config: NodeConfig) -> Result<Self, StartError> {
        let token = TokenCheck::new(&config.token)?;
        let bearer = TokenBearer::new(&config.token)?;
        let raft_config = Arc::new(raft_config(&config)?);
        let listen_error = |source| StartError::Listen {
            address: config.listen,
            source,
        };
        let listener = TcpListener::bind(config.listen)
            .await
            .map_err(listen_error)?;
        let local_addr = listener.local_addr().map_err(listen_error)?;
        let address = config
            .advertise
            .clone()
            .unwrap_or_else(|| local_addr.to_string());

        // Checking the whole log takes a while.
        let (log, state) = {
            let config = config.clone();
            tokio::task::spawn_blocking(move || open_stores(&config))
                .await
                .map_err(|error| StartError::Raft(error.to_string()))??
        };
        let identity = log.identity();
        let (_, membership) = state.applied();
        if let Some(peer) = membership.get_node(&identity.node)
            && peer.store != identity.store
        {
            return Err(StartError::ForeignStore(config.node_id));
        }

        let observers = Observers::default();
        let dialer = Dialer::new(identity, bearer.clone(), config.raft.patience());
        let machine = StateMachine::new(state.clone(), observers.clone());
        let raft = Raft::build(
            identity.node,
            raft_config,
            dialer.clone(),
            log.clone(),
            machine,
        )
        .await
        .map_err(|error| StartError::Raft(error.to_string()))?;

        let cancel = CancellationToken::new();
        let tasks = TaskTracker::new();
        let fences = Fences::new(state.fenced());
        let proposer = Proposer::new(raft.clone(), fences.clone());
        let peers = Peers::new(dialer.clone(), state.clone());
        let reads = ReadGate::new(raft.clone(), peers, config.reads, config.raft.patience());
        let (sender, leadership) = watch::channel(Leadership::Follower {
            leader: None,
            term: 0,
        });
        tasks.spawn(watch_leadership(raft.clone(), sender, cancel.clone()));
        let log_holds = LogHolds::default();
        let purge = PurgeDriver {
            raft: raft.clone(),
            log: log.clone(),
            state: state.clone(),
            retention: config.log.clone(),
            holds: log_holds.clone(),
        };
        tasks.spawn(purge.run(cancel.clone()));
        let admin = RaftAdmin {
            raft: raft.clone(),
            proposer: proposer.clone(),
            dialer,
            token: bearer,
            identity,
            address: address.clone(),
            state: state.clone(),
            log: log.clone(),
            leadership: leadership.clone(),
        };
        let ends = AppendEnds::default();
        if config.reads == ReadMode::ReadIndex {
            let departures = DepartureWatch {
                raft: raft.clone(),
                leadership: leadership.clone(),
                ends: ends.clone(),
            };
            tasks.spawn(departures.run(cancel.clone()));
        }
        let damage = Damage::default();
        tasks.spawn(crate::drivers::pins::keep(state.clone(), cancel.clone()));
        tasks.spawn(crate::scrub::run(
            state.clone(),
            damage.clone(),
            config.scrub_interval,
            cancel.clone(),
        ));
        let context = Arc::new(NodeContext {
            node_id: config.node_id,
            store_uuid: identity.store,
            address,
            state: state.clone(),
            log,
            log_holds,
            proposer,
            fences,
            reads: reads.clone(),
            leadership,
            raft: admin,
            observers,
            damage,
            mirrors: MirrorBoard::default(),
            token: token.clone(),
            cancel: cancel.clone(),
            tasks,
            config,
        });

        let transport = TransportService::new(raft.clone(), state, reads, identity, ends, cancel);
        let transport = RaftTransportServer::new(transport)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        // Observers are registered before the first entry is applied, and before this node can lead.
        let (routes, shown) = crate::grpc::start(&context);
        let routes = routes.add_service(InterceptedService::new(transport, token));
        raft.run();

        let close = CancellationToken::new();
        let closing = close.clone();
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let serving = Server::builder()
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .max_concurrent_streams(None)
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, closing.cancelled_owned());
        let server = tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, "the listener failed");
            }
        });
        tracing::info!(node = identity.node, address = %context.address, "started");
        Ok(Self {
            context,
            raft,
            shown,
            local_addr,
            server,
            close,
        })
    }

    /// Where this node listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// What the node's parts share.
    pub fn context(&self) -> &Arc<NodeContext> {
        &self.context
    }

    /// Metrics and readiness.
    pub fn shown(&self) -> &Shown {
        &self.shown
    }

    /// The cluster's administration.
    pub fn raft(&self) -> &RaftAdmin {
        &self.context.raft
    }

    /// Completes when the node has stopped because of an error; says which.
    pub async fn failed(&self) -> String {
        // The lead is published when it changes, openraft's metrics a thousand times a second: this must not wake up for them.
        let mut leadership = self.context.leadership.clone();
        tokio::select! {
            damage = self.context.damage.reported() => return damage,
            // A sender that is gone has published `Stopped`.
            _ = leadership.wait_for(|now| *now == Leadership::Stopped) => {}
        }
        match &self.raft.metrics().borrow_watched().running_state {
            Err(fatal) => fatal.to_string(),
            Ok(()) => "raft has stopped".to_owned(),
        }
    }

    /// Hands over the lead if somebody can take it, tells clients to go elsewhere, and stops with everything on disk.
    pub async fn shutdown(self) -> Result<(), OpenError> {
        self.hand_over().await;
        self.context.cancel.cancel();
        self.context.tasks.close();
        if tokio::time::timeout(STOP_TIMEOUT, self.context.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!("tasks are still running; stopping without them");
        }
        self.close.cancel();
        let mut server = self.server;
        if tokio::time::timeout(STOP_TIMEOUT, &mut server)
            .await
            .is_err()
        {
            tracing::warn!("calls are still open; cutting them off");
            server.abort();
        }
        if let Err(error) = self.raft.shutdown().await {
            tracing::error!(%error, "raft did not stop cleanly");
        }
        let state = self.context.state.clone();
        tokio::task::spawn_blocking(move || state.flush())
            .await
            .map_err(std::io::Error::other)
            .flatten()
            .map_err(OpenError::io("flush the state"))?;
        self.context
            .log
            .stop()
            .await
            .map_err(OpenError::io("stop the log"))?;
        tracing::info!(node = %self.context.node_id, "stopped");
        Ok(())
    }

    /// To the voter that is furthest.
    async fn hand_over(&self) {
        let best = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            let me = metrics.id;
            if metrics.state != ServerState::Leader || metrics.running_state.is_err() {
                return;
            }
            let voters: Vec<u64> = metrics.membership_config.voter_ids().collect();
            let replication = metrics.replication.iter().flatten();
            replication
                .filter(|(id, matched)| **id != me && voters.contains(id) && matched.is_some())
                .max_by_key(|(_, matched)| **matched)
                .map(|(id, _)| *id)
        };
        let Some(to) = best else {
            return;
        };
        let transfer = self.context.raft.transfer(NodeId(to));
        match tokio::time::timeout(TRANSFER_TIMEOUT, transfer).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, to, "the lead was not handed over"),
            Err(_) => tracing::warn!(to, "nobody took the lead in time"),
        }
    }
}

fn open_stores(config: &NodeConfig) -> Result<(LogStore, State), OpenError> {
    let state_exists = State::exists(&config.data_dir)?;
    let log = LogStore::open(
        &config.data_dir,
        config.node_id,
        config.cache.log_cache_bytes,
        state_exists,
    )?;
    let state = State::open(&config.data_dir, &config.cache)?;
    Ok((log, state))
}

/// Publishes what openraft's metrics say about the lead.
async fn watch_leadership(
    raft: Raft,
    sender: watch::Sender<Leadership>,
    cancel: CancellationToken,
) {
    let mut metrics = raft.server_metrics();
    loop {
        let now = {
            let metrics = metrics.borrow_watched();
            let leader = metrics.current_leader;
            let term = metrics.vote.leader_id.term;
            match metrics.state {
                ServerState::Leader if leader == Some(metrics.id) => Leadership::Leader { term },
                ServerState::Shutdown => Leadership::Stopped,
                ServerState::Leader
                | ServerState::Candidate
                | ServerState::Follower
                | ServerState::Learner => {
                    let peer = leader
                        .filter(|leader| *leader != metrics.id)
                        .and_then(|leader| {
                            let node = metrics.membership_config.get_node(&leader)?;
                            Some(Peer {
                                id: NodeId(leader),
                                address: node.address.clone(),
                            })
                        });
                    Leadership::Follower { leader: peer, term }
                }
            }
        };
        sender.send_if_modified(|last| {
            let changed = *last != now;
            if changed {
                tracing::info!(?now, "leadership");
                *last = now;
            }
            changed
        });
        tokio::select! {
            changed = metrics.changed() => {
                if changed.is_err() {
                    break;
                }
            }
            () = cancel.cancelled() => break,
        }
    }
    sender.send_replace(Leadership::Stopped);
}

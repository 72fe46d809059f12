//! A metadata cluster as a client sees it: its peers, which of them leads, and how a call reaches the right one.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use heliofs_proto::limits::MESSAGE_BYTES_MAX;
use heliofs_proto::v1::admin_client::AdminClient;
use parking_lot::Mutex;
use rand::seq::SliceRandom;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use crate::error::ClusterError;
use crate::token::Token;
use crate::url::MetaUrl;

/// Metadata key with which a node that doesn't lead names the one that does: "host:port", or empty during an election.
pub(crate) const LEADER_KEY: &str = "heliofs-leader";

/// Receive windows of HTTP/2: a full page of a directory, or a burst of replies, must not wait for window updates.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// How long a cluster's calls wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterOptions {
    /// A call waits this long for a leader (elections included) before it fails.
    pub deadline: Duration,
    /// When no peer at all answered for this long, the call fails earlier: it is not an election, it is a wrong address.
    pub unreachable_after: Duration,
    /// One attempt at one peer.
    pub attempt_timeout: Duration,
    /// Establishing a connection.
    pub connect_timeout: Duration,
}

impl Default for ClusterOptions {
    /// 30 s for a leader, 5 s when nobody answers, 5 s per attempt, 1 s to connect.
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            unreachable_after: Duration::from_secs(5),
            attempt_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(1),
        }
    }
}

/// A cheap handle on a cluster: its peers, its token, and what is known of its leader.
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

struct Inner {
    token: Token,
    options: ClusterOptions,
    /// Those given, then those learned.
    peers: Mutex<Vec<String>>,
    leader: Mutex<Option<String>>,
    /// Connections of admin calls; they connect when first used and reconnect by themselves.
    channels: Mutex<HashMap<String, Channel>>,
}

impl Cluster {
    /// A cluster with these peers ("host:port"). Connects when first used.
    pub fn new(peers: Vec<String>, token: Token, options: ClusterOptions) -> Self {
        Self {
            inner: Arc::new(Inner {
                token,
                options,
                peers: Mutex::new(peers),
                leader: Mutex::new(None),
                channels: Mutex::new(HashMap::new()),
            }),
        }
    }

    /// The cluster that a META-URL names, with default options.
    pub fn from_url(url: &MetaUrl, token: Token) -> Self {
        Self::new(url.peers.clone(), token, ClusterOptions::default())
    }

    /// Peers given and learned, "host:port".
    pub fn peers(&self) -> Vec<String> {
        self.inner.peers.lock().clone()
    }

    /// The node that led when last heard of.
    pub fn leader(&self) -> Option<String> {
        self.inner.leader.lock().clone()
    }

    /// How long calls wait.
    pub fn options(&self) -> &ClusterOptions {
        &self.inner.options
    }

    /// Adds peers that the cluster told us of. Those given stay: the cluster may know itself under addresses that only its
    /// own network can reach.
    pub(crate) fn learn_peers(&self, learned: &[String]) {
        let mut peers = self.inner.peers.lock();
        for peer in learned {
            if !peer.is_empty() && !peers.contains(peer) {
                peers.push(peer.clone());
            }
        }
    }

    /// Remembers who leads, as a redirect or a welcome says; an empty hint forgets.
    pub(crate) fn learn_leader(&self, hint: Option<String>) {
        let hint = hint.filter(|hint| !hint.is_empty());
        if let Some(leader) = &hint {
            self.learn_peers(std::slice::from_ref(leader));
        }
        *self.inner.leader.lock() = hint;
    }

    /// Peers in the order to try: the leader, the others shuffled, and last the one that just failed.
    pub(crate) fn order(&self, avoid: Option<&str>) -> Vec<String> {
        let mut peers = self.peers();
        peers.shuffle(&mut rand::rng());
        let leader = self.leader();
        peers.sort_by_key(|peer| {
            if avoid == Some(peer.as_str()) {
                2
            } else if leader.as_ref() == Some(peer) {
                0
            } else {
                1
            }
        });
        peers
    }

    /// How connections to `peer` are made. Keep-alive notices a peer that is gone without a word (a cut, a stopped machine).
    pub(crate) fn endpoint(&self, peer: &str) -> Result<Endpoint, ClusterError> {
        let endpoint = Endpoint::from_shared(format!("http://{peer}")).map_err(|error| {
            ClusterError::Invalid(format!("`{peer}` is not an address: {error}"))
        })?;
        Ok(endpoint
            .connect_timeout(self.inner.options.connect_timeout)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(3)))
    }

    /// `body` with our token.
    pub(crate) fn request<T>(&self, body: T) -> Request<T> {
        let mut request = Request::new(body);
        request
            .metadata_mut()
            .insert("authorization", self.inner.token.bearer());
        request
    }

    /// The kept connection to `peer`.
    pub(crate) fn channel(&self, peer: &str) -> Result<Channel, ClusterError> {
        if let Some(channel) = self.inner.channels.lock().get(peer) {
            return Ok(channel.clone());
        }
        let channel = self.endpoint(peer)?.connect_lazy();
        let mut channels = self.inner.channels.lock();
        Ok(channels.entry(peer.to_owned()).or_insert(channel).clone())
    }

    fn admin(&self, peer: &str) -> Result<AdminClient<Channel>, ClusterError> {
        Ok(AdminClient::new(self.channel(peer)?).max_decoding_message_size(MESSAGE_BYTES_MAX))
    }

    /// One attempt at one peer, no redirects.
    pub(crate) async fn call_peer<T, F, Fut>(&self, peer: &str, call: F) -> Result<T, Answer>
    where
        F: FnOnce(AdminClient<Channel>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_peer_within(peer, self.inner.options.attempt_timeout, call)
            .await
    }

    /// As [`Cluster::call_peer`], for calls that take longer than others.
    pub(crate) async fn call_peer_within<T, F, Fut>(
        &self,
        peer: &str,
        within: Duration,
        call: F,
    ) -> Result<T, Answer>
    where
        F: FnOnce(AdminClient<Channel>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let client = self.admin(peer).map_err(Answer::Refused)?;
        match tokio::time::timeout(within, call(client)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(judge(peer, &status)),
            Err(_) => Err(Answer::Broken("it did not answer in time".to_owned())),
        }
    }

    /// Reaches the node that can serve the call: follows redirects, waits through elections, and gives up at the deadline.
    ///
    /// `mutates`: an attempt whose outcome isn't known must not be repeated, since admin calls have no sequence numbers.
    pub(crate) async fn call<T, F, Fut>(
        &self,
        name: &'static str,
        mutates: bool,
        call: F,
    ) -> Result<T, ClusterError>
    where
        F: Fn(AdminClient<Channel>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let mut search = Search::new(self);
        loop {
            for peer in self.order(None) {
                let mut peer = peer;
                // A redirect is followed at once; a second one from there is stale, so the round goes on.
                for _ in 0..2 {
                    match self.call_peer(&peer, &call).await {
                        Ok(reply) => return Ok(reply),
                        Err(Answer::Refused(error)) => return Err(error),
                        Err(Answer::Broken(detail)) if mutates => {
                            return Err(ClusterError::Unknown {
                                peer,
                                call: name,
                                detail,
                            });
                        }
                        Err(Answer::Broken(detail)) | Err(Answer::Unreachable(detail)) => {
                            search.note(&peer, &detail, false);
                            break;
                        }
                        Err(Answer::Elsewhere(hint, detail)) => {
                            search.note(&peer, &detail, true);
                            self.learn_leader(hint.clone());
                            match hint {
                                Some(leader) if leader != peer => peer = leader,
                                _ => break,
                            }
                        }
                    }
                }
                search.check()?;
            }
            tokio::time::sleep(search.pace()).await;
        }
    }
}

/// What an attempt that brought no result means for the search.
#[derive(Debug)]
pub(crate) enum Answer {
    /// The peer lives but can't serve it; the leader, if it named one.
    Elsewhere(Option<String>, String),
    /// No connection: certainly not delivered.
    Unreachable(String),
    /// Broken off after it may have been delivered.
    Broken(String),
    /// An answer that another peer would give, too.
    Refused(ClusterError),
}

/// Whether the failure is that of establishing a connection, so that nothing was delivered.
fn never_connected(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() || error.is::<tonic::TimeoutExpired>() {
            return error.is::<tonic::ConnectError>();
        }
        source = error.source();
    }
    false
}

/// The innermost cause: "connection refused" rather than "transport error".
pub(crate) fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Sorts a status by what to do next.
pub(crate) fn judge(peer: &str, status: &Status) -> Answer {
    let message = status.message().to_owned();
    let has_source = std::error::Error::source(status).is_some();
    match status.code() {
        Code::FailedPrecondition => match status.metadata().get(LEADER_KEY) {
            Some(leader) => {
                let leader = leader.to_str().unwrap_or_default().to_owned();
                Answer::Elsewhere(Some(leader).filter(|l| !l.is_empty()), message)
            }
            None => Answer::Refused(ClusterError::Invalid(message)),
        },
        _ if never_connected(status) => Answer::Unreachable(root_cause(status)),
        // Made up on this side of the wire: the connection or the stream broke.
        _ if has_source => Answer::Broken(root_cause(status)),
        Code::Unavailable => Answer::Elsewhere(None, message),
        Code::DeadlineExceeded | Code::Cancelled => Answer::Broken(message),
        Code::Unauthenticated | Code::PermissionDenied => {
            Answer::Refused(ClusterError::TokenRefused {
                peer: peer.to_owned(),
            })
        }
        Code::NotFound => Answer::Refused(ClusterError::NotFound(message)),
        Code::OutOfRange => Answer::Refused(ClusterError::Trimmed(message)),
        Code::Aborted => Answer::Refused(ClusterError::OtherHistory(message)),
        Code::Ok
        | Code::Unknown
        | Code::InvalidArgument
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::Unimplemented
        | Code::Internal
        | Code::DataLoss => Answer::Refused(ClusterError::Invalid(if message.is_empty() {
            format!("{peer}: {}", status.code())
        } else {
            message
        })),
    }
}

/// A search for a node that serves: how long it has lasted, and whether anybody answered at all.
pub(crate) struct Search<'a> {
    cluster: &'a Cluster,
    begun: Instant,
    answered: bool,
    detail: String,
}

impl<'a> Search<'a> {
    pub(crate) fn new(cluster: &'a Cluster) -> Self {
        Self {
            cluster,
            begun: Instant::now(),
            answered: false,
            detail: "not tried".to_owned(),
        }
    }

    /// Remembers a failure; `answered` when the peer lives.
    pub(crate) fn note(&mut self, peer: &str, detail: &str, answered: bool) {
        self.answered |= answered;
        self.detail = format!("{peer}: {detail}");
    }

    /// The last failure.
    pub(crate) fn detail(&self) -> &str {
        &self.detail
    }

    /// The pause before the next attempt: 50 ms while a failover may be under way, and 1/40 of the time searched so far
    /// later (at most 1 s), so that a long outage doesn't end in a storm. Jittered by half.
    pub(crate) fn pace(&self) -> Duration {
        let pace =
            (self.begun.elapsed() / 40).clamp(Duration::from_millis(50), Duration::from_secs(1));
        pace.mul_f64(rand::random_range(0.5..1.5))
    }

    /// When to give up, as things stand.
    pub(crate) fn deadline(&self) -> Instant {
        let options = self.cluster.options();
        let waits = if self.answered {
            options.deadline
        } else {
            options.unreachable_after.min(options.deadline)
        };
        self.begun + waits
    }

    /// An error once the deadline has passed.
    pub(crate) fn check(&self) -> Result<(), ClusterError> {
        if Instant::now() < self.deadline() {
            return Ok(());
        }
        Err(self.failure())
    }

    /// What to tell a person when the search is given up.
    pub(crate) fn failure(&self) -> ClusterError {
        let peers = self.cluster.peers().join(", ");
        let detail = self.detail.clone();
        if self.answered {
            ClusterError::NoLeader {
                peers,
                waited: self.begun.elapsed(),
                detail,
            }
        } else {
            ClusterError::NoNode { peers, detail }
        }
    }
}

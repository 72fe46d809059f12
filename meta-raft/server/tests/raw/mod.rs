//! A one-node cluster with a volume, and a client that speaks frames.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Duration;

use heliofs_proto::ids::NodeId;
use heliofs_proto::v1::admin_client::AdminClient;
use heliofs_proto::v1::changelog_client::ChangelogClient;
use heliofs_proto::v1::sessions_client::SessionsClient;
use heliofs_proto::v1::{self, FsError, command::Op, request::Body, response};
use meta_server::auth::TokenBearer;
use meta_server::metrics::Shown;
use meta_server::{Node, NodeConfig};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

const TOKEN: &str = "test-token";
const VOLUME: &str = "vol";
/// No answer takes this long.
const PATIENCE: Duration = Duration::from_secs(20);

/// A few times per session time-out.
const PING_EVERY: Duration = Duration::from_millis(400);

type Authed = InterceptedService<Channel, TokenBearer>;

pub struct Cluster {
    node: Node,
    channel: Channel,
    dir: tempfile::TempDir,
}

impl Cluster {
    pub async fn start() -> Self {
        let cluster = Self::start_in(tempfile::tempdir().unwrap()).await;
        let mut admin = cluster.admin();
        admin.init_cluster(v1::InitClusterRequest {}).await.unwrap();
        let create = v1::VolumeCreate {
            name: VOLUME.into(),
            storage: Some(v1::StorageConfig {
                storage: "memory".into(),
                ..Default::default()
            }),
            settings: None,
        };
        admin.create_volume(create).await.unwrap();
        cluster
    }

    async fn start_in(dir: tempfile::TempDir) -> Self {
        let mut config = NodeConfig::new(NodeId(1), dir.path(), TOKEN);
        config.sessions.timeout = Duration::from_secs(2);
        let node = Node::start(config).await.unwrap();
        let endpoint = Channel::from_shared(format!("http://{}", node.local_addr())).unwrap();
        let channel = endpoint.connect().await.unwrap();
        Self { node, channel, dir }
    }

    pub async fn stop(self) {
        drop(self.channel);
        self.node.shutdown().await.unwrap();
    }

    /// Stops the node, lets `change` at its data directory, starts it again and waits until it leads.
    pub async fn restarted(self, change: impl FnOnce(&Path)) -> Self {
        drop(self.channel);
        self.node.shutdown().await.unwrap();
        change(self.dir.path());
        let cluster = Self::start_in(self.dir).await;
        let mut leadership = cluster.node.context().leadership.clone();
        let leads = leadership.wait_for(|now| now.leading().is_some());
        tokio::time::timeout(PATIENCE, leads)
            .await
            .expect("a node alone leads")
            .unwrap();
        cluster
    }

    /// Waits until the node says that it has to stop, and why.
    pub async fn failed(&self) -> String {
        tokio::time::timeout(PATIENCE, self.node.failed())
            .await
            .expect("the node goes on")
    }

    fn bearer(&self) -> TokenBearer {
        TokenBearer::new(TOKEN).unwrap()
    }

    pub fn admin(&self) -> AdminClient<Authed> {
        AdminClient::with_interceptor(self.channel.clone(), self.bearer())
    }

    pub async fn status(&self) -> v1::StatusResponse {
        self.admin()
            .status(v1::StatusRequest {})
            .await
            .unwrap()
            .into_inner()
    }

    pub async fn follow(
        &self,
        after: u64,
        follow: bool,
    ) -> Result<Streaming<v1::ChangelogFrame>, Status> {
        let mut client = ChangelogClient::with_interceptor(self.channel.clone(), self.bearer())
            .max_decoding_message_size(64 << 20);
        let after = Some(v1::Position {
            epoch: 0,
            seq: after,
        });
        let request = v1::FollowRequest {
            packing: String::new(),
            volume: VOLUME.into(),
            after,
            follow,
        };
        Ok(client.follow(request).await?.into_inner())
    }

    async fn connect(
        &self,
        token: &str,
        change: impl FnOnce(&mut v1::Hello),
    ) -> Result<(mpsc::Sender<v1::ClientFrame>, Streaming<v1::ServerFrame>), Status> {
        let bearer = TokenBearer::new(token).unwrap();
        let mut client = SessionsClient::with_interceptor(self.channel.clone(), bearer);
        let (sender, receiver) = mpsc::channel(64);
        let mut hello = v1::Hello {
            wire_version: heliofs_proto::limits::WIRE_VERSION,
            volume: VOLUME.into(),
            host: "test".into(),
            ..Default::default()
        };
        change(&mut hello);
        let first = v1::ClientFrame {
            hello: Some(hello),
            ..Default::default()
        };
        sender.send(first).await.unwrap();
        let frames = client
            .attach(ReceiverStream::new(receiver))
            .await?
            .into_inner();
        Ok((sender, frames))
    }

    pub async fn try_attach(&self, change: impl FnOnce(&mut v1::Hello)) -> Result<Raw, Status> {
        let (sender, frames) = self.connect(TOKEN, change).await?;
        Ok(Raw::new(sender, frames).await)
    }

    pub async fn attach_with_token(&self, token: &str) -> Result<Raw, Status> {
        let (sender, frames) = self.connect(token, |_| {}).await?;
        Ok(Raw::new(sender, frames).await)
    }

    pub async fn try_attach_frames(
        &self,
        change: impl FnOnce(&mut v1::Hello),
    ) -> Streaming<v1::ServerFrame> {
        self.connect(TOKEN, change).await.unwrap().1
    }

    pub async fn attach(&self) -> Raw {
        self.attach_as(|_| {}).await
    }

    pub async fn attach_as(&self, change: impl FnOnce(&mut v1::Hello)) -> Raw {
        self.try_attach(change).await.unwrap()
    }

    pub async fn resume(&self, raw: Raw, change: impl FnOnce(&mut v1::Hello)) -> Raw {
        let (session, sequence) = (raw.session, raw.sequence);
        drop(raw);
        let mut resumed = self
            .attach_as(|hello| {
                hello.session = session;
                change(hello);
            })
            .await;
        assert_eq!(resumed.session, session);
        resumed.sequence = sequence;
        resumed
    }

    /// Waits until an inode is reaped.
    pub async fn until_gone(&self, raw: &mut Raw, ino: u64) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while raw.read(Body::GetAttr(v1::GetAttr { ino })).await.error() != FsError::Stale {
            assert!(
                tokio::time::Instant::now() < deadline,
                "inode {ino} is not reaped"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn shown(&self) -> &Shown {
        self.node.shown()
    }
}

/// A session's stream, driven by hand.
pub struct Raw {
    sender: mpsc::Sender<v1::ClientFrame>,
    frames: Streaming<v1::ServerFrame>,
    pub session: u64,
    next_id: u64,
    sequence: u64,
    /// Sequences without a reply, and the requests that carry them.
    unanswered: BTreeMap<u64, u64>,
    arrived: HashMap<u64, v1::Response>,
    pub invalidations: Vec<v1::Invalidation>,
    pongs: Vec<u64>,
    ended: bool,
}

impl Raw {
    async fn new(
        sender: mpsc::Sender<v1::ClientFrame>,
        mut frames: Streaming<v1::ServerFrame>,
    ) -> Self {
        let first = frames.message().await.unwrap().unwrap();
        let welcome = first.welcome.expect("the first frame welcomes");
        assert!(welcome.lease_ms > 0 && !welcome.peers.is_empty());
        Self {
            sender,
            frames,
            session: welcome.session,
            next_id: 1,
            sequence: 0,
            unanswered: Default::default(),
            arrived: HashMap::new(),
            invalidations: Vec::new(),
            pongs: Vec::new(),
            ended: false,
        }
    }

    async fn take(&mut self) {
        let began = tokio::time::Instant::now();
        let next = loop {
            // A client that waits says that it is alive.
            match tokio::time::timeout(PING_EVERY, self.frames.message()).await {
                Ok(next) => break next,
                Err(_) => {
                    assert!(began.elapsed() < PATIENCE, "the server is silent");
                    let ping = v1::ClientFrame {
                        ping: 1,
                        ..Default::default()
                    };
                    // The stream may be over, which the next frame tells.
                    self.sender.send(ping).await.ok();
                }
            }
        };
        let ended = || v1::ServerFrame {
            session_ended: true,
            ..Default::default()
        };
        let frame = next.unwrap().unwrap_or_else(ended);
        // As a client must: invalidations of a frame come before its responses.
        self.invalidations.extend(frame.invalidations);
        for response in frame.responses {
            assert!(
                self.arrived.insert(response.id, response).is_none(),
                "answered twice"
            );
        }
        if frame.pong != 0 {
            self.pongs.push(frame.pong);
        }
        self.ended |= frame.session_ended;
    }

    pub async fn send_request(&mut self, request: v1::Request) {
        let frame = v1::ClientFrame {
            requests: vec![request],
            ..Default::default()
        };
        self.sender.send(frame).await.unwrap();
    }

    /// Without waiting for an answer; returns the request's id.
    pub async fn begin(&mut self, body: Body) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.send_request(v1::Request {
            id,
            body: Some(body),
        })
        .await;
        id
    }

    pub async fn send(&mut self, body: Body) {
        self.begin(body).await;
    }

    pub async fn response(&mut self, id: u64) -> v1::Response {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            assert!(
                tokio::time::Instant::now() < deadline,
                "no answer to request {id}"
            );
            if let Some(response) = self.arrived.remove(&id) {
                return response;
            }
            assert!(!self.ended, "the stream ended before the answer");
            self.take().await;
        }
    }

    pub async fn read(&mut self, body: Body) -> v1::Response {
        let id = self.begin(body).await;
        self.response(id).await
    }

    pub async fn read_raw(&mut self, request: v1::Request) -> v1::Response {
        let id = request.id;
        self.send_request(request).await;
        self.response(id).await
    }

    async fn begin_mutate_as(&mut self, sequence: u64, acknowledged_below: u64, op: Op) -> u64 {
        let command = v1::Command {
            sequence,
            acknowledged_below,
            op: Some(op),
            ..Default::default()
        };
        self.begin(Body::Command(command)).await
    }

    /// Under the next sequence, acknowledging everything that was answered.
    pub async fn begin_mutate(&mut self, op: Op) -> u64 {
        self.sequence += 1;
        let sequence = self.sequence;
        let below = self.unanswered.keys().next().copied().unwrap_or(sequence);
        let id = self.begin_mutate_as(sequence, below, op).await;
        self.unanswered.insert(sequence, id);
        id
    }

    pub async fn reply(&mut self, id: u64) -> v1::Reply {
        let response = self.response(id).await;
        let Some(response::Body::Reply(reply)) = response.body else {
            panic!("{response:?}")
        };
        self.unanswered.retain(|_, request| *request != id);
        reply
    }

    pub async fn mutate(&mut self, op: Op) -> v1::Reply {
        let id = self.begin_mutate(op).await;
        self.reply(id).await
    }

    pub async fn mutate_as(&mut self, sequence: u64, acknowledged_below: u64, op: Op) -> v1::Reply {
        let id = self.begin_mutate_as(sequence, acknowledged_below, op).await;
        self.reply(id).await
    }

    pub async fn cancel(&mut self, id: u64) {
        let frame = v1::ClientFrame {
            cancels: vec![id],
            ..Default::default()
        };
        self.sender.send(frame).await.unwrap();
    }

    pub async fn ping(&mut self, ping: u64) {
        self.sender
            .send(v1::ClientFrame {
                ping,
                ..Default::default()
            })
            .await
            .unwrap();
    }

    pub async fn pong(&mut self) -> u64 {
        while self.pongs.is_empty() {
            self.take().await;
        }
        self.pongs.remove(0)
    }

    /// Says bye and waits for the end of the stream.
    pub async fn bye(mut self) {
        self.sender
            .send(v1::ClientFrame {
                bye: true,
                ..Default::default()
            })
            .await
            .unwrap();
        self.until_ended().await;
    }

    pub async fn until_ended(&mut self) {
        while !self.ended {
            self.take().await;
        }
    }
}

pub fn create(parent: u64, name: &str, kind: v1::FileKind) -> Op {
    Op::Create(v1::Create {
        parent,
        name: name.to_owned().into(),
        kind: kind as i32,
        mode: 0o644,
        ..Default::default()
    })
}

pub fn unlink(parent: u64, name: &str) -> Op {
    Op::Unlink(v1::Unlink {
        parent,
        name: name.to_owned().into(),
        directory: false,
    })
}

pub fn attr_of(reply: &v1::Reply) -> v1::Attr {
    assert_eq!(reply.error(), FsError::None);
    reply.attr.expect("the reply has attributes")
}

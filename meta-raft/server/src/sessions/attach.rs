//! The Sessions service: a session begins or comes back, and its stream is set up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use heliofs_proto::ids::{SessionId, VolumeId};
use heliofs_proto::limits::WIRE_VERSION;
use heliofs_proto::v1::{self, FsError, command::Op, sessions_server::Sessions};
use meta_core::query;
use tonic::{Request, Response, Status, Streaming};

use super::Context;
use super::hub::VolumeSessions;
use super::outbox::{Frames, Outbox, Outgoing, outbox};
use super::soft::ClientFacts;
use super::stream::SessionStream;
use crate::grpc::status;
use crate::proposer::ProposeError;

/// A client says hello at once.
const HELLO_WAIT: Duration = Duration::from_secs(10);

/// A new leader applies what it has before it serves; clients would only come back to it if it sent them away.
const REIGN_WAIT: Duration = Duration::from_secs(5);

/// The service.
#[derive(Clone)]
pub struct SessionsService {
    ctx: Context,
}

impl SessionsService {
    /// Over the node's parts.
    pub fn new(ctx: Context) -> Self {
        Self { ctx }
    }

    /// Waits until this node leads with its soft state in place; returns the term.
    async fn reign(&self) -> Result<u64, Status> {
        let mut leadership = self.ctx.leadership.clone();
        let mut reign = self.ctx.hub.reign();
        let leads = async {
            loop {
                let now = leadership.borrow_and_update().clone();
                let Some(leading) = now.leading() else {
                    return Err(status::not_leader(now.other_leader()));
                };
                if *reign.borrow_and_update() == Some(leading) {
                    return Ok(leading);
                }
                let gone = tokio::select! {
                    changed = leadership.changed() => changed.is_err(),
                    changed = reign.changed() => changed.is_err(),
                };
                if gone {
                    return Err(Status::unavailable("the node is stopping"));
                }
            }
        };
        let late = "this node was just elected and is not ready yet; try again";
        let waited = tokio::time::timeout(REIGN_WAIT, leads).await;
        waited.unwrap_or_else(|_| Err(Status::unavailable(late)))
    }

    /// Begins a session: it exists in the records before the client hears of it.
    async fn begin(&self, volume: &VolumeSessions, cluster_id: u32) -> Result<u64, Status> {
        let begin = Op::SessionBegin(v1::SessionBegin { cluster_id });
        let reply =
            super::propose(&self.ctx, volume, begin)
                .await
                .map_err(|error| match error {
                    // A session that nobody heard of expires, so another try is safe.
                    ProposeError::Unknown => Status::unavailable(error.to_string()),
                    ProposeError::NotLeader { .. }
                    | ProposeError::Fatal(_)
                    | ProposeError::Fenced(_) => status::propose(error),
                })?;
        match reply.error() {
            FsError::None => Ok(reply.value),
            error => Err(Status::unavailable(format!(
                "the session can't begin: {error:?}"
            ))),
        }
    }

    /// Does the session exist?
    async fn exists(&self, volume: VolumeId, session: u64) -> Result<bool, Status> {
        self.ctx.gate.linearizable().await.map_err(status::read)?;
        let Some(before) = session.checked_sub(1) else {
            return Ok(false);
        };
        let found = self
            .ctx
            .state
            .snapshot_view(|view| query::sessions(view, volume, SessionId(before), 1))
            .map_err(|found| status::corrupt(&self.ctx.damage, "a session", &found))?;
        Ok(found.first().is_some_and(|(id, _)| id.0 == session))
    }

    fn welcome(&self, volume: &v1::Volume, session: u64, term: u64) -> Result<v1::Welcome, Status> {
        let id = VolumeId(volume.id);
        let settings = self
            .ctx
            .state
            .snapshot_view(|view| query::settings(view, id))
            .map_err(|found| status::corrupt(&self.ctx.damage, "a volume's settings", &found))?;
        let timings = self.ctx.hub.timings();
        let (_, membership) = self.ctx.state.applied();
        Ok(v1::Welcome {
            session,
            volume_id: volume.id,
            storage: volume.storage.clone(),
            settings,
            lease_ms: timings.lease.as_millis() as u64,
            session_timeout_ms: timings.timeout.as_millis() as u64,
            cluster_id: self.ctx.state.cluster_id().map_or(0, |id| id.0),
            peers: membership
                .membership()
                .nodes()
                .map(|(_, node)| node.address.clone())
                .collect(),
            node: self.ctx.node.0,
            term,
            mirror: volume.mirror.is_some(),
            prefix: match &volume.mirror {
                Some(mirror) => mirror.prefix.clone(),
                None if volume.prefix.is_empty() => volume.name.clone(),
                None => volume.prefix.clone(),
            },
            second: volume.second.clone(),
        })
    }
}

/// The first frame must say hello, in our version.
async fn hello(inbound: &mut Streaming<v1::ClientFrame>) -> Result<v1::Hello, Status> {
    let first = tokio::time::timeout(HELLO_WAIT, inbound.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no hello came"))??;
    let hello = first
        .and_then(|frame| frame.hello)
        .ok_or_else(|| Status::invalid_argument("the first frame must hold a hello"))?;
    if hello.wire_version == WIRE_VERSION {
        Ok(hello)
    } else {
        Err(Status::invalid_argument(format!(
            "the client speaks wire version {}, this node speaks {WIRE_VERSION}: install the same release on both",
            hello.wire_version
        )))
    }
}

/// A stream whose only word is that the session is over.
fn ended() -> Response<Frames> {
    let (outbox, frames) = outbox();
    outbox.send(Outgoing::SessionEnded);
    Response::new(frames)
}

#[tonic::async_trait]
impl Sessions for SessionsService {
    type AttachStream = Frames;

    async fn attach(
        &self,
        request: Request<Streaming<v1::ClientFrame>>,
    ) -> Result<Response<Frames>, Status> {
        let mut inbound = request.into_inner();
        let hello = hello(&mut inbound).await?;
        let term = self.reign().await?;
        let record = self.ctx.state.volume_named(&hello.volume).ok_or_else(|| {
            Status::not_found(format!("no volume `{}` in this cluster", hello.volume))
        })?;
        if let Some(mirror) = &record.mirror
            && mirror.state() == v1::MirrorState::Loading
        {
            return Err(Status::unavailable(format!(
                "volume `{}` is a mirror that is being loaded",
                hello.volume
            )));
        }
        let volume = self
            .ctx
            .hub
            .volume(VolumeId(record.id))
            .map_err(|found| status::corrupt(&self.ctx.damage, "a volume's sessions", &found))?
            .ok_or_else(|| status::not_leader(self.ctx.leadership.borrow().other_leader()))?;
        let cluster = self
            .ctx
            .state
            .cluster_id()
            .ok_or_else(|| Status::unavailable("the cluster was not formed yet"))?;
        let mirror = record.mirror.is_some();
        let session = match hello.session {
            new_or_known if mirror => {
                let id = SessionId(new_or_known);
                if new_or_known != 0 && id.cluster() != cluster {
                    return Ok(ended());
                }
                volume.admit_to_mirror(cluster, term, new_or_known)
            }
            0 => self.begin(&volume, cluster.0).await?,
            resumed if self.exists(volume.id, resumed).await? => resumed,
            _ => return Ok(ended()),
        };
        let welcome = self.welcome(&record, session, term)?;
        let (mut outbox, frames) = outbox();
        // Once the volume is written here, what others wrote here is to be seen, whatever its source's bucket alone has.
        if hello.complete && mirror && record.second.is_some() {
            let pin = volume.soft().pin().ok_or_else(|| {
                Status::unavailable(format!(
                    "the mirror's own bucket is not complete up to any position of `{}` yet; see `heliofs mirror status`, \
                     or mount with --mirror-read latest",
                    hello.volume
                ))
            })?;
            outbox = outbox.pinned(pin.position);
        }
        outbox.send(Outgoing::Welcome(Box::new(welcome)));
        let Some(stream) = self.attach_stream(&volume, session, &hello, &outbox) else {
            return Ok(ended());
        };
        let stream = SessionStream {
            ctx: self.ctx.clone(),
            volume,
            session,
            stream,
            outbox,
            read_only: hello.read_only || mirror,
        };
        tracing::debug!(session, volume = %hello.volume, host = %hello.host, "a session attached");
        tokio::spawn(stream.run(inbound));
        Ok(Response::new(frames))
    }
}

impl SessionsService {
    /// Ties the stream to the session and takes over what it re-asserts. `None`: the session ended meanwhile.
    fn attach_stream(
        &self,
        volume: &Arc<VolumeSessions>,
        session: u64,
        hello: &v1::Hello,
        outbox: &Outbox,
    ) -> Option<u64> {
        let facts = ClientFacts {
            host: hello.host.clone(),
            mount_point: hello.mount_point.clone(),
            build: hello.build.clone(),
            pid: hello.pid,
            takes_leases: hello.takes_leases,
            takes_directories: hello.takes_directories,
        };
        let stream = self.ctx.hub.next_stream();
        let now = Instant::now();
        let wake = {
            let mut soft = volume.soft();
            if !soft.attach(session, stream, outbox.clone(), facts, now) {
                return None;
            }
            if hello.session != 0 {
                soft.follow_all(stream, now + self.ctx.hub.timings().lease);
            }
            let locks: Vec<v1::Lock> = hello.locks.iter().filter_map(|held| held.lock).collect();
            if !hello.directories.is_empty() {
                soft.comes_back_with_directories(session, self.ctx.hub.timings().lease, now);
            }
            soft.reassert_directories(session, &hello.directories);
            soft.reassert(session, &hello.opens, &hello.leases, &locks)
                .and(soft.settle(session, now))
        };
        volume.returned();
        self.ctx.hub.wake(volume, wake);
        Some(stream)
    }
}

//! One long-lived, pipelined stream of appends to a peer: requests go out without waiting, answers come in their order.

use std::pin::Pin;
use std::time::Duration;

use futures::{Stream, StreamExt};
use heliofs_proto::v1;
use openraft::errors::{NetworkError, RPCError};
use openraft::raft::{AppendEntriesRequest, StreamAppendResult};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::network::{PeerClient, rpc_error};
use super::types::{LogId, TypeConfig};
use super::wire;

/// Appends on their way to a peer. Enough that a round trip never stops the pipeline, few enough that a slow peer's backlog
/// stays in the log's cache.
const IN_FLIGHT_MAX: usize = 32;

/// How long a follower may be left without news of what is committed. Under load it hears it with an append, and applies many
/// entries as one group; a request that would tell only that is sent when nothing else came. Nobody waits for a follower to
/// apply but readers of its changelog, and whoever reads from it by read index.
const COMMIT_EVERY: Duration = Duration::from_millis(5);

/// An open stream. It outlives openraft's replication sessions as long as no answer is outstanding between them.
pub(super) struct AppendLink {
    requests: mpsc::Sender<v1::AppendRequest>,
    answers: Streaming<v1::AppendResponse>,
    outstanding: usize,
    broken: bool,
}

type Answer = Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>;

impl AppendLink {
    pub(super) async fn open(mut client: PeerClient) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(IN_FLIGHT_MAX);
        let answers = client.append(ReceiverStream::new(receiver)).await?;
        Ok(Self {
            requests,
            answers: answers.into_inner(),
            outstanding: 0,
            broken: false,
        })
    }

    /// No answer is outstanding and the stream works: another session may use it.
    pub(super) fn is_idle(&self) -> bool {
        self.outstanding == 0 && !self.broken && !self.requests.is_closed()
    }

    /// Sends `input`, yields an answer per request, ends with the input or with the first error.
    pub(super) fn run<'s, S>(
        &'s mut self,
        input: S,
        idle_max: Duration,
    ) -> impl Stream<Item = Answer> + Send + 's
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 's,
    {
        let session = Session {
            link: self,
            input: Some(input),
            idle_max,
            deadline: Box::pin(tokio::time::sleep(idle_max)),
            held: None,
            hold: Box::pin(tokio::time::sleep(COMMIT_EVERY)),
            commit: None,
            commit_due: Instant::now(),
            ended: false,
        };
        futures::stream::unfold(session, |mut session| async move {
            let answer = session.next().await?;
            Some((answer, session))
        })
    }

    fn answer(&mut self, message: Result<Option<v1::AppendResponse>, Status>) -> Answer {
        let answer = match message {
            Ok(Some(message)) => wire::append_response_from_wire(message)
                .map_err(|error| RPCError::Network(NetworkError::from_string(error))),
            Ok(None) => Err(RPCError::Network(NetworkError::from_string(
                "the peer ended the append stream",
            ))),
            Err(status) => Err(rpc_error(&status)),
        };
        self.outstanding -= 1;
        // The peer ends its side after it refused an append.
        self.broken |= !matches!(answer, Ok(Ok(_)));
        answer
    }
}

struct Session<'s, S> {
    link: &'s mut AppendLink,
    /// `None`: it has ended.
    input: Option<S>,
    idle_max: Duration,
    deadline: Pin<Box<Sleep>>,
    /// A request without entries that was not sent yet. openraft takes one answer for all requests up to its position, so a
    /// later one may take its place.
    held: Option<AppendEntriesRequest<TypeConfig>>,
    /// When `held` is sent at the latest.
    hold: Pin<Box<Sleep>>,
    /// The commit index that the peer was told last.
    commit: Option<LogId>,
    /// From when on it is told another.
    commit_due: Instant,
    ended: bool,
}

impl<S> Session<'_, S>
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin,
{
    async fn next(&mut self) -> Option<Answer> {
        if self.ended {
            return None;
        }
        loop {
            let room = self.link.outstanding < IN_FLIGHT_MAX;
            if room
                && self.input.is_none()
                && let Some(held) = self.held.take()
            {
                self.send(held);
            }
            let waiting = self.link.outstanding > 0;
            if self.input.is_none() && !waiting {
                return None;
            }
            tokio::select! {
                biased;
                message = self.link.answers.message(), if waiting => {
                    let answer = self.link.answer(message);
                    self.ended = self.link.broken;
                    self.rearm();
                    return Some(answer);
                }
                request = next(&mut self.input), if room && self.input.is_some() => {
                    let Some(request) = request else {
                        self.input = None;
                        continue;
                    };
                    if request.entries.is_empty() {
                        self.hold(request);
                    } else {
                        self.append(request);
                    }
                }
                () = self.hold.as_mut(), if room && self.held.is_some() => {
                    if let Some(held) = self.held.take() {
                        self.send(held);
                    }
                }
                () = self.deadline.as_mut(), if waiting => {
                    self.link.broken = true;
                    self.ended = true;
                    let error = NetworkError::from_string("no answer to an append in time");
                    return Some(Err(RPCError::Network(error)));
                }
            }
        }
    }

    fn hold(&mut self, request: AppendEntriesRequest<TypeConfig>) {
        if self.held.replace(request).is_none() {
            self.hold
                .as_mut()
                .reset(self.commit_due.max(Instant::now()));
        }
    }

    /// Sends entries; news of what is committed goes with them if it is time for it, and later if not.
    fn append(&mut self, mut request: AppendEntriesRequest<TypeConfig>) {
        if Instant::now() >= self.commit_due {
            self.held = None;
        } else if request.leader_commit > self.commit
            && let Some(last) = request.entries.last()
        {
            let later = AppendEntriesRequest {
                vote: request.vote,
                prev_log_id: Some(last.log_id),
                entries: Vec::new(),
                leader_commit: std::mem::replace(&mut request.leader_commit, self.commit),
            };
            self.hold(later);
        }
        self.send(request);
    }

    /// There is room for it: as many fit into the channel as may be in flight.
    fn send(&mut self, request: AppendEntriesRequest<TypeConfig>) {
        if self.link.outstanding == 0 {
            self.rearm();
        }
        self.link.outstanding += 1;
        if request.leader_commit > self.commit {
            self.commit = request.leader_commit;
            self.commit_due = Instant::now() + COMMIT_EVERY;
        }
        if self
            .link
            .requests
            .try_send(request_to_wire(request))
            .is_err()
        {
            self.link.broken = true;
        }
    }

    /// The next answer may take `idle_max` from when its request was sent or from now, whichever is later.
    fn rearm(&mut self) {
        self.deadline.as_mut().reset(Instant::now() + self.idle_max);
    }
}

async fn next<S: Stream + Unpin>(input: &mut Option<S>) -> Option<S::Item> {
    match input {
        Some(input) => input.next().await,
        None => None,
    }
}

fn request_to_wire(request: AppendEntriesRequest<TypeConfig>) -> v1::AppendRequest {
    v1::AppendRequest {
        vote: Some(wire::vote_to_wire(&request.vote)),
        prev_log_id: request.prev_log_id.map(wire::log_id_to_wire),
        entries: request.entries.iter().map(wire::entry_to_wire).collect(),
        leader_commit: request.leader_commit.map(wire::log_id_to_wire),
    }
}

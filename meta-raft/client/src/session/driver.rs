//! The task that reads a session's stream and keeps it attached, and what it shares with the handles.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::task::AtomicWaker;
use heliofs_proto::limits::MESSAGE_BYTES_MAX;
use heliofs_proto::v1;
use heliofs_proto::v1::request::Body;
use heliofs_proto::v1::sessions_client::SessionsClient;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use super::lease::Lease;
use super::state::{AnswerReceiver, State, Ticket};
use super::wire::Outgoing;
use super::{Event, Recalled, SessionOptions};
use crate::cluster::{Answer, Cluster, judge, root_cause};
use crate::dial::race;
use crate::error::{AttachError, ClientError, ClusterError};

/// What handles and tasks share.
pub(super) struct Shared {
    pub(super) cluster: Cluster,
    pub(super) options: SessionOptions,
    pub(super) state: Mutex<State>,
    pub(super) lease: Lease,
    /// Rises with every [`super::Watcher::forget_all`].
    pub(super) generation: AtomicU64,
    pub(super) invalidated_seq: AtomicU64,
    pub(super) events: Mutex<Option<mpsc::UnboundedSender<Event>>>,
    /// Whether the lease ran out since its last pong; guards the order of forgetting and renewing.
    lease_lost: Mutex<bool>,
    /// The clock found the leader silent.
    pub(super) leader_silent: Notify,
    /// The driver has ended.
    pub(super) ended: CancellationToken,
    next_line: AtomicU64,
}

impl Shared {
    /// Queues a request; its answer comes through the receiver.
    pub(super) fn submit(&self, body: Body) -> Result<(u64, AnswerReceiver), ClientError> {
        let (caller, answer) = oneshot::channel();
        let mut state = self.state.lock();
        let id = state.submit(body, Some(caller), Instant::now())?;
        wake(state);
        Ok((id, answer))
    }

    /// Counts an open, and queues what its caller needs.
    pub(super) fn submit_open(
        &self,
        ino: u64,
        how: (u32, bool),
    ) -> Result<(Ticket, AnswerReceiver), ClientError> {
        let (caller, answer) = oneshot::channel();
        let mut state = self.state.lock();
        let ticket = state.submit_open(ino, how, caller, Instant::now())?;
        wake(state);
        Ok((ticket, answer))
    }

    /// Queues a create whose file counts as open from its reply on.
    pub(super) fn submit_create_open(
        &self,
        command: v1::Command,
    ) -> Result<AnswerReceiver, ClientError> {
        let (caller, answer) = oneshot::channel();
        let mut state = self.state.lock();
        state.submit_create_open(command, caller, Instant::now())?;
        wake(state);
        Ok(answer)
    }

    pub(super) fn release(&self, ino: u64) {
        let mut state = self.state.lock();
        state.release(ino, Instant::now());
        wake(state);
    }

    pub(super) fn return_lease(&self, recall: Recalled) {
        let mut state = self.state.lock();
        state.return_lease(recall);
        wake(state);
    }

    pub(super) fn return_directory(&self, ino: u64) {
        let mut state = self.state.lock();
        state.return_directory(ino);
        wake(state);
    }

    pub(super) fn submit_batch(&self, command: v1::Command) -> Result<AnswerReceiver, ClientError> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.state.lock();
        state.submit_batch(command, sender, Instant::now())?;
        wake(state);
        Ok(receiver)
    }

    pub(super) fn expect_open(&self, ino: u64) {
        self.state.lock().expect_open(ino);
    }

    pub(super) fn submit_lock(&self, lock: v1::Lock) -> Result<(u64, AnswerReceiver), ClientError> {
        self.submit(Body::Lock(lock))
    }

    pub(super) fn give_up_lock(&self, id: u64) {
        let mut state = self.state.lock();
        state.give_up_lock(id);
        wake(state);
    }

    pub(super) fn may_hold_locks(&self, ino: u64, owner: u64, flock: bool) -> bool {
        self.state.lock().may_hold_locks(ino, owner, flock)
    }

    /// The answer, or that the session ended without one.
    pub(super) async fn wait(&self, answer: AnswerReceiver) -> Result<v1::Response, ClientError> {
        match answer.await {
            Ok(outcome) => outcome,
            Err(_) => Err(ClientError::SessionGone("its tasks have ended".to_owned())),
        }
    }

    /// Queues the farewell. Without a stream there is nobody to tell, and the session is simply over.
    pub(super) fn begin_detach(&self) {
        let mut state = self.state.lock();
        if state.leave() {
            wake(state);
        } else {
            drop(state);
            self.end("detached");
        }
    }

    /// The session is over: everyone who waits is told, caches forget, the lease ends.
    pub(super) fn end(&self, reason: &str) {
        let Some(completions) = self.state.lock().end(reason) else {
            return;
        };
        // So that the clock doesn't report it as lost on top.
        *self.lease_lost.lock() = true;
        self.lease.revoke();
        self.forget_all();
        for (caller, outcome) in completions {
            // A caller that has gone away doesn't mind.
            let _: Result<(), _> = caller.send(outcome);
        }
        self.emit(Event::Gone(reason.to_owned()));
        self.ended.cancel();
    }

    fn broke(&self, trouble: String) {
        let mut state = self.state.lock();
        state.trouble = trouble;
        state.broke();
    }

    pub(super) fn emit(&self, event: Event) {
        if let Some(events) = self.events.lock().as_ref() {
            // The receiver may have been dropped by an owner that no longer cares.
            let _: Result<(), _> = events.send(event);
        }
    }

    /// Moves the generation first: see [`super::Session::cacheable`].
    fn forget_all(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        if let Some(watcher) = &self.options.watcher {
            watcher.forget_all();
        }
    }

    /// Notices that the lease has run out since its last pong; caches forget before anything else happens.
    pub(super) fn check_lease(&self, now: Instant) {
        let mut lost = self.lease_lost.lock();
        if !*lost && !self.lease.valid_at(now) {
            *lost = true;
            self.forget_all();
            self.emit(Event::LeaseLost);
        }
    }

    /// A pong arrived.
    fn renew_lease(&self, sent: Instant) {
        let now = Instant::now();
        self.check_lease(now);
        let length = Duration::from_millis(self.state.lock().welcome.lease_ms);
        let mut lost = self.lease_lost.lock();
        self.lease.extend(sent, length);
        if *lost && self.lease.valid_at(now) {
            *lost = false;
            self.emit(Event::LeaseRegained);
        }
    }

    fn invalidate(&self, invalidation: v1::Invalidation) {
        let seq = invalidation.position.map_or(0, |position| position.seq);
        // Before the watcher hears of it: see `Session::cacheable`.
        self.invalidated_seq.fetch_max(seq, Ordering::AcqRel);
        match &self.options.watcher {
            Some(watcher) => watcher.invalidated(&invalidation),
            None => self.emit(Event::Invalidate(invalidation)),
        }
    }
}

/// Releases the mutex, then wakes the sender if it slept.
pub(super) fn wake(mut state: parking_lot::MutexGuard<'_, State>) {
    let sleeper = state.sleeper();
    drop(state);
    if let Some(sleeper) = sleeper {
        sleeper.wake();
    }
}

/// An accepted stream.
struct Attached {
    peer: String,
    line: u64,
    accepted: Arc<AtomicWaker>,
    hello_opens: Vec<u64>,
    welcome: v1::Welcome,
    frames: Streaming<v1::ServerFrame>,
    /// Keeps the connection open.
    _client: SessionsClient<tonic::transport::Channel>,
}

/// Why reading stopped.
enum Stop {
    /// Resume, here or elsewhere.
    Broken(String),
    /// The session is over.
    Gone(String),
    /// The last handle is gone, or the farewell was answered.
    Left,
}

/// See the module.
pub(super) struct Driver {
    shared: Arc<Shared>,
    stop: CancellationToken,
}

impl Driver {
    /// Attaches, then spawns the tasks.
    pub(super) async fn start(
        cluster: Cluster,
        options: SessionOptions,
        stop: CancellationToken,
    ) -> Result<Arc<Shared>, AttachError> {
        let now = Instant::now();
        let shared = Arc::new(Shared {
            cluster,
            options,
            state: Mutex::new(State::new(now)),
            lease: Lease::new(now),
            generation: AtomicU64::new(0),
            invalidated_seq: AtomicU64::new(0),
            events: Mutex::new(None),
            lease_lost: Mutex::new(true),
            leader_silent: Notify::new(),
            ended: CancellationToken::new(),
            next_line: AtomicU64::new(1),
        });
        let attempt = |peer| attach(shared.clone(), peer);
        let attached = race(&shared.cluster, None, false, attempt, |_| {})
            .await
            .map_err(|error| match error {
                ClusterError::NotFound(detail) => AttachError::NoVolume {
                    volume: shared.options.volume.clone(),
                    detail,
                },
                error => AttachError::Cluster(error),
            })?;
        let driver = Self {
            shared: shared.clone(),
            stop: stop.clone(),
        };
        let frames = driver.adopt(attached);
        tokio::spawn(super::clock::run(shared.clone(), stop));
        tokio::spawn(driver.run(frames));
        Ok(shared)
    }

    /// Makes an accepted stream the session's.
    fn adopt(&self, attached: Attached) -> Attached {
        let shared = &self.shared;
        shared.cluster.learn_peers(&attached.welcome.peers);
        shared.cluster.learn_leader(Some(attached.peer.clone()));
        let mut state = shared.state.lock();
        let welcome = attached.welcome.clone();
        state.attach(
            attached.line,
            welcome,
            &attached.hello_opens,
            Instant::now(),
        );
        drop(state);
        attached.accepted.wake();
        attached
    }

    async fn run(self, mut attached: Attached) {
        loop {
            let stop = self.read(&mut attached).await;
            let trouble = match stop {
                Stop::Broken(trouble) => trouble,
                Stop::Gone(reason) => return self.shared.end(&reason),
                Stop::Left => return self.shared.end("detached"),
            };
            let peer = attached.peer.clone();
            // Ends the old stream before the next begins: the server then sees one stream of this session.
            drop(attached);
            tracing::info!(peer, trouble, "session: the stream broke, resuming");
            self.shared.broke(format!("{peer}: {trouble}"));
            // Before anybody hears a hello of ours: the next leader takes it for our word that nothing is cached any more.
            self.shared.lease.revoke();
            self.shared.check_lease(Instant::now());
            self.shared.emit(Event::Disconnected);
            attached = match self.resume(&peer).await {
                Ok(resumed) => resumed,
                Err(Stop::Gone(reason)) => return self.shared.end(&reason),
                Err(Stop::Left) | Err(Stop::Broken(_)) => return self.shared.end("detached"),
            };
        }
    }

    /// Attaches again, as the same session, for as long as it takes.
    async fn resume(&self, avoid: &str) -> Result<Attached, Stop> {
        let shared = &self.shared;
        let begun = Instant::now();
        let session = shared.state.lock().welcome.session;
        let attempt = |peer| attach(shared.clone(), peer);
        let note = |trouble: &str| shared.state.lock().trouble = trouble.to_owned();
        let raced = tokio::select! {
            raced = race(&shared.cluster, Some(avoid), true, attempt, note) => raced,
            () = self.stop.cancelled() => return Err(Stop::Left),
            () = shared.ended.cancelled() => return Err(Stop::Left),
        };
        let attached = match raced {
            Ok(attached) => attached,
            Err(error) => return Err(Stop::Gone(error.to_string())),
        };
        if attached.welcome.session != session {
            return Err(Stop::Gone("the server began another session".to_owned()));
        }
        // The server may have forgotten what it told us; nothing cached so far survives, and no answer under way is cached.
        shared.forget_all();
        let attached = self.adopt(attached);
        tracing::info!(
            peer = attached.peer,
            after_ms = begun.elapsed().as_millis() as u64,
            "session: resumed"
        );
        shared.emit(Event::Reattached);
        Ok(attached)
    }

    /// Takes frames in until the stream is of no more use.
    async fn read(&self, attached: &mut Attached) -> Stop {
        let shared = &self.shared;
        loop {
            let message = tokio::select! {
                biased;
                message = attached.frames.message() => message,
                () = shared.leader_silent.notified() => {
                    return Stop::Broken("the leader is silent".to_owned());
                }
                () = self.stop.cancelled() => return Stop::Left,
                () = shared.ended.cancelled() => return Stop::Left,
            };
            match message {
                Ok(Some(frame)) => {
                    if let Err(stop) = self.take_in(frame) {
                        return stop;
                    }
                }
                Ok(None) if shared.state.lock().leaving() => return Stop::Left,
                Ok(None) => return Stop::Broken("it ended the stream".to_owned()),
                Err(status) => return self.broken(&status),
            }
        }
    }

    fn broken(&self, status: &Status) -> Stop {
        if self.shared.state.lock().leaving() {
            return Stop::Left;
        }
        if let Some(leader) = status.metadata().get(crate::cluster::LEADER_KEY) {
            let leader = leader.to_str().unwrap_or_default().to_owned();
            self.shared.cluster.learn_leader(Some(leader));
        }
        Stop::Broken(root_cause(status))
    }

    fn take_in(&self, frame: v1::ServerFrame) -> Result<(), Stop> {
        let shared = &self.shared;
        // Invalidations first, also of the same frame: the position rule tells which responses they overtook.
        for invalidation in frame.invalidations {
            shared.invalidate(invalidation);
        }
        let now = Instant::now();
        let mut completions = Vec::with_capacity(frame.responses.len());
        let mut gone = frame.session_ended;
        let mut state = shared.state.lock();
        state.heard(now);
        for response in frame.responses {
            gone |= state.answered(response, now, &mut completions);
        }
        let recalls: Vec<Recalled> = frame.recalls.into_iter().map(Recalled::from).collect();
        for recall in &recalls {
            state.lease_recalled(*recall);
        }
        let sent = (frame.pong != 0).then(|| state.pong(frame.pong)).flatten();
        if state.can_go_on() || state.has_queued() {
            wake(state);
        } else {
            drop(state);
        }
        for (caller, outcome) in completions {
            // A caller that has gone away doesn't mind.
            let _: Result<(), _> = caller.send(outcome);
        }
        if let Some(sent) = sent {
            shared.renew_lease(sent);
        }
        for recall in recalls {
            match &shared.options.watcher {
                Some(watcher) => watcher.recalled(recall),
                None => shared.return_lease(recall),
            }
        }
        if gone {
            return Err(Stop::Gone("the server ended it".to_owned()));
        }
        if let Some(leader) = frame.moved {
            shared.cluster.learn_leader(Some(leader));
            return Err(Stop::Broken("the leader moved".to_owned()));
        }
        Ok(())
    }
}

/// One attempt at one peer: connects, says hello, and waits for the welcome.
async fn attach(shared: Arc<Shared>, peer: String) -> Result<Attached, Answer> {
    let timeout = shared.cluster.options().attempt_timeout;
    match tokio::time::timeout(timeout, greet(shared, peer)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Answer::Broken("it did not answer in time".to_owned())),
    }
}

async fn greet(shared: Arc<Shared>, peer: String) -> Result<Attached, Answer> {
    let endpoint = shared.cluster.endpoint(&peer).map_err(Answer::Refused)?;
    // A connection of its own: it is fresh after a failure, and nothing else stands in its way.
    let channel = endpoint
        .connect()
        .await
        .map_err(|error| Answer::Unreachable(root_cause(&error)))?;
    let mut client = SessionsClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let line = shared.next_line.fetch_add(1, Ordering::Relaxed);
    let hello = shared.state.lock().hello(&shared.options);
    let resumes = hello.session != 0;
    let hello_opens = hello.opens.clone();
    let accepted = Arc::new(AtomicWaker::new());
    let outgoing = Outgoing::new(shared.clone(), line, accepted.clone(), hello);
    let refused = |status: Status| refusal(&peer, &status, resumes);
    let response = client.attach(shared.cluster.request(outgoing)).await;
    let mut frames = response.map_err(refused)?.into_inner();
    let first = frames.message().await.map_err(refused)?;
    let first =
        first.ok_or_else(|| Answer::Broken("it ended the stream without a welcome".to_owned()))?;
    if first.session_ended {
        let ended = "the session had ended when it was resumed".to_owned();
        return Err(Answer::Refused(ClusterError::NotFound(ended)));
    }
    if let Some(leader) = first.moved {
        let hint = Some(leader).filter(|leader| !leader.is_empty());
        return Err(Answer::Elsewhere(hint, "it does not lead".to_owned()));
    }
    let Some(welcome) = first.welcome else {
        let detail = format!("{peer} did not begin with a welcome: is it a heliofs node?");
        return Err(Answer::Refused(ClusterError::Invalid(detail)));
    };
    Ok(Attached {
        peer,
        line,
        accepted,
        hello_opens,
        welcome,
        frames,
        _client: client,
    })
}

/// What a refused attach means. A session that exists doesn't die of a refusal that may pass (a node with another token or
/// build in the middle of an upgrade): only of the leader's word that it, or its volume, is no more.
fn refusal(peer: &str, status: &Status, resumes: bool) -> Answer {
    match judge(peer, status) {
        Answer::Refused(error) if resumes => match status.code() {
            Code::NotFound | Code::Aborted => {
                Answer::Refused(ClusterError::NotFound(status.message().to_owned()))
            }
            _ => {
                tracing::warn!(peer, %error, "session: a node refused to resume it; trying on");
                Answer::Elsewhere(None, error.to_string())
            }
        },
        answer => answer,
    }
}

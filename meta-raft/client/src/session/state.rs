//! What a session knows at one moment: unanswered requests, the queue, opens, locks. Everything here runs under one mutex,
//! does no I/O, and is handed the time.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use heliofs_proto::error::FsError;
use heliofs_proto::limits::{IN_FLIGHT_MAX, WIRE_VERSION};
use heliofs_proto::v1;
use heliofs_proto::v1::command::Op;
use heliofs_proto::v1::request::Body;
use prost::Message;
use tokio::sync::oneshot;

use super::locks::HeldLocks;
use super::opens::{Need, Opens};
use super::pulse::Pulse;
use super::window::Window;
use super::{Recalled, SessionOptions};
use crate::error::ClientError;

/// A frame takes no further request beyond this; the rest travels in the next one. Well below the largest message, since a
/// single request may be as long as a commit of many inline files.
const FRAME_BYTES_MAX: usize = 1 << 20;

/// What a waiting caller gets.
pub(super) type Outcome = Result<v1::Response, ClientError>;

/// The caller's end.
pub(super) type AnswerReceiver = oneshot::Receiver<Outcome>;

/// A caller and what to tell it, once the mutex is released.
pub(super) type Completion = (oneshot::Sender<Outcome>, Outcome);

/// Which request an open became.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ticket {
    /// `Open`: the first of this inode.
    Open,
    /// `GetExtents`: the inode is registered already.
    Read,
}

/// Where the session stands with the server.
#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// No stream; requests wait.
    Broken,
    /// Requests travel on the line of this number.
    Attached(u64),
    /// As `Attached`, with a farewell behind what is queued.
    Leaving(u64),
    /// Over, and why.
    Gone(String),
}

/// An unanswered request.
struct Pending {
    body: Body,
    /// `None`: nobody waits (any more), but the answer matters.
    caller: Option<oneshot::Sender<Outcome>>,
    submitted: Instant,
    /// Blocking locks wait without bound.
    bounded: bool,
    /// A blocking lock whose caller gave up.
    given_up: bool,
    /// A create whose file the caller goes on to use.
    keeps_open: bool,
}

impl Pending {
    /// The sequence of a mutation that was sent at least once.
    fn sequence(&self) -> Option<u64> {
        match &self.body {
            Body::Command(command) if command.sequence != 0 => Some(command.sequence),
            _ => None,
        }
    }

    /// Whether the answer changes what this session knows, so that it must be had even when nobody waits.
    fn matters_to_session(&self) -> bool {
        matches!(
            self.body,
            Body::Command(_) | Body::Lock(_) | Body::ReleaseLocks(_)
        )
    }
}

/// Something to send, in order.
enum Out {
    Request(u64),
    Release(u64),
    ReturnLease(Recalled),
    Cancel(u64),
}

/// See the module.
pub(super) struct State {
    pub(super) welcome: Arc<v1::Welcome>,
    phase: Phase,
    last_line: u64,
    next_id: u64,
    pending: HashMap<u64, Pending>,
    outbox: VecDeque<Out>,
    /// Mutations that wait for room in the window, in order.
    stalled: VecDeque<u64>,
    window: Window,
    opens: Opens,
    /// Directories whose write lease was granted and not returned: by which grant, and whether it is wanted back.
    directories: HashMap<u64, (u64, bool)>,
    locks: HeldLocks,
    pulse: Pulse,
    /// Of the task that sends, while it has nothing to do.
    waker: Option<Waker>,
    /// The last failure to reach a leader, for messages.
    pub(super) trouble: String,
}

impl State {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            welcome: Arc::default(),
            phase: Phase::Broken,
            last_line: 0,
            next_id: 1,
            pending: HashMap::new(),
            outbox: VecDeque::new(),
            stalled: VecDeque::new(),
            window: Window::new(IN_FLIGHT_MAX),
            opens: Opens::default(),
            directories: HashMap::new(),
            locks: HeldLocks::default(),
            pulse: Pulse::new(now),
            waker: None,
            trouble: "the leader does not answer".to_owned(),
        }
    }

    /// Why the session is over, when it is.
    pub(super) fn gone(&self) -> Option<&str> {
        match &self.phase {
            Phase::Gone(reason) => Some(reason),
            _ => None,
        }
    }

    /// The task that sends, if it sleeps. To be woken after the mutex is released.
    pub(super) fn sleeper(&mut self) -> Option<Waker> {
        self.waker.take()
    }

    fn push(&mut self, out: Out) {
        // Without a stream nothing is queued: attaching queues what is unanswered, and the hello says what is open.
        if let Phase::Attached(_) = self.phase {
            self.outbox.push_back(out);
        }
    }

    /// Queues a request.
    pub(super) fn submit(
        &mut self,
        body: Body,
        caller: Option<oneshot::Sender<Outcome>>,
        now: Instant,
    ) -> Result<u64, ClientError> {
        match &self.phase {
            Phase::Gone(reason) => return Err(ClientError::SessionGone(reason.clone())),
            Phase::Leaving(_) => return Err(ClientError::SessionGone("detached".to_owned())),
            Phase::Broken | Phase::Attached(_) => {}
        }
        let id = self.next_id;
        self.next_id += 1;
        let bounded = caller.is_some() && !matches!(&body, Body::Lock(lock) if lock.wait);
        let pending = Pending {
            body,
            caller,
            submitted: now,
            bounded,
            given_up: false,
            keeps_open: false,
        };
        self.pending.insert(id, pending);
        self.push(Out::Request(id));
        Ok(id)
    }

    /// As [`State::submit`] for a create: its file counts as open from its reply on.
    pub(super) fn submit_create_open(
        &mut self,
        command: v1::Command,
        caller: oneshot::Sender<Outcome>,
        now: Instant,
    ) -> Result<(), ClientError> {
        let id = self.submit(Body::Command(command), Some(caller), now)?;
        if let Some(pending) = self.pending.get_mut(&id) {
            pending.keeps_open = true;
        }
        Ok(())
    }

    /// As [`State::submit`] for a batch, whose outcome is waited for without bound.
    pub(super) fn submit_batch(
        &mut self,
        command: v1::Command,
        caller: oneshot::Sender<Outcome>,
        now: Instant,
    ) -> Result<(), ClientError> {
        let id = self.submit(Body::Command(command), Some(caller), now)?;
        if let Some(pending) = self.pending.get_mut(&id) {
            pending.bounded = false;
        }
        Ok(())
    }

    /// Counts an open of a file that a batch to come makes.
    pub(super) fn expect_open(&mut self, ino: u64) {
        self.opens.expect(ino);
    }

    /// Counts an open and queues what its caller needs. [`State::release`] takes the count back, also after a failure.
    pub(super) fn submit_open(
        &mut self,
        ino: u64,
        (extents_max, write): (u32, bool),
        caller: oneshot::Sender<Outcome>,
        now: Instant,
    ) -> Result<Ticket, ClientError> {
        if self.opens.add(ino) != Need::Register {
            let body = Body::GetExtents(v1::GetExtents {
                ino,
                offset: 0,
                length: u64::MAX,
                extents_max,
            });
            self.submit(body, Some(caller), now)?;
            return Ok(Ticket::Read);
        }
        let body = Body::Open(v1::Open {
            ino,
            extents_max,
            write,
        });
        let id = self.submit(body, Some(caller), now)?;
        self.opens.opening(ino, id);
        Ok(Ticket::Open)
    }

    /// Takes one open back; the last one ends the server's registration.
    pub(super) fn release(&mut self, ino: u64, now: Instant) {
        let need = self.opens.release(ino);
        self.meet(need, ino, now);
    }

    /// The server wants a file's write lease back; it gets it through [`State::return_lease`].
    pub(super) fn lease_recalled(&mut self, recall: Recalled) {
        match self.directories.get_mut(&recall.ino) {
            Some((grant, recalled)) => *recalled |= *grant == recall.grant,
            None => self.opens.lease_recalled(recall),
        }
    }

    /// Whether this session holds a directory's write lease, and nobody wants it back.
    pub(super) fn holds_directory(&self, ino: u64) -> bool {
        self.directories
            .get(&ino)
            .is_some_and(|(_, recalled)| !recalled)
    }

    /// Returns a directory's write lease, wanted back or not. Nothing happens if it is not held.
    pub(super) fn return_directory(&mut self, ino: u64) {
        if let Some((grant, _)) = self.directories.remove(&ino) {
            self.push(Out::ReturnLease(Recalled { ino, grant }));
        }
    }

    /// Whether data may be kept back under the file's write lease, as far as the leader said.
    pub(super) fn holds_lease(&self, ino: u64) -> bool {
        self.opens.holds_lease(ino)
    }

    /// Answers a recall. Said again by the next hello when it is lost with the stream.
    pub(super) fn return_lease(&mut self, recall: Recalled) {
        self.opens.lease_returned(recall);
        let held = self.directories.get(&recall.ino);
        if held.is_some_and(|(grant, _)| *grant == recall.grant) {
            self.directories.remove(&recall.ino);
        }
        self.push(Out::ReturnLease(recall));
    }

    fn meet(&mut self, need: Need, ino: u64, now: Instant) {
        match need {
            Need::Nothing => {}
            Need::Release => self.push(Out::Release(ino)),
            Need::Register => {
                let body = Body::Open(v1::Open {
                    ino,
                    extents_max: 0,
                    write: false,
                });
                // Fails only when the session is over, and the registration with it.
                if let Ok(id) = self.submit(body, None, now) {
                    self.opens.opening(ino, id);
                }
            }
        }
    }

    /// Whether an owner holds, or is asking for, locks on an inode.
    pub(super) fn may_hold_locks(&self, ino: u64, owner: u64, flock: bool) -> bool {
        let same = |lock: &v1::Lock| lock.ino == ino && lock.owner == owner && lock.flock == flock;
        self.locks.any(ino, owner, flock)
            || self
                .pending
                .values()
                .any(|pending| matches!(&pending.body, Body::Lock(lock) if same(lock)))
    }

    /// The caller of a lock no longer waits.
    pub(super) fn give_up_lock(&mut self, id: u64) {
        if let Some(pending) = self.pending.get_mut(&id) {
            pending.given_up = true;
            pending.caller = None;
            if matches!(&pending.body, Body::Lock(lock) if lock.wait) {
                self.push(Out::Cancel(id));
            }
        }
    }

    /// What a new stream begins with, and the opens that it names.
    pub(super) fn hello(&self, options: &SessionOptions) -> v1::Hello {
        v1::Hello {
            wire_version: WIRE_VERSION,
            volume: options.volume.clone(),
            session: self.welcome.session,
            host: options.host.clone(),
            mount_point: options.mount_point.clone(),
            build: options.build.clone(),
            pid: options.pid,
            read_only: options.read_only,
            complete: options.complete,
            opens: self.opens.registered(),
            locks: self.locks.held(),
            volume_token: options.volume_token.clone(),
            leases: self.opens.leases(),
            short_lived: options.short_lived,
            takes_leases: options.takes_leases,
            takes_directories: options.takes_directories,
            directories: self
                .directories
                .iter()
                .map(|(ino, (grant, _))| v1::WriteLease {
                    ino: *ino,
                    grant: *grant,
                })
                .collect(),
        }
    }

    /// A stream was accepted: queues everything unanswered, mutations that were sent before first and in their order.
    /// `hello_opens`: what its hello said; what changed since is made up for.
    pub(super) fn attach(
        &mut self,
        line: u64,
        welcome: v1::Welcome,
        hello_opens: &[u64],
        now: Instant,
    ) {
        self.welcome = Arc::new(welcome);
        self.phase = Phase::Attached(line);
        self.last_line = line;
        self.outbox.clear();
        self.stalled.clear();
        self.pulse.begin(now);
        self.waker = None;
        // Reads that nobody waits for any more are not repeated, nor opens that were released before they were answered.
        let opens = &self.opens;
        self.pending.retain(|id, pending| match &pending.body {
            Body::Open(open) => opens.is_opening(open.ino, *id),
            _ => {
                pending.matters_to_session()
                    || pending.caller.as_ref().is_some_and(|c| !c.is_closed())
            }
        });
        for &ino in hello_opens {
            if !self.opens.is_registered(ino) {
                self.outbox.push_back(Out::Release(ino));
            }
        }
        let mut again: Vec<(Option<u64>, u64, bool)> = self
            .pending
            .iter()
            .map(|(id, pending)| (pending.sequence(), *id, pending.given_up))
            .collect();
        again.sort_by_key(|(sequence, id, _)| (sequence.unwrap_or(u64::MAX), *id));
        for (_, id, given_up) in again {
            self.outbox.push_back(Out::Request(id));
            if given_up {
                self.outbox.push_back(Out::Cancel(id));
            }
        }
    }

    /// The stream is gone; requests wait.
    pub(super) fn broke(&mut self) {
        if let Phase::Attached(_) | Phase::Leaving(_) = self.phase {
            self.phase = Phase::Broken;
            self.outbox.clear();
            self.pulse.end();
            // The line's sender learns that it was left, and ends.
            if let Some(waker) = self.waker.take() {
                waker.wake();
            }
        }
    }

    /// Begins the farewell; false when there is no stream to say it on.
    pub(super) fn leave(&mut self) -> bool {
        match self.phase {
            Phase::Attached(line) => {
                self.phase = Phase::Leaving(line);
                true
            }
            Phase::Leaving(_) => true,
            Phase::Broken | Phase::Gone(_) => false,
        }
    }

    /// Ends the session; everyone who waits is to be told. `None` when it was over already.
    pub(super) fn end(&mut self, reason: &str) -> Option<Vec<Completion>> {
        if let Phase::Gone(_) = self.phase {
            return None;
        }
        self.phase = Phase::Gone(reason.to_owned());
        self.outbox.clear();
        self.stalled.clear();
        self.opens.clear();
        self.directories.clear();
        self.locks = HeldLocks::default();
        let gone = ClientError::SessionGone(reason.to_owned());
        let completions = self
            .pending
            .drain()
            .filter_map(|(_, pending)| Some((pending.caller?, Err(gone.clone()))))
            .collect();
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
        Some(completions)
    }

    /// The line that requests travel on.
    pub(super) fn line(&self) -> Option<u64> {
        match self.phase {
            Phase::Attached(line) | Phase::Leaving(line) => Some(line),
            Phase::Broken | Phase::Gone(_) => None,
        }
    }

    /// The greatest line that was ever accepted.
    pub(super) fn last_line(&self) -> u64 {
        self.last_line
    }

    /// Whether the farewell has begun.
    pub(super) fn leaving(&self) -> bool {
        matches!(self.phase, Phase::Leaving(_))
    }

    /// The next frame, of everything that waits at this moment (as far as one frame holds); `None` when nothing does.
    pub(super) fn frame(&mut self, now: Instant) -> Option<v1::ClientFrame> {
        let mut frame = v1::ClientFrame::default();
        let mut bytes = 0;
        while bytes < FRAME_BYTES_MAX && self.window.has_room() {
            let Some(id) = self.stalled.pop_front() else {
                break;
            };
            self.put_request(id, &mut frame, &mut bytes);
        }
        while bytes < FRAME_BYTES_MAX {
            let Some(out) = self.outbox.pop_front() else {
                break;
            };
            match out {
                Out::Request(id) => self.put_request(id, &mut frame, &mut bytes),
                Out::Release(ino) => {
                    let id = self.next_id;
                    self.next_id += 1;
                    let body = Some(Body::Release(v1::Release { ino }));
                    frame.requests.push(v1::Request { id, body });
                }
                Out::ReturnLease(recall) => {
                    let id = self.next_id;
                    self.next_id += 1;
                    let lease = Some(v1::WriteLease {
                        ino: recall.ino,
                        grant: recall.grant,
                    });
                    let body = Some(Body::ReturnLease(v1::ReturnLease { lease }));
                    frame.requests.push(v1::Request { id, body });
                }
                Out::Cancel(id) => frame.cancels.push(id),
            }
        }
        frame.ping = self.pulse.take_due(now).unwrap_or(0);
        let empty = frame.requests.is_empty() && frame.cancels.is_empty() && frame.ping == 0;
        (!empty).then_some(frame)
    }

    /// Copies a request into the frame: a mutation under its sequence, or aside when the window has no room.
    fn put_request(&mut self, id: u64, frame: &mut v1::ClientFrame, bytes: &mut usize) {
        let Some(pending) = self.pending.get_mut(&id) else {
            return;
        };
        if let Body::Command(command) = &mut pending.body {
            if command.sequence == 0 {
                // Nobody waits for it and it was never sent: it did not happen.
                if pending
                    .caller
                    .as_ref()
                    .is_none_or(oneshot::Sender::is_closed)
                {
                    self.pending.remove(&id);
                    return;
                }
                // Those that stalled before got their chance first: `frame` takes them ahead of the outbox.
                match self.window.assign() {
                    Some(sequence) => command.sequence = sequence,
                    None => {
                        self.stalled.push_back(id);
                        return;
                    }
                }
            }
            command.acknowledged_below = self.window.acknowledged_below();
        }
        let body = Some(pending.body.clone());
        let request = v1::Request { id, body };
        *bytes += request.encoded_len();
        frame.requests.push(request);
    }

    /// Whether the farewell is due: everything that was queued has been handed out.
    pub(super) fn bye_due(&self) -> bool {
        matches!(self.phase, Phase::Leaving(_)) && self.outbox.is_empty()
    }

    /// The sending task has nothing to do.
    pub(super) fn sleep(&mut self, waker: &Waker) {
        match &mut self.waker {
            Some(old) => old.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }

    /// A frame arrived.
    pub(super) fn heard(&mut self, now: Instant) {
        self.pulse.heard(now);
    }

    /// When the ping that this pong echoes was sent.
    pub(super) fn pong(&mut self, ping: u64) -> Option<Instant> {
        self.pulse.pong(ping)
    }

    /// Takes in a response; whom to tell. Also says whether the server no longer knows the session.
    pub(super) fn answered(
        &mut self,
        response: v1::Response,
        now: Instant,
        completions: &mut Vec<Completion>,
    ) -> bool {
        let id = response.id;
        let Some(pending) = self.pending.remove(&id) else {
            // The deadline passed before, or it is the answer to a release.
            return false;
        };
        let ok = response.error() == FsError::None;
        let mut session_gone = response.error() == FsError::SessionGone;
        let mut needs = Vec::new();
        match &pending.body {
            Body::Command(command) => {
                self.window.resolve(command.sequence);
                if let Some(v1::response::Body::Reply(reply)) = &response.body {
                    session_gone |= reply.error() == FsError::SessionGone;
                    if let Some(ino) = created_file(command, reply) {
                        let used = pending.caller.as_ref().is_some_and(|c| !c.is_closed());
                        let need = self.opens.created(ino, pending.keeps_open && used);
                        if response.write_lease != 0 {
                            self.opens.lease_granted(ino, response.write_lease);
                        }
                        self.meet(need, ino, now);
                    }
                    if let Some(ino) = created(command, reply, v1::FileKind::Directory)
                        && response.write_lease != 0
                    {
                        self.directories.insert(ino, (response.write_lease, false));
                    }
                    if let Some(Op::Batch(batch)) = &command.op {
                        for (ino, is_file) in made_by(batch, reply) {
                            if is_file {
                                let need = self.opens.made(ino);
                                needs.push((need, ino));
                            }
                        }
                        for lease in &response.write_leases {
                            let mut made = made_by(batch, reply);
                            if made.any(|(ino, is_file)| ino == lease.ino && is_file) {
                                self.opens.lease_granted(lease.ino, lease.grant);
                            } else {
                                self.directories.insert(lease.ino, (lease.grant, false));
                            }
                        }
                    }
                }
            }
            Body::Open(open) => {
                // Not the answer to an open that was released since, which ended its lease.
                if response.write_lease != 0 && self.opens.is_opening(open.ino, id) {
                    self.opens.lease_granted(open.ino, response.write_lease);
                }
                let need = self.opens.opened(open.ino, id, ok);
                self.meet(need, open.ino, now);
            }
            // An unlock that nobody waits for is still wanted.
            Body::Lock(lock) if ok && pending.given_up && lock.kind() != v1::LockKind::Unlock => {
                for undo in self.locks.undo(lock) {
                    // Fails only when the session is over, and its locks with it.
                    let _: Result<u64, _> = self.submit(Body::Lock(undo), None, now);
                }
            }
            Body::Lock(lock) if ok => self.locks.granted(lock),
            Body::ReleaseLocks(of) if ok => self.locks.released(of.ino, of.owner, of.flock),
            _ => {}
        }
        for (need, ino) in needs {
            self.meet(need, ino, now);
        }
        if let Some(caller) = pending.caller {
            completions.push((caller, Ok(response)));
        }
        session_gone
    }

    /// Whether mutations wait that now have room.
    pub(super) fn can_go_on(&self) -> bool {
        !self.stalled.is_empty() && self.window.has_room() && self.line().is_some()
    }

    /// Whether anything waits to be sent.
    pub(super) fn has_queued(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Fails what has waited for longer than `deadline`. A mutation that was sent stays, without its caller: its sequence is
    /// resolved only by its reply.
    pub(super) fn expire(&mut self, deadline: Duration, now: Instant) -> Vec<Completion> {
        let mut completions = Vec::new();
        let mut opens = Vec::new();
        let detail = match self.phase {
            Phase::Broken => self.trouble.clone(),
            _ => "the leader does not answer".to_owned(),
        };
        self.pending.retain(|id, pending| {
            let waited = now.saturating_duration_since(pending.submitted);
            if !pending.bounded || waited < deadline {
                return true;
            }
            let sent_mutation = pending.sequence().is_some();
            let Some(caller) = pending.caller.take() else {
                return true;
            };
            let detail = detail.clone();
            if sent_mutation {
                completions.push((caller, Err(ClientError::Unknown { waited, detail })));
                return true;
            }
            completions.push((caller, Err(ClientError::Unavailable { waited, detail })));
            if let Body::Open(open) = &pending.body {
                opens.push((*id, open.ino));
            }
            // A lock must be known to be held or not; whoever asked is gone, so a grant is taken back.
            if let Body::Lock(_) = &pending.body {
                pending.given_up = true;
                return true;
            }
            matches!(pending.body, Body::ReleaseLocks(_))
        });
        for (id, ino) in opens {
            let need = self.opens.opened(ino, id, false);
            self.meet(need, ino, now);
        }
        completions
    }

    /// Makes a ping due when the last one is `every` ago; true when the sender is to be woken.
    pub(super) fn ping_if_due(&mut self, every: Duration, now: Instant) -> bool {
        self.line().is_some() && self.pulse.tick(every, now)
    }

    /// Whether the leader has been silent for this long.
    pub(super) fn silent(&self, silence: Duration, now: Instant) -> bool {
        self.line().is_some() && self.pulse.silent(silence, now)
    }
}

/// The inode of a successful create of a regular file, also of one that existed.
fn created_file(command: &v1::Command, reply: &v1::Reply) -> Option<u64> {
    created(command, reply, v1::FileKind::File)
}

/// What the changes of a batch that took effect have made under numbers that they name, and whether it is a regular file.
fn made_by(batch: &v1::Batch, reply: &v1::Reply) -> impl Iterator<Item = (u64, bool)> {
    let accepted = reply.error() == FsError::None;
    let applied = if accepted { reply.applied as usize } else { 0 };
    let changes = batch.changes.iter().take(applied);
    changes.filter_map(|change| match &change.op {
        Some(v1::change::Op::Create(create)) if create.ino != 0 => {
            Some((create.ino, create.kind() == v1::FileKind::File))
        }
        _ => None,
    })
}

/// The inode of a successful create of something of this kind.
fn created(command: &v1::Command, reply: &v1::Reply, kind: v1::FileKind) -> Option<u64> {
    match &command.op {
        Some(Op::Create(create)) if create.kind() == kind && reply.error() == FsError::None => {
            reply.attr.as_ref().map(|attr| attr.ino)
        }
        _ => None,
    }
}

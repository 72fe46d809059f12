//! One session's stream: takes requests from frames, answers them out of order.
//!
//! One task per stream and none per request: mutations go straight to the proposer, reads of a frame share one linearizable
//! round and are answered from one view. What is under way is bounded; beyond it no further frame is read.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use heliofs_proto::ids::{Position, VolumeId};
use heliofs_proto::v1::{self, FsError, command::Op, log_item::Item, request::Body};
use meta_core::Corruption;
use tonic::Streaming;

use super::Context;
use super::hub::VolumeSessions;
use super::interest::StreamId;
use super::locks::Ticket;
use super::opens::Registered;
use super::outbox::{Outbox, Outgoing};
use super::reads::{self, Answer, refusal};
use super::soft::Wake;
use super::write_leases::Returned;
use super::{copies, deletions, directories, fenced, maintain, summary};
use crate::proposer::{ProposeError, Proposed};
use crate::read_gate::ReadError;

/// Requests under way on one stream, by weight (see [`weight`]): four times what a client may have unanswered mutations.
const IN_FLIGHT_MAX: usize = 4 * heliofs_proto::limits::IN_FLIGHT_MAX;

/// Reads answered from one view before others get the thread.
const READS_PER_TURN: usize = 64;

/// Times that a read waits for leases that are taken again and again; after that it is answered as things are with files, and
/// nobody is granted directories until it is answered.
const RECALLS_MAX: usize = 8;

/// The stream of an attached session.
pub(super) struct SessionStream {
    pub ctx: Context,
    pub volume: Arc<VolumeSessions>,
    pub session: u64,
    pub stream: StreamId,
    pub outbox: Outbox,
    pub read_only: bool,
}

/// What ended, of what was under way.
#[expect(
    clippy::large_enum_variant,
    reason = "most are mutations, and a box each would cost more than the room"
)]
enum Done {
    /// Answered, or about to be without us; this much weight is free again.
    Answered(usize),
    /// A mutation.
    Mutation {
        id: u64,
        makes: Makes,
        outcome: Result<Proposed, ProposeError>,
    },
    /// The stream can't go on here.
    Leave(Leave),
}

/// What a mutation makes that its session gets leases of.
enum Makes {
    Nothing,
    File,
    Directory,
    /// The creates of a batch, and which of its changes they are.
    Batch(Vec<(usize, v1::Create)>),
}

impl Makes {
    fn of(command: &v1::Command) -> Self {
        match &command.op {
            Some(Op::Create(op)) if op.kind() == v1::FileKind::File => Self::File,
            Some(Op::Create(op)) if op.kind() == v1::FileKind::Directory => Self::Directory,
            Some(Op::Batch(op)) => {
                let changes = op.changes.iter().enumerate();
                let creates = changes.filter_map(|(at, change)| match &change.op {
                    Some(v1::change::Op::Create(create)) if create.ino != 0 => {
                        Some((at, create.clone()))
                    }
                    _ => None,
                });
                Self::Batch(creates.collect())
            }
            _ => Self::Nothing,
        }
    }
}

/// Why the stream can't go on here.
enum Leave {
    /// Another node leads, perhaps the one of this address.
    Moved(String),
    /// The records can't be read.
    Corrupt(Corruption),
}

/// Requests of one frame that wait for a linearizable round.
#[derive(Default)]
struct Round {
    reads: Vec<Read>,
    /// Decided, but to be told only after it is sure that nobody else leads.
    confirmed: Vec<v1::Response>,
    ping: u64,
    weight: usize,
}

struct Read {
    id: u64,
    body: Body,
    opened: Option<Registered>,
}

type Work = FuturesUnordered<BoxFuture<'static, Done>>;

impl SessionStream {
    /// Runs until either side ends the stream. Afterwards the session goes on without a stream, or has ended.
    pub(super) async fn run(self, mut inbound: Streaming<v1::ClientFrame>) {
        let mut work = Work::new();
        let mut backlog = VecDeque::new();
        let mut in_flight = 0;
        let mut bye = false;
        loop {
            self.admit(&mut backlog, &mut work, &mut in_flight);
            if bye && work.is_empty() && backlog.is_empty() {
                self.leave_for_good().await;
                return;
            }
            let may_read = !bye && backlog.is_empty() && in_flight < IN_FLIGHT_MAX;
            let has_room = self.outbox.has_room();
            tokio::select! {
                Some(done) = work.next(), if !work.is_empty() => {
                    if let Err(leave) = self.finish(done, &mut in_flight) {
                        self.leave(leave);
                        break;
                    }
                }
                frame = inbound.message(), if may_read && has_room => match frame {
                    Ok(Some(frame)) => {
                        bye = frame.bye;
                        self.take(frame, &mut backlog, &mut work);
                    }
                    Ok(None) => break,
                    Err(status) => {
                        tracing::debug!(session = self.session, %status, "a session's stream broke");
                        break;
                    }
                },
                () = self.outbox.room(), if !has_room => {}
                () = self.outbox.closed() => break,
            }
        }
        self.volume
            .soft()
            .detach(self.session, self.stream, Instant::now());
        if !work.is_empty() {
            // Proposals must not be dropped half-way: they carry other sessions' commands, too.
            tokio::spawn(async move { while work.next().await.is_some() {} });
        }
    }

    /// A frame's parts: what needs no answer at once, requests to the backlog.
    fn take(&self, frame: v1::ClientFrame, backlog: &mut VecDeque<v1::Request>, work: &mut Work) {
        {
            let mut soft = self.volume.soft();
            soft.heard(self.session, Instant::now());
            for request in &frame.cancels {
                soft.cancel(Ticket {
                    session: self.session,
                    request: *request,
                });
            }
        }
        backlog.extend(frame.requests);
        if frame.ping != 0 {
            let round = Round {
                ping: frame.ping,
                ..Round::default()
            };
            work.push(Box::pin(self.round(round)));
        }
    }

    /// Begins requests of the backlog, as many as may be under way.
    fn admit(&self, backlog: &mut VecDeque<v1::Request>, work: &mut Work, in_flight: &mut usize) {
        let mut round = Round::default();
        while *in_flight < IN_FLIGHT_MAX
            && let Some(request) = backlog.pop_front()
        {
            let Some(body) = request.body else {
                // From a newer client; the version check of Hello lets only compatible ones in.
                self.respond(request.id, refusal(FsError::NotSupported));
                continue;
            };
            let weight = weight(&body);
            let id = request.id;
            match body {
                Body::Command(command) => {
                    if let Some(future) = self.mutation(id, command) {
                        *in_flight += 1;
                        work.push(Box::pin(future));
                    }
                }
                Body::ReturnLease(returned) => {
                    let lease = returned.lease.unwrap_or_default();
                    self.volume.soft().return_lease(self.session, lease);
                }
                Body::Release(release) => {
                    let wake = self.volume.soft().release(self.session, release.ino);
                    self.wake(wake);
                }
                Body::ReleaseLocks(release) => {
                    self.volume.soft().release_locks(self.session, &release);
                    self.respond(id, v1::Response::default());
                }
                Body::Lock(lock) => {
                    let ticket = Ticket {
                        session: self.session,
                        request: id,
                    };
                    let decided = self.volume.soft().lock(ticket, &lock, Instant::now());
                    round.confirmed.extend(decided);
                }
                Body::TestLock(test) => {
                    let ticket = Ticket {
                        session: self.session,
                        request: id,
                    };
                    let lock = test.lock.unwrap_or_default();
                    let decided = self.volume.soft().test(ticket, &lock, Instant::now());
                    round.confirmed.extend(decided);
                }
                Body::Open(open) => {
                    let registered = self.volume.soft().open(
                        self.session,
                        open.ino,
                        open.write && !self.read_only,
                    );
                    match registered {
                        Ok(registered) => {
                            round.weight += weight;
                            *in_flight += weight;
                            let opened = Some(registered);
                            round.reads.push(Read {
                                id,
                                body: Body::Open(open),
                                opened,
                            });
                        }
                        Err(error) => self.respond(id, refusal(error)),
                    }
                }
                Body::TakeDeletions(ask) => {
                    *in_flight += weight;
                    work.push(Box::pin(self.take_deletions(id, ask)));
                }
                Body::TakeCopies(ask) => {
                    *in_flight += weight;
                    work.push(Box::pin(self.take_copies(id, ask)));
                }
                Body::Maintain(ask) => {
                    *in_flight += weight;
                    work.push(Box::pin(self.maintain(id, ask)));
                }
                Body::Summary(ask) => {
                    *in_flight += weight;
                    work.push(Box::pin(self.summary(id, ask.ino)));
                }
                body @ (Body::Lookup(_)
                | Body::GetAttr(_)
                | Body::ReadDir(_)
                | Body::ReadLink(_)
                | Body::GetXattr(_)
                | Body::ListXattr(_)
                | Body::GetExtents(_)
                | Body::StatFs(_)
                | Body::Walk(_)) => {
                    round.weight += weight;
                    *in_flight += weight;
                    round.reads.push(Read {
                        id,
                        body,
                        opened: None,
                    });
                }
            }
        }
        if !round.reads.is_empty() || !round.confirmed.is_empty() {
            work.push(Box::pin(self.round(round)));
        }
    }

    fn respond(&self, id: u64, response: v1::Response) {
        self.outbox
            .send(Outgoing::Response(v1::Response { id, ..response }));
    }

    fn wake(&self, wake: Wake) {
        self.ctx.hub.wake(&self.volume, wake);
    }

    /// Proposes a mutation, unless it is refused at once.
    fn mutation(
        &self,
        id: u64,
        mut command: v1::Command,
    ) -> Option<impl Future<Output = Done> + Send + use<>> {
        let late =
            matches!(command.op, Some(Op::Batch(_))) && self.volume.soft().is_late(self.session);
        let refused = reads::refuse_command(&command, self.read_only);
        if let Some(error) = refused.or(late.then_some(FsError::Stale)) {
            let position = self.volume.soft().seen();
            let reply = v1::Reply {
                position: Some(position.into()),
                error: error as i32,
                ..Default::default()
            };
            let body = Some(v1::response::Body::Reply(reply));
            self.respond(
                id,
                v1::Response {
                    body,
                    ..Default::default()
                },
            );
            return None;
        }
        command.volume = self.volume.id.0;
        command.session = self.session;
        let makes = Makes::of(&command);
        let ctx = self.ctx.clone();
        let volume = Arc::clone(&self.volume);
        let session = self.session;
        Some(async move {
            volume.caches_known().await;
            for ino in overtakes_writes(&command) {
                // What the holder of the file's lease was told to be written comes first.
                let returned = volume.soft().recall(session, ino);
                if let Some(returned) = returned {
                    // An error is how the wait ends.
                    returned.await.ok();
                }
            }
            let removes = directories::removes(&command);
            if !removes.is_empty() {
                volume.soft().begin_removal(session, &removes);
            }
            let halts = directories::needs_all(&command);
            let _halt = halts.then(|| directories::Halt::begin(&volume));
            let made_way = directories::make_way(&ctx, &volume, session, &command).await;
            if let Err(corruption) = made_way {
                volume.soft().end_removal(session, &removes);
                return Done::Leave(Leave::Corrupt(corruption));
            }
            let outcome = match ctx.proposer.fences().is_fenced(volume.id) {
                false => ctx.proposer.propose(Item::Command(command)).await,
                true => fenced::propose(&ctx, volume.id, command).await,
            };
            if !removes.is_empty() {
                volume.soft().end_removal(session, &removes);
            }
            Done::Mutation { id, makes, outcome }
        })
    }

    fn finish(&self, done: Done, in_flight: &mut usize) -> Result<(), Leave> {
        match done {
            Done::Answered(weight) => *in_flight -= weight,
            Done::Leave(leave) => return Err(leave),
            Done::Mutation { id, makes, outcome } => {
                *in_flight -= 1;
                let reply = match outcome {
                    Ok(Proposed::Reply(reply)) => reply,
                    Ok(Proposed::Local(other)) => {
                        tracing::error!(?other, "a command was answered like a local one");
                        return Err(Leave::Moved(String::new()));
                    }
                    // No reply: the client sends it again elsewhere, under the same sequence.
                    Err(ProposeError::NotLeader { leader }) => {
                        return Err(Leave::Moved(
                            leader.map_or_else(String::new, |at| at.address),
                        ));
                    }
                    Err(
                        ProposeError::Unknown | ProposeError::Fatal(_) | ProposeError::Fenced(_),
                    ) => {
                        return Err(Leave::Moved(String::new()));
                    }
                };
                let gone = reply.error() == FsError::SessionGone;
                let accepted = reply.error() == FsError::None;
                let made = reply.attr.as_ref().filter(|_| accepted);
                let made = made.map_or(0, |attr| attr.ino);
                let applied = if accepted { reply.applied as usize } else { 0 };
                let response = v1::Response {
                    id,
                    body: Some(v1::response::Body::Reply(reply)),
                    ..Default::default()
                };
                let (session, outbox) = (self.session, &self.outbox);
                match makes {
                    Makes::File if made != 0 => {
                        let mut soft = self.volume.soft();
                        soft.answer_create(session, made, outbox, response);
                    }
                    Makes::Directory if made != 0 => {
                        let mut soft = self.volume.soft();
                        soft.answer_mkdir(session, made, outbox, response);
                    }
                    Makes::Batch(made) => {
                        let took_effect = made.into_iter().filter(|(at, _)| *at < applied);
                        let made: Vec<_> = took_effect.map(|(_, create)| create).collect();
                        let mut soft = self.volume.soft();
                        soft.answer_batch(session, &made, outbox, response);
                    }
                    Makes::Nothing | Makes::File | Makes::Directory => {
                        outbox.send(Outgoing::Response(response));
                    }
                }
                if gone {
                    self.outbox.send(Outgoing::SessionEnded);
                }
            }
        }
        Ok(())
    }

    /// Answers what waits for one linearizable round. Reads of files whose write lease another session holds wait until it is
    /// returned, and take another round.
    fn round(&self, mut round: Round) -> impl Future<Output = Done> + Send + use<> {
        let (ctx, volume) = (self.ctx.clone(), Arc::clone(&self.volume));
        let (session, stream, outbox) = (self.session, self.stream, self.outbox.clone());
        async move {
            if round.reads.iter().any(|read| may_be_leased(&read.body)) {
                // Until then somebody whose write lease an earlier leader granted may not be back.
                volume.caches_known().await;
            }
            let mut reads = std::mem::take(&mut round.reads);
            let mut halt = None;
            for attempt in 0.. {
                let patient = attempt < RECALLS_MAX;
                if !patient && halt.is_none() {
                    halt = Some(directories::Halt::begin(&volume));
                }
                let mut waits = Vec::new();
                // Before the view is taken, which then shows what was written under the lease.
                if !reads.is_empty() {
                    hold_back(&volume, (session, patient), &mut reads, &mut waits);
                }
                if let Err(error) = ctx.gate.linearizable().await {
                    return Done::Leave(leave_for(error));
                }
                for response in round.confirmed.drain(..) {
                    outbox.send(Outgoing::Response(response));
                }
                if round.ping != 0 {
                    outbox.send(Outgoing::Pong(std::mem::take(&mut round.ping)));
                }
                let mut reads_left = std::mem::take(&mut reads).into_iter().peekable();
                while reads_left.peek().is_some() {
                    let turn: Vec<Read> = reads_left.by_ref().take(READS_PER_TURN).collect();
                    let pin = match outbox.is_pinned() {
                        true => volume.soft().pin(),
                        false => None,
                    };
                    let answered = match &pin {
                        Some(pin) => answer_all(pin.view(), volume.id, &turn),
                        // The lead was lost, and what is complete is not known yet.
                        None if outbox.is_pinned() => {
                            return Done::Leave(Leave::Moved(String::new()));
                        }
                        None => ctx
                            .state
                            .snapshot_view(|view| answer_all(view, volume.id, &turn)),
                    };
                    let (position, mut answers) = match answered {
                        Ok((Some(position), answers)) => (position, answers),
                        // It is a mirror that is loaded anew.
                        Ok((None, _)) if ctx.state.volume(volume.id).is_some() => {
                            return Done::Leave(Leave::Moved(String::new()));
                        }
                        Ok((None, answers)) => (Position::START, answers),
                        Err(corruption) => return Done::Leave(Leave::Corrupt(corruption)),
                    };
                    if let Err(found) = copies::tell_elsewhere(&ctx.state, volume.id, &mut answers)
                    {
                        return Done::Leave(Leave::Corrupt(found));
                    }
                    for (read, (_, answer)) in turn.iter().zip(&answers) {
                        if let (Some(Registered { first: true, .. }), Body::Open(open)) =
                            (read.opened, &read.body)
                            && answer.response.error() != FsError::None
                        {
                            let wake = volume.soft().release(session, open.ino);
                            ctx.hub.wake(&volume, wake);
                        }
                    }
                    let by = (session, patient);
                    let (mut told, answers) =
                        held_back_by_name(&volume, by, turn, answers, &mut waits);
                    let by = (session, stream);
                    let leased = volume.tell(by, position, answers, patient).await;
                    for (id, recalled) in leased {
                        if let Some(at) = told.iter().position(|read| read.id == id) {
                            waits.push((told.swap_remove(at), recalled));
                        }
                    }
                    if reads_left.peek().is_some() {
                        tokio::task::yield_now().await;
                    }
                }
                if waits.is_empty() {
                    break;
                }
                for (read, recalled) in waits {
                    for returned in recalled {
                        // An error is how the wait ends.
                        returned.await.ok();
                    }
                    reads.push(read);
                }
            }
            Done::Answered(round.weight)
        }
    }

    fn take_deletions(
        &self,
        id: u64,
        ask: v1::TakeDeletions,
    ) -> impl Future<Output = Done> + Send + use<> {
        let (ctx, volume) = (self.ctx.clone(), Arc::clone(&self.volume));
        let (session, outbox, read_only) = (self.session, self.outbox.clone(), self.read_only);
        let weight = weight(&Body::TakeDeletions(v1::TakeDeletions::default()));
        async move {
            // A mirror's mounts clean up its own bucket.
            let response = if read_only && !ctx.state.is_dual(volume.id) {
                refusal(FsError::ReadOnly)
            } else {
                match deletions::serve(&ctx, &volume, session, ask).await {
                    Ok(response) => response,
                    Err(failed) => return Done::Leave(leave_after(failed)),
                }
            };
            outbox.send(Outgoing::Response(v1::Response { id, ..response }));
            Done::Answered(weight)
        }
    }

    fn take_copies(
        &self,
        id: u64,
        ask: v1::TakeCopies,
    ) -> impl Future<Output = Done> + Send + use<> {
        let (ctx, volume) = (self.ctx.clone(), Arc::clone(&self.volume));
        let (session, outbox) = (self.session, self.outbox.clone());
        let weight = weight(&Body::TakeCopies(v1::TakeCopies::default()));
        async move {
            match copies::serve(&ctx, &volume, session, ask).await {
                Ok(response) => {
                    outbox.send(Outgoing::Response(v1::Response { id, ..response }));
                    Done::Answered(weight)
                }
                Err(failed) => Done::Leave(leave_after(failed)),
            }
        }
    }

    fn maintain(&self, id: u64, ask: v1::Maintain) -> impl Future<Output = Done> + Send + use<> {
        let (ctx, volume) = (self.ctx.clone(), Arc::clone(&self.volume));
        let (session, outbox) = (self.session, self.outbox.clone());
        let weight = weight(&Body::Maintain(v1::Maintain::default()));
        async move {
            match maintain::serve(&ctx, &volume, session, ask).await {
                Ok(response) => {
                    outbox.send(Outgoing::Response(v1::Response { id, ..response }));
                    Done::Answered(weight)
                }
                Err(failed) => Done::Leave(leave_after(failed)),
            }
        }
    }

    fn summary(&self, id: u64, ino: u64) -> impl Future<Output = Done> + Send + use<> {
        let (ctx, volume) = (self.ctx.clone(), Arc::clone(&self.volume));
        let (session, outbox) = (self.session, self.outbox.clone());
        let weight = weight(&Body::Summary(v1::Summary::default()));
        async move {
            // Sizes count that somebody holds back, wherever they are.
            let recalled = volume.soft().recall_all(session);
            for returned in recalled {
                // An error is how the wait ends.
                returned.await.ok();
            }
            if let Err(error) = ctx.gate.linearizable().await {
                return Done::Leave(leave_for(error));
            }
            match summary::walk(&ctx.state, volume.id, ino).await {
                Ok(response) => {
                    outbox.send(Outgoing::Response(v1::Response { id, ..response }));
                    Done::Answered(weight)
                }
                Err(corruption) => Done::Leave(Leave::Corrupt(corruption)),
            }
        }
    }

    fn leave(&self, leave: Leave) {
        match leave {
            Leave::Moved(leader) => self.outbox.send(Outgoing::Moved(leader)),
            Leave::Corrupt(corruption) => {
                self.ctx.damage.report("for a session", &corruption);
                self.outbox.send(Outgoing::Moved(String::new()));
            }
        }
    }

    /// The client said bye: everything is answered; the session ends.
    async fn leave_for_good(&self) {
        self.outbox.send(Outgoing::Close);
        {
            let mut soft = self.volume.soft();
            soft.detach(self.session, self.stream, Instant::now());
            if !soft.begin_end(self.session) {
                return;
            }
        }
        super::end_session(&self.ctx, &self.volume, self.session).await;
    }
}

/// Takes out the reads of files and directories whose lease another session holds, and recalls that; of directories alone when the
/// reader is not `patient` any more.
fn hold_back(
    volume: &VolumeSessions,
    (session, patient): (u64, bool),
    reads: &mut Vec<Read>,
    waits: &mut Vec<(Read, Vec<Returned>)>,
) {
    let mut soft = volume.soft();
    if soft.no_leases() {
        return;
    }
    for read in std::mem::take(reads) {
        let ino = match &read.body {
            Body::Open(ask) => ask.ino,
            Body::GetAttr(ask) => ask.ino,
            Body::GetExtents(ask) => ask.ino,
            Body::Lookup(ask) => ask.parent,
            Body::ReadDir(ask) => ask.ino,
            _ => 0,
        };
        match soft.recall_for_read(session, ino, patient) {
            Some(returned) => waits.push((read, vec![returned])),
            None => reads.push(read),
        }
    }
}

/// Takes out the answers about files and directories whose lease another session holds, where only the answer says which one it is.
/// Pages of directories leave the attributes of such out: who wants them asks for them one by one. Returns the reads that are left,
/// and their answers.
fn held_back_by_name(
    volume: &VolumeSessions,
    (session, patient): (u64, bool),
    reads: Vec<Read>,
    answers: Vec<(u64, Answer)>,
    waits: &mut Vec<(Read, Vec<Returned>)>,
) -> (Vec<Read>, Vec<(u64, Answer)>) {
    let mut soft = volume.soft();
    if soft.no_leases() {
        return (reads, answers);
    }
    let mut kept = (Vec::new(), Vec::with_capacity(answers.len()));
    for (read, (id, mut answer)) in reads.into_iter().zip(answers) {
        let inos = match &mut answer.response.body {
            Some(v1::response::Body::DirPage(page)) => {
                for entry in &mut page.entries {
                    if soft.is_leased_against(session, entry.ino) {
                        entry.attr = None;
                    }
                }
                Vec::new()
            }
            Some(v1::response::Body::Attr(attr)) => vec![attr.ino],
            // A name in a leased directory may be there or not.
            Some(v1::response::Body::Walk(walk)) => walk.attrs.iter().map(|a| a.ino).collect(),
            _ => Vec::new(),
        };
        let recalls = inos.into_iter();
        let recalled: Vec<_> = recalls
            .filter_map(|ino| soft.recall_for_read(session, ino, patient))
            .collect();
        if recalled.is_empty() {
            kept.0.push(read);
            kept.1.push((id, answer));
        } else {
            waits.push((read, recalled));
        }
    }
    kept
}

/// Reads of what another session may hold a write lease of.
fn may_be_leased(body: &Body) -> bool {
    matches!(
        body,
        Body::Open(_) | Body::Lookup(_) | Body::GetAttr(_) | Body::ReadDir(_) | Body::Walk(_)
    )
}

/// The files whose content, length or time of change this command reads or sets, so that what was written before must be
/// committed before. 0: none.
fn overtakes_writes(command: &v1::Command) -> [u64; 2] {
    match &command.op {
        Some(Op::SetAttr(op)) if op.size.is_some() || op.mtime.is_some() => [op.ino, 0],
        Some(Op::Fallocate(op)) => [op.ino, 0],
        Some(Op::CopyRange(op)) => [op.source, op.target],
        _ => [0, 0],
    }
}

/// The position that a view shows, and answers from it by request.
type Answered = (Option<Position>, Vec<(u64, Answer)>);

/// Answers reads from one view, with the position that it shows. `None`, and everything is stale, without the volume.
fn answer_all(
    view: &impl meta_core::View,
    volume: VolumeId,
    reads: &[Read],
) -> Result<Answered, Corruption> {
    let found = reads::position(view, volume)?;
    let position = found.unwrap_or_default();
    let mut answers = Vec::with_capacity(reads.len());
    for read in reads {
        let was_held = read.opened.is_some_and(|registered| registered.was_held);
        let mut answer = reads::answer(view, volume, &read.body, was_held)?.unwrap_or(Answer {
            response: refusal(FsError::NotSupported),
            told: Vec::new(),
        });
        answer.response.position = Some(position.into());
        answers.push((read.id, answer));
    }
    Ok((found, answers))
}

fn leave_for(error: ReadError) -> Leave {
    match error {
        ReadError::NoLeader { leader } => {
            Leave::Moved(leader.map_or_else(String::new, |at| at.address))
        }
        ReadError::NoQuorum | ReadError::Fatal(_) => Leave::Moved(String::new()),
    }
}

fn leave_after(failed: deletions::Failed) -> Leave {
    match failed {
        deletions::Failed::Moved(leader) => Leave::Moved(leader),
        deletions::Failed::Read(error) => leave_for(error),
        deletions::Failed::Corrupt(corruption) => Leave::Corrupt(corruption),
    }
}

/// What a request counts towards [`IN_FLIGHT_MAX`]: large answers count for more.
fn weight(body: &Body) -> usize {
    match body {
        Body::ReadDir(ask) if ask.entries_max == 0 => 64,
        Body::ReadDir(ask) => 1 + (ask.entries_max as usize).min(4096) / 64,
        Body::GetExtents(ask) => 1 + (ask.extents_max as usize).min(4096) / 64,
        Body::Open(ask) => 1 + (ask.extents_max as usize).min(4096) / 64,
        Body::ListXattr(_) | Body::GetXattr(_) | Body::TakeDeletions(_) | Body::TakeCopies(_) => 8,
        Body::Summary(_) | Body::Maintain(_) => 64,
        Body::Command(_)
        | Body::Lookup(_)
        | Body::GetAttr(_)
        | Body::Release(_)
        | Body::ReadLink(_)
        | Body::StatFs(_)
        | Body::Walk(_)
        | Body::Lock(_)
        | Body::TestLock(_)
        | Body::ReleaseLocks(_)
        | Body::ReturnLease(_) => 1,
    }
}

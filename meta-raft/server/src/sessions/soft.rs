//! One volume's soft state on the leader: sessions and their streams, opens, locks, who was told what.
//!
//! It lies under one mutex per volume, so that "what was told" and "what changed" have one order. No I/O, no waiting: time
//! is an argument, and what has to be sent goes into the streams' queues.

use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use heliofs_proto::ids::Position;
use heliofs_proto::v1::{self, FsError, LockKind};

use super::copies::CopyLeases;
use super::deletions::SegmentLeases;
use super::grace::Grace;
use super::interest::{Effects, Interest, StreamId, Told, everything};
use super::locks::{LockTable, Owner, Ticket, Verdict};
use super::maintain::CompactionLease;
use super::opens::Opens;
use super::orphans::Orphans;
use super::outbox::{Outbox, Outgoing};
use super::reads;
use super::write_leases::{Returned, WriteLeases};
use crate::observer::AppliedItem;
use crate::store::Pin;

#[cfg(test)]
mod tests;

/// Commands whose effects are remembered for answers that were read before them and are told after.
const RECENT_MAX: usize = 4096;

/// A session that is silent for this long while somebody waits for a write lease of it is over. Longer than a mount needs to find
/// a new leader, and shorter than operations wait.
const LEASE_WAIT: Duration = Duration::from_secs(5);

/// Lock requests of one session that wait; above it, they are refused.
const LOCK_WAITS_MAX: usize = 4096;

/// What a client said about itself.
#[derive(Clone, Debug, Default)]
pub struct ClientFacts {
    /// This machine's name.
    pub host: String,
    /// Where the volume is mounted.
    pub mount_point: String,
    /// The client's build.
    pub build: String,
    /// The client's process.
    pub pid: u32,
    /// It takes write leases.
    pub takes_leases: bool,
    /// It takes those of directories.
    pub takes_directories: bool,
}

struct Attached {
    stream: StreamId,
    outbox: Outbox,
}

struct Session {
    facts: ClientFacts,
    /// When a frame last came.
    heard: Instant,
    attached: Option<Attached>,
    /// A SessionEnd is proposed.
    ending: bool,
    lock_waits: usize,
}

impl Session {
    fn silent_since(heard: Instant) -> Self {
        Self {
            facts: ClientFacts::default(),
            heard,
            attached: None,
            ending: false,
            lock_waits: 0,
        }
    }
}

/// A lock request that waits for the end of the grace period.
struct Deferred {
    ticket: Ticket,
    lock: v1::Lock,
    test: bool,
}

/// What a change of the soft state makes worth doing.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[must_use]
pub struct Wake {
    /// An orphan may be free to go.
    pub reap: bool,
    /// Erase records or tree removals may be there.
    pub work: bool,
}

impl Wake {
    /// Either.
    pub fn and(self, other: Self) -> Self {
        Self {
            reap: self.reap || other.reap,
            work: self.work || other.work,
        }
    }
}

/// How much soft state there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// Sessions.
    pub sessions: usize,
    /// Sessions with a stream.
    pub streams: usize,
    /// Inodes held open.
    pub opens: usize,
    /// Inodes that somebody was told about.
    pub told: usize,
}

/// What a read's answer needs before it can be told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Telling {
    /// It was queued.
    Told,
    /// The effects of its position are not known here yet: wait until [`Soft::seen`] reaches it.
    TooEarly,
    /// Another session holds the lease of something that it tells of, perhaps granted since it was read: recall that, wait until it
    /// is returned, and read again.
    Leased,
}

/// A volume's soft state.
pub struct Soft {
    sessions: HashMap<u64, Session>,
    streams: HashMap<StreamId, (u64, Outbox)>,
    opens: Opens,
    leases: WriteLeases,
    /// Commands under way that remove or move directories whose names are in these, and whose they are.
    removals: Vec<(u64, u64)>,
    /// The volume is about to be written elsewhere: no leases of directories are granted.
    stopped: bool,
    /// Commands under way before which all directories are recalled: meanwhile no leases of any are granted.
    halts: usize,
    /// Sessions that came back to a new leader when others had been let in: what they answered before is not taken.
    late: HashSet<u64>,
    locks: LockTable,
    interest: Interest,
    grace: Grace,
    /// Orphans still rest: see [`Soft::look`].
    resting: bool,
    deferred: Vec<Deferred>,
    recent: VecDeque<(u64, Effects)>,
    seen: Position,
    orphans: Orphans,
    /// The volume is a mirror: commands are of the source's sessions.
    mirror: bool,
    /// Which dead segments are leased to whom.
    pub deletions: SegmentLeases,
    /// Which session compacts.
    pub compaction: CompactionLease,
    /// Which copy tasks are leased to whom.
    pub copies: CopyLeases,
    /// What streams are shown that read only what the region's own bucket has all of.
    pin: Option<Arc<Pin>>,
}

impl Soft {
    /// The state of a volume for a term that began at `grace.began()`; `known` are the sessions of the records.
    pub fn new(known: &[u64], grace: Grace, inodes_told_max: NonZeroUsize) -> Self {
        let silent = |id: &u64| (*id, Session::silent_since(grace.began()));
        Self {
            sessions: known.iter().map(silent).collect(),
            streams: HashMap::new(),
            opens: Opens::default(),
            leases: WriteLeases::default(),
            removals: Vec::new(),
            stopped: false,
            halts: 0,
            late: HashSet::new(),
            locks: LockTable::default(),
            interest: Interest::new(inodes_told_max),
            grace,
            resting: true,
            deferred: Vec::new(),
            recent: VecDeque::new(),
            seen: Position::START,
            orphans: Orphans::default(),
            mirror: false,
            deletions: SegmentLeases::default(),
            compaction: CompactionLease::default(),
            copies: CopyLeases::default(),
            pin: None,
        }
    }

    /// Of a mirror, commands change what is told and nothing else: whom they are of lives elsewhere.
    pub fn of_mirror(&mut self, mirror: bool) {
        self.mirror = mirror;
    }

    /// Whether there is such a session.
    pub fn knows(&self, session: u64) -> bool {
        self.sessions.contains_key(&session)
    }

    /// A session of a mirror, of which no record tells.
    pub fn admit(&mut self, session: u64, now: Instant) {
        self.sessions
            .entry(session)
            .or_insert_with(|| Session::silent_since(now));
    }

    /// The effects of all positions up to this one are known here.
    pub fn seen(&self) -> Position {
        self.seen
    }

    /// The records were read at `position` after this state could see every command: nothing at or below it will come.
    pub fn start_at(&mut self, position: Position) {
        self.seen = self.seen.max(position);
    }

    /// A stream of `session` begins. A stream that it had before is told to go. `false`: the session ended or is about to.
    pub fn attach(
        &mut self,
        session: u64,
        stream: StreamId,
        outbox: Outbox,
        facts: ClientFacts,
        now: Instant,
    ) -> bool {
        if self.sessions.get(&session).is_none_or(|known| known.ending) {
            return false;
        }
        if let Some(before) = self
            .sessions
            .get(&session)
            .and_then(|known| known.attached.as_ref())
        {
            before.outbox.send(Outgoing::Close);
            let before = before.stream;
            self.detach(session, before, now);
        }
        self.interest.begin(stream);
        self.streams.insert(stream, (session, outbox.clone()));
        self.sessions.insert(
            session,
            Session {
                facts,
                heard: now,
                attached: Some(Attached { stream, outbox }),
                ending: false,
                lock_waits: 0,
            },
        );
        true
    }

    /// A resumed stream hears of every change until `until`: what its session was told before is not known here.
    pub fn follow_all(&mut self, stream: StreamId, until: Instant) {
        self.interest.follow_all(stream, until);
    }

    /// A resumed session says what it has open, leased and locked. Locks that conflict with others' are lost: somebody got them
    /// after this session's time was over.
    pub fn reassert(
        &mut self,
        session: u64,
        opens: &[u64],
        leases: &[v1::WriteLease],
        locks: &[v1::Lock],
    ) -> Wake {
        let freed = self.opens.reassert(session, opens);
        let is_alone = |ino| self.opens.is_alone(session, ino);
        let (held, recalled) = self.leases.reassert(session, leases, is_alone);
        for ino in held {
            self.outdate(session, ino);
        }
        for lease in recalled {
            self.send(session, Outgoing::Recall(lease));
        }
        // What it does not name it does not hold: an unlock may have been lost with the stream.
        let granted = self.locks.end_session(session);
        self.granted(granted);
        for lock in locks {
            if let Err(verdict) = self.locks.reassert(session, lock) {
                tracing::warn!(
                    session,
                    ino = lock.ino,
                    ?verdict,
                    "a re-asserted lock is lost"
                );
            }
        }
        self.freed(&freed)
    }

    /// A resumed session says which leases of directories it did not return: it is asked to.
    pub fn reassert_directories(&mut self, session: u64, named: &[v1::WriteLease]) {
        self.leases.reassert_directories(session, named);
        for lease in named {
            self.send(session, Outgoing::Recall(*lease));
        }
    }

    /// The session is complete: it is no longer waited for.
    pub fn settle(&mut self, session: u64, now: Instant) -> Wake {
        self.grace.settle(session);
        self.end_grace(now)
    }

    /// See [`Grace::caches_until`].
    pub fn caches_until(&self, lease: Duration, now: Instant) -> Option<Instant> {
        self.grace.caches_until(lease, now)
    }

    /// When the grace period is over, the locks that waited for it are decided.
    pub fn end_grace(&mut self, now: Instant) -> Wake {
        if !self.grace.is_over(now) {
            return Wake::default();
        }
        for Deferred { ticket, lock, test } in std::mem::take(&mut self.deferred) {
            let response = if test {
                Some(self.test_lock(ticket, &lock))
            } else {
                self.decide_lock(ticket, &lock)
            };
            if let (Some(response), Some(known)) =
                (response, self.sessions.get_mut(&ticket.session))
            {
                known.lock_waits = known.lock_waits.saturating_sub(1);
                self.respond(ticket.session, response);
            }
        }
        Wake {
            reap: true,
            work: false,
        }
    }

    /// Looks at the clock: ends the grace period, and wakes the reaper once when orphans need not rest any more.
    pub fn look(&mut self, now: Instant) -> Wake {
        let rested = self.resting && self.grace.may_reap(now);
        if rested {
            self.resting = false;
        }
        let ended = if self.deferred.is_empty() {
            Wake::default()
        } else {
            self.end_grace(now)
        };
        ended.and(Wake {
            reap: rested,
            work: false,
        })
    }

    /// A stream ended. The session lives on until it is back or its time is over.
    pub fn detach(&mut self, session: u64, stream: StreamId, now: Instant) {
        self.interest.end(stream);
        self.streams.remove(&stream);
        let Some(known) = self.sessions.get_mut(&session) else {
            return;
        };
        if known
            .attached
            .as_ref()
            .is_some_and(|attached| attached.stream == stream)
        {
            known.attached = None;
            known.heard = now;
            known.lock_waits = 0;
            // Nobody could be told of a grant; the client asks again on its next stream.
            self.locks.forget_waits(session);
            self.deferred
                .retain(|deferred| deferred.ticket.session != session);
        }
    }

    /// A frame came.
    pub fn heard(&mut self, session: u64, now: Instant) {
        if let Some(known) = self.sessions.get_mut(&session) {
            known.heard = now;
        }
    }

    /// This process stood still: whatever sessions said meanwhile was not read, so their silence begins anew.
    pub fn excuse(&mut self, now: Instant) {
        for known in self.sessions.values_mut() {
            known.heard = now;
        }
    }

    /// Sessions that were silent for longer than `timeout`, once each; none during the grace period. Others don't wait that long
    /// for the write lease of a silent session.
    pub fn expired(&mut self, now: Instant, timeout: Duration) -> Vec<u64> {
        if !self.grace.is_over(now) {
            return Vec::new();
        }
        let mut expired = Vec::new();
        for (id, known) in &mut self.sessions {
            let silent = now.saturating_duration_since(known.heard);
            let waited_for = || silent >= LEASE_WAIT && self.leases.is_waited_for(*id);
            if !known.ending && (silent >= timeout || waited_for()) {
                known.ending = true;
                expired.push(*id);
            }
        }
        expired
    }

    /// The session is about to be ended by a command; `false`: unknown, or already.
    pub fn begin_end(&mut self, session: u64) -> bool {
        self.sessions
            .get_mut(&session)
            .is_some_and(|known| !std::mem::replace(&mut known.ending, true))
    }

    /// The SessionEnd could not be proposed: the session may be tried again.
    pub fn cancel_end(&mut self, session: u64) {
        if let Some(known) = self.sessions.get_mut(&session) {
            known.ending = false;
        }
    }

    /// All of a session is dropped, and what it held up is granted. Its stream is told.
    pub fn end_session(&mut self, session: u64, now: Instant) -> Wake {
        if let Some(known) = self.sessions.remove(&session)
            && let Some(attached) = known.attached
        {
            self.interest.end(attached.stream);
            self.streams.remove(&attached.stream);
            attached.outbox.send(Outgoing::SessionEnded);
        }
        self.deferred
            .retain(|deferred| deferred.ticket.session != session);
        let granted = self.locks.end_session(session);
        self.granted(granted);
        self.deletions.end_session(session);
        self.copies.end_session(session);
        self.compaction.end_session(session);
        self.leases.end_session(session);
        let freed = self.opens.end_session(session);
        let wake = self.freed(&freed);
        wake.and(self.settle(session, now))
    }

    /// All streams are told to go; `leader` is whom they may ask.
    pub fn move_all(&mut self, leader: &str) {
        for (_, outbox) in self.streams.values() {
            outbox.send(Outgoing::Moved(leader.to_owned()));
        }
    }

    /// The volume is gone, and with it all sessions.
    pub fn end_all(&mut self) {
        for (_, outbox) in self.streams.values() {
            outbox.send(Outgoing::SessionEnded);
        }
    }

    // ---- opens

    /// Registers an open before its attributes are read. `Ok` says whether somebody held the inode before, and whether this
    /// session did not. `write`: with its write lease, if nobody else has it open.
    pub fn open(
        &mut self,
        session: u64,
        ino: u64,
        write: bool,
    ) -> Result<super::opens::Registered, FsError> {
        let registered = self.opens.open(session, ino)?;
        if write {
            self.grant_lease(session, ino);
        }
        Ok(registered)
    }

    fn grant_lease(&mut self, session: u64, ino: u64) {
        let Some(known) = self.sessions.get(&session) else {
            return;
        };
        if !known.facts.takes_leases || !self.opens.is_alone(session, ino) {
            return;
        }
        if self.leases.grant(session, ino) {
            self.outdate(session, ino);
        }
    }

    /// From here on nothing that others know of the file's size and times is sure: they are to ask, which recalls the lease.
    fn outdate(&mut self, holder: u64, ino: u64) {
        let known = self.sessions.get(&holder);
        let own = known.and_then(|known| known.attached.as_ref());
        let own = own.map(|attached| attached.stream);
        let streams = &self.streams;
        let position = Some(v1::Position::from(self.seen));
        self.interest.outdate(ino, own, |stream, message| {
            if let Some((_, outbox)) = streams.get(&stream) {
                outbox.send(Outgoing::Invalidation(v1::Invalidation {
                    position,
                    ..message
                }));
            }
        });
    }

    /// Recalls the write lease that another session holds of `ino`. `None`: there is none; otherwise wait, then look again.
    pub fn recall(&mut self, by: u64, ino: u64) -> Option<Returned> {
        let recall = self.leases.recall(by, ino)?;
        if let Some((holder, lease)) = recall.ask {
            // One that is away is asked when it is back.
            self.send(holder, Outgoing::Recall(lease));
        }
        Some(recall.returned)
    }

    /// As [`Soft::recall`], of a directory, and if the reader is `patient` of a file.
    pub fn recall_for_read(&mut self, by: u64, ino: u64, patient: bool) -> Option<Returned> {
        match patient || self.leases.is_directory_held_against(by, ino) {
            true => self.recall(by, ino),
            false => None,
        }
    }

    /// As [`Soft::recall`], for all files.
    pub fn recall_all(&mut self, by: u64) -> Vec<Returned> {
        let inos = self.leases.held_against(by);
        inos.into_iter()
            .filter_map(|ino| self.recall(by, ino))
            .collect()
    }

    /// As [`Soft::recall`], for all directories.
    pub fn recall_directories(&mut self, by: u64) -> Vec<Returned> {
        let inos = self.leases.directories_held_against(by);
        inos.into_iter()
            .filter_map(|ino| self.recall(by, ino))
            .collect()
    }

    /// Recalls all leases of directories, and grants no more.
    pub fn stop_directories(&mut self) -> Vec<Returned> {
        self.stopped = true;
        self.recall_directories(0)
    }

    /// After [`Soft::stop_directories`]: the volume goes on to be written here.
    pub fn grant_directories_again(&mut self) {
        self.stopped = false;
    }

    /// Until [`Soft::end_halt`], no lease of a directory is granted to anybody.
    pub fn begin_halt(&mut self) {
        self.halts += 1;
    }

    /// See [`Soft::begin_halt`].
    pub fn end_halt(&mut self) {
        self.halts -= 1;
    }

    /// A session comes back at `now`, with leases of directories: if this is a new leader that has let others in meanwhile, what
    /// the session has answered and not sent is refused until it has returned them all.
    pub fn comes_back_with_directories(&mut self, session: u64, lease: Duration, now: Instant) {
        if self.grace.is_awaited(session) && self.caches_until(lease, now).is_none() {
            self.late.insert(session);
        }
    }

    /// Whether what the session has answered ahead must not be taken any more: others may have seen that it was not there.
    pub fn is_late(&mut self, session: u64) -> bool {
        if !self.leases.holds_directories(session) {
            self.late.remove(&session);
        }
        self.late.contains(&session)
    }

    /// Nobody but `by` holds a directory's lease.
    pub fn no_directories_against(&self, by: u64) -> bool {
        self.leases.no_directories_against(by)
    }

    /// A command of `session` is under way that may remove or move directories whose names are in these. Until
    /// [`Soft::end_removal`], no lease is granted to others of what they make there: what is removed would be looked for too
    /// early.
    pub fn begin_removal(&mut self, session: u64, parents: &[u64]) {
        let all = parents.iter().map(|parent| (session, *parent));
        self.removals.extend(all);
    }

    /// The command is applied, or was not proposed.
    pub fn end_removal(&mut self, session: u64, parents: &[u64]) {
        for parent in parents {
            let found = self
                .removals
                .iter()
                .position(|one| *one == (session, *parent));
            if let Some(found) = found {
                self.removals.swap_remove(found);
            }
        }
    }

    fn grant_directory(&mut self, session: u64, parent: u64, ino: u64) {
        let known = self.sessions.get(&session);
        let takes = known.is_some_and(|known| known.facts.takes_directories && !known.ending);
        let mut removals = self.removals.iter();
        let granting = !self.stopped && self.halts == 0 && !self.late.contains(&session);
        if takes && granting && !removals.any(|(by, at)| *at == parent && *by != session) {
            self.leases.grant_directory(session, ino);
        }
    }

    /// What a session's command made: files count as open, and leases are granted of files and directories.
    fn made(&mut self, command: &v1::Command, reply: &v1::Reply, repeated: bool) {
        use v1::FileKind;
        use v1::command::Op;
        let session = command.session;
        match &command.op {
            Some(Op::Create(op)) if op.kind() == FileKind::File => {
                if let Some(attr) = &reply.attr {
                    self.opens.pin(session, command.sequence, attr.ino);
                    self.grant_lease(session, attr.ino);
                }
            }
            Some(Op::Create(op)) if op.kind() == FileKind::Directory => {
                // An answer that is repeated may have been seen by others since.
                if let Some(attr) = &reply.attr
                    && reply.deferrable
                    && !repeated
                {
                    self.grant_directory(session, op.parent, attr.ino);
                }
            }
            Some(Op::Batch(op)) => {
                let takes_leases = self
                    .sessions
                    .get(&session)
                    .is_some_and(|known| known.facts.takes_leases);
                for made in made_by(op, reply) {
                    if made.kind() == FileKind::File {
                        self.opens.pin(session, command.sequence, made.ino);
                        if repeated {
                            self.grant_lease(session, made.ino);
                        } else if takes_leases {
                            self.leases.grant(session, made.ino);
                        }
                    } else if made.kind() == FileKind::Directory && reply.deferrable && !repeated {
                        self.grant_directory(session, made.parent, made.ino);
                    }
                }
            }
            _ => {}
        }
    }

    /// A recall is answered.
    pub fn return_lease(&mut self, session: u64, lease: v1::WriteLease) {
        self.leases.give_back(session, lease);
    }

    /// Another session than `session` may know better what this file holds.
    pub fn is_leased_against(&self, session: u64, ino: u64) -> bool {
        self.leases.is_held_against(session, ino)
    }

    /// Nobody holds a write lease.
    pub fn no_leases(&self) -> bool {
        self.leases.is_empty()
    }

    /// Takes an open back.
    pub fn release(&mut self, session: u64, ino: u64) -> Wake {
        self.leases.end(session, ino);
        if self.opens.release(session, ino) {
            self.freed(&[ino])
        } else {
            Wake::default()
        }
    }

    /// Most files that are closed still have a name: only an orphan among them is worth a look.
    fn freed(&mut self, inos: &[u64]) -> Wake {
        Wake {
            reap: self.orphans.freed(inos),
            work: false,
        }
    }

    /// At most `max` orphans that nobody holds; from now on nobody can open them. Fewer than `max`: those are all that are
    /// known, but see [`Soft::orphan_search`].
    pub fn begin_reaps(&mut self, max: usize, now: Instant) -> Vec<u64> {
        let mut free = Vec::new();
        while free.len() < max
            && self.grace.may_reap(now)
            && let Some(ino) = self.orphans.pop()
        {
            if self.opens.begin_reap(ino) {
                free.push(ino);
            } else {
                self.orphans.hold(ino);
            }
        }
        free
    }

    /// Orphan records above this inode are to be searched.
    pub fn orphan_search(&self) -> Option<u64> {
        self.orphans.search_after()
    }

    /// What the search found; `more`: there may be further ones.
    pub fn orphans_found(&mut self, inos: impl IntoIterator<Item = u64>, more: bool) {
        self.orphans.found(inos, more);
    }

    /// A reap that was begun is to be gone on with.
    pub fn reap_again(&mut self, ino: u64) {
        self.orphans.add(ino);
    }

    /// The reap is done.
    pub fn end_reap(&mut self, ino: u64) {
        self.opens.end_reap(ino);
    }

    /// Nothing may be reaped yet; [`Soft::look`] tells when.
    pub fn rests(&self, now: Instant) -> bool {
        !self.grace.may_reap(now)
    }

    // ---- locks

    /// Places, queues, defers or refuses a lock. `None`: the answer comes later.
    pub fn lock(&mut self, ticket: Ticket, lock: &v1::Lock, now: Instant) -> Option<v1::Response> {
        if lock.kind == LockKind::Unlock as i32 || self.grace.is_over(now) {
            return self.decide_lock(ticket, lock);
        }
        self.defer(ticket, lock, false)
    }

    /// Which lock is in the way. `None`: the answer comes later.
    pub fn test(&mut self, ticket: Ticket, lock: &v1::Lock, now: Instant) -> Option<v1::Response> {
        if self.grace.is_over(now) {
            return Some(self.test_lock(ticket, lock));
        }
        self.defer(ticket, lock, true)
    }

    /// Drops an owner's locks on an inode.
    pub fn release_locks(&mut self, session: u64, release: &v1::ReleaseLocks) {
        let holder = Owner {
            session,
            owner: release.owner,
        };
        let granted = self.locks.release_owner(release.ino, holder, release.flock);
        self.granted(granted);
    }

    /// Gives up a waiting lock request; it is answered with `INTERRUPTED`. Nothing happens when it does not wait.
    pub fn cancel(&mut self, ticket: Ticket) {
        let before = self.deferred.len();
        self.deferred.retain(|deferred| deferred.ticket != ticket);
        if self.deferred.len() < before || self.locks.cancel(ticket) {
            self.waits(ticket.session, -1);
            self.respond(
                ticket.session,
                v1::Response {
                    id: ticket.request,
                    ..reads::refusal(FsError::Interrupted)
                },
            );
        }
    }

    fn defer(&mut self, ticket: Ticket, lock: &v1::Lock, test: bool) -> Option<v1::Response> {
        if self.too_many_waits(ticket.session) {
            return Some(lock_refusal(ticket, FsError::NoSpace));
        }
        self.waits(ticket.session, 1);
        self.deferred.push(Deferred {
            ticket,
            lock: *lock,
            test,
        });
        None
    }

    fn decide_lock(&mut self, ticket: Ticket, lock: &v1::Lock) -> Option<v1::Response> {
        if lock.wait && self.too_many_waits(ticket.session) {
            return Some(lock_refusal(ticket, FsError::NoSpace));
        }
        let (verdict, granted) = self.locks.request(ticket, lock);
        self.granted(granted);
        match verdict {
            Verdict::Granted => Some(lock_granted(ticket)),
            Verdict::Waits => {
                self.waits(ticket.session, 1);
                None
            }
            Verdict::Conflict(_) => Some(lock_refusal(ticket, FsError::WouldBlock)),
            Verdict::Deadlock => Some(lock_refusal(ticket, FsError::Deadlock)),
            Verdict::Invalid => Some(lock_refusal(ticket, FsError::Invalid)),
            // Linux would say ENOLCK, which the wire does not have.
            Verdict::TooMany => Some(lock_refusal(ticket, FsError::NoSpace)),
        }
    }

    fn test_lock(&self, ticket: Ticket, lock: &v1::Lock) -> v1::Response {
        let conflict = self.locks.test(ticket.session, lock);
        v1::Response {
            body: Some(v1::response::Body::Lock(v1::LockReply { conflict })),
            ..lock_granted(ticket)
        }
    }

    fn too_many_waits(&self, session: u64) -> bool {
        self.sessions
            .get(&session)
            .is_some_and(|known| known.lock_waits >= LOCK_WAITS_MAX)
    }

    fn waits(&mut self, session: u64, change: isize) {
        if let Some(known) = self.sessions.get_mut(&session) {
            known.lock_waits = known.lock_waits.saturating_add_signed(change);
        }
    }

    fn granted(&mut self, tickets: Vec<Ticket>) {
        for ticket in tickets {
            self.waits(ticket.session, -1);
            self.respond(ticket.session, lock_granted(ticket));
        }
    }

    fn respond(&self, session: u64, response: v1::Response) {
        self.send(session, Outgoing::Response(response));
    }

    /// Nothing happens when the session is away.
    fn send(&self, session: u64, outgoing: Outgoing) {
        let attached = self
            .sessions
            .get(&session)
            .and_then(|known| known.attached.as_ref());
        if let Some(attached) = attached {
            attached.outbox.send(outgoing);
        }
    }

    // ---- what was told, and what changed

    /// A command was applied; called in the order of positions, before anybody is sent its reply.
    pub fn applied(&mut self, applied: &AppliedItem<'_>, now: Instant) -> Wake {
        use v1::command::Op;
        let command: &v1::Command = &applied.command;
        let position = applied.position;
        self.seen = self.seen.max(position);
        let effects = Effects::of(&applied.touched);
        let attached = |session: u64| {
            self.sessions
                .get(&session)
                .and_then(|known| known.attached.as_ref())
        };
        let by = attached(command.session).map(|attached| attached.stream);
        let streams = &self.streams;
        let wire_position = Some(v1::Position::from(position));
        // Whoever changes something in a leased directory has recalled the lease; what the system does has not.
        let mut outdated: Vec<u64> = Vec::new();
        if !self.leases.no_directories_against(command.session) {
            let held = |ino: &u64| self.leases.is_directory_held_against(command.session, *ino);
            outdated.extend(effects.inos().filter(held));
        }
        let mut send = |stream: StreamId, message: v1::Invalidation| {
            if let Some((_, outbox)) = streams.get(&stream) {
                let message = v1::Invalidation {
                    position: wire_position,
                    ..message
                };
                outbox.send(Outgoing::Invalidation(message));
            }
        };
        let crowded = |stream| {
            streams
                .get(&stream)
                .is_some_and(|(_, outbox)| outbox.is_crowded())
        };
        self.interest.change(by, &effects, now, crowded, &mut send);
        if self.recent.len() >= RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back((position.seq, effects));
        if self.mirror {
            return Wake::default();
        }

        let reply = &applied.reply;
        let refused = reply.error() != FsError::None;
        // The answer to a repeated command is of the position where it first took effect.
        let repeated = !refused
            && reply
                .position
                .is_some_and(|first| first.seq != position.seq);
        if let Some(stream) = by {
            for told in reads::told_by_mutation(command, reply) {
                self.interest.tell(stream, told, &mut send);
                if repeated {
                    send(stream, everything(told.ino, told.what));
                }
                if self.leases.is_held_against(command.session, told.ino) {
                    outdated.push(told.ino);
                }
            }
        }
        for ino in outdated {
            // What the reply tells of this file lacks what its writer holds back: that is to come forth, and corrects it. Nobody
            // has to wait for it.
            drop(self.recall(command.session, ino));
        }
        if command.session != 0 {
            let freed = self
                .opens
                .acknowledge(command.session, command.acknowledged_below);
            let wake = self.freed(&freed);
            if refused {
                return wake;
            }
            if self.sessions.contains_key(&command.session) {
                self.made(command, reply, repeated);
            }
            for ino in &reply.orphans {
                self.orphans.add(*ino);
            }
            if reply.orphaned {
                match orphaned_by(command, reply) {
                    Some(ino) => self.orphans.add(ino),
                    None => self.orphans.search_all(),
                }
            }
            let reap = reply.orphaned || !reply.orphans.is_empty() || wake.reap;
            let work = matches!(
                command.op,
                Some(
                    Op::Commit(_)
                        | Op::SetAttr(_)
                        | Op::Fallocate(_)
                        | Op::CopyRange(_)
                        | Op::RemoveTree(_)
                        | Op::Rename(_)
                        | Op::QuotaSet(_)
                        | Op::QuotaRemove(_)
                )
            );
            return Wake { reap, work };
        }
        match &command.op {
            // Known from its begin on, so that it expires also if its client never heard of it.
            Some(Op::SessionBegin(_)) if !refused => {
                self.sessions
                    .entry(reply.value)
                    .or_insert_with(|| Session::silent_since(now));
                Wake::default()
            }
            Some(Op::SessionEnd(end)) if !refused => self.end_session(end.session, now),
            // Whatever it unlinked.
            Some(Op::RemoveTreeStep(_)) => {
                self.orphans.search_all();
                Wake {
                    reap: true,
                    work: false,
                }
            }
            _ => Wake::default(),
        }
    }

    /// Sends the answer to a create on its stream: the file counts as open from here on.
    pub fn answer_create(
        &mut self,
        session: u64,
        ino: u64,
        outbox: &Outbox,
        mut response: v1::Response,
    ) {
        if let Err(error) = self.opens.open(session, ino) {
            // Only the answer to a repeated create can come this late: the file was removed meanwhile.
            tracing::debug!(session, ino, ?error, "a created file can't be held open");
        }
        response.write_lease = self.leases.holds(session, ino);
        outbox.send(Outgoing::Response(response));
    }

    /// As [`Soft::answer_create`], of a batch: `made` are the files and directories that took effect.
    pub fn answer_batch(
        &mut self,
        session: u64,
        made: &[v1::Create],
        outbox: &Outbox,
        mut response: v1::Response,
    ) {
        for made in made {
            if made.kind() == v1::FileKind::File
                && let Err(error) = self.opens.open(session, made.ino)
            {
                tracing::debug!(
                    session,
                    ino = made.ino,
                    ?error,
                    "a created file can't be held open"
                );
            }
            let grant = self.leases.holds(session, made.ino);
            if grant != 0 {
                response.write_leases.push(v1::WriteLease {
                    ino: made.ino,
                    grant,
                });
            }
        }
        outbox.send(Outgoing::Response(response));
    }

    /// As [`Soft::answer_create`], of a directory.
    pub fn answer_mkdir(
        &mut self,
        session: u64,
        ino: u64,
        outbox: &Outbox,
        mut response: v1::Response,
    ) {
        response.write_lease = self.leases.holds(session, ino);
        outbox.send(Outgoing::Response(response));
    }

    /// What streams are shown that asked for what is complete; `None`: nothing is yet.
    pub fn pin(&self) -> Option<Arc<Pin>> {
        self.pin.clone()
    }

    /// Such streams are shown a later position from here on.
    pub fn show(&mut self, pin: Arc<Pin>) {
        for (_, outbox) in self.streams.values() {
            outbox.show(pin.position);
        }
        self.pin = Some(pin);
    }

    /// Queues the answer of a read at `position`, with what changed since for what it tells.
    ///
    /// A leased directory is never told of. With `patient` no leased file is either; else its writer is asked to come forth with what
    /// corrects the answer.
    pub fn tell(
        &mut self,
        stream: StreamId,
        position: Position,
        (told, patient): (&[Told], bool),
        response: &mut Option<v1::Response>,
    ) -> Telling {
        if self.seen < position {
            return Telling::TooEarly;
        }
        let (Some((session, own)), streams) = (self.streams.get(&stream), &self.streams) else {
            // The stream is gone: there is nobody to tell.
            *response = None;
            return Telling::Told;
        };
        let page = match response
            .as_mut()
            .and_then(|response| response.body.as_mut())
        {
            Some(v1::response::Body::DirPage(page)) => Some(page),
            _ => None,
        };
        // Of a page, what is told besides the directory is left out.
        let asked_for = if page.is_some() { 1 } else { told.len() };
        if !self.leases.is_empty() {
            let leases = &self.leases;
            let in_the_way = |told: &Told| match patient {
                true => leases.is_held_against(*session, told.ino),
                false => leases.is_directory_held_against(*session, told.ino),
            };
            if told.iter().take(asked_for).any(in_the_way) {
                return Telling::Leased;
            }
            let entries = page.into_iter().flat_map(|page| &mut page.entries);
            for entry in entries.filter(|entry| leases.is_held_against(*session, entry.ino)) {
                entry.attr = None;
            }
        }
        let seen = Some(v1::Position::from(self.seen));
        let send = |stream: StreamId, message: v1::Invalidation| {
            if let Some((_, outbox)) = streams.get(&stream) {
                let message = v1::Invalidation {
                    position: seen,
                    ..message
                };
                outbox.send(Outgoing::Invalidation(message));
            }
        };
        let forgotten = self
            .recent
            .front()
            .is_none_or(|(seq, _)| *seq > position.seq + 1);
        for told in told {
            self.interest.tell(stream, *told, send);
            if forgotten && self.seen > position {
                // What changed since is not known any more: everything may have, at once after what a stream is shown.
                let at = match own.is_pinned() {
                    true => Position {
                        seq: position.seq + 1,
                        ..self.seen
                    },
                    false => self.seen,
                };
                own.send(Outgoing::Invalidation(v1::Invalidation {
                    position: Some(at.into()),
                    ..everything(told.ino, told.what)
                }));
            }
        }
        if !told.is_empty() {
            for (seq, effects) in self.recent.iter().rev() {
                if *seq <= position.seq {
                    break;
                }
                // Told at its own position to those who are not shown it yet.
                let at = match own.is_pinned() {
                    true => Position {
                        seq: *seq,
                        ..self.seen
                    },
                    false => self.seen,
                };
                self.interest.change_for(stream, effects, |message| {
                    own.send(Outgoing::Invalidation(v1::Invalidation {
                        position: Some(at.into()),
                        ..message
                    }));
                });
            }
        }
        // Leases that were granted since the answer was read.
        let mut outdated = Vec::new();
        if !self.leases.is_empty() {
            let against = |told: &&Told| self.leases.is_held_against(*session, told.ino);
            let about = told.iter().take(asked_for).filter(against);
            outdated.extend(about.map(|told| (*session, told.ino)));
        }
        if let Some(mut response) = response.take() {
            if let Some(v1::response::Body::Opened(opened)) = &response.body {
                let ino = opened.attr.as_ref().map_or(0, |attr| attr.ino);
                response.write_lease = self.leases.holds(*session, ino);
            }
            own.send(Outgoing::Response(response));
        }
        for (session, ino) in outdated {
            // What the answer tells lacks what the file's writer holds back: that is to come forth, and corrects it.
            drop(self.recall(session, ino));
        }
        Telling::Told
    }

    // ---- status

    /// What `heliofs status` shows.
    pub fn status(&self, volume: u32, now: Instant) -> Vec<v1::SessionStatus> {
        let status = |(id, known): (&u64, &Session)| v1::SessionStatus {
            session: *id,
            volume,
            host: known.facts.host.clone(),
            mount_point: known.facts.mount_point.clone(),
            build: known.facts.build.clone(),
            pid: known.facts.pid,
            opens: self.opens.count(*id) as u64,
            locks: self.locks.held(*id) as u64,
            silent_ms: now.saturating_duration_since(known.heard).as_millis() as u64,
            connected: known.attached.is_some(),
        };
        let mut all: Vec<_> = self.sessions.iter().map(status).collect();
        all.sort_unstable_by_key(|status| status.session);
        all
    }

    /// How much there is.
    pub fn sizes(&self) -> Sizes {
        Sizes {
            sessions: self.sessions.len(),
            streams: self.streams.len(),
            opens: self.opens.held(),
            told: self.interest.len(),
        }
    }
}

/// What the changes of a batch that took effect have made under numbers that they name.
pub fn made_by<'a>(
    batch: &'a v1::Batch,
    reply: &v1::Reply,
) -> impl Iterator<Item = &'a v1::Create> + use<'a> {
    let changes = batch.changes.iter().take(reply.applied as usize);
    changes.filter_map(|change| match &change.op {
        Some(v1::change::Op::Create(create)) if create.ino != 0 => Some(create),
        _ => None,
    })
}

/// The inode that lost its last name by a command whose reply says `orphaned`. `None`: the reply does not name it.
fn orphaned_by(command: &v1::Command, reply: &v1::Reply) -> Option<u64> {
    let attr = match &command.op {
        Some(v1::command::Op::Unlink(_)) => &reply.attr,
        Some(v1::command::Op::Rename(_)) => &reply.replaced,
        _ => &None,
    };
    attr.as_ref().map(|attr| attr.ino)
}

fn lock_granted(ticket: Ticket) -> v1::Response {
    v1::Response {
        id: ticket.request,
        body: Some(v1::response::Body::Lock(v1::LockReply { conflict: None })),
        ..Default::default()
    }
}

fn lock_refusal(ticket: Ticket, error: FsError) -> v1::Response {
    v1::Response {
        id: ticket.request,
        ..reads::refusal(error)
    }
}

//! Operations of a session: reads, opens, locks and mutations, typed.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, Position, SegmentId};
use heliofs_proto::v1;
use heliofs_proto::v1::request::Body;
use heliofs_proto::v1::response::Body as Answer;

use super::Session;
use super::state::Ticket;
use crate::error::ClientError;

/// The answer has a body of another kind than the question asks for.
fn unexpected(question: &'static str) -> ClientError {
    ClientError::Invalid(format!("the answer to {question} has another type"))
}

/// A read's verdict as an error, else the response.
fn settle(response: v1::Response) -> Result<v1::Response, ClientError> {
    match response.error() {
        FsError::None => Ok(response),
        FsError::SessionGone => Err(ClientError::SessionGone(
            "the server doesn't know it".to_owned(),
        )),
        verdict => Err(ClientError::Verdict(verdict)),
    }
}

/// A mutation's reply.
fn mutated(response: v1::Response) -> Result<v1::Reply, ClientError> {
    match settle(response)?.body {
        Some(Answer::Reply(reply)) if reply.error() == FsError::SessionGone => Err(
            ClientError::SessionGone("the state machine doesn't know it".to_owned()),
        ),
        Some(Answer::Reply(reply)) => Ok(reply),
        _ => Err(unexpected("a mutation")),
    }
}

/// Entries per question when a name is looked for by its inode.
const PATH_ENTRIES: u32 = 4096;

/// Directories above an inode that are followed; more is a loop that renames have made meanwhile.
const PATH_DEPTH_MAX: usize = 4096;

/// A refusal as an error.
fn accepted(reply: v1::Reply) -> Result<v1::Reply, ClientError> {
    match reply.error() {
        FsError::None => Ok(reply),
        verdict => Err(ClientError::Verdict(verdict)),
    }
}

/// The volume's position that an answer reflects; the start when the server names none.
pub fn position_of(response: &v1::Response) -> Position {
    response.position.map(Position::from).unwrap_or_default()
}

macro_rules! expect_body {
    ($response:expr, $kind:ident, $question:literal) => {{
        let response = $response;
        let position = position_of(&response);
        match response.body {
            Some(Answer::$kind(body)) => Ok((body, position)),
            _ => Err(unexpected($question)),
        }
    }};
}

impl Session {
    /// Sends a read and waits for its response, whatever verdict is in it (a negative answer has a position, too). Resent
    /// after a reconnect, so it must be repeatable. Not for mutations ([`Session::mutate`]) nor for opens, releases and
    /// locks, which the session has to know of.
    ///
    /// Errors: `Unavailable` past the deadline, `SessionGone`.
    pub async fn call(&self, body: Body) -> Result<v1::Response, ClientError> {
        let (_, answer) = self.shared().submit(body)?;
        self.shared().wait(answer).await
    }

    /// As [`Session::call`], with a verdict as an error.
    pub async fn read(&self, body: Body) -> Result<v1::Response, ClientError> {
        settle(self.call(body).await?)
    }

    /// Proposes a mutation; it takes effect once, however often it has to be resent.
    ///
    /// Errors: `Verdict` (nothing changed); `Unavailable` (never sent); `Unknown` (sent, and not answered within the
    /// deadline: it may still take effect); `SessionGone` (likewise unknown if it was sent). Dropping the future doesn't
    /// take back what was sent.
    pub async fn mutate(
        &self,
        caller: v1::Caller,
        op: v1::command::Op,
    ) -> Result<v1::Reply, ClientError> {
        accepted(self.mutate_raw(caller, op).await?)
    }

    /// As [`Session::mutate`], but a refusal is a reply like any other: its position tells what it was judged by.
    pub async fn mutate_raw(
        &self,
        caller: v1::Caller,
        op: v1::command::Op,
    ) -> Result<v1::Reply, ClientError> {
        let command = v1::Command {
            caller: Some(caller),
            op: Some(op),
            ..Default::default()
        };
        let (_, answer) = self.shared().submit(Body::Command(command))?;
        mutated(self.shared().wait(answer).await?)
    }

    /// The entry `name` of directory `parent`, and the position it was read at.
    pub async fn lookup(
        &self,
        parent: Ino,
        name: Bytes,
    ) -> Result<(v1::Attr, Position), ClientError> {
        match self.try_lookup(parent, name).await? {
            (Some(attr), position) => Ok((attr, position)),
            (None, _) => Err(ClientError::Verdict(FsError::NotFound)),
        }
    }

    /// As [`Session::lookup`], with absence as an answer that has a position and can be cached.
    pub async fn try_lookup(
        &self,
        parent: Ino,
        name: Bytes,
    ) -> Result<(Option<v1::Attr>, Position), ClientError> {
        let body = Body::Lookup(v1::Lookup {
            parent: parent.0,
            name,
        });
        let response = self.call(body).await?;
        if response.error() == FsError::NotFound {
            return Ok((None, position_of(&response)));
        }
        let (attr, position) = expect_body!(settle(response)?, Attr, "a lookup")?;
        Ok((Some(attr), position))
    }

    /// Attributes of an inode. `Stale` when it is gone.
    pub async fn get_attr(&self, ino: Ino) -> Result<(v1::Attr, Position), ClientError> {
        let body = Body::GetAttr(v1::GetAttr { ino: ino.0 });
        expect_body!(self.read(body).await?, Attr, "get_attr")
    }

    /// Opens an inode: while it is open in some session it lives on without a name. Returns its attributes and up to
    /// `extents_max` extents from offset 0. Each success is paid back with one [`Session::release`]; a failure or a dropped
    /// future needs none. `write`: asks for the write lease ([`Session::holds_write_lease`] tells).
    pub async fn open(
        &self,
        ino: Ino,
        extents_max: u32,
        write: bool,
    ) -> Result<(v1::Opened, Position), ClientError> {
        let guard = OpenGuard {
            session: self,
            ino: Some(ino),
        };
        let opened = match self.shared().submit_open(ino.0, (extents_max, write))? {
            (Ticket::Open, answer) => {
                let response = settle(self.shared().wait(answer).await?)?;
                expect_body!(response, Opened, "open")?
            }
            // This session already has it open on the server: only what the reader needs is fetched, so that the server
            // holds one registration per inode, which ends with the last release.
            (Ticket::Read, answer) => {
                let response = settle(self.shared().wait(answer).await?)?;
                let (page, position) = expect_body!(response, Extents, "get_extents")?;
                let attr = page.attr;
                let opened = v1::Opened {
                    attr,
                    extents: Some(page),
                    quota_room: None,
                };
                (opened, position)
            }
        };
        guard.keep();
        Ok(opened)
    }

    /// Creates a regular file (or returns the one that is there, without `exclusive`) and opens it, in one round trip: each
    /// success is paid back with one [`Session::release`]. A file created by [`Session::mutate`] is not open.
    ///
    /// Errors: as [`Session::mutate`].
    pub async fn create_open(
        &self,
        caller: v1::Caller,
        create: v1::Create,
    ) -> Result<v1::Reply, ClientError> {
        let command = v1::Command {
            caller: Some(caller),
            op: Some(v1::command::Op::Create(create)),
            ..Default::default()
        };
        let answer = self.shared().submit_create_open(command)?;
        accepted(mutated(self.shared().wait(answer).await?)?)
    }

    /// Proposes changes that were answered already, at most 64, and waits for as long as it takes. What they did is in the reply:
    /// a refusal as a whole, too. Regular files that they make count as open, if [`Session::expect_open`] said so.
    ///
    /// Errors: `SessionGone`, and then nobody knows whether they took effect.
    pub async fn batch(&self, changes: Vec<v1::Change>) -> Result<v1::Reply, ClientError> {
        let command = v1::Command {
            op: Some(v1::command::Op::Batch(v1::Batch { changes })),
            ..Default::default()
        };
        let answer = self.shared().submit_batch(command)?;
        mutated(self.shared().wait(answer).await?)
    }

    /// A file that a batch to come makes is open from now on. Paid back with one [`Session::release`].
    pub fn expect_open(&self, ino: Ino) {
        self.shared().expect_open(ino.0);
    }

    /// Takes back one open. Does not wait, can't fail.
    pub fn release(&self, ino: Ino) {
        self.shared().release(ino.0);
    }

    /// A page of a directory: up to `entries_max` entries after cookie `after` (0 starts), with attributes if `plus`.
    pub async fn read_dir(
        &self,
        ino: Ino,
        after: u64,
        entries_max: u32,
        plus: bool,
    ) -> Result<(v1::DirPage, Position), ClientError> {
        let body = Body::ReadDir(v1::ReadDir {
            ino: ino.0,
            after,
            entries_max,
            plus,
        });
        expect_body!(self.read(body).await?, DirPage, "read_dir")
    }

    /// The target of a symlink.
    pub async fn read_link(&self, ino: Ino) -> Result<Bytes, ClientError> {
        let body = Body::ReadLink(v1::ReadLink { ino: ino.0 });
        Ok(expect_body!(self.read(body).await?, Bytes, "read_link")?.0)
    }

    /// The value of an extended attribute. `NoAttribute` when it isn't set; [`Session::try_get_xattr`] has a position then.
    pub async fn get_xattr(&self, ino: Ino, name: Bytes) -> Result<(Bytes, Position), ClientError> {
        match self.try_get_xattr(ino, name).await? {
            (Some(value), position) => Ok((value, position)),
            (None, _) => Err(ClientError::Verdict(FsError::NoAttribute)),
        }
    }

    /// As [`Session::get_xattr`], with absence as an answer that has a position and can be cached.
    pub async fn try_get_xattr(
        &self,
        ino: Ino,
        name: Bytes,
    ) -> Result<(Option<Bytes>, Position), ClientError> {
        let body = Body::GetXattr(v1::GetXattr { ino: ino.0, name });
        let response = self.call(body).await?;
        if response.error() == FsError::NoAttribute {
            return Ok((None, position_of(&response)));
        }
        let (value, position) = expect_body!(settle(response)?, Bytes, "get_xattr")?;
        Ok((Some(value), position))
    }

    /// The names of an inode's extended attributes.
    pub async fn list_xattr(&self, ino: Ino) -> Result<(Vec<Bytes>, Position), ClientError> {
        let body = Body::ListXattr(v1::ListXattr { ino: ino.0 });
        let (list, position) = expect_body!(self.read(body).await?, Names, "list_xattr")?;
        Ok((list.names, position))
    }

    /// The first `extents_max` extents that intersect `[offset, offset + length)`, in file order, with the attributes at the
    /// same position. Units: bytes.
    pub async fn get_extents(
        &self,
        ino: Ino,
        offset: u64,
        length: u64,
        extents_max: u32,
    ) -> Result<(v1::ExtentPage, Position), ClientError> {
        let body = Body::GetExtents(v1::GetExtents {
            ino: ino.0,
            offset,
            length,
            extents_max,
        });
        expect_body!(self.read(body).await?, Extents, "get_extents")
    }

    /// Usage and limits of the volume.
    pub async fn stat_fs(&self, ino: Ino) -> Result<v1::StatFsReply, ClientError> {
        let body = Body::StatFs(v1::StatFs { ino: ino.0 });
        Ok(expect_body!(self.read(body).await?, StatFs, "stat_fs")?.0)
    }

    /// Resolves a path from the root without following symlinks: one attribute set per component that exists, root first.
    pub async fn walk(&self, path: Bytes) -> Result<(Vec<v1::Attr>, Position), ClientError> {
        let body = Body::Walk(v1::Walk { path });
        let (reply, position) = expect_body!(self.read(body).await?, Walk, "walk")?;
        Ok((reply.attrs, position))
    }

    /// One path of an inode from the volume's root, for people; `None`: it has no name (any more). Names that are no text are
    /// shown with replacements. Takes two or more round trips per directory on the way.
    pub async fn path_of(&self, ino: Ino) -> Result<Option<String>, ClientError> {
        let mut names: Vec<Bytes> = Vec::new();
        let mut at = ino;
        while at != Ino::ROOT {
            if names.len() > PATH_DEPTH_MAX {
                return Ok(None);
            }
            let parent = match self.get_attr(at).await {
                Ok((attr, _)) => Ino(attr.parent),
                Err(ClientError::Verdict(_)) => return Ok(None),
                Err(error) => return Err(error),
            };
            match self.name_in(parent, at).await? {
                Some(name) => names.push(name),
                None => return Ok(None),
            }
            at = parent;
        }
        let names = names.iter().rev().map(|name| String::from_utf8_lossy(name));
        Ok(Some(names.fold(String::new(), |path, name| {
            format!("{path}/{name}")
        })))
    }

    /// A name of `ino` in a directory.
    async fn name_in(&self, directory: Ino, ino: Ino) -> Result<Option<Bytes>, ClientError> {
        let mut after = 0;
        loop {
            let page = match self.read_dir(directory, after, PATH_ENTRIES, false).await {
                Ok((page, _)) => page,
                Err(ClientError::Verdict(_)) => return Ok(None),
                Err(error) => return Err(error),
            };
            if let Some(entry) = page.entries.iter().find(|entry| entry.ino == ino.0) {
                return Ok(Some(entry.name.clone()));
            }
            match page.entries.last() {
                Some(last) if !page.end => after = last.cookie,
                _ => return Ok(None),
            }
        }
    }

    /// Counts below a directory; not a snapshot. May take longer than other reads: the deadline is the same.
    pub async fn summary(&self, ino: Ino) -> Result<v1::SummaryReply, ClientError> {
        let body = Body::Summary(v1::Summary { ino: ino.0 });
        Ok(expect_body!(self.read(body).await?, Summary, "summary")?.0)
    }

    /// Places or removes (`LOCK_KIND_UNLOCK`) a lock. With `wait` it blocks, without a deadline, until it is granted;
    /// dropping the future cancels it, and a grant that was already under way is taken back.
    ///
    /// Errors: `WouldBlock`, `Deadlock`, `Interrupted`, `SessionGone`; without `wait` also `Unavailable`. Held locks are
    /// re-asserted on reconnect.
    pub async fn lock(&self, lock: v1::Lock) -> Result<(), ClientError> {
        let (id, answer) = self.shared().submit_lock(lock)?;
        let guard = LockGuard {
            session: self,
            id: Some(id),
        };
        let response = self.shared().wait(answer).await;
        guard.keep();
        settle(response?).map(drop)
    }

    /// The first lock in the way of `lock`, if any.
    pub async fn test_lock(&self, lock: v1::Lock) -> Result<Option<v1::Lock>, ClientError> {
        let body = Body::TestLock(v1::TestLock { lock: Some(lock) });
        Ok(expect_body!(self.read(body).await?, Lock, "test_lock")?
            .0
            .conflict)
    }

    /// Drops every lock of `owner` on an inode: fcntl locks at close, flock locks (`flock`) at the last close.
    pub async fn release_locks(
        &self,
        ino: Ino,
        owner: u64,
        flock: bool,
    ) -> Result<(), ClientError> {
        // Nothing held and nothing asked for: no round trip at each close.
        if !self.shared().may_hold_locks(ino.0, owner, flock) {
            return Ok(());
        }
        let body = Body::ReleaseLocks(v1::ReleaseLocks {
            ino: ino.0,
            owner,
            flock,
        });
        self.read(body).await.map(drop)
    }

    /// Asks what gc, fsck and compaction need to know.
    pub async fn maintain(
        &self,
        ask: v1::maintain::Ask,
    ) -> Result<v1::maintained::Answer, ClientError> {
        let body = Body::Maintain(v1::Maintain { ask: Some(ask) });
        let (maintained, _) = expect_body!(self.read(body).await?, Maintained, "maintain")?;
        maintained
            .answer
            .ok_or_else(|| ClientError::Invalid("the answer to `maintain` is empty".to_owned()))
    }

    /// Leases up to `segments_max` dead segments for deletion from the bucket, and reports those that are `done`. Second
    /// part: the epoch in which they are dead.
    pub async fn take_deletions(
        &self,
        segments_max: u32,
        done: &[SegmentId],
    ) -> Result<(Vec<SegmentId>, u32), ClientError> {
        let body = Body::TakeDeletions(v1::TakeDeletions {
            segments_max,
            done: done.iter().map(|id| id.0).collect(),
        });
        let (deletions, _) = expect_body!(self.read(body).await?, Deletions, "take_deletions")?;
        let segments = deletions.segments.into_iter().map(SegmentId).collect();
        Ok((segments, deletions.epoch))
    }
}

impl Session {
    /// Reports what became of copy tasks, and leases up to `segments_max` more, the `wanted` ones first. For volumes whose
    /// welcome names a second bucket.
    ///
    /// Errors: `Verdict(NOT_SUPPORTED)` for a volume with one bucket. A report that failed may be sent again.
    pub async fn take_copies(
        &self,
        report: v1::CopyReport,
        segments_max: u32,
        wanted: &[SegmentId],
        working: Vec<u64>,
    ) -> Result<v1::Copies, ClientError> {
        let body = Body::TakeCopies(v1::TakeCopies {
            working,
            report: Some(report),
            segments_max,
            wanted: wanted.iter().map(|id| id.0).collect(),
            check: None,
        });
        let (copies, _) = expect_body!(self.read(body).await?, Copies, "take_copies")?;
        Ok(copies)
    }

    /// Asks for the lease on the check of both buckets, or keeps it and says what was found. `bucket`: the uuid of this
    /// region's.
    ///
    /// Errors: as [`Session::take_copies`].
    pub async fn take_check(
        &self,
        bucket: &str,
        check: v1::TakeCheck,
    ) -> Result<v1::CheckLease, ClientError> {
        let body = Body::TakeCopies(v1::TakeCopies {
            report: Some(v1::CopyReport {
                bucket: bucket.to_owned(),
                ..v1::CopyReport::default()
            }),
            check: Some(check),
            ..v1::TakeCopies::default()
        });
        let (copies, _) = expect_body!(self.read(body).await?, Copies, "take_check")?;
        Ok(copies.check.unwrap_or_default())
    }
}

/// Takes an open back unless it succeeded: on errors, and when the caller drops the future.
struct OpenGuard<'a> {
    session: &'a Session,
    ino: Option<Ino>,
}

impl OpenGuard<'_> {
    fn keep(mut self) {
        self.ino = None;
    }
}

impl Drop for OpenGuard<'_> {
    fn drop(&mut self) {
        if let Some(ino) = self.ino {
            self.session.release(ino);
        }
    }
}

/// Cancels a blocking lock when the caller drops the future.
struct LockGuard<'a> {
    session: &'a Session,
    id: Option<u64>,
}

impl LockGuard<'_> {
    fn keep(mut self) {
        self.id = None;
    }
}

impl Drop for LockGuard<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.session.shared().give_up_lock(id);
        }
    }
}

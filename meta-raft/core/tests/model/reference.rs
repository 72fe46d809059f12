//! The file system as POSIX describes it: names, attributes, sessions. Content is in `reference_content`.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::limits::{FILE_BYTES_MAX, NAME_BYTES_MAX, SEGMENTS_PER_BLOCK};
use heliofs_proto::v1::{self, Command, FileKind, Reply, change::Op as Change, command::Op};

use crate::world::Byte;

pub(crate) const ROOT: u64 = 1;
pub(crate) const CAPABILITY: &[u8] = b"security.capability";

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) kind: FileKind,
    pub(crate) mode: u32,
    pub(crate) nlink: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) ctime: i64,
    pub(crate) parent: u64,
    pub(crate) content: Rc<Vec<Byte>>,
    pub(crate) entries: BTreeMap<Bytes, u64>,
    pub(crate) target: Bytes,
    pub(crate) xattrs: BTreeMap<Bytes, Bytes>,
    pub(crate) orphan: bool,
}

impl Node {
    fn new(kind: FileKind, mode: u32, parent: u64, time: i64) -> Self {
        Self {
            kind,
            mode,
            nlink: if kind == FileKind::Directory { 2 } else { 1 },
            uid: 0,
            gid: 0,
            mtime: time,
            ctime: time,
            parent,
            content: Rc::default(),
            entries: BTreeMap::new(),
            target: Bytes::new(),
            xattrs: BTreeMap::new(),
            orphan: false,
        }
    }

    pub(crate) fn is_directory(&self) -> bool {
        self.kind == FileKind::Directory
    }

    pub(crate) fn size(&self) -> u64 {
        match self.kind {
            FileKind::Directory => self.entries.keys().map(|name| name.len() as u64).sum(),
            FileKind::Symlink => self.target.len() as u64,
            _ => self.content.len() as u64,
        }
    }

    pub(crate) fn kill_suidgid(&mut self) {
        if !self.is_directory() {
            let setgid = if self.mode & 0o10 != 0 { 0o2000 } else { 0 };
            self.mode &= !(0o4000 | setgid);
        }
    }

    pub(crate) fn drop_capability(&mut self) {
        self.xattrs.remove(CAPABILITY);
    }
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Session {
    pub(crate) ended: bool,
    pub(crate) acknowledged_below: u64,
    pub(crate) replies: BTreeMap<u64, Reply>,
    /// Inode numbers that it may name.
    pub(crate) inos: Vec<std::ops::Range<u64>>,
}

#[derive(Clone, Debug)]
pub(crate) struct Reference {
    pub(crate) nodes: BTreeMap<u64, Node>,
    pub(crate) sessions: BTreeMap<u64, Session>,
    /// Block of segment ids → session.
    pub(crate) blocks: BTreeMap<u64, u64>,
    /// What a commit brought; `None`: freed since.
    pub(crate) segments: BTreeMap<u64, Option<(u64, u32)>>,
    pub(crate) intents: BTreeMap<u64, BTreeSet<u64>>,
    pub(crate) time: i64,
    /// Whether the last command was answered with the reply of an earlier one.
    pub(crate) repeated: bool,
    /// Verdicts per file of the last commit.
    pub(crate) files: Vec<FsError>,
}

type Verdict<T = ()> = Result<T, FsError>;

impl Reference {
    pub(crate) fn new(time: i64) -> Self {
        let root = Node::new(FileKind::Directory, 0o755, ROOT, time);
        Self {
            nodes: BTreeMap::from([(ROOT, root)]),
            sessions: BTreeMap::new(),
            blocks: BTreeMap::new(),
            segments: BTreeMap::new(),
            intents: BTreeMap::new(),
            time,
            repeated: false,
            files: Vec::new(),
        }
    }

    /// Does what the command says, or says why not (then this state is spoilt). The reply is looked at for new ids, and compared
    /// where a value is certain.
    pub(crate) fn apply(&mut self, command: &Command, reply: &Reply, time: i64) -> Verdict {
        self.time = time;
        self.files.clear();
        self.repeated = false;
        if command.session != 0 {
            let session = self.sessions.get(&command.session);
            let session = session.filter(|session| !session.ended);
            let session = session.ok_or(FsError::SessionGone)?;
            if command.sequence < session.acknowledged_below {
                return Err(FsError::AlreadyAcknowledged);
            }
            if let Some(first) = session.replies.get(&command.sequence) {
                assert_eq!(first, reply, "a repeated request gets the first reply");
                self.repeated = true;
                return Ok(());
            }
        }
        self.execute(command, reply)?;
        self.remember(command, reply);
        Ok(())
    }

    /// Whether the command is a repetition whose first reply is kept.
    pub(crate) fn remembers(&self, command: &Command) -> bool {
        let session = self.sessions.get(&command.session);
        session.is_some_and(|session| session.replies.contains_key(&command.sequence))
    }

    /// Keeps a reply, as a success does; refusals must be told.
    pub(crate) fn remember(&mut self, command: &Command, reply: &Reply) {
        if matches!(
            reply.error(),
            FsError::SessionGone | FsError::AlreadyAcknowledged
        ) {
            return;
        }
        if let Some(session) = self.sessions.get_mut(&command.session) {
            let below = command.acknowledged_below.min(command.sequence);
            session.acknowledged_below = session.acknowledged_below.max(below);
            let below = session.acknowledged_below;
            session.replies.retain(|sequence, _| *sequence >= below);
            session.replies.insert(command.sequence, reply.clone());
        }
    }

    fn execute(&mut self, command: &Command, reply: &Reply) -> Verdict {
        match command.op.as_ref().expect("scripts set an op") {
            Op::VolumeInit(_) => Err(FsError::Exists),
            Op::SettingsUpdate(_) => Ok(()),
            Op::SessionBegin(_) => {
                let new = self.sessions.insert(reply.value, Session::default());
                assert!(new.is_none(), "session ids are fresh");
                Ok(())
            }
            Op::SessionEnd(op) => {
                if let Some(session) = self.sessions.get_mut(&op.session) {
                    session.ended = true;
                }
                Ok(())
            }
            Op::SegmentsAllocate(op) => {
                assert!(reply.value > 0 && reply.value.is_multiple_of(SEGMENTS_PER_BLOCK));
                let first = reply.value / SEGMENTS_PER_BLOCK;
                for block in first..first + u64::from(op.count) / SEGMENTS_PER_BLOCK {
                    let new = self.blocks.insert(block, command.session);
                    assert!(new.is_none(), "segment ids are fresh");
                }
                Ok(())
            }
            Op::InosReserve(op) if op.count == 0 => Err(FsError::Invalid),
            Op::InosReserve(op) => {
                assert!(reply.value > 1 && !self.nodes.contains_key(&reply.value));
                let session = self.sessions.get_mut(&command.session).expect("checked");
                let range = reply.value..reply.value + u64::from(op.count);
                session.inos.push(range);
                let lost = session.inos.len().saturating_sub(4);
                session.inos.drain(..lost);
                Ok(())
            }
            Op::Batch(op) => self.batch(op, command.session, reply),
            Op::Create(op) => {
                self.take_ino(op.ino, command.session)?;
                self.create(op, reply, command.caller.unwrap_or_default())
            }
            Op::Link(op) => self.link(op),
            Op::Unlink(op) => self.unlink(op, Some(reply)),
            Op::Rename(op) => self.rename(op, Some(reply)),
            Op::SetAttr(op) => self.set_attr(op),
            Op::SetXattr(op) => self.set_xattr(op),
            Op::RemoveXattr(op) => self.remove_xattr(op),
            Op::Commit(op) => self.commit(op, command.session),
            Op::Fallocate(op) => self.fallocate(op),
            Op::CopyRange(op) => self.copy_range(op, reply),
            Op::Relocate(op) => self.relocate(op, command.session, reply),
            Op::Reap(op) => self.reap(op, reply),
            Op::EraseStep(_) => Ok(()),
            Op::RemoveTree(op) => self.remove_tree(op, reply),
            Op::RemoveTreeStep(op) => self.remove_tree_step(op, reply),
            // What they come to is checked on the records.
            Op::QuotaSet(_) | Op::QuotaRemove(_) | Op::QuotaStep(_) => Ok(()),
            Op::EpochBegin(_) => Ok(()),
        }
    }

    /// The number that a create names is one of those that the session has left, and those below it are not any more.
    fn take_ino(&mut self, ino: u64, session: u64) -> Verdict {
        if ino == 0 {
            return Ok(());
        }
        let session = self.sessions.get_mut(&session).ok_or(FsError::Invalid)?;
        let range = session.inos.iter_mut().find(|range| range.contains(&ino));
        range.ok_or(FsError::Invalid)?.start = ino + 1;
        session.inos.retain(|range| !range.is_empty());
        Ok(())
    }

    /// The changes up to the first that can't be made.
    fn batch(&mut self, op: &v1::Batch, session: u64, reply: &Reply) -> Verdict {
        if op.changes.is_empty() || op.changes.len() > 64 {
            return Err(FsError::Invalid);
        }
        let now = self.time;
        let mut earliest = now - 600_000_000_000;
        let mut orphans = Vec::new();
        let mut done = (op.changes.len(), FsError::None);
        for (index, change) in op.changes.iter().enumerate() {
            let before = self.clone();
            self.time = match change.time {
                0 => now,
                time => time.clamp(earliest, now),
            };
            earliest = self.time;
            let checked = self.as_answered(change);
            self.time = self.time.max(checked.unwrap_or(self.time).min(now));
            let named = |ino| Reply {
                attr: Some(v1::Attr {
                    ino,
                    ..v1::Attr::default()
                }),
                created: true,
                ..Reply::default()
            };
            let verdict = match change.op.as_ref().expect("scripts set an op") {
                _ if checked.is_err() => checked.map(|_| ()),
                Change::Create(op) => {
                    let existing = self.entry(op.parent, &op.name);
                    match existing {
                        Ok(None) => self.take_ino(op.ino, session),
                        _ => Ok(()),
                    }
                    .and_then(|()| {
                        self.create(op, &named(op.ino), change.caller.unwrap_or_default())
                    })
                }
                Change::Link(op) => self.link(op),
                Change::Unlink(op) => {
                    let ino = self.entry(op.parent, &op.name);
                    self.unlink(op, None)
                        .map(|()| orphans.extend(ino.ok().flatten()))
                }
                Change::Rename(op) => {
                    let ino = self.entry(op.new_parent, &op.new_name);
                    self.rename(op, None)
                        .map(|()| orphans.extend(ino.ok().flatten()))
                }
                Change::SetAttr(op) => self.set_attr(op),
            };
            // Of quotas nothing is known here.
            let crossing = reply.refused() == FsError::CrossDevice
                && reply.applied as usize == index
                && matches!(change.op, Some(Change::Rename(_) | Change::Link(_)));
            if let Err(error) = verdict {
                *self = before;
                done = (index, error);
                break;
            } else if crossing {
                *self = before;
                done = (index, FsError::CrossDevice);
                break;
            }
        }
        self.time = now;
        assert_eq!((reply.applied as usize, reply.refused()), done, "{op:?}");
        orphans.retain(|ino| self.nodes[ino].orphan);
        orphans.sort_unstable();
        orphans.dedup();
        let mut told = reply.orphans.clone();
        told.sort_unstable();
        assert_eq!(told, orphans, "{op:?}");
        Ok(())
    }

    /// Whether names stand for what the change says; when what it concerns was changed last.
    fn as_answered(&self, change: &v1::Change) -> Verdict<i64> {
        let named = |parent: u64, name: &Bytes| {
            let entries = self.nodes.get(&parent).map(|node| &node.entries);
            entries.and_then(|entries| entries.get(name)).copied()
        };
        let mut concerned = Vec::new();
        match change.op.as_ref().expect("scripts set an op") {
            Change::Create(op) => concerned.push(op.parent),
            Change::Link(op) => concerned.extend([op.parent, op.ino]),
            Change::SetAttr(op) => concerned.push(op.ino),
            Change::Unlink(op) => {
                concerned.push(op.parent);
                concerned.extend(named(op.parent, &op.name));
            }
            Change::Rename(op) => {
                let replaced = named(op.new_parent, &op.new_name);
                if change
                    .replaces
                    .is_some_and(|ino| ino != replaced.unwrap_or(0))
                {
                    return Err(FsError::Stale);
                }
                concerned.extend([op.parent, op.new_parent]);
                concerned.extend(named(op.parent, &op.name));
                concerned.extend(replaced);
            }
        }
        if let Change::Unlink(v1::Unlink { parent, name, .. })
        | Change::Rename(v1::Rename { parent, name, .. }) =
            change.op.as_ref().expect("scripts set an op")
            && change.ino != 0
            && named(*parent, name).is_some_and(|found| found != change.ino)
        {
            return Err(FsError::Stale);
        }
        let nodes = concerned.iter().filter_map(|ino| self.nodes.get(ino));
        Ok(nodes.map(|node| node.ctime).max().unwrap_or(i64::MIN))
    }

    // ---- names

    pub(crate) fn node(&mut self, ino: u64) -> Verdict<&mut Node> {
        self.nodes.get_mut(&ino).ok_or(FsError::Stale)
    }

    fn directory(&mut self, ino: u64) -> Verdict<&mut Node> {
        let node = self.node(ino)?;
        match node.kind {
            FileKind::Directory if node.nlink == 0 => Err(FsError::NotFound),
            FileKind::Directory => Ok(node),
            _ => Err(FsError::NotDirectory),
        }
    }

    fn entry(&mut self, parent: u64, name: &[u8]) -> Verdict<Option<u64>> {
        let dir = self.directory(parent)?;
        if name.len() > NAME_BYTES_MAX {
            return Err(FsError::NameTooLong);
        }
        if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
            return Err(FsError::Invalid);
        }
        Ok(dir.entries.get(name).copied())
    }

    fn kind(&self, ino: u64) -> FileKind {
        self.nodes[&ino].kind
    }

    /// Lets a name mean `to`, or nothing.
    fn point(&mut self, parent: u64, name: &Bytes, to: Option<u64>) {
        let is_directory = to.is_some_and(|to| self.kind(to) == FileKind::Directory);
        let time = self.time;
        let dir = self.nodes.get_mut(&parent).expect("a checked directory");
        let before = match to {
            Some(to) => dir.entries.insert(name.clone(), to),
            None => dir.entries.remove(name),
        };
        (dir.mtime, dir.ctime) = (time, time);
        dir.nlink += u32::from(is_directory);
        // A directory that a tree removal takes apart has no links that could be counted.
        if before.is_some_and(|ino| self.kind(ino) == FileKind::Directory) {
            let dir = self.nodes.get_mut(&parent).expect("a checked directory");
            dir.nlink = dir.nlink.saturating_sub(1);
        }
    }

    fn lose_name(&mut self, ino: u64) {
        let time = self.time;
        let node = self.nodes.get_mut(&ino).expect("a named node");
        node.ctime = time;
        node.nlink = if node.is_directory() {
            0
        } else {
            node.nlink - 1
        };
        node.orphan = node.nlink == 0;
    }

    fn create(&mut self, op: &v1::Create, reply: &Reply, caller: v1::Caller) -> Verdict {
        let time = self.time;
        if let Some(ino) = self.entry(op.parent, &op.name)? {
            return match self.kind(ino) {
                _ if op.exclusive || op.kind() != FileKind::File => Err(FsError::Exists),
                FileKind::Directory => Err(FsError::IsDirectory),
                FileKind::File => {
                    assert!(!reply.created);
                    assert_eq!(reply.attr.map(|attr| attr.ino), Some(ino));
                    Ok(())
                }
                _ => Err(FsError::Exists),
            };
        }
        let mode = match op.kind() {
            FileKind::Symlink => 0o777,
            _ => op.mode & !op.umask,
        };
        let mut node = Node::new(op.kind(), mode, op.parent, time);
        (node.uid, node.gid) = (caller.uid, caller.gid);
        let parent = &self.nodes[&op.parent];
        if parent.mode & 0o2000 != 0 {
            node.gid = parent.gid;
            if op.kind() == FileKind::Directory {
                node.mode |= 0o2000;
            }
        }
        node.target = op.symlink_target.clone();
        // Without a reply to take the number from, any will do: the reply is found wrong.
        let ino = reply.attr.map_or(u64::MAX, |attr| attr.ino);
        assert!(self.nodes.insert(ino, node).is_none(), "a fresh number");
        self.point(op.parent, &op.name, Some(ino));
        Ok(())
    }

    fn link(&mut self, op: &v1::Link) -> Verdict {
        let time = self.time;
        if self.entry(op.parent, &op.name)?.is_some() {
            return Err(FsError::Exists);
        }
        let node = self.node(op.ino)?;
        if node.is_directory() {
            return Err(FsError::NotPermitted);
        }
        if node.nlink == 0 {
            return Err(FsError::NotFound);
        }
        node.nlink += 1;
        node.ctime = time;
        node.parent = op.parent;
        self.point(op.parent, &op.name, Some(op.ino));
        Ok(())
    }

    fn unlink(&mut self, op: &v1::Unlink, reply: Option<&Reply>) -> Verdict {
        let ino = self.entry(op.parent, &op.name)?.ok_or(FsError::NotFound)?;
        let node = &self.nodes[&ino];
        match (op.directory, node.is_directory()) {
            (false, true) => return Err(FsError::IsDirectory),
            (true, false) => return Err(FsError::NotDirectory),
            (true, true) if !node.entries.is_empty() => return Err(FsError::NotEmpty),
            _ => {}
        }
        self.point(op.parent, &op.name, None);
        self.lose_name(ino);
        if let Some(reply) = reply {
            assert_eq!(reply.orphaned, self.nodes[&ino].orphan);
        }
        Ok(())
    }

    fn is_below(&self, ino: u64, mut at: u64) -> bool {
        while at != ROOT {
            if at == ino {
                return true;
            }
            match &self.nodes[&at] {
                node if node.nlink == 0 => return false,
                node => at = node.parent,
            }
        }
        false
    }

    fn rename(&mut self, op: &v1::Rename, reply: Option<&Reply>) -> Verdict {
        if op.no_replace && op.exchange {
            return Err(FsError::Invalid);
        }
        let (old, new) = (op.parent, op.new_parent);
        self.directory(old)?;
        self.directory(new)?;
        let source = self.entry(old, &op.name)?.ok_or(FsError::NotFound)?;
        let target = self.entry(new, &op.new_name)?;
        match target {
            Some(_) if op.no_replace => return Err(FsError::Exists),
            None if op.exchange => return Err(FsError::NotFound),
            Some(target) if target == source => return Ok(()),
            _ => {}
        }
        let source_is_directory = self.kind(source) == FileKind::Directory;
        if source_is_directory && self.is_below(source, new) {
            return Err(FsError::Invalid);
        }
        if let Some(target) = target {
            let target_node = &self.nodes[&target];
            if op.exchange {
                if target_node.is_directory() && self.is_below(target, old) {
                    return Err(FsError::Invalid);
                }
            } else {
                match (source_is_directory, target_node.is_directory()) {
                    (true, false) => return Err(FsError::NotDirectory),
                    (false, true) => return Err(FsError::IsDirectory),
                    (true, true) if !target_node.entries.is_empty() => {
                        return Err(FsError::NotEmpty);
                    }
                    _ => {}
                }
            }
        }
        let time = self.time;
        self.point(old, &op.name, target.filter(|_| op.exchange));
        self.point(new, &op.new_name, Some(source));
        let moved = self.node(source)?;
        (moved.parent, moved.ctime) = (new, time);
        if let Some(target) = target {
            if op.exchange {
                let moved = self.node(target)?;
                (moved.parent, moved.ctime) = (old, time);
            } else {
                self.lose_name(target);
                if let Some(reply) = reply {
                    assert_eq!(reply.orphaned, self.nodes[&target].orphan);
                }
            }
        }
        Ok(())
    }

    fn remove_tree(&mut self, op: &v1::RemoveTree, reply: &Reply) -> Verdict {
        let time = self.time;
        let ino = self.entry(op.parent, &op.name)?.ok_or(FsError::NotFound)?;
        self.point(op.parent, &op.name, None);
        let node = self.node(ino)?;
        if node.entries.is_empty() {
            self.lose_name(ino);
            assert!(reply.done);
        } else {
            (node.nlink, node.ctime) = (0, time);
            assert!(!reply.done);
            let new = self.intents.insert(reply.value, BTreeSet::from([ino]));
            assert!(new.is_none(), "intents are fresh");
        }
        Ok(())
    }

    fn remove_tree_step(&mut self, op: &v1::RemoveTreeStep, reply: &Reply) -> Verdict {
        let Some(mut pending) = self.intents.remove(&op.intent) else {
            assert!(reply.done);
            return Ok(());
        };
        let time = self.time;
        // Scripts make no directory with more entries than one step removes.
        let ino = pending.pop_first().expect("an intent that is not done");
        let dir = self.node(ino)?;
        let entries = std::mem::take(&mut dir.entries);
        (dir.orphan, dir.mtime, dir.ctime) = (true, time, time);
        for child in entries.into_values() {
            let node = self.node(child)?;
            if node.entries.is_empty() {
                self.lose_name(child);
            } else {
                (node.nlink, node.ctime) = (0, time);
                pending.insert(child);
            }
        }
        assert_eq!(reply.done, pending.is_empty());
        if !pending.is_empty() {
            self.intents.insert(op.intent, pending);
        }
        Ok(())
    }

    // ---- attributes

    fn set_attr(&mut self, op: &v1::SetAttr) -> Verdict {
        let time = self.time;
        let node = self.node(op.ino)?;
        if let Some(size) = op.size {
            match node.kind {
                FileKind::File if size > FILE_BYTES_MAX => return Err(FsError::FileTooLarge),
                FileKind::File => {}
                FileKind::Directory => return Err(FsError::IsDirectory),
                _ => return Err(FsError::Invalid),
            }
            if size != node.size() {
                Rc::make_mut(&mut node.content).resize(size as usize, Byte::Hole);
            }
            node.drop_capability();
            node.mtime = time;
        }
        if let Some(mode) = op.mode {
            if node.kind == FileKind::Symlink {
                return Err(FsError::NotSupported);
            }
            node.mode = mode;
        }
        if let Some(uid) = op.uid {
            node.uid = uid;
            if !node.is_directory() {
                node.kill_suidgid();
                node.drop_capability();
            }
        }
        if op.kill_suidgid {
            node.kill_suidgid();
        }
        if let Some(v1::set_time::To::Nanos(nanos)) = op.mtime.and_then(|time| time.to) {
            node.mtime = nanos;
        }
        node.ctime = time;
        Ok(())
    }

    fn xattr_name(node: &Node, name: &[u8]) -> Verdict {
        match (name.starts_with(b"user."), node.kind) {
            (true, FileKind::File | FileKind::Directory) => Ok(()),
            (true, _) => Err(FsError::NotPermitted),
            (false, _) if name == CAPABILITY => Ok(()),
            (false, _) => Err(FsError::NotSupported),
        }
    }

    fn set_xattr(&mut self, op: &v1::SetXattr) -> Verdict {
        let time = self.time;
        let node = self.node(op.ino)?;
        Self::xattr_name(node, &op.name)?;
        match node.xattrs.contains_key(&op.name) {
            true if op.create_only => return Err(FsError::Exists),
            false if op.replace_only => return Err(FsError::NoAttribute),
            _ => {}
        }
        node.xattrs.insert(op.name.clone(), op.value.clone());
        node.ctime = time;
        Ok(())
    }

    fn remove_xattr(&mut self, op: &v1::RemoveXattr) -> Verdict {
        let time = self.time;
        let node = self.node(op.ino)?;
        Self::xattr_name(node, &op.name)?;
        let removed = node.xattrs.remove(&op.name);
        removed.ok_or(FsError::NoAttribute)?;
        node.ctime = time;
        Ok(())
    }

    fn reap(&mut self, op: &v1::Reap, reply: &Reply) -> Verdict {
        match self.nodes.get(&op.ino) {
            None => assert!(reply.done),
            Some(node) if !node.orphan => return Err(FsError::Invalid),
            Some(_) if reply.done => {
                self.nodes.remove(&op.ino);
            }
            Some(_) => {}
        }
        Ok(())
    }
}

//! The changes that are answered ahead, and what they do: as `meta-core` does it, where nobody else can interfere. Whatever is
//! rare goes the usual way.

use super::{
    Bytes, Caller, Directory, Entry, Errno, FileKind, Instant, NewNode, Node, Op, Plan, QUEUE_MAX,
    Queued, State, v1,
};
use crate::fs::attr::{AttrChange, SetTime};
use heliofs_proto::error::FsError;
use heliofs_proto::limits::SYMLINK_BYTES_MAX;

const SETGID: u32 = 0o2000;

impl State {
    /// Whether a change of names in this directory may be answered; `Err`: what to do instead.
    fn may_change(&mut self, directory: u64) -> Result<(), Plan<Result<v1::Attr, Errno>>> {
        if let Some(errno) = self.failure_once(directory) {
            return Err(Plan::Answered(Err(errno)));
        }
        if !self.is_leased(directory) {
            return Err(Plan::Usual);
        }
        if self.frozen > 0 || self.queue.len() >= QUEUE_MAX {
            return Err(Plan::Wait);
        }
        Ok(())
    }

    /// The time of a change that is answered now: not before any time that a program here has seen.
    fn stamp(&mut self, now: i64, others: &[u64]) -> i64 {
        let mut time = now.max(self.time);
        for ino in others {
            if let Some(attr) = self.attr_mut(*ino) {
                time = time.max(attr.ctime);
            }
        }
        self.time = time;
        time
    }

    /// `inos`: what it is about beside the directories that it names; first what the name stands for, of a rename then what is
    /// replaced.
    fn push(&mut self, caller: Caller, time: i64, op: Op, inos: Vec<u64>) {
        self.answered += 1;
        // If it comes late, it must not hit what others have put there.
        let (ino, replaces) = match &op {
            Op::Unlink(_) => (inos[0], None),
            Op::Rename(_) => (inos[0], Some(inos.get(1).copied().unwrap_or(0))),
            Op::Create(_) | Op::Link(_) | Op::SetAttr(_) => (0, None),
        };
        let queued = Queued {
            number: self.answered,
            change: v1::Change {
                caller: Some(caller.into()),
                time,
                op: Some(op),
                ino,
                replaces,
            },
            inos,
        };
        for ino in queued.all_inos() {
            self.pending.insert(ino, queued.number);
        }
        self.since.get_or_insert_with(Instant::now);
        self.queue.push_back(queued);
    }

    /// Names in `directory` change at `time`: their lengths by `length`, its subdirectories by `subdirectories`.
    fn change_directory(&mut self, directory: u64, time: i64, length: i64, subdirectories: i32) {
        if let Some(attr) = self.attr_mut(directory) {
            attr.size = attr.size.saturating_add_signed(length);
            attr.nlink = attr.nlink.saturating_add_signed(subdirectories);
            (attr.mtime, attr.ctime) = (time, time);
        }
        self.use_directory(directory);
    }

    fn insert(&mut self, parent: u64, name: &Bytes, entry: Entry) {
        if let Some(directory) = self.directories.get_mut(&parent)
            && directory.names.insert(name.clone(), entry).is_none()
        {
            self.names += 1;
        }
    }

    fn entry(&self, parent: u64, name: &[u8]) -> Option<Entry> {
        self.directories.get(&parent)?.names.get(name).copied()
    }

    fn take_entry(&mut self, parent: u64, name: &[u8]) {
        if let Some(directory) = self.directories.get_mut(&parent)
            && directory.names.remove(name).is_some()
        {
            self.names -= 1;
        }
    }

    /// Makes an inode of a new name.
    pub fn create(
        &mut self,
        (parent, name): (u64, &Bytes),
        node: &NewNode,
        exclusive: bool,
        (caller, now): (Caller, i64),
    ) -> Plan<Result<v1::Attr, Errno>> {
        if let Err(plan) = self.may_change(parent) {
            return plan;
        }
        if self.entry(parent, name).is_some() {
            return match exclusive || node.kind != FileKind::File {
                true => Plan::Answered(Err(Errno::EXIST)),
                false => Plan::Usual,
            };
        }
        let target = node.target.len();
        if node.kind == FileKind::Symlink && !(1..=SYMLINK_BYTES_MAX).contains(&target) {
            return Plan::Usual;
        }
        let Some(dir) = self.attr_mut(parent).copied() else {
            return Plan::Usual;
        };
        let Some(ino) = self.next_ino() else {
            return Plan::Wait;
        };
        let time = self.stamp(now, &[parent]);
        let is_directory = node.kind == FileKind::Directory;
        let mut attr = v1::Attr {
            ino,
            kind: node.kind as i32,
            mode: node.mode & 0o7777,
            nlink: if is_directory { 2 } else { 1 },
            uid: caller.uid,
            gid: caller.gid,
            size: 0,
            allocated: 0,
            atime: time,
            mtime: time,
            ctime: time,
            btime: time,
            rdev: 0,
            data_seq: 0,
            parent,
            flags: 0,
        };
        if dir.mode & SETGID != 0 {
            attr.gid = dir.gid;
        }
        match node.kind {
            FileKind::Directory => attr.mode |= dir.mode & SETGID,
            FileKind::CharDevice | FileKind::BlockDevice => attr.rdev = node.rdev,
            _ => {}
        }
        match node.kind {
            FileKind::Symlink => (attr.mode, attr.size) = (0o777, target as u64),
            _ => attr.mode &= !(node.umask & 0o777),
        }
        let op = Op::Create(v1::Create {
            parent,
            name: name.clone(),
            kind: node.kind as i32,
            mode: node.mode,
            umask: node.umask,
            rdev: node.rdev,
            symlink_target: node.target.clone(),
            exclusive: true,
            ino,
        });
        self.push(caller, time, op, vec![ino]);
        let entry = Entry {
            ino,
            kind: node.kind,
        };
        self.insert(parent, name, entry);
        let subdirectories = i32::from(is_directory);
        self.change_directory(parent, time, name.len() as i64, subdirectories);
        let made = Node {
            attr: Some(attr),
            parent,
        };
        self.nodes.insert(ino, made);
        if is_directory {
            self.directories.insert(ino, Directory::default());
            self.use_directory(ino);
        }
        Plan::Answered(Ok(attr))
    }

    pub(super) fn next_ino(&mut self) -> Option<u64> {
        loop {
            match self.inos.front_mut()?.next() {
                Some(ino) => return Some(ino),
                None => drop(self.inos.pop_front()),
            }
        }
    }

    /// unlink and rmdir. Answers with what the directory was before.
    pub fn unlink(
        &mut self,
        (parent, name): (u64, &Bytes),
        directory: bool,
        (caller, now): (Caller, i64),
    ) -> Plan<Result<v1::Attr, Errno>> {
        if let Err(plan) = self.may_change(parent) {
            return plan;
        }
        let Some(dir) = self.attr_mut(parent).copied() else {
            return Plan::Usual;
        };
        let Some(entry) = self.entry(parent, name) else {
            return Plan::Answered(Err(Errno::NOENT));
        };
        match (directory, entry.kind == FileKind::Directory) {
            (true, true) => match self.directories.get(&entry.ino) {
                // Whether it is empty is not known.
                None => return Plan::Usual,
                Some(inner) if !inner.names.is_empty() => {
                    return Plan::Answered(Err(FsError::NotEmpty.into()));
                }
                Some(_) => {}
            },
            (false, false) => {}
            (true, false) => return Plan::Answered(Err(FsError::NotDirectory.into())),
            (false, true) => return Plan::Answered(Err(FsError::IsDirectory.into())),
        }
        let time = self.stamp(now, &[parent, entry.ino]);
        let op = Op::Unlink(v1::Unlink {
            parent,
            name: name.clone(),
            directory,
        });
        self.push(caller, time, op, vec![entry.ino]);
        self.take_entry(parent, name);
        self.change_directory(parent, time, -(name.len() as i64), -i32::from(directory));
        self.directories.remove(&entry.ino);
        self.nodes.remove(&entry.ino);
        Plan::Answered(Ok(dir))
    }

    /// rename, without exchange, of one leased directory's name into another's. Answers with the attributes of what was moved,
    /// or, when they are not known here, of the directory that it was moved from.
    pub fn rename(
        &mut self,
        (parent, name): (u64, &Bytes),
        (new_parent, new_name): (u64, &Bytes),
        no_replace: bool,
        (caller, now): (Caller, i64),
    ) -> Plan<Result<v1::Attr, Errno>> {
        for directory in [parent, new_parent] {
            if let Err(plan) = self.may_change(directory) {
                return plan;
            }
        }
        let Some(dir) = self.attr_mut(parent).copied() else {
            return Plan::Usual;
        };
        let Some(moved) = self.entry(parent, name) else {
            return Plan::Answered(Err(Errno::NOENT));
        };
        let target = self.entry(new_parent, new_name);
        let is_directory = moved.kind == FileKind::Directory;
        match target {
            Some(_) if no_replace => return Plan::Answered(Err(Errno::EXIST)),
            Some(target) if target.ino == moved.ino => return Plan::Usual,
            Some(target) if is_directory || target.kind == FileKind::Directory => {
                return Plan::Usual;
            }
            // Whether it would lie below itself is not known here.
            _ if is_directory && parent != new_parent => return Plan::Usual,
            _ => {}
        }
        let mut inos = vec![moved.ino];
        inos.extend(target.map(|target| target.ino));
        let mut seen = inos.clone();
        seen.extend([parent, new_parent]);
        let time = self.stamp(now, &seen);
        let op = Op::Rename(v1::Rename {
            parent,
            name: name.clone(),
            new_parent,
            new_name: new_name.clone(),
            no_replace,
            exchange: false,
        });
        self.push(caller, time, op, inos);
        self.take_entry(parent, name);
        self.insert(new_parent, new_name, moved);
        let added = match target {
            Some(_) => 0,
            None => new_name.len() as i64,
        };
        self.change_directory(parent, time, -(name.len() as i64), 0);
        self.change_directory(new_parent, time, added, 0);
        if let Some(target) = target {
            self.nodes.remove(&target.ino);
        }
        let node = self.nodes.get_mut(&moved.ino);
        let shown = node.and_then(|node| {
            node.parent = new_parent;
            let attr = node.attr.as_mut()?;
            attr.ctime = time;
            attr.parent = new_parent;
            Some(*attr)
        });
        Plan::Answered(Ok(shown.unwrap_or(dir)))
    }

    /// Changes of mode, owner and times of what is known here.
    pub fn set_attr(
        &mut self,
        ino: u64,
        change: &AttrChange,
        (caller, now): (Caller, i64),
    ) -> Plan<Result<v1::Attr, Errno>> {
        let Some(Node {
            attr: Some(attr), ..
        }) = self.nodes.get(&ino)
        else {
            return Plan::Usual;
        };
        let mut attr = *attr;
        let symlink = attr.kind() == FileKind::Symlink;
        if change.size.is_some() || change.mode.is_some() && symlink {
            return Plan::Usual;
        }
        if self.frozen > 0 || self.queue.len() >= QUEUE_MAX {
            return Plan::Wait;
        }
        let time = self.stamp(now, &[ino]);
        let is_directory = attr.kind() == FileKind::Directory;
        let kill_suidgid = |mode: u32| match (is_directory, mode & 0o010 != 0) {
            (true, _) => mode,
            (false, true) => mode & !0o6000,
            (false, false) => mode & !0o4000,
        };
        if let Some(mode) = change.mode {
            attr.mode = mode & 0o7777;
        }
        if change.uid.is_some() || change.gid.is_some() {
            attr.uid = change.uid.unwrap_or(attr.uid);
            attr.gid = change.gid.unwrap_or(attr.gid);
            attr.mode = kill_suidgid(attr.mode);
        }
        if change.kill_suidgid {
            attr.mode = kill_suidgid(attr.mode);
        }
        let at = |to: SetTime| match to {
            SetTime::Now => time,
            SetTime::At(nanos) => nanos,
        };
        attr.atime = change.atime.map_or(attr.atime, at);
        attr.mtime = change.mtime.map_or(attr.mtime, at);
        attr.ctime = time;
        let op = Op::SetAttr(change.to_wire(ino));
        self.push(caller, time, op, vec![ino]);
        if let Some(known) = self.attr_mut(ino) {
            *known = attr;
        }
        Plan::Answered(Ok(attr))
    }
}

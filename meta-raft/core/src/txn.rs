//! One command's reads and writes: typed records over an overlay, and what they imply.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Epoch, Ino, Position, SegmentId, SessionId, UnixNanos, VolumeId};
use heliofs_proto::v1;

use crate::change::{Change, Corruption, Touched};
use crate::keys;
use crate::ops::charge::Charges;
use crate::records::{CountersRecord, InodeRecord, NameRecord, Record, SettingsRecord};
use crate::view::{Overlay, View};

/// Why an op did not succeed.
#[derive(Debug)]
pub(crate) enum OpError {
    /// A verdict for the caller; nothing changes.
    Refused(FsError),
    /// The node must stop.
    Corrupt(Corruption),
}

impl From<Corruption> for OpError {
    fn from(corruption: Corruption) -> Self {
        Self::Corrupt(corruption)
    }
}

impl From<FsError> for OpError {
    fn from(error: FsError) -> Self {
        Self::Refused(error)
    }
}

/// What an op returns.
pub(crate) type OpResult<T = v1::Reply> = Result<T, OpError>;

/// One command in the making. Changes are dropped unless the op succeeds.
pub(crate) struct Txn<V> {
    overlay: Overlay<V>,
    pub(crate) volume: VolumeId,
    /// The position that this command takes.
    pub(crate) position: Position,
    /// The command's effective time.
    pub(crate) time: UnixNanos,
    pub(crate) session: SessionId,
    pub(crate) caller: v1::Caller,
    freed: Vec<SegmentId>,
    touched: Vec<Touched>,
    counters: Option<CountersRecord>,
    /// What quotas are to be charged in the end.
    pub(crate) charges: Charges,
}

/// What a command left behind.
pub(crate) struct Effects {
    pub(crate) changes: Vec<Change>,
    pub(crate) freed: Vec<SegmentId>,
    pub(crate) touched: Vec<Touched>,
}

impl<V: View> Txn<V> {
    pub(crate) fn new(view: V, command: &v1::Command, position: Position, time: UnixNanos) -> Self {
        Self {
            overlay: Overlay::new(view),
            volume: VolumeId(command.volume),
            position,
            time,
            session: SessionId(command.session),
            caller: command.caller.unwrap_or_default(),
            freed: Vec::new(),
            touched: Vec::new(),
            counters: None,
            charges: Charges::default(),
        }
    }

    /// Ends the command: writes what was kept back and merges what was touched more than once.
    pub(crate) fn finish(mut self) -> Result<Effects, Corruption> {
        if let Some(counters) = self.counters.take() {
            self.overlay
                .set(keys::counters(self.volume), Some(counters.encode()))?;
        }
        let mut touched = self.touched;
        touched.sort_unstable();
        touched.dedup_by(|next, first| match (&*next, &mut *first) {
            (
                Touched::Inode {
                    ino,
                    attr,
                    content,
                    xattr,
                },
                Touched::Inode {
                    ino: i,
                    attr: a,
                    content: c,
                    xattr: x,
                },
            ) if ino == i => {
                *a |= attr;
                *c |= content;
                *x |= xattr;
                true
            }
            (next, first) => next == first,
        });
        Ok(Effects {
            changes: self.overlay.into_changes(),
            freed: self.freed,
            touched,
        })
    }

    // ---- records

    pub(crate) fn get<R: Record>(&self, key: &[u8]) -> Result<Option<R>, Corruption> {
        self.overlay
            .get(key)?
            .map(|value| R::decode(key, &value))
            .transpose()
    }

    pub(crate) fn exists(&self, key: &[u8]) -> Result<bool, Corruption> {
        Ok(self.overlay.get(key)?.is_some())
    }

    pub(crate) fn put(&mut self, key: Bytes, record: &impl Record) -> Result<(), Corruption> {
        self.overlay.set(key, Some(record.encode()))
    }

    /// For keys that hold a fresh id: the read of what was there before is saved.
    pub(crate) fn put_fresh(&mut self, key: Bytes, record: &impl Record) {
        self.overlay.insert_fresh(key, record.encode());
    }

    pub(crate) fn get_bytes(&self, key: &[u8]) -> Result<Option<Bytes>, Corruption> {
        self.overlay.get(key)
    }

    pub(crate) fn put_bytes(&mut self, key: Bytes, value: Bytes) -> Result<(), Corruption> {
        self.overlay.set(key, Some(value))
    }

    pub(crate) fn remove(&mut self, key: Bytes) -> Result<(), Corruption> {
        self.overlay.set(key, None)
    }

    pub(crate) fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        records_max: usize,
    ) -> Result<Vec<(Bytes, Bytes)>, Corruption> {
        self.overlay.scan(from, to, records_max)
    }

    /// Records that this command has set so far.
    pub(crate) fn changed(&self) -> usize {
        self.overlay.changed()
    }

    /// This command's view, for code that reads through [`View`] (queries).
    #[allow(
        dead_code,
        reason = "queries are shared with ops where they are the same"
    )]
    pub(crate) fn view(&self) -> &impl View {
        &self.overlay
    }

    // ---- inodes and entries

    /// The inode, or `STALE`: the caller holds an inode number, so it existed.
    pub(crate) fn inode(&self, ino: Ino) -> OpResult<InodeRecord> {
        self.get(&keys::inode(self.volume, ino))?
            .ok_or(OpError::Refused(FsError::Stale))
    }

    /// The inode of a directory: `STALE` if it is gone, `NOT_DIRECTORY` if it is none.
    pub(crate) fn directory(&self, ino: Ino) -> OpResult<InodeRecord> {
        let inode = self.inode(ino)?;
        if inode.is_directory() {
            Ok(inode)
        } else {
            Err(FsError::NotDirectory.into())
        }
    }

    /// The inode that an entry names: its absence is a contradiction.
    pub(crate) fn named_inode(&self, ino: Ino) -> OpResult<InodeRecord> {
        self.get(&keys::inode(self.volume, ino))?.ok_or_else(|| {
            let what = format!(
                "volume {}: an entry names inode {ino}, which does not exist",
                self.volume
            );
            OpError::Corrupt(Corruption::Contradiction(what))
        })
    }

    /// Writes an inode; its attributes count as touched.
    pub(crate) fn put_inode(&mut self, ino: Ino, inode: &InodeRecord) -> Result<(), Corruption> {
        self.touch(ino, true, false, false);
        self.put(keys::inode(self.volume, ino), inode)
    }

    pub(crate) fn entry(&self, parent: Ino, name: &[u8]) -> Result<Option<NameRecord>, Corruption> {
        self.get(&keys::name(self.volume, parent, name))
    }

    pub(crate) fn touch(&mut self, ino: Ino, attr: bool, content: bool, xattr: bool) {
        self.touched.push(Touched::Inode {
            ino,
            attr,
            content,
            xattr,
        });
    }

    pub(crate) fn touch_entry(&mut self, parent: Ino, name: Bytes) {
        self.touched.push(Touched::Entry { parent, name });
    }

    /// Refuses (`READ_ONLY`) to change what belongs to a snapshot, unless the caller makes or removes snapshots, or is the system.
    pub(crate) fn changeable(&self, inode: &InodeRecord) -> Result<(), FsError> {
        let may = self.caller.snapshot || self.session == SessionId::SYSTEM;
        match inode.is_snapshot() && !may {
            true => Err(FsError::ReadOnly),
            false => Ok(()),
        }
    }

    // ---- volume

    pub(crate) fn epoch(&self) -> Epoch {
        self.position.epoch
    }

    pub(crate) fn settings(&self) -> OpResult<v1::VolumeSettings> {
        let settings: Option<SettingsRecord> = self.get(&keys::settings(self.volume))?;
        let missing = || {
            Corruption::Contradiction(format!("volume {} has a head and no settings", self.volume))
        };
        Ok(settings.ok_or_else(missing)?.0)
    }

    /// The counters, to be read and changed in place; written at the end.
    pub(crate) fn counters(&mut self) -> Result<&mut CountersRecord, Corruption> {
        if self.counters.is_none() {
            self.counters = Some(self.get(&keys::counters(self.volume))?.unwrap_or_default());
        }
        Ok(self.counters.as_mut().expect("just set"))
    }

    /// Reports a segment without references; its record must be removed too.
    pub(crate) fn free_segment(&mut self, segment: SegmentId) {
        self.freed.push(segment);
    }
}

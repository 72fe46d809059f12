//! Attributes: getattr and setattr.

use std::sync::Arc;

use heliofs_proto::ids::Ino;
use heliofs_proto::v1;
use heliofs_proto::v1::command::Op;

use super::{Caller, Entry, Fs};
use crate::ahead::Plan;
use crate::errno::{Errno, FsResult};
use crate::inode::Inode;

/// A time to set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetTime {
    /// The server's time when it makes the change.
    Now,
    /// Nanoseconds since 1970.
    At(i64),
}

impl SetTime {
    fn to_wire(self) -> v1::SetTime {
        v1::SetTime {
            to: Some(match self {
                Self::Now => v1::set_time::To::Now(true),
                Self::At(nanos) => v1::set_time::To::Nanos(nanos),
            }),
        }
    }
}

/// What setattr changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AttrChange {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Truncates or extends.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
    /// Clear setuid and setgid, since the caller is not privileged.
    pub kill_suidgid: bool,
}

impl AttrChange {
    /// As it is proposed.
    pub(crate) fn to_wire(self, ino: u64) -> v1::SetAttr {
        v1::SetAttr {
            ino,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            size: self.size,
            atime: self.atime.map(SetTime::to_wire),
            mtime: self.mtime.map(SetTime::to_wire),
            kill_suidgid: self.kill_suidgid,
        }
    }
}

impl Fs {
    /// Attributes of an inode, with uncommitted data shown.
    pub async fn get_attr(&self, ino: u64) -> FsResult<Entry> {
        let generation = self.coherence.cache.generation();
        let known = self
            .ahead(|ahead| match ahead.attr(ino) {
                Plan::Answered(attr) => Plan::Answered((attr, ahead.at())),
                Plan::Wait => Plan::Wait,
                Plan::Usual => Plan::Usual,
            })
            .await?;
        if let Some((attr, at)) = known {
            return Ok(Entry {
                attr: self.show(attr),
                at,
                generation,
            });
        }
        self.settled(&[ino]).await?;
        if self.trusted()
            && let Some((attr, at)) = self.coherence.cache.attr(ino)
        {
            self.metrics.cache_hits.inc();
            return Ok(Entry {
                attr: self.show(attr),
                at,
                generation,
            });
        }
        self.metrics.cache_misses.inc();
        let (attr, at) = self
            .ask(|session| async move { session.get_attr(Ino(ino)).await })
            .await?;
        self.saw(generation, &attr, at);
        Ok(Entry {
            attr: self.show(attr),
            at,
            generation,
        })
    }

    /// Changes attributes.
    pub async fn set_attr(
        self: &Arc<Self>,
        ino: u64,
        change: AttrChange,
        caller: Caller,
    ) -> FsResult<Entry> {
        self.writable()?;
        let generation = self.coherence.cache.generation();
        let inode = self.coherence.inodes.get(ino);
        if change.size.is_none() && (change.mtime.is_none() || inode.is_none()) {
            let changed = self
                .ahead(|ahead| {
                    let changed = ahead.set_attr(ino, &change, (caller, self.clock.now()));
                    match changed {
                        Plan::Answered(changed) => Plan::Answered((changed, ahead.at())),
                        Plan::Wait => Plan::Wait,
                        Plan::Usual => Plan::Usual,
                    }
                })
                .await?;
            if let Some((changed, at)) = changed {
                return Ok(Entry {
                    attr: self.show(changed?),
                    at,
                    generation,
                });
            }
        }
        let Some(inode) = inode else {
            return self.propose_attr(ino, &change, caller).await?.entry(self);
        };
        if change.size.is_none() && change.mtime.is_none() {
            return self.propose_attr(ino, &change, caller).await?.entry(self);
        }
        // A commit under way would bring back a time or a length that this replaces.
        let changing = inode.changing.lock().await;
        // Nothing is staged while it is cut: the record would be of what was before.
        let _staging = match change.size {
            Some(_) => Some(inode.staging.lock().await),
            None => None,
        };
        if let Some(lost) = inode.lock().lost {
            return Err(lost);
        }
        let (is_dirty, is_staged) = {
            let state = inode.lock();
            (!state.pieces.is_empty(), !state.records.is_empty())
        };
        if is_staged && change.size.is_some() {
            // A crash must not bring back what is cut off.
            self.flush_locked(&inode).await?;
        }
        if let (true, Some(SetTime::At(time))) = (is_dirty, change.mtime)
            && time > self.clock.now()
        {
            // The server limits a commit's time to its own: a time in the future must be set after the data is there.
            self.flush_locked(&inode).await?;
        }
        let changed = self.propose_attr(ino, &change, caller).await?;
        let attr = changed.reply.attr.ok_or(Errno::IO)?;
        {
            let mut state = inode.lock();
            if let Some(size) = change.size {
                state.pieces.cut(size..u64::MAX);
                state.drop_empty_batches();
                let before = state.moved(&attr, changed.at, |content| {
                    content.extents.truncate(content.size.min(size));
                });
                if let Some(before) = before {
                    self.coherence.cache.pages_moved(ino, before, attr.data_seq);
                }
            }
            state.mtime = (!state.pieces.is_empty()).then_some(attr.mtime);
        }
        drop(changing);
        self.settle(&inode);
        changed.entry(self)
    }

    async fn propose_attr(
        &self,
        ino: u64,
        change: &AttrChange,
        caller: Caller,
    ) -> FsResult<super::Changed> {
        self.mutate(caller, Op::SetAttr(change.to_wire(ino))).await
    }

    /// Clears what a write by `caller` must clear, before the write is answered, so that the next stat shows it.
    pub(super) async fn drop_privileges(
        &self,
        inode: &Inode,
        kill_suidgid: bool,
        caller: Caller,
    ) -> FsResult<()> {
        let attr = self.get_attr(inode.ino).await?.attr;
        // Setgid without group execution marks mandatory locking, not a privilege. Source: setattr_should_drop_suidgid.
        let suidgid = attr.mode & 0o4000 != 0 || attr.mode & 0o2010 == 0o2010;
        if kill_suidgid && suidgid {
            let change = AttrChange {
                kill_suidgid: true,
                ..AttrChange::default()
            };
            self.propose_attr(inode.ino, &change, caller).await?;
            self.coherence.tell_attr(inode.ino);
        }
        if attr.flags & v1::AttrFlag::Capability as u32 != 0 {
            match self
                .remove_xattr(inode.ino, b"security.capability", caller)
                .await
            {
                Ok(()) | Err(Errno::NODATA) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

//! Open files: open, create, release.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockstore::{ReadAhead, ReadAheadOptions};
use heliofs_proto::ids::Ino;
use heliofs_proto::v1;
use heliofs_proto::v1::FileKind;
use parking_lot::Mutex;

use super::attr::{AttrChange, SetTime};
use super::namespace::NewNode;
use super::{Caller, Entry, Fs};
use crate::errno::{Errno, FsResult};
use crate::inode::{Content, Inode};
use crate::options::AtimePolicy;
use crate::read::extents::ExtentMap;

/// Extents that come with an open: enough for a file of 256 MiB that was written in one go.
const OPEN_EXTENTS: u32 = 64;

/// Relative access times are updated when they are older than this, nanoseconds. Source: relatime in mount(8).
const RELATIME_NANOS: i64 = 24 * 3600 * 1_000_000_000;

/// An open file.
#[derive(Debug)]
pub struct FileHandle {
    /// What is open.
    pub inode: Arc<Inode>,
    /// The read-ahead window of this handle.
    pub read_ahead: Mutex<ReadAhead>,
    /// The access time was looked at.
    atime_done: AtomicBool,
}

/// An answer to open or create.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    /// The handle's number.
    pub handle: u64,
    /// The kernel's pages are still good.
    pub keep_pages: bool,
}

/// How a file is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenHow {
    /// O_TRUNC
    pub truncate: bool,
    /// Truncation clears setuid and setgid, since the caller is not privileged.
    pub kill_suidgid: bool,
    /// O_WRONLY or O_RDWR
    pub write: bool,
}

impl Fs {
    fn new_handle(&self, inode: Arc<Inode>) -> u64 {
        let max = self.options.read_ahead_bytes_max;
        let options = ReadAheadOptions {
            bytes_min: ReadAheadOptions::default().bytes_min.min(max),
            bytes_max: max,
        };
        self.files.insert(Arc::new(FileHandle {
            inode,
            read_ahead: Mutex::new(ReadAhead::new(options)),
            atime_done: AtomicBool::new(self.options.atime == AtimePolicy::Off),
        }))
    }

    /// The open file of a handle's number.
    pub fn file(&self, handle: u64) -> FsResult<Arc<FileHandle>> {
        self.files.get(handle)
    }

    /// Opens a file. Always asks the server, so that the last close or fsync anywhere is seen.
    pub async fn open(
        self: &Arc<Self>,
        ino: u64,
        how: OpenHow,
        caller: Caller,
    ) -> FsResult<Opened> {
        if how.truncate || how.write {
            self.writable()?;
        }
        loop {
            let session = self.session();
            let adoption = self.adoption.read().await;
            let inode = self.coherence.inodes.acquire(ino);
            match self.open_at_server(&inode, how, caller).await {
                Ok(keep_pages) => {
                    return Ok(Opened {
                        handle: self.new_handle(inode),
                        keep_pages,
                    });
                }
                Err(error) => {
                    self.coherence.inodes.abandon(&inode);
                    drop(adoption);
                    // Of a change nobody knows whether it took effect.
                    if how.truncate || !self.renewed(&session).await {
                        return Err(error);
                    }
                }
            }
        }
    }

    async fn open_at_server(
        self: &Arc<Self>,
        inode: &Arc<Inode>,
        how: OpenHow,
        caller: Caller,
    ) -> FsResult<bool> {
        let ino = inode.ino;
        let (failed, lost) = {
            let state = inode.lock();
            (state.failure.is_some(), state.lost)
        };
        if let Some(lost) = lost.filter(|_| !how.truncate) {
            return Err(lost);
        }
        if failed && !how.truncate {
            // Whoever opens the file must not believe in data that could not be stored.
            self.flush(inode).await?;
        }
        self.settled(&[ino]).await?;
        let cache = &self.coherence.cache;
        let generation = cache.generation();
        let session = self.session();
        let (opened, at) = session.open(Ino(ino), OPEN_EXTENTS, how.write).await?;
        let opened = Paid {
            fs: self,
            ino,
            answer: opened,
            kept: false,
        };
        let attr = opened.answer.attr.ok_or(Errno::IO)?;
        self.saw(generation, &attr, at);
        if how.write && attr.flags & v1::AttrFlag::Snapshot as u32 != 0 {
            return Err(Errno::ROFS);
        }
        if let Some(room) = opened.answer.quota_room {
            inode.lock().quota_room = room;
        }
        if let Some(page) = &opened.answer.extents {
            self.store.note_elsewhere(&page.elsewhere);
            let mut state = inode.lock();
            state.learn(&attr, at, 0..page.complete_to, &page.extents);
        }
        let mut data_seq = attr.data_seq;
        if how.truncate {
            let change = AttrChange {
                size: Some(0),
                mtime: Some(SetTime::Now),
                kill_suidgid: how.kill_suidgid,
                ..AttrChange::default()
            };
            // What was lost is not wanted any more.
            let lost = inode.lock().lost.take();
            match self.set_attr(ino, change, caller).await {
                Ok(entry) => data_seq = entry.attr.data_seq,
                Err(error) => {
                    inode.lock().lost = lost;
                    return Err(error);
                }
            }
        }
        opened.keep();
        Ok(cache.keep_pages(ino, data_seq))
    }

    /// Creates a file, or opens the one that came into being meanwhile unless `exclusive`.
    pub async fn create(
        self: &Arc<Self>,
        parent: u64,
        name: &[u8],
        (mode, umask): (u32, u32),
        exclusive: bool,
        how: OpenHow,
        caller: Caller,
    ) -> FsResult<(Entry, Opened)> {
        let node = NewNode {
            kind: FileKind::File,
            mode,
            umask,
            rdev: 0,
            target: bytes::Bytes::new(),
        };
        let adoption = self.adoption.read().await;
        let made = self.make(parent, name, node, exclusive, true, caller).await;
        let (entry, created, quota_room) = match made {
            // Something else than a file: it must be looked up and treated by its own rules.
            Err(Errno::EXIST) if !exclusive => return Err(Errno::STALE),
            made => made?,
        };
        let ino = entry.attr.ino;
        if !created {
            // The kernel believed that there was no such name and has checked no permissions for it. Only root passes without
            // a check; for others it looks the name up again and opens by the usual way.
            drop(adoption);
            let opened = if caller.uid == 0 {
                self.open(ino, how, caller).await
            } else {
                Err(Errno::STALE)
            };
            // `open` counted an open of its own.
            self.session().release(Ino(ino));
            return Ok((self.get_attr(ino).await?, opened?));
        }
        let inode = self.coherence.inodes.acquire(ino);
        {
            let mut state = inode.lock();
            state.saw(&entry.attr, entry.at, false);
            state.quota_room = quota_room.unwrap_or(u64::MAX);
            if state.content.is_none() && entry.at >= state.content_floor {
                let mut extents = ExtentMap::default();
                extents.truncate(0);
                state.content = Some(Content {
                    size: 0,
                    data_seq: entry.attr.data_seq,
                    extents,
                });
            }
        }
        self.coherence.cache.keep_pages(ino, entry.attr.data_seq);
        let opened = Opened {
            handle: self.new_handle(inode),
            // A new inode has no pages.
            keep_pages: true,
        };
        Ok((entry, opened))
    }

    /// close(2) of one of the file's descriptors. Returns at once under the file's write lease: the data is stored within the
    /// flush age, or when another mount asks for the file. Without the lease, once it is stored and committed.
    pub async fn close(self: &Arc<Self>, file: &FileHandle) -> FsResult<()> {
        if self.may_defer(&file.inode) {
            return Ok(());
        }
        self.sync(file).await
    }

    /// Whether the file's data may be kept back after close: nobody else can look at it without asking us, storing it has not
    /// failed, and neither the volume nor a quota is about to be full.
    fn may_defer(&self, inode: &Inode) -> bool {
        let (fails, quota_room) = {
            let state = inode.lock();
            let fails = state.failure.is_some() || state.lost.is_some();
            (fails, state.quota_room)
        };
        !fails
            && self.options.defer_close
            && self.has_ample_room(quota_room)
            && (self.session.load().holds_write_lease(Ino(inode.ino)) || self.is_unseen(inode.ino))
    }

    /// Whether nobody else can see the file without asking for the directory that it was made in.
    fn is_unseen(&self, ino: u64) -> bool {
        self.trusted() && self.coherence.ahead.lock().is_pending(ino)
    }

    /// Whether all that this mount holds back would fit twice into the volume, and into the file's tightest quota. Near a limit
    /// closes wait, so that they can say ENOSPC or EDQUOT.
    fn has_ample_room(&self, quota_room: u64) -> bool {
        let room = self.room.load(Ordering::Relaxed).min(quota_room);
        let staged = self.staging.as_ref().map_or(0, |staging| staging.bytes());
        self.coherence.budget.used() + staged <= room / 2
    }

    /// Asks how much the volume's limit leaves; false when there is no answer.
    pub(super) async fn look_for_room(&self) -> bool {
        match self.stat_fs(0).await {
            Ok(stat) => {
                let room = match stat.capacity_bytes_max {
                    0 => u64::MAX,
                    limit => limit.saturating_sub(stat.used_bytes),
                };
                self.room.store(room, Ordering::Relaxed);
                true
            }
            Err(error) => {
                tracing::debug!(%error, "the volume's room is not known");
                false
            }
        }
    }

    /// The last reference to an open file is gone. `flock_owner`: whose flock locks end with it.
    pub async fn release(self: &Arc<Self>, handle: u64, flock_owner: Option<u64>) -> FsResult<()> {
        let file = self.files.remove(handle)?;
        let inode = &file.inode;
        let forgotten = {
            let mut state = inode.lock();
            // Nobody can read it any more, here or, under the write lease, elsewhere. Storing it may not even be possible: what
            // was written past a limit would be kept for ever.
            let forgotten = state.unlinked
                && state.handles == 1
                && self.session.load().holds_write_lease(Ino(inode.ino));
            if forgotten {
                state.pieces.clear();
                state.batches.clear();
            }
            forgotten
        };
        if forgotten {
            self.settle(inode);
        }
        let unsafe_data = !inode.lock().pieces.is_empty();
        if unsafe_data
            && !self.may_defer(inode)
            && let Err(error) = self.sync(&file).await
        {
            // It stays buffered, the flusher tries again, and the open at the server stays with it.
            tracing::warn!(ino = inode.ino, %error, "a closed file's data is not stored yet");
        }
        let unlocked = match flock_owner {
            Some(owner) => self.release_locks(inode.ino, owner, true).await,
            None => Ok(()),
        };
        let _adoption = self.adoption.read().await;
        if self.coherence.inodes.release(inode) {
            self.session().release(Ino(inode.ino));
        }
        // Two handles may have been closed at once.
        if inode.lock().unlinked {
            self.orphaned(inode.ino);
        }
        unlocked
    }

    /// Closes every file that is still open: the kernel is gone and will not.
    pub async fn close_all(self: &Arc<Self>) {
        for file in self.files.drain() {
            // A failure is logged by the flush, and counted when everything is flushed.
            let _ = self.sync(&file).await;
            if self.coherence.inodes.release(&file.inode) {
                self.session().release(Ino(file.inode.ino));
            }
        }
    }

    /// A program reads: whether the access time follows is the policy's matter.
    pub(crate) fn touch_atime(self: &Arc<Self>, file: &FileHandle) {
        if self.writable().is_err() || file.atime_done.swap(true, Ordering::Relaxed) {
            return;
        }
        let (fs, ino) = (self.clone(), file.inode.ino);
        self.runtime.spawn(async move {
            let due = match fs.options.atime {
                AtimePolicy::Off => false,
                AtimePolicy::Strict => true,
                AtimePolicy::Relative => match fs.get_attr(ino).await {
                    Ok(Entry { attr, .. }) => {
                        attr.atime <= attr.mtime
                            || attr.atime <= attr.ctime
                            || fs.clock.now().saturating_sub(attr.atime) > RELATIME_NANOS
                    }
                    Err(_) => false,
                },
            };
            let change = AttrChange {
                atime: Some(SetTime::Now),
                ..AttrChange::default()
            };
            if due && let Err(error) = fs.set_attr(ino, change, Caller::default()).await {
                tracing::debug!(ino, %error, "access time not updated");
            }
        });
    }
}

/// Takes an open at the server back unless it is kept.
struct Paid<'a> {
    fs: &'a Fs,
    ino: u64,
    answer: v1::Opened,
    kept: bool,
}

impl Paid<'_> {
    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Paid<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.fs.session().release(Ino(self.ino));
        }
    }
}

//! Names: lookup, create, link, unlink, rename, symlinks.

use std::sync::Arc;

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, Position};
use heliofs_proto::limits::NAME_BYTES_MAX;
use heliofs_proto::v1;
use heliofs_proto::v1::FileKind;
use heliofs_proto::v1::command::Op;
use meta_client::ClientError;

use super::{Caller, Changed, Entry, Fs};
use crate::ahead::Plan;
use crate::errno::{Errno, FsResult};
use crate::meta_cache::{Found, Generation, PREFETCH_ENTRIES};

/// What a lookup found.
#[derive(Clone, Copy, Debug)]
pub enum Looked {
    /// The name exists.
    Found(Entry),
    /// It does not.
    Absent {
        /// The volume's position that this reflects.
        at: Position,
        /// The cache's generation when it was asked for.
        generation: Generation,
    },
}

/// What to make.
#[derive(Clone, Debug)]
pub struct NewNode {
    /// Kind of the inode.
    pub kind: FileKind,
    /// Permission bits.
    pub mode: u32,
    /// The caller's umask; the server applies it unless a default ACL takes its place.
    pub umask: u32,
    /// Devices.
    pub rdev: u32,
    /// Symlinks.
    pub target: Bytes,
}

pub(super) fn check_name(name: &[u8]) -> FsResult<()> {
    if name.len() > NAME_BYTES_MAX {
        return Err(Errno::NAMETOOLONG);
    }
    Ok(())
}

/// An answer with the position that it reflects.
fn with_position<T>(plan: Plan<T>, at: Position) -> Plan<(T, Position)> {
    match plan {
        Plan::Answered(answer) => Plan::Answered((answer, at)),
        Plan::Wait => Plan::Wait,
        Plan::Usual => Plan::Usual,
    }
}

impl Fs {
    /// What `name` in directory `parent` is.
    pub async fn lookup(self: &Arc<Self>, parent: u64, name: &[u8]) -> FsResult<Looked> {
        check_name(name)?;
        let cache = &self.coherence.cache;
        let generation = cache.generation();
        let known = self
            .ahead(|ahead| with_position(ahead.lookup(parent, name), ahead.at()))
            .await?;
        match known {
            Some((None, at)) => return Ok(Looked::Absent { at, generation }),
            Some((Some((_, Some(attr))), at)) => {
                return Ok(Looked::Found(Entry {
                    attr: self.show(attr),
                    at,
                    generation,
                }));
            }
            Some((Some((ino, None)), _)) => return Ok(Looked::Found(self.get_attr(ino).await?)),
            None => self.settled(&[parent]).await?,
        }
        if self.trusted() {
            // Before the look: what has changed up to there is known to the cache by now.
            let before = self.coherence.ahead.lock().at();
            match cache.lookup(parent, name) {
                Found::Attr(attr, at) => {
                    self.metrics.cache_hits.inc();
                    let ahead = self.coherence.ahead.lock().known(attr.ino);
                    let (attr, at) = match ahead {
                        Some(ahead) => (ahead, at.max(before)),
                        None => (attr, at),
                    };
                    return Ok(Looked::Found(Entry {
                        attr: self.show(attr),
                        at,
                        generation,
                    }));
                }
                Found::Absent(at) => {
                    self.metrics.cache_hits.inc();
                    return Ok(Looked::Absent { at, generation });
                }
                Found::Unknown { prefetch } => {
                    if let Some(after) = prefetch {
                        self.prefetch(parent, after);
                    }
                }
            }
        }
        self.metrics.cache_misses.inc();
        let name = Bytes::copy_from_slice(name);
        let (attr, at) = self
            .ask(|session| {
                let name = name.clone();
                async move { session.try_lookup(Ino(parent), name).await }
            })
            .await?;
        let Some(attr) = attr else {
            cache.put_name(generation, parent, &name, 0, at);
            return Ok(Looked::Absent { at, generation });
        };
        self.saw(generation, &attr, at);
        cache.put_name(generation, parent, &name, attr.ino, at);
        Ok(Looked::Found(Entry {
            attr: self.show(attr),
            at,
            generation,
        }))
    }

    /// Fetches a page of a directory into the cache, in the background.
    fn prefetch(self: &Arc<Self>, parent: u64, after: u64) {
        let fs = self.clone();
        self.runtime.spawn(async move {
            let cache = &fs.coherence.cache;
            let generation = cache.generation();
            let page = fs
                .session()
                .read_dir(Ino(parent), after, PREFETCH_ENTRIES, true)
                .await;
            let next = match page {
                Ok((page, at)) => {
                    fs.keep_page(generation, parent, &page, at);
                    match page.entries.last() {
                        Some(last) if !page.end => Some(last.cookie),
                        _ => None,
                    }
                }
                Err(error) => {
                    tracing::debug!(parent, %error, "a directory could not be fetched ahead");
                    None
                }
            };
            cache.prefetched(parent, next);
        });
    }

    /// Keeps what a page of a directory told.
    pub(super) fn keep_page(
        &self,
        generation: Generation,
        parent: u64,
        page: &v1::DirPage,
        at: Position,
    ) {
        if let Some(dir) = &page.dir {
            self.saw(generation, dir, at);
        }
        for entry in &page.entries {
            if let Some(attr) = &entry.attr {
                self.saw(generation, attr, at);
            }
            self.coherence
                .cache
                .put_name(generation, parent, &entry.name, entry.ino, at);
        }
    }

    /// This mount made `name` in `parent` be `ino` (0: nothing).
    fn named(&self, changed: &Changed, parent: u64, name: &Bytes, ino: u64) {
        self.coherence
            .cache
            .put_name(changed.generation, parent, name, ino, changed.at);
        self.coherence.name_changed(parent, Some(name), changed.at);
    }

    /// Makes an inode; `exclusive`: an existing name is refused, otherwise an existing regular file is returned. Second part:
    /// whether it was made; third: the room that its quotas leave, if any limits it. `open`: it is open at the server afterwards, made or not.
    pub(super) async fn make(
        &self,
        parent: u64,
        name: &[u8],
        node: NewNode,
        exclusive: bool,
        open: bool,
        caller: Caller,
    ) -> FsResult<(Entry, bool, Option<u64>)> {
        self.writable()?;
        check_name(name)?;
        let name = Bytes::copy_from_slice(name);
        let kind = node.kind;
        let generation = self.coherence.cache.generation();
        let made = self
            .ahead(|ahead| {
                let by = (caller, self.clock.now());
                let made = ahead.create((parent, &name), &node, exclusive, by);
                if let (Plan::Answered(Ok(attr)), true) = (&made, open) {
                    // Under the lock, so that it is known when the answer comes.
                    self.session().expect_open(Ino(attr.ino));
                }
                with_position(made, ahead.at())
            })
            .await?;
        if let Some((made, at)) = made {
            let attr = made?;
            let entry = Entry {
                attr,
                at,
                generation,
            };
            return Ok((entry, true, None));
        }
        let create = v1::Create {
            parent,
            name: name.clone(),
            kind: kind as i32,
            mode: node.mode,
            umask: node.umask,
            rdev: node.rdev,
            symlink_target: node.target,
            exclusive,
            ino: 0,
        };
        let session = self.session();
        let changed = if open {
            self.make_way(&Op::Create(create.clone())).await?;
            let generation = self.coherence.cache.generation();
            let reply = self.session().create_open(caller.into(), create).await?;
            self.made_way(&reply).await;
            self.absorb(generation, reply, false)
        } else {
            self.mutate(caller, Op::Create(create)).await?
        };
        let entry = changed.entry(self)?;
        self.named(&changed, parent, &name, entry.attr.ino);
        if kind == FileKind::Directory {
            self.coherence
                .cache
                .put_new_directory(changed.generation, entry.attr.ino, changed.at);
            self.directory_made(&session, &entry.attr, changed.at);
        }
        Ok((entry, changed.reply.created, changed.reply.quota_room))
    }

    /// mknod, mkdir and symlink.
    pub async fn make_node(
        &self,
        parent: u64,
        name: &[u8],
        node: NewNode,
        caller: Caller,
    ) -> FsResult<Entry> {
        Ok(self.make(parent, name, node, true, false, caller).await?.0)
    }

    /// unlink, or rmdir if `directory`.
    pub async fn unlink(
        &self,
        parent: u64,
        name: &[u8],
        directory: bool,
        caller: Caller,
    ) -> FsResult<()> {
        check_name(name)?;
        let name = Bytes::copy_from_slice(name);
        let gone = self
            .ahead(|ahead| ahead.unlink((parent, &name), directory, (caller, self.clock.now())))
            .await?;
        if let Some(gone) = gone {
            return gone.map(drop);
        }
        let op = Op::Unlink(v1::Unlink {
            parent,
            name: name.clone(),
            directory,
        });
        let changed = self.mutate(caller, op).await?;
        self.named(&changed, parent, &name, 0);
        if changed.reply.orphaned
            && let Some(attr) = &changed.reply.attr
        {
            self.orphaned(attr.ino);
        }
        Ok(())
    }

    /// An inode lost its last name: data that nobody has open can be forgotten. Without the write lease somebody else may have it
    /// open.
    pub(super) fn orphaned(&self, ino: u64) {
        if self.session.load().holds_write_lease(Ino(ino))
            && let Some(inode) = self.coherence.inodes.get(ino)
        {
            {
                let mut state = inode.lock();
                if state.handles > 0 {
                    // `Fs::release` does it.
                    state.unlinked = true;
                    return;
                }
                state.pieces.clear();
                state.batches.clear();
            }
            self.settle(&inode);
        }
    }

    /// rename, with RENAME_NOREPLACE and RENAME_EXCHANGE.
    pub async fn rename(
        self: &Arc<Self>,
        (parent, name): (u64, &[u8]),
        (new_parent, new_name): (u64, &[u8]),
        no_replace: bool,
        exchange: bool,
        caller: Caller,
    ) -> FsResult<()> {
        check_name(name)?;
        check_name(new_name)?;
        let (name, new_name) = (
            Bytes::copy_from_slice(name),
            Bytes::copy_from_slice(new_name),
        );
        if !no_replace {
            self.store_before_replacing((parent, &name), (new_parent, &new_name))
                .await?;
        }
        let moved = match exchange {
            true => None,
            false => {
                let (from, to) = ((parent, &name), (new_parent, &new_name));
                self.ahead(|ahead| ahead.rename(from, to, no_replace, (caller, self.clock.now())))
                    .await?
            }
        };
        if let Some(moved) = moved {
            return moved.map(drop);
        }
        let op = Op::Rename(v1::Rename {
            parent,
            name: name.clone(),
            new_parent,
            new_name: new_name.clone(),
            no_replace,
            exchange,
        });
        let changed = self.mutate(caller, op).await?;
        let reply = &changed.reply;
        let moved = reply.attr.ok_or(Errno::IO)?;
        match (&reply.replaced, exchange) {
            (Some(other), true) => self.named(&changed, parent, &name, other.ino),
            // Without a replaced inode an exchange was one of two names of the same inode.
            (None, true) => self.named(&changed, parent, &name, moved.ino),
            // It may have been a rename between two names of one inode, which does nothing.
            (None, false) if moved.kind() != FileKind::Directory && moved.nlink > 1 => {
                self.coherence.cache.name_changed(parent, &name, changed.at);
                self.coherence.name_changed(parent, Some(&name), changed.at);
            }
            (_, false) => self.named(&changed, parent, &name, 0),
        }
        self.named(&changed, new_parent, &new_name, moved.ino);
        if reply.orphaned
            && let Some(replaced) = &reply.replaced
        {
            self.orphaned(replaced.ino);
        }
        Ok(())
    }

    /// Whoever writes a file anew and renames it over the old one wants one of the two after a crash: the new one's data is
    /// stored before it takes the place of something.
    async fn store_before_replacing(
        self: &Arc<Self>,
        (parent, name): (u64, &[u8]),
        (new_parent, new_name): (u64, &[u8]),
    ) -> FsResult<()> {
        if self.dirty.lock().is_empty() {
            return Ok(());
        }
        let cache = &self.coherence.cache;
        let is_leased = |ino| self.coherence.ahead.lock().is_leased(ino);
        if is_leased(new_parent) {
            if let Looked::Absent { .. } = self.lookup(new_parent, new_name).await? {
                return Ok(());
            }
        } else if self.trusted() && matches!(cache.lookup(new_parent, new_name), Found::Absent(_)) {
            return Ok(());
        }
        let ino = match cache.lookup(parent, name) {
            Found::Attr(attr, _) if !is_leased(parent) => attr.ino,
            _ => match self.lookup(parent, name).await? {
                Looked::Found(found) => found.attr.ino,
                Looked::Absent { .. } => return Ok(()),
            },
        };
        match self.coherence.inodes.get(ino) {
            Some(inode) => self.flush(&inode).await,
            None => Ok(()),
        }
    }

    /// Gives an inode another name.
    pub async fn link(
        &self,
        ino: u64,
        parent: u64,
        name: &[u8],
        caller: Caller,
    ) -> FsResult<Entry> {
        check_name(name)?;
        let name = Bytes::copy_from_slice(name);
        let op = Op::Link(v1::Link {
            ino,
            parent,
            name: name.clone(),
        });
        let changed = self.mutate(caller, op).await?;
        self.named(&changed, parent, &name, ino);
        changed.entry(self)
    }

    /// The target of a symlink.
    pub async fn read_link(&self, ino: u64) -> FsResult<Bytes> {
        self.settled(&[ino]).await?;
        match self.session().read_link(Ino(ino)).await {
            Err(ClientError::Verdict(FsError::NotFound)) => Err(Errno::STALE),
            answer => Ok(answer?),
        }
    }

    /// Usage and limits of the directory quota that an inode is charged to; without one, and for inode 0: the volume's.
    pub async fn stat_fs(&self, ino: u64) -> FsResult<v1::StatFsReply> {
        Ok(self.session().stat_fs(Ino(ino)).await?)
    }
}

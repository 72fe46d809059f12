//! `heliofs clone`: copies a file or a tree within a volume by sharing its data: no object is read or written.
//!
//! The copy is put together below a hidden name and gets its own at the end: it appears whole or not at all. It is no snapshot: what is
//! changed in the source meanwhile may be copied in its old or its new form, file by file.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use clap::Args;
use futures::{StreamExt, TryStreamExt};
use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{self, Attr, FileKind, FsError, command::Op, set_time};
use indicatif::ProgressBar;
use meta_client::{ClientError, Session};
use parking_lot::Mutex;
use serde_json::json;

use super::info::{self, places};
use crate::cli::Access;
use crate::failure::{Failure, Outcome};
use crate::units::{self, show_size};
use crate::{output, progress};

/// Entries of a directory per question.
const ENTRIES: u32 = 1024;

/// How often one name may be replaced while it is being copied.
const REPLACED_MAX: usize = 100;

/// Entries copied at once.
const AT_ONCE: usize = 32;

/// What to copy where.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// SOURCE TARGET, both in one mount; or META-URL with the volume's name, then SOURCE TARGET inside the volume. TARGET must not exist.
    #[arg(required = true, num_args = 2..=3, value_name = "PATH")]
    paths: Vec<String>,
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    if !nix::unistd::geteuid().is_root() {
        return Err(
            Failure::new("clone is root's: it keeps owners and checks no permissions")
                .hint("cp --reflink=auto shares the data of single files, too"),
        );
    }
    let mut found = places(&options.access, &options.paths)?;
    let (Some((target, places)), true) = (found.pop(), found.is_empty()) else {
        return Err(Failure::usage("source and target lie in different volumes"));
    };
    let [from, to] = &places[..] else {
        return Err(Failure::usage("a source and a target must be named"));
    };
    let session = target.session(false).await?;
    let cloner = Cloner::new(&session, Kind::Clone, json);
    let outcome = cloner.run(&from.inside, &to.inside).await;
    let (copied, bytes) = cloner.copied();
    session.detach().await;
    outcome?;
    if json {
        return output::print_json(&json!({ "entries": copied, "bytes": bytes }));
    }
    output::line(format_args!(
        "cloned {copied} entries with {}, sharing their data",
        show_size(bytes)
    ))
}

/// What a copy is for.
pub(super) enum Kind {
    /// Somebody's own from then on.
    Clone,
    /// A snapshot; `source` is told by it.
    Snapshot {
        /// The path inside the volume.
        source: String,
    },
}

/// Copies trees within a volume.
pub(super) struct Cloner<'a> {
    session: &'a Session,
    kind: Kind,
    /// Copies of files with several names.
    linked: Mutex<HashMap<u64, u64>>,
    /// Files with several names are copied one at a time: the second name must find the first one's copy.
    linking: tokio::sync::Mutex<()>,
    bar: ProgressBar,
    copied: AtomicU64,
    bytes: AtomicU64,
}

/// What became of one name.
enum Copied {
    /// Nothing is left to do for it.
    Whole,
    /// A directory, to be filled.
    Directory(Pair),
    /// It was removed or replaced meanwhile; nothing was made.
    Gone,
}

/// A directory that is being filled.
#[derive(Clone, Copy)]
struct Pair {
    source: Attr,
    target: u64,
}

impl<'a> Cloner<'a> {
    /// Copies for `kind`, through a session that may write.
    pub(super) fn new(session: &'a Session, kind: Kind, json: bool) -> Self {
        let what = match kind {
            Kind::Clone => "clone",
            Kind::Snapshot { .. } => "snapshot",
        };
        Self {
            session,
            kind,
            linked: Mutex::default(),
            linking: tokio::sync::Mutex::default(),
            bar: progress::bar(what, 0, false, json),
            copied: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    /// Entries and bytes that were copied.
    pub(super) fn copied(&self) -> (u64, u64) {
        (
            self.copied.load(Ordering::Relaxed),
            self.bytes.load(Ordering::Relaxed),
        )
    }

    /// Whoever owns the original.
    fn caller(&self, attr: &Attr) -> v1::Caller {
        v1::Caller {
            uid: attr.uid,
            gid: attr.gid,
            ..self.root()
        }
    }

    fn root(&self) -> v1::Caller {
        v1::Caller {
            uid: 0,
            gid: 0,
            pid: std::process::id(),
            snapshot: matches!(self.kind, Kind::Snapshot { .. }),
        }
    }

    /// Copies what is at `from` as `to`; paths inside the volume.
    pub(super) async fn run(&self, from: &Path, to: &Path) -> Outcome {
        let outcome = self.copy(from, to).await;
        self.bar.finish_and_clear();
        outcome
    }

    async fn copy(&self, from: &Path, to: &Path) -> Outcome {
        let missing =
            |path: &Path| Failure::new(format!("/{}: no such file or directory", path.display()));
        let source = info::walk(self.session, from)
            .await?
            .ok_or_else(|| missing(from))?;
        let (Some(parent), Some(name)) = (to.parent(), to.file_name()) else {
            return Err(Failure::usage("the root of the volume can't be a target"));
        };
        let parent = info::walk(self.session, parent)
            .await?
            .ok_or_else(|| missing(parent))?;
        let name = Bytes::copy_from_slice(name.as_encoded_bytes());
        let exists = || Failure::new(format!("/{} exists already", to.display()));
        if info::walk(self.session, to).await?.is_some() {
            return Err(exists());
        }
        match self.copy_as(&source, parent.ino, name).await? {
            true => Ok(()),
            false => Err(exists()),
        }
    }

    /// Copies an inode and all below it as `name` of directory `parent`, where it appears when it is whole. False: there is something
    /// of that name, and nothing was copied.
    pub(super) async fn copy_as(&self, source: &Attr, parent: u64, name: Bytes) -> Outcome<bool> {
        let hidden = Bytes::from(format!(".heliofs-clone-{}", units::random_hex()));
        let outcome = async {
            let top = self.one(source, parent, &hidden).await?;
            if let (Some(top), Kind::Snapshot { source }) = (top, &self.kind) {
                self.change(self.root(), super::snapshot::mark(top, source))
                    .await?;
            }
            let rename = Op::Rename(v1::Rename {
                parent,
                name: hidden.clone(),
                new_parent: parent,
                new_name: name,
                no_replace: true,
                exchange: false,
            });
            match self.change(self.root(), rename).await {
                Err(ClientError::Verdict(FsError::Exists)) => Ok(false),
                other => Ok(other.map(|_| true)?),
            }
        }
        .await;
        if !matches!(outcome, Ok(true)) {
            match self.remove(parent, &hidden).await {
                Ok(()) | Err(ClientError::Verdict(FsError::NotFound)) => {}
                Err(error) => {
                    let hidden = String::from_utf8_lossy(&hidden);
                    tracing::warn!(%error, %hidden, "what was cloned so far is left");
                }
            }
        }
        outcome
    }

    /// Removes a tree that nobody is to find in the trash.
    async fn remove(&self, parent: u64, name: &Bytes) -> Result<(), ClientError> {
        let remove = |parent, name| Op::RemoveTree(v1::RemoveTree { parent, name });
        let reply = self
            .change(self.root(), remove(parent, name.clone()))
            .await?;
        // A tree that was put into the trash has another parent there, and this name.
        let kept = reply
            .attr
            .filter(|attr| attr.nlink > 0 && attr.parent != parent);
        if let Some(attr) = kept {
            let mut kept = format!("{parent}-{}-", attr.ino).into_bytes();
            kept.extend_from_slice(name);
            self.change(self.root(), remove(attr.parent, kept.into()))
                .await?;
        }
        Ok(())
    }

    async fn change(&self, caller: v1::Caller, op: Op) -> Result<v1::Reply, ClientError> {
        self.session.mutate(caller, op).await
    }

    /// Copies one inode, and all below it, as `name` of `parent`; the copy, if it is a directory.
    async fn one(&self, source: &Attr, parent: u64, name: &Bytes) -> Outcome<Option<u64>> {
        let top = match self.entry(source, parent, name).await? {
            Copied::Directory(top) => top,
            Copied::Whole => return Ok(None),
            Copied::Gone => return Err(Failure::new("what was to be copied is gone")),
        };
        // Directories get their own times when nothing is added to them any more.
        let mut directories = vec![top];
        let mut next = 0;
        while let Some(pair) = directories.get(next).copied() {
            next += 1;
            let mut after = 0;
            loop {
                let (page, _) = self
                    .session
                    .read_dir(Ino(pair.source.ino), after, ENTRIES, true)
                    .await?;
                self.bar.inc_length(page.entries.len() as u64);
                let last = page.entries.last().map(|entry| entry.cookie);
                let made: Vec<Option<Pair>> = futures::stream::iter(page.entries)
                    // The hidden copy itself, if it lies in what is copied.
                    .filter(|entry| {
                        let own = pair.source.ino == parent && entry.name == *name;
                        std::future::ready(!own && !self.left_out(pair.source.ino, &entry.name))
                    })
                    .map(|entry| async move {
                        let attr = match entry.attr {
                            Some(attr) => attr,
                            // A mount holds data of it back: asked for by itself, it is told to store them first.
                            None => match self.session.get_attr(Ino(entry.ino)).await {
                                Ok((attr, _)) => attr,
                                // Gone between listing and look.
                                Err(ClientError::Verdict(FsError::Stale)) => return Ok(None),
                                Err(error) => return Err(Failure::from(error)),
                            },
                        };
                        self.named(attr, pair, &entry.name).await
                    })
                    .buffered(AT_ONCE)
                    .try_collect()
                    .await?;
                directories.extend(made.into_iter().flatten());
                match last {
                    Some(last) if !page.end => after = last,
                    _ => break,
                }
            }
        }
        for pair in directories.iter().rev() {
            self.dress(&pair.source, pair.target).await?;
        }
        Ok(Some(top.target))
    }

    /// A snapshot of the root holds neither the others nor the trash.
    fn left_out(&self, parent: u64, name: &[u8]) -> bool {
        matches!(self.kind, Kind::Snapshot { .. })
            && parent == Ino::ROOT.0
            && [
                super::snapshot::DIRECTORY.as_bytes(),
                meta_core::trash::NAME,
            ]
            .contains(&name)
    }

    /// Copies what a name of a directory means, as [`Cloner::entry`] does: what has been put in its place since it was listed,
    /// if it was replaced. What is gone is passed over.
    async fn named(&self, mut attr: Attr, pair: Pair, name: &Bytes) -> Outcome<Option<Pair>> {
        for _ in 0..REPLACED_MAX {
            match self.entry(&attr, pair.target, name).await? {
                Copied::Directory(pair) => return Ok(Some(pair)),
                Copied::Whole => return Ok(None),
                Copied::Gone => {}
            }
            match self
                .session
                .lookup(Ino(pair.source.ino), name.clone())
                .await
            {
                Ok((now, _)) => attr = now,
                Err(ClientError::Verdict(
                    FsError::NotFound | FsError::Stale | FsError::NotDirectory,
                )) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        let name = String::from_utf8_lossy(name);
        Err(Failure::new(format!("`{name}` is replaced all the time")))
    }

    /// Copies one inode but not what is below it.
    async fn entry(&self, source: &Attr, parent: u64, name: &Bytes) -> Outcome<Copied> {
        let several = source.nlink > 1 && source.kind() != FileKind::Directory;
        let _turn = match several {
            true => Some(self.linking.lock().await),
            false => None,
        };
        let known = self.linked.lock().get(&source.ino).copied();
        if let Some(ino) = known {
            let link = Op::Link(v1::Link {
                ino,
                parent,
                name: name.clone(),
            });
            self.change(self.caller(source), link).await?;
            self.count(0);
            return Ok(Copied::Whole);
        }
        let kind = source.kind();
        if kind == FileKind::File {
            return self.file(source, parent, name).await;
        }
        let symlink_target = match kind {
            FileKind::Symlink => match self.session.read_link(Ino(source.ino)).await {
                Ok(target) => target,
                Err(ClientError::Verdict(FsError::Stale)) => return Ok(Copied::Gone),
                Err(error) => return Err(error.into()),
            },
            _ => Bytes::new(),
        };
        let target = self.create(source, parent, name, symlink_target).await?;
        if kind == FileKind::Directory {
            self.count(0);
            return Ok(Copied::Directory(Pair {
                source: *source,
                target,
            }));
        }
        self.finish(source, target, 0).await
    }

    async fn create(
        &self,
        source: &Attr,
        parent: u64,
        name: &Bytes,
        symlink_target: Bytes,
    ) -> Outcome<u64> {
        let create = Op::Create(v1::Create {
            parent,
            name: name.clone(),
            kind: source.kind() as i32,
            // Closed to others until it is whole; its own mode comes at the end.
            mode: 0o700,
            umask: 0,
            rdev: source.rdev,
            symlink_target,
            exclusive: true,
            ino: 0,
        });
        let made = self.change(self.caller(source), create).await?.attr;
        Ok(made.map(|attr| attr.ino).unwrap_or_default())
    }

    async fn finish(&self, source: &Attr, target: u64, size: u64) -> Outcome<Copied> {
        self.dress(source, target).await?;
        if source.nlink > 1 {
            self.linked.lock().insert(source.ino, target);
        }
        self.count(size);
        Ok(Copied::Whole)
    }

    fn count(&self, bytes: u64) {
        self.copied.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.bar.inc(1);
    }

    /// Copies a file. It is opened meanwhile, so that a mount that holds data of it back stores them first, and so that it lives
    /// until it is copied.
    async fn file(&self, source: &Attr, parent: u64, name: &Bytes) -> Outcome<Copied> {
        let opened = match self.session.open(Ino(source.ino), 0, false).await {
            Ok((opened, _)) => opened.attr.unwrap_or(*source),
            Err(ClientError::Verdict(FsError::Stale)) => return Ok(Copied::Gone),
            Err(error) => return Err(error.into()),
        };
        let copy = async {
            let target = self.create(&opened, parent, name, Bytes::new()).await?;
            let size = self.share_open(source.ino, target).await?;
            self.finish(&opened, target, size).await
        };
        let outcome = copy.await;
        self.session.release(Ino(source.ino));
        outcome
    }

    async fn share_open(&self, source: u64, target: u64) -> Result<u64, ClientError> {
        let mut at = 0;
        loop {
            let copy = Op::CopyRange(v1::CopyRange {
                source,
                source_offset: at,
                target,
                target_offset: at,
                length: u64::MAX >> 2,
                kill_suidgid: false,
            });
            let copied = self.change(self.root(), copy).await?.value;
            if copied == 0 {
                return Ok(at);
            }
            at += copied;
        }
    }

    /// Extended attributes, ACLs, mode and times. The owner is whom it was created for: to set it again would clear setuid.
    async fn dress(&self, source: &Attr, target: u64) -> Outcome {
        if source.flags != 0 {
            let (names, _) = self.session.list_xattr(Ino(source.ino)).await?;
            for name in names {
                let value = match self.session.get_xattr(Ino(source.ino), name.clone()).await {
                    Ok((value, _)) => value,
                    Err(ClientError::Verdict(FsError::NoAttribute)) => continue,
                    Err(error) => return Err(error.into()),
                };
                let set = Op::SetXattr(v1::SetXattr {
                    ino: target,
                    name,
                    value,
                    ..v1::SetXattr::default()
                });
                self.change(self.root(), set).await?;
            }
        }
        let at = |nanos| {
            Some(v1::SetTime {
                to: Some(set_time::To::Nanos(nanos)),
            })
        };
        let set = Op::SetAttr(v1::SetAttr {
            ino: target,
            mode: (source.kind() != FileKind::Symlink).then_some(source.mode),
            atime: at(source.atime),
            mtime: at(source.mtime),
            ..v1::SetAttr::default()
        });
        self.change(self.root(), set).await?;
        Ok(())
    }
}

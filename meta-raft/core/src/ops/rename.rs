//! rename, with RENAME_NOREPLACE and RENAME_EXCHANGE.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1;

use super::{dir, quota, trash};
use crate::change::Corruption;
use crate::records::{InodeRecord, NameRecord};
use crate::txn::{OpError, OpResult, Txn};
use crate::view::View;

/// The two directories of a rename, which may be one.
struct Parents {
    old: Ino,
    old_dir: InodeRecord,
    new: Ino,
    /// `None`: the same directory.
    new_dir: Option<InodeRecord>,
}

impl Parents {
    fn read<V: View>(txn: &Txn<V>, old: Ino, new: Ino) -> OpResult<Self> {
        let old_dir = dir::live_directory(txn, old)?;
        let new_dir = match new == old {
            true => None,
            false => Some(dir::live_directory(txn, new)?),
        };
        Ok(Self {
            old,
            old_dir,
            new,
            new_dir,
        })
    }

    fn new_dir(&mut self) -> &mut InodeRecord {
        self.new_dir.as_mut().unwrap_or(&mut self.old_dir)
    }

    fn write<V: View>(&self, txn: &mut Txn<V>) -> Result<(), Corruption> {
        txn.put_inode(self.old, &self.old_dir)?;
        match &self.new_dir {
            Some(new_dir) => txn.put_inode(self.new, new_dir),
            None => Ok(()),
        }
    }

    fn reply(&self) -> v1::Reply {
        let new_dir = self.new_dir.as_ref().unwrap_or(&self.old_dir);
        v1::Reply {
            parent: Some(self.old_dir.attr(self.old)),
            new_parent: Some(new_dir.attr(self.new)),
            ..v1::Reply::default()
        }
    }
}

/// Moves a name, over what was there if anything was, or exchanges two names.
pub(crate) fn rename<V: View>(txn: &mut Txn<V>, op: &v1::Rename) -> OpResult {
    if op.no_replace && op.exchange {
        return Err(FsError::Invalid.into());
    }
    trash::protect(txn, Ino(op.parent), &op.name)?;
    trash::protect(txn, Ino(op.new_parent), &op.new_name)?;
    let parents = Parents::read(txn, Ino(op.parent), Ino(op.new_parent))?;
    let source = dir::existing_entry(txn, parents.old, &op.name)?;
    dir::check_name(&op.new_name)?;
    let target = txn.entry(parents.new, &op.new_name)?;
    match target {
        Some(_) if op.no_replace => Err(FsError::Exists.into()),
        None if op.exchange => Err(FsError::NotFound.into()),
        // Two names of one inode: nothing happens, both stay (rename(2)).
        Some(target) if target.ino == source.ino => {
            let inode = txn.named_inode(source.ino)?;
            Ok(v1::Reply {
                attr: Some(inode.attr(source.ino)),
                ..parents.reply()
            })
        }
        Some(target) if op.exchange => exchange(txn, op, parents, source, target),
        target => replace(txn, op, parents, source, target),
    }
}

fn replace<V: View>(
    txn: &mut Txn<V>,
    op: &v1::Rename,
    mut parents: Parents,
    source: NameRecord,
    target: Option<NameRecord>,
) -> OpResult {
    let (old, new) = (parents.old, parents.new);
    let mut moved = txn.named_inode(source.ino)?;
    txn.changeable(&moved)?;
    if moved.is_directory() && new != old {
        refuse_below_itself(txn, source.ino, new)?;
    }
    let replaced = match &target {
        Some(target) => {
            let inode = txn.named_inode(target.ino)?;
            match (moved.is_directory(), inode.is_directory()) {
                (true, false) => return Err(FsError::NotDirectory.into()),
                (false, true) => return Err(FsError::IsDirectory.into()),
                (true, true) if inode.size > 0 => return Err(FsError::NotEmpty.into()),
                _ => {
                    txn.changeable(&inode)?;
                    Some((target, inode))
                }
            }
        }
        None => None,
    };
    let into = parents.new_dir().quota;
    charge_like(txn, source.ino, &mut moved, into, new == old)?;
    moved.ctime = txn.time;
    moved.parent = new;
    let named = (source.ino, source.kind);
    dir::remove_entry(txn, old, &mut parents.old_dir, &op.name, &source)?;
    match &target {
        Some(target) => {
            dir::point_entry(txn, new, parents.new_dir(), &op.new_name, target, named)?;
        }
        None if new == old => {
            // The name changes and the place in listings stays, so that no listing shows it twice or not at all.
            parents.old_dir.size += op.new_name.len() as u64;
            if moved.is_directory() {
                parents.old_dir.nlink += 1;
            }
            dir::put_entry(txn, old, &op.new_name, &source)?;
        }
        None => {
            let (ino, kind) = named;
            dir::add_entry(txn, new, parents.new_dir(), &op.new_name, ino, kind)?;
        }
    }
    parents.write(txn)?;
    txn.put_inode(source.ino, &moved)?;
    let mut reply = v1::Reply {
        attr: Some(moved.attr(source.ino)),
        ..parents.reply()
    };
    if let Some((target, mut inode)) = replaced {
        let name = (new, &op.new_name);
        dir::lose_name_or_keep(txn, name, target.ino, &mut inode, &mut reply)?;
        reply.replaced = Some(inode.attr(target.ino));
        // Read anew: the trash's own directory may have been made in one of them.
        reply.parent = Some(txn.inode(old)?.attr(old));
        reply.new_parent = Some(txn.inode(new)?.attr(new));
    }
    Ok(reply)
}

/// Both names stay where they stand in listings and swap what they name.
fn exchange<V: View>(
    txn: &mut Txn<V>,
    op: &v1::Rename,
    mut parents: Parents,
    source: NameRecord,
    target: NameRecord,
) -> OpResult {
    let (old, new) = (parents.old, parents.new);
    let mut first = txn.named_inode(source.ino)?;
    let mut second = txn.named_inode(target.ino)?;
    txn.changeable(&first)?;
    txn.changeable(&second)?;
    if first.is_directory() && new != old {
        refuse_below_itself(txn, source.ino, new)?;
    }
    if second.is_directory() && new != old {
        refuse_below_itself(txn, target.ino, old)?;
    }
    let (old_quota, new_quota) = (parents.old_dir.quota, parents.new_dir().quota);
    charge_like(txn, source.ino, &mut first, new_quota, new == old)?;
    charge_like(txn, target.ino, &mut second, old_quota, new == old)?;
    (first.parent, second.parent) = (new, old);
    (first.ctime, second.ctime) = (txn.time, txn.time);
    point(txn, old, &mut parents.old_dir, &op.name, &source, &target)?;
    point(txn, new, parents.new_dir(), &op.new_name, &target, &source)?;
    parents.write(txn)?;
    txn.put_inode(source.ino, &first)?;
    txn.put_inode(target.ino, &second)?;
    Ok(v1::Reply {
        attr: Some(first.attr(source.ino)),
        replaced: Some(second.attr(target.ino)),
        ..parents.reply()
    })
}

/// What moves is charged like where it moves to, or refused (`CROSS_DEVICE`).
fn charge_like<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
    into: Ino,
    same_directory: bool,
) -> OpResult<()> {
    let alone = inode.is_directory() || inode.nlink <= 1;
    match quota::adopt(txn, ino, inode, into, alone) {
        // It stays where it is: a name of a file that is charged elsewhere by another one.
        Err(OpError::Refused(FsError::CrossDevice)) if same_directory => Ok(()),
        adopted => adopted,
    }
}

fn point<V: View>(
    txn: &mut Txn<V>,
    parent: Ino,
    dir: &mut InodeRecord,
    name: &Bytes,
    entry: &NameRecord,
    to: &NameRecord,
) -> OpResult<()> {
    dir::point_entry(txn, parent, dir, name, entry, (to.ino, to.kind))
}

/// Refuses (`INVALID`) to move directory `ino` into `parent` if that is it or below it: the two would be cut off from the root.
fn refuse_below_itself<V: View>(txn: &mut Txn<V>, ino: Ino, parent: Ino) -> OpResult<()> {
    let inodes = txn.counters()?.used_inodes;
    let mut at = parent;
    for _ in 0..=inodes {
        if at == ino {
            return Err(FsError::Invalid.into());
        }
        if at == Ino::ROOT {
            return Ok(());
        }
        let dir = txn.named_inode(at)?;
        if dir.nlink == 0 {
            // The top of a tree that is being removed lies below nothing.
            return Ok(());
        }
        at = dir.parent;
    }
    let what = format!(
        "volume {}: the parents of {parent} form a circle",
        txn.volume
    );
    Err(Corruption::Contradiction(what).into())
}

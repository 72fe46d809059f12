//! Entries, links, directories: every inode is reachable as often as it says, or waits to be removed.

use std::collections::{BTreeMap, BTreeSet};

use heliofs_proto::ids::{Ino, VolumeId};
use heliofs_proto::v1::FileKind;

use super::{Found, Records, decode, each_of, get, number};
use crate::change::Corruption;
use crate::keys::{self, Tag};
use crate::ops::dir::{COOKIE_FIRST, check_name};
use crate::records::{CookieRecord, InodeRecord, NameRecord};
use crate::view::View;

/// What the entries say about an inode.
#[derive(Default)]
struct Seen {
    names: u32,
    /// Of a directory: what its entries add up to.
    subdirectories: u32,
    name_bytes: u64,
    /// Of a directory: where its name is.
    parent: Option<Ino>,
}

pub(super) fn check(
    view: &impl View,
    volume: VolumeId,
    records: &Records,
    found: &mut Found,
) -> Result<(), Corruption> {
    let part = records.part;
    let mut seen: BTreeMap<Ino, Seen> = BTreeMap::new();
    each_of(view, volume, Tag::Name, |key, value| {
        let (parent, name) = (Ino(number(key, 0)?), keys::name_of(key));
        let entry: NameRecord = decode(key, value)?;
        let at = || format!("entry {parent}/{:?}", String::from_utf8_lossy(&name));
        let is_directory = entry.kind == FileKind::Directory;
        if part.has_ino(entry.ino) {
            let inode = records.inodes.get(&entry.ino);
            found.expect(inode.is_some_and(|inode| inode.kind == entry.kind), || {
                format!(
                    "{} names {}, which does not exist or is of another kind",
                    at(),
                    entry.ino
                )
            });
            let child = seen.entry(entry.ino).or_default();
            child.names += 1;
            child.parent = Some(parent);
        }
        if !part.has_ino(parent) {
            return Ok(());
        }
        found.expect(check_name(&name).is_ok(), || {
            format!("{} has no valid name", at())
        });
        let twin: Option<CookieRecord> = get(view, &keys::cookie(volume, parent, entry.cookie))?;
        let agrees = twin.is_some_and(|twin| {
            twin.name == name && twin.ino == entry.ino && twin.kind == entry.kind
        });
        found.expect(agrees, || {
            format!("{} and its cookie {} disagree", at(), entry.cookie)
        });
        let dir = records.inodes.get(&parent);
        found.expect(dir.is_some_and(|dir| dir.is_directory()), || {
            format!("{} lies in what is no directory", at())
        });
        found.expect(
            dir.is_some_and(|dir| (COOKIE_FIRST..dir.next_cookie).contains(&entry.cookie)),
            || format!("{} has a cookie that was never given out", at()),
        );
        let dir = seen.entry(parent).or_default();
        dir.name_bytes += name.len() as u64;
        dir.subdirectories += u32::from(is_directory);
        Ok(())
    })?;
    each_of(view, volume, Tag::Cookie, |key, value| {
        let (parent, cookie) = (Ino(number(key, 0)?), number(key, 1)?);
        if !part.has_ino(parent) {
            return Ok(());
        }
        let entry: CookieRecord = decode(key, value)?;
        let twin: Option<NameRecord> = get(view, &keys::name(volume, parent, &entry.name))?;
        found.expect(twin.is_some_and(|twin| twin.cookie == cookie), || {
            format!("cookie {parent}/{cookie} has no entry by name")
        });
        Ok(())
    })?;
    let none = Seen::default();
    let dismantled: BTreeSet<Ino> = records.remove_trees.keys().map(|(_, ino)| *ino).collect();
    for (ino, inode) in &records.inodes {
        let seen = seen.get(ino).unwrap_or(&none);
        let waits = (records.orphans.contains_key(ino), dismantled.contains(ino));
        found.expect((inode.nlink == 0) == (waits.0 || waits.1), || {
            format!(
                "inode {ino} has {} links, orphan and dismantled: {waits:?}",
                inode.nlink
            )
        });
        found.expect(waits != (true, true), || {
            format!("inode {ino} is an orphan before it is taken apart")
        });
        if !inode.is_directory() {
            found.expect(inode.nlink == seen.names, || {
                format!(
                    "inode {ino} has {} links and {} names",
                    inode.nlink, seen.names
                )
            });
            continue;
        }
        found.expect(inode.size == seen.name_bytes, || {
            let names = seen.name_bytes;
            format!(
                "directory {ino} has size {} and {names} bytes of names",
                inode.size
            )
        });
        if inode.nlink == 0 {
            found.expect(seen.names == 0, || {
                format!("removed directory {ino} has a name")
            });
            found.expect(!waits.0 || inode.size == 0, || {
                format!("orphaned directory {ino} is not empty")
            });
            continue;
        }
        found.expect(inode.nlink == 2 + seen.subdirectories, || {
            let subdirectories = seen.subdirectories;
            format!(
                "directory {ino} has {} links, {subdirectories} subdirectories",
                inode.nlink
            )
        });
        if *ino == Ino::ROOT {
            found.expect(seen.names == 0 && inode.parent == Ino::ROOT, || {
                "the root has a name or a parent".to_owned()
            });
        } else {
            found.expect(seen.names == 1 && seen.parent == Some(inode.parent), || {
                let (names, at) = (seen.names, seen.parent);
                format!(
                    "directory {ino} has {names} names, in {at:?}, not {}",
                    inode.parent
                )
            });
            let top = reaches_the_top(view, volume, records, *ino)?;
            found.expect(top, || format!("directory {ino} is cut off"));
        }
    }
    found.expect(
        !part.has_ino(Ino::ROOT) || records.inodes.contains_key(&Ino::ROOT),
        || "there is no root".to_owned(),
    );
    for ino in records.orphans.keys().chain(&dismantled) {
        found.expect(records.inodes.contains_key(ino), || {
            format!("{ino} waits to be removed and does not exist")
        });
    }
    for ino in &dismantled {
        let dir = records.inodes.get(ino);
        found.expect(
            dir.is_some_and(|dir| dir.is_directory() && dir.size > 0),
            || format!("{ino} waits to be emptied and is no directory with entries"),
        );
    }
    Ok(())
}

/// Whether the parents of a directory lead to the root or to the top of a tree that is being removed.
fn reaches_the_top(
    view: &impl View,
    volume: VolumeId,
    records: &Records,
    mut ino: Ino,
) -> Result<bool, Corruption> {
    for _ in 0..=records.counters.used_inodes {
        let inode: Option<InodeRecord> = match records.inodes.get(&ino) {
            Some(inode) => Some(inode.clone()),
            None => get(view, &keys::inode(volume, ino))?,
        };
        match inode {
            None => return Ok(false),
            Some(_) if ino == Ino::ROOT => return Ok(true),
            Some(inode) if inode.nlink == 0 => return Ok(true),
            Some(inode) => ino = inode.parent,
        }
    }
    Ok(false)
}

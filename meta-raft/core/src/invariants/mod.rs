//! What is true of a volume after every command. For tests and for offline checks: everything is read into memory.
//!
//! - `namespace`: entries, links, directories, orphans
//! - `attributes`: symlinks, extended attributes, ACLs
//! - `content`: extents, segments
//! - `quotas`: what is charged to them
//! - `usage`: counters, sessions, the digest

mod attributes;
mod content;
mod namespace;
mod quotas;
mod usage;

use std::collections::BTreeMap;

use bytes::Bytes;
use heliofs_proto::ids::{Ino, SegmentId, SessionId, VolumeId};

use crate::change::Corruption;
use crate::digest::Sums;
use crate::keys::{self, Tag};
use crate::records::{
    CookieRecord, CountersRecord, EraseRecord, ExtentRecord, HeadRecord, InodeRecord, NameRecord,
    OrphanRecord, QuotaRecord, QuotaWalkRecord, Record, RemoveTreeRecord, SegmentBlockRecord,
    SegmentRecord, SessionRecord, SettingsRecord,
};
use crate::view::View;

/// Checks a whole volume. Errors: one sentence per contradiction.
pub fn check(view: &impl View, volume: VolumeId) -> Result<(), Vec<String>> {
    let records = Records::read(view, volume).map_err(|damage| vec![damage.to_string()])?;
    let mut found = Found(Vec::new());
    namespace::check(&records, &mut found);
    attributes::check(&records, &mut found);
    content::check(&records, &mut found);
    usage::check(&records, &mut found);
    quotas::check(&records, &mut found);
    if found.0.is_empty() {
        Ok(())
    } else {
        Err(found.0)
    }
}

/// The digest of a volume, computed from its records: what the sums that were kept up to date must be equal to.
pub fn recomputed_digest(view: &impl View, volume: VolumeId) -> Result<Sums, Corruption> {
    let mut sums = Sums::default();
    each(view, volume, |key, value| {
        sums.add(key, value);
        Ok(())
    })?;
    Ok(sums)
}

/// Contradictions found so far.
struct Found(Vec<String>);

impl Found {
    /// `holds` must be true; otherwise `what` says what is wrong.
    fn expect(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.0.push(what());
        }
    }
}

/// Everything of one volume.
#[derive(Default)]
struct Records {
    head: Option<HeadRecord>,
    settings: Option<SettingsRecord>,
    counters: CountersRecord,
    inodes: BTreeMap<Ino, InodeRecord>,
    names: BTreeMap<(Ino, Bytes), NameRecord>,
    cookies: BTreeMap<(Ino, u64), CookieRecord>,
    extents: BTreeMap<(Ino, u64), ExtentRecord>,
    symlinks: BTreeMap<Ino, Bytes>,
    xattrs: BTreeMap<(Ino, Bytes), Bytes>,
    erases: BTreeMap<Ino, EraseRecord>,
    segments: BTreeMap<SegmentId, SegmentRecord>,
    blocks: BTreeMap<u64, SegmentBlockRecord>,
    orphans: BTreeMap<Ino, OrphanRecord>,
    remove_trees: BTreeMap<(u64, Ino), RemoveTreeRecord>,
    sessions: BTreeMap<SessionId, SessionRecord>,
    replies: BTreeMap<(SessionId, u64), Bytes>,
    /// By kind and id.
    quotas: BTreeMap<(u64, u64), QuotaRecord>,
    quota_walks: BTreeMap<(Ino, Ino), QuotaWalkRecord>,
}

impl Records {
    fn read(view: &impl View, volume: VolumeId) -> Result<Self, Corruption> {
        let mut records = Self::default();
        each(view, volume, |key, value| records.take(key, value))?;
        Ok(records)
    }

    fn take(&mut self, key: &Bytes, value: &Bytes) -> Result<(), Corruption> {
        let corrupt = |why| Corruption::Record {
            key: key.to_vec(),
            why,
        };
        let tag = Tag::of(key).ok_or_else(|| corrupt("unknown tag"))?;
        let number = |index| keys::number(key, index).ok_or_else(|| corrupt("key is too short"));
        match tag {
            Tag::Head => self.head = Some(Record::decode(key, value)?),
            Tag::Settings => self.settings = Some(Record::decode(key, value)?),
            Tag::Counters => self.counters = Record::decode(key, value)?,
            Tag::Inode => put(&mut self.inodes, Ino(number(0)?), key, value)?,
            Tag::Name => {
                let name = (Ino(number(0)?), keys::name_of(key));
                put(&mut self.names, name, key, value)?;
            }
            Tag::Cookie => put(&mut self.cookies, (Ino(number(0)?), number(1)?), key, value)?,
            Tag::Extent => put(&mut self.extents, (Ino(number(0)?), number(1)?), key, value)?,
            Tag::Symlink => {
                self.symlinks.insert(Ino(number(0)?), value.clone());
            }
            Tag::Xattr => {
                let name = (Ino(number(0)?), keys::name_of(key));
                self.xattrs.insert(name, value.clone());
            }
            Tag::Erase => put(&mut self.erases, Ino(number(0)?), key, value)?,
            Tag::Segment => put(&mut self.segments, SegmentId(number(0)?), key, value)?,
            Tag::SegmentBlock => put(&mut self.blocks, number(0)?, key, value)?,
            Tag::Orphan => put(&mut self.orphans, Ino(number(0)?), key, value)?,
            Tag::RemoveTree => {
                put(
                    &mut self.remove_trees,
                    (number(0)?, Ino(number(1)?)),
                    key,
                    value,
                )?;
            }
            Tag::Session => put(&mut self.sessions, SessionId(number(0)?), key, value)?,
            Tag::Reply => {
                let request = (SessionId(number(0)?), number(1)?);
                self.replies.insert(request, value.clone());
            }
            Tag::Quota => put(&mut self.quotas, (number(0)?, number(1)?), key, value)?,
            Tag::QuotaWalk => {
                let walk = (Ino(number(0)?), Ino(number(1)?));
                put(&mut self.quota_walks, walk, key, value)?;
            }
        }
        Ok(())
    }
}

fn put<K: Ord, R: Record>(
    records: &mut BTreeMap<K, R>,
    id: K,
    key: &Bytes,
    value: &Bytes,
) -> Result<(), Corruption> {
    let record = R::decode(key, value)?;
    if record.encode() != *value {
        return Err(Corruption::Record {
            key: key.to_vec(),
            why: "not in its canonical encoding",
        });
    }
    records.insert(id, record);
    Ok(())
}

fn each(
    view: &impl View,
    volume: VolumeId,
    mut take: impl FnMut(&Bytes, &Bytes) -> Result<(), Corruption>,
) -> Result<(), Corruption> {
    const PAGE: usize = 1000;
    let (mut from, to) = keys::volume_range(volume);
    loop {
        let page = view.scan(&from, &to, PAGE)?;
        for (key, value) in &page {
            take(key, value)?;
        }
        match page.last() {
            Some((key, _)) if page.len() == PAGE => from = keys::after(key),
            _ => return Ok(()),
        }
    }
}

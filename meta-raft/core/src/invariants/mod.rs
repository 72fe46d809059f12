//! What is true of a volume after every command. For tests and for checks of volumes in use, which hold a part of the inodes and
//! segments in memory at a time.
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
use heliofs_proto::v1::QuotaKind;

use crate::change::Corruption;
use crate::digest::Sums;
use crate::keys::{self, Tag};
use crate::ops::charge::is_counted;
use crate::records::{
    CountersRecord, EraseRecord, HeadRecord, InodeRecord, OrphanRecord, QuotaRecord,
    QuotaWalkRecord, Record, RemoveTreeRecord, SegmentBlockRecord, SegmentRecord, SessionRecord,
    SettingsRecord,
};
use crate::view::View;

/// Checks a whole volume, all in memory. Errors: one sentence per contradiction.
pub fn check(view: &impl View, volume: VolumeId) -> Result<(), Vec<String>> {
    check_part(view, volume, Part::WHOLE)
}

/// Which inodes and segments are checked: those whose number leaves `index` when divided by `of`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Below `of`.
    pub index: u64,
    /// Not 0.
    pub of: u64,
}

impl Part {
    /// All of them.
    pub const WHOLE: Self = Self { index: 0, of: 1 };

    fn has(self, id: u64) -> bool {
        id % self.of == self.index
    }

    fn has_ino(self, ino: Ino) -> bool {
        self.has(ino.0)
    }

    /// What there is once per volume is checked with the first part.
    fn is_first(self) -> bool {
        self.index == 0
    }
}

/// Checks a part of a volume: all parts together find what [`check`] finds. Each goes through all records and holds those of its
/// inodes and segments, so that memory is bounded by their number. Errors: one sentence per contradiction.
pub fn check_part(view: &impl View, volume: VolumeId, part: Part) -> Result<(), Vec<String>> {
    let look = || -> Result<Vec<String>, Corruption> {
        let records = Records::read(view, volume, part)?;
        let mut found = Found(Vec::new());
        namespace::check(view, volume, &records, &mut found)?;
        attributes::check(&records, &mut found);
        content::check(view, volume, &records, &mut found)?;
        if part.is_first() {
            quotas::check(&records, &mut found);
        }
        usage::check(&records, &mut found);
        Ok(found.0)
    };
    match look() {
        Ok(found) if found.is_empty() => Ok(()),
        Ok(found) => Err(found),
        Err(damage) => Err(vec![damage.to_string()]),
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

/// What is held of one volume: of inodes and segments those of a part. Entries and extents are gone through as they are needed.
struct Records {
    part: Part,
    /// Of all parts.
    inodes_count: u64,
    segments_count: u64,
    /// What inodes of all parts add up to for quotas, by kind and id: bytes and inodes. Directories' without those around them.
    charged: BTreeMap<(u64, u64), (u64, u64)>,
    head: Option<HeadRecord>,
    settings: Option<SettingsRecord>,
    counters: CountersRecord,
    inodes: BTreeMap<Ino, InodeRecord>,
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
    fn read(view: &impl View, volume: VolumeId, part: Part) -> Result<Self, Corruption> {
        let mut records = Self {
            part,
            inodes_count: 0,
            segments_count: 0,
            charged: BTreeMap::new(),
            head: None,
            settings: None,
            counters: CountersRecord::default(),
            inodes: BTreeMap::new(),
            symlinks: BTreeMap::new(),
            xattrs: BTreeMap::new(),
            erases: BTreeMap::new(),
            segments: BTreeMap::new(),
            blocks: BTreeMap::new(),
            orphans: BTreeMap::new(),
            remove_trees: BTreeMap::new(),
            sessions: BTreeMap::new(),
            replies: BTreeMap::new(),
            quotas: BTreeMap::new(),
            quota_walks: BTreeMap::new(),
        };
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
        // Keys begin with the number of what they belong to; others are few or are taken by every part.
        let mine = |index| Ok::<_, Corruption>(self.part.has(number(index)?));
        match tag {
            Tag::Head => self.head = Some(Record::decode(key, value)?),
            Tag::Settings => self.settings = Some(Record::decode(key, value)?),
            Tag::Counters => self.counters = Record::decode(key, value)?,
            Tag::Inode => {
                self.inodes_count += 1;
                let ino = Ino(number(0)?);
                if self.part.is_first() {
                    self.charge(ino, &InodeRecord::decode(key, value)?);
                }
                if self.part.has_ino(ino) {
                    put(&mut self.inodes, ino, key, value)?;
                }
            }
            // Gone through by `namespace` and `content`.
            Tag::Name | Tag::Cookie | Tag::Extent => {}
            Tag::Symlink if mine(0)? => {
                self.symlinks.insert(Ino(number(0)?), value.clone());
            }
            Tag::Xattr if mine(0)? => {
                let name = (Ino(number(0)?), keys::name_of(key));
                self.xattrs.insert(name, value.clone());
            }
            Tag::Erase if mine(0)? => put(&mut self.erases, Ino(number(0)?), key, value)?,
            Tag::Segment => {
                self.segments_count += 1;
                if mine(0)? {
                    put(&mut self.segments, SegmentId(number(0)?), key, value)?;
                }
            }
            Tag::SegmentBlock => put(&mut self.blocks, number(0)?, key, value)?,
            Tag::Orphan if mine(0)? => put(&mut self.orphans, Ino(number(0)?), key, value)?,
            Tag::RemoveTree if mine(1)? => {
                let pending = (number(0)?, Ino(number(1)?));
                put(&mut self.remove_trees, pending, key, value)?;
            }
            Tag::Session => put(&mut self.sessions, SessionId(number(0)?), key, value)?,
            Tag::Reply if self.part.is_first() => {
                let request = (SessionId(number(0)?), number(1)?);
                self.replies.insert(request, value.clone());
            }
            Tag::Quota => put(&mut self.quotas, (number(0)?, number(1)?), key, value)?,
            Tag::QuotaWalk => {
                let walk = (Ino(number(0)?), Ino(number(1)?));
                put(&mut self.quota_walks, walk, key, value)?;
            }
            Tag::Symlink | Tag::Xattr | Tag::Erase | Tag::Orphan | Tag::RemoveTree | Tag::Reply => {
            }
        }
        Ok(())
    }

    /// Counters lie before inodes.
    fn charge(&mut self, ino: Ino, inode: &InodeRecord) {
        if inode.is_snapshot() {
            return;
        }
        let mut add = |kind: QuotaKind, id: u64| {
            let sum = self.charged.entry((kind as u64, id)).or_default();
            sum.0 += inode.allocated;
            sum.1 += 1;
        };
        if is_counted(&self.counters.quotas, ino) {
            add(QuotaKind::User, inode.uid.into());
            add(QuotaKind::Group, inode.gid.into());
        }
        if inode.quota != Ino(0) {
            add(QuotaKind::Directory, inode.quota.0);
        }
    }
}

fn put<K: Ord, R: Record>(
    records: &mut BTreeMap<K, R>,
    id: K,
    key: &Bytes,
    value: &Bytes,
) -> Result<(), Corruption> {
    records.insert(id, decode(key, value)?);
    Ok(())
}

fn decode<R: Record>(key: &Bytes, value: &Bytes) -> Result<R, Corruption> {
    let record = R::decode(key, value)?;
    if record.encode() != *value {
        return Err(Corruption::Record {
            key: key.to_vec(),
            why: "not in its canonical encoding",
        });
    }
    Ok(record)
}

/// The record under a key, if there is one.
fn get<R: Record>(view: &impl View, key: &[u8]) -> Result<Option<R>, Corruption> {
    view.get(key)?
        .map(|value| R::decode(key, &value))
        .transpose()
}

/// Number `index` of a key whose tag says that it has one.
fn number(key: &Bytes, index: usize) -> Result<u64, Corruption> {
    keys::number(key, index).ok_or_else(|| Corruption::Record {
        key: key.to_vec(),
        why: "key is too short",
    })
}

fn each(
    view: &impl View,
    volume: VolumeId,
    take: impl FnMut(&Bytes, &Bytes) -> Result<(), Corruption>,
) -> Result<(), Corruption> {
    each_in(view, keys::volume_range(volume), take)
}

/// Every record of a tag.
fn each_of(
    view: &impl View,
    volume: VolumeId,
    tag: Tag,
    take: impl FnMut(&Bytes, &Bytes) -> Result<(), Corruption>,
) -> Result<(), Corruption> {
    each_in(view, keys::tag_range(volume, tag), take)
}

fn each_in(
    view: &impl View,
    (mut from, to): (Bytes, Bytes),
    mut take: impl FnMut(&Bytes, &Bytes) -> Result<(), Corruption>,
) -> Result<(), Corruption> {
    const PAGE: usize = 1000;
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

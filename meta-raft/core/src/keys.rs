//! The layout of replicated keys: `volume (4, big endian) | tag (1) | …`, numbers big endian so that order is meaning.
//!
//! | tag | key after the tag | record |
//! |---|---|---|
//! | 0x00 | | head: position, time, epochs (not in the digest: every command changes it, and beats carry it) |
//! | 0x01 | | settings |
//! | 0x02 | | counters: next ids, usage |
//! | 0x10 | ino | inode |
//! | 0x11 | parent, name | entry by name |
//! | 0x12 | parent, cookie | entry by cookie |
//! | 0x13 | ino, offset | extent |
//! | 0x14 | ino | symlink target |
//! | 0x15 | ino, name | extended attribute |
//! | 0x16 | ino | erase: the ranges of a file whose older extents are dead and not removed yet |
//! | 0x17 | segment | segment |
//! | 0x18 | block | segment id block: which session may commit ids of it |
//! | 0x19 | ino | orphan |
//! | 0x1a | intent, ino | directory that a tree removal still has to empty |
//! | 0x1b | session | session |
//! | 0x1c | session, sequence | cached reply |
//! | 0x1d | kind, id | quota of a directory (kind 1, its inode), a user (2, uid) or a group (3, gid) |
//! | 0x1e | quota's directory, ino | directory whose entries are still to be charged anew |

use bytes::{BufMut, Bytes, BytesMut};
use heliofs_proto::ids::{Ino, SegmentId, SessionId, VolumeId};
use heliofs_proto::v1::QuotaKind;

/// What kind of record a key names; the byte after the volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
#[allow(missing_docs, reason = "the table above says what each is")]
pub enum Tag {
    Head = 0x00,
    Settings = 0x01,
    Counters = 0x02,
    Inode = 0x10,
    Name = 0x11,
    Cookie = 0x12,
    Extent = 0x13,
    Symlink = 0x14,
    Xattr = 0x15,
    Erase = 0x16,
    Segment = 0x17,
    SegmentBlock = 0x18,
    Orphan = 0x19,
    RemoveTree = 0x1a,
    Session = 0x1b,
    Reply = 0x1c,
    Quota = 0x1d,
    QuotaWalk = 0x1e,
}

impl Tag {
    /// Every tag, in key order.
    pub const ALL: [Self; 18] = [
        Self::Head,
        Self::Settings,
        Self::Counters,
        Self::Inode,
        Self::Name,
        Self::Cookie,
        Self::Extent,
        Self::Symlink,
        Self::Xattr,
        Self::Erase,
        Self::Segment,
        Self::SegmentBlock,
        Self::Orphan,
        Self::RemoveTree,
        Self::Session,
        Self::Reply,
        Self::Quota,
        Self::QuotaWalk,
    ];

    /// The tag of a key; `None` if the key is too short or the tag unknown.
    pub fn of(key: &[u8]) -> Option<Self> {
        let byte = *key.get(4)?;
        Self::ALL.into_iter().find(|tag| *tag as u8 == byte)
    }
}

fn key(volume: VolumeId, tag: Tag, rest: usize) -> BytesMut {
    let mut key = BytesMut::with_capacity(5 + rest);
    key.put_u32(volume.0);
    key.put_u8(tag as u8);
    key
}

fn numbers<const N: usize>(volume: VolumeId, tag: Tag, numbers: [u64; N]) -> Bytes {
    let mut key = key(volume, tag, 8 * N);
    for number in numbers {
        key.put_u64(number);
    }
    key.freeze()
}

fn named(volume: VolumeId, tag: Tag, ino: Ino, name: &[u8]) -> Bytes {
    let mut key = key(volume, tag, 8 + name.len());
    key.put_u64(ino.0);
    key.put_slice(name);
    key.freeze()
}

/// Key of the head.
pub fn head(volume: VolumeId) -> Bytes {
    numbers(volume, Tag::Head, [])
}

/// Key of the settings.
pub fn settings(volume: VolumeId) -> Bytes {
    numbers(volume, Tag::Settings, [])
}

/// Key of the counters.
pub fn counters(volume: VolumeId) -> Bytes {
    numbers(volume, Tag::Counters, [])
}

/// Key of an inode.
pub fn inode(volume: VolumeId, ino: Ino) -> Bytes {
    numbers(volume, Tag::Inode, [ino.0])
}

/// Key of a directory entry by its name.
pub fn name(volume: VolumeId, parent: Ino, name: &[u8]) -> Bytes {
    named(volume, Tag::Name, parent, name)
}

/// Key of a directory entry by its cookie.
pub fn cookie(volume: VolumeId, parent: Ino, cookie: u64) -> Bytes {
    numbers(volume, Tag::Cookie, [parent.0, cookie])
}

/// Key of the extent that starts at byte `offset`.
pub fn extent(volume: VolumeId, ino: Ino, offset: u64) -> Bytes {
    numbers(volume, Tag::Extent, [ino.0, offset])
}

/// Key of a symlink's target.
pub fn symlink(volume: VolumeId, ino: Ino) -> Bytes {
    numbers(volume, Tag::Symlink, [ino.0])
}

/// Key of an extended attribute.
pub fn xattr(volume: VolumeId, ino: Ino, name: &[u8]) -> Bytes {
    named(volume, Tag::Xattr, ino, name)
}

/// Key of the erased ranges of a file.
pub fn erase(volume: VolumeId, ino: Ino) -> Bytes {
    numbers(volume, Tag::Erase, [ino.0])
}

/// Key of a segment.
pub fn segment(volume: VolumeId, segment: SegmentId) -> Bytes {
    numbers(volume, Tag::Segment, [segment.0])
}

/// Key of the block that a segment id lies in.
pub fn segment_block(volume: VolumeId, segment: SegmentId) -> Bytes {
    numbers(
        volume,
        Tag::SegmentBlock,
        [segment.0 / heliofs_proto::limits::SEGMENTS_PER_BLOCK],
    )
}

/// Key of an orphan.
pub fn orphan(volume: VolumeId, ino: Ino) -> Bytes {
    numbers(volume, Tag::Orphan, [ino.0])
}

/// Key of a directory that a tree removal still has to empty.
pub fn remove_tree(volume: VolumeId, intent: u64, ino: Ino) -> Bytes {
    numbers(volume, Tag::RemoveTree, [intent, ino.0])
}

/// Key of a session.
pub fn session(volume: VolumeId, session: SessionId) -> Bytes {
    numbers(volume, Tag::Session, [session.0])
}

/// Key of a cached reply.
pub fn reply(volume: VolumeId, session: SessionId, sequence: u64) -> Bytes {
    numbers(volume, Tag::Reply, [session.0, sequence])
}

/// Key of a quota.
pub fn quota(volume: VolumeId, kind: QuotaKind, id: u64) -> Bytes {
    numbers(volume, Tag::Quota, [kind as u64, id])
}

/// Key of a directory whose entries are still to be charged anew, for the quota of `quota`.
pub fn quota_walk(volume: VolumeId, quota: Ino, ino: Ino) -> Bytes {
    numbers(volume, Tag::QuotaWalk, [quota.0, ino.0])
}

/// The half-open range of keys that start with `prefix`.
pub fn prefix_range(prefix: &[u8]) -> (Bytes, Bytes) {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            break;
        }
    }
    (Bytes::copy_from_slice(prefix), Bytes::from(end))
}

/// The half-open range of all records of one tag.
pub fn tag_range(volume: VolumeId, tag: Tag) -> (Bytes, Bytes) {
    prefix_range(&numbers(volume, tag, []))
}

/// The half-open range of all records of one tag below one number (the extents of an inode, the entries of a directory, …).
pub fn number_range(volume: VolumeId, tag: Tag, number: u64) -> (Bytes, Bytes) {
    prefix_range(&numbers(volume, tag, [number]))
}

/// The half-open range of all records of a volume.
pub fn volume_range(volume: VolumeId) -> (Bytes, Bytes) {
    prefix_range(&volume.0.to_be_bytes())
}

/// The first key after `key`.
pub fn after(key: &[u8]) -> Bytes {
    let mut next = BytesMut::with_capacity(key.len() + 1);
    next.put_slice(key);
    next.put_u8(0);
    next.freeze()
}

/// The `index`-th number after the tag; `None` if the key is too short.
pub fn number(key: &[u8], index: usize) -> Option<u64> {
    let bytes = key.get(5 + 8 * index..)?;
    Some(u64::from_be_bytes(*bytes.first_chunk()?))
}

/// The name behind the first number after the tag (entries by name, extended attributes); empty if the key is too short.
pub fn name_of(key: &Bytes) -> Bytes {
    if key.len() < 13 {
        Bytes::new()
    } else {
        key.slice(13..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_of_one_inode_sort_by_offset_and_stay_inside_their_range() {
        let volume = VolumeId(7);
        let (from, to) = number_range(volume, Tag::Extent, 5);
        let first = extent(volume, Ino(5), 0);
        let last = extent(volume, Ino(5), u64::MAX);
        assert!(from <= first && first < last && last < to);
        assert!(extent(volume, Ino(6), 0) >= to);
        assert_eq!(number(&last, 1), Some(u64::MAX));
        assert_eq!(Tag::of(&last), Some(Tag::Extent));
    }

    #[test]
    fn a_prefix_of_ff_ends_where_the_byte_before_it_rises() {
        assert_eq!(
            prefix_range(&[1, 0xff]),
            (Bytes::from_static(&[1, 0xff]), Bytes::from_static(&[2]))
        );
    }

    #[test]
    fn tags_are_unique_and_ordered() {
        assert!(Tag::ALL.is_sorted_by(|a, b| (*a as u8) < (*b as u8)));
    }
}

//! POSIX ACLs: their extended-attribute form, and how they and mode bits follow each other.
//!
//! Byte form (linux/posix_acl_xattr.h, version 2): u32 version, then 8 bytes per entry: u16 tag, u16 permissions, u32 id, all
//! little endian. Semantics: fs/posix_acl.c.

use bytes::{BufMut, Bytes, BytesMut};
use heliofs_proto::error::FsError;

/// Extended attribute of the ACL that guards an inode.
pub(crate) const ACCESS: &[u8] = b"system.posix_acl_access";
/// Extended attribute of the ACL that a directory hands to what is created in it.
pub(crate) const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
/// The id of entries that name nobody.
const ID_NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
enum Tag {
    UserObj = 0x01,
    User = 0x02,
    GroupObj = 0x04,
    Group = 0x08,
    Mask = 0x10,
    Other = 0x20,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: Tag,
    permissions: u16,
    id: u32,
}

/// A valid ACL: one entry each for owner, group and others, and a mask if anybody is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Acl(Vec<Entry>);

impl Acl {
    /// Reads and checks the bytes of an extended attribute; `None`: an empty ACL, which means "remove it".
    ///
    /// Errors: `INVALID`; `NOT_SUPPORTED` for another version.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Self>, FsError> {
        let (version, rest) = bytes.split_first_chunk::<4>().ok_or(FsError::Invalid)?;
        if u32::from_le_bytes(*version) != VERSION {
            return Err(FsError::NotSupported);
        }
        let (entries, rest) = rest.as_chunks::<8>();
        if !rest.is_empty() {
            return Err(FsError::Invalid);
        }
        let entries = entries
            .iter()
            .map(parse_entry)
            .collect::<Result<Vec<_>, _>>()?;
        if entries.is_empty() {
            return Ok(None);
        }
        check(&entries)?;
        Ok(Some(Self(entries)))
    }

    /// The bytes of the extended attribute.
    pub(crate) fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(4 + 8 * self.0.len());
        bytes.put_u32_le(VERSION);
        for entry in &self.0 {
            bytes.put_u16_le(entry.tag as u16);
            bytes.put_u16_le(entry.permissions);
            bytes.put_u32_le(entry.id);
        }
        bytes.freeze()
    }

    /// `mode` with the permission bits that this ACL means, and whether those bits say all that the ACL says
    /// (posix_acl_equiv_mode).
    pub(crate) fn mode(&self, mode: u32) -> (u32, bool) {
        let mut bits = 0;
        let mut equivalent = true;
        for entry in &self.0 {
            let permissions = u32::from(entry.permissions);
            match entry.tag {
                Tag::UserObj => bits |= permissions << 6,
                Tag::GroupObj => bits |= permissions << 3,
                Tag::Other => bits |= permissions,
                Tag::Mask => {
                    bits = (bits & !0o070) | (permissions << 3);
                    equivalent = false;
                }
                Tag::User | Tag::Group => equivalent = false,
            }
        }
        ((mode & !0o777) | bits, equivalent)
    }

    /// Makes a copy of a default ACL the access ACL of a new inode that was asked for with `mode`: both are cut down to what
    /// the other allows. Returns the inode's mode, and whether it says all that the ACL says (posix_acl_create_masq).
    pub(crate) fn create_masq(&mut self, mode: u32) -> (u32, bool) {
        // The mask stands for the group bits where there is one.
        let group = if self.has(Tag::Mask) {
            Tag::Mask
        } else {
            Tag::GroupObj
        };
        let mut bits = mode & 0o777;
        for entry in &mut self.0 {
            let shift = match entry.tag {
                Tag::UserObj => 6,
                Tag::Other => 0,
                tag if tag == group => 3,
                _ => continue,
            };
            entry.permissions &= (bits >> shift) as u16 & 7;
            bits &= (u32::from(entry.permissions) << shift) | !(7 << shift);
        }
        // A valid ACL without a mask names nobody.
        ((mode & !0o777) | bits, group == Tag::GroupObj)
    }

    /// Lets an access ACL follow a chmod (posix_acl_chmod_masq).
    pub(crate) fn chmod_masq(&mut self, mode: u32) {
        let group = if self.has(Tag::Mask) {
            Tag::Mask
        } else {
            Tag::GroupObj
        };
        for entry in &mut self.0 {
            let shift = match entry.tag {
                Tag::UserObj => 6,
                Tag::Other => 0,
                tag if tag == group => 3,
                _ => continue,
            };
            entry.permissions = (mode >> shift) as u16 & 7;
        }
    }

    fn has(&self, tag: Tag) -> bool {
        self.0.iter().any(|entry| entry.tag == tag)
    }
}

fn parse_entry(bytes: &[u8; 8]) -> Result<Entry, FsError> {
    let [t0, t1, p0, p1, id @ ..] = *bytes;
    let tag = match u16::from_le_bytes([t0, t1]) {
        0x01 => Tag::UserObj,
        0x02 => Tag::User,
        0x04 => Tag::GroupObj,
        0x08 => Tag::Group,
        0x10 => Tag::Mask,
        0x20 => Tag::Other,
        _ => return Err(FsError::Invalid),
    };
    let permissions = u16::from_le_bytes([p0, p1]);
    if permissions & !7 != 0 {
        return Err(FsError::Invalid);
    }
    // Ids of entries that name nobody are meaningless; one form of them keeps equal ACLs equal in bytes.
    let id = match tag {
        Tag::User | Tag::Group => u32::from_le_bytes(id),
        _ => ID_NONE,
    };
    if matches!(tag, Tag::User | Tag::Group) && id == ID_NONE {
        return Err(FsError::Invalid);
    }
    Ok(Entry {
        tag,
        permissions,
        id,
    })
}

/// As posix_acl_valid: owner, named users, group, named groups, mask, others, in this order.
fn check(entries: &[Entry]) -> Result<(), FsError> {
    let count = |tag| entries.iter().filter(|entry| entry.tag == tag).count();
    let named = count(Tag::User) + count(Tag::Group) > 0;
    let valid = entries.is_sorted_by_key(|entry| entry.tag)
        && count(Tag::UserObj) == 1
        && count(Tag::GroupObj) == 1
        && count(Tag::Other) == 1
        && count(Tag::Mask) <= 1
        && (!named || count(Tag::Mask) == 1);
    if valid { Ok(()) } else { Err(FsError::Invalid) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(Tag, u16, u32)]) -> Acl {
        let entries = entries.iter().map(|&(tag, permissions, id)| Entry {
            tag,
            permissions,
            id,
        });
        Acl(entries.collect())
    }

    fn named() -> Acl {
        acl(&[
            (Tag::UserObj, 7, ID_NONE),
            (Tag::User, 6, 1000),
            (Tag::GroupObj, 5, ID_NONE),
            (Tag::Mask, 7, ID_NONE),
            (Tag::Other, 1, ID_NONE),
        ])
    }

    fn minimal() -> Acl {
        acl(&[
            (Tag::UserObj, 7, ID_NONE),
            (Tag::GroupObj, 5, ID_NONE),
            (Tag::Other, 1, ID_NONE),
        ])
    }

    #[test]
    fn an_acl_reads_back() {
        for acl in [named(), minimal()] {
            assert_eq!(Acl::parse(&acl.encode()), Ok(Some(acl)));
        }
        assert_eq!(Acl::parse(&VERSION.to_le_bytes()), Ok(None));
    }

    #[test]
    fn what_is_no_acl_is_refused() {
        let mut without_mask = named();
        without_mask.0.remove(3);
        let mut out_of_order = named();
        out_of_order.0.swap(0, 2);
        let mut without_other = minimal();
        without_other.0.pop();
        let mut twice = minimal();
        twice.0.insert(0, twice.0[0]);
        let mut too_many_bits = minimal();
        too_many_bits.0[0].permissions = 8;
        let mut nobody_named = named();
        nobody_named.0[1].id = ID_NONE;
        for acl in [
            without_mask,
            out_of_order,
            without_other,
            twice,
            too_many_bits,
            nobody_named,
        ] {
            assert_eq!(Acl::parse(&acl.encode()), Err(FsError::Invalid), "{acl:?}");
        }
        assert_eq!(Acl::parse(b""), Err(FsError::Invalid));
        assert_eq!(Acl::parse(&[1, 0, 0, 0]), Err(FsError::NotSupported));
        assert_eq!(Acl::parse(&[2, 0, 0, 0, 1]), Err(FsError::Invalid));
    }

    #[test]
    fn the_mode_shows_the_mask_where_there_is_one() {
        assert_eq!(minimal().mode(0o4000), (0o4751, true));
        assert_eq!(named().mode(0o777), (0o771, false));
    }

    #[test]
    fn a_new_inode_gets_what_both_its_mode_and_the_default_acl_allow() {
        let mut acl = named();
        assert_eq!(acl.create_masq(0o2640), (0o2640, false));
        assert_eq!(
            acl.0.iter().map(|e| e.permissions).collect::<Vec<_>>(),
            [6, 6, 5, 4, 0]
        );
        let mut acl = minimal();
        assert_eq!(acl.create_masq(0o666), (0o640, true));
        assert_eq!(
            acl.0.iter().map(|e| e.permissions).collect::<Vec<_>>(),
            [6, 4, 0]
        );
    }

    #[test]
    fn chmod_changes_the_mask_and_not_the_group() {
        let mut acl = named();
        acl.chmod_masq(0o604);
        assert_eq!(
            acl.0.iter().map(|e| e.permissions).collect::<Vec<_>>(),
            [6, 6, 5, 0, 4]
        );
        let mut acl = minimal();
        acl.chmod_masq(0o123);
        assert_eq!(acl.mode(0), (0o123, true));
    }
}

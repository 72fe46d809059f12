//! Symlink targets and extended attributes belong to inodes that know of them.

use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{AttrFlag, FileKind};

use super::{Found, Records};
use crate::limits::{XATTR_BYTES_PER_INODE_MAX, XATTRS_PER_INODE_MAX};
use crate::ops::posix_acl::{self, Acl};
use crate::ops::privileges::CAPABILITY;

pub(super) fn check(records: &Records, found: &mut Found) {
    for (ino, inode) in &records.inodes {
        found.expect(inode.mode & !0o7777 == 0, || {
            format!("inode {ino} has mode {:o}", inode.mode)
        });
        let target = records.symlinks.get(ino);
        let fits = match inode.kind {
            FileKind::Symlink => target.is_some_and(|target| target.len() as u64 == inode.size),
            _ => target.is_none(),
        };
        found.expect(fits, || {
            format!("the symlink target of {ino} is missing, too much or long")
        });

        let mut flags = 0;
        let (mut count, mut bytes) = (0, 0);
        for ((_, name), value) in records
            .xattrs
            .range((*ino, bytes::Bytes::new())..)
            .take_while(|((of, _), _)| of == ino)
        {
            count += 1;
            bytes += name.len() + value.len();
            flags |= AttrFlag::Xattr as u32;
            let acl = [posix_acl::ACCESS, posix_acl::DEFAULT].contains(&&name[..]);
            if acl {
                flags |= AttrFlag::Acl as u32;
                check_acl(found, *ino, inode.mode, name, value);
            }
            if name == CAPABILITY {
                flags |= AttrFlag::Capability as u32;
            }
        }
        found.expect(inode.flags == flags, || {
            format!(
                "inode {ino} has flags {}, its attributes mean {flags}",
                inode.flags
            )
        });
        found.expect(
            count <= XATTRS_PER_INODE_MAX && bytes <= XATTR_BYTES_PER_INODE_MAX,
            || format!("inode {ino} has {count} attributes of {bytes} bytes"),
        );
    }
    let owners = records
        .symlinks
        .keys()
        .chain(records.xattrs.keys().map(|(ino, _)| ino));
    for ino in owners {
        found.expect(records.inodes.contains_key(ino), || {
            format!("{ino} has a symlink target or attributes and does not exist")
        });
    }
}

/// A stored access ACL says more than the mode, and the same where both speak.
fn check_acl(found: &mut Found, ino: Ino, mode: u32, name: &[u8], value: &[u8]) {
    let Ok(Some(acl)) = Acl::parse(value) else {
        found.expect(false, || format!("an ACL of {ino} is invalid"));
        return;
    };
    if name == posix_acl::ACCESS {
        let (means, equivalent) = acl.mode(mode);
        found.expect(means == mode && !equivalent, || {
            format!("the access ACL of {ino} means {means:o}, its mode is {mode:o}")
        });
    }
}

//! Extended attributes and POSIX ACLs.

use bytes::Bytes;
use heliofs_proto::ids::Ino;
use heliofs_proto::limits::{XATTR_NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX};
use heliofs_proto::v1;
use heliofs_proto::v1::AttrFlag;
use heliofs_proto::v1::command::Op;

use super::{Caller, Fs};
use crate::errno::{Errno, FsResult};

const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
const CAPABILITY: &[u8] = b"security.capability";

/// Flags of setxattr.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SetXattrHow {
    /// XATTR_CREATE
    pub create_only: bool,
    /// XATTR_REPLACE
    pub replace_only: bool,
    /// An access ACL clears setgid, as chmod by somebody outside of the group does.
    pub kill_setgid: bool,
}

/// Whether attributes with these flags can have the extended attribute `name`. The kernel asks for capabilities and ACLs at
/// every other operation, so that an answer without a round trip matters.
fn may_have(flags: u32, name: &[u8]) -> bool {
    let flag = match name {
        ACL_ACCESS | ACL_DEFAULT => AttrFlag::Acl,
        CAPABILITY => AttrFlag::Capability,
        _ => AttrFlag::Xattr,
    };
    flags & flag as u32 != 0
}

impl Fs {
    /// The value of an extended attribute. `NODATA` if it isn't set.
    pub async fn get_xattr(&self, ino: u64, name: &[u8]) -> FsResult<Bytes> {
        if name.len() > XATTR_NAME_BYTES_MAX {
            return Err(Errno::RANGE);
        }
        let attr = self.get_attr(ino).await?.attr;
        if !may_have(attr.flags, name) {
            return Err(Errno::NODATA);
        }
        let cache = &self.coherence.cache;
        if self.trusted()
            && let Some(value) = cache.xattr(ino, name)
        {
            return value.ok_or(Errno::NODATA);
        }
        self.settled(&[ino]).await?;
        let generation = cache.generation();
        let name = Bytes::copy_from_slice(name);
        let (value, at) = self.session().try_get_xattr(Ino(ino), name.clone()).await?;
        cache.put_xattr(generation, ino, &name, value.clone(), at);
        value.ok_or(Errno::NODATA)
    }

    /// The names of an inode's extended attributes, each ended by a zero byte.
    pub async fn list_xattr(&self, ino: u64) -> FsResult<Bytes> {
        let attr = self.get_attr(ino).await?.attr;
        if attr.flags == 0 {
            return Ok(Bytes::new());
        }
        self.settled(&[ino]).await?;
        let (names, _) = self.session().list_xattr(Ino(ino)).await?;
        let mut list = Vec::new();
        for name in names {
            list.extend_from_slice(&name);
            list.push(0);
        }
        Ok(list.into())
    }

    /// Sets an extended attribute.
    pub async fn set_xattr(
        &self,
        ino: u64,
        name: &[u8],
        value: Bytes,
        how: SetXattrHow,
        caller: Caller,
    ) -> FsResult<()> {
        if name.len() > XATTR_NAME_BYTES_MAX {
            return Err(Errno::RANGE);
        }
        if value.len() > XATTR_VALUE_BYTES_MAX {
            return Err(heliofs_proto::error::FsError::TooBig.into());
        }
        let op = Op::SetXattr(v1::SetXattr {
            ino,
            name: Bytes::copy_from_slice(name),
            value,
            create_only: how.create_only,
            replace_only: how.replace_only,
            kill_setgid: how.kill_setgid,
        });
        let changed = self.mutate(caller, op).await?;
        self.coherence.cache.xattrs_changed(ino, changed.at);
        Ok(())
    }

    /// Removes an extended attribute. `NODATA` if it isn't set.
    pub async fn remove_xattr(&self, ino: u64, name: &[u8], caller: Caller) -> FsResult<()> {
        let op = Op::RemoveXattr(v1::RemoveXattr {
            ino,
            name: Bytes::copy_from_slice(name),
        });
        let changed = self.mutate(caller, op).await?;
        self.coherence.cache.xattrs_changed(ino, changed.at);
        Ok(())
    }

    /// Whether setting an access ACL by `caller` must clear setgid: the file has it, and the caller is neither privileged nor
    /// in its group. Source: posix_acl_update_mode in fs/posix_acl.c.
    pub async fn acl_kills_setgid(&self, ino: u64, name: &[u8], caller: Caller) -> FsResult<bool> {
        if name != ACL_ACCESS || caller.uid == 0 {
            return Ok(false);
        }
        let attr = self.get_attr(ino).await?.attr;
        Ok(attr.mode & 0o2000 != 0
            && attr.gid != caller.gid
            && !supplementary_groups(caller.pid).contains(&attr.gid))
    }
}

/// The groups of a thread, as /proc tells; empty when it can't be known (then the caller counts as outside of the group).
fn supplementary_groups(pid: u32) -> Vec<u32> {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else {
        return Vec::new();
    };
    let line = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    line.unwrap_or_default()
        .split_whitespace()
        .filter_map(|group| group.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_answer_for_absent_attributes() {
        assert!(!may_have(0, b"user.a"));
        assert!(!may_have(AttrFlag::Xattr as u32, CAPABILITY));
        assert!(!may_have(AttrFlag::Xattr as u32, ACL_ACCESS));
        assert!(may_have(AttrFlag::Xattr as u32, b"user.a"));
        assert!(may_have(AttrFlag::Acl as u32, ACL_DEFAULT));
    }

    #[test]
    fn the_groups_of_this_thread_are_found() {
        assert!(supplementary_groups(std::process::id()).len() < 1 << 16);
        assert!(supplementary_groups(u32::MAX).is_empty());
    }
}

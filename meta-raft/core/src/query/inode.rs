//! One inode: attributes, symlink target, extended attributes.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, VolumeId};
use heliofs_proto::v1::{self, AttrFlag, FileKind};

use super::{QueryError, inode_record};
use crate::change::Corruption;
use crate::keys::{self, Tag};
use crate::limits;
use crate::view::View;

/// Attributes. Errors: `STALE`.
pub fn get_attr(view: &impl View, volume: VolumeId, ino: Ino) -> Result<v1::Attr, QueryError> {
    Ok(inode_record(view, volume, ino)?.attr(ino))
}

/// The target of a symlink. Errors: `STALE`; `INVALID` if it is no symlink.
pub fn read_link(view: &impl View, volume: VolumeId, ino: Ino) -> Result<Bytes, QueryError> {
    let inode = inode_record(view, volume, ino)?;
    if inode.kind != FileKind::Symlink {
        return Err(FsError::Invalid.into());
    }
    let target = view.get(&keys::symlink(volume, ino))?;
    target.ok_or_else(|| {
        let what = format!("volume {volume}: symlink {ino} has no target");
        Corruption::Contradiction(what).into()
    })
}

/// The value of an extended attribute. Errors: `STALE`; `NO_ATTRIBUTE`.
pub fn get_xattr(
    view: &impl View,
    volume: VolumeId,
    ino: Ino,
    name: &[u8],
) -> Result<Bytes, QueryError> {
    let inode = inode_record(view, volume, ino)?;
    if !inode.has(AttrFlag::Xattr) {
        return Err(FsError::NoAttribute.into());
    }
    let value = view.get(&keys::xattr(volume, ino, name))?;
    value.ok_or(QueryError::Refused(FsError::NoAttribute))
}

/// The names of all extended attributes, ascending; at most 64 KiB of them. Errors: `STALE`.
pub fn list_xattr(
    view: &impl View,
    volume: VolumeId,
    ino: Ino,
) -> Result<v1::NameList, QueryError> {
    let inode = inode_record(view, volume, ino)?;
    if !inode.has(AttrFlag::Xattr) {
        return Ok(v1::NameList::default());
    }
    let (from, to) = keys::number_range(volume, Tag::Xattr, ino.0);
    let records = view.scan(&from, &to, limits::XATTRS_PER_INODE_MAX)?;
    Ok(v1::NameList {
        names: records.iter().map(|(key, _)| keys::name_of(key)).collect(),
    })
}

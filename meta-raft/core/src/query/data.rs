//! File content: which extents hold a range.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, VolumeId};
use heliofs_proto::v1::{self, FileKind};

use super::{PAGE_MAX, QueryError, inode_record};
use crate::ops::extents;
use crate::view::View;

/// Extents that intersect `[offset, offset + length)`, whole as they are stored, the first `extents_max` of them (and at most
/// [`PAGE_MAX`]), with the file's attributes.
///
/// Errors: `STALE`; `IS_DIRECTORY`; `INVALID` for anything else without content.
pub fn get_extents(
    view: &impl View,
    volume: VolumeId,
    ino: Ino,
    offset: u64,
    length: u64,
    extents_max: u32,
) -> Result<v1::ExtentPage, QueryError> {
    let inode = inode_record(view, volume, ino)?;
    match inode.kind {
        FileKind::File => {}
        FileKind::Directory => return Err(FsError::IsDirectory.into()),
        _ => return Err(FsError::Invalid.into()),
    }
    let max = (extents_max as usize).min(PAGE_MAX);
    let page = extents::live_extents(view, volume, ino, &inode, offset, length, max)?;
    Ok(v1::ExtentPage {
        extents: page
            .extents
            .into_iter()
            .map(|(offset, extent)| extent.extent(offset))
            .collect(),
        complete_to: page.complete_to,
        attr: Some(inode.attr(ino)),
        ..v1::ExtentPage::default()
    })
}

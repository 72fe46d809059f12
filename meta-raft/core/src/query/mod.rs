//! Reads: what clients and drivers ask without changing anything. Every answer is bounded.
//!
//! - [`volume`]: head, settings, usage, sessions, segments
//! - [`inode`]: attributes, symlinks, extended attributes
//! - [`dir`]: lookups, listings, walks, children for summaries
//! - [`segments`]: for gc, fsck and compaction
//! - [`data`]: which extents hold a range of a file
//! - [`quota`]: quotas, and the room that they leave
//! - [`work`]: what drivers still have to finish

pub mod data;
pub mod dir;
pub mod inode;
pub mod quota;
pub mod segments;
pub mod volume;
pub mod work;

pub use data::get_extents;
pub use dir::{Child, children, lookup, read_dir, walk};
pub use inode::{get_attr, get_xattr, list_xattr, read_link};
pub use quota::{quota_room, quotas};
pub use segments::{Claim, Placed, claim, extents_of, segments};
pub use volume::{counters, head, segment, sessions, settings, stat_fs};
pub use work::{Intent, erases, intents, orphans, quota_walks};

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, VolumeId};

use crate::change::Corruption;
use crate::keys;
use crate::records::{InodeRecord, Record};
use crate::view::View;

/// Why a query has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// A verdict for the caller.
    #[error("refused: {0:?}")]
    Refused(FsError),
    /// The records are damaged: the node must stop.
    #[error(transparent)]
    Corrupt(#[from] Corruption),
}

impl From<FsError> for QueryError {
    fn from(error: FsError) -> Self {
        Self::Refused(error)
    }
}

/// Most entries, names or ids in one answer, whatever the caller asks for.
pub const PAGE_MAX: usize = 4096;

fn get<R: Record>(view: &impl View, key: &[u8]) -> Result<Option<R>, Corruption> {
    view.get(key)?
        .map(|value| R::decode(key, &value))
        .transpose()
}

/// The inode, or `STALE`.
fn inode_record(view: &impl View, volume: VolumeId, ino: Ino) -> Result<InodeRecord, QueryError> {
    get(view, &keys::inode(volume, ino))?.ok_or(QueryError::Refused(FsError::Stale))
}

/// The inode of a directory: `STALE` if it is gone, `NOT_DIRECTORY` if it is none.
fn directory(view: &impl View, volume: VolumeId, ino: Ino) -> Result<InodeRecord, QueryError> {
    let inode = inode_record(view, volume, ino)?;
    if inode.is_directory() {
        Ok(inode)
    } else {
        Err(FsError::NotDirectory.into())
    }
}

/// The inode that a record names: its absence is a contradiction.
fn named_inode(view: &impl View, volume: VolumeId, ino: Ino) -> Result<InodeRecord, Corruption> {
    get(view, &keys::inode(volume, ino))?.ok_or_else(|| {
        Corruption::Contradiction(format!(
            "volume {volume}: a record names inode {ino}, which does not exist"
        ))
    })
}

/// A number of a key that a scan returned.
fn key_number(key: &[u8], index: usize) -> Result<u64, Corruption> {
    keys::number(key, index).ok_or_else(|| Corruption::Record {
        key: key.to_vec(),
        why: "key is too short",
    })
}

//! Stored forms. Each record opens with a version byte; a new form is a new version beside the old one, written only from the
//! core level on that introduces it.

mod dentry;
mod extent;
mod inode;
mod intent;
mod quota;
mod segment;
mod session;
mod volume;

pub use dentry::{CookieRecord, NameRecord};
pub use extent::{ExtentData, ExtentRecord};
pub use inode::{InodeRecord, SNAPSHOT};
pub use intent::{EraseRecord, ErasedRange, OrphanRecord, RemoveTreeRecord};
pub use quota::{QuotaRecord, QuotaState, QuotaWalkRecord};
pub use segment::{SegmentBlockRecord, SegmentRecord};
pub use session::SessionRecord;
pub use volume::{Accounting, CountersRecord, HeadRecord, QuotaCounters, SettingsRecord};

use bytes::Bytes;

use crate::change::Corruption;

/// A value that lies under a key.
pub trait Record: Sized {
    /// The canonical bytes.
    fn encode(&self) -> Bytes;
    /// Reads the bytes back; the key is for the error.
    fn decode(key: &[u8], value: &Bytes) -> Result<Self, Corruption>;
}

/// The file kind of a stored byte.
fn kind(
    reader: &crate::codec::Reader<'_>,
    byte: u8,
) -> Result<heliofs_proto::v1::FileKind, Corruption> {
    use heliofs_proto::v1::FileKind;
    match FileKind::try_from(i32::from(byte)) {
        Ok(FileKind::Unspecified) | Err(_) => Err(reader.corrupt("unknown file kind")),
        Ok(kind) => Ok(kind),
    }
}

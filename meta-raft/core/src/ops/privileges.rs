//! Privileges that writing and giving away a file take from it: setuid, setgid, file capabilities.

use heliofs_proto::ids::Ino;
use heliofs_proto::v1::AttrFlag;

use super::xattr;
use crate::change::Corruption;
use crate::records::InodeRecord;
use crate::txn::Txn;
use crate::view::View;

const SETUID: u32 = 0o4000;
pub(crate) const SETGID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o010;

/// Extended attribute that holds a file's capabilities.
pub(crate) const CAPABILITY: &[u8] = b"security.capability";

/// Clears setuid, and setgid if the group may execute: without that it marks a file for mandatory locking, not a privilege
/// (setattr_should_drop_suidgid in fs/attr.c). Directories keep theirs: there setgid means inheritance.
pub(crate) fn kill_suidgid(inode: &mut InodeRecord) {
    if inode.is_directory() {
        return;
    }
    inode.mode &= !SETUID;
    if inode.mode & GROUP_EXECUTE != 0 {
        inode.mode &= !SETGID;
    }
}

/// Removes file capabilities, as every write, truncation and chown does, root's too (security_inode_killpriv). The caller
/// writes the inode.
pub(crate) fn drop_capability<V: View>(
    txn: &mut Txn<V>,
    ino: Ino,
    inode: &mut InodeRecord,
) -> Result<(), Corruption> {
    if inode.has(AttrFlag::Capability) {
        xattr::erase(txn, ino, inode, CAPABILITY)?;
    }
    Ok(())
}

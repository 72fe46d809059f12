//! Bounds of the state machine. DESIGN.md §3.3: a command changes at most 1,000 records.

use std::sync::atomic::{AtomicU32, Ordering};

/// The highest behaviour that this build can apply. A volume's `core_level` is raised only by a logged command.
pub const CORE_LEVEL_MAX: u32 = 5;

/// What [`core_level_known`] answers.
static KNOWN: AtomicU32 = AtomicU32::new(CORE_LEVEL_MAX);

/// The highest level that this process applies: [`CORE_LEVEL_MAX`], unless it pretends to be an older build.
pub fn core_level_known() -> u32 {
    KNOWN.load(Ordering::Relaxed)
}

/// For tests of rolling upgrades, before anything is applied: this process takes itself for a build that knows levels up to
/// `level` only, and stops where such a build would.
pub fn pretend_core_level(level: u32) {
    KNOWN.store(level.min(CORE_LEVEL_MAX), Ordering::Relaxed);
}

/// From this level on there are quotas and snapshots.
pub const CORE_LEVEL_QUOTAS: u32 = 2;

/// From this level on a commit can depend on what the file's content is.
pub const CORE_LEVEL_CONDITIONS: u32 = 3;

/// From this level on a command that overwrites is measured by what it leaves, also where what it overwrites is removed later;
/// and chains of quotas are bounded from below, too.
pub const CORE_LEVEL_GROWTH: u32 = 4;

/// From this level on sessions reserve inode numbers, and commands may be batches of changes that were answered before.
pub const CORE_LEVEL_BATCHES: u32 = 5;

/// Changes of one `Batch`; a rename over something changes some ten records, a create in the place of another fewer.
pub const CHANGES_PER_BATCH_MAX: usize = 64;

/// By how much a change's time may be before the volume's, nanoseconds: 10 minutes. A mount does not wait that long for a leader.
pub const CHANGE_AGE_MAX: i64 = 600 * 1_000_000_000;

/// By how much the volume's time follows a change's past the proposer's clock, nanoseconds: 1 s.
pub const CHANGE_AHEAD_MAX: i64 = 1_000_000_000;

/// Inode numbers that one `InosReserve` gives out.
pub const INOS_PER_RESERVATION_MAX: u32 = 65_536;

/// Ranges of reserved inode numbers that a session has; one more makes it lose the oldest.
pub const INO_RANGES_MAX: usize = 4;

/// Inodes that a volume must have left beside a hundredth of its limit for changes to be answered before they are proposed.
pub const INODES_SPARE: u64 = 10_000;

/// Extents that one command removes in place; more become an erase record that `EraseStep` works off. Each removal touches the
/// extent and perhaps its segment's record, so that twice this number stays well below 1,000.
pub const EXTENTS_PER_COMMAND_MAX: usize = 300;

/// Extents that one `EraseStep` or `Reap` removes.
pub const EXTENTS_PER_STEP: usize = 300;

/// Directory entries that one `RemoveTreeStep` removes; an entry is about five records.
pub const ENTRIES_PER_STEP: usize = 100;

/// Directory entries that one `QuotaStep` looks at; each may change an inode, a record of the walk and an enclosed quota.
pub const QUOTA_ENTRIES_PER_STEP: usize = 200;

/// Inodes that one `QuotaStep` counts for their owners; each may be of another user and another group.
pub const QUOTA_INODES_PER_STEP: usize = 400;

/// Quotas of users and groups that one `QuotaStep` forgets.
pub const QUOTAS_CLEARED_PER_STEP: usize = 900;

/// Quotas of directories that may lie in each other. What a command charges is charged to all of them, so that each file of a
/// commit may change this many records more (mostly of the same directories).
pub const QUOTA_DEPTH_MAX: usize = 16;

/// Extents, of those that a command overwrites and leaves to `EraseStep`, that are looked at to learn how much it will give back: 96
/// full segments in pieces of 4 KiB. What more there is counts as if it stayed.
pub const EXTENTS_WEIGHED_MAX: usize = 131_072;

/// Extents that one `CopyRange` copies; each may touch an extent, a segment record and a replaced extent.
pub const EXTENTS_PER_COPY: usize = 200;

/// Moves of one `Relocate`; each may change records of two segments.
pub const MOVES_PER_RELOCATE: usize = 128;

/// Extents that one `Relocate` changes; each may leave a part on both sides. With the segments' records below 1,000.
pub const PARTS_PER_RELOCATE: usize = 200;

/// Directories above one that are looked at to learn whether it lies in the trash; what is deeper down counts as outside.
pub const TRASH_DEPTH_MAX: usize = 4096;

/// Repeated requests whose cached replies one command drops: the window of a session, twice over.
pub const REPLIES_PER_COMMAND_MAX: u64 = 2 * heliofs_proto::limits::IN_FLIGHT_MAX as u64;

/// Extended attributes of one inode: so many that removing an inode with all of them stays well below 1,000 records.
pub const XATTRS_PER_INODE_MAX: usize = 400;

/// Bytes of names and values of one inode's attributes: a change carries the old value, so this bounds the memory of removing
/// them all in one command. Far above what other Linux file systems hold per inode.
pub const XATTR_BYTES_PER_INODE_MAX: usize = 1 << 20;

/// Cached replies that one `SessionEnd` drops: the whole window of a well-behaved client; a rest is left to a repeated `SessionEnd`.
pub const REPLIES_PER_SESSION_END: usize = 500;

/// Erased ranges of one file that wait to be worked off; an erasure that would leave more is refused with `BUSY`. All of them
/// lie in one record, which each erasure and each step rewrites: 4,096 are about 100 KiB. Reaching it takes 32 full commits,
/// each of 128 ranges that hold hundreds of extents, with no step in between.
pub const ERASED_RANGES_MAX: usize = 4096;

/// Records that a command may have set when it still removes extents in place; leaves room to 1,000 for inodes, replies, counters.
pub const IN_PLACE_RECORDS_MAX: usize = 900;

/// Stored extents that one read or step looks at, live or dead, before it answers with what it has.
pub const EXTENTS_EXAMINED_MAX: usize = 16384;

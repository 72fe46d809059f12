//! Bounds of the state machine. DESIGN.md §3.3: a command changes at most 1,000 records.

/// The highest behaviour that this build can apply. A volume's `core_level` is raised only by a logged command.
pub const CORE_LEVEL_MAX: u32 = 1;

/// Extents that one command removes in place; more become an erase record that `EraseStep` works off. Each removal touches the
/// extent and perhaps its segment's record, so that twice this number stays well below 1,000.
pub const EXTENTS_PER_COMMAND_MAX: usize = 300;

/// Extents that one `EraseStep` or `Reap` removes.
pub const EXTENTS_PER_STEP: usize = 300;

/// Directory entries that one `RemoveTreeStep` removes; an entry is about five records.
pub const ENTRIES_PER_STEP: usize = 100;

/// Extents that one `CopyRange` copies; each may touch an extent, a segment record and a replaced extent.
pub const EXTENTS_PER_COPY: usize = 200;

/// Repeated requests whose cached replies one command drops: the window of a session, twice over.
pub const REPLIES_PER_COMMAND_MAX: u64 = 2 * heliofs_proto::limits::IN_FLIGHT_MAX as u64;

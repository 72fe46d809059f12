//! What items of the log ask of the build that applies them.
//!
//! A volume's `core_level` says it of commands, and is raised by an operator. What changes the cluster's local records has no
//! such switch: each item says what it needs, and a node that does not know that stops instead of going its own way.

use heliofs_proto::v1::{local_command::Op, log_item::Item};
use meta_core::limits::{CORE_LEVEL_MAX, core_level_known};

/// Copies of mirrored volumes are loaded beside what is served.
const LOADS_BESIDE: u32 = 1;

/// The highest level that this process applies: whoever pretends to be of an earlier release is of one that knew none.
pub(crate) fn known() -> u32 {
    match core_level_known() == CORE_LEVEL_MAX {
        true => LOADS_BESIDE,
        false => 0,
    }
}

/// What a node must know to apply this as the proposer does.
pub(crate) fn of(item: &Item) -> u32 {
    let Item::Local(command) = item else {
        return 0;
    };
    let needed = match &command.op {
        Some(Op::MirrorLoadBegin(_) | Op::MirrorLoad(_) | Op::MirrorLoadEnd(_)) => LOADS_BESIDE,
        _ => 0,
    };
    needed.min(known())
}

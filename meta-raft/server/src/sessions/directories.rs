//! What a command has to wait for where others hold write leases of directories: what they have answered comes first.

use std::sync::Arc;

use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{self, command::Op};
use meta_core::query::{self, QueryError};
use meta_core::{Corruption, View};

use super::Context;
use super::hub::VolumeSessions;

/// The directories whose names a command changes in such a way that a directory may go or move. Empty: none.
pub(super) fn removes(command: &v1::Command) -> Vec<u64> {
    match &command.op {
        Some(Op::Unlink(op)) if op.directory => vec![op.parent],
        Some(Op::Rename(op)) => vec![op.parent, op.new_parent],
        Some(Op::RemoveTree(op)) => vec![op.parent],
        _ => Vec::new(),
    }
}

/// Whether the command concerns directories that it does not name: all of them are recalled, and none is leased before it is
/// applied.
pub(super) fn needs_all(command: &v1::Command) -> bool {
    matches!(command.op, Some(Op::RemoveTree(_) | Op::QuotaSet(_)))
}

/// As long as it lives no leases of directories are granted.
pub(super) struct Halt(Arc<VolumeSessions>);

impl Halt {
    pub(super) fn begin(volume: &Arc<VolumeSessions>) -> Self {
        volume.soft().begin_halt();
        Self(Arc::clone(volume))
    }
}

impl Drop for Halt {
    fn drop(&mut self) {
        self.0.soft().end_halt();
    }
}

/// Recalls what others hold of directories that the command names, and waits until it is returned. What it names by a name is
/// looked up once the directory of that name is nobody's; see [`super::soft::Soft::begin_removal`] for what comes after.
pub(super) async fn make_way(
    ctx: &Context,
    volume: &VolumeSessions,
    session: u64,
    command: &v1::Command,
) -> Result<(), Corruption> {
    if volume.soft().no_directories_against(session) {
        return Ok(());
    }
    if needs_all(command) {
        // Whatever lies below.
        let recalled = volume.soft().recall_directories(session);
        for returned in recalled {
            // An error is how the wait ends.
            returned.await.ok();
        }
        return Ok(());
    }
    for ino in named(command) {
        recall(volume, session, ino).await;
    }
    let by_name = by_name(command);
    if by_name.is_empty() {
        return Ok(());
    }
    let found: Vec<u64> = ctx.state.snapshot_view(|view| {
        let inos = by_name.iter();
        let inos = inos.map(|(parent, name)| look_up(view, volume, *parent, name));
        inos.collect::<Result<_, Corruption>>()
    })?;
    for ino in found {
        recall(volume, session, ino).await;
    }
    Ok(())
}

async fn recall(volume: &VolumeSessions, session: u64, ino: u64) {
    let returned = volume.soft().recall(session, ino);
    if let Some(returned) = returned {
        // An error is how the wait ends.
        returned.await.ok();
    }
}

/// 0: there is no such name.
fn look_up(
    view: &impl View,
    volume: &VolumeSessions,
    parent: u64,
    name: &[u8],
) -> Result<u64, Corruption> {
    match query::lookup(view, volume.id, Ino(parent), name) {
        Ok(attr) => Ok(attr.ino),
        Err(QueryError::Refused(_)) => Ok(0),
        Err(QueryError::Corrupt(corruption)) => Err(corruption),
    }
}

/// Inodes that the command names and that may be directories.
fn named(command: &v1::Command) -> Vec<u64> {
    match &command.op {
        Some(Op::Create(op)) => vec![op.parent],
        Some(Op::Link(op)) => vec![op.parent],
        Some(Op::Unlink(op)) => vec![op.parent],
        Some(Op::Rename(op)) => vec![op.parent, op.new_parent],
        Some(Op::SetAttr(op)) => vec![op.ino],
        Some(Op::SetXattr(op)) => vec![op.ino],
        Some(Op::RemoveXattr(op)) => vec![op.ino],
        _ => Vec::new(),
    }
}

/// Directories that it names by their names.
fn by_name(command: &v1::Command) -> Vec<(u64, &[u8])> {
    match &command.op {
        Some(Op::Unlink(op)) if op.directory => vec![(op.parent, &op.name)],
        Some(Op::Rename(op)) => vec![(op.parent, &op.name), (op.new_parent, &op.new_name)],
        _ => Vec::new(),
    }
}

//! Answers reads from a view, and says what each answer tells. Pure.

use heliofs_proto::ids::{Ino, Position, VolumeId};
use heliofs_proto::v1::{self, FsError, request, response};
use meta_core::query::{self, QueryError};
use meta_core::{Corruption, View};

use super::interest::{Told, What};

/// An answer and what it tells.
#[derive(Debug)]
pub struct Answer {
    /// The answer itself, without id and position.
    pub response: v1::Response,
    /// What the client may cache from it.
    pub told: Vec<Told>,
}

/// Answers one read. `None`: the body is not a read that the view alone answers.
///
/// A refusal is an answer with `error` set. `was_held`, for an open: somebody held the inode before, so it can be opened
/// also without a name.
pub fn answer(
    view: &impl View,
    volume: VolumeId,
    body: &request::Body,
    was_held: bool,
) -> Result<Option<Answer>, Corruption> {
    use request::Body;
    let mut told = Told::list();
    let outcome = match body {
        Body::Lookup(ask) => {
            let found = query::lookup(view, volume, Ino(ask.parent), &ask.name);
            // Absence is knowledge, too.
            if matches!(found, Ok(_) | Err(QueryError::Refused(FsError::NotFound))) {
                told.push(ask.parent, What::ENTRIES);
            }
            found.map(|attr| {
                told.push(attr.ino, What::ATTR);
                response::Body::Attr(attr)
            })
        }
        Body::GetAttr(ask) => query::get_attr(view, volume, Ino(ask.ino)).map(|attr| {
            told.push(attr.ino, What::ATTR);
            response::Body::Attr(attr)
        }),
        Body::Open(ask) => open(view, volume, *ask, was_held).map(|opened| {
            told.push(ask.ino, What::ATTR.and(What::CONTENT));
            response::Body::Opened(opened)
        }),
        Body::ReadDir(ask) => query::read_dir(
            view,
            volume,
            Ino(ask.ino),
            ask.after,
            ask.entries_max,
            ask.plus,
        )
        .map(|page| {
            told.push(ask.ino, What::ENTRIES.and(What::ATTR));
            for entry in &page.entries {
                if entry.attr.is_some() {
                    told.push(entry.ino, What::ATTR);
                }
            }
            response::Body::DirPage(page)
        }),
        // A symlink's target never changes.
        Body::ReadLink(ask) => {
            query::read_link(view, volume, Ino(ask.ino)).map(response::Body::Bytes)
        }
        Body::GetXattr(ask) => {
            let found = query::get_xattr(view, volume, Ino(ask.ino), &ask.name);
            if matches!(
                found,
                Ok(_) | Err(QueryError::Refused(FsError::NoAttribute))
            ) {
                told.push(ask.ino, What::XATTR);
            }
            found.map(response::Body::Bytes)
        }
        Body::ListXattr(ask) => query::list_xattr(view, volume, Ino(ask.ino)).map(|names| {
            told.push(ask.ino, What::XATTR);
            response::Body::Names(names)
        }),
        Body::GetExtents(ask) => query::get_extents(
            view,
            volume,
            Ino(ask.ino),
            ask.offset,
            ask.length,
            ask.extents_max,
        )
        .map(|page| {
            told.push(ask.ino, What::ATTR.and(What::CONTENT));
            response::Body::Extents(page)
        }),
        // Usage changes with every write: nobody caches it for longer than a moment, so nobody is told.
        Body::StatFs(ask) => query::stat_fs(view, volume, Ino(ask.ino))
            .map(response::Body::StatFs)
            .map_err(Into::into),
        Body::Walk(ask) => query::walk(view, volume, &ask.path).map(|reply| {
            for attr in &reply.attrs {
                let entries = attr.kind() == v1::FileKind::Directory;
                let what = if entries {
                    What::ATTR.and(What::ENTRIES)
                } else {
                    What::ATTR
                };
                told.push(attr.ino, what);
            }
            response::Body::Walk(reply)
        }),
        Body::Command(_)
        | Body::Release(_)
        | Body::Lock(_)
        | Body::TestLock(_)
        | Body::TakeDeletions(_)
        | Body::TakeCopies(_)
        | Body::ReleaseLocks(_)
        | Body::Maintain(_)
        | Body::ReturnLease(_)
        | Body::Summary(_) => return Ok(None),
    };
    let response = match outcome {
        Ok(body) => v1::Response {
            body: Some(body),
            ..Default::default()
        },
        Err(QueryError::Refused(error)) => refusal(error),
        Err(QueryError::Corrupt(corruption)) => return Err(corruption),
    };
    Ok(Some(Answer {
        response,
        told: told.0,
    }))
}

/// A response that says no.
pub fn refusal(error: FsError) -> v1::Response {
    v1::Response {
        error: error as i32,
        ..Default::default()
    }
}

/// The volume's position in this view; `None` if the volume is gone.
pub fn position(view: &impl View, volume: VolumeId) -> Result<Option<Position>, Corruption> {
    Ok(query::head(view, volume)?.map(|head| head.position))
}

fn open(
    view: &impl View,
    volume: VolumeId,
    ask: v1::Open,
    was_held: bool,
) -> Result<v1::Opened, QueryError> {
    let attr = query::get_attr(view, volume, Ino(ask.ino))?;
    if attr.nlink == 0 && !was_held {
        // Nobody kept it: it may be reaped at any moment.
        return Err(FsError::Stale.into());
    }
    if ask.write && attr.flags & v1::AttrFlag::Snapshot as u32 != 0 {
        return Err(FsError::ReadOnly.into());
    }
    let extents = if ask.extents_max > 0 && attr.kind() == v1::FileKind::File {
        let ino = Ino(ask.ino);
        Some(query::get_extents(
            view,
            volume,
            ino,
            0,
            u64::MAX,
            ask.extents_max,
        )?)
    } else {
        None
    };
    // A mount that may hold back what is written must know how much would be taken.
    let quota_room = match ask.write {
        true => query::quota_room(view, volume, Ino(ask.ino))?,
        false => None,
    };
    Ok(v1::Opened {
        attr: Some(attr),
        extents,
        quota_room,
    })
}

/// What the reply of an applied mutation tells the session that made it.
pub fn told_by_mutation(command: &v1::Command, reply: &v1::Reply) -> Vec<Told> {
    use v1::command::Op;
    let mut told = Told::list();
    if reply.error() != FsError::None {
        return told.0;
    }
    for attr in [
        &reply.attr,
        &reply.parent,
        &reply.new_parent,
        &reply.replaced,
    ]
    .into_iter()
    .flatten()
    {
        told.push(attr.ino, What::ATTR);
    }
    let content = What::ATTR.and(What::CONTENT);
    match &command.op {
        Some(Op::Create(op)) => {
            told.push(op.parent, What::ENTRIES);
            if let Some(attr) = &reply.attr
                && reply.created
            {
                // A new directory is known to be empty, a new file to have no content.
                told.push(attr.ino, content.and(What::ENTRIES).and(What::XATTR));
            }
        }
        Some(Op::Link(op)) => told.push(op.parent, What::ENTRIES),
        Some(Op::Unlink(op)) => told.push(op.parent, What::ENTRIES),
        Some(Op::RemoveTree(op)) => told.push(op.parent, What::ENTRIES),
        Some(Op::Rename(op)) => {
            told.push(op.parent, What::ENTRIES);
            told.push(op.new_parent, What::ENTRIES);
        }
        Some(Op::SetAttr(op)) => told.push(op.ino, content),
        Some(Op::SetXattr(op)) => told.push(op.ino, What::XATTR),
        Some(Op::RemoveXattr(op)) => told.push(op.ino, What::XATTR),
        // Whoever made them knows what came of them without being told.
        Some(Op::Batch(op)) => {
            for change in op.changes.iter().take(reply.applied as usize) {
                told_by_change(change, &mut told);
            }
        }
        Some(Op::Commit(op)) => op
            .files
            .iter()
            .for_each(|file| told.push(file.ino, content)),
        Some(Op::Fallocate(op)) => told.push(op.ino, content),
        Some(Op::CopyRange(op)) => told.push(op.target, content),
        Some(
            Op::VolumeInit(_)
            | Op::SettingsUpdate(_)
            | Op::SessionBegin(_)
            | Op::SessionEnd(_)
            | Op::SegmentsAllocate(_)
            | Op::InosReserve(_)
            | Op::Relocate(_)
            | Op::Reap(_)
            | Op::EraseStep(_)
            | Op::RemoveTreeStep(_)
            | Op::QuotaSet(_)
            | Op::QuotaRemove(_)
            | Op::QuotaStep(_)
            | Op::EpochBegin(_),
        )
        | None => {}
    }
    told.0
}

fn told_by_change(change: &v1::Change, told: &mut ToldList) {
    use v1::change::Op;
    let directory = What::ENTRIES.and(What::ATTR);
    match &change.op {
        Some(Op::Create(op)) => {
            told.push(op.parent, directory);
            let content = What::ATTR.and(What::CONTENT);
            told.push(op.ino, content.and(What::ENTRIES).and(What::XATTR));
        }
        Some(Op::Link(op)) => {
            told.push(op.parent, directory);
            told.push(op.ino, What::ATTR);
        }
        Some(Op::Unlink(op)) => told.push(op.parent, directory),
        Some(Op::Rename(op)) => {
            told.push(op.parent, directory);
            told.push(op.new_parent, directory);
        }
        Some(Op::SetAttr(op)) => told.push(op.ino, What::ATTR),
        None => {}
    }
}

struct ToldList(Vec<Told>);

impl ToldList {
    fn push(&mut self, ino: u64, what: What) {
        self.0.push(Told { ino, what });
    }
}

impl Told {
    fn list() -> ToldList {
        ToldList(Vec::new())
    }
}

/// Why a client's command is not proposed; `None`: it may be.
///
/// Everything about names, sizes and ids is the core's verdict; here is only who may ask for what.
pub fn refuse_command(command: &v1::Command, read_only: bool) -> Option<FsError> {
    use v1::command::Op;
    let Some(op) = &command.op else {
        return Some(FsError::NotSupported);
    };
    match op {
        Op::VolumeInit(_)
        | Op::SettingsUpdate(_)
        | Op::SessionBegin(_)
        | Op::SessionEnd(_)
        | Op::Reap(_)
        | Op::EraseStep(_)
        | Op::RemoveTreeStep(_)
        | Op::QuotaStep(_)
        | Op::EpochBegin(_) => Some(FsError::NotPermitted),
        Op::SegmentsAllocate(_)
        | Op::InosReserve(_)
        | Op::Batch(_)
        | Op::Create(_)
        | Op::Link(_)
        | Op::Unlink(_)
        | Op::Rename(_)
        | Op::SetAttr(_)
        | Op::SetXattr(_)
        | Op::RemoveXattr(_)
        | Op::Commit(_)
        | Op::Fallocate(_)
        | Op::CopyRange(_)
        | Op::Relocate(_)
        | Op::QuotaSet(_)
        | Op::QuotaRemove(_)
        | Op::RemoveTree(_) => {
            if read_only {
                Some(FsError::ReadOnly)
            } else if command.sequence == 0 {
                // Without a number a retry could not be told from a new command.
                Some(FsError::Invalid)
            } else {
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use heliofs_proto::v1::command::Op;

    use super::*;

    fn command(sequence: u64, op: Option<Op>) -> v1::Command {
        v1::Command {
            sequence,
            op,
            ..Default::default()
        }
    }

    #[test]
    fn clients_may_not_speak_for_the_system() {
        let system = [
            Op::VolumeInit(Default::default()),
            Op::SettingsUpdate(Default::default()),
            Op::SessionBegin(Default::default()),
            Op::SessionEnd(Default::default()),
            Op::Reap(Default::default()),
            Op::EraseStep(Default::default()),
            Op::RemoveTreeStep(Default::default()),
            Op::QuotaStep(Default::default()),
            Op::EpochBegin(Default::default()),
        ];
        for op in system {
            assert_eq!(
                refuse_command(&command(1, Some(op)), false),
                Some(FsError::NotPermitted)
            );
        }
        let unlink = Some(Op::Unlink(Default::default()));
        assert_eq!(refuse_command(&command(1, unlink.clone()), false), None);
        assert_eq!(
            refuse_command(&command(0, unlink.clone()), false),
            Some(FsError::Invalid)
        );
        assert_eq!(
            refuse_command(&command(1, unlink), true),
            Some(FsError::ReadOnly)
        );
        assert_eq!(
            refuse_command(&command(1, None), false),
            Some(FsError::NotSupported)
        );
    }
}

//! Commands whose point is in numbers or in chance, which scripts show badly: bounds, large trees, random histories.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bounds;
mod exactly_once;
mod listing;
mod quota;
mod random;
mod remove_tree;

use std::collections::BTreeMap;

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, SessionId, UnixNanos, VolumeId};
use heliofs_proto::v1::{self, FileKind, command::Op};
use meta_core::{Applied, Stamp, Sums, apply, invariants};

const VOLUME: VolumeId = VolumeId(3);
/// DESIGN.md §3.3.
const RECORDS_PER_COMMAND_MAX: usize = 1000;

/// A volume in memory.
struct Volume {
    records: BTreeMap<Bytes, Bytes>,
    sums: Sums,
    time: i64,
}

impl Volume {
    fn new() -> Self {
        let mut volume = Self {
            records: BTreeMap::new(),
            sums: Sums::default(),
            time: 0,
        };
        let init = v1::VolumeInit {
            settings: Some(v1::VolumeSettings {
                core_level: 1,
                ..v1::VolumeSettings::default()
            }),
            root_mode: 0o755,
            ..v1::VolumeInit::default()
        };
        volume.run(Op::VolumeInit(init)).unwrap();
        volume
    }

    fn apply(&mut self, command: &v1::Command) -> Applied {
        self.time += 1;
        let time = UnixNanos(self.time);
        let applied = apply(&self.records, Stamp { time }, command).unwrap();
        let changed = applied.changes.len();
        assert!(changed <= RECORDS_PER_COMMAND_MAX, "{changed} records");
        for change in &applied.changes {
            self.sums.absorb(change);
            match &change.new {
                Some(new) => self.records.insert(change.key.clone(), new.clone()),
                None => self.records.remove(&change.key),
            };
        }
        applied
    }

    fn send(
        &mut self,
        session: SessionId,
        sequence: u64,
        acknowledged_below: u64,
        op: Op,
    ) -> v1::Reply {
        let command = v1::Command {
            volume: VOLUME.0,
            session: session.0,
            sequence,
            acknowledged_below,
            caller: Some(v1::Caller::default()),
            op: Some(op),
        };
        self.apply(&command).reply
    }

    fn run(&mut self, op: Op) -> Result<v1::Reply, FsError> {
        let reply = self.send(SessionId::SYSTEM, 0, 0, op);
        match reply.error() {
            FsError::None => Ok(reply),
            error => Err(error),
        }
    }

    fn begin_session(&mut self) -> SessionId {
        let begin = Op::SessionBegin(v1::SessionBegin { cluster_id: 9 });
        SessionId(self.run(begin).unwrap().value)
    }

    fn check(&self) {
        if let Err(wrong) = invariants::check(&self.records, VOLUME) {
            panic!("{wrong:#?}");
        }
        let recomputed = invariants::recomputed_digest(&self.records, VOLUME).unwrap();
        assert_eq!(recomputed, self.sums);
    }
}

fn make(parent: u64, name: impl Into<Bytes>, kind: FileKind) -> Op {
    Op::Create(v1::Create {
        parent,
        name: name.into(),
        kind: kind as i32,
        mode: 0o755,
        exclusive: true,
        ..v1::Create::default()
    })
}

fn create(parent: u64, name: impl Into<Bytes>) -> Op {
    make(parent, name, FileKind::File)
}

fn mkdir(parent: u64, name: impl Into<Bytes>) -> Op {
    make(parent, name, FileKind::Directory)
}

fn link(ino: u64, parent: u64, name: impl Into<Bytes>) -> Op {
    Op::Link(v1::Link {
        ino,
        parent,
        name: name.into(),
    })
}

fn unlink(parent: u64, name: impl Into<Bytes>, directory: bool) -> Op {
    Op::Unlink(v1::Unlink {
        parent,
        name: name.into(),
        directory,
    })
}

fn rename(parent: u64, name: impl Into<Bytes>, new_parent: u64, new_name: impl Into<Bytes>) -> Op {
    Op::Rename(v1::Rename {
        parent,
        name: name.into(),
        new_parent,
        new_name: new_name.into(),
        no_replace: false,
        exchange: false,
    })
}

fn set_xattr(ino: u64, name: impl Into<Bytes>, value: impl Into<Bytes>) -> Op {
    Op::SetXattr(v1::SetXattr {
        ino,
        name: name.into(),
        value: value.into(),
        ..v1::SetXattr::default()
    })
}

fn ino(reply: &v1::Reply) -> u64 {
    reply.attr.as_ref().unwrap().ino
}

const ROOT: u64 = Ino::ROOT.0;

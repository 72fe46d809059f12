//! A volume in memory: applies commands and checks what must hold of each.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, UnixNanos, VolumeId};
use heliofs_proto::v1::{self, Command, command::Op};
use meta_core::keys::Tag;
use meta_core::{Applied, Change, Stamp, Sums, apply, query};

pub(crate) const VOLUME: VolumeId = VolumeId(7);

pub(crate) type Records = BTreeMap<Bytes, Bytes>;

/// One byte of a file: where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Byte {
    Hole,
    Inline(u8),
    At(u64, u32, u32),
}

#[derive(Clone, Default)]
pub(crate) struct World {
    pub(crate) records: Records,
    pub(crate) sums: Sums,
    pub(crate) log: Vec<(Stamp, Command)>,
    pub(crate) freed: BTreeSet<u64>,
    pub(crate) time: i64,
}

pub(crate) fn system(op: Op) -> Command {
    Command {
        volume: VOLUME.0,
        op: Some(op),
        ..Command::default()
    }
}

pub(crate) fn write_changes(records: &mut Records, sums: &mut Sums, changes: &[Change]) {
    for change in changes {
        assert_eq!(records.get(&change.key), change.old.as_ref(), "old value");
        assert_ne!(change.old, change.new, "a change that changes nothing");
        sums.absorb(change);
        match &change.new {
            Some(new) => records.insert(change.key.clone(), new.clone()),
            None => records.remove(&change.key),
        };
    }
}

impl World {
    pub(crate) fn new(settings: v1::VolumeSettings) -> Self {
        let mut world = Self {
            time: 1_000_000,
            ..Self::default()
        };
        let init = v1::VolumeInit {
            settings: Some(settings),
            root_mode: 0o755,
            ..v1::VolumeInit::default()
        };
        let applied = world.apply(system(Op::VolumeInit(init)));
        assert_eq!(applied.reply.error(), FsError::None);
        world
    }

    pub(crate) fn apply(&mut self, command: Command) -> Applied {
        self.time += 1000;
        let stamp = Stamp {
            time: UnixNanos(self.time),
        };
        let applied = apply(&self.records, stamp, &command).expect("records are sound");
        assert_eq!(applied.position.seq, self.log.len() as u64 + 1);
        assert!(
            applied
                .changes
                .is_sorted_by(|first, next| first.key < next.key),
            "changes in key order, each key once"
        );
        let bounded = applied
            .changes
            .iter()
            .filter(|change| Tag::of(&change.key) != Some(Tag::Reply));
        assert!(bounded.count() <= 1000, "at most 1,000 records per command");
        let is_commit = matches!(command.op, Some(Op::Commit(_)));
        if applied.reply.error() != FsError::None && !is_commit {
            let own =
                |key: &Bytes| matches!(Tag::of(key), Some(Tag::Head | Tag::Session | Tag::Reply));
            let own_only = applied.changes.iter().all(|change| own(&change.key));
            assert!(
                own_only,
                "a refusal moves the head and is remembered; nothing else"
            );
            assert!(applied.freed.is_empty() && applied.touched.is_empty());
        }
        for segment in &applied.freed {
            assert!(self.freed.insert(segment.0), "{segment} is freed twice");
        }
        write_changes(&mut self.records, &mut self.sums, &applied.changes);
        self.log.push((stamp, command));
        applied
    }

    /// Applies a command of the system that must not be refused.
    pub(crate) fn system(&mut self, op: Op) -> Applied {
        let applied = self.apply(system(op));
        assert_eq!(applied.reply.error(), FsError::None);
        applied
    }

    /// The content of a file as a reader puts it together from small pages.
    pub(crate) fn read(&self, ino: u64) -> Vec<Byte> {
        let size = query::get_attr(&self.records, VOLUME, Ino(ino))
            .expect("the file exists")
            .size;
        let mut content = vec![Byte::Hole; size as usize];
        let mut offset = 0;
        loop {
            let page = query::get_extents(
                &self.records,
                VOLUME,
                Ino(ino),
                offset,
                u64::MAX - offset,
                61,
            )
            .expect("a regular file");
            for extent in &page.extents {
                for at in 0..extent.length {
                    let byte = match extent.segment {
                        0 => Byte::Inline(extent.inline_bytes[at as usize]),
                        segment => Byte::At(segment, extent.frame, extent.frame_offset + at as u32),
                    };
                    content[(extent.offset + at) as usize] = byte;
                }
            }
            if page.complete_to == u64::MAX {
                return content;
            }
            assert!(
                page.complete_to > offset,
                "a page brings the reader forward"
            );
            offset = page.complete_to;
        }
    }

    /// Works off all erasures.
    pub(crate) fn finish_erasures(&mut self) {
        while let Some(ino) = query::erases(&self.records, VOLUME, Ino(0), 1)
            .expect("records are sound")
            .first()
        {
            self.system(Op::EraseStep(v1::EraseStep { ino: ino.0 }));
        }
    }
}

//! A client on a fresh volume, for single situations.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{self, Caller, Command, FileKind, command::Op};
use meta_core::keys::Tag;
use meta_core::{Applied, query};

use crate::world::{VOLUME, World};

pub(crate) struct Bench {
    pub(crate) world: World,
    pub(crate) session: u64,
    pub(crate) sequence: u64,
    pub(crate) next_segment: u64,
    pub(crate) segments_end: u64,
    pub(crate) acknowledged_below: u64,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::with(v1::VolumeSettings::default())
    }

    pub(crate) fn with(settings: v1::VolumeSettings) -> Self {
        let mut bench = Self {
            world: World::new(settings),
            session: 0,
            sequence: 0,
            next_segment: 0,
            segments_end: 0,
            acknowledged_below: 0,
        };
        bench.begin_session();
        bench
    }

    pub(crate) fn begin_session(&mut self) {
        let begin = Op::SessionBegin(v1::SessionBegin { cluster_id: 9 });
        self.session = self.world.system(begin).reply.value;
        (self.sequence, self.acknowledged_below) = (0, 0);
        self.allocate();
    }

    pub(crate) fn allocate(&mut self) {
        let allocate = v1::SegmentsAllocate { count: 256 };
        let applied = self.run(Op::SegmentsAllocate(allocate));
        assert_eq!(applied.reply.error(), FsError::None);
        self.next_segment = applied.reply.value;
        self.segments_end = self.next_segment + 256;
    }

    pub(crate) fn run(&mut self, op: Op) -> Applied {
        self.sequence += 1;
        self.acknowledged_below = self.sequence;
        self.world.apply(Command {
            volume: VOLUME.0,
            session: self.session,
            sequence: self.sequence,
            acknowledged_below: self.acknowledged_below,
            caller: Some(Caller::default()),
            op: Some(op),
        })
    }

    pub(crate) fn ok(&mut self, op: Op) -> Applied {
        let applied = self.run(op);
        assert_eq!(applied.reply.error(), FsError::None);
        applied
    }

    pub(crate) fn file(&mut self, name: &str) -> u64 {
        let create = v1::Create {
            parent: 1,
            name: Bytes::copy_from_slice(name.as_bytes()),
            kind: FileKind::File as i32,
            mode: 0o644,
            exclusive: true,
            ..v1::Create::default()
        };
        self.ok(Op::Create(create)).reply.attr.unwrap().ino
    }

    pub(crate) fn segment(&mut self) -> v1::Segment {
        let ended = self.next_segment == self.segments_end;
        if ended {
            self.allocate();
        }
        let id = self.next_segment;
        self.next_segment += 1;
        v1::Segment {
            id,
            length: 100_000_000,
            checksum: 5,
            data_bytes: 90_000_000,
            live_bytes: 0,
        }
    }

    /// Commits extents (offset, length) of one new segment, one frame per extent; returns the segment.
    pub(crate) fn write(&mut self, ino: u64, ranges: &[(u64, u64)]) -> u64 {
        let segment = self.segment();
        let extents = ranges
            .iter()
            .enumerate()
            .map(|(frame, (offset, length))| extent(*offset, *length, segment.id, frame as u32, 0));
        let file = file_commit(ino, extents.collect());
        let id = segment.id;
        let reply = self.ok(commit(vec![segment], vec![file])).reply;
        assert_eq!(reply.files[0].error(), FsError::None);
        id
    }

    /// Many one-byte extents, every other byte from `offset` on.
    pub(crate) fn shred(&mut self, ino: u64, offset: u64, extents_count: u64) {
        let offsets: Vec<_> = (0..extents_count).map(|i| (offset + 2 * i, 1)).collect();
        for part in offsets.chunks(heliofs_proto::limits::COMMIT_EXTENTS_MAX) {
            let extents = part.iter().map(|(offset, _)| inline(*offset, b"x"));
            let file = file_commit(ino, extents.collect());
            self.ok(commit(vec![], vec![file]));
        }
    }

    pub(crate) fn truncate(&mut self, ino: u64, size: u64) -> Applied {
        self.ok(Op::SetAttr(v1::SetAttr {
            ino,
            size: Some(size),
            ..v1::SetAttr::default()
        }))
    }

    pub(crate) fn unlink(&mut self, name: &'static str) -> Applied {
        self.ok(Op::Unlink(v1::Unlink {
            parent: 1,
            name: Bytes::from_static(name.as_bytes()),
            directory: false,
        }))
    }

    pub(crate) fn extents(&self, ino: u64) -> Vec<(u64, u64, u64)> {
        let page = query::get_extents(&self.world.records, VOLUME, Ino(ino), 0, u64::MAX, 4096);
        let extents = page.unwrap().extents;
        let parts = extents.iter().map(|e| (e.offset, e.length, e.segment));
        parts.collect()
    }
}

pub(crate) fn extent(
    offset: u64,
    length: u64,
    segment: u64,
    frame: u32,
    frame_offset: u32,
) -> v1::Extent {
    v1::Extent {
        offset,
        length,
        segment,
        frame,
        frame_offset,
        inline_bytes: Bytes::new(),
        seq: 0,
    }
}

pub(crate) fn inline(offset: u64, bytes: &'static [u8]) -> v1::Extent {
    v1::Extent {
        offset,
        length: bytes.len() as u64,
        inline_bytes: Bytes::from_static(bytes),
        seq: 0,
        ..v1::Extent::default()
    }
}

pub(crate) fn file_commit(ino: u64, extents: Vec<v1::Extent>) -> v1::FileCommit {
    v1::FileCommit {
        ino,
        extents,
        ..v1::FileCommit::default()
    }
}

pub(crate) fn commit(segments: Vec<v1::Segment>, files: Vec<v1::FileCommit>) -> Op {
    Op::Commit(v1::Commit { segments, files })
}

pub(crate) fn changed(applied: &Applied, tag: Tag) -> usize {
    let keys = applied.changes.iter().map(|change| &change.key);
    keys.filter(|key| Tag::of(key) == Some(tag)).count()
}

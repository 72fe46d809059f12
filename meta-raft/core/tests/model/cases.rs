//! Single situations of the data path.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::limits::{FILE_BYTES_MAX, FRAME_BYTES_MAX};
use heliofs_proto::v1::{self, Caller, Command, FileKind, command::Op};
use meta_core::keys::Tag;
use meta_core::{Applied, query};

use crate::check::{check, has_segment, inode};
use crate::world::{Byte, VOLUME, World};

struct Bench {
    world: World,
    session: u64,
    sequence: u64,
    next_segment: u64,
    acknowledged_below: u64,
}

impl Bench {
    fn new() -> Self {
        Self::with(v1::VolumeSettings::default())
    }

    fn with(settings: v1::VolumeSettings) -> Self {
        let mut bench = Self {
            world: World::new(settings),
            session: 0,
            sequence: 0,
            next_segment: 0,
            acknowledged_below: 0,
        };
        bench.begin_session();
        bench
    }

    fn begin_session(&mut self) {
        let begin = Op::SessionBegin(v1::SessionBegin { cluster_id: 9 });
        self.session = self.world.system(begin).reply.value;
        (self.sequence, self.acknowledged_below) = (0, 0);
        self.next_segment = self.allocate();
    }

    fn allocate(&mut self) -> u64 {
        let allocate = v1::SegmentsAllocate { count: 256 };
        let applied = self.run(Op::SegmentsAllocate(allocate));
        assert_eq!(applied.reply.error(), FsError::None);
        applied.reply.value
    }

    fn run(&mut self, op: Op) -> Applied {
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

    fn ok(&mut self, op: Op) -> Applied {
        let applied = self.run(op);
        assert_eq!(applied.reply.error(), FsError::None);
        applied
    }

    fn file(&mut self, name: &'static str) -> u64 {
        let create = v1::Create {
            parent: 1,
            name: Bytes::from_static(name.as_bytes()),
            kind: FileKind::File as i32,
            mode: 0o644,
            exclusive: true,
            ..v1::Create::default()
        };
        self.ok(Op::Create(create)).reply.attr.unwrap().ino
    }

    fn segment(&mut self) -> v1::Segment {
        if self.next_segment.is_multiple_of(256) && self.world.freed.len() + 1 > 255 {
            self.next_segment = self.allocate();
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
    fn write(&mut self, ino: u64, ranges: &[(u64, u64)]) -> u64 {
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
    fn shred(&mut self, ino: u64, offset: u64, extents_count: u64) {
        let offsets: Vec<_> = (0..extents_count).map(|i| (offset + 2 * i, 1)).collect();
        for part in offsets.chunks(128) {
            let extents = part.iter().map(|(offset, _)| inline(*offset, b"x"));
            let file = file_commit(ino, extents.collect());
            self.ok(commit(vec![], vec![file]));
        }
    }

    fn truncate(&mut self, ino: u64, size: u64) -> Applied {
        self.ok(Op::SetAttr(v1::SetAttr {
            ino,
            size: Some(size),
            ..v1::SetAttr::default()
        }))
    }

    fn unlink(&mut self, name: &'static str) -> Applied {
        self.ok(Op::Unlink(v1::Unlink {
            parent: 1,
            name: Bytes::from_static(name.as_bytes()),
            directory: false,
        }))
    }

    fn extents(&self, ino: u64) -> Vec<(u64, u64, u64)> {
        let page = query::get_extents(&self.world.records, VOLUME, Ino(ino), 0, u64::MAX, 4096);
        let extents = page.unwrap().extents;
        let parts = extents.iter().map(|e| (e.offset, e.length, e.segment));
        parts.collect()
    }
}

fn extent(offset: u64, length: u64, segment: u64, frame: u32, frame_offset: u32) -> v1::Extent {
    v1::Extent {
        offset,
        length,
        segment,
        frame,
        frame_offset,
        inline_bytes: Bytes::new(),
    }
}

fn inline(offset: u64, bytes: &'static [u8]) -> v1::Extent {
    v1::Extent {
        offset,
        length: bytes.len() as u64,
        inline_bytes: Bytes::from_static(bytes),
        ..v1::Extent::default()
    }
}

fn file_commit(ino: u64, extents: Vec<v1::Extent>) -> v1::FileCommit {
    v1::FileCommit {
        ino,
        extents,
        ..v1::FileCommit::default()
    }
}

fn commit(segments: Vec<v1::Segment>, files: Vec<v1::FileCommit>) -> Op {
    Op::Commit(v1::Commit { segments, files })
}

fn changed(applied: &Applied, tag: Tag) -> usize {
    let keys = applied.changes.iter().map(|change| &change.key);
    keys.filter(|key| Tag::of(key) == Some(tag)).count()
}

#[test]
fn an_overwrite_in_the_middle_splits_an_extent_in_three() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    let old = bench.write(ino, &[(0, 1000)]);
    let new = bench.write(ino, &[(400, 100)]);
    assert_eq!(
        bench.extents(ino),
        [(0, 400, old), (400, 100, new), (500, 500, old)]
    );
    assert_eq!(bench.world.read(ino)[500], Byte::At(old, 0, 500));
    assert_eq!(inode(&bench.world, ino).allocated, 1000);
    let stored = query::segment(&bench.world.records, VOLUME, old.into());
    assert_eq!(stored.unwrap().unwrap().live_bytes, 900);
    check(&bench.world);
}

#[test]
fn an_overwrite_over_two_extents_and_all_between_trims_the_outer_ones() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    let old = bench.write(ino, &[(0, 100), (100, 100), (250, 50), (300, 100)]);
    let new = bench.write(ino, &[(50, 300)]);
    assert_eq!(
        bench.extents(ino),
        [(0, 50, old), (50, 300, new), (350, 50, old)]
    );
    check(&bench.world);
}

#[test]
fn a_segment_is_freed_when_its_last_byte_goes_and_exactly_once() {
    let mut bench = Bench::new();
    let (first, second) = (bench.file("a"), bench.file("b"));
    let old = bench.write(first, &[(0, 100), (100, 100)]);
    bench.ok(Op::CopyRange(v1::CopyRange {
        source: first,
        source_offset: 50,
        target: second,
        target_offset: 0,
        length: 100,
        ..v1::CopyRange::default()
    }));
    assert!(bench.truncate(first, 0).freed.is_empty());
    check(&bench.world);
    let freed = bench.truncate(second, 0).freed;
    assert_eq!(freed, [old.into()]);
    assert!(!has_segment(&bench.world, old));
    check(&bench.world);
}

#[test]
fn a_freed_segment_is_fenced_for_good() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    let segment = bench.segment();
    let file = file_commit(ino, vec![extent(0, 10, segment.id, 0, 0)]);
    bench.ok(commit(vec![segment], vec![file.clone()]));
    assert_eq!(bench.truncate(ino, 0).freed, [segment.id.into()]);
    // Its object may be deleted any moment: listing it again must not revive it.
    for segments in [vec![segment], vec![]] {
        let reply = bench.run(commit(segments, vec![file.clone()])).reply;
        assert_eq!(reply.error(), FsError::SegmentFenced);
    }
}

#[test]
fn segments_of_other_and_of_ended_sessions_are_fenced() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    let stored = bench.write(ino, &[(0, 10)]);
    let unused = bench.segment();
    bench.begin_session();
    for (segments, id) in [
        (vec![unused], unused.id),
        (vec![], stored),
        (vec![], 1 << 40),
    ] {
        let file = file_commit(ino, vec![extent(0, 10, id, 0, 0)]);
        let reply = bench.run(commit(segments, vec![file])).reply;
        assert_eq!(reply.error(), FsError::SegmentFenced);
    }
}

#[test]
fn a_repeated_segment_must_be_the_one_that_is_stored() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    let segment = bench.segment();
    let file = |offset| file_commit(ino, vec![extent(offset, 10, segment.id, 0, 0)]);
    bench.ok(commit(vec![segment], vec![file(0)]));
    bench.ok(commit(vec![segment], vec![file(20)]));
    bench.ok(commit(vec![], vec![file(40)]));
    let other = v1::Segment {
        checksum: segment.checksum + 1,
        ..segment
    };
    let reply = bench.run(commit(vec![other], vec![file(60)])).reply;
    assert_eq!(reply.error(), FsError::Invalid);
    check(&bench.world);
}

#[test]
fn a_file_that_is_gone_does_not_stop_the_others_and_frees_what_only_it_needed() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    let (packed, own) = (bench.segment(), bench.segment());
    let gone = file_commit(
        999,
        vec![extent(0, 5, packed.id, 0, 0), extent(5, 5, own.id, 0, 0)],
    );
    let here = file_commit(ino, vec![extent(0, 10, packed.id, 1, 0)]);
    let applied = bench.run(commit(vec![packed, own], vec![gone.clone(), here]));
    let errors: Vec<_> = applied.reply.files.iter().map(|f| f.error()).collect();
    assert_eq!(errors, [FsError::Stale, FsError::None]);
    assert_eq!(applied.reply.error(), FsError::Stale);
    assert_eq!(applied.freed, [own.id.into()]);
    check(&bench.world);

    // None left at all: its data goes too.
    let lonely = bench.segment();
    let gone = file_commit(999, vec![extent(0, 5, lonely.id, 0, 0)]);
    let applied = bench.run(commit(vec![lonely], vec![gone]));
    assert_eq!(applied.reply.error(), FsError::Stale);
    assert_eq!(applied.freed, [lonely.id.into()]);
    check(&bench.world);
}

#[test]
fn a_full_volume_takes_overwrites_and_nothing_more() {
    let mut bench = Bench::with(v1::VolumeSettings {
        capacity_bytes_max: 1000,
        ..v1::VolumeSettings::default()
    });
    let ino = bench.file("f");
    bench.write(ino, &[(0, 1000)]);
    bench.write(ino, &[(0, 500)]);
    let segment = bench.segment();
    let more = file_commit(ino, vec![extent(500, 501, segment.id, 0, 0)]);
    let reply = bench.run(commit(vec![segment], vec![more])).reply;
    assert_eq!(reply.error(), FsError::NoSpace);
    assert!(!has_segment(&bench.world, segment.id));
    let copy = v1::CopyRange {
        source: ino,
        target: ino,
        target_offset: 1000,
        length: 1,
        ..v1::CopyRange::default()
    };
    let reply = bench.run(Op::CopyRange(copy)).reply;
    assert_eq!(reply.error(), FsError::NoSpace);
    bench.truncate(ino, 999);
    bench.ok(Op::CopyRange(v1::CopyRange {
        target_offset: 5000,
        ..copy
    }));
    check(&bench.world);
}

#[test]
fn extents_that_make_no_sense_are_refused() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    let id = bench.segment().id;
    let frame_end = (FRAME_BYTES_MAX - 5) as u32;
    let mut inline_and_segment = extent(0, 1, id, 0, 0);
    inline_and_segment.inline_bytes = Bytes::from_static(b"x");
    let mut wrong_length = inline(0, b"abc");
    wrong_length.length = 2;
    let mut too_long = inline(0, b"");
    too_long.inline_bytes = Bytes::from(vec![0; 4097]);
    too_long.length = 4097;
    for extents in [
        vec![extent(0, 0, id, 0, 0)],
        vec![inline(0, b"")],
        vec![inline(0, b"abc"), inline(2, b"d")],
        vec![inline(9, b"abc"), inline(2, b"d")],
        vec![extent(FILE_BYTES_MAX - 5, 6, id, 0, 0)],
        vec![extent(u64::MAX, 6, id, 0, 0)],
        vec![extent(0, 6, id, 0, frame_end)],
        vec![inline_and_segment],
        vec![wrong_length],
        vec![too_long],
    ] {
        let reply = bench.run(commit(vec![], vec![file_commit(ino, extents.clone())]));
        assert_eq!(reply.reply.error(), FsError::Invalid, "{extents:?}");
    }
    let twice = vec![file_commit(ino, vec![]), file_commit(ino, vec![])];
    let reply = bench.run(commit(vec![], twice)).reply;
    assert_eq!(reply.error(), FsError::Invalid);
    let many = (0..129).map(|i| inline(2 * i, b"x")).collect();
    let reply = bench
        .run(commit(vec![], vec![file_commit(ino, many)]))
        .reply;
    assert_eq!(reply.error(), FsError::Invalid);
    let reply = bench
        .run(commit(vec![], vec![file_commit(1, vec![])]))
        .reply;
    assert_eq!(reply.error(), FsError::IsDirectory);
}

#[test]
fn the_last_byte_that_a_file_can_have_is_written_and_truncated() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    bench.write(ino, &[(FILE_BYTES_MAX - 1, 1)]);
    assert_eq!(inode(&bench.world, ino).size, FILE_BYTES_MAX);
    assert_eq!(bench.truncate(ino, FILE_BYTES_MAX - 1).freed.len(), 1);
    check(&bench.world);
}

#[test]
fn truncating_and_extending_reads_zeros_while_erasures_wait() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    bench.shred(ino, 0, 1000);
    bench.truncate(ino, 3);
    assert_eq!(inode(&bench.world, ino).erases, 1);
    bench.truncate(ino, 2000);
    let mut expected = vec![Byte::Hole; 2000];
    (expected[0], expected[2]) = (Byte::Inline(b'x'), Byte::Inline(b'x'));
    assert_eq!(bench.world.read(ino), expected);
    check(&bench.world);

    // New data over dead data lives, is trimmed and splits as usual.
    let segment = bench.write(ino, &[(100, 800)]);
    expected[100..900].copy_from_slice(&std::array::from_fn::<_, 800, _>(|at| {
        Byte::At(segment, 0, at as u32)
    }));
    assert_eq!(bench.world.read(ino), expected);
    bench.ok(Op::Fallocate(v1::Fallocate {
        ino,
        offset: 400,
        length: 100,
        punch_hole: true,
        ..v1::Fallocate::default()
    }));
    expected[400..500].fill(Byte::Hole);
    assert_eq!(bench.world.read(ino), expected);
    check(&bench.world);

    let mut steps = 0;
    loop {
        let applied = bench.world.system(Op::EraseStep(v1::EraseStep { ino }));
        check(&bench.world);
        assert_eq!(bench.world.read(ino), expected);
        steps += 1;
        if applied.reply.done {
            break;
        }
    }
    assert!(steps >= 3, "{steps} steps");
    assert_eq!(inode(&bench.world, ino).allocated, 702);
    let again = bench.world.system(Op::EraseStep(v1::EraseStep { ino }));
    assert!(again.reply.done && again.changes.len() == 1);
}

#[test]
fn rewriting_a_shredded_file_in_one_commit_leaves_one_erased_range() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    bench.shred(ino, 0, 10_000);
    let ranges: Vec<_> = (0..100).map(|i| (200 * i, 200)).collect();
    let segment = bench.write(ino, &ranges);
    // The first few are removed in place; what is left is one range.
    assert_eq!(inode(&bench.world, ino).erases, 1);
    check(&bench.world);
    let content = bench.world.read(ino);
    for (at, byte) in content.iter().enumerate() {
        let (frame, frame_offset) = (at as u32 / 200, at as u32 % 200);
        assert_eq!(*byte, Byte::At(segment, frame, frame_offset));
    }
    bench.world.finish_erasures();
    check(&bench.world);
    assert_eq!(bench.world.read(ino), content);
    assert_eq!(inode(&bench.world, ino).allocated, 20_000);
}

#[test]
fn the_commit_that_changes_the_most_records_stays_bounded() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    // Pairs of neighbours in segments of their own; each is then overwritten over their border.
    for i in 0..100 {
        bench.write(ino, &[(100 * i, 50)]);
        bench.write(ino, &[(100 * i + 50, 50)]);
    }
    bench.acknowledged_below = bench.sequence;
    let segments: Vec<_> = (0..50).map(|_| bench.segment()).collect();
    let extents = segments
        .iter()
        .enumerate()
        .map(|(i, s)| extent(100 * i as u64 + 25, 50, s.id, 0, 0));
    let file = file_commit(ino, extents.collect());
    let applied = bench.ok(commit(segments, vec![file]));
    assert!(applied.changes.len() > 300, "{}", applied.changes.len());
    check(&bench.world);
}

#[test]
fn hundreds_of_thousands_of_extents_are_reaped_in_bounded_steps() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    bench.write(ino, &[(0, 10)]);
    bench.shred(ino, 1000, 200_000);
    let refused = bench
        .world
        .apply(crate::world::system(Op::Reap(v1::Reap { ino })));
    assert_eq!(refused.reply.error(), FsError::Invalid);
    assert!(bench.unlink("f").reply.orphaned);
    let mut freed = 0;
    for step in 0.. {
        let applied = bench.world.system(Op::Reap(v1::Reap { ino }));
        assert!(changed(&applied, Tag::Extent) <= 300);
        freed += applied.freed.len();
        if applied.reply.done {
            assert!(step > 600);
            break;
        }
    }
    assert_eq!(freed, 1);
    check(&bench.world);
    let again = bench.world.system(Op::Reap(v1::Reap { ino }));
    assert!(again.reply.done);
    let counters = query::counters(&bench.world.records, VOLUME).unwrap();
    assert_eq!((counters.used_bytes, counters.segments), (0, 0));
}

#[test]
fn adjacent_parts_of_one_frame_become_one_extent() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    let id = bench.write(ino, &[(0, 100)]);
    for (offset, frame_offset) in [(100, 100), (200, 200), (300, 299)] {
        let extents = vec![extent(offset, 100, id, 0, frame_offset)];
        bench.ok(commit(vec![], vec![file_commit(ino, extents)]));
    }
    assert_eq!(bench.extents(ino), [(0, 300, id), (300, 100, id)]);
    check(&bench.world);
}

#[test]
fn a_copy_of_many_extents_is_short_and_goes_on() {
    let mut bench = Bench::new();
    let (source, target) = (bench.file("a"), bench.file("b"));
    bench.shred(source, 10, 500);
    let mut at = 0;
    let mut calls = 0;
    while at < 1009 {
        let applied = bench.ok(Op::CopyRange(v1::CopyRange {
            source,
            source_offset: at,
            target,
            target_offset: at,
            length: 1 << 40,
            ..v1::CopyRange::default()
        }));
        assert!(applied.reply.value > 0);
        at += applied.reply.value;
        calls += 1;
    }
    assert_eq!((at, calls), (1009, 3));
    assert_eq!(bench.world.read(source), bench.world.read(target));
    check(&bench.world);
}

#[test]
fn mtime_is_the_write_s_but_never_goes_back_nor_ahead() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    let created = bench.world.time;
    let mut write = |mtime: i64| {
        let file = v1::FileCommit {
            mtime,
            ..file_commit(ino, vec![inline(0, b"x")])
        };
        let reply = bench.ok(commit(vec![], vec![file])).reply;
        (reply.files[0].attr.unwrap().mtime, bench.world.time)
    };
    assert_eq!(write(created + 500).0, created + 500);
    assert_eq!(write(created + 400).0, created + 500);
    let (mtime, now) = write(created + 1_000_000_000);
    assert_eq!(mtime, now);
    let (mtime, now) = write(0);
    assert_eq!(mtime, now);
}

#[test]
fn fallocate_extends_punches_and_refuses() {
    let mut bench = Bench::new();
    let ino = bench.file("f");
    bench.write(ino, &[(0, 100)]);
    let base = v1::Fallocate {
        ino,
        offset: 50,
        length: 100,
        ..v1::Fallocate::default()
    };
    let size = |bench: &mut Bench, op| bench.ok(Op::Fallocate(op)).reply.attr.unwrap().size;
    let keep = v1::Fallocate {
        keep_size: true,
        ..base
    };
    assert_eq!(size(&mut bench, keep), 100);
    let punch = v1::Fallocate {
        punch_hole: true,
        ..base
    };
    assert_eq!(size(&mut bench, punch), 100);
    assert_eq!(inode(&bench.world, ino).allocated, 50);
    assert_eq!(size(&mut bench, base), 150);
    let zero = v1::Fallocate {
        zero_range: true,
        offset: 0,
        length: 151,
        ..base
    };
    assert_eq!(size(&mut bench, zero), 151);
    assert_eq!(inode(&bench.world, ino).allocated, 0);
    let both = v1::Fallocate {
        zero_range: true,
        punch_hole: true,
        ..base
    };
    let nothing = v1::Fallocate { length: 0, ..base };
    let huge = v1::Fallocate {
        length: FILE_BYTES_MAX,
        ..base
    };
    let directory = v1::Fallocate { ino: 1, ..base };
    let gone = v1::Fallocate { ino: 999, ..base };
    for (op, error) in [
        (both, FsError::NotSupported),
        (nothing, FsError::Invalid),
        (huge, FsError::FileTooLarge),
        (directory, FsError::IsDirectory),
        (gone, FsError::Stale),
    ] {
        assert_eq!(bench.run(Op::Fallocate(op)).reply.error(), error);
    }
}

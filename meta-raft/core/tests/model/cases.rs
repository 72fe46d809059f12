//! Single situations of the data path.

use bytes::Bytes;
use heliofs_proto::error::FsError;
use heliofs_proto::limits::{FILE_BYTES_MAX, FRAME_BYTES_MAX};
use heliofs_proto::v1::{self, command::Op};
use meta_core::keys::Tag;
use meta_core::query;

use crate::bench::{Bench, changed, commit, extent, file_commit, inline};
use crate::check::{check, has_segment, inode};
use crate::world::{Byte, VOLUME};

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
    bench.ok(commit(vec![segment, segment], vec![file(60)]));
    let (fresh, other) = (bench.segment(), bench.segment());
    let other = v1::Segment {
        id: fresh.id,
        length: 3,
        ..other
    };
    let reply = bench.run(commit(vec![fresh, other], vec![file(80)])).reply;
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
    let ranges: Vec<_> = (0..80).map(|i| (250 * i, 250)).collect();
    let segment = bench.write(ino, &ranges);
    // The first few are removed in place; what is left is one range.
    assert_eq!(inode(&bench.world, ino).erases, 1);
    check(&bench.world);
    let content = bench.world.read(ino);
    for (at, byte) in content.iter().enumerate() {
        let (frame, frame_offset) = (at as u32 / 250, at as u32 % 250);
        assert_eq!(*byte, Byte::At(segment, frame, frame_offset));
    }
    bench.world.finish_erasures();
    check(&bench.world);
    assert_eq!(bench.world.read(ino), content);
    assert_eq!(inode(&bench.world, ino).allocated, 20_000);
}

#[test]
fn a_commit_that_cuts_two_extents_in_each_of_many_files_stays_bounded() {
    let mut bench = Bench::new();
    // Neighbours in segments of their own; each pair is then overwritten over its border.
    let files: Vec<u64> = (0..96).map(|i| bench.file(&i.to_string())).collect();
    for ino in &files {
        bench.write(*ino, &[(0, 50)]);
        bench.write(*ino, &[(50, 50)]);
    }
    let segments: Vec<_> = files.iter().map(|_| bench.segment()).collect();
    let commits = files
        .iter()
        .zip(&segments)
        .map(|(ino, segment)| file_commit(*ino, vec![extent(25, 50, segment.id, 0, 0)]));
    let commits = commits.collect();
    let applied = bench.ok(commit(segments, commits));
    // Four extents, three segments and the inode per file.
    assert!((768..800).contains(&applied.changes.len()));
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

//! Properties of random histories.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{self, Command, FileKind, QuotaKind, command::Op};
use meta_core::keys::{self, Tag};
use meta_core::{Applied, Overlay, Sums, Touched, apply, invariants, query};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use crate::check::{check, inode};
use crate::reference::{Node, ROOT, Reference};
use crate::script::{Step, Writer, quota_steps, steps};
use crate::world::{Byte, Records, VOLUME, World, write_changes};

/// Applies a command to both and compares what they say.
fn compare(world: &mut World, reference: &mut Reference, command: Command) -> Applied {
    let before = query::stat_fs(&world.records, VOLUME, Ino(0)).unwrap();
    let quotas = all_quotas(world);
    let applied = world.apply(command.clone());
    let after = query::stat_fs(&world.records, VOLUME, Ino(0)).unwrap();
    let error = applied.reply.error();
    let capacity = before.capacity_bytes_max;
    if error == FsError::NoSpace && !reference.remembers(&command) {
        // How much of an overwrite is given back at once is the core's choice: take the refusal if more would not have fitted.
        let asked = match command.op.as_ref().unwrap() {
            Op::Commit(op) => {
                let extents = op.files.iter().flat_map(|file| &file.extents);
                extents.map(|extent| extent.length).sum()
            }
            Op::CopyRange(op) => op.length,
            op => panic!("no space for {op:?}"),
        };
        assert!(capacity != 0 && before.used_bytes + asked > capacity);
        reference.remember(&command, &applied.reply);
        return applied;
    }
    if !reference.remembers(&command) && refused_by_quotas(&command, error, &quotas) {
        reference.remember(&command, &applied.reply);
        return applied;
    }
    let mut next = reference.clone();
    let verdict = next.apply(&command, &applied.reply, applied.time.0);
    match verdict {
        Err(expected) => {
            assert_eq!(error, expected, "{command:?}");
            next = reference.clone();
            next.time = applied.time.0;
            next.remember(&command, &applied.reply);
        }
        Ok(()) if !next.files.is_empty() => {
            let files: Vec<_> = applied.reply.files.iter().map(|f| f.error()).collect();
            assert_eq!(files, next.files, "{command:?}");
        }
        Ok(()) if next.repeated => assert_eq!(applied.changes.len(), 1, "{command:?}"),
        Ok(()) => assert_eq!(error, FsError::None, "{command:?}"),
    }
    // What a command overwrites and leaves to later steps still counts as used: then it may not show more than was shown.
    if capacity != 0 && after.used_bytes > capacity.max(before.used_bytes) {
        let (shown_before, shown) = (reference.shown_bytes(), next.shown_bytes());
        assert!(shown <= capacity.max(shown_before), "above the capacity");
    }
    for segment in &applied.freed {
        let brought = next.segments.insert(segment.0, None);
        assert!(matches!(brought, Some(Some(_))), "{segment} was not live");
    }
    // Moved bytes are the same bytes: nobody drops what was read.
    if matches!(command.op, Some(Op::Relocate(_))) {
        let content = |touched: &Touched| !matches!(touched, Touched::Inode { content: false, .. });
        assert!(!applied.touched.iter().any(content));
    } else {
        check_touched(&applied, reference, &next);
    }
    *reference = next;
    applied
}

fn all_quotas(world: &World) -> Vec<v1::Quota> {
    query::quotas(&world.records, VOLUME, (QuotaKind::Unspecified, 0), 1000).unwrap()
}

/// Whether a refusal is one that the reference knows nothing of: for that there must be quotas that explain it.
fn refused_by_quotas(command: &Command, error: FsError, quotas: &[v1::Quota]) -> bool {
    let op = command.op.as_ref().unwrap();
    match (op, error) {
        (_, FsError::None | FsError::SessionGone | FsError::AlreadyAcknowledged) => false,
        (Op::QuotaSet(_) | Op::QuotaRemove(_), _) => true,
        (Op::Rename(_) | Op::Link(_), FsError::CrossDevice) => {
            let directory = |quota: &v1::Quota| quota.kind() == QuotaKind::Directory;
            assert!(quotas.iter().any(directory), "{op:?} without a quota");
            true
        }
        (_, FsError::QuotaExceeded) => {
            let (bytes, inodes) = match op {
                Op::Commit(op) => {
                    let extents = op.files.iter().flat_map(|file| &file.extents);
                    (extents.map(|extent| extent.length).sum(), 0)
                }
                Op::CopyRange(op) => (op.length, 0),
                Op::Create(_) => (0, 1),
                Op::Batch(_) => (1 << 40, 1 << 40),
                // A directory with a quota of its own takes along what is charged to it.
                Op::Rename(_) | Op::SetAttr(_) => (1 << 40, 1 << 40),
                op => panic!("over quota by {op:?}"),
            };
            let over = |used: u64, more: u64, max: u64| max != 0 && more > 0 && used + more > max;
            let explains = |quota: &v1::Quota| {
                over(quota.used_bytes, bytes, quota.bytes_max)
                    || over(quota.used_inodes, inodes, quota.inodes_max)
            };
            assert!(quotas.iter().any(explains), "{op:?} {quotas:?}");
            true
        }
        _ => false,
    }
}

/// Whatever changed is named as touched, and every attribute is as expected.
fn check_touched(applied: &Applied, before: &Reference, after: &Reference) {
    let touched = |ino: u64, what: fn(&Touched) -> bool| {
        applied.touched.iter().any(|touched| match touched {
            Touched::Inode {
                ino: touched_ino, ..
            } => touched_ino.0 == ino && what(touched),
            Touched::Entry { .. } => false,
        })
    };
    let entry = |parent: u64, name: &bytes::Bytes| {
        let touched = Touched::Entry {
            parent: Ino(parent),
            name: name.clone(),
        };
        applied.touched.contains(&touched)
    };
    for (ino, node) in &after.nodes {
        let Some(old) = before.nodes.get(ino) else {
            continue;
        };
        // Cheap first: most nodes are what they were.
        let same_content = Rc::ptr_eq(&old.content, &node.content) || old.content == node.content;
        if !same_content {
            let content =
                |touched: &Touched| matches!(touched, Touched::Inode { content, .. } if *content);
            assert!(touched(*ino, content), "content of {ino}");
        }
        if old.xattrs != node.xattrs {
            let xattr =
                |touched: &Touched| matches!(touched, Touched::Inode { xattr, .. } if *xattr);
            assert!(touched(*ino, xattr), "attributes of {ino}");
        }
        let attrs = |node: &Node| {
            (
                node.mode,
                node.nlink,
                node.uid,
                node.mtime,
                node.ctime,
                node.size(),
            )
        };
        if attrs(old) != attrs(node) {
            let attr = |touched: &Touched| matches!(touched, Touched::Inode { attr, .. } if *attr);
            assert!(touched(*ino, attr), "attr of {ino}");
        }
        let names: BTreeSet<_> = old.entries.keys().chain(node.entries.keys()).collect();
        for name in names {
            if old.entries.get(name) != node.entries.get(name) {
                assert!(entry(*ino, name), "entry {name:?} of {ino}");
            }
        }
    }
}

fn check_attr(world: &World, ino: u64, node: &Node) {
    let attr = query::get_attr(&world.records, VOLUME, Ino(ino)).expect("the node exists");
    let found = (
        attr.kind(),
        attr.mode,
        attr.nlink,
        attr.uid,
        attr.gid,
        attr.size,
    );
    let expected = (
        node.kind,
        node.mode,
        node.nlink,
        node.uid,
        node.gid,
        node.size(),
    );
    assert_eq!(found, expected, "inode {ino}");
    assert_eq!(
        (attr.mtime, attr.ctime),
        (node.mtime, node.ctime),
        "times of {ino}"
    );
    assert_eq!(attr.parent, node.parent, "parent of {ino}");
}

fn check_everything(world: &World, reference: &Reference) {
    check(world);
    for (ino, node) in &reference.nodes {
        check_attr(world, *ino, node);
        match node.kind {
            FileKind::File => assert_eq!(world.read(*ino), *node.content, "content of {ino}"),
            FileKind::Directory => {
                let page = query::read_dir(&world.records, VOLUME, Ino(*ino), 0, 100, false);
                let page = page.unwrap();
                let mut listed: Vec<_> =
                    page.entries.into_iter().map(|e| (e.name, e.ino)).collect();
                listed.sort();
                let expected: Vec<_> = match node.nlink {
                    // Gone for everybody, whatever a tree removal still has to take apart.
                    0 => vec![],
                    _ => node.entries.iter().map(|(n, i)| (n.clone(), *i)).collect(),
                };
                assert_eq!(listed, expected, "entries of {ino}");
            }
            FileKind::Symlink => {
                let target = query::read_link(&world.records, VOLUME, Ino(*ino));
                assert_eq!(target.unwrap(), node.target);
            }
            _ => {}
        }
        let names = query::list_xattr(&world.records, VOLUME, Ino(*ino))
            .unwrap()
            .names;
        assert_eq!(names, node.xattrs.keys().cloned().collect::<Vec<_>>());
    }
    let counters = query::counters(&world.records, VOLUME).unwrap();
    assert_eq!(counters.used_inodes, reference.nodes.len() as u64);
}

/// Counts to the end; then every directory is charged to its own quota or to its parent's.
fn finish_walks(world: &mut World, reference: &mut Reference) {
    for steps in 0.. {
        assert!(steps < 10_000, "walks come to an end");
        let walks = query::quota_walks(&world.records, VOLUME).unwrap();
        let Some(walk) = walks.first() else { break };
        let step = v1::QuotaStep { directory: walk.0 };
        compare(world, reference, crate::world::system(Op::QuotaStep(step)));
    }
    for (ino, node) in &reference.nodes {
        if node.is_directory() && node.nlink > 0 && *ino != ROOT {
            let (quota, around) = (inode(world, *ino).quota, inode(world, node.parent).quota);
            assert!(
                quota == around || quota == Ino(*ino),
                "{ino} is charged to {quota}"
            );
            if quota == Ino(*ino) {
                let quotas = all_quotas(world);
                let own = quotas.iter().find(|quota| quota.id == *ino).unwrap();
                assert_eq!(own.parent, around.0, "what encloses quota {ino}");
            }
        }
    }
    check(world);
}

/// Removes and frees whatever has no name or no reader any more; then nothing may be left over.
fn quiesce(world: &mut World, reference: &mut Reference) {
    let run = |world: &mut World, reference: &mut Reference, op| {
        compare(world, reference, crate::world::system(op))
            .reply
            .done
    };
    while let Some(intent) = reference.intents.keys().next().copied() {
        let step = v1::RemoveTreeStep { intent };
        run(world, reference, Op::RemoveTreeStep(step));
    }
    while let Some(ino) = reference
        .nodes
        .iter()
        .find(|(_, node)| node.orphan)
        .map(|(ino, _)| *ino)
    {
        run(world, reference, Op::Reap(v1::Reap { ino }));
    }
    finish_walks(world, reference);
    for quota in all_quotas(world) {
        let limited = quota.bytes_max != 0 || quota.inodes_max != 0;
        if limited {
            let remove = v1::QuotaRemove {
                kind: quota.kind,
                id: quota.id,
            };
            let removed = compare(
                world,
                reference,
                crate::world::system(Op::QuotaRemove(remove)),
            );
            assert_eq!(removed.reply.error(), FsError::None);
            finish_walks(world, reference);
        }
    }
    for (ino, node) in &reference.nodes {
        assert!(
            !node.is_directory() || inode(world, *ino).quota == Ino(0),
            "{ino} is charged after all quotas were taken back"
        );
    }
    let left = all_quotas(world);
    let left_over = |quota: &v1::Quota| quota.kind() == QuotaKind::Directory && quota.removed;
    assert!(left.iter().all(left_over), "{left:?}");

    let mut referenced = BTreeSet::new();
    for (ino, node) in &reference.nodes.clone() {
        if node.kind == FileKind::File {
            while !run(world, reference, Op::EraseStep(v1::EraseStep { ino: *ino })) {}
            let allocated = node
                .content
                .iter()
                .filter(|byte| **byte != Byte::Hole)
                .count();
            let attr = query::get_attr(&world.records, VOLUME, Ino(*ino)).unwrap();
            assert_eq!(attr.allocated, allocated as u64, "nothing dead is left");
        }
        referenced.extend(node.content.iter().filter_map(|byte| match byte {
            Byte::At(segment, ..) => Some(*segment),
            _ => None,
        }));
    }
    let live = reference
        .segments
        .iter()
        .filter(|(_, state)| state.is_some());
    let live: BTreeSet<u64> = live.map(|(id, _)| *id).collect();
    assert_eq!(
        live, referenced,
        "segments live as long as somebody shows them"
    );
    let reachable = reference.nodes.values().map(|node| node.entries.len());
    assert!(reachable.sum::<usize>() + 1 >= reference.nodes.len());
}

/// The same log, `group` commands to an overlay.
fn replay(mut records: Records, log: &[(meta_core::Stamp, Command)], group: usize) -> Records {
    let mut sums = Sums::default();
    for commands in log.chunks(group) {
        let mut overlay = Overlay::new(&records);
        for (stamp, command) in commands {
            let applied = apply(&overlay, *stamp, command).expect("records are sound");
            overlay.absorb(&applied.changes);
        }
        let changes = overlay.into_changes();
        write_changes(&mut records, &mut sums, &changes);
    }
    records
}

fn run(steps: &[Step]) -> (World, Reference, Vec<Records>) {
    let settings = v1::VolumeSettings {
        core_level: meta_core::limits::CORE_LEVEL_MAX,
        ..v1::VolumeSettings::default()
    };
    let mut world = World::new(settings);
    let mut reference = Reference::new(world.time);
    let mut writer = Writer::default();
    let mut snapshots = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        if index == steps.len() / 2 {
            snapshots.push(world.records.clone());
        }
        for part in 0..Writer::parts(step) {
            while let Some(command) = writer.before(&reference) {
                compare(&mut world, &mut reference, command);
            }
            let Some(command) = writer.command(&reference, step, part) else {
                continue;
            };
            let reap = matches!(command.op, Some(Op::Reap(_)));
            loop {
                let applied = compare(&mut world, &mut reference, command.clone());
                // Once begun, a reap goes on to its end: nobody has the file open.
                if !reap || applied.reply.done || applied.reply.error() != FsError::None {
                    break;
                }
            }
        }
        if index % 16 == 0 {
            check_everything(&world, &reference);
        }
    }
    (world, reference, snapshots)
}

/// `PROPTEST_CASES` asks for a longer run.
#[allow(
    clippy::disallowed_methods,
    reason = "a setting of the test, not of the core"
)]
fn config(cases_default: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").map(|cases| cases.parse().expect("a number"));
    ProptestConfig {
        cases: cases.unwrap_or(cases_default),
        failure_persistence: None,
        max_shrink_time: 60_000,
        ..ProptestConfig::default()
    }
}

/// How often scripts come to which outcomes.
fn reached(scripts: fn() -> BoxedStrategy<Vec<Step>>) -> BTreeMap<String, usize> {
    let mut runner = TestRunner::deterministic();
    let mut reached = BTreeMap::<String, usize>::new();
    for _ in 0..120 {
        let script = scripts()
            .new_tree(&mut runner)
            .expect("no filters")
            .current();
        let (world, ..) = run(&script);
        let mut again = World::default();
        for (stamp, command) in &world.log {
            let (from, to) = keys::tag_range(VOLUME, Tag::Erase);
            let erasing = again.records.range(from..to).count();
            again.time = stamp.time.0 - 1000;
            let applied = again.apply(command.clone());
            let op = format!("{:?}", command.op.as_ref().expect("scripts set an op"));
            let op = op.split('(').next().unwrap_or_default().to_owned();
            let mut what = vec![format!("{op} {}", applied.reply.error().as_str_name())];
            let files = applied.reply.files.iter();
            what.extend(files.map(|file| format!("file {}", file.error().as_str_name())));
            if matches!(command.op, Some(Op::Batch(_))) && applied.reply.error() == FsError::None {
                what.push(match applied.reply.refused() {
                    FsError::None => "batch whole".to_owned(),
                    FsError::Stale => "batch stale".to_owned(),
                    _ => "batch stopped".to_owned(),
                });
            }
            for what in what {
                if erasing > 0 {
                    *reached.entry(format!("{what} while erasing")).or_default() += 1;
                }
                *reached.entry(what).or_default() += 1;
            }
            *reached.entry("freed".to_owned()).or_default() += applied.freed.len();
        }
    }
    reached
}

/// Guards the others: a script that never gets anywhere proves nothing.
#[test]
fn scripts_reach_what_they_are_meant_to_reach() {
    let reached = reached(|| steps(160).boxed());
    for (what, at_least) in [
        ("Commit FS_ERROR_NONE", 300),
        ("Commit FS_ERROR_NONE while erasing", 100),
        ("Commit FS_ERROR_NO_SPACE", 1),
        ("Commit FS_ERROR_SEGMENT_FENCED", 5),
        ("Commit FS_ERROR_SESSION_GONE", 1),
        ("CopyRange FS_ERROR_NONE while erasing", 20),
        ("SetAttr FS_ERROR_NONE while erasing", 20),
        ("Fallocate FS_ERROR_NONE while erasing", 20),
        ("EraseStep FS_ERROR_NONE while erasing", 20),
        ("Reap FS_ERROR_NONE while erasing", 5),
        ("Rename FS_ERROR_NONE", 30),
        ("Rename FS_ERROR_INVALID", 5),
        ("Batch FS_ERROR_NONE", 100),
        ("batch whole", 40),
        ("batch stopped", 40),
        ("batch stale", 10),
        ("InosReserve FS_ERROR_NONE", 50),
        ("Create FS_ERROR_EXISTS", 20),
        ("Create FS_ERROR_ALREADY_ACKNOWLEDGED", 1),
        ("Relocate FS_ERROR_NONE", 100),
        ("Relocate FS_ERROR_NONE while erasing", 15),
        ("Relocate FS_ERROR_SEGMENT_FENCED", 5),
        ("Unlink FS_ERROR_NONE", 20),
        ("Unlink FS_ERROR_NOT_EMPTY", 2),
        ("Link FS_ERROR_NONE", 5),
        ("RemoveTree FS_ERROR_NONE", 5),
        ("RemoveTreeStep FS_ERROR_NONE", 5),
        ("file FS_ERROR_STALE", 5),
        ("file FS_ERROR_INVALID", 5),
        ("freed", 100),
    ] {
        let times = reached.get(what).copied().unwrap_or(0);
        assert!(times >= at_least, "{what}: {times} times of {reached:#?}");
    }
}

#[test]
fn scripts_about_quotas_reach_what_they_are_meant_to_reach() {
    let reached = reached(|| quota_steps(200).boxed());
    for (what, at_least) in [
        ("QuotaSet FS_ERROR_NONE", 200),
        ("QuotaSet FS_ERROR_BUSY", 20),
        ("QuotaRemove FS_ERROR_NONE", 50),
        ("QuotaStep FS_ERROR_NONE", 300),
        ("Create FS_ERROR_QUOTA_EXCEEDED", 20),
        ("Commit FS_ERROR_QUOTA_EXCEEDED", 20),
        ("Rename FS_ERROR_QUOTA_EXCEEDED", 3),
        ("Rename FS_ERROR_CROSS_DEVICE", 10),
        ("Rename FS_ERROR_NONE", 200),
        ("Link FS_ERROR_CROSS_DEVICE", 10),
    ] {
        let times = reached.get(what).copied().unwrap_or(0);
        assert!(times >= at_least, "{what}: {times} times of {reached:#?}");
    }
}

proptest! {
    #![proptest_config(config(256))]

    #[test]
    fn quotas_count_what_is_charged_to_them(steps in quota_steps(200)) {
        let (mut world, mut reference, _) = run(&steps);
        check_everything(&world, &reference);
        quiesce(&mut world, &mut reference);
        check_everything(&world, &reference);
    }
}

proptest! {
    #![proptest_config(config(96))]

    #[test]
    fn the_core_does_what_the_reference_does(steps in steps(160)) {
        let (mut world, mut reference, _) = run(&steps);
        check_everything(&world, &reference);
        quiesce(&mut world, &mut reference);
        check_everything(&world, &reference);
        prop_assert!(reference.nodes.contains_key(&ROOT));
    }

}

proptest! {
    #![proptest_config(config(96))]

    #[test]
    fn the_parts_of_a_check_find_what_the_whole_finds(
        steps in quota_steps(120), lost in any::<prop::sample::Index>(), of in 1u64..5,
    ) {
        let (world, ..) = run(&steps);
        let mut records = world.records;
        let damage: Vec<_> = records.keys().cloned().collect();
        let lost = lost.get(&damage);
        records.remove(lost);
        let all = |found: Result<(), Vec<String>>| found.err().unwrap_or_default();
        let whole: BTreeSet<String> = all(invariants::check(&records, VOLUME)).into_iter().collect();
        let parts = (0..of).flat_map(|index| {
            all(invariants::check_part(&records, VOLUME, invariants::Part { index, of }))
        });
        prop_assert_eq!(&whole, &parts.collect::<BTreeSet<_>>());
        // What nothing refers to may be lost without a trace, and so may what only commands look at.
        let traceless = matches!(
            Tag::of(lost),
            Some(Tag::Session | Tag::Reply | Tag::SegmentBlock | Tag::QuotaWalk)
        );
        // A user's or a group's quota, while it is taken back, is one of these.
        let owners = Tag::of(lost) == Some(Tag::Quota)
            && keys::number(lost, 0) != Some(QuotaKind::Directory as u64);
        prop_assert!(traceless || owners || !whole.is_empty(), "{lost:?} was not missed");
    }
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn neither_batching_nor_a_snapshot_in_between_changes_the_outcome(
        steps in steps(80), group in 2usize..40,
    ) {
        let (world, _, snapshots) = run(&steps);
        prop_assert_eq!(&replay(Records::new(), &world.log, group), &world.records);
        for snapshot in snapshots {
            let head = query::head(&snapshot, VOLUME).unwrap().unwrap();
            let tail = &world.log[head.position.seq as usize..];
            prop_assert_eq!(&replay(snapshot, tail, group), &world.records);
        }
    }
}

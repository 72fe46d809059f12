//! Tree removals: bounded steps, whatever the tree looks like.

use std::collections::BTreeSet;

use meta_core::query;

use super::*;

fn finish(volume: &mut Volume, intent: u64) -> usize {
    let mut steps = 0;
    loop {
        let step = Op::RemoveTreeStep(v1::RemoveTreeStep { intent });
        let done = volume.run(step).unwrap().done;
        volume.check();
        steps += 1;
        if done {
            return steps;
        }
    }
}

fn remove_tree(volume: &mut Volume, parent: u64, name: &'static str) -> v1::Reply {
    let name = Bytes::from(name);
    volume
        .run(Op::RemoveTree(v1::RemoveTree { parent, name }))
        .unwrap()
}

#[test]
fn a_wide_and_deep_tree_is_taken_apart_in_bounded_steps_and_names_elsewhere_survive() {
    let mut volume = Volume::new();
    let tree = ino(&volume.run(mkdir(ROOT, "tree")).unwrap());
    let mut expected = BTreeSet::from([tree]);
    let mut parent = tree;
    for level in 0..5 {
        for number in 0..130 {
            let file = ino(&volume.run(create(parent, format!("f{number}"))).unwrap());
            volume
                .run(link(file, parent, format!("l{number}")))
                .unwrap();
            if level == 2 && number < 10 {
                volume
                    .run(link(file, ROOT, format!("kept{number}")))
                    .unwrap();
            } else {
                expected.insert(file);
            }
        }
        parent = ino(&volume.run(mkdir(parent, "deeper")).unwrap());
        expected.insert(parent);
    }
    let reply = remove_tree(&mut volume, ROOT, "tree");
    assert!(reply.value > 0 && !reply.done);
    volume.check();
    assert_eq!(
        query::lookup(&volume.records, VOLUME, Ino::ROOT, b"tree"),
        Err(FsError::NotFound.into())
    );
    assert_eq!(volume.run(create(tree, "late")), Err(FsError::NotFound));
    assert_eq!(finish(&mut volume, reply.value), 15);
    let orphans = query::orphans(&volume.records, VOLUME, Ino(0), 4096).unwrap();
    let orphans: BTreeSet<_> = orphans.into_iter().map(|(ino, _)| ino.0).collect();
    assert_eq!(orphans, expected);
    let kept = query::read_dir(&volume.records, VOLUME, Ino::ROOT, 0, 0, true).unwrap();
    assert_eq!(kept.entries.len(), 10);
    assert!(
        kept.entries
            .iter()
            .all(|entry| entry.attr.as_ref().unwrap().nlink == 1)
    );
}

#[test]
fn what_moves_out_of_a_tree_before_its_directory_is_reached_is_saved() {
    let mut volume = Volume::new();
    let tree = ino(&volume.run(mkdir(ROOT, "tree")).unwrap());
    let sub = ino(&volume.run(mkdir(tree, "sub")).unwrap());
    let deep = ino(&volume.run(mkdir(sub, "deep")).unwrap());
    volume.run(create(deep, "file")).unwrap();
    let intent = remove_tree(&mut volume, ROOT, "tree").value;
    // The tree itself is empty for everybody; what somebody still has open below it is not.
    assert_eq!(
        volume.run(rename(tree, "sub", ROOT, "sub")),
        Err(FsError::NotFound)
    );
    volume.run(rename(sub, "deep", ROOT, "deep")).unwrap();
    finish(&mut volume, intent);
    let walk = query::walk(&volume.records, VOLUME, b"/deep/file").unwrap();
    assert_eq!(walk.attrs.len(), 3);
}

#[test]
fn two_removals_at_once_do_not_mix() {
    let mut volume = Volume::new();
    let outer = ino(&volume.run(mkdir(ROOT, "outer")).unwrap());
    let inner = ino(&volume.run(mkdir(outer, "inner")).unwrap());
    let innermost = ino(&volume.run(mkdir(inner, "innermost")).unwrap());
    volume.run(create(innermost, "file")).unwrap();
    let first = remove_tree(&mut volume, ROOT, "outer").value;
    let second = remove_tree(&mut volume, inner, "innermost").value;
    assert_ne!(first, second);
    let pending = query::intents(&volume.records, VOLUME, 0, 10).unwrap();
    assert_eq!(
        pending.iter().map(|intent| intent.id).collect::<Vec<_>>(),
        [first, second]
    );
    finish(&mut volume, first);
    assert_eq!(
        query::intents(&volume.records, VOLUME, 0, 10)
            .unwrap()
            .len(),
        1
    );
    finish(&mut volume, second);
    assert_eq!(query::intents(&volume.records, VOLUME, 0, 10).unwrap(), []);
    assert_eq!(
        query::orphans(&volume.records, VOLUME, Ino(0), 10)
            .unwrap()
            .len(),
        4
    );
}

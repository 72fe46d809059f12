//! Counting a large tree and many owners, in bounded steps.

use super::*;
use heliofs_proto::v1::{Quota, QuotaKind};
use meta_core::query;

fn volume() -> Volume {
    let mut volume = Volume::new();
    let settings = v1::VolumeSettings {
        core_level: 2,
        ..v1::VolumeSettings::default()
    };
    let update = v1::SettingsUpdate {
        settings: Some(settings),
    };
    volume.run(Op::SettingsUpdate(update)).unwrap();
    volume
}

fn count(volume: &mut Volume) -> usize {
    let mut steps = 0;
    while let Some(walk) = query::quota_walks(&volume.records, VOLUME).unwrap().first() {
        let step = v1::QuotaStep { directory: walk.0 };
        volume.run(Op::QuotaStep(step)).unwrap();
        steps += 1;
    }
    volume.check();
    steps
}

fn quota(volume: &Volume, kind: QuotaKind, id: u64) -> Quota {
    let quotas = query::quotas(&volume.records, VOLUME, (QuotaKind::Unspecified, 0), 10_000);
    let mut quotas = quotas.unwrap().into_iter();
    quotas
        .find(|quota| (quota.kind(), quota.id) == (kind, id))
        .unwrap()
}

fn set(volume: &mut Volume, kind: QuotaKind, id: u64, inodes: u64) {
    let set = v1::QuotaSet {
        kind: kind as i32,
        id,
        inodes_max: Some(inodes),
        bytes_max: None,
    };
    volume.run(Op::QuotaSet(set)).unwrap();
}

#[test]
fn a_large_tree_is_counted_and_forgotten_in_bounded_steps() {
    let mut volume = volume();
    let top = ino(&volume.run(mkdir(ROOT, "top")).unwrap());
    for dir in 0..40 {
        let dir = ino(&volume.run(mkdir(top, format!("d{dir}"))).unwrap());
        for file in 0..450 {
            volume.run(create(dir, format!("f{file}"))).unwrap();
        }
    }
    set(&mut volume, QuotaKind::Directory, top, 1);
    let steps = count(&mut volume);
    assert!(steps > 40 * 2, "{steps}");
    let counted = quota(&volume, QuotaKind::Directory, top);
    assert_eq!(counted.used_inodes, 1 + 40 + 40 * 450);
    assert!(!counted.counting);

    let remove = v1::QuotaRemove {
        kind: QuotaKind::Directory as i32,
        id: top,
    };
    volume.run(Op::QuotaRemove(remove)).unwrap();
    count(&mut volume);
    let left = query::quotas(&volume.records, VOLUME, (QuotaKind::Unspecified, 0), 10);
    assert_eq!(left.unwrap(), []);
}

#[test]
fn many_owners_are_counted_while_files_come_and_go() {
    let mut volume = volume();
    for owner in 0..2000u32 {
        let command = v1::Command {
            volume: VOLUME.0,
            caller: Some(v1::Caller {
                uid: owner,
                gid: 10_000 + owner,
                ..v1::Caller::default()
            }),
            op: Some(create(ROOT, format!("f{owner}"))),
            ..v1::Command::default()
        };
        volume.apply(&command);
    }
    set(&mut volume, QuotaKind::User, 7, 5);
    // Half way: what was counted is charged at once, the rest when its turn comes.
    for _ in 0..2 {
        let step = v1::QuotaStep { directory: 0 };
        volume.run(Op::QuotaStep(step)).unwrap();
    }
    volume.check();
    for (name, owner) in [("f20", 7), ("f1900", 7), ("f7", 8)] {
        let found = query::lookup(&volume.records, VOLUME, Ino::ROOT, name.as_bytes());
        let chown = v1::SetAttr {
            ino: found.unwrap().ino,
            uid: Some(owner),
            ..v1::SetAttr::default()
        };
        volume.run(Op::SetAttr(chown)).unwrap();
    }
    volume.check();
    count(&mut volume);
    assert_eq!(quota(&volume, QuotaKind::User, 7).used_inodes, 2);
    assert_eq!(quota(&volume, QuotaKind::User, 8).used_inodes, 2);
    assert_eq!(quota(&volume, QuotaKind::Group, 10_020).used_inodes, 1);
}

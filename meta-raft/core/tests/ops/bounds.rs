//! What is bounded, and what a caller hears who reaches the bound.

use heliofs_proto::limits::{LINKS_MAX, XATTR_LIST_BYTES_MAX, XATTR_VALUE_BYTES_MAX};
use meta_core::limits::{XATTR_BYTES_PER_INODE_MAX, XATTRS_PER_INODE_MAX};
use meta_core::query;

use super::*;

#[test]
fn an_inode_has_at_most_links_max_names() {
    let mut volume = Volume::new();
    let file = ino(&volume.run(create(ROOT, "0")).unwrap());
    for number in 1..LINKS_MAX {
        volume.run(link(file, ROOT, number.to_string())).unwrap();
    }
    assert_eq!(
        volume.run(link(file, ROOT, "more")),
        Err(FsError::TooManyLinks)
    );
    volume.run(unlink(ROOT, "7", false)).unwrap();
    volume.run(link(file, ROOT, "more")).unwrap();
    volume.check();
}

#[test]
fn attributes_of_an_inode_are_bounded_in_number() {
    let mut volume = Volume::new();
    for number in 0..XATTRS_PER_INODE_MAX {
        volume
            .run(set_xattr(ROOT, format!("user.{number}"), "v"))
            .unwrap();
    }
    assert_eq!(
        volume.run(set_xattr(ROOT, "user.more", "v")),
        Err(FsError::NoSpace)
    );
    volume.run(set_xattr(ROOT, "user.7", "other")).unwrap();
    let names = query::list_xattr(&volume.records, VOLUME, Ino::ROOT)
        .unwrap()
        .names;
    assert_eq!(names.len(), XATTRS_PER_INODE_MAX);
    let remove = Op::RemoveXattr(v1::RemoveXattr {
        ino: ROOT,
        name: "user.7".into(),
    });
    volume.run(remove).unwrap();
    volume.run(set_xattr(ROOT, "user.more", "v")).unwrap();
    volume.check();
}

#[test]
fn attributes_of_an_inode_are_bounded_in_bytes() {
    let mut volume = Volume::new();
    let value = vec![b'v'; XATTR_VALUE_BYTES_MAX];
    let mut count = 0;
    while volume
        .run(set_xattr(ROOT, format!("user.{count}"), value.clone()))
        .is_ok()
    {
        count += 1;
    }
    assert_eq!(count, XATTR_BYTES_PER_INODE_MAX / XATTR_VALUE_BYTES_MAX - 1);
    // A smaller value in place of a large one needs no room.
    volume.run(set_xattr(ROOT, "user.0", "")).unwrap();
    volume
        .run(set_xattr(ROOT, "user.more", vec![b'v'; 60_000]))
        .unwrap();
    volume.check();
}

#[test]
fn the_list_of_names_fits_what_linux_can_return() {
    let mut volume = Volume::new();
    let mut bytes = 0;
    for number in 0..XATTRS_PER_INODE_MAX {
        let name = format!("user.{number:0250}");
        match volume.run(set_xattr(ROOT, name.clone(), "")) {
            Ok(_) => bytes += name.len() + 1,
            Err(error) => {
                assert_eq!(error, FsError::NoSpace);
                assert!(bytes + name.len() + 1 > XATTR_LIST_BYTES_MAX);
                break;
            }
        }
    }
    assert!(bytes <= XATTR_LIST_BYTES_MAX && bytes > XATTR_LIST_BYTES_MAX - 256);
    volume.check();
}

#[test]
fn a_command_for_a_volume_that_does_not_exist_changes_nothing() {
    let mut volume = Volume::new();
    let command = v1::Command {
        volume: VOLUME.0 + 1,
        op: Some(create(ROOT, "a")),
        ..v1::Command::default()
    };
    let applied = volume.apply(&command);
    assert_eq!(applied.reply.error(), FsError::Stale);
    assert!(applied.changes.is_empty());
}

#[test]
fn a_build_stops_at_a_core_level_that_it_does_not_know() {
    let volume = Volume::new();
    let settings = v1::VolumeSettings {
        core_level: meta_core::limits::CORE_LEVEL_MAX + 1,
        ..v1::VolumeSettings::default()
    };
    let command = v1::Command {
        volume: VOLUME.0,
        op: Some(Op::SettingsUpdate(v1::SettingsUpdate {
            settings: Some(settings),
        })),
        ..v1::Command::default()
    };
    let stamp = Stamp { time: UnixNanos(0) };
    let stopped = apply(&volume.records, stamp, &command).unwrap_err();
    assert!(matches!(
        stopped,
        meta_core::Corruption::UpgradeRequired { .. }
    ));
}

//! Random histories of the name space: whatever is asked, the volume stays consistent, and nothing is lost that has a name.

use proptest::prelude::*;

use super::*;

fn name() -> impl Strategy<Value = Bytes> {
    prop_oneof![Just("a"), Just("b"), Just("c"), Just("longer")].prop_map(Bytes::from)
}

fn op() -> impl Strategy<Value = Op> {
    // The first dozen inodes, some of which do not exist (yet, or any more).
    let some = || 1..14u64;
    prop_oneof![
        3 => (some(), name()).prop_map(|(parent, name)| mkdir(parent, name)),
        2 => (some(), name()).prop_map(|(parent, name)| create(parent, name)),
        1 => (some(), some(), name()).prop_map(|(ino, parent, name)| link(ino, parent, name)),
        2 => (some(), name(), any::<bool>()).prop_map(|(parent, name, directory)| unlink(parent, name, directory)),
        4 => (some(), name(), some(), name(), 0..4u8).prop_map(|(parent, name, new_parent, new_name, how)| {
            Op::Rename(v1::Rename {
                parent,
                name,
                new_parent,
                new_name,
                no_replace: how == 0,
                exchange: how == 1,
            })
        }),
        1 => (some(), name()).prop_map(|(parent, name)| Op::RemoveTree(v1::RemoveTree { parent, name })),
        1 => (1..4u64).prop_map(|intent| Op::RemoveTreeStep(v1::RemoveTreeStep { intent })),
        1 => (some(), 0..0o10000u32).prop_map(|(ino, mode)| Op::SetAttr(v1::SetAttr {
            ino,
            mode: Some(mode),
            ..v1::SetAttr::default()
        })),
        1 => (some(), 0..2u32, any::<bool>()).prop_map(|(ino, user, default)| {
            let which = if default { "system.posix_acl_default" } else { "system.posix_acl_access" };
            set_xattr(ino, which, acl(user))
        }),
        1 => (some(), 0..3u8).prop_map(|(ino, which)| Op::RemoveXattr(v1::RemoveXattr {
            ino,
            name: ["system.posix_acl_default", "system.posix_acl_access", "security.capability"]
                [usize::from(which)].into(),
        })),
        1 => some().prop_map(|ino| set_xattr(ino, "security.capability", "cap")),
    ]
}

/// A minimal ACL, or one that names a user.
fn acl(user: u32) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    let named = [(2u16, 6u16, user), (16, 5, u32::MAX)];
    let all = [
        (1, 7, u32::MAX),
        named[0],
        (4, 4, u32::MAX),
        named[1],
        (32, 1, u32::MAX),
    ];
    for (tag, permissions, id) in all {
        if user > 0 || ![2, 16].contains(&tag) {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(permissions.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_history_of_names_leaves_a_consistent_volume(ops in proptest::collection::vec(op(), 0..60)) {
        let mut volume = Volume::new();
        for op in ops {
            let before = volume.records.clone();
            match volume.run(op.clone()) {
                Ok(_) => {}
                Err(_) => {
                    // A refusal moves the head and is remembered; nothing else.
                    use meta_core::keys::Tag;
                    let files = |records: &BTreeMap<Bytes, Bytes>| {
                        let mut records = records.clone();
                        records.retain(|key, _| {
                            !matches!(Tag::of(key), Some(Tag::Head | Tag::Session | Tag::Reply))
                        });
                        records
                    };
                    prop_assert_eq!(files(&volume.records), files(&before));
                }
            }
            if let Err(wrong) = meta_core::invariants::check(&volume.records, VOLUME) {
                return Err(TestCaseError::fail(format!("{op:?}: {wrong:#?}")));
            }
        }
        volume.check();
    }
}

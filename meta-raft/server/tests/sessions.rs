//! A raw client on a one-node cluster: what the session stream promises, without the client library in between.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod raw;

use std::time::Duration;

use heliofs_proto::ids::{Ino, VolumeId};
use heliofs_proto::v1::{self, FsError, LockKind, command::Op, request::Body, response};
use raw::{Cluster, Raw, attr_of, create, unlink};

#[tokio::test(flavor = "multi_thread")]
async fn files_are_created_found_renamed_and_listed() {
    let cluster = Cluster::start().await;
    let mut raw = cluster.attach().await;
    let dir = attr_of(&raw.mutate(create(1, "d", v1::FileKind::Directory)).await);
    let file = attr_of(&raw.mutate(create(dir.ino, "f", v1::FileKind::File)).await);
    let found = raw
        .read(Body::Lookup(v1::Lookup {
            parent: dir.ino,
            name: "f".into(),
        }))
        .await;
    assert_eq!(found.body, Some(response::Body::Attr(file)));
    let rename = Op::Rename(v1::Rename {
        parent: dir.ino,
        name: "f".into(),
        new_parent: 1,
        new_name: "g".into(),
        ..Default::default()
    });
    let reply = raw.mutate(rename).await;
    assert_eq!(reply.error(), FsError::None);
    let gone = raw
        .read(Body::Lookup(v1::Lookup {
            parent: dir.ino,
            name: "f".into(),
        }))
        .await;
    assert_eq!(gone.error(), FsError::NotFound);
    assert!(
        seq(gone.position) >= seq(reply.position),
        "absence has a position"
    );
    let list = v1::ReadDir {
        ino: 1,
        after: 0,
        entries_max: 10,
        plus: true,
    };
    let page = raw.read(Body::ReadDir(list)).await;
    let Some(response::Body::DirPage(page)) = page.body else {
        panic!("{page:?}")
    };
    let names: Vec<_> = page
        .entries
        .iter()
        .map(|entry| entry.name.clone())
        .collect();
    assert_eq!(names, ["d", "g"]);
    assert!(page.end && page.entries.iter().all(|entry| entry.attr.is_some()));
    let summary = raw.read(Body::Summary(v1::Summary { ino: 1 })).await;
    let Some(response::Body::Summary(summary)) = summary.body else {
        panic!("{summary:?}")
    };
    assert_eq!((summary.files, summary.directories), (1, 2));
    let walk = raw.read(Body::Walk(v1::Walk { path: "/g".into() })).await;
    let Some(response::Body::Walk(walk)) = walk.body else {
        panic!("{walk:?}")
    };
    assert_eq!(walk.attrs.last().map(|attr| attr.ino), Some(file.ino));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_sequence_returns_the_first_reply_also_on_a_new_stream() {
    let cluster = Cluster::start().await;
    let mut raw = cluster.attach().await;
    let op = create(1, "once", v1::FileKind::File);
    let first = raw.mutate_as(1, 0, op.clone()).await;
    assert_eq!(first.error(), FsError::None);
    assert_eq!(raw.mutate_as(1, 0, op.clone()).await, first);
    let mut resumed = cluster.resume(raw, |_| {}).await;
    assert_eq!(resumed.mutate_as(1, 0, op.clone()).await, first);
    // Under a new number it is a new command.
    assert!(!resumed.mutate_as(2, 2, op).await.created);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unlinked_file_lives_until_its_last_release() {
    let cluster = Cluster::start().await;
    let mut raw = cluster.attach().await;
    let mut other = cluster.attach().await;
    let ino = attr_of(&raw.mutate(create(1, "tmp", v1::FileKind::File)).await).ino;
    let opened = other
        .read(Body::Open(v1::Open {
            ino,
            extents_max: 8,
            write: false,
        }))
        .await;
    assert!(
        matches!(opened.body, Some(response::Body::Opened(_))),
        "{opened:?}"
    );
    assert!(raw.mutate(unlink(1, "tmp")).await.orphaned);
    // The create counts as an open, so both must let go. Longer than the rest after a term's begin, and than a reap takes.
    for turn in 0..8 {
        if turn == 6 {
            raw.send(Body::Release(v1::Release { ino })).await;
        }
        tokio::time::sleep(Duration::from_millis(400)).await;
        raw.read(Body::StatFs(v1::StatFs { ino: 0 })).await;
        let alive = other.read(Body::GetAttr(v1::GetAttr { ino })).await;
        assert_eq!(alive.error(), FsError::None);
    }
    // Held by somebody, so it can be opened once more.
    let again = raw
        .read(Body::Open(v1::Open {
            ino,
            extents_max: 0,
            write: false,
        }))
        .await;
    assert_eq!(again.error(), FsError::None);
    raw.send(Body::Release(v1::Release { ino })).await;
    other.send(Body::Release(v1::Release { ino })).await;
    // The creator's reply must be acknowledged, too: any later mutation does that.
    raw.mutate(create(1, "next", v1::FileKind::Directory)).await;
    cluster.until_gone(&mut other, ino).await;
    let late = raw
        .read(Body::Open(v1::Open {
            ino,
            extents_max: 0,
            write: false,
        }))
        .await;
    assert_eq!(late.error(), FsError::Stale);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_file_of_a_dead_session_is_reaped() {
    let cluster = Cluster::start().await;
    let mut raw = cluster.attach().await;
    let mut other = cluster.attach().await;
    let ino = attr_of(&raw.mutate(create(1, "tmp", v1::FileKind::File)).await).ino;
    assert!(other.mutate(unlink(1, "tmp")).await.orphaned);
    assert_eq!(
        other.read(Body::GetAttr(v1::GetAttr { ino })).await.error(),
        FsError::None
    );
    // Without a word; the session is silent from now on.
    drop(raw);
    cluster.until_gone(&mut other, ino).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_session_is_invalidated_before_it_can_read_what_is_newer() {
    let cluster = Cluster::start().await;
    let mut writer = cluster.attach().await;
    let mut reader = cluster.attach().await;
    let ino = attr_of(&writer.mutate(create(1, "f", v1::FileKind::File)).await).ino;
    for round in 0..50 {
        let before = reader.read(Body::GetAttr(v1::GetAttr { ino })).await;
        assert_eq!(before.error(), FsError::None);
        let missing = v1::Lookup {
            parent: 1,
            name: format!("new-{round}").into(),
        };
        assert_eq!(
            reader.read(Body::Lookup(missing.clone())).await.error(),
            FsError::NotFound
        );
        reader.invalidations.clear();
        let chmod = Op::SetAttr(v1::SetAttr {
            ino,
            mode: Some(0o600 + round % 8),
            ..Default::default()
        });
        let made = format!("new-{round}");
        // Under way at once: reads race with the changes.
        let (changed, created, newer) = {
            let changed = writer.begin_mutate(chmod).await;
            let created = writer
                .begin_mutate(create(1, &made, v1::FileKind::File))
                .await;
            let asked = reader.begin(Body::GetAttr(v1::GetAttr { ino })).await;
            let newer = reader.response(asked).await;
            (
                writer.reply(changed).await,
                writer.reply(created).await,
                newer,
            )
        };
        assert_eq!(
            (changed.error(), created.error()),
            (FsError::None, FsError::None)
        );
        let told = |raw: &Raw, what: fn(&v1::Invalidation) -> bool, ino: u64| {
            raw.invalidations
                .iter()
                .any(|told| told.ino == ino && what(told))
        };
        if seq(newer.position) >= seq(changed.position) {
            assert!(
                told(&reader, |told| told.attr, ino),
                "round {round}: read before the invalidation"
            );
        }
        // After the writer was answered, whoever reads has been told, in the same frame at the latest.
        let found = reader.read(Body::Lookup(missing)).await;
        assert_eq!(found.error(), FsError::None);
        assert!(told(&reader, |told| told.attr, ino));
        assert!(
            reader
                .invalidations
                .iter()
                .any(|told| told.ino == 1 && told.names.contains(&made.clone().into()))
        );
        assert!(
            reader
                .invalidations
                .iter()
                .all(|told| told.position.is_some())
        );
    }
    assert!(
        writer.invalidations.is_empty(),
        "who makes a change is not told"
    );
    cluster.stop().await;
}

fn seq(position: Option<v1::Position>) -> u64 {
    position.expect("every answer has a position").seq
}

fn lock(ino: u64, kind: LockKind, wait: bool) -> v1::Lock {
    v1::Lock {
        ino,
        owner: 1,
        kind: kind as i32,
        start: 0,
        end: u64::MAX,
        wait,
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_lock_is_granted_when_the_other_session_ends() {
    let cluster = Cluster::start().await;
    let mut holder = cluster.attach().await;
    let mut waiter = cluster.attach().await;
    let write = lock(1, LockKind::Write, false);
    assert_eq!(holder.read(Body::Lock(write)).await.error(), FsError::None);
    assert_eq!(
        waiter.read(Body::Lock(write)).await.error(),
        FsError::WouldBlock
    );
    let tested = waiter
        .read(Body::TestLock(v1::TestLock { lock: Some(write) }))
        .await;
    let Some(response::Body::Lock(reply)) = tested.body else {
        panic!("{tested:?}")
    };
    assert_eq!(
        reply.conflict.map(|lock| lock.kind),
        Some(LockKind::Write as i32)
    );
    // One that is given up is answered as interrupted.
    let cancelled = waiter
        .begin(Body::Lock(lock(1, LockKind::Read, true)))
        .await;
    waiter.cancel(cancelled).await;
    assert_eq!(
        waiter.response(cancelled).await.error(),
        FsError::Interrupted
    );
    let blocked = waiter
        .begin(Body::Lock(lock(1, LockKind::Write, true)))
        .await;
    holder.bye().await;
    assert_eq!(waiter.response(blocked).await.error(), FsError::None);
    // And again with a holder that just dies: its locks go when its time is over.
    let mut third = cluster.attach().await;
    let blocked = third
        .begin(Body::Lock(lock(1, LockKind::Write, true)))
        .await;
    drop(waiter);
    assert_eq!(third.response(blocked).await.error(), FsError::None);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_session_keeps_its_locks_and_opens() {
    let cluster = Cluster::start().await;
    let mut raw = cluster.attach().await;
    let mut other = cluster.attach().await;
    let ino = attr_of(&raw.mutate(create(1, "f", v1::FileKind::File)).await).ino;
    let write = lock(ino, LockKind::Write, false);
    assert_eq!(raw.read(Body::Lock(write)).await.error(), FsError::None);
    let mut resumed = cluster
        .resume(raw, |hello| {
            hello.opens = vec![ino];
            hello.locks = vec![v1::HeldLock { lock: Some(write) }];
        })
        .await;
    assert_eq!(
        other.read(Body::Lock(write)).await.error(),
        FsError::WouldBlock
    );
    let sessions = cluster.status().await.sessions;
    let mine = sessions
        .iter()
        .find(|status| status.session == resumed.session)
        .unwrap();
    assert_eq!((mine.opens, mine.locks, mine.connected), (1, 1, true));
    // Without re-asserting, nothing is held.
    assert!(other.mutate(unlink(1, "f")).await.orphaned);
    resumed
        .mutate(create(1, "x", v1::FileKind::Directory))
        .await;
    let resumed = cluster.resume(resumed, |_| {}).await;
    assert_eq!(other.read(Body::Lock(write)).await.error(), FsError::None);
    cluster.until_gone(&mut other, ino).await;
    drop(resumed);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_requests_are_refused_one_by_one() {
    let cluster = Cluster::start().await;
    let mut raw = cluster.attach().await;
    let long = "x".repeat(256);
    let refused = raw.mutate(create(1, &long, v1::FileKind::File)).await;
    assert_eq!(refused.error(), FsError::NameTooLong);
    let end = Op::SessionEnd(v1::SessionEnd {
        session: raw.session,
    });
    assert_eq!(raw.mutate(end).await.error(), FsError::NotPermitted);
    let init = Op::VolumeInit(v1::VolumeInit::default());
    assert_eq!(raw.mutate(init).await.error(), FsError::NotPermitted);
    let nothing = raw.read_raw(v1::Request { id: 0, body: None }).await;
    assert_eq!(nothing.error(), FsError::NotSupported);
    let bad_lock = v1::Lock {
        start: 9,
        end: 3,
        ..lock(1, LockKind::Read, false)
    };
    assert_eq!(
        raw.read(Body::Lock(bad_lock)).await.error(),
        FsError::Invalid
    );
    let stale = raw
        .read(Body::Open(v1::Open {
            ino: 0xdead,
            extents_max: 9,
            write: false,
        }))
        .await;
    assert_eq!(stale.error(), FsError::Stale);
    let mut reader = cluster.attach_as(|hello| hello.read_only = true).await;
    let refused = reader.mutate(create(1, "f", v1::FileKind::File)).await;
    assert_eq!(refused.error(), FsError::ReadOnly);

    let refusal = cluster
        .try_attach(|hello| hello.wire_version = 99)
        .await
        .err()
        .unwrap();
    assert!(
        refusal.message().contains("99") && refusal.message().contains('1'),
        "{refusal}"
    );
    let refusal = cluster
        .try_attach(|hello| hello.volume = "nope".into())
        .await
        .err()
        .unwrap();
    assert_eq!(refusal.code(), tonic::Code::NotFound);
    let refusal = cluster.attach_with_token("wrong").await.err().unwrap();
    assert_eq!(refusal.code(), tonic::Code::Unauthenticated);
    let mut unknown = cluster
        .try_attach_frames(|hello| hello.session = 0x1_0000_0077)
        .await;
    assert!(unknown.message().await.unwrap().unwrap().session_ended);
    assert!(unknown.message().await.unwrap().is_none());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ping_is_answered_and_a_bye_ends_the_session() {
    let cluster = Cluster::start().await;
    let mut raw = cluster.attach().await;
    raw.ping(77).await;
    assert_eq!(raw.pong().await, 77);
    let session = raw.session;
    raw.bye().await;
    let mut unknown = cluster
        .try_attach_frames(|hello| hello.session = session)
        .await;
    // The end is on its way until it is not.
    let frame = unknown.message().await.unwrap().unwrap();
    assert!(frame.session_ended, "{frame:?}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_once_are_all_answered() {
    let cluster = Cluster::start().await;
    let mut raw = cluster.attach().await;
    let mut expected = Vec::new();
    for number in 0..3000 {
        expected.push(raw.begin(Body::GetAttr(v1::GetAttr { ino: 1 })).await);
        if number % 12 == 0 {
            let name = format!("f{number}");
            expected.push(raw.begin_mutate(create(1, &name, v1::FileKind::File)).await);
        }
    }
    for id in expected {
        assert_eq!(raw.response(id).await.error(), FsError::None);
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_removal_goes_on_by_itself() {
    let cluster = Cluster::start().await;
    let mut raw = cluster.attach().await;
    let dir = attr_of(&raw.mutate(create(1, "tree", v1::FileKind::Directory)).await).ino;
    let mut begun = Vec::new();
    for number in 0..250 {
        let name = format!("f{number}");
        begun.push(
            raw.begin_mutate(create(dir, &name, v1::FileKind::File))
                .await,
        );
        if begun.len() == 200 {
            for id in std::mem::take(&mut begun) {
                let ino = attr_of(&raw.reply(id).await).ino;
                raw.send(Body::Release(v1::Release { ino })).await;
            }
        }
    }
    for id in begun {
        let ino = attr_of(&raw.reply(id).await).ino;
        raw.send(Body::Release(v1::Release { ino })).await;
    }
    let removed = raw
        .mutate(Op::RemoveTree(v1::RemoveTree {
            parent: 1,
            name: "tree".into(),
        }))
        .await;
    assert_eq!(removed.error(), FsError::None);
    // Acknowledges the creates' replies, which hold the files as well.
    raw.mutate(unlink(1, "none")).await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    loop {
        let used = raw.read(Body::StatFs(v1::StatFs { ino: 0 })).await;
        let Some(response::Body::StatFs(used)) = used.body else {
            panic!("{used:?}")
        };
        if used.used_inodes == 1 {
            break;
        }
        assert!(
            tokio::time::Instant::now() < deadline,
            "{} inodes are left",
            used.used_inodes
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_changelog_equals_what_was_sent_without_gaps() {
    let cluster = Cluster::start().await;
    let mut raw = cluster.attach().await;
    let mut sent = Vec::new();
    let mut live = cluster.follow(0, true).await.unwrap();
    for number in 0..300 {
        let op = if number % 3 == 2 {
            unlink(1, &format!("f{}", number - 1))
        } else {
            create(1, &format!("f{number}"), v1::FileKind::File)
        };
        sent.push(op.clone());
        assert_eq!(raw.mutate(op).await.error(), FsError::None);
    }
    let mut all = Vec::new();
    let mut finite = cluster.follow(0, false).await.unwrap();
    while let Some(frame) = finite.message().await.unwrap() {
        all.extend(frame.entries);
    }
    for (at, entry) in all.iter().enumerate() {
        assert_eq!(entry.position.unwrap().seq, at as u64 + 1);
    }
    assert!(all.windows(2).all(|pair| pair[0].time <= pair[1].time));
    let first = all[0].command.as_ref().unwrap().op.clone();
    assert!(matches!(first, Some(Op::VolumeInit(_))), "{first:?}");
    let of_session = |entries: &[v1::ChangelogEntry]| -> Vec<Op> {
        let commands = entries.iter().map(|entry| entry.command.clone().unwrap());
        commands
            .filter(|command| command.session == raw.session)
            .filter_map(|command| command.op)
            .collect()
    };
    assert_eq!(of_session(&all), sent);
    // The same entries, told as they happened; then beats at the same position.
    let mut told = Vec::new();
    let beat = loop {
        let frame = live.message().await.unwrap().unwrap();
        told.extend(frame.entries);
        if let Some(beat) = frame.beat {
            break beat;
        }
    };
    assert!(told.len() >= all.len());
    assert_eq!(told[..all.len()], all);
    assert_eq!(beat.position, told.last().unwrap().position);
    // From the middle on.
    let mut tail = Vec::new();
    let mut finite = cluster.follow(150, false).await.unwrap();
    while let Some(frame) = finite.message().await.unwrap() {
        tail.extend(frame.entries);
    }
    assert_eq!(tail[..all.len() - 150], all[150..]);
    let future = cluster.follow(100_000, true).await.err().unwrap();
    assert_eq!(future.code(), tonic::Code::Aborted, "{future}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_made_changed_listed_and_destroyed() {
    let cluster = Cluster::start().await;
    let mut admin = cluster.admin();
    let storage = v1::StorageConfig {
        storage: "memory".into(),
        secret_key: "hush".into(),
        ..Default::default()
    };
    let create = |name: &str| v1::VolumeCreate {
        name: name.into(),
        storage: Some(storage.clone()),
        settings: None,
    };
    let made = admin
        .create_volume(create("second"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(made.position.unwrap().seq, 1);
    assert!(!made.storage.unwrap().uuid.is_empty());
    let again = admin.create_volume(create("second")).await.unwrap_err();
    assert_eq!(again.code(), tonic::Code::AlreadyExists);
    assert!(admin.create_volume(create("No")).await.is_err());
    let listed = admin
        .list_volumes(v1::ListVolumesRequest {})
        .await
        .unwrap()
        .into_inner()
        .volumes;
    assert_eq!(listed.len(), 2);
    assert!(
        listed
            .iter()
            .all(|volume| volume.storage.as_ref().unwrap().secret_key.is_empty())
    );
    let got = admin
        .get_volume(v1::GetVolumeRequest {
            name: "second".into(),
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(got.storage.as_ref().unwrap().secret_key, "hush");
    let settings = v1::VolumeSettings {
        inodes_max: 5,
        ..got.settings.unwrap()
    };
    let update = v1::UpdateVolumeRequest {
        name: "second".into(),
        settings: Some(settings),
        storage: None,
        ..Default::default()
    };
    let updated = admin.update_volume(update).await.unwrap().into_inner();
    assert_eq!(updated.settings, Some(settings));

    // In the log, a level that this build does not know would stop every node, for good.
    let unknown = v1::VolumeSettings {
        core_level: meta_core::limits::CORE_LEVEL_MAX + 1,
        ..settings
    };
    let raise = v1::UpdateVolumeRequest {
        name: "second".into(),
        settings: Some(unknown),
        storage: None,
        ..Default::default()
    };
    let make = v1::VolumeCreate {
        settings: Some(unknown),
        ..create("third")
    };
    for refused in [
        admin.update_volume(raise).await.unwrap_err(),
        admin.create_volume(make).await.unwrap_err(),
    ] {
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains("upgrade"), "{refused}");
    }
    let update = v1::UpdateVolumeRequest {
        name: "second".into(),
        settings: Some(settings),
        storage: None,
        ..Default::default()
    };
    let updated = admin.update_volume(update).await.unwrap().into_inner();
    assert_eq!(updated.settings, Some(settings), "the node goes on");
    let digest = admin
        .digest(v1::DigestRequest { volume: got.id })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (digest.sums.len(), digest.digest.len(), digest.diverged),
        (256 * 16, 16, None)
    );
    let mut raw = cluster
        .attach_as(|hello| hello.volume = "second".into())
        .await;
    admin
        .destroy_volume(v1::VolumeDestroy { volume: got.id })
        .await
        .unwrap();
    raw.until_ended().await;
    let gone = admin
        .get_volume(v1::GetVolumeRequest {
            name: "second".into(),
        })
        .await
        .unwrap_err();
    assert_eq!(gone.code(), tonic::Code::NotFound);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_shows_its_metrics_and_whether_it_is_ready() {
    let cluster = Cluster::start().await;
    let mut raw = cluster.attach().await;
    raw.mutate(create(1, "f", v1::FileKind::File)).await;
    assert_eq!(cluster.shown().not_ready(), None);
    let text = cluster.shown().text().unwrap();
    for line in [
        "heliofs_meta_sessions_count 1",
        "heliofs_meta_leader_bool 1",
        "heliofs_meta_opens_count 1",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
    for counted in [
        "heliofs_meta_apply_seconds_count",
        "heliofs_meta_read_index_seconds_count",
    ] {
        let line = text.lines().find(|line| line.starts_with(counted));
        let count = line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        assert!(count > Some(0.0), "{counted} is {count:?} in\n{text}");
    }
    assert!(text.contains("\nheliofs_meta_read_index_failed_total "));
    cluster.stop().await;
}

/// A record that can't be decoded stops the node, as a damaged log does: the session would meet it here again and again, and
/// another replica may be sound.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_record_that_a_read_meets_stops_the_node() {
    let cluster = Cluster::start().await;
    let mut raw = cluster.attach().await;
    let sound = attr_of(&raw.mutate(create(1, "sound", v1::FileKind::File)).await).ino;
    let damaged = attr_of(&raw.mutate(create(1, "damaged", v1::FileKind::File)).await).ino;
    drop(raw);
    let key = meta_core::keys::inode(VolumeId(1), Ino(damaged));
    let cluster = cluster
        .restarted(|dir| {
            let pointer = std::fs::read_to_string(dir.join("CURRENT_STATE")).unwrap();
            let db = rocksdb::DB::open_cf(
                &rocksdb::Options::default(),
                dir.join(pointer.trim()),
                ["default", "replicated", "local"],
            )
            .unwrap();
            let records = db.cf_handle("replicated").unwrap();
            let mut value = db.get_cf(records, &key).unwrap().expect("the inode");
            value.truncate(value.len() / 2);
            db.put_cf(records, &key, value).unwrap();
            db.flush_cf(records).unwrap();
        })
        .await;
    let mut raw = cluster.attach().await;
    let read = raw.read(Body::GetAttr(v1::GetAttr { ino: sound })).await;
    assert_eq!(read.error(), FsError::None, "what is sound is served");
    raw.send(Body::GetAttr(v1::GetAttr { ino: damaged })).await;
    let why = cluster.failed().await;
    let named = format!("{:02x?}", key.to_vec());
    assert!(
        why.contains("can't be decoded") && why.contains(&named),
        "{why}"
    );
    raw.until_ended().await;
    cluster.stop().await;
}

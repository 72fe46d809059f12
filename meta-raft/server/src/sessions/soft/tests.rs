//! The order of what is told and what changes, and what waits for the end of the grace period.

use std::borrow::Cow;

use heliofs_proto::ids::{Epoch, Ino, SessionId, UnixNanos, VolumeId};
use heliofs_proto::v1::command::Op;
use meta_core::Touched;
use tokio_stream::StreamExt;

use super::super::interest::What;
use super::super::outbox::{Frames, outbox};
use super::*;

const TIMEOUT: Duration = Duration::from_secs(30);

fn soft(known: &[u64], began: Instant) -> Soft {
    let grace = Grace::new(known.iter().copied(), began, TIMEOUT);
    Soft::new(known, grace, NonZeroUsize::new(100).unwrap())
}

fn attach(soft: &mut Soft, session: u64, now: Instant) -> Frames {
    let (outbox, frames) = outbox();
    assert!(soft.attach(session, session + 100, outbox, ClientFacts::default(), now));
    frames
}

fn position(seq: u64) -> Position {
    Position {
        epoch: Epoch(0),
        seq,
    }
}

fn applied(
    seq: u64,
    session: u64,
    op: Op,
    reply: v1::Reply,
    touched: Vec<Touched>,
) -> AppliedItem<'static> {
    let command = v1::Command {
        session,
        sequence: seq,
        op: Some(op),
        ..Default::default()
    };
    AppliedItem {
        volume: VolumeId(1),
        session: SessionId(session),
        position: position(seq),
        time: UnixNanos(0),
        command: Cow::Owned(command),
        reply,
        touched,
    }
}

fn chmod(seq: u64, session: u64, ino: u64) -> AppliedItem<'static> {
    let attr = v1::Attr {
        ino,
        ..Default::default()
    };
    let reply = v1::Reply {
        position: Some(position(seq).into()),
        attr: Some(attr),
        ..Default::default()
    };
    let touched = Touched::Inode {
        ino: Ino(ino),
        attr: true,
        content: false,
        xattr: false,
    };
    let op = Op::SetAttr(v1::SetAttr {
        ino,
        ..Default::default()
    });
    applied(seq, session, op, reply, vec![touched])
}

fn write_lock(wait: bool) -> v1::Lock {
    v1::Lock {
        ino: 9,
        kind: LockKind::Write as i32,
        end: 10,
        wait,
        ..Default::default()
    }
}

/// What is in the queue, as (ino, seq) of invalidations and ids of responses.
async fn drain(frames: &mut Frames) -> Vec<Result<(u64, u64), u64>> {
    let mut all = Vec::new();
    while let Ok(Some(Ok(frame))) =
        tokio::time::timeout(Duration::from_millis(20), frames.next()).await
    {
        let invalidation =
            |told: v1::Invalidation| Ok((told.ino, told.position.map_or(0, |at| at.seq)));
        all.extend(frame.invalidations.into_iter().map(invalidation));
        all.extend(frame.responses.into_iter().map(|response| Err(response.id)));
    }
    all
}

#[tokio::test]
async fn an_answer_waits_for_the_effects_of_what_it_shows() {
    let now = Instant::now();
    let mut soft = soft(&[1, 2], now);
    let mut reader = attach(&mut soft, 1, now);
    let _writer = attach(&mut soft, 2, now);
    soft.start_at(position(5));
    let told = [Told {
        ino: 7,
        what: What::ATTR,
    }];
    let answer = |id| {
        Some(v1::Response {
            id,
            ..Default::default()
        })
    };
    assert_eq!(
        soft.tell(101, position(5), (&told, true), &mut answer(1)),
        Telling::Told
    );
    // The view shows 6 already, its effects are not known yet.
    let mut early = answer(2);
    assert_eq!(
        soft.tell(101, position(6), (&told, true), &mut early),
        Telling::TooEarly
    );
    let _ = soft.applied(&chmod(6, 2, 7), now);
    assert_eq!(
        soft.tell(101, position(6), (&told, true), &mut early),
        Telling::Told
    );
    assert_eq!(drain(&mut reader).await, [Err(1), Ok((7, 6)), Err(2)]);
    // Read at 6, told after 7: the change in between is told with it.
    let _ = soft.applied(&chmod(7, 2, 8), now);
    let _ = soft.applied(&chmod(8, 2, 7), now);
    assert_eq!(drain(&mut reader).await, [Ok((7, 8))]);
    let late = [Told {
        ino: 8,
        what: What::ATTR,
    }];
    assert_eq!(
        soft.tell(101, position(6), (&late, true), &mut answer(3)),
        Telling::Told
    );
    assert_eq!(drain(&mut reader).await, [Ok((8, 8)), Err(3)]);
}

#[tokio::test]
async fn a_repeated_reply_is_not_to_be_cached() {
    let now = Instant::now();
    let mut soft = soft(&[1], now);
    let mut frames = attach(&mut soft, 1, now);
    let mut repeated = chmod(3, 1, 7);
    repeated.position = position(9);
    repeated.touched.clear();
    let _ = soft.applied(&repeated, now);
    assert_eq!(drain(&mut frames).await, [Ok((7, 9)), Ok((7, 9))]);
}

#[tokio::test]
async fn new_locks_wait_for_sessions_that_may_hold_them() {
    let now = Instant::now();
    let mut soft = soft(&[1, 2], now);
    let mut first = attach(&mut soft, 1, now);
    let _ = soft.reassert(1, &[], &[], &[]).and(soft.settle(1, now));
    let ticket = |request| Ticket {
        session: 1,
        request,
    };
    assert!(soft.lock(ticket(1), &write_lock(false), now).is_none());
    assert!(soft.test(ticket(2), &write_lock(false), now).is_none());
    assert!(soft.lock(ticket(3), &write_lock(true), now).is_none());
    soft.cancel(ticket(3));
    assert_eq!(drain(&mut first).await, [Err(3)]);
    assert!(soft.expired(now + TIMEOUT / 2, Duration::ZERO).is_empty());
    soft.orphans_found([77, 78], false);
    assert!(soft.begin_reaps(2, now + TIMEOUT / 2).is_empty());
    // The other comes back with the lock, so it is in the way.
    let _second = attach(&mut soft, 2, now);
    let _ = soft
        .reassert(2, &[77], &[], &[write_lock(false)])
        .and(soft.settle(2, now));
    let mut all = Vec::new();
    while let Ok(Some(Ok(frame))) =
        tokio::time::timeout(Duration::from_millis(20), first.next()).await
    {
        all.extend(frame.responses);
    }
    assert_eq!(all[0].error(), FsError::WouldBlock);
    let Some(v1::response::Body::Lock(reply)) = &all[1].body else {
        panic!("{all:?}")
    };
    assert!(reply.conflict.is_some());
    assert_eq!(soft.begin_reaps(2, now + TIMEOUT), [78], "77 is open");
}

#[tokio::test]
async fn grace_ends_with_time_when_a_session_does_not_come_back() {
    let now = Instant::now();
    let mut soft = soft(&[1, 2], now);
    let mut first = attach(&mut soft, 1, now);
    let _ = soft.settle(1, now);
    let ticket = Ticket {
        session: 1,
        request: 1,
    };
    assert!(soft.lock(ticket, &write_lock(false), now).is_none());
    let _ = soft.look(now + TIMEOUT / 2);
    assert!(drain(&mut first).await.is_empty());
    soft.heard(1, now + TIMEOUT / 2);
    let wake = soft.look(now + TIMEOUT);
    assert!(wake.reap);
    assert_eq!(drain(&mut first).await, [Err(1)]);
    assert_eq!(soft.expired(now + TIMEOUT, TIMEOUT), [2]);
    assert!(soft.expired(now + TIMEOUT, TIMEOUT).is_empty(), "once");
    let (outbox, _frames) = outbox();
    assert!(
        !soft.attach(2, 5, outbox, ClientFacts::default(), now),
        "it is about to end"
    );
    // A process that stood still heard nobody.
    soft.excuse(now + 3 * TIMEOUT);
    assert!(soft.expired(now + 3 * TIMEOUT, TIMEOUT).is_empty());
}

#[tokio::test]
async fn closes_wake_the_reaper_only_while_there_are_orphans() {
    let now = Instant::now();
    let mut soft = soft(&[1], now);
    let _frames = attach(&mut soft, 1, now);
    soft.orphans_found([], false);
    soft.open(1, 7, false).unwrap();
    assert!(!soft.release(1, 7).reap);
    soft.open(1, 7, false).unwrap();
    let unlinked = v1::Reply {
        position: Some(position(1).into()),
        orphaned: true,
        attr: Some(v1::Attr {
            ino: 7,
            ..Default::default()
        }),
        ..Default::default()
    };
    let op = Op::Unlink(v1::Unlink::default());
    assert!(
        soft.applied(&applied(1, 1, op, unlinked, Vec::new()), now)
            .reap
    );
    let rested = now + TIMEOUT;
    assert!(soft.begin_reaps(1, rested).is_empty(), "it is open");
    assert!(soft.release(1, 7).reap);
    assert_eq!(soft.begin_reaps(1, rested), [7]);
    assert_eq!(soft.orphan_search(), None);
}

fn takes_leases(soft: &mut Soft, session: u64, now: Instant) -> Frames {
    let (outbox, frames) = outbox();
    let facts = ClientFacts {
        takes_leases: true,
        ..Default::default()
    };
    assert!(soft.attach(session, session + 100, outbox, facts, now));
    frames
}

#[tokio::test]
async fn a_write_lease_makes_others_ask_and_a_silent_holder_is_given_up_early() {
    let now = Instant::now();
    let mut soft = soft(&[1, 2], now);
    let mut writer = takes_leases(&mut soft, 1, now);
    let mut reader = takes_leases(&mut soft, 2, now);
    let _ = soft.settle(1, now).and(soft.settle(2, now));
    let told = Told {
        ino: 7,
        what: What::ATTR,
    };
    assert_eq!(
        soft.tell(102, position(0), (&[told], true), &mut None),
        Telling::Told
    );
    soft.open(1, 7, true).unwrap();
    let frame = reader.next().await.unwrap().unwrap();
    assert!(frame.invalidations[0].attr && frame.invalidations[0].ino == 7);

    assert!(soft.recall(1, 7).is_none(), "one's own is not in the way");
    assert!(soft.is_leased_against(2, 7));
    let returned = soft.recall(2, 7).unwrap();
    let frame = writer.next().await.unwrap().unwrap();
    assert_eq!(frame.recalls, [v1::WriteLease { ino: 7, grant: 1 }]);
    let later = now + LEASE_WAIT;
    soft.heard(2, later);
    assert!(
        soft.expired(later - Duration::from_millis(1), TIMEOUT)
            .is_empty(),
        "too early"
    );
    assert_eq!(soft.expired(later, TIMEOUT), [1]);
    let _ = soft.end_session(1, later);
    assert!(returned.await.is_err(), "the wait is over");
    assert!(soft.no_leases());
}

#[tokio::test]
async fn nobody_is_granted_a_lease_beside_others() {
    let now = Instant::now();
    let mut soft = soft(&[1, 2], now);
    let mut first = takes_leases(&mut soft, 1, now);
    let _second = takes_leases(&mut soft, 2, now);
    soft.open(2, 7, false).unwrap();
    soft.open(1, 7, true).unwrap();
    assert!(soft.no_leases());
    let _ = soft.release(2, 7);
    soft.open(1, 7, true).unwrap();
    assert!(!soft.no_leases());
    // While the holder was away, somebody opened the file: it is told at once.
    soft.open(2, 9, false).unwrap();
    let lease = |ino, grant| v1::WriteLease { ino, grant };
    let _ = soft.reassert(1, &[7, 9], &[lease(7, 1), lease(9, 2)], &[]);
    let frame = first.next().await.unwrap().unwrap();
    assert_eq!(frame.recalls, [lease(9, 2)]);
    let _ = soft.release(1, 7);
    assert!(!soft.is_leased_against(2, 7));
}

fn takes_directories(soft: &mut Soft, session: u64, now: Instant) -> Frames {
    let (outbox, frames) = outbox();
    let facts = ClientFacts {
        takes_leases: true,
        takes_directories: true,
        ..Default::default()
    };
    assert!(soft.attach(session, session + 100, outbox, facts, now));
    frames
}

/// Session 1 makes directory `ino` in `parent`.
fn mkdir(seq: u64, (parent, ino): (u64, u64), deferrable: bool) -> AppliedItem<'static> {
    let op = Op::Create(v1::Create {
        parent,
        kind: v1::FileKind::Directory as i32,
        ..Default::default()
    });
    let reply = v1::Reply {
        position: Some(position(seq).into()),
        attr: Some(v1::Attr {
            ino,
            ..Default::default()
        }),
        created: true,
        deferrable,
        ..Default::default()
    };
    applied(seq, 1, op, reply, Vec::new())
}

#[tokio::test]
async fn a_directory_s_lease_comes_with_its_making_alone() {
    let now = Instant::now();
    let mut soft = soft(&[1, 2], now);
    let mut first = takes_directories(&mut soft, 1, now);
    let _second = takes_directories(&mut soft, 2, now);
    let _ = soft.settle(1, now).and(soft.settle(2, now));
    let held = |soft: &Soft, ino| soft.is_leased_against(2, ino);

    let _ = soft.applied(&mkdir(1, (5, 10), false), now);
    assert!(!held(&soft, 10), "the core says no");
    soft.begin_removal(2, &[5]);
    let _ = soft.applied(&mkdir(2, (5, 11), true), now);
    let _ = soft.applied(&mkdir(3, (6, 12), true), now);
    assert!(!held(&soft, 11), "somebody may be removing it");
    assert!(held(&soft, 12), "elsewhere nobody is");
    soft.end_removal(2, &[5]);
    let mut again = mkdir(4, (5, 11), true);
    again.reply.position = Some(position(2).into());
    let _ = soft.applied(&again, now);
    assert!(!held(&soft, 11), "a repeated answer grants nothing");
    let _ = soft.applied(&mkdir(5, (5, 13), true), now);
    assert!(held(&soft, 13));

    // What the system changes in it is told to the holder, and nobody waits.
    let step = Op::RemoveTreeStep(v1::RemoveTreeStep { intent: 1 });
    let touched = Touched::Inode {
        ino: Ino(12),
        attr: true,
        content: false,
        xattr: false,
    };
    let _ = soft.applied(
        &applied(6, 0, step, v1::Reply::default(), vec![touched]),
        now,
    );
    let mut recalls = Vec::new();
    while recalls.is_empty() {
        recalls = first.next().await.unwrap().unwrap().recalls;
    }
    assert_eq!(recalls[0].ino, 12);

    let waits = soft.stop_directories();
    assert_eq!(waits.len(), 2);
    let _ = soft.applied(&mkdir(7, (5, 14), true), now);
    assert!(!held(&soft, 14), "the volume is about to go elsewhere");
    soft.grant_directories_again();
    let _ = soft.end_session(1, now);
    for returned in waits {
        assert!(returned.await.is_err(), "the wait is over");
    }
    assert!(soft.no_leases());
}

#[tokio::test]
async fn a_batch_opens_its_files_and_its_response_names_the_leases() {
    let now = Instant::now();
    let mut soft = soft(&[1], now);
    let (outbox, mut frames) = outbox();
    let facts = ClientFacts {
        takes_leases: true,
        takes_directories: true,
        ..Default::default()
    };
    assert!(soft.attach(1, 101, outbox.clone(), facts, now));
    let _ = soft.settle(1, now);
    let create = |ino, kind: v1::FileKind| v1::Create {
        parent: 5,
        kind: kind as i32,
        ino,
        ..Default::default()
    };
    let made = [
        create(20, v1::FileKind::File),
        create(21, v1::FileKind::Directory),
        create(22, v1::FileKind::File),
    ];
    let changes = made.iter().map(|create| v1::Change {
        op: Some(v1::change::Op::Create(create.clone())),
        ..Default::default()
    });
    let op = Op::Batch(v1::Batch {
        changes: changes.collect(),
    });
    // The third was refused; the first has lost its name again.
    let reply = v1::Reply {
        position: Some(position(1).into()),
        applied: 2,
        orphans: vec![20],
        deferrable: true,
        ..Default::default()
    };
    let wake = soft.applied(&applied(1, 1, op, reply, Vec::new()), now);
    assert!(wake.reap);
    soft.answer_batch(1, &made[..2], &outbox, v1::Response::default());
    let response = frames.next().await.unwrap().unwrap().responses.remove(0);
    let leased: Vec<u64> = response
        .write_leases
        .iter()
        .map(|lease| lease.ino)
        .collect();
    assert_eq!(leased, [20, 21]);
    let rested = now + 2 * TIMEOUT;
    assert_eq!(soft.begin_reaps(9, rested), [0; 0], "it is open");
    let _ = soft.release(1, 20);
    assert_eq!(
        soft.begin_reaps(9, rested),
        [0; 0],
        "the batch's answer is not acknowledged"
    );
}

/// What was read just before a directory was leased is not told any more: its holder may have changed it by then.
#[tokio::test]
async fn nobody_is_told_of_a_directory_that_was_leased_since_it_was_read() {
    let now = Instant::now();
    let mut soft = soft(&[1, 2], now);
    let mut holder = takes_directories(&mut soft, 1, now);
    let mut reader = takes_directories(&mut soft, 2, now);
    let _ = soft.settle(1, now).and(soft.settle(2, now));
    let attr = |ino| v1::Attr {
        ino,
        ..Default::default()
    };
    let attributes = |ino| Told {
        ino,
        what: What::ATTR,
    };
    let answer = |id, body| {
        Some(v1::Response {
            id,
            body: Some(body),
            ..Default::default()
        })
    };
    // The view shows the directory already, its lease is not granted yet.
    let mut looked_up = answer(1, v1::response::Body::Attr(attr(10)));
    let told = [
        Told {
            ino: 5,
            what: What::ENTRIES,
        },
        attributes(10),
    ];
    let tell = |soft: &mut Soft, response: &mut Option<v1::Response>, patient| {
        soft.tell(102, position(1), (&told, patient), response)
    };
    assert_eq!(tell(&mut soft, &mut looked_up, true), Telling::TooEarly);
    let _ = soft.applied(&mkdir(1, (5, 10), true), now);
    for patient in [true, false] {
        assert_eq!(tell(&mut soft, &mut looked_up, patient), Telling::Leased);
    }
    assert!(looked_up.is_some(), "it was not sent");

    // A listing of its parent is told at once, without what is not known of it.
    let entry = |ino| v1::DirEntry {
        ino,
        attr: Some(attr(ino)),
        ..Default::default()
    };
    let page = v1::DirPage {
        entries: vec![entry(9), entry(10)],
        ..Default::default()
    };
    let mut listed = answer(2, v1::response::Body::DirPage(page));
    let of_page = [5, 9, 10].map(attributes);
    let telling = soft.tell(102, position(1), (&of_page, true), &mut listed);
    assert_eq!(telling, Telling::Told);
    let response = reader.next().await.unwrap().unwrap().responses.remove(0);
    let Some(v1::response::Body::DirPage(page)) = response.body else {
        panic!("{response:?}");
    };
    let known: Vec<_> = page.entries.iter().map(|entry| entry.attr).collect();
    assert_eq!(known, [Some(attr(9)), None]);

    let returned = soft.recall_for_read(2, 10, false).unwrap();
    let recall = holder.next().await.unwrap().unwrap().recalls.remove(0);
    assert_eq!(recall.ino, 10);
    soft.return_lease(1, recall);
    assert!(returned.await.is_err(), "the wait is over");
    assert_eq!(tell(&mut soft, &mut looked_up, false), Telling::Told);
    assert!(looked_up.is_none());
}

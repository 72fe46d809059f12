//! A request takes effect once, however often it arrives, and its first reply is the reply.

use super::*;

#[test]
fn a_repeated_request_returns_the_first_reply_and_changes_nothing_but_the_head() {
    let mut volume = Volume::new();
    let session = volume.begin_session();
    let first = volume.send(session, 1, 0, create(ROOT, "a"));
    assert_eq!(first.error(), FsError::None);
    // By now the same request would be answered otherwise.
    volume.run(unlink(ROOT, "a", false)).unwrap();
    let command = v1::Command {
        volume: VOLUME.0,
        session: session.0,
        sequence: 1,
        op: Some(create(ROOT, "a")),
        ..v1::Command::default()
    };
    let again = volume.apply(&command);
    assert_eq!(again.reply, first);
    assert_eq!(again.changes.len(), 1, "only the head");
    assert!(again.touched.is_empty() && again.freed.is_empty());
    volume.check();
}

#[test]
fn requests_may_arrive_out_of_order() {
    let mut volume = Volume::new();
    let session = volume.begin_session();
    let third = volume.send(session, 3, 1, create(ROOT, "c"));
    let first = volume.send(session, 1, 1, create(ROOT, "a"));
    assert_eq!(first.error(), FsError::None);
    assert_eq!(volume.send(session, 3, 1, create(ROOT, "c")), third);
    assert_eq!(volume.send(session, 1, 1, create(ROOT, "a")), first);
    volume.check();
}

#[test]
fn an_acknowledged_request_is_forgotten_and_refused() {
    let mut volume = Volume::new();
    let session = volume.begin_session();
    for sequence in 1..=10 {
        volume.send(session, sequence, 0, create(ROOT, sequence.to_string()));
    }
    let records = volume.records.len();
    // Ten entries go, one comes with an inode and two records of its name.
    volume.send(session, 11, 11, create(ROOT, "11"));
    assert_eq!(volume.records.len(), records - 10 + 4);
    let late = volume.send(session, 10, 0, create(ROOT, "late"));
    assert_eq!(late.error(), FsError::AlreadyAcknowledged);
    volume.check();
}

#[test]
fn an_ended_session_is_refused_even_what_it_was_answered_before() {
    let mut volume = Volume::new();
    let session = volume.begin_session();
    volume.send(session, 1, 0, create(ROOT, "a"));
    let end = Op::SessionEnd(v1::SessionEnd { session: session.0 });
    assert!(volume.run(end).unwrap().done);
    assert_eq!(
        volume.send(session, 1, 0, create(ROOT, "a")).error(),
        FsError::SessionGone
    );
    assert_eq!(
        volume.send(session, 2, 0, create(ROOT, "b")).error(),
        FsError::SessionGone
    );
    assert_ne!(volume.begin_session(), session);
    volume.check();
}

#[test]
fn ending_a_session_with_many_replies_takes_several_bounded_commands() {
    let mut volume = Volume::new();
    let session = volume.begin_session();
    for sequence in 1..=1200 {
        volume.send(
            session,
            sequence,
            0,
            set_xattr(ROOT, "user.a", sequence.to_string()),
        );
    }
    let end = || Op::SessionEnd(v1::SessionEnd { session: session.0 });
    let mut commands = 1;
    while !volume.run(end()).unwrap().done {
        commands += 1;
        assert_eq!(
            volume.send(session, 1, 0, create(ROOT, "a")).error(),
            FsError::SessionGone
        );
    }
    assert_eq!(commands, 3);
    volume.check();
}

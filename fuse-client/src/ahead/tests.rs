use super::*;
use crate::fs::attr::{AttrChange, SetTime};
use heliofs_proto::error::FsError;
use heliofs_proto::ids::Epoch;

const SESSION: SessionId = SessionId(7);

fn at(seq: u64) -> Position {
    Position {
        epoch: Epoch(0),
        seq,
    }
}

/// Directory 10 is leased, and there are numbers from 100 on.
fn leased() -> State {
    let mut state = State::default();
    let attr = v1::Attr {
        ino: 10,
        kind: FileKind::Directory as i32,
        mode: 0o755,
        nlink: 2,
        ctime: 50,
        mtime: 50,
        ..v1::Attr::default()
    };
    state.granted(SESSION, attr, at(1));
    state.reserved(SESSION, 100..200);
    state
}

fn node(kind: FileKind) -> NewNode {
    NewNode {
        kind,
        mode: 0o666,
        umask: 0o022,
        rdev: 0,
        target: Bytes::from_static(b"target"),
    }
}

fn name(name: &'static str) -> Bytes {
    Bytes::from_static(name.as_bytes())
}

const BY: (Caller, i64) = (
    Caller {
        uid: 5,
        gid: 6,
        pid: 1,
    },
    60,
);

fn create(state: &mut State, parent: u64, of: &'static str, kind: FileKind) -> v1::Attr {
    match state.create((parent, &name(of)), &node(kind), true, BY) {
        Plan::Answered(Ok(attr)) => attr,
        plan => panic!("{plan:?}"),
    }
}

fn attr(state: &State, ino: u64) -> v1::Attr {
    match state.attr(ino) {
        Plan::Answered(attr) => attr,
        plan => panic!("{plan:?}"),
    }
}

fn refused(plan: Plan<Result<v1::Attr, Errno>>) -> Errno {
    match plan {
        Plan::Answered(Err(errno)) => errno,
        plan => panic!("{plan:?}"),
    }
}

#[test]
fn a_leased_directory_knows_what_becomes_of_its_names() {
    let mut state = leased();
    let file = create(&mut state, 10, "file", FileKind::File);
    assert_eq!(
        (file.ino, file.mode, file.uid, file.ctime),
        (100, 0o644, 5, 60)
    );
    let sub = create(&mut state, 10, "sub", FileKind::Directory);
    create(&mut state, sub.ino, "inner", FileKind::Symlink);
    let top = attr(&state, 10);
    assert_eq!((top.nlink, top.size, top.mtime), (3, 7, 60));
    let by_name = |state: &mut State, parent, name: &[u8]| match state.lookup(parent, name) {
        Plan::Answered(found) => found.map(|(ino, _)| ino),
        plan => panic!("{plan:?}"),
    };
    assert_eq!(by_name(&mut state, 10, b"file"), Some(100));
    assert_eq!(by_name(&mut state, 10, b"other"), None);
    assert!(matches!(state.lookup(11, b"file"), Plan::Usual));

    let exists = state.create((10, &name("sub")), &node(FileKind::File), true, BY);
    assert_eq!(refused(exists), Errno::EXIST);
    let not_empty = state.unlink((10, &name("sub")), true, BY);
    assert_eq!(refused(not_empty), FsError::NotEmpty.into());
    let directory = state.unlink((10, &name("sub")), false, BY);
    assert_eq!(refused(directory), FsError::IsDirectory.into());
    assert_eq!(
        refused(state.unlink((10, &name("x")), false, BY)),
        Errno::NOENT
    );

    let (from, to) = ((10, &name("file")), (sub.ino, &name("moved")));
    assert!(matches!(
        state.rename(from, to, false, BY),
        Plan::Answered(Ok(_))
    ));
    assert_eq!(by_name(&mut state, sub.ino, b"moved"), Some(100));
    assert_eq!((attr(&state, 10).size, attr(&state, sub.ino).size), (3, 10));
    assert_eq!(attr(&state, 100).parent, sub.ino);
    // Directories don't move between directories here, nor names out of leased ones.
    let (from, to) = ((10, &name("sub")), (sub.ino, &name("loop")));
    assert!(matches!(state.rename(from, to, false, BY), Plan::Usual));
    let (from, to) = ((10, &name("sub")), (1, &name("out")));
    assert!(matches!(state.rename(from, to, false, BY), Plan::Usual));

    // What others have put in their places is not hit.
    let (from, to) = ((10, &name("moved too")), (sub.ino, &name("moved")));
    let other = create(&mut state, 10, "moved too", FileKind::File);
    assert!(matches!(
        state.rename(from, to, false, BY),
        Plan::Answered(Ok(_))
    ));
    assert!(matches!(
        state.unlink((sub.ino, &name("moved")), false, BY),
        Plan::Answered(Ok(_))
    ));
    let expects = |queued: &Queued| (queued.change.ino, queued.change.replaces);
    let expected: Vec<_> = state.queue.iter().map(expects).skip(3).collect();
    assert_eq!(
        expected,
        [
            (file.ino, Some(0)),
            (0, None),
            (other.ino, Some(file.ino)),
            (other.ino, None)
        ]
    );

    let numbers: Vec<u64> = state.take(64).iter().map(|queued| queued.number).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn times_never_go_back_behind_what_was_seen() {
    let mut state = leased();
    let (caller, _) = BY;
    let early = state.create((10, &name("a")), &node(FileKind::File), true, (caller, 7));
    assert!(matches!(early, Plan::Answered(Ok(made)) if made.ctime == 50));
    let change = AttrChange {
        mode: Some(0o6711),
        uid: Some(9),
        mtime: Some(SetTime::At(3)),
        ..AttrChange::default()
    };
    assert!(matches!(
        state.set_attr(100, &change, (caller, 80)),
        Plan::Answered(Ok(_))
    ));
    let changed = attr(&state, 100);
    assert_eq!((changed.mode, changed.uid), (0o711, 9));
    assert_eq!((changed.mtime, changed.ctime), (3, 80));
    create(&mut state, 10, "b", FileKind::File);
    assert_eq!(attr(&state, 101).ctime, 80);
}

#[test]
fn changes_are_settled_in_order_and_fail_from_the_first_on() {
    let mut state = leased();
    create(&mut state, 10, "a", FileKind::File);
    create(&mut state, 10, "d", FileKind::Directory);
    create(&mut state, 101, "b", FileKind::File);
    let mark = state.mark_of(&[101]);
    assert_eq!(
        (mark, state.mark_of(&[100]), state.mark_of(&[55])),
        (3, 1, 0)
    );
    let sent = state.take(2);
    let (known, made) = state.took_effect(&sent, at(9));
    assert_eq!(made, [101]);
    assert!(
        known
            .iter()
            .all(|attr| attr.data_seq == 9 || attr.ino == 10)
    );
    assert!(!state.is_pending(100) && state.is_pending(101) && !state.has_settled(mark));
    assert_eq!(state.at(), at(9));
    create(&mut state, 10, "c", FileKind::File);
    let sent = state.take(1);
    let mut lost = state.failed(&sent, Errno::IO);
    lost.sort_unstable();
    assert_eq!(lost, [10, 101]);
    assert!(state.is_settled() && !state.is_leased(10));
    assert_eq!(state.failure(10), Some(Errno::IO));
    assert_eq!(
        (state.failure(102), state.failure(100)),
        (Some(Errno::IO), None)
    );
    assert_eq!(state.failure_once(10), Some(Errno::IO));
    assert_eq!(state.failure_once(10), None);
    assert_eq!(
        state.failure(10),
        Some(Errno::IO),
        "fsync says it every time"
    );
}

#[test]
fn nothing_is_answered_while_a_lease_is_given_back() {
    let mut state = leased();
    create(&mut state, 10, "a", FileKind::File);
    let sub = create(&mut state, 10, "sub", FileKind::Directory).ino;
    state.freeze();
    assert!(matches!(state.lookup(10, b"a"), Plan::Wait));
    assert!(matches!(state.attr(100), Plan::Wait));
    let waits = state.create((sub, &name("b")), &node(FileKind::File), true, BY);
    assert!(matches!(waits, Plan::Wait));
    let sent = state.take(64);
    state.took_effect(&sent, at(5));
    state.dropped(10);
    state.thaw();
    assert!(matches!(state.lookup(10, b"a"), Plan::Usual));
    assert!(matches!(state.attr(100), Plan::Usual));
    // The one below is leased for itself.
    create(&mut state, sub, "b", FileKind::File);
    assert_eq!(state.parent_of(sub), None);
    state.ask_about(&[102]);
    assert!(matches!(state.attr(102), Plan::Usual));
    assert!(matches!(
        state.lookup(sub, b"b"),
        Plan::Answered(Some((102, None)))
    ));
    assert!(matches!(
        state.unlink((sub, &name("b")), false, BY),
        Plan::Answered(Ok(_))
    ));
}

#[test]
fn without_numbers_creates_wait_and_another_session_s_are_not_used() {
    let mut state = leased();
    state.reserved(SessionId(8), 500..600);
    for _ in 100..200 {
        assert!(state.next_ino().is_some());
    }
    let waits = state.create((10, &name("a")), &node(FileKind::File), true, BY);
    assert!(matches!(waits, Plan::Wait));
    assert!(state.needs_inos(1));
    let attr = v1::Attr {
        ino: 20,
        ..v1::Attr::default()
    };
    state.reserved(SESSION, 700..701);
    state.granted(SessionId(8), attr, at(2));
    assert!(state.next_ino().is_none());
}

#[test]
fn what_was_longest_not_used_is_given_back_when_there_is_too_much() {
    let mut state = leased();
    state.reserved(SESSION, 1000..1000 + 2 * DIRECTORIES_MAX as u64);
    assert!(state.surplus().is_empty());
    for n in 0.. {
        if state.leased().len() > DIRECTORIES_MAX {
            break;
        }
        let name = Bytes::from(n.to_string());
        let made = state.create((10, &name), &node(FileKind::Directory), true, BY);
        if let Plan::Wait = made {
            let sent = state.take(QUEUE_MAX);
            state.took_effect(&sent, at(3));
        }
    }
    let surplus = state.surplus();
    assert!(surplus.len() > DIRECTORIES_MAX / 4);
    assert!(!surplus.contains(&10), "it was used last");
    assert!(surplus.contains(&1000), "it was not used since it was made");
}

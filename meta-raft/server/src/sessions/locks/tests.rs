//! Examples from fcntl(2) and flock(2), and a comparison with a model that keeps one lock state per byte and owner.

use proptest::prelude::*;

use super::*;

const INO: u64 = 7;

fn lock(owner: u64, kind: LockKind, start: u64, end: u64) -> v1::Lock {
    v1::Lock {
        ino: INO,
        owner,
        kind: kind as i32,
        start,
        end,
        flock: false,
        wait: false,
        pid: owner as u32,
    }
}

fn waiting(lock: v1::Lock) -> v1::Lock {
    v1::Lock { wait: true, ..lock }
}

fn flock(owner: u64, kind: LockKind) -> v1::Lock {
    v1::Lock {
        flock: true,
        ..lock(owner, kind, 0, u64::MAX)
    }
}

fn ticket(session: u64, request: u64) -> Ticket {
    Ticket { session, request }
}

fn conflict_of(verdict: Verdict) -> (u64, i32, u64, u64) {
    match verdict {
        Verdict::Conflict(lock) => (lock.owner, lock.kind, lock.start, lock.end),
        other => panic!("{other:?} is not a conflict"),
    }
}

#[test]
fn unlocking_the_middle_splits_and_relocking_it_merges() {
    let mut table = LockTable::default();
    let (write, read) = (LockKind::Write, LockKind::Read as i32);
    assert_eq!(
        table.request(ticket(1, 1), &lock(1, write, 0, 99)).0,
        Verdict::Granted
    );
    assert_eq!(
        table
            .request(ticket(1, 2), &lock(1, LockKind::Unlock, 40, 59))
            .0,
        Verdict::Granted
    );
    assert_eq!(table.held(1), 2);
    assert_eq!(
        table
            .request(ticket(2, 1), &lock(1, LockKind::Read, 40, 59))
            .0,
        Verdict::Granted
    );
    let (refused, _) = table.request(ticket(2, 2), &lock(1, LockKind::Read, 59, 60));
    assert_eq!(conflict_of(refused), (1, write as i32, 60, 99));
    table.request(ticket(2, 3), &lock(1, LockKind::Unlock, 0, u64::MAX));
    assert_eq!(
        table.request(ticket(1, 3), &lock(1, write, 40, 59)).0,
        Verdict::Granted
    );
    assert_eq!(table.held(1), 1);
    // A part of another kind stays apart.
    assert_eq!(
        table
            .request(ticket(1, 4), &lock(1, LockKind::Read, 10, 19))
            .0,
        Verdict::Granted
    );
    assert_eq!(table.held(1), 3);
    let met = table.test(2, &lock(9, write, 15, 15)).unwrap();
    assert_eq!((met.kind, met.start, met.end), (read, 10, 19));
}

#[test]
fn a_range_that_reaches_the_end_of_the_file_does_not_overflow() {
    let mut table = LockTable::default();
    let write = LockKind::Write;
    table.request(ticket(1, 1), &lock(1, write, 10, u64::MAX));
    table.request(ticket(1, 2), &lock(1, write, 0, 9));
    assert_eq!(table.held(1), 1);
    table.request(ticket(1, 3), &lock(1, LockKind::Unlock, u64::MAX, u64::MAX));
    assert!(table.test(2, &lock(2, write, u64::MAX, u64::MAX)).is_none());
    assert!(
        table
            .test(2, &lock(2, write, u64::MAX - 1, u64::MAX))
            .is_some()
    );
    assert_eq!(
        table.request(ticket(1, 4), &lock(1, write, 5, 4)).0,
        Verdict::Invalid
    );
    let unknown = v1::Lock {
        kind: 77,
        ..lock(1, write, 0, 1)
    };
    assert_eq!(table.request(ticket(1, 5), &unknown).0, Verdict::Invalid);
}

#[test]
fn waiters_are_granted_in_order_and_a_cancelled_one_is_not() {
    let mut table = LockTable::default();
    let write = LockKind::Write;
    table.request(ticket(1, 1), &lock(1, write, 0, 9));
    for session in 2..=4 {
        let (verdict, _) = table.request(ticket(session, 1), &waiting(lock(1, write, 0, 9)));
        assert_eq!(verdict, Verdict::Waits);
    }
    assert!(table.cancel(ticket(2, 1)));
    assert!(!table.cancel(ticket(2, 1)));
    let (_, granted) = table.request(ticket(1, 2), &lock(1, LockKind::Unlock, 0, 9));
    assert_eq!(granted, [ticket(3, 1)]);
    assert_eq!(table.end_session(3), [ticket(4, 1)]);
    assert_eq!(table.end_session(4), []);
    assert!(table.inodes.is_empty() && table.by_session.is_empty());
}

#[test]
fn two_owners_that_wait_for_each_other_are_a_deadlock() {
    let mut table = LockTable::default();
    let write = LockKind::Write;
    table.request(ticket(1, 1), &lock(1, write, 0, 0));
    table.request(ticket(2, 1), &lock(1, write, 1, 1));
    table.request(ticket(3, 1), &lock(1, write, 2, 2));
    assert_eq!(
        table
            .request(ticket(1, 2), &waiting(lock(1, write, 1, 1)))
            .0,
        Verdict::Waits
    );
    assert_eq!(
        table
            .request(ticket(2, 2), &waiting(lock(1, write, 2, 2)))
            .0,
        Verdict::Waits
    );
    let (verdict, _) = table.request(ticket(3, 2), &waiting(lock(1, write, 0, 0)));
    assert_eq!(verdict, Verdict::Deadlock);
    // The refused owner keeps what it had; once it lets go, the others move on.
    let (_, granted) = table.request(ticket(3, 3), &lock(1, LockKind::Unlock, 0, 9));
    assert_eq!(granted, [ticket(2, 2)]);
}

#[test]
fn flock_upgrades_downgrades_and_ignores_fcntl_locks() {
    let mut table = LockTable::default();
    table.request(ticket(1, 1), &lock(1, LockKind::Write, 0, u64::MAX));
    assert_eq!(
        table.request(ticket(2, 1), &flock(1, LockKind::Read)).0,
        Verdict::Granted
    );
    assert_eq!(
        table.request(ticket(3, 1), &flock(1, LockKind::Read)).0,
        Verdict::Granted
    );
    let upgrade = waiting(flock(1, LockKind::Write));
    assert_eq!(table.request(ticket(2, 2), &upgrade).0, Verdict::Waits);
    // While it waits it holds nothing: the other may upgrade, and when it goes down again both read.
    assert_eq!(
        table.request(ticket(3, 2), &flock(1, LockKind::Write)).0,
        Verdict::Granted
    );
    let (_, granted) = table.request(ticket(3, 3), &flock(1, LockKind::Read));
    assert_eq!(granted, []);
    let holder = Owner {
        session: 3,
        owner: 1,
    };
    assert_eq!(table.release_owner(INO, holder, true), [ticket(2, 2)]);
    assert!(matches!(
        table.request(ticket(3, 4), &flock(1, LockKind::Read)).0,
        Verdict::Conflict(_)
    ));
    let (_, granted) = table.request(ticket(2, 3), &flock(1, LockKind::Read));
    assert_eq!(granted, []);
    assert_eq!(
        table.request(ticket(3, 5), &flock(1, LockKind::Read)).0,
        Verdict::Granted
    );
}

#[test]
fn a_lost_stream_takes_its_waits_but_not_its_locks() {
    let mut table = LockTable::default();
    table.request(ticket(1, 1), &lock(1, LockKind::Write, 0, 0));
    table.request(ticket(2, 1), &lock(1, LockKind::Write, 5, 5));
    table.request(ticket(2, 2), &waiting(lock(1, LockKind::Write, 0, 0)));
    table.forget_waits(2);
    let (_, granted) = table.request(ticket(1, 2), &lock(1, LockKind::Unlock, 0, 0));
    assert_eq!(granted, []);
    assert_eq!(table.held(2), 1);
    assert!(table.reassert(1, &lock(1, LockKind::Read, 5, 5)).is_err());
    assert!(table.reassert(1, &lock(1, LockKind::Read, 6, 6)).is_ok());
}

/// The model: for each byte and owner, what is held there.
#[derive(Default)]
struct Bytes {
    held: HashMap<(u64, Owner), LockKind>,
}

impl Bytes {
    fn free(&self, owner: Owner, kind: LockKind, range: std::ops::RangeInclusive<u64>) -> bool {
        !self.held.iter().any(|(&(byte, holder), &held)| {
            range.contains(&byte)
                && holder != owner
                && (held == LockKind::Write || kind == LockKind::Write)
        })
    }

    fn set(&mut self, owner: Owner, kind: LockKind, range: std::ops::RangeInclusive<u64>) {
        for byte in range {
            if kind == LockKind::Unlock {
                self.held.remove(&(byte, owner));
            } else {
                self.held.insert((byte, owner), kind);
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Request {
        owner: Owner,
        kind: LockKind,
        start: u64,
        end: u64,
        wait: bool,
    },
    Release(Owner),
    End(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let owner = (1u64..4, 1u64..3).prop_map(|(session, owner)| Owner { session, owner });
    let kind = prop_oneof![
        Just(LockKind::Unlock),
        Just(LockKind::Read),
        Just(LockKind::Write)
    ];
    let request = (owner.clone(), kind, 0u64..24, 0u64..24, any::<bool>()).prop_map(
        |(owner, kind, a, b, wait)| Step::Request {
            owner,
            kind,
            start: a.min(b),
            end: a.max(b),
            wait,
        },
    );
    let step = prop_oneof![
        12 => request,
        1 => owner.prop_map(Step::Release),
        1 => (1u64..4).prop_map(Step::End)
    ];
    proptest::collection::vec(step, 0..60)
}

proptest! {
    #[test]
    fn the_table_agrees_with_a_model_of_single_bytes(steps in steps()) {
        let mut table = LockTable::default();
        let mut model = Bytes::default();
        // In order of arrival: what the model expects to be granted next.
        let mut waiters: Vec<(Ticket, Owner, LockKind, u64, u64)> = Vec::new();
        for (number, step) in steps.into_iter().enumerate() {
            let granted = match step {
                Step::Request { owner, kind, start, end, wait } => {
                    let me = ticket(owner.session, number as u64);
                    let wanted = v1::Lock { wait, ..lock(owner.owner, kind, start, end) };
                    let free = kind == LockKind::Unlock || model.free(owner, kind, start..=end);
                    prop_assert_eq!(table.test(owner.session, &wanted).is_none() || kind == LockKind::Unlock, free);
                    let (verdict, granted) = table.request(me, &wanted);
                    match verdict {
                        Verdict::Granted => {
                            prop_assert!(free);
                            model.set(owner, kind, start..=end);
                        }
                        Verdict::Waits => {
                            prop_assert!(!free && wait);
                            waiters.push((me, owner, kind, start, end));
                        }
                        Verdict::Conflict(_) => prop_assert!(!free && !wait),
                        Verdict::Deadlock => prop_assert!(!free && wait),
                        other => prop_assert!(false, "{:?}", other),
                    }
                    granted
                }
                Step::Release(owner) => {
                    model.set(owner, LockKind::Unlock, 0..=24);
                    table.release_owner(INO, owner, false)
                }
                Step::End(session) => {
                    model.held.retain(|(_, owner), _| owner.session != session);
                    waiters.retain(|(_, owner, ..)| owner.session != session);
                    table.end_session(session)
                }
            };
            let mut expected = Vec::new();
            let next = |waiters: &[(Ticket, Owner, LockKind, u64, u64)], model: &Bytes| {
                waiters.iter().position(|&(_, owner, kind, start, end)| model.free(owner, kind, start..=end))
            };
            while let Some(at) = next(&waiters, &model) {
                let (ticket, owner, kind, start, end) = waiters.remove(at);
                model.set(owner, kind, start..=end);
                expected.push(ticket);
            }
            prop_assert_eq!(granted, expected);
            for byte in 0..24 {
                for session in 1..4 {
                    for kind in [LockKind::Read, LockKind::Write] {
                        let owner = Owner { session, owner: 1 };
                        let free = table.test(session, &lock(1, kind, byte, byte)).is_none();
                        prop_assert_eq!(free, model.free(owner, kind, byte..=byte));
                    }
                }
            }
        }
    }
}

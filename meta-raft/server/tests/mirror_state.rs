//! A mirror's state, without a cluster: it is loaded from a copy, takes each entry once and in order, and stops before it
//! diverges.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::collections::BTreeMap;

use heliofs_proto::ids::{Epoch, Ino, Position, SessionId, VolumeId};
use heliofs_proto::v1::{
    self, FileKind, FsError, MirrorState, command, local_command, log_item::Item,
};
use meta_core::query::lookup;
use meta_core::{Stamp, View};
use meta_server::config::CacheSizes;
use meta_server::proposer::{LocalReply, Proposed};
use meta_server::raft::LogData;
use meta_server::raft::types::{Entry, LogId};
use meta_server::store::State;
use meta_server::store::group::stands_alone;
use meta_server::store::view::SnapshotView;
use openraft::EntryPayload;
use tempfile::TempDir;

const VOLUME: VolumeId = VolumeId(1);

/// A state and the log index that it is at.
struct Region {
    state: State,
    index: u64,
    dir: TempDir,
}

impl Region {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let state = State::open(dir.path(), &CacheSizes::default()).unwrap();
        Self {
            state,
            index: 0,
            dir,
        }
    }

    /// Each item in an entry of its own, all in one group.
    fn apply(&mut self, items: Vec<v1::LogItem>) -> Vec<Proposed> {
        let entries: Vec<Entry> = items
            .into_iter()
            .map(|item| {
                self.index += 1;
                Entry {
                    log_id: LogId {
                        leader_id: 1.into(),
                        index: self.index,
                    },
                    payload: EntryPayload::Normal(LogData::new(v1::LogBatch { items: vec![item] })),
                }
            })
            .collect();
        let mut answers = Vec::new();
        // As the state machine does it.
        for group in entries.chunk_by(|a, b| !stands_alone(a) && !stands_alone(b)) {
            let mut applied = self.state.apply(group).unwrap();
            answers.extend(applied.replies().into_iter().flatten());
        }
        answers
    }

    fn local(&mut self, op: local_command::Op) -> LocalReply {
        let item = Item::Local(v1::LocalCommand { op: Some(op) });
        match self.apply(vec![stamped(item)]).pop().unwrap() {
            Proposed::Local(reply) => reply,
            Proposed::Reply(reply) => panic!("{reply:?}"),
        }
    }

    fn head(&self) -> Position {
        self.state.head(VOLUME).unwrap().0
    }

    fn digest(&self) -> u128 {
        let (position, sums) = self.state.digest(VOLUME).unwrap();
        assert_eq!(position, self.head());
        let found = self.state.scrub(VOLUME, |_| true).unwrap().unwrap();
        let (scrubbed, again) = (found.position, found.sums);
        assert_eq!((scrubbed, again.total()), (position, sums.total()));
        sums.total()
    }

    fn mirror(&self) -> v1::MirrorOf {
        self.state.mirror(VOLUME).unwrap()
    }
}

fn stamped(item: Item) -> v1::LogItem {
    v1::LogItem {
        time: 1_000,
        item: Some(item),
        ..Default::default()
    }
}

fn create(name: &str) -> v1::Command {
    v1::Command {
        volume: VOLUME.0,
        op: Some(command::Op::Create(v1::Create {
            parent: 1,
            name: name.to_owned().into(),
            kind: FileKind::File.into(),
            mode: 0o644,
            ..Default::default()
        })),
        ..Default::default()
    }
}

/// A source with a volume, the commands of whose history are kept.
struct Source {
    region: Region,
    history: Vec<v1::ChangelogEntry>,
}

impl Source {
    fn new() -> Self {
        let mut region = Region::new();
        let made = region.local(local_command::Op::VolumeCreate(v1::VolumeCreate {
            name: "vol".to_owned(),
            storage: Some(v1::StorageConfig::default()),
            settings: Some(v1::VolumeSettings {
                core_level: 1,
                ..Default::default()
            }),
        }));
        assert_eq!(made, LocalReply::VolumeCreated(VOLUME));
        Self {
            region,
            history: Vec::new(),
        }
    }

    fn create(&mut self, names: std::ops::Range<u32>) {
        for n in names {
            let command = create(&format!("file-{n}"));
            let time = 1_000 + i64::from(n);
            let item = v1::LogItem {
                time,
                item: Some(Item::Command(command.clone())),
                ..Default::default()
            };
            self.region.apply(vec![item]);
            self.history.push(v1::ChangelogEntry {
                position: Some(self.region.head().into()),
                time,
                command: Some(command),
            });
        }
    }

    fn after(&self, position: Position) -> Vec<v1::ChangelogEntry> {
        let mut entries = self.history.clone();
        entries.retain(|entry| Position::from(entry.position.unwrap()) > position);
        entries
    }

    /// The parts of a copy, and its end.
    fn copy(&self) -> (Vec<Vec<v1::StoredRecord>>, v1::MirrorLoadEnd) {
        let mut parts = Vec::new();
        let send = |records: Vec<v1::StoredRecord>| {
            parts.extend(records.chunks(7).map(<[_]>::to_vec));
            true
        };
        let copied = self.region.state.copy(VOLUME, |_| true, send);
        let copied = copied.unwrap().unwrap();
        let end = v1::MirrorLoadEnd {
            volume: VOLUME.0,
            load: 0,
            digest: copied.digest.to_le_bytes().to_vec().into(),
            head: copied.head,
        };
        (parts, end)
    }
}

fn begin() -> local_command::Op {
    local_command::Op::MirrorLoadBegin(v1::MirrorLoadBegin {
        fence: None,
        volume: VOLUME.0,
        name: "far".to_owned(),
        mirror: Some(v1::MirrorOf {
            volume: "vol".to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    })
}

fn load(mirror: &mut Region, source: &Source) {
    let LocalReply::Load(load) = mirror.local(begin()) else {
        panic!("the load does not begin")
    };
    let (parts, end) = source.copy();
    load_parts(mirror, load, 0, &parts);
    let end = v1::MirrorLoadEnd { load, ..end };
    let ended = mirror.local(local_command::Op::MirrorLoadEnd(end));
    assert_eq!(ended, LocalReply::Replayed(source.region.head()));
}

/// These parts of a copy, from number `first` on.
fn load_parts(mirror: &mut Region, load: u64, first: u64, parts: &[Vec<v1::StoredRecord>]) {
    for (part, records) in (first..).zip(parts) {
        let part = local_command::Op::MirrorLoad(v1::MirrorLoad {
            volume: VOLUME.0,
            load,
            part,
            records: records.clone(),
        });
        assert_eq!(mirror.local(part), LocalReply::Done);
    }
}

fn replay(mirror: &mut Region, entries: Vec<v1::ChangelogEntry>) -> LocalReply {
    let replay = v1::Replay {
        pin: false,
        volume: VOLUME.0,
        entries,
        beats: Vec::new(),
    };
    match mirror.apply(vec![stamped(Item::Replay(replay))]).pop() {
        Some(Proposed::Local(reply)) => reply,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_was_destroyed_right_before_takes_nothing_of_the_next_copy_along() {
    let mut source = Source::new();
    source.create(0..50);
    let mut mirror = Region::new();
    load(&mut mirror, &source);
    source.create(50..80);
    // As a node does it that is behind, or restarted: all of it at once.
    let (parts, end) = source.copy();
    let load = 1;
    let destroy = v1::VolumeDestroy { volume: VOLUME.0 };
    let mut ops = vec![local_command::Op::VolumeDestroy(destroy), begin()];
    ops.extend((0..).zip(parts).map(|(part, records)| {
        local_command::Op::MirrorLoad(v1::MirrorLoad {
            volume: VOLUME.0,
            load,
            part,
            records,
        })
    }));
    ops.push(local_command::Op::MirrorLoadEnd(v1::MirrorLoadEnd {
        load,
        ..end
    }));
    let item = |op| stamped(Item::Local(v1::LocalCommand { op: Some(op) }));
    let mut answers = mirror.apply(ops.into_iter().map(item).collect());
    let ended = Proposed::Local(LocalReply::Replayed(source.region.head()));
    assert_eq!(answers.pop(), Some(ended));
    assert_eq!(mirror.digest(), source.region.digest());
}

#[test]
fn a_mirror_is_loaded_and_replays_each_entry_once_and_in_order() {
    let mut source = Source::new();
    source.create(0..50);
    let mut mirror = Region::new();
    load(&mut mirror, &source);
    assert_eq!(mirror.digest(), source.region.digest());

    let loaded = mirror.head();
    source.create(50..80);
    let entries = source.after(loaded);
    let upto = replay(&mut mirror, entries[..20].to_vec());
    assert_eq!(upto, LocalReply::Replayed(mirror.head()));
    // By a leader and by its successor: what is there is passed over.
    replay(&mut mirror, entries[10..].to_vec());
    replay(&mut mirror, entries.clone());
    assert_eq!(mirror.head(), source.region.head());
    assert_eq!(mirror.digest(), source.region.digest());
    assert_eq!(mirror.state.head(VOLUME), source.region.state.head(VOLUME));

    // A restart loses what was not flushed and nothing else; here everything was.
    mirror.state.flush().unwrap();
    let Region { state, index, dir } = mirror;
    drop(state);
    let state = State::open(dir.path(), &CacheSizes::default()).unwrap();
    let mut mirror = Region { state, index, dir };
    assert_eq!(mirror.digest(), source.region.digest());
    source.create(80..85);
    let head = mirror.head();
    replay(&mut mirror, source.after(head));
    assert_eq!(mirror.digest(), source.region.digest());
}

#[test]
fn a_gap_stops_the_mirror_for_good_and_changes_nothing() {
    let mut source = Source::new();
    source.create(0..10);
    let mut mirror = Region::new();
    load(&mut mirror, &source);
    let (head, digest) = (mirror.head(), mirror.digest());
    source.create(10..20);
    let entries = source.after(head);
    let refused = replay(&mut mirror, entries[1..].to_vec());
    let LocalReply::Invalid(why) = refused else {
        panic!("{refused:?}")
    };
    assert!(why.contains("entries are missing"), "{why}");
    assert_eq!((mirror.head(), mirror.digest()), (head, digest));
    assert_eq!(mirror.mirror().state(), MirrorState::Stopped);
    assert_eq!(mirror.mirror().reason, why);
    // The right ones come too late.
    let late = replay(&mut mirror, entries.clone());
    assert!(matches!(late, LocalReply::Invalid(_)), "{late:?}");
    assert_eq!(mirror.head(), head);
    // Loaded anew it goes on.
    load(&mut mirror, &source);
    assert_eq!(mirror.digest(), source.region.digest());
}

#[test]
fn an_entry_of_another_epoch_or_volume_stops_the_mirror() {
    for wrong in [0, 1] {
        let mut source = Source::new();
        source.create(0..5);
        let mut mirror = Region::new();
        load(&mut mirror, &source);
        let head = mirror.head();
        source.create(5..6);
        let mut entry = source.after(head).remove(0);
        if wrong == 0 {
            entry.position = Some(
                Position {
                    epoch: Epoch(7),
                    ..head.next()
                }
                .into(),
            );
        } else {
            entry.command.as_mut().unwrap().volume = 9;
        }
        let refused = replay(&mut mirror, vec![entry]);
        assert!(matches!(refused, LocalReply::Invalid(_)), "{refused:?}");
        assert_eq!(mirror.head(), head);
        assert_eq!(mirror.mirror().state(), MirrorState::Stopped);
    }
}

#[test]
fn a_load_that_is_damaged_or_mixed_up_does_not_come_to_life() {
    let mut source = Source::new();
    source.create(0..30);
    let mut mirror = Region::new();
    let first = mirror.local(begin());
    assert_eq!(first, LocalReply::Load(1));
    assert_eq!(mirror.mirror().state(), MirrorState::Loading);
    let (parts, end) = source.copy();
    let part = |load, part, records: &[v1::StoredRecord]| {
        local_command::Op::MirrorLoad(v1::MirrorLoad {
            volume: VOLUME.0,
            load,
            part,
            records: records.to_vec(),
        })
    };
    let invalid = |reply: LocalReply| assert!(matches!(reply, LocalReply::Invalid(_)), "{reply:?}");
    invalid(mirror.local(part(1, 1, &parts[0])));
    assert_eq!(mirror.local(part(1, 0, &parts[0])), LocalReply::Done);
    invalid(mirror.local(part(1, 0, &parts[0])));
    let foreign = v1::StoredRecord {
        key: meta_core::keys::counters(VolumeId(2)),
        value: "x".into(),
    };
    invalid(mirror.local(part(1, 1, &[foreign])));
    // Half of it.
    let early = v1::MirrorLoadEnd {
        load: 1,
        ..end.clone()
    };
    invalid(mirror.local(local_command::Op::MirrorLoadEnd(early)));
    assert_eq!(mirror.state.loaded(VOLUME), 0);
    assert!(
        mirror
            .state
            .view()
            .get(&meta_core::keys::head(VOLUME))
            .unwrap()
            .is_none()
    );
    // Another begins; what is left of the first is gone, and late parts of it are refused.
    assert_eq!(mirror.local(begin()), LocalReply::Load(2));
    assert_eq!(
        mirror
            .state
            .scrub(VOLUME, |_| true)
            .unwrap()
            .unwrap()
            .sums
            .total(),
        0
    );
    invalid(mirror.local(part(1, 1, &parts[1])));
    for (number, records) in (0..).zip(&parts) {
        assert_eq!(mirror.local(part(2, number, records)), LocalReply::Done);
    }
    let ended = mirror.local(local_command::Op::MirrorLoadEnd(v1::MirrorLoadEnd {
        load: 2,
        ..end
    }));
    assert_eq!(ended, LocalReply::Replayed(source.region.head()));
    assert_eq!(mirror.state.loaded(VOLUME), mirror.index);
    assert_eq!(mirror.digest(), source.region.digest());
}

#[test]
fn a_mirror_that_stops_only_to_be_loaded_anew_is_told_apart_until_the_copy_is_whole() {
    let mut source = Source::new();
    source.create(0..10);
    let mut mirror = Region::new();
    load(&mut mirror, &source);
    let stop = |reload| {
        local_command::Op::MirrorStop(v1::MirrorStop {
            volume: VOLUME.0,
            reason: "why".to_owned(),
            reload,
        })
    };
    let stands = |mirror: &Region| {
        let it = mirror.mirror();
        (it.state(), it.followed, it.reload)
    };
    for followed in [true, false] {
        if !followed {
            assert_eq!(mirror.local(stop(false)), LocalReply::Done);
        }
        // Asked twice.
        for _ in 0..2 {
            assert_eq!(mirror.local(stop(true)), LocalReply::Done);
            assert_eq!(stands(&mirror), (MirrorState::Stopped, followed, true));
        }
        load(&mut mirror, &source);
        assert_eq!(stands(&mirror), (MirrorState::Following, false, false));
        assert_eq!(mirror.mirror().reason, "");
    }
}

#[test]
fn a_node_stops_at_an_item_that_a_later_build_must_apply() {
    let mut source = Source::new();
    source.create(0..10);
    let mut mirror = Region::new();
    load(&mut mirror, &source);
    let (head, digest) = (mirror.head(), mirror.digest());
    let item = Item::Local(v1::LocalCommand { op: Some(begin()) });
    let data = |level| {
        LogData::new(v1::LogBatch {
            items: vec![v1::LogItem {
                level,
                ..stamped(item.clone())
            }],
        })
    };
    let mut apply = |level| {
        mirror.index += 1;
        let entry = Entry {
            log_id: LogId {
                leader_id: 1.into(),
                index: mirror.index,
            },
            payload: EntryPayload::Normal(data(level)),
        };
        let entries = [entry];
        let applied = mirror.state.apply(&entries);
        applied.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(apply(1), Ok(()));
    let why = apply(u32::MAX).unwrap_err();
    assert!(why.contains("upgrade this node"), "{why}");
    mirror = mirror.restarted();
    assert_eq!((mirror.head(), mirror.digest()), (head, digest));
}

#[test]
fn a_load_whose_entries_are_applied_again_after_a_crash_ends_the_same() {
    let mut source = Source::new();
    source.create(0..20);
    let mut mirror = Region::new();
    load(&mut mirror, &source);
    let before = mirror.digest();
    // All in one run of the state machine: an old volume, its removal, parts, the end, and entries on top.
    let loaded = mirror.head();
    let (parts, end) = source.copy();
    source.create(20..40);
    let mut ops = vec![begin()];
    ops.extend((0..).zip(parts).map(|(part, records)| {
        local_command::Op::MirrorLoad(v1::MirrorLoad {
            volume: VOLUME.0,
            load: 2,
            part,
            records,
        })
    }));
    ops.push(local_command::Op::MirrorLoadEnd(v1::MirrorLoadEnd {
        load: 2,
        ..end
    }));
    let mut items: Vec<v1::LogItem> = ops
        .into_iter()
        .map(|op| stamped(Item::Local(v1::LocalCommand { op: Some(op) })))
        .collect();
    items.push(stamped(Item::Replay(v1::Replay {
        pin: false,
        volume: VOLUME.0,
        entries: source.after(loaded),
        beats: Vec::new(),
    })));
    mirror.apply(items);
    assert_ne!(mirror.digest(), before);
    assert_eq!(mirror.digest(), source.region.digest());
    assert_eq!(mirror.mirror().load, 2);
}

impl Region {
    /// As a node that is started again, with what it had flushed.
    fn restarted(self) -> Self {
        self.state.flush().unwrap();
        let Region { state, index, dir } = self;
        drop(state);
        let state = State::open(dir.path(), &CacheSizes::default()).unwrap();
        Region { state, index, dir }
    }

    fn has(&self, name: &str) -> bool {
        let path = name.as_bytes();
        let live = lookup(&self.state.view(), VOLUME, Ino::ROOT, path).is_ok();
        let at_once = |view: &SnapshotView<'_>| lookup(view, VOLUME, Ino::ROOT, path).is_ok();
        assert_eq!(live, self.state.snapshot_view(at_once));
        live
    }
}

#[test]
fn what_there_was_is_served_until_a_copy_is_whole() {
    let mut source = Source::new();
    source.create(0..30);
    let mut mirror = Region::new();
    load(&mut mirror, &source);
    // Copies in both halves of the keys.
    for round in 1..4 {
        let (before, digest) = (mirror.head(), mirror.digest());
        let new = 30 * round + 1..30 * (round + 1);
        source.create(new.clone());
        // One breaks off...
        let LocalReply::Load(broken) = mirror.local(begin()) else {
            panic!("the load does not begin")
        };
        let (parts, end) = source.copy();
        load_parts(&mut mirror, broken, 0, &parts[..5]);
        assert_eq!((mirror.head(), mirror.digest()), (before, digest));
        assert_eq!(mirror.mirror().state(), MirrorState::Following);
        assert_eq!(mirror.mirror().loading, broken);
        // ... another is interrupted by a restart, and by entries that were on their way.
        let LocalReply::Load(second) = mirror.local(begin()) else {
            panic!("the load does not begin")
        };
        assert!(second > broken);
        load_parts(&mut mirror, second, 0, &parts[..7]);
        replay(&mut mirror, source.after(before)[..3].to_vec());
        mirror = mirror.restarted();
        assert_eq!(mirror.head().seq, before.seq + 3);
        let served = mirror.digest();
        load_parts(&mut mirror, second, 7, &parts[7..]);
        assert_eq!(mirror.digest(), served);
        assert!(!mirror.has(&format!("file-{}", new.end - 1)));
        let end = v1::MirrorLoadEnd {
            load: second,
            ..end
        };
        let whole = source.region.head();
        mirror.state.clone().snapshot_view(|view| {
            let ended = mirror.local(local_command::Op::MirrorLoadEnd(end));
            assert_eq!(ended, LocalReply::Replayed(whole));
            // Who was reading goes on with what there was.
            let head = meta_core::query::head(view, VOLUME).unwrap().unwrap();
            assert_eq!(head.position.seq, before.seq + 3);
            let gone = format!("file-{}", new.end - 1);
            assert!(lookup(view, VOLUME, Ino::ROOT, gone.as_bytes()).is_err());
            assert!(lookup(view, VOLUME, Ino::ROOT, b"file-0").is_ok());
        });
        assert_eq!(mirror.digest(), source.region.digest());
        assert!(mirror.has(&format!("file-{}", new.end - 1)));
        assert_eq!((mirror.mirror().load, mirror.mirror().loading), (second, 0));
        // It is the same history.
        assert_eq!(mirror.mirror().history_since, 1);
        mirror = mirror.restarted();
        assert_eq!(mirror.digest(), source.region.digest());
        source.create(new.end..new.end + 1);
        let head = mirror.head();
        replay(&mut mirror, source.after(head));
        assert_eq!(mirror.digest(), source.region.digest());
    }
}

#[test]
fn a_mirror_whose_source_dies_while_a_copy_is_loaded_is_promoted_with_what_it_had() {
    let mut source = Source::new();
    source.create(0..30);
    let mut mirror = Region::new();
    load(&mut mirror, &source);
    let (head, digest) = (mirror.head(), mirror.digest());
    source.create(30..60);
    assert_eq!(mirror.local(begin()), LocalReply::Load(2));
    let (parts, end) = source.copy();
    load_parts(&mut mirror, 2, 0, &parts[..6]);
    assert_eq!((mirror.head(), mirror.digest()), (head, digest));
    let promoted = mirror.local(local_command::Op::MirrorPromote(v1::MirrorPromote {
        volume: VOLUME.0,
        at: Some(head.into()),
        epoch: 1,
        ..Default::default()
    }));
    let begun = Position {
        epoch: Epoch(1),
        seq: head.seq + 1,
    };
    assert_eq!(promoted, LocalReply::Replayed(begun));
    // What was under way is over, for late parts and for the end, too.
    let late = mirror.local(local_command::Op::MirrorLoad(v1::MirrorLoad {
        volume: VOLUME.0,
        load: 2,
        part: 6,
        records: parts[6].clone(),
    }));
    assert!(matches!(late, LocalReply::Invalid(_)), "{late:?}");
    let end = v1::MirrorLoadEnd { load: 2, ..end };
    let late = mirror.local(local_command::Op::MirrorLoadEnd(end));
    assert!(matches!(late, LocalReply::Invalid(_)), "{late:?}");
    mirror = mirror.restarted();
    assert_eq!(mirror.head(), begun);
    assert!(mirror.has("file-29") && !mirror.has("file-30"));
    mirror.digest();
}

#[test]
fn a_digest_of_the_source_that_differs_is_noticed_and_one_that_agrees_is_counted() {
    let mut source = Source::new();
    source.create(0..5);
    let mut mirror = Region::new();
    load(&mut mirror, &source);
    let mut with = |beat: v1::Beat| {
        let replay = v1::Replay {
            pin: false,
            volume: VOLUME.0,
            entries: Vec::new(),
            beats: vec![beat],
        };
        mirror.apply(vec![stamped(Item::Replay(replay))]);
        (
            mirror.state.beats_agreed(VOLUME),
            mirror.state.diverged(VOLUME),
        )
    };
    let beat = source.region.state.beat(VOLUME).unwrap();
    assert_eq!(with(beat.clone()), (1, None));
    let wrong = v1::Beat {
        digest: vec![1; 16].into(),
        ..beat
    };
    assert_eq!(with(wrong), (1, Some(source.region.head())));
}

#[test]
fn commands_of_its_own_are_refused_by_a_mirror_and_take_no_position() {
    let mut source = Source::new();
    source.create(0..5);
    let mut mirror = Region::new();
    load(&mut mirror, &source);
    let (head, digest) = (mirror.head(), mirror.digest());
    let command = v1::Command {
        session: SessionId::SYSTEM.0,
        ..create("own")
    };
    match mirror.apply(vec![stamped(Item::Command(command))]).pop() {
        Some(Proposed::Reply(reply)) => assert_eq!(reply.error(), FsError::ReadOnly),
        other => panic!("{other:?}"),
    }
    assert_eq!((mirror.head(), mirror.digest()), (head, digest));
    assert_eq!(mirror.state.deletions_waiting(VOLUME), 0);
}

#[test]
fn a_mirror_does_not_take_the_place_of_a_volume_of_its_own() {
    let mut own = Source::new();
    own.create(0..3);
    let digest = own.region.digest();
    let refused = own.region.local(begin());
    assert!(matches!(refused, LocalReply::Invalid(_)), "{refused:?}");
    assert_eq!(own.region.digest(), digest);
}

#[test]
fn slots_keep_what_they_need_until_they_are_given_up() {
    let mut source = Source::new();
    source.create(0..200);
    let slot = |name: &str| v1::MirrorSlot {
        volume: VOLUME.0,
        name: name.to_owned(),
        log_bytes_max: 1 << 20,
        ..Default::default()
    };
    let make = |name: &str, reset| {
        local_command::Op::SlotCreate(v1::SlotCreate {
            slot: Some(slot(name)),
            reset,
        })
    };
    let made = source.region.local(make("east", false));
    let LocalReply::Slot(made, true) = made else {
        panic!("{made:?}")
    };
    let head = source.region.head();
    assert_eq!(made.oldest.map(Position::from), Some(head));
    assert_eq!(
        source.region.state.slots_index().unwrap(),
        None,
        "it has everything"
    );
    source.create(200..400);
    assert_eq!(source.region.state.slots_horizon(VOLUME), Some(head));
    let index = source.region.state.slots_index().unwrap().unwrap();
    assert!(index <= source.region.index - 199, "{index}");
    // Making it again changes nothing; reports move it, late ones don't move it back.
    let again = source.region.local(make("east", false));
    assert!(matches!(again, LocalReply::Slot(_, false)), "{again:?}");
    let report = |position: Position| {
        local_command::Op::SlotReport(v1::SlotReport {
            volume: VOLUME.0,
            name: "east".to_owned(),
            applied: Some(position.into()),
            complete: Some(position.into()),
            oldest: Some(position.into()),
            cluster_id: 5,
        })
    };
    let later = source.region.head();
    source.region.local(report(later));
    source.region.local(report(head));
    assert_eq!(source.region.state.slots_horizon(VOLUME), Some(later));
    let change = |change| {
        local_command::Op::SlotChange(v1::SlotChange {
            volume: VOLUME.0,
            name: "east".to_owned(),
            change: Some(change),
        })
    };
    let why = v1::slot_change::Change::Invalidate("too far".to_owned());
    source.region.local(change(why));
    assert_eq!(source.region.state.slots_horizon(VOLUME), None);
    assert_eq!(source.region.state.slots(VOLUME)[0].invalid, "too far");
    source.region.local(make("east", true));
    assert_eq!(source.region.state.slots(VOLUME)[0].invalid, "");
    // Slots survive a restart, and go when they are deleted.
    source.region.state.flush().unwrap();
    let Region { state, index, dir } = source.region;
    drop(state);
    let state = State::open(dir.path(), &CacheSizes::default()).unwrap();
    let mut region = Region { state, index, dir };
    assert_eq!(region.state.slots(VOLUME).len(), 1);
    region.local(change(v1::slot_change::Change::Delete(true)));
    assert!(region.state.slots(VOLUME).is_empty());
}

/// The model of what a mirror must be: the same commands, applied one by one to records in memory.
#[test]
fn a_mirror_equals_its_commands_applied_one_by_one() {
    let mut source = Source::new();
    source.create(0..40);
    let mut mirror = Region::new();
    load(&mut mirror, &source);
    let mut records = BTreeMap::new();
    let (parts, end) = source.copy();
    for record in parts.into_iter().flatten() {
        records.insert(record.key, record.value);
    }
    records.insert(meta_core::keys::head(VOLUME), end.head);
    let head = mirror.head();
    source.create(40..120);
    for entry in source.after(head) {
        let stamp = Stamp {
            time: heliofs_proto::ids::UnixNanos(entry.time),
        };
        let applied = meta_core::apply(&records, stamp, entry.command.as_ref().unwrap()).unwrap();
        for change in applied.changes {
            match change.new {
                Some(new) => records.insert(change.key, new),
                None => records.remove(&change.key),
            };
        }
    }
    for chunk in source.after(head).chunks(13) {
        replay(&mut mirror, chunk.to_vec());
    }
    let (from, to) = meta_core::keys::volume_range(VOLUME);
    let found = mirror.state.view().scan(&from, &to, usize::MAX).unwrap();
    assert_eq!(found, records.into_iter().collect::<Vec<_>>());
}

#[test]
fn of_an_undo_and_a_seal_of_a_hand_over_the_first_in_the_log_counts() {
    for undone_first in [false, true] {
        let mut source = Source::new();
        source.create(0..10);
        let mut mirror = Region::new();
        load(&mut mirror, &source);
        let last = source.region.head();
        let demote = |undo, seal, at| {
            local_command::Op::VolumeDemote(v1::VolumeDemote {
                volume: VOLUME.0,
                successor: "helio://far/far".to_owned(),
                hand_over: true,
                undo,
                seal,
                at: Some(Position::into(at)),
            })
        };
        let invalid =
            |reply: LocalReply| assert!(matches!(reply, LocalReply::Invalid(_)), "{reply:?}");
        // Nothing was handed over.
        invalid(source.region.local(demote(false, true, last)));
        let handed_over = source.region.local(demote(false, false, last));
        assert_eq!(handed_over, LocalReply::Replayed(last));
        if undone_first {
            let undone = source.region.local(demote(true, false, last));
            assert_eq!(undone, LocalReply::Replayed(last));
            invalid(source.region.local(demote(false, true, last)));
            assert_eq!(source.region.head(), last);
            continue;
        }
        let time = 5_000;
        let seal = v1::LogItem {
            time,
            level: 0,
            item: Some(Item::Local(v1::LocalCommand {
                op: Some(demote(false, true, last)),
            })),
        };
        source.region.apply(vec![seal]);
        let sealed = last.next();
        assert_eq!(source.region.head(), sealed);
        // Asked twice.
        let again = source.region.local(demote(false, true, last));
        assert_eq!(again, LocalReply::Replayed(sealed));
        invalid(source.region.local(demote(true, false, last)));
        assert!(source.region.state.is_mirror(VOLUME));
        assert!(source.region.mirror().sealed);
        // The mirror is told the same.
        let entry = v1::ChangelogEntry {
            position: Some(sealed.into()),
            time,
            command: Some(meta_server::store::group::sealed(VOLUME)),
        };
        let replayed = replay(&mut mirror, vec![entry]);
        assert_eq!(replayed, LocalReply::Replayed(sealed));
        assert_eq!(mirror.digest(), source.region.digest());
        assert_eq!(mirror.state.head(VOLUME), source.region.state.head(VOLUME));
    }
}

#[test]
fn a_demoted_volume_takes_no_commands_and_a_promoted_mirror_takes_them_in_a_new_epoch() {
    let mut source = Source::new();
    source.create(0..10);
    let mut mirror = Region::new();
    load(&mut mirror, &source);
    let demote = || {
        local_command::Op::VolumeDemote(v1::VolumeDemote {
            volume: VOLUME.0,
            successor: "helio://far/far".to_owned(),
            hand_over: true,
            ..v1::VolumeDemote::default()
        })
    };
    let last = source.region.head();
    for _ in 0..2 {
        let demoted = source.region.local(demote());
        assert_eq!(demoted, LocalReply::Replayed(last));
    }
    let late = stamped(Item::Command(create("late")));
    match source.region.apply(vec![late]).pop() {
        Some(Proposed::Reply(reply)) => assert_eq!(reply.error(), FsError::ReadOnly),
        other => panic!("{other:?}"),
    }
    assert_eq!(source.region.head(), last);
    assert_eq!(source.region.mirror().prefix, "vol");

    // To another one it is not handed over again, and a mirror has nothing to hand over.
    let to = |successor: &str, hand_over| {
        local_command::Op::VolumeDemote(v1::VolumeDemote {
            volume: VOLUME.0,
            successor: successor.to_owned(),
            hand_over,
            ..v1::VolumeDemote::default()
        })
    };
    // Taken back, it goes on where it was; handed over again, it stays there.
    let undo = || {
        local_command::Op::VolumeDemote(v1::VolumeDemote {
            volume: VOLUME.0,
            successor: "helio://far/far".to_owned(),
            undo: true,
            at: Some(last.into()),
            ..v1::VolumeDemote::default()
        })
    };
    assert_eq!(source.region.local(undo()), LocalReply::Replayed(last));
    assert!(!source.region.state.is_mirror(VOLUME));
    assert_eq!(source.region.local(demote()), LocalReply::Replayed(last));
    // What is loaded is not taken back.
    let refused = mirror.local(undo());
    assert!(matches!(refused, LocalReply::Invalid(_)), "{refused:?}");
    let refused = source.region.local(to("helio://third/vol", true));
    assert!(matches!(refused, LocalReply::Invalid(_)), "{refused:?}");
    let refused = mirror.local(to("helio://third/vol", true));
    assert!(matches!(refused, LocalReply::Invalid(_)), "{refused:?}");
    // That neither is written to is what the others ask.
    let asked = mirror.local(to("helio://third/vol", false));
    assert_eq!(asked, LocalReply::Replayed(last));

    let promote = |at: Position, epoch| {
        local_command::Op::MirrorPromote(v1::MirrorPromote {
            fence: None,
            volume: VOLUME.0,
            at: Some(at.into()),
            epoch,
        })
    };
    for (at, epoch) in [(last.next(), 1), (last, 0)] {
        let refused = mirror.local(promote(at, epoch));
        assert!(matches!(refused, LocalReply::Invalid(_)), "{refused:?}");
        assert!(mirror.state.is_mirror(VOLUME));
    }
    let first = Position {
        epoch: Epoch(1),
        seq: last.seq + 1,
    };
    assert_eq!(mirror.local(promote(last, 1)), LocalReply::Replayed(first));
    assert!(!mirror.state.is_mirror(VOLUME));
    match mirror
        .apply(vec![stamped(Item::Command(create("own")))])
        .pop()
    {
        Some(Proposed::Reply(reply)) => {
            assert_eq!(reply.error(), FsError::None);
            assert_eq!(reply.position.map(Position::from), Some(first.next()));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(
        mirror.digest(),
        mirror.state.digest(VOLUME).unwrap().1.total()
    );
    let head = mirror
        .state
        .snapshot_view(|view| meta_core::query::head(view, VOLUME))
        .unwrap()
        .unwrap();
    assert_eq!(head.epochs, [(Epoch(0), 1), (Epoch(1), first.seq)]);
    // What the old source might still send is of another epoch.
    let late = v1::ChangelogEntry {
        position: Some(last.next().into()),
        time: 2_000,
        command: Some(create("late")),
    };
    let refused = replay(&mut mirror, vec![late]);
    assert!(matches!(refused, LocalReply::Invalid(_)), "{refused:?}");
    // A mirror of the mirror goes on through the change of epoch.
    let third_at = first;
    let begin = v1::ChangelogEntry {
        position: Some(third_at.into()),
        time: 2_000,
        command: Some(v1::Command {
            volume: VOLUME.0,
            op: Some(command::Op::EpochBegin(v1::EpochBegin { epoch: 1 })),
            ..Default::default()
        }),
    };
    let mut fresh = Source::new();
    fresh.create(0..10);
    let mut third = Region::new();
    load(&mut third, &fresh);
    assert_eq!(third.head(), last);
    assert_eq!(replay(&mut third, vec![begin]), LocalReply::Replayed(first));
}

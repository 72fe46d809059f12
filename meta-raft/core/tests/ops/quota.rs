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

/// A volume of core level `level`, a client's session in it, and the sequence of its last command.
struct Client {
    volume: Volume,
    session: SessionId,
    sequence: u64,
}

impl Client {
    fn new(level: u32, capacity: u64) -> Self {
        let mut volume = volume();
        let settings = v1::VolumeSettings {
            core_level: level,
            capacity_bytes_max: capacity,
            ..v1::VolumeSettings::default()
        };
        let update = v1::SettingsUpdate {
            settings: Some(settings),
        };
        volume.run(Op::SettingsUpdate(update)).unwrap();
        let session = volume.begin_session();
        Self {
            volume,
            session,
            sequence: 0,
        }
    }

    fn run(&mut self, op: Op) -> Result<v1::Reply, FsError> {
        self.sequence += 1;
        let reply = self
            .volume
            .send(self.session, self.sequence, self.sequence, op);
        match reply.error() {
            FsError::None => Ok(reply),
            error => Err(error),
        }
    }

    fn write(&mut self, ino: u64, pieces: &[(u64, usize)]) -> Result<v1::Reply, FsError> {
        let extents = pieces.iter().map(|(offset, length)| v1::Extent {
            offset: *offset,
            length: *length as u64,
            inline_bytes: vec![b'x'; *length].into(),
            ..v1::Extent::default()
        });
        self.run(Op::Commit(v1::Commit {
            files: vec![v1::FileCommit {
                ino,
                extents: extents.collect(),
                ..v1::FileCommit::default()
            }],
            ..v1::Commit::default()
        }))
    }

    /// A file of pieces of one byte, `stride` apart.
    fn fragmented(&mut self, parent: u64, name: &str, stride: u64) -> u64 {
        let file = ino(&self.run(create(parent, name.to_owned())).unwrap());
        for commit in 0..8 {
            let pieces: Vec<_> = (0..96)
                .map(|piece| ((commit * 96 + piece) * stride, 1))
                .collect();
            self.write(file, &pieces).unwrap();
        }
        file
    }

    fn work_off(&mut self, ino: u64) {
        while !self
            .volume
            .run(Op::EraseStep(v1::EraseStep { ino }))
            .unwrap()
            .done
        {}
        self.volume.check();
    }
}

/// Pieces of [`Client::fragmented`]; more than one command removes in place.
const PIECES: u64 = 8 * 96;

fn limit(client: &mut Client, kind: QuotaKind, id: u64, bytes: u64) {
    let set = v1::QuotaSet {
        kind: kind as i32,
        id,
        bytes_max: Some(bytes),
        inodes_max: None,
    };
    client.volume.run(Op::QuotaSet(set)).unwrap();
    count(&mut client.volume);
}

#[test]
fn an_overwrite_under_a_full_limit_is_not_refused_however_fragmented_the_file_is() {
    let limits = [
        (Some(QuotaKind::Directory), FsError::QuotaExceeded),
        (Some(QuotaKind::User), FsError::QuotaExceeded),
        (None, FsError::NoSpace),
    ];
    for (limited, refusal) in limits {
        let capacity = match limited {
            Some(_) => 0,
            None => PIECES,
        };
        for level in [3, 4] {
            let mut client = Client::new(level, capacity);
            let dir = ino(&client.run(mkdir(ROOT, "d")).unwrap());
            let file = client.fragmented(dir, "f", 1);
            match limited {
                Some(QuotaKind::Directory) => {
                    limit(&mut client, QuotaKind::Directory, dir, PIECES);
                }
                Some(kind) => limit(&mut client, kind, 0, PIECES),
                None => {}
            }
            if level == 3 {
                // What an earlier release answers, for ever.
                assert_eq!(client.write(file, &[(0, PIECES as usize)]), Err(refusal));
                continue;
            }
            // What makes the file larger is growth, how little it may be.
            let longer = client.write(file, &[(0, PIECES as usize + 1)]);
            assert_eq!(longer, Err(refusal), "{limited:?}");
            // Again while what was overwritten waits: that of the first time still counts, but it isn't more.
            for _ in 0..2 {
                client.write(file, &[(0, PIECES as usize)]).unwrap();
            }
            client.volume.check();
            client.work_off(file);
            assert_eq!(client.write(file, &[(PIECES, 1)]), Err(refusal));
            client.write(file, &[(PIECES / 2, 5)]).unwrap();
            client.volume.check();
        }
    }
}

#[test]
fn a_commit_of_many_pieces_over_a_fragmented_file_is_weighed_as_a_whole() {
    let mut client = Client::new(4, 0);
    let dir = ino(&client.run(mkdir(ROOT, "d")).unwrap());
    let file = client.fragmented(dir, "f", 1);
    limit(&mut client, QuotaKind::Directory, dir, PIECES);
    // As many as a commit may bring, each over some of the old ones.
    let each = PIECES / 96;
    let pieces: Vec<_> = (0..96).map(|piece| (piece * each, each as usize)).collect();
    client.write(file, &pieces).unwrap();
    client.volume.check();
    client.work_off(file);
    let used = quota(&client.volume, QuotaKind::Directory, dir).used_bytes;
    assert_eq!(used, PIECES);
}

#[test]
fn what_fills_holes_of_a_fragmented_file_is_growth() {
    let mut client = Client::new(4, 0);
    let dir = ino(&client.run(mkdir(ROOT, "d")).unwrap());
    let file = client.fragmented(dir, "f", 2);
    limit(&mut client, QuotaKind::Directory, dir, PIECES + 10);
    let half = PIECES as usize;
    assert_eq!(
        client.write(file, &[(0, half)]),
        Err(FsError::QuotaExceeded)
    );
    // Half of what the range shows then was there before.
    limit(&mut client, QuotaKind::Directory, dir, PIECES + PIECES / 2);
    client.write(file, &[(0, half)]).unwrap();
    client.volume.check();
    client.work_off(file);
    let used = quota(&client.volume, QuotaKind::Directory, dir).used_bytes;
    assert_eq!(used, PIECES + PIECES / 2);
}

#[test]
fn a_copy_over_a_fragmented_range_is_weighed_once() {
    let mut client = Client::new(4, 0);
    let dir = ino(&client.run(mkdir(ROOT, "d")).unwrap());
    let file = client.fragmented(dir, "f", 1);
    let other = ino(&client.run(create(ROOT, "other")).unwrap());
    // Many pieces, so that some of what the copy erased first is removed by its later parts.
    for first in 0..2u64 {
        let pieces: Vec<_> = (0..90).map(|piece| (first * 90 + piece, 1)).collect();
        client.write(other, &pieces).unwrap();
    }
    client
        .write(other, &[(180, (PIECES - 180) as usize)])
        .unwrap();
    limit(&mut client, QuotaKind::Directory, dir, PIECES);
    let copy = |length| {
        Op::CopyRange(v1::CopyRange {
            source: other,
            target: file,
            length,
            ..v1::CopyRange::default()
        })
    };
    assert_eq!(client.run(copy(PIECES)).unwrap().value, PIECES);
    client.volume.check();
    client.work_off(file);
    let used = quota(&client.volume, QuotaKind::Directory, dir).used_bytes;
    assert_eq!(used, PIECES);
    // One byte more than there was.
    client.write(other, &[(PIECES, 1)]).unwrap();
    let fragmented = client.fragmented(ROOT, "g", 1);
    let moved = rename(ROOT, "g", dir, "g");
    assert_eq!(client.run(moved), Err(FsError::QuotaExceeded));
    limit(&mut client, QuotaKind::Directory, dir, 2 * PIECES);
    client.run(rename(ROOT, "g", dir, "g")).unwrap();
    let copy = Op::CopyRange(v1::CopyRange {
        source: other,
        target: fragmented,
        length: PIECES + 1,
        ..v1::CopyRange::default()
    });
    assert_eq!(client.run(copy), Err(FsError::QuotaExceeded));
    client.volume.check();
}

/// Directories in each other, from the root: `names` of them.
fn nested(volume: &mut Volume, parent: u64, names: usize) -> Vec<u64> {
    let mut inos = vec![parent];
    for name in 0..names {
        let parent = inos[inos.len() - 1];
        inos.push(ino(&volume.run(mkdir(parent, format!("n{name}"))).unwrap()));
    }
    inos.remove(0);
    inos
}

fn try_set(volume: &mut Volume, id: u64) -> Result<v1::Reply, FsError> {
    volume.run(Op::QuotaSet(v1::QuotaSet {
        kind: QuotaKind::Directory as i32,
        id,
        bytes_max: Some(1 << 40),
        inodes_max: None,
    }))
}

fn levelled(level: u32) -> Volume {
    let mut volume = volume();
    let settings = v1::VolumeSettings {
        core_level: level,
        ..v1::VolumeSettings::default()
    };
    let update = v1::SettingsUpdate {
        settings: Some(settings),
    };
    volume.run(Op::SettingsUpdate(update)).unwrap();
    volume
}

#[test]
fn quotas_lie_in_each_other_only_so_deep_from_whichever_side_they_are_set() {
    let depth = meta_core::limits::QUOTA_DEPTH_MAX;
    // From above.
    let mut volume = levelled(4);
    let dirs = nested(&mut volume, ROOT, depth + 1);
    for dir in &dirs[..depth] {
        try_set(&mut volume, *dir).unwrap();
        count(&mut volume);
    }
    assert_eq!(try_set(&mut volume, dirs[depth]), Err(FsError::TooBig));

    // From below, and between.
    for (level, refused) in [(3, false), (4, true)] {
        let mut volume = levelled(level);
        let dirs = nested(&mut volume, ROOT, depth + 3);
        // Quotas beside them do not count, deep or not.
        for beside in 0..depth {
            let name = format!("beside{beside}");
            let dir = ino(&volume.run(mkdir(ROOT, name)).unwrap());
            try_set(&mut volume, dir).unwrap();
            count(&mut volume);
        }
        for dir in dirs[2..depth + 2].iter().rev() {
            try_set(&mut volume, *dir).unwrap();
            count(&mut volume);
        }
        let outermost = try_set(&mut volume, dirs[0]);
        match refused {
            true => assert_eq!(outermost, Err(FsError::TooBig)),
            false => {
                outermost.unwrap();
                count(&mut volume);
                continue;
            }
        }
        // Changing one that exists is no matter of depth.
        try_set(&mut volume, dirs[2]).unwrap();
        // With one taken back there is room for one, anywhere on the path.
        let remove = v1::QuotaRemove {
            kind: QuotaKind::Directory as i32,
            id: dirs[7],
        };
        volume.run(Op::QuotaRemove(remove)).unwrap();
        count(&mut volume);
        try_set(&mut volume, dirs[1]).unwrap();
        count(&mut volume);
        assert_eq!(try_set(&mut volume, dirs[7]), Err(FsError::TooBig));
        assert_eq!(try_set(&mut volume, dirs[0]), Err(FsError::TooBig));
    }
}

#[test]
fn trees_with_quotas_move_into_each_other_only_so_deep() {
    let depth = meta_core::limits::QUOTA_DEPTH_MAX;
    let mut volume = levelled(4);
    let left = ino(&volume.run(mkdir(ROOT, "left")).unwrap());
    let right = ino(&volume.run(mkdir(ROOT, "right")).unwrap());
    let into = nested(&mut volume, left, depth - 3);
    let moved = nested(&mut volume, right, 4);
    for dir in into.iter().chain(&moved) {
        try_set(&mut volume, *dir).unwrap();
        count(&mut volume);
    }
    let deepest = into[into.len() - 1];
    let too_deep = volume.run(rename(right, "n0", deepest, "m"));
    // As for any tree that can't be charged at once: `mv` copies.
    assert_eq!(too_deep, Err(FsError::CrossDevice));
    let above = into[into.len() - 2];
    volume.run(rename(right, "n0", above, "m")).unwrap();
    volume.check();
    let last = quota(&volume, QuotaKind::Directory, moved[0]);
    assert_eq!(last.parent, above);
}

#[test]
fn a_depth_that_depends_on_what_is_being_counted_is_told_later() {
    let depth = meta_core::limits::QUOTA_DEPTH_MAX;
    let mut volume = levelled(4);
    let dirs = nested(&mut volume, ROOT, depth + 1);
    for dir in dirs[2..].iter().rev() {
        try_set(&mut volume, *dir).unwrap();
        count(&mut volume);
    }
    let beside = ino(&volume.run(mkdir(ROOT, "beside")).unwrap());
    volume.run(create(beside, "f")).unwrap();
    // One fewer than may lie in each other, and one that is being counted: it could lie between them.
    try_set(&mut volume, beside).unwrap();
    assert_eq!(try_set(&mut volume, dirs[0]), Err(FsError::Busy));
    count(&mut volume);
    try_set(&mut volume, dirs[0]).unwrap();
    count(&mut volume);
    assert_eq!(try_set(&mut volume, dirs[1]), Err(FsError::TooBig));
}

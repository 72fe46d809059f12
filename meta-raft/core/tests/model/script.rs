//! Random commands that hit what exists: each step is turned into a command by what the reference holds at that moment.

use std::collections::BTreeMap;

use bytes::Bytes;
use heliofs_proto::limits::SEGMENTS_PER_BLOCK;
use heliofs_proto::v1::{
    self, Caller, Command, FileKind, QuotaKind, change::Op as Change, command::Op,
};
use proptest::prelude::*;

use crate::reference::{CAPABILITY, Reference};
use crate::world::{Byte, VOLUME, system};

/// Picks among what exists.
type Pick = u16;

#[derive(Clone, Debug)]
pub(crate) struct Piece {
    gap: u16,
    length: u16,
    source: u8,
}

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Create(Pick, u8, u8, bool),
    Link(Pick, Pick, u8),
    Unlink(Pick, u8, bool),
    Rename(Pick, u8, Pick, u8, u8),
    Truncate(Pick, u16),
    Mode(Pick, u16, u8),
    Mtime(Pick, i32),
    SetXattr(Pick, u8, u8),
    RemoveXattr(Pick, u8),
    Write(Vec<(Pick, u16, Vec<Piece>, u16)>, u8),
    Shred(Pick, u16),
    Fallocate(Pick, u8, u16, u16),
    Copy(Pick, u16, Pick, u16, u16),
    Relocate(Vec<(Pick, u16, u16, u8)>, u8),
    Reap(Pick),
    EraseSome(Pick),
    RemoveTree(Pick, u8),
    RemoveSome(Pick),
    Session(u8),
    Repeat(Pick),
    Capacity(u16),
    Quota(u8, Pick, u16, u8),
    NoQuota(u8, Pick),
    Count(Pick),
    Reserve(u8),
    Batch(Vec<(Step, i16)>),
}

pub(crate) fn steps(count: usize) -> impl Strategy<Value = Vec<Step>> {
    let piece = (
        0u16..90,
        prop_oneof![4 => 1u16..60, 1 => 200u16..900, 1 => Just(0)],
        any::<u8>(),
    )
        .prop_map(|(gap, length, source)| Piece {
            gap: if gap < 30 { 0 } else { gap },
            // Empty extents are refused: rarely enough that commits succeed.
            length: if length == 0 && source > 40 {
                7
            } else {
                length
            },
            source,
        });
    let file = (
        any::<Pick>(),
        0u16..1500,
        prop::collection::vec(piece, 0..6),
        0u16..2000,
    );
    let (pick, name) = (any::<Pick>, 0u8..7);
    let step = prop_oneof![
        8 => (pick(), name.clone(), 0u8..8, any::<bool>()).prop_map(|(a, b, c, d)| Step::Create(a, b, c, d)),
        2 => (pick(), pick(), name.clone()).prop_map(|(a, b, c)| Step::Link(a, b, c)),
        4 => (pick(), name.clone(), any::<bool>()).prop_map(|(a, b, c)| Step::Unlink(a, b, c)),
        5 => (pick(), name.clone(), pick(), name.clone(), 0u8..8)
            .prop_map(|(a, b, c, d, e)| Step::Rename(a, b, c, d, e)),
        5 => (pick(), 0u16..2500).prop_map(|(a, b)| Step::Truncate(a, b)),
        2 => (pick(), any::<u16>(), any::<u8>()).prop_map(|(a, b, c)| Step::Mode(a, b, c)),
        1 => (pick(), any::<i32>()).prop_map(|(a, b)| Step::Mtime(a, b)),
        2 => (pick(), 0u8..4, any::<u8>()).prop_map(|(a, b, c)| Step::SetXattr(a, b, c)),
        1 => (pick(), 0u8..4).prop_map(|(a, b)| Step::RemoveXattr(a, b)),
        12 => (prop::collection::vec(file, 1..4), any::<u8>()).prop_map(|(a, b)| Step::Write(a, b)),
        5 => (pick(), 0u16..600).prop_map(|(a, b)| Step::Shred(a, b)),
        4 => (pick(), 0u8..16, 0u16..2000, 0u16..1500).prop_map(|(a, b, c, d)| Step::Fallocate(a, b, c, d)),
        5 => (pick(), 0u16..1500, pick(), 0u16..1500, 0u16..2000)
            .prop_map(|(a, b, c, d, e)| Step::Copy(a, b, c, d, e)),
        4 => (prop::collection::vec((pick(), 0u16..1500, 1u16..60, any::<u8>()), 1..4), any::<u8>())
            .prop_map(|(a, b)| Step::Relocate(a, b)),
        3 => pick().prop_map(Step::Reap),
        3 => pick().prop_map(Step::EraseSome),
        1 => (pick(), name).prop_map(|(a, b)| Step::RemoveTree(a, b)),
        2 => pick().prop_map(Step::RemoveSome),
        1 => any::<u8>().prop_map(Step::Session),
        3 => pick().prop_map(Step::Repeat),
        1 => (0u16..6000).prop_map(Step::Capacity),
        3 => (0u8..6, pick(), any::<u16>(), any::<u8>()).prop_map(|(a, b, c, d)| Step::Quota(a, b, c, d)),
        1 => (0u8..6, pick()).prop_map(|(a, b)| Step::NoQuota(a, b)),
        4 => pick().prop_map(Step::Count),
        2 => any::<u8>().prop_map(Step::Reserve),
        6 => batch(),
    ];
    prop::collection::vec(step, 1..count)
}

/// Changes of names, some of which can't be made.
fn batch() -> impl Strategy<Value = Step> {
    let (pick, name) = (any::<Pick>, 0u8..7);
    let change = prop_oneof![
        8 => (pick(), name.clone(), 0u8..8).prop_map(|(a, b, c)| Step::Create(a, b, c, true)),
        1 => (pick(), pick(), name.clone()).prop_map(|(a, b, c)| Step::Link(a, b, c)),
        2 => (pick(), name.clone(), any::<bool>()).prop_map(|(a, b, c)| Step::Unlink(a, b, c)),
        2 => (pick(), name.clone(), pick(), name, 4u8..8)
            .prop_map(|(a, b, c, d, e)| Step::Rename(a, b, c, d, e)),
        1 => (pick(), any::<u16>(), any::<u8>()).prop_map(|(a, b, c)| Step::Mode(a, b, c)),
        1 => (pick(), any::<i32>()).prop_map(|(a, b)| Step::Mtime(a, b)),
    ];
    prop::collection::vec((change, any::<i16>()), 1..8).prop_map(Step::Batch)
}

/// Scripts that are about quotas: few names, many directories, much moving about, and walks that are left half done.
pub(crate) fn quota_steps(count: usize) -> impl Strategy<Value = Vec<Step>> {
    // Odd and above 2000: not the root, and something that exists.
    let pick = || (1000u16..32_000).prop_map(|at| 2 * at + 1);
    let name = || 0u8..4;
    let piece = (1u16..60, 0u8..60).prop_map(|(length, source)| Piece {
        gap: 0,
        length,
        source,
    });
    let file = (
        pick(),
        0u16..100,
        prop::collection::vec(piece, 1..3),
        Just(1),
    );
    let step = prop_oneof![
        8 => (pick(), name(), 0u8..6).prop_map(|(a, b, c)| Step::Create(a, b, c, true)),
        2 => (pick(), pick(), name()).prop_map(|(a, b, c)| Step::Link(a, b, c)),
        1 => (pick(), name(), any::<bool>()).prop_map(|(a, b, c)| Step::Unlink(a, b, c)),
        8 => (pick(), name(), pick(), name(), 3u8..8).prop_map(|(a, b, c, d, e)| Step::Rename(a, b, c, d, e)),
        1 => (pick(), any::<u16>(), any::<u8>()).prop_map(|(a, b, c)| Step::Mode(a, b, c)),
        5 => (prop::collection::vec(file, 1..4), any::<u8>()).prop_map(|(a, b)| Step::Write(a, b)),
        1 => (pick(), 0u16..90).prop_map(|(a, b)| Step::Truncate(a, b)),
        2 => pick().prop_map(Step::Reap),
        1 => (pick(), name()).prop_map(|(a, b)| Step::RemoveTree(a, b)),
        2 => pick().prop_map(Step::RemoveSome),
        4 => (0u8..6, pick(), any::<u16>(), any::<u8>()).prop_map(|(a, b, c, d)| Step::Quota(a, b, c, d)),
        2 => (0u8..6, pick()).prop_map(|(a, b)| Step::NoQuota(a, b)),
        4 => pick().prop_map(Step::Count),
    ];
    prop::collection::vec(step, 1..count)
}

/// Turns steps into commands.
#[derive(Default)]
pub(crate) struct Writer {
    session: u64,
    sequence: u64,
    sequences: BTreeMap<u64, u64>,
    segments: Vec<u64>,
    used: Vec<u64>,
    sent: Vec<Command>,
    stamp: u8,
}

fn pick<T: Copy>(from: &[T], pick: Pick) -> Option<T> {
    (!from.is_empty()).then(|| from[pick as usize % from.len()])
}

fn name(index: u8) -> Bytes {
    match index {
        0..=4 => Bytes::copy_from_slice(&b"abcde"[..][index as usize..][..1]),
        5 => Bytes::from_static(b"longer name"),
        _ => Bytes::from(vec![b'n'; 256]),
    }
}

fn xattr_name(index: u8) -> Bytes {
    match index {
        0 => Bytes::from_static(b"user.one"),
        1 => Bytes::from_static(b"user.two"),
        2 => Bytes::from_static(CAPABILITY),
        _ => Bytes::from_static(b"odd"),
    }
}

impl Writer {
    /// A node that exists; rarely one that does not.
    fn any(&self, reference: &Reference, at: Pick) -> u64 {
        let inos: Vec<u64> = reference.nodes.keys().copied().collect();
        match at {
            0..1000 => 1 << 50,
            _ => pick(&inos, at).expect("there is a root"),
        }
    }

    fn of(&self, reference: &Reference, at: Pick, kind: FileKind) -> u64 {
        let inos: Vec<u64> = reference
            .nodes
            .iter()
            .filter(|(_, node)| node.kind == kind)
            .map(|(ino, _)| *ino)
            .collect();
        // Half of the steps meet at one file, or at the root.
        let at_first = if at.is_multiple_of(2) { 0 } else { at };
        match pick(&inos, at_first) {
            Some(ino) if at > 2000 => ino,
            _ => self.any(reference, at),
        }
    }

    /// A name in the directory: two times out of three one that is there.
    fn entry(&self, reference: &Reference, dir: u64, index: u8, at: Pick) -> Bytes {
        match reference.nodes.get(&dir) {
            Some(node) if !at.is_multiple_of(3) && !node.entries.is_empty() => {
                let names: Vec<&Bytes> = node.entries.keys().collect();
                names[index as usize % names.len()].clone()
            }
            _ => name(index),
        }
    }

    fn file(&self, reference: &Reference, at: Pick) -> u64 {
        self.of(reference, at, FileKind::File)
    }

    fn dir(&self, reference: &Reference, at: Pick) -> u64 {
        self.of(reference, at, FileKind::Directory)
    }

    /// A directory below the root: one of few, so that steps meet.
    fn tree(&self, reference: &Reference, at: Pick) -> u64 {
        let directories = reference.nodes.iter();
        let directories = directories.filter(|(ino, node)| **ino != 1 && node.is_directory());
        let inos: Vec<u64> = directories.map(|(ino, _)| *ino).take(4).collect();
        pick(&inos, at / 3).unwrap_or(1)
    }

    fn payer(&self, reference: &Reference, kind: u8, at: Pick) -> (QuotaKind, u64) {
        match kind {
            0..4 => (QuotaKind::Directory, self.tree(reference, at)),
            4 => (QuotaKind::User, [10, 10, 0, 20][usize::from(at % 4)]),
            _ => (QuotaKind::Group, 20),
        }
    }

    fn client(&mut self, op: Op) -> Command {
        self.sequence += 1;
        let command = Command {
            volume: VOLUME.0,
            session: self.session,
            sequence: self.sequence,
            acknowledged_below: self.sequence.saturating_sub(5),
            caller: Some(Caller {
                uid: 10,
                gid: 20,
                pid: 1,
                ..Caller::default()
            }),
            op: Some(op),
        };
        self.sent.push(command.clone());
        command
    }

    /// What must come first for the step to make sense: a session, ids for it.
    pub(crate) fn before(&mut self, reference: &Reference) -> Option<Command> {
        let live = reference
            .sessions
            .iter()
            .rfind(|(_, session)| !session.ended);
        let Some((session, _)) = live else {
            return Some(system(Op::SessionBegin(v1::SessionBegin { cluster_id: 3 })));
        };
        if *session != self.session {
            // Perhaps one that was used before the last one began and ended.
            self.sequences.insert(self.session, self.sequence);
            self.session = *session;
            self.sequence = self.sequences.get(session).copied().unwrap_or(0);
            self.segments.clear();
        }
        if self.segments.is_empty() {
            let owned = reference
                .blocks
                .iter()
                .rfind(|(_, owner)| *owner == session);
            let Some((block, _)) = owned.filter(|(block, _)| {
                let first = *block * SEGMENTS_PER_BLOCK;
                !self.used.contains(&first)
            }) else {
                let allocate = v1::SegmentsAllocate { count: 256 };
                return Some(self.client(Op::SegmentsAllocate(allocate)));
            };
            let first = block * SEGMENTS_PER_BLOCK;
            self.segments = (first..first + SEGMENTS_PER_BLOCK).rev().collect();
        }
        None
    }

    /// How many commands a step stands for.
    pub(crate) fn parts(step: &Step) -> u64 {
        match step {
            Step::Shred(..) => 4,
            _ => 1,
        }
    }

    /// One of the commands of a step.
    pub(crate) fn command(
        &mut self,
        reference: &Reference,
        step: &Step,
        part: u64,
    ) -> Option<Command> {
        let op = match step {
            Step::Create(dir, index, kind, exclusive) => {
                let kind = match kind {
                    0..=3 => FileKind::File,
                    4 | 5 => FileKind::Directory,
                    6 => FileKind::Symlink,
                    _ => FileKind::Fifo,
                };
                Op::Create(v1::Create {
                    parent: self.dir(reference, *dir),
                    name: name(*index),
                    kind: kind as i32,
                    mode: if dir % 5 == 0 { 0o6777 } else { 0o666 },
                    umask: 0o022,
                    exclusive: *exclusive,
                    symlink_target: match kind {
                        FileKind::Symlink => Bytes::from_static(b"a/b"),
                        _ => Bytes::new(),
                    },
                    ..v1::Create::default()
                })
            }
            Step::Link(node, dir, index) => Op::Link(v1::Link {
                ino: self.any(reference, *node),
                parent: self.dir(reference, *dir),
                name: name(*index),
            }),
            Step::Unlink(at, index, directory) => {
                let dir = self.dir(reference, *at);
                Op::Unlink(v1::Unlink {
                    parent: dir,
                    name: self.entry(reference, dir, *index, *at),
                    directory: *directory,
                })
            }
            Step::Rename(at, index, new_at, new_index, flags) => {
                let (dir, new_dir) = (self.dir(reference, *at), self.dir(reference, *new_at));
                Op::Rename(v1::Rename {
                    parent: dir,
                    name: self.entry(reference, dir, *index, *at),
                    new_parent: new_dir,
                    new_name: self.entry(reference, new_dir, *new_index, *new_at),
                    no_replace: matches!(flags, 0 | 1),
                    exchange: matches!(flags, 1..=3),
                })
            }
            Step::Truncate(node, size) => Op::SetAttr(v1::SetAttr {
                ino: self.file(reference, *node),
                size: Some((*size).into()),
                kill_suidgid: size % 2 == 0,
                ..v1::SetAttr::default()
            }),
            Step::Mode(node, mode, uid) => Op::SetAttr(v1::SetAttr {
                ino: self.any(reference, *node),
                mode: Some(u32::from(*mode) & 0o7777),
                uid: (*uid < 100).then_some(u32::from(*uid)),
                ..v1::SetAttr::default()
            }),
            Step::Mtime(node, by) => Op::SetAttr(v1::SetAttr {
                ino: self.any(reference, *node),
                mtime: Some(v1::SetTime {
                    to: Some(v1::set_time::To::Nanos(
                        reference.time + i64::from(*by) / 1000,
                    )),
                }),
                ..v1::SetAttr::default()
            }),
            Step::SetXattr(node, index, value) => Op::SetXattr(v1::SetXattr {
                ino: self.any(reference, *node),
                name: xattr_name(*index),
                value: Bytes::copy_from_slice(&[*value]),
                create_only: value % 4 == 0,
                replace_only: value % 4 == 1,
                ..v1::SetXattr::default()
            }),
            Step::RemoveXattr(node, index) => Op::RemoveXattr(v1::RemoveXattr {
                ino: self.any(reference, *node),
                name: xattr_name(*index),
            }),
            Step::Write(files, flags) => self.write(reference, files, *flags),
            Step::Shred(node, offset) => {
                let ino = self.file(reference, *node);
                self.stamp = self.stamp.wrapping_add(1);
                let count = heliofs_proto::limits::COMMIT_EXTENTS_MAX as u64;
                let extents = (0..count).map(|i| v1::Extent {
                    offset: u64::from(*offset) + 2 * (count * part + i),
                    length: 1,
                    inline_bytes: Bytes::copy_from_slice(&[self.stamp]),
                    ..v1::Extent::default()
                });
                Op::Commit(v1::Commit {
                    segments: vec![],
                    files: vec![v1::FileCommit {
                        ino,
                        extents: extents.collect(),
                        ..v1::FileCommit::default()
                    }],
                })
            }
            Step::Fallocate(node, flags, offset, length) => Op::Fallocate(v1::Fallocate {
                ino: self.file(reference, *node),
                offset: (*offset).into(),
                length: (*length).into(),
                keep_size: flags & 1 != 0,
                punch_hole: flags & 2 != 0,
                zero_range: flags & 4 != 0,
                kill_suidgid: flags & 8 != 0,
            }),
            Step::Copy(source, source_offset, target, target_offset, length) => {
                Op::CopyRange(v1::CopyRange {
                    source: self.file(reference, *source),
                    source_offset: (*source_offset).into(),
                    target: self.file(reference, *target),
                    target_offset: (*target_offset).into(),
                    length: (*length).into(),
                    kill_suidgid: length % 2 == 0,
                })
            }
            Step::Relocate(moves, flags) => self.relocate(reference, moves, *flags)?,
            Step::Reap(at) => {
                let orphans = reference.nodes.iter().filter(|(_, node)| node.orphan);
                let orphans: Vec<u64> = orphans.map(|(ino, _)| *ino).collect();
                let ino = pick(&orphans, *at).unwrap_or_else(|| self.any(reference, *at));
                return Some(system(Op::Reap(v1::Reap { ino })));
            }
            Step::EraseSome(node) => {
                let ino = self.file(reference, *node);
                return Some(system(Op::EraseStep(v1::EraseStep { ino })));
            }
            Step::RemoveTree(at, index) => {
                let dir = self.dir(reference, *at);
                Op::RemoveTree(v1::RemoveTree {
                    parent: dir,
                    name: self.entry(reference, dir, *index, *at),
                })
            }
            Step::RemoveSome(at) => {
                let intents: Vec<u64> = reference.intents.keys().copied().collect();
                let intent = pick(&intents, *at).unwrap_or(77_777);
                return Some(system(Op::RemoveTreeStep(v1::RemoveTreeStep { intent })));
            }
            Step::Session(what) => {
                return Some(system(match what % 2 {
                    0 => Op::SessionBegin(v1::SessionBegin { cluster_id: 3 }),
                    _ => Op::SessionEnd(v1::SessionEnd {
                        session: self.session,
                    }),
                }));
            }
            Step::Repeat(at) => {
                // Mostly one of the last, which are still remembered.
                let back = if at % 4 == 0 { 200 } else { 8 };
                let from = self.sent.len().saturating_sub(back);
                let again: Vec<&Command> = self.sent[from..].iter().collect();
                return pick(&again, *at).cloned();
            }
            Step::Quota(kind, at, bytes, inodes) => {
                let (kind, id) = self.payer(reference, *kind, *at);
                Op::QuotaSet(v1::QuotaSet {
                    kind: kind as i32,
                    id,
                    // Mostly far away: a script that is refused everything proves little.
                    bytes_max: (bytes % 3 != 0)
                        .then_some(u64::from(bytes % 64) * if bytes % 2 == 0 { 20 } else { 500 }),
                    inodes_max: (inodes % 3 != 0).then_some(u64::from(inodes % 32) * 2),
                })
            }
            Step::NoQuota(kind, at) => {
                let (kind, id) = self.payer(reference, *kind, *at);
                Op::QuotaRemove(v1::QuotaRemove {
                    kind: kind as i32,
                    id,
                })
            }
            Step::Count(at) => {
                let directory = match at % 3 {
                    0 => 0,
                    _ => self.tree(reference, *at),
                };
                return Some(system(Op::QuotaStep(v1::QuotaStep { directory })));
            }
            Step::Reserve(count) => Op::InosReserve(v1::InosReserve {
                count: u32::from(*count),
            }),
            Step::Batch(changes) => self.batch(reference, changes)?,
            Step::Capacity(bytes) => {
                let settings = v1::VolumeSettings {
                    core_level: meta_core::limits::CORE_LEVEL_MAX,
                    capacity_bytes_max: if bytes % 2 == 0 { 0 } else { u64::from(*bytes) },
                    ..v1::VolumeSettings::default()
                };
                return Some(system(Op::SettingsUpdate(v1::SettingsUpdate {
                    settings: Some(settings),
                })));
            }
        };
        Some(self.client(op))
    }

    /// Made of what there is before the first of them. Creates name numbers of the session's, rarely others.
    fn batch(&mut self, reference: &Reference, steps: &[(Step, i16)]) -> Option<Op> {
        let ranges = reference.sessions.get(&self.session)?.inos.iter();
        let mut numbers = ranges.flat_map(|range| range.clone().step_by(2));
        let mut changes = Vec::new();
        for (step, at) in steps {
            let mark = (self.sequence, self.sent.len());
            let command = self.command(reference, step, 0)?;
            // It was never sent by itself.
            self.sequence = mark.0;
            self.sent.truncate(mark.1);
            let op = match command.op? {
                Op::Create(mut op) => {
                    op.exclusive = true;
                    op.ino = match at % 50 {
                        0 => 2,
                        _ => numbers.next()?,
                    };
                    Change::Create(op)
                }
                Op::Link(op) => Change::Link(op),
                Op::Unlink(op) => Change::Unlink(op),
                Op::Rename(op) => Change::Rename(op),
                Op::SetAttr(op) => Change::SetAttr(op),
                op => panic!("no change of names: {op:?}"),
            };
            // Mostly what is there before the batch, which the changes ahead may have replaced.
            let named = |parent: &u64, name: &Bytes| {
                let entries = reference.nodes.get(parent).map(|node| &node.entries);
                let found = entries.and_then(|entries| entries.get(name)).copied();
                match at % 13 {
                    0 => 3,
                    _ => found.unwrap_or(0),
                }
            };
            let (ino, replaces) = match &op {
                Change::Unlink(op) => (named(&op.parent, &op.name), None),
                Change::Rename(op) => {
                    let replaces = (at % 3 != 0).then(|| named(&op.new_parent, &op.new_name));
                    (named(&op.parent, &op.name), replaces)
                }
                _ => (0, None),
            };
            changes.push(v1::Change {
                ino,
                replaces,
                caller: command.caller,
                time: match at % 7 {
                    0 => 0,
                    _ => reference.time + i64::from(*at),
                },
                op: Some(op),
            });
        }
        Some(Op::Batch(v1::Batch { changes }))
    }

    /// Moves of bytes that lie where they are said to; rarely not, as if they had been overwritten meanwhile.
    fn relocate(
        &mut self,
        reference: &Reference,
        moves: &[(Pick, u16, u16, u8)],
        flags: u8,
    ) -> Option<Op> {
        let mut to_segment = self.segments.pop().expect("`before` saw to ids");
        let mut to_frame_offset = 0;
        let mut chosen = Vec::new();
        for (node, offset, length, odd) in moves {
            let ino = self.file(reference, *node);
            let Some(content) = reference.nodes.get(&ino).map(|node| &node.content) else {
                continue;
            };
            let from = usize::from(*offset).min(content.len());
            let stored = |byte: &Byte| matches!(byte, Byte::At(..));
            let Some(at) = content[from..].iter().position(stored) else {
                continue;
            };
            let Byte::At(segment, frame, frame_offset) = content[from + at] else {
                continue;
            };
            chosen.push(v1::Move {
                ino,
                offset: (from + at) as u64,
                length: (*length).into(),
                from_segment: segment,
                from_frame: frame,
                from_frame_offset: frame_offset + u32::from(odd % 8 == 0),
                to_segment: 0,
                to_frame: 9,
                to_frame_offset,
            });
            to_frame_offset += u32::from(*length);
        }
        let new = to_segment;
        // One that was committed before, freed or not, or somebody else's.
        if flags.is_multiple_of(8) {
            to_segment = pick(&self.used, flags.into()).unwrap_or(new);
        }
        self.used.push(new);
        chosen
            .iter_mut()
            .for_each(|each| each.to_segment = to_segment);
        if chosen.is_empty() || chosen.iter().any(|each| each.from_segment == to_segment) {
            return None;
        }
        let listed = flags % 8 != 1;
        let segments = listed.then_some(new).into_iter().map(|id| v1::Segment {
            id,
            length: 1_000_000 + id,
            checksum: id as u32,
            data_bytes: 500_000,
            ..v1::Segment::default()
        });
        Some(Op::Relocate(v1::Relocate {
            segments: segments.collect(),
            moves: chosen,
        }))
    }

    fn write(
        &mut self,
        reference: &Reference,
        files: &[(Pick, u16, Vec<Piece>, u16)],
        flags: u8,
    ) -> Op {
        let mut segments = Vec::new();
        let mut commits: Vec<v1::FileCommit> = Vec::new();
        let new = self.segments.pop().expect("`before` saw to ids");
        let mut new_offset = 0;
        for (node, offset, pieces, size_min) in files {
            let ino = self.file(reference, *node);
            if commits.iter().any(|file| file.ino == ino) {
                continue;
            }
            let mut offset = u64::from(*offset);
            let mut extents = Vec::new();
            for piece in pieces {
                offset += u64::from(piece.gap);
                let mut extent = v1::Extent {
                    offset,
                    length: piece.length.into(),
                    ..v1::Extent::default()
                };
                match piece.source {
                    0..60 => {
                        self.stamp = self.stamp.wrapping_add(1);
                        extent.inline_bytes = Bytes::from(vec![self.stamp; piece.length.into()]);
                    }
                    // One that was committed before, by this session or another, freed or not.
                    60..66 => {
                        let back = self.used.len().saturating_sub(4);
                        extent.segment = pick(&self.used[back..], *node).unwrap_or(new);
                        extent.frame = piece.source.into();
                    }
                    _ => {
                        extent.segment = new;
                        extent.frame_offset = new_offset;
                        new_offset += u32::from(piece.length);
                    }
                }
                offset += u64::from(piece.length);
                extents.push(extent);
            }
            commits.push(v1::FileCommit {
                ino,
                extents,
                size_min: if size_min % 3 == 0 {
                    u64::from(*size_min)
                } else {
                    0
                },
                mtime: match size_min % 5 {
                    0 => 0,
                    by => reference.time + 700 * (i64::from(by) - 3),
                },
                kill_suidgid: flags & 1 != 0,
                // No content has this number: what a right one does, other tests show.
                base_seq: (size_min % 17 == 5).then_some(u64::MAX),
            });
        }
        // Sometimes listed without need, sometimes not listed although new, sometimes listed again.
        if !flags.is_multiple_of(16) {
            segments.push(new);
        }
        if flags % 16 == 1 {
            segments.extend(self.used.last().copied());
        }
        self.used.push(new);
        let segments = segments.into_iter().map(|id| v1::Segment {
            id,
            length: 1_000_000 + id,
            checksum: id as u32,
            data_bytes: 900_000,
            live_bytes: 0,
        });
        Op::Commit(v1::Commit {
            segments: segments.collect(),
            files: commits,
        })
    }
}

//! The words of a script, and the volume that they act on.
//!
//! A path begins at the root (`/a/b`) or at an inode (`#5/b`, `#5`). Options are `key=value` or a bare word:
//! `as=UID:GID`, `s=SESSION` (0 without), `seq=N` (the session's next without), `ack=N`, `time=N` (one later than before without).

use std::collections::BTreeMap;

use bytes::Bytes;
use heliofs_proto::ids::{Ino, SessionId, UnixNanos, VolumeId};
use heliofs_proto::v1::{self, FileKind, QuotaKind, change::Op as Change, command::Op, set_time};
use meta_core::{Applied, Stamp, Sums, apply, invariants, query};

use crate::show;

const VOLUME: VolumeId = VolumeId(1);
const CLUSTER: u64 = 7 << 32;

/// A volume in memory.
#[derive(Default)]
pub(crate) struct Volume {
    records: BTreeMap<Bytes, Bytes>,
    sums: Sums,
    time: i64,
    sequences: BTreeMap<u64, u64>,
}

type Failure = String;

/// One line, taken apart.
struct Words<'a> {
    positional: Vec<&'a str>,
    options: BTreeMap<&'a str, &'a str>,
}

impl<'a> Words<'a> {
    fn new(line: &'a str) -> Self {
        const FLAGS: [&str; 7] = [
            "excl",
            "noreplace",
            "kill",
            "create-only",
            "replace-only",
            "plus",
            "snapshot",
        ];
        let mut words = Self {
            positional: Vec::new(),
            options: BTreeMap::new(),
        };
        for word in line.split_whitespace() {
            match word.split_once('=') {
                Some((key, value)) => drop(words.options.insert(key, value)),
                None if FLAGS.contains(&word) => drop(words.options.insert(word, "")),
                None => words.positional.push(word),
            }
        }
        words
    }

    fn get(&self, index: usize) -> Result<&'a str, Failure> {
        self.positional
            .get(index)
            .copied()
            .ok_or_else(|| format!("word {index} is missing"))
    }

    fn flag(&self, name: &str) -> bool {
        self.options.contains_key(name)
    }

    fn number(&self, name: &str) -> Result<Option<u64>, Failure> {
        self.options
            .get(name)
            .map(|value| number(value))
            .transpose()
    }

    /// SEGMENT:FRAME:OFFSET
    fn place(&self, name: &str) -> Result<(u64, u32, u32), Failure> {
        let text = self.options.get(name).ok_or("a place is missing")?;
        let parts: Vec<_> = text.split(':').map(number).collect::<Result<_, _>>()?;
        match parts[..] {
            [segment, frame, offset] => Ok((segment, frame as u32, offset as u32)),
            _ => Err(format!("place {text}")),
        }
    }

    /// The segment that the command brings, of 1000 bytes.
    fn new_segments(&self) -> Result<Vec<v1::Segment>, Failure> {
        let new = self.number("new")?.into_iter().map(|id| v1::Segment {
            id,
            length: 1100,
            checksum: 7,
            data_bytes: 1000,
            live_bytes: 0,
        });
        Ok(new.collect())
    }

    fn or(&self, name: &str, otherwise: u64) -> Result<u64, Failure> {
        Ok(self.number(name)?.unwrap_or(otherwise))
    }

    fn mode(&self, name: &str) -> Result<Option<u32>, Failure> {
        let octal = |text: &&str| u32::from_str_radix(text, 8).map_err(|error| error.to_string());
        self.options.get(name).map(octal).transpose()
    }

    fn time(&self, name: &str) -> Result<Option<v1::SetTime>, Failure> {
        let to = match self.options.get(name) {
            None => return Ok(None),
            Some(&"now") => set_time::To::Now(true),
            Some(text) => set_time::To::Nanos(text.parse().map_err(|_| format!("time {text}"))?),
        };
        Ok(Some(v1::SetTime { to: Some(to) }))
    }
}

fn number(text: &str) -> Result<u64, Failure> {
    text.parse().map_err(|_| format!("{text} is no number"))
}

/// `hex:…`, `acl:u::7,u:1000:6,g::5,m::7,o::0`, or the text itself.
fn value(text: &str) -> Result<Bytes, Failure> {
    if let Some(entries) = text.strip_prefix("acl:") {
        let mut bytes = 2u32.to_le_bytes().to_vec();
        for entry in entries.split(',').filter(|entry| !entry.is_empty()) {
            let parts: Vec<_> = entry.split(':').collect();
            let [kind, id, permissions] = parts[..] else {
                return Err(format!("ACL entry {entry}"));
            };
            let tag: u16 = match (kind, id.is_empty()) {
                ("u", true) => 1,
                ("u", false) => 2,
                ("g", true) => 4,
                ("g", false) => 8,
                ("m", true) => 16,
                ("o", true) => 32,
                _ => return Err(format!("ACL entry {entry}")),
            };
            let id = if id.is_empty() {
                u32::MAX
            } else {
                number(id)? as u32
            };
            bytes.extend(tag.to_le_bytes());
            bytes.extend((number(permissions)? as u16).to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        return Ok(bytes.into());
    }
    if let Some(count) = text.strip_prefix("bytes:") {
        return Ok(vec![b'x'; number(count)? as usize].into());
    }
    Ok(Bytes::copy_from_slice(text.as_bytes()))
}

impl Volume {
    /// Runs one line and returns what came out.
    pub(crate) fn run(&mut self, line: &str) -> Result<Vec<String>, Failure> {
        let words = Words::new(line);
        if let Some(shown) = self.ask(&words)? {
            return Ok(shown);
        }
        let session = match words.or("s", 0)? {
            0 => 0,
            number => CLUSTER | number,
        };
        let next = self.sequences.entry(session).or_insert(1);
        let sequence = words.or("seq", *next)?;
        *next = (*next).max(sequence + 1);
        let (uid, gid) = match words.options.get("as") {
            Some(ids) => ids.split_once(':').ok_or("as=UID:GID")?,
            None => ("0", "0"),
        };
        let command = v1::Command {
            volume: VOLUME.0,
            session,
            sequence: if session == 0 { 0 } else { sequence },
            acknowledged_below: words.or("ack", 0)?,
            caller: Some(v1::Caller {
                uid: number(uid)? as u32,
                gid: number(gid)? as u32,
                pid: 1,
                snapshot: words.flag("snapshot"),
            }),
            op: Some(match line.strip_prefix("batch ") {
                Some(changes) => self.batch(changes)?,
                None => self.op(&words)?,
            }),
        };
        self.time = match words.options.get("time") {
            Some(time) => time.parse().map_err(|_| format!("time {time}"))?,
            None => self.time + 1,
        };
        let time = UnixNanos(self.time);
        let applied = apply(&self.records, Stamp { time }, &command).map_err(|e| e.to_string())?;
        let again = apply(&self.records, Stamp { time }, &command).map_err(|e| e.to_string())?;
        assert_eq!(applied, again, "the same command gave two results");
        self.write(&applied);
        if let Err(wrong) = invariants::check(&self.records, VOLUME) {
            return Err(format!("{wrong:#?}\nafter {:#?}", show::applied(&applied)));
        }
        let recomputed = invariants::recomputed_digest(&self.records, VOLUME).unwrap();
        assert_eq!(recomputed, self.sums, "the digest was not kept up to date");
        Ok(show::applied(&applied))
    }

    fn write(&mut self, applied: &Applied) {
        assert!(
            applied.changes.is_sorted_by(|a, b| a.key < b.key),
            "out of order or twice"
        );
        for change in &applied.changes {
            assert_eq!(
                self.records.get(&change.key),
                change.old.as_ref(),
                "old value is wrong"
            );
            self.sums.absorb(change);
            match &change.new {
                Some(new) => self.records.insert(change.key.clone(), new.clone()),
                None => self.records.remove(&change.key),
            };
        }
    }

    /// `batch s=1 | mkdir /a ino=5 at=7 | unlink /b`
    fn batch(&self, line: &str) -> Result<Op, Failure> {
        let changes = line.split('|').skip(1).map(|line| {
            let words = Words::new(line);
            let op = match self.op(&words)? {
                Op::Create(op) => Change::Create(op),
                Op::Link(op) => Change::Link(op),
                Op::Unlink(op) => Change::Unlink(op),
                Op::Rename(op) => Change::Rename(op),
                Op::SetAttr(op) => Change::SetAttr(op),
                op => return Err(format!("{op:?} in a batch")),
            };
            Ok(v1::Change {
                caller: Some(v1::Caller {
                    uid: words.or("uid", 0)? as u32,
                    ..v1::Caller::default()
                }),
                time: words.or("at", 0)? as i64,
                ino: words.or("expect", 0)?,
                replaces: match words.options.contains_key("replaces") {
                    true => Some(words.or("replaces", 0)?),
                    false => None,
                },
                op: Some(op),
            })
        });
        let changes = changes.collect::<Result<_, Failure>>()?;
        Ok(Op::Batch(v1::Batch { changes }))
    }

    fn op(&self, words: &Words<'_>) -> Result<Op, Failure> {
        let verb = words.get(0)?;
        let kind = match verb {
            "mkdir" => FileKind::Directory,
            "symlink" => FileKind::Symlink,
            "mknod" => match words.options.get("kind") {
                Some(&"fifo") => FileKind::Fifo,
                Some(&"socket") => FileKind::Socket,
                Some(&"char") => FileKind::CharDevice,
                Some(&"block") => FileKind::BlockDevice,
                _ => return Err("kind=fifo|socket|char|block".to_owned()),
            },
            _ => FileKind::File,
        };
        let settings = || -> Result<_, Failure> {
            Ok(v1::VolumeSettings {
                core_level: words.or("level", 1)? as u32,
                capacity_bytes_max: words.or("capacity", 0)?,
                inodes_max: words.or("inodes", 0)?,
                trash_days: words.or("trash", 0)? as u32,
                ..v1::VolumeSettings::default()
            })
        };
        Ok(match verb {
            "init" => Op::VolumeInit(v1::VolumeInit {
                settings: Some(settings()?),
                root_mode: words.mode("mode")?.unwrap_or(0o755),
                ..v1::VolumeInit::default()
            }),
            "settings" => Op::SettingsUpdate(v1::SettingsUpdate {
                settings: Some(settings()?),
            }),
            "reserve" => Op::InosReserve(v1::InosReserve {
                count: number(words.get(1)?)? as u32,
            }),
            "session" => Op::SessionBegin(v1::SessionBegin { cluster_id: 7 }),
            "end" => Op::SessionEnd(v1::SessionEnd {
                session: CLUSTER | number(words.get(1)?)?,
            }),
            "mkdir" | "create" | "mknod" | "symlink" => {
                let (parent, name) = self.entry(words.get(1)?)?;
                let otherwise = if kind == FileKind::Directory {
                    0o755
                } else {
                    0o644
                };
                Op::Create(v1::Create {
                    parent,
                    name,
                    kind: kind as i32,
                    mode: words.mode("mode")?.unwrap_or(otherwise),
                    umask: words.mode("umask")?.unwrap_or(0),
                    rdev: words.or("rdev", 0)? as u32,
                    symlink_target: match kind {
                        FileKind::Symlink => value(words.get(2).unwrap_or(""))?,
                        _ => Bytes::new(),
                    },
                    exclusive: verb != "create" || words.flag("excl"),
                    ino: words.or("ino", 0)?,
                })
            }
            "link" => {
                let (parent, name) = self.entry(words.get(2)?)?;
                Op::Link(v1::Link {
                    ino: self.ino(words.get(1)?)?,
                    parent,
                    name,
                })
            }
            "unlink" | "rmdir" => {
                let (parent, name) = self.entry(words.get(1)?)?;
                Op::Unlink(v1::Unlink {
                    parent,
                    name,
                    directory: verb == "rmdir",
                })
            }
            "rename" | "exchange" => {
                let (parent, name) = self.entry(words.get(1)?)?;
                let (new_parent, new_name) = self.entry(words.get(2)?)?;
                Op::Rename(v1::Rename {
                    parent,
                    name,
                    new_parent,
                    new_name,
                    no_replace: words.flag("noreplace"),
                    exchange: verb == "exchange",
                })
            }
            "setattr" => Op::SetAttr(v1::SetAttr {
                ino: self.ino(words.get(1)?)?,
                mode: words.mode("mode")?,
                uid: words.number("uid")?.map(|uid| uid as u32),
                gid: words.number("gid")?.map(|gid| gid as u32),
                size: words.number("size")?,
                atime: words.time("atime")?,
                mtime: words.time("mtime")?,
                kill_suidgid: words.flag("kill"),
            }),
            "setxattr" => Op::SetXattr(v1::SetXattr {
                ino: self.ino(words.get(1)?)?,
                name: value(words.get(2)?)?,
                value: value(words.get(3).unwrap_or(""))?,
                create_only: words.flag("create-only"),
                replace_only: words.flag("replace-only"),
                kill_setgid: words.flag("kill"),
            }),
            "rmxattr" => Op::RemoveXattr(v1::RemoveXattr {
                ino: self.ino(words.get(1)?)?,
                name: value(words.get(2)?)?,
            }),
            "write" => {
                let inline_bytes = value(words.get(3)?)?;
                let offset = number(words.get(2)?)?;
                let length = inline_bytes.len() as u64;
                let extent = v1::Extent {
                    offset,
                    length,
                    inline_bytes,
                    ..v1::Extent::default()
                };
                let file = v1::FileCommit {
                    ino: self.ino(words.get(1)?)?,
                    extents: vec![extent],
                    size_min: offset + length,
                    mtime: 0,
                    kill_suidgid: words.flag("kill"),
                    base_seq: words.number("base")?,
                };
                Op::Commit(v1::Commit {
                    segments: Vec::new(),
                    files: vec![file],
                })
            }
            "segments" => Op::SegmentsAllocate(v1::SegmentsAllocate {
                count: number(words.get(1)?)? as u32,
            }),
            // put INO OFFSET LENGTH at=SEGMENT:FRAME:OFFSET new=SEGMENT
            "put" => {
                let (segment, frame, frame_offset) = words.place("at")?;
                let (offset, length) = (number(words.get(2)?)?, number(words.get(3)?)?);
                let extent = v1::Extent {
                    offset,
                    length,
                    segment,
                    frame,
                    frame_offset,
                    ..v1::Extent::default()
                };
                let file = v1::FileCommit {
                    ino: self.ino(words.get(1)?)?,
                    extents: vec![extent],
                    size_min: offset + length,
                    ..v1::FileCommit::default()
                };
                Op::Commit(v1::Commit {
                    segments: words.new_segments()?,
                    files: vec![file],
                })
            }
            // move INO OFFSET LENGTH from=SEGMENT:FRAME:OFFSET to=SEGMENT:FRAME:OFFSET new=SEGMENT
            "move" => {
                let (from_segment, from_frame, from_frame_offset) = words.place("from")?;
                let (to_segment, to_frame, to_frame_offset) = words.place("to")?;
                let each = v1::Move {
                    ino: self.ino(words.get(1)?)?,
                    offset: number(words.get(2)?)?,
                    length: number(words.get(3)?)?,
                    from_segment,
                    from_frame,
                    from_frame_offset,
                    to_segment,
                    to_frame,
                    to_frame_offset,
                };
                Op::Relocate(v1::Relocate {
                    segments: words.new_segments()?,
                    moves: vec![each],
                })
            }
            "reap" => Op::Reap(v1::Reap {
                ino: self.ino(words.get(1)?)?,
            }),
            "rmtree" => {
                let (parent, name) = self.entry(words.get(1)?)?;
                Op::RemoveTree(v1::RemoveTree { parent, name })
            }
            // quota PATH|uid:N|gid:N bytes=N inodes=N
            "quota" => {
                let (kind, id) = self.payer(words.get(1)?)?;
                Op::QuotaSet(v1::QuotaSet {
                    kind: kind as i32,
                    id,
                    bytes_max: words.number("bytes")?,
                    inodes_max: words.number("inodes")?,
                })
            }
            "noquota" => {
                let (kind, id) = self.payer(words.get(1)?)?;
                Op::QuotaRemove(v1::QuotaRemove {
                    kind: kind as i32,
                    id,
                })
            }
            "count" => Op::QuotaStep(v1::QuotaStep {
                directory: number(words.get(1)?)?,
            }),
            "rmstep" => Op::RemoveTreeStep(v1::RemoveTreeStep {
                intent: number(words.get(1)?)?,
            }),
            _ => return Err("unknown word".to_owned()),
        })
    }

    /// Queries; `None` if the line is a command.
    fn ask(&self, words: &Words<'_>) -> Result<Option<Vec<String>>, Failure> {
        let view = &self.records;
        let ino = || Ok::<_, Failure>(Ino(self.ino(words.get(1)?)?));
        Ok(Some(match words.get(0)? {
            "ls" => {
                let (after, max) = (words.or("after", 0)?, words.or("max", 0)? as u32);
                let page = query::read_dir(view, VOLUME, ino()?, after, max, words.flag("plus"));
                show::or_error(page, show::page)
            }
            "stat" => show::or_error(query::get_attr(view, VOLUME, ino()?), |attr| {
                vec![show::attr(&attr)]
            }),
            "lookup" => {
                let (parent, name) = self.entry(words.get(1)?)?;
                let found = query::lookup(view, VOLUME, Ino(parent), &name);
                show::or_error(found, |attr| vec![show::attr(&attr)])
            }
            "walk" => show::or_error(
                query::walk(view, VOLUME, words.get(1)?.as_bytes()),
                |found| {
                    vec![
                        found
                            .attrs
                            .iter()
                            .map(|attr| format!("#{} ", attr.ino))
                            .collect(),
                    ]
                },
            ),
            "readlink" => show::or_error(query::read_link(view, VOLUME, ino()?), |target| {
                vec![show::text(&target)]
            }),
            "getxattr" => {
                let found = query::get_xattr(view, VOLUME, ino()?, &value(words.get(2)?)?);
                show::or_error(found, |value| vec![show::value(&value)])
            }
            "listxattr" => show::or_error(query::list_xattr(view, VOLUME, ino()?), |list| {
                list.names.iter().map(show::text).collect()
            }),
            "extents" => {
                let page = query::get_extents(view, VOLUME, ino()?, 0, u64::MAX, 100);
                show::or_error(page, |page| show::extents(&page))
            }
            "statfs" => {
                let ino = match words.positional.len() {
                    1 => Ino(0),
                    _ => ino()?,
                };
                vec![format!("{:?}", query::stat_fs(view, VOLUME, ino).unwrap())]
            }
            "quotas" => query::quotas(view, VOLUME, (QuotaKind::Unspecified, 0), 100)
                .unwrap()
                .iter()
                .map(|quota| format!("{quota:?}"))
                .collect(),
            "sessions" => query::sessions(view, VOLUME, SessionId(0), 100)
                .unwrap()
                .iter()
                .map(|(id, record)| format!("{} {record:?}", id.0 & !CLUSTER))
                .collect(),
            "work" => {
                let orphans = query::orphans(view, VOLUME, Ino(0), 100).unwrap();
                let orphans: Vec<_> = orphans.iter().map(|(ino, _)| ino.0).collect();
                let intents = query::intents(view, VOLUME, 0, 100).unwrap();
                let erases = query::erases(view, VOLUME, Ino(0), 100).unwrap();
                vec![format!(
                    "orphans {orphans:?} intents {intents:?} erases {erases:?}"
                )]
            }
            _ => return Ok(None),
        }))
    }

    fn ino(&self, path: &str) -> Result<u64, Failure> {
        let (mut ino, rest) = match path.strip_prefix('#') {
            Some(rest) => {
                let (start, rest) = rest.split_once('/').unwrap_or((rest, ""));
                (number(start)?, rest)
            }
            None => (1, path),
        };
        for name in rest.split('/').filter(|name| !name.is_empty()) {
            let found = query::lookup(&self.records, VOLUME, Ino(ino), name.as_bytes());
            ino = found.map_err(|error| format!("{name}: {error}"))?.ino;
        }
        Ok(ino)
    }

    fn payer(&self, text: &str) -> Result<(QuotaKind, u64), Failure> {
        Ok(match text.split_once(':') {
            Some(("uid", id)) => (QuotaKind::User, number(id)?),
            Some(("gid", id)) => (QuotaKind::Group, number(id)?),
            _ => (QuotaKind::Directory, self.ino(text)?),
        })
    }

    fn entry(&self, path: &str) -> Result<(u64, Bytes), Failure> {
        let (parent, name) = path.rsplit_once('/').ok_or("a path has a slash")?;
        Ok((self.ino(parent)?, value(name)?))
    }
}

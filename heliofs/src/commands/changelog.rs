//! `heliofs changelog`: prints a volume's history, from any replica.

use clap::Args;
use heliofs_proto::ids::{Epoch, Position};
use heliofs_proto::v1::{self, QuotaKind, change::Op as Change, command::Op};
use meta_client::changelog::ChangelogItem;
use serde_json::{Value, json};

use crate::cli::Access;
use crate::failure::Outcome;
use crate::output;
use crate::signals::Stop;
use crate::units::{hex, show_time};

/// Which volume's history, and which part of it.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]
    #[arg(value_name = "META-URL")]
    url: String,
    /// The volume.
    name: Option<String>,
    /// The first position to print; unless given, the oldest that the log still has.
    #[arg(long, value_name = "EPOCH:SEQ")]
    from: Option<Position>,
    /// Goes on with what happens from now on.
    #[arg(short, long)]
    follow: bool,
    /// Ends after this many entries.
    #[arg(short = 'n', long, value_name = "N")]
    count: Option<u64>,
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    let target = options
        .access
        .target(&options.url, options.name.as_deref())?;
    let from = options.from.unwrap_or(Position {
        epoch: Epoch(0),
        seq: 1,
    });
    let after = Position {
        seq: from.seq.saturating_sub(1),
        ..from
    };
    let mut follower = target.cluster.follow(&target.volume, after, options.follow);
    let mut stop = Stop::catch()?;
    let mut left = options.count.unwrap_or(u64::MAX);
    while left > 0 {
        let item = tokio::select! {
            item = follower.next() => item?,
            _ = stop.wait() => return Ok(()),
        };
        match item {
            None => break,
            Some(ChangelogItem::Entry(entry)) => {
                print(&entry, json)?;
                left -= 1;
            }
            // Shown by --follow only on request: silence is the normal state of a volume.
            Some(ChangelogItem::Beat(beat)) if json && options.follow => print_beat(&beat)?,
            Some(ChangelogItem::Beat(_)) => {}
        }
    }
    Ok(())
}

/// An entry as a reader of JSON sees it.
pub(crate) fn as_json(entry: &v1::ChangelogEntry) -> Value {
    let position = Position::from(entry.position.unwrap_or_default());
    let command = entry.command.clone().unwrap_or_default();
    let (name, fields) = command.op.as_ref().map_or(("none", json!({})), describe);
    json!({
        "position": position.to_string(),
        "time": show_time(entry.time),
        "session": format!("{:016x}", command.session),
        "sequence": command.sequence,
        "op": name,
        "fields": fields,
    })
}

fn print(entry: &v1::ChangelogEntry, json: bool) -> Outcome {
    if json {
        return output::line(as_json(entry));
    }
    let position = Position::from(entry.position.unwrap_or_default());
    let command = entry.command.clone().unwrap_or_default();
    let (name, fields) = command.op.as_ref().map_or(("none", json!({})), describe);
    let fields = match &fields {
        Value::Object(fields) => fields
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect::<Vec<_>>()
            .join(" "),
        other => other.to_string(),
    };
    output::line(format_args!(
        "{position}\t{}\t{:016x}\t{name} {fields}",
        show_time(entry.time),
        command.session
    ))
}

fn print_beat(beat: &v1::ChangelogBeat) -> Outcome {
    let position = Position::from(beat.position.unwrap_or_default());
    output::line(json!({
        "beat": position.to_string(),
        "time": show_time(beat.time),
        "digest": hex(&beat.digest),
    }))
}

/// Names are bytes; most are text.
fn name(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => json!(text),
        Err(_) => json!({ "hex": hex(bytes) }),
    }
}

/// The command's name and what a reader wants to know of it; file contents are counted, not shown.
fn describe(op: &Op) -> (&'static str, Value) {
    match op {
        Op::VolumeInit(_) => ("volume-init", json!({})),
        Op::SettingsUpdate(op) => {
            let settings = op.settings.unwrap_or_default();
            (
                "settings-update",
                json!({
                    "core_level": settings.core_level,
                    "capacity_bytes": settings.capacity_bytes_max,
                    "inodes": settings.inodes_max,
                    "trash_days": settings.trash_days,
                    "deletion_grace_seconds": settings.deletion_grace_seconds,
                }),
            )
        }
        Op::SessionBegin(_) => ("session-begin", json!({})),
        Op::SessionEnd(op) => (
            "session-end",
            json!({ "ended": format!("{:016x}", op.session) }),
        ),
        Op::SegmentsAllocate(op) => ("segments-allocate", json!({ "count": op.count })),
        Op::Create(op) => (
            "create",
            json!({
                "parent": op.parent,
                "name": name(&op.name),
                "kind": op.kind().as_str_name().trim_start_matches("FILE_KIND_").to_lowercase(),
                "mode": format!("{:04o}", op.mode),
            }),
        ),
        Op::Link(op) => (
            "link",
            json!({ "inode": op.ino, "parent": op.parent, "name": name(&op.name) }),
        ),
        Op::Unlink(op) => (
            "unlink",
            json!({ "parent": op.parent, "name": name(&op.name), "directory": op.directory }),
        ),
        Op::Rename(op) => (
            "rename",
            json!({
                "parent": op.parent,
                "name": name(&op.name),
                "new_parent": op.new_parent,
                "new_name": name(&op.new_name),
                "exchange": op.exchange,
                "no_replace": op.no_replace,
            }),
        ),
        Op::SetAttr(op) => (
            "set-attr",
            json!({
                "inode": op.ino,
                "mode": op.mode.map(|mode| format!("{mode:04o}")),
                "uid": op.uid,
                "gid": op.gid,
                "size": op.size,
                "atime": op.atime.is_some(),
                "mtime": op.mtime.is_some(),
            }),
        ),
        Op::SetXattr(op) => (
            "set-xattr",
            json!({ "inode": op.ino, "name": name(&op.name), "bytes": op.value.len() }),
        ),
        Op::RemoveXattr(op) => (
            "remove-xattr",
            json!({ "inode": op.ino, "name": name(&op.name) }),
        ),
        Op::Commit(op) => {
            let files: Vec<_> = op
                .files
                .iter()
                .map(|file| {
                    json!({
                        "inode": file.ino,
                        "extents": file.extents.len(),
                        "bytes": file.extents.iter().map(|extent| extent.length).sum::<u64>(),
                        "size_min": file.size_min,
                    })
                })
                .collect();
            let segments: Vec<_> = op
                .segments
                .iter()
                .map(|segment| format!("{:016x}", segment.id))
                .collect();
            ("commit", json!({ "files": files, "segments": segments }))
        }
        Op::Fallocate(op) => (
            "fallocate",
            json!({
                "inode": op.ino,
                "offset": op.offset,
                "length": op.length,
                "keep_size": op.keep_size,
                "punch_hole": op.punch_hole,
                "zero_range": op.zero_range,
            }),
        ),
        Op::CopyRange(op) => (
            "copy-range",
            json!({
                "source": op.source,
                "source_offset": op.source_offset,
                "target": op.target,
                "target_offset": op.target_offset,
                "length": op.length,
            }),
        ),
        Op::Relocate(op) => (
            "relocate",
            json!({
                "moves": op.moves.len(),
                "bytes": op.moves.iter().map(|each| each.length).sum::<u64>(),
                "segments": op.segments.iter().map(|each| format!("{:016x}", each.id)).collect::<Vec<_>>(),
            }),
        ),
        Op::InosReserve(op) => ("inos-reserve", json!({ "count": op.count })),
        Op::Batch(op) => (
            "batch",
            json!({
                "changes": op
                    .changes
                    .iter()
                    .filter_map(|change| change.op.clone())
                    .map(|op| {
                        let (name, fields) = describe(&match op {
                            Change::Create(op) => Op::Create(op),
                            Change::Link(op) => Op::Link(op),
                            Change::Unlink(op) => Op::Unlink(op),
                            Change::Rename(op) => Op::Rename(op),
                            Change::SetAttr(op) => Op::SetAttr(op),
                        });
                        json!({ name: fields })
                    })
                    .collect::<Vec<_>>(),
            }),
        ),
        Op::Reap(op) => ("reap", json!({ "inode": op.ino })),
        Op::EraseStep(op) => ("erase-step", json!({ "inode": op.ino })),
        Op::RemoveTree(op) => (
            "remove-tree",
            json!({ "parent": op.parent, "name": name(&op.name) }),
        ),
        Op::EpochBegin(op) => ("epoch-begin", json!({ "epoch": op.epoch })),
        Op::QuotaSet(op) => (
            "quota-set",
            json!({
                "kind": quota_kind(op.kind()),
                "id": op.id,
                "bytes_max": op.bytes_max,
                "inodes_max": op.inodes_max,
            }),
        ),
        Op::QuotaRemove(op) => (
            "quota-remove",
            json!({ "kind": quota_kind(op.kind()), "id": op.id }),
        ),
        Op::QuotaStep(op) => ("quota-step", json!({ "directory": op.directory })),
        Op::RemoveTreeStep(op) => ("remove-tree-step", json!({ "intent": op.intent })),
    }
}

fn quota_kind(kind: QuotaKind) -> &'static str {
    match kind {
        QuotaKind::Unspecified => "unknown",
        QuotaKind::Directory => "directory",
        QuotaKind::User => "user",
        QuotaKind::Group => "group",
    }
}

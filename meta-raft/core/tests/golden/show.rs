//! What results look like in scripts.

use bytes::Bytes;
use heliofs_proto::ids::{Ino, UnixNanos};
use heliofs_proto::v1::{self, FileKind};
use meta_core::keys::{self, Tag};
use meta_core::query::QueryError;
use meta_core::records::{
    CookieRecord, CountersRecord, ExtentRecord, InodeRecord, NameRecord, QuotaCounters,
    QuotaRecord, QuotaWalkRecord, Record, SegmentRecord, SessionRecord, SettingsRecord,
};
use meta_core::{Applied, Change, Touched};
use prost::Message;

/// The lines below a command.
pub(crate) fn applied(applied: &Applied) -> Vec<String> {
    let UnixNanos(time) = applied.time;
    let mut lines = vec![format!(
        "@{} t={time} {}",
        applied.position,
        reply(&applied.reply)
    )];
    let attrs = [
        ("attr", &applied.reply.attr),
        ("parent", &applied.reply.parent),
        ("new_parent", &applied.reply.new_parent),
        ("replaced", &applied.reply.replaced),
    ];
    for (name, value) in attrs {
        lines.extend(value.iter().map(|value| format!("{name} {}", attr(value))));
    }
    for file in &applied.reply.files {
        let error = file.error().as_str_name();
        let attr = file.attr.as_ref().map(attr).unwrap_or_default();
        lines.push(format!("file {error} {attr}"));
    }
    lines.extend(applied.changes.iter().filter_map(change));
    lines.extend(
        applied
            .freed
            .iter()
            .map(|segment| format!("freed {segment}")),
    );
    if !applied.touched.is_empty() {
        let touched: Vec<_> = applied.touched.iter().map(touched).collect();
        lines.push(format!("touched {}", touched.join(", ")));
    }
    lines
}

fn reply(reply: &v1::Reply) -> String {
    if reply.error != 0 {
        return error(reply.error());
    }
    let mut words = vec!["ok".to_owned()];
    let position = reply.position.map_or(0, |position| position.seq);
    words.push(format!("seq={position}"));
    if reply.value != 0 {
        words.push(format!("value={}", reply.value));
    }
    if reply.applied != 0 || reply.refused != 0 {
        words.push(format!("applied={}", reply.applied));
    }
    if reply.refused != 0 {
        words.push(format!("refused={}", error(reply.refused())));
    }
    if !reply.orphans.is_empty() {
        words.push(format!("orphans={:?}", reply.orphans));
    }
    let flags = [
        (reply.deferrable, "deferrable"),
        (reply.done, "done"),
        (reply.created, "created"),
        (reply.orphaned, "orphaned"),
    ];
    words.extend(
        flags
            .iter()
            .filter(|(set, _)| *set)
            .map(|(_, word)| (*word).to_owned()),
    );
    words.join(" ")
}

fn error(error: v1::FsError) -> String {
    error
        .as_str_name()
        .trim_start_matches("FS_ERROR_")
        .to_owned()
}

/// What a query answered.
pub(crate) fn or_error<T>(
    found: Result<T, QueryError>,
    show: impl Fn(T) -> Vec<String>,
) -> Vec<String> {
    match found {
        Ok(found) => show(found),
        Err(QueryError::Refused(refused)) => vec![error(refused)],
        Err(QueryError::Corrupt(corruption)) => panic!("{corruption}"),
    }
}

/// Attributes on one line.
pub(crate) fn attr(attr: &v1::Attr) -> String {
    let fields = attr_fields(attr);
    let fields: Vec<_> = fields
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    format!("#{} {}", attr.ino, fields.join(" "))
}

fn attr_fields(attr: &v1::Attr) -> Vec<(&'static str, String)> {
    vec![
        ("kind", kind(attr.kind())),
        ("mode", format!("{:04o}", attr.mode)),
        ("nlink", attr.nlink.to_string()),
        ("owner", format!("{}:{}", attr.uid, attr.gid)),
        ("size", attr.size.to_string()),
        ("allocated", attr.allocated.to_string()),
        ("a", attr.atime.to_string()),
        ("m", attr.mtime.to_string()),
        ("c", attr.ctime.to_string()),
        ("b", attr.btime.to_string()),
        ("rdev", attr.rdev.to_string()),
        ("data", attr.data_seq.to_string()),
        ("parent", attr.parent.to_string()),
        ("flags", attr.flags.to_string()),
    ]
}

fn kind(kind: FileKind) -> String {
    kind.as_str_name()
        .trim_start_matches("FILE_KIND_")
        .to_lowercase()
}

/// A page of a directory.
pub(crate) fn page(page: v1::DirPage) -> Vec<String> {
    let entries = page.entries.iter().map(|entry| {
        let attr = entry.attr.as_ref().map(attr).unwrap_or_default();
        let (name, kind) = (text(&entry.name), kind(entry.kind()));
        format!("{} {name} #{} {kind} {attr}", entry.cookie, entry.ino)
            .trim_end()
            .to_owned()
    });
    let mut lines: Vec<_> = entries.collect();
    lines.push(if page.end { "end" } else { "more" }.to_owned());
    lines
}

/// A page of extents.
pub(crate) fn extents(page: &v1::ExtentPage) -> Vec<String> {
    let extents = page.extents.iter().map(|extent| {
        let (offset, length) = (extent.offset, extent.length);
        let (segment, frame) = (extent.segment, extent.frame);
        match segment {
            0 => format!("{offset}+{length} {}", value(&extent.inline_bytes)),
            _ => format!(
                "{offset}+{length} at {segment}:{frame}:{}",
                extent.frame_offset
            ),
        }
    });
    extents
        .chain([format!("complete to {}", page.complete_to)])
        .collect()
}

/// A name.
pub(crate) fn text(bytes: &Bytes) -> String {
    if bytes.len() > 40 {
        format!("{} bytes", bytes.len())
    } else {
        bytes.escape_ascii().to_string()
    }
}

/// A value of an attribute.
pub(crate) fn value(bytes: &Bytes) -> String {
    let Some(acl) = bytes.strip_prefix(&[2, 0, 0, 0]) else {
        return text(bytes);
    };
    let entries = acl.chunks(8).map(|entry| {
        let kind = match entry[0] {
            1 | 2 => "u",
            4 | 8 => "g",
            16 => "m",
            _ => "o",
        };
        let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
        let id = if id == u32::MAX {
            String::new()
        } else {
            id.to_string()
        };
        format!("{kind}:{id}:{}", entry[2])
    });
    format!("acl:{}", entries.collect::<Vec<_>>().join(","))
}

fn touched(touched: &Touched) -> String {
    match touched {
        Touched::Inode {
            ino,
            attr,
            content,
            xattr,
        } => {
            let parts = [(*attr, " attr"), (*content, " content"), (*xattr, " xattr")];
            let parts: String = parts
                .iter()
                .filter(|(set, _)| *set)
                .map(|(_, part)| *part)
                .collect();
            format!("#{ino}{parts}")
        }
        Touched::Entry { parent, name } => format!("#{parent}/{}", text(name)),
    }
}

/// A changed record; the head's, which moves with every command, is left out.
fn change(change: &Change) -> Option<String> {
    let tag = Tag::of(&change.key).unwrap();
    if tag == Tag::Head {
        return None;
    }
    let sign = match (&change.old, &change.new) {
        (None, _) => '+',
        (_, None) => '-',
        _ => '~',
    };
    let fields = |value: &Option<Bytes>| match value {
        Some(value) => fields(tag, &change.key, value),
        None => Vec::new(),
    };
    let (old, new) = (fields(&change.old), fields(&change.new));
    let differences = if new.is_empty() {
        Vec::new()
    } else {
        let pairs = new.iter().enumerate();
        let pairs = pairs.filter_map(|(index, (name, value))| match old.get(index) {
            Some((_, old)) if old == value => None,
            Some((_, old)) => Some(format!("{name}={old}→{value}")),
            None => Some(format!("{name}={value}")),
        });
        pairs.collect()
    };
    let line = format!("{sign} {} {}", key(tag, &change.key), differences.join(" "));
    Some(line.trim_end().to_owned())
}

fn key(tag: Tag, key: &Bytes) -> String {
    let number = |index| keys::number(key, index).unwrap();
    let name = || format!("{tag:?} {}/{}", number(0), text(&keys::name_of(key)));
    match tag {
        Tag::Head | Tag::Settings | Tag::Counters => format!("{tag:?}"),
        Tag::Name | Tag::Xattr => name(),
        Tag::Cookie | Tag::Extent | Tag::RemoveTree | Tag::Quota | Tag::QuotaWalk => {
            format!("{tag:?} {}/{}", number(0), number(1))
        }
        Tag::Session => format!("{tag:?} {}", number(0) as u32),
        Tag::Reply => format!("{tag:?} {}/{}", number(0) as u32, number(1)),
        _ => format!("{tag:?} {}", number(0)),
    }
}

fn fields(tag: Tag, key: &Bytes, bytes: &Bytes) -> Vec<(&'static str, String)> {
    match tag {
        Tag::Inode => {
            let record = InodeRecord::decode(key, bytes).unwrap();
            let mut fields = attr_fields(&record.attr(Ino(0)));
            fields.push(("next_cookie", record.next_cookie.to_string()));
            fields.push(("erases", record.erases.to_string()));
            if record.quota != Ino(0) {
                fields.push(("quota", record.quota.to_string()));
            }
            fields
        }
        Tag::Counters => {
            let record = CountersRecord::decode(key, bytes).unwrap();
            let mut fields = vec![
                ("next_ino", record.next_ino.to_string()),
                ("next_segment", record.next_segment.to_string()),
                ("next_session", record.next_session.to_string()),
                ("next_intent", record.next_intent.to_string()),
                ("used_bytes", record.used_bytes.to_string()),
                ("used_inodes", record.used_inodes.to_string()),
                ("segments", record.segments.to_string()),
            ];
            if record.quotas != QuotaCounters::default() {
                fields.push(("quotas", format!("{:?}", record.quotas)));
            }
            fields
        }
        Tag::Name => {
            let record = NameRecord::decode(key, bytes).unwrap();
            vec![
                ("ino", record.ino.to_string()),
                ("kind", kind(record.kind)),
                ("cookie", record.cookie.to_string()),
            ]
        }
        Tag::Cookie => {
            let record = CookieRecord::decode(key, bytes).unwrap();
            vec![
                ("ino", record.ino.to_string()),
                ("kind", kind(record.kind)),
                ("name", text(&record.name)),
            ]
        }
        Tag::Extent => {
            let record = ExtentRecord::decode(key, bytes).unwrap();
            vec![
                ("length", record.length.to_string()),
                ("seq", record.seq.to_string()),
            ]
        }
        Tag::Segment => {
            let record = SegmentRecord::decode(key, bytes).unwrap();
            vec![("live", record.live_bytes.to_string())]
        }
        Tag::Session => {
            let record = SessionRecord::decode(key, bytes).unwrap();
            let below = record.acknowledged_below;
            let below = match record.inos.is_empty() {
                true => below.to_string(),
                false => format!("{below} inos={:?}", record.inos),
            };
            vec![("acknowledged_below", below)]
        }
        Tag::Settings => {
            let settings = SettingsRecord::decode(key, bytes).unwrap().0;
            vec![
                ("level", settings.core_level.to_string()),
                ("capacity", settings.capacity_bytes_max.to_string()),
                ("inodes", settings.inodes_max.to_string()),
            ]
        }
        Tag::Reply => {
            let reply = v1::Reply::decode(bytes.clone()).unwrap();
            vec![("seq", reply.position.unwrap_or_default().seq.to_string())]
        }
        Tag::Quota => {
            let record = QuotaRecord::decode(key, bytes).unwrap();
            vec![
                ("bytes_max", record.bytes_max.to_string()),
                ("inodes_max", record.inodes_max.to_string()),
                ("used_bytes", record.used_bytes.to_string()),
                ("used_inodes", record.used_inodes.to_string()),
                ("parent", record.parent.to_string()),
                ("state", format!("{:?}", record.state)),
                ("from", record.from.to_string()),
            ]
        }
        Tag::QuotaWalk => {
            let record = QuotaWalkRecord::decode(key, bytes).unwrap();
            vec![("after", record.after.to_string())]
        }
        Tag::Xattr | Tag::Symlink => vec![("value", value(bytes))],
        _ => Vec::new(),
    }
}

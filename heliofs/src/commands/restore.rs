//! `heliofs restore`: shows what is in the trash, and puts it back where it was.

use std::collections::HashSet;

use bytes::Bytes;
use clap::Args;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{self, FileKind, FsError, RemoveTree, Rename, command::Op};
use meta_client::{ClientError, Session};
use serde_json::json;

use super::clone::{Cloner, Kind};
use crate::cli::Access;
use crate::failure::{Failure, Outcome};
use crate::{output, progress};

/// Entries of a directory per question.
const ENTRIES: u32 = 4096;

/// Things named to people; JSON has all.
const SHOWN: usize = 20;

/// Which volume, which hours, and whether to put things back.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// helio://HOST[:PORT][,HOST[:PORT]…]/VOLUME
    #[arg(value_name = "META-URL")]
    url: String,
    /// Hours as /.trash has them, such as 2026-11-22-07 (UTC), or the beginning of such names; none: all.
    #[arg(value_name = "HOUR")]
    hours: Vec<String>,
    /// Moves things back to where they were removed from; where something else is by now, they stay in the trash.
    #[arg(long)]
    put_back: bool,
}

/// One thing in the trash.
struct Kept {
    hour: Bytes,
    hour_ino: u64,
    /// As it lies there: `<parent>-<inode>-<name>`.
    kept_name: Bytes,
    parent: u64,
    name: Bytes,
    ino: u64,
    kind: FileKind,
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    let target = options.access.target(&options.url, None)?;
    let session = target.session(!options.put_back).await?;
    let outcome = work(&session, &options, json).await;
    session.detach().await;
    outcome
}

async fn work(session: &Session, options: &Options, json: bool) -> Outcome {
    let kept = collect(session, &options.hours).await?;
    if !options.put_back {
        return show(&kept, json);
    }
    let bar = progress::bar("restore", kept.len() as u64, false, json);
    let (mut restored, mut left) = (0u64, Vec::new());
    // Directories last: what was removed from them goes back into them first, wherever they are, since one that comes back as a
    // copy is another one from then on. Among them what was removed first, the innermost, comes first.
    let (directories, others): (Vec<&Kept>, Vec<&Kept>) =
        kept.iter().partition(|it| it.kind == FileKind::Directory);
    for it in others.into_iter().chain(directories) {
        match put_back(session, it).await? {
            None => restored += 1,
            Some(why) => left.push((it, why)),
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if json {
        let left: Vec<_> = left
            .iter()
            .map(|(it, why)| json!({ "hour": text(&it.hour), "name": text(&it.name), "why": why }))
            .collect();
        output::print_json(&json!({ "restored": restored, "left": left }))?;
    } else {
        for (it, why) in left.iter().take(SHOWN) {
            output::line(format_args!(
                "left in the trash: {}/{}: {why}",
                text(&it.hour),
                text(&it.kept_name)
            ))?;
        }
        output::line(format_args!("restored {restored}, left {}", left.len()))?;
    }
    match left.is_empty() {
        true => Ok(()),
        false => Err(
            Failure::new(format!("{} things could not be restored", left.len()))
                .hint("move them by hand, as root, from .trash in a mount"),
        ),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn show(kept: &[Kept], json: bool) -> Outcome {
    if json {
        let kept: Vec<_> = kept
            .iter()
            .map(|it| {
                json!({
                    "hour": text(&it.hour),
                    "name": text(&it.name),
                    "parent": it.parent,
                    "inode": it.ino,
                    "directory": it.kind == FileKind::Directory,
                })
            })
            .collect();
        return output::print_json(&kept.into());
    }
    let mut hours: Vec<(&Bytes, u64)> = Vec::new();
    for it in kept {
        match hours.last_mut() {
            Some((hour, count)) if **hour == it.hour => *count += 1,
            _ => hours.push((&it.hour, 1)),
        }
    }
    if hours.is_empty() {
        return output::line("nothing is in the trash");
    }
    let mut table = output::table(["hour (utc)", "removed"]);
    for (hour, count) in hours {
        table.add_row([text(hour), count.to_string()]);
    }
    output::print_table(&table)?;
    output::line("--put-back restores; to look at single files: .trash in a mount, as root")
}

/// What lies in the hours that were asked for.
async fn collect(session: &Session, hours: &[String]) -> Outcome<Vec<Kept>> {
    let trash = match session
        .lookup(Ino::ROOT, Bytes::from_static(b".trash"))
        .await
    {
        Ok((attr, _)) => attr,
        Err(ClientError::Verdict(FsError::NotFound)) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut kept = Vec::new();
    for hour in entries(session, trash.ino).await? {
        let asked = |prefix: &String| hour.name.starts_with(prefix.as_bytes());
        if hour.kind() != FileKind::Directory || !(hours.is_empty() || hours.iter().any(asked)) {
            continue;
        }
        for entry in entries(session, hour.ino).await? {
            if let Some((parent, name)) = parse(&entry) {
                kept.push(Kept {
                    hour: hour.name.clone(),
                    hour_ino: hour.ino,
                    parent,
                    name,
                    ino: entry.ino,
                    kind: entry.kind(),
                    kept_name: entry.name,
                });
            }
        }
    }
    Ok(kept)
}

async fn entries(session: &Session, ino: u64) -> Outcome<Vec<v1::DirEntry>> {
    let (mut all, mut seen): (Vec<v1::DirEntry>, HashSet<u64>) = Default::default();
    loop {
        let after = all.last().map_or(0, |entry| entry.cookie);
        let (page, _) = session.read_dir(Ino(ino), after, ENTRIES, false).await?;
        let end = page.end || page.entries.is_empty();
        all.extend(
            page.entries
                .into_iter()
                .filter(|entry| seen.insert(entry.cookie)),
        );
        if end {
            return Ok(all);
        }
    }
}

/// `<parent>-<inode>-<name>`; `None`: put there by somebody by hand.
fn parse(entry: &v1::DirEntry) -> Option<(u64, Bytes)> {
    let mut parts = entry.name.splitn(3, |byte| *byte == b'-');
    let mut number = || std::str::from_utf8(parts.next()?).ok()?.parse::<u64>().ok();
    let (parent, ino) = (number()?, number()?);
    let name = parts.next().filter(|name| !name.is_empty())?;
    (ino == entry.ino).then(|| (parent, entry.name.slice_ref(name)))
}

/// `None`: done; else why not.
async fn put_back(session: &Session, it: &Kept) -> Outcome<Option<String>> {
    let op = Op::Rename(Rename {
        parent: it.hour_ino,
        name: it.kept_name.clone(),
        new_parent: it.parent,
        new_name: it.name.clone(),
        no_replace: true,
        exchange: false,
    });
    match session.mutate(root(), op).await {
        Ok(_) => Ok(None),
        Err(ClientError::Verdict(FsError::CrossDevice)) => put_back_copy(session, it).await,
        Err(ClientError::Verdict(verdict)) => Ok(Some(why(verdict))),
        Err(error) => Err(error.into()),
    }
}

/// A quota was set or taken back since, and a tree that is moved would not be charged anew: a copy is, which shares the data. What is
/// in the trash goes when the copy is whole.
async fn put_back_copy(session: &Session, it: &Kept) -> Outcome<Option<String>> {
    let copied = async {
        let (kept, _) = session.get_attr(Ino(it.ino)).await?;
        Cloner::new(session, Kind::Clone, true)
            .copy_as(&kept, it.parent, it.name.clone())
            .await
    };
    match copied.await {
        Ok(true) => {}
        Ok(false) => return Ok(Some(why(FsError::Exists))),
        Err(failure) => return Ok(Some(format!("copying it failed: {}", failure.message()))),
    }
    let op = Op::RemoveTree(RemoveTree {
        parent: it.hour_ino,
        name: it.kept_name.clone(),
    });
    match session.mutate(root(), op).await {
        Ok(_) => Ok(None),
        // By somebody else, or because its time was over: then what the copy met may not have been all.
        Err(ClientError::Verdict(FsError::NotFound)) => Ok(Some(
            "it went from the trash while it was copied: the copy, which is in its place, may not be whole".to_owned(),
        )),
        Err(error) => Err(error.into()),
    }
}

fn why(verdict: FsError) -> String {
    match verdict {
        FsError::Exists => "there is something of that name again".to_owned(),
        FsError::Stale | FsError::NotFound | FsError::NotDirectory => {
            "the directory that it was in is gone for good".to_owned()
        }
        verdict => Failure::from(ClientError::Verdict(verdict))
            .message()
            .to_owned(),
    }
}

fn root() -> v1::Caller {
    v1::Caller {
        uid: 0,
        gid: 0,
        pid: std::process::id(),
        ..v1::Caller::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_the_trash_say_where_things_were() {
        let entry = |name: &'static [u8], ino| v1::DirEntry {
            name: Bytes::from_static(name),
            ino,
            ..v1::DirEntry::default()
        };
        let parsed = parse(&entry(b"12-7-a-b-c", 7));
        assert_eq!(parsed, Some((12, Bytes::from_static(b"a-b-c"))));
        for (name, ino) in [
            (&b"12-8-a"[..], 7),
            (b"12-7-", 7),
            (b"mine", 7),
            (b"x-7-a", 7),
        ] {
            assert_eq!(parse(&entry(name, ino)), None);
        }
    }
}

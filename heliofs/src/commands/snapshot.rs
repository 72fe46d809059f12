//! `heliofs snapshot`: read-only copies of a directory below `/.snapshots`, which share its data.
//!
//! A snapshot is put together as a clone is, below a hidden name, and gets its own at the end: it appears whole or not at all.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use clap::{Args, Subcommand};
use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{self, Attr, FileKind, FsError, command::Op};
use meta_client::{ClientError, Session};
use meta_core::limits::CORE_LEVEL_QUOTAS;
use serde_json::json;

use super::clone::{Cloner, Kind};
use super::info::{self, places};
use crate::cli::Access;
use crate::failure::{Failure, Outcome};
use crate::units::{show_size, show_time};
use crate::{mounts, output};

/// The directory of the root that snapshots are in.
pub(crate) const DIRECTORY: &str = ".snapshots";

/// Keeps what it is a snapshot of.
const SOURCE: &[u8] = b"trusted.heliofs.source";

/// Entries of a directory per question.
const ENTRIES: u32 = 1024;

/// What to do with snapshots.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Makes a read-only copy of a directory, /.snapshots/NAME, which shares its data.
    Create(CreateOptions),
    /// Shows a volume's snapshots.
    #[command(alias = "list")]
    Ls(ListOptions),
    /// Removes snapshots; they are gone at once, and taken apart in the background.
    Rm(RemoveOptions),
}

/// Of what, and its name.
#[derive(Args)]
pub(crate) struct CreateOptions {
    #[command(flatten)]
    access: Access,
    /// A directory in a mount; or helio://HOST/VOLUME and then the directory inside the volume.
    #[arg(required = true, num_args = 1..=2, value_name = "DIR")]
    paths: Vec<String>,
    /// The snapshot's name; without one: the time in UTC, such as 2026-11-22T10-15-00.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

/// Of which volume.
#[derive(Args)]
pub(crate) struct ListOptions {
    #[command(flatten)]
    access: Access,
    /// A path in a mount, or helio://HOST/VOLUME.
    #[arg(value_name = "PATH")]
    place: String,
    /// Counts what is in each; takes time.
    #[arg(long)]
    sizes: bool,
}

/// Which ones.
#[derive(Args)]
pub(crate) struct RemoveOptions {
    #[command(flatten)]
    access: Access,
    /// A path in a mount, or helio://HOST/VOLUME.
    #[arg(value_name = "PATH")]
    place: String,
    /// Names of snapshots.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

pub(crate) async fn run(command: Command, json: bool) -> Outcome {
    match command {
        Command::Create(options) => create(options, json).await,
        Command::Ls(options) => list(options, json).await,
        Command::Rm(options) => remove(options, json).await,
    }
}

/// Who changes snapshots: root, and no mount.
fn caller() -> v1::Caller {
    v1::Caller {
        pid: std::process::id(),
        snapshot: true,
        ..v1::Caller::default()
    }
}

fn root_only() -> Outcome {
    match nix::unistd::geteuid().is_root() {
        true => Ok(()),
        false => Err(Failure::new(
            "snapshots are root's to make and remove: they keep owners and check no permissions",
        )),
    }
}

/// One component that says what it is.
fn check_name(name: &str) -> Outcome {
    if name.is_empty() || name.starts_with('.') || name.contains('/') || name.len() > 255 {
        return Err(
            Failure::usage(format!("`{name}` can't be a snapshot's name"))
                .hint("one component of a path that does not begin with a dot"),
        );
    }
    Ok(())
}

/// `2026-11-22T10-15-00`
fn name_of_now() -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let shown = show_time(i64::try_from(now.as_nanos()).unwrap_or_default());
    shown.chars().take(19).collect::<String>().replace(':', "-")
}

async fn create(options: CreateOptions, json: bool) -> Outcome {
    root_only()?;
    let name = options.name.unwrap_or_else(name_of_now);
    check_name(&name)?;
    let mut found = places(&options.access, &options.paths)?;
    let (Some((target, mut places)), true) = (found.pop(), found.is_empty()) else {
        return Err(Failure::usage("one directory must be named"));
    };
    let (Some(place), true) = (places.pop(), places.is_empty()) else {
        return Err(
            Failure::usage("one directory must be named").hint("--name NAME names the snapshot")
        );
    };
    let session = target.session(false).await?;
    let outcome = make(&session, &place.inside, &name, json).await;
    session.detach().await;
    let (entries, bytes) = outcome?;
    if json {
        let path = format!("/{DIRECTORY}/{name}");
        return output::print_json(
            &json!({ "name": name, "path": path, "entries": entries, "bytes": bytes }),
        );
    }
    output::line(format_args!(
        "snapshot /{DIRECTORY}/{name}: {entries} entries with {}, sharing their data",
        show_size(bytes)
    ))
}

async fn make(session: &Session, inside: &Path, name: &str, json: bool) -> Outcome<(u64, u64)> {
    if session.welcome().settings.unwrap_or_default().core_level < CORE_LEVEL_QUOTAS {
        return Err(Failure::new("the volume is older than snapshots").hint(
            "when all metadata nodes and mirrors run this release: heliofs config META-URL --core-level 2",
        ));
    }
    if inside.starts_with(DIRECTORY) {
        return Err(Failure::usage("snapshots of snapshots make no sense")
            .hint("heliofs clone copies one to where it can be changed"));
    }
    let shown = format!("/{}", inside.display());
    let source = info::walk(session, inside)
        .await?
        .ok_or_else(|| Failure::new(format!("{shown}: no such file or directory")))?;
    if source.kind() != FileKind::Directory {
        return Err(Failure::new(format!("{shown} is no directory"))
            .hint("cp --reflink=auto shares the data of single files"));
    }
    directory(session).await?;
    let cloner = Cloner::new(session, Kind::Snapshot { source: shown }, json);
    cloner
        .run(inside, &PathBuf::from(DIRECTORY).join(name))
        .await?;
    Ok(cloner.copied())
}

/// Makes `/.snapshots` unless it exists.
async fn directory(session: &Session) -> Outcome<Attr> {
    let create = Op::Create(v1::Create {
        parent: Ino::ROOT.0,
        name: Bytes::from_static(DIRECTORY.as_bytes()),
        kind: FileKind::Directory as i32,
        mode: 0o755,
        exclusive: true,
        ..v1::Create::default()
    });
    match session.mutate(caller(), create).await {
        Ok(reply) => Ok(reply.attr.unwrap_or_default()),
        Err(ClientError::Verdict(FsError::Exists)) => existing(session)
            .await?
            .ok_or_else(|| Failure::new(format!("/{DIRECTORY} came and went"))),
        Err(error) => Err(error.into()),
    }
}

/// `/.snapshots`, if there is one.
async fn existing(session: &Session) -> Outcome<Option<Attr>> {
    let Some(attr) = info::walk(session, Path::new(DIRECTORY)).await? else {
        return Ok(None);
    };
    if attr.flags & v1::AttrFlag::Snapshot as u32 == 0 {
        return Err(Failure::new(format!(
            "/{DIRECTORY} is somebody's own, not the place of snapshots"
        ))
        .hint("rename it"));
    }
    Ok(Some(attr))
}

fn volume(access: &Access, place: &str) -> Outcome<crate::connect::Target> {
    if place.starts_with("helio://") {
        return access.target(place, None);
    }
    let (note, _) = mounts::containing(Path::new(place))?;
    let access = access.or_file(note.token_file);
    access.target(&note.url, None)
}

async fn list(options: ListOptions, json: bool) -> Outcome {
    let target = volume(&options.access, &options.place)?;
    let session = target.session(true).await?;
    let outcome = all(&session, options.sizes).await;
    session.detach().await;
    let all = outcome?;
    if json {
        let values = all.iter().map(|(name, attr, source, summary)| {
            json!({
                "name": name,
                "source": source,
                "created": show_time(attr.btime),
                "inode": attr.ino,
                "files": summary.as_ref().map(|it| it.files),
                "directories": summary.as_ref().map(|it| it.directories),
                "bytes": summary.as_ref().map(|it| it.size_bytes),
            })
        });
        return output::print_json(&values.collect::<Vec<_>>().into());
    }
    if all.is_empty() {
        return output::line("there are no snapshots");
    }
    let mut table = output::table(["snapshot", "of", "created", "files", "size"]);
    for (name, attr, source, summary) in all {
        let (files, size) = match summary {
            Some(it) => (it.files.to_string(), show_size(it.size_bytes)),
            None => ("-".to_owned(), "-".to_owned()),
        };
        let created: String = show_time(attr.btime).chars().take(19).collect();
        table.add_row([name, source, format!("{created}Z"), files, size]);
    }
    output::print_table(&table)
}

/// Names, attributes, sources and, if asked for, sums.
type Listed = (String, Attr, String, Option<v1::SummaryReply>);

async fn all(session: &Session, sizes: bool) -> Outcome<Vec<Listed>> {
    let mut all = Vec::new();
    let Some(directory) = existing(session).await? else {
        return Ok(all);
    };
    let mut after = 0;
    loop {
        let (page, _) = session
            .read_dir(Ino(directory.ino), after, ENTRIES, true)
            .await?;
        let last = page.entries.last().map(|entry| entry.cookie);
        for entry in page.entries {
            let Some(attr) = entry.attr else { continue };
            let source = match session
                .get_xattr(Ino(attr.ino), Bytes::from_static(SOURCE))
                .await
            {
                Ok((value, _)) => String::from_utf8_lossy(&value).into_owned(),
                // One that is being made, or whose making was broken off.
                Err(ClientError::Verdict(_)) => "(unfinished)".to_owned(),
                Err(error) => return Err(error.into()),
            };
            let summary = match sizes {
                true => Some(session.summary(Ino(attr.ino)).await?),
                false => None,
            };
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            all.push((name, attr, source, summary));
        }
        match last {
            Some(last) if !page.end => after = last,
            _ => return Ok(all),
        }
    }
}

async fn remove(options: RemoveOptions, json: bool) -> Outcome {
    root_only()?;
    let target = volume(&options.access, &options.place)?;
    let session = target.session(false).await?;
    let outcome = remove_all(&session, &options.names).await;
    session.detach().await;
    outcome?;
    if json {
        return output::print_json(&json!({ "removed": options.names }));
    }
    Ok(())
}

async fn remove_all(session: &Session, names: &[String]) -> Outcome {
    let missing = |name: &str| {
        Failure::new(format!("there is no snapshot `{name}`"))
            .hint("`heliofs snapshot ls` shows them")
    };
    let Some(directory) = existing(session).await? else {
        return Err(missing(&names[0]));
    };
    for name in names {
        let op = Op::RemoveTree(v1::RemoveTree {
            parent: directory.ino,
            name: Bytes::copy_from_slice(name.as_bytes()),
        });
        match session.mutate(caller(), op).await {
            Ok(_) => {}
            Err(ClientError::Verdict(FsError::NotFound)) => return Err(missing(name)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Says on a snapshot what it is of.
pub(super) fn mark(ino: u64, source: &str) -> Op {
    Op::SetXattr(v1::SetXattr {
        ino,
        name: Bytes::from_static(SOURCE),
        value: Bytes::copy_from_slice(source.as_bytes()),
        ..v1::SetXattr::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_component_that_can_be_seen() {
        for name in ["daily", "2026-11-22T10-15-00", "a b"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", ".", "..", ".hidden", "a/b"] {
            assert!(check_name(name).is_err(), "{name}");
        }
        assert_eq!(name_of_now().len(), 19);
        assert!(check_name(&name_of_now()).is_ok());
    }
}

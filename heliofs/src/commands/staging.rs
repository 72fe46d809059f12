//! `heliofs staging`: what mounts with `--writeback` have staged in a cache directory, and what they kept aside.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use blockstore::{SegmentStore, StoreOptions};
use clap::{Args, Subcommand};
use fuse_client::write::staging::look::{self, Found};
use heliofs_proto::ids::Ino;
use meta_client::Session;
use serde_json::{Value, json};

use super::config;
use crate::cli::Access;
use crate::failure::{Failure, Outcome, While};
use crate::output;
use crate::passphrase::PassphraseSource;
use crate::units::{show_millis, show_size};

/// Ranges of a record that are shown to people.
const RANGES_SHOWN: usize = 4;

/// What to do with staged data.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Shows what is staged, and what was kept aside since others had changed its file.
    Ls(ListOptions),
    /// Writes a record's bytes to a local file, at the offsets that they had.
    Export(ExportOptions),
    /// Removes what was kept aside.
    Rm(RemoveOptions),
}

/// Which cache directory.
#[derive(Args)]
pub(crate) struct ListOptions {
    #[command(flatten)]
    access: Access,
    /// The first --cache-dir of the mount, or one volume's folder in it.
    #[arg(value_name = "CACHE-DIR")]
    directory: PathBuf,
    /// helio://HOST/VOLUME: asks that volume for the files' paths.
    #[arg(long, value_name = "VOLUME-URL")]
    volume: Option<String>,
}

/// Which record, and where to.
#[derive(Args)]
pub(crate) struct ExportOptions {
    #[command(flatten)]
    access: Access,
    /// The first --cache-dir of the mount, or one volume's folder in it.
    #[arg(value_name = "CACHE-DIR")]
    directory: PathBuf,
    /// The record's number, as `staging ls` shows it.
    #[arg(value_name = "RECORD")]
    record: String,
    /// A new file; what the record does not have is a hole in it.
    #[arg(value_name = "FILE")]
    to: PathBuf,
    /// helio://HOST/VOLUME, whose data it is.
    #[arg(long, value_name = "VOLUME-URL")]
    volume: String,
    #[command(flatten)]
    passphrase: PassphraseSource,
}

/// Which records.
#[derive(Args)]
pub(crate) struct RemoveOptions {
    /// The first --cache-dir of the mount, or one volume's folder in it.
    #[arg(value_name = "CACHE-DIR")]
    directory: PathBuf,
    /// Numbers of records that were kept aside, as `staging ls` shows them.
    #[arg(required = true, value_name = "RECORD")]
    records: Vec<String>,
    /// Really: nobody else may have these bytes.
    #[arg(long)]
    yes: bool,
}

/// A staging folder and what is in it.
struct Folder {
    /// The volume's folder in the cache directory.
    volume: String,
    in_use: bool,
    records: Vec<Found>,
}

pub(crate) async fn run(command: Command, json: bool) -> Outcome {
    match command {
        Command::Ls(options) => list(options, json).await,
        Command::Export(options) => export(options, json).await,
        Command::Rm(options) => remove(&options, json),
    }
}

/// The staging folders at a path: of all volumes of a cache directory, or of one.
fn folders(directory: &Path) -> Outcome<Vec<Folder>> {
    let doing = || format!("look at {}", directory.display());
    let mut volumes = vec![directory.to_owned()];
    for entry in fs::read_dir(directory).while_(doing())? {
        volumes.push(entry.while_(doing())?.path());
    }
    let mut found = Vec::new();
    for volume in volumes {
        let folder = volume.join("staging");
        if !folder.is_dir() {
            continue;
        }
        found.push(Folder {
            volume: volume
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            in_use: look::is_in_use(&folder).while_(doing())?,
            records: look::list(&folder).while_(doing())?,
        });
    }
    found.sort_by(|one, other| one.volume.cmp(&other.volume));
    Ok(found)
}

/// The record of that number.
fn find<'a>(folders: &'a [Folder], number: &str, directory: &Path) -> Outcome<&'a Found> {
    let known = u64::from_str_radix(number, 16)
        .map_err(|_| Failure::usage(format!("{number} is no record's number")))?;
    let records = folders.iter().flat_map(|folder| &folder.records);
    let mut matching = records.filter(|found| found.number == known);
    match (matching.next(), matching.next()) {
        (Some(found), None) => Ok(found),
        (Some(_), Some(_)) => Err(Failure::usage(format!(
            "several volumes have a record {number}"
        ))
        .hint(format!(
            "name one volume's folder in {}",
            directory.display()
        ))),
        (None, _) => Err(Failure::new(format!(
            "there is no record {number} in {}",
            directory.display()
        ))
        .hint("`heliofs staging ls` shows them; it may have been stored meanwhile")),
    }
}

async fn list(options: ListOptions, json: bool) -> Outcome {
    let folders = folders(&options.directory)?;
    let session = match &options.volume {
        Some(url) => Some(options.access.target(url, None)?.session(true).await?),
        None => None,
    };
    let mut rows = Vec::new();
    for folder in &folders {
        for found in &folder.records {
            let path = match &session {
                Some(session) => path_of(session, found).await?,
                None => None,
            };
            rows.push((folder, found, path));
        }
    }
    if let Some(session) = session {
        session.detach().await;
    }
    if json {
        let shown = rows.iter().map(|(folder, found, path)| {
            let mut shown = to_json(found, path.as_deref());
            shown["volume"] = json!(folder.volume);
            shown["in_use"] = json!(folder.in_use);
            shown
        });
        return output::print_json(&Value::Array(shown.collect()));
    }
    let mut table = output::table(["record", "state", "inode", "path", "bytes", "age", "ranges"]);
    for (folder, found, path) in &rows {
        let state = match (found.aside, folder.in_use) {
            (true, _) => "kept aside",
            (false, true) => "being stored",
            (false, false) => "waits for a mount",
        };
        let age = SystemTime::now().duration_since(found.since);
        let (inode, bytes, ranges) = match &found.header {
            Ok(header) => (
                header.ino.to_string(),
                show_size(header.ranges.iter().map(|(_, length)| length).sum()),
                show_ranges(&header.ranges),
            ),
            Err(why) => ("-".to_owned(), show_size(found.file_bytes), why.clone()),
        };
        table.add_row([
            format!("{:016x}", found.number),
            state.to_owned(),
            inode,
            path.clone().unwrap_or_else(|| "-".to_owned()),
            bytes,
            show_millis(age.map_or(0, |age| age.as_millis() as u64)),
            ranges,
        ]);
    }
    output::print_table(&table)
}

/// The path of a record's file, if the session's volume has it.
async fn path_of(session: &Session, found: &Found) -> Outcome<Option<String>> {
    match &found.header {
        Ok(header) if header.volume == session.volume_id().0 => {
            Ok(session.path_of(Ino(header.ino)).await?)
        }
        _ => Ok(None),
    }
}

fn to_json(found: &Found, path: Option<&str>) -> Value {
    let age = SystemTime::now().duration_since(found.since);
    let mut shown = json!({
        "record": format!("{:016x}", found.number),
        "file": found.path,
        "kept_aside": found.aside,
        "file_bytes": found.file_bytes,
        "age_seconds": age.map_or(0, |age| age.as_secs()),
        "path": path,
    });
    match &found.header {
        Ok(header) => {
            shown["volume_id"] = json!(header.volume);
            shown["inode"] = json!(header.ino);
            shown["bytes"] = json!(header.ranges.iter().map(|(_, length)| length).sum::<u64>());
            shown["ranges"] = json!(header.ranges);
        }
        Err(why) => shown["damage"] = json!(why),
    }
    shown
}

fn show_ranges(ranges: &[(u64, u64)]) -> String {
    let mut shown: Vec<String> = ranges
        .iter()
        .take(RANGES_SHOWN)
        .map(|(offset, length)| format!("{offset}+{length}"))
        .collect();
    if ranges.len() > RANGES_SHOWN {
        shown.push(format!("and {} more", ranges.len() - RANGES_SHOWN));
    }
    shown.join(" ")
}

async fn export(options: ExportOptions, json: bool) -> Outcome {
    let folders = folders(&options.directory)?;
    let found = find(&folders, &options.record, &options.directory)?;
    let header = found.header.as_ref().map_err(|why| {
        Failure::damaged(format!("record {} can't be read: {why}", options.record))
    })?;
    let target = options.access.target(&options.volume, None)?;
    let volume = config::find(&target.cluster, &target.volume).await?;
    let session = target.session(true).await?;
    let (storage, id) = (session.storage(), session.volume_id());
    let path = session.path_of(Ino(header.ino)).await;
    session.detach().await;
    if header.volume != id.0 {
        return Err(Failure::usage(format!(
            "record {} is of the volume with id {}, and {} has id {}",
            options.record, header.volume, target.volume, id.0
        )));
    }
    let store_options = StoreOptions {
        memory_cache_bytes: 0,
        opener: match storage.encryption {
            Some(_) => Some(options.passphrase.required()?),
            None => None,
        },
        ..StoreOptions::default()
    };
    let store = SegmentStore::open(&storage, config::prefix(&volume), id, store_options)?;
    let parts = look::data(&found.path, &store).map_err(|why| {
        Failure::damaged(format!("record {} can't be read: {why}", options.record))
    })?;
    let doing = || format!("write {}", options.to.display());
    // Whoever may read the file in the volume need not be who may read it here.
    let file: File = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&options.to)
        .while_(doing())?;
    for (offset, bytes) in &parts {
        file.write_all_at(bytes, *offset).while_(doing())?;
    }
    file.sync_all().while_(doing())?;
    let path = path?;
    if json {
        return output::print_json(&to_json(found, path.as_deref()));
    }
    let of = path.unwrap_or_else(|| format!("inode {}", header.ino));
    output::line(format_args!(
        "{} of {of} at {}",
        show_size(parts.iter().map(|(_, bytes)| bytes.len() as u64).sum()),
        show_ranges(&header.ranges)
    ))
}

fn remove(options: &RemoveOptions, json: bool) -> Outcome {
    let folders = folders(&options.directory)?;
    let mut chosen = Vec::new();
    for number in &options.records {
        let found = find(&folders, number, &options.directory)?;
        if !found.aside {
            return Err(Failure::new(format!(
                "record {number} is staged: sync has confirmed it, and it is not stored yet"
            ))
            .hint("a mount of the volume with this cache directory stores it"));
        }
        chosen.push(found);
    }
    if !options.yes {
        return Err(
            Failure::usage("removing what nobody else may have must be confirmed")
                .hint("use --yes; `heliofs staging export` saves it before"),
        );
    }
    for found in &chosen {
        fs::remove_file(&found.path).while_(format_args!("remove {}", found.path.display()))?;
    }
    if json {
        let removed = chosen.iter().map(|found| to_json(found, None));
        return output::print_json(&Value::Array(removed.collect()));
    }
    output::line(format_args!("removed {} records", chosen.len()))
}

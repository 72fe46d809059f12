//! `heliofs info`: what the metadata knows of a file.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::Args;
use heliofs_proto::ids::{Ino, SegmentId};
use heliofs_proto::v1::{Attr, Extent, FileKind};
use meta_client::Session;
use serde_json::json;

use crate::cli::Access;
use crate::connect::Target;
use crate::failure::{Failure, Outcome};
use crate::units::{show_size, show_time};
use crate::{mounts, output};

/// Extents shown to people; JSON has all.
const EXTENTS_SHOWN: usize = 20;
/// Extents per request.
const EXTENTS_PAGE: u32 = 1000;

/// What to look at.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// Paths in mounts, or META-URL with the volume's name and then paths inside the volume.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,
    /// Counts what is below directories.
    #[arg(short, long)]
    recursive: bool,
}

/// A path inside a volume.
pub(crate) struct Place {
    /// As it was typed.
    pub(crate) shown: String,
    /// From the volume's root, "" being the root.
    pub(crate) inside: PathBuf,
}

/// Sorts paths by the volume they are in: `helio://…/VOLUME PATH…`, or paths in mounts.
pub(crate) fn places(access: &Access, paths: &[String]) -> Outcome<Vec<(Target, Vec<Place>)>> {
    if let Some((url, rest)) = paths.split_first()
        && url.starts_with("helio://")
    {
        if rest.is_empty() {
            return Err(
                Failure::usage("no path is named").hint(format!("{url} PATH; / is the root"))
            );
        }
        let target = access.target(url, None)?;
        let places = rest.iter().map(|path| Place {
            shown: path.clone(),
            inside: PathBuf::from(path.trim_matches('/')),
        });
        return Ok(vec![(target, places.collect())]);
    }
    let mut found: Vec<(String, Target, Vec<Place>)> = Vec::new();
    for path in paths {
        let (note, inside) = mounts::containing(Path::new(path))?;
        let place = Place {
            shown: path.clone(),
            inside,
        };
        if let Some((_, _, places)) = found.iter_mut().find(|(url, ..)| *url == note.url) {
            places.push(place);
            continue;
        }
        let access = access.or_file(note.token_file);
        let target = access.target(&note.url, None)?;
        found.push((note.url, target, vec![place]));
    }
    Ok(found
        .into_iter()
        .map(|(_, target, places)| (target, places))
        .collect())
}

/// The inode at a path inside the volume.
pub(crate) async fn walk(session: &Session, inside: &Path) -> Outcome<Option<Attr>> {
    let path = Bytes::copy_from_slice(inside.as_os_str().as_encoded_bytes());
    let components = inside.components().count();
    let (attrs, _) = session.walk(path).await?;
    Ok(attrs.into_iter().nth(components))
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    let mut all = Vec::new();
    for (target, places) in places(&options.access, &options.paths)? {
        let session = target.session(true).await?;
        let outcome = look(&session, &target, &places, &options, json).await;
        session.detach().await;
        all.extend(outcome?);
    }
    if json {
        output::print_json(&all.into())
    } else {
        Ok(())
    }
}

async fn look(
    session: &Session,
    target: &Target,
    places: &[Place],
    options: &Options,
    json: bool,
) -> Outcome<Vec<serde_json::Value>> {
    let mut values = Vec::new();
    for place in places {
        let attr = walk(session, &place.inside)
            .await?
            .ok_or_else(|| Failure::new(format!("{}: no such file or directory", place.shown)))?;
        let extents = match attr.kind() {
            FileKind::File => all_extents(session, Ino(attr.ino)).await?,
            _ => Vec::new(),
        };
        let summary = match (attr.kind(), options.recursive) {
            (FileKind::Directory, true) => Some(session.summary(Ino(attr.ino)).await?),
            _ => None,
        };
        let mut value = as_json(&place.shown, &target.volume, &attr, &extents);
        if let Some(summary) = &summary {
            value["summary"] = json!({
                "files": summary.files,
                "directories": summary.directories,
                "size_bytes": summary.size_bytes,
                "allocated_bytes": summary.allocated_bytes,
            });
        }
        if !json {
            print(&place.shown, &target.volume, &attr, &extents)?;
            if let Some(summary) = summary {
                output::line(format_args!(
                    "below it: {} files and {} directories with {} ({} stored)",
                    summary.files,
                    summary.directories,
                    show_size(summary.size_bytes),
                    show_size(summary.allocated_bytes)
                ))?;
            }
        }
        values.push(value);
    }
    Ok(values)
}

pub(crate) async fn all_extents(session: &Session, ino: Ino) -> Outcome<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut offset = 0;
    loop {
        let (page, _) = session
            .get_extents(ino, offset, u64::MAX - offset, EXTENTS_PAGE)
            .await?;
        extents.extend(page.extents);
        if page.complete_to == u64::MAX || page.complete_to <= offset {
            return Ok(extents);
        }
        offset = page.complete_to;
    }
}

/// `<volume>/<2 hex>/<segment id>`, or where else the bytes are.
fn object_key(volume: &str, extent: &Extent) -> String {
    match extent.segment {
        0 => "inline".to_owned(),
        id => format!("{volume}/{}", SegmentId(id).object_name()),
    }
}

fn kind_name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Unspecified => "unknown",
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
        FileKind::CharDevice => "character device",
        FileKind::BlockDevice => "block device",
    }
}

fn as_json(shown: &str, volume: &str, attr: &Attr, extents: &[Extent]) -> serde_json::Value {
    let extents: Vec<_> = extents
        .iter()
        .map(|extent| {
            json!({
                "offset": extent.offset,
                "length": extent.length,
                "object": object_key(volume, extent),
                "segment": extent.segment,
                "frame": extent.frame,
                "frame_offset": extent.frame_offset,
            })
        })
        .collect();
    json!({
        "path": shown,
        "volume": volume,
        "inode": attr.ino,
        "kind": kind_name(attr.kind()),
        "mode": format!("{:04o}", attr.mode),
        "nlink": attr.nlink,
        "uid": attr.uid,
        "gid": attr.gid,
        "size": attr.size,
        "allocated": attr.allocated,
        "mtime": show_time(attr.mtime),
        "ctime": show_time(attr.ctime),
        "btime": show_time(attr.btime),
        "data_seq": attr.data_seq,
        "extents": extents,
    })
}

fn print(shown: &str, volume: &str, attr: &Attr, extents: &[Extent]) -> Outcome {
    output::line(format_args!(
        "{shown}: {} {} of volume {volume}, {} ({} bytes), {} stored, mode {:04o}, {} links, owner {}:{}",
        kind_name(attr.kind()),
        attr.ino,
        show_size(attr.size),
        attr.size,
        show_size(attr.allocated),
        attr.mode,
        attr.nlink,
        attr.uid,
        attr.gid
    ))?;
    output::line(format_args!("modified {}", show_time(attr.mtime)))?;
    if extents.is_empty() {
        return Ok(());
    }
    let mut table = output::table(["offset", "length", "object", "frame", "at"]);
    for extent in extents.iter().take(EXTENTS_SHOWN) {
        table.add_row([
            extent.offset.to_string(),
            extent.length.to_string(),
            object_key(volume, extent),
            extent.frame.to_string(),
            extent.frame_offset.to_string(),
        ]);
    }
    output::print_table(&table)?;
    if extents.len() > EXTENTS_SHOWN {
        output::line(format_args!(
            "… {} more; --json has all",
            extents.len() - EXTENTS_SHOWN
        ))?;
    }
    Ok(())
}

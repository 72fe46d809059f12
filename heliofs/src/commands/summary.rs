//! `heliofs summary`: what is below a directory, and where most of it lies.

use std::pin::Pin;

use clap::Args;
use futures::{StreamExt, TryStreamExt};
use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{Attr, FileKind, FsError, SummaryReply};
use meta_client::{ClientError, Session};
use serde_json::{Value, json};

use super::info::{self, places};
use crate::cli::Access;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::units::show_size;

/// Entries of a directory per question.
const ENTRIES: u32 = 4096;

/// Subtrees that the server walks at once for us.
const AT_ONCE: usize = 8;

/// Deepest tree that is shown; each level makes the server walk everything once more.
const DEPTH_MAX: u32 = 10;

/// Which directory, and how much of it.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// Paths in mounts, or META-URL with the volume's name and then paths inside the volume.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,
    /// Levels below PATH that are shown; at most 10.
    #[arg(short, long, default_value_t = 2, value_name = "N")]
    depth: u32,
    /// The largest entries of each directory that are shown.
    #[arg(short, long, default_value_t = 10, value_name = "N")]
    entries: usize,
}

/// A directory or a file with all that is below it.
struct Node {
    name: String,
    directory: bool,
    sum: SummaryReply,
    /// The largest ones, largest first.
    children: Vec<Node>,
    /// The others, if there are any: how many, and their sum.
    others: Option<(usize, SummaryReply)>,
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    if options.depth > DEPTH_MAX {
        return Err(
            Failure::usage(format!("a depth of {} is too much", options.depth)).hint(format!(
                "at most {DEPTH_MAX}; look at a directory further down"
            )),
        );
    }
    let mut nodes = Vec::new();
    for (target, places) in places(&options.access, &options.paths)? {
        let session = target.session(true).await?;
        let mut outcome = Ok(());
        for place in &places {
            let found = async {
                let attr = info::walk(&session, &place.inside).await?.ok_or_else(|| {
                    Failure::new(format!("{}: no such file or directory", place.shown))
                })?;
                look(&session, place.shown.clone(), attr, &options, options.depth).await
            };
            match found.await {
                Ok(node) => nodes.extend(node),
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        session.detach().await;
        outcome?;
    }
    if json {
        return output::print_json(&nodes.iter().map(as_json).collect::<Vec<_>>().into());
    }
    let mut table = output::table(["path", "size", "stored", "dirs", "files"]);
    for node in &nodes {
        rows(&mut table, node, "");
    }
    output::print_table(&table)
}

/// Looks at one inode; `None`: it is gone meanwhile.
fn look<'a>(
    session: &'a Session,
    name: String,
    attr: Attr,
    options: &'a Options,
    depth: u32,
) -> Pin<Box<dyn Future<Output = Outcome<Option<Node>>> + Send + 'a>> {
    Box::pin(async move {
        let directory = attr.kind() == FileKind::Directory;
        let sum = match directory {
            true => match session.summary(Ino(attr.ino)).await {
                Ok(sum) => sum,
                Err(ClientError::Verdict(FsError::Stale)) => return Ok(None),
                Err(error) => return Err(error.into()),
            },
            false => SummaryReply {
                files: 1,
                directories: 0,
                size_bytes: attr.size,
                allocated_bytes: attr.allocated,
            },
        };
        let mut node = Node {
            name,
            directory,
            sum,
            children: Vec::new(),
            others: None,
        };
        if directory && depth > 0 {
            let entries = entries(session, Ino(attr.ino)).await?;
            let found: Vec<Option<Node>> = futures::stream::iter(entries)
                .map(|(name, attr)| look(session, name, attr, options, depth - 1))
                .buffered(AT_ONCE)
                .try_collect()
                .await?;
            node.children = found.into_iter().flatten().collect();
            node.children
                .sort_by(|a, b| (b.sum.size_bytes, &a.name).cmp(&(a.sum.size_bytes, &b.name)));
            let rest = node
                .children
                .split_off(options.entries.min(node.children.len()));
            if !rest.is_empty() {
                let mut sum = SummaryReply::default();
                for other in &rest {
                    sum.files += other.sum.files;
                    sum.directories += other.sum.directories;
                    sum.size_bytes += other.sum.size_bytes;
                    sum.allocated_bytes += other.sum.allocated_bytes;
                }
                node.others = Some((rest.len(), sum));
            }
        }
        Ok(Some(node))
    })
}

async fn entries(session: &Session, ino: Ino) -> Outcome<Vec<(String, Attr)>> {
    let (mut all, mut after) = (Vec::new(), 0);
    loop {
        let (page, _) = session.read_dir(ino, after, ENTRIES, true).await?;
        let last = page.entries.last().map(|entry| entry.cookie);
        for entry in page.entries {
            let attr = match entry.attr {
                Some(attr) => attr,
                // A mount holds data of it back: asked for by itself, it is told to store them first.
                None => match session.get_attr(Ino(entry.ino)).await {
                    Ok((attr, _)) => attr,
                    Err(ClientError::Verdict(FsError::Stale)) => continue,
                    Err(error) => return Err(error.into()),
                },
            };
            all.push((String::from_utf8_lossy(&entry.name).into_owned(), attr));
        }
        match last {
            Some(last) if !page.end => after = last,
            _ => return Ok(all),
        }
    }
}

fn as_json(node: &Node) -> Value {
    let sum = |sum: &SummaryReply| {
        json!({
            "size_bytes": sum.size_bytes,
            "stored_bytes": sum.allocated_bytes,
            "directories": sum.directories,
            "files": sum.files,
        })
    };
    let mut value = sum(&node.sum);
    value["path"] = json!(node.name);
    value["directory"] = json!(node.directory);
    value["children"] = node.children.iter().map(as_json).collect();
    if let Some((count, rest)) = &node.others {
        value["others"] = sum(rest);
        value["others"]["entries"] = json!(count);
    }
    value
}

fn rows(table: &mut comfy_table::Table, node: &Node, indent: &str) {
    let mut row = |name: String, sum: &SummaryReply| {
        table.add_row([
            name,
            show_size(sum.size_bytes),
            show_size(sum.allocated_bytes),
            sum.directories.to_string(),
            sum.files.to_string(),
        ]);
    };
    let slash = if node.directory && !node.name.ends_with('/') {
        "/"
    } else {
        ""
    };
    row(format!("{indent}{}{slash}", node.name), &node.sum);
    let deeper = format!("{indent}  ");
    for child in &node.children {
        rows(table, child, &deeper);
    }
    if let Some((count, rest)) = &node.others {
        table.add_row([
            format!("{deeper}({count} more)"),
            show_size(rest.size_bytes),
            show_size(rest.allocated_bytes),
            rest.directories.to_string(),
            rest.files.to_string(),
        ]);
    }
}

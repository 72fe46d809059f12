//! `heliofs destroy`: removes a volume and its objects for good.

use std::io::{BufRead, IsTerminal, Write};

use blockstore::{Bucket, StoreOptions};
use clap::Args;
use serde_json::json;

use super::{config, raft};
use crate::cli::Access;
use crate::failure::{Failure, Outcome, While};
use crate::{output, units};

/// Which volume, and how sure.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]
    #[arg(value_name = "META-URL")]
    url: String,
    /// The volume.
    name: Option<String>,
    /// Does not ask for the name again.
    #[arg(short, long)]
    yes: bool,
    /// Even while it is mounted; those mounts lose it.
    #[arg(long)]
    force: bool,
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    let target = options
        .access
        .target(&options.url, options.name.as_deref())?;
    let volume = config::find(&target.cluster, &target.volume).await?;
    let storage = volume.storage.clone().unwrap_or_default();
    let answers = raft::ask_all(&target.cluster).await?;
    let leader = raft::leader(&answers)
        .ok_or_else(|| Failure::new("no leader: it alone knows who has mounted the volume"))?;
    let mounts: Vec<_> = leader
        .sessions
        .iter()
        .filter(|session| session.volume == volume.id && !session.mount_point.is_empty())
        .map(|session| format!("{}:{}", session.host, session.mount_point))
        .collect();
    if !mounts.is_empty() && !options.force {
        return Err(Failure::new(format!("{} is mounted: {}", volume.name, mounts.join(", ")))
            .hint("unmount it there (a mount that died is forgotten after its session's time-out), or use --force"));
    }
    if !options.yes {
        confirm(&volume.name, volume.used_inodes, volume.used_bytes)?;
    }
    // Metadata first: were it last, an interruption would leave files without data. What this order may leave behind are
    // objects that nobody refers to, and the marker that tells whose they were.
    let bucket = Bucket::open(&storage, config::prefix(&volume), &StoreOptions::default());
    target.cluster.destroy_volume(volume.id.into()).await?;
    if volume.mirror.is_some() && volume.second.is_none() {
        // The objects are the source's.
        if json {
            return output::print_json(&json!({ "destroyed": volume.name, "objects_deleted": 0 }));
        }
        return output::line(format_args!(
            "destroyed the mirror {}; the source and its objects stay",
            volume.name
        ));
    }
    let objects = match bucket {
        Ok(bucket) => bucket.delete_all().await,
        Err(error) => Err(error),
    };
    let objects = objects.map_err(|error| {
        Failure::new(format!(
            "the volume is gone, but its objects in {} could not all be deleted: {error}",
            storage.bucket
        ))
        .hint(format!(
            "delete what lies below `{}/` in the bucket",
            config::prefix(&volume)
        ))
    })?;
    if json {
        return output::print_json(
            &json!({ "destroyed": volume.name, "objects_deleted": objects }),
        );
    }
    output::line(format_args!(
        "destroyed {}, deleted {objects} objects",
        volume.name
    ))
}

fn confirm(name: &str, inodes: u64, bytes: u64) -> Outcome {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::usage("destroying a volume must be confirmed").hint("use --yes"));
    }
    eprint!(
        "Destroys {name} with {inodes} inodes and {} for good.\nType the volume's name to go on: ",
        units::show_size(bytes)
    );
    std::io::stderr().flush().while_("ask")?;
    let mut typed = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut typed)
        .while_("read the answer")?;
    if typed.trim() == name {
        return Ok(());
    }
    Err(Failure::new(
        "that is not the volume's name; nothing was changed",
    ))
}

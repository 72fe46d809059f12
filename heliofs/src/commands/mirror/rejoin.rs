//! `heliofs mirror rejoin`: an old source comes back as a mirror of the one that was promoted, and what it acknowledged and
//! nobody else has is written down.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;
use heliofs_proto::ids::{Epoch, Position};
use heliofs_proto::v1;
use meta_client::changelog::ChangelogItem;
use meta_client::{ClusterError, MetaUrl};
use serde_json::json;

use super::At;
use super::tail_paths::TailPaths;
use crate::commands::changelog;
use crate::failure::{Failure, Outcome, While};
use crate::output;

/// Which volume, and of what it becomes a mirror.
#[derive(Args)]
pub(crate) struct Options {
    /// The cluster that was the source.
    #[command(flatten)]
    at: At,
    /// The volume that was promoted: helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]
    #[arg(long, value_name = "META-URL")]
    of: String,
    /// File with the cluster token of --of [default: the other's].
    #[arg(long, value_name = "FILE")]
    of_token_file: Option<PathBuf>,
    /// Where to write the divergent tail, one JSON object a line [default: VOLUME-divergent-EPOCH.json].
    #[arg(long, value_name = "FILE")]
    export: Option<PathBuf>,
    /// Goes on although the log no longer has all of the tail.
    #[arg(long)]
    force: bool,
}

/// Where the histories part: the first position of the epoch that follows the last one that both know.
fn parting(old: &v1::Volume, new: &v1::Volume) -> Option<Position> {
    let old_epoch = old.position.map_or(0, |position| position.epoch);
    let next = new.epochs.iter().find(|begun| begun.epoch > old_epoch)?;
    Some(Position {
        epoch: Epoch(next.epoch),
        seq: next.seq,
    })
}

pub(super) async fn run(options: Options, json: bool) -> Outcome {
    let at = &options.at;
    let target = at.access.target(&at.url, at.name.as_deref())?;
    let of: MetaUrl = options.of.parse()?;
    let access = at.access.with_file(options.of_token_file.clone());
    let promoted = of.volume.clone().unwrap_or(target.volume.clone());
    let successor = access.target(&options.of, of.volume.is_none().then_some(&target.volume))?;
    let (old, new) = tokio::try_join!(
        target.cluster.get_volume(&target.volume),
        successor.cluster.get_volume(&promoted)
    )?;
    if old.id != new.id {
        return Err(Failure::new(format!(
            "{} and {promoted} are not the same volume: their ids are {} and {}",
            target.volume, old.id, new.id
        )));
    }
    let parting = parting(&old, &new).ok_or_else(|| {
        Failure::new(format!(
            "{promoted} has no later epoch than {}: it was not promoted",
            target.volume
        ))
        .hint("`heliofs mirror promote` there comes first")
    })?;
    // From here on nothing is added to the tail.
    let last = target
        .cluster
        .demote_volume(&target.volume, &successor.url.to_string(), false)
        .await?;
    let file = options.export.clone().unwrap_or_else(|| {
        PathBuf::from(format!("{}-divergent-{}.json", target.volume, last.epoch.0))
    });
    // How many there are, whether or not the log has them still.
    let divergent = (last.seq + 1).saturating_sub(parting.seq);
    let exported = match divergent {
        0 => 0,
        _ => export(&target, parting, last, &file, options.force).await?,
    };
    let reloading = target.cluster.mirror_reload(&target.volume).await;
    reloading.map_err(|error| {
        Failure::from(error).hint(
            "nothing is lost by that: the tail is exported, and the volume is read-only; try again, with another --export FILE",
        )
    })?;
    if json {
        return output::print_json(&json!({
            "volume": target.volume,
            "of": successor.url.to_string(),
            "last_position": last.to_string(),
            "parted_at": parting.to_string(),
            "divergent_entries": divergent,
            "exported_entries": exported,
            "export": (exported > 0).then_some(file),
        }));
    }
    if exported > 0 {
        output::line(format_args!(
            "{exported} entries that only this region has are in {}",
            file.display()
        ))?;
    }
    if divergent > exported {
        output::line(format_args!(
            "{} entries that only this region had are lost: the log does not have them any more",
            divergent - exported
        ))?;
    }
    if divergent == 0 {
        output::line("nothing was acknowledged here that the other region does not have")?;
    }
    output::line(format_args!(
        "{} becomes a mirror of {}: its nodes must run with --mirror-of; `heliofs mirror status` shows how it loads",
        target.volume, successor.url
    ))
}

/// Writes down the entries from where the histories part to the last one, with the paths that inodes have at its end; how many.
async fn export(
    target: &crate::connect::Target,
    parting: Position,
    last: Position,
    file: &Path,
    force: bool,
) -> Outcome<u64> {
    let doing = || format!("write the divergent tail to {}", file.display());
    let out = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .while_(doing())?;
    let mut out = BufWriter::new(out);
    let after = Position {
        epoch: last.epoch,
        seq: parting.seq - 1,
    };
    let mut exported = 0;
    let unfinished = |failure: Failure| {
        // One that is there is never overwritten: try again.
        std::fs::remove_file(file).while_(doing())?;
        Err(failure.hint(
            "the volume is read-only now and nothing was dropped; try again, or --force without what can't be had",
        ))
    };
    // Before the records are dropped: afterwards nobody knows what an inode was.
    let mut paths = match target.session(true).await {
        Ok(session) => Some(TailPaths::new(session)),
        Err(failure) => {
            tracing::warn!(why = failure.message(), "inodes of the tail are not named");
            None
        }
    };
    let mut reader = target.cluster.follow(&target.volume, after, false);
    loop {
        match reader.next().await {
            Ok(Some(ChangelogItem::Entry(entry))) => {
                let mut line = changelog::as_json(&entry);
                // The names are for people: the tail is what it is without them.
                if let Some(named) = &mut paths
                    && let Err(error) = named.put(&mut line).await
                {
                    tracing::warn!(%error, "inodes from here on are not named");
                    paths = None;
                }
                serde_json::to_writer(&mut out, &line).map_err(Failure::new)?;
                out.write_all(b"\n").while_(doing())?;
                exported += 1;
            }
            Ok(Some(ChangelogItem::Beat(_))) => {}
            Ok(None) => break,
            Err(ClusterError::Trimmed(why)) if force => {
                tracing::warn!(why, "the log no longer has all of the tail");
                break;
            }
            Err(error) => return unfinished(error.into()),
        }
    }
    if let Some(paths) = paths {
        paths.end().await;
    }
    let out: File = out
        .into_inner()
        .map_err(|error| Failure::new(error.error()))?;
    out.sync_all().while_(doing())?;
    Ok(exported)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histories_part_where_the_next_epoch_begins() {
        let volume = |epoch, epochs: &[(u32, u64)]| v1::Volume {
            position: Some(v1::Position { epoch, seq: 50 }),
            epochs: epochs
                .iter()
                .map(|(epoch, seq)| v1::Position {
                    epoch: *epoch,
                    seq: *seq,
                })
                .collect(),
            ..v1::Volume::default()
        };
        let old = volume(1, &[(0, 1), (1, 30)]);
        let parts = parting(&old, &volume(3, &[(0, 1), (1, 30), (2, 45), (3, 90)])).unwrap();
        assert_eq!((parts.epoch.0, parts.seq), (2, 45));
        assert!(parting(&old, &volume(1, &[(0, 1), (1, 30)])).is_none());
    }
}

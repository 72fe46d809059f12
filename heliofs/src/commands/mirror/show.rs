//! How mirrors are.

use std::time::Duration;

use clap::Args;
use heliofs_proto::v1::{
    CheckCounts, CheckState, CopyState, MirrorOf, MirrorState, MirrorStatus, Rot,
};
use meta_client::{Cluster, MetaUrl};
use serde_json::{Value, json};

use super::At;
use super::slots::show_position;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::units::{show_millis, show_size};

/// How often `--watch` looks.
const EVERY: Duration = Duration::from_secs(1);

/// How long nodes are waited for that are asked what is wrong with their records.
const NODES_WITHIN: Duration = Duration::from_secs(2);

/// Which, and how long.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    at: At,
    /// Goes on, once a second.
    #[arg(short, long)]
    watch: bool,
    /// Lists what the mirror's own bucket lacks of a volume.
    #[arg(long, conflicts_with = "watch")]
    missing: bool,
}

pub(super) fn as_json(status: &MirrorStatus) -> serde_json::Value {
    let mirror = status.mirror.clone().unwrap_or_default();
    let state = match mirror.state() {
        MirrorState::Loading => "loading",
        MirrorState::Following => "following",
        MirrorState::Stopped => "stopped",
        MirrorState::Unspecified => "promoted",
    };
    json!({
        "volume": status.name,
        "source": mirror.source,
        "source_volume": mirror.volume,
        "slot": mirror.slot,
        "state": state,
        "doing": status.doing,
        "detail": if status.detail.is_empty() { &mirror.reason } else { &status.detail },
        "applied": show_position(status.applied),
        "complete": show_position(status.complete),
        "source_head": status.source_head.map(|head| show_position(Some(head))),
        "lag_entries": status.lag_entries,
        "lag_ms": status.lag_ms,
        "contact_ms": status.contact_ms,
        "peer": status.peer,
        "replayed": status.replayed,
        "proposals": status.proposals,
        "loaded_records": status.loaded_records,
        "stream_bytes": status.stream_bytes,
        "stream_plain_bytes": status.stream_plain_bytes,
        "digests_agreed": status.digests_agreed,
        "diverged_at": status.diverged.map(|at| show_position(Some(at))),
        "loads": mirror.load,
        "loading": mirror.loading != 0,
        "bucket": status.copies.as_ref().map(copies_json),
        "copies_leased": status.copies_leased,
        "copiers": status.copiers,
    })
}

fn copies_json(copies: &CopyState) -> serde_json::Value {
    json!({
        "walking": copies.walk != 0,
        "pending_segments": copies.pending_segments,
        "pending_bytes": copies.pending_bytes,
        "quarantined_segments": copies.quarantined_segments,
        "copied_segments": copies.copied_segments,
        "copied_bytes": copies.copied_bytes,
        "pulled_bytes": copies.pulled_bytes,
        "lost_segments": copies.lost_segments,
        "check": copies.check.as_ref().map(check_json),
    })
}

fn check_json(check: &CheckState) -> serde_json::Value {
    let counts = |counts: &CheckCounts| {
        json!({
            "segments": counts.segments,
            "own_lost": counts.own_lost,
            "source_lost": counts.source_lost,
            "source_healed": counts.source_healed,
            "reason": counts.reason,
        })
    };
    json!({
        "checks": check.checks,
        "under_way": check.under_way,
        "percent": check.groups * 100 / 256,
        "ended": check.ended / 1_000_000_000,
        "now": check.now.as_ref().filter(|_| check.under_way).map(counts),
        "last": check.last.as_ref().map(counts),
    })
}

/// One line about the own bucket.
fn show_copies(status: &MirrorStatus) -> String {
    let Some(copies) = &status.copies else {
        return "shared".to_owned();
    };
    let mut parts = Vec::new();
    if copies.walk != 0 {
        parts.push("looking".to_owned());
    }
    if copies.pending_segments > 0 {
        parts.push(format!(
            "{} to copy ({}), {} under way",
            copies.pending_segments,
            show_size(copies.pending_bytes),
            status.copies_leased
        ));
    }
    if copies.quarantined_segments > 0 {
        parts.push(format!("{} can't be had", copies.quarantined_segments));
    }
    if parts.is_empty() {
        parts.push("has all".to_owned());
    }
    if copies.pulled_bytes > 0 {
        parts.push(format!("{} pulled", show_size(copies.pulled_bytes)));
    }
    parts.join(", ")
}

/// What the bucket lacks, one line each.
async fn missing(at: At, json: bool) -> Outcome {
    let target = at.access.target(&at.url, at.name.as_deref())?;
    let mut after = 0;
    let mut all = Vec::new();
    loop {
        let (missing, next) = target
            .cluster
            .list_missing(&target.volume, false, after)
            .await?;
        for listed in missing {
            let what = listed.missing.unwrap_or_default();
            if json {
                all.push(json!({
                    "segment": listed.segment,
                    "length": what.length,
                    "since": show_position(what.since),
                    "quarantine": (!what.quarantine.is_empty()).then_some(what.quarantine),
                }));
                continue;
            }
            let why = match what.quarantine.as_str() {
                "" => "to be copied",
                why => why,
            };
            output::line(format_args!(
                "{:016x}  {:>10}  since {}  {why}",
                listed.segment,
                show_size(what.length),
                show_position(what.since)
            ))?;
        }
        match next {
            Some(next) => after = next,
            None => break,
        }
    }
    match json {
        true => output::print_json(&all.into()),
        false => Ok(()),
    }
}

pub(super) async fn run(options: Options, json: bool) -> Outcome {
    if options.missing {
        return missing(options.at, json).await;
    }
    let connected = options.at.access.connect(&options.at.url)?;
    let volume = options.at.name.or(connected.url.volume);
    loop {
        let (mirrors, rotten) = tokio::join!(
            connected.cluster.mirror_status(volume.as_deref()),
            rotten(&connected.cluster),
        );
        let mirrors = mirrors?;
        match (json, options.watch) {
            (true, true) => output::line(all_json(&mirrors, &rotten))?,
            (true, false) => output::print_json(&all_json(&mirrors, &rotten))?,
            (false, false) if mirrors.is_empty() => {
                let slots = connected.cluster.list_slots(volume.as_deref()).await?;
                if slots.is_empty() {
                    return output::line(
                        "this cluster mirrors nothing yet, and nobody mirrors it: see `heliofs meta --mirror-of`",
                    );
                }
                output::line("this cluster mirrors nothing; who mirrors its volumes:")?;
                return super::slots::print(&slots);
            }
            (false, _) => print(&mirrors, &rotten)?,
        }
        if !options.watch {
            let of = |it: &Rotten| mirrors.iter().any(|status| status.volume == it.rot.volume);
            return match rotten.iter().find(|it| of(it)) {
                None => Ok(()),
                Some(it) => Err(Failure::damaged(it)
                    .hint("replace the node (`heliofs raft remove`, `add`), or load the volume anew with `heliofs mirror reload`")),
            };
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Where the volume is followed, or written; nothing when it is written here.
fn from(mirror: &MirrorOf) -> String {
    match mirror.source.parse::<MetaUrl>() {
        Ok(url) if url.volume.is_none() => format!("{}/{}", mirror.source, mirror.volume),
        _ => mirror.source.clone(),
    }
}

/// What a node found wrong with its own records.
struct Rotten {
    node: u64,
    peer: String,
    rot: Rot,
}

impl std::fmt::Display for Rotten {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { node, peer, rot } = self;
        let at = show_position(rot.position);
        write!(f, "node {node} at {peer}: ")?;
        match rot.records_min {
            0 => write!(
                f,
                "its digest of {} is another than the leader's or the source's at {at}",
                rot.name
            ),
            1 => write!(
                f,
                "a record of {} is not what was applied up to {at}, or more",
                rot.name
            ),
            some => write!(
                f,
                "{some} records of {} are not what was applied up to {at}, or more",
                rot.name
            ),
        }
    }
}

/// What the nodes know to be wrong with their records. Of one that does not answer it is said that nothing is known.
async fn rotten(cluster: &Cluster) -> Vec<Rotten> {
    let all = cluster.status_all_within(NODES_WITHIN).await;
    all.into_iter()
        .filter_map(|(peer, status)| match status {
            Ok(status) => Some((peer, status)),
            Err(error) => {
                tracing::warn!(peer, %error, "whether this node's records are sound is not known");
                None
            }
        })
        .flat_map(|(peer, status)| {
            let node = status.node;
            let found = move |rot| Rotten {
                node,
                peer: peer.clone(),
                rot,
            };
            status.rot.into_iter().map(found)
        })
        .collect()
}

fn all_json(mirrors: &[MirrorStatus], rotten: &[Rotten]) -> Value {
    let shown = mirrors.iter().map(|status| {
        let mut shown = as_json(status);
        let here = rotten.iter().filter(|it| it.rot.volume == status.volume);
        shown["rotten"] = here
            .map(|it| {
                json!({
                    "node": it.node,
                    "address": it.peer,
                    "position": show_position(it.rot.position),
                    "records_min": it.rot.records_min,
                })
            })
            .collect();
        shown
    });
    shown.collect()
}

fn print(mirrors: &[MirrorStatus], rotten: &[Rotten]) -> Outcome {
    let mut table = output::table([
        "volume", "doing", "applied", "behind", "lag", "complete", "bucket", "heard", "from",
        "detail",
    ]);
    for status in mirrors {
        let mirror = status.mirror.clone().unwrap_or_default();
        table.add_row([
            status.name.clone(),
            status.doing.clone(),
            show_position(status.applied),
            status.lag_entries.to_string(),
            show_millis(status.lag_ms),
            show_position(status.complete),
            show_copies(status),
            heard(status.contact_ms),
            from(&mirror),
            status.detail.clone(),
        ]);
    }
    output::print_table(&table)?;
    for status in mirrors {
        for it in rotten.iter().filter(|it| it.rot.volume == status.volume) {
            output::line(it)?;
        }
    }
    Ok(())
}

fn heard(contact_ms: Option<u64>) -> String {
    contact_ms.map_or_else(
        || "not yet".to_owned(),
        |ms| format!("{} ago", show_millis(ms)),
    )
}

/// Loads a volume anew.
pub(super) async fn reload(at: At, json: bool) -> Outcome {
    let target = at.access.target(&at.url, at.name.as_deref())?;
    target.cluster.mirror_reload(&target.volume).await?;
    if json {
        return output::print_json(&json!({ "volume": target.volume, "state": "loading" }));
    }
    output::line(format_args!(
        "{} is loaded anew when the source sends a copy; until then what it has is served",
        target.volume
    ))
}

//! How mirrors are.

use std::time::Duration;

use clap::Args;
use heliofs_proto::v1::{MirrorState, MirrorStatus};
use serde_json::json;

use super::At;
use super::slots::show_position;
use crate::failure::Outcome;
use crate::output;
use crate::units::show_millis;

/// How often `--watch` looks.
const EVERY: Duration = Duration::from_secs(1);

/// Which, and how long.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    at: At,
    /// Goes on, once a second.
    #[arg(short, long)]
    watch: bool,
}

pub(super) fn as_json(status: &MirrorStatus) -> serde_json::Value {
    let mirror = status.mirror.clone().unwrap_or_default();
    let state = match mirror.state() {
        MirrorState::Loading => "loading",
        MirrorState::Following => "following",
        MirrorState::Stopped => "stopped",
        MirrorState::Unspecified => "unknown",
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
        "digests_agreed": status.digests_agreed,
        "loads": mirror.load,
    })
}

pub(super) async fn run(options: Options, json: bool) -> Outcome {
    let connected = options.at.access.connect(&options.at.url)?;
    let volume = options.at.name.or(connected.url.volume);
    loop {
        let mirrors = connected.cluster.mirror_status(volume.as_deref()).await?;
        match (json, options.watch) {
            (true, true) => {
                output::line(serde_json::Value::from_iter(mirrors.iter().map(as_json)))?
            }
            (true, false) => output::print_json(&mirrors.iter().map(as_json).collect())?,
            (false, _) => print(&mirrors)?,
        }
        if !options.watch {
            return Ok(());
        }
        tokio::time::sleep(EVERY).await;
    }
}

fn print(mirrors: &[MirrorStatus]) -> Outcome {
    if mirrors.is_empty() {
        return output::line("this cluster mirrors nothing: see `heliofs meta --mirror-of`");
    }
    let mut table = output::table([
        "volume", "doing", "applied", "behind", "lag", "heard", "from", "detail",
    ]);
    for status in mirrors {
        let mirror = status.mirror.clone().unwrap_or_default();
        table.add_row([
            status.name.clone(),
            status.doing.clone(),
            show_position(status.applied),
            status.lag_entries.to_string(),
            show_millis(status.lag_ms),
            format!("{} ago", show_millis(status.contact_ms)),
            format!("{}/{}", mirror.source, mirror.volume),
            status.detail.clone(),
        ]);
    }
    output::print_table(&table)
}

/// Loads a volume anew.
pub(super) async fn reload(at: At, json: bool) -> Outcome {
    let target = at.access.target(&at.url, at.name.as_deref())?;
    target.cluster.mirror_reload(&target.volume).await?;
    if json {
        return output::print_json(&json!({ "volume": target.volume, "state": "loading" }));
    }
    output::line(format_args!("{} is loaded anew", target.volume))
}

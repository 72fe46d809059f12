//! Slots at the source.

use clap::Args;
use heliofs_proto::ids::Position;
use heliofs_proto::v1::{self, change_slot_request::Change};
use meta_client::MetaUrl;
use serde_json::{Value, json};

use super::At;
use crate::cli::Access;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::units::{self, show_millis, show_size};

/// A slot to make.
#[derive(Args)]
pub(crate) struct Create {
    #[command(flatten)]
    named: Named,
    /// Log that is kept for the mirror at most; past it, it loads the volume anew [default: 1G].
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE")]
    log_cap: Option<u64>,
}

/// A slot.
#[derive(Args)]
pub(crate) struct Named {
    #[command(flatten)]
    access: Access,
    /// META-URL VOLUME MIRROR, or helio://HOST[,HOST…]/VOLUME MIRROR, of the source.
    #[arg(value_name = "META-URL")]
    first: String,
    /// As above; the MIRROR when two are given.
    #[arg(value_name = "VOLUME")]
    second: String,
    /// As above.
    #[arg(value_name = "MIRROR")]
    third: Option<String>,
}

impl Named {
    /// The cluster, the volume and the mirror.
    fn resolve(self) -> Outcome<(meta_client::Cluster, String, String)> {
        let url = self.first;
        let (volume, mirror) = match self.third {
            Some(third) => (Some(self.second), third),
            None => (None, self.second),
        };
        if volume.is_none() && url.parse::<MetaUrl>().is_ok_and(|url| url.volume.is_none()) {
            return Err(
                Failure::usage("volume, mirror, or both are not named").hint(format!(
                    "write META-URL VOLUME MIRROR; `heliofs mirror list {url}` shows them"
                )),
            );
        }
        let target = self.access.target(&url, volume.as_deref())?;
        Ok((target.cluster, target.volume, mirror))
    }
}

/// `epoch:seq`
pub(super) fn show_position(position: Option<v1::Position>) -> String {
    position.map(Position::from).unwrap_or_default().to_string()
}

fn slot_json(volume: &str, slot: &v1::MirrorSlot) -> Value {
    let state = match (slot.invalid.is_empty(), slot.paused) {
        (false, _) => "invalid",
        (true, true) => "paused",
        (true, false) => "kept",
    };
    json!({
        "volume": volume,
        "mirror": slot.name,
        "state": state,
        "why": slot.invalid,
        "applied": show_position(slot.applied),
        "complete": show_position(slot.complete),
        "oldest": show_position(slot.oldest),
        "log_cap_bytes": slot.log_bytes_max,
        "cluster": format!("{:08x}", slot.cluster_id),
    })
}

pub(super) async fn create(options: Create, json: bool) -> Outcome {
    let log_bytes_max = options.log_cap.unwrap_or(0);
    let (cluster, volume, mirror) = options.named.resolve()?;
    let ask = v1::CreateSlotRequest {
        volume: volume.clone(),
        mirror,
        log_bytes_max,
        ..Default::default()
    };
    let slot = cluster.create_slot(ask).await?;
    if json {
        return output::print_json(&slot_json(&volume, &slot));
    }
    output::line(format_args!(
        "log and segments of {volume} are kept for {} from {} on, up to {} of log",
        slot.name,
        show_position(slot.oldest),
        show_size(slot.log_bytes_max)
    ))
}

pub(super) async fn list(at: At, json: bool) -> Outcome {
    let connected = at.access.connect(&at.url)?;
    let volume = at.name.or(connected.url.volume);
    let slots = connected.cluster.list_slots(volume.as_deref()).await?;
    if json {
        let slots = slots.iter().map(|status| {
            let slot = status.slot.clone().unwrap_or_default();
            let mut value = slot_json(&status.volume, &slot);
            value["head"] = json!(show_position(status.head));
            value["log_bytes"] = json!(status.log_bytes);
            value["silent_ms"] = json!(status.silent_ms);
            value
        });
        return output::print_json(&slots.collect());
    }
    print(&slots)
}

/// A table of slots.
pub(super) fn print(slots: &[v1::SlotStatus]) -> Outcome {
    if slots.is_empty() {
        return output::line("no mirrors: `heliofs meta --mirror-of` starts one");
    }
    let mut table = output::table([
        "volume", "mirror", "state", "applied", "behind", "log kept", "cap", "heard",
    ]);
    for status in slots {
        let slot = status.slot.clone().unwrap_or_default();
        let seq = |position: Option<v1::Position>| position.map_or(0, |position| position.seq);
        let behind = seq(status.head).saturating_sub(seq(slot.applied));
        let value = slot_json(&status.volume, &slot);
        table.add_row([
            status.volume.clone(),
            slot.name,
            value["state"].as_str().unwrap_or_default().to_owned(),
            show_position(slot.applied),
            behind.to_string(),
            show_size(status.log_bytes),
            show_size(slot.log_bytes_max),
            format!("{} ago", show_millis(status.silent_ms)),
        ]);
    }
    output::print_table(&table)
}

async fn change(named: Named, change: Change, done: &str, json: bool) -> Outcome {
    let (cluster, volume, mirror) = named.resolve()?;
    let ask = v1::ChangeSlotRequest {
        volume: volume.clone(),
        mirror: mirror.clone(),
        change: Some(change),
    };
    cluster.change_slot(ask).await?;
    if json {
        return output::print_json(&json!({ "volume": volume, "mirror": mirror, "state": done }));
    }
    output::line(format_args!("the slot {mirror} of {volume} is {done}"))
}

pub(super) async fn pause(named: Named, pause: bool, json: bool) -> Outcome {
    let done = if pause { "paused" } else { "resumed" };
    change(named, Change::Pause(pause), done, json).await
}

pub(super) async fn delete(named: Named, json: bool) -> Outcome {
    change(named, Change::Delete(true), "deleted", json).await
}

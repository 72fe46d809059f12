//! `heliofs status`: nodes, volumes and mounts of a cluster.

use clap::Args;
use heliofs_proto::v1::{SessionStatus, Volume};
use serde_json::json;

use super::raft;
use crate::cli::Access;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::units::{show_limit, show_millis, show_size};

/// Which cluster, and perhaps which volume of it.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]
    #[arg(value_name = "META-URL")]
    url: String,
    /// Only this volume.
    name: Option<String>,
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    let connected = options.access.connect(&options.url)?;
    let wanted = options.name.or(connected.url.volume.clone());
    let answers = raft::ask_all(&connected.cluster).await?;
    let formed = answers.iter().any(|(_, answer)| {
        answer
            .as_ref()
            .is_ok_and(|status| status.role != "unformed")
    });
    let mut volumes = if formed {
        connected.cluster.list_volumes().await?
    } else {
        Vec::new()
    };
    if let Some(name) = &wanted {
        volumes.retain(|volume| volume.name == *name);
        if volumes.is_empty() {
            return Err(Failure::no_volume(name));
        }
    }
    let sessions: Vec<_> = raft::leader(&answers)
        .map(|leader| leader.sessions.clone())
        .unwrap_or_default()
        .into_iter()
        .filter(|session| wanted.is_none() || volumes.iter().any(|v| v.id == session.volume))
        .collect();
    if json {
        let mut value = raft::as_json(&answers);
        value["volumes"] = volumes.iter().map(volume_json).collect();
        value["mounts"] = sessions
            .iter()
            .map(|session| session_json(session, &volumes))
            .collect();
        return output::print_json(&value);
    }
    raft::print_nodes(&answers)?;
    output::line("")?;
    print_volumes(&volumes)?;
    if !sessions.is_empty() {
        output::line("")?;
        print_sessions(&sessions, &volumes)?;
    }
    Ok(())
}

/// A volume without its secrets.
pub(crate) fn volume_json(volume: &Volume) -> serde_json::Value {
    let storage = volume.storage.clone().unwrap_or_default();
    let settings = volume.settings.unwrap_or_default();
    let position = volume.position.unwrap_or_default();
    json!({
        "id": volume.id,
        "name": volume.name,
        "uuid": storage.uuid,
        "storage": storage.storage,
        "bucket": storage.bucket,
        "region": storage.region,
        "segment_bytes": storage.segment_bytes,
        "compress": if storage.compress.is_empty() { "none" } else { storage.compress.as_str() },
        "encrypt": storage.encryption.as_ref().map_or("none", |encryption| encryption.cipher.as_str()),
        "position": format!("{}:{}", position.epoch, position.seq),
        "used_bytes": volume.used_bytes,
        "used_inodes": volume.used_inodes,
        "segments": volume.segments,
        "deletions_waiting": volume.deletions_waiting,
        "capacity_bytes": settings.capacity_bytes_max,
        "inodes": settings.inodes_max,
        "trash_days": settings.trash_days,
        "deletion_grace_seconds": settings.deletion_grace_seconds,
        "core_level": settings.core_level,
        "fence_store": volume.fence.as_ref().map(|fence| fence.store.clone().unwrap_or_default().bucket),
        "read_only_because": (!volume.fenced.is_empty()).then_some(&volume.fenced),
    })
}

fn session_json(session: &SessionStatus, volumes: &[Volume]) -> serde_json::Value {
    json!({
        "session": format!("{:016x}", session.session),
        "volume": volume_name(session.volume, volumes),
        "host": session.host,
        "mount_point": session.mount_point,
        "pid": session.pid,
        "build": session.build,
        "opens": session.opens,
        "locks": session.locks,
        "silent_ms": session.silent_ms,
        "connected": session.connected,
    })
}

fn volume_name(id: u32, volumes: &[Volume]) -> String {
    volumes
        .iter()
        .find(|volume| volume.id == id)
        .map_or_else(|| id.to_string(), |volume| volume.name.clone())
}

fn print_volumes(volumes: &[Volume]) -> Outcome {
    if volumes.is_empty() {
        return output::line("no volumes yet: `heliofs format` creates one");
    }
    let mut table = output::table([
        "volume",
        "used",
        "capacity",
        "inodes",
        "inode limit",
        "segments",
        "position",
        "bucket",
    ]);
    for volume in volumes {
        let settings = volume.settings.unwrap_or_default();
        let position = volume.position.unwrap_or_default();
        table.add_row([
            volume.name.clone(),
            show_size(volume.used_bytes),
            show_limit(settings.capacity_bytes_max, show_size),
            volume.used_inodes.to_string(),
            show_limit(settings.inodes_max, |n| n.to_string()),
            volume.segments.to_string(),
            format!("{}:{}", position.epoch, position.seq),
            volume
                .storage
                .as_ref()
                .map(|storage| storage.bucket.clone())
                .unwrap_or_default(),
        ]);
    }
    output::print_table(&table)
}

fn print_sessions(sessions: &[SessionStatus], volumes: &[Volume]) -> Outcome {
    let mut table = output::table([
        "mounted at",
        "volume",
        "host",
        "pid",
        "opens",
        "locks",
        "heard",
        "build",
    ]);
    for session in sessions {
        let heard = match session.connected {
            true => format!("{} ago", show_millis(session.silent_ms)),
            false => format!("lost {} ago", show_millis(session.silent_ms)),
        };
        let place = if session.mount_point.is_empty() {
            "(command)"
        } else {
            &session.mount_point
        };
        table.add_row([
            place.to_owned(),
            volume_name(session.volume, volumes),
            session.host.clone(),
            session.pid.to_string(),
            session.opens.to_string(),
            session.locks.to_string(),
            heard,
            session.build.clone(),
        ]);
    }
    output::print_table(&table)
}

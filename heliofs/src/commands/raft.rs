//! `heliofs raft …`: the nodes of a metadata cluster.

use clap::{Args, Subcommand};
use heliofs_proto::ids::{NodeId, Position};
use heliofs_proto::v1::StatusResponse;
use meta_client::Cluster;
use meta_client::url::parse_peer;
use serde_json::json;

use crate::cli::Access;
use crate::connect::Target;
use crate::failure::{Failure, Outcome};
use crate::{output, progress, units};

/// What to do with the cluster's nodes.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Shows every node as it sees itself.
    Status(Place),
    /// Forms a cluster of the one node at META-URL; further nodes are added.
    Init(Place),
    /// Adds a running node: it catches up, then votes.
    Add {
        #[command(flatten)]
        place: Place,
        /// The id it was started with.
        id: u64,
        /// host:port where the others and the clients reach it.
        address: String,
    },
    /// Removes a node for good: its id can't be used again.
    Remove {
        #[command(flatten)]
        place: Place,
        /// The node's id.
        id: u64,
    },
    /// Makes another node the leader.
    Transfer {
        #[command(flatten)]
        place: Place,
        /// The node that shall lead.
        id: u64,
    },
    /// Takes a snapshot on the first node of META-URL that answers.
    Snapshot(Place),
    /// Flushes and compacts the state of every node, one after the other.
    Compact(Place),
    /// Compares the digests of a volume's records on all nodes.
    Digest {
        #[command(flatten)]
        access: Access,
        /// helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]
        #[arg(value_name = "META-URL")]
        url: String,
        /// The volume.
        name: Option<String>,
    },
}

/// Which cluster.
#[derive(Args)]
pub(crate) struct Place {
    #[command(flatten)]
    access: Access,
    /// helio://HOST[:PORT][,HOST[:PORT]…]
    #[arg(value_name = "META-URL")]
    url: String,
}

impl Place {
    fn cluster(&self) -> Outcome<Cluster> {
        Ok(self.access.connect(&self.url)?.cluster)
    }
}

pub(crate) async fn run(command: Command, json: bool) -> Outcome {
    let done = |text: String, value: serde_json::Value| {
        if json {
            output::print_json(&value)
        } else {
            output::line(text)
        }
    };
    match command {
        Command::Status(place) => status(&place.cluster()?, json).await,
        Command::Init(place) => {
            let connected = place.access.connect(&place.url)?;
            if connected.url.peers.len() != 1 {
                return Err(Failure::usage("a cluster is formed of one node").hint(format!(
                    "heliofs raft init helio://{}, then heliofs raft add for each of the others",
                    connected.url.peers[0]
                )));
            }
            let id = connected.cluster.init_cluster().await?;
            done(
                format!(
                    "formed cluster {id:08x} of the node at {}",
                    connected.url.peers[0]
                ),
                json!({ "cluster_id": id }),
            )
        }
        Command::Add { place, id, address } => {
            let address = parse_peer(&address)?;
            let bar = progress::bar("entries", 0, false, json);
            let told = |behind: u64| {
                let most = bar.length().unwrap_or(0).max(behind);
                bar.set_length(most);
                bar.set_position(most - behind);
            };
            let cluster = place.cluster()?;
            cluster.add_node(NodeId(id), &address, told).await?;
            bar.finish_and_clear();
            done(
                format!("added node {id} at {address}"),
                json!({ "node": id, "address": address }),
            )
        }
        Command::Remove { place, id } => {
            place.cluster()?.remove_node(NodeId(id)).await?;
            done(
                format!("removed node {id}; its id must not be used again"),
                json!({ "node": id }),
            )
        }
        Command::Transfer { place, id } => {
            place.cluster()?.transfer(NodeId(id)).await?;
            done(format!("node {id} leads"), json!({ "leader": id }))
        }
        Command::Digest { access, url, name } => {
            digest(&access.target(&url, name.as_deref())?, json).await
        }
        Command::Compact(place) => compact(&place.cluster()?, json).await,
        Command::Snapshot(place) => {
            let index = place.cluster()?.snapshot().await?;
            done(
                format!("snapshot taken at log index {index}"),
                json!({ "applied_index": index }),
            )
        }
    }
}

/// One node after the other, so that the others serve at full speed meanwhile. A node that can't be asked is an error, but the
/// rest is compacted first.
async fn compact(cluster: &Cluster, json: bool) -> Outcome {
    let mut rows = Vec::new();
    let mut failed = None;
    for (address, answer) in ask_all(cluster).await? {
        let compacted = match answer {
            Ok(_) => cluster.compact(&address).await,
            Err(error) => Err(error),
        };
        match compacted {
            Ok(done) => {
                if !json {
                    let size = units::show_size(done.state_bytes);
                    output::line(format!("node {} at {address}: {size}", done.node))?;
                }
                rows.push(json!({ "node": done.node, "address": address, "state_bytes": done.state_bytes }));
            }
            Err(error) => {
                rows.push(json!({ "address": address, "error": error.to_string() }));
                failed = Some(error);
            }
        }
    }
    if json {
        output::print_json(&rows.into())?;
    }
    failed.map_or(Ok(()), |error| Err(error.into()))
}

/// A node as it answered, or why it did not.
pub(crate) type NodeAnswer = (String, Result<StatusResponse, meta_client::ClusterError>);

/// The node that leads: of those that say so, the one of the highest term (an older one has not noticed yet).
pub(crate) fn leader(answers: &[NodeAnswer]) -> Option<&StatusResponse> {
    answers
        .iter()
        .filter_map(|(_, answer)| answer.as_ref().ok())
        .filter(|status| status.role == "leader")
        .max_by_key(|status| status.term)
}

/// Asks every node. An error when none answers.
pub(crate) async fn ask_all(cluster: &Cluster) -> Outcome<Vec<NodeAnswer>> {
    let mut answers = cluster.status_all().await;
    if let Some((_, Err(error))) = answers.iter().find(|(_, answer)| answer.is_err())
        && answers.iter().all(|(_, answer)| answer.is_err())
    {
        return Err(error.clone().into());
    }
    // A node is listed under the address that the cluster knows, once.
    answers.sort_by_key(|(address, answer)| {
        (
            answer.as_ref().map_or(u64::MAX, |status| status.node),
            address.clone(),
        )
    });
    answers.dedup_by(|(_, a), (_, b)| match (a, b) {
        (Ok(a), Ok(b)) => a.node == b.node,
        _ => false,
    });
    Ok(answers)
}

async fn status(cluster: &Cluster, json: bool) -> Outcome {
    let answers = ask_all(cluster).await?;
    if json {
        output::print_json(&as_json(&answers))
    } else {
        print_nodes(&answers)
    }
}

/// For `--json`, of `raft status` and of `status`.
pub(crate) fn as_json(answers: &[NodeAnswer]) -> serde_json::Value {
    let leader = leader(answers);
    let nodes: Vec<_> = answers
        .iter()
        .map(|(address, answer)| match answer {
            Ok(status) => {
                let seen =
                    leader.and_then(|leader| leader.nodes.iter().find(|n| n.node == status.node));
                json!({
                    "node": status.node,
                    "address": address,
                    "role": status.role,
                    "voter": seen.map(|seen| seen.voter),
                    "term": status.term,
                    "last_log_index": status.last_log_index,
                    "committed_index": status.committed_index,
                    "applied_index": status.applied_index,
                    "flushed_index": status.flushed_index,
                    "snapshot_index": status.snapshot_index,
                    "purged_index": status.purged_index,
                    "matched_index": seen.map(|seen| seen.matched_index),
                    "heard_ms_ago": seen.and_then(|seen| seen.heard_ms_ago),
                    "store_uuid": units::hex(&status.store_uuid),
                    "build": status.build,
                    "fatal": (!status.fatal.is_empty()).then_some(&status.fatal),
                })
            }
            Err(error) => json!({ "address": address, "error": error.to_string() }),
        })
        .collect();
    json!({
        "cluster_id": answers.iter().filter_map(|(_, a)| a.as_ref().ok()).map(|s| s.cluster_id).find(|id| *id != 0),
        "leader": leader.map(|leader| leader.node),
        "leader_address": leader.map(|leader| &leader.leader_address),
        "term": leader.map(|leader| leader.term),
        "nodes": nodes,
    })
}

/// The table of nodes.
pub(crate) fn print_nodes(answers: &[NodeAnswer]) -> Outcome {
    let leader = leader(answers);
    let mut table = output::table([
        "node", "address", "role", "term", "log", "applied", "snapshot", "behind", "heard",
    ]);
    for (address, answer) in answers {
        match answer {
            Ok(status) => {
                let seen =
                    leader.and_then(|leader| leader.nodes.iter().find(|n| n.node == status.node));
                let role = match (&status.fatal, seen) {
                    (fatal, _) if !fatal.is_empty() => format!("stopped: {fatal}"),
                    (_, Some(seen)) if !seen.voter => "learner".to_owned(),
                    _ => status.role.clone(),
                };
                let behind = leader.map_or("-".to_owned(), |leader| {
                    leader
                        .committed_index
                        .saturating_sub(status.applied_index)
                        .to_string()
                });
                let heard = match seen.and_then(|seen| seen.heard_ms_ago) {
                    // The leader does not write to itself.
                    Some(millis) if status.role != "leader" => {
                        format!("{} ago", units::show_millis(millis))
                    }
                    _ => "-".to_owned(),
                };
                table.add_row([
                    status.node.to_string(),
                    address.clone(),
                    role,
                    status.term.to_string(),
                    status.last_log_index.to_string(),
                    status.applied_index.to_string(),
                    status.snapshot_index.to_string(),
                    behind,
                    heard,
                ]);
            }
            Err(error) => {
                let known =
                    leader.and_then(|leader| leader.nodes.iter().find(|n| n.address == *address));
                let id = known.map_or("?".to_owned(), |node| node.node.to_string());
                let why = match error {
                    meta_client::ClusterError::NoNode { detail, .. } => detail.clone(),
                    other => other.to_string(),
                };
                table.add_row([id, address.clone(), format!("unreachable: {why}")]);
            }
        }
    }
    output::print_table(&table)?;
    if leader.is_none() {
        let unformed = answers.iter().any(|(_, answer)| {
            answer
                .as_ref()
                .is_ok_and(|status| status.role == "unformed")
        });
        output::line(if unformed {
            "no cluster yet: `heliofs raft init` forms one, `heliofs raft add` adds nodes"
        } else {
            "no leader"
        })?;
    }
    Ok(())
}

/// Nodes are asked one after the other, so that their positions differ while somebody writes; digests can be compared only at
/// equal positions. Each node also compares with the leader's beats by itself: `diverged` is what it found.
async fn digest(target: &Target, json: bool) -> Outcome {
    let volume = super::config::find(&target.cluster, &target.volume).await?;
    let answers = ask_all(&target.cluster).await?;
    let mut rows = Vec::new();
    for (address, answer) in &answers {
        let node = answer.as_ref().ok().map(|status| status.node);
        let digest = match answer {
            Ok(_) => target.cluster.digest_of(address, volume.id.into()).await,
            Err(error) => Err(error.clone()),
        };
        rows.push(match digest {
            Ok(found) => json!({
                "node": node,
                "address": address,
                "position": Position::from(found.position.unwrap_or_default()).to_string(),
                "digest": units::hex(&found.digest),
                "diverged": found.diverged.map(|position| Position::from(position).to_string()),
            }),
            Err(error) => json!({ "node": node, "address": address, "error": error.to_string() }),
        });
    }
    if json {
        return output::print_json(&rows.into());
    }
    let mut table = output::table(["node", "address", "position", "digest", "diverged at"]);
    for row in &rows {
        let text = |key: &str| match &row[key] {
            serde_json::Value::Null => "-".to_owned(),
            serde_json::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let digest = if row["error"].is_null() {
            text("digest")
        } else {
            text("error")
        };
        table.add_row([
            text("node"),
            text("address"),
            text("position"),
            digest,
            text("diverged"),
        ]);
    }
    output::print_table(&table)
}

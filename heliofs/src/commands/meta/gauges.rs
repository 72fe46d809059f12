//! What a metadata node shows at `/metrics`, in Prometheus' text format, from what it says about itself.

use std::fmt::Write;

use heliofs_proto::v1::StatusResponse;

/// One line a gauge, each with its meaning.
pub(super) fn text(status: &StatusResponse) -> String {
    let flag = |yes: bool| u64::from(yes);
    let serves = matches!(status.role.as_str(), "leader" | "follower" | "learner");
    let gauges = [
        (
            "heliofs_meta_up",
            "1 unless the node has stopped itself.",
            flag(status.fatal.is_empty()),
        ),
        (
            "heliofs_meta_leader",
            "1 on the node that leads.",
            flag(status.role == "leader"),
        ),
        (
            "heliofs_meta_in_quorum",
            "1 while it leads or follows.",
            flag(serves),
        ),
        ("heliofs_meta_term_number", "Raft's term.", status.term),
        (
            "heliofs_meta_log_last_index",
            "Last entry of the log.",
            status.last_log_index,
        ),
        (
            "heliofs_meta_committed_index",
            "Last entry known to be committed.",
            status.committed_index,
        ),
        (
            "heliofs_meta_applied_index",
            "Last entry applied to the state.",
            status.applied_index,
        ),
        (
            "heliofs_meta_flushed_index",
            "Last entry that the state holds on disk.",
            status.flushed_index,
        ),
        (
            "heliofs_meta_snapshot_index",
            "Last entry in the latest snapshot.",
            status.snapshot_index,
        ),
        (
            "heliofs_meta_purged_index",
            "Last entry trimmed from the log.",
            status.purged_index,
        ),
        (
            "heliofs_meta_nodes_count",
            "Nodes in the membership.",
            status.nodes.len() as u64,
        ),
        (
            "heliofs_meta_sessions_count",
            "Sessions that this node serves.",
            status.sessions.len() as u64,
        ),
    ];
    let mut text = String::new();
    for (name, help, value) in gauges {
        writeln!(
            text,
            "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}"
        )
        .expect("writing to a string does not fail");
    }
    text
}

/// Why it can't serve, if it can't: stopped, in no cluster, or without a leader.
pub(super) fn unready(status: &StatusResponse) -> Option<String> {
    if !status.fatal.is_empty() {
        return Some(status.fatal.clone());
    }
    match status.role.as_str() {
        "unformed" => Some("it belongs to no cluster yet".to_owned()),
        "leader" | "learner" => None,
        _ if status.leader == 0 => Some("no leader".to_owned()),
        _ => None,
    }
}

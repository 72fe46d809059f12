//! Counters count what there is, and ids that were given out lie below the next ones.

use heliofs_proto::v1;
use prost::Message;

use super::{Found, Records};
use crate::limits::CORE_LEVEL_MAX;

/// The counter of an id without its epoch.
const COUNTER_MASK: u64 = (1 << 48) - 1;

pub(super) fn check(records: &Records, found: &mut Found) {
    let counters = &records.counters;
    let inodes = records.inodes_count;
    let first = records.part.is_first();
    found.expect(!first || counters.used_inodes == inodes, || {
        format!(
            "{} inodes count as used, there are {inodes}",
            counters.used_inodes
        )
    });
    let segments = records.segments_count;
    found.expect(!first || counters.segments == segments, || {
        format!(
            "{} segments are counted, there are {segments}",
            counters.segments
        )
    });
    for ino in records.inodes.keys() {
        found.expect(ino.0 & COUNTER_MASK < counters.next_ino, || {
            format!("inode {ino} was never given out")
        });
    }
    for id in records.segments.keys() {
        found.expect(id.0 & COUNTER_MASK < counters.next_segment, || {
            format!("segment {id} was never given out")
        });
    }
    for (intent, _) in records.remove_trees.keys() {
        found.expect(*intent < counters.next_intent, || {
            format!("intent {intent} was never given out")
        });
    }
    if !first {
        return;
    }
    for session in records.sessions.keys() {
        found.expect(
            session.0 & u64::from(u32::MAX) < counters.next_session,
            || format!("session {session} was never given out"),
        );
    }
    for ((session, sequence), reply) in &records.replies {
        found.expect(v1::Reply::decode(&reply[..]).is_ok(), || {
            format!("reply {session}/{sequence} can't be decoded")
        });
        // Replies of an ended session may wait for the rest of its end.
        let acknowledged = records
            .sessions
            .get(session)
            .map_or(0, |s| s.acknowledged_below);
        found.expect(*sequence >= acknowledged, || {
            format!("reply {session}/{sequence} is kept below {acknowledged}")
        });
    }
    let Some(head) = &records.head else {
        found.expect(false, || "there is no head".to_owned());
        return;
    };
    let level = records
        .settings
        .as_ref()
        .map_or(0, |settings| settings.0.core_level);
    found.expect((1..=CORE_LEVEL_MAX).contains(&level), || {
        format!("core level {level}")
    });
    let ordered = head.epochs.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1);
    let last = head.epochs.last().map(|(epoch, _)| *epoch);
    found.expect(ordered && last == Some(head.position.epoch), || {
        format!("epochs {:?} do not end at {}", head.epochs, head.position)
    });
}

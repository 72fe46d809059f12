//! Removes hours of the trash that are over. Each is detached at once and taken apart in steps, as any tree.

use std::time::{Duration, Instant};

use bytes::Bytes;
use heliofs_proto::ids::{Ino, UnixNanos};
use heliofs_proto::v1::{self, FsError, command::Op};
use meta_core::query::{self, QueryError};
use meta_core::{Corruption, trash};

use super::{Step, rest};
use crate::proposer::clock;
use crate::sessions::hub::VolumeSessions;
use crate::sessions::{self, Context};

/// An hour is over once an hour.
const LOOK_EVERY: Duration = Duration::from_secs(300);

/// Hours in one page of the listing; the oldest were made first and stand first.
const HOURS: u32 = 1000;

/// Runs until dropped.
pub(super) async fn run(ctx: Context) {
    loop {
        for volume in ctx.hub.volumes() {
            let hours = expired(&ctx, &volume).unwrap_or_else(|corruption| {
                ctx.damage.report("the trash", &corruption);
                Vec::new()
            });
            for (parent, name) in hours {
                let began = Instant::now();
                let shown = String::from_utf8_lossy(&name).into_owned();
                let op = Op::RemoveTree(v1::RemoveTree {
                    parent: parent.0,
                    name,
                });
                let step = match sessions::propose(&ctx, &volume, op).await {
                    Ok(reply) if reply.error() == FsError::None => {
                        tracing::info!(volume = %volume.id, hour = shown, "removed from the trash");
                        Step::More
                    }
                    // Removed by hand meanwhile, or no leader any more: looked at again next time.
                    Ok(_) | Err(_) => Step::Failed,
                };
                rest(step, began).await;
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The trash and the hours of it that are over.
fn expired(ctx: &Context, volume: &VolumeSessions) -> Result<Vec<(Ino, Bytes)>, Corruption> {
    if ctx.state.is_mirror(volume.id) {
        // The source's removals are replayed.
        return Ok(Vec::new());
    }
    ctx.state.snapshot_view(|view| {
        let days = query::settings(view, volume.id)?.map_or(0, |settings| settings.trash_days);
        if days == 0 {
            return Ok(Vec::new());
        }
        let listed = query::lookup(view, volume.id, Ino::ROOT, trash::NAME).and_then(|attr| {
            let ino = Ino(attr.ino);
            query::read_dir(view, volume.id, ino, 0, HOURS, false).map(|page| (ino, page))
        });
        match listed {
            Ok((ino, page)) => {
                let names = page.entries.into_iter().map(|entry| entry.name);
                let last = last_expired(days);
                Ok(names
                    .filter(|name| is_hour(name) && **name <= *last.as_bytes())
                    .map(|name| (ino, name))
                    .collect())
            }
            // No trash yet.
            Err(QueryError::Refused(_)) => Ok(Vec::new()),
            Err(QueryError::Corrupt(corruption)) => Err(corruption),
        }
    })
}

/// The name of the latest hour that is over: its last minute is `days` ago. By this node's clock, as the stamps are a leader's.
fn last_expired(days: u32) -> String {
    let kept = Duration::from_secs((u64::from(days) * 24 + 1) * 3600);
    let then = clock().saturating_sub(kept);
    trash::hour_name(UnixNanos(i64::try_from(then.as_nanos()).unwrap_or(0)))
}

/// `YYYY-MM-DD-HH`: what else lies in the trash is somebody's own. Order of these names is order of time.
fn is_hour(name: &[u8]) -> bool {
    name.len() == 13
        && name.iter().enumerate().all(|(at, byte)| match at {
            4 | 7 | 10 => *byte == b'-',
            _ => byte.is_ascii_digit(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hours_expire_and_only_after_their_days() {
        assert!(is_hour(b"2026-11-22-07"));
        for other in [&b"2026-11-22"[..], b"2026-11-22-7x", b"2026_11-22-07", b""] {
            assert!(!is_hour(other));
        }
        let now = clock();
        let hour = |hours_ago: u64| {
            let then = now - Duration::from_secs(hours_ago * 3600);
            trash::hour_name(UnixNanos(then.as_nanos() as i64))
        };
        let last = last_expired(2);
        assert!(hour(48) > last && hour(50) <= last);
    }
}

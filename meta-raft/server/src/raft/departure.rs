//! Notices that the leader's process is gone, and stands for election at once instead of after the timers.
//!
//! A process that dies takes its connections and its listening socket with it, and the machine it ran on says so: appends break
//! off, and connecting is refused. A follower that sees both gives up the promise it made to that leader (not to vote for
//! another while the leader's lease runs) and asks whether the others would vote for it; they grant that only if they gave up
//! theirs. A leader that one follower can't reach thus stays. A machine or network that is gone says nothing: that is what the
//! timers are for.
//!
//! Promises to a leader are what lease reads rely on, so nothing is given up where those are configured. Everything else relies
//! on majorities alone.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::raft::TransferLeaderRequest;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::types::{Raft, Vote};
use crate::leadership::{Leadership, Peer};

/// A dying process closes its connections and its listener one after the other: asked this often, at this distance.
const PROBES: u32 = 5;
const PROBE_EVERY: Duration = Duration::from_millis(20);
/// A refusal comes at once; silence is no refusal.
const PROBE_WAIT: Duration = Duration::from_millis(200);

/// Followers stand one after the other, in the order of their ids, so that they do not split the votes: each gives the one
/// before it so much time to be elected. A vote is two round trips and a sync.
const TURN: Duration = Duration::from_millis(40);
/// The others need a moment to notice, too.
const NOTICE: Duration = Duration::from_millis(10);
/// Turns of everybody before it is left to the timers.
const ROUNDS: u32 = 10;

/// Told by whoever serves appends: one of the streams has ended.
#[derive(Clone, Default)]
pub struct AppendEnds {
    notify: Arc<Notify>,
}

impl AppendEnds {
    /// Tells when it is dropped.
    pub fn guard(&self) -> EndGuard {
        EndGuard {
            notify: self.notify.clone(),
        }
    }
}

/// Belongs to one append stream.
pub struct EndGuard {
    notify: Arc<Notify>,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.notify.notify_one();
    }
}

/// The task.
pub struct DepartureWatch {
    /// openraft.
    pub raft: Raft,
    /// Who leads.
    pub leadership: watch::Receiver<Leadership>,
    /// When to look.
    pub ends: AppendEnds,
}

impl DepartureWatch {
    /// Until cancelled.
    pub async fn run(self, cancel: CancellationToken) {
        tokio::select! {
            () = cancel.cancelled() => {}
            () = self.watch() => {}
        }
    }

    async fn watch(self) {
        loop {
            self.ends.notify.notified().await;
            let now = self.leadership.borrow().clone();
            if let Leadership::Follower {
                leader: Some(leader),
                ..
            } = &now
                && is_gone(leader).await
            {
                tracing::info!(leader = %leader.id, "the leader's process is gone");
                self.stand(&now, leader).await;
            }
        }
    }

    /// Stands until somebody leads, or for [`ROUNDS`] rounds.
    async fn stand(&self, before: &Leadership, gone: &Peer) {
        let mut leadership = self.leadership.clone();
        let changed = leadership.wait_for(|now| now != before);
        tokio::pin!(changed);
        for _ in 0..ROUNDS {
            let Some((vote, turn, turns)) = self.turn(gone) else {
                return;
            };
            // As if the leader had handed over to itself: the lease of exactly this vote ends, nothing else happens.
            let release = TransferLeaderRequest::new(vote, gone.id.0, None);
            if let Err(fatal) = self.raft.handle_transfer_leader(release).await {
                tracing::warn!(%fatal, "can't give up the leader's lease");
                return;
            }
            let mine = NOTICE + TURN * turn;
            if timeout(mine, &mut changed).await.is_ok() {
                return;
            }
            if let Err(fatal) = self.raft.trigger().elect(true).await {
                tracing::warn!(%fatal, "can't stand for election");
                return;
            }
            let rest = (NOTICE + TURN * turns).saturating_sub(mine);
            if timeout(rest, &mut changed).await.is_ok() {
                return;
            }
        }
        tracing::info!("nobody was elected at once; the timers decide");
    }

    /// The vote that the leader rules by, which turn is this node's, from 0, and how many there are; `None` if the vote moved
    /// on or this node has none.
    fn turn(&self, gone: &Peer) -> Option<(Vote, u32, u32)> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let vote = metrics.vote;
        if !vote.committed || vote.leader_id.voted_for != gone.id.0 {
            return None;
        }
        let voters: BTreeSet<u64> = metrics
            .membership_config
            .voter_ids()
            .filter(|id| *id != gone.id.0)
            .collect();
        let turn = voters.iter().position(|id| *id == metrics.id)?;
        let count = |n: usize| u32::try_from(n).ok();
        Some((vote, count(turn)?, count(voters.len())?))
    }
}

/// Whether nothing listens at the leader's address any more, as its machine itself says.
async fn is_gone(leader: &Peer) -> bool {
    for _ in 0..PROBES {
        match timeout(PROBE_WAIT, TcpStream::connect(&leader.address)).await {
            Ok(Err(error)) => return error.kind() == std::io::ErrorKind::ConnectionRefused,
            // It listens still, or nobody answers.
            Ok(Ok(_)) | Err(_) => sleep(PROBE_EVERY).await,
        }
    }
    false
}

//! Linearizable reads: all callers that wait share one quorum round, and only rounds that began after a caller arrived
//! count for it.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use openraft::errors::{LinearizableReadError, RaftError};
use openraft::{LinearizerOption, ReadPolicy};
use parking_lot::Mutex;
use prometheus::{Histogram, IntCounter};
use tokio::sync::oneshot;

use crate::config::ReadMode;
use crate::leadership::Peer;
use crate::proposer::forwarded;
use crate::raft::network::Peers;
use crate::raft::types::{LogId, Raft};

/// Why a linearizable read is not possible here and now. A read may always be retried.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    /// No leader is known, or this node lost the lead: ask `leader`, or anybody.
    #[error("no leader can be reached from here")]
    NoLeader {
        /// Who leads, when known.
        leader: Option<Peer>,
    },
    /// A quorum did not answer in time.
    #[error("a quorum did not confirm the leader in time")]
    NoQuorum,
    /// The node has stopped.
    #[error("the node has stopped: {0}")]
    Fatal(String),
}

type Waiter = oneshot::Sender<Result<(), ReadError>>;

#[derive(Default)]
struct Rounds {
    running: bool,
    /// Callers that arrived while a round was running: it began too early for them.
    waiting: Vec<Waiter>,
}

/// Rounds that were run, for the metrics.
pub(crate) struct RoundCounts {
    /// How long each took, failed ones included.
    pub(crate) seconds: Histogram,
    /// Rounds that failed: no leader, no quorum.
    pub(crate) failed: IntCounter,
}

struct Shared {
    raft: Raft,
    counts: OnceLock<RoundCounts>,
    peers: Peers,
    mode: ReadMode,
    round_max: Duration,
    rounds: Mutex<Rounds>,
}

/// Makes reads of this node's state linearizable; cheap to clone.
#[derive(Clone)]
pub struct ReadGate {
    shared: Arc<Shared>,
}

impl ReadGate {
    /// `round_max` bounds one round.
    pub fn new(raft: Raft, peers: Peers, mode: ReadMode, round_max: Duration) -> Self {
        Self {
            shared: Arc::new(Shared {
                raft,
                counts: OnceLock::new(),
                peers,
                mode,
                round_max,
                rounds: Mutex::default(),
            }),
        }
    }

    /// Counts rounds from now on; the first call wins.
    pub(crate) fn count(&self, counts: RoundCounts) {
        // A second one would be a second set of metrics for one node.
        self.shared.counts.set(counts).ok();
    }

    /// Returns once this node's state holds everything that was acknowledged anywhere before the call. Works on the leader
    /// and, by asking it, on followers.
    pub async fn linearizable(&self) -> Result<(), ReadError> {
        if self.shared.mode == ReadMode::LeaderLease
            && let Some(outcome) = self.shared.by_lease().await
        {
            return outcome;
        }
        let (waiter, answer) = oneshot::channel();
        let begin = {
            let mut rounds = self.shared.rounds.lock();
            rounds.waiting.push(waiter);
            !std::mem::replace(&mut rounds.running, true)
        };
        if begin {
            // A task of its own: the round must go on for the others when this caller gives up.
            let shared = self.shared.clone();
            tokio::spawn(async move { shared.run_rounds().await });
        }
        answer
            .await
            .unwrap_or_else(|_| Err(ReadError::Fatal("the runtime is shutting down".to_owned())))
    }

    /// The log index up to which a read that arrived before this call must wait; only the leader knows.
    pub(crate) async fn read_index(&self) -> Result<LogId, ReadError> {
        self.shared.confirm(ReadPolicy::ReadIndex).await
    }
}

impl Shared {
    async fn run_rounds(&self) {
        loop {
            let waiting = {
                let mut rounds = self.rounds.lock();
                if rounds.waiting.is_empty() {
                    rounds.running = false;
                    return;
                }
                std::mem::take(&mut rounds.waiting)
            };
            let began = Instant::now();
            let outcome = self.round().await;
            if let Some(counts) = self.counts.get() {
                counts.seconds.observe(began.elapsed().as_secs_f64());
                counts.failed.inc_by(u64::from(outcome.is_err()));
            }
            for waiter in waiting {
                // A caller that gave up is no error.
                waiter.send(outcome.clone()).ok();
            }
        }
    }

    async fn round(&self) -> Result<(), ReadError> {
        let log_id = match self.confirm(ReadPolicy::ReadIndex).await {
            Err(ReadError::NoLeader {
                leader: Some(leader),
            }) => self.peers.read_index(leader.id.0, self.round_max).await?,
            other => other?,
        };
        self.applied(log_id.index).await
    }

    /// `None`: there is no lease to rely on, a round is needed.
    async fn by_lease(&self) -> Option<Result<(), ReadError>> {
        match self.confirm(ReadPolicy::LeaseRead).await {
            Ok(log_id) => Some(self.applied(log_id.index).await),
            Err(ReadError::Fatal(why)) => Some(Err(ReadError::Fatal(why))),
            Err(ReadError::NoLeader { .. } | ReadError::NoQuorum) => None,
        }
    }

    async fn confirm(&self, policy: ReadPolicy) -> Result<LogId, ReadError> {
        let option = match policy {
            ReadPolicy::ReadIndex => {
                LinearizerOption::from(ReadPolicy::ReadIndex).with_wait_timeout(self.round_max)
            }
            ReadPolicy::LeaseRead => LinearizerOption::from(ReadPolicy::LeaseRead),
        };
        match self.raft.get_read_log_id(option).await {
            Ok((read, _)) => Ok(*read.log_id()),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => {
                Err(ReadError::NoLeader {
                    leader: forwarded(forward),
                })
            }
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => {
                Err(ReadError::NoQuorum)
            }
            Err(RaftError::Fatal(fatal)) => Err(ReadError::Fatal(fatal.to_string())),
        }
    }

    async fn applied(&self, index: u64) -> Result<(), ReadError> {
        let wait = self.raft.wait(Some(self.round_max));
        match wait.applied_index_at_least(Some(index), "read").await {
            Ok(_) => Ok(()),
            Err(openraft::metrics::WaitError::Timeout(..)) => Err(ReadError::NoQuorum),
            Err(openraft::metrics::WaitError::ShuttingDown) => {
                Err(ReadError::Fatal("shutting down".to_owned()))
            }
        }
    }
}

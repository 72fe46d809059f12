//! Group commit: what many sessions propose while an append is under way becomes one log entry and one fsync.
//!
//! There is no batching task: the caller that finds room in the pipeline sends what waits, its own item among it, and a
//! completed entry sends what gathered meanwhile. An idle proposer thus adds no delay and no task switch.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use heliofs_proto::ids::{ClusterId, NodeId, VolumeId};
use heliofs_proto::v1;
use openraft::errors::{ClientWriteError, ForwardToLeader};
use openraft::raft::ClientWriteResult;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::oneshot;

use crate::leadership::Peer;
use crate::raft::types::{LogData, OnComplete, Raft, TypeConfig};

/// Items of one entry: bounds what one apply group must hold.
const BATCH_ITEMS_MAX: usize = 1_000;
/// Bytes of one entry, unless a single item is larger.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Entries proposed and not yet applied. Two would do on one node; with the third the leader's fsync, the followers' and the
/// apply overlap.
const ENTRIES_IN_FLIGHT_MAX: usize = 3;

/// What an applied item answered.
#[derive(Clone, Debug, PartialEq)]
#[allow(
    clippy::large_enum_variant,
    reason = "nearly all are replies; a box each would cost more than the few others waste"
)]
pub enum Proposed {
    /// A command's reply; a refusal is a reply too.
    Reply(v1::Reply),
    /// A beat's or a local command's outcome.
    Local(LocalReply),
}

/// What a local command or a beat answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalReply {
    /// Done; nothing to tell.
    Done,
    /// The volume was created.
    VolumeCreated(VolumeId),
    /// The name is taken.
    VolumeExists(VolumeId),
    /// No volume has this id.
    NoSuchVolume,
    /// The cluster has this id, from this command or from an earlier one.
    Cluster(ClusterId),
    /// A deletion queue lost this many entries.
    DeletionsDone(u64),
    /// The command makes no sense; says why.
    Invalid(String),
}

/// Why an item has no reply.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ProposeError {
    /// This node does not lead: nothing was logged.
    #[error("this node is not the leader")]
    NotLeader {
        /// Who leads, when known.
        leader: Option<Peer>,
    },
    /// Leadership was lost or the node is stopping while the item was in flight: it may or may not take effect.
    #[error("the outcome is unknown: leadership was lost while the command was in flight")]
    Unknown,
    /// The node has stopped.
    #[error("the node has stopped: {0}")]
    Fatal(String),
}

type Waiter = oneshot::Sender<Result<Proposed, ProposeError>>;

struct Waiting {
    item: v1::LogItem,
    bytes: usize,
    waiter: Waiter,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    in_flight: usize,
    /// The last stamp given: stamps of one proposer never go back.
    time: i64,
}

struct Shared {
    raft: Raft,
    queue: Mutex<Queue>,
    runtime: tokio::runtime::Handle,
}

/// Proposes items for the log; cheap to clone.
#[derive(Clone)]
pub struct Proposer {
    shared: Arc<Shared>,
}

impl Proposer {
    /// Must be called within the runtime that is to carry the proposals.
    pub fn new(raft: Raft) -> Self {
        Self {
            shared: Arc::new(Shared {
                raft,
                queue: Mutex::default(),
                runtime: tokio::runtime::Handle::current(),
            }),
        }
    }

    /// Logs, commits and applies `item`, stamped with this node's time, and returns what it answered.
    ///
    /// The item is in the log's order before the first await is over; dropping the future does not take it back.
    pub async fn propose(&self, item: v1::log_item::Item) -> Result<Proposed, ProposeError> {
        let (waiter, reply) = oneshot::channel();
        let batch = {
            let mut queue = self.shared.queue.lock();
            queue.time = queue.time.max(now());
            let item = v1::LogItem {
                time: queue.time,
                item: Some(item),
            };
            let bytes = item.encoded_len();
            queue.waiting.push_back(Waiting {
                item,
                bytes,
                waiter,
            });
            queue.next_batch()
        };
        if let Some(batch) = batch {
            self.shared.start(batch);
        }
        // Dropped without an answer: openraft stopped.
        reply.await.unwrap_or(Err(ProposeError::Unknown))
    }
}

/// Nanoseconds since 1970 by this node's clock.
fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

impl Queue {
    /// What to send now, if there is something and the pipeline has room.
    fn next_batch(&mut self) -> Option<Vec<Waiting>> {
        if self.waiting.is_empty() || self.in_flight >= ENTRIES_IN_FLIGHT_MAX {
            return None;
        }
        let mut bytes = 0;
        let mut items = 0;
        for waiting in self.waiting.iter().take(BATCH_ITEMS_MAX) {
            bytes += waiting.bytes;
            if items > 0 && bytes > BATCH_BYTES_MAX {
                break;
            }
            items += 1;
        }
        self.in_flight += 1;
        Some(self.waiting.drain(..items).collect())
    }
}

impl Shared {
    /// Sends without depending on the caller, who may be dropped at any await: others' items are in the batch.
    fn start(self: &Arc<Self>, batch: Vec<Waiting>) {
        let shared = self.clone();
        let mut sending = Box::pin(async move { shared.send(batch).await });
        // Nearly always there is room, and it is sent without a task switch.
        if sending.as_mut().now_or_never().is_none() {
            self.runtime.spawn(sending);
        }
    }

    async fn send(self: &Arc<Self>, batch: Vec<Waiting>) {
        let (items, waiters): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .map(|waiting| (waiting.item, waiting.waiter))
            .unzip();
        let mut in_flight = InFlight {
            waiters,
            shared: Arc::downgrade(self),
        };
        let data = LogData::new(v1::LogBatch { items });
        let responder = OnComplete::new(move |outcome: ClientWriteResult<TypeConfig>| {
            in_flight.answer(outcome)
        });
        if let Err(fatal) = self.raft.client_write_ff(data, Some(responder)).await {
            // The responder went with the message; its waiters see `Unknown`.
            tracing::warn!(%fatal, "a proposal found raft stopped");
        }
    }
}

/// An entry on its way. Dropped, answered or not, it makes room for the next.
struct InFlight {
    waiters: Vec<Waiter>,
    shared: Weak<Shared>,
}

impl InFlight {
    fn answer(&mut self, outcome: ClientWriteResult<TypeConfig>) {
        let waiters = std::mem::take(&mut self.waiters);
        match outcome {
            Ok(response) => {
                debug_assert_eq!(response.data.0.len(), waiters.len());
                for (waiter, reply) in waiters.into_iter().zip(response.data.0) {
                    // A caller that no longer waits is no error.
                    waiter.send(Ok(reply)).ok();
                }
            }
            Err(error) => {
                let error = refusal(error);
                for waiter in waiters {
                    waiter.send(Err(error.clone())).ok();
                }
            }
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let batch = {
            let mut queue = shared.queue.lock();
            queue.in_flight -= 1;
            queue.next_batch()
        };
        if let Some(batch) = batch {
            // Encoding and sending must not hold up the apply task, on which this usually runs.
            let runtime = shared.runtime.clone();
            runtime.spawn(async move { shared.send(batch).await });
        }
    }
}

/// Whom a refusal of openraft names.
pub(crate) fn forwarded(forward: ForwardToLeader<TypeConfig>) -> Option<Peer> {
    let id = forward.leader_id?;
    let node = forward.leader_node?;
    Some(Peer {
        id: NodeId(id),
        address: node.address,
    })
}

fn refusal(error: ClientWriteError<TypeConfig>) -> ProposeError {
    match error {
        ClientWriteError::ForwardToLeader(forward) => ProposeError::NotLeader {
            leader: forwarded(forward),
        },
        // The entry was appended here and replaced by another leader's log; elsewhere it may have been committed.
        ClientWriteError::LogEntryDiscarded(_) => ProposeError::Unknown,
        error @ (ClientWriteError::ChangeMembershipError(_)
        | ClientWriteError::PreconditionFailed(_)) => ProposeError::Fatal(error.to_string()),
    }
}

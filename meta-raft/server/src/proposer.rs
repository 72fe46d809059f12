//! Group commit: what many sessions propose while an append is under way becomes one log entry and one fsync.
//!
//! There is no batching task: the caller that finds room in the pipeline sends what waits, its own item among it, and a
//! completed entry sends what gathered meanwhile. An idle proposer thus adds no delay and no task switch.
//!
//! Callers that were just answered are likely to come back at once, as programs do that make one file after the other. The next
//! entry waits a moment for them ([`Gather`]): four programs then share one round of the cluster instead of paying for three.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use heliofs_proto::ids::{ClusterId, NodeId, Position, VolumeId};
use heliofs_proto::v1;
use openraft::errors::{ClientWriteError, ForwardToLeader};
use openraft::raft::ClientWriteResult;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::oneshot;

use crate::fence::{Fences, Shut};
use crate::leadership::Peer;
use crate::raft::types::{LogData, OnComplete, Raft, TypeConfig};

/// Items of one entry: bounds what one apply group must hold.
const BATCH_ITEMS_MAX: usize = 1_000;
/// Bytes of one entry, unless a single item is larger.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Entries proposed and not yet applied. Two would do on one node; with the third the leader's fsync, the followers' and the
/// apply overlap.
const ENTRIES_IN_FLIGHT_MAX: usize = 3;

/// How long an entry waits for callers to come back. Their way is an answer, a system call or two, and a request.
const GATHER_MAX: Duration = Duration::from_micros(800);
/// Most entries that don't wait after waiting was in vain.
const GATHER_SKIPS_MAX: u32 = 64;

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
#[derive(Clone, Debug, PartialEq)]
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
    /// A mirror's volume is at this position.
    Replayed(Position),
    /// The number of the load that begins.
    Load(u64),
    /// A slot as it is now; `true`: it was made by this command.
    Slot(Box<v1::MirrorSlot>, bool),
    /// No slot has this name.
    NoSuchSlot,
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
    /// The volume's fence store does not say that it may be changed here: nothing was logged.
    #[error("{0}")]
    Fenced(String),
}

type Waiter = oneshot::Sender<Result<Proposed, ProposeError>>;

struct Waiting {
    item: v1::LogItem,
    bytes: usize,
    waiter: Waiter,
}

/// Whether waiting for callers to come back pays, and the wait that is under way.
#[derive(Default)]
struct Gather {
    /// Callers that the next entry is held back for; 0: it is not.
    expected: usize,
    /// How many of them must be there for the wait to be worth its time: half of those that were missing.
    worth: usize,
    /// Counts the waits, so that the end of an earlier one is not taken for this one's.
    wait: u64,
    /// Entries that are not held back any more, since the last wait was in vain.
    skips: u32,
    /// How many that were, last time.
    penalty: u32,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    in_flight: usize,
    gather: Gather,
    /// The last stamp given: stamps of one proposer never go back.
    time: i64,
}

struct Shared {
    raft: Raft,
    fences: Fences,
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
    pub fn new(raft: Raft, fences: Fences) -> Self {
        Self {
            shared: Arc::new(Shared {
                raft,
                fences,
                queue: Mutex::default(),
                runtime: tokio::runtime::Handle::current(),
            }),
        }
    }

    /// Logs, commits and applies `item`, stamped with this node's time, and returns what it answered.
    ///
    /// The item is in the log's order before the first await is over, unless its volume has a fence store; dropping the future
    /// does not take it back. Of such a volume nothing is logged, and nothing answered, but while its marker is this cluster's.
    pub async fn propose(&self, item: v1::log_item::Item) -> Result<Proposed, ProposeError> {
        let v1::log_item::Item::Command(command) = &item else {
            return self.log(item).await;
        };
        let volume = VolumeId(command.volume);
        let fences = &self.shared.fences;
        let admitted = fences.admit(volume).await;
        let fenced = admitted.map_err(|Shut(why)| ProposeError::Fenced(why))?;
        let applied = self.log(item).await?;
        // It may have got a fence store, or lost the marker, meanwhile.
        if (fenced || fences.is_fenced(volume)) && !fences.may_answer(volume).await {
            return Err(ProposeError::Unknown);
        }
        Ok(applied)
    }

    /// What fence stores say.
    pub fn fences(&self) -> &Fences {
        &self.shared.fences
    }

    async fn log(&self, item: v1::log_item::Item) -> Result<Proposed, ProposeError> {
        let (waiter, reply) = oneshot::channel();
        let batch = {
            let mut queue = self.shared.queue.lock();
            queue.time = queue.time.max(now());
            let item = v1::LogItem {
                time: queue.time,
                level: crate::levels::of(&item),
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

/// When this process's clock began to run faster, and how much.
static FASTER: OnceLock<(Duration, u32)> = OnceLock::new();

/// Makes stamps of this process advance `speed` times as fast as time, from now on: what waits for hours (deletion grace, trash)
/// can be tested in minutes. For tests. The first call counts.
pub fn hasten_stamps(speed: u32) {
    FASTER.get_or_init(|| (since_1970(), speed));
}

fn since_1970() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// Time since 1970 by this node's clock.
pub(crate) fn clock() -> Duration {
    let now = since_1970();
    match FASTER.get() {
        Some((begin, speed)) => *begin + now.saturating_sub(*begin) * *speed,
        None => now,
    }
}

/// Nanoseconds since 1970 by this node's clock.
pub(crate) fn now() -> i64 {
    i64::try_from(clock().as_nanos()).unwrap_or(i64::MAX)
}

impl Queue {
    /// What to send now, if there is something and the pipeline has room.
    fn next_batch(&mut self) -> Option<Vec<Waiting>> {
        let gather = &mut self.gather;
        // One at a time while callers come back together; else what comes in between would wait for a whole round.
        let room = if gather.skips == 0 {
            1
        } else {
            ENTRIES_IN_FLIGHT_MAX
        };
        if self.waiting.is_empty() || self.in_flight >= room || self.waiting.len() < gather.expected
        {
            return None;
        }
        if std::mem::take(&mut gather.expected) > 0 {
            gather.penalty = 0;
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

    /// An entry is done and `callers` of sessions were answered. `Some`: the next one waits for them; call
    /// [`Queue::waited`] with this after [`GATHER_MAX`].
    fn completed(&mut self, callers: usize) -> Option<u64> {
        self.in_flight -= 1;
        let gather = &mut self.gather;
        if gather.skips > 0 {
            gather.skips -= 1;
            return None;
        }
        let here = self.waiting.len();
        let expected = (callers + here).min(BATCH_ITEMS_MAX);
        if self.in_flight > 0 || expected < 2 || here >= expected {
            return None;
        }
        gather.expected = expected;
        gather.worth = here + (expected - here).div_ceil(2);
        gather.wait += 1;
        Some(gather.wait)
    }

    /// A wait is over. If most are still missing it was in vain, and is tried less often.
    fn waited(&mut self, wait: u64) {
        let gather = &mut self.gather;
        if gather.wait != wait || gather.expected == 0 {
            return;
        }
        gather.expected = 0;
        if self.waiting.len() < gather.worth {
            gather.penalty = (2 * gather.penalty).clamp(1, GATHER_SKIPS_MAX);
            gather.skips = gather.penalty;
        }
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
        let from_session = |item: &&v1::LogItem| matches!(&item.item, Some(v1::log_item::Item::Command(command)) if command.session != 0);
        let mut in_flight = InFlight {
            callers: items.iter().filter(from_session).count(),
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
    /// How many of them are sessions'; drivers rest between their steps.
    callers: usize,
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
        let (wait, batch) = {
            let mut queue = shared.queue.lock();
            (queue.completed(self.callers), queue.next_batch())
        };
        if let Some(wait) = wait {
            let shared = shared.clone();
            let runtime = shared.runtime.clone();
            runtime.spawn(async move {
                tokio::time::sleep(GATHER_MAX).await;
                let batch = {
                    let mut queue = shared.queue.lock();
                    queue.waited(wait);
                    queue.next_batch()
                };
                if let Some(batch) = batch {
                    shared.start(batch);
                }
            });
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    impl Queue {
        /// Callers come; their answers are nobody's matter here.
        fn come(&mut self, callers: usize) -> Option<usize> {
            for _ in 0..callers {
                let (waiter, _) = oneshot::channel();
                self.waiting.push_back(Waiting {
                    item: v1::LogItem::default(),
                    bytes: 1,
                    waiter,
                });
            }
            self.next_batch().map(|batch| batch.len())
        }
    }

    #[test]
    fn callers_that_come_back_share_an_entry() {
        let mut queue = Queue::default();
        assert_eq!(queue.come(1), Some(1));
        assert_eq!(queue.come(3), None, "an entry is under way");
        let wait = queue.completed(1).expect("three wait, one was answered");
        assert_eq!(queue.come(0), None, "the fourth is likely to come back");
        assert_eq!(queue.come(1), Some(4));
        queue.waited(wait);
        assert_eq!(queue.gather.penalty, 0, "it was not in vain");
        assert!(queue.completed(4).is_some());
        assert_eq!(queue.come(4), Some(4));
    }

    #[test]
    fn a_caller_alone_never_waits() {
        let mut queue = Queue::default();
        for _ in 0..3 {
            assert_eq!(queue.come(1), Some(1));
            assert_eq!(queue.completed(1), None);
        }
    }

    #[test]
    fn waiting_in_vain_is_tried_less_and_less_often() {
        let mut queue = Queue::default();
        let mut rounds = Vec::new();
        for round in 0..40 {
            assert!(queue.come(3).is_some(), "round {round}");
            if let Some(wait) = queue.completed(3) {
                rounds.push(round);
                assert_eq!(queue.come(1), None);
                queue.waited(wait);
                assert_eq!(queue.come(0), Some(1), "nobody waits for longer");
                assert_eq!(queue.completed(0), None);
            }
        }
        // The entry of one that came counts as one that did not wait.
        assert_eq!(rounds, [0, 1, 3, 7, 15, 31]);
        // Meanwhile entries overlap.
        assert_eq!(queue.come(1), Some(1));
        assert_eq!(queue.come(1), Some(1));
    }

    #[test]
    fn a_wait_that_brought_most_of_them_was_not_in_vain() {
        let mut queue = Queue::default();
        assert_eq!(queue.come(4), Some(4));
        let wait = queue.completed(4).expect("four were answered");
        assert_eq!(queue.come(2), None);
        queue.waited(wait);
        assert_eq!(queue.come(0), Some(2));
        assert!(queue.completed(2).is_some());
    }
}

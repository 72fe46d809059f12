//! What openraft is instantiated with.

use std::fmt;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use heliofs_proto::v1;
use openraft::raft::responder::Responder;
use prost::Message;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::proposer::Proposed;

/// openraft's types as this server uses them: standard Raft, one leader per term.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TypeConfig;

// By hand because `declare_raft_types!` can't name a responder of one's own.
impl openraft::RaftTypeConfig for TypeConfig {
    type D = LogData;
    type R = BatchReply;
    type NodeId = u64;
    type Node = RaftPeer;
    type Term = u64;
    type LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>;
    type Vote = openraft::Vote<Self::LeaderId>;
    type Payload = openraft::EntryPayload<LogData, u64, RaftPeer>;
    type Entry =
        openraft::Entry<<Self::LeaderId as openraft::vote::RaftLeaderId>::Committed, Self::Payload>;
    type AsyncRuntime = openraft::TokioRuntime;
    type Responder<T>
        = OnComplete<T>
    where
        T: openraft::OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: openraft::OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

/// openraft's handle.
pub type Raft = openraft::Raft<TypeConfig, crate::raft::machine::StateMachine>;
/// A log entry.
pub type Entry = openraft::alias::EntryOf<TypeConfig>;
/// Term and index of an entry.
pub type LogId = openraft::alias::LogIdOf<TypeConfig>;
/// A vote.
pub type Vote = openraft::alias::VoteOf<TypeConfig>;
/// Voters and learners, with the log id that made them so.
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
/// Voters and learners.
pub type Membership = openraft::Membership<u64, RaftPeer>;
/// What a snapshot contains.
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;

/// A member: where it is and which disk its id is bound to.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RaftPeer {
    /// `host:port`.
    pub address: String,
    /// The store its id is bound to.
    pub store: [u8; 16],
}

/// An encoded `LogBatch`, and its decoded form once somebody needed it. Cheap to clone.
#[derive(Clone)]
pub struct LogData(Arc<Inner>);

struct Inner {
    bytes: Bytes,
    decoded: OnceLock<v1::LogBatch>,
}

impl LogData {
    /// Takes an encoded batch as it came from the network or the log.
    pub fn encoded(bytes: Bytes) -> Self {
        Self(Arc::new(Inner {
            bytes,
            decoded: OnceLock::new(),
        }))
    }

    /// Encodes a batch, keeping the decoded form for the apply task.
    pub fn new(batch: v1::LogBatch) -> Self {
        let bytes = Bytes::from(batch.encode_to_vec());
        Self(Arc::new(Inner {
            bytes,
            decoded: OnceLock::from(batch),
        }))
    }

    /// The encoded batch.
    pub fn bytes(&self) -> &Bytes {
        &self.0.bytes
    }

    /// The batch, decoded at the first call. Errors: the bytes are no batch.
    pub fn batch(&self) -> Result<&v1::LogBatch, prost::DecodeError> {
        if let Some(batch) = self.0.decoded.get() {
            return Ok(batch);
        }
        let batch = v1::LogBatch::decode(self.0.bytes.clone())?;
        Ok(self.0.decoded.get_or_init(|| batch))
    }
}

impl PartialEq for LogData {
    fn eq(&self, other: &Self) -> bool {
        self.0.bytes == other.0.bytes
    }
}

impl fmt::Debug for LogData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LogData({} bytes)", self.0.bytes.len())
    }
}

impl fmt::Display for LogData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

// openraft asks for serde on everything it may print as JSON; our wire and disk forms are protobuf.
impl Serialize for LogData {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.bytes.as_ref().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for LogData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::<u8>::deserialize(deserializer).map(|bytes| Self::encoded(bytes.into()))
    }
}

/// What applying one entry answered, one per item of its batch; empty for entries that are not batches.
#[derive(Debug, Default)]
pub struct BatchReply(pub Vec<Proposed>);

// Replies never leave the process through openraft; see `LogData` for why these exist.
impl Serialize for BatchReply {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.len().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for BatchReply {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        usize::deserialize(deserializer).map(|_| Self::default())
    }
}

/// Called with the outcome of a write, on the task that has it: saves waking a task in between.
pub struct OnComplete<T>(Box<dyn FnOnce(T) + Send>);

impl<T> OnComplete<T> {
    /// Calls `f` with the outcome; `f` is dropped uncalled when openraft stops first.
    pub fn new(f: impl FnOnce(T) + Send + 'static) -> Self {
        Self(Box::new(f))
    }
}

impl<T: Send + 'static> Responder<TypeConfig, T> for OnComplete<T> {
    fn on_complete(self, outcome: T) {
        (self.0)(outcome);
    }
}

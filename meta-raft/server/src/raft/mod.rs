//! openraft glue.
//!
//! - [`types`]: the type configuration, log data, replies
//! - [`wire`]: openraft's types to and from protobuf, for the log, the network and the state
//! - [`log`]: openraft's log storage over [`crate::store::log`]
//! - [`machine`]: openraft's state machine over [`crate::store::state`]
//! - [`network`]: calls to peers (`append_stream`: the pipelined appends); [`service`]: calls from peers; [`snapshot`]: snapshots
//!   in transit
//! - [`admin`]: forming, growing, shrinking the cluster, moving its leader
//! - [`purge`]: trims the log; [`departure`]: elections without waiting when the leader's process is gone

pub mod admin;
mod append_stream;
pub mod departure;
pub mod log;
pub mod machine;
pub mod network;
pub mod purge;
pub mod service;
pub mod snapshot;
pub mod types;
pub mod wire;

pub use types::{LogData, Raft, RaftPeer, TypeConfig};

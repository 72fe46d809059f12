//! A metadata node: Raft over RocksDB, sessions, changelog.
//!
//! - [`node`]: starts and stops everything; [`config`]: its settings
//! - [`raft`]: openraft glue: types, wire, log, state machine, network, membership
//! - [`store`]: the two RocksDB instances (log and state), views, the one batch
//! - [`proposer`]: group commit; [`read_gate`]: linearizable reads; [`leadership`]: who leads
//! - [`observer`]: who watches what is applied; [`damage`]: what a read met that makes the node stop
//! - [`mirrors`]: what the followers of mirrored volumes say of themselves
//! - [`auth`]: the cluster token on every call
//! - `grpc`, `sessions`, `drivers`, `changelog`, `metrics`: what clients and operators talk to

pub mod auth;
pub mod changelog;
pub mod config;
pub mod damage;
pub mod drivers;
pub mod fence;
pub mod grpc;
pub mod leadership;
mod levels;
pub mod metrics;
pub mod mirrors;
pub mod node;
pub mod observer;
pub mod proposer;
pub mod raft;
pub mod read_gate;
pub mod scrub;
pub mod sessions;
pub mod store;

pub use config::NodeConfig;
pub use node::{Node, NodeContext, StartError};
pub use proposer::hasten_stamps;

//! Settings of a node: values only, read once at start.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use heliofs_proto::ids::NodeId;

/// How linearizable reads prove that nobody else leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ReadMode {
    /// A round to a quorum, shared by all reads that wait. Trusts no clock.
    #[default]
    ReadIndex,
    /// The leader answers while its lease lasts. Saves the round, but trusts that clocks run at
    /// about the same rate on all nodes.
    LeaderLease,
}

/// Raft's timers.
#[derive(Clone, Debug)]
pub struct RaftTimings {
    /// The leader's heartbeat.
    pub heartbeat: Duration,
    /// A follower that heard nothing for `election_max` (the leader's lease) and then for a random time between these two asks
    /// for an election.
    pub election_min: Duration,
    /// See `election_min`.
    pub election_max: Duration,
    /// Sending and installing one snapshot may take this long.
    pub snapshot_timeout: Duration,
}

impl RaftTimings {
    /// How long a peer may take to answer before its connection counts as dead. Not less than 2 s, however short the timers
    /// are: a disk that syncs slowly under load is no reason to begin anew.
    pub fn patience(&self) -> Duration {
        self.election_max.max(Duration::from_secs(2))
    }
}

impl Default for RaftTimings {
    /// For a leader whose machine is gone: elected after 1.3 to 1.6 s of silence by these timers, 1.5 to 1.9 s as measured. One whose process is
    /// gone is noticed at once.
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(150),
            election_min: Duration::from_millis(500),
            election_max: Duration::from_millis(800),
            snapshot_timeout: Duration::from_secs(600),
        }
    }
}

/// How much of the log is kept for followers and changelog readers.
#[derive(Clone, Debug)]
pub struct LogRetention {
    /// This many recent entries are kept even when the state holds them.
    pub entries_min: u64,
    /// Above this many entries the state is flushed and the log trimmed to `entries_min`.
    pub entries_max: u64,
    /// Above this many bytes of entries the same happens.
    pub bytes_max: u64,
    /// How often the log's size is looked at.
    pub check_every: Duration,
}

impl Default for LogRetention {
    fn default() -> Self {
        Self {
            entries_min: 50_000,
            entries_max: 200_000,
            bytes_max: 256 << 20,
            check_every: Duration::from_secs(2),
        }
    }
}

/// Memory for caches and buffers.
#[derive(Clone, Debug)]
pub struct CacheSizes {
    /// RocksDB's block cache of the state, indexes and filters included, bytes.
    pub block_cache_bytes: usize,
    /// One write buffer of a column family of the state, bytes; there are two per family.
    pub write_buffer_bytes: usize,
    /// Recent log entries kept in memory, bytes.
    pub log_cache_bytes: usize,
}

impl Default for CacheSizes {
    fn default() -> Self {
        Self {
            block_cache_bytes: 128 << 20,
            write_buffer_bytes: 32 << 20,
            log_cache_bytes: 32 << 20,
        }
    }
}

/// Leases and expiry of client sessions.
#[derive(Clone, Debug)]
pub struct SessionTimings {
    /// A mount trusts its caches this long after it sent a ping that was answered.
    pub lease: Duration,
    /// A session that is silent for this long is ended.
    pub timeout: Duration,
}

impl Default for SessionTimings {
    fn default() -> Self {
        Self {
            lease: Duration::from_millis(1000),
            timeout: Duration::from_secs(30),
        }
    }
}

/// Everything a node needs to know to start.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Never reused: a node that lost its disk comes back under a new id.
    pub node_id: NodeId,
    /// Holds `log/`, `state-<n>/` and `CURRENT_STATE`; created if absent.
    pub data_dir: PathBuf,
    /// Where to listen; port 0 picks one.
    pub listen: SocketAddr,
    /// `host:port` under which peers and clients reach this node; unset: the address listened on.
    pub advertise: Option<String>,
    /// The cluster token: every call, from nodes and clients, must carry it.
    pub token: String,
    /// Raft's timers.
    pub raft: RaftTimings,
    /// How reads are made linearizable.
    pub reads: ReadMode,
    /// How much log is kept.
    pub log: LogRetention,
    /// Memory.
    pub cache: CacheSizes,
    /// Client sessions.
    pub sessions: SessionTimings,
    /// How often all records are read and compared with the digests; zero: never.
    pub scrub_interval: Duration,
}

impl NodeConfig {
    /// Defaults for a node that listens on a free loopback port.
    pub fn new(node_id: NodeId, data_dir: impl Into<PathBuf>, token: impl Into<String>) -> Self {
        Self {
            node_id,
            data_dir: data_dir.into(),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: None,
            token: token.into(),
            raft: RaftTimings::default(),
            reads: ReadMode::default(),
            log: LogRetention::default(),
            cache: CacheSizes::default(),
            sessions: SessionTimings::default(),
            scrub_interval: Duration::from_secs(600),
        }
    }
}

//! Prometheus metrics of a node, and whether it can serve. The command shows both over HTTP.

use std::sync::Arc;
use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};

use crate::observer::{AppliedItem, ApplyObserver};
use crate::raft::admin::RaftAdmin;
use crate::read_gate::RoundCounts;
use crate::sessions::hub::Hub;
use crate::store::LogStore;

/// A node is ready while at most this many committed entries wait to be applied: a second's worth under load.
const APPLY_LAG_MAX: u64 = 10_000;

/// All metrics of a node.
pub struct Metrics {
    registry: Registry,
    commands: IntCounterVec,
    group_commands: Histogram,
    apply_seconds: Histogram,
    read_round_seconds: Histogram,
    read_rounds_failed: IntCounter,
    sessions: IntGauge,
    connected: IntGauge,
    opens: IntGauge,
    told: IntGauge,
    log_bytes: IntGauge,
    applied: IntGauge,
    committed: IntGauge,
    last_log: IntGauge,
    flushed: IntGauge,
    term: IntGauge,
    leads: IntGauge,
    scrapes: IntCounter,
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    let gauge = IntGauge::new(name, help).expect("the name is a valid metric name");
    registry
        .register(Box::new(gauge.clone()))
        .expect("the name is registered once");
    gauge
}

/// Times from 50 µs, less than one synced write, to 3 s, more than an election; each bucket twice the one before.
fn seconds(name: &str, help: &str) -> Histogram {
    let buckets =
        prometheus::exponential_buckets(50e-6, 2.0, 17).expect("start and factor are positive");
    Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))
        .expect("the name is a valid metric name")
}

impl Metrics {
    /// All zero.
    pub fn new() -> Arc<Self> {
        let registry = Registry::new();
        let commands = Opts::new("heliofs_meta_commands_total", "Replicated commands applied");
        let commands =
            IntCounterVec::new(commands, &["outcome"]).expect("the name is a valid metric name");
        let group = HistogramOpts::new(
            "heliofs_meta_apply_group_commands",
            "Commands applied and written as one group",
        )
        .buckets(vec![
            1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0,
        ]);
        let group_commands = Histogram::with_opts(group).expect("the name is a valid metric name");
        let apply_seconds = seconds(
            "heliofs_meta_apply_seconds",
            "Applying and writing one group of log entries",
        );
        let read_round_seconds = seconds(
            "heliofs_meta_read_index_seconds",
            "One round that makes waiting reads linearizable",
        );
        let read_rounds_failed = IntCounter::new(
            "heliofs_meta_read_index_failed_total",
            "Rounds that found no leader or no quorum",
        )
        .expect("the name is a valid metric name");
        let scrapes = IntCounter::new("heliofs_meta_scrapes_total", "Times that these were read")
            .expect("the name is a valid metric name");
        let collectors: [Box<dyn prometheus::core::Collector>; 6] = [
            Box::new(commands.clone()),
            Box::new(group_commands.clone()),
            Box::new(apply_seconds.clone()),
            Box::new(read_round_seconds.clone()),
            Box::new(read_rounds_failed.clone()),
            Box::new(scrapes.clone()),
        ];
        for collector in collectors {
            registry
                .register(collector)
                .expect("the name is registered once");
        }
        let gauge = |name, help| gauge(&registry, name, help);
        Arc::new(Self {
            sessions: gauge("heliofs_meta_sessions_count", "Sessions, on the leader"),
            connected: gauge("heliofs_meta_streams_count", "Sessions with a stream here"),
            opens: gauge("heliofs_meta_opens_count", "Inodes held open by sessions"),
            told: gauge(
                "heliofs_meta_interest_inodes",
                "Inodes that clients were told about",
            ),
            log_bytes: gauge("heliofs_meta_log_bytes", "Bytes of log kept, about"),
            applied: gauge("heliofs_meta_applied_index", "Last log entry applied"),
            committed: gauge("heliofs_meta_committed_index", "Last log entry committed"),
            last_log: gauge("heliofs_meta_last_log_index", "Last log entry"),
            flushed: gauge(
                "heliofs_meta_flushed_index",
                "Last log entry durable in the state",
            ),
            term: gauge("heliofs_meta_term_number", "Raft term"),
            leads: gauge("heliofs_meta_leader_bool", "1 while this node leads"),
            commands,
            group_commands,
            apply_seconds,
            read_round_seconds,
            read_rounds_failed,
            scrapes,
            registry,
        })
    }

    /// What the read gate counts in.
    pub(crate) fn rounds(&self) -> RoundCounts {
        RoundCounts {
            seconds: self.read_round_seconds.clone(),
            failed: self.read_rounds_failed.clone(),
        }
    }

    /// What the apply task calls.
    pub fn observer(self: &Arc<Self>) -> Arc<dyn ApplyObserver> {
        self.clone()
    }
}

impl ApplyObserver for Metrics {
    fn applied(&self, items: &[AppliedItem<'_>]) {
        self.group_commands.observe(items.len() as f64);
        let refused = items.iter().filter(|item| item.reply.error != 0).count();
        self.commands
            .with_label_values(&["refused"])
            .inc_by(refused as u64);
        self.commands
            .with_label_values(&["done"])
            .inc_by((items.len() - refused) as u64);
    }

    fn took(&self, spent: Duration) {
        self.apply_seconds.observe(spent.as_secs_f64());
    }

    fn reset(&self) {}
}

/// What a node shows of itself.
#[derive(Clone)]
pub struct Shown {
    /// Counted as things happen.
    pub metrics: Arc<Metrics>,
    /// Looked at when asked.
    pub hub: Hub,
    /// Looked at when asked.
    pub raft: RaftAdmin,
    /// Looked at when asked.
    pub log: LogStore,
}

impl Shown {
    fn look(&self) {
        let metrics = &self.metrics;
        let status = self.raft.status();
        let set =
            |gauge: &IntGauge, value: u64| gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        set(&metrics.applied, status.applied_index);
        set(&metrics.committed, status.committed_index);
        set(&metrics.last_log, status.last_log_index);
        set(&metrics.flushed, status.flushed_index);
        set(&metrics.term, status.term);
        set(&metrics.leads, u64::from(status.role == "leader"));
        set(&metrics.log_bytes, self.log.bytes());
        let (mut sessions, mut connected, mut opens, mut told) = (0, 0, 0, 0);
        for volume in self.hub.volumes() {
            let sizes = volume.soft().sizes();
            sessions += sizes.sessions;
            connected += sizes.streams;
            opens += sizes.opens;
            told += sizes.told;
        }
        set(&metrics.sessions, sessions as u64);
        set(&metrics.connected, connected as u64);
        set(&metrics.opens, opens as u64);
        set(&metrics.told, told as u64);
        metrics.scrapes.inc();
    }

    /// All metrics in Prometheus' text format.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        self.look();
        TextEncoder::new().encode_to_string(&self.metrics.registry.gather())
    }

    /// Why clients should not be sent here; `None`: they may.
    pub fn not_ready(&self) -> Option<String> {
        let status = self.raft.status();
        if !status.fatal.is_empty() {
            return Some(format!("stopped: {}", status.fatal));
        }
        if status.cluster_id == 0 {
            return Some("not part of a formed cluster".to_owned());
        }
        if status.leader == 0 {
            return Some("no leader is known".to_owned());
        }
        let behind = status.committed_index.saturating_sub(status.applied_index);
        (behind > APPLY_LAG_MAX).then(|| format!("{behind} committed entries wait to be applied"))
    }
}

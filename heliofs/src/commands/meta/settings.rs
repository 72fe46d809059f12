//! The TOML file of a metadata node.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use meta_server::NodeConfig;
use meta_server::config::ReadMode;
use serde::{Deserialize, Deserializer};

use crate::failure::{Failure, Outcome, While};
use crate::units;

/// What the file may say. Everything is optional; unknown names are errors.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileSettings {
    pub(super) id: Option<u64>,
    pub(super) data_dir: Option<PathBuf>,
    pub(super) listen: Option<SocketAddr>,
    pub(super) advertise: Option<String>,
    pub(super) metrics: Option<SocketAddr>,
    pub(super) token_file: Option<PathBuf>,
    /// `read-index` or `leader-lease`
    reads: Option<String>,
    scrub_interval: Option<Time>,
    raft: Raft,
    sessions: Sessions,
    log: Log,
    cache: Cache,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raft {
    heartbeat: Option<Time>,
    election_min: Option<Time>,
    election_max: Option<Time>,
    snapshot_timeout: Option<Time>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Sessions {
    lease: Option<Time>,
    timeout: Option<Time>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Log {
    entries_min: Option<u64>,
    entries_max: Option<u64>,
    bytes_max: Option<Size>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Cache {
    block_cache: Option<Size>,
    write_buffer: Option<Size>,
    log_cache: Option<Size>,
}

/// "200ms"
struct Time(Duration);

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        units::parse_duration(&text)
            .map(Self)
            .map_err(serde::de::Error::custom)
    }
}

/// "64M"
struct Size(u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        units::parse_size(&text)
            .map(Self)
            .map_err(serde::de::Error::custom)
    }
}

fn set<T>(target: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *target = value;
    }
}

impl FileSettings {
    /// Reads the file; an error names the line.
    pub(super) fn read(path: &Path) -> Outcome<Self> {
        let text = std::fs::read_to_string(path)
            .while_(format_args!("read the settings in {}", path.display()))?;
        toml::from_str(&text)
            .map_err(|error| Failure::usage(format!("{}: {error}", path.display())))
    }

    /// Sets what the file names, but for what `resolve` has merged with flags already.
    pub(super) fn apply(self, config: &mut NodeConfig) -> Outcome {
        config.reads = match self.reads.as_deref() {
            None | Some("read-index") => ReadMode::ReadIndex,
            Some("leader-lease") => ReadMode::LeaderLease,
            Some(other) => {
                return Err(Failure::usage(format!("reads = \"{other}\" is unknown"))
                    .hint("read-index, or leader-lease, which trusts that all clocks run at about the same rate"));
            }
        };
        let time = |time: Option<Time>| time.map(|time| time.0);
        let size = |size: Option<Size>| size.map(|size| size.0);
        let small =
            |bytes: Option<Size>| bytes.map(|bytes| usize::try_from(bytes.0).unwrap_or(usize::MAX));
        set(&mut config.scrub_interval, time(self.scrub_interval));
        set(&mut config.raft.heartbeat, time(self.raft.heartbeat));
        set(&mut config.raft.election_min, time(self.raft.election_min));
        set(&mut config.raft.election_max, time(self.raft.election_max));
        set(
            &mut config.raft.snapshot_timeout,
            time(self.raft.snapshot_timeout),
        );
        set(&mut config.sessions.lease, time(self.sessions.lease));
        set(&mut config.sessions.timeout, time(self.sessions.timeout));
        set(&mut config.log.entries_min, self.log.entries_min);
        set(&mut config.log.entries_max, self.log.entries_max);
        set(&mut config.log.bytes_max, size(self.log.bytes_max));
        set(
            &mut config.cache.block_cache_bytes,
            small(self.cache.block_cache),
        );
        set(
            &mut config.cache.write_buffer_bytes,
            small(self.cache.write_buffer),
        );
        set(
            &mut config.cache.log_cache_bytes,
            small(self.cache.log_cache),
        );
        Ok(())
    }
}

/// Relations without which a cluster would not hold still.
pub(super) fn check(config: &NodeConfig) -> Outcome {
    let raft = &config.raft;
    let wrong = |message: &str| Err(Failure::usage(message));
    if raft.election_min >= raft.election_max {
        return wrong(
            "election_min must be below election_max: nodes that wait equally long split their votes",
        );
    }
    if raft.heartbeat * 3 > raft.election_min {
        return wrong(
            "heartbeat must be at most a third of election_min, or one lost packet elects a new leader",
        );
    }
    if config.sessions.timeout < config.sessions.lease * 3 {
        return wrong(
            "a session's timeout must be at least three leases, or one lost packet ends mounts",
        );
    }
    if config.log.entries_min >= config.log.entries_max {
        return wrong("log.entries_min must be below log.entries_max");
    }
    Ok(())
}

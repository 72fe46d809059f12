//! `heliofs meta`: runs one metadata node until it is told to stop.

mod mirror;
mod settings;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use meta_client::{Cluster, ClusterOptions, Token};
use meta_server::{Node, NodeConfig};
use mirror_sync::fence::Keeper;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use self::settings::FileSettings;
use super::{runtime, service_threads};
use crate::cli::Access;
use crate::failure::{Failure, Outcome, While};
use crate::log::{self, Role};
use crate::mirror_target::NodeTarget;
use crate::serve_metrics::{self, Exposed};
use crate::signals::Stop;
use crate::{output, units};

/// The node's settings; flags override the file.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// TOML file with the same names, `_` for `-`.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The node's number in its cluster: never 0, never used again for another disk.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    id: Option<u64>,
    /// Holds the log and the state; a fast, durable disk.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where to listen [default: 127.0.0.1:7870].
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// host:port where the other nodes and the clients reach this one [default: --listen].
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Serves /metrics and /ready here.
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
    /// Forms a cluster of this node alone if it belongs to none; others are added with `heliofs raft add`.
    #[arg(long)]
    init: bool,
    /// How often the leader is heard [default: 150ms].
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME")]
    heartbeat: Option<Duration>,
    /// A node that heard nothing for --election-max, and then for this long at least, wants to lead [default: 500ms].
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME")]
    election_min: Option<Duration>,
    /// … and then for this long at most [default: 800ms].
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME")]
    election_max: Option<Duration>,
    /// A mount that was silent for this long has lost its session [default: 30s].
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME")]
    session_timeout: Option<Duration>,
    /// How often all records are read again and compared with the digests; 0s: never [default: 10m].
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME")]
    scrub_interval: Option<Duration>,
    /// For tests: stamps advance this much faster than time, so that horizons of hours are over in minutes.
    #[arg(long, hide = true, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
    stamp_speed: Option<u32>,
    /// For tests of rolling upgrades: the node takes itself for one of an earlier release, which knows core levels up to N and no
    /// fence stores. It stops where that would.
    #[arg(long, hide = true, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    pretend_core_level: Option<u32>,
    #[command(flatten)]
    mirror: mirror::Options,
}

/// What a node is started with.
struct Resolved {
    config: NodeConfig,
    token: Token,
    metrics: Option<SocketAddr>,
    mirror: Option<mirror::Source>,
}

impl Options {
    /// File, then flags, then checks. The token comes from the flag, the file's token_file, or the environment.
    fn resolve(mut self) -> Outcome<Resolved> {
        let file = match &self.config {
            Some(path) => FileSettings::read(path)?,
            None => FileSettings::default(),
        };
        self.access = self.access.or_file(file.token_file.clone());
        let token = self.access.token()?;
        if let Some(speed) = self.stamp_speed {
            meta_server::hasten_stamps(speed);
        }
        if let Some(level) = self.pretend_core_level {
            meta_core::limits::pretend_core_level(level);
        }
        let missing = |flag: &str| {
            Failure::usage(format!("{flag} is missing")).hint(format!(
                "for example: heliofs meta --id 1 --data-dir /var/lib/heliofs --token-file token --init \
                 (give {flag}, or put it into the file of --config)"
            ))
        };
        let id = self.id.or(file.id).ok_or_else(|| missing("--id"))?;
        let data_dir = self
            .data_dir
            .take()
            .or_else(|| file.data_dir.clone())
            .ok_or_else(|| missing("--data-dir"))?;
        let mut config = NodeConfig::new(id.into(), data_dir, super::format::secret_of(&token));
        config.listen = self
            .listen
            .or(file.listen)
            .unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], meta_client::url::PORT_DEFAULT)));
        config.advertise = match self.advertise.take().or_else(|| file.advertise.clone()) {
            Some(address) => Some(meta_client::url::parse_peer(&address)?),
            None => None,
        };
        let metrics = self.metrics.or(file.metrics);
        file.apply(&mut config)?;
        let raft = &mut config.raft;
        for (flag, setting) in [
            (self.heartbeat, &mut raft.heartbeat),
            (self.election_min, &mut raft.election_min),
            (self.election_max, &mut raft.election_max),
            (self.session_timeout, &mut config.sessions.timeout),
            (self.scrub_interval, &mut config.scrub_interval),
        ] {
            if let Some(value) = flag {
                *setting = value;
            }
        }
        settings::check(&config)?;
        Ok(Resolved {
            mirror: self.mirror.resolve(&token)?,
            config,
            token,
            metrics,
        })
    }
}

pub(crate) fn run(options: Options, json: bool, verbose: u8) -> Outcome {
    log::start(Role::Service, verbose, None)?;
    let init = options.init;
    let resolved = options.resolve()?;
    runtime(service_threads())?.block_on(serve(resolved, init, json))
}

async fn serve(resolved: Resolved, init: bool, json: bool) -> Outcome {
    let Resolved {
        config,
        token,
        metrics,
        mirror,
    } = resolved;
    let mut stop = Stop::catch()?;
    let id = config.node_id;
    let node = start(config).await?;
    let address = node.local_addr();
    let cancel = CancellationToken::new();
    let metrics = match metrics {
        Some(listen) => {
            let (shown, asked) = (node.shown().clone(), node.shown().clone());
            let exposed = Exposed {
                metrics: Box::new(move || {
                    shown.text().unwrap_or_else(|error| format!("# {error}\n"))
                }),
                unready: Box::new(move || asked.not_ready()),
            };
            Some(serve_metrics::start(listen, exposed, cancel.clone()).await?)
        }
        None => None,
    };
    if let Some(source) = mirror {
        source.follow(&node);
    }
    if init {
        form(&address.to_string(), token).await?;
    }
    if json {
        output::line(json!({
            "ready": { "node": id.0, "listen": address.to_string(), "metrics": metrics.map(|m| m.to_string()) }
        }))?;
    } else {
        output::line(format_args!("ready: node {id} at {address}"))?;
    }
    let ended = tokio::select! {
        signal = stop.wait() => {
            tracing::info!(signal, "stopping");
            Ok(())
        }
        why = node.failed() => Err(Failure::new(format!("the node stopped: {why}")).hint(hint(&why.to_string()))),
    };
    cancel.cancel();
    let stopped = node.shutdown().await;
    ended.and(stopped.while_("stop the node in order"))
}

/// What to do about a node that stopped.
fn hint(why: &str) -> &'static str {
    match why.contains("upgrade this node") {
        true => {
            "nothing is wrong with its disk: start it again with the release that the others run"
        }
        false => {
            "if its disk is damaged, replace it: `heliofs raft remove` this id and `add` a new one"
        }
    }
}

/// Starts a node; what is wrong with its disk is said with what to do.
pub(crate) async fn start(config: NodeConfig) -> Outcome<Node> {
    let directory = config.data_dir.clone();
    let listen = config.listen;
    let started = Node::start(config).await.map_err(|error| {
        Failure::new(format!(
            "cannot start the node in {} at {listen}: {error}",
            directory.display()
        ))
    });
    if let Ok(node) = &started {
        // Volumes that have a fence store are written only while it keeps their markers.
        let context = node.context();
        let keeper = Keeper::new(Arc::new(NodeTarget(Arc::clone(context))));
        context.tasks.spawn(keeper.run(context.cancel.clone()));
    }
    started
}

/// Forms a cluster of the node at `address` unless it belongs to one.
pub(crate) async fn form(address: &str, token: Token) -> Outcome {
    let cluster = Cluster::new(vec![address.to_owned()], token, ClusterOptions::default());
    if cluster.status_of(address).await?.role != "unformed" {
        return Ok(());
    }
    let id = cluster.init_cluster().await?;
    tracing::info!(
        cluster = format!("{id:08x}"),
        "formed a cluster of this node"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(config: PathBuf) -> Options {
        Options {
            access: Access::default(),
            config: Some(config),
            id: None,
            data_dir: None,
            listen: None,
            advertise: None,
            metrics: None,
            init: false,
            heartbeat: None,
            election_min: None,
            election_max: None,
            session_timeout: Some(Duration::from_secs(7)),
            scrub_interval: None,
            stamp_speed: None,
            pretend_core_level: None,
            mirror: mirror::Options::default(),
        }
    }

    #[test]
    fn the_file_is_read_and_flags_override_it() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let token = directory.path().join("token");
        std::fs::write(&token, "0123456789abcdef").unwrap();
        std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
        let file = directory.path().join("meta.toml");
        let text = format!(
            "id = 3\ndata_dir = \"/x\"\ntoken_file = {token:?}\n[sessions]\ntimeout = \"20s\"\nlease = \"500ms\"\n\
             [cache]\nblock_cache = \"64M\"\n"
        );
        std::fs::write(&file, text).unwrap();
        let config = options(file).resolve().unwrap().config;
        assert_eq!(config.node_id.0, 3);
        assert_eq!(config.sessions.timeout, Duration::from_secs(7));
        assert_eq!(config.sessions.lease, Duration::from_millis(500));
        assert_eq!(config.cache.block_cache_bytes, 64 << 20);
    }

    #[test]
    fn an_unknown_setting_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("meta.toml");
        std::fs::write(&file, "idd = 3\n").unwrap();
        assert!(FileSettings::read(&file).is_err());
    }
}

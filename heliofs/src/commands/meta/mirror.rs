//! Flags of a node whose cluster mirrors another.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use meta_client::{Cluster, ClusterOptions, MetaUrl, Token};
use meta_server::Node;
use mirror_sync::{MirrorConfig, Supervisor};

use crate::failure::{Failure, Outcome};
use crate::mirror_target::NodeTarget;
use crate::units;

/// What is mirrored; the same on every node of the cluster.
#[derive(Args, Default)]
pub(super) struct Options {
    /// Mirrors volumes of this cluster: helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME].
    #[arg(long, value_name = "META-URL")]
    mirror_of: Option<String>,
    /// A volume to mirror, and its name here if it is another; may be repeated [default: all].
    #[arg(long, value_name = "NAME[=NAME]", requires = "mirror_of")]
    mirror_volume: Vec<String>,
    /// File with the source's cluster token [default: this cluster's token].
    #[arg(long, value_name = "FILE", requires = "mirror_of")]
    mirror_token_file: Option<PathBuf>,
    /// The name of this mirror's slots at the source [default: made of the cluster's id].
    #[arg(long, value_name = "NAME", requires = "mirror_of")]
    mirror_name: Option<String>,
    /// Log that the source keeps for this mirror at most; past it, it loads anew [default: 1G].
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE", requires = "mirror_of")]
    mirror_log_cap: Option<u64>,
}

/// The cluster that is mirrored.
pub(super) struct Source {
    cluster: Cluster,
    /// Of the cluster that mirrors it.
    own: Token,
    config: MirrorConfig,
}

impl Options {
    /// `None`: this cluster mirrors nothing. `own` is this cluster's token.
    pub(super) fn resolve(self, own: &Token) -> Outcome<Option<Source>> {
        let Some(url) = self.mirror_of else {
            return Ok(None);
        };
        let mut url: MetaUrl = url.parse()?;
        let token = match &self.mirror_token_file {
            Some(file) => Token::from_file(file)?,
            None => own.clone(),
        };
        let mut volumes: Vec<(String, String)> = self
            .mirror_volume
            .iter()
            .map(|pair| match pair.split_once('=') {
                Some((source, local)) => (source.to_owned(), local.to_owned()),
                None => (pair.clone(), pair.clone()),
            })
            .collect();
        if let Some(volume) = url.volume.take()
            && !volumes.iter().any(|(source, _)| *source == volume)
        {
            volumes.push((volume.clone(), volume));
        }
        for (at, (source, local)) in volumes.iter().enumerate() {
            if source.is_empty() || local.is_empty() {
                return Err(Failure::usage("--mirror-volume needs a name")
                    .hint("write NAME, or NAME-AT-THE-SOURCE=NAME-HERE"));
            }
            let before = &volumes[..at];
            if before.iter().any(|(s, l)| s == source || l == local) {
                return Err(Failure::usage(format!(
                    "--mirror-volume {source}={local}: one of the names was given before"
                )));
            }
        }
        let config = MirrorConfig {
            url: url.to_string(),
            volumes,
            slot: self.mirror_name.unwrap_or_default(),
            log_bytes_max: self.mirror_log_cap.unwrap_or(0),
        };
        let cluster = Cluster::new(url.peers, token, ClusterOptions::default());
        Ok(Some(Source {
            cluster,
            own: own.clone(),
            config,
        }))
    }
}

impl Source {
    /// Follows it while the node leads, until the node stops.
    pub(super) fn follow(self, node: &Node) {
        let context = node.context();
        let target = Arc::new(NodeTarget(context.clone()));
        tracing::info!(source = self.config.url, "this cluster mirrors another");
        let supervisor = Supervisor::new(self.cluster, self.own, target, self.config);
        context.tasks.spawn(supervisor.run(context.cancel.clone()));
    }
}

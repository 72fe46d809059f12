//! `heliofs up`: everything in one process: a metadata node, a directory as bucket, a mount.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use heliofs_proto::ids::NodeId;
use heliofs_proto::v1::{StorageConfig, VolumeCreate, VolumeSettings};
use meta_client::{Cluster, ClusterError, ClusterOptions, MetaUrl, Token};
use meta_server::NodeConfig;
use serde_json::json;

use super::mount::{Serving, check_mount_point, finish};
use super::{format, meta, runtime, service_threads};
use crate::cli::Access;
use crate::failure::{Failure, Outcome, While};
use crate::log::{self, Role};
use crate::mounts::MountNote;
use crate::signals::Stop;
use crate::{output, units};

/// The volume's name.
const VOLUME: &str = "local";

/// Everything has a default.
#[derive(Args)]
pub(crate) struct Options {
    /// Holds metadata, objects and the token [default: ~/.local/share/heliofs].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where to mount; created if missing.
    #[arg(long, default_value = "heliofs", value_name = "DIR")]
    mount: PathBuf,
    /// Where the metadata node listens; other mounts may join. Port 0 picks one.
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDR")]
    listen: SocketAddr,
    #[command(flatten)]
    serving: Serving,
}

pub(crate) fn run(options: &Options, json: bool, verbose: u8) -> Outcome {
    let data_dir = match &options.data_dir {
        Some(directory) => {
            std::path::absolute(directory).while_(format_args!("use {}", directory.display()))?
        }
        None => data_home()?,
    };
    std::fs::create_dir_all(&data_dir).while_(format_args!("create {}", data_dir.display()))?;
    let log_file = data_dir.join("heliofs.log");
    log::start(Role::Service, verbose, Some(&log_file))?;
    let created = !options.mount.exists();
    if created {
        std::fs::create_dir_all(&options.mount)
            .while_(format_args!("create {}", options.mount.display()))?;
    }
    let outcome = runtime(service_threads())?.block_on(serve(options, &data_dir, log_file, json));
    if created && let Err(error) = std::fs::remove_dir(&options.mount) {
        tracing::debug!(%error, "the mount point stays");
    }
    outcome
}

/// `~/.local/share/heliofs`
pub(crate) fn data_home() -> Outcome<PathBuf> {
    match (std::env::var_os("XDG_DATA_HOME"), std::env::var_os("HOME")) {
        (Some(data), _) => Ok(Path::new(&data).join("heliofs")),
        (None, Some(home)) => Ok(Path::new(&home).join(".local/share/heliofs")),
        (None, None) => Err(Failure::usage("HOME is not set").hint("say where: --data-dir DIR")),
    }
}

/// The token in the data directory; made at the first start.
fn token(data_dir: &Path) -> Outcome<(Token, PathBuf)> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let path = data_dir.join("token");
    match std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
    {
        Ok(mut file) => {
            let written = writeln!(file, "{}", units::random_hex()).and_then(|()| file.sync_all());
            written.while_(format_args!("write {}", path.display()))?;
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).while_(format_args!("create {}", path.display())),
    }
    Ok((Token::from_file(&path)?, path))
}

async fn serve(options: &Options, data_dir: &Path, log_file: PathBuf, json: bool) -> Outcome {
    let mut stop = Stop::catch()?;
    let (token, token_file) = token(data_dir)?;
    let mount_point = check_mount_point(&options.mount.to_string_lossy())?;
    let mut config = NodeConfig::new(NodeId(1), data_dir.join("meta"), format::secret_of(&token));
    config.listen = options.listen;
    // Alone in its cluster: nobody to wait for.
    config.raft.heartbeat = std::time::Duration::from_millis(50);
    config.raft.election_min = std::time::Duration::from_millis(150);
    config.raft.election_max = std::time::Duration::from_millis(300);
    let node = meta::start(config).await?;
    let outcome = async {
        let address = node.local_addr().to_string();
        meta::form(&address, token.clone()).await?;
        let peers = vec![address];
        let cluster = Cluster::new(peers.clone(), token, ClusterOptions::default());
        ensure_volume(&cluster, data_dir).await?;
        let url = MetaUrl { peers, volume: Some(VOLUME.to_owned()) };
        let note = MountNote {
            mount_point,
            url: url.to_string(),
            pid: std::process::id(),
            token_file: Some(token_file.clone()),
            log_file: Some(log_file),
        };
        let mut serving = options.serving.clone();
        serving.take_options(&mut Access::default())?;
        if serving.cache_dir.is_empty() {
            serving.cache_dir.push(data_dir.join("cache"));
        }
        let mounted = serving.mount(cluster, VOLUME, &note).await?;
        let _noted = note.leave()?;
        if json {
            output::line(json!({ "ready": { "mount_point": note.mount_point, "url": note.url, "token_file": token_file } }))?;
        } else {
            output::line(format_args!(
                "heliofs is mounted at {}\ndata lies in {}; Ctrl-C unmounts and stops\n\
                 other mounts join with: heliofs mount {} DIRECTORY --token-file {}",
                note.mount_point.display(),
                data_dir.display(),
                note.url,
                token_file.display()
            ))?;
        }
        tokio::select! {
            ended = finish(mounted, &mut stop) => ended,
            // The mount goes with the future that held it: without its node it could only hang.
            why = node.failed() => Err(Failure::new(format!("the metadata node stopped: {why}"))
                .hint("what was synced lies in the data directory; the log says which record or file is damaged")),
        }
    }
    .await;
    let stopped = node.shutdown().await;
    outcome.and(stopped.while_("stop the metadata node in order"))
}

/// Creates the volume at the first start.
async fn ensure_volume(cluster: &Cluster, data_dir: &Path) -> Outcome {
    match cluster.get_volume(VOLUME).await {
        Ok(_) => return Ok(()),
        Err(ClusterError::NotFound(_)) => {}
        Err(error) => return Err(error.into()),
    }
    let volume = VolumeCreate {
        name: VOLUME.to_owned(),
        storage: Some(StorageConfig {
            storage: format::Storage::File.name().to_owned(),
            bucket: data_dir.join("bucket").to_string_lossy().into_owned(),
            uuid: units::random_hex(),
            segment_bytes: 4 << 20,
            ..StorageConfig::default()
        }),
        settings: Some(VolumeSettings {
            core_level: meta_core::limits::CORE_LEVEL_MAX,
            deletion_grace_seconds: 600,
            ..VolumeSettings::default()
        }),
    };
    format::create(cluster, volume, false).await.map(drop)
}

//! `heliofs config`: shows or changes a volume's settings.

use std::path::PathBuf;
use std::time::Duration;

use blockstore::{Bucket, Passphrase, StoreOptions, VolumeKey};
use clap::Args;
use heliofs_proto::v1::{UpdateVolumeRequest, Volume};
use meta_client::ClusterError;

use super::format::{Compress, Keys};
use super::status::volume_json;
use crate::cli::Access;
use crate::failure::{Failure, Outcome};
use crate::fencing::{self, FenceAccess};
use crate::passphrase::{PassphraseSource, read_key, read_private};
use crate::units::{show_limit, show_size};
use crate::{output, units};

/// Which volume, and what to change; nothing: shows it.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]
    #[arg(value_name = "META-URL")]
    url: String,
    /// The volume.
    name: Option<String>,
    /// Bytes that files may have in all. 0: no limit.
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE")]
    capacity: Option<u64>,
    /// Files and directories that there may be. 0: no limit.
    #[arg(long, value_name = "N")]
    inodes: Option<u64>,
    /// Days that deleted files stay in the trash.
    #[arg(long, value_name = "DAYS")]
    trash_days: Option<u32>,
    /// How long an object that nobody references stays in the bucket.
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME")]
    deletion_grace: Option<Duration>,
    /// How objects are compressed from now on; mounts use it when they are mounted again.
    #[arg(long, value_enum, value_name = "CODEC")]
    compress: Option<Compress>,
    /// File with a new passphrase for an encrypted volume, which replaces the one given with --passphrase-file or
    /// HELIOFS_PASSPHRASE. The data is not encrypted anew.
    #[arg(long, value_name = "FILE")]
    new_passphrase_file: Option<PathBuf>,
    /// File with an RSA key (the public one is enough) that opens the volume from now on instead of what did before.
    #[arg(long, value_name = "FILE", conflicts_with = "new_passphrase_file")]
    new_encrypt_key: Option<PathBuf>,
    /// Lets the volume use what releases brought since it was created: quotas and snapshots need 2. All metadata nodes and mirrors
    /// must know it; there is no way back.
    #[arg(long, value_name = "N")]
    core_level: Option<u32>,
    /// Changes the fence store although the one before can't be reached. Its marker stays there: never promote a mirror by it.
    #[arg(long, requires = "fence_store")]
    abandon_fence: bool,
    #[command(flatten)]
    fence: FenceAccess,
    #[command(flatten)]
    passphrase: PassphraseSource,
    #[command(flatten)]
    keys: Keys,
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    let target = options
        .access
        .target(&options.url, options.name.as_deref())?;
    let volume = find(&target.cluster, &target.volume).await?;
    let mut settings = volume.settings.unwrap_or_default();
    let before = settings;
    if let Some(bytes) = options.capacity {
        settings.capacity_bytes_max = bytes;
    }
    if let Some(inodes) = options.inodes {
        settings.inodes_max = inodes;
    }
    if let Some(days) = options.trash_days {
        settings.trash_days = days;
    }
    if let Some(grace) = options.deletion_grace {
        settings.deletion_grace_seconds = grace.as_secs();
    }
    if let Some(level) = options.core_level {
        let known = target.cluster.core_level_of_all().await;
        if level > known {
            return Err(Failure::new(format!(
                "not all metadata nodes know core level {level}, only {known}, or one does not answer"
            ))
            .hint("upgrade them first: a node that does not know the level stops; `heliofs raft status` shows them"));
        }
        settings.core_level = level;
    }
    let mut storage = volume.storage.clone().unwrap_or_default();
    let unchanged = storage.clone();
    if let Some(compress) = options.compress {
        storage.compress = compress.name().to_owned();
    }
    let new = match (&options.new_passphrase_file, &options.new_encrypt_key) {
        (Some(file), _) => Some(Passphrase::new(read_private(file, "passphrase")?).into()),
        (None, Some(file)) => Some(read_key(file)?),
        (None, None) => None,
    };
    if let Some(new) = new {
        let Some(encryption) = &mut storage.encryption else {
            return Err(Failure::usage(format!("{} is not encrypted", volume.name)));
        };
        let key = VolumeKey::open(encryption, &options.passphrase.required()?)?;
        encryption.keys = vec![key.wrap(&new)?];
        // Volumes of earlier releases have none.
        encryption.commitment = key.commitment();
    }
    if options.keys.given() {
        (storage.access_key, storage.secret_key) = options.keys.find()?;
        // Keys that don't open the bucket would leave every mount without data.
        let bucket = Bucket::open(&storage, prefix(&volume), &StoreOptions::default())?;
        bucket.check_marker(&storage.uuid).await?;
    }
    let storage = (storage != unchanged).then_some(storage);
    let volume = if settings != before || storage.is_some() {
        let update = UpdateVolumeRequest {
            name: target.volume.clone(),
            settings: (settings != before).then_some(settings),
            storage,
            ..UpdateVolumeRequest::default()
        };
        target.cluster.update_volume(update).await?
    } else {
        volume
    };
    let fence = options.fence.resolve()?;
    if fence.is_some() || options.fence.is_none() {
        fencing::written_here(&volume)?;
    }
    if fence.is_some() {
        fencing::known_by_all(&target.cluster).await?;
    }
    if (fence.is_some() || options.fence.is_none()) && !options.abandon_fence {
        fencing::give_up(&target.cluster, &volume, fence.as_ref()).await?;
    }
    let volume = match fence {
        Some(store) => fencing::fence(&target.cluster, &volume, store).await?,
        None if options.fence.is_none() => {
            let update = UpdateVolumeRequest {
                name: volume.name,
                unfence: true,
                ..UpdateVolumeRequest::default()
            };
            target.cluster.update_volume(update).await?
        }
        None => volume,
    };
    if json {
        output::print_json(&volume_json(&volume))
    } else {
        print(&volume)
    }
}

/// The volume with its secrets.
pub(crate) async fn find(cluster: &meta_client::Cluster, name: &str) -> Outcome<Volume> {
    match cluster.get_volume(name).await {
        Err(ClusterError::NotFound(_)) => Err(Failure::no_volume(name)),
        other => Ok(other?),
    }
}

/// The prefix of a volume's objects in its bucket: its name where it was created.
pub(crate) fn prefix(volume: &Volume) -> &str {
    match &volume.mirror {
        Some(mirror) => &mirror.prefix,
        None if volume.prefix.is_empty() => &volume.name,
        None => &volume.prefix,
    }
}

/// Refuses what would change the objects of a volume that is a mirror: they are the source's, which has newer ones than the
/// mirror knows of.
pub(crate) fn not_a_mirror(volume: &Volume) -> Outcome {
    let Some(mirror) = &volume.mirror else {
        return Ok(());
    };
    Err(Failure::new(format!(
        "{} is a mirror: its objects are the source's",
        volume.name
    ))
    .hint(format!(
        "do it at the source: {}/{}",
        mirror.source, mirror.volume
    )))
}

fn print(volume: &Volume) -> Outcome {
    let storage = volume.storage.clone().unwrap_or_default();
    let settings = volume.settings.unwrap_or_default();
    let fence = volume.fence.clone().and_then(|fence| fence.store);
    let grace = Duration::from_secs(settings.deletion_grace_seconds);
    let mut table = output::table(["setting", "value"]);
    for (name, value) in [
        ("name", volume.name.clone()),
        ("uuid", storage.uuid),
        ("storage", storage.storage),
        ("bucket", storage.bucket),
        ("access key", storage.access_key),
        ("block size", show_size(storage.segment_bytes)),
        ("compress", storage.compress),
        (
            "encrypt",
            storage.encryption.map(|e| e.cipher).unwrap_or_default(),
        ),
        (
            "capacity",
            show_limit(settings.capacity_bytes_max, show_size),
        ),
        ("inodes", show_limit(settings.inodes_max, |n| n.to_string())),
        ("fence store", fence.unwrap_or_default().bucket),
        ("read-only because", volume.fenced.clone()),
        ("core level", settings.core_level.to_string()),
        ("trash days", settings.trash_days.to_string()),
        (
            "deletion grace",
            humantime::format_duration(grace).to_string(),
        ),
    ] {
        if !value.is_empty() {
            table.add_row([name.to_owned(), value]);
        }
    }
    output::print_table(&table)
}

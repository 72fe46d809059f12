//! `heliofs format`: creates a volume, its bucket if missing, and claims the volume's prefix of the bucket.

use std::path::PathBuf;
use std::time::Duration;

use blockstore::{Bucket, StoreError, StoreOptions, VolumeKey};
use clap::{Args, ValueEnum};
use heliofs_proto::v1::{StorageConfig, VolumeCreate, VolumeSettings};
use meta_client::{ClusterError, Token};
use meta_core::limits::CORE_LEVEL_MAX;

use crate::cli::Access;
use crate::commands::status::volume_json;
use crate::failure::{Failure, Outcome, While};
use crate::fencing::{self, FenceAccess};
use crate::passphrase::{PassphraseSource, read_private};
use crate::{output, units};

/// Where objects can be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Storage {
    /// A directory, which all mounts must reach under the same path.
    File,
    /// Amazon S3 or any server that speaks it.
    S3,
    /// The memory of one process: for tests with `heliofs up`.
    Memory,
}

impl Storage {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::S3 => "s3",
            Self::Memory => "memory",
        }
    }
}

/// The keys of a bucket, never only in argv.
#[derive(Args, Clone, Default)]
pub(crate) struct Keys {
    /// Else HELIOFS_ACCESS_KEY, ACCESS_KEY or AWS_ACCESS_KEY_ID.
    #[arg(long, value_name = "KEY")]
    access_key: Option<String>,
    /// Everybody on this machine can read it in the process list: better HELIOFS_SECRET_KEY, SECRET_KEY,
    /// AWS_SECRET_ACCESS_KEY or --secret-key-file.
    #[arg(long, value_name = "KEY", conflicts_with = "secret_key_file")]
    secret_key: Option<String>,
    /// File that holds the secret key, readable by its owner only.
    #[arg(long, value_name = "FILE")]
    secret_key_file: Option<PathBuf>,
}

impl Keys {
    /// Whether anything was given on the command line.
    pub(crate) fn given(&self) -> bool {
        self.access_key.is_some() || self.secret_key.is_some() || self.secret_key_file.is_some()
    }

    /// Access key and secret key, both or neither.
    pub(crate) fn find(&self) -> Outcome<(String, String)> {
        let from_environment = |names: [&str; 3]| {
            names
                .into_iter()
                .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
        };
        let access = self.access_key.clone().or_else(|| {
            from_environment(["HELIOFS_ACCESS_KEY", "ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
        });
        let secret = match (&self.secret_key, &self.secret_key_file) {
            (Some(secret), _) => Some(secret.clone()),
            (None, Some(file)) => Some(read_private(file, "secret key")?.trim().to_owned()),
            (None, None) => {
                from_environment(["HELIOFS_SECRET_KEY", "SECRET_KEY", "AWS_SECRET_ACCESS_KEY"])
            }
        };
        match (access, secret) {
            (Some(access), Some(secret)) => Ok((access, secret)),
            (None, None) => Ok((String::new(), String::new())),
            (Some(_), None) => Err(Failure::usage("an access key without a secret key")
                .hint("give the secret in SECRET_KEY or with --secret-key-file")),
            (None, Some(_)) => Err(Failure::usage("a secret key without an access key")
                .hint("give --access-key or ACCESS_KEY")),
        }
    }
}

/// How objects are compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Compress {
    /// Not at all.
    None,
    /// Fast.
    Lz4,
    /// Smaller.
    Zstd,
}

impl Compress {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// What volume to create.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]
    #[arg(value_name = "META-URL")]
    url: String,
    /// The volume's name: 3 to 63 lower-case letters, digits and dashes.
    name: Option<String>,
    /// Where its objects are.
    #[arg(long, value_enum, default_value = "file")]
    storage: Storage,
    /// A directory, or http://HOST:PORT/BUCKET, https://BUCKET.s3.REGION.amazonaws.com, BUCKET. For `file`, unless given:
    /// ~/.local/share/heliofs/buckets.
    #[arg(long)]
    bucket: Option<String>,
    #[command(flatten)]
    keys: Keys,
    /// The bucket's region, when its URL does not say.
    #[arg(long, default_value = "")]
    region: String,
    /// Bytes that files may have in all, such as 10G. 0: no limit.
    #[arg(long, value_parser = units::parse_size, default_value = "0", value_name = "SIZE")]
    capacity: u64,
    /// Files and directories that there may be. 0: no limit.
    #[arg(long, default_value_t = 0, value_name = "N")]
    inodes: u64,
    /// Days that deleted files stay in the trash.
    #[arg(long, default_value_t = 0, value_name = "DAYS")]
    trash_days: u32,
    /// Largest data object.
    #[arg(
        long,
        visible_alias = "segment-size",
        value_parser = units::parse_size,
        default_value = "4M",
        value_name = "SIZE"
    )]
    block_size: u64,
    /// How new objects are compressed.
    #[arg(long, value_enum, default_value = "none", value_name = "CODEC")]
    compress: Compress,
    /// Encrypts objects with AES-256-GCM; needs a passphrase or an RSA key (--encrypt-key), without which the data is lost.
    #[arg(long)]
    encrypt: bool,
    #[command(flatten)]
    passphrase: PassphraseSource,
    /// How long an object that nobody references stays in the bucket.
    #[arg(long, value_parser = units::parse_duration, default_value = "10m", value_name = "TIME")]
    deletion_grace: Duration,
    #[command(flatten)]
    fence: FenceAccess,
    /// Takes over a prefix of the bucket that a volume which is gone has left; its objects are deleted.
    #[arg(long)]
    force: bool,
}

/// Segments below this cost more requests than bytes, above it more memory than they save.
const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=64 << 20;

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    let target = options
        .access
        .target(&options.url, options.name.as_deref())?;
    check_name(&target.volume)?;
    if !SEGMENT_BYTES.contains(&options.block_size) {
        return Err(Failure::usage(format!(
            "a block size of {} is out of bounds",
            units::show_size(options.block_size)
        ))
        .hint("choose from 64K to 64M"));
    }
    let settings = VolumeSettings {
        // Nodes of older builds would stop at a level that they do not know.
        core_level: CORE_LEVEL_MAX.min(target.cluster.core_level_of_all().await),
        capacity_bytes_max: options.capacity,
        inodes_max: options.inodes,
        trash_days: options.trash_days,
        deletion_grace_seconds: options.deletion_grace.as_secs(),
    };
    let (access_key, secret_key) = match options.storage {
        Storage::S3 => options.keys.find()?,
        Storage::File | Storage::Memory => (String::new(), String::new()),
    };
    let encryption = match options.encrypt {
        true => Some(VolumeKey::create(&options.passphrase.required()?)?.1),
        false if options.passphrase.is_given() => {
            return Err(
                Failure::usage("a passphrase or a key for a volume that is not encrypted")
                    .hint("add --encrypt"),
            );
        }
        false => None,
    };
    let storage = StorageConfig {
        storage: options.storage.name().to_owned(),
        bucket: bucket(&options)?,
        access_key,
        secret_key,
        region: options.region.clone(),
        uuid: units::random_hex(),
        segment_bytes: options.block_size,
        // An empty name: no frame was ever encoded, so that readers need not look.
        compress: match options.compress {
            Compress::None => String::new(),
            codec => codec.name().to_owned(),
        },
        encryption,
    };
    let volume = VolumeCreate {
        name: target.volume.clone(),
        storage: Some(storage),
        settings: Some(settings),
    };
    let fence = options.fence.resolve()?;
    if fence.is_some() {
        fencing::known_by_all(&target.cluster).await?;
    }
    let mut created = create(&target.cluster, volume, options.force).await?;
    if let Some(store) = fence {
        created = fencing::fence(&target.cluster, &created, store)
            .await
            .map_err(|failure| {
                failure.hint("the volume exists, without a fence store: `heliofs config --fence-store` gives it one")
            })?;
    }
    if json {
        return output::print_json(&volume_json(&created));
    }
    output::line(format_args!(
        "created volume {} (id {}) in {}",
        created.name,
        created.id,
        created.storage.unwrap_or_default().bucket
    ))?;
    output::line(format_args!(
        "mount it: heliofs mount {} DIRECTORY",
        target.url
    ))
}

/// The metadata nodes' rule, told before anything is asked of them: as a bucket's name, since it becomes a part of keys, and so
/// that it is never mistaken for a flag or a path.
fn check_name(name: &str) -> Outcome {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let fits = (3..=63).contains(&name.len())
        && name.chars().all(|c| plain(c) || c == '-')
        && name.starts_with(plain)
        && name.ends_with(plain);
    if fits {
        return Ok(());
    }
    Err(Failure::usage(format!("`{name}` can't be a volume's name"))
        .hint("3 to 63 lower-case letters, digits and dashes, with no dash at either end"))
}

fn bucket(options: &Options) -> Outcome<String> {
    match (options.storage, &options.bucket) {
        (Storage::S3, None) => Err(Failure::usage("an S3 volume needs --bucket")
            .hint("--bucket http://HOST:PORT/BUCKET, or https://BUCKET.s3.REGION.amazonaws.com")),
        (Storage::S3, Some(bucket)) => Ok(bucket.clone()),
        (Storage::Memory, bucket) => Ok(bucket.clone().unwrap_or_default()),
        (Storage::File, Some(bucket)) => {
            let path = std::path::absolute(bucket.strip_prefix("file://").unwrap_or(bucket))
                .while_(format_args!("use {bucket} as a bucket"))?;
            Ok(path.to_string_lossy().into_owned())
        }
        (Storage::File, None) => Ok(super::up::data_home()?
            .join("buckets")
            .to_string_lossy()
            .into_owned()),
    }
}

/// Creates bucket, marker and volume, in this order: a volume that exists can be mounted.
pub(crate) async fn create(
    cluster: &meta_client::Cluster,
    volume: VolumeCreate,
    force: bool,
) -> Outcome<heliofs_proto::v1::Volume> {
    match cluster.get_volume(&volume.name).await {
        Err(ClusterError::NotFound(_)) => {}
        Ok(_) => {
            return Err(Failure::new(format!("the cluster has a volume `{}` already", volume.name))
                .hint("mount it, choose another name, change it with `heliofs config`, or remove it with `heliofs destroy`"));
        }
        Err(error) => return Err(error.into()),
    }
    let storage = volume.storage.clone().unwrap_or_default();
    let store_options = StoreOptions {
        // A person waits; a server that is up answers at once.
        deadline: Duration::from_secs(10),
        attempt_timeout: Duration::from_secs(5),
        memory_cache_bytes: 0,
        ..StoreOptions::default()
    };
    blockstore::object::create_bucket(&storage, &store_options).await?;
    let bucket = Bucket::open(&storage, &volume.name, &store_options)?;
    claim(&bucket, &storage.uuid, &volume.name, force).await?;
    match cluster.create_volume(volume).await {
        Ok(created) => Ok(created),
        // Nothing refers to the marker: give the prefix back, unless the volume may exist after all.
        Err(error @ ClusterError::Unknown { .. }) => Err(error.into()),
        Err(error) => {
            if let Err(left) = bucket.delete(blockstore::object::marker::MARKER_NAME).await {
                tracing::warn!(%left, "the marker object stays in the bucket; format again with --force");
            }
            Err(error.into())
        }
    }
}

async fn claim(bucket: &Bucket, uuid: &str, name: &str, force: bool) -> Outcome {
    match bucket.claim_marker(uuid).await {
        Err(StoreError::AlreadyExists { key, .. }) if force => {
            tracing::warn!(key, "taking over the prefix of another volume");
            bucket.delete_all().await?;
            Ok(bucket.claim_marker(uuid).await?)
        }
        Err(StoreError::AlreadyExists { .. }) => Err(Failure::new(format!(
            "the bucket holds data of another volume `{name}`"
        ))
        .hint(
            "choose another name or bucket; if that volume's cluster is gone for good, --force deletes its data",
        )),
        other => Ok(other?),
    }
}

/// The token as the server wants it; here since `up` forms clusters too.
pub(crate) fn secret_of(token: &Token) -> String {
    token.secret().to_owned()
}

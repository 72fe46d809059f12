//! `heliofs mirror bucket`: a mirror gets a bucket of its own, into which the source's objects are copied.

use std::time::Duration;

use blockstore::object::marker::MARKER_NAME;
use blockstore::{Bucket, Kind, StoreError, StoreOptions};
use bytes::Bytes;
use clap::Args;
use heliofs_proto::v1::{SetBucketRequest, StorageConfig};
use serde_json::json;

use super::At;
use crate::commands::config::prefix;
use crate::commands::format::{Keys, Storage};
use crate::failure::{Failure, Outcome, While};
use crate::{output, units};

/// Which bucket, and how it is filled.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    at: At,
    /// What kind of store the mirror's own bucket is.
    #[arg(long, value_enum, default_value = "s3")]
    storage: Storage,
    /// The mirror's own bucket: a directory, or http://HOST:PORT/BUCKET, https://BUCKET.s3.REGION.amazonaws.com, BUCKET.
    #[arg(long)]
    bucket: Option<String>,
    #[command(flatten)]
    keys: Keys,
    /// The bucket's region, when its URL does not say.
    #[arg(long, default_value = "")]
    region: String,
    /// Bytes per second that all copiers together pull from the source's bucket at most. 0: no limit.
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE")]
    copy_limit: Option<u64>,
    /// Tries segments again that could not be copied.
    #[arg(long)]
    retry: bool,
    /// Takes over a prefix of the bucket that another volume has left; its objects are deleted.
    #[arg(long)]
    force: bool,
}

fn store_options() -> StoreOptions {
    StoreOptions {
        // A person waits; a server that is up answers at once.
        deadline: Duration::from_secs(10),
        attempt_timeout: Duration::from_secs(5),
        memory_cache_bytes: 0,
        ..StoreOptions::default()
    }
}

pub(super) async fn run(options: Options, json: bool) -> Outcome {
    let at = &options.at;
    let target = at.access.target(&at.url, at.name.as_deref())?;
    if options.bucket.is_none() && options.copy_limit.is_none() && !options.retry {
        return Err(Failure::usage("nothing to change").hint(
            "--bucket gives the mirror a bucket of its own; --copy-limit and --retry change how it is filled",
        ));
    }
    let volume = target.cluster.get_volume(&target.volume).await?;
    let (source, prefix) = match (&volume.second, &volume.mirror) {
        (Some(second), _) => (second.clone(), prefix(&volume).to_owned()),
        (None, Some(_)) => (
            volume.storage.clone().unwrap_or_default(),
            prefix(&volume).to_owned(),
        ),
        (None, None) => {
            return Err(
                Failure::new(format!("{} is no mirror", target.volume)).hint(
                    "give the META-URL of the mirror's cluster: `heliofs mirror status` lists its mirrors",
                ),
            );
        }
    };
    let mut emptied = false;
    let own = match &options.bucket {
        None => None,
        Some(bucket) => {
            let bucket = match options.storage {
                Storage::File => {
                    std::path::absolute(bucket.strip_prefix("file://").unwrap_or(bucket))
                        .while_(format_args!("use {bucket} as a bucket"))?
                        .to_string_lossy()
                        .into_owned()
                }
                _ => bucket.clone(),
            };
            let (access_key, secret_key) = match options.storage {
                Storage::S3 => options.keys.find()?,
                Storage::File | Storage::Memory => (String::new(), String::new()),
            };
            let status = target.cluster.status().await?;
            let own = StorageConfig {
                storage: options.storage.name().to_owned(),
                bucket,
                access_key,
                secret_key,
                region: options.region.clone(),
                uuid: String::new(),
                ..source.clone()
            };
            blockstore::object::create_bucket(&own, &store_options()).await?;
            let there = Bucket::open(&own, &prefix, &store_options())?;
            // The one that it has, perhaps under another address or with other keys.
            let known = volume.second.as_ref().and(volume.storage.as_ref());
            let uuid = match known {
                Some(known) if there.check_marker(&known.uuid).await.is_ok() => known.uuid.clone(),
                _ => {
                    // The same whenever this bucket is asked for, and never the source's or another bucket's.
                    let place =
                        crc32fast::hash(format!("{} {}", own.storage, own.bucket).as_bytes());
                    let uuid = format!("{}-{:08x}-{place:08x}", source.uuid, status.cluster_id);
                    // It is known, and its marker is gone: so may be the rest.
                    emptied = known.is_some_and(|known| known.uuid == uuid);
                    claim(&there, &uuid, &source, &own.bucket, &prefix, options.force).await?;
                    uuid
                }
            };
            Some(StorageConfig { uuid, ..own })
        }
    };
    let shown = own.as_ref().map(|own| own.bucket.clone());
    let ask = SetBucketRequest {
        volume: target.volume.clone(),
        own,
        copy_bytes_per_second: options.copy_limit,
        retry: options.retry,
        emptied,
    };
    target.cluster.set_bucket(ask).await?;
    if json {
        return output::print_json(&json!({
            "volume": target.volume,
            "bucket": shown,
            "copy_limit": options.copy_limit,
        }));
    }
    match shown {
        Some(bucket) => output::line(format_args!(
            "objects of {} are copied into {bucket}: by mounts that are made from now on, and by `heliofs mirror worker`",
            target.volume
        )),
        None => output::line(format_args!("{} is changed", target.volume)),
    }
}

/// Makes the bucket's prefix this mirror's. One that was filled in advance, by a copy of the source's objects, is fine.
async fn claim(
    bucket: &Bucket,
    uuid: &str,
    source: &StorageConfig,
    place: &str,
    prefix: &str,
    force: bool,
) -> Outcome {
    match bucket.claim_marker(uuid).await {
        Ok(()) => return Ok(()),
        Err(StoreError::AlreadyExists { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    if bucket.check_marker(&source.uuid).await.is_ok() {
        if is_same(bucket, source, prefix).await? {
            return Err(Failure::new(format!("{place} is the source's bucket"))
                .hint("a mirror's own bucket is another one, in its own region"));
        }
        bucket.delete(MARKER_NAME).await?;
        return Ok(bucket.claim_marker(uuid).await?);
    }
    if force {
        bucket.delete_all().await?;
        return Ok(bucket.claim_marker(uuid).await?);
    }
    Err(Failure::new(format!(
        "the bucket holds data of another volume `{prefix}`"
    ))
    .hint("choose another bucket; if that volume is gone for good, --force deletes its data"))
}

/// Whether what is put into the bucket appears in the source's.
async fn is_same(bucket: &Bucket, source: &StorageConfig, prefix: &str) -> Outcome<bool> {
    let name = format!("probe-{}", units::random_hex());
    let source = Bucket::open(source, prefix, &store_options())?;
    bucket.put(&name, Bytes::from_static(b"probe")).await?;
    let seen = source.get(&name).await;
    bucket.delete(&name).await?;
    match seen {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == Kind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

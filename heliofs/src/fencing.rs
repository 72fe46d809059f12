//! The fence store of a volume: how it is named on the command line, and how a volume gets one.

use std::time::Duration;

use blockstore::StoreOptions;
use clap::Args;
use heliofs_proto::v1::{FenceStore, StorageConfig, UpdateVolumeRequest, Volume};
use meta_client::Cluster;
use mirror_sync::fence::{self, TakeError, marker::Me};

use crate::buckets::find_keys;
use crate::commands::format::Keys;
use crate::failure::{Failure, Outcome};
use crate::units;

/// What is said instead of a bucket to do without.
pub(crate) const NONE: &str = "none";

/// Shorter ones would lapse at every hiccup of a store.
const LEASE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(600);

/// A bucket that both regions reach.
#[derive(Args, Clone, Default)]
pub(crate) struct FenceAccess {
    /// A bucket that both regions reach and none of them depends on, named as --bucket is. A marker in it says which region may
    /// write the volume, so that no two ever do. The server must know conditional puts.
    #[arg(long, value_name = "BUCKET")]
    fence_store: Option<String>,
    /// Its access key, or HELIOFS_ACCESS_KEY_FENCE; else as for --access-key.
    #[arg(long, value_name = "KEY", requires = "fence_store")]
    fence_access_key: Option<String>,
    /// Its secret key; better HELIOFS_SECRET_KEY_FENCE.
    #[arg(long, value_name = "KEY", requires = "fence_store")]
    fence_secret_key: Option<String>,
    /// Its region, when the URL does not say.
    #[arg(
        long,
        value_name = "REGION",
        default_value = "",
        requires = "fence_store"
    )]
    fence_region: String,
    /// A region that can't renew the marker stops writing after this time; a promotion by force waits for it.
    #[arg(long, value_parser = units::parse_duration, default_value = "10s", value_name = "TIME")]
    fence_lease: Duration,
}

impl FenceAccess {
    /// Whether the volume is to do without.
    pub(crate) fn is_none(&self) -> bool {
        self.fence_store.as_deref() == Some(NONE)
    }

    /// The store that is named; `None`: none is.
    pub(crate) fn resolve(&self) -> Outcome<Option<FenceStore>> {
        let Some(bucket) = self.fence_store.as_ref().filter(|_| !self.is_none()) else {
            return Ok(None);
        };
        if !LEASE.contains(&self.fence_lease) {
            return Err(
                Failure::usage("--fence-lease is out of bounds").hint("choose from 1s to 10m")
            );
        }
        let keys = find_keys(&self.fence_access_key, &self.fence_secret_key, "_FENCE")?;
        let (access_key, secret_key) = match keys {
            Some(keys) => keys,
            None => Keys::default().find()?,
        };
        Ok(Some(FenceStore {
            store: Some(StorageConfig {
                storage: "s3".to_owned(),
                bucket: bucket.clone(),
                access_key,
                secret_key,
                region: self.fence_region.clone(),
                ..StorageConfig::default()
            }),
            lease_ms: u32::try_from(self.fence_lease.as_millis()).unwrap_or(u32::MAX),
        }))
    }
}

/// Refuses at a mirror, and at a source that was superseded.
pub(crate) fn written_here(volume: &Volume) -> Outcome {
    match &volume.mirror {
        None => Ok(()),
        Some(mirror) => Err(Failure::new(format!(
            "{} is a mirror: what fences it is said at the source",
            volume.name
        ))
        .hint(format!("do it at {}/{}", mirror.source, mirror.volume))),
    }
}

/// Refuses unless every node of the cluster says that it knows fence stores: another one would lead and write without looking.
pub(crate) async fn known_by_all(cluster: &Cluster) -> Outcome {
    let mut unknowing = Vec::new();
    for (peer, status) in cluster.status_all().await {
        match status {
            Ok(status) if status.fences => {}
            Ok(_) => unknowing.push(format!("{peer} is of an earlier release")),
            Err(error) => unknowing.push(format!("{peer} does not answer: {error}")),
        }
    }
    match unknowing.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(format!(
            "not all metadata nodes are known to know fence stores: {}",
            unknowing.join("; ")
        ))
        .hint("upgrade, start or remove them first; `heliofs raft status` shows them")),
    }
}

/// Makes the volume's marker name this cluster, then tells the cluster to keep it.
pub(crate) async fn fence(
    cluster: &Cluster,
    volume: &Volume,
    store: FenceStore,
) -> Outcome<Volume> {
    written_here(volume)?;
    known_by_all(cluster).await?;
    let bucket = store.store.clone().unwrap_or_default();
    let options = StoreOptions {
        deadline: Duration::from_secs(10),
        attempt_timeout: Duration::from_secs(5),
        memory_cache_bytes: 0,
        ..StoreOptions::default()
    };
    blockstore::object::create_bucket(&bucket, &options).await?;
    let status = cluster.status().await?;
    let me = Me {
        volume: volume.id,
        cluster: status.cluster_id,
        epoch: volume.position.unwrap_or_default().epoch,
    };
    let url = url_of(&status);
    let register = fence::open(&store, fence::prefix(volume))?;
    fence::claim(&register, me, &url, fence::lease(&store))
        .await
        .map_err(|error| {
            Failure::new(error).hint(
                "if that region is gone for good, delete the marker object in the fence store first",
            )
        })?;
    let update = UpdateVolumeRequest {
        name: volume.name.clone(),
        fence: Some(store),
        ..UpdateVolumeRequest::default()
    };
    Ok(cluster.update_volume(update).await?)
}

/// Gives up the marker of the fence store that the volume has now, before it gets `next`, another one or none: a mirror that does
/// not know of the change must not believe a marker that nobody renews. Until the change is made the volume is read-only.
pub(crate) async fn give_up(
    cluster: &Cluster,
    volume: &Volume,
    next: Option<&FenceStore>,
) -> Outcome<()> {
    let bucket = |fence: &FenceStore| fence.store.clone().unwrap_or_default().bucket;
    let Some(now) = &volume.fence else {
        return Ok(());
    };
    if volume.mirror.is_some() || next.is_some_and(|next| bucket(next) == bucket(now)) {
        return Ok(());
    }
    let unreachable = |error: &dyn std::fmt::Display| {
        Failure::new(format!(
            "the marker in the fence store {} can't be given up: {error}",
            bucket(now)
        ))
        .hint("a mirror could be promoted by it; if that store is gone for good: --abandon-fence")
    };
    let register = fence::open(now, fence::prefix(volume)).map_err(|error| unreachable(&error))?;
    let me = Me {
        volume: volume.id,
        cluster: cluster.status().await?.cluster_id,
        epoch: volume.position.unwrap_or_default().epoch,
    };
    match fence::give_up(&register, me).await {
        Ok(()) => Ok(()),
        // Without its fence store this cluster would write beside that one.
        Err(TakeError::TakenBy(marker)) => Err(Failure::new(format!(
            "{} has been taken over by the cluster at {}, with epoch {}",
            volume.name, marker.url, marker.epoch
        ))
        .hint("`heliofs mirror rejoin` makes this one its mirror")),
        Err(error) => Err(unreachable(&error)),
    }
}

/// META-URL of a cluster, as its nodes are known to each other.
pub(crate) fn url_of(status: &heliofs_proto::v1::StatusResponse) -> String {
    let addresses: Vec<&str> = status
        .nodes
        .iter()
        .map(|node| node.address.as_str())
        .collect();
    format!("helio://{}", addresses.join(","))
}

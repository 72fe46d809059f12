//! The object that says whose prefix this is: no two volumes share one, and nobody mounts the wrong bucket.

use bytes::Bytes;
use object_store::PutPayload;
use serde::{Deserialize, Serialize};

use super::Bucket;
use crate::StoreError;

/// The marker's name below the volume's prefix.
pub const MARKER_NAME: &str = ".heliofs-volume";

/// Beside it, once the volume was promoted: the epoch that is written.
pub const EPOCH_NAME: &str = ".heliofs-epoch";

/// Whether an object of this name says something about the bucket, and holds no data.
pub fn is_about_the_bucket(name: &str) -> bool {
    name == MARKER_NAME || name == EPOCH_NAME
}

/// About their length.
const MARKER_BYTES: u64 = 256;

/// What the marker says, as JSON.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Marker {
    /// Version of this object.
    format: u32,
    /// `StorageConfig.uuid` of the volume.
    uuid: String,
}

impl Marker {
    fn encode(uuid: &str) -> Bytes {
        let marker = Self {
            format: 1,
            uuid: uuid.to_owned(),
        };
        serde_json::to_vec(&marker)
            .expect("two plain fields serialize")
            .into()
    }
}

/// What the object [`EPOCH_NAME`] says, as JSON.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Written {
    /// Version of this object.
    format: u32,
    /// The newest epoch in which objects of this prefix are referred to.
    epoch: u32,
}

impl Bucket {
    /// The epoch that the bucket was told of; 0: of none.
    ///
    /// Errors: the store's; `Invalid` for an object that is not what it should be.
    pub async fn epoch(&self) -> Result<u32, StoreError> {
        let found = match self.get_about(EPOCH_NAME, MARKER_BYTES).await {
            Ok(found) => found,
            Err(StoreError::NotFound { .. }) => return Ok(0),
            Err(error) => return Err(error),
        };
        serde_json::from_slice::<Written>(&found)
            .map(|written| written.epoch)
            .map_err(|error| {
                let key = self.key(EPOCH_NAME);
                StoreError::Invalid(format!("`{key}` does not say an epoch: {error}"))
            })
    }

    /// Tells whoever still believes in an earlier epoch that what it holds for dead may live in this one: see
    /// [`Bucket::check_epoch`]. A later one that is there stays; two promotions at the same moment may still leave the earlier.
    pub async fn raise_epoch(&self, epoch: u32) -> Result<(), StoreError> {
        if self.epoch().await? >= epoch {
            return Ok(());
        }
        let written = Written { format: 1, epoch };
        let bytes = serde_json::to_vec(&written).expect("two numbers serialize");
        self.put(EPOCH_NAME, bytes.into()).await
    }

    /// What a volume in `epoch` asks before it deletes anything here.
    ///
    /// Errors: `Invalid` when a later epoch is written in another region, which may refer to what is dead here; the store's.
    pub async fn check_epoch(&self, epoch: u32) -> Result<(), StoreError> {
        match self.epoch().await? {
            later if later > epoch => Err(StoreError::Invalid(format!(
                "the volume is written in epoch {later} in another region, and here in epoch {epoch}: nothing is deleted from {}",
                self.key("")
            ))),
            _ => Ok(()),
        }
    }

    /// Claims the prefix for the volume with this uuid. Claiming it again is fine.
    ///
    /// Errors: `AlreadyExists` when another volume's data lies there; `Denied`, `Unavailable`.
    pub async fn claim_marker(&self, uuid: &str) -> Result<(), StoreError> {
        let bytes = Marker::encode(uuid);
        let checksum = crc32fast::hash(&bytes);
        match self
            .put_new(MARKER_NAME, PutPayload::from_bytes(bytes), checksum)
            .await
        {
            // Servers without conditional puts overwrite; read it back to see who won.
            Ok(()) => self.check_marker(uuid).await,
            Err(StoreError::AlreadyExists { .. }) => self.check_marker(uuid).await,
            Err(error) => Err(error),
        }
    }

    /// Whether the prefix is the volume's with this uuid.
    ///
    /// Errors: `NotFound` when nobody has claimed it; `AlreadyExists` when another volume has; `Denied`, `Unavailable`.
    pub async fn check_marker(&self, uuid: &str) -> Result<(), StoreError> {
        let found = self.get_about(MARKER_NAME, MARKER_BYTES).await?;
        let key = self.key(MARKER_NAME);
        match serde_json::from_slice::<Marker>(&found) {
            Ok(marker) if marker.uuid == uuid => Ok(()),
            Ok(marker) => Err(StoreError::AlreadyExists {
                key,
                detail: format!(
                    "this prefix belongs to the volume with uuid {}, not {uuid}; \
                     choose another name or bucket, or destroy that volume first",
                    marker.uuid
                ),
            }),
            Err(error) => Err(StoreError::AlreadyExists {
                key,
                detail: format!("it is no marker of heliofs: {error}"),
            }),
        }
    }
}

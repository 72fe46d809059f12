//! The object that says whose prefix this is: no two volumes share one, and nobody mounts the wrong bucket.

use bytes::Bytes;
use object_store::PutPayload;
use serde::{Deserialize, Serialize};

use super::Bucket;
use crate::StoreError;

/// The marker's name below the volume's prefix.
pub const MARKER_NAME: &str = ".heliofs-volume";

/// About its length.
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

impl Bucket {
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

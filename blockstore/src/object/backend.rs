//! Opens the object store that a volume's settings name.

use std::collections::HashMap;
use std::path::{Path as FsPath, PathBuf};
use std::sync::{Arc, LazyLock};

use heliofs_proto::v1::StorageConfig;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::{ObjectStore, path::Path};
use parking_lot::Mutex;

use super::s3;
use crate::{StoreError, StoreOptions};

/// An opened object store.
#[derive(Clone, Debug)]
pub(crate) struct Backend {
    /// The store.
    pub(crate) store: Arc<dyn ObjectStore>,
    /// What lies in front of the volume's prefix.
    pub(crate) prefix: Path,
    /// Where the `file` backend keeps its objects.
    pub(crate) directory: Option<PathBuf>,
}

/// Buckets of the `memory` backend, by name: all stores of one process that name the same bucket share it, as processes share
/// a real one.
static MEMORY_BUCKETS: LazyLock<Mutex<HashMap<String, Arc<InMemory>>>> =
    LazyLock::new(Mutex::default);

/// Opens what `config` names. Sends nothing.
pub(crate) fn open(config: &StorageConfig, options: &StoreOptions) -> Result<Backend, StoreError> {
    match config.storage.as_str() {
        "file" => {
            let directory = file_directory(config)?;
            let store = LocalFileSystem::new_with_prefix(directory)
                .map_err(|error| {
                    StoreError::Invalid(format!(
                        "the bucket directory `{}` cannot be used; create it with `heliofs format`, or mount its disk: {error}",
                        directory.display()
                    ))
                })?
                // An acknowledged put survives a power loss; object_store leaves this off by default.
                .with_fsync(true);
            Ok(Backend {
                store: Arc::new(store),
                prefix: Path::default(),
                directory: Some(directory.to_owned()),
            })
        }
        "s3" => {
            let (store, place) = s3::open(config, options)?;
            Ok(Backend {
                store: Arc::new(store),
                prefix: Path::from(place.prefix),
                directory: None,
            })
        }
        "memory" => {
            let mut buckets = MEMORY_BUCKETS.lock();
            let store = buckets.entry(config.bucket.clone()).or_default();
            Ok(Backend {
                store: Arc::clone(store) as Arc<dyn ObjectStore>,
                prefix: Path::default(),
                directory: None,
            })
        }
        other => Err(StoreError::Invalid(format!(
            "storage `{other}` is unknown; file, s3 and memory are known"
        ))),
    }
}

/// Creates the bucket (the directory, for `file`) that `config` names, unless it exists. For `format`.
///
/// Errors: `Denied`, `Unavailable`, `Invalid`; the messages say what to do.
pub async fn create_bucket(
    config: &StorageConfig,
    options: &StoreOptions,
) -> Result<(), StoreError> {
    match config.storage.as_str() {
        "file" => {
            let directory = file_directory(config)?;
            create_directories(directory).map_err(|error| {
                StoreError::Invalid(format!(
                    "cannot create the bucket directory `{}`: {error}",
                    directory.display()
                ))
            })
        }
        "s3" => s3::create_bucket(config, options).await,
        _ => open(config, options).map(drop),
    }
}

/// Creates a directory and those above it, and makes the new names durable.
fn create_directories(directory: &FsPath) -> std::io::Result<()> {
    let missing = directory
        .ancestors()
        .take_while(|path| !path.exists())
        .count();
    std::fs::create_dir_all(directory)?;
    for parent in directory.ancestors().skip(1).take(missing) {
        std::fs::File::open(parent)?.sync_all()?;
    }
    Ok(())
}

fn file_directory(config: &StorageConfig) -> Result<&FsPath, StoreError> {
    let directory = FsPath::new(
        config
            .bucket
            .strip_prefix("file://")
            .unwrap_or(&config.bucket),
    );
    // A relative one would mean another place to every process.
    if directory.is_absolute() {
        Ok(directory)
    } else {
        Err(StoreError::Invalid(format!(
            "the bucket directory `{}` must be an absolute path",
            config.bucket
        )))
    }
}

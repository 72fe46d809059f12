//! [`Register`]: one object that is changed only by whoever has read its last version, by conditional puts.
//!
//! Nothing is tried again here: of a conditional put that had no answer nobody knows whether it took effect, and only the caller
//! can tell its own bytes from another's.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use heliofs_proto::v1::StorageConfig;
use object_store::path::Path;
use object_store::{
    Error, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, UpdateVersion,
};

use super::backend;
use super::fault::as_error;
use crate::{StoreError, StoreOptions};

/// A version of the object, as the store calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    etag: Option<String>,
    version: Option<String>,
}

/// How a conditional put went.
#[derive(Clone, Debug)]
pub enum Written {
    /// It took effect; the object's version now.
    Done(Version),
    /// Somebody else was faster: nothing changed.
    Conflict,
}

/// One object of a bucket, below a volume's prefix.
pub struct Register {
    store: Arc<dyn ObjectStore>,
    path: Path,
}

impl Register {
    /// The object `name` below `volume_name`. Sends nothing; each request has `timeout`.
    ///
    /// Errors: `Invalid`, also for stores that have no conditional puts (`file`).
    pub fn open(
        config: &StorageConfig,
        volume_name: &str,
        name: &str,
        timeout: Duration,
    ) -> Result<Self, StoreError> {
        if config.storage == "file" {
            return Err(StoreError::Invalid(
                "a directory has no conditional puts: name a bucket".to_owned(),
            ));
        }
        let options = StoreOptions {
            deadline: timeout,
            attempt_timeout: timeout,
            memory_cache_bytes: 0,
            ..StoreOptions::default()
        };
        let backend = backend::open(config, &options)?;
        Ok(Self {
            path: backend.prefix.join(volume_name).join(name),
            store: backend.store,
        })
    }

    /// The object's key.
    pub fn key(&self) -> &str {
        self.path.as_ref()
    }

    /// What it holds; `None`: nobody has put it.
    ///
    /// Errors: any but `NotFound` and `AlreadyExists`; `Retry` may succeed next time.
    pub async fn read(&self) -> Result<Option<(Bytes, Version)>, StoreError> {
        let found = match self.store.get(&self.path).await {
            Ok(found) => found,
            Err(error) => {
                return match as_error("get", self.key(), error) {
                    StoreError::NotFound { .. } => Ok(None),
                    error => Err(error),
                };
            }
        };
        let version = Version {
            etag: found.meta.e_tag.clone(),
            version: found.meta.version.clone(),
        };
        let bytes = found.bytes().await;
        let bytes = bytes.map_err(|error| as_error("get", self.key(), error))?;
        Ok(Some((bytes, version)))
    }

    /// Puts it if it is at `over`; `None`: if it does not exist.
    ///
    /// Errors: as [`Register::read`]; after `Retry` it may or may not have taken effect. `Invalid`: the store has no conditional
    /// puts.
    pub async fn write(&self, bytes: Bytes, over: Option<&Version>) -> Result<Written, StoreError> {
        let mode = match over {
            None => PutMode::Create,
            Some(version) => PutMode::Update(UpdateVersion {
                e_tag: version.etag.clone(),
                version: version.version.clone(),
            }),
        };
        let payload = PutPayload::from_bytes(bytes);
        let put = self
            .store
            .put_opts(&self.path, payload, PutOptions::from(mode));
        match put.await {
            Ok(put) => Ok(Written::Done(Version {
                etag: put.e_tag,
                version: put.version,
            })),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(Written::Conflict),
            Err(error) => match as_error("put", self.key(), error) {
                // There is nothing to be replaced.
                StoreError::NotFound { .. } => Ok(Written::Conflict),
                error => Err(error),
            },
        }
    }

    /// Removes it; it may be gone already.
    ///
    /// Errors: as [`Register::read`].
    pub async fn remove(&self) -> Result<(), StoreError> {
        match self.store.delete(&self.path).await {
            Ok(()) => Ok(()),
            Err(error) => match as_error("delete", self.key(), error) {
                StoreError::NotFound { .. } => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Whether the store keeps its word: a put over a version that never was must change nothing.
    ///
    /// Errors: `Invalid` when it does not; else as [`Register::read`].
    pub async fn check_conditions(&self, now: &Bytes) -> Result<(), StoreError> {
        let never = Version {
            etag: Some("\"00000000000000000000000000000000\"".to_owned()),
            version: None,
        };
        match self.write(now.clone(), Some(&never)).await? {
            Written::Conflict => Ok(()),
            Written::Done(_) => Err(StoreError::Invalid(format!(
                "the server of `{}` ignores the conditions of puts (If-Match): it can't fence anything",
                self.key()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(storage: &str, bucket: &str) -> StorageConfig {
        StorageConfig {
            storage: storage.to_owned(),
            bucket: bucket.to_owned(),
            ..StorageConfig::default()
        }
    }

    #[tokio::test]
    async fn of_two_writers_who_read_the_same_one_wins() {
        let timeout = Duration::from_secs(1);
        let config = config("memory", "register-tests");
        let register = Register::open(&config, "abc", "marker", timeout).unwrap();
        assert!(register.read().await.unwrap().is_none());
        let first = register.write("one".into(), None).await.unwrap();
        let Written::Done(first) = first else {
            panic!("{first:?}")
        };
        let again = register.write("two".into(), None).await.unwrap();
        assert!(matches!(again, Written::Conflict));
        let second = register.write("two".into(), Some(&first)).await.unwrap();
        assert!(matches!(second, Written::Done(_)));
        let late = register.write("three".into(), Some(&first)).await.unwrap();
        assert!(matches!(late, Written::Conflict));
        let (bytes, version) = register.read().await.unwrap().unwrap();
        assert_eq!(bytes, "two");
        let Written::Done(second) = second else {
            unreachable!()
        };
        assert_eq!(version, second);
        register.remove().await.unwrap();
        register.remove().await.unwrap();
        assert!(register.read().await.unwrap().is_none());
        let over = register.write("late".into(), Some(&second)).await.unwrap();
        assert!(matches!(over, Written::Conflict), "it came back: {over:?}");
    }

    #[test]
    fn a_directory_fences_nothing() {
        let config = config("file", "/tmp");
        let opened = Register::open(&config, "abc", "marker", Duration::from_secs(1));
        assert!(matches!(opened, Err(StoreError::Invalid(_))));
    }
}

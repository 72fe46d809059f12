//! [`PlainBucket`]: objects of an S3 bucket under their own keys, whoever wrote them. For `heliofs sync`.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use heliofs_proto::v1::StorageConfig;
use object_store::aws::AmazonS3;
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, MultipartId, ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload,
};

use super::attempts::Patience;
use super::fault::{Fault, as_error, classify};
use super::listing::{From, Listing, Page, Pager};
use super::s3::{self, S3Place};
use crate::metrics::Metrics;
use crate::{Kind, StoreError, StoreOptions};

/// What a listing says of an object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlainObject {
    /// Its key below the place that was listed.
    pub key: String,
    /// Its length.
    pub bytes: u64,
    /// When it was stored, nanoseconds since 1970 by the server's clock; many servers count whole seconds.
    pub modified: i64,
}

/// Bytes of an object, and what the object was when they were read.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The bytes.
    pub bytes: Bytes,
    /// The length of the whole object.
    pub object_bytes: u64,
    /// The server's name for this content of the object.
    pub etag: Option<String>,
}

/// An object that is being stored in parts; it appears when it is finished.
#[derive(Debug)]
pub struct Upload {
    path: Path,
    id: MultipartId,
}

/// A part that is stored.
#[derive(Clone, Debug)]
pub struct Part(PartId);

/// All objects below a place of a bucket. Keys are relative to it; the empty key is the object of the place's own name.
///
/// Requests are tried again as those of [`super::Bucket`].
#[derive(Clone, Debug)]
pub struct PlainBucket {
    store: Arc<AmazonS3>,
    place: S3Place,
    patience: Patience,
    metrics: Arc<Metrics>,
}

impl PlainBucket {
    /// Opens the bucket and prefix that `config` names; only `s3`. Sends nothing.
    ///
    /// Errors: `Invalid`.
    pub fn open(config: &StorageConfig, options: &StoreOptions) -> Result<Self, StoreError> {
        let (store, place) = s3::open(config, options)?;
        Path::parse(&place.prefix)
            .map_err(|error| StoreError::Invalid(format!("`{}`: {error}", config.bucket)))?;
        Ok(Self {
            store: Arc::new(store),
            metrics: Arc::new(Metrics::new(&place.bucket, options.registry.as_ref())),
            patience: Patience::new(options),
            place,
        })
    }

    /// Where it is.
    pub fn place(&self) -> &S3Place {
        &self.place
    }

    /// The same bucket, another place of it.
    #[must_use]
    pub fn at(&self, prefix: &str) -> Self {
        let mut other = self.clone();
        prefix.clone_into(&mut other.place.prefix);
        other
    }

    /// The key in the bucket.
    pub fn key(&self, key: &str) -> String {
        match (self.place.prefix.as_str(), key) {
            ("", key) => key.to_owned(),
            (prefix, "") => prefix.to_owned(),
            (prefix, key) => format!("{prefix}/{key}"),
        }
    }

    /// Exactly the key, or an error where `object_store` would put something else in its place.
    fn path(&self, key: &str) -> Result<Path, StoreError> {
        let whole = self.key(key);
        match Path::parse(&whole) {
            Ok(path) if path.as_ref() == whole && !whole.is_empty() => Ok(path),
            Ok(_) => Err(StoreError::Invalid(format!(
                "`{whole}` is no key that can be stored"
            ))),
            Err(error) => Err(StoreError::Invalid(error.to_string())),
        }
    }

    /// Objects below the place in the order of the bytes of their keys. Ends with the first error.
    ///
    /// Errors: `Denied`, `Unavailable`; `Invalid` for a key that is not usable (an empty name between slashes, control
    /// characters) or a server that knows no order.
    pub fn list(&self, from: Option<From>) -> BoxStream<'static, Result<PlainObject, StoreError>> {
        let prefix = match self.place.prefix.as_str() {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        };
        let strip = prefix.len();
        let from = from.map(|from| From {
            key: format!("{prefix}{}", from.key),
            ..from
        });
        // Amazon's own buckets are in the order of bytes.
        let bytewise = self.place.endpoint.is_none();
        let listing = Listing::new(self.clone(), &prefix, from, bytewise);
        futures::stream::try_unfold(listing, async |mut listing| {
            Ok(listing.next().await?.map(|object| (object, listing)))
        })
        .map(move |object| {
            object.map(|mut object: PlainObject| {
                object.key.drain(..strip.min(object.key.len()));
                object
            })
        })
        .boxed()
    }

    /// What lies under the key; `None` when nothing does.
    ///
    /// Errors: `Denied`, `Unavailable`, `Invalid`.
    pub async fn head(&self, key: &str) -> Result<Option<PlainObject>, StoreError> {
        let path = self.path(key)?;
        let found = self
            .attempts("head", &path, 0, || async {
                let found = self.store.head(&path).await;
                found.map_err(|error| as_error("head", path.as_ref(), error))
            })
            .await;
        match found {
            Ok(meta) => Ok(Some(PlainObject {
                key: key.to_owned(),
                ..object(&meta)
            })),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// An object, or bytes `range` of it.
    ///
    /// Errors: `NotFound`, `Denied`, `Unavailable`, `Invalid` (no such range).
    pub async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Piece, StoreError> {
        let path = self.path(key)?;
        let expected = range.as_ref().map_or(0, |range| range.end - range.start);
        let piece = self
            .attempts("get", &path, expected, || {
                self.get_once(&path, range.clone())
            })
            .await?;
        self.metrics.gets.inc();
        self.metrics.get_bytes.inc_by(piece.bytes.len() as u64);
        Ok(piece)
    }

    async fn get_once(&self, path: &Path, range: Option<Range<u64>>) -> Result<Piece, StoreError> {
        let options = GetOptions {
            range: range.map(GetRange::Bounded),
            ..GetOptions::default()
        };
        let failed = |error| as_error("get", path.as_ref(), error);
        let found = self.store.get_opts(path, options).await.map_err(failed)?;
        let promised = found.range.end - found.range.start;
        let (object_bytes, etag) = (found.meta.size, found.meta.e_tag.clone());
        let bytes = found.bytes().await.map_err(failed)?;
        if bytes.len() as u64 != promised {
            // A body cut short by the connection is not always an error of the client's.
            return Err(StoreError::Retry {
                operation: "get",
                key: path.to_string(),
                detail: format!("the body has {} of {promised} bytes", bytes.len()),
            });
        }
        Ok(Piece {
            bytes,
            object_bytes,
            etag,
        })
    }

    /// Stores an object in one request, replacing what lies there.
    ///
    /// Errors: `Denied`, `Unavailable` (may or may not be stored), `Invalid`.
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        let path = self.path(key)?;
        let length = bytes.len() as u64;
        self.attempts("put", &path, length, || {
            let payload = PutPayload::from_bytes(bytes.clone());
            let path = &path;
            async move {
                let stored = self.store.put(path, payload).await;
                stored.map_err(|error| as_error("put", path.as_ref(), error))
            }
        })
        .await?;
        self.metrics.puts.inc();
        self.metrics.put_bytes.inc_by(length);
        Ok(())
    }

    /// Begins an object that is stored in parts.
    ///
    /// Errors: as of [`PlainBucket::put`].
    pub async fn begin(&self, key: &str) -> Result<Upload, StoreError> {
        let path = self.path(key)?;
        let id = self
            .attempts("begin", &path, 0, || async {
                let begun = self.store.create_multipart(&path).await;
                begun.map_err(|error| as_error("begin", path.as_ref(), error))
            })
            .await?;
        Ok(Upload { path, id })
    }

    /// Stores part `index` (from 0; at most 10,000 parts, all but the last of one length of at least 5 MiB).
    ///
    /// Errors: as of [`PlainBucket::put`].
    pub async fn put_part(
        &self,
        upload: &Upload,
        index: usize,
        bytes: Bytes,
    ) -> Result<Part, StoreError> {
        let Upload { path, id } = upload;
        let length = bytes.len() as u64;
        let part = self
            .attempts("put part", path, length, || {
                let payload = PutPayload::from_bytes(bytes.clone());
                async move {
                    let stored = self.store.put_part(path, id, index, payload).await;
                    stored.map_err(|error| as_error("put part", path.as_ref(), error))
                }
            })
            .await?;
        self.metrics.put_bytes.inc_by(length);
        Ok(Part(part))
    }

    /// The object appears, whole, with the parts in their order.
    ///
    /// Errors: as of [`PlainBucket::put`]; `NotFound` when the upload is gone, which an earlier attempt may have finished.
    pub async fn finish(&self, upload: &Upload, parts: Vec<Part>) -> Result<(), StoreError> {
        let Upload { path, id } = upload;
        let parts: Vec<PartId> = parts.into_iter().map(|Part(id)| id).collect();
        self.attempts("finish", path, 0, || async {
            let done = self.store.complete_multipart(path, id, parts.clone()).await;
            done.map_err(|error| as_error("finish", path.as_ref(), error))
        })
        .await?;
        self.metrics.puts.inc();
        Ok(())
    }

    /// Drops what was stored of an object that will not be finished.
    ///
    /// Errors: `Denied`, `Unavailable`; the server keeps the parts then.
    pub async fn abort(&self, upload: &Upload) -> Result<(), StoreError> {
        let Upload { path, id } = upload;
        let aborted = self
            .attempts("abort", path, 0, || async {
                let aborted = self.store.abort_multipart(path, id).await;
                aborted.map_err(|error| as_error("abort", path.as_ref(), error))
            })
            .await;
        gone_is_fine(aborted)
    }

    /// Deletes an object; one that does not exist is deleted already.
    ///
    /// Errors: `Denied`, `Unavailable`, `Invalid`.
    pub async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let path = self.path(key)?;
        let deleted = self
            .attempts("delete", &path, 0, || async {
                let deleted = self.store.delete(&path).await;
                deleted.map_err(|error| as_error("delete", path.as_ref(), error))
            })
            .await;
        gone_is_fine(deleted)
    }

    async fn attempts<T, Fut>(
        &self,
        operation: &'static str,
        path: &Path,
        bytes: u64,
        attempt: impl FnMut() -> Fut,
    ) -> Result<T, StoreError>
    where
        Fut: Future<Output = Result<T, StoreError>>,
    {
        self.patience
            .attempts(&self.metrics, operation, path.as_ref(), bytes, attempt)
            .await
    }
}

fn gone_is_fine(result: Result<(), StoreError>) -> Result<(), StoreError> {
    match result {
        Err(StoreError::NotFound { .. }) => Ok(()),
        other => other,
    }
}

fn object(meta: &ObjectMeta) -> PlainObject {
    PlainObject {
        key: meta.location.to_string(),
        bytes: meta.size,
        modified: meta.last_modified.timestamp_nanos_opt().unwrap_or(0),
    }
}

#[async_trait]
impl Pager for PlainBucket {
    async fn page(
        &self,
        prefix: &str,
        after: Option<&str>,
        token: Option<&str>,
        max: usize,
    ) -> Result<Page, StoreError> {
        let shown = format!("{}/{prefix}", self.place.bucket);
        let ask = || async {
            let options = PaginatedListOptions {
                // A token knows where it began.
                offset: after.filter(|_| token.is_none()).map(str::to_owned),
                page_token: token.map(str::to_owned),
                max_keys: (max > 0).then_some(max),
                ..PaginatedListOptions::default()
            };
            let some = Some(prefix).filter(|prefix| !prefix.is_empty());
            let found = self.store.list_paginated(some, options).await;
            found.map_err(|error| refused("list", &shown, error))
        };
        let found = self
            .patience
            .attempts(&self.metrics, "list", &shown, 0, ask)
            .await?;
        Ok(Page {
            objects: found.result.objects.iter().map(object).collect(),
            token: found.page_token,
        })
    }
}

/// A list that finds no bucket is no object that is missing.
fn refused(operation: &'static str, key: &str, error: Error) -> StoreError {
    let detail = error.to_string();
    match classify(operation, key, error) {
        Fault::Error(StoreError::NotFound { .. }) => StoreError::Denied {
            operation,
            key: key.to_owned(),
            detail: format!("is the bucket there? {detail}"),
        },
        Fault::Error(error) => error,
        Fault::OutOfRange | Fault::NoConditions => StoreError::Invalid(detail),
    }
}

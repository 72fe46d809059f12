//! [`Place`]: a source or destination, whatever it is: what lies there in order, and how it is opened.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockstore::object::{From, PlainBucket, PlainObject, RateLimit};
use blockstore::{Kind, StoreError, StoreOptions};
use bytes::Bytes;
use futures::StreamExt;
use heliofs_proto::v1::StorageConfig;
use tokio::sync::mpsc;

use super::filter::Filters;
use super::local::{self, Seen, Tree};
use crate::failure::{Failure, Outcome, While};

/// What one request moves at most, unless an object needs larger parts. More than the 5 MiB that S3 asks for.
pub(crate) const PIECE: u64 = 8 << 20;

/// Objects that a listing is ahead of what is done with them.
const AHEAD: usize = 2000;

/// Which of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    Source,
    Destination,
}

impl Role {
    /// As in the usage line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Source => "SRC",
            Self::Destination => "DST",
        }
    }

    /// What flags and variables of its keys end with.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Source => "",
            Self::Destination => "2",
        }
    }
}

#[derive(Clone, Debug)]
enum Kinds {
    Local(Tree),
    Bucket(PlainBucket),
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    role: Role,
    shown: String,
    kind: Kinds,
}

/// Why nothing came of one object.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// The source's object is no longer there.
    Gone,
    /// It was written to meanwhile.
    Changed,
    /// Anything else.
    Failed(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("it is no longer there"),
            Self::Changed => f.write_str("it changes while it is read"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

impl std::convert::From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        match error.kind() {
            Kind::NotFound => Self::Gone,
            _ => Self::Failed(error.to_string()),
        }
    }
}

impl std::convert::From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::NotFound => Self::Gone,
            // A file that became shorter.
            std::io::ErrorKind::UnexpectedEof => Self::Changed,
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// Files that are no objects, for the summary.
pub(crate) type Ignored = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// A listing, in order; an error is its last item.
pub(crate) type Listing = mpsc::Receiver<Outcome<PlainObject>>;

impl Place {
    /// Understands a path, `file:///…`, `s3://BUCKET[/PREFIX]` and `http[s]://HOST[:PORT]/BUCKET[/PREFIX]`. `keys`: access key
    /// and secret key; without them those of the environment that S3's own tools know.
    ///
    /// Errors: usage.
    pub(crate) fn parse(
        role: Role,
        text: &str,
        keys: Option<(String, String)>,
        region: &str,
        options: &StoreOptions,
    ) -> Outcome<Self> {
        let kind = match text.split_once("://") {
            None | Some(("file", _)) => {
                let path = text.strip_prefix("file://").unwrap_or(text);
                if path.is_empty() {
                    return Err(Failure::usage(format!("{} is empty", role.name())));
                }
                let path = std::path::absolute(path).while_(format_args!("use {path}"))?;
                Kinds::Local(Tree::new(path))
            }
            Some(("s3" | "http" | "https", _)) => {
                let (access_key, secret_key) = keys.unwrap_or_default();
                let config = StorageConfig {
                    storage: "s3".to_owned(),
                    bucket: text.to_owned(),
                    access_key,
                    secret_key,
                    region: region.to_owned(),
                    ..StorageConfig::default()
                };
                let bucket = PlainBucket::open(&config, options)
                    .map_err(|error| Failure::usage(format!("{}: {error}", role.name())))?;
                Kinds::Bucket(bucket)
            }
            Some((scheme, _)) => {
                return Err(Failure::usage(format!(
                    "{} `{text}`: nothing is known of {scheme}://",
                    role.name()
                ))
                .hint(
                    "write a path, file:///PATH, s3://BUCKET/PREFIX or http://HOST:PORT/BUCKET/PREFIX",
                ));
            }
        };
        Ok(Self {
            role,
            shown: text.to_owned(),
            kind,
        })
    }

    /// As it was typed.
    pub(crate) fn shown(&self) -> &str {
        &self.shown
    }

    pub(crate) fn is_bucket(&self) -> bool {
        matches!(self.kind, Kinds::Bucket(_))
    }

    /// The server and the bucket; `None` for a local path.
    pub(crate) fn server(&self) -> Option<(Option<&str>, &str)> {
        match &self.kind {
            Kinds::Local(_) => None,
            Kinds::Bucket(bucket) => {
                let place = bucket.place();
                Some((place.endpoint.as_deref(), &place.bucket))
            }
        }
    }

    /// The local path, or the prefix in the bucket.
    fn base(&self) -> PathBuf {
        match &self.kind {
            Kinds::Local(tree) => {
                // As much of it as there is, without symbolic links.
                let root = tree.root();
                let there = root.ancestors().find_map(|above| {
                    let real = std::fs::canonicalize(above).ok()?;
                    Some(real.join(root.strip_prefix(above).ok()?))
                });
                there.unwrap_or_else(|| root.to_owned())
            }
            Kinds::Bucket(bucket) => PathBuf::from(&bucket.place().prefix),
        }
    }

    /// Whether one of them lies in the other.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let (a, b) = (self.base(), other.base());
        self.server() == other.server() && (a.starts_with(&b) || b.starts_with(&a))
    }

    /// A bucket whose prefix is not empty: it exists as long as objects lie below it.
    pub(crate) fn is_prefix(&self) -> bool {
        self.is_bucket() && !self.base().as_os_str().is_empty()
    }

    /// Whether it is one file or object, not what lies below: nothing else can be meant by a path of a file; a key is meant when
    /// it exists and no slash follows it.
    ///
    /// Errors: a local path that does not exist; a bucket that does not answer.
    pub(crate) async fn is_single(&self) -> Outcome<bool> {
        match &self.kind {
            Kinds::Local(tree) => {
                let metadata = std::fs::metadata(tree.root()).while_(format_args!(
                    "read {} {}",
                    self.role.name(),
                    self.shown
                ))?;
                if metadata.is_file() && self.shown.ends_with('/') {
                    return Err(Failure::usage(format!("{} is a file", self.shown)));
                }
                Ok(metadata.is_file())
            }
            Kinds::Bucket(bucket) if self.is_prefix() && !self.shown.ends_with('/') => {
                let found = bucket.head("").await;
                Ok(found
                    .map_err(|error| self.failure("look at", &error))?
                    .is_some())
            }
            Kinds::Bucket(_) => Ok(false),
        }
    }

    /// For a single object: the place of this name, when the place is a directory or the whole bucket.
    pub(crate) fn for_single(mut self, source: &Self) -> Outcome<Self> {
        let name = source.base();
        let name = name.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| Failure::usage(format!("{} has no name", source.shown)))?;
        match &mut self.kind {
            Kinds::Local(tree) if self.shown.ends_with('/') || tree.root().is_dir() => {
                *tree = Tree::new(tree.root().join(name));
            }
            Kinds::Bucket(bucket)
                if self.shown.ends_with('/') || bucket.place().prefix.is_empty() =>
            {
                let prefix = bucket.key(name);
                *bucket = bucket.at(&prefix);
            }
            Kinds::Local(_) | Kinds::Bucket(_) => {}
        }
        Ok(self)
    }

    /// What lies under the place's own name; for single objects.
    pub(crate) async fn single(&self) -> Outcome<Option<PlainObject>> {
        match &self.kind {
            Kinds::Local(tree) => match tree.open("").await {
                Ok(reader) => Ok(Some(PlainObject {
                    key: String::new(),
                    bytes: reader.bytes,
                    modified: reader.modified(),
                })),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error).while_(format_args!("read {}", self.shown)),
            },
            Kinds::Bucket(bucket) => {
                let found = bucket.head("").await;
                found.map_err(|error| self.failure("look at", &error))
            }
        }
    }

    /// Lists what `filters` keep, from `from` on, in a task of its own. `clean`: local files that killed runs left are removed.
    pub(crate) fn list(
        &self,
        from: Option<From>,
        filters: &Filters,
        clean: bool,
        ignored: Ignored,
    ) -> Listing {
        let (send, receive) = mpsc::channel(AHEAD);
        let (place, filters) = (self.clone(), filters.clone());
        match &self.kind {
            Kinds::Local(tree) => {
                let tree = tree.clone();
                tokio::task::spawn_blocking(move || {
                    let walked = tree.walk(
                        from.as_ref(),
                        clean,
                        &|directory| filters.keeps(directory),
                        &mut |seen| match seen {
                            Seen::File(file) => {
                                // An error means that nobody reads on.
                                !filters.keeps(&file.key) || send.blocking_send(Ok(file)).is_ok()
                            }
                            Seen::Ignored { key, why } => {
                                if filters.keeps(&key) {
                                    ignored(&key, why);
                                }
                                true
                            }
                        },
                    );
                    if let Err((path, error)) = walked {
                        let failed = Failure::new(format!(
                            "cannot read {}: {error}",
                            path.display()
                        ))
                        .hint(
                            "nothing is copied past what cannot be listed; --exclude leaves it out",
                        );
                        let _ = send.blocking_send(Err(failed));
                    }
                });
            }
            Kinds::Bucket(bucket) => {
                let mut listed = bucket.list(from);
                tokio::spawn(async move {
                    while let Some(object) = listed.next().await {
                        let object = match object {
                            Ok(object) if !filters.keeps(&object.key) => continue,
                            Ok(object) => Ok(object),
                            Err(error) => Err(place.failure("list", &error)),
                        };
                        if send.send(object).await.is_err() {
                            return;
                        }
                    }
                });
            }
        }
        receive
    }

    /// An error of the bucket as a user meets it.
    pub(crate) fn failure(&self, doing: &str, error: &StoreError) -> Failure {
        let (name, suffix) = (self.role.name(), self.role.suffix());
        let failure = Failure::new(format!("cannot {doing} {name} {}: {error}", self.shown));
        match error.kind() {
            Kind::Denied => failure.hint(format!(
                "is the bucket there? keys of {name} come from --access-key{suffix} and --secret-key{suffix}, or \
                 HELIOFS_ACCESS_KEY{suffix} and HELIOFS_SECRET_KEY{suffix}"
            )),
            Kind::Unavailable | Kind::Retry => {
                failure.hint("is the object store running, and is its address right?")
            }
            _ => failure,
        }
    }

    /// Makes the bucket or the directory, unless it exists.
    ///
    /// Errors: as they are for the user.
    pub(crate) async fn create(
        &self,
        keys: Option<(String, String)>,
        region: &str,
        options: &StoreOptions,
    ) -> Outcome {
        match &self.kind {
            Kinds::Local(tree) => std::fs::create_dir_all(tree.root())
                .while_(format_args!("create {}", tree.root().display())),
            Kinds::Bucket(_) => {
                let (access_key, secret_key) = keys.unwrap_or_default();
                let config = StorageConfig {
                    storage: "s3".to_owned(),
                    bucket: self.shown.clone(),
                    access_key,
                    secret_key,
                    region: region.to_owned(),
                    ..StorageConfig::default()
                };
                let made = blockstore::object::create_bucket(&config, options).await;
                made.map_err(|error| self.failure("use", &error))
            }
        }
    }

    /// Opens an object of the listing for reading. `listed_bytes`: its length there.
    pub(crate) async fn open(
        &self,
        key: &str,
        listed_bytes: u64,
        limit: Option<&RateLimit>,
    ) -> Result<Reader, Trouble> {
        match &self.kind {
            Kinds::Local(tree) => Ok(Reader::Local(tree.open(key).await?)),
            Kinds::Bucket(bucket) => {
                if let Some(limit) = limit {
                    limit.admit(listed_bytes.min(PIECE)).await;
                }
                // Of an empty object there is no range.
                let range = (listed_bytes > 0).then_some(0..PIECE);
                let first = bucket.get(key, range).await?;
                Ok(Reader::Object(Box::new(Object {
                    bucket: bucket.clone(),
                    key: key.to_owned(),
                    bytes: first.object_bytes,
                    etag: first.etag,
                    first: first.bytes,
                })))
            }
        }
    }

    /// The tree, if it is one.
    pub(crate) fn tree(&self) -> Option<&Tree> {
        match &self.kind {
            Kinds::Local(tree) => Some(tree),
            Kinds::Bucket(_) => None,
        }
    }

    /// The bucket, if it is one.
    pub(crate) fn bucket(&self) -> Option<&PlainBucket> {
        match &self.kind {
            Kinds::Local(_) => None,
            Kinds::Bucket(bucket) => Some(bucket),
        }
    }

    /// Deletes an object of the listing; `false` when there was none.
    pub(crate) async fn delete(&self, object: &PlainObject) -> Result<bool, Trouble> {
        match &self.kind {
            Kinds::Local(tree) => tree.delete(&object.key).await?,
            Kinds::Bucket(bucket) => {
                // An empty object that stands for a directory has lost the slash of its key in the listing.
                if object.bytes == 0 && bucket.head(&object.key).await?.is_none() {
                    return Ok(false);
                }
                bucket.delete(&object.key).await?;
            }
        }
        Ok(true)
    }

    /// A name for a key in messages: the empty key is the place's own.
    pub(crate) fn name<'a>(&'a self, key: &'a str) -> &'a str {
        match key {
            "" => Path::new(&self.shown)
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or(&self.shown),
            key => key,
        }
    }
}

/// An object that is read, piece by piece.
#[derive(Debug)]
pub(crate) enum Reader {
    Local(local::Reader),
    Object(Box<Object>),
}

/// See [`Reader`].
#[derive(Debug)]
pub(crate) struct Object {
    bucket: PlainBucket,
    key: String,
    bytes: u64,
    etag: Option<String>,
    first: Bytes,
}

impl Reader {
    /// The whole length.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Local(reader) => reader.bytes,
            Self::Object(object) => object.bytes,
        }
    }

    /// `length` bytes from `offset`; all of them, or an error.
    pub(crate) async fn read(
        &self,
        offset: u64,
        length: u64,
        limit: Option<&RateLimit>,
    ) -> Result<Bytes, Trouble> {
        let end = offset + length;
        if let Self::Object(object) = self
            && end <= object.first.len() as u64
        {
            return Ok(object.first.slice(offset as usize..end as usize));
        }
        if let Some(limit) = limit {
            limit.admit(length).await;
        }
        match self {
            Self::Local(reader) => {
                let length = usize::try_from(length).expect("a piece fits into memory");
                Ok(reader.read(offset, length).await?)
            }
            Self::Object(object) => {
                let piece = object.bucket.get(&object.key, Some(offset..end)).await?;
                let same = piece.etag == object.etag && piece.object_bytes == object.bytes;
                match same && piece.bytes.len() as u64 == length {
                    true => Ok(piece.bytes),
                    false => Err(Trouble::Changed),
                }
            }
        }
    }

    /// Fails when it was written to since it was opened; objects are compared at each piece.
    pub(crate) async fn settle(&self) -> Result<(), Trouble> {
        match self {
            Self::Local(reader) => match reader.unchanged().await? {
                true => Ok(()),
                false => Err(Trouble::Changed),
            },
            Self::Object(_) => Ok(()),
        }
    }
}

//! [`Copier`]: copies and compares single objects, in bounded memory.

use blockstore::object::plain::{Part, Upload};
use blockstore::object::{PlainBucket, PlainObject, RateLimit};
use blockstore::{Kind, StoreError};
use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt};

use super::local::Tree;
use super::place::{PIECE, Place, Reader, Trouble};
use super::plan::Step;

/// S3 takes 10,000 parts; room for a source that grew.
const PARTS_MAX: u64 = 9_000;

/// How often an object is begun anew that changes while it is read, or whose copy is not what was read.
const TRIES: usize = 3;

/// What came of one object.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Done {
    /// Of the copy, if one was made.
    pub(crate) copied: Option<u64>,
    /// Whether both sides were compared.
    pub(crate) checked: bool,
    /// Objects that were deleted, on either side.
    pub(crate) deleted: u64,
    /// The source's object was no longer there.
    pub(crate) lost: bool,
    /// It is an empty object `dir/` that stands for a directory; it has lost the slash of its key in the listing.
    pub(crate) marker: bool,
}

impl Done {
    /// The source's `object` was not found.
    fn gone(object: &PlainObject) -> Self {
        let marker = object.bytes == 0;
        Self {
            lost: !marker,
            marker,
            ..Self::default()
        }
    }
}

/// Both places, and how they are treated.
#[derive(Debug)]
pub(crate) struct Copier {
    pub(crate) source: Place,
    pub(crate) destination: Place,
    pub(crate) limit: Option<RateLimit>,
    pub(crate) check_new: bool,
    pub(crate) delete_src: bool,
}

/// Where pieces of an object begin, and how long they are.
fn pieces(bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let length = PIECE.max(bytes.div_ceil(PARTS_MAX).next_multiple_of(1 << 20));
    (0..bytes.div_ceil(length)).map(move |n| (n * length, length.min(bytes - n * length)))
}

impl Copier {
    /// Does `step` about `object`, the source's or (to be deleted) the destination's.
    pub(crate) async fn run(&self, step: Step, object: &PlainObject) -> Result<Done, Trouble> {
        let mut done = Done::default();
        match step {
            Step::Skip => return Ok(done),
            Step::DeleteDestination => {
                done.deleted = u64::from(self.destination.delete(object).await?);
                return Ok(done);
            }
            Step::DeleteSource => {}
            Step::Check => {
                done.checked = true;
                match self.same(object).await {
                    Ok(true) => {}
                    Ok(false) => done.copied = Some(self.copy(object).await?),
                    Err(Trouble::Gone) => return Ok(Done::gone(object)),
                    Err(trouble) => return Err(trouble),
                }
            }
            Step::Copy => match self.copy(object).await {
                Ok(bytes) => {
                    done.copied = Some(bytes);
                    done.checked = self.check_new;
                }
                Err(Trouble::Gone) => return Ok(Done::gone(object)),
                Err(trouble) => return Err(trouble),
            },
        }
        if self.delete_src {
            done.deleted = u64::from(self.source.delete(object).await?);
        }
        Ok(done)
    }

    /// Whether both sides have the same bytes.
    async fn same(&self, object: &PlainObject) -> Result<bool, Trouble> {
        let (key, limit) = (&object.key, self.limit.as_ref());
        let (ours, theirs) = futures::join!(
            self.source.open(key, object.bytes, limit),
            self.destination.open(key, object.bytes, None),
        );
        let ours = ours?;
        let theirs = match theirs {
            // Deleted meanwhile, or an object that stands for a directory.
            Err(Trouble::Gone) => return Ok(false),
            theirs => theirs?,
        };
        if ours.bytes() != theirs.bytes() {
            return Ok(false);
        }
        for (offset, length) in pieces(ours.bytes()) {
            let (ours, theirs) = futures::try_join!(
                ours.read(offset, length, limit),
                theirs.read(offset, length, None),
            )?;
            if ours != theirs {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Copies; how many bytes it were.
    async fn copy(&self, object: &PlainObject) -> Result<u64, Trouble> {
        let mut tries = 1;
        loop {
            let outcome = match self.copy_once(object).await {
                Ok((bytes, sum)) if self.check_new => match self.holds(object, bytes, sum).await? {
                    true => Ok(bytes),
                    false => Err(Trouble::Failed(
                        "the copy is not what was written, again and again".to_owned(),
                    )),
                },
                Ok((bytes, _)) => Ok(bytes),
                Err(Trouble::Changed) => Err(Trouble::Changed),
                Err(trouble) => return Err(trouble),
            };
            match outcome {
                Err(trouble) if tries < TRIES => {
                    tracing::debug!(key = object.key, %trouble, "trying again");
                    tries += 1;
                }
                outcome => return outcome,
            }
        }
    }

    /// Whether the destination has these bytes.
    async fn holds(&self, object: &PlainObject, bytes: u64, sum: u32) -> Result<bool, Trouble> {
        let missing = |trouble| match trouble {
            Trouble::Gone => Trouble::Failed("the copy is not there".to_owned()),
            other => other,
        };
        let opened = self.destination.open(&object.key, bytes, None).await;
        let copy = opened.map_err(missing)?;
        let mut found = crc32fast::Hasher::new();
        for (offset, length) in pieces(copy.bytes()) {
            found.update(&copy.read(offset, length, None).await.map_err(missing)?);
        }
        Ok(copy.bytes() == bytes && found.finalize() == sum)
    }

    /// Copies; length and CRC32 of what was read.
    async fn copy_once(&self, object: &PlainObject) -> Result<(u64, u32), Trouble> {
        let limit = self.limit.as_ref();
        let source = self.source.open(&object.key, object.bytes, limit).await?;
        let sum = match (self.destination.bucket(), self.destination.tree()) {
            (Some(bucket), _) => put(bucket, object, &source, limit).await?,
            (None, Some(tree)) => write(tree, object, &source, limit).await?,
            (None, None) => unreachable!("a place is a bucket or a tree"),
        };
        Ok((source.bytes(), sum))
    }
}

/// The pieces of an object, the next one being read while one is written.
fn read<'a>(
    source: &'a Reader,
    limit: Option<&'a RateLimit>,
) -> impl Stream<Item = Result<Bytes, Trouble>> + 'a {
    stream::iter(pieces(source.bytes()))
        .map(move |(offset, length)| source.read(offset, length, limit))
        .buffered(2)
}

/// What is missing at the destination is no sign that the source's object is gone.
fn at_destination(error: StoreError) -> Trouble {
    Trouble::Failed(error.to_string())
}

async fn put(
    bucket: &PlainBucket,
    object: &PlainObject,
    source: &Reader,
    limit: Option<&RateLimit>,
) -> Result<u32, Trouble> {
    let mut sum = crc32fast::Hasher::new();
    if source.bytes() <= PIECE {
        let bytes = source.read(0, source.bytes(), limit).await?;
        sum.update(&bytes);
        source.settle().await?;
        let stored = bucket.put(&object.key, bytes).await;
        stored.map_err(at_destination)?;
        return Ok(sum.finalize());
    }
    let upload = bucket.begin(&object.key).await.map_err(at_destination)?;
    let stored = put_parts(bucket, &upload, source, limit, &mut sum).await;
    let finished = match stored {
        Ok(parts) => finish(bucket, object, source, &upload, parts).await,
        Err(trouble) => Err(trouble),
    };
    if let Err(trouble) = finished {
        if let Err(error) = bucket.abort(&upload).await {
            tracing::warn!(key = object.key, %error, "parts of an upload stay in the bucket");
        }
        return Err(trouble);
    }
    Ok(sum.finalize())
}

async fn put_parts(
    bucket: &PlainBucket,
    upload: &Upload,
    source: &Reader,
    limit: Option<&RateLimit>,
    sum: &mut crc32fast::Hasher,
) -> Result<Vec<Part>, Trouble> {
    let mut parts = Vec::new();
    let pieces = read(source, limit);
    futures::pin_mut!(pieces);
    while let Some(bytes) = pieces.next().await {
        let bytes = bytes?;
        sum.update(&bytes);
        let stored = bucket.put_part(upload, parts.len(), bytes).await;
        parts.push(stored.map_err(at_destination)?);
    }
    source.settle().await?;
    Ok(parts)
}

async fn finish(
    bucket: &PlainBucket,
    object: &PlainObject,
    source: &Reader,
    upload: &Upload,
    parts: Vec<Part>,
) -> Result<(), Trouble> {
    match bucket.finish(upload, parts).await {
        // An attempt before this one may have finished it, and its answer was lost.
        Err(error) if error.kind() == Kind::NotFound => {
            let found = bucket.head(&object.key).await.map_err(at_destination)?;
            match found.is_some_and(|found| found.bytes == source.bytes()) {
                true => Ok(()),
                false => Err(at_destination(error)),
            }
        }
        other => other.map_err(at_destination),
    }
}

async fn write(
    tree: &Tree,
    object: &PlainObject,
    source: &Reader,
    limit: Option<&RateLimit>,
) -> Result<u32, Trouble> {
    let at_destination = |error: std::io::Error| Trouble::Failed(format!("DST: {error}"));
    let mut sum = crc32fast::Hasher::new();
    let created = tree.create(&object.key).await;
    let mut writer = created.map_err(at_destination)?;
    let pieces = read(source, limit);
    futures::pin_mut!(pieces);
    while let Some(bytes) = pieces.next().await {
        let bytes = bytes?;
        sum.update(&bytes);
        writer.write(bytes).await.map_err(at_destination)?;
    }
    source.settle().await?;
    let committed = writer.commit(object.modified).await;
    committed.map_err(at_destination)?;
    Ok(sum.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_an_object_in_at_most_ten_thousand() {
        assert_eq!(pieces(0).count(), 0);
        assert_eq!(pieces(1).collect::<Vec<_>>(), [(0, 1)]);
        for bytes in [PIECE, PIECE + 1, 3 * PIECE - 1, 1 << 40, 5 << 40] {
            let all: Vec<_> = pieces(bytes).collect();
            assert!(all.len() <= 10_000);
            let mut end = 0;
            for (offset, length) in &all {
                assert_eq!(*offset, end);
                end += length;
            }
            assert_eq!(end, bytes);
            // All but the last are of one length.
            assert!(all.windows(2).rev().skip(1).all(|two| two[0].1 == two[1].1));
        }
    }
}

//! What gc, fsck and compact share: all segments of a volume, what the metadata says of ids, which files name them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use blockstore::{Bucket, StoreError, StoreOptions};
use heliofs_proto::ids::SegmentId;
use heliofs_proto::v1::{self, SegmentState, maintain::Ask, maintained::Answer};
use meta_client::Session;

use crate::failure::{Failure, Outcome};

/// Segments per question.
pub(crate) const PAGE: u32 = 4096;

fn other_answer() -> Failure {
    Failure::new("the cluster gave another answer than was asked for")
        .hint("is it of another version?")
}

/// The volume's bucket, known to be the right one: every command that believes a listing begins here.
pub(crate) async fn bucket(storage: &v1::StorageConfig, volume: &str) -> Outcome<Bucket> {
    let options = StoreOptions {
        deadline: Duration::from_secs(30),
        memory_cache_bytes: 0,
        ..StoreOptions::default()
    };
    let bucket = Bucket::open(storage, volume, &options)?;
    check_marker(&bucket, storage).await?;
    Ok(bucket)
}

/// Whether the bucket is still this volume's.
pub(crate) async fn check_marker(bucket: &Bucket, storage: &v1::StorageConfig) -> Outcome {
    bucket
        .check_marker(&storage.uuid)
        .await
        .map_err(|error| match error {
            StoreError::NotFound { .. } => Failure::new(format!(
                "the bucket {} does not hold the volume: its marker object is missing; nothing was changed",
                storage.bucket
            ))
            .hint("`heliofs config` shows where it should be"),
            other => Failure::from(other),
        })
}

/// All segments that extents refer to, ascending, those behind `after`.
pub(crate) async fn live(session: &Session, after: u64) -> Outcome<Vec<v1::Segment>> {
    let mut all: Vec<v1::Segment> = Vec::new();
    loop {
        let ask = Ask::ListSegments(v1::ListSegments {
            after: all.last().map_or(after, |segment| segment.id),
            segments_max: PAGE,
        });
        let Answer::Segments(page) = session.maintain(ask).await? else {
            return Err(other_answer());
        };
        all.extend(page.segments);
        if page.end {
            return Ok(all);
        }
    }
}

/// What the metadata knows of ids, in their order; at most [`PAGE`] of them.
pub(crate) async fn states(session: &Session, ids: &[u64]) -> Outcome<Vec<SegmentState>> {
    let ask = Ask::CheckSegments(v1::CheckSegments { ids: ids.to_vec() });
    let Answer::States(states) = session.maintain(ask).await? else {
        return Err(other_answer());
    };
    if states.states.len() != ids.len() {
        return Err(other_answer());
    }
    Ok(states.states().collect())
}

/// Who names segments: per segment the files and their extents.
pub(crate) async fn users(
    session: &Session,
    segments: &BTreeSet<u64>,
) -> Outcome<BTreeMap<u64, Vec<(u64, v1::Extent)>>> {
    let mut users: BTreeMap<u64, Vec<(u64, v1::Extent)>> = BTreeMap::new();
    each_extent(session, segments, |ino, extent| {
        users.entry(extent.segment).or_default().push((ino, extent));
    })
    .await?;
    Ok(users)
}

/// Shows all extents that name one of `segments`, or any if that is empty, to `see`, each with its file.
pub(crate) async fn each_extent(
    session: &Session,
    segments: &BTreeSet<u64>,
    mut see: impl FnMut(u64, v1::Extent),
) -> Outcome {
    let mut from = (0, 0);
    loop {
        let ask = Ask::FindExtents(v1::FindExtents {
            segments: segments.iter().copied().collect(),
            from_ino: from.0,
            from_offset: from.1,
        });
        let Answer::Extents(page) = session.maintain(ask).await? else {
            return Err(other_answer());
        };
        for placed in page.extents {
            if let Some(extent) = placed.extent {
                see(placed.ino, extent);
            }
        }
        if page.end {
            return Ok(());
        }
        from = (page.next_ino, page.next_offset);
    }
}

/// The segment that an object's name below the volume's prefix says; `None`: no segment's name.
pub(crate) fn parse_name(name: &str) -> Option<SegmentId> {
    let (_, digits) = name.split_once('/')?;
    let id = SegmentId(u64::from_str_radix(digits, 16).ok()?);
    (id.object_name() == name).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_segment_s_own_name_names_it() {
        assert_eq!(parse_name("ab/00000000000001ab"), Some(SegmentId(0x1ab)));
        for other in [
            "ab/00000000000001ac",
            "ab/1ab",
            ".heliofs-volume",
            "ab/x",
            "AB/00000000000001AB",
        ] {
            assert_eq!(parse_name(other), None, "{other}");
        }
    }
}

//! `heliofs gc`: finds objects that nothing refers to and nothing ever will, and deletes them when asked to.
//!
//! A listing proposes, the metadata decides, read so that no acknowledged change is missing: an object is a leak only if its id
//! was given out, its session is over (or it was freed), nothing refers to it and it does not wait in the deletion queue. On any
//! doubt or error nothing more is deleted.

use clap::Args;
use futures::StreamExt;
use heliofs_proto::ids::SegmentId;
use heliofs_proto::v1::SegmentState;
use serde_json::json;

use super::{config, segments};
use crate::cli::Access;
use crate::failure::{Failure, Outcome};
use crate::units::show_size;
use crate::{output, progress};

/// Deletions in flight.
const DELETES: usize = 16;

/// Leaks shown to people; JSON has all.
const SHOWN: usize = 20;

/// Which volume, and whether to delete.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]
    #[arg(value_name = "META-URL")]
    url: String,
    /// The volume.
    name: Option<String>,
    /// Deletes what was found; else it is only shown.
    #[arg(long)]
    delete: bool,
}

#[derive(Default)]
struct Found {
    objects: u64,
    live: u64,
    open: u64,
    deleting: u64,
    /// Of all objects but those in the deletion queue.
    kept_bytes: u64,
    deleting_bytes: u64,
    foreign: Vec<String>,
    unknown: Vec<String>,
    leaks: Vec<(SegmentId, u64)>,
    deleted: u64,
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    let target = options
        .access
        .target(&options.url, options.name.as_deref())?;
    let volume = config::find(&target.cluster, &target.volume).await?;
    if volume.second.is_none() {
        // A mirror's own bucket is its own to clean up.
        config::not_a_mirror(&volume)?;
    }
    let storage = volume.storage.clone().unwrap_or_default();
    let bucket = segments::bucket(&storage, config::prefix(&volume)).await?;
    let session = target.session(true).await?;
    let epoch = volume.position.map_or(0, |position| position.epoch);
    let outcome = collect(&bucket, &storage, epoch, &session, options.delete, json).await;
    session.detach().await;
    let found = outcome?;
    let bytes: u64 = found.leaks.iter().map(|(_, length)| length).sum();
    if json {
        let leaks: Vec<_> = found
            .leaks
            .iter()
            .map(|(id, length)| json!({ "object": id.object_name(), "bytes": length }))
            .collect();
        return output::print_json(&json!({
            "objects": found.objects,
            "live": found.live,
            "open": found.open,
            "deleting": found.deleting,
            "kept_bytes": found.kept_bytes,
            "deleting_bytes": found.deleting_bytes,
            "unknown": found.unknown,
            "foreign": found.foreign,
            "leaks": leaks,
            "leaked_bytes": bytes,
            "deleted": found.deleted,
        }));
    }
    output::line(format_args!(
        "{} objects: {} live, {} that mounts may still commit, {} in the deletion queue",
        found.objects, found.live, found.open, found.deleting
    ))?;
    for name in found.unknown.iter().chain(&found.foreign).take(SHOWN) {
        output::line(format_args!("left alone: {name}"))?;
    }
    if !found.unknown.is_empty() {
        output::line(format_args!(
            "{} objects have ids that this metadata never gave out: is it older than the bucket?",
            found.unknown.len()
        ))?;
    }
    if !found.foreign.is_empty() {
        output::line(format_args!(
            "{} objects have names that are no segment's",
            found.foreign.len()
        ))?;
    }
    for (id, length) in found.leaks.iter().take(SHOWN) {
        let name = id.object_name();
        output::line(format_args!("leak: {name} {}", show_size(*length)))?;
    }
    let leaks = found.leaks.len();
    output::line(match (leaks, options.delete) {
        (0, _) => "no leaks".to_owned(),
        (_, true) => format!(
            "deleted {} of {leaks} leaks with {}",
            found.deleted,
            show_size(bytes)
        ),
        (_, false) => format!(
            "{leaks} leaks with {}; --delete deletes them",
            show_size(bytes)
        ),
    })
}

async fn collect(
    bucket: &blockstore::Bucket,
    storage: &heliofs_proto::v1::StorageConfig,
    epoch: u32,
    session: &meta_client::Session,
    delete: bool,
    json: bool,
) -> Outcome<Found> {
    let mut found = Found::default();
    let bar = progress::bar("gc", 256, false, json);
    for group in 0..=u8::MAX {
        let directory = format!("{group:02x}");
        // First the bucket, then the metadata: what was uploaded in between is not in the listing.
        let listed = bucket.list(&directory).await?;
        let mut named = Vec::new();
        for (name, length) in listed {
            found.objects += 1;
            match segments::parse_name(&name) {
                Some(id) => named.push((id, length)),
                None => found.foreign.push(name),
            }
        }
        for page in named.chunks(segments::PAGE as usize) {
            let leaks = leaks_among(session, page, &mut found).await?;
            if delete && !leaks.is_empty() {
                segments::check_marker(bucket, storage).await?;
                bucket.check_epoch(epoch).await?;
                found.deleted += delete_all(bucket, &leaks).await?;
            }
            found.leaks.extend(leaks);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(found)
}

async fn leaks_among(
    session: &meta_client::Session,
    page: &[(SegmentId, u64)],
    found: &mut Found,
) -> Outcome<Vec<(SegmentId, u64)>> {
    let ids: Vec<u64> = page.iter().map(|(id, _)| id.0).collect();
    let states = segments::states(session, &ids).await?;
    let mut leaks = Vec::new();
    for ((id, length), state) in page.iter().zip(states) {
        match state {
            SegmentState::Deleting => found.deleting_bytes += length,
            _ => found.kept_bytes += length,
        }
        match state {
            SegmentState::Live => found.live += 1,
            SegmentState::Open => found.open += 1,
            SegmentState::Deleting => found.deleting += 1,
            SegmentState::Leaked => leaks.push((*id, *length)),
            SegmentState::Unknown => found.unknown.push(id.object_name()),
        }
    }
    Ok(leaks)
}

async fn delete_all(bucket: &blockstore::Bucket, leaks: &[(SegmentId, u64)]) -> Outcome<u64> {
    let mut deletions = futures::stream::iter(leaks)
        .map(|(id, _)| async move { (id, bucket.delete(&id.object_name()).await) })
        .buffer_unordered(DELETES);
    let mut deleted = 0;
    while let Some((id, outcome)) = deletions.next().await {
        outcome.map_err(|error| {
            Failure::new(format!(
                "{} could not be deleted: {error}",
                id.object_name()
            ))
            .hint(format!("{deleted} leaks were deleted before; run it again"))
        })?;
        deleted += 1;
    }
    Ok(deleted)
}

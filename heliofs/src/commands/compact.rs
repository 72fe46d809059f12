//! `heliofs compact`: copies what lives in sparse segments together, now and as fast as the bucket takes it. Mounts do the same
//! in the background, slowly.

use std::time::Duration;

use blockstore::{SegmentStore, StoreOptions};
use clap::Args;
use fuse_client::compact::{self, Compacted, Compactor};
use fuse_client::write::segment_ids::SegmentIds;
use heliofs_proto::v1::SegmentState;
use serde_json::json;

use super::{config, segments};
use crate::cli::Access;
use crate::failure::{Failure, Outcome};
use crate::passphrase::PassphraseSource;
use crate::units::{self, show_size};
use crate::{output, progress};

/// Segments whose extents are looked for in one pass over the metadata.
const BATCH: usize = 512;

/// Which volume, and what counts as sparse.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]
    #[arg(value_name = "META-URL")]
    url: String,
    /// The volume.
    name: Option<String>,
    /// Compacts segments of which at most this part lives.
    #[arg(long, default_value_t = 70, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=99))]
    live_percent: u32,
    /// Bytes to write per second at most. 0: no limit.
    #[arg(long, value_parser = units::parse_size, default_value = "0", value_name = "SIZE")]
    limit: u64,
    #[command(flatten)]
    passphrase: PassphraseSource,
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    let target = options
        .access
        .target(&options.url, options.name.as_deref())?;
    let volume = config::find(&target.cluster, &target.volume).await?;
    config::not_a_mirror(&volume)?;
    let storage = volume.storage.clone().unwrap_or_default();
    segments::bucket(&storage, config::prefix(&volume)).await?;
    let store_options = StoreOptions {
        deadline: Duration::from_secs(30),
        cache_uploads: false,
        opener: match storage.encryption {
            Some(_) => Some(options.passphrase.required()?),
            None => None,
        },
        ..StoreOptions::default()
    };
    let session = target.session(false).await?;
    let store = SegmentStore::open(
        &storage,
        config::prefix(&volume),
        session.volume_id(),
        store_options,
    );
    let outcome = match store {
        Ok(store) => {
            let compactor = Compactor {
                session: &session,
                store: &store,
                ids: &SegmentIds::default(),
                segment_bytes: storage.segment_bytes,
                bytes_per_second: options.limit,
                leased: false,
            };
            all(&compactor, options.live_percent, json).await
        }
        Err(error) => Err(error.into()),
    };
    session.detach().await;
    let done = outcome?;
    if json {
        output::print_json(&json!({
            "segments": done.segments,
            "moved_bytes": done.moved_bytes,
            "written_segments": done.written_segments,
            "written_bytes": done.written_bytes,
            "unreadable_extents": done.unreadable.len(),
        }))?;
    } else {
        output::line(format_args!(
            "moved {} out of {} sparse segments into {} new ones; the old objects go after the deletion grace",
            show_size(done.moved_bytes),
            done.segments,
            done.written_segments
        ))?;
    }
    match done.unreadable.first() {
        None => Ok(()),
        Some((ino, _, why)) => Err(Failure::new(format!(
            "{} extents could not be read and stay where they are, the first of inode {ino}: {why}",
            done.unreadable.len()
        ))
        .hint("`heliofs fsck --level data` names the files")),
    }
}

async fn all(compactor: &Compactor<'_>, live_percent: u32, json: bool) -> Outcome<Compacted> {
    let live = segments::live(compactor.session, 0).await?;
    let sparse: Vec<u64> = compact::sparse(&live, live_percent).into_iter().collect();
    let bar = progress::bar("compact", sparse.len() as u64, false, json);
    let mut total = Compacted::default();
    for batch in sparse.chunks(BATCH) {
        let done = compactor.compact(batch).await.map_err(Failure::new)?;
        total.segments += done.segments;
        total.moved_bytes += done.moved_bytes;
        total.written_segments += done.written_segments;
        total.written_bytes += done.written_bytes;
        total.unreadable.extend(done.unreadable);
        bar.inc(batch.len() as u64);
    }
    bar.finish_and_clear();
    // Deleted between listing and reading, since nothing refers to them any more: no damage.
    let mut unreadable = Vec::new();
    for found in std::mem::take(&mut total.unreadable) {
        let state = segments::states(compactor.session, &[found.1.segment]).await?;
        if state == [SegmentState::Live] {
            unreadable.push(found);
        }
    }
    total.unreadable = unreadable;
    Ok(total)
}

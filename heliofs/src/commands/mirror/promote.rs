//! Makes a mirror the volume.
//!
//! Planned: the source logs its demotion at a position, the mirror reaches it, and opens an epoch: nothing is lost. Forced: the
//! source is dead; what it had acknowledged and the mirror has not is lost, and is counted as far as it is known. With a fence
//! store its lease there is waited out, so that it writes no more, dead or not.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use blockstore::{Bucket, StoreError, StoreOptions};
use clap::Args;
use futures::future::join_all;
use heliofs_proto::ids::Position;
use heliofs_proto::v1;
use meta_client::{Cluster, ClusterOptions, MetaUrl};
use mirror_sync::fence::{self, How, TakeError, marker::Me};
use serde_json::json;

use super::handover::{REPEAT, expect_dead, hand_over, other_side, seal, take_back, way_back};
use crate::cli::Access;
use crate::commands::config;
use crate::connect::Target;
use crate::failure::{Failure, Outcome};
use crate::fencing::{self, FenceAccess};
use crate::{output, units};

/// A source that does not answer within this time counts as dead, if that is what was said.
const ALIVE_WITHIN: Duration = Duration::from_secs(3);

/// For one that is to hand over.
const PATIENT: Duration = Duration::from_secs(30);

/// A bucket that does not answer within this time is not told of an epoch.
const BUCKET_WITHIN: Duration = Duration::from_secs(5);

/// Which mirror, and how.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// The mirror: helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]
    #[arg(value_name = "META-URL")]
    url: String,
    /// The volume.
    name: Option<String>,
    /// The source, if it is reached under another address than the mirror's nodes use.
    #[arg(long, value_name = "META-URL")]
    source: Option<String>,
    /// File with the source's cluster token [default: the mirror's].
    #[arg(long, value_name = "FILE")]
    source_token_file: Option<PathBuf>,
    /// Planned: gives up when the mirror has not reached the source's last position within this time.
    #[arg(long, value_parser = units::parse_duration, default_value = "60s", value_name = "TIME")]
    timeout: Duration,
    /// Does without the source. What it has acknowledged and the mirror has not is lost.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    fence: FenceAccess,
    /// Needed with --force where there is no fence store: then nothing but you keeps a source that is only cut off from being
    /// written to. Where there is one, it is not asked.
    #[arg(long, requires = "force")]
    i_know_the_source_is_dead: bool,
    /// With --force, also a mirror that stopped because its records are not the source's.
    #[arg(long, requires = "force")]
    even_if_stopped: bool,
}

pub(super) async fn run(options: Options, json: bool) -> Outcome {
    let begun = Instant::now();
    let target = options
        .access
        .target(&options.url, options.name.as_deref())?;
    let status = status_of(&target).await?;
    let mirror = status.mirror.clone().unwrap_or_default();
    let access = options.access.with_file(options.source_token_file.clone());
    let (url, volume) = other_side(&mirror, options.source.as_deref())?;
    let source = |within| {
        let patience = ClusterOptions {
            deadline: within,
            ..ClusterOptions::default()
        };
        Ok::<_, Failure>(Target {
            cluster: Cluster::new(url.peers.clone(), access.token()?, patience),
            url: MetaUrl {
                volume: Some(volume.clone()),
                ..url.clone()
            },
            volume: volume.clone(),
        })
    };
    let known = status.applied.map(Position::from).unwrap_or_default();
    let here = target.cluster.get_volume(&target.volume).await?;
    let fence = options.fence.resolve()?.or(here.fence.clone());
    // An operator's word stands for the store's.
    let mut fence =
        fence.filter(|_| !options.i_know_the_source_is_dead && !options.fence.is_none());
    let handed_over = mirror.was_handed_over();
    // Who handed over: it can take the volume back if the rest fails.
    let mut giver: Option<Target> = None;
    let mut buckets = Vec::new();
    let (mut at, forced) = if options.force {
        if !options.i_know_the_source_is_dead && fence.is_none() {
            return Err(Failure::usage("--force needs --fence-store, or --i-know-the-source-is-dead")
                .hint("without a fence store a source that is only cut off from here would be written to as well: two histories"));
        }
        if mirror.state() == v1::MirrorState::Loading {
            return Err(Failure::new(
                "the mirror is being loaded: it does not have the volume yet",
            )
            .hint("another mirror of this source, if there is one"));
        }
        let wrong = mirror.state() == v1::MirrorState::Stopped && !handed_over && !mirror.followed;
        if wrong && !options.even_if_stopped {
            return Err(Failure::new(format!("the mirror stopped: {}", mirror.reason)).hint(
                "what it shows may be wrong; another mirror of this source is the better one, or --even-if-stopped",
            ));
        }
        // What is dead takes its time to be found so. Nothing is told before the source is.
        let source = source(ALIVE_WITHIN)?.cluster;
        let (dead, reached) =
            tokio::join!(expect_dead(&source, &volume, &mirror), reach_buckets(&here));
        dead?;
        buckets = reached;
        (None, true)
    } else if handed_over {
        let successor = source(PATIENT)?;
        take_back(&target, &successor, &mirror.source, known, fence).await?;
        return taken_back(&target, known, json);
    } else {
        let source = source(PATIENT)?;
        let at = hand_over(&source, &target, options.timeout).await?;
        // The source may have got another one, or none, after the mirror was loaded.
        fence = match options.fence.resolve()? {
            None if !options.fence.is_none() => {
                let theirs = source.cluster.get_volume(&volume).await;
                theirs
                    .map_err(|error| Failure::from(error).hint(way_back(&source)))?
                    .fence
            }
            given => given,
        };
        giver = Some(source);
        (Some(at), false)
    };
    let or_back = |failure: Failure, sealed| match &giver {
        Some(_) if sealed => failure.hint(REPEAT),
        Some(source) => failure.hint(way_back(source)),
        None => failure,
    };
    // Never one that the source is known to have begun, though the mirror has not met its first entry. A source that handed over
    // and goes on without its successor leaves out the one that this may have begun.
    let heard = status.source_head.map_or(0, |head| head.epoch);
    let last_epoch = at.unwrap_or(known).epoch.0.max(heard);
    let mut epoch = last_epoch + if handed_over { 2 } else { 1 };
    let mut waited = Duration::ZERO;
    if let Some(store) = &fence {
        let how = match options.force {
            true => How::LeaseOut,
            false => How::Demoted,
        };
        let taken = take_marker(&target, &here, store, epoch, how).await;
        (epoch, waited) = taken.map_err(|failure| or_back(failure, false))?;
    }
    let mut sealed = false;
    match (&giver, at) {
        // Somebody may have had it taken back while the mirror was waited for, or be about to.
        (Some(source), Some(given)) => {
            // A node of an earlier release would not count the position that this takes.
            let all = source.cluster.status_all().await;
            let mut answered = all.iter().filter_map(|(_, status)| status.as_ref().ok());
            if answered.all(|status| status.seals) {
                let successor = target.url.to_string();
                at = Some(seal(source, &target, &successor, given, options.timeout).await?);
                // With a fence store the marker, which is the mirror's by now, can be taken back.
                sealed = fence.is_none();
            } else {
                tracing::warn!(
                    "a node of the source is of an earlier release: nobody else may take the volume back now"
                );
            }
        }
        // A source that is alive after all goes on freeing objects.
        _ => tell(buckets, epoch).await,
    }
    let fenced = fence.is_some();
    // What is known of the source is the leader's, and goes with the promotion.
    let status = match forced {
        true => status_of(&target).await?,
        false => status,
    };
    let promoted = target.cluster.promote_mirror(v1::PromoteMirrorRequest {
        volume: target.volume.clone(),
        at: at.map(Into::into),
        fence,
        forced,
        epoch,
    });
    let first = promoted.await;
    let first = first.map_err(|error| or_back(error.into(), sealed))?;
    if !forced {
        tell(reach_buckets(&here).await, epoch).await;
    }
    let last = Position {
        epoch: at.unwrap_or(known).epoch,
        seq: first.seq - 1,
    };
    let loss = match forced {
        true => Loss::known(&status, last),
        false => Loss::None,
    };
    let seconds = begun.elapsed().as_secs_f64();
    let pending = status.copies.clone().unwrap_or_default();
    let source_only = pending.pending_segments + pending.quarantined_segments;
    if json {
        let mut shown = json!({
            "volume": target.volume,
            "last_position": last.to_string(),
            "first_position": first.to_string(),
            "lag_ms": if forced { status.lag_ms } else { 0 },
            "objects_at_source_only": source_only,
            "seconds": seconds,
            "fenced": fenced,
            "lease_waited_ms": u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
        });
        loss.put(&mut shown);
        return output::print_json(&shown);
    }
    output::line(format_args!(
        "{} is written here from {first} on; the last position of the source that is here is {last}",
        target.volume
    ))?;
    if forced {
        output::line(&loss)?;
        if source_only > 0 {
            output::line(format_args!(
                "{source_only} objects are in the source's bucket only: files that need them can be read while that bucket can; \
                 `heliofs mirror status --missing` lists them",
            ))?;
        }
    }
    Ok(())
}

/// A bucket that holds objects of the volume, if it answers.
type Reached = (String, Result<Bucket, StoreError>);

/// Opens the buckets that hold the volume's objects, all at once; one that is dead takes [`BUCKET_WITHIN`].
async fn reach_buckets(volume: &v1::Volume) -> Vec<Reached> {
    let options = StoreOptions {
        deadline: BUCKET_WITHIN,
        memory_cache_bytes: 0,
        ..StoreOptions::default()
    };
    let options = &options;
    let each = volume.storage.iter().chain(&volume.second);
    let each = each.map(|storage| async move {
        let reached = async {
            let bucket = Bucket::open(storage, config::prefix(volume), options)?;
            bucket.check_marker(&storage.uuid).await?;
            Ok(bucket)
        };
        (storage.bucket.clone(), reached.await)
    });
    join_all(each).await
}

/// Tells the buckets that hold the volume's objects of the new epoch, so that nobody of the old one deletes what lives in the new
/// one. Without it, only a source that is alive in spite of everything could; so a bucket that can't be told is no reason to stop.
async fn tell(buckets: Vec<Reached>, epoch: u32) {
    let each = buckets.into_iter().map(|(name, reached)| async move {
        let told = match reached {
            Ok(bucket) => bucket.raise_epoch(epoch).await,
            Err(error) => Err(error),
        };
        if let Err(error) = told {
            tracing::warn!(
                bucket = name, %error,
                "the bucket could not be told of the new epoch: a source that is alive after all may delete from it"
            );
        }
    });
    join_all(each).await;
}

/// Says that a source is written again after a promotion that did not happen.
fn taken_back(target: &Target, at: Position, json: bool) -> Outcome {
    if json {
        return output::print_json(&json!({
            "volume": target.volume,
            "taken_back_at": at.to_string(),
        }));
    }
    output::line(format_args!(
        "{} is written here again, behind {at}: its successor was not promoted",
        target.volume
    ))
}

/// How the mirror is.
pub(super) async fn status_of(target: &Target) -> Outcome<v1::MirrorStatus> {
    let all = target.cluster.mirror_status(Some(&target.volume)).await?;
    all.into_iter()
        .find(|status| status.mirror.is_some())
        .ok_or_else(|| Failure::new(format!("{} is no mirror", target.volume)))
}

/// What a promotion lost, as far as it can be known here.
#[derive(Debug, PartialEq, Eq)]
enum Loss {
    /// Nothing: it was planned.
    None,
    /// At least this.
    Known {
        /// Entries up to `head` that are not here.
        entries: u64,
        /// How far the source was when it was last heard of.
        head: Position,
        /// How long ago that was. What it acknowledged since then is lost, too.
        silent: Duration,
    },
    /// Whoever leads the mirror now never heard of the source.
    Unknown,
}

impl Loss {
    /// Of a forced promotion after `last`.
    fn known(status: &v1::MirrorStatus, last: Position) -> Self {
        let Some(head) = status.source_head.map(Position::from) else {
            return Self::Unknown;
        };
        Self::Known {
            entries: head.seq.saturating_sub(last.seq),
            head,
            silent: Duration::from_millis(status.contact_ms.unwrap_or_default()),
        }
    }

    fn put(&self, shown: &mut serde_json::Value) {
        let (entries, head, silent) = match self {
            Self::None => (Some(0), None, None),
            Self::Known {
                entries,
                head,
                silent,
            } => (Some(*entries), Some(head.to_string()), Some(*silent)),
            Self::Unknown => (None, None, None),
        };
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        shown["lost_entries_known"] = json!(entries);
        shown["source_known_up_to"] = json!(head);
        shown["source_silent_ms"] = json!(silent.map(millis));
        shown["source_last_heard"] = json!(silent.map(clock));
    }
}

/// The time of day so long ago, UTC.
fn clock(ago: Duration) -> String {
    humantime::format_rfc3339_seconds(SystemTime::now() - ago).to_string()
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => write!(f, "lost: nothing"),
            Self::Known {
                entries,
                head,
                silent,
            } => write!(
                f,
                "lost: at least {entries} entries, which the source was known to have (up to {head}); it was last heard of at {}, \
                 {:.1} s ago, and what it acknowledged since then is lost too and could not be counted",
                clock(*silent),
                silent.as_secs_f64()
            ),
            Self::Unknown => write!(
                f,
                "lost: not known; the mirror's leader has not heard of the source since it leads, and whatever the source \
                 acknowledged behind that position is lost"
            ),
        }
    }
}

/// Makes the marker name this cluster at `epoch`, or behind the one that it names, if that is later; that epoch, and how long the
/// source's lease was waited for.
pub(super) async fn take_marker(
    target: &Target,
    volume: &v1::Volume,
    store: &v1::FenceStore,
    epoch: u32,
    how: How,
) -> Outcome<(u32, Duration)> {
    let status = target.cluster.status().await?;
    let register = fence::open(store, fence::prefix(volume))?;
    // A source that took its volume back may be in an epoch that the mirror has not heard of.
    let epoch = match (how, fence::holder(&register, volume.id).await) {
        (How::LeaseOut, Ok(Some(marker))) if marker.cluster == status.cluster_id => {
            epoch.max(marker.epoch)
        }
        (How::LeaseOut, Ok(Some(marker))) => epoch.max(marker.epoch + 1),
        _ => epoch,
    };
    let me = Me {
        volume: volume.id,
        cluster: status.cluster_id,
        epoch,
    };
    let lease = fence::lease(store);
    let taken = fence::take_over(&register, me, &fencing::url_of(&status), lease, how).await;
    match taken {
        Ok(taken) => Ok((epoch, taken.waited)),
        Err(error @ TakeError::Alive(_)) => {
            Err(Failure::new(error).hint("leave --force out: then nothing is lost"))
        }
        Err(error @ TakeError::Store(_)) => Err(Failure::new(error).hint(
            "nothing was promoted; try again when the fence store answers, or --i-know-the-source-is-dead does without it",
        )),
        Err(error) => Err(Failure::new(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_counted_as_far_as_it_is_known_and_never_called_nothing() {
        let at = |seq| v1::Position { epoch: 2, seq };
        let mut status = v1::MirrorStatus {
            source_head: Some(at(50)),
            contact_ms: Some(7000),
            ..v1::MirrorStatus::default()
        };
        let loss = Loss::known(&status, at(38).into());
        let mut shown = json!({});
        loss.put(&mut shown);
        assert_eq!(shown["lost_entries_known"], 12);
        assert_eq!(shown["source_known_up_to"], "2:50");
        assert_eq!(shown["source_silent_ms"], 7000);
        assert!(loss.to_string().contains("at least 12 entries"), "{loss}");
        assert!(loss.to_string().contains("7.0 s ago"), "{loss}");
        status.source_head = None;
        let loss = Loss::known(&status, at(38).into());
        loss.put(&mut shown);
        assert!(shown["lost_entries_known"].is_null(), "{shown}");
        assert!(loss.to_string().contains("not known"), "{loss}");
    }
}

//! Makes a mirror the volume, or all mirrors of a cluster.
//!
//! Planned: the source logs its demotion at a position, the mirror reaches it, and opens an epoch: nothing is lost. Forced: the
//! source is dead; what it had acknowledged and the mirror has not is lost, and is counted as far as it is known. With a fence
//! store its lease there is waited out, so that it writes no more, dead or not.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use blockstore::{Bucket, StoreError, StoreOptions};
use clap::Args;
use futures::StreamExt;
use futures::future::join_all;
use heliofs_proto::ids::Position;
use heliofs_proto::v1;
use meta_client::{Cluster, ClusterOptions, MetaUrl};
use mirror_sync::fence::{self, How, TakeError, marker::Me};
use serde_json::json;

use super::handover::{REPEAT, expect_dead, hand_over, other_side, seal, take_back, way_back};
use super::promoted::{Begun, Loss, Promoted, row};
use crate::cli::Access;
use crate::commands::config;
use crate::connect::{Connected, Target};
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
    /// The volume; unless one is named, every volume that this cluster mirrors.
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

/// Files that are not complete are looked for this long: the volume is written here by then, and people wait for what it came to.
const LOOK_WITHIN: Duration = Duration::from_secs(60);

pub(super) async fn run(options: Options, json: bool) -> Outcome {
    let connected = options.access.connect(&options.url)?;
    if options.name.is_none() && connected.url.volume.is_none() {
        return run_all(&options, connected, json).await;
    }
    let target = options
        .access
        .target(&options.url, options.name.as_deref())?;
    let status = status_of(&target).await?;
    let mut promoted = promote(&options, &target, status).await?;
    if !json {
        promoted.print()?;
    }
    promoted.look(&target, Instant::now() + LOOK_WITHIN).await;
    match json {
        true => output::print_json(&promoted.as_json()),
        false => promoted.print_incomplete(),
    }
}

/// Every volume that the cluster mirrors: by force at once, so that what a dead source takes is taken once; else one after
/// another, so that each is without a writer for a moment only. One that fails keeps no other from it.
async fn run_all(options: &Options, connected: Connected, json: bool) -> Outcome {
    if let Some(source) = &options.source
        && source.parse::<MetaUrl>()?.volume.is_some()
    {
        return Err(Failure::usage(
            "--source names a volume, and all are to be promoted",
        ));
    }
    let all = connected.cluster.mirror_status(None).await?;
    // What was handed over is written elsewhere, or is to be taken back by name.
    let mirrors = all.into_iter().filter(|status| {
        let mirror = status.mirror.as_ref();
        mirror.is_some_and(|mirror| !mirror.was_handed_over())
    });
    let each = mirrors.map(|status| {
        let target = Target {
            cluster: connected.cluster.clone(),
            url: MetaUrl {
                volume: Some(status.name.clone()),
                ..connected.url.clone()
            },
            volume: status.name.clone(),
        };
        async move {
            let promoted = promote(options, &target, status).await;
            // What is known of the source goes with the promotion: at once.
            let printed = match &promoted {
                Ok(promoted) if !json => promoted.print(),
                _ => Ok(()),
            };
            (target, promoted.and_then(|it| printed.map(|()| it)))
        }
    });
    let mut promoted: Vec<(Target, Outcome<Promoted>)> = match options.force {
        true => join_all(each).await,
        false => futures::stream::iter(each).then(|one| one).collect().await,
    };
    if promoted.is_empty() {
        return Err(Failure::new("this cluster mirrors no volume").hint(
            "give the META-URL of the mirror's cluster: `heliofs mirror status` lists its mirrors",
        ));
    }
    let until = Instant::now() + LOOK_WITHIN;
    for (target, outcome) in &mut promoted {
        if let Ok(promoted) = outcome {
            promoted.look(target, until).await;
        }
    }
    let failed = promoted.iter().filter(|(_, outcome)| outcome.is_err());
    let failed = failed.count();
    if json {
        let all: Vec<_> = promoted
            .iter()
            .map(|(target, outcome)| match outcome {
                Ok(promoted) => promoted.as_json(),
                Err(failure) => {
                    let mut shown = failure.to_json();
                    shown["volume"] = json!(target.volume);
                    shown["promoted"] = json!(false);
                    shown
                }
            })
            .collect();
        output::print_json(&json!(all))?;
    } else {
        let mut table = output::table([
            "volume",
            "promoted",
            "first",
            "lost",
            "incomplete files",
            "why not",
        ]);
        for (target, outcome) in &promoted {
            if let Ok(promoted) = outcome {
                promoted.print_incomplete()?;
            }
            table.add_row(row(&target.volume, outcome));
        }
        output::print_table(&table)?;
    }
    if failed > 0 {
        return Err(Failure::new(format!(
            "{failed} of {} volumes were not promoted",
            promoted.len()
        ))
        .hint("the same command again tries just those"));
    }
    Ok(())
}

/// Promotes one volume.
async fn promote(
    options: &Options,
    target: &Target,
    status: v1::MirrorStatus,
) -> Outcome<Promoted> {
    let begun = Instant::now();
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
        take_back(target, &successor, &mirror.source, known, fence).await?;
        return Ok(Promoted::TakenBack {
            volume: target.volume.clone(),
            at: known,
        });
    } else {
        let source = source(PATIENT)?;
        let at = hand_over(&source, target, options.timeout).await?;
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
        let taken = take_marker(target, &here, store, epoch, how).await;
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
                at = Some(seal(source, target, &successor, given, options.timeout).await?);
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
        true => status_of(target).await?,
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
    Ok(Promoted::Begun(Box::new(Begun {
        volume: target.volume.clone(),
        last,
        first,
        forced,
        lag_ms: if forced { status.lag_ms } else { 0 },
        loss,
        source_only,
        seconds,
        fenced,
        waited,
        incomplete: None,
    })))
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

/// How the mirror is.
pub(super) async fn status_of(target: &Target) -> Outcome<v1::MirrorStatus> {
    let all = target.cluster.mirror_status(Some(&target.volume)).await?;
    all.into_iter()
        .find(|status| status.mirror.is_some())
        .ok_or_else(|| Failure::new(format!("{} is no mirror", target.volume)))
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

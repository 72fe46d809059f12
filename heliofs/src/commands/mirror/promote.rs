//! Makes a mirror the volume.
//!
//! Planned: the source logs its demotion at a position, the mirror reaches it, and opens an epoch: nothing is lost. Forced: the
//! source is dead; what it had acknowledged and the mirror has not is lost, and is counted as far as it is known. With a fence
//! store its lease there is waited out, so that it writes no more, dead or not.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use heliofs_proto::ids::Position;
use heliofs_proto::v1;
use meta_client::{Cluster, ClusterOptions, MetaUrl};
use mirror_sync::fence::{self, How, TakeError, marker::Me};
use serde_json::json;

use super::handover::{expect_dead, expect_not_promoted, hand_over, other_side};
use crate::cli::Access;
use crate::connect::Target;
use crate::failure::{Failure, Outcome};
use crate::fencing::{self, FenceAccess};
use crate::{output, units};

/// A source that does not answer within this time counts as dead, if that is what was said.
const ALIVE_WITHIN: Duration = Duration::from_secs(3);

/// For one that is to hand over.
const PATIENT: Duration = Duration::from_secs(30);

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
    let status = target.cluster.mirror_status(Some(&target.volume)).await?;
    let status = status
        .into_iter()
        .find(|status| status.mirror.is_some())
        .ok_or_else(|| Failure::new(format!("{} is no mirror", target.volume)))?;
    let mirror = status.mirror.clone().unwrap_or_default();
    let access = Access {
        token_file: options
            .source_token_file
            .clone()
            .or(options.access.token_file.clone()),
    };
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
    let head = status.source_head.map(Position::from).unwrap_or(known);
    let here = target.cluster.get_volume(&target.volume).await?;
    let fence = options.fence.resolve()?.or(here.fence.clone());
    // An operator's word stands for the store's.
    let mut fence =
        fence.filter(|_| !options.i_know_the_source_is_dead && !options.fence.is_none());
    let mut epoch = Epoch::Next;
    let (at, lost) = if options.force {
        if !options.i_know_the_source_is_dead && fence.is_none() {
            return Err(Failure::usage("--force needs --fence-store, or --i-know-the-source-is-dead")
                .hint("without a fence store a source that is only cut off from here would be written to as well: two histories"));
        }
        if mirror.state() == v1::MirrorState::Stopped
            && !mirror.handed_over
            && !options.even_if_stopped
        {
            return Err(Failure::new(format!("the mirror stopped: {}", mirror.reason)).hint(
                "what it shows may be wrong; another mirror of this source is the better one, or --even-if-stopped",
            ));
        }
        expect_dead(&source(ALIVE_WITHIN)?.cluster, &volume).await?;
        (None, head.seq.saturating_sub(known.seq))
    } else if mirror.handed_over {
        expect_not_promoted(&source(PATIENT)?, known).await?;
        epoch = Epoch::AfterSuccessors;
        (Some(known), 0)
    } else {
        let source = source(PATIENT)?;
        let at = hand_over(&source, &target, &status, options.timeout).await?;
        // The source may have got another one, or none, after the mirror was loaded.
        fence = match options.fence.resolve()? {
            None if !options.fence.is_none() => source.cluster.get_volume(&volume).await?.fence,
            given => given,
        };
        (Some(at), 0)
    };
    let epoch = epoch.behind(at.unwrap_or(known));
    let mut waited = Duration::ZERO;
    if let Some(store) = &fence {
        let how = match options.force || mirror.handed_over {
            true => How::LeaseOut,
            false => How::Demoted,
        };
        waited = take_marker(&target, &here, store, epoch, how).await?;
    }
    let fenced = fence.is_some();
    let promoted = target.cluster.promote_mirror(v1::PromoteMirrorRequest {
        volume: target.volume.clone(),
        at: at.map(Into::into),
        fence,
        forced: options.force,
        epoch: at.map_or(0, |_| epoch),
    });
    let first = promoted.await?;
    let last = Position {
        epoch: at.unwrap_or(known).epoch,
        seq: first.seq - 1,
    };
    let seconds = begun.elapsed().as_secs_f64();
    let pending = status.copies.clone().unwrap_or_default();
    if json {
        return output::print_json(&json!({
            "volume": target.volume,
            "last_position": last.to_string(),
            "first_position": first.to_string(),
            "lost_entries_known": lost,
            "lag_ms": if options.force { status.lag_ms } else { 0 },
            "objects_at_source_only": pending.pending_segments + pending.quarantined_segments,
            "seconds": seconds,
            "fenced": fenced,
            "lease_waited_ms": u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
        }));
    }
    output::line(format_args!(
        "{} is written here from {first} on; the last position of the source that is here is {last}",
        target.volume
    ))?;
    if options.force {
        output::line(format_args!(
            "lost: {lost} entries that the source was known to have, and whatever it acknowledged in the {:.1} s since it was \
             last seen",
            status.contact_ms as f64 / 1000.0
        ))?;
        if pending.pending_segments + pending.quarantined_segments > 0 {
            output::line(format_args!(
                "{} objects are in the source's bucket only: files that need them can be read while that bucket can; \
                 `heliofs mirror status --missing` lists them",
                pending.pending_segments + pending.quarantined_segments
            ))?;
        }
    }
    Ok(())
}

/// Which epoch follows the one of the last position.
#[derive(Clone, Copy)]
pub(super) enum Epoch {
    /// The next.
    Next,
    /// The one after the next, which is that of a successor that was perhaps promoted.
    AfterSuccessors,
}

impl Epoch {
    /// Its number.
    pub(super) fn behind(self, last: Position) -> u32 {
        match self {
            Self::Next => u32::from(last.epoch.0) + 1,
            Self::AfterSuccessors => u32::from(last.epoch.0) + 2,
        }
    }
}

/// Makes the marker name this cluster at `epoch`; how long the source's lease was waited for.
pub(super) async fn take_marker(
    target: &Target,
    volume: &v1::Volume,
    store: &v1::FenceStore,
    epoch: u32,
    how: How,
) -> Outcome<Duration> {
    let status = target.cluster.status().await?;
    let me = Me {
        volume: volume.id,
        cluster: status.cluster_id,
        epoch,
    };
    let register = fence::open(store, fence::prefix(volume))?;
    let lease = fence::lease(store);
    let taken = fence::take_over(&register, me, &fencing::url_of(&status), lease, how).await;
    match taken {
        Ok(taken) => Ok(taken.waited),
        Err(error @ TakeError::Alive(_)) => {
            Err(Failure::new(error).hint("leave --force out: then nothing is lost"))
        }
        Err(error @ TakeError::Store(_)) => Err(Failure::new(error).hint(
            "nothing was promoted; try again when the fence store answers, or --i-know-the-source-is-dead does without it",
        )),
        Err(error) => Err(Failure::new(error)),
    }
}

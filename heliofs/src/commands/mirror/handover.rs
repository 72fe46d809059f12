//! What comes before a mirror is promoted: a source that lives hands over, and takes the volume back if the mirror does not get
//! there; of one that does not, it is made sure that nobody answers.

use std::time::{Duration, Instant};

use heliofs_proto::ids::Position;
use heliofs_proto::v1;
use meta_client::{Cluster, ClusterError, MetaUrl};

use mirror_sync::fence;

use super::promote::{status_of, take_marker};
use crate::connect::Target;
use crate::failure::{Failure, Outcome};

/// A mirror that is further behind than this would keep both regions from writing for too long while it catches up.
const LAG_MAX: Duration = Duration::from_secs(10);

/// How long one that is not close yet is waited for, and how often it is looked at.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Where the other side of `mirror` is: a source, or the successor of one that handed over.
pub(super) fn other_side(mirror: &v1::MirrorOf, given: Option<&str>) -> Outcome<(MetaUrl, String)> {
    let mut url: MetaUrl = given.unwrap_or(&mirror.source).parse()?;
    let volume = url.volume.take().unwrap_or_else(|| mirror.volume.clone());
    Ok((url, volume))
}

/// Fails unless the source can be done without.
pub(super) async fn expect_dead(source: &Cluster, volume: &str, mirror: &v1::MirrorOf) -> Outcome {
    match source.get_volume(volume).await {
        Ok(_) => Err(Failure::new("the source answers: it is not dead")
            .hint("leave --force out: then nothing is lost")),
        // Without a majority nobody there is written to, and may be again: that is what the oath or the fence store is for.
        Err(ClusterError::NoNode { .. } | ClusterError::NoLeader { .. }) => Ok(()),
        // Nobody writes a volume that is not there. A successor may have it under another name.
        Err(ClusterError::NotFound(_)) if !mirror.was_handed_over() => Ok(()),
        Err(error) => Err(Failure::new(format!(
            "the source answers, though not as it should, so it is not dead: {error}"
        ))
        .hint("give --source and --source-token-file as its own mounts use them")),
    }
}

/// The source writes no more, and `mirror` has all that it wrote: the position of the last of it. If the mirror does not get there
/// within `timeout`, the source takes the volume back.
pub(super) async fn hand_over(
    source: &Target,
    mirror: &Target,
    timeout: Duration,
) -> Outcome<Position> {
    let dead = |error: ClusterError| match error {
        error @ (ClusterError::NoNode { .. } | ClusterError::NoLeader { .. }) => {
            Failure::from(error).hint("if the source is dead: --force --i-know-the-source-is-dead")
        }
        error => error.into(),
    };
    let successor = mirror.url.to_string();
    let theirs = source.cluster.get_volume(&source.volume).await;
    let theirs = theirs.map_err(dead)?;
    let again = theirs
        .mirror
        .as_ref()
        .is_some_and(|it| it.was_handed_over() && it.source == successor);
    if !again {
        expect_close(mirror).await?;
    }
    let demoted = source
        .cluster
        .demote_volume(&source.volume, &successor, true);
    let at = demoted.await.map_err(dead)?;
    let waited = mirror
        .cluster
        .mirror_wait(&mirror.volume, at, false, timeout);
    let late = match waited.await {
        Ok((true, _)) => return Ok(at),
        Ok((false, applied)) => {
            format!("the mirror is at {applied} and has not reached {at} within {timeout:?}")
        }
        Err(error) => format!("the mirror can't be asked any more: {error}"),
    };
    // By an earlier call of this command; with a fence store the source can take the marker back even so.
    let is_final = theirs.fence.is_none() && theirs.mirror.is_some_and(|it| it.sealed);
    match take_back(source, mirror, &successor, at, theirs.fence).await {
        Ok(()) => Err(Failure::new(format!("{late}: not promoted; the source is written again"))
            .hint("nothing is lost: try again when `heliofs mirror status` shows that the mirror follows")),
        Err(failed) => Err(Failure::new(format!(
            "{late}: not promoted, and the source is read-only: {}",
            failed.message()
        ))
        .hint(match is_final {
            true => REPEAT.to_owned(),
            false => way_back(source),
        })),
    }
}

/// What to do about a mirror that was not promoted after the hand-over became final: its source is not written again.
pub(super) const REPEAT: &str = "nothing is lost: repeat the command";

/// What to do about a source that handed over to a mirror that was not promoted.
pub(super) fn way_back(source: &Target) -> String {
    format!(
        "nothing is lost: repeat the command, or `heliofs mirror promote {}` makes the source writable again",
        source.url
    )
}

/// Makes a source that handed over to `successor` at `at` writable again, if this was not promoted: in the same epoch, as if nothing
/// had been. If the successor has taken the marker in the fence store already, the source takes that back, and needs the epoch
/// behind the successor's for it.
pub(super) async fn take_back(
    source: &Target,
    mirror: &Target,
    successor: &str,
    at: Position,
    fence: Option<v1::FenceStore>,
) -> Outcome {
    for (peer, status) in source.cluster.status_all().await {
        if status.is_ok_and(|status| !status.fences) {
            return Err(Failure::new(format!(
                "{peer} is of a release that can't take a volume back"
            )));
        }
    }
    let here = source.cluster.get_volume(&source.volume).await?;
    let own = source.cluster.status().await?.cluster_id;
    let holder = match &fence {
        None => None,
        Some(store) => {
            let register = fence::open(store, fence::prefix(&here))?;
            let found = fence::holder(&register, here.id).await;
            found.map_err(Failure::new)?
        }
    };
    // Last, since it may be promoted at any time.
    expect_not_promoted(mirror, at).await?;
    match (holder, fence) {
        (Some(marker), Some(store)) if marker.cluster != own && marker.epoch > at.epoch.0 => {
            let epoch = marker.epoch + 1;
            let taken = take_marker(source, &here, &store, epoch, fence::How::LeaseOut);
            let (epoch, _) = taken.await?;
            expect_not_promoted(mirror, at).await?;
            let ask = v1::PromoteMirrorRequest {
                volume: source.volume.clone(),
                at: Some(at.into()),
                fence: Some(store),
                forced: false,
                epoch,
            };
            source.cluster.promote_mirror(ask).await?;
        }
        // Nothing but the marker would keep the successor from being promoted at this very moment.
        _ if here.mirror.as_ref().is_some_and(|mirror| mirror.sealed) => {
            return Err(Failure::new(format!(
                "the hand-over to {successor} is final: it may be promoted at any moment"
            ))
            .hint(format!(
                "repeat `heliofs mirror promote {successor}`; if that is dead for good, `heliofs mirror promote {} --force \
                 --i-know-the-source-is-dead` goes on here",
                source.url
            )));
        }
        _ => {
            let cluster = &source.cluster;
            cluster
                .take_volume_back(&source.volume, successor, at)
                .await?;
        }
    }
    Ok(())
}

/// Right before the mirror is promoted: the source logs that the hand-over to `successor` at `at` is final, if nobody has had it taken
/// back, and the mirror gets that. The position that it is to be promoted at. From here on nobody takes the volume back: whoever
/// tries at the same moment is refused by the source's log, or has come first, and then this is.
pub(super) async fn seal(
    source: &Target,
    mirror: &Target,
    successor: &str,
    at: Position,
    timeout: Duration,
) -> Outcome<Position> {
    let sealed = source
        .cluster
        .seal_hand_over(&source.volume, successor, at)
        .await;
    let sealed = sealed.map_err(|error| match error {
        ClusterError::Invalid(why) => Failure::new(format!(
            "the source was taken back meanwhile: not promoted ({why})"
        ))
        .hint("is somebody else promoting it?"),
        // It may be in the log.
        error => Failure::from(error).hint(REPEAT),
    })?;
    let waited = mirror
        .cluster
        .mirror_wait(&mirror.volume, sealed, false, timeout);
    let late = match waited.await {
        Ok((true, _)) => return Ok(sealed),
        Ok((false, applied)) => {
            format!("the mirror is at {applied} and has not reached {sealed} within {timeout:?}")
        }
        Err(error) => format!("the mirror can't be asked any more: {error}"),
    };
    Err(Failure::new(format!(
        "{late}: not promoted, and the source is read-only, since the hand-over is final"
    ))
    .hint(REPEAT))
}

/// Fails unless the volume's successor, to which it was handed over at `at`, is a mirror still.
pub(super) async fn expect_not_promoted(successor: &Target, at: Position) -> Outcome {
    let there = successor.cluster.get_volume(&successor.volume).await?;
    let head = there.position.map(Position::from).unwrap_or_default();
    if there.mirror.is_none() || head.epoch > at.epoch {
        return Err(Failure::new(format!(
            "the volume was handed over to {}, and is written there",
            successor.url
        ))
        .hint("`heliofs mirror rejoin` makes this one a mirror of it; then it can be promoted"));
    }
    Ok(())
}

/// Fails unless the mirror would soon reach whatever position the source stops at. One that just began to follow, or lost its
/// connection a moment ago, is given [`CLOSE_WITHIN`].
async fn expect_close(mirror: &Target) -> Outcome {
    let until = Instant::now() + CLOSE_WITHIN;
    loop {
        let status = status_of(mirror).await?;
        let lag = Duration::from_millis(status.lag_ms);
        let following = status.doing == "following";
        let soon = following || matches!(status.doing.as_str(), "starting" | "retrying");
        if following && lag <= LAG_MAX {
            return Ok(());
        }
        if soon && Instant::now() < until {
            tokio::time::sleep(LOOK_AGAIN).await;
            continue;
        }
        return Err(match following {
            false => Failure::new(format!(
                "the mirror does not follow its source: it is {} ({}); nothing was changed",
                status.doing, status.detail
            ))
            .hint("a planned promotion needs a mirror that follows: see `heliofs mirror status`"),
            true => Failure::new(format!(
                "the mirror is {lag:?} behind its source: nobody could write until it has caught up; nothing was changed"
            ))
            .hint("wait until `heliofs mirror status` shows a lag of less than 10 s"),
        });
    }
}

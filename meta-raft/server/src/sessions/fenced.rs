//! A session's command on a volume that has a fence store: it is refused while the marker there can't be renewed, unless it
//! took effect before.

use heliofs_proto::ids::{SessionId, VolumeId};
use heliofs_proto::v1::{self, FsError, log_item::Item};
use meta_core::{View, keys};

use super::Context;
use crate::proposer::{ProposeError, Proposed};

/// As [`crate::proposer::Proposer::propose`]; a volume that must not be changed now answers that it is read-only.
///
/// A command that is sent again may have taken effect before the marker was lost sight of; it must not be told that it did not.
pub(super) async fn propose(
    ctx: &Context,
    volume: VolumeId,
    command: v1::Command,
) -> Result<Proposed, ProposeError> {
    loop {
        let proposed = ctx.proposer.propose(Item::Command(command.clone())).await;
        let why = match proposed {
            Err(ProposeError::Fenced(why)) => why,
            other => return other,
        };
        if !was_applied(ctx, volume, &command).await? {
            tracing::debug!(%volume, why, "a change is refused");
            return Ok(Proposed::Reply(v1::Reply {
                error: FsError::ReadOnly.into(),
                position: ctx.state.head(volume).map(|(head, _)| head.into()),
                ..v1::Reply::default()
            }));
        }
        if !ctx.proposer.fences().may_answer(volume).await {
            return Err(ProposeError::Unknown);
        }
    }
}

/// Whether an earlier copy of the command took effect. Afterwards none that is under way can.
async fn was_applied(
    ctx: &Context,
    volume: VolumeId,
    command: &v1::Command,
) -> Result<bool, ProposeError> {
    let Some(beat) = ctx.state.beat(volume) else {
        return Ok(false);
    };
    // Behind whatever was proposed before: once it is applied, that is.
    ctx.proposer.propose(Item::Beat(beat)).await?;
    let key = keys::reply(volume, SessionId(command.session), command.sequence);
    match ctx.state.snapshot_view(|view| view.get(&key)) {
        Ok(reply) => Ok(reply.is_some()),
        Err(found) => {
            ctx.damage.report("a reply", &found);
            Err(ProposeError::Unknown)
        }
    }
}

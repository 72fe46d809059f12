//! Sessions of clients: their streams, and the soft state that the leader keeps for them.
//!
//! - [`attach`]: the service; [`stream`]: one session's stream; [`outbox`]: what leaves on it
//! - [`hub`]: all volumes' soft state, while this node leads; [`soft`]: one volume's
//! - [`locks`], [`opens`], [`write_leases`], [`orphans`], [`interest`], [`grace`], [`deletions`], [`copies`]: its parts, pure
//! - [`reads`]: answers from a view, and what they tell; [`summary`]: the one read that takes long

pub mod attach;
pub mod copies;
pub mod deletions;
mod directories;
mod fenced;
pub mod grace;
pub mod hub;
pub mod interest;
pub mod locks;
pub mod maintain;
pub mod opens;
pub mod orphans;
pub mod outbox;
pub mod reads;
pub mod soft;
mod stream;
mod summary;
pub mod write_leases;

use std::time::Instant;

use heliofs_proto::ids::NodeId;
use heliofs_proto::v1::{self, FsError, command::Op, log_item::Item};
use tokio::sync::watch;

use crate::damage::Damage;
use crate::leadership::Leadership;
use crate::mirrors::MirrorBoard;
use crate::proposer::{ProposeError, Proposed, Proposer};
use crate::read_gate::ReadGate;
use crate::store::State;
use hub::{Hub, VolumeSessions};

/// What sessions and drivers work with; cheap to clone.
#[derive(Clone)]
pub struct Context {
    /// This node.
    pub node: NodeId,
    /// The records.
    pub state: State,
    /// Proposes commands.
    pub proposer: Proposer,
    /// Makes reads linearizable.
    pub gate: ReadGate,
    /// Who leads.
    pub leadership: watch::Receiver<Leadership>,
    /// The soft state.
    pub hub: Hub,
    /// Where damaged records are reported.
    pub damage: Damage,
    /// What the followers of this node's mirrors say of themselves.
    pub mirrors: MirrorBoard,
}

/// Ends a session that is marked as ending: by a command, whose application drops the soft state on the way.
pub(crate) async fn end_session(ctx: &Context, volume: &VolumeSessions, session: u64) {
    if ctx.state.is_mirror(volume.id) {
        // A mirror's sessions are soft state alone: its records are the source's.
        let wake = volume.soft().end_session(session, Instant::now());
        ctx.hub.wake(volume, wake);
        return;
    }
    loop {
        let op = Op::SessionEnd(v1::SessionEnd { session });
        match propose(ctx, volume, op).await {
            // It ended at once, but some of its cached replies are left.
            Ok(reply) if reply.error() == FsError::None && !reply.done => {}
            Ok(reply) if reply.error() == FsError::None => return,
            Ok(reply) => {
                // The volume is gone: nothing of the session may stay here either.
                tracing::debug!(session, error = ?reply.error(), "a session's end was refused");
                let wake = volume.soft().end_session(session, Instant::now());
                ctx.hub.wake(volume, wake);
                return;
            }
            Err(error) => {
                tracing::debug!(session, %error, "a session's end could not be proposed");
                volume.soft().cancel_end(session);
                return;
            }
        }
    }
}

/// Proposes a command of the system.
pub(crate) async fn propose(
    ctx: &Context,
    volume: &VolumeSessions,
    op: Op,
) -> Result<v1::Reply, ProposeError> {
    let command = v1::Command {
        volume: volume.id.0,
        op: Some(op),
        ..Default::default()
    };
    match ctx.proposer.propose(Item::Command(command)).await? {
        Proposed::Reply(reply) => Ok(reply),
        Proposed::Local(other) => Err(ProposeError::Fatal(format!(
            "a command was answered with {other:?}"
        ))),
    }
}

//! The services that clients and operators call.
//!
//! - [`admin`]: cluster and volumes; [`mirrors`]: slots and mirrors; [`status`]: how failures look
//! - elsewhere: [`crate::sessions::attach`], [`crate::changelog`], and between nodes [`crate::raft::service`]

pub mod admin;
pub mod mirrors;
pub mod status;

use heliofs_proto::limits::MESSAGE_BYTES_MAX;
use heliofs_proto::v1::admin_server::AdminServer;
use heliofs_proto::v1::changelog_server::ChangelogServer;
use heliofs_proto::v1::sessions_server::SessionsServer;
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;

use crate::changelog::ChangelogService;
use crate::drivers::reign;
use crate::drivers::slots::SlotDriver;
use crate::node::NodeContext;
use crate::sessions::Context;
use crate::sessions::attach::SessionsService;
use crate::sessions::hub::Hub;
use crate::{changelog, metrics};

/// Registers observers, spawns the tasks of sessions and drivers, and returns the services, which check the token, and what the
/// node shows of itself.
///
/// Call before the first entry is applied.
pub fn start(node: &NodeContext) -> (Routes, metrics::Shown) {
    let hub = Hub::new(node.state.clone(), node.config.sessions.clone());
    let applies = changelog::Applies::default();
    let metrics = metrics::Metrics::new();
    node.observers.register(hub.observer());
    node.observers.register(applies.observer());
    node.observers.register(metrics.observer());
    node.reads.count(metrics.rounds());
    let ctx = Context {
        node: node.node_id,
        state: node.state.clone(),
        proposer: node.proposer.clone(),
        gate: node.reads.clone(),
        leadership: node.leadership.clone(),
        hub,
        damage: node.damage.clone(),
        mirrors: node.mirrors.clone(),
    };
    node.tasks
        .spawn(reign::run(ctx.clone(), node.cancel.clone()));
    let slots = SlotDriver::new(ctx.clone(), node.log.clone());
    node.tasks.spawn(slots.run(node.cancel.clone()));
    let shown = metrics::Shown {
        metrics,
        hub: ctx.hub.clone(),
        raft: node.raft.clone(),
        log: node.log.clone(),
    };
    let sessions = SessionsServer::new(SessionsService::new(ctx.clone()))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let admin = admin::AdminService::new(ctx.clone(), node.raft.clone(), applies.clone());
    let admin = AdminServer::new(admin).max_encoding_message_size(MESSAGE_BYTES_MAX);
    let follow = ChangelogService::new(ctx, node, applies);
    let follow = ChangelogServer::new(follow).max_encoding_message_size(MESSAGE_BYTES_MAX);
    let token = || node.token.clone();
    let routes = Routes::new(InterceptedService::new(sessions, token()))
        .add_service(InterceptedService::new(admin, token()))
        .add_service(InterceptedService::new(follow, token()));
    (routes, shown)
}

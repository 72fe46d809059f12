//! The Admin service: the cluster's nodes, its volumes, their digests.

use heliofs_proto::ids::{NodeId, Position, VolumeId};
use heliofs_proto::v1::admin_server::Admin;
use heliofs_proto::v1::{self, FsError, command::Op, local_command, log_item::Item};
use meta_core::{limits::core_level_known, query};
use tonic::{Request, Response, Status};

use super::status;
use crate::changelog::Applies;
use crate::proposer::{LocalReply, Proposed};
use crate::raft::admin::{AdminError, Joining, RaftAdmin};
use crate::sessions::Context;
use crate::store::LogStore;

/// Segments are this large unless the volume says otherwise: large enough that a request's overhead does not count, small
/// enough that a retry does not hurt.
const SEGMENT_BYTES: u64 = 4 << 20;

/// The service.
#[derive(Clone)]
pub struct AdminService {
    pub(super) ctx: Context,
    raft: RaftAdmin,
    pub(super) log: LogStore,
    pub(super) applies: Applies,
}

pub(super) type Answer<T> = Result<Response<T>, Status>;

fn admin_status(error: AdminError) -> Status {
    match error {
        AdminError::NotLeader { leader } => status::not_leader(leader.as_ref()),
        AdminError::Refused(why) => Status::invalid_argument(why),
        // It may still take effect, so it is not `unavailable`.
        AdminError::Unavailable(why) => Status::deadline_exceeded(why),
    }
}

/// JuiceFS's rule, so that a name can be a bucket's prefix and a host's label: 3 to 63 lower-case letters, digits and
/// dashes, no dash at either end.
pub(super) fn check_name(name: &str) -> Result<(), Status> {
    let fits = (3..=63).contains(&name.len())
        && name
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && !name.starts_with('-')
        && !name.ends_with('-');
    if fits {
        Ok(())
    } else {
        Err(Status::invalid_argument(format!(
            "`{name}` can't be a volume's name: use 3 to 63 lower-case letters, digits and dashes, with no dash at either end"
        )))
    }
}

/// A level that a node does not know stops it when the command is applied, and it would stop all of them. The core can't
/// refuse: a newer build would accept, and the replicas would go separate ways. So it is refused before it is in the log.
fn check_core_level(settings: Option<&v1::VolumeSettings>) -> Result<(), Status> {
    match settings {
        Some(settings) if settings.core_level > core_level_known() => {
            Err(Status::invalid_argument(format!(
                "core level {} is above what this build supports ({}): upgrade all metadata nodes first",
                settings.core_level,
                core_level_known()
            )))
        }
        Some(_) | None => Ok(()),
    }
}

pub(super) fn no_volume(what: impl std::fmt::Display) -> Status {
    Status::not_found(format!("no volume `{what}` in this cluster"))
}

pub(super) fn unexpected(answer: &dyn std::fmt::Debug) -> Status {
    tracing::error!(?answer, "a proposal was answered with something else");
    Status::internal(format!("unexpected answer {answer:?}"))
}

impl AdminService {
    /// Over the node's parts.
    pub fn new(ctx: Context, raft: RaftAdmin, applies: Applies) -> Self {
        let log = raft.log.clone();
        Self {
            ctx,
            raft,
            log,
            applies,
        }
    }

    pub(super) async fn propose_local(&self, op: local_command::Op) -> Result<LocalReply, Status> {
        let item = Item::Local(v1::LocalCommand { op: Some(op) });
        match self
            .ctx
            .proposer
            .propose(item)
            .await
            .map_err(status::propose)?
        {
            Proposed::Local(LocalReply::Invalid(why)) => Err(Status::invalid_argument(why)),
            Proposed::Local(reply) => Ok(reply),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) fn named(&self, name: &str) -> Result<v1::Volume, Status> {
        self.ctx
            .state
            .volume_named(name)
            .ok_or_else(|| no_volume(name))
    }

    /// With what is in the replicated records.
    fn describe(&self, record: v1::Volume) -> Result<v1::Volume, Status> {
        let id = VolumeId(record.id);
        let (head, settings, counters) = self
            .ctx
            .state
            .snapshot_view(|view| {
                Ok((
                    query::head(view, id)?,
                    query::settings(view, id)?,
                    query::counters(view, id)?,
                ))
            })
            .map_err(|found| status::corrupt(&self.ctx.damage, "a volume", &found))?;
        Ok(v1::Volume {
            settings: settings.or(record.settings),
            position: head.as_ref().map(|head| head.position.into()),
            epochs: head.map_or_else(Vec::new, |head| {
                let epochs = head.epochs.into_iter();
                epochs
                    .map(|(epoch, seq)| Position { epoch, seq }.into())
                    .collect()
            }),
            used_bytes: counters.used_bytes,
            used_inodes: counters.used_inodes,
            segments: counters.segments,
            deletions_waiting: self.ctx.state.deletions_waiting(id),
            fenced: match self.ctx.leadership.borrow().leading() {
                Some(_) => self.ctx.proposer.fences().shut(id).unwrap_or_default(),
                None => String::new(),
            },
            ..record
        })
    }

    pub(super) async fn current(&self) -> Result<(), Status> {
        self.ctx.gate.linearizable().await.map_err(status::read)
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn status(&self, _: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        let status = v1::StatusResponse {
            build: env!("CARGO_PKG_VERSION").to_owned(),
            sessions: self.ctx.hub.status(),
            ..self.raft.status()
        };
        Ok(Response::new(status))
    }

    async fn init_cluster(
        &self,
        _: Request<v1::InitClusterRequest>,
    ) -> Answer<v1::InitClusterResponse> {
        let cluster = self.raft.init().await.map_err(admin_status)?;
        Ok(Response::new(v1::InitClusterResponse {
            cluster_id: cluster.0,
        }))
    }

    async fn add_node(&self, request: Request<v1::AddNodeRequest>) -> Answer<v1::AddNodeResponse> {
        let v1::AddNodeRequest { node, address } = request.into_inner();
        if node == 0 {
            return Err(Status::invalid_argument("a node's id is not 0"));
        }
        let added = self.raft.add_node(NodeId(node), &address).await;
        let behind = match added.map_err(admin_status)? {
            Joining::Votes => 0,
            Joining::CatchingUp { behind } => behind,
        };
        Ok(Response::new(v1::AddNodeResponse { behind }))
    }

    async fn remove_node(
        &self,
        request: Request<v1::RemoveNodeRequest>,
    ) -> Answer<v1::RemoveNodeResponse> {
        let node = NodeId(request.into_inner().node);
        self.raft.remove_node(node).await.map_err(admin_status)?;
        Ok(Response::new(v1::RemoveNodeResponse {}))
    }

    async fn transfer(
        &self,
        request: Request<v1::TransferRequest>,
    ) -> Answer<v1::TransferResponse> {
        let to = NodeId(request.into_inner().to);
        self.raft.transfer(to).await.map_err(admin_status)?;
        Ok(Response::new(v1::TransferResponse {}))
    }

    async fn snapshot(&self, _: Request<v1::SnapshotRequest>) -> Answer<v1::SnapshotTaken> {
        let applied_index = self.raft.snapshot().await.map_err(admin_status)?;
        Ok(Response::new(v1::SnapshotTaken { applied_index }))
    }

    async fn compact(&self, _: Request<v1::CompactRequest>) -> Answer<v1::Compacted> {
        let state_bytes = self.raft.compact().await.map_err(admin_status)?;
        Ok(Response::new(v1::Compacted {
            node: self.ctx.node.0,
            state_bytes,
        }))
    }

    async fn create_volume(&self, request: Request<v1::VolumeCreate>) -> Answer<v1::Volume> {
        let mut create = request.into_inner();
        check_name(&create.name)?;
        check_core_level(create.settings.as_ref())?;
        let Some(storage) = &mut create.storage else {
            return Err(Status::invalid_argument("a volume needs a storage"));
        };
        if storage.segment_bytes == 0 {
            storage.segment_bytes = SEGMENT_BYTES;
        }
        if storage.uuid.is_empty() {
            storage.uuid = format!("{:032x}", rand::random::<u128>());
        }
        let name = create.name.clone();
        match self
            .propose_local(local_command::Op::VolumeCreate(create))
            .await?
        {
            LocalReply::VolumeCreated(_) => {
                let volume = self.describe(self.named(&name)?)?;
                tracing::info!(volume = volume.id, name, "a volume was created");
                Ok(Response::new(volume))
            }
            LocalReply::VolumeExists(_) => Err(Status::already_exists(format!(
                "a volume `{name}` exists already"
            ))),
            other => Err(unexpected(&other)),
        }
    }

    async fn update_volume(&self, request: Request<v1::UpdateVolumeRequest>) -> Answer<v1::Volume> {
        let v1::UpdateVolumeRequest {
            name,
            settings,
            storage,
            fence,
            unfence,
        } = request.into_inner();
        check_core_level(settings.as_ref())?;
        self.current().await?;
        let record = self.named(&name)?;
        if let Some(mut storage) = storage {
            let before = record.storage.clone().unwrap_or_default();
            if storage.uuid != before.uuid {
                return Err(Status::invalid_argument(format!(
                    "the storage's uuid is {} and can't be changed: it says which objects are this volume's",
                    before.uuid
                )));
            }
            let key = |storage: &v1::StorageConfig| {
                let encryption = storage.encryption.as_ref();
                encryption.map(|encryption| (encryption.cipher.clone(), encryption.key_id))
            };
            let commitment = |storage: &v1::StorageConfig| {
                let encryption = storage.encryption.as_ref();
                encryption.map_or_else(Default::default, |it| it.commitment.clone())
            };
            // Who does not know of commitments leaves it out.
            if commitment(&storage).is_empty()
                && let Some(encryption) = &mut storage.encryption
            {
                encryption.commitment = commitment(&before);
            }
            let recommitted =
                !commitment(&before).is_empty() && commitment(&storage) != commitment(&before);
            if key(&storage) != key(&before) || recommitted {
                return Err(Status::invalid_argument(
                    "whether and with which key a volume is encrypted can't be changed: its objects are",
                ));
            }
            let update = v1::VolumeUpdate {
                volume: record.id,
                storage: Some(storage),
            };
            match self
                .propose_local(local_command::Op::VolumeUpdate(update))
                .await?
            {
                LocalReply::Done => {}
                LocalReply::NoSuchVolume => return Err(no_volume(name)),
                other => return Err(unexpected(&other)),
            }
        }
        if fence.is_some() || unfence {
            let op = local_command::Op::VolumeFence(v1::VolumeFence {
                volume: record.id,
                fence,
                of_source: false,
            });
            match self.propose_local(op).await? {
                LocalReply::Done => {}
                LocalReply::NoSuchVolume => return Err(no_volume(name)),
                other => return Err(unexpected(&other)),
            }
        }
        if settings.is_some() && record.mirror.is_some() {
            return Err(Status::invalid_argument(format!(
                "volume `{name}` is a mirror: its settings are changed at the source"
            )));
        }
        if settings.is_some() {
            let command = v1::Command {
                volume: record.id,
                op: Some(Op::SettingsUpdate(v1::SettingsUpdate { settings })),
                ..Default::default()
            };
            let proposed = self.ctx.proposer.propose(Item::Command(command)).await;
            match proposed.map_err(status::propose)? {
                Proposed::Reply(reply) if reply.error() == FsError::None => {}
                Proposed::Reply(reply) if reply.error() == FsError::Stale => {
                    return Err(no_volume(name));
                }
                Proposed::Reply(reply) => {
                    return Err(Status::invalid_argument(format!(
                        "the settings are refused: {:?}",
                        reply.error()
                    )));
                }
                other => return Err(unexpected(&other)),
            }
        }
        Ok(Response::new(self.describe(self.named(&name)?)?))
    }

    async fn destroy_volume(
        &self,
        request: Request<v1::VolumeDestroy>,
    ) -> Answer<v1::DestroyVolumeResponse> {
        let destroy = request.into_inner();
        let volume = destroy.volume;
        match self
            .propose_local(local_command::Op::VolumeDestroy(destroy))
            .await?
        {
            LocalReply::Done => {
                tracing::info!(volume, "a volume was destroyed");
                Ok(Response::new(v1::DestroyVolumeResponse {}))
            }
            LocalReply::NoSuchVolume => Err(no_volume(volume)),
            other => Err(unexpected(&other)),
        }
    }

    async fn list_volumes(
        &self,
        _: Request<v1::ListVolumesRequest>,
    ) -> Answer<v1::ListVolumesResponse> {
        self.current().await?;
        let volumes = self.ctx.state.volumes().into_iter().map(|record| {
            let mut volume = self.describe(record)?;
            // A list is printed; whoever needs the keys asks for the volume.
            let fence = volume.fence.as_mut().and_then(|fence| fence.store.as_mut());
            if let Some(store) = fence {
                store.secret_key.clear();
            }
            if let Some(storage) = &mut volume.storage {
                storage.secret_key.clear();
                if let Some(encryption) = &mut storage.encryption {
                    encryption.keys.clear();
                }
            }
            Ok(volume)
        });
        let volumes = volumes.collect::<Result<_, Status>>()?;
        Ok(Response::new(v1::ListVolumesResponse { volumes }))
    }

    async fn get_volume(&self, request: Request<v1::GetVolumeRequest>) -> Answer<v1::Volume> {
        self.current().await?;
        let record = self.named(&request.into_inner().name)?;
        Ok(Response::new(self.describe(record)?))
    }

    async fn digest(&self, request: Request<v1::DigestRequest>) -> Answer<v1::DigestResponse> {
        let id = VolumeId(request.into_inner().volume);
        let (position, sums) = self.ctx.state.digest(id).ok_or_else(|| no_volume(id))?;
        let bytes: Vec<u8> = (0..=u8::MAX)
            .flat_map(|bucket| sums.get(bucket).to_le_bytes())
            .collect();
        Ok(Response::new(v1::DigestResponse {
            position: Some(position.into()),
            digest: sums.total().to_le_bytes().to_vec().into(),
            sums: bytes.into(),
            diverged: self.ctx.state.diverged(id).map(Into::into),
        }))
    }

    async fn create_slot(&self, ask: Request<v1::CreateSlotRequest>) -> Answer<v1::MirrorSlot> {
        self.slot_created(ask.into_inner()).await
    }

    async fn list_slots(
        &self,
        ask: Request<v1::ListSlotsRequest>,
    ) -> Answer<v1::ListSlotsResponse> {
        self.slots_listed(ask.into_inner()).await
    }

    async fn change_slot(
        &self,
        ask: Request<v1::ChangeSlotRequest>,
    ) -> Answer<v1::ChangeSlotResponse> {
        self.slot_changed(ask.into_inner()).await
    }

    async fn report_slot(&self, ask: Request<v1::SlotReport>) -> Answer<v1::MirrorSlot> {
        self.slot_reported(ask.into_inner()).await
    }

    async fn mirror_status(
        &self,
        ask: Request<v1::MirrorStatusRequest>,
    ) -> Answer<v1::MirrorStatusResponse> {
        self.mirrors_shown(ask.into_inner()).await
    }

    async fn mirror_wait(
        &self,
        ask: Request<v1::MirrorWaitRequest>,
    ) -> Answer<v1::MirrorWaitResponse> {
        self.position_awaited(ask.into_inner()).await
    }

    async fn demote_volume(
        &self,
        ask: Request<v1::DemoteVolumeRequest>,
    ) -> Answer<v1::DemoteVolumeResponse> {
        self.demoted(ask.into_inner()).await
    }

    async fn promote_mirror(
        &self,
        ask: Request<v1::PromoteMirrorRequest>,
    ) -> Answer<v1::PromoteMirrorResponse> {
        self.promoted(ask.into_inner()).await
    }

    async fn set_bucket(
        &self,
        ask: Request<v1::SetBucketRequest>,
    ) -> Answer<v1::SetBucketResponse> {
        self.bucket_set(ask.into_inner()).await
    }

    async fn list_missing(
        &self,
        ask: Request<v1::ListMissingRequest>,
    ) -> Answer<v1::ListMissingResponse> {
        self.missing_listed(ask.into_inner()).await
    }

    async fn mirror_reload(
        &self,
        ask: Request<v1::MirrorReloadRequest>,
    ) -> Answer<v1::MirrorReloadResponse> {
        self.reload(ask.into_inner()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rule_of_juicefs() {
        for good in ["abc", "my-volume-2", "000", &"x".repeat(63)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "ab",
            "Abc",
            "a_b",
            "-ab",
            "ab-",
            "a b",
            "ä-b",
            &"x".repeat(64),
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}

//! Calls about mirrors, of both sides: slots and copies of volumes at a source, status and waiting at a mirror.

use std::time::Duration;

use heliofs_proto::ids::Position;
use heliofs_proto::limits::MESSAGE_BYTES_MAX;
use heliofs_proto::packing::{self, Unpacker};
use heliofs_proto::v1;
use heliofs_proto::v1::changelog_client::ChangelogClient;
use tokio::time::Instant;
use tonic::Streaming;

use crate::admin::call;
use crate::cluster::{Answer, Cluster, Search, judge, root_cause};
use crate::error::ClusterError;

/// A copy's replica reads its disk all the time; one that is silent for this long is not going to go on.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// A server answers a wait after at most four seconds; below the time that an attempt may take.
const WAIT: Duration = Duration::from_secs(3);

/// All records of a volume, on their way from one replica.
pub struct VolumeCopy {
    stream: Streaming<v1::CopyFrame>,
    unpacker: Unpacker,
    peer: String,
}

impl VolumeCopy {
    fn new(stream: Streaming<v1::CopyFrame>, peer: String) -> Result<Self, ClusterError> {
        let unpacker = Unpacker::new()
            .map_err(|error| ClusterError::Invalid(format!("a copy can't be unpacked: {error}")))?;
        Ok(Self {
            stream,
            unpacker,
            peer,
        })
    }

    /// The replica that is copied from.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The next frame; `None` at the end. A copy that breaks must begin anew.
    ///
    /// Errors: `NoNode` when the stream broke or fell silent; what the replica refuses.
    pub async fn next(&mut self) -> Result<Option<v1::CopyFrame>, ClusterError> {
        let broken = |detail: String| ClusterError::NoNode {
            peers: self.peer.clone(),
            detail,
        };
        match tokio::time::timeout(SILENCE_MAX, self.stream.message()).await {
            Ok(Ok(Some(frame))) if !frame.packed.is_empty() => {
                let frame = self.unpacker.unpack(&frame.packed);
                frame.map(Some).map_err(|error| broken(error.to_string()))
            }
            Ok(Ok(frame)) => Ok(frame),
            Ok(Err(status)) => Err(match judge(&self.peer, &status) {
                Answer::Refused(error) => error,
                Answer::Elsewhere(_, detail)
                | Answer::Unreachable(detail)
                | Answer::Broken(detail) => broken(detail),
            }),
            Err(_) => Err(broken("it was silent".to_owned())),
        }
    }
}

/// A mirror that is held where it is, for some seconds at most; until this is dropped, or a copy of it has begun.
pub struct ReplayHold {
    // What keeps it.
    _stream: Streaming<v1::HoldFrame>,
    id: u64,
    peer: String,
}

impl Cluster {
    /// Makes a mirror's leader replay nothing more for a moment: whatever the source answers from now on is not older than what
    /// the mirror has.
    ///
    /// Errors: `NotFound` without such a volume; `Invalid` of a node that does not know how; `NoNode`, `NoLeader` when none leads
    /// within the deadline.
    pub async fn hold_replay(&self, volume: &str) -> Result<ReplayHold, ClusterError> {
        let mut search = Search::new(self);
        loop {
            for peer in self.order(None) {
                match self.ask_for_hold(&peer, volume).await {
                    Ok(hold) => return Ok(hold),
                    Err(Answer::Refused(error)) => return Err(error),
                    Err(Answer::Elsewhere(_, detail)) => search.note(&peer, &detail, true),
                    Err(Answer::Unreachable(detail)) | Err(Answer::Broken(detail)) => {
                        search.note(&peer, &detail, false);
                    }
                }
            }
            search.check()?;
            tokio::time::sleep(search.pace()).await;
        }
    }

    async fn ask_for_hold(&self, peer: &str, volume: &str) -> Result<ReplayHold, Answer> {
        let channel = self.channel(peer).map_err(Answer::Refused)?;
        let mut client = ChangelogClient::new(channel);
        let request = self.request(v1::HoldRequest {
            volume: volume.to_owned(),
        });
        let held = async {
            let mut stream = client.hold(request).await?.into_inner();
            let first = stream.message().await?;
            Ok((stream, first))
        };
        match tokio::time::timeout(self.options().attempt_timeout, held).await {
            Ok(Ok((stream, Some(first)))) => Ok(ReplayHold {
                _stream: stream,
                id: first.hold,
                peer: peer.to_owned(),
            }),
            Ok(Ok((_, None))) => Err(Answer::Broken("nothing was held".to_owned())),
            Ok(Err(status)) => Err(judge(peer, &status)),
            Err(elapsed) => Err(Answer::Broken(root_cause(&elapsed))),
        }
    }

    /// Begins to copy all records of a volume of a mirror that is held, at just this position, to which it is replayed first.
    ///
    /// Errors, also of the first frame: `NoNode` when the hold is over, or the mirror was not there before it was.
    pub async fn copy_held_volume(
        &self,
        volume: &str,
        hold: &ReplayHold,
        at: Position,
    ) -> Result<VolumeCopy, ClusterError> {
        let peer = hold.peer.clone();
        match self.ask_for_copy(&peer, volume, Some((hold.id, at))).await {
            Ok(stream) => VolumeCopy::new(stream, peer),
            Err(Answer::Refused(error)) => Err(error),
            Err(
                Answer::Elsewhere(_, detail) | Answer::Unreachable(detail) | Answer::Broken(detail),
            ) => Err(ClusterError::NoNode {
                peers: peer,
                detail,
            }),
        }
    }

    /// Begins to copy all records of a volume from some replica.
    ///
    /// Errors: `NotFound` without such a volume; `NoNode`, `NoLeader` when none serves within the deadline.
    pub async fn copy_volume(&self, volume: &str) -> Result<VolumeCopy, ClusterError> {
        let mut search = Search::new(self);
        loop {
            for peer in self.order(None) {
                match self.ask_for_copy(&peer, volume, None).await {
                    Ok(stream) => return VolumeCopy::new(stream, peer),
                    Err(Answer::Refused(error)) => return Err(error),
                    Err(Answer::Elsewhere(_, detail)) => search.note(&peer, &detail, true),
                    Err(Answer::Unreachable(detail)) | Err(Answer::Broken(detail)) => {
                        search.note(&peer, &detail, false);
                    }
                }
            }
            search.check()?;
            tokio::time::sleep(search.pace()).await;
        }
    }

    async fn ask_for_copy(
        &self,
        peer: &str,
        volume: &str,
        held: Option<(u64, Position)>,
    ) -> Result<Streaming<v1::CopyFrame>, Answer> {
        let channel = self.channel(peer).map_err(Answer::Refused)?;
        let mut client = ChangelogClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let request = self.request(v1::CopyRequest {
            packing: packing::ZSTD.to_owned(),
            volume: volume.to_owned(),
            hold: held.map_or(0, |(hold, _)| hold),
            at: held.map(|(_, at)| at.into()),
        });
        let timeout = self.options().attempt_timeout;
        match tokio::time::timeout(timeout, client.copy(request)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(judge(peer, &status)),
            Err(elapsed) => Err(Answer::Broken(root_cause(&elapsed))),
        }
    }

    /// Makes a slot for a mirror; one that exists is returned as it is unless it is to begin anew. Repeating it is safe.
    pub async fn create_slot(
        &self,
        slot: v1::CreateSlotRequest,
    ) -> Result<v1::MirrorSlot, ClusterError> {
        call!(self, create_slot, mutates = false, slot)
    }

    /// The slots of a volume, or of all.
    pub async fn list_slots(
        &self,
        volume: Option<&str>,
    ) -> Result<Vec<v1::SlotStatus>, ClusterError> {
        let body = v1::ListSlotsRequest {
            volume: volume.unwrap_or_default().to_owned(),
        };
        Ok(call!(self, list_slots, mutates = false, body)?.slots)
    }

    /// Pauses, resumes or deletes a slot. Pausing and resuming twice is harmless; a slot that was deleted is `NotFound`.
    pub async fn change_slot(&self, change: v1::ChangeSlotRequest) -> Result<(), ClusterError> {
        call!(self, change_slot, mutates = false, change).map(drop)
    }

    /// A mirror says how far it is. Late and repeated reports change nothing.
    pub async fn report_slot(
        &self,
        report: v1::SlotReport,
    ) -> Result<v1::MirrorSlot, ClusterError> {
        call!(self, report_slot, mutates = false, report)
    }

    /// How a volume's mirror is, or all of the cluster's.
    pub async fn mirror_status(
        &self,
        volume: Option<&str>,
    ) -> Result<Vec<v1::MirrorStatus>, ClusterError> {
        let body = v1::MirrorStatusRequest {
            volume: volume.unwrap_or_default().to_owned(),
        };
        Ok(call!(self, mirror_status, mutates = false, body)?.mirrors)
    }

    /// Waits until a mirror has applied `position`, with `data` also until its bucket has every segment of it; `false`: it had
    /// not when `within` was over. The position that was reached.
    pub async fn mirror_wait(
        &self,
        volume: &str,
        position: Position,
        data: bool,
        within: Duration,
    ) -> Result<(bool, Position), ClusterError> {
        let until = Instant::now() + within;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let body = v1::MirrorWaitRequest {
                volume: volume.to_owned(),
                position: Some(position.into()),
                wait_ms: left.min(WAIT).as_millis() as u32,
                data,
            };
            let answer = call!(self, mirror_wait, mutates = false, body)?;
            if answer.reached || left.is_zero() {
                let reached = match data {
                    true => answer.complete,
                    false => answer.applied,
                };
                return Ok((
                    answer.reached,
                    reached.map(Position::from).unwrap_or_default(),
                ));
            }
        }
    }

    /// Gives a mirror a bucket of its own, or changes how it is copied into it. Repeating it is safe.
    pub async fn set_bucket(&self, ask: v1::SetBucketRequest) -> Result<(), ClusterError> {
        call!(self, set_bucket, mutates = false, ask).map(drop)
    }

    /// Segments that a mirror's own bucket lacks, in order of their ids from `after` on; where to go on, or `None` at the end.
    pub async fn list_missing(
        &self,
        volume: &str,
        quarantined: bool,
        after: u64,
    ) -> Result<(Vec<v1::ListedMissing>, Option<u64>), ClusterError> {
        let body = v1::ListMissingRequest {
            volume: volume.to_owned(),
            quarantined,
            after,
            segments_max: 0,
        };
        let answer = call!(self, list_missing, mutates = false, body)?;
        Ok((answer.missing, (!answer.end).then_some(answer.after)))
    }

    /// Makes a mirror load a volume anew.
    pub async fn mirror_reload(&self, volume: &str) -> Result<(), ClusterError> {
        let body = v1::MirrorReloadRequest {
            volume: volume.to_owned(),
        };
        call!(self, mirror_reload, mutates = true, body).map(drop)
    }

    /// Makes a volume read-only for good, since it is written elsewhere from now on; the position that it stays at. Doing it
    /// again answers the same. With `hand_over`, refused (`Invalid`) of a volume that is a mirror, or was handed to another one.
    pub async fn demote_volume(
        &self,
        volume: &str,
        successor: &str,
        hand_over: bool,
    ) -> Result<Position, ClusterError> {
        let body = v1::DemoteVolumeRequest {
            volume: volume.to_owned(),
            successor: successor.to_owned(),
            hand_over,
            ..v1::DemoteVolumeRequest::default()
        };
        let answer = call!(self, demote_volume, mutates = false, body)?;
        Ok(answer.position.map(Position::from).unwrap_or_default())
    }

    /// Takes a volume back that was handed over to `successor` at `at`; whoever calls knows that this was not promoted.
    pub async fn take_volume_back(
        &self,
        volume: &str,
        successor: &str,
        at: Position,
    ) -> Result<(), ClusterError> {
        let body = v1::DemoteVolumeRequest {
            volume: volume.to_owned(),
            successor: successor.to_owned(),
            undo: true,
            at: Some(at.into()),
            ..v1::DemoteVolumeRequest::default()
        };
        call!(self, demote_volume, mutates = false, body).map(drop)
    }

    /// Makes it final that a volume was handed over to `successor` at `at`; the position that the successor must reach for it.
    /// Refused (`Invalid`) when somebody has taken it back.
    pub async fn seal_hand_over(
        &self,
        volume: &str,
        successor: &str,
        at: Position,
    ) -> Result<Position, ClusterError> {
        let body = v1::DemoteVolumeRequest {
            volume: volume.to_owned(),
            successor: successor.to_owned(),
            seal: true,
            at: Some(at.into()),
            ..v1::DemoteVolumeRequest::default()
        };
        let answer = call!(self, demote_volume, mutates = false, body)?;
        Ok(answer.position.map(Position::from).unwrap_or_default())
    }

    /// Makes a mirror writable under a new epoch; the first position of that. With a position, only if it is just there.
    pub async fn promote_mirror(
        &self,
        ask: v1::PromoteMirrorRequest,
    ) -> Result<Position, ClusterError> {
        let body = ask;
        let answer = call!(self, promote_mirror, mutates = true, body)?;
        Ok(answer.position.map(Position::from).unwrap_or_default())
    }
}

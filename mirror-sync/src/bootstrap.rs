//! Loads a volume from a copy at one position, in parts, while the source goes on. What was loaded by halves is never served
//! and is loaded anew.

use std::time::Duration;

use heliofs_proto::ids::{Position, VolumeId};
use heliofs_proto::v1::{self, MirrorState, local_command::Op, log_item::Item};
use meta_client::{Cluster, ClusterOptions};
use meta_core::keys::Tag;
use meta_core::limits::core_level_known;
use meta_core::records::{Record, SettingsRecord};
use prost::Message;

use crate::follow::{Failed, Follower};
use crate::target::Answered;

/// Bytes of one part: an entry of the log that takes some milliseconds to be applied.
const PART_BYTES: usize = 256 << 10;

/// How long a node of the mirror has to say of which release it is.
const MEMBERS_WITHIN: Duration = Duration::from_secs(2);

fn local(op: Op) -> Item {
    Item::Local(v1::LocalCommand { op: Some(op) })
}

/// Whether this build can apply what comes under these settings.
fn known(settings: Option<&v1::VolumeSettings>) -> Result<(), Failed> {
    let level = settings.map_or(0, |settings| settings.core_level);
    match level > core_level_known() {
        false => Ok(()),
        true => Err(Failed::Upgrade(format!(
            "upgrade me: the source works with core level {level}, this build knows {}",
            core_level_known()
        ))),
    }
}

impl Follower {
    /// Loads the volume; returns its id.
    pub(crate) async fn load(&mut self) -> Result<VolumeId, Failed> {
        self.expect_members_know_loads().await?;
        let mut copy = self.source.copy_volume(&self.names.source).await?;
        let begin = match copy.next().await?.and_then(|frame| frame.begin) {
            Some(begin) => begin,
            None => return Err(Failed::retry("the copy does not begin with what it is of")),
        };
        let record = begin.volume.unwrap_or_default();
        known(record.settings.as_ref())?;
        let volume = VolumeId(record.id);
        let source_cluster = self.source.status().await?.cluster_id;
        let position = begin.position.map(Position::from).unwrap_or_default();
        let served = self.found().and_then(|served| served.mirror);
        if served.is_some_and(|mirror| mirror.state() == MirrorState::Following) {
            let (ours, _) = self.head(volume)?;
            if position < ours {
                return Err(Failed::Refused(format!(
                    "the source's copy is of position {position}, and {ours} is here already: was it set back? `heliofs mirror \
                     reload` takes it all the same"
                )));
            }
        }
        tracing::info!(
            volume = self.names.local, peer = copy.peer(), position = ?begin.position,
            "loading a copy of the volume"
        );
        let prefix = match record.mirror {
            Some(mirror) => mirror.prefix,
            None if record.prefix.is_empty() => record.name,
            None => record.prefix,
        };
        let begun = Op::MirrorLoadBegin(v1::MirrorLoadBegin {
            volume: volume.0,
            name: self.names.local.clone(),
            storage: record.storage,
            settings: record.settings,
            fence: record.fence,
            mirror: Some(v1::MirrorOf {
                source: self.names.url.clone(),
                volume: self.names.source.clone(),
                slot: self.names.slot.clone(),
                prefix,
                source_cluster,
                source_epoch: begin.position.map_or(0, |position| position.epoch),
                ..Default::default()
            }),
        });
        let load = match self.target.propose(local(begun)).await? {
            Answered::Load(load) => load,
            Answered::NameTaken(other) => {
                return Err(Failed::Refused(format!(
                    "volume {other} of this cluster is already called `{}`: mirror it under another name \
                     (--mirror-volume {}=NAME)",
                    self.names.local, self.names.source
                )));
            }
            Answered::Refused(why) => return Err(Failed::Refused(why)),
            other => return Err(unexpected(&other)),
        };
        self.says.volume = volume.0;
        self.says.loaded_records = 0;
        self.say("loading", format!("from {}", copy.peer()));
        let mut part = v1::MirrorLoad {
            volume: volume.0,
            load,
            part: 0,
            records: Vec::new(),
        };
        let mut bytes = 0;
        while let Some(frame) = copy.next().await? {
            for record in frame.records {
                // A source of an earlier release says at the beginning how the volume was created.
                if Tag::of(&record.key) == Some(Tag::Settings) {
                    let settings = SettingsRecord::decode(&record.key, &record.value);
                    let settings = settings.map_err(|error| Failed::retry(error.to_string()))?;
                    known(Some(&settings.0))?;
                }
                bytes += record.encoded_len();
                part.records.push(record);
                if bytes >= PART_BYTES {
                    self.part(&mut part).await?;
                    bytes = 0;
                }
            }
            let Some(end) = frame.end else { continue };
            if !part.records.is_empty() {
                self.part(&mut part).await?;
            }
            let ended = Op::MirrorLoadEnd(v1::MirrorLoadEnd {
                volume: volume.0,
                load,
                digest: end.digest,
                head: end.head,
            });
            return match self.target.propose(local(ended)).await? {
                Answered::Replayed(position) => {
                    tracing::info!(volume = self.names.local, %position, records = end.records, "loaded");
                    self.loads += 1;
                    Ok(volume)
                }
                Answered::Refused(why) => Err(Failed::retry(why)),
                other => Err(unexpected(&other)),
            };
        }
        Err(Failed::retry("the copy broke off"))
    }

    /// A node of an earlier release would put the parts of a copy among the records that it serves, and go its own way. One that does
    /// not answer stops by itself when it meets them, unless it is older than that.
    async fn expect_members_know_loads(&self) -> Result<(), Failed> {
        let members = self.target.members();
        if members.len() < 2 {
            return Ok(());
        }
        let own = Cluster::new(members, self.own.clone(), ClusterOptions::default());
        for (peer, status) in own.status_all_within(MEMBERS_WITHIN).await {
            if status.is_ok_and(|status| !status.seals) {
                return Err(Failed::Upgrade(format!(
                    "upgrade node {peer} of this mirror: it is of an earlier release, which does not load a copy beside what it serves"
                )));
            }
        }
        Ok(())
    }

    async fn part(&mut self, part: &mut v1::MirrorLoad) -> Result<(), Failed> {
        let next = v1::MirrorLoad {
            volume: part.volume,
            load: part.load,
            part: part.part + 1,
            records: Vec::new(),
        };
        let whole = std::mem::replace(part, next);
        let records = whole.records.len() as u64;
        match self.target.propose(local(Op::MirrorLoad(whole))).await? {
            Answered::Done => {}
            // Somebody began another load.
            Answered::Refused(why) => return Err(Failed::retry(why)),
            other => return Err(unexpected(&other)),
        }
        self.says.loaded_records += records;
        self.say_again();
        Ok(())
    }
}

pub(crate) fn unexpected(answer: &Answered) -> Failed {
    Failed::retry(format!("unexpected answer {answer:?}"))
}

//! Follows a volume's history: every entry once, in order, from any replica, across their failures.

use std::collections::VecDeque;
use std::time::Duration;

use heliofs_proto::ids::Position;
use heliofs_proto::limits::MESSAGE_BYTES_MAX;
use heliofs_proto::packing::{self, Unpacker};
use heliofs_proto::v1;
use heliofs_proto::v1::changelog_client::ChangelogClient;
use prost::Message;
use tonic::Streaming;

use crate::cluster::{Answer, Cluster, Search, judge, root_cause};
use crate::error::ClusterError;

/// A followed replica sends beats when idle, every second or so; one that is silent for this long is left for another.
const SILENCE_MAX: Duration = Duration::from_secs(15);

/// One thing that a changelog says.
#[derive(Clone, Debug, PartialEq)]
pub enum ChangelogItem {
    /// The next command of the volume.
    Entry(v1::ChangelogEntry),
    /// Nothing new: the replica is at this position.
    Beat(v1::ChangelogBeat),
}

/// What a follower has received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of frames as they came.
    pub received: u64,
    /// The same as they were before the server packed them.
    pub plain: u64,
}

/// A place in a volume's history that moves forward; see [`Cluster::follow`].
pub struct ChangelogFollower {
    cluster: Cluster,
    volume: String,
    after: Position,
    follow: bool,
    peer: Option<String>,
    stream: Option<(Streaming<v1::ChangelogFrame>, Unpacker)>,
    traffic: Traffic,
    items: VecDeque<ChangelogItem>,
}

impl Cluster {
    /// Entries of `volume` after a position, in order, without gaps. With `follow` it goes on forever; otherwise it ends at
    /// what is committed when the replica is asked.
    pub fn follow(&self, volume: &str, after: Position, follow: bool) -> ChangelogFollower {
        ChangelogFollower {
            cluster: self.clone(),
            volume: volume.to_owned(),
            after,
            follow,
            peer: None,
            stream: None,
            traffic: Traffic::default(),
            items: VecDeque::new(),
        }
    }
}

impl ChangelogFollower {
    /// The position of the last entry handed out, or where it began.
    pub fn position(&self) -> Position {
        self.after
    }

    /// The replica it follows now.
    pub fn peer(&self) -> Option<&str> {
        self.peer.as_deref()
    }

    /// What it has received.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// The next entry or beat; `None` at the end, when it doesn't follow. May be dropped and called again: nothing is lost.
    ///
    /// Errors: `Trimmed` when no replica's log reaches back that far; `NotFound` without such a volume; `NoNode` when none
    /// answers within the deadline; `Invalid` when a replica leaves a gap.
    pub async fn next(&mut self) -> Result<Option<ChangelogItem>, ClusterError> {
        loop {
            if let Some(item) = self.items.pop_front() {
                if let Some(item) = self.admit(item)? {
                    return Ok(Some(item));
                }
                continue;
            }
            let Some(frame) = self.receive().await? else {
                return Ok(None);
            };
            let entries = frame.entries.into_iter().map(ChangelogItem::Entry);
            self.items.extend(entries);
            self.items.extend(frame.beat.map(ChangelogItem::Beat));
        }
    }

    /// The next frame whole, with what the replica says of itself; what was seen before is taken out. For those who call nothing
    /// else; otherwise as [`ChangelogFollower::next`].
    pub async fn next_frame(&mut self) -> Result<Option<v1::ChangelogFrame>, ClusterError> {
        let Some(mut frame) = self.receive().await? else {
            return Ok(None);
        };
        let mut entries = Vec::with_capacity(frame.entries.len());
        for entry in frame.entries {
            if let Some(ChangelogItem::Entry(entry)) = self.admit(ChangelogItem::Entry(entry))? {
                entries.push(entry);
            }
        }
        frame.entries = entries;
        Ok(Some(frame))
    }

    /// A frame of whichever replica serves.
    async fn receive(&mut self) -> Result<Option<v1::ChangelogFrame>, ClusterError> {
        loop {
            if self.stream.is_none() {
                self.connect().await?;
            }
            let Some((stream, unpacker)) = &mut self.stream else {
                continue;
            };
            match tokio::time::timeout(SILENCE_MAX, stream.message()).await {
                Ok(Ok(Some(frame))) => {
                    let received = frame.encoded_len() as u64;
                    let frame = match frame.packed.is_empty() {
                        true => Ok(frame),
                        false => unpacker.unpack(&frame.packed),
                    };
                    match frame {
                        Ok(frame) => {
                            self.traffic.received += received;
                            self.traffic.plain += frame.encoded_len() as u64;
                            return Ok(Some(frame));
                        }
                        // What was damaged on the way, or packed otherwise, comes again from elsewhere.
                        Err(error) => self.leave(&error.to_string()),
                    }
                }
                Ok(Ok(None)) if !self.follow => return Ok(None),
                Ok(Ok(None)) => self.leave("it ended the stream"),
                Ok(Err(status)) => match judge(self.peer.as_deref().unwrap_or(""), &status) {
                    Answer::Refused(error @ ClusterError::TokenRefused { .. })
                    | Answer::Refused(error @ ClusterError::NotFound(_)) => return Err(error),
                    // Trimmed under a slow reader: another replica may still have it, and connect() tells if none has.
                    Answer::Refused(error) => self.leave(&error.to_string()),
                    Answer::Elsewhere(_, detail)
                    | Answer::Unreachable(detail)
                    | Answer::Broken(detail) => self.leave(&detail),
                },
                Err(_) => self.leave("it was silent"),
            }
        }
    }

    fn leave(&mut self, detail: &str) {
        tracing::debug!(
            peer = self.peer.as_deref(),
            detail,
            "changelog: leaving a replica"
        );
        self.stream = None;
    }

    /// Moves the position; drops what was seen on another replica before.
    fn admit(&mut self, item: ChangelogItem) -> Result<Option<ChangelogItem>, ClusterError> {
        let ChangelogItem::Entry(entry) = &item else {
            return Ok(Some(item));
        };
        let position = entry.position.map(Position::from).unwrap_or_default();
        if position.seq <= self.after.seq {
            return Ok(None);
        }
        if position.seq != self.after.seq + 1 || position.epoch < self.after.epoch {
            return Err(ClusterError::Invalid(format!(
                "{} sent position {position} after {}: entries are missing",
                self.peer.as_deref().unwrap_or("the replica"),
                self.after
            )));
        }
        self.after = position;
        Ok(Some(item))
    }

    /// Asks replica after replica; the one left last comes last.
    async fn connect(&mut self) -> Result<(), ClusterError> {
        let cluster = self.cluster.clone();
        let mut search = Search::new(&cluster);
        let left = self.peer.take();
        loop {
            let mut trimmed = None;
            let mut others = false;
            for peer in cluster.order(left.as_deref()) {
                match self.ask(&peer).await {
                    Ok(stream) => {
                        self.peer = Some(peer);
                        let unpacker = Unpacker::new().map_err(|error| {
                            ClusterError::Invalid(format!("a changelog can't be unpacked: {error}"))
                        })?;
                        self.stream = Some((stream, unpacker));
                        return Ok(());
                    }
                    Err(Answer::Refused(error @ ClusterError::Trimmed(_))) => trimmed = Some(error),
                    Err(Answer::Refused(error)) => return Err(error),
                    Err(Answer::Elsewhere(_, detail)) => {
                        search.note(&peer, &detail, true);
                        others = true;
                    }
                    Err(Answer::Unreachable(detail)) | Err(Answer::Broken(detail)) => {
                        search.note(&peer, &detail, false);
                        others = true;
                    }
                }
            }
            match trimmed {
                // Every replica says so, or those that might not have it don't come back.
                Some(error) if !others => return Err(error),
                Some(error) => search.check().map_err(|_| error)?,
                None => search.check()?,
            }
            tokio::time::sleep(search.pace()).await;
        }
    }

    async fn ask(&self, peer: &str) -> Result<Streaming<v1::ChangelogFrame>, Answer> {
        let channel = self.cluster.channel(peer).map_err(Answer::Refused)?;
        let mut client = ChangelogClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let request = self.cluster.request(v1::FollowRequest {
            volume: self.volume.clone(),
            after: Some(self.after.into()),
            follow: self.follow,
            packing: packing::ZSTD.to_owned(),
        });
        let timeout = self.cluster.options().attempt_timeout;
        match tokio::time::timeout(timeout, client.follow(request)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(judge(peer, &status)),
            Err(elapsed) => Err(Answer::Broken(root_cause(&elapsed))),
        }
    }
}

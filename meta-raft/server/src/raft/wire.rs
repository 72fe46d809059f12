//! openraft's types to and from protobuf: one form for the log, the network and the state.

use std::collections::{BTreeMap, BTreeSet};

use heliofs_proto::v1;
use openraft::EntryPayload;
use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, StreamAppendResult, VoteRequest, VoteResponse,
};

use super::types::{
    Entry, LogData, LogId, Membership, RaftPeer, StoredMembership, TypeConfig, Vote,
};

/// A message that no peer of this version sends.
#[derive(Debug, thiserror::Error)]
pub enum BadMessage {
    /// A field that must be there is not.
    #[error("the message lacks {0}")]
    Missing(&'static str),
    /// A value is not one of those that exist.
    #[error("the message has a bad {0}")]
    Bad(&'static str),
    /// A membership that openraft refuses.
    #[error("the membership is not valid: {0}")]
    Membership(String),
    /// Not protobuf.
    #[error("the bytes are no message: {0}")]
    Decode(#[from] prost::DecodeError),
}

/// Standard Raft: an entry's term says who led it, so `node` stays 0.
pub fn log_id_to_wire(log_id: LogId) -> v1::RaftLogId {
    v1::RaftLogId {
        term: log_id.leader_id.term,
        node: 0,
        index: log_id.index,
    }
}

/// See [`log_id_to_wire`].
pub fn log_id_from_wire(log_id: v1::RaftLogId) -> LogId {
    LogId {
        leader_id: log_id.term.into(),
        index: log_id.index,
    }
}

/// A vote for the network or the log.
pub fn vote_to_wire(vote: &Vote) -> v1::RaftVote {
    v1::RaftVote {
        term: vote.leader_id.term,
        node: vote.leader_id.voted_for,
        committed: vote.committed,
    }
}

/// See [`vote_to_wire`].
pub fn vote_from_wire(vote: Option<v1::RaftVote>) -> Result<Vote, BadMessage> {
    let vote = vote.ok_or(BadMessage::Missing("the vote"))?;
    Ok(if vote.committed {
        Vote::new_committed(vote.term, vote.node)
    } else {
        Vote::new(vote.term, vote.node)
    })
}

/// Voters (two sets while they change) and all nodes.
pub fn membership_to_wire(membership: &Membership) -> v1::RaftMembership {
    v1::RaftMembership {
        configs: membership
            .get_joint_config()
            .iter()
            .map(|voters| v1::VoterSet {
                voters: voters.iter().copied().collect(),
            })
            .collect(),
        nodes: membership
            .nodes()
            .map(|(id, peer)| v1::RaftNode {
                id: *id,
                address: peer.address.clone(),
                store_uuid: peer.store.to_vec().into(),
            })
            .collect(),
    }
}

/// See [`membership_to_wire`].
pub fn membership_from_wire(membership: v1::RaftMembership) -> Result<Membership, BadMessage> {
    let configs: Vec<BTreeSet<u64>> = membership
        .configs
        .into_iter()
        .map(|set| set.voters.into_iter().collect())
        .collect();
    let mut nodes = BTreeMap::new();
    for node in membership.nodes {
        let peer = RaftPeer {
            address: node.address,
            store: store_from_wire(&node.store_uuid)?,
        };
        nodes.insert(node.id, peer);
    }
    if configs.is_empty() && nodes.is_empty() {
        // What a node that never heard of a cluster has.
        return Ok(Membership::default());
    }
    Membership::new(configs, nodes).map_err(|error| BadMessage::Membership(error.to_string()))
}

/// 16 bytes.
pub fn store_from_wire(bytes: &[u8]) -> Result<[u8; 16], BadMessage> {
    bytes.try_into().map_err(|_| BadMessage::Bad("store uuid"))
}

/// A membership and the entry that brought it, for the state store and snapshots.
pub fn stored_membership_from_wire(
    log_id: Option<v1::RaftLogId>,
    membership: Option<v1::RaftMembership>,
) -> Result<StoredMembership, BadMessage> {
    Ok(StoredMembership::new(
        log_id.map(log_id_from_wire),
        membership_from_wire(membership.unwrap_or_default())?,
    ))
}

/// An entry for the network or the log; its bytes are shared, not copied.
pub fn entry_to_wire(entry: &Entry) -> v1::RaftEntry {
    use v1::raft_entry::Payload;
    v1::RaftEntry {
        log_id: Some(log_id_to_wire(entry.log_id)),
        payload: Some(match &entry.payload {
            EntryPayload::Blank => Payload::Blank(true),
            EntryPayload::Normal(data) => Payload::Normal(data.bytes().clone()),
            EntryPayload::Membership(membership) => {
                Payload::Membership(membership_to_wire(membership))
            }
        }),
    }
}

/// See [`entry_to_wire`].
pub fn entry_from_wire(entry: v1::RaftEntry) -> Result<Entry, BadMessage> {
    use v1::raft_entry::Payload;
    let log_id = entry.log_id.ok_or(BadMessage::Missing("the log id"))?;
    let payload = match entry.payload.ok_or(BadMessage::Missing("the payload"))? {
        Payload::Blank(_) => EntryPayload::Blank,
        Payload::Normal(bytes) => EntryPayload::Normal(LogData::encoded(bytes)),
        Payload::Membership(membership) => {
            EntryPayload::Membership(membership_from_wire(membership)?)
        }
    };
    Ok(Entry {
        log_id: log_id_from_wire(log_id),
        payload,
    })
}

/// The answer to one append.
pub fn append_response_to_wire(result: &StreamAppendResult<TypeConfig>) -> v1::AppendResponse {
    use v1::append_response::Outcome;
    match result {
        // openraft's streamed answers say how far the log matches, which is what SUCCESS carries here.
        Ok(matching) => v1::AppendResponse {
            outcome: Outcome::Success.into(),
            matching: matching.map(log_id_to_wire),
            vote: None,
        },
        Err(StreamAppendError::Conflict(at)) => v1::AppendResponse {
            outcome: Outcome::Conflict.into(),
            matching: Some(log_id_to_wire(*at)),
            vote: None,
        },
        Err(StreamAppendError::HigherVote(vote)) => v1::AppendResponse {
            outcome: Outcome::HigherVote.into(),
            matching: None,
            vote: Some(vote_to_wire(vote)),
        },
    }
}

/// See [`append_response_to_wire`].
pub fn append_response_from_wire(
    response: v1::AppendResponse,
) -> Result<StreamAppendResult<TypeConfig>, BadMessage> {
    use v1::append_response::Outcome;
    Ok(match response.outcome() {
        Outcome::Success | Outcome::Partial => Ok(response.matching.map(log_id_from_wire)),
        Outcome::Conflict => Err(StreamAppendError::Conflict(log_id_from_wire(
            response
                .matching
                .ok_or(BadMessage::Missing("the conflicting log id"))?,
        ))),
        Outcome::HigherVote => Err(StreamAppendError::HigherVote(vote_from_wire(
            response.vote,
        )?)),
        Outcome::Unspecified => return Err(BadMessage::Bad("outcome")),
    })
}

/// Which of the two questions a vote request asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VoteKind {
    /// Would you vote for me? Changes nothing.
    PreVote,
    /// Vote for me.
    Vote,
}

/// Bits of the single byte in `VoteRequest.extra`.
const PRE_VOTE: u8 = 1;
const LEADERSHIP_TRANSFER: u8 = 2;

/// A vote request; `extra` is one byte of flags.
pub fn vote_request_to_wire(request: &VoteRequest<TypeConfig>, kind: VoteKind) -> v1::VoteRequest {
    let mut flags = 0;
    if kind == VoteKind::PreVote {
        flags |= PRE_VOTE;
    }
    if request.leadership_transfer {
        flags |= LEADERSHIP_TRANSFER;
    }
    v1::VoteRequest {
        vote: Some(vote_to_wire(&request.vote)),
        last_log_id: request.last_log_id.map(log_id_to_wire),
        extra: vec![flags].into(),
    }
}

/// See [`vote_request_to_wire`].
pub fn vote_request_from_wire(
    request: v1::VoteRequest,
) -> Result<(VoteRequest<TypeConfig>, VoteKind), BadMessage> {
    let flags = match request.extra.as_ref() {
        [flags] => *flags,
        _ => return Err(BadMessage::Bad("vote request's flags")),
    };
    let kind = if flags & PRE_VOTE == 0 {
        VoteKind::Vote
    } else {
        VoteKind::PreVote
    };
    let mut vote = VoteRequest::new(
        vote_from_wire(request.vote)?,
        request.last_log_id.map(log_id_from_wire),
    );
    vote.leadership_transfer = flags & LEADERSHIP_TRANSFER != 0;
    Ok((vote, kind))
}

/// The answer to a vote request.
pub fn vote_response_to_wire(response: &VoteResponse<TypeConfig>) -> v1::VoteResponse {
    v1::VoteResponse {
        vote: Some(vote_to_wire(&response.vote)),
        granted: response.vote_granted,
        last_log_id: response.last_log_id.map(log_id_to_wire),
        extra: bytes::Bytes::new(),
    }
}

/// See [`vote_response_to_wire`].
pub fn vote_response_from_wire(
    response: v1::VoteResponse,
) -> Result<VoteResponse<TypeConfig>, BadMessage> {
    Ok(VoteResponse::new(
        vote_from_wire(response.vote)?,
        response.last_log_id.map(log_id_from_wire),
        response.granted,
    ))
}

/// See `append_stream`.
pub fn append_request_from_wire(
    request: v1::AppendRequest,
) -> Result<AppendEntriesRequest<TypeConfig>, BadMessage> {
    Ok(AppendEntriesRequest {
        vote: vote_from_wire(request.vote)?,
        prev_log_id: request.prev_log_id.map(log_id_from_wire),
        entries: request
            .entries
            .into_iter()
            .map(entry_from_wire)
            .collect::<Result<_, _>>()?,
        leader_commit: request.leader_commit.map(log_id_from_wire),
    })
}

//! How failures of this node look to gRPC clients: one mapping for all services.

use meta_core::Corruption;
use tonic::metadata::AsciiMetadataValue;
use tonic::{Code, Status};

use crate::damage::Damage;
use crate::leadership::Peer;
use crate::proposer::ProposeError;
use crate::read_gate::ReadError;

/// Metadata that names the leader, `host:port`.
pub const LEADER: &str = "heliofs-leader";

/// Ask the leader, or anybody when it is not known.
pub fn not_leader(leader: Option<&Peer>) -> Status {
    let Some(leader) = leader else {
        return Status::unavailable("no leader is known here; try again or try another node");
    };
    let mut status = Status::new(
        Code::FailedPrecondition,
        format!("node {} at {} is the leader", leader.id, leader.address),
    );
    if let Ok(address) = AsciiMetadataValue::try_from(leader.address.as_str()) {
        status.metadata_mut().insert(LEADER, address);
    }
    status
}

/// A proposal without an answer.
pub fn propose(error: ProposeError) -> Status {
    match error {
        ProposeError::NotLeader { leader } => not_leader(leader.as_ref()),
        // Not `unavailable`: that would say that trying again is safe.
        ProposeError::Unknown => Status::cancelled(ProposeError::Unknown.to_string()),
        ProposeError::Fatal(why) => Status::internal(format!("the node has stopped: {why}")),
        ProposeError::Fenced(why) => Status::unavailable(why),
    }
}

/// A read that can't be made linearizable.
pub fn read(error: ReadError) -> Status {
    match error {
        ReadError::NoLeader { leader } => not_leader(leader.as_ref()),
        ReadError::NoQuorum => Status::unavailable(ReadError::NoQuorum.to_string()),
        ReadError::Fatal(why) => Status::internal(format!("the node has stopped: {why}")),
    }
}

/// Records that can't be read; the node stops.
pub fn corrupt(damage: &Damage, reading: &str, corruption: &Corruption) -> Status {
    damage.report(reading, corruption);
    Status::data_loss(corruption.to_string())
}

//! Who leads, as this node knows it.

use heliofs_proto::ids::NodeId;

/// A member of the cluster and where to reach it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its id.
    pub id: NodeId,
    /// `host:port`.
    pub address: String,
}

/// This node's part in the cluster; published on a watch channel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Leadership {
    /// This node leads. There is at most one leader per term. Its state may still lack entries of
    /// earlier terms: a linearizable read waits for them.
    Leader {
        /// The term it leads.
        term: u64,
    },
    /// Another node leads, or nobody is known to.
    Follower {
        /// The leader, when known.
        leader: Option<Peer>,
        /// The highest term seen.
        term: u64,
    },
    /// The node is stopping or has stopped after a fatal error.
    Stopped,
}

impl Leadership {
    /// The term this node leads, if it does.
    pub fn leading(&self) -> Option<u64> {
        match self {
            Self::Leader { term } => Some(*term),
            Self::Follower { .. } | Self::Stopped => None,
        }
    }

    /// Whom to ask instead of this node.
    pub fn other_leader(&self) -> Option<&Peer> {
        match self {
            Self::Follower { leader, .. } => leader.as_ref(),
            Self::Leader { .. } | Self::Stopped => None,
        }
    }
}

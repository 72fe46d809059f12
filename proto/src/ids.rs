//! Ids: what names what, in memory and on the wire.

use std::fmt;
use std::str::FromStr;

use crate::v1;

/// Number of bits of an [`Ino`] or [`SegmentId`] that count within an epoch.
const COUNTER_BITS: u32 = 48;
const COUNTER_MAX: u64 = (1 << COUNTER_BITS) - 1;

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($int:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $int);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<$int> for $name {
            fn from(value: $int) -> Self {
                Self(value)
            }
        }
    };
}

number_id! {
    /// A volume of a cluster; never reused. 0 names no volume.
    VolumeId(u32)
}
number_id! {
    /// A writer's reign over a volume: raised by promotion. 16 bits are used.
    Epoch(u32)
}
number_id! {
    /// A cluster; random, non-zero.
    ClusterId(u32)
}
number_id! {
    /// A node of a Raft cluster; never reused.
    NodeId(u64)
}
number_id! {
    /// A client's session: the cluster's id in the high half, a counter of the volume in the low half. 0 is the system.
    SessionId(u64)
}
number_id! {
    /// An inode: the epoch in the high 16 bits, a counter in the low 48. Never reused within a volume.
    Ino(u64)
}
number_id! {
    /// An immutable data object: the epoch in the high 16 bits, a counter in the low 48. Never reused within a volume.
    SegmentId(u64)
}

impl SessionId {
    /// The session of commands that no client sent.
    pub const SYSTEM: Self = Self(0);

    /// The `number`-th session of a volume under `cluster`.
    pub fn new(cluster: ClusterId, number: u32) -> Self {
        Self(u64::from(cluster.0) << 32 | u64::from(number))
    }

    /// Which cluster began it.
    pub fn cluster(self) -> ClusterId {
        ClusterId((self.0 >> 32) as u32)
    }
}

/// Epoch and counter in one number; `None` when either is out of range.
fn epoch_counter(epoch: Epoch, counter: u64) -> Option<u64> {
    (epoch.0 <= u32::from(u16::MAX) && counter <= COUNTER_MAX)
        .then(|| u64::from(epoch.0) << COUNTER_BITS | counter)
}

impl Ino {
    /// The root directory of every volume.
    pub const ROOT: Self = Self(1);

    /// `None` when 48 bits of counter are used up.
    pub fn new(epoch: Epoch, counter: u64) -> Option<Self> {
        epoch_counter(epoch, counter).map(Self)
    }
}

impl SegmentId {
    /// `None` when 48 bits of counter are used up.
    pub fn new(epoch: Epoch, counter: u64) -> Option<Self> {
        epoch_counter(epoch, counter).map(Self)
    }

    /// The object's key below the volume's prefix: `<2 hex>/<16 hex>`. The two digits are the id's lowest byte, so that
    /// consecutive segments spread over the store's partitions.
    pub fn object_name(self) -> String {
        format!("{:02x}/{:016x}", self.0 & 0xff, self.0)
    }
}

/// A place in one volume's history: `seq` commands were applied, the last one under `epoch`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Position {
    /// The writer's reign.
    pub epoch: Epoch,
    /// Rises by exactly 1 per replicated command, across epochs.
    pub seq: u64,
}

impl Position {
    /// Before the first command of epoch 0.
    pub const START: Self = Self {
        epoch: Epoch(0),
        seq: 0,
    };

    /// The position of the next command of the same epoch.
    #[must_use]
    pub fn next(self) -> Self {
        Self {
            epoch: self.epoch,
            seq: self.seq + 1,
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.epoch, self.seq)
    }
}

/// `text` is not `EPOCH:SEQ`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not a position; write EPOCH:SEQ, for example 0:1234")]
pub struct NotAPosition(String);

impl FromStr for Position {
    type Err = NotAPosition;

    fn from_str(text: &str) -> Result<Self, NotAPosition> {
        let parse = || {
            let (epoch, seq) = text.split_once(':')?;
            Some(Self {
                epoch: Epoch(epoch.parse().ok()?),
                seq: seq.parse().ok()?,
            })
        };
        parse().ok_or_else(|| NotAPosition(text.to_owned()))
    }
}

impl From<Position> for v1::Position {
    fn from(position: Position) -> Self {
        Self {
            epoch: position.epoch.0,
            seq: position.seq,
        }
    }
}

impl From<v1::Position> for Position {
    fn from(position: v1::Position) -> Self {
        Self {
            epoch: Epoch(position.epoch),
            seq: position.seq,
        }
    }
}

/// A moment: nanoseconds since 1970-01-01T00:00:00Z, negative before; reaches from 1677 to 2262.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct UnixNanos(pub i64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_survives_being_printed_and_parsed() {
        let position = Position {
            epoch: Epoch(3),
            seq: 42,
        };
        assert_eq!(position.to_string().parse(), Ok(position));
        assert!("42".parse::<Position>().is_err());
        assert!("a:b".parse::<Position>().is_err());
    }

    #[test]
    fn ids_hold_epoch_and_counter_and_refuse_overflow() {
        assert_eq!(Ino::new(Epoch(0), 1), Some(Ino::ROOT));
        assert_eq!(SegmentId::new(Epoch(2), 5), Some(SegmentId(2 << 48 | 5)));
        assert_eq!(SegmentId::new(Epoch(0), 1 << 48), None);
        assert_eq!(SegmentId::new(Epoch(1 << 16), 0), None);
        assert_eq!(SegmentId(0x1ab).object_name(), "ab/00000000000001ab");
    }
}

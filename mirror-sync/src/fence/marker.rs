//! What the marker says, as JSON.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Who may write a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// Version of this object.
    pub format: u32,
    /// The volume's id, which all its regions share.
    pub volume: u32,
    /// The epoch that is written.
    pub epoch: u32,
    /// The id of the cluster that writes it.
    pub cluster: u32,
    /// META-URL of that cluster, for people and for the one that was superseded.
    pub url: String,
    /// Who renewed it has promised to stop this much later unless it renews it again.
    pub lease_ms: u32,
    /// Different in every put, so that versions that are made of the content differ too, and that a writer knows its own.
    pub nonce: String,
}

/// The format of a marker.
const MARKER: u32 = 1;

/// The format of what lies in the place of a marker that was given up. A build that does not know it touches nothing.
const TOMBSTONE: u32 = 2;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Me {
    /// The volume.
    pub volume: u32,
    /// The cluster.
    pub cluster: u32,
    /// The epoch that the cluster's records are in.
    pub epoch: u32,
}

/// What a writer does about a marker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Renew it.
    Mine,
    /// The volume is written elsewhere under a higher epoch: for good.
    Superseded {
        /// META-URL of who writes it.
        by: String,
        /// Its epoch.
        epoch: u32,
    },
    /// It can't be renewed as things are; why.
    NotMine(String),
}

/// What lies in a fence store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored {
    /// It names the writer.
    Marker(Marker),
    /// A tombstone: this one was the last writer by leave of this store, and gave it up.
    GivenUp(Marker),
}

impl Marker {
    /// Of this version, with a nonce of its own.
    pub fn new(me: Me, url: &str, lease: Duration) -> Self {
        Self {
            format: MARKER,
            volume: me.volume,
            epoch: me.epoch,
            cluster: me.cluster,
            url: url.to_owned(),
            lease_ms: u32::try_from(lease.as_millis()).unwrap_or(u32::MAX),
            nonce: nonce(),
        }
    }

    /// As it is stored.
    pub fn encode(&self) -> Bytes {
        serde_json::to_vec(self)
            .expect("plain fields serialize")
            .into()
    }

    /// What is stored in its place when it is given up: the volume is not written by leave of this store any more.
    pub fn tombstone(&self) -> Bytes {
        Self {
            format: TOMBSTONE,
            nonce: nonce(),
            ..self.clone()
        }
        .encode()
    }

    /// What is stored; `Err`: why it is none.
    pub fn decode(bytes: &[u8]) -> Result<Stored, String> {
        let marker: Self = serde_json::from_slice(bytes)
            .map_err(|error| format!("the marker in the fence store can't be read: {error}"))?;
        match marker.format {
            MARKER => Ok(Stored::Marker(marker)),
            TOMBSTONE => Ok(Stored::GivenUp(marker)),
            other => Err(format!(
                "the marker in the fence store has format {other}, this build knows {MARKER} and {TOMBSTONE}"
            )),
        }
    }

    /// How long its writer may go on after the put that made it.
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms.into())
    }

    /// What the writer `me` does about it.
    pub fn judge(&self, me: Me) -> Verdict {
        if self.volume != me.volume {
            return Verdict::NotMine(format!(
                "the marker in the fence store is of another volume, with id {}",
                self.volume
            ));
        }
        let mine = self.cluster == me.cluster;
        match self.epoch.cmp(&me.epoch) {
            std::cmp::Ordering::Greater if mine => Verdict::NotMine(format!(
                "a promotion of this cluster to epoch {} is under way",
                self.epoch
            )),
            std::cmp::Ordering::Greater => Verdict::Superseded {
                by: self.url.clone(),
                epoch: self.epoch,
            },
            std::cmp::Ordering::Equal | std::cmp::Ordering::Less if mine => Verdict::Mine,
            std::cmp::Ordering::Equal | std::cmp::Ordering::Less => Verdict::NotMine(format!(
                "the marker in the fence store names the cluster at {} and epoch {}, here is epoch {}: if nothing is written there \
                 any more, `heliofs config --fence-store` here makes it this cluster's",
                self.url, self.epoch, me.epoch
            )),
        }
    }
}

fn nonce() -> String {
    format!("{:032x}", rand::random::<u128>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Me = Me {
        volume: 1,
        cluster: 7,
        epoch: 3,
    };

    #[test]
    fn a_marker_is_renewed_only_by_whom_it_names() {
        let mine = Marker::new(ME, "helio://here", Duration::from_secs(9));
        assert_eq!(mine.judge(ME), Verdict::Mine);
        let stored = Marker::decode(&mine.encode()).unwrap();
        assert_eq!(stored, Stored::Marker(mine.clone()));
        let given_up = Marker::decode(&mine.tombstone()).unwrap();
        assert!(
            matches!(given_up, Stored::GivenUp(was) if was.cluster == mine.cluster && was.epoch == mine.epoch)
        );
        let theirs = Marker {
            cluster: 8,
            ..mine.clone()
        };
        assert!(matches!(theirs.judge(ME), Verdict::NotMine(_)));
        let later = Marker { epoch: 4, ..theirs };
        assert!(matches!(
            later.judge(ME),
            Verdict::Superseded { epoch: 4, .. }
        ));
        // Taken over by this cluster, which is not promoted yet.
        let soon = Marker {
            epoch: 4,
            ..mine.clone()
        };
        assert!(matches!(soon.judge(ME), Verdict::NotMine(_)));
        let before = Marker {
            epoch: 2,
            ..mine.clone()
        };
        assert_eq!(before.judge(ME), Verdict::Mine);
        let other = Marker {
            volume: 2,
            ..mine.clone()
        };
        assert!(matches!(other.judge(ME), Verdict::NotMine(_)));
        assert_ne!(
            mine.nonce,
            Marker::new(ME, "helio://here", mine.lease()).nonce
        );
    }

    #[test]
    fn what_a_newer_build_wrote_is_not_guessed_at() {
        let newer = Marker {
            format: 3,
            ..Marker::new(ME, "", Duration::ZERO)
        };
        assert!(Marker::decode(&newer.encode()).is_err());
        assert!(Marker::decode(b"{}").is_err());
    }
}

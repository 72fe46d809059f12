//! Damage met by a read: the node stops, as it does for a damaged log.
//!
//! What is applied is checked by apply itself, which ends Raft. A read has nobody who would notice: its stream would end, the
//! client would come back to the same node and meet the same record for ever, while sound replicas stand beside it.

use meta_core::Corruption;
use tokio::sync::watch;

/// Where readers report records that can't be read; cheap to clone.
#[derive(Clone, Debug)]
pub struct Damage {
    first: watch::Sender<Option<String>>,
}

impl Default for Damage {
    fn default() -> Self {
        Self {
            first: watch::Sender::new(None),
        }
    }
}

impl Damage {
    /// Logs what a reader met and makes the node stop; `reading` says what was read. The first report is the reason that
    /// [`Damage::reported`] gives: later ones may only follow from it.
    pub fn report(&self, reading: &str, corruption: &Corruption) {
        tracing::error!(
            %corruption,
            reading,
            "this node stops: its records can't be trusted any more"
        );
        self.first.send_if_modified(|first| {
            let is_first = first.is_none();
            if is_first {
                *first = Some(format!("damage met while reading {reading}: {corruption}"));
            }
            is_first
        });
    }

    /// Completes when something was reported; says what.
    pub async fn reported(&self) -> String {
        let mut first = self.first.subscribe();
        let found = first
            .wait_for(Option::is_some)
            .await
            .expect("the sender lives as long as self");
        found.clone().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_report_is_the_reason() {
        let damage = Damage::default();
        let waiting = tokio::spawn({
            let damage = damage.clone();
            async move { damage.reported().await }
        });
        for why in ["first", "second"] {
            damage.report("a test", &Corruption::Store(why.to_owned()));
        }
        let expected = "damage met while reading a test: store: first";
        assert_eq!(damage.reported().await, expected);
        assert_eq!(waiting.await.unwrap(), expected);
    }
}

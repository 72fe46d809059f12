//! Frames of a changelog become proposals: many entries in each, bounded. Pure.

use heliofs_proto::ids::{Position, VolumeId};
use heliofs_proto::v1::{self, command::Op};
use meta_core::limits::core_level_known;
use prost::Message;

/// Entries of one proposal: bounds what one group of the state must hold.
const ENTRIES_MAX: usize = 1000;

/// Bytes of one proposal, unless a single entry is larger. Below what one entry of the log may have.
const BYTES_MAX: usize = 512 << 10;

/// What has arrived and was not proposed.
#[derive(Debug)]
pub struct Plan {
    volume: VolumeId,
    entries: Vec<v1::ChangelogEntry>,
    digests: Vec<v1::Beat>,
}

/// The source speaks of what this build does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpgradeMe(pub String);

/// What this build can't apply as the source did.
fn beyond(entry: &v1::ChangelogEntry) -> Option<UpgradeMe> {
    let position = entry.position.unwrap_or_default();
    let command = entry.command.as_ref()?;
    let settings = match &command.op {
        Some(Op::VolumeInit(op)) => op.settings,
        Some(Op::SettingsUpdate(op)) => op.settings,
        Some(_) => None,
        None => {
            return Some(UpgradeMe(format!(
                "upgrade me: position {}:{} of the source is a command that this build does not know",
                position.epoch, position.seq
            )));
        }
    };
    let level = settings.map_or(0, |settings| settings.core_level);
    (level > core_level_known()).then(|| {
        UpgradeMe(format!(
            "upgrade me: from position {}:{} on the source works with core level {level}, this build knows {}",
            position.epoch,
            position.seq,
            core_level_known()
        ))
    })
}

impl Plan {
    /// Nothing yet.
    pub fn new(volume: VolumeId) -> Self {
        Self {
            volume,
            entries: Vec::new(),
            digests: Vec::new(),
        }
    }

    /// Takes a frame in. `Err`: entries before the one that this build can't apply were taken, and nothing more may be.
    pub fn take(&mut self, frame: v1::ChangelogFrame) -> Result<(), UpgradeMe> {
        for entry in frame.entries {
            if let Some(beyond) = beyond(&entry) {
                return Err(beyond);
            }
            self.entries.push(entry);
        }
        self.digests.extend(frame.digests);
        Ok(())
    }

    /// Entries that wait.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.digests.is_empty()
    }

    /// Enough for a full proposal.
    pub fn is_full(&self) -> bool {
        self.entries.len() >= ENTRIES_MAX
    }

    /// The next proposal, up to `limit` if there is one; `None`: nothing waits that may be proposed.
    pub fn pop(&mut self, limit: Option<Position>) -> Option<v1::Replay> {
        let allowed = |entry: &v1::ChangelogEntry| {
            let at = entry.position.map(Position::from).unwrap_or_default();
            limit.is_none_or(|limit| at <= limit)
        };
        let first_is_held = match self.entries.first() {
            Some(first) => !allowed(first),
            None => limit.is_some(),
        };
        if self.is_empty() || first_is_held {
            return None;
        }
        let mut bytes = 0;
        let fits = |entry: &&v1::ChangelogEntry| {
            bytes += entry.encoded_len();
            bytes <= BYTES_MAX
        };
        let entries = self.entries.iter().take(ENTRIES_MAX);
        let count = entries.take_while(|entry| allowed(entry)).take_while(fits);
        // One that is larger alone goes alone.
        let count = count.count().max(1).min(self.entries.len());
        let rest = self.entries.split_off(count);
        let entries = std::mem::replace(&mut self.entries, rest);
        // Digests of entries that still wait would be compared too early, and in vain.
        let digests = match self.entries.is_empty() {
            true => std::mem::take(&mut self.digests),
            false => Vec::new(),
        };
        Some(v1::Replay {
            pin: false,
            volume: self.volume.0,
            entries,
            beats: digests,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(seq: u64, op: Op) -> v1::ChangelogEntry {
        v1::ChangelogEntry {
            position: Some(v1::Position { epoch: 0, seq }),
            time: 0,
            command: Some(v1::Command {
                volume: 1,
                op: Some(op),
                ..Default::default()
            }),
        }
    }

    fn unlink(seq: u64, name: usize) -> v1::ChangelogEntry {
        let name = vec![b'x'; name].into();
        entry(
            seq,
            Op::Unlink(v1::Unlink {
                parent: 1,
                name,
                directory: false,
            }),
        )
    }

    fn frame(entries: Vec<v1::ChangelogEntry>) -> v1::ChangelogFrame {
        v1::ChangelogFrame {
            entries,
            digests: vec![v1::Beat::default()],
            ..Default::default()
        }
    }

    #[test]
    fn proposals_are_bounded_in_entries_and_bytes_and_digests_come_last() {
        let mut plan = Plan::new(VolumeId(1));
        plan.take(frame((1..=1500).map(|seq| unlink(seq, 5)).collect()))
            .unwrap();
        let first = plan.pop(None).unwrap();
        assert_eq!((first.entries.len(), first.beats.len()), (1000, 0));
        let second = plan.pop(None).unwrap();
        assert_eq!((second.entries.len(), second.beats.len()), (500, 1));
        assert_eq!(plan.pop(None), None);
        let large = (1..=3).map(|seq| unlink(seq, BYTES_MAX)).collect();
        plan.take(frame(large)).unwrap();
        assert_eq!(plan.pop(None).unwrap().entries.len(), 1);
        let small = (4..=5)
            .map(|seq| unlink(seq, BYTES_MAX / 2 - 100))
            .collect();
        plan.take(frame(small)).unwrap();
        assert_eq!(plan.pop(None).unwrap().entries.len(), 1);
        assert_eq!(plan.pop(None).unwrap().entries.len(), 1);
        assert_eq!(plan.pop(None).unwrap().entries.len(), 2);
        assert_eq!(plan.pop(None), None);
    }

    #[test]
    fn a_proposal_ends_where_the_mirror_is_held() {
        let mut plan = Plan::new(VolumeId(1));
        let at = |seq| {
            Some(Position {
                seq,
                ..Position::START
            })
        };
        plan.take(frame((11..=20).map(|seq| unlink(seq, 5)).collect()))
            .unwrap();
        assert_eq!(plan.pop(at(10)), None);
        let upto = plan.pop(at(14)).unwrap();
        // Digests are of the entries behind.
        assert_eq!((upto.entries.len(), upto.beats.len()), (4, 0));
        assert_eq!(upto.entries[3].position.unwrap().seq, 14);
        assert_eq!(plan.pop(at(14)), None);
        let rest = plan.pop(at(20)).unwrap();
        assert_eq!((rest.entries.len(), rest.beats.len()), (6, 1));
        plan.take(frame(Vec::new())).unwrap();
        assert_eq!(plan.pop(at(20)), None);
        assert_eq!(plan.pop(None).unwrap().beats.len(), 1);
    }

    #[test]
    fn what_this_build_does_not_know_ends_the_plan_before_it() {
        let mut plan = Plan::new(VolumeId(1));
        let settings = v1::VolumeSettings {
            core_level: core_level_known() + 1,
            ..Default::default()
        };
        let higher = entry(
            8,
            Op::SettingsUpdate(v1::SettingsUpdate {
                settings: Some(settings),
            }),
        );
        let refused = plan.take(frame(vec![unlink(7, 1), higher, unlink(9, 1)]));
        assert!(refused.unwrap_err().0.starts_with("upgrade me"));
        assert_eq!(plan.pop(None).unwrap().entries.len(), 1);
        let mut unknown = unlink(8, 1);
        unknown.command.as_mut().unwrap().op = None;
        assert!(plan.take(frame(vec![unknown])).is_err());
        assert!(plan.is_empty());
    }
}

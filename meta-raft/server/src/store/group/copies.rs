//! What the bucket of this region lacks, in volumes whose objects come from another region's.

use std::collections::BTreeMap;

use bytes::Bytes;
use heliofs_proto::ids::{Position, SegmentId, UnixNanos, VolumeId};
use heliofs_proto::v1;
use meta_core::keys::{self, Tag};
use meta_core::records::{Record, SegmentRecord};
use meta_core::{Change, Corruption, View};
use prost::Message;

use super::{ApplyError, Group};
use crate::proposer::LocalReply;
use crate::store::local;

/// Gaps that are told apart; beyond them the two oldest become one, which makes the watermark later and never wrong.
const GAPS_MAX: usize = 64;

/// Segments named as those that another one was made of; what others held of it is pulled.
const MADE_OF_MAX: usize = 256;

/// What the group changed of what is missing; `None`: not missing any more.
pub(super) type Missing = BTreeMap<(VolumeId, SegmentId), Option<v1::MissingSegment>>;

fn position(at: Option<v1::Position>) -> Position {
    at.map(Position::from).unwrap_or_default()
}

/// Adds [from, to), so that gaps stay ordered and apart.
fn add_gap(gaps: &mut Vec<v1::PositionRange>, from: Position, to: Position) {
    if from >= to {
        return;
    }
    let (mut from, mut to) = (from, to);
    gaps.retain(|gap| {
        let (begin, end) = (position(gap.from), position(gap.to));
        let touches = begin <= to && from <= end;
        if touches {
            (from, to) = (from.min(begin), to.max(end));
        }
        !touches
    });
    let at = gaps.partition_point(|gap| position(gap.from) < from);
    let gap = v1::PositionRange {
        from: Some(from.into()),
        to: Some(to.into()),
    };
    gaps.insert(at, gap);
    if gaps.len() > GAPS_MAX {
        let first = gaps.remove(0);
        gaps[0].from = first.from;
    }
}

impl Group<'_, '_> {
    /// Whether the volume's objects are copied into a bucket of this region.
    pub(super) fn is_dual(&self, volume: VolumeId) -> bool {
        let known = self.memory.volumes.get(&volume);
        known.is_some_and(|known| known.record.second.is_some())
    }

    fn missing(
        &self,
        volume: VolumeId,
        segment: SegmentId,
    ) -> Result<Option<v1::MissingSegment>, ApplyError> {
        if let Some(known) = self.missing.get(&(volume, segment)) {
            return Ok(known.clone());
        }
        let key = local::missing(volume, segment);
        let found = self.generation.db.get_cf(self.generation.local(), key);
        let found = found.map_err(ApplyError::Write)?;
        let decoded = found.map(|bytes| v1::MissingSegment::decode(bytes.as_slice()));
        Ok(decoded
            .transpose()
            .map_err(|error| Corruption::Store(format!("a missing segment: {error}")))?)
    }

    fn set_missing(
        &mut self,
        volume: VolumeId,
        segment: SegmentId,
        old: Option<&v1::MissingSegment>,
        new: Option<v1::MissingSegment>,
    ) {
        let local = self.generation.local();
        let pending = |record: &v1::MissingSegment| {
            record
                .quarantine
                .is_empty()
                .then(|| local::pending(volume, position(record.since), segment))
        };
        if let Some(index) = old.and_then(pending) {
            self.batch.delete_cf(local, index);
        }
        let key = local::missing(volume, segment);
        match &new {
            Some(record) => {
                self.batch.put_cf(local, key, record.encode_to_vec());
                if let Some(index) = pending(record) {
                    self.batch.put_cf(local, index, []);
                }
            }
            None => self.batch.delete_cf(local, key),
        }
        if let Some(known) = self.memory.volumes.get_mut(&volume) {
            let state = &mut known.copies;
            match old {
                Some(old) if old.quarantine.is_empty() => {
                    state.pending_segments = state.pending_segments.saturating_sub(1);
                    state.pending_bytes = state.pending_bytes.saturating_sub(old.length);
                }
                Some(_) => {
                    state.quarantined_segments = state.quarantined_segments.saturating_sub(1);
                }
                None => {}
            }
            match &new {
                Some(new) if new.quarantine.is_empty() => {
                    state.pending_segments += 1;
                    state.pending_bytes += new.length;
                }
                Some(_) => state.quarantined_segments += 1,
                None => {}
            }
            if state.pending_segments == 0 {
                // Everything up to here is complete: nobody asks for what lies before.
                state.gaps.clear();
            }
        }
        self.missing.insert((volume, segment), new);
        self.copies_changed.insert(volume);
    }

    /// Segments that came with these changes are not in this region's bucket yet.
    pub(super) fn note_segments(
        &mut self,
        volume: VolumeId,
        changes: &[Change],
        at: Position,
    ) -> Result<(), ApplyError> {
        for change in changes {
            let (None, Some(new), Some(Tag::Segment)) =
                (&change.old, &change.new, Tag::of(&change.key))
            else {
                continue;
            };
            let Some(segment) = keys::number(&change.key, 0).map(SegmentId) else {
                continue;
            };
            let record = SegmentRecord::decode(&change.key, new)?;
            let missing = v1::MissingSegment {
                since: Some(at.into()),
                length: record.length,
                ..v1::MissingSegment::default()
            };
            let old = self.missing(volume, segment)?;
            self.set_missing(volume, segment, old.as_ref(), Some(missing));
        }
        Ok(())
    }

    /// Notes of what the segments that compaction brought were made: they may be built from that in this region's bucket.
    pub(super) fn note_relocated(
        &mut self,
        volume: VolumeId,
        relocate: &v1::Relocate,
    ) -> Result<(), ApplyError> {
        for brought in &relocate.segments {
            let segment = SegmentId(brought.id);
            let Some(old) = self.missing(volume, segment)? else {
                continue;
            };
            let moves = relocate.moves.iter();
            let sources = moves.filter(|each| each.to_segment == brought.id);
            let mut new = old.clone();
            for source in sources.map(|each| each.from_segment) {
                if new.made_of.len() < MADE_OF_MAX && !new.made_of.contains(&source) {
                    new.made_of.push(source);
                }
            }
            if new != old {
                self.set_missing(volume, segment, Some(&old), Some(new));
            }
        }
        Ok(())
    }

    /// The segment lost its last reference. `true`: its object never came to this region's bucket.
    pub(super) fn freed_before_copied(
        &mut self,
        volume: VolumeId,
        segment: SegmentId,
        at: Position,
    ) -> Result<bool, ApplyError> {
        let Some(old) = self.missing(volume, segment)? else {
            return Ok(false);
        };
        if old.quarantine.is_empty()
            && let Some(known) = self.memory.volumes.get_mut(&volume)
        {
            let since = position(old.since);
            add_gap(&mut known.copies.gaps, since, at);
            for (_, whole) in known.watched.range_mut(since..at) {
                *whole = false;
            }
        }
        self.set_missing(volume, segment, Some(&old), None);
        // Something may lie there.
        Ok(!old.replace && !old.look)
    }

    fn segment(
        &self,
        volume: VolumeId,
        segment: SegmentId,
    ) -> Result<Option<SegmentRecord>, ApplyError> {
        let key = keys::segment(volume, segment);
        let found: Option<Bytes> = self.overlay.get(&key)?;
        let record = found.map(|value| SegmentRecord::decode(&key, &value));
        Ok(record.transpose()?)
    }

    /// The region gets a bucket of its own; its walk over the records begins.
    pub(super) fn second_bucket(&mut self, ask: &v1::SecondBucket) -> LocalReply {
        let volume = VolumeId(ask.volume);
        let Some(known) = self.memory.volumes.get_mut(&volume) else {
            return LocalReply::NoSuchVolume;
        };
        if let Some(own) = &ask.own {
            let storage = known.record.storage.as_ref();
            let same = storage.is_some_and(|storage| storage.uuid == own.uuid);
            if known.record.mirror.is_none() && !same {
                return LocalReply::Invalid(
                    "the volume is written here: its objects can't move to another bucket"
                        .to_owned(),
                );
            }
            match (&known.record.second, &known.record.mirror) {
                (None, _) => {
                    known.record.second = known.record.storage.replace(own.clone());
                    if let Some(mirror) = &mut known.record.mirror {
                        mirror.shared = false;
                    }
                }
                // Another address or other keys; or another bucket, to be filled anew.
                (Some(_), _) => known.record.storage = Some(own.clone()),
            }
            if !same || ask.emptied {
                begin_walk(&mut known.copies);
            }
        }
        if let Some(rate) = ask.copy_bytes_per_second {
            known.record.copy_bytes_per_second = rate;
        }
        if ask.retry && known.copies.walk == 0 {
            known.copies.walks += 1;
            known.copies.walk = known.copies.walks;
            known.copies.walked = 0;
        }
        let record = known.record.clone();
        self.copies_changed.insert(volume);
        self.put_volume(&record);
        LocalReply::Done
    }

    /// A volume was loaded into a region with a bucket of its own: what the bucket has must be found out.
    pub(super) fn walk_after_load(&mut self, volume: VolumeId) {
        if let Some(known) = self.memory.volumes.get_mut(&volume)
            && known.record.second.is_some()
        {
            begin_walk(&mut known.copies);
            self.copies_changed.insert(volume);
        }
    }

    pub(super) fn copies_needed(
        &mut self,
        time: UnixNanos,
        needed: &v1::CopiesNeeded,
    ) -> Result<LocalReply, ApplyError> {
        let volume = VolumeId(needed.volume);
        let Some(known) = self.memory.volumes.get_mut(&volume) else {
            return Ok(LocalReply::NoSuchVolume);
        };
        let state = &mut known.copies;
        if state.walk == 0 || state.walk != needed.walk {
            return Ok(LocalReply::Invalid("that walk is over".to_owned()));
        }
        let first = state.first_walk;
        let walked = state.walked;
        if let Some(last) = needed.segments.last() {
            state.walked = state.walked.max(*last);
        }
        if needed.last {
            state.walk = 0;
            state.first_walk = false;
            // Everything is looked at now: the next check is due an interval later.
            let check = state.check.get_or_insert_default();
            check.ended = check.ended.max(time.0);
        }
        self.copies_changed.insert(volume);
        for segment in needed.segments.iter().copied().map(SegmentId) {
            if segment.0 <= walked {
                // Proposed twice.
                continue;
            }
            match self.missing(volume, segment)? {
                Some(old) if !old.quarantine.is_empty() => {
                    let again = v1::MissingSegment {
                        quarantine: String::new(),
                        ..old.clone()
                    };
                    self.set_missing(volume, segment, Some(&old), Some(again));
                }
                Some(_) => {}
                None if first => {
                    if let Some(record) = self.segment(volume, segment)? {
                        let missing = v1::MissingSegment {
                            since: Some(Position::START.into()),
                            length: record.length,
                            look: true,
                            ..v1::MissingSegment::default()
                        };
                        self.set_missing(volume, segment, None, Some(missing));
                    }
                }
                None => {}
            }
        }
        Ok(LocalReply::Done)
    }

    pub(super) fn copy_report(
        &mut self,
        time: UnixNanos,
        report: &v1::CopyReport,
    ) -> Result<LocalReply, ApplyError> {
        let volume = VolumeId(report.volume);
        let Some(known) = self.memory.volumes.get_mut(&volume) else {
            return Ok(LocalReply::NoSuchVolume);
        };
        let own = known.record.storage.as_ref();
        if own.is_none_or(|own| own.uuid != report.bucket) {
            return Ok(LocalReply::Invalid(
                "the report is about another bucket".to_owned(),
            ));
        }
        known.copies.pulled_bytes += report.pulled_bytes;
        if let Some(check) = &report.check {
            note_check(known.copies.check.get_or_insert_default(), check, time);
        }
        let loading = known
            .record
            .mirror
            .as_ref()
            .is_some_and(|mirror| mirror.state() == v1::MirrorState::Loading);
        let head = known.digest.position;
        self.copies_changed.insert(volume);
        for segment in report.stored.iter().copied().map(SegmentId) {
            match self.missing(volume, segment)? {
                Some(old) => {
                    self.set_missing(volume, segment, Some(&old), None);
                    if let Some(known) = self.memory.volumes.get_mut(&volume) {
                        known.copies.copied_segments += 1;
                        known.copies.copied_bytes += old.length;
                    }
                }
                // It was freed while somebody copied it. While records are loaded nobody can tell.
                None if !loading && self.segment(volume, segment)?.is_none() => {
                    self.queue_deletion(volume, segment, time, head)?;
                }
                // Reported twice.
                None => {}
            }
        }
        for bad in &report.bad {
            let segment = SegmentId(bad.segment);
            if let Some(old) = self.missing(volume, segment)? {
                tracing::error!(%volume, segment = segment.0, why = bad.reason, "a segment can't be copied");
                let quarantined = v1::MissingSegment {
                    quarantine: bad.reason.clone(),
                    ..old.clone()
                };
                self.set_missing(volume, segment, Some(&old), Some(quarantined));
            }
        }
        for lost in &report.lost {
            let segment = SegmentId(lost.segment);
            let old = self.missing(volume, segment)?;
            let Some(record) = self.segment(volume, segment)? else {
                continue;
            };
            if let Some(old) = old {
                if lost.replace && !old.replace {
                    let again = v1::MissingSegment {
                        replace: true,
                        ..old.clone()
                    };
                    self.set_missing(volume, segment, Some(&old), Some(again));
                }
                continue;
            }
            tracing::warn!(%volume, segment = segment.0, "an object of this region's bucket is gone or bad; it is copied again");
            let missing = v1::MissingSegment {
                since: Some(head.into()),
                length: record.length,
                look: true,
                replace: lost.replace,
                ..v1::MissingSegment::default()
            };
            self.set_missing(volume, segment, None, Some(missing));
            if let Some(known) = self.memory.volumes.get_mut(&volume) {
                known.copies.lost_segments += 1;
                if report.check.is_some()
                    && let Some(check) = &mut known.copies.check
                {
                    let counts = match check.under_way {
                        true => &mut check.now,
                        // Its last report brought these.
                        false => &mut check.last,
                    };
                    counts.get_or_insert_default().own_lost += 1;
                }
            }
        }
        Ok(LocalReply::Done)
    }
}

/// A check begins, goes on or ends. What belongs to another one is passed over.
fn note_check(state: &mut v1::CheckState, report: &v1::CheckReport, time: UnixNanos) {
    if !state.under_way && report.number == state.number + 1 {
        state.number = report.number;
        state.under_way = true;
        state.groups = 0;
        state.now = Some(v1::CheckCounts::default());
        return;
    }
    if !state.under_way || report.number != state.number || report.groups < state.groups {
        return;
    }
    let before = state.now.take().unwrap_or_default();
    let counts = v1::CheckCounts {
        own_lost: before.own_lost,
        ..report.counts.clone().unwrap_or_default()
    };
    state.groups = report.groups;
    if report.done {
        state.under_way = false;
        state.ended = time.0;
        state.checks += 1;
        state.last = Some(counts);
    } else {
        state.now = Some(counts);
    }
}

/// Everything that the records name may be missing, and is looked for.
fn begin_walk(state: &mut v1::CopyState) {
    state.walks += 1;
    state.walk = state.walks;
    state.walked = 0;
    state.first_walk = true;
}

#[cfg(test)]
mod tests {
    use heliofs_proto::ids::Epoch;

    use super::*;

    #[test]
    fn a_check_is_counted_once_whoever_reports_it() {
        let mut state = v1::CheckState::default();
        let report = |number, groups, source_lost, done| v1::CheckReport {
            number,
            groups,
            counts: Some(v1::CheckCounts {
                source_lost,
                ..v1::CheckCounts::default()
            }),
            done,
        };
        let mut note = |report, time| note_check(&mut state, &report, UnixNanos(time));
        note(report(1, 0, 0, false), 10);
        note(report(1, 64, 2, false), 20);
        // Of one that lost its lease meanwhile.
        note(report(1, 32, 9, false), 21);
        note(report(1, 256, 3, true), 30);
        note(report(1, 256, 7, true), 31);
        assert_eq!((state.checks, state.ended, state.under_way), (1, 30, false));
        assert_eq!(state.last.unwrap().source_lost, 3);
    }

    #[test]
    fn gaps_stay_ordered_and_apart() {
        let at = |seq| Position {
            epoch: Epoch(0),
            seq,
        };
        let mut gaps = Vec::new();
        let seen = |gaps: &[v1::PositionRange]| -> Vec<(u64, u64)> {
            let seq = |at: Option<v1::Position>| position(at).seq;
            gaps.iter().map(|g| (seq(g.from), seq(g.to))).collect()
        };
        add_gap(&mut gaps, at(10), at(12));
        add_gap(&mut gaps, at(5), at(7));
        add_gap(&mut gaps, at(7), at(7));
        assert_eq!(seen(&gaps), [(5, 7), (10, 12)]);
        add_gap(&mut gaps, at(6), at(10));
        assert_eq!(seen(&gaps), [(5, 12)]);
        add_gap(&mut gaps, at(20), at(30));
        add_gap(&mut gaps, at(1), at(2));
        assert_eq!(seen(&gaps), [(1, 2), (5, 12), (20, 30)]);
    }
}

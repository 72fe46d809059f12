//! What the state knows of a region's own bucket: what it lacks, and up to which position it lacks nothing.

use heliofs_proto::ids::{Position, SegmentId, VolumeId};
use heliofs_proto::v1;
use prost::Message;

use super::io_error;
use super::local;
use super::state::{Known, State};

impl State {
    /// Whether the volume's objects are copied into this region's bucket from another one.
    pub fn is_dual(&self, volume: VolumeId) -> bool {
        let memory = self.memory();
        let known = memory.volumes.get(&volume);
        known.is_some_and(|known| known.record.second.is_some())
    }

    /// How far the region's bucket is; `None`: the volume has one bucket.
    pub fn copy_state(&self, volume: VolumeId) -> Option<v1::CopyState> {
        let memory = self.memory();
        let known = memory.volumes.get(&volume)?;
        known.record.second.as_ref()?;
        Some(known.copies.clone())
    }

    /// The greatest position all of whose segments are in the region's bucket, quarantined ones excepted; the volume's position
    /// when it has one bucket.
    pub fn complete(&self, volume: VolumeId) -> std::io::Result<Position> {
        let known = || {
            let memory = self.memory();
            let known = memory.volumes.get(&volume)?;
            let copies = known.record.second.as_ref().map(|_| known.copies.clone());
            Some((known.digest.position, copies))
        };
        let applied = match known() {
            None => return Ok(Position::START),
            Some((applied, None)) => return Ok(applied),
            Some((applied, Some(_))) => applied,
        };
        // What is missing is read after the position, and the gaps after that: what came since can only make the answer older,
        // and what was freed since has left its gap.
        let mut limit = match self.pending(volume, 1)?.first() {
            Some((since, _)) => before(*since).min(applied),
            None => applied,
        };
        let Some((_, Some(copies))) = known() else {
            return Ok(Position::START);
        };
        if copies.walk != 0 && copies.first_walk {
            return Ok(Position::START);
        }
        for gap in copies.gaps.iter().rev() {
            let position = |at: Option<v1::Position>| at.map(Position::from).unwrap_or_default();
            let (from, to) = (position(gap.from), position(gap.to));
            if from <= limit && limit < to {
                limit = before(from);
            }
        }
        Ok(limit)
    }

    /// The oldest missing segments that are not quarantined, at most `max`, and since when they are referenced.
    pub fn pending(
        &self,
        volume: VolumeId,
        max: usize,
    ) -> std::io::Result<Vec<(Position, SegmentId)>> {
        let generation = self.generation();
        let (from, to) = local::all_pending(volume);
        let mut found = Vec::new();
        for item in generation.local_range(from, to).take(max) {
            let (key, _) = item.map_err(io_error)?;
            found.extend(local::decode_pending(&key));
        }
        Ok(found)
    }

    /// What is known of a segment that the region's bucket lacks; `None`: it has it, or the segment does not exist.
    pub fn missing(
        &self,
        volume: VolumeId,
        segment: SegmentId,
    ) -> std::io::Result<Option<v1::MissingSegment>> {
        let generation = self.generation();
        let key = local::missing(volume, segment);
        let found = generation.db.get_pinned_cf(generation.local(), key);
        let decoded = found
            .map_err(io_error)?
            .map(|bytes| v1::MissingSegment::decode(bytes.as_ref()));
        decoded.transpose().map_err(std::io::Error::other)
    }

    /// Whether the region's bucket lacks anything.
    pub fn lacks_any(&self, volume: VolumeId) -> bool {
        if !self.is_lacking() {
            return false;
        }
        let memory = self.memory();
        let known = memory.volumes.get(&volume);
        known.is_some_and(Known::lacks_any)
    }

    /// Missing segments with ids above `after`, ascending.
    pub fn all_missing(
        &self,
        volume: VolumeId,
        after: SegmentId,
        max: usize,
    ) -> std::io::Result<Vec<(SegmentId, v1::MissingSegment)>> {
        let generation = self.generation();
        let (_, to) = local::all_missing(volume);
        let from = local::missing(volume, SegmentId(after.0.saturating_add(1)));
        let mut found = Vec::new();
        for item in generation.local_range(from, to).take(max) {
            let (key, value) = item.map_err(io_error)?;
            let Some(id) = key.last_chunk() else { continue };
            let record = v1::MissingSegment::decode(value.as_ref());
            let record = record.map_err(std::io::Error::other)?;
            found.push((SegmentId(u64::from_be_bytes(*id)), record));
        }
        Ok(found)
    }
}

/// The position in front of one.
fn before(at: Position) -> Position {
    match at.seq {
        0 | 1 => Position::START,
        seq => Position { seq: seq - 1, ..at },
    }
}

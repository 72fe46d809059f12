//! Keys of the `local` column family: records of this cluster that are in no volume's history. Numbers are big endian.
//!
//! | key | record |
//! |---|---|
//! | `applied` | RaftLogId: the last entry applied |
//! | `members` | SnapshotHeader: membership and its log id |
//! | `cluster` | cluster id, u32 |
//! | `next-volume` | id of the next volume, u32 |
//! | `level` | the highest level of the items applied, u32; nothing: 0 |
//! | `V` volume | Volume: name, storage, settings as created |
//! | `S` volume, bucket (1) | digest sum, u128 little endian |
//! | `D` volume, freed-at (i64, sign flipped), segment | in the deletion queue since; epoch (u32) and seq (u64) of the freeing command, nothing in old stores |
//! | `d` volume, segment | freed-at: finds the record above |
//! | `L` volume, name | MirrorSlot: what is kept for a mirror |
//! | `C` volume, seq (u64), epoch (u32), segment | nothing: the segment is missing since that position, and may be copied |
//! | `c` volume, segment | MissingSegment: this region's bucket lacks it |
//! | `O` volume | CopyState: how far this region's bucket is |
//! | `H` volume | nothing: the volume's records lie in the upper half of the keys, with the highest bit set |
//! | `I` volume | MirrorIncoming: a copy that is being loaded; its records lie in the half that is not in use |
//! | `i` volume, bucket (1) | digest sum of what has arrived of it, u128 little endian |
//! | `W` volume | length of the deletion queue, u64 |
//! | `P` volume, seq | log index (u64), epoch (u32), time (i64), replayed (1, since mirrors): `seq` is the volume's first command in that entry; sparse |

use heliofs_proto::ids::{Epoch, Position, SegmentId, UnixNanos, VolumeId};

/// The last entry applied.
pub const APPLIED: &[u8] = b"applied";
/// Membership and its log id.
pub const MEMBERS: &[u8] = b"members";
/// The cluster's id.
pub const CLUSTER: &[u8] = b"cluster";
/// The next volume's id.
pub const NEXT_VOLUME: &[u8] = b"next-volume";
/// What a build must know to go on from here.
pub const LEVEL: &[u8] = b"level";

const VOLUME: u8 = b'V';
const SUM: u8 = b'S';
const DELETION: u8 = b'D';
const DELETION_OF: u8 = b'd';
const WAITING: u8 = b'W';
const PLACE: u8 = b'P';
const SLOT: u8 = b'L';
const PENDING: u8 = b'C';
const MISSING: u8 = b'c';
const COPIES: u8 = b'O';
const UPPER: u8 = b'H';
const INCOMING: u8 = b'I';
const INCOMING_SUM: u8 = b'i';

/// The tags of all records of one volume.
const TAGS: [u8; 13] = [
    VOLUME,
    SUM,
    DELETION,
    DELETION_OF,
    WAITING,
    PLACE,
    SLOT,
    PENDING,
    MISSING,
    COPIES,
    UPPER,
    INCOMING,
    INCOMING_SUM,
];

fn key(tag: u8, volume: VolumeId, rest: &[&[u8]]) -> Vec<u8> {
    let mut key = Vec::with_capacity(24);
    key.push(tag);
    key.extend_from_slice(&volume.0.to_be_bytes());
    for part in rest {
        key.extend_from_slice(part);
    }
    key
}

/// A volume's admin record.
pub fn volume(volume: VolumeId) -> Vec<u8> {
    key(VOLUME, volume, &[])
}

/// All volumes.
pub fn volumes() -> (Vec<u8>, Vec<u8>) {
    (vec![VOLUME], vec![VOLUME + 1])
}

/// One of a volume's 256 sums.
pub fn sum(volume: VolumeId, bucket: u8) -> Vec<u8> {
    key(SUM, volume, &[&[bucket]])
}

/// All sums of a volume.
pub fn sums(volume: VolumeId) -> (Vec<u8>, Vec<u8>) {
    range(SUM, volume)
}

/// Says that a volume's records lie in the upper half of the keys.
pub fn upper(volume: VolumeId) -> Vec<u8> {
    key(UPPER, volume, &[])
}

/// All volumes in the upper half.
pub fn uppers() -> (Vec<u8>, Vec<u8>) {
    (vec![UPPER], vec![UPPER + 1])
}

/// The volume of a key that begins with a tag and a volume.
pub fn volume_of(key: &[u8]) -> Option<VolumeId> {
    let volume = key.get(1..)?.first_chunk()?;
    Some(VolumeId(u32::from_be_bytes(*volume)))
}

/// The copy that is being loaded.
pub fn incoming(volume: VolumeId) -> Vec<u8> {
    key(INCOMING, volume, &[])
}

/// One of the 256 sums of what has arrived of a copy.
pub fn incoming_sum(volume: VolumeId, bucket: u8) -> Vec<u8> {
    key(INCOMING_SUM, volume, &[&[bucket]])
}

/// All sums of what has arrived of a copy.
pub fn incoming_sums(volume: VolumeId) -> (Vec<u8>, Vec<u8>) {
    range(INCOMING_SUM, volume)
}

/// Order of bytes is order of time, also before 1970.
fn ordered(time: UnixNanos) -> [u8; 8] {
    (time.0 as u64 ^ 1 << 63).to_be_bytes()
}

/// A segment in the deletion queue.
pub fn deletion(volume: VolumeId, freed_at: UnixNanos, segment: SegmentId) -> Vec<u8> {
    key(
        DELETION,
        volume,
        &[&ordered(freed_at), &segment.0.to_be_bytes()],
    )
}

/// The part of a volume's deletion queue that was freed before a time.
pub fn deletions_before(volume: VolumeId, time: UnixNanos) -> (Vec<u8>, Vec<u8>) {
    (
        key(DELETION, volume, &[]),
        key(DELETION, volume, &[&ordered(time)]),
    )
}

/// The segment of a deletion key.
pub fn deletion_segment(key: &[u8]) -> Option<SegmentId> {
    key.last_chunk()
        .map(|bytes| SegmentId(u64::from_be_bytes(*bytes)))
}

/// Value of a deletion: the position of the command that freed the segment.
pub fn encode_freed(position: Position) -> [u8; 12] {
    let mut value = [0; 12];
    value[..4].copy_from_slice(&position.epoch.0.to_be_bytes());
    value[4..].copy_from_slice(&position.seq.to_be_bytes());
    value
}

/// The position in a deletion's value; the start for queues of builds that knew no mirrors.
pub fn decode_freed(value: &[u8]) -> Position {
    match (
        value.first_chunk(),
        value.get(4..).and_then(<[u8]>::first_chunk),
    ) {
        (Some(epoch), Some(seq)) => Position {
            epoch: Epoch(u32::from_be_bytes(*epoch)),
            seq: u64::from_be_bytes(*seq),
        },
        _ => Position::START,
    }
}

/// A mirror's slot.
pub fn slot(volume: VolumeId, name: &str) -> Vec<u8> {
    key(SLOT, volume, &[name.as_bytes()])
}

/// All slots of a volume.
pub fn slots(volume: VolumeId) -> (Vec<u8>, Vec<u8>) {
    range(SLOT, volume)
}

/// A segment that is to be copied, missing since a position: the oldest come first.
pub fn pending(volume: VolumeId, since: Position, segment: SegmentId) -> Vec<u8> {
    let parts: [&[u8]; 3] = [
        &since.seq.to_be_bytes(),
        &since.epoch.0.to_be_bytes(),
        &segment.0.to_be_bytes(),
    ];
    key(PENDING, volume, &parts)
}

/// What [`pending`] made the key of.
pub fn decode_pending(key: &[u8]) -> Option<(Position, SegmentId)> {
    let since = Position {
        seq: u64::from_be_bytes(*key.get(5..)?.first_chunk()?),
        epoch: Epoch(u32::from_be_bytes(*key.get(13..)?.first_chunk()?)),
    };
    Some((since, SegmentId(u64::from_be_bytes(*key.last_chunk()?))))
}

/// All segments of a volume that are to be copied.
pub fn all_pending(volume: VolumeId) -> (Vec<u8>, Vec<u8>) {
    range(PENDING, volume)
}

/// A segment that this region's bucket lacks.
pub fn missing(volume: VolumeId, segment: SegmentId) -> Vec<u8> {
    key(MISSING, volume, &[&segment.0.to_be_bytes()])
}

/// All segments of a volume that this region's bucket lacks.
pub fn all_missing(volume: VolumeId) -> (Vec<u8>, Vec<u8>) {
    range(MISSING, volume)
}

/// How far this region's bucket is.
pub fn copies(volume: VolumeId) -> Vec<u8> {
    key(COPIES, volume, &[])
}

/// When a segment was freed.
pub fn deletion_of(volume: VolumeId, segment: SegmentId) -> Vec<u8> {
    key(DELETION_OF, volume, &[&segment.0.to_be_bytes()])
}

/// A volume's whole deletion queue.
pub fn all_deletions(volume: VolumeId) -> (Vec<u8>, Vec<u8>) {
    range(DELETION, volume)
}

/// When the segments of the deletion queue were freed.
pub fn all_deletions_of(volume: VolumeId) -> (Vec<u8>, Vec<u8>) {
    range(DELETION_OF, volume)
}

/// Length of a volume's deletion queue.
pub fn waiting(volume: VolumeId) -> Vec<u8> {
    key(WAITING, volume, &[])
}

/// Where in the log a command is.
pub fn place(volume: VolumeId, seq: u64) -> Vec<u8> {
    key(PLACE, volume, &[&seq.to_be_bytes()])
}

/// Everything of one kind of one volume.
fn range(tag: u8, volume: VolumeId) -> (Vec<u8>, Vec<u8>) {
    (key(tag, volume, &[]), key(tag, VolumeId(volume.0 + 1), &[]))
}

/// All places of a volume.
pub fn places(volume: VolumeId) -> (Vec<u8>, Vec<u8>) {
    range(PLACE, volume)
}

/// The ranges of all records of a volume.
pub fn all_of(volume: VolumeId) -> impl Iterator<Item = (Vec<u8>, Vec<u8>)> {
    TAGS.into_iter().map(move |tag| range(tag, volume))
}

/// Where a volume's command is in the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The command's seq: the volume's first one in the entry.
    pub seq: u64,
    /// The command's epoch.
    pub epoch: Epoch,
    /// The entry.
    pub index: u64,
    /// The volume's time before the command: effective times are the greatest stamp so far.
    pub time_before: UnixNanos,
    /// It was replayed: the volume was a mirror then.
    pub mirrored: bool,
}

impl Place {
    /// The record's value.
    pub fn encode(&self) -> [u8; 21] {
        let mut value = [0; 21];
        value[..8].copy_from_slice(&self.index.to_be_bytes());
        value[8..12].copy_from_slice(&self.epoch.0.to_be_bytes());
        value[12..20].copy_from_slice(&self.time_before.0.to_be_bytes());
        value[20] = self.mirrored.into();
        value
    }

    /// From key and value; `None` if they are no place.
    pub fn decode(key: &[u8], value: &[u8]) -> Option<Self> {
        Some(Self {
            seq: u64::from_be_bytes(*key.last_chunk()?),
            index: u64::from_be_bytes(*value.first_chunk()?),
            epoch: Epoch(u32::from_be_bytes(value.get(8..12)?.try_into().ok()?)),
            time_before: UnixNanos(i64::from_be_bytes(value.get(12..20)?.try_into().ok()?)),
            // Older builds knew no mirrors.
            mirrored: value.get(20).is_some_and(|mirrored| *mirrored != 0),
        })
    }
}

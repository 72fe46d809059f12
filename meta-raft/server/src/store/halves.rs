//! Where the records of a volume lie: under their keys, or under their keys with the highest bit set.
//!
//! A copy of a mirrored volume is loaded into the half of the keys that is not in use, beside what is served, and takes its place
//! by one small write. Only the keys of the `replicated` family in the database have halves: nobody outside the store sees them.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arc_swap::ArcSwap;
use heliofs_proto::ids::VolumeId;
use rocksdb::{IteratorMode, ReadOptions, WriteBatch};

use super::OpenError;
use super::state::{Generation, Known, without_wal};

/// Of a key's first byte.
const UPPER: u8 = 0x80;

/// Whether a volume's keys leave the bit free.
pub(super) fn has_halves(volume: VolumeId) -> bool {
    // One less than half: the key that ends the range of the last volume has no half.
    volume.0 < u32::MAX / 2
}

/// Volumes whose records lie in the upper half, at one moment; cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Places {
    upper: Arc<BTreeSet<VolumeId>>,
}

fn set(key: &[u8]) -> Vec<u8> {
    let mut key = key.to_vec();
    if let Some(first) = key.first_mut() {
        *first |= UPPER;
    }
    key
}

impl Places {
    /// Whether the records of the volume that a key is of lie in the upper half.
    pub(super) fn is_upper(&self, key: &[u8]) -> bool {
        !self.upper.is_empty()
            && key.first_chunk().is_some_and(|volume| {
                let volume = VolumeId(u32::from_be_bytes(*volume));
                self.upper.contains(&volume)
            })
    }

    /// Under which key a record lies.
    pub(super) fn of<'k>(&self, key: &'k [u8]) -> Cow<'k, [u8]> {
        match self.is_upper(key) {
            true => Cow::Owned(set(key)),
            false => Cow::Borrowed(key),
        }
    }

    /// Under which key a record lies in the half that is not in use.
    pub(super) fn beside<'k>(&self, key: &'k [u8]) -> Cow<'k, [u8]> {
        match self.is_upper(key) {
            true => Cow::Borrowed(key),
            false => Cow::Owned(set(key)),
        }
    }

    /// Where the records from `from` to `to` lie: keys of one volume, or the one that ends its range.
    pub(super) fn range<'k>(
        &self,
        from: &'k [u8],
        to: &'k [u8],
    ) -> (Cow<'k, [u8]>, Cow<'k, [u8]>, bool) {
        match self.is_upper(from) {
            true => (Cow::Owned(set(from)), Cow::Owned(set(to)), true),
            false => (Cow::Borrowed(from), Cow::Borrowed(to), false),
        }
    }

    /// Both halves of a volume: the one in use, and the other.
    pub(super) fn both(&self, volume: VolumeId) -> [(Vec<u8>, Vec<u8>); 2] {
        let (from, to) = meta_core::keys::volume_range(volume);
        let lower = (from.to_vec(), to.to_vec());
        let upper = (set(&from), set(&to));
        match self.upper.contains(&volume) {
            true => [upper, lower],
            false => [lower, upper],
        }
    }
}

/// The key of a record from the key under which it lies in the upper half.
pub(super) fn lowered(key: &[u8]) -> bytes::Bytes {
    let mut key = key.to_vec();
    if let Some(first) = key.first_mut() {
        *first &= !UPPER;
    }
    key.into()
}

/// Where the records of each volume lie now.
#[derive(Default)]
pub(super) struct Halves {
    now: ArcSwap<BTreeSet<VolumeId>>,
}

impl Halves {
    /// As stored.
    pub(super) fn new(upper: BTreeSet<VolumeId>) -> Self {
        Self {
            now: ArcSwap::from_pointee(upper),
        }
    }

    /// As they are at this moment.
    pub(super) fn places(&self) -> Places {
        Places {
            upper: self.now.load_full(),
        }
    }

    /// Reads where the records are, again if they were elsewhere meanwhile. That is exact as the half that was left is emptied
    /// only after [`Halves::set`].
    pub(super) fn steady<R>(&self, mut read: impl FnMut(&Places) -> R) -> R {
        loop {
            let places = self.places();
            let found = read(&places);
            if Arc::ptr_eq(&places.upper, &self.now.load()) {
                return found;
            }
        }
    }

    /// Of the apply task, when the records of these volumes were written: they lie in the other half from now on; `gone` have
    /// none any more.
    pub(super) fn set(&self, swapped: &BTreeSet<VolumeId>, gone: &BTreeSet<VolumeId>) {
        let before = self.now.load_full();
        let mut now: BTreeSet<VolumeId> = before.symmetric_difference(swapped).copied().collect();
        now.retain(|volume| !gone.contains(volume));
        if now != *before {
            self.now.store(Arc::new(now));
        }
    }
}

/// Empties the half that a volume does not use: a crash came between a swap and that. Before anybody reads.
pub(super) fn empty_unused(
    generation: &Generation,
    volumes: &BTreeMap<VolumeId, Known>,
) -> Result<(), OpenError> {
    let failed = |error: rocksdb::Error| OpenError::State(format!("an unused half: {error}"));
    let places = generation.halves.places();
    for (volume, known) in volumes {
        if known.incoming.is_some() || !has_halves(*volume) {
            continue;
        }
        let [_, (from, to)] = places.both(*volume);
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(from.clone());
        options.set_iterate_upper_bound(to.clone());
        let family = generation.replicated();
        let mut found = (generation.db).iterator_cf_opt(family, options, IteratorMode::Start);
        if found.next().transpose().map_err(failed)?.is_none() {
            continue;
        }
        tracing::info!(%volume, "removing what was replaced before this node stopped");
        let mut left = WriteBatch::default();
        left.delete_range_cf(family, from, to);
        let written = generation.db.write_opt(left, &without_wal());
        written.map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_moves_alone_and_its_keys_come_back() {
        let halves = Halves::default();
        let key = meta_core::keys::head(VolumeId(7));
        let other = meta_core::keys::head(VolumeId(8));
        assert_eq!(halves.places().of(&key), &key[..]);
        let beside = halves.places().beside(&key).into_owned();
        assert_ne!(beside, &key[..]);
        let none = BTreeSet::new();
        halves.set(&BTreeSet::from([VolumeId(7)]), &none);
        let places = halves.places();
        assert_eq!(places.of(&key), beside);
        assert_eq!(lowered(&beside), key);
        assert_eq!(places.beside(&key), &key[..]);
        assert_eq!(places.of(&other), &other[..]);
        let (from, to) = meta_core::keys::volume_range(VolumeId(7));
        let (from, to, upper) = places.range(&from, &to);
        assert!(upper && *from <= beside[..] && beside[..] < *to);
        halves.set(&none, &BTreeSet::from([VolumeId(7)]));
        assert_eq!(halves.places().of(&key), &key[..]);
    }

    #[test]
    fn what_a_crash_left_in_the_other_half_goes_unless_a_copy_is_arriving_there() {
        use prost::Message;

        use crate::config::CacheSizes;
        use crate::store::{State, local};

        let volume = VolumeId(7);
        let key = meta_core::keys::inode(volume, heliofs_proto::ids::Ino(9));
        for (upper, arriving) in [(false, false), (true, false), (false, true), (true, true)] {
            let dir = tempfile::TempDir::new().unwrap();
            let open = || State::open(dir.path(), &CacheSizes::default()).unwrap();
            let state = open();
            let generation = state.generation();
            let put = |key: &[u8], value: &[u8]| {
                let family = generation.local();
                let options = without_wal();
                (generation.db)
                    .put_cf_opt(family, key, value, &options)
                    .unwrap();
            };
            let record = heliofs_proto::v1::Volume {
                id: volume.0,
                ..Default::default()
            };
            put(&local::volume(volume), &record.encode_to_vec());
            if upper {
                put(&local::upper(volume), &[]);
            }
            if arriving {
                let incoming = heliofs_proto::v1::MirrorIncoming::default();
                put(&local::incoming(volume), &incoming.encode_to_vec());
            }
            for key in [key.to_vec(), set(&key)] {
                let family = generation.replicated();
                let options = without_wal();
                (generation.db)
                    .put_cf_opt(family, key, b"x", &options)
                    .unwrap();
            }
            state.flush().unwrap();
            drop((generation, state));
            let generation = open().generation();
            let has = |key: &[u8]| {
                let found = generation.db.get_cf(generation.replicated(), key);
                found.unwrap().is_some()
            };
            let (lower, higher) = (has(&key), has(&set(&key)));
            let expected = match upper {
                false => (true, arriving),
                true => (arriving, true),
            };
            assert_eq!((lower, higher), expected, "{upper} {arriving}");
        }
    }

    #[test]
    fn a_read_during_which_a_volume_moved_is_made_again() {
        let halves = Halves::default();
        let mut reads = 0;
        let upper = halves.steady(|places| {
            reads += 1;
            if reads == 1 {
                halves.set(&BTreeSet::from([VolumeId(7)]), &BTreeSet::new());
            }
            places.is_upper(&meta_core::keys::head(VolumeId(7)))
        });
        assert_eq!((reads, upper), (2, true));
    }
}

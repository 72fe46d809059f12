//! The digest of a volume: 256 sums that replicas and mirrors compare.

use crate::change::Change;
use crate::keys::Tag;

/// 256 sums of 128 bits, one per value of the first byte of the key's hash: a difference is narrowed to 1/256 of the keys.
///
/// A record adds hash(key, value) modulo 2^128 to its sum, so that sums can be kept up to date by adding what is new and
/// subtracting what was, in any order and any batching. The hash is XXH3-128: it finds rot and defects, not forgery.
#[derive(Clone, PartialEq, Eq)]
pub struct Sums([u128; 256]);

impl Default for Sums {
    fn default() -> Self {
        Self([0; 256])
    }
}

impl std::fmt::Debug for Sums {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sums({:032x})", self.total())
    }
}

/// Whether records of this key are summed. The head is not: it changes with every command, and beats carry what it says.
fn summed(key: &[u8]) -> bool {
    Tag::of(key) != Some(Tag::Head)
}

/// Which of the 256 sums a key belongs to.
pub fn bucket(key: &[u8]) -> u8 {
    xxhash_rust::xxh3::xxh3_64(key) as u8
}

fn hash(key: &[u8], value: &[u8]) -> u128 {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    // The key's length separates key and value, so that moving a byte between them changes the hash.
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key);
    hasher.update(value);
    hasher.digest128()
}

impl Sums {
    /// From 256 × 16 bytes, little endian; `None` if there are more or fewer.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (sums, rest) = bytes.as_chunks::<16>();
        let sums: &[[u8; 16]; 256] = sums.try_into().ok()?;
        rest.is_empty().then(|| Self(sums.map(u128::from_le_bytes)))
    }

    /// 256 × 16 bytes, little endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|sum| sum.to_le_bytes()).collect()
    }

    /// One of the sums.
    pub fn get(&self, bucket: u8) -> u128 {
        self.0[usize::from(bucket)]
    }

    /// Sets one of the sums, as read from a store.
    pub fn set(&mut self, bucket: u8, sum: u128) {
        self.0[usize::from(bucket)] = sum;
    }

    /// Adds a record.
    pub fn add(&mut self, key: &[u8], value: &[u8]) {
        if summed(key) {
            let sum = &mut self.0[usize::from(bucket(key))];
            *sum = sum.wrapping_add(hash(key, value));
        }
    }

    fn subtract(&mut self, key: &[u8], value: &[u8]) {
        if summed(key) {
            let sum = &mut self.0[usize::from(bucket(key))];
            *sum = sum.wrapping_sub(hash(key, value));
        }
    }

    /// Takes a change into the sums; returns the sum that changed, if any did.
    pub fn absorb(&mut self, change: &Change) -> Option<u8> {
        if !summed(&change.key) {
            return None;
        }
        if let Some(old) = &change.old {
            self.subtract(&change.key, old);
        }
        if let Some(new) = &change.new {
            self.add(&change.key, new);
        }
        Some(bucket(&change.key))
    }

    /// The sum of the 256 sums: what beats carry.
    pub fn total(&self) -> u128 {
        self.0.iter().fold(0, |total, sum| total.wrapping_add(*sum))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn change(
        key: &'static [u8],
        old: Option<&'static [u8]>,
        new: Option<&'static [u8]>,
    ) -> Change {
        Change {
            key: Bytes::from_static(key),
            old: old.map(Bytes::from_static),
            new: new.map(Bytes::from_static),
        }
    }

    #[test]
    fn sums_do_not_depend_on_the_way_that_led_to_the_records() {
        const KEY: &[u8] = &[0, 0, 0, 1, Tag::Inode as u8, 1];
        const OTHER: &[u8] = &[0, 0, 0, 1, Tag::Inode as u8, 2];
        let mut long_way = Sums::default();
        long_way.absorb(&change(KEY, None, Some(b"a")));
        long_way.absorb(&change(OTHER, None, Some(b"x")));
        long_way.absorb(&change(KEY, Some(b"a"), Some(b"b")));
        long_way.absorb(&change(OTHER, Some(b"x"), None));
        let mut direct = Sums::default();
        direct.add(KEY, b"b");
        assert_eq!(long_way, direct);
        assert_ne!(direct.total(), 0);
        assert_eq!(Sums::from_bytes(&direct.to_bytes()), Some(direct));
    }

    #[test]
    fn the_head_is_not_summed() {
        const HEAD: &[u8] = &[0, 0, 0, 1, Tag::Head as u8];
        let mut sums = Sums::default();
        assert_eq!(sums.absorb(&change(HEAD, None, Some(b"a"))), None);
        assert_eq!(sums.total(), 0);
    }
}

//! One file's data as it is staged: a header that says where it belongs, then a segment. docs/FORMAT.md holds the byte map.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use blockstore::segment::object::FrameEntry;

const MAGIC: &[u8; 8] = b"HELIOWBK";
const VERSION: u16 = 1;
/// Magic, length and checksum of what follows.
const PREFIX_BYTES: usize = 16;
const FIXED_BYTES: usize = 64;
/// More would be no header of ours.
const HEADER_BYTES_MAX: usize = 64 << 20;

/// A record that is being written, or lies in the folder.
#[derive(Debug)]
pub struct StagedRecord {
    number: u64,
    ino: u64,
    path: PathBuf,
    frames: OnceLock<Frames>,
    damaged: AtomicBool,
    removed: AtomicBool,
}

/// Where a record's data lies in its file.
#[derive(Debug)]
pub struct Frames {
    /// Where the segment begins.
    pub base: u64,
    /// Its frames, in the order of the data.
    pub entries: Vec<FrameEntry>,
}

impl StagedRecord {
    /// A record that is not written yet.
    pub fn new(number: u64, ino: u64, path: PathBuf) -> Self {
        Self {
            number,
            ino,
            path,
            frames: OnceLock::new(),
            damaged: AtomicBool::new(false),
            removed: AtomicBool::new(false),
        }
    }

    /// Its number; later records have greater ones.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whose data it holds.
    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// It survives a crash from now on.
    pub(super) fn written(&self, frames: Frames) {
        // A second time would be the same.
        let _again = self.frames.set(frames);
    }

    /// Whether it survives a crash.
    pub fn is_written(&self) -> bool {
        self.frames.get().is_some()
    }

    /// Where its data lies, once it is written.
    pub fn frames(&self) -> Option<&Frames> {
        self.frames.get()
    }

    /// It is about to be removed, since its bytes are safe elsewhere.
    pub(super) fn remove(&self) {
        self.removed.store(true, Ordering::Release);
    }

    /// Whether it is not needed any more.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    /// It could not be read back. True for the first who says so.
    pub fn damage(&self) -> bool {
        !self.damaged.swap(true, Ordering::Relaxed)
    }

    /// Whether it could not be read back.
    pub fn is_damaged(&self) -> bool {
        self.damaged.load(Ordering::Relaxed)
    }
}

/// Where a record belongs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// The volume's id.
    pub volume: u32,
    /// The volume's epoch: after a forced promotion the same seq can mean other content.
    pub epoch: u64,
    /// The file.
    pub ino: u64,
    /// The record's number, also the id of its segment.
    pub number: u64,
    /// What identified the file's content when the data was staged.
    pub base_seq: u64,
    /// When the newest of it was written, nanoseconds since 1970; 0: unknown.
    pub mtime: i64,
    /// File offset and length of its parts, in the order of the data.
    pub ranges: Vec<(u64, u64)>,
}

impl Header {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(FIXED_BYTES + 16 * self.ranges.len());
        body.extend_from_slice(&VERSION.to_le_bytes());
        body.extend_from_slice(&[0; 2]);
        body.extend_from_slice(&self.volume.to_le_bytes());
        for number in [self.epoch, self.ino, self.number, self.base_seq] {
            body.extend_from_slice(&number.to_le_bytes());
        }
        body.extend_from_slice(&self.mtime.to_le_bytes());
        body.extend_from_slice(&(self.ranges.len() as u64).to_le_bytes());
        body.resize(FIXED_BYTES, 0);
        for (offset, length) in &self.ranges {
            body.extend_from_slice(&offset.to_le_bytes());
            body.extend_from_slice(&length.to_le_bytes());
        }
        let mut bytes = Vec::with_capacity(PREFIX_BYTES + body.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Reads it from the beginning of a record. Any bytes are allowed. Errors: what is wrong.
    pub fn read(from: &mut impl Read) -> Result<Self, String> {
        let cut = |error: std::io::Error| format!("the header is cut off: {error}");
        let mut prefix = [0; PREFIX_BYTES];
        from.read_exact(&mut prefix).map_err(cut)?;
        if &prefix[..8] != MAGIC {
            return Err("not a staged record".to_owned());
        }
        let length = u32_at(&prefix, 8) as usize;
        if !(FIXED_BYTES..=HEADER_BYTES_MAX).contains(&length) {
            return Err(format!("a header of {length} bytes"));
        }
        let mut body = vec![0; length];
        from.read_exact(&mut body).map_err(cut)?;
        if crc32fast::hash(&body) != u32_at(&prefix, 12) {
            return Err("the header's checksum is wrong".to_owned());
        }
        let version = u16::from_le_bytes([body[0], body[1]]);
        if version != VERSION {
            return Err(format!(
                "version {version}, which this release does not know"
            ));
        }
        let count = u64_at(&body, 48);
        let (table, rest) = body[FIXED_BYTES..].as_chunks::<16>();
        if table.len() as u64 != count || !rest.is_empty() {
            return Err(format!("{count} ranges in a header of {length} bytes"));
        }
        let ranges: Vec<_> = table
            .iter()
            .map(|range| (u64_at(range, 0), u64_at(range, 8)))
            .collect();
        let sane = |(offset, length): &(u64, u64)| {
            *length > 0
                && offset
                    .checked_add(*length)
                    .is_some_and(|end| end <= i64::MAX as u64)
        };
        if !ranges.iter().all(sane) {
            return Err("an impossible range".to_owned());
        }
        Ok(Self {
            volume: u32_at(&body, 4),
            epoch: u64_at(&body, 8),
            ino: u64_at(&body, 16),
            number: u64_at(&body, 24),
            base_seq: u64_at(&body, 32),
            mtime: u64_at(&body, 40).cast_signed(),
            ranges,
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written_and_no_flipped_bit_goes_unseen() {
        let header = Header {
            volume: 7,
            epoch: 3,
            ino: 1 << 50,
            number: 12,
            base_seq: 99,
            mtime: -5,
            ranges: vec![(0, 10), (1 << 40, 4096)],
        };
        let bytes = header.encode();
        assert_eq!(Header::read(&mut &bytes[..]).as_ref(), Ok(&header));
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::read(&mut &bad[..]).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(
                Header::read(&mut &bytes[..length]).is_err(),
                "{length} bytes"
            );
        }
    }
}

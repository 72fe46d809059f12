//! Which segments commits of staged data have named, and in which files: written before the commit is proposed, so that after a
//! crash a file's newest extents tell whether the last change was this mount's own.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// Inode, segment, CRC32 of both.
const NOTE_BYTES: usize = 20;

/// See the module. An append-only file.
#[derive(Debug)]
pub struct Notes {
    file: File,
    noted: HashSet<(u64, u64)>,
}

impl Notes {
    /// Opens or creates the file. `forget`: nothing is staged that its notes could be about.
    pub fn open(path: &Path, forget: bool) -> io::Result<Self> {
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(forget)
            .open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let mut noted = HashSet::new();
        let mut good = 0;
        for note in bytes.as_chunks::<NOTE_BYTES>().0 {
            let (pair, sum) = note.split_at(16);
            // A crash may have cut the last one off.
            if crc32fast::hash(pair).to_le_bytes() != sum {
                break;
            }
            let (ino, segment) = pair.split_at(8);
            let number = |part: &[u8]| u64::from_le_bytes(part.try_into().expect("8 bytes"));
            noted.insert((number(ino), number(segment)));
            good += NOTE_BYTES as u64;
        }
        file.set_len(good)?;
        file.seek(SeekFrom::Start(good))?;
        Ok(Self { file, noted })
    }

    /// Adds (inode, segment) pairs; synced when it returns `Ok`.
    pub fn add(&mut self, commits: &[(u64, u64)]) -> io::Result<()> {
        let mut bytes = Vec::new();
        let mut news = Vec::new();
        for &(ino, segment) in commits {
            if !self.noted.insert((ino, segment)) {
                continue;
            }
            news.push((ino, segment));
            let mut pair = [0; 16];
            pair[..8].copy_from_slice(&ino.to_le_bytes());
            pair[8..].copy_from_slice(&segment.to_le_bytes());
            bytes.extend_from_slice(&pair);
            bytes.extend_from_slice(&crc32fast::hash(&pair).to_le_bytes());
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let good = self.file.stream_position()?;
        let added = self
            .file
            .write_all(&bytes)
            .and_then(|()| self.file.sync_data());
        if added.is_err() {
            // Half a note would hide all that come after it.
            for pair in news {
                self.noted.remove(&pair);
            }
            self.file.set_len(good)?;
            self.file.seek(SeekFrom::Start(good))?;
        }
        added
    }

    /// Whether the pair was added.
    pub fn has(&self, ino: u64, segment: u64) -> bool {
        self.noted.contains(&(ino, segment))
    }

    /// Their number.
    pub fn len(&self) -> usize {
        self.noted.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.noted.is_empty()
    }

    /// Drops those of other inodes. Until the next [`Notes::add`] returns a crash may lose all: then what is staged of files
    /// that were committed in part is kept aside, not stored.
    pub fn keep(&mut self, is_staged: impl Fn(u64) -> bool) -> io::Result<()> {
        let kept: Vec<_> = self
            .noted
            .drain()
            .filter(|(ino, _)| is_staged(*ino))
            .collect();
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.add(&kept)
    }

    /// Nothing is staged any more.
    pub fn clear(&mut self) {
        if self.noted.is_empty() {
            return;
        }
        self.noted.clear();
        let emptied = self
            .file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)).map(drop));
        if let Err(error) = emptied {
            // They only grow; what they say stays true.
            tracing::warn!(%error, "the notes of the staging folder were not emptied");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_survive_and_a_torn_one_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes");
        let mut notes = Notes::open(&path, false).unwrap();
        notes.add(&[(1, 10), (2, 20)]).unwrap();
        notes.add(&[(1, 10), (1, 11)]).unwrap();
        drop(notes);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 3 * NOTE_BYTES);
        std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        let mut notes = Notes::open(&path, false).unwrap();
        assert!(notes.has(1, 10) && notes.has(2, 20) && !notes.has(1, 11));
        notes.add(&[(3, 30)]).unwrap();
        drop(notes);
        let mut notes = Notes::open(&path, false).unwrap();
        assert!(notes.has(3, 30) && !notes.has(1, 20));
        notes.clear();
        drop(notes);
        assert!(!Notes::open(&path, false).unwrap().has(3, 30));
    }
}

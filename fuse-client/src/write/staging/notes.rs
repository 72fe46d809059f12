//! What commits of staged data have put where, and what each led to: after a crash this tells whether a file's last change was this
//! mount's own.
//!
//! Before a commit is proposed, the places of its extents are noted; once it is answered, what identifies the file's content since.
//! Only between the two must be looked at the file: its newest extents are the commit's own if all of them are where they were
//! noted. A copy of them, by clone or copy_file_range, lies elsewhere in the file, or the commit was answered before.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use heliofs_proto::v1;

/// Inode, segment, frame, shift, CRC32 of these.
const NOTE_BYTES: usize = 32;

/// Where a commit puts bytes of a segment: the same for all extents that are left of one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Place {
    /// Never 0.
    pub segment: u64,
    /// Within the segment.
    pub frame: u32,
    /// Offset in the file less offset in the frame, wrapping.
    pub shift: u64,
}

impl Place {
    /// `None`: the bytes are inline, and those of anybody look alike.
    pub fn of(extent: &v1::Extent) -> Option<Self> {
        (extent.segment != 0).then(|| Self {
            segment: extent.segment,
            frame: extent.frame,
            shift: extent.offset.wrapping_sub(extent.frame_offset.into()),
        })
    }
}

/// See the module. An append-only file.
#[derive(Debug)]
pub struct Notes {
    file: File,
    /// By inode: what was proposed, and not answered as far as is known.
    proposed: HashMap<u64, HashSet<Place>>,
    /// By inode: `data_seq` that the last answered commit led to.
    reached: HashMap<u64, u64>,
    /// Notes in the file.
    length: usize,
}

fn encoded(ino: u64, segment: u64, frame: u32, shift: u64) -> [u8; NOTE_BYTES] {
    let mut note = [0; NOTE_BYTES];
    note[..8].copy_from_slice(&ino.to_le_bytes());
    note[8..16].copy_from_slice(&segment.to_le_bytes());
    note[16..20].copy_from_slice(&frame.to_le_bytes());
    note[20..28].copy_from_slice(&shift.to_le_bytes());
    let sum = crc32fast::hash(&note[..28]);
    note[28..].copy_from_slice(&sum.to_le_bytes());
    note
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
        let mut notes = Self {
            file,
            proposed: HashMap::new(),
            reached: HashMap::new(),
            length: 0,
        };
        for note in bytes.as_chunks::<NOTE_BYTES>().0 {
            let number = |at: usize| {
                let bytes = note[at..at + 8].try_into().expect("8 bytes");
                u64::from_le_bytes(bytes)
            };
            let (ino, segment, shift) = (number(0), number(8), number(20));
            let frame = u32::from_le_bytes(note[16..20].try_into().expect("4 bytes"));
            // A crash may have cut the last one off.
            if encoded(ino, segment, frame, shift) != *note {
                break;
            }
            match segment {
                0 => notes.learn_reached(ino, shift),
                segment => {
                    let place = Place {
                        segment,
                        frame,
                        shift,
                    };
                    notes.proposed.entry(ino).or_default().insert(place);
                }
            }
            notes.length += 1;
        }
        let good = (notes.length * NOTE_BYTES) as u64;
        notes.file.set_len(good)?;
        notes.file.seek(SeekFrom::Start(good))?;
        Ok(notes)
    }

    fn learn_reached(&mut self, ino: u64, data_seq: u64) {
        self.reached.insert(ino, data_seq);
        self.proposed.remove(&ino);
    }

    /// Adds places of extents that are about to be committed; synced when it returns `Ok`.
    pub fn propose(&mut self, commits: &[(u64, Place)]) -> io::Result<()> {
        let is_new = |(ino, place): &&(u64, Place)| {
            let known = self.proposed.get(ino);
            known.is_none_or(|places| !places.contains(place))
        };
        let news: Vec<_> = commits.iter().filter(is_new).copied().collect();
        let encoded: Vec<_> = news
            .iter()
            .map(|(ino, place)| encoded(*ino, place.segment, place.frame, place.shift))
            .collect();
        self.append(&encoded, true)?;
        for (ino, place) in news {
            self.proposed.entry(ino).or_default().insert(place);
        }
        Ok(())
    }

    /// Commits of these inodes were answered, and led to this `data_seq` each. Not synced: a power failure may take it back, and
    /// then the places decide.
    pub fn reach(&mut self, commits: &[(u64, u64)]) -> io::Result<()> {
        let encoded: Vec<_> = commits
            .iter()
            .map(|(ino, data_seq)| encoded(*ino, 0, 0, *data_seq))
            .collect();
        self.append(&encoded, false)?;
        for (ino, data_seq) in commits {
            self.learn_reached(*ino, *data_seq);
        }
        Ok(())
    }

    fn append(&mut self, notes: &[[u8; NOTE_BYTES]], sync: bool) -> io::Result<()> {
        if notes.is_empty() {
            return Ok(());
        }
        let good = (self.length * NOTE_BYTES) as u64;
        let mut added = self.file.write_all(notes.as_flattened());
        if sync {
            added = added.and_then(|()| self.file.sync_data());
        }
        match added {
            Ok(()) => self.length += notes.len(),
            Err(_) => {
                // Half a note would hide all that come after it.
                self.file.set_len(good)?;
                self.file.seek(SeekFrom::Start(good))?;
            }
        }
        added
    }

    /// Whether a commit that is not known to be answered was to put bytes there.
    pub fn is_proposed(&self, ino: u64, place: Place) -> bool {
        let places = self.proposed.get(&ino);
        places.is_some_and(|places| places.contains(&place))
    }

    /// Whether `data_seq` is what the inode's last answered commit led to.
    pub fn is_reached(&self, ino: u64, data_seq: u64) -> bool {
        self.reached.get(&ino) == Some(&data_seq)
    }

    /// Notes in the file.
    pub fn len(&self) -> usize {
        self.length
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Drops those of other inodes, and what later ones made useless. Until it returns a crash may lose all: then what is staged of
    /// files that were committed in part is kept aside, not stored.
    pub fn keep(&mut self, is_staged: impl Fn(u64) -> bool) -> io::Result<()> {
        self.reached.retain(|ino, _| is_staged(*ino));
        self.proposed.retain(|ino, _| is_staged(*ino));
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.length = 0;
        let reached = self.reached.iter();
        let mut kept: Vec<_> = reached
            .map(|(ino, data_seq)| encoded(*ino, 0, 0, *data_seq))
            .collect();
        for (ino, places) in &self.proposed {
            kept.extend(
                places
                    .iter()
                    .map(|place| encoded(*ino, place.segment, place.frame, place.shift)),
            );
        }
        let written = self.append(&kept, true);
        if written.is_err() {
            // What the file does not say must be said again before it is relied upon.
            self.reached.clear();
            self.proposed.clear();
        }
        written
    }

    /// Nothing is staged any more.
    pub fn clear(&mut self) {
        if self.is_empty() {
            return;
        }
        self.proposed.clear();
        self.reached.clear();
        let emptied = self
            .file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)).map(drop));
        match emptied {
            Ok(()) => self.length = 0,
            // They only grow; what they say stays true.
            Err(error) => {
                tracing::warn!(%error, "the notes of the staging folder were not emptied");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(segment: u64, offset: u64) -> Place {
        let extent = v1::Extent {
            segment,
            frame: 4,
            offset,
            frame_offset: 1000,
            ..v1::Extent::default()
        };
        Place::of(&extent).unwrap()
    }

    #[test]
    fn notes_survive_and_a_torn_one_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes");
        let (first, second, other) = (place(10, 0), place(11, 5000), place(20, 0));
        let mut notes = Notes::open(&path, false).unwrap();
        notes.propose(&[(1, first), (2, other)]).unwrap();
        notes.propose(&[(1, first), (1, second)]).unwrap();
        drop(notes);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 3 * NOTE_BYTES, "each once");
        std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        let mut notes = Notes::open(&path, false).unwrap();
        assert!(notes.is_proposed(1, first) && notes.is_proposed(2, other));
        assert!(!notes.is_proposed(1, second));
        notes.propose(&[(3, other)]).unwrap();
        drop(notes);
        let mut notes = Notes::open(&path, false).unwrap();
        assert!(notes.is_proposed(3, other) && !notes.is_proposed(1, other));
        notes.clear();
        drop(notes);
        assert!(!Notes::open(&path, false).unwrap().is_proposed(3, other));
    }

    #[test]
    fn a_place_is_told_from_another_one_of_the_same_bytes() {
        let at = |offset, frame_offset| {
            Place::of(&v1::Extent {
                segment: 7,
                frame: 1,
                offset,
                frame_offset,
                ..v1::Extent::default()
            })
        };
        // What is left of an extent after others wrote over parts of it.
        assert_eq!(at(5000, 100), at(5500, 600));
        assert_ne!(at(5000, 100), at(9000, 100));
        // A file's beginning may come from the middle of a frame.
        assert_eq!(at(0, 100), at(50, 150));
        assert_eq!(Place::of(&v1::Extent::default()), None);
    }

    #[test]
    fn what_was_answered_is_known_by_what_it_led_to_and_by_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes");
        let (first, second) = (place(10, 0), place(11, 5000));
        let mut notes = Notes::open(&path, false).unwrap();
        notes.propose(&[(1, first), (2, first)]).unwrap();
        notes.reach(&[(1, 77)]).unwrap();
        notes.propose(&[(1, second)]).unwrap();
        let check = |notes: &Notes| {
            assert!(notes.is_reached(1, 77) && !notes.is_reached(2, 77));
            assert!(!notes.is_proposed(1, first), "a copy of it is not ours");
            assert!(notes.is_proposed(1, second) && notes.is_proposed(2, first));
        };
        check(&notes);
        drop(notes);
        let mut notes = Notes::open(&path, false).unwrap();
        check(&notes);
        notes.keep(|_| true).unwrap();
        check(&notes);
        drop(notes);
        let mut notes = Notes::open(&path, false).unwrap();
        assert_eq!(notes.len(), 3);
        check(&notes);
        notes.reach(&[(1, 80)]).unwrap();
        assert!(notes.is_reached(1, 80) && !notes.is_reached(1, 77));
        notes.keep(|ino| ino == 2).unwrap();
        assert!(!notes.is_reached(1, 80) && notes.is_proposed(2, first));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), NOTE_BYTES as u64);
    }
}

//! What is in a staging folder, without taking it: for people who look at what was kept aside.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use blockstore::SegmentStore;
use bytes::Bytes;

use super::record::Header;
use super::{ASIDE, load, names, number_of, read_record};

/// A record's file.
#[derive(Debug)]
pub struct Found {
    /// The record's number, unique in its folder.
    pub number: u64,
    /// Its file.
    pub path: PathBuf,
    /// It was put aside: no mount will store it.
    pub aside: bool,
    /// What the file takes.
    pub file_bytes: u64,
    /// When it was written.
    pub since: SystemTime,
    /// Where its data belongs, or why that can't be read.
    pub header: Result<Header, String>,
}

/// The records of a folder, those that were put aside too, ascending by number. None when the folder is missing.
///
/// Errors: the folder can't be read.
pub fn list(folder: &Path) -> io::Result<Vec<Found>> {
    let mut all = Vec::new();
    for (directory, aside) in [(folder.to_owned(), false), (folder.join(ASIDE), true)] {
        for name in names(&directory)? {
            let Some(number) = number_of(&name) else {
                continue;
            };
            let path = directory.join(name);
            let stat = match fs::metadata(&path) {
                // Stored meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                stat => stat?,
            };
            let header = File::open(&path)
                .map_err(|error| error.to_string())
                .and_then(|mut file| Header::read(&mut file));
            all.push(Found {
                number,
                path,
                aside,
                file_bytes: stat.len(),
                since: stat.modified()?,
                header,
            });
        }
    }
    all.sort_by_key(|found| found.number);
    Ok(all)
}

/// Whether a mount uses the folder now.
///
/// Errors: the folder's lock can't be opened.
pub fn is_in_use(folder: &Path) -> io::Result<bool> {
    let lock = match File::open(folder.join("lock")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        lock => lock?,
    };
    match lock.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// A record's data: offset in the file and bytes, in the order in which they were written down. Every byte is checked. Holds the
/// whole record in memory, about 32 MiB.
///
/// Errors: what is wrong with it; `store` must be the volume's, with its key.
pub fn data(path: &Path, store: &SegmentStore) -> Result<Vec<(u64, Bytes)>, String> {
    let (header, record) = read_record(path, store)?;
    let mut parts = Vec::with_capacity(header.ranges.len());
    let mut at = 0;
    for (offset, length) in header.ranges {
        let bytes = load(store, &record, at, length as usize).map_err(|error| error.to_string())?;
        at += length;
        parts.push((offset, bytes));
    }
    Ok(parts)
}

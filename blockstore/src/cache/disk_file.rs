//! One file of the disk tier: a header, and a run of pages exactly as they lie in the object, their headers included.
//! docs/FORMAT.md holds the byte map. Written beside its name and renamed, never synced: a torn file fails verification.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use heliofs_proto::ids::SegmentId;

use crate::FrameNumber;
use crate::segment::layout::PAGE_HEADER_BYTES;
use crate::segment::page::{Page, PageIdentity, page_bytes_at, take_page};

/// The file's first bytes.
const MAGIC: [u8; 8] = *b"HELIOPG1";
const HEADER_BYTES: usize = 32;

/// Names a file of the tier: pages `[first, first + count)` of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(super) struct RunKey {
    pub(super) segment: SegmentId,
    pub(super) frame: FrameNumber,
    pub(super) first: u32,
    pub(super) count: u32,
}

impl RunKey {
    /// `<2 hex>/<segment>-<frame>-<first>-<count>`, all hex.
    pub(super) fn path(&self, directory: &Path) -> PathBuf {
        directory
            .join(format!("{:02x}", self.segment.0 & 0xff))
            .join(format!(
                "{:016x}-{:08x}-{:04x}-{:04x}",
                self.segment.0, self.frame.0, self.first, self.count
            ))
    }

    /// The key whose file has this name.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let mut parts = name
            .split('-')
            .map(|part| (part.len(), u64::from_str_radix(part, 16)));
        let mut next = |length: usize| match parts.next() {
            Some((found, Ok(value))) if found == length => Some(value),
            _ => None,
        };
        let key = Self {
            segment: SegmentId(next(16)?),
            frame: FrameNumber(next(8)? as u32),
            first: next(4)? as u32,
            count: next(4)? as u32,
        };
        parts.next().is_none().then_some(key)
    }

    pub(super) fn pages(&self) -> Range<u32> {
        self.first..self.first + self.count
    }
}

/// Writes `raw`, the pages of `key`, whose headers carry `origin`; returns the file's length.
pub(super) fn write(
    directory: &Path,
    key: &RunKey,
    origin: &PageIdentity,
    raw: &[u8],
) -> io::Result<u64> {
    let path = key.path(directory);
    let beside = path.with_extension("tmp");
    let mut header = [0; HEADER_BYTES];
    header[0..8].copy_from_slice(&MAGIC);
    header[8..16].copy_from_slice(&origin.segment.0.to_le_bytes());
    header[16..20].copy_from_slice(&origin.frame.0.to_le_bytes());
    header[20..24].copy_from_slice(&origin.volume.0.to_le_bytes());
    let mut sum = crc32fast::Hasher::new();
    sum.update(&header[..28]);
    // The name is part of what is summed: a file under another's name is refused.
    sum.update(&key.segment.0.to_le_bytes());
    sum.update(&key.frame.0.to_le_bytes());
    sum.update(&key.first.to_le_bytes());
    header[28..32].copy_from_slice(&sum.finalize().to_le_bytes());
    let create = || File::create(&beside);
    let written = create()
        .or_else(|error| match (error.kind(), beside.parent()) {
            (io::ErrorKind::NotFound, Some(parent)) => {
                std::fs::create_dir_all(parent)?;
                create()
            }
            _ => Err(error),
        })
        .and_then(|mut file| {
            file.write_all(&header)?;
            file.write_all(raw)?;
            std::fs::rename(&beside, &path)
        });
    if let Err(error) = written {
        // Most likely the disk is full; what is left of the file would only make that worse.
        if let Err(left) = std::fs::remove_file(&beside)
            && left.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(path = %beside.display(), error = %left, "a torn cache file stays until the next start");
        }
        return Err(error);
    }
    Ok((HEADER_BYTES + raw.len()) as u64)
}

/// What reading a file came to.
#[derive(Debug)]
pub(super) enum Found {
    /// Every page that was asked for, verified.
    Pages(Vec<Page>),
    /// The file is gone: evicted meanwhile, or removed by a person.
    Gone,
    /// The file is not what it should be.
    Corrupt(String),
}

/// Reads `pages`, which lie within the run, of volume `volume`.
pub(super) fn read(
    directory: &Path,
    key: &RunKey,
    volume: heliofs_proto::ids::VolumeId,
    pages: Range<u32>,
) -> Found {
    let read = || -> io::Result<Found> {
        let file = File::open(key.path(directory))?;
        // The first page's header comes along: it says how long the pages are.
        let mut front = [0; HEADER_BYTES + PAGE_HEADER_BYTES];
        file.read_exact_at(&mut front, 0)?;
        let (header, page_header) = front.split_at(HEADER_BYTES);
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let mut sum = crc32fast::Hasher::new();
        sum.update(&header[..28]);
        sum.update(&key.segment.0.to_le_bytes());
        sum.update(&key.frame.0.to_le_bytes());
        sum.update(&key.first.to_le_bytes());
        if header[0..8] != MAGIC || sum.finalize() != word(28) || word(20) != volume.0 {
            return Ok(Found::Corrupt("its header is wrong".to_owned()));
        }
        let origin = PageIdentity {
            volume,
            segment: SegmentId(u64::from(word(12)) << 32 | u64::from(word(8))),
            frame: FrameNumber(word(16)),
        };
        let Some(page_bytes) = page_bytes_at(page_header) else {
            return Ok(Found::Corrupt(
                "no page begins behind its header".to_owned(),
            ));
        };
        let stride = PAGE_HEADER_BYTES + page_bytes;
        let at = HEADER_BYTES as u64 + u64::from(pages.start - key.first) * stride as u64;
        let want = (pages.end - pages.start) as usize * stride;
        let left = file.metadata()?.len().saturating_sub(at).min(want as u64) as usize;
        let mut raw = vec![0; left];
        file.read_exact_at(&mut raw, at)?;
        let mut raw = Bytes::from(raw);
        let mut found = Vec::with_capacity((pages.end - pages.start) as usize);
        for page in pages.clone() {
            match take_page(&mut raw, &origin, page) {
                Ok(page) => found.push(page),
                Err(fault) => return Ok(Found::Corrupt(format!("page {page}: {fault}"))),
            }
        }
        Ok(Found::Pages(found))
    };
    match read() {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Found::Gone,
        Err(error) => Found::Corrupt(error.to_string()),
    }
}

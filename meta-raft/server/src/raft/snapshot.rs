//! Snapshots in transit: a checkpoint's files, in chunks with checksums.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use heliofs_proto::v1;

use super::types::{SnapshotMeta, Vote};
use super::wire;

/// Data of one chunk: well below the largest gRPC message.
const CHUNK_BYTES: usize = 1 << 20;

/// A directory with a checkpoint of the state. Removed with the last handle, unless it became the state.
#[derive(Clone, Debug)]
pub struct SnapshotData(Arc<Directory>);

#[derive(Debug)]
struct Directory {
    path: PathBuf,
    temporary: AtomicBool,
}

impl SnapshotData {
    /// Takes over a directory.
    pub fn temporary(path: PathBuf) -> Self {
        Self(Arc::new(Directory {
            path,
            temporary: AtomicBool::new(true),
        }))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The directory is somebody else's now.
    pub fn keep(&self) {
        self.0.temporary.store(false, Ordering::Release);
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if *self.temporary.get_mut()
            && let Err(error) = std::fs::remove_dir_all(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            // The next start of the node removes it.
            tracing::warn!(path = %self.path.display(), %error, "a snapshot's directory stays");
        }
    }
}

/// What the first chunk says.
pub(super) fn header(vote: &Vote, meta: &SnapshotMeta) -> v1::SnapshotHeader {
    v1::SnapshotHeader {
        vote: Some(wire::vote_to_wire(vote)),
        last_log_id: meta.last_log_id.map(wire::log_id_to_wire),
        membership_log_id: (*meta.last_membership.log_id()).map(wire::log_id_to_wire),
        membership: Some(wire::membership_to_wire(meta.last_membership.membership())),
        snapshot_id: meta
            .last_log_id
            .map_or_else(String::new, |log_id| log_id.to_string()),
    }
}

/// Reads a checkpoint as chunks, calling `send` with each; stops when `send` says so by returning false. Blocks.
pub(super) fn read_chunks(
    path: &Path,
    header: v1::SnapshotHeader,
    mut send: impl FnMut(v1::SnapshotChunk) -> bool,
) -> io::Result<bool> {
    let first = v1::SnapshotChunk {
        header: Some(header),
        ..v1::SnapshotChunk::default()
    };
    if !send(first) {
        return Ok(false);
    }
    let mut names: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name().into_string();
        let name = name.map_err(|name| io::Error::other(format!("a file named {name:?}")))?;
        // RocksDB keeps a checkpoint's files in one flat directory; LOCK and LOG are the reader's.
        if entry.file_type()?.is_file() && name != "LOCK" && !name.starts_with("LOG") {
            names.push(name);
        }
    }
    names.sort();
    for name in names {
        let mut file = File::open(path.join(&name))?;
        let mut begun = false;
        loop {
            let mut data = Vec::with_capacity(CHUNK_BYTES);
            (&mut file)
                .take(CHUNK_BYTES as u64)
                .read_to_end(&mut data)?;
            let end = data.len() < CHUNK_BYTES;
            if begun && data.is_empty() {
                break;
            }
            let chunk = v1::SnapshotChunk {
                file: if begun { String::new() } else { name.clone() },
                crc32: crc32fast::hash(&data),
                data: Bytes::from(data),
                ..v1::SnapshotChunk::default()
            };
            if !send(chunk) {
                return Ok(false);
            }
            begun = true;
            if end {
                break;
            }
        }
    }
    Ok(send(v1::SnapshotChunk {
        last: true,
        ..v1::SnapshotChunk::default()
    }))
}

/// Writes chunks to a directory. Until it becomes the state nothing refers to it, and the next start removes it.
pub(super) struct Receiver {
    directory: SnapshotData,
    file: Option<File>,
    /// The last chunk came: the snapshot is whole.
    complete: bool,
}

impl Receiver {
    /// Into `path`, which exists and is empty.
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            directory: SnapshotData::temporary(path),
            file: None,
            complete: false,
        }
    }

    /// Writes one chunk. Blocks.
    pub(super) fn chunk(&mut self, chunk: &v1::SnapshotChunk) -> io::Result<()> {
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
        if self.complete {
            return Err(bad("a chunk after the last one"));
        }
        if chunk.last {
            self.file = None;
            self.complete = true;
            return Ok(());
        }
        if crc32fast::hash(&chunk.data) != chunk.crc32 {
            return Err(bad("a chunk's checksum is wrong"));
        }
        if !chunk.file.is_empty() {
            let name = Path::new(&chunk.file);
            let mut parts = name.components();
            let (Some(Component::Normal(name)), None) = (parts.next(), parts.next()) else {
                return Err(bad("a file outside the snapshot"));
            };
            self.file = Some(File::create_new(self.directory.path().join(name))?);
        }
        let file = self.file.as_mut().ok_or_else(|| bad("data of no file"))?;
        file.write_all(&chunk.data)
    }

    /// The directory, once all of it came.
    pub(super) fn finish(self) -> io::Result<SnapshotData> {
        if self.complete {
            Ok(self.directory)
        } else {
            Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the snapshot is not whole",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_arrive_as_they_were_and_a_flipped_bit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        std::fs::create_dir(&source).unwrap();
        std::fs::write(source.join("empty"), b"").unwrap();
        std::fs::write(source.join("exact"), vec![7; CHUNK_BYTES]).unwrap();
        std::fs::write(source.join("long"), vec![9; 2 * CHUNK_BYTES + 1]).unwrap();
        let mut chunks = Vec::new();
        let sent = read_chunks(&source, v1::SnapshotHeader::default(), |chunk| {
            chunks.push(chunk);
            true
        });
        assert!(sent.unwrap());

        let target = dir.path().join("target");
        std::fs::create_dir(&target).unwrap();
        let mut receiver = Receiver::new(target.clone());
        for chunk in &chunks[1..] {
            receiver.chunk(chunk).unwrap();
        }
        let received = receiver.finish().unwrap();
        for name in ["empty", "exact", "long"] {
            let [a, b] = [&source, &target].map(|dir| std::fs::read(dir.join(name)).unwrap());
            assert!(a == b, "{name}");
        }
        drop(received);
        assert!(
            !target.exists(),
            "a snapshot that nobody installed is removed"
        );

        std::fs::create_dir(&target).unwrap();
        let mut receiver = Receiver::new(target.clone());
        let mut bad = chunks[2].clone();
        bad.crc32 ^= 1;
        assert!(receiver.chunk(&bad).is_err());
        bad = chunks[2].clone();
        bad.file = "../escaped".to_owned();
        assert!(receiver.chunk(&bad).is_err());
        assert!(receiver.finish().is_err(), "not whole");
    }
}

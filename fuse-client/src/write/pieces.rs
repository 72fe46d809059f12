//! Written bytes of one file that are not committed yet; pure.
//!
//! Non-overlapping pieces by file offset. A piece is *open* (grows, may be overwritten in place), *frozen* (its bytes are
//! shared with an upload), and gone once a commit names it. Writing over a frozen piece cuts it: what is left of it still
//! belongs to its upload, so that a commit publishes exactly the newest bytes. Bytes stay in memory, or in a record of the
//! staging folder ([`super::staging`]), until they are committed, so that reads never depend on an upload and an upload can be
//! repeated under another segment id.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use blockstore::segment::layout::PAGE_BYTES;
use bytes::Bytes;
use heliofs_proto::limits::FRAME_BYTES_MAX;

use super::staging::StagedRecord;

/// What the kernel reads at least, and from multiples of it.
pub const FILE_PAGE_BYTES: u64 = 4096;

/// Which upload a frozen piece is part of, and where it lies in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sent {
    /// The upload.
    pub batch: u64,
    /// The frame, by its place in the batch.
    pub frame: usize,
    /// First byte within the frame, behind its [`Frame::lead`].
    pub frame_offset: u32,
}

/// Where bytes lie in the staging folder.
#[derive(Clone, Debug)]
pub struct StagedAt {
    /// The record.
    pub record: Arc<StagedRecord>,
    /// First byte within the record's data.
    pub offset: u64,
}

/// Bytes that don't change any more: in memory, in a staged record, or in both.
#[derive(Clone, Debug)]
pub struct Held {
    bytes: Option<Bytes>,
    length: usize,
    staged: Option<StagedAt>,
}

impl From<Bytes> for Held {
    fn from(bytes: Bytes) -> Self {
        Self {
            length: bytes.len(),
            bytes: Some(bytes),
            staged: None,
        }
    }
}

impl Held {
    /// Bytes that are in a record only.
    fn staged(at: StagedAt, length: usize) -> Self {
        Self {
            bytes: None,
            length,
            staged: Some(at),
        }
    }

    /// Their number.
    pub fn len(&self) -> usize {
        self.length
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The bytes, unless they are in a record only.
    pub fn bytes(&self) -> Option<&Bytes> {
        self.bytes.as_ref()
    }

    /// Where to load them from.
    pub fn place(&self) -> Option<&StagedAt> {
        self.staged.as_ref()
    }

    /// Leaves them to the record, if that is written.
    pub fn release(&mut self) {
        if self.is_safe() {
            self.bytes = None;
        }
    }

    /// They are in a record that survives a crash.
    fn is_safe(&self) -> bool {
        self.staged
            .as_ref()
            .is_some_and(|at| at.record.is_written())
    }

    fn memory(&self) -> u64 {
        self.bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)
    }

    /// Everything from `at` on, split off.
    fn split_off(&mut self, at: usize) -> Self {
        let rest = Self {
            bytes: self.bytes.as_mut().map(|bytes| bytes.split_off(at)),
            length: self.length - at,
            staged: self.staged.as_ref().map(|staged| StagedAt {
                record: staged.record.clone(),
                offset: staged.offset + at as u64,
            }),
        };
        self.length = at;
        rest
    }

    /// Everything before `at`, split off.
    fn split_to(&mut self, at: usize) -> Self {
        let rest = self.split_off(at);
        std::mem::replace(self, rest)
    }

    /// A part of them.
    fn slice(&self, range: Range<usize>) -> Self {
        let mut part = self.clone();
        part.split_off(range.end);
        part.split_off(range.start)
    }
}

#[derive(Clone, Debug)]
enum Content {
    Open(Vec<u8>),
    Frozen { held: Held, sent: Option<Sent> },
}

impl Content {
    fn len(&self) -> u64 {
        match self {
            Self::Open(bytes) => bytes.len() as u64,
            Self::Frozen { held, .. } => held.len() as u64,
        }
    }

    fn memory(&self) -> u64 {
        match self {
            Self::Open(bytes) => bytes.len() as u64,
            Self::Frozen { held, .. } => held.memory(),
        }
    }

    fn is_safe(&self) -> bool {
        match self {
            Self::Open(_) => false,
            Self::Frozen { held, .. } => held.is_safe(),
        }
    }

    /// Everything from `at` on, split off.
    fn split_off(&mut self, at: usize) -> Self {
        match self {
            Self::Open(bytes) => Self::Open(bytes.split_off(at)),
            Self::Frozen { held, sent } => Self::Frozen {
                held: held.split_off(at),
                sent: sent.map(|sent| Sent {
                    frame_offset: sent.frame_offset + at as u32,
                    ..sent
                }),
            },
        }
    }
}

/// A run of bytes that the caller uploads as one frame.
#[derive(Clone, Debug)]
pub struct Frame {
    /// File offset of its first byte.
    pub offset: u64,
    /// Its bytes, end to end.
    pub pieces: Vec<Held>,
    /// Sum of the pieces' lengths.
    pub length: u64,
}

/// Pieces that are in memory, end to end. Those that are not are left out: ask [`Frame::is_in_memory`].
pub fn concat(pieces: &[Held]) -> Vec<u8> {
    let bytes: Vec<&[u8]> = pieces
        .iter()
        .filter_map(|held| held.bytes().map(|b| &b[..]))
        .collect();
    bytes.concat()
}

impl Frame {
    /// Zeros that are stored in front of its bytes, so that a page of the file is within one page of the frame: a read of 4 KiB
    /// fetches no second one. None where the frame has a single page.
    pub fn lead(&self) -> u32 {
        let lead = self.offset % FILE_PAGE_BYTES;
        let several = self.length > PAGE_BYTES as u64 && self.length + lead <= FRAME_BYTES_MAX;
        if several { lead as u32 } else { 0 }
    }

    /// Nothing of it has to be loaded.
    pub fn is_in_memory(&self) -> bool {
        self.pieces.iter().all(|held| held.bytes().is_some())
    }

    /// Bytes of memory that it keeps.
    pub fn memory(&self) -> u64 {
        self.pieces.iter().map(Held::memory).sum()
    }
}

/// A piece of a batch, as a commit names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SentPiece {
    /// File offset.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Where it was sent.
    pub sent: Sent,
}

/// Uncommitted bytes of one file.
#[derive(Debug, Default)]
pub struct Pieces {
    map: BTreeMap<u64, Content>,
    bytes: u64,
    /// Those of `bytes` that are in memory.
    memory: u64,
    /// Records of which something was overwritten by bytes that are in no record and not committed either: after a crash the
    /// older bytes count.
    hidden: Vec<Arc<StagedRecord>>,
    /// How often frozen bytes were overwritten.
    overwrites: u64,
}

/// What [`Pieces::visit`] sees.
#[derive(Debug)]
pub enum Seen<'a> {
    /// Bytes in memory.
    Bytes(&'a [u8]),
    /// Bytes in a record.
    Staged(Held),
}

impl Seen<'_> {
    /// Their number.
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Staged(held) => held.len(),
        }
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Pieces {
    /// Nothing is waiting.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes held in memory.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// Number of pieces.
    pub fn count(&self) -> usize {
        self.map.len()
    }

    /// One past the last byte; 0 when empty.
    pub fn end(&self) -> u64 {
        self.map
            .last_key_value()
            .map_or(0, |(offset, content)| offset + content.len())
    }

    /// Puts `data` at `offset`, over whatever was there. Returns the length of the open piece that it went into, so that the
    /// caller notices a full one.
    pub fn write(&mut self, offset: u64, data: &[u8], piece_bytes_max: usize) -> usize {
        if data.is_empty() {
            return 0;
        }
        let end = offset + data.len() as u64;
        // In place, the most frequent overwrite: the same block again, or a part of an open run.
        if let Some((start, Content::Open(bytes))) = self.map.range_mut(..=offset).next_back() {
            let at = (offset - start) as usize;
            if at < bytes.len() && at + data.len() <= bytes.len() {
                bytes[at..at + data.len()].copy_from_slice(data);
                return bytes.len();
            }
        }
        self.cut(offset..end);
        self.bytes += data.len() as u64;
        self.memory += data.len() as u64;
        // Appending to an open run, the most frequent write of all.
        if let Some((start, Content::Open(bytes))) = self.map.range_mut(..offset).next_back()
            && start + bytes.len() as u64 == offset
            && bytes.len() + data.len() <= piece_bytes_max
        {
            if bytes.capacity() < bytes.len() + data.len() {
                let doubled = (bytes.capacity() * 2).min(piece_bytes_max);
                bytes.reserve_exact(doubled.max(bytes.len() + data.len()) - bytes.len());
            }
            bytes.extend_from_slice(data);
            return bytes.len();
        }
        let length = data.len();
        self.map.insert(offset, Content::Open(data.to_vec()));
        length
    }

    /// Drops what lies in `range`.
    pub fn cut(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        // A piece that begins before the range and reaches into it: keep its head, and its tail if it reaches beyond.
        if let Some((&start, content)) = self.map.range_mut(..range.start).next_back() {
            let end = start + content.len();
            if end > range.start {
                let mut rest = content.split_off((range.start - start) as usize);
                if end > range.end {
                    let tail = rest.split_off((range.end - range.start) as usize);
                    self.map.insert(range.end, tail);
                }
                self.gone(&rest);
            }
        }
        let inside: Vec<u64> = self.map.range(range.clone()).map(|(&at, _)| at).collect();
        for start in inside {
            let Some(mut content) = self.map.remove(&start) else {
                continue;
            };
            let end = start + content.len();
            if end > range.end {
                let tail = content.split_off((range.end - start) as usize);
                self.map.insert(range.end, tail);
            }
            self.gone(&content);
        }
    }

    /// `content` was cut out.
    fn gone(&mut self, content: &Content) {
        self.bytes -= content.len();
        self.memory -= content.memory();
        let Content::Frozen { held, .. } = content else {
            return;
        };
        self.overwrites += 1;
        if let Some(at) = held.place() {
            self.hide(vec![at.record.clone()]);
        }
    }

    /// Takes bytes of a record, over whatever is there.
    pub fn put_staged(&mut self, offset: u64, at: StagedAt, length: u64) {
        self.cut(offset..offset + length);
        self.bytes += length;
        let held = Held::staged(at, length as usize);
        self.map
            .insert(offset, Content::Frozen { held, sent: None });
    }

    /// From now on nothing is written into what is here.
    pub fn freeze_open(&mut self) {
        for content in self.map.values_mut() {
            if let Content::Open(open) = content {
                let held = Bytes::from(std::mem::take(open)).into();
                *content = Content::Frozen { held, sent: None };
            }
        }
    }

    /// Takes frozen bytes that are in no record, some `bytes_max` of them, and notes that they will be in `record`. Shape: file
    /// offset and bytes, in the order of the record's data.
    pub fn assign(&mut self, record: &Arc<StagedRecord>, bytes_max: u64) -> Vec<(u64, Bytes)> {
        let mut assigned = Vec::new();
        let mut total = 0;
        for (&offset, content) in &mut self.map {
            let Content::Frozen { held, .. } = content else {
                continue;
            };
            let (Some(bytes), None) = (&held.bytes, &held.staged) else {
                continue;
            };
            assigned.push((offset, bytes.clone()));
            held.staged = Some(StagedAt {
                record: record.clone(),
                offset: total,
            });
            total += held.length as u64;
            if total >= bytes_max {
                break;
            }
        }
        assigned
    }

    /// `record` could not be written: what was to be in it is in none.
    pub fn unassign(&mut self, record: &Arc<StagedRecord>) {
        for content in self.map.values_mut() {
            if let Content::Frozen { held, .. } = content
                && held
                    .staged
                    .as_ref()
                    .is_some_and(|at| Arc::ptr_eq(&at.record, record))
            {
                held.staged = None;
            }
        }
        self.hidden.retain(|hidden| !Arc::ptr_eq(hidden, record));
    }

    /// Leaves to the records what is in them. Returns how many bytes of memory that gave back.
    pub fn release(&mut self) -> u64 {
        let before = self.memory;
        for content in self.map.values_mut() {
            if let Content::Frozen { held, .. } = content {
                let memory = held.memory();
                held.release();
                self.memory -= memory - held.memory();
            }
        }
        before - self.memory
    }

    /// Something would not survive a crash.
    pub fn has_unsafe(&self) -> bool {
        self.map.values().any(|content| !content.is_safe())
    }

    /// Takes the list of records of which something was overwritten by bytes that were not safe; the caller makes those bytes
    /// safe, or gives the list back.
    pub fn take_hidden(&mut self) -> Vec<Arc<StagedRecord>> {
        std::mem::take(&mut self.hidden)
    }

    /// See [`Pieces::take_hidden`].
    pub fn hide(&mut self, records: Vec<Arc<StagedRecord>>) {
        for record in records {
            let known = |hidden: &Arc<StagedRecord>| Arc::ptr_eq(hidden, &record);
            if !self.hidden.iter().any(known) {
                self.hidden.push(record);
            }
        }
    }

    /// Changes whenever frozen bytes are overwritten.
    pub fn overwrites(&self) -> u64 {
        self.overwrites
    }

    /// The parts of pieces in `range`, in file order.
    pub fn visit(&self, range: Range<u64>, mut see: impl FnMut(u64, Seen<'_>)) {
        if range.start >= range.end {
            return;
        }
        let first = self
            .map
            .range(..=range.start)
            .next_back()
            .map_or(range.start, |(&at, _)| at);
        for (&start, content) in self.map.range(first..range.end) {
            let from = range.start.max(start);
            let to = range.end.min(start + content.len());
            if from >= to {
                continue;
            }
            let part = (from - start) as usize..(to - start) as usize;
            match content {
                Content::Open(bytes) => see(from, Seen::Bytes(&bytes[part])),
                Content::Frozen { held, .. } => match held.bytes() {
                    Some(bytes) => see(from, Seen::Bytes(&bytes[part])),
                    None => see(from, Seen::Staged(held.slice(part))),
                },
            }
        }
    }

    /// Freezes every piece that belongs to no upload and hands the bytes out as batches of frames: contiguous bytes are one
    /// frame, a frame has at most `batch_bytes_max` bytes, and so has a batch. With `full_only`, only open runs of at least
    /// that size are taken.
    pub fn freeze(
        &mut self,
        batch_bytes_max: u64,
        frames_max: usize,
        full_only: bool,
        mut next_batch: impl FnMut() -> u64,
    ) -> Vec<(u64, Vec<Frame>)> {
        let mut batches: Vec<(u64, Vec<Frame>)> = Vec::new();
        let mut room = 0;
        let mut splits = Vec::new();
        for (&start, content) in &mut self.map {
            if full_only
                && !matches!(content, Content::Open(bytes) if bytes.len() as u64 >= batch_bytes_max)
            {
                continue;
            }
            let held = match content {
                Content::Open(open) => Held::from(Bytes::from(std::mem::take(open))),
                Content::Frozen { held, sent: None } => held.clone(),
                Content::Frozen { .. } => continue,
            };
            let mut at = start;
            let mut left = held;
            let mut parts = Vec::new();
            while !left.is_empty() {
                let continues = batches
                    .last()
                    .and_then(|(_, frames)| frames.last())
                    .is_some_and(|frame| frame.offset + frame.length == at);
                let full = batches
                    .last()
                    .is_none_or(|(_, frames)| frames.len() >= frames_max && !continues);
                if room == 0 || full {
                    batches.push((next_batch(), Vec::new()));
                    room = batch_bytes_max;
                }
                let part = left.split_to(left.len().min(room as usize));
                room -= part.len() as u64;
                let (batch, frames) = batches.last_mut().expect("one was pushed above");
                let extends = frames
                    .last()
                    .is_some_and(|frame| frame.offset + frame.length == at);
                if !extends {
                    frames.push(Frame {
                        offset: at,
                        pieces: Vec::new(),
                        length: 0,
                    });
                }
                let index = frames.len() - 1;
                let frame = &mut frames[index];
                let sent = Sent {
                    batch: *batch,
                    frame: index,
                    frame_offset: frame.length as u32,
                };
                frame.length += part.len() as u64;
                frame.pieces.push(part.clone());
                at += part.len() as u64;
                parts.push((at - part.len() as u64, part, sent));
            }
            let mut parts = parts.into_iter();
            if let Some((_, held, sent)) = parts.next() {
                *content = Content::Frozen {
                    held,
                    sent: Some(sent),
                };
            }
            splits.extend(parts);
        }
        for (at, held, sent) in splits {
            self.map.insert(
                at,
                Content::Frozen {
                    held,
                    sent: Some(sent),
                },
            );
        }
        batches
    }

    /// What is left of the given batch's pieces, in file order.
    pub fn of_batch(&self, batch: u64) -> Vec<SentPiece> {
        self.map
            .iter()
            .filter_map(|(&offset, content)| match content {
                Content::Frozen {
                    held,
                    sent: Some(sent),
                } if sent.batch == batch => Some(SentPiece {
                    offset,
                    length: held.len() as u64,
                    sent: *sent,
                }),
                _ => None,
            })
            .collect()
    }

    /// The upload failed: its pieces wait for the next one.
    pub fn unsend(&mut self, batch: u64) {
        for content in self.map.values_mut() {
            if let Content::Frozen { sent, .. } = content
                && sent.is_some_and(|sent| sent.batch == batch)
            {
                *sent = None;
            }
        }
    }

    /// All uploads are of no use: every piece waits for another one.
    pub fn unsend_all(&mut self) {
        for content in self.map.values_mut() {
            if let Content::Frozen { sent, .. } = content {
                *sent = None;
            }
        }
    }

    /// These pieces of `batch` are committed: whatever of them was not overwritten since leaves the buffer. True when bytes of
    /// them were in no record: records that are older do not show what is committed.
    pub fn commit(&mut self, batch: u64, pieces: &[SentPiece]) -> bool {
        let mut beside = false;
        for piece in pieces {
            let range = piece.offset..piece.offset + piece.length;
            let gone: Vec<u64> = self
                .map
                .range(range)
                .filter(|(_, content)| {
                    matches!(content, Content::Frozen { sent: Some(sent), .. } if sent.batch == batch)
                })
                .map(|(&at, _)| at)
                .collect();
            for at in gone {
                if let Some(content) = self.map.remove(&at) {
                    self.bytes -= content.len();
                    self.memory -= content.memory();
                    beside |= !content.is_safe();
                }
            }
        }
        beside
    }

    /// Something belongs to no upload yet.
    pub fn has_unsent(&self) -> bool {
        self.map.values().any(|content| {
            matches!(
                content,
                Content::Open(_) | Content::Frozen { sent: None, .. }
            )
        })
    }

    /// Forgets everything; the data is lost.
    pub fn clear(&mut self) {
        self.map.clear();
        self.hidden.clear();
        self.bytes = 0;
        self.memory = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The file as a byte array: `committed` is what the server has, `pieces` lie over it.
    #[derive(Default)]
    struct Model {
        expected: Vec<u8>,
        committed: Vec<u8>,
        pieces: Pieces,
        batches: u64,
        sent: Vec<(u64, Vec<Frame>)>,
    }

    const MAX: usize = 64;

    impl Model {
        fn write(&mut self, offset: usize, data: &[u8]) {
            let end = offset + data.len();
            if self.expected.len() < end {
                self.expected.resize(end, 0);
            }
            self.expected[offset..end].copy_from_slice(data);
            self.pieces.write(offset as u64, data, MAX);
        }

        fn truncate(&mut self, size: usize) {
            self.expected.resize(size, 0);
            self.committed.resize(size, 0);
            self.pieces.cut(size as u64..u64::MAX);
        }

        fn freeze(&mut self, full_only: bool) {
            let batches = &mut self.batches;
            let frozen = self.pieces.freeze(MAX as u64, 3, full_only, || {
                *batches += 1;
                *batches
            });
            for (_, frames) in &frozen {
                assert!(frames.len() <= 3);
                assert!(frames.iter().map(|frame| frame.length).sum::<u64>() <= MAX as u64);
            }
            self.sent.extend(frozen);
        }

        fn commit_oldest(&mut self) {
            if self.sent.is_empty() {
                return;
            }
            let (batch, frames) = self.sent.remove(0);
            let pieces = self.pieces.of_batch(batch);
            for piece in &pieces {
                let frame = concat(&frames[piece.sent.frame].pieces);
                let from = piece.sent.frame_offset as usize;
                let bytes = &frame[from..from + piece.length as usize];
                let end = (piece.offset + piece.length) as usize;
                if self.committed.len() < end {
                    self.committed.resize(end, 0);
                }
                self.committed[piece.offset as usize..end].copy_from_slice(bytes);
            }
            self.pieces.commit(batch, &pieces);
        }

        fn fail_oldest(&mut self) {
            if !self.sent.is_empty() {
                let (batch, _) = self.sent.remove(0);
                self.pieces.unsend(batch);
            }
        }

        fn check(&self) {
            let size = self.expected.len().max(self.committed.len());
            let mut seen = self.committed.clone();
            seen.resize(size, 0);
            let mut covered = 0;
            self.pieces.visit(0..size as u64, |at, part| {
                covered += part.len() as u64;
                let bytes = match part {
                    Seen::Bytes(bytes) => bytes.to_vec(),
                    Seen::Staged(held) => concat(&[held]),
                };
                seen[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
            });
            assert_eq!(seen, self.expected);
            assert_eq!(covered, self.pieces.bytes());
            assert!(self.pieces.end() <= size as u64);
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(usize, Vec<u8>),
        Truncate(usize),
        Freeze(bool),
        Commit,
        Fail,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..300usize, proptest::collection::vec(any::<u8>(), 1..90))
                .prop_map(|(at, data)| Step::Write(at, data)),
            1 => (0..300usize).prop_map(Step::Truncate),
            2 => any::<bool>().prop_map(Step::Freeze),
            2 => Just(Step::Commit),
            1 => Just(Step::Fail),
        ]
    }

    proptest! {
        #[test]
        fn a_file_reads_as_a_byte_array_whatever_is_in_flight(steps in proptest::collection::vec(step(), 1..60)) {
            let mut model = Model::default();
            for step in steps {
                match step {
                    Step::Write(at, data) => model.write(at, &data),
                    Step::Truncate(size) => model.truncate(size),
                    Step::Freeze(full_only) => model.freeze(full_only),
                    Step::Commit => model.commit_oldest(),
                    Step::Fail => model.fail_oldest(),
                }
                model.check();
            }
            model.freeze(false);
            prop_assert!(!model.pieces.has_unsent());
            while !model.sent.is_empty() {
                model.commit_oldest();
                model.check();
            }
            prop_assert!(model.pieces.is_empty());
            prop_assert_eq!(model.pieces.bytes(), 0);
            prop_assert_eq!(model.committed, model.expected);
        }
    }

    #[test]
    fn sequential_writes_make_one_frame() {
        let mut pieces = Pieces::default();
        assert_eq!(pieces.write(0, &[1; 10], MAX), 10);
        assert_eq!(pieces.write(10, &[2; 10], MAX), 20);
        let batches = pieces.freeze(MAX as u64, 8, false, || 1);
        assert_eq!(batches.len(), 1);
        assert_eq!(batches[0].1.len(), 1);
        assert_eq!(batches[0].1[0].length, 20);
    }

    #[test]
    fn a_write_over_a_sent_piece_leaves_only_the_rest_to_its_commit() {
        let mut pieces = Pieces::default();
        pieces.write(0, &[1; 30], MAX);
        pieces.freeze(MAX as u64, 8, false, || 7);
        pieces.write(10, &[2; 10], MAX);
        let rest = pieces.of_batch(7);
        assert_eq!(rest.len(), 2);
        assert_eq!((rest[1].offset, rest[1].sent.frame_offset), (20, 20));
        pieces.commit(7, &rest);
        assert_eq!((pieces.bytes(), pieces.count()), (10, 1));
    }
}

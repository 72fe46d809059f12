//! Content in the reference: what commits, punches and copies do to the bytes of files.

use std::collections::BTreeMap;
use std::rc::Rc;

use heliofs_proto::error::FsError;
use heliofs_proto::limits::SEGMENTS_PER_BLOCK;
use heliofs_proto::v1::{self, FileKind, Reply};

use crate::reference::{Node, Reference};
use crate::world::Byte;

fn regular(node: &Node) -> Result<(), FsError> {
    match node.kind {
        FileKind::File => Ok(()),
        FileKind::Directory => Err(FsError::IsDirectory),
        _ => Err(FsError::Invalid),
    }
}

fn grow(content: &mut Vec<Byte>, size: u64) {
    if content.len() < size as usize {
        content.resize(size as usize, Byte::Hole);
    }
}

fn listed(segments: &[v1::Segment]) -> BTreeMap<u64, (u64, u32)> {
    segments
        .iter()
        .map(|segment| (segment.id, (segment.length, segment.checksum)))
        .collect()
}

impl Reference {
    /// Bytes that files show and that are no holes.
    pub(crate) fn shown_bytes(&self) -> u64 {
        let bytes = self.nodes.values().flat_map(|node| node.content.iter());
        bytes.filter(|byte| **byte != Byte::Hole).count() as u64
    }

    pub(crate) fn relocate(
        &mut self,
        op: &v1::Relocate,
        session: u64,
        reply: &Reply,
    ) -> Result<(), FsError> {
        let listed = listed(&op.segments);
        let owned = |id: &u64| self.blocks.get(&(id / SEGMENTS_PER_BLOCK)) == Some(&session);
        let fenced = |id: &u64| {
            !owned(id)
                || match self.segments.get(id) {
                    Some(state) => state.is_none(),
                    None => !listed.contains_key(id),
                }
        };
        if op.moves.iter().any(|each| fenced(&each.to_segment)) {
            return Err(FsError::SegmentFenced);
        }
        let brought: Vec<_> = listed
            .iter()
            .filter(|(id, _)| owned(id) && !self.segments.contains_key(id))
            .map(|(id, what)| (*id, Some(*what)))
            .collect();
        self.segments.extend(brought);
        let mut moved = 0;
        for each in &op.moves {
            let Some(node) = self.nodes.get_mut(&each.ino) else {
                continue;
            };
            let content = Rc::make_mut(&mut node.content);
            for at in 0..each.length as u32 {
                let Some(byte) = content.get_mut((each.offset + u64::from(at)) as usize) else {
                    break;
                };
                let old = Byte::At(
                    each.from_segment,
                    each.from_frame,
                    each.from_frame_offset + at,
                );
                if *byte == old {
                    *byte = Byte::At(each.to_segment, each.to_frame, each.to_frame_offset + at);
                    moved += 1;
                }
            }
        }
        assert_eq!(reply.value, moved, "bytes moved");
        Ok(())
    }

    pub(crate) fn commit(&mut self, op: &v1::Commit, session: u64) -> Result<(), FsError> {
        if op.files.is_empty() {
            return Err(FsError::Invalid);
        }
        let listed = listed(&op.segments);
        let owned = |id: &u64| self.blocks.get(&(id / SEGMENTS_PER_BLOCK)) == Some(&session);
        for (id, what) in listed.iter().filter(|(id, _)| owned(id)) {
            if let Some(Some(stored)) = self.segments.get(id)
                && stored != what
            {
                return Err(FsError::Invalid);
            }
        }
        let fenced = |id: &u64| {
            !owned(id)
                || match self.segments.get(id) {
                    Some(Some(_)) => false,
                    Some(None) => true,
                    None => !listed.contains_key(id),
                }
        };
        for file in &op.files {
            let verdict = match self.nodes.get(&file.ino) {
                None => FsError::Stale,
                Some(node) => match regular(node) {
                    Err(error) => error,
                    Ok(()) if file.extents.iter().any(|extent| extent.length == 0) => {
                        FsError::Invalid
                    }
                    Ok(()) if file.base_seq.is_some() => FsError::Changed,
                    Ok(()) => {
                        let ids = file.extents.iter().map(|extent| extent.segment);
                        match ids.filter(|id| *id != 0).any(|id| fenced(&id)) {
                            true => FsError::SegmentFenced,
                            false => FsError::None,
                        }
                    }
                },
            };
            self.files.push(verdict);
        }
        if !self.files.contains(&FsError::None) && !self.files.contains(&FsError::Stale) {
            return Err(self.files[0]);
        }
        let brought: Vec<_> = listed
            .iter()
            .filter(|(id, _)| owned(id) && !self.segments.contains_key(id))
            .map(|(id, what)| (*id, Some(*what)))
            .collect();
        self.segments.extend(brought);
        for (file, verdict) in op.files.iter().zip(self.files.clone()) {
            if verdict == FsError::None {
                self.commit_file(file);
            }
        }
        Ok(())
    }

    fn commit_file(&mut self, file: &v1::FileCommit) {
        let now = self.time;
        let node = self.nodes.get_mut(&file.ino).expect("a checked file");
        let size_before = node.size();
        if !file.extents.is_empty() || file.size_min > size_before {
            let content = Rc::make_mut(&mut node.content);
            for extent in &file.extents {
                grow(content, extent.offset + extent.length);
                for at in 0..extent.length {
                    content[(extent.offset + at) as usize] = match extent.segment {
                        0 => Byte::Inline(extent.inline_bytes[at as usize]),
                        segment => Byte::At(segment, extent.frame, extent.frame_offset + at as u32),
                    };
                }
            }
            grow(content, file.size_min);
            node.drop_capability();
        }
        if file.kill_suidgid {
            node.kill_suidgid();
        }
        let written = if file.mtime == 0 { now } else { file.mtime };
        let written = written.min(now);
        node.mtime = if node.mtime > now {
            written
        } else {
            written.max(node.mtime)
        };
        node.ctime = match file.kill_suidgid {
            true => now,
            false => node.ctime.max(written),
        };
    }

    pub(crate) fn fallocate(&mut self, op: &v1::Fallocate) -> Result<(), FsError> {
        let now = self.time;
        let node = self.node(op.ino)?;
        regular(node)?;
        if op.punch_hole && op.zero_range {
            return Err(FsError::NotSupported);
        }
        if op.length == 0 {
            return Err(FsError::Invalid);
        }
        let end = op.offset + op.length;
        let extends = !op.punch_hole && !op.keep_size && end > node.size();
        if op.punch_hole || op.zero_range || extends {
            let content = Rc::make_mut(&mut node.content);
            if op.punch_hole || op.zero_range {
                let size = content.len() as u64;
                let range = op.offset.min(size) as usize..end.min(size) as usize;
                content[range].fill(Byte::Hole);
            }
            if extends {
                grow(content, end);
            }
        }
        node.drop_capability();
        if op.kill_suidgid {
            node.kill_suidgid();
        }
        (node.mtime, node.ctime) = (now, now);
        Ok(())
    }

    pub(crate) fn copy_range(&mut self, op: &v1::CopyRange, reply: &Reply) -> Result<(), FsError> {
        let now = self.time;
        let source = self.node(op.source)?.clone();
        let target = self.node(op.target)?;
        regular(&source)?;
        regular(target)?;
        let length = op
            .length
            .min(source.size().saturating_sub(op.source_offset));
        let overlap = op.source_offset < op.target_offset + length
            && op.target_offset < op.source_offset + length;
        if op.source == op.target && overlap {
            return Err(FsError::Invalid);
        }
        // How much one command copies is the core's choice, but never nothing.
        let copied = reply.value;
        assert!(copied <= length && (copied > 0) == (length > 0));
        if copied > 0 {
            let from = op.source_offset as usize..(op.source_offset + copied) as usize;
            let to = op.target_offset as usize..(op.target_offset + copied) as usize;
            let content = Rc::make_mut(&mut target.content);
            grow(content, to.end as u64);
            content[to].copy_from_slice(&source.content[from]);
            target.drop_capability();
            if op.kill_suidgid {
                target.kill_suidgid();
            }
            (target.mtime, target.ctime) = (now, now);
        }
        Ok(())
    }
}

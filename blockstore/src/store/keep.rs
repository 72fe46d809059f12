//! Into the caches: what was fetched, what came along, what was just stored.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use heliofs_proto::ids::SegmentId;

use super::fetch::{RUN_PAGES_MAX, Shared};
use crate::cache::PageKey;
use crate::cache::memory::MemoryTier;
use crate::segment::layout::{
    FRAME_ALIGN, PAGE_BYTES, PAGE_HEADER_BYTES, PAGE_STRIDE, frame_extent_bytes,
};
use crate::segment::page::{Codec, Page, PageIdentity, take_page, take_pages};
use crate::{EncodedSegment, FrameNumber};

impl Shared {
    /// The frames behind the one that was asked for came along; small files that were written together are read together.
    pub(super) fn harvest(
        &self,
        segment: SegmentId,
        frame: FrameNumber,
        end: u32,
        bytes: &Bytes,
        first: u32,
        frame_is: Option<(Codec, u32)>,
    ) {
        let (Some(memory), Some((codec, frame_bytes))) = (&self.memory, frame_is) else {
            return;
        };
        let page_bytes = codec.page_bytes();
        if u64::from(end) * (page_bytes as u64) < u64::from(frame_bytes) {
            return;
        }
        let base = frame.byte_range(first..first, page_bytes).start;
        let mut next = frame.start() + frame_extent_bytes(u64::from(frame_bytes), page_bytes);
        loop {
            next = next.next_multiple_of(FRAME_ALIGN);
            let at = (next - base) as usize;
            let (Some(frame), true) = (FrameNumber::at(next), at < bytes.len()) else {
                return;
            };
            let mut rest = bytes.slice(at..);
            let origin = PageIdentity {
                volume: self.volume,
                segment,
                frame,
            };
            let Ok(page) = take_page(&mut rest, &origin, 0) else {
                return;
            };
            let key = PageKey {
                segment,
                frame,
                page: 0,
            };
            if memory.contains(&key) {
                // Its neighbours came with it.
            } else if page.codec.is_plain() {
                memory.insert(key, Bytes::copy_from_slice(&page.data));
            } else if page.frame_bytes as usize <= PAGE_BYTES {
                let mut pages = vec![page.clone()];
                let stored_pages = page.frame_bytes.div_ceil(page.codec.page_bytes() as u32);
                match take_pages(&mut rest, &origin, 1, stored_pages - 1) {
                    Ok(others) => pages.extend(others),
                    Err(_) => return,
                }
                self.harvest_encoded(memory, segment, frame, &pages);
            }
            if page.frame_bytes as usize > PAGE_BYTES {
                return;
            }
            next += frame_extent_bytes(u64::from(page.frame_bytes), page.codec.page_bytes());
        }
    }

    /// The data of an encoded frame, all of whose pages are here.
    fn harvest_encoded(
        &self,
        memory: &MemoryTier,
        segment: SegmentId,
        frame: FrameNumber,
        pages: &[Page],
    ) {
        // Whoever asks for a frame that can't be decoded is told why.
        let Ok(head) = self.parse_head(segment, frame, &pages[0]) else {
            return;
        };
        let blocks = 0..head.blocks();
        let range = head.stored_range(blocks.clone());
        let stored = match pages {
            [only] => only.data.clone(),
            _ => pages
                .iter()
                .flat_map(|page| &page.data[..])
                .copied()
                .collect(),
        };
        // Two pages that contradict each other, though each is sound.
        let Some(stored) = stored.get(range.start as usize..range.end as usize) else {
            return;
        };
        for (page, data) in blocks.clone().zip(head.decode(blocks, stored)) {
            if let Ok(data) = data {
                let key = PageKey {
                    segment,
                    frame,
                    page,
                };
                memory.insert(key, data);
            }
        }
    }

    /// Into the memory tier; `shared`: the bytes lie in a buffer with others, which must not live as long as they do.
    pub(super) fn remember(
        &self,
        segment: SegmentId,
        frame: FrameNumber,
        page: u32,
        data: Bytes,
        shared: bool,
    ) {
        let Some(memory) = &self.memory else { return };
        let small = data.len() < PAGE_BYTES;
        let data = match shared || small {
            true => Bytes::copy_from_slice(&data),
            false => data,
        };
        let key = PageKey {
            segment,
            frame,
            page,
        };
        memory.insert(key, data);
    }

    pub(super) fn keep_on_disk(
        &self,
        segment: SegmentId,
        frame: FrameNumber,
        pages: Range<u32>,
        origin: PageIdentity,
        bytes: &Bytes,
        frame_is: Option<(Codec, u32)>,
    ) {
        let (Some(disk), Some((codec, frame_bytes))) = (&self.disk, frame_is) else {
            return;
        };
        let page_bytes = codec.page_bytes() as u64;
        let from = u64::from(pages.start) * page_bytes;
        let to = (u64::from(pages.end) * page_bytes).min(u64::from(frame_bytes));
        let raw = to - from + u64::from(pages.end - pages.start) * PAGE_HEADER_BYTES as u64;
        // Not a slice: what else came along would be kept in memory while the writer is behind.
        let raw = match bytes.len() as u64 > raw * 2 {
            true => Bytes::copy_from_slice(&bytes[..raw as usize]),
            false => bytes.slice(..raw as usize),
        };
        disk.insert(
            segment,
            frame,
            pages.start,
            pages.end - pages.start,
            origin,
            raw,
        );
    }

    /// Whether there is any cache to fill.
    pub(super) fn caches(&self) -> bool {
        self.memory.is_some() || self.disk.is_some()
    }

    /// Puts the pages of a segment that has just been stored into the caches.
    pub(super) fn cache_segment(&self, segment: &EncodedSegment) {
        for (frame, pieces) in segment.plain.iter().filter(|_| self.memory.is_some()) {
            let mut data = BytesMut::new();
            let full = |page: u32, data: &mut BytesMut, all: bool| match data.len() {
                0 => None,
                length if length >= PAGE_BYTES => Some((page, data.split_to(PAGE_BYTES))),
                length if all => Some((page, data.split_to(length))),
                _ => None,
            };
            let mut page = 0;
            for (n, piece) in pieces.iter().enumerate() {
                data.extend_from_slice(piece);
                while let Some((at, whole)) = full(page, &mut data, n + 1 == pieces.len()) {
                    self.remember(segment.id, *frame, at, whole.freeze(), true);
                    page += 1;
                }
            }
        }
        let object = segment.to_bytes();
        for entry in &segment.frames {
            let origin = entry.identity(self.volume);
            let from = entry.frame.start();
            let to = from + entry.extent_bytes();
            let raw = object.slice(from as usize..to as usize);
            let pages = entry.pages();
            for page in (0..pages).filter(|_| entry.codec.is_plain()) {
                let at = page as usize * PAGE_STRIDE;
                let data = raw.slice(at + PAGE_HEADER_BYTES..raw.len().min(at + PAGE_STRIDE));
                self.remember(segment.id, entry.frame, page, data, true);
            }
            let Some(disk) = &self.disk else { continue };
            let stride = PAGE_HEADER_BYTES + entry.codec.page_bytes();
            for first in (0..pages).step_by(RUN_PAGES_MAX as usize) {
                let end = pages.min(first + RUN_PAGES_MAX);
                let part = first as usize * stride..raw.len().min(end as usize * stride);
                disk.insert(
                    segment.id,
                    entry.frame,
                    first,
                    end - first,
                    origin,
                    raw.slice(part),
                );
            }
        }
    }

    /// Drops what the disk tier holds of a deleted segment; the memory tier's pages age out.
    pub(super) fn forget(&self, segment: SegmentId) {
        self.tables.lock().pop(&segment);
        if let Some(disk) = &self.disk {
            disk.forget(segment);
        }
    }

    pub(super) async fn flush_disk(&self) {
        if let Some(disk) = &self.disk {
            disk.flush().await;
        }
    }
}

//! Segments that lie on local disk and in no bucket: what a mount has staged.

use bytes::{Bytes, BytesMut};
use heliofs_proto::ids::SegmentId;

use super::SegmentStore;
use crate::StoreError;
use crate::segment::codec::FrameHead;
use crate::segment::object::{FrameEntry, ObjectFault, check_object};
use crate::segment::page::take_pages;

impl SegmentStore {
    /// Checks every byte of a segment of this volume; returns its frames. Blocks for some 20 µs per MiB.
    ///
    /// Errors: what is wrong with it.
    pub fn check(&self, object: &Bytes, id: SegmentId) -> Result<Vec<FrameEntry>, ObjectFault> {
        check_object(object, self.shared.volume, id)
    }

    /// The data of a frame of a segment of this volume; `stored` is the whole frame as it is stored, page headers and all. Every
    /// page is verified. Blocks.
    ///
    /// Errors: `Corrupt`; `Denied` when it is encrypted with another key.
    pub fn decode(&self, entry: &FrameEntry, stored: &Bytes) -> Result<Bytes, StoreError> {
        let shared = &self.shared;
        let identity = entry.identity(shared.volume);
        let corrupt = |page: u32, detail: String| StoreError::Corrupt {
            volume: shared.volume,
            segment: identity.segment,
            frame: entry.frame.0,
            page,
            detail,
        };
        let pages = take_pages(&mut stored.clone(), &identity, 0, entry.pages())
            .map_err(|(page, fault)| corrupt(page, fault.to_string()))?;
        let Some(first) = pages.first() else {
            return Err(corrupt(0, "the frame is empty".to_owned()));
        };
        if pages.len() == 1 && first.codec.is_plain() {
            return Ok(first.data.clone());
        }
        let mut contiguous = BytesMut::with_capacity(entry.stored_bytes as usize);
        for page in &pages {
            contiguous.extend_from_slice(&page.data);
        }
        if first.codec.is_plain() {
            return Ok(contiguous.freeze());
        }
        let head = shared.parse_head(identity.segment, entry.frame, first)?;
        let blocks = 0..head.blocks();
        let range = head.stored_range(blocks.clone());
        let Some(encoded) = contiguous.get(range.start as usize..range.end as usize) else {
            return Err(corrupt(0, "the frame is shorter than it says".to_owned()));
        };
        let mut data = BytesMut::with_capacity(entry.decoded_bytes as usize);
        for (block, decoded) in blocks
            .clone()
            .zip(FrameHead::decode(&head, blocks, encoded))
        {
            data.extend_from_slice(&decoded.map_err(|fault| corrupt(block, fault.to_string()))?);
        }
        Ok(data.freeze())
    }
}

//! Compression and encryption of frames. A frame is cut into blocks of 64 KiB of data, each encoded on its own, so that a
//! random read decodes one; a prelude in front of them lists their lengths. docs/FORMAT.md holds the byte map.

use std::ops::Range;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use heliofs_proto::limits::FRAME_BYTES_MAX;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};

use super::layout::{FINE_PAGE_BYTES, PAGE_BYTES};
use super::page::{Codec, Compression, PageIdentity};
use crate::StoreError;
use crate::keys::VolumeKey;

/// Data per block; as a page, so that caches hold pages of data under the same numbers whatever the codec.
pub const BLOCK_BYTES: usize = PAGE_BYTES;
/// Its logarithm, as the prelude has it.
const BLOCK_SHIFT: u8 = 16;
const _: () = assert!(BLOCK_BYTES == 1 << BLOCK_SHIFT);

/// The prelude up to the salt or the table.
const PRELUDE_BYTES: usize = 16;
const PRELUDE_VERSION: u8 = 1;
/// Where in it its own checksum lies: whoever needs no more than the prelude need not fetch the page, whose checksum is of all of
/// it. 0 in frames of earlier releases.
const SUM: Range<usize> = 12..16;
/// Random bytes from which the frame's own key is derived.
const SALT_BYTES: usize = 32;
/// What AES-GCM adds to each block.
const TAG_BYTES: usize = 16;
/// In a length of the table: the block did not shrink and was left as it is.
const INCOMPRESSIBLE: u32 = 1 << 31;
/// A level that a single core encodes at several hundred MB/s; higher ones win a few percent of space.
const ZSTD_LEVEL: i32 = 1;

/// A frame's prelude must fit its first page, which readers fetch to find a block.
const _: () = assert!(
    PRELUDE_BYTES + SALT_BYTES + 4 * (FRAME_BYTES_MAX as usize / BLOCK_BYTES) < FINE_PAGE_BYTES
);

/// The prelude's checksum, with what the page header says of the frame. Never 0.
fn prelude_sum(identity: &PageIdentity, codec: Codec, stored_bytes: u32, prelude: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&identity.volume.0.to_le_bytes());
    sum.update(&identity.segment.0.to_le_bytes());
    sum.update(&identity.frame.0.to_le_bytes());
    sum.update(&[codec.byte()]);
    sum.update(&stored_bytes.to_le_bytes());
    sum.update(&prelude[..SUM.start]);
    sum.update(&prelude[SUM.end..]);
    sum.finalize().max(1)
}

/// Why the stored bytes of a frame give no data, though their checksums are right.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameFault {
    /// The prelude contradicts itself.
    #[error("the frame's prelude is wrong: {0}")]
    Prelude(&'static str),
    /// Encrypted, and no key was given.
    #[error("the frame is encrypted with key {0:08x}, and no key was given")]
    NoKey(u32),
    /// Encrypted with another key.
    #[error("the frame is encrypted with key {frame:08x}; the key that was given is {given:08x}")]
    OtherKey {
        /// As the frame says.
        frame: u32,
        /// As the volume says.
        given: u32,
    },
    /// Changed since, or by somebody without the key.
    #[error("block {0} does not decrypt")]
    Decrypt(u32),
    /// Not what the compressor made.
    #[error("block {0} does not decompress")]
    Decompress(u32),
}

/// How a segment's frames are encoded. The default leaves them as they are.
#[derive(Clone, Debug, Default)]
pub struct FrameEncoder {
    /// Applied to each block that gets shorter by it.
    pub compression: Compression,
    /// Set: every frame is encrypted.
    pub key: Option<Arc<VolumeKey>>,
}

impl FrameEncoder {
    /// Whether frames are anything but stored as they are.
    pub fn is_plain(&self) -> bool {
        self.compression == Compression::None && self.key.is_none()
    }

    /// What the headers of its frames' pages say.
    pub fn codec(&self) -> Codec {
        Codec {
            compression: self.compression,
            encrypted: self.key.is_some(),
            fine: !self.is_plain(),
        }
    }

    /// Encodes the frame `identity`, whose data is `pieces` end to end; `None`: it is better stored as it is. `codec` is
    /// [`Self::codec`].
    ///
    /// Errors: `Invalid` when the system gives no random numbers.
    pub fn encode(
        &self,
        codec: Codec,
        identity: &PageIdentity,
        pieces: &[Bytes],
    ) -> Result<Option<(Codec, Bytes)>, StoreError> {
        if self.is_plain() {
            return Ok(None);
        }
        let decoded: usize = pieces.iter().map(Bytes::len).sum();
        let no_random = |_| StoreError::Invalid("the system gives no random numbers".to_owned());
        let (salt, sealer) = match &self.key {
            Some(key) => {
                let mut salt = [0; SALT_BYTES];
                SystemRandom::new().fill(&mut salt).map_err(no_random)?;
                (Some(salt), Some(frame_key(key, &salt)))
            }
            None => (None, None),
        };
        let blocks = decoded.div_ceil(BLOCK_BYTES);
        let prelude = PRELUDE_BYTES + salt.map_or(0, |salt| salt.len()) + 4 * blocks;
        let mut stored = BytesMut::with_capacity(prelude + decoded + blocks * TAG_BYTES);
        stored.put_u16_le(prelude as u16);
        stored.put_u8(PRELUDE_VERSION);
        stored.put_u8(BLOCK_SHIFT);
        stored.put_u32_le(decoded as u32);
        stored.put_u32_le(self.key.as_ref().map_or(0, |key| key.id()));
        stored.put_u32_le(0);
        stored.put_slice(salt.as_ref().map_or(&[], |salt| &salt[..]));
        let table_at = stored.len();
        stored.put_bytes(0, 4 * blocks);

        let mut compressor = Compressor::new(self.compression)?;
        let (mut at, mut left) = (0, pieces.iter());
        let mut piece: &[u8] = &[];
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        while at < decoded {
            let length = BLOCK_BYTES.min(decoded - at);
            block.clear();
            while block.len() < length {
                if piece.is_empty() {
                    let next = left.next().expect("the pieces are as long as their sum");
                    piece = next;
                    continue;
                }
                let take = piece.len().min(length - block.len());
                block.extend_from_slice(&piece[..take]);
                piece = &piece[take..];
            }
            let number = (at / BLOCK_BYTES) as u32;
            let begin = stored.len();
            let shrunk = compressor.compress(&block);
            let flag = if shrunk.is_some() { 0 } else { INCOMPRESSIBLE };
            stored.put_slice(shrunk.unwrap_or(&block));
            if let Some(sealer) = &sealer {
                let aad = aad(identity, codec, decoded as u32, number, flag);
                let tag = sealer
                    .seal_in_place_separate_tag(nonce(number), aad, &mut stored[begin..])
                    .expect("a block is far shorter than the cipher's limit");
                stored.put_slice(tag.as_ref());
            }
            let entry = (stored.len() - begin) as u32 | flag;
            let entry_at = table_at + 4 * number as usize;
            stored[entry_at..entry_at + 4].copy_from_slice(&entry.to_le_bytes());
            at += length;
        }
        if sealer.is_none() && stored.len() >= decoded {
            return Ok(None);
        }
        let sum = prelude_sum(identity, codec, stored.len() as u32, &stored[..prelude]);
        stored[SUM].copy_from_slice(&sum.to_le_bytes());
        Ok(Some((codec, stored.freeze())))
    }
}

/// One block at a time, with the memory of the one before.
struct Compressor {
    zstd: Option<zstd::bulk::Compressor<'static>>,
    compression: Compression,
    out: Vec<u8>,
}

impl Compressor {
    fn new(compression: Compression) -> Result<Self, StoreError> {
        let zstd = match compression {
            Compression::Zstd => {
                Some(zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(|error| {
                    StoreError::Invalid(format!("zstd cannot be used: {error}"))
                })?)
            }
            Compression::None | Compression::Lz4 => None,
        };
        Ok(Self {
            zstd,
            compression,
            // A result that has no room here would be no gain.
            out: vec![0; lz4_flex::block::get_maximum_output_size(BLOCK_BYTES)],
        })
    }

    /// The block compressed, if that is shorter.
    fn compress(&mut self, block: &[u8]) -> Option<&[u8]> {
        let length = match (self.compression, &mut self.zstd) {
            (Compression::Lz4, _) => lz4_flex::block::compress_into(block, &mut self.out).ok()?,
            (Compression::Zstd, Some(zstd)) => {
                zstd.compress_to_buffer(block, &mut self.out[..]).ok()?
            }
            _ => return None,
        };
        (length < block.len()).then(|| &self.out[..length])
    }
}

/// What a frame's first page tells: where its blocks lie and how to read them.
#[derive(Debug)]
pub struct FrameHead {
    identity: PageIdentity,
    codec: Codec,
    decoded_bytes: u32,
    /// Where each block begins within the stored bytes, and where the last one ends.
    begins: Vec<u32>,
    /// One flag per block.
    incompressible: Vec<bool>,
    key: Option<LessSafeKey>,
}

impl FrameHead {
    /// Bytes of the prelude that begins like this.
    pub fn prelude_bytes(front: &[u8]) -> Option<usize> {
        let length = u16::from_le_bytes(*front.first_chunk()?);
        Some(usize::from(length).max(PRELUDE_BYTES))
    }

    /// As [`FrameHead::parse`], from the first bytes of the first page, whose checksum was not looked at. `None`: the prelude has
    /// no checksum of its own, or a wrong one, or goes on behind them.
    pub fn parse_front(
        front: &[u8],
        identity: PageIdentity,
        codec: Codec,
        stored_bytes: u32,
        key: Option<&VolumeKey>,
    ) -> Option<Result<Self, FrameFault>> {
        let prelude = front.get(..Self::prelude_bytes(front)?)?;
        let sum = u32::from_le_bytes(*prelude[SUM].first_chunk()?);
        if sum != prelude_sum(&identity, codec, stored_bytes, prelude) {
            return None;
        }
        Some(Self::parse(prelude, identity, codec, stored_bytes, key))
    }

    /// Reads the prelude from the first page of the frame `identity` of `stored_bytes`. Any bytes are allowed.
    pub fn parse(
        page: &[u8],
        identity: PageIdentity,
        codec: Codec,
        stored_bytes: u32,
        key: Option<&VolumeKey>,
    ) -> Result<Self, FrameFault> {
        let wrong = FrameFault::Prelude;
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(*page.get(at..)?.first_chunk()?))
        };
        let (Some(first), Some(decoded_bytes), Some(key_id)) = (word(0), word(4), word(8)) else {
            return Err(wrong("cut off"));
        };
        let [low, high, version, shift] = first.to_le_bytes();
        if (version, shift) != (PRELUDE_VERSION, BLOCK_SHIFT) {
            return Err(wrong("unknown to this release; upgrade the mount"));
        }
        if decoded_bytes == 0 || u64::from(decoded_bytes) > FRAME_BYTES_MAX {
            return Err(wrong("impossible length"));
        }
        let salt = PRELUDE_BYTES..PRELUDE_BYTES + if codec.encrypted { SALT_BYTES } else { 0 };
        let blocks = decoded_bytes.div_ceil(BLOCK_BYTES as u32) as usize;
        let prelude = usize::from(u16::from_le_bytes([low, high]));
        if prelude != salt.end + 4 * blocks {
            return Err(wrong("its length is another"));
        }
        let key = match (codec.encrypted, key) {
            (false, _) => None,
            (true, None) => return Err(FrameFault::NoKey(key_id)),
            (true, Some(key)) if key.id() != key_id => {
                return Err(FrameFault::OtherKey {
                    frame: key_id,
                    given: key.id(),
                });
            }
            (true, Some(key)) => {
                let salt = page.get(salt.clone()).ok_or(wrong("cut off"))?;
                Some(frame_key(key, salt))
            }
        };
        let tag = if codec.encrypted { TAG_BYTES } else { 0 };
        let mut begins = Vec::with_capacity(blocks + 1);
        let mut incompressible = Vec::with_capacity(blocks);
        let mut at = prelude as u32;
        for block in 0..blocks {
            let entry = word(salt.end + 4 * block).ok_or(wrong("cut off"))?;
            let length = entry & !INCOMPRESSIBLE;
            let data = BLOCK_BYTES.min(decoded_bytes as usize - block * BLOCK_BYTES);
            if length as usize <= tag || length as usize > data + tag {
                return Err(wrong("impossible length of a block"));
            }
            begins.push(at);
            incompressible.push(entry & INCOMPRESSIBLE != 0);
            at += length;
        }
        if at != stored_bytes {
            return Err(wrong("the blocks do not fill the frame"));
        }
        begins.push(at);
        Ok(Self {
            identity,
            codec,
            decoded_bytes,
            begins,
            incompressible,
            key,
        })
    }

    /// Number of blocks, which are the frame's pages of data.
    pub fn blocks(&self) -> u32 {
        self.incompressible.len() as u32
    }

    /// Stored bytes of each of its pages but the last.
    pub fn page_bytes(&self) -> usize {
        self.codec.page_bytes()
    }

    /// Stored bytes of the whole frame.
    pub fn stored_bytes(&self) -> u32 {
        self.begins[self.incompressible.len()]
    }

    /// Where blocks lie within the stored bytes. The blocks must exist.
    pub fn stored_range(&self, blocks: Range<u32>) -> Range<u32> {
        self.begins[blocks.start as usize]..self.begins[blocks.end as usize]
    }

    /// The data of blocks, which must exist; `stored` is their [`Self::stored_range`].
    ///
    /// Shape: one result per block, in order.
    pub fn decode(&self, blocks: Range<u32>, stored: &[u8]) -> Vec<Result<Bytes, FrameFault>> {
        let base = self.begins[blocks.start as usize];
        let mut zstd = None;
        blocks
            .map(|block| {
                let range = self.stored_range(block..block + 1);
                let stored = &stored[(range.start - base) as usize..(range.end - base) as usize];
                self.decode_block(block, stored, &mut zstd)
            })
            .collect()
    }

    fn decode_block(
        &self,
        block: u32,
        stored: &[u8],
        zstd: &mut Option<zstd::bulk::Decompressor<'static>>,
    ) -> Result<Bytes, FrameFault> {
        let raw = self.incompressible[block as usize];
        let begin = block as usize * BLOCK_BYTES;
        let length = BLOCK_BYTES.min(self.decoded_bytes as usize - begin);
        let mut opened;
        let packed: &[u8] = match &self.key {
            None => stored,
            Some(key) => {
                opened = stored.to_vec();
                let flag = if raw { INCOMPRESSIBLE } else { 0 };
                let aad = aad(&self.identity, self.codec, self.decoded_bytes, block, flag);
                let data = key
                    .open_in_place(nonce(block), aad, &mut opened)
                    .map_err(|_| FrameFault::Decrypt(block))?
                    .len();
                if raw {
                    opened.truncate(data);
                    return if data == length {
                        Ok(opened.into())
                    } else {
                        Err(FrameFault::Decompress(block))
                    };
                }
                &opened[..data]
            }
        };
        let mut data = vec![0; length];
        let got = match self.codec.compression {
            _ if raw => {
                if packed.len() == length {
                    data.copy_from_slice(packed);
                }
                Some(packed.len())
            }
            Compression::None => None,
            Compression::Lz4 => lz4_flex::block::decompress_into(packed, &mut data).ok(),
            Compression::Zstd => {
                if zstd.is_none() {
                    *zstd = zstd::bulk::Decompressor::new().ok();
                }
                let zstd = zstd.as_mut().ok_or(FrameFault::Decompress(block))?;
                zstd.decompress_to_buffer(packed, &mut data[..]).ok()
            }
        };
        match got {
            Some(got) if got == length => Ok(data.into()),
            _ => Err(FrameFault::Decompress(block)),
        }
    }
}

/// A key of the frame's own, so that block numbers can be nonces: no volume has so many frames that two salts meet.
fn frame_key(key: &VolumeKey, salt: &[u8]) -> LessSafeKey {
    let derived = key.derive(salt);
    let okm = derived
        .expand(&[b"heliofs frame 1"], &AES_256_GCM)
        .expect("the key is as long as the cipher wants it");
    LessSafeKey::new(UnboundKey::from(okm))
}

fn nonce(block: u32) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[..4].copy_from_slice(&block.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// What a block is bound to: the place where its frame was first written, and its own within the frame.
fn aad(
    identity: &PageIdentity,
    codec: Codec,
    decoded_bytes: u32,
    block: u32,
    flag: u32,
) -> Aad<[u8; 29]> {
    let mut aad = [0; 29];
    aad[0..4].copy_from_slice(&identity.volume.0.to_le_bytes());
    aad[4..12].copy_from_slice(&identity.segment.0.to_le_bytes());
    aad[12..16].copy_from_slice(&identity.frame.0.to_le_bytes());
    aad[16..20].copy_from_slice(&decoded_bytes.to_le_bytes());
    aad[20..24].copy_from_slice(&block.to_le_bytes());
    aad[24..28].copy_from_slice(&flag.to_le_bytes());
    aad[28] = codec.byte();
    Aad::from(aad)
}

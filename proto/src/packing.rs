//! Streams of frames, compressed: each frame is a flushed piece of one zstd stream, so that what repeats from frame to frame
//! (names of fields, ids, times that differ little) is sent once.
//!
//! A reader that can unpack says so when it asks; a server that can't pack, or a reader that did not say, makes a stream of plain
//! frames.

use std::io::Write;

use bytes::Bytes;
use prost::Message;

use crate::limits::MESSAGE_BYTES_MAX;

/// How a reader says that it can unpack, and a server how it packed.
pub const ZSTD: &str = "zstd";

/// What a stream is packed with: on one core of 2020 some 300 MB/s; more takes time from commits and saves little.
const LEVEL: i32 = 1;

/// How far back a piece may refer, as a power of two: bounds the memory of both sides.
const WINDOW_LOG: u32 = 20;

/// The sending side of one stream.
pub struct Packer {
    encoder: zstd::stream::write::Encoder<'static, Vec<u8>>,
}

/// The receiving side of one stream.
pub struct Unpacker {
    decoder: zstd::stream::write::Decoder<'static, Bounded>,
}

/// What comes out of a piece, up to the largest message: who sends more is no server of ours.
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
}

impl Write for Bounded {
    fn write(&mut self, piece: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + piece.len() > MESSAGE_BYTES_MAX {
            return Err(std::io::Error::other("a packed frame is too large"));
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Packer {
    /// Of a new stream.
    pub fn new() -> std::io::Result<Self> {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), LEVEL)?;
        encoder.window_log(WINDOW_LOG)?;
        Ok(Self { encoder })
    }

    /// The next frame's piece.
    pub fn pack(&mut self, frame: &impl Message) -> std::io::Result<Bytes> {
        self.encoder.write_all(&frame.encode_to_vec())?;
        self.encoder.flush()?;
        Ok(std::mem::take(self.encoder.get_mut()).into())
    }
}

impl Unpacker {
    /// Of a new stream.
    pub fn new() -> std::io::Result<Self> {
        let mut decoder = zstd::stream::write::Decoder::new(Bounded::default())?;
        decoder.window_log_max(WINDOW_LOG)?;
        Ok(Self { decoder })
    }

    /// The frame that was packed into the next piece; pieces must come in order, none left out.
    ///
    /// Errors: what was sent is no such piece.
    pub fn unpack<M: Message + Default>(&mut self, piece: &[u8]) -> std::io::Result<M> {
        self.decoder.write_all(piece)?;
        self.decoder.flush()?;
        let bytes = std::mem::take(&mut self.decoder.get_mut().bytes);
        M::decode(Bytes::from(bytes)).map_err(std::io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1;

    fn frame(seq: u64) -> v1::ChangelogFrame {
        v1::ChangelogFrame {
            entries: vec![v1::ChangelogEntry {
                position: Some(v1::Position { epoch: 0, seq }),
                time: 1_700_000_000_000_000_000 + seq as i64,
                command: Some(v1::Command {
                    volume: 1,
                    session: 0x1234_5678_0000_0001,
                    sequence: seq,
                    ..Default::default()
                }),
            }],
            ..Default::default()
        }
    }

    #[test]
    fn frames_come_out_as_they_went_in_and_repetition_costs_little() {
        let (mut packer, mut unpacker) = (Packer::new().unwrap(), Unpacker::new().unwrap());
        let (mut plain, mut packed) = (0, 0);
        for seq in 1..2000 {
            let sent = frame(seq);
            let piece = packer.pack(&sent).unwrap();
            plain += sent.encoded_len();
            packed += piece.len();
            let got: v1::ChangelogFrame = unpacker.unpack(&piece).unwrap();
            assert_eq!(got, sent);
        }
        assert!(packed * 10 < plain * 7, "{packed} of {plain} bytes");
    }

    #[test]
    fn a_piece_that_is_missing_or_damaged_is_an_error() {
        let (mut packer, mut unpacker) = (Packer::new().unwrap(), Unpacker::new().unwrap());
        let first = packer.pack(&frame(1)).unwrap();
        let second = packer.pack(&frame(2)).unwrap();
        assert!(unpacker.unpack::<v1::ChangelogFrame>(&second).is_err());
        let mut unpacker = Unpacker::new().unwrap();
        assert_eq!(
            unpacker.unpack::<v1::ChangelogFrame>(&first).unwrap(),
            frame(1)
        );
        let bomb = zstd::stream::encode_all(&vec![0; 4 * MESSAGE_BYTES_MAX][..], 1).unwrap();
        let mut unpacker = Unpacker::new().unwrap();
        assert!(unpacker.unpack::<v1::ChangelogFrame>(&bomb).is_err());
    }
}

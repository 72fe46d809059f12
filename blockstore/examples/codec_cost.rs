//! What do compression and encryption cost per MiB on one core, and what do they save? Asked of a file, or of this machine's
//! `/usr/share/dict`-like text made up here: `cargo run --release --example codec_cost [FILE]`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockstore::segment::codec::{FrameEncoder, FrameHead};
use blockstore::segment::page::{Compression, PageIdentity};
use blockstore::{FrameNumber, Passphrase, VolumeKey};
use bytes::Bytes;
use heliofs_proto::ids::{SegmentId, VolumeId};

const LENGTH: usize = 4 << 20;
const ROUNDS: u32 = 20;

fn main() {
    let data: Bytes = match std::env::args().nth(1) {
        Some(file) => std::fs::read(file).expect("the file can be read").into(),
        None => (0..LENGTH as u32)
            .flat_map(|n| format!("{} ", n.wrapping_mul(2_654_435_761) % 5000).into_bytes())
            .take(LENGTH)
            .collect(),
    };
    let data = data.slice(..data.len().min(LENGTH));
    let passphrase = Passphrase::new("cost".to_owned());
    let (key, _) = VolumeKey::create(&passphrase.into()).expect("random numbers");
    let key = Arc::new(key);
    let identity = PageIdentity {
        volume: VolumeId(1),
        segment: SegmentId(1),
        frame: FrameNumber(4),
    };
    for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
        for key in [None, Some(Arc::clone(&key))] {
            let encoder = FrameEncoder {
                compression,
                key: key.clone(),
            };
            let begin = Instant::now();
            let mut encoded = None;
            for _ in 0..ROUNDS {
                encoded = encoder
                    .encode(encoder.codec(), &identity, std::slice::from_ref(&data))
                    .expect("random numbers");
            }
            let encode = begin.elapsed();
            let Some((codec, stored)) = encoded else {
                continue;
            };
            let head = FrameHead::parse(
                &stored,
                identity,
                codec,
                stored.len() as u32,
                key.as_deref(),
            )
            .expect("nothing was changed");
            let begin = Instant::now();
            for _ in 0..ROUNDS {
                let range = head.stored_range(0..head.blocks());
                let stored = &stored[range.start as usize..range.end as usize];
                let blocks = head.decode(0..head.blocks(), stored);
                assert!(blocks.iter().all(Result::is_ok));
            }
            let decode = begin.elapsed();
            let rate = |time: Duration| {
                data.len() as f64 * f64::from(ROUNDS) / time.as_secs_f64() / f64::from(1 << 20)
            };
            println!(
                "{compression:?}{}: {:.0} % of the size, encode {:.0} MiB/s, decode {:.0} MiB/s",
                if key.is_some() { " + AES-256-GCM" } else { "" },
                stored.len() as f64 * 100.0 / data.len() as f64,
                rate(encode),
                rate(decode)
            );
        }
    }
}

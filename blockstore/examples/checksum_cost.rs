//! What do the checksums of a write and of a read cost, per MiB? Asked on two cores, one busy: see the printed line.

use std::time::Instant;

use blockstore::SegmentBuilder;
use blockstore::segment::page::{PageIdentity, take_pages};
use bytes::Bytes;
use heliofs_proto::ids::{SegmentId, VolumeId};

fn main() {
    let data = Bytes::from(vec![0x5a; 4 << 20]);
    let rounds = 200;
    let pieces = || {
        data.chunks(128 << 10)
            .map(|piece| data.slice_ref(piece))
            .collect::<Vec<_>>()
    };
    let begin = Instant::now();
    let mut last = None;
    for _ in 0..rounds {
        let mut builder = SegmentBuilder::new(VolumeId(1), SegmentId(1));
        let frame = builder
            .add_frame(pieces())
            .expect("4 MiB are a valid frame");
        last = Some((frame, builder.finish()));
    }
    let build = begin.elapsed();
    let Some((frame, segment)) = last else { return };
    let object = segment.to_bytes();
    let identity = PageIdentity {
        volume: VolumeId(1),
        segment: SegmentId(1),
        frame,
    };
    let begin = Instant::now();
    for _ in 0..rounds {
        let mut rest = object.slice(frame.start() as usize..);
        let pages = take_pages(&mut rest, &identity, 0, 64).expect("nothing was changed");
        assert_eq!(pages.len(), 64);
    }
    let verify = begin.elapsed();
    let per_mib = |time: std::time::Duration| time.as_secs_f64() * 1e6 / f64::from(rounds) / 4.0;
    println!(
        "build {:.0} µs/MiB, verify {:.0} µs/MiB",
        per_mib(build),
        per_mib(verify)
    );
}

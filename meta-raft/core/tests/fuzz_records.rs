//! Decoding of whatever bytes as records: no panic, and what is taken for a record reads back as itself. `make fuzz` runs a
//! million rounds; `FUZZ_ITERATIONS` says how many otherwise. Seeds are round numbers, so that a failure names its round.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use bytes::Bytes;
use heliofs_proto::ids::{Epoch, Ino, Position, SegmentId, SessionId, UnixNanos};
use heliofs_proto::v1::{FileKind, VolumeSettings};
use meta_core::records::{
    Accounting, CookieRecord, CountersRecord, EraseRecord, ErasedRange, ExtentData, ExtentRecord,
    HeadRecord, InodeRecord, NameRecord, OrphanRecord, QuotaCounters, QuotaRecord, QuotaState,
    QuotaWalkRecord, Record, RemoveTreeRecord, SegmentBlockRecord, SegmentRecord, SessionRecord,
    SettingsRecord,
};

/// splitmix64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            if bytes.is_empty() {
                return;
            }
            let at = self.below(bytes.len());
            match self.below(5) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
                2 => bytes.truncate(at),
                3 => bytes.insert(at, self.next() as u8),
                // A number that is too long, or as large as can be.
                _ => drop(bytes.splice(at..at, [0xff; 9])),
            }
        }
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "a setting of the test, not of the core"
)]
fn rounds() -> u64 {
    let rounds = std::env::var("FUZZ_ITERATIONS");
    rounds.map_or(20_000, |rounds| rounds.parse().expect("a number"))
}

/// Decodes; a record that was taken must be one: encoded anew it is read as the same.
fn reads_back<R: Record + PartialEq + std::fmt::Debug>(bytes: &Bytes) {
    if let Ok(record) = R::decode(b"key", bytes) {
        assert_eq!(R::decode(b"key", &record.encode()), Ok(record));
    }
}

fn corpus() -> Vec<Bytes> {
    let time = UnixNanos(1_795_330_800_000_000_000);
    let inode = InodeRecord {
        kind: FileKind::File,
        mode: 0o644,
        nlink: 1,
        uid: 1000,
        gid: 1000,
        size: 70_000,
        allocated: 70_000,
        atime: time,
        mtime: time,
        ctime: time,
        btime: time,
        rdev: 0,
        data_seq: 77,
        parent: Ino(1),
        flags: 1,
        next_cookie: 3,
        erases: 2,
        quota: Ino(0),
    };
    let in_segment = ExtentData::Segment {
        segment: SegmentId(300),
        frame: 4,
        frame_offset: 65_536,
    };
    let extent = |data| ExtentRecord {
        length: 5,
        seq: 9,
        data,
    };
    let range = |start, end| ErasedRange { start, end, seq: 9 };
    vec![
        inode.encode(),
        extent(in_segment).encode(),
        extent(ExtentData::Inline(Bytes::from_static(b"bytes"))).encode(),
        NameRecord {
            ino: Ino(5),
            kind: FileKind::Directory,
            cookie: 3,
        }
        .encode(),
        CookieRecord {
            ino: Ino(5),
            kind: FileKind::File,
            name: Bytes::from_static(b"name"),
        }
        .encode(),
        EraseRecord {
            ranges: vec![range(5, 9), range(9, 1 << 40)],
        }
        .encode(),
        OrphanRecord { since: time }.encode(),
        RemoveTreeRecord.encode(),
        SegmentRecord {
            length: 4 << 20,
            checksum: 7,
            data_bytes: 4 << 20,
            live_bytes: 100,
        }
        .encode(),
        SegmentBlockRecord {
            session: SessionId(7 << 32 | 1),
            brought: [0xa5; 32],
        }
        .encode(),
        SessionRecord {
            acknowledged_below: 12,
            inos: vec![],
        }
        .encode(),
        SessionRecord {
            acknowledged_below: 12,
            inos: vec![7..9, 1 << 40..1 << 41],
        }
        .encode(),
        HeadRecord {
            position: Position {
                epoch: Epoch(1),
                seq: 99,
            },
            time,
            epochs: vec![(Epoch(0), 1), (Epoch(1), 50)],
        }
        .encode(),
        CountersRecord::default().encode(),
        InodeRecord {
            quota: Ino(1 << 48 | 9),
            ..inode
        }
        .encode(),
        CountersRecord {
            quotas: QuotaCounters {
                directories: 2,
                limited_owners: 1,
                accounting: Accounting::Counting,
                counted_to: Ino(500),
            },
            ..CountersRecord::default()
        }
        .encode(),
        QuotaRecord {
            bytes_max: 1 << 40,
            inodes_max: 1000,
            used_bytes: 12_345,
            used_inodes: 17,
            parent: Ino(3),
            state: QuotaState::Counting,
            from: Ino(3),
        }
        .encode(),
        QuotaWalkRecord { after: 300 }.encode(),
        SettingsRecord(VolumeSettings {
            core_level: 1,
            trash_days: 7,
            ..VolumeSettings::default()
        })
        .encode(),
    ]
}

#[test]
fn records_of_any_bytes_are_refused_or_read_back() {
    let corpus = corpus();
    for round in 0..rounds() {
        let random = &mut Random(round);
        let mut bytes = match round % 8 {
            0 => (0..random.below(80)).map(|_| random.next() as u8).collect(),
            _ => corpus[random.below(corpus.len())].to_vec(),
        };
        random.mutate(&mut bytes);
        if round % 2 == 0
            && let Some(version) = bytes.first_mut()
        {
            *version = 1 + (round % 4 / 2) as u8;
        }
        let bytes = Bytes::from(bytes);
        reads_back::<InodeRecord>(&bytes);
        reads_back::<ExtentRecord>(&bytes);
        reads_back::<NameRecord>(&bytes);
        reads_back::<CookieRecord>(&bytes);
        reads_back::<EraseRecord>(&bytes);
        reads_back::<OrphanRecord>(&bytes);
        reads_back::<RemoveTreeRecord>(&bytes);
        reads_back::<SegmentRecord>(&bytes);
        reads_back::<SegmentBlockRecord>(&bytes);
        reads_back::<SessionRecord>(&bytes);
        reads_back::<HeadRecord>(&bytes);
        reads_back::<CountersRecord>(&bytes);
        reads_back::<SettingsRecord>(&bytes);
        reads_back::<QuotaRecord>(&bytes);
        reads_back::<QuotaWalkRecord>(&bytes);
    }
}

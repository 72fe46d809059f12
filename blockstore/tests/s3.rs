//! The store over an S3 server that we did not write: SeaweedFS's `weed`.
//!
//! `weed` is looked for in HELIOFS_WEED and on PATH. Without it these tests do nothing, unless HELIOFS_REQUIRE_WEED=1 says that it
//! should be there.

#![allow(clippy::unwrap_used)]

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blockstore::object::create_bucket;
use blockstore::{Bucket, FrameRange, Kind, SegmentBuilder, SegmentStore, StoreOptions};
use bytes::Bytes;
use heliofs_proto::ids::{SegmentId, VolumeId};
use heliofs_proto::v1::StorageConfig;

struct Weed {
    server: Child,
    url: String,
    _directory: tempfile::TempDir,
}

impl Drop for Weed {
    fn drop(&mut self) {
        self.server.kill().expect("the server is a child of ours");
        self.server.wait().expect("and is waited for only here");
    }
}

fn find_weed() -> Option<PathBuf> {
    let found = std::env::var_os("HELIOFS_WEED")
        .map(PathBuf::from)
        .or_else(|| {
            std::env::split_paths(&std::env::var_os("PATH")?)
                .map(|directory| directory.join("weed"))
                .find(|path| path.is_file())
        });
    if found.is_none() {
        let required = std::env::var("HELIOFS_REQUIRE_WEED").is_ok_and(|value| value == "1");
        assert!(
            !required,
            "HELIOFS_REQUIRE_WEED=1, but there is no `weed`: set HELIOFS_WEED"
        );
        eprintln!("skipped: no `weed`");
    }
    found
}

/// Ports that were free a moment ago, all below those that weed derives by adding 10000.
fn free_ports<const N: usize>() -> [u16; N] {
    let mut held = Vec::new();
    for port in 20_000 + (std::process::id() as u16 % 100) * 100.. {
        let pair = [port, port + 10_000].map(|port| TcpListener::bind(("127.0.0.1", port)));
        if let [Ok(a), Ok(b)] = pair {
            held.push((port, a, b));
        }
        if held.len() == N {
            break;
        }
    }
    let ports: Vec<u16> = held.iter().map(|(port, ..)| *port).collect();
    ports.try_into().expect("as many as were asked for")
}

async fn start() -> Option<Weed> {
    let weed = find_weed()?;
    let directory = tempfile::tempdir().unwrap();
    let identities = directory.path().join("s3.json");
    let config = r#"{"identities":[{"name":"t","credentials":[{"accessKey":"key","secretKey":"secret"}],
        "actions":["Admin","Read","List","Tagging","Write"]}]}"#;
    std::fs::write(&identities, config).unwrap();
    let [master, volume, filer, s3] = free_ports::<4>();
    let server = Command::new(weed)
        .arg("server")
        .args(["-ip", "127.0.0.1", "-ip.bind", "127.0.0.1", "-s3", "-filer"])
        .arg(format!("-dir={}", directory.path().display()))
        .arg(format!("-master.port={master}"))
        .arg(format!("-volume.port={volume}"))
        .arg(format!("-filer.port={filer}"))
        .arg(format!("-s3.port={s3}"))
        .arg(format!("-s3.config={}", identities.display()))
        .args([
            "-master.volumeSizeLimitMB=64",
            "-volume.max=20",
            "-s3.port.iceberg=0",
            "-s3.autoCreateBucket=false",
        ])
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(directory.path().join("log")).unwrap())
        .spawn()
        .unwrap();
    let weed = Weed {
        server,
        url: format!("http://127.0.0.1:{s3}"),
        _directory: directory,
    };
    let begin = Instant::now();
    let patient = options(Duration::from_secs(5));
    while let Err(error) = create_bucket(&weed.config("ready", "key", "secret"), &patient).await {
        if begin.elapsed() > Duration::from_secs(60) {
            let log = std::fs::read_to_string(weed._directory.path().join("log"));
            panic!("weed does not come up: {error}\n{log:?}");
        }
    }
    Some(weed)
}

impl Weed {
    fn config(&self, bucket: &str, access_key: &str, secret_key: &str) -> StorageConfig {
        StorageConfig {
            storage: "s3".to_owned(),
            bucket: format!("{}/{bucket}", self.url),
            access_key: access_key.to_owned(),
            secret_key: secret_key.to_owned(),
            ..Default::default()
        }
    }
}

fn options(deadline: Duration) -> StoreOptions {
    StoreOptions {
        deadline,
        memory_cache_bytes: 0,
        cache_uploads: false,
        ..Default::default()
    }
}

fn noise(length: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_over_a_real_s3_server() {
    let Some(weed) = start().await else { return };
    let options = options(Duration::from_secs(20));
    let config = weed.config("bucket", "key", "secret");
    let volume = VolumeId(1);

    let early = Bucket::open(&config, "vol", &options).unwrap();
    let error = early.claim_marker("u").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied, "{error}");
    assert!(error.to_string().contains("heliofs format"), "{error}");

    create_bucket(&config, &options).await.unwrap();
    create_bucket(&config, &options).await.unwrap();
    let store = SegmentStore::open(&config, "vol", volume, options.clone()).unwrap();
    store.bucket().claim_marker("u").await.unwrap();
    store.bucket().claim_marker("u").await.unwrap();
    store.bucket().check_marker("u").await.unwrap();
    assert_eq!(
        store.bucket().claim_marker("v").await.unwrap_err().kind(),
        Kind::AlreadyExists
    );

    let frames = [noise(3_000_000, 1), noise(10, 2), noise(65_536, 3)];
    let build = |last: &Bytes| {
        let mut builder = SegmentBuilder::new(volume, SegmentId(0x1ab));
        let numbers: Vec<_> = frames[..2]
            .iter()
            .chain([last])
            .map(|data| {
                builder
                    .add_frame(vec![data.slice(..5), data.slice(5..)])
                    .unwrap()
            })
            .collect();
        (builder.finish(), numbers)
    };
    let (segment, numbers) = build(&frames[2]);
    store.put(segment.clone()).await.unwrap();
    store.put(segment).await.unwrap();
    let error = store.put(build(&noise(65_536, 4)).0).await.unwrap_err();
    assert_eq!(
        error.kind(),
        Kind::AlreadyExists,
        "conditional puts hold: {error}"
    );
    for (frame, data) in numbers.iter().zip(&frames) {
        for (from, to) in [
            (0, data.len()),
            (data.len() / 2, data.len()),
            (0, 1),
            (data.len() - 1, data.len()),
        ] {
            let at = FrameRange {
                segment: SegmentId(0x1ab),
                frame: *frame,
                offset: from as u32,
                length: (to - from) as u32,
            };
            assert_eq!(store.read(at).await.unwrap(), data.slice(from..to));
        }
    }
    let beyond = FrameRange {
        segment: SegmentId(0x1ab),
        frame: blockstore::FrameNumber(1 << 30),
        offset: 0,
        length: 1,
    };
    assert_eq!(
        store.read(beyond).await.unwrap_err().kind(),
        Kind::Corrupt,
        "416"
    );

    let mut listed = store.bucket().list("").await.unwrap();
    listed.sort();
    let names: Vec<_> = listed.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, [".heliofs-volume", "ab/00000000000001ab"]);
    for _ in 0..2 {
        let deleted = store.delete(&[SegmentId(0x1ab), SegmentId(7)]).await;
        assert!(
            deleted.iter().all(|(_, result)| result.is_ok()),
            "{deleted:?}"
        );
    }
    let gone = FrameRange {
        frame: numbers[0],
        ..beyond
    };
    assert_eq!(store.read(gone).await.unwrap_err().kind(), Kind::NotFound);

    for (access_key, secret_key) in [("key", "wrong"), ("nobody", "secret")] {
        let wrong = weed.config("bucket", access_key, secret_key);
        let error = create_bucket(&wrong, &options).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Denied, "{error}");
        let bucket = Bucket::open(&wrong, "vol", &options).unwrap();
        let begin = Instant::now();
        let error = bucket.check_marker("u").await.unwrap_err();
        assert_eq!(error.kind(), Kind::Denied, "{error}");
        assert!(error.to_string().contains("secret key"), "{error}");
        assert!(
            begin.elapsed() < Duration::from_secs(5),
            "a refusal is no reason to wait"
        );
    }

    // The server is killed under a put: an error within the bound, never a hang.
    drop(weed);
    let short = self::options(Duration::from_secs(3));
    let store = SegmentStore::open(&config, "vol", volume, short.clone()).unwrap();
    let begin = Instant::now();
    let error = store.put(build(&frames[2]).0).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(
        begin.elapsed() < Duration::from_secs(7),
        "{:?}",
        begin.elapsed()
    );
    let begin = Instant::now();
    let error = create_bucket(&config, &short).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(
        begin.elapsed() < Duration::from_secs(7),
        "{:?}",
        begin.elapsed()
    );
}

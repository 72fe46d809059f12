//! How does a metadata cluster bear size? What `benches/scale` is made of: sessions that fill a volume as fast as the cluster
//! takes it, without a mount in the way, and threads that work through a mount meanwhile.
//!
//! - [`inodes`]: millions of inodes; [`extents`]: one file of very many extents
//! - [`others`]: stat, create and rename on files of their own until told to stop

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use hdrhistogram::Histogram;
use heliofs_proto::ids::Ino;
use heliofs_proto::limits::{COMMIT_EXTENTS_MAX, SEGMENTS_ALLOCATE_MAX};
use heliofs_proto::v1::{self, FileKind, command::Op};
use meta_client::{Cluster, MetaUrl, Session, SessionOptions, Token};

/// Which volume, as whom.
#[derive(clap::Args)]
pub(crate) struct Target {
    /// helio://HOST:PORT[,HOST:PORT…]
    #[arg(long)]
    pub(crate) url: String,
    /// The volume's name.
    #[arg(long)]
    pub(crate) volume: String,
    /// The cluster's token.
    #[arg(long, env = "HELIOFS_TOKEN_FILE")]
    pub(crate) token_file: PathBuf,
}

/// What `inodes` makes.
#[derive(clap::Args)]
pub(crate) struct Inodes {
    #[command(flatten)]
    target: Target,
    /// Name of the tree's root, a new entry of the volume's root.
    #[arg(long)]
    root: String,
    /// Files to create; directories come on top.
    #[arg(long)]
    inodes: u64,
    /// Files of each directory.
    #[arg(long, default_value_t = 1000)]
    per_directory: u64,
    /// Sessions that create at once.
    #[arg(long, default_value_t = 4)]
    sessions: u64,
    /// Creates under way in each session; a session has at most 256.
    #[arg(long, default_value_t = 200)]
    pipeline: usize,
}

/// What `extents` makes.
#[derive(clap::Args)]
pub(crate) struct Extents {
    #[command(flatten)]
    target: Target,
    /// The file, a new entry of the volume's root.
    #[arg(long)]
    name: String,
    /// Its extents, none adjacent to another.
    #[arg(long)]
    extents: u64,
    /// Commits under way.
    #[arg(long, default_value_t = 32)]
    pipeline: usize,
}

/// What `others` does.
#[derive(clap::Args)]
pub(crate) struct Others {
    /// A directory of the mount; a new directory is made in it and removed again.
    #[arg(long)]
    directory: PathBuf,
    /// Threads that work at once.
    #[arg(long, default_value_t = 4)]
    threads: usize,
    /// Ends when this file appears.
    #[arg(long)]
    until: PathBuf,
    /// What the result is filed under.
    #[arg(long)]
    label: String,
}

/// Whoever made it all.
fn caller() -> v1::Caller {
    v1::Caller {
        uid: 0,
        gid: 0,
        pid: std::process::id(),
        ..v1::Caller::default()
    }
}

pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?)
}

impl Target {
    pub(crate) async fn session(&self) -> anyhow::Result<Session> {
        let url: MetaUrl = self.url.parse()?;
        let cluster = Cluster::from_url(&url, Token::from_file(&self.token_file)?);
        let options = SessionOptions {
            volume: self.volume.clone(),
            host: "bench".to_owned(),
            short_lived: true,
            // A filled pipeline on a busy machine waits for longer than a person would.
            op_deadline: Duration::from_secs(120),
            ..SessionOptions::default()
        };
        Ok(Session::attach(cluster, options).await?)
    }
}

pub(crate) async fn create(
    session: &Session,
    parent: Ino,
    name: String,
    kind: FileKind,
) -> anyhow::Result<Ino> {
    let create = v1::Create {
        parent: parent.0,
        name: Bytes::from(name),
        kind: kind as i32,
        mode: 0o755,
        exclusive: true,
        ..v1::Create::default()
    };
    let reply = session.mutate(caller(), Op::Create(create)).await?;
    Ok(Ino(reply
        .attr
        .context("a create's reply has no inode")?
        .ino))
}

/// Creates a tree of empty files and prints how long it took, as one JSON line.
pub(crate) fn inodes(options: &Inodes) -> anyhow::Result<()> {
    ensure!(options.per_directory > 0, "a directory holds files");
    runtime()?.block_on(async {
        let began = Instant::now();
        let first = options.target.session().await?;
        let root = create(&first, Ino(1), options.root.clone(), FileKind::Directory).await?;
        first.detach().await;
        let directories = options.inodes.div_ceil(options.per_directory);
        let next = AtomicU64::new(0);
        let made = AtomicU64::new(0);
        let workers = (0..options.sessions).map(|_| fill(options, root, directories, &next, &made));
        let told = report(&made, options.inodes);
        tokio::select! {
            done = futures::future::try_join_all(workers) => done.map(drop)?,
            () = told => {}
        }
        let seconds = began.elapsed().as_secs_f64();
        let line = serde_json::json!({
            "inodes": options.inodes,
            "directories": directories,
            "seconds": seconds,
            "per_second": options.inodes as f64 / seconds,
        });
        println!("{line}");
        Ok(())
    })
}

/// Fills directories, one after the other, until all are taken.
async fn fill(
    options: &Inodes,
    root: Ino,
    directories: u64,
    next: &AtomicU64,
    made: &AtomicU64,
) -> anyhow::Result<()> {
    let session = options.target.session().await?;
    loop {
        let directory = next.fetch_add(1, Ordering::Relaxed);
        if directory >= directories {
            break;
        }
        let name = format!("directory-{directory:06}");
        let parent = create(&session, root, name, FileKind::Directory).await?;
        let from = directory * options.per_directory;
        let to = options.inodes.min(from + options.per_directory);
        stream::iter(from..to)
            .map(|n| create(&session, parent, format!("file-{n:09}.dat"), FileKind::File))
            .buffer_unordered(options.pipeline)
            .try_for_each(|_| {
                made.fetch_add(1, Ordering::Relaxed);
                futures::future::ok(())
            })
            .await?;
    }
    session.detach().await;
    Ok(())
}

/// Says every ten seconds how far it is; never ends.
async fn report(made: &AtomicU64, of: u64) {
    let every = Duration::from_secs(10);
    let mut before = 0;
    loop {
        tokio::time::sleep(every).await;
        let now = made.load(Ordering::Relaxed);
        eprintln!(
            "    {now} of {of} inodes, {}/s",
            (now - before) / every.as_secs()
        );
        before = now;
    }
}

/// Bytes of each extent: a page of a random writer.
const EXTENT_BYTES: u64 = 4096;
/// Extents of a segment: 4 MiB of them.
const EXTENTS_PER_SEGMENT: u64 = 1024;

/// Makes one file of many extents, as a random writer would have left it, and prints how long it took, as one JSON line. The
/// segments have no objects: nothing reads them.
pub(crate) fn extents(options: &Extents) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let began = Instant::now();
        let session = options.target.session().await?;
        let ino = create(&session, Ino(1), options.name.clone(), FileKind::File).await?;
        let segments = allocate(&session, options.extents.div_ceil(EXTENTS_PER_SEGMENT)).await?;
        let per_commit = COMMIT_EXTENTS_MAX as u64;
        stream::iter(0..options.extents.div_ceil(per_commit))
            .map(|n| {
                let to = options.extents.min((n + 1) * per_commit);
                commit(&session, ino, n * per_commit..to, &segments)
            })
            .buffer_unordered(options.pipeline)
            .try_collect::<()>()
            .await?;
        session.detach().await;
        let seconds = began.elapsed().as_secs_f64();
        println!(
            "{}",
            serde_json::json!({ "extents": options.extents, "seconds": seconds })
        );
        Ok(())
    })
}

/// So many segment ids.
async fn allocate(session: &Session, wanted: u64) -> anyhow::Result<Vec<u64>> {
    let mut ids = Vec::new();
    while (ids.len() as u64) < wanted {
        let op = Op::SegmentsAllocate(v1::SegmentsAllocate {
            count: SEGMENTS_ALLOCATE_MAX,
        });
        let first = session.mutate(caller(), op).await?.value;
        ids.extend(first..first + u64::from(SEGMENTS_ALLOCATE_MAX));
    }
    Ok(ids)
}

/// Extents `range` of the file, with the segments that they are the first to name.
async fn commit(
    session: &Session,
    ino: Ino,
    range: std::ops::Range<u64>,
    ids: &[u64],
) -> anyhow::Result<()> {
    // Commits overtake each other, so each names all segments that it touches; those that are known are checked, not made.
    let segment = |index: u64| v1::Segment {
        id: ids[index as usize],
        length: EXTENTS_PER_SEGMENT * EXTENT_BYTES,
        checksum: 0,
        live_bytes: 0,
        data_bytes: EXTENTS_PER_SEGMENT * EXTENT_BYTES,
    };
    let touched = range.start / EXTENTS_PER_SEGMENT..=(range.end - 1) / EXTENTS_PER_SEGMENT;
    let extents = range.map(|n| v1::Extent {
        // Holes between them, so that no two can ever be merged.
        offset: n * 2 * EXTENT_BYTES,
        length: EXTENT_BYTES,
        segment: ids[(n / EXTENTS_PER_SEGMENT) as usize],
        frame: 0,
        frame_offset: (n % EXTENTS_PER_SEGMENT * EXTENT_BYTES) as u32,
        inline_bytes: Bytes::new(),
    });
    let op = Op::Commit(v1::Commit {
        segments: touched.map(segment).collect(),
        files: vec![v1::FileCommit {
            ino: ino.0,
            extents: extents.collect(),
            ..v1::FileCommit::default()
        }],
    });
    session.mutate(caller(), op).await?;
    Ok(())
}

/// The kinds of operation that `others` times. A stat may be answered by the mount, an open is always answered by the leader.
const KINDS: [&str; 4] = ["stat", "open", "create", "rename"];

type Latencies = [Histogram<u64>; KINDS.len()];

fn latencies() -> Latencies {
    KINDS.map(|_| crate::load::histogram())
}

/// Works until told to stop and prints a JSON line per kind of operation, times in microseconds.
pub(crate) fn others(options: &Others) -> anyhow::Result<()> {
    let top = tempfile::Builder::new()
        .prefix("others-")
        .tempdir_in(&options.directory)
        .context("making a directory to work in")?;
    let together = Barrier::new(options.threads);
    let merged = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..options.threads)
            .map(|thread| {
                let directory = top.path().join(format!("thread{thread}"));
                let together = &together;
                scope.spawn(move || {
                    fs::create_dir(&directory)?;
                    together.wait();
                    work(&directory, &options.until)
                })
            })
            .collect();
        let mut merged = latencies();
        for worker in workers {
            let found = worker.join().expect("a worker returns its errors")?;
            for (all, one) in merged.iter_mut().zip(found) {
                all.add(one).expect("all histograms have the same bounds");
            }
        }
        anyhow::Ok(merged)
    })?;
    for (kind, latencies) in KINDS.iter().zip(&merged) {
        let line = serde_json::json!({
            "label": options.label,
            "kind": kind,
            "operations": latencies.len(),
            "p50_us": latencies.value_at_quantile(0.5),
            "p99_us": latencies.value_at_quantile(0.99),
            "max_us": latencies.max(),
        });
        println!("{line}");
    }
    top.close().context("removing what the run made")?;
    Ok(())
}

/// Creates a file, renames it over an older one, looks at that one and opens it: the directory stays small.
fn work(directory: &Path, until: &Path) -> anyhow::Result<Latencies> {
    const KEPT: u64 = 64;
    let mut latencies = latencies();
    let mut timed = |kind: usize, run: &dyn Fn() -> std::io::Result<()>| {
        let began = Instant::now();
        run().with_context(|| KINDS[kind])?;
        latencies[kind].saturating_record((began.elapsed().as_micros() as u64).max(1));
        anyhow::Ok(())
    };
    let mut n: u64 = 0;
    // Looking for the file is itself a system call, but on another file system.
    while !until.exists() {
        let new = directory.join(format!("n{n}"));
        let kept = directory.join(format!("k{}", n % KEPT));
        timed(2, &|| fs::File::create_new(&new).map(drop))?;
        timed(3, &|| fs::rename(&new, &kept))?;
        timed(0, &|| fs::symlink_metadata(&kept).map(drop))?;
        timed(1, &|| fs::File::open(&kept).map(drop))?;
        n += 1;
    }
    Ok(latencies)
}

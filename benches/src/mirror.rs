//! How far is a mirror behind, and how quickly does it come back? What `benches/mirror` is made of.
//!
//! - [`relay`]: a link with a round trip of its own, since the machines have no netem
//! - [`lag`]: commits at a given rate; each entry's age when the mirror has applied it, from its commit stamp
//! - [`catch_up`]: a mirror that was paused; entries per second that it applies while the source goes on
//!
//! Source and mirror run on one machine, so that stamps and arrival are by one clock.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use futures::{StreamExt, stream};
use hdrhistogram::Histogram;
use heliofs_proto::ids::{Ino, Position};
use heliofs_proto::v1::{self, FileKind, change_slot_request::Change};
use meta_client::{Cluster, MetaUrl, Session, Token};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::scale::{Target, create, runtime};

/// A link.
#[derive(clap::Args)]
pub(crate) struct Relay {
    /// host:port of the far end.
    #[arg(long)]
    to: String,
    /// Where to listen.
    #[arg(long)]
    listen: String,
    /// Milliseconds of a round trip over it.
    #[arg(long)]
    rtt_ms: u64,
}

/// A source and its mirror.
#[derive(clap::Args)]
pub(crate) struct Pair {
    #[command(flatten)]
    source: Target,
    /// META-URL of the mirror.
    #[arg(long)]
    mirror: String,
    /// Commits a second; what was reached is printed.
    #[arg(long, default_value_t = 1000)]
    rate: u64,
    /// What the result is filed under.
    #[arg(long)]
    label: String,
}

/// What `mirror-lag` does.
#[derive(clap::Args)]
pub(crate) struct Lag {
    #[command(flatten)]
    pair: Pair,
    /// How long.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
}

/// What `mirror-catch-up` does.
#[derive(clap::Args)]
pub(crate) struct CatchUp {
    #[command(flatten)]
    pair: Pair,
    /// Entries that the mirror is to be behind.
    #[arg(long, default_value_t = 100_000)]
    entries: u64,
    /// The mirror's slot.
    #[arg(long)]
    slot: String,
}

/// Passes connections on until it is ended.
pub(crate) fn relay(options: &Relay) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let listener = TcpListener::bind(&options.listen).await?;
        println!("ready: {}", listener.local_addr()?);
        let delay = Duration::from_millis(options.rtt_ms) / 2;
        loop {
            let (near, _) = listener.accept().await?;
            let to = options.to.clone();
            tokio::spawn(async move {
                // A far end that is down refuses, and so do we.
                let Ok(far) = TcpStream::connect(&to).await else {
                    return;
                };
                if near.set_nodelay(true).and(far.set_nodelay(true)).is_err() {
                    return;
                }
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = far.into_split();
                tokio::join!(
                    pass(near_read, far_write, delay),
                    pass(far_read, near_write, delay)
                );
            });
        }
    })
}

/// One direction. What is under way is bounded by what a link of 1 GB/s would hold.
async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    delay: Duration,
) {
    let (sender, mut receiver) = mpsc::channel::<(tokio::time::Instant, Vec<u8>)>(4096);
    let read = async move {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count) = from.read(&mut buffer).await
            && count > 0
        {
            let due = tokio::time::Instant::now() + delay;
            if sender.send((due, buffer[..count].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let write = async move {
        while let Some((due, bytes)) = receiver.recv().await {
            tokio::time::sleep_until(due).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(read, write);
}

/// Creates files at a rate until told to stop.
struct Commits {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
}

/// Sessions that commit, and commits under way in each; a session has at most 256.
const SESSIONS: u64 = 4;
const PIPELINE: usize = 200;

impl Commits {
    async fn start(target: &Target, rate: u64, label: &str) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let mut sessions: Vec<(Session, Ino)> = Vec::new();
        for number in 0..SESSIONS {
            let session = target.session().await?;
            let name = format!("{label}-{number}");
            let parent = create(&session, Ino::ROOT, name, FileKind::Directory).await?;
            sessions.push((session, parent));
        }
        let (stopped, counted) = (stop.clone(), done.clone());
        let task = tokio::spawn(async move {
            let work = sessions.iter().map(|(session, parent)| {
                let (stopped, counted) = (&stopped, &counted);
                let began = tokio::time::Instant::now();
                let every = Duration::from_secs_f64(SESSIONS as f64 / rate as f64);
                stream::iter(0u32..)
                    .take_while(|_| {
                        let goes_on = !stopped.load(Ordering::Relaxed);
                        async move { goes_on }
                    })
                    .map(move |n| async move {
                        tokio::time::sleep_until(began + every * n).await;
                        create(session, *parent, n.to_string(), FileKind::File).await?;
                        counted.fetch_add(1, Ordering::Relaxed);
                        anyhow::Ok(())
                    })
                    .buffer_unordered(PIPELINE)
                    .fold(anyhow::Ok(()), |all, one| async move { all.and(one) })
            });
            let outcomes = futures::future::join_all(work).await;
            for (session, _) in &sessions {
                session.detach().await;
            }
            outcomes.into_iter().collect()
        });
        Ok(Self { stop, done, task })
    }

    async fn stop(self) -> anyhow::Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await??;
        Ok(self.done.load(Ordering::Relaxed))
    }
}

impl Pair {
    fn clusters(&self) -> anyhow::Result<(Cluster, Cluster)> {
        let token: &PathBuf = &self.source.token_file;
        let connect = |url: &str| -> anyhow::Result<Cluster> {
            let url: MetaUrl = url.parse()?;
            Ok(Cluster::from_url(&url, Token::from_file(token)?))
        };
        Ok((connect(&self.source.url)?, connect(&self.mirror)?))
    }

    async fn status(&self, mirror: &Cluster) -> anyhow::Result<v1::MirrorStatus> {
        let all = mirror.mirror_status(Some(&self.source.volume)).await?;
        all.into_iter().next().context("the mirror says nothing")
    }
}

fn now_nanos() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    since.as_nanos() as i64
}

/// Prints one JSON line: the rate that was reached, and the age of entries when the mirror had applied them.
pub(crate) fn lag(options: &Lag) -> anyhow::Result<()> {
    let pair = &options.pair;
    runtime()?.block_on(async {
        let (_, mirror) = pair.clusters()?;
        let at = pair.status(&mirror).await?.applied.unwrap_or_default();
        // A mirror tells what it has applied, with the source's stamps.
        let mut applied = mirror.follow(&pair.source.volume, Position::from(at), true);
        let (sender, mut ages) = mpsc::unbounded_channel();
        let reader = tokio::spawn(async move {
            while let Ok(Some(frame)) = applied.next_frame().await {
                let now = now_nanos();
                for entry in frame.entries {
                    if sender.send(now - entry.time).is_err() {
                        return;
                    }
                }
            }
        });
        let began = Instant::now();
        let commits = Commits::start(&pair.source, pair.rate, &pair.label).await?;
        tokio::time::sleep(Duration::from_secs(options.seconds)).await;
        // Those that waited for their moment still come.
        let done = commits.stop().await?;
        let spent = began.elapsed();
        // The last ones are on their way.
        tokio::time::sleep(Duration::from_secs(3)).await;
        reader.abort();
        ages.close();
        let mut histogram = Histogram::<u64>::new(3)?;
        while let Some(age) = ages.recv().await {
            histogram.record((age.max(0) / 1000) as u64)?;
        }
        ensure!(
            histogram.len() >= done,
            "the mirror told of {} entries, {done} were committed",
            histogram.len()
        );
        let millis = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
        let line = serde_json::json!({
            "label": pair.label,
            "asked_rate": pair.rate,
            "rate": done as f64 / spent.as_secs_f64(),
            "entries": histogram.len(),
            "lag_p50_ms": millis(0.5),
            "lag_p99_ms": millis(0.99),
            "lag_max_ms": millis(1.0),
        });
        println!("{line}");
        Ok(())
    })
}

/// Prints one JSON line: how many entries a second the mirror applied until it had caught up.
pub(crate) fn catch_up(options: &CatchUp) -> anyhow::Result<()> {
    let pair = &options.pair;
    runtime()?.block_on(async {
        let (source, mirror) = pair.clusters()?;
        let slot = |pause| v1::ChangeSlotRequest {
            volume: pair.source.volume.clone(),
            mirror: options.slot.clone(),
            change: Some(Change::Pause(pause)),
        };
        source.change_slot(slot(true)).await?;
        wait(pair, &mirror, "the pause", |status| {
            status.doing == "paused"
        })
        .await?;
        let fill = Commits::start(&pair.source, 1_000_000, &format!("{}-fill", pair.label)).await?;
        while fill.done.load(Ordering::Relaxed) < options.entries {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        fill.stop().await?;
        let from = pair.status(&mirror).await?.applied.unwrap_or_default().seq;
        let load = Commits::start(&pair.source, pair.rate, &pair.label).await?;
        source.change_slot(slot(false)).await?;
        let mut rates = VecDeque::new();
        let mut began: Option<(Instant, u64)> = None;
        let done_before = load.done.load(Ordering::Relaxed);
        loop {
            let status = pair.status(&mirror).await?;
            let applied = status.applied.unwrap_or_default().seq;
            if applied > from {
                let (at, first) = *began.get_or_insert((Instant::now(), applied));
                rates.push_back((at.elapsed(), applied - first));
                let head = status.source_head.unwrap_or_default().seq;
                // Within a fifth of a second of the load.
                if head.saturating_sub(applied) < pair.rate / 5 && head > from + options.entries / 2
                {
                    break;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let (spent, entries) = *rates.back().context("it never moved")?;
        let committed = load.done.load(Ordering::Relaxed) - done_before;
        load.stop().await?;
        let line = serde_json::json!({
            "label": pair.label,
            "behind": options.entries,
            "entries": entries,
            "seconds": spent.as_secs_f64(),
            "rate": entries as f64 / spent.as_secs_f64(),
            "source_rate": committed as f64 / spent.as_secs_f64(),
        });
        println!("{line}");
        Ok(())
    })
}

async fn wait(
    pair: &Pair,
    mirror: &Cluster,
    what: &str,
    reached: impl Fn(&v1::MirrorStatus) -> bool,
) -> anyhow::Result<()> {
    let until = Instant::now() + Duration::from_secs(60);
    while !reached(&pair.status(mirror).await?) {
        ensure!(Instant::now() < until, "{what} did not happen within 60 s");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

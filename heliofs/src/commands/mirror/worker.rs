//! `heliofs mirror worker`: copies objects into a mirror's own bucket, without a mount.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use blockstore::object::RateLimit;
use blockstore::{Bucket, StoreOptions};
use clap::Args;
use meta_client::{Session, SessionOptions};
use mirror_sync::check::Checker;
use mirror_sync::copy::{Copier, CopyProgress, delete_dead};
use parking_lot::Mutex;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::At;
use crate::buckets::BucketAccess;
use crate::commands::{auth, version};
use crate::connect::host_name;
use crate::copying::{self, CopyMetrics, WorkerHost};
use crate::failure::{Failure, Outcome};
use crate::serve_metrics::{self, Exposed};
use crate::signals::Stop;
use crate::units::{self, show_size};
use crate::{output, progress};

/// How often progress is shown, and whether all is copied looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What is copied where, and how fast.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    at: At,
    #[command(flatten)]
    buckets: BucketAccess,
    /// Objects under way at once.
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Ends when the bucket lacks nothing but what could not be had (exit code 4, if there is such).
    #[arg(long)]
    once: bool,
    /// Bytes per second to the mirror's bucket at most. 0: no limit.
    #[arg(long, value_parser = units::parse_size, default_value = "0", value_name = "SIZE")]
    upload_limit: u64,
    /// Bytes per second from both buckets together at most. 0: no limit.
    #[arg(long, value_parser = units::parse_size, default_value = "0", value_name = "SIZE")]
    download_limit: u64,
    /// Both buckets are checked against the metadata this long after the last check, by whichever mount or worker comes first:
    /// what is missing is copied again, or put back at the source if the keys allow it. 0s: not by this worker.
    #[arg(long, value_parser = units::parse_duration, default_value = "7d", value_name = "TIME")]
    sync_interval: Duration,
    /// Serves /metrics and /ready here.
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
}

fn as_json(volume: &str, progress: &CopyProgress) -> serde_json::Value {
    json!({
        "volume": volume,
        "copied_segments": progress.copied_segments,
        "copied_bytes": progress.copied_bytes,
        "pulled_bytes": progress.pulled_bytes,
        "found_segments": progress.found_segments,
        "repacked_segments": progress.repacked_segments,
        "bad_segments": progress.bad_segments,
    })
}

pub(super) async fn run(options: Options, json: bool) -> Outcome {
    let mut signals = Stop::catch()?;
    let at = &options.at;
    let target = at.access.target(&at.url, at.name.as_deref())?;
    let session_options = SessionOptions {
        volume: target.volume.clone(),
        host: host_name(),
        mount_point: "(mirror worker)".to_owned(),
        build: version::BUILD.to_owned(),
        read_only: true,
        short_lived: true,
        ..SessionOptions::default()
    };
    let session = Session::attach(target.cluster.clone(), session_options).await?;
    let welcome = session.welcome();
    let Some(second) = welcome.second.clone() else {
        session.detach().await;
        return Err(
            Failure::new(format!("{} has no bucket of its own", target.volume))
                .hint("`heliofs mirror bucket` gives a mirror one"),
        );
    };
    let access = match auth::find(&at.url)? {
        Some(saved) => options.buckets.clone().or(saved.buckets),
        None => options.buckets.clone(),
    };
    let (storage, second) = access.apply(session.storage(), Some(second))?;
    let second = second.expect("it was given");
    let store_options = StoreOptions {
        uploads_max: options.threads.into(),
        downloads_max: options.threads.into(),
        upload_bytes_per_second: options.upload_limit,
        download_budget: RateLimit::new(options.download_limit).map(Arc::new),
        ..StoreOptions::default()
    };
    let buckets = copying::open(&session, &storage, &second, &store_options)?;
    let checked = copying::open(&session, &storage, &second, &store_options)?;
    // One that is another's must be noticed before anything is put into it.
    buckets.own.check_marker(&storage.uuid).await?;
    copying::check_second(&buckets.second, &second.uuid).await?;
    let own = Bucket::open(&storage, &welcome.prefix, &store_options)?;
    let registry = prometheus::Registry::new();
    let host = Arc::new(WorkerHost {
        session: Mutex::new(session.clone()),
        progress: Mutex::default(),
        metrics: CopyMetrics::new(&registry, &target.volume),
    });
    let stop = CancellationToken::new();
    if let Some(listen) = options.metrics {
        let watched = host.clone();
        let exposed = Exposed {
            metrics: Box::new(move || serve_metrics::encode(&registry)),
            unready: Box::new(move || watched.session.lock().gone()),
        };
        serve_metrics::start(listen, exposed, stop.clone()).await?;
    }
    let copier = Copier::new(buckets, host.clone(), options.threads.into());
    let copying = tokio::spawn(copier.run(None, stop.clone()));
    let checking = tokio::spawn({
        let (host, stop) = (host.clone(), stop.clone());
        async move {
            if !options.sync_interval.is_zero() {
                let checker = Checker::new(checked, host, options.sync_interval);
                checker.run(stop).await;
            }
        }
    });
    let deleting = tokio::spawn(delete_dead(own, host.clone(), stop.clone()));
    let bar = progress::bar("copying", 0, false, json);
    let watching = watch(&options, &target, &host, &bar);
    let outcome = tokio::select! {
        outcome = watching => outcome,
        signal = signals.wait() => {
            tracing::info!(signal, "stopping");
            Ok(0)
        }
    };
    stop.cancel();
    for task in [copying, checking, deleting] {
        if let Err(error) = task.await {
            tracing::error!(%error, "a task of the worker failed");
        }
    }
    bar.finish_and_clear();
    let session = host.session.lock().clone();
    session.detach().await;
    let quarantined = outcome?;
    let done = host.progress.lock().clone();
    if json {
        output::print_json(&as_json(&target.volume, &done))?;
    } else {
        output::line(format_args!(
            "copied {} objects ({}), {} of them pulled from the source",
            done.copied_segments,
            show_size(done.copied_bytes),
            show_size(done.pulled_bytes)
        ))?;
    }
    if quarantined > 0 {
        return Err(Failure::damaged(format!(
            "{quarantined} objects can't be had from the source's bucket"
        ))
        .hint("`heliofs mirror status --missing` lists them; `heliofs mirror bucket --retry` tries them again"));
    }
    Ok(())
}

/// Until all is copied, with `--once`; how many objects are quarantined then. Renews the session.
async fn watch(
    options: &Options,
    target: &crate::connect::Target,
    host: &WorkerHost,
    bar: &indicatif::ProgressBar,
) -> Outcome<u64> {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let session = host.session.lock().clone();
        if let Some(why) = session.gone() {
            tracing::warn!(why, "the session is gone; beginning another one");
            match session.renew().await {
                Ok(renewed) => *host.session.lock() = renewed,
                Err(error) => tracing::warn!(%error, "no new session yet"),
            }
            continue;
        }
        let done = host.progress.lock().clone();
        bar.set_length(done.copied_segments + done.under_way + done.waiting);
        bar.set_position(done.copied_segments);
        if !options.once || done.under_way > 0 || done.waiting > 0 {
            continue;
        }
        let mirrors = target.cluster.mirror_status(Some(&target.volume)).await?;
        let copies = mirrors.into_iter().find_map(|status| status.copies);
        let copies = copies.unwrap_or_default();
        if copies.walk == 0 && copies.pending_segments == 0 {
            return Ok(copies.quarantined_segments);
        }
    }
}

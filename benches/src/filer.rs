//! How far is SeaweedFS's `filer.sync` behind? The nearest open peer of a mirror, measured as `mirror-lag` measures ours: metadata
//! alone (directories, since a file's data would go another way), at a rate, from the answer at the source to when the other
//! region shows it. Only some are looked for, since each look is a request.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures::{StreamExt, stream};
use hdrhistogram::Histogram;
use reqwest::{Client, StatusCode};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::scale::runtime;

/// Requests under way at once.
const PIPELINE: usize = 64;

/// Directories looked for in the other region, per second.
const LOOKED_FOR: u64 = 20;

/// Between two looks for the same one.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What is not there by then is an error.
const LOST_AFTER: Duration = Duration::from_secs(120);

/// What `filer-lag` does.
#[derive(clap::Args)]
pub(crate) struct FilerLag {
    /// http://host:port of the source's filer.
    #[arg(long)]
    from: String,
    /// http://host:port of the other region's filer.
    #[arg(long)]
    to: String,
    /// Directories a second; what was reached is printed.
    #[arg(long, default_value_t = 1000)]
    rate: u64,
    /// How long.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// What the result is filed under.
    #[arg(long)]
    label: String,
}

/// Prints one JSON line: the rate that was reached, and how long directories took to the other region.
pub(crate) fn lag(options: &FilerLag) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let client = Client::builder().no_proxy().build()?;
        let looks = Arc::new(Mutex::new(JoinSet::new()));
        let began = tokio::time::Instant::now();
        let every = Duration::from_secs_f64(1.0 / options.rate as f64);
        let count = options.rate * options.seconds;
        let sampled = (options.rate / LOOKED_FOR).max(1);
        let made: Vec<anyhow::Result<()>> = stream::iter(0..count)
            .map(|n| {
                let (client, looks) = (&client, &looks);
                async move {
                    tokio::time::sleep_until(began + every.mul_f64(n as f64)).await;
                    let path = format!("{}/{n}/", options.label);
                    let url = format!("{}/{path}", options.from);
                    let answer = client.post(&url).send().await?;
                    ensure!(answer.status().is_success(), "{url}: {}", answer.status());
                    if n % sampled == 0 {
                        let url = format!("{}/{path}", options.to);
                        let look = look_for(client.clone(), url, Instant::now());
                        looks.lock().await.spawn(look);
                    }
                    Ok(())
                }
            })
            .buffer_unordered(PIPELINE)
            .collect()
            .await;
        let spent = began.elapsed();
        made.into_iter().collect::<anyhow::Result<()>>()?;
        let mut histogram = Histogram::<u64>::new(3)?;
        let mut looks = looks.lock().await;
        while let Some(lag) = looks.join_next().await {
            histogram.record(lag??.as_micros() as u64)?;
        }
        let millis = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
        let line = serde_json::json!({
            "label": options.label,
            "asked_rate": options.rate,
            "rate": count as f64 / spent.as_secs_f64(),
            "entries": histogram.len(),
            "lag_p50_ms": millis(0.5),
            "lag_p99_ms": millis(0.99),
            "lag_max_ms": millis(1.0),
        });
        println!("{line}");
        Ok(())
    })
}

/// How long after `since` the directory is there.
async fn look_for(client: Client, url: String, since: Instant) -> anyhow::Result<Duration> {
    loop {
        let answer = client.head(&url).send().await.context("the other filer")?;
        if answer.status() != StatusCode::NOT_FOUND {
            ensure!(answer.status().is_success(), "{url}: {}", answer.status());
            return Ok(since.elapsed());
        }
        ensure!(
            since.elapsed() < LOST_AFTER,
            "{url} has not come within {LOST_AFTER:?}"
        );
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

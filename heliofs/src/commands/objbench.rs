//! `heliofs objbench`: how fast an object store is, and whether it does what a volume needs.

use std::time::{Duration, Instant};

use blockstore::{Bucket, StoreError, StoreOptions};
use bytes::Bytes;
use clap::Args;
use futures::StreamExt;
use heliofs_proto::v1::StorageConfig;
use object_store::PutPayload;
use serde_json::json;

use super::format::{Keys, Storage};
use crate::failure::{Failure, Outcome};
use crate::units::{self, show_size};
use crate::{output, progress};

/// Where, and how much.
#[derive(Args)]
pub(crate) struct Options {
    /// A directory, or http://HOST:PORT/BUCKET, https://BUCKET.s3.REGION.amazonaws.com, BUCKET. It must exist.
    #[arg(value_name = "BUCKET")]
    bucket: String,
    /// What kind of store it is.
    #[arg(long, value_enum, default_value = "s3")]
    storage: Storage,
    #[command(flatten)]
    keys: Keys,
    /// The bucket's region, when its URL does not say.
    #[arg(long, default_value = "")]
    region: String,
    /// Length of large objects.
    #[arg(long, value_parser = units::parse_size, default_value = "4M", value_name = "SIZE")]
    block_size: u64,
    /// Length of small objects.
    #[arg(long, value_parser = units::parse_size, default_value = "64K", value_name = "SIZE")]
    small_size: u64,
    /// Large objects.
    #[arg(long, default_value_t = 64, value_name = "N")]
    objects: u32,
    /// Small objects.
    #[arg(long, default_value_t = 256, value_name = "N")]
    small_objects: u32,
    /// Requests at once.
    #[arg(long, default_value_t = 8, value_name = "N")]
    threads: usize,
}

/// What one kind of request came to.
struct Measured {
    what: &'static str,
    requests: usize,
    bytes: u64,
    took: Duration,
    /// Of each request, ascending.
    latencies: Vec<Duration>,
}

impl Measured {
    fn percentile(&self, percent: usize) -> Duration {
        let at = (self.latencies.len() * percent / 100).min(self.latencies.len().saturating_sub(1));
        self.latencies.get(at).copied().unwrap_or_default()
    }
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    let (access_key, secret_key) = match options.storage {
        Storage::S3 => options.keys.find()?,
        Storage::File | Storage::Memory => (String::new(), String::new()),
    };
    let config = StorageConfig {
        storage: options.storage.name().to_owned(),
        bucket: options.bucket.clone(),
        access_key,
        secret_key,
        region: options.region.clone(),
        ..StorageConfig::default()
    };
    let store_options = StoreOptions {
        memory_cache_bytes: 0,
        uploads_max: options.threads.max(1),
        downloads_max: options.threads.max(1),
        ..StoreOptions::default()
    };
    // A prefix of its own, which no volume's name can be.
    let prefix = format!("heliofs-objbench-{}", units::random_hex());
    let bucket = Bucket::open(&config, &prefix, &store_options)?;
    let outcome = measure(&bucket, &options, json).await;
    let cleaned = bucket.delete_all().await;
    let (measured, conditional) = outcome?;
    cleaned.map_err(|error| {
        Failure::new(format!(
            "the test objects below {prefix}/ could not all be deleted: {error}"
        ))
    })?;
    show(&measured, conditional, json)
}

fn payload(length: u64, seed: u64) -> Bytes {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

async fn measure(bucket: &Bucket, options: &Options, json: bool) -> Outcome<(Vec<Measured>, bool)> {
    let (large, small) = (options.objects, options.small_objects);
    let steps = u64::from(large) * 2 + u64::from(small) * 3;
    let bar = progress::bar("objbench", steps, false, json);
    let mut measured = Vec::new();
    for (kind, count, length) in [
        ("large", large, options.block_size),
        ("small", small, options.small_size),
    ] {
        let data = payload(length, 7);
        let sum = crc32fast::hash(&data);
        let (put, get) = match kind {
            "large" => ("put large objects", "get large objects"),
            _ => ("put small objects", "get small objects"),
        };
        measured.push(
            several(put, count, length, options.threads, &bar, |n| {
                let payload = PutPayload::from_bytes(data.clone());
                async move { bucket.put_new(&format!("{kind}/{n}"), payload, sum).await }
            })
            .await?,
        );
        measured.push(
            several(get, count, length, options.threads, &bar, |n| async move {
                let got = bucket.get_range(&format!("{kind}/{n}"), 0..length).await?;
                match crc32fast::hash(&got) == sum {
                    true => Ok(()),
                    false => Err(StoreError::Invalid(format!(
                        "object {n} came back as another"
                    ))),
                }
            })
            .await?,
        );
    }
    measured.push(
        several("list", 4, 0, 1, &bar, |_| async move {
            let listed = bucket.list("small").await?;
            match listed.len() == small as usize {
                true => Ok(()),
                false => Err(StoreError::Invalid(format!(
                    "the listing shows {} of {small} objects",
                    listed.len()
                ))),
            }
        })
        .await?,
    );
    // Whether create-if-absent is kept: other bytes under the same name must be refused.
    let other = payload(100, 9);
    let sum = crc32fast::hash(&other);
    let again = bucket
        .put_new("large/0", PutPayload::from_bytes(other), sum)
        .await;
    let conditional = matches!(again, Err(StoreError::AlreadyExists { .. }));
    measured.push(
        several("delete", small, 0, options.threads, &bar, |n| async move {
            bucket.delete(&format!("small/{n}")).await
        })
        .await?,
    );
    bar.finish_and_clear();
    Ok((measured, conditional))
}

async fn several<F>(
    what: &'static str,
    count: u32,
    length: u64,
    threads: usize,
    bar: &indicatif::ProgressBar,
    request: impl Fn(u32) -> F,
) -> Outcome<Measured>
where
    F: Future<Output = Result<(), StoreError>>,
{
    let began = Instant::now();
    let mut requests = futures::stream::iter(0..count)
        .map(|n| {
            let began = Instant::now();
            let request = request(n);
            async move { request.await.map(|()| began.elapsed()) }
        })
        .buffer_unordered(threads.max(1));
    let mut latencies = Vec::new();
    while let Some(latency) = requests.next().await {
        latencies.push(latency?);
        bar.inc(1);
    }
    latencies.sort_unstable();
    Ok(Measured {
        what,
        requests: latencies.len(),
        bytes: length * u64::from(count),
        took: began.elapsed(),
        latencies,
    })
}

fn show(measured: &[Measured], conditional: bool, json: bool) -> Outcome {
    let millis = |time: Duration| time.as_secs_f64() * 1000.0;
    if json {
        let measured: Vec<_> = measured
            .iter()
            .map(|it| {
                json!({
                    "what": it.what,
                    "requests": it.requests,
                    "bytes": it.bytes,
                    "seconds": it.took.as_secs_f64(),
                    "p50_ms": millis(it.percentile(50)),
                    "p99_ms": millis(it.percentile(99)),
                })
            })
            .collect();
        return output::print_json(
            &json!({ "measured": measured, "conditional_put": conditional }),
        );
    }
    let mut table = output::table(["request", "per second", "bytes per second", "p50", "p99"]);
    for it in measured {
        let seconds = it.took.as_secs_f64().max(1e-9);
        let rate = match it.bytes {
            0 => String::new(),
            bytes => show_size((bytes as f64 / seconds) as u64),
        };
        table.add_row([
            it.what.to_owned(),
            format!("{:.1}", it.requests as f64 / seconds),
            rate,
            format!("{:.1} ms", millis(it.percentile(50))),
            format!("{:.1} ms", millis(it.percentile(99))),
        ]);
    }
    output::print_table(&table)?;
    output::line(match conditional {
        true => "objects are never overwritten (create-if-absent works)",
        false => {
            "the store overwrites objects: heliofs works with it, but two volumes in one place would not be noticed"
        }
    })
}

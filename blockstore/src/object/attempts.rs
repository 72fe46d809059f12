//! [`Patience`]: how long and how often a request is tried again.

use std::future::Future;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::time::Instant;

use crate::metrics::Metrics;
use crate::{Kind, StoreError, StoreOptions};

/// A request may take this much longer per byte: a link of 1 MiB/s is slow, not dead.
const ALLOWANCE_BYTES_PER_SECOND: u64 = 1 << 20;

/// First pause between attempts; doubled each time, with jitter.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest pause: a store that comes back is noticed within it.
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// Times of `StoreOptions`.
#[derive(Clone, Debug)]
pub(super) struct Patience {
    /// A request fails for good after it.
    pub(super) deadline: Duration,
    /// An attempt is given up after it.
    pub(super) attempt_timeout: Duration,
}

impl Patience {
    pub(super) fn new(options: &StoreOptions) -> Self {
        Self {
            deadline: options.deadline,
            attempt_timeout: options.attempt_timeout,
        }
    }

    /// Runs `attempt` until it succeeds, fails for good, or the deadline passes. `bytes`: how much it moves.
    pub(super) async fn attempts<T, F, Fut>(
        &self,
        metrics: &Metrics,
        operation: &'static str,
        key: &str,
        bytes: u64,
        mut attempt: F,
    ) -> Result<T, StoreError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, StoreError>>,
    {
        let allowance = Duration::from_secs(bytes / ALLOWANCE_BYTES_PER_SECOND);
        let begin = Instant::now();
        let end = begin + self.deadline + allowance;
        let mut pauses = ExponentialBuilder::default()
            .with_min_delay(BACKOFF_MIN)
            .with_max_delay(BACKOFF_MAX)
            .with_jitter()
            .without_max_times()
            .build();
        let mut attempts = 0;
        loop {
            attempts += 1;
            let until = end.min(Instant::now() + self.attempt_timeout + allowance);
            let detail = match tokio::time::timeout_at(until, attempt()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(StoreError::Retry { detail, .. })) => detail,
                Ok(Err(error)) => {
                    // A missing or present object is an answer, not a failure.
                    if !matches!(error.kind(), Kind::NotFound | Kind::AlreadyExists) {
                        tracing::warn!(operation, key, %error, "the store refused");
                        metrics.failures.inc();
                    }
                    return Err(error);
                }
                Err(_) => "no answer in time".to_owned(),
            };
            let pause = pauses.next().unwrap_or(BACKOFF_MAX);
            if Instant::now() + pause >= end {
                metrics.failures.inc();
                tracing::warn!(operation, key, attempts, detail, "the store is unavailable");
                return Err(StoreError::Unavailable {
                    operation,
                    key: key.to_owned(),
                    waited: begin.elapsed(),
                    attempts,
                    detail,
                });
            }
            metrics.retries.inc();
            tracing::debug!(operation, key, attempts, detail, "trying again");
            tokio::time::sleep(pause).await;
        }
    }
}

//! S3: which bucket a URL means, its client, and what `object_store` cannot do (create a bucket).

use std::time::Duration;

use aws_sdk_s3::config::retry::RetryConfig as SdkRetry;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{Credentials, Region};
use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_s3::types::{BucketLocationConstraint, CreateBucketConfiguration};
use heliofs_proto::v1::StorageConfig;
use object_store::aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut};
use object_store::{BackoffConfig, ClientOptions, RetryConfig};

use crate::{StoreError, StoreOptions};

/// S3's default region, and the one that most compatible servers expect in signatures.
const REGION_DEFAULT: &str = "us-east-1";

/// Long enough for a slow TLS handshake, short enough that a dead address leaves time for retries.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a bucket is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct S3Place {
    /// `http://host:port`; `None` is Amazon's for the region.
    pub endpoint: Option<String>,
    /// The bucket's name.
    pub bucket: String,
    /// Keys begin with this, without slashes at its ends; often empty.
    pub prefix: String,
    /// The region's name.
    pub region: String,
}

impl S3Place {
    /// Understands `http://host:port/bucket[/prefix]`, `https://bucket.s3.region.amazonaws.com[/prefix]`,
    /// `https://s3.region.amazonaws.com/bucket`, `s3://bucket[/prefix]`, and a bucket's name alone. `region` overrides what
    /// the URL says.
    pub fn parse(url: &str, region: &str) -> Result<Self, StoreError> {
        let wrong = |why: &str| {
            StoreError::Invalid(format!(
                "`{url}` is not a bucket: {why}; write http://HOST:PORT/BUCKET, \
                 https://BUCKET.s3.REGION.amazonaws.com, or a bucket's name"
            ))
        };
        let (scheme, rest) = match url.split_once("://") {
            Some((scheme @ ("http" | "https"), rest)) => (scheme, rest),
            Some(("s3", rest)) => ("", rest),
            Some(_) => return Err(wrong("unknown scheme")),
            None => ("", url),
        };
        if rest.contains(['?', '#', '@', ' ']) {
            return Err(wrong("it holds one of ? # @ or a space"));
        }
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let path = path.trim_matches('/');
        let pick = |from_url: Option<&str>| match (region, from_url) {
            ("", None) => REGION_DEFAULT.to_owned(),
            ("", Some(found)) => found.to_owned(),
            (given, _) => given.to_owned(),
        };
        let first_and_rest = |path: &str| {
            let (first, rest) = path.split_once('/').unwrap_or((path, ""));
            (first.to_owned(), rest.trim_matches('/').to_owned())
        };
        if host.is_empty() {
            return Err(wrong("it names no host or bucket"));
        }
        if scheme.is_empty() {
            return Ok(Self {
                endpoint: None,
                bucket: host.to_owned(),
                prefix: path.to_owned(),
                region: pick(None),
            });
        }
        if let Some(amazon) = host.strip_suffix(".amazonaws.com") {
            let (bucket_dot, service) = match amazon.rfind("s3") {
                Some(at) => amazon.split_at(at),
                None => return Err(wrong("this host of Amazon's is not S3")),
            };
            let found = service
                .strip_prefix("s3")
                .map(|r| r.trim_start_matches(['.', '-']));
            let region = pick(found.filter(|r| !r.is_empty()));
            let (bucket, prefix) = match bucket_dot.strip_suffix('.') {
                Some(bucket) => (bucket.to_owned(), path.to_owned()),
                None => first_and_rest(path),
            };
            if bucket.is_empty() {
                return Err(wrong("it names no bucket"));
            }
            return Ok(Self {
                endpoint: None,
                bucket,
                prefix,
                region,
            });
        }
        let (bucket, prefix) = first_and_rest(path);
        if bucket.is_empty() {
            return Err(wrong("it names no bucket behind the host"));
        }
        Ok(Self {
            endpoint: Some(format!("{scheme}://{host}")),
            bucket,
            prefix,
            region: pick(None),
        })
    }

    fn plain_http(&self) -> bool {
        self.endpoint
            .as_deref()
            .is_some_and(|endpoint| endpoint.starts_with("http://"))
    }
}

/// A client of the bucket. Nothing is sent yet.
pub fn open(
    config: &StorageConfig,
    options: &StoreOptions,
) -> Result<(AmazonS3, S3Place), StoreError> {
    let place = S3Place::parse(&config.bucket, &config.region)?;
    // Without keys the SDK's usual sources apply: AWS_* variables, container and instance roles.
    let mut builder = if config.access_key.is_empty() {
        AmazonS3Builder::from_env()
    } else {
        AmazonS3Builder::new()
            .with_access_key_id(&config.access_key)
            .with_secret_access_key(&config.secret_key)
    };
    if let Some(endpoint) = &place.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    let client = ClientOptions::new()
        .with_allow_http(true)
        .with_connect_timeout(CONNECT_TIMEOUT)
        // Bucket's own retry loop knows the size of the request and sets the time-out; this one only backs it up.
        .with_timeout(options.deadline + options.attempt_timeout)
        .with_pool_idle_timeout(Duration::from_secs(60))
        .with_pool_max_idle_per_host(options.uploads_max + options.downloads_max);
    let store = builder
        .with_bucket_name(&place.bucket)
        .with_region(&place.region)
        .with_virtual_hosted_style_request(place.endpoint.is_none() && !place.bucket.contains('.'))
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        // TLS protects the body already; over plain HTTP the signature's SHA-256 does.
        .with_unsigned_payload(!place.plain_http())
        .with_client_options(client)
        .with_retry(RetryConfig {
            backoff: BackoffConfig::default(),
            // Ours is the only retry loop: counted, and bounded by one deadline.
            max_retries: 0,
            retry_timeout: options.deadline,
        })
        .build()
        .map_err(|error| StoreError::Invalid(format!("bucket `{}`: {error}", config.bucket)))?;
    Ok((store, place))
}

/// Creates the bucket unless it exists.
///
/// Errors: `Denied` (wrong keys, no right to create, name taken by another account), `Unavailable` (no answer).
pub async fn create_bucket(
    config: &StorageConfig,
    options: &StoreOptions,
) -> Result<(), StoreError> {
    let place = S3Place::parse(&config.bucket, &config.region)?;
    if config.access_key.is_empty() {
        // The SDK's chain of credential sources is in a crate that we do without; the bucket must exist then.
        return Ok(());
    }
    let mut sdk = aws_sdk_s3::Config::builder()
        .behavior_version_latest()
        .region(Region::new(place.region.clone()))
        .credentials_provider(Credentials::new(
            &config.access_key,
            &config.secret_key,
            None,
            None,
            "heliofs",
        ))
        .force_path_style(place.endpoint.is_some())
        .retry_config(SdkRetry::standard().with_max_attempts(5))
        .timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(CONNECT_TIMEOUT)
                .operation_attempt_timeout(options.attempt_timeout)
                .operation_timeout(options.deadline)
                .build(),
        );
    if let Some(endpoint) = &place.endpoint {
        sdk = sdk.endpoint_url(endpoint);
    }
    let client = aws_sdk_s3::Client::from_conf(sdk.build());
    match client.head_bucket().bucket(&place.bucket).send().await {
        Ok(_) => return Ok(()),
        Err(error) => match error.raw_response().map(|r| r.status().as_u16()) {
            Some(404) => {}
            status => return Err(explain("look at bucket", config, options, status, &error)),
        },
    }
    let mut request = client.create_bucket().bucket(&place.bucket);
    if place.endpoint.is_none() && place.region != REGION_DEFAULT {
        request = request.create_bucket_configuration(
            CreateBucketConfiguration::builder()
                .location_constraint(BucketLocationConstraint::from(place.region.as_str()))
                .build(),
        );
    }
    match request.send().await {
        Ok(_) => {
            tracing::info!(bucket = config.bucket, "created the bucket");
            Ok(())
        }
        // Two `format` at once.
        Err(error) if error.code() == Some("BucketAlreadyOwnedByYou") => Ok(()),
        Err(error) => {
            let status = error.raw_response().map(|r| r.status().as_u16());
            Err(explain("create bucket", config, options, status, &error))
        }
    }
}

fn explain<E: std::error::Error + 'static>(
    operation: &'static str,
    config: &StorageConfig,
    options: &StoreOptions,
    status: Option<u16>,
    error: &SdkError<E>,
) -> StoreError {
    let key = config.bucket.clone();
    let detail = DisplayErrorContext(error).to_string();
    match status {
        Some(400..=499) => StoreError::Denied {
            operation,
            key,
            detail: format!("check access key, secret key, region and bucket name: {detail}"),
        },
        _ => StoreError::Unavailable {
            operation,
            key,
            waited: options.deadline,
            attempts: 5,
            detail: format!("is the server running, and is its address right? {detail}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(endpoint: Option<&str>, bucket: &str, prefix: &str, region: &str) -> S3Place {
        S3Place {
            endpoint: endpoint.map(str::to_owned),
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            region: region.to_owned(),
        }
    }

    #[test]
    fn every_usual_way_to_name_a_bucket_is_understood() {
        for (url, region, want) in [
            (
                "http://127.0.0.1:8333/data",
                "",
                place(Some("http://127.0.0.1:8333"), "data", "", "us-east-1"),
            ),
            (
                "https://minio.example/data/team/a/",
                "eu-1",
                place(Some("https://minio.example"), "data", "team/a", "eu-1"),
            ),
            (
                "https://photos.s3.eu-west-1.amazonaws.com",
                "",
                place(None, "photos", "", "eu-west-1"),
            ),
            (
                "https://s3.eu-west-1.amazonaws.com/photos/x",
                "",
                place(None, "photos", "x", "eu-west-1"),
            ),
            (
                "https://photos.s3.amazonaws.com/",
                "",
                place(None, "photos", "", "us-east-1"),
            ),
            (
                "photos",
                "eu-west-1",
                place(None, "photos", "", "eu-west-1"),
            ),
            ("s3://photos/x", "", place(None, "photos", "x", "us-east-1")),
        ] {
            assert_eq!(S3Place::parse(url, region).unwrap(), want, "{url}");
        }
    }

    #[test]
    fn what_names_no_bucket_is_refused_with_an_example() {
        for url in [
            "",
            "http://127.0.0.1:8333",
            "http://127.0.0.1:8333/",
            "ftp://x/y",
            "https:///b",
        ] {
            let error = S3Place::parse(url, "").unwrap_err();
            assert!(
                error.to_string().contains("http://HOST:PORT/BUCKET"),
                "{url}: {error}"
            );
        }
    }
}

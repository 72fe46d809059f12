//! How a mount or a worker reaches the buckets of a volume, when not as the cluster says.

use std::ffi::OsString;

use clap::Args;
use heliofs_proto::v1::StorageConfig;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome};

/// Addresses and keys from the command line or the environment; what is not given is as the cluster says.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct BucketAccess {
    /// Where the volume's bucket is, seen from here [default: as the metadata cluster says].
    #[arg(long, value_name = "BUCKET")]
    bucket: Option<String>,
    /// Its access key, or HELIOFS_ACCESS_KEY.
    #[arg(long, value_name = "KEY")]
    access_key: Option<String>,
    /// Its secret key; better HELIOFS_SECRET_KEY, since everybody on this machine can read the process list.
    #[arg(long, value_name = "KEY")]
    secret_key: Option<String>,
    /// In a mirror region with a bucket of its own: where the source region's bucket is, seen from here.
    #[arg(long, value_name = "BUCKET")]
    bucket2: Option<String>,
    /// The access key of the source region's bucket, or HELIOFS_ACCESS_KEY2. Keys that may only read are enough.
    #[arg(long, value_name = "KEY")]
    access_key2: Option<String>,
    /// The secret key of the source region's bucket; better HELIOFS_SECRET_KEY2.
    #[arg(long, value_name = "KEY")]
    secret_key2: Option<String>,
}

/// A pair of keys as given, else of HELIOFS_ACCESS_KEY and HELIOFS_SECRET_KEY with `which` behind; `None`: neither is there.
///
/// Errors: half a pair of keys.
pub(crate) fn find_keys(
    access: &Option<String>,
    secret: &Option<String>,
    which: &str,
) -> Outcome<Option<(String, String)>> {
    let access = given_or(access, &format!("HELIOFS_ACCESS_KEY{which}"));
    let secret = given_or(secret, &format!("HELIOFS_SECRET_KEY{which}"));
    match (access, secret) {
        (Some(access), Some(secret)) => Ok(Some((access, secret))),
        (None, None) => Ok(None),
        _ => Err(Failure::usage(format!(
            "an access key and a secret key belong together: one of --access-key{which} and --secret-key{which} is missing"
        ))),
    }
}

/// What was given, or what a variable of the environment says.
fn given_or(given: &Option<String>, variable: &str) -> Option<String> {
    given
        .clone()
        .or_else(|| std::env::var(variable).ok())
        .filter(|value| !value.is_empty())
}

/// How one bucket is reached.
struct Way {
    bucket: Option<String>,
    keys: Option<(String, String)>,
}

impl Way {
    fn find(
        bucket: &Option<String>,
        access: &Option<String>,
        secret: &Option<String>,
        which: &str,
    ) -> Outcome<Self> {
        Ok(Self {
            bucket: given_or(bucket, &format!("HELIOFS_BUCKET{which}")),
            keys: find_keys(access, secret, which)?,
        })
    }

    fn apply(self, storage: StorageConfig) -> StorageConfig {
        let (access_key, secret_key) = self
            .keys
            .unwrap_or((storage.access_key, storage.secret_key));
        StorageConfig {
            bucket: self.bucket.unwrap_or(storage.bucket),
            access_key,
            secret_key,
            ..storage
        }
    }
}

impl BucketAccess {
    /// The buckets as this process reaches them.
    ///
    /// Errors: half a pair of keys; something about a second bucket for a volume that has one.
    pub(crate) fn apply(
        &self,
        storage: StorageConfig,
        second: Option<StorageConfig>,
    ) -> Outcome<(StorageConfig, Option<StorageConfig>)> {
        let first = Way::find(&self.bucket, &self.access_key, &self.secret_key, "")?;
        let given =
            self.bucket2.is_some() || self.access_key2.is_some() || self.secret_key2.is_some();
        if given && second.is_none() {
            return Err(Failure::usage(
                "--bucket2 and its keys are for mirrors with a bucket of their own, and this volume has one bucket",
            )
            .hint("`heliofs mirror bucket` gives a mirror a bucket of its own"));
        }
        let other = Way::find(&self.bucket2, &self.access_key2, &self.secret_key2, "2")?;
        Ok((
            first.apply(storage),
            second.map(|second| other.apply(second)),
        ))
    }

    /// What is given here, and for the rest what `other` says.
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            bucket: self.bucket.or(other.bucket),
            access_key: self.access_key.or(other.access_key),
            secret_key: self.secret_key.or(other.secret_key),
            bucket2: self.bucket2.or(other.bucket2),
            access_key2: self.access_key2.or(other.access_key2),
            secret_key2: self.secret_key2.or(other.secret_key2),
        }
    }

    /// With keys of the environment, to be saved.
    ///
    /// Errors: half a pair of keys.
    pub(crate) fn with_environment(self) -> Outcome<Self> {
        let first = Way::find(&self.bucket, &self.access_key, &self.secret_key, "")?;
        let second = Way::find(&self.bucket2, &self.access_key2, &self.secret_key2, "2")?;
        let (access_key, secret_key) = first.keys.unzip();
        let (access_key2, secret_key2) = second.keys.unzip();
        Ok(Self {
            bucket: first.bucket,
            access_key,
            secret_key,
            bucket2: second.bucket,
            access_key2,
            secret_key2,
        })
    }

    /// As variables of the environment, for the background process: its arguments are for all to read.
    pub(crate) fn to_environment(&self) -> Vec<(&'static str, OsString)> {
        [
            ("HELIOFS_BUCKET", &self.bucket),
            ("HELIOFS_ACCESS_KEY", &self.access_key),
            ("HELIOFS_SECRET_KEY", &self.secret_key),
            ("HELIOFS_BUCKET2", &self.bucket2),
            ("HELIOFS_ACCESS_KEY2", &self.access_key2),
            ("HELIOFS_SECRET_KEY2", &self.secret_key2),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value.clone()?.into())))
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_is_taken_and_the_rest_is_as_the_cluster_says() {
        let storage = |bucket: &str| StorageConfig {
            bucket: bucket.to_owned(),
            access_key: "a".to_owned(),
            secret_key: "s".to_owned(),
            ..StorageConfig::default()
        };
        let access = BucketAccess {
            bucket2: Some("there".to_owned()),
            ..BucketAccess::default()
        };
        let (own, second) = access.apply(storage("one"), Some(storage("two"))).unwrap();
        assert_eq!((own, second), (storage("one"), Some(storage("there"))));
        assert!(access.apply(storage("one"), None).is_err());
        let half = BucketAccess {
            access_key: Some("x".to_owned()),
            ..BucketAccess::default()
        };
        assert!(half.apply(storage("one"), None).is_err());
    }
}

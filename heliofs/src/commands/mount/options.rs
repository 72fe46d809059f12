//! How a mount behaves: flags, and the same by name in `-o`, as fstab has it.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use std::sync::Arc;
use std::time::Duration;

use blockstore::object::RateLimit;
use blockstore::{DiskCacheOptions, SegmentStore, StoreOptions};
use clap::{Args, ValueEnum};
use fuse_client::{
    AtimePolicy, Coherence, CompactionOptions, FsOptions, MountOptions, Mounted, StagingOptions,
};
use meta_client::{Cluster, Session, SessionOptions};
use tokio_util::sync::CancellationToken;

use crate::buckets::BucketAccess;
use crate::cli::Access;
use crate::commands::version;
use crate::connect::host_name;
use crate::copying::{self, CopyMetrics};
use crate::failure::{Failure, Outcome, While};
use crate::mounts::MountNote;
use crate::passphrase::PassphraseSource;
use crate::serve_metrics::{self, Exposed};
use crate::units;

/// When reading a file changes its access time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Atime {
    /// Never.
    Noatime,
    /// When it was older than the last change, or than a day.
    Relatime,
    /// Always.
    Strictatime,
}

/// What a mount of a mirror shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum MirrorRead {
    /// What is applied.
    Latest,
    /// What the region's own bucket has all of.
    Complete,
}

/// Settings of a mount.
#[derive(Args, Clone, Debug)]
pub(crate) struct Serving {
    /// Options by name, separated by commas: ro, noatime, cache-size=2G, …
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// No change through this mount.
    #[arg(short, long)]
    pub(crate) read_only: bool,
    /// Keeps what was read and written on local disk [default: /var/cache/heliofs, or ~/.cache/heliofs/blocks for users]. Several,
    /// separated by colons or given again, share it: one for each disk.
    #[arg(long, value_name = "DIR", value_delimiter = ':')]
    pub(crate) cache_dir: Vec<PathBuf>,
    /// Most that the disk cache may take. 0: no disk cache.
    #[arg(long, value_parser = units::parse_size, default_value = "20G", value_name = "SIZE")]
    pub(crate) cache_size: u64,
    /// Memory for data on its way to and from the bucket.
    #[arg(long, value_parser = units::parse_size, default_value = "300M", value_name = "SIZE")]
    pub(crate) buffer_size: u64,
    /// How long the bucket is tried before a read, fsync or close fails with EIO; data that was not stored is kept and tried
    /// again. At least 1s.
    #[arg(long, value_parser = parse_io_timeout, default_value = "30s", value_name = "TIME")]
    pub(crate) io_timeout: Duration,
    /// close waits until the file's data is in the bucket and committed. Without it close returns at once while no other mount
    /// has the file open; the data follows within the flush age, or at once when another mount opens or stats the file.
    #[arg(long)]
    pub(crate) close_sync: bool,
    /// Changes of names in directories that this mount made, and that nobody else has looked into, are answered at once and follow
    /// within milliseconds; fsync of the file or the directory waits for them, and so does whoever looks. Without it every such
    /// change waits for the cluster. New: not yet for what must not be lost.
    #[arg(long)]
    pub(crate) dir_ahead: bool,
    /// fsync returns once the data is on this machine's disk, in the first cache directory; it follows to the bucket in the
    /// background, also after a crash, when the volume is mounted again with the same cache directory. Until then, if this mount
    /// dies, others see what was stored before.
    #[arg(long)]
    pub(crate) writeback: bool,
    /// With --writeback: how long staged data may wait before it is uploaded, if no other mount asks for it.
    #[arg(long, value_parser = parse_upload_delay, default_value = "0s", value_name = "TIME")]
    pub(crate) upload_delay: Duration,
    /// With --writeback: how long other mounts wait for a file with staged data while the bucket takes nothing. After that they see
    /// what was stored before.
    #[arg(long, value_parser = parse_recall_wait, default_value = "60s", value_name = "TIME")]
    pub(crate) recall_wait: Duration,
    /// Written data is stored after this time, if nobody asks for it earlier.
    #[arg(long, value_parser = parse_flush_age, default_value = "1s", value_name = "TIME")]
    pub(crate) flush_age: Duration,
    /// When reading changes access times.
    #[arg(long, value_enum, default_value = "noatime")]
    pub(crate) atime: Atime,
    /// Threads that talk to the kernel [default: one a core, 2 to 8].
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Others than the user who mounts may use it; root's mounts allow that anyway.
    #[arg(long)]
    pub(crate) allow_other: bool,
    /// Bytes per second to the bucket at most. 0: no limit.
    #[arg(long, value_parser = units::parse_size, default_value = "0", value_name = "SIZE")]
    pub(crate) upload_limit: u64,
    /// Bytes per second from the bucket, or from both, at most. 0: no limit.
    #[arg(long, value_parser = units::parse_size, default_value = "0", value_name = "SIZE")]
    pub(crate) download_limit: u64,
    /// At a mirror: the mount refuses changes itself, not the kernel, and takes them without a remount once the mirror is
    /// promoted.
    #[arg(long)]
    pub(crate) follow_promotion: bool,
    /// At a mirror with a bucket of its own: both buckets are checked against the metadata this long after the last check, by
    /// whichever mount or worker comes first. What is missing is copied again, or put back at the source if the keys allow it.
    /// 0s: not by this mount.
    #[arg(long, value_parser = units::parse_duration, default_value = "7d", value_name = "TIME")]
    pub(crate) sync_interval: Duration,
    /// Part of the cache's file system that stays free, 0.0 to 1.0.
    #[arg(long, default_value_t = 0.1, value_name = "RATIO", value_parser = parse_ratio)]
    pub(crate) free_space_ratio: f64,
    /// Leaves deleting dead objects, compaction and expiry of the trash to other mounts.
    #[arg(long)]
    pub(crate) no_bgjob: bool,
    /// Time between two looks for sparse objects to compact.
    #[arg(long, value_parser = units::parse_duration, default_value = "60s", value_name = "TIME")]
    pub(crate) compact_interval: Duration,
    /// Of a mirror with a bucket of its own: shows the latest state, of which objects may have to come from the source's bucket, or
    /// the latest of which its own bucket has all.
    #[arg(long, value_enum, default_value = "latest", value_name = "STATE")]
    pub(crate) mirror_read: MirrorRead,
    #[command(flatten)]
    pub(crate) buckets: BucketAccess,
    #[command(flatten)]
    pub(crate) passphrase: PassphraseSource,
    /// Serves /metrics and /ready here.
    #[arg(long, value_name = "ADDR")]
    pub(crate) metrics: Option<SocketAddr>,
}

/// Options that mount(8), systemd and fstab use among themselves.
const IGNORED: &[&str] = &[
    "rw",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "defaults",
    "_netdev",
    "nofail",
    "dev",
    "nodev",
    "suid",
    "nosuid",
    "exec",
    "noexec",
    "async",
    "diratime",
    "nodiratime",
];

impl Serving {
    /// Takes the `-o` options apart. `token-file` belongs to the access.
    pub(crate) fn take_options(&mut self, access: &mut Access) -> Outcome {
        let options = std::mem::take(&mut self.options);
        for option in options
            .iter()
            .flat_map(|list| list.split(','))
            .filter(|option| !option.is_empty())
        {
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (option, None),
            };
            let wrong = |why: String| Failure::usage(format!("-o {option}: {why}"));
            let needed = || value.ok_or_else(|| wrong("it needs a value".to_owned()));
            match name {
                "ro" => self.read_only = true,
                "noatime" => self.atime = Atime::Noatime,
                "relatime" => self.atime = Atime::Relatime,
                "strictatime" | "atime" => self.atime = Atime::Strictatime,
                "allow_other" => self.allow_other = true,
                "cache-dir" => self.cache_dir = needed()?.split(':').map(Into::into).collect(),
                "cache-size" => self.cache_size = units::parse_size(needed()?).map_err(wrong)?,
                "buffer-size" => self.buffer_size = units::parse_size(needed()?).map_err(wrong)?,
                "io-timeout" => self.io_timeout = parse_io_timeout(needed()?).map_err(wrong)?,
                "close-sync" => self.close_sync = true,
                "dir-ahead" => self.dir_ahead = true,
                "writeback" => self.writeback = true,
                "upload-delay" => {
                    self.upload_delay = parse_upload_delay(needed()?).map_err(wrong)?;
                }
                "recall-wait" => self.recall_wait = parse_recall_wait(needed()?).map_err(wrong)?,
                "flush-age" => self.flush_age = parse_flush_age(needed()?).map_err(wrong)?,
                "threads" => {
                    self.threads = Some(
                        needed()?
                            .parse()
                            .map_err(|_| wrong("not a number".to_owned()))?,
                    );
                }
                "metrics" => {
                    self.metrics = Some(
                        needed()?
                            .parse()
                            .map_err(|_| wrong("not an address".to_owned()))?,
                    );
                }
                "no-bgjob" => self.no_bgjob = true,
                "upload-limit" => {
                    self.upload_limit = units::parse_size(needed()?).map_err(wrong)?
                }
                "download-limit" => {
                    self.download_limit = units::parse_size(needed()?).map_err(wrong)?;
                }
                "follow-promotion" => self.follow_promotion = true,
                "sync-interval" => {
                    self.sync_interval = units::parse_duration(needed()?).map_err(wrong)?;
                }
                "free-space-ratio" => {
                    self.free_space_ratio = parse_ratio(needed()?).map_err(wrong)?;
                }
                "passphrase-file" => self.passphrase.passphrase_file = Some(needed()?.into()),
                "encrypt-key" => self.passphrase.encrypt_key = Some(needed()?.into()),
                "token-file" => access.token_file = Some(needed()?.into()),
                name if IGNORED.contains(&name) || name.starts_with("x-") => {}
                _ => {
                    return Err(wrong("unknown option".to_owned()).hint(
                        "known: ro, rw, noatime, relatime, strictatime, allow_other, cache-dir=, cache-size=, buffer-size=, \
                         io-timeout=, close-sync, dir-ahead, flush-age=, writeback, upload-delay=, threads=, no-bgjob, upload-limit=, download-limit=, sync-interval=, follow-promotion, free-space-ratio=, metrics=, passphrase-file=, encrypt-key=, token-file=",
                    ));
                }
            }
        }
        Ok(())
    }

    /// As flags, for the background process. Paths are made absolute.
    pub(crate) fn to_arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut flag = |name: &str, value: Option<OsString>| {
            if let Some(value) = value {
                arguments.extend([name.into(), value]);
            }
        };
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        for path in &self.cache_dir {
            flag("--cache-dir", Some(absolute(path).into()));
        }
        flag("--cache-size", Some(self.cache_size.to_string().into()));
        flag("--buffer-size", Some(self.buffer_size.to_string().into()));
        let io_timeout = format!("{}ms", self.io_timeout.as_millis());
        flag("--io-timeout", Some(io_timeout.into()));
        let flush_age = format!("{}ms", self.flush_age.as_millis());
        flag("--flush-age", Some(flush_age.into()));
        let atime = self
            .atime
            .to_possible_value()
            .expect("no variant is skipped");
        flag("--atime", Some(atime.get_name().into()));
        flag(
            "--threads",
            self.threads.map(|threads| threads.to_string().into()),
        );
        flag(
            "--metrics",
            self.metrics.map(|address| address.to_string().into()),
        );
        arguments.extend(self.passphrase.to_arguments());
        let mirror_read = self.mirror_read.to_possible_value();
        let mirror_read = mirror_read.expect("no variant is skipped");
        arguments.extend(["--mirror-read".into(), mirror_read.get_name().into()]);
        for (name, value) in [
            ("--upload-limit", self.upload_limit.to_string()),
            ("--download-limit", self.download_limit.to_string()),
            (
                "--sync-interval",
                format!("{}ms", self.sync_interval.as_millis()),
            ),
            ("--free-space-ratio", self.free_space_ratio.to_string()),
        ] {
            arguments.extend([name.into(), value.into()]);
        }
        if self.writeback {
            arguments.push("--writeback".into());
        }
        let upload_delay = format!("{}ms", self.upload_delay.as_millis());
        arguments.extend(["--upload-delay".into(), upload_delay.into()]);
        let recall_wait = format!("{}ms", self.recall_wait.as_millis());
        arguments.extend(["--recall-wait".into(), recall_wait.into()]);
        let compact_interval = format!("{}ms", self.compact_interval.as_millis());
        arguments.extend(["--compact-interval".into(), compact_interval.into()]);
        if self.no_bgjob {
            arguments.push("--no-bgjob".into());
        }
        if self.follow_promotion {
            arguments.push("--follow-promotion".into());
        }
        if self.read_only {
            arguments.push("--read-only".into());
        }
        if self.close_sync {
            arguments.push("--close-sync".into());
        }
        if self.dir_ahead {
            arguments.push("--dir-ahead".into());
        }
        if self.allow_other {
            arguments.push("--allow-other".into());
        }
        arguments
    }

    /// Where a volume's staged data is.
    fn staging_directory(&self, uuid: &str) -> PathBuf {
        let mut directories = self.cache_directories();
        directories.swap_remove(0).join(uuid).join("staging")
    }

    /// Where the disk cache is; at least one directory.
    pub(crate) fn cache_directories(&self) -> Vec<PathBuf> {
        if !self.cache_dir.is_empty() {
            return self.cache_dir.clone();
        }
        vec![match nix::unistd::geteuid().is_root() {
            true => PathBuf::from("/var/cache/heliofs"),
            false => home("XDG_CACHE_HOME", ".cache").join("heliofs/blocks"),
        }]
    }
}

/// Below this a bucket that is only slow would look like one that is gone.
const IO_TIMEOUT_MIN: Duration = Duration::from_secs(1);

fn parse_io_timeout(text: &str) -> Result<Duration, String> {
    let timeout = units::parse_duration(text)?;
    if timeout < IO_TIMEOUT_MIN {
        return Err(
            "less than 1s: a bucket that is only slow would look like one that is gone".to_owned(),
        );
    }
    Ok(timeout)
}

/// Longest flush age: data that a program believes to be stored should not wait longer in memory.
const FLUSH_AGE_MAX: Duration = Duration::from_secs(60);

fn parse_flush_age(text: &str) -> Result<Duration, String> {
    let age = units::parse_duration(text)?;
    if age > FLUSH_AGE_MAX {
        return Err("more than 60s: what was written would be lost with the mount".to_owned());
    }
    Ok(age)
}

/// Longest upload delay: other regions and a lost disk should not wait longer.
const UPLOAD_DELAY_MAX: Duration = Duration::from_secs(24 * 3600);

fn parse_upload_delay(text: &str) -> Result<Duration, String> {
    let delay = units::parse_duration(text)?;
    if delay > UPLOAD_DELAY_MAX {
        return Err("more than 24h: the data would be on this machine's disk alone".to_owned());
    }
    Ok(delay)
}

/// Longest recall wait: those who wait may be many.
const RECALL_WAIT_MAX: Duration = Duration::from_secs(3600);

fn parse_recall_wait(text: &str) -> Result<Duration, String> {
    let wait = units::parse_duration(text)?;
    if wait > RECALL_WAIT_MAX {
        return Err(
            "more than 1h: others would wait for a bucket that may not come back".to_owned(),
        );
    }
    Ok(wait)
}

/// A part of a whole.
fn parse_ratio(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        _ => Err("a number from 0.0 to 1.0".to_owned()),
    }
}

/// A read that takes longer is asked for once more: stores that answer in milliseconds have moments like this.
const HEDGE_AFTER: Duration = Duration::from_secs(1);

/// Inodes and names that a mount remembers; about 300 bytes each.
const META_CACHE_ENTRIES: usize = 300_000;

impl From<Atime> for AtimePolicy {
    fn from(atime: Atime) -> Self {
        match atime {
            Atime::Noatime => Self::Off,
            Atime::Relatime => Self::Relative,
            Atime::Strictatime => Self::Strict,
        }
    }
}

impl Serving {
    /// Attaches a session, opens the bucket and mounts.
    pub(crate) async fn mount(
        &self,
        cluster: Cluster,
        volume: &str,
        note: &MountNote,
    ) -> Outcome<Mounted> {
        let registry = prometheus::Registry::new();
        let coherence = Coherence::new(META_CACHE_ENTRIES, META_CACHE_ENTRIES, self.buffer_size);
        let session = Session::attach(
            cluster,
            SessionOptions {
                volume: volume.to_owned(),
                host: host_name(),
                mount_point: note.mount_point.to_string_lossy().into_owned(),
                build: version::BUILD.to_owned(),
                read_only: self.read_only,
                watcher: Some(coherence.clone()),
                takes_leases: !self.read_only && (!self.close_sync || self.writeback),
                takes_directories: !self.read_only && self.dir_ahead,
                complete: self.mirror_read == MirrorRead::Complete,
                ..SessionOptions::default()
            },
        )
        .await?;
        let mounted = self
            .over(session.clone(), coherence, volume, note, registry)
            .await;
        if mounted.is_err() {
            session.detach().await;
        }
        mounted
    }

    async fn over(
        &self,
        session: Session,
        coherence: std::sync::Arc<Coherence>,
        volume: &str,
        note: &MountNote,
        registry: prometheus::Registry,
    ) -> Outcome<Mounted> {
        let welcome = session.welcome();
        let (storage, second) = self
            .buckets
            .apply(session.storage(), welcome.second.clone())?;
        // The server refuses changes of a mirror; the kernel says so at once.
        let follow_promotion = self.follow_promotion && !self.read_only;
        let read_only = self.read_only || (welcome.mirror && !follow_promotion);
        let prefix = welcome.prefix.as_str();
        let store_options = StoreOptions {
            deadline: self.io_timeout,
            // Three attempts at least, so that one lost answer is no error.
            attempt_timeout: StoreOptions::default()
                .attempt_timeout
                .min(self.io_timeout / 3),
            memory_cache_bytes: self.buffer_size,
            disk_cache: (self.cache_size > 0).then(|| {
                let directories = self.cache_directories();
                let mut own = directories.iter().map(|it| it.join(&storage.uuid));
                DiskCacheOptions {
                    free_space_ratio: self.free_space_ratio,
                    ..DiskCacheOptions::new(own.next().unwrap_or_default(), self.cache_size)
                }
                .and(own.collect())
            }),
            upload_bytes_per_second: self.upload_limit,
            // One for reads and copies, and for both buckets.
            download_budget: RateLimit::new(self.download_limit).map(Arc::new),
            hedge_after: Some(HEDGE_AFTER),
            opener: match storage.encryption {
                Some(_) => Some(self.passphrase.required()?),
                None => None,
            },
            registry: Some(registry.clone()),
            ..StoreOptions::default()
        };
        // A bucket that is gone or another's must be noticed now, not at the first read.
        let quick = StoreOptions {
            deadline: Duration::from_secs(10),
            attempt_timeout: Duration::from_secs(5),
            ..StoreOptions::default()
        };
        let bucket = blockstore::Bucket::open(&storage, prefix, &quick)?;
        bucket.check_marker(&storage.uuid).await.map_err(|error| match error {
            blockstore::StoreError::NotFound { .. } => Failure::new(format!(
                "the bucket {} does not hold the volume {volume}: its marker object is missing",
                storage.bucket
            ))
            .hint("was the bucket emptied, or is it another server's? `heliofs config` shows where it should be"),
            another @ blockstore::StoreError::AlreadyExists { .. } => Failure::new(another)
                .hint("was the bucket restored or copied from elsewhere? `heliofs config` shows where it should be"),
            other => other.into(),
        })?;
        if let Some(second) = &second {
            let bucket = blockstore::Bucket::open(second, prefix, &quick)?;
            copying::check_second(&bucket, &second.uuid).await?;
        }
        let id = session.volume_id();
        let copies = match &second {
            Some(second) if !self.no_bgjob => Some((
                copying::open(&session, &storage, second, &store_options)?,
                copying::open(&session, &storage, second, &store_options)?,
            )),
            _ => None,
        };
        let (store, news) = match &second {
            None => (
                SegmentStore::open(&storage, prefix, id, store_options)?,
                None,
            ),
            Some(second) => {
                let (store, news) =
                    SegmentStore::open_with_second(&storage, second, prefix, id, store_options)?;
                (store, Some(news))
            }
        };
        let options = MountOptions {
            volume: volume.to_owned(),
            fs: FsOptions {
                read_only,
                follow_promotion,
                atime: self.atime.into(),
                segment_bytes: storage.segment_bytes,
                delete_segments: !self.no_bgjob,
                // At a mirror nothing is to be compacted, until it is promoted.
                compaction: (!self.no_bgjob && !read_only).then(|| CompactionOptions {
                    pause: self.compact_interval,
                    ..CompactionOptions::default()
                }),
                flush_age: self.flush_age,
                defer_close: !self.close_sync,
                staging: (!read_only).then(|| StagingOptions {
                    directory: self.staging_directory(&storage.uuid),
                    active: self.writeback,
                    // The cache gives way earlier.
                    free_ratio: self.free_space_ratio / 2.0,
                    upload_delay: self.upload_delay,
                    recall_wait: self.recall_wait,
                }),
                ..FsOptions::default()
            },
            allow_other: self.allow_other || nix::unistd::geteuid().is_root(),
            threads: self.threads.unwrap_or(0),
            registry: Some(registry.clone()),
            flush_marker: Some(note.flush_marker()),
            ..MountOptions::default()
        };
        let runtime = tokio::runtime::Handle::current();
        let mounted = fuse_client::mount(
            &runtime,
            session.clone(),
            coherence,
            store.clone(),
            &note.mount_point,
            options,
        )
        .await
        .map_err(|error| {
            Failure::new(format!(
                "cannot mount at {}: {error}",
                note.mount_point.display()
            ))
        })?;
        if let Some(news) = news {
            let metrics = CopyMetrics::new(&registry, volume);
            let fs = mounted.fs().clone();
            match copies {
                Some(buckets) => {
                    copying::start(buckets, self.sync_interval, fs, store, news, metrics);
                }
                None => copying::count(storage.uuid.clone(), fs, store, metrics),
            }
        }
        if let Some(listen) = self.metrics {
            let exposed = Exposed {
                metrics: Box::new(move || serve_metrics::encode(&registry)),
                unready: Box::new(move || {
                    let cut_off =
                        || "the lease is not live: cut off from the metadata cluster".to_owned();
                    session
                        .gone()
                        .or_else(|| (!session.lease_valid()).then(cut_off))
                }),
            };
            // Lives as long as the process, which lives as long as the mount.
            serve_metrics::start(listen, exposed, CancellationToken::new()).await?;
        }
        Ok(mounted)
    }
}

/// `$variable`, or a directory of the home directory.
fn home(variable: &str, below_home: &str) -> PathBuf {
    match (std::env::var_os(variable), std::env::var_os("HOME")) {
        (Some(directory), _) => PathBuf::from(directory),
        (None, Some(home)) => Path::new(&home).join(below_home),
        (None, None) => std::env::temp_dir(),
    }
}

/// Where a background mount logs.
pub(crate) fn default_log_file() -> PathBuf {
    match nix::unistd::geteuid().is_root() {
        true => PathBuf::from("/var/log/heliofs.log"),
        false => home("XDG_STATE_HOME", ".local/state").join("heliofs/mount.log"),
    }
}

/// An existing, empty directory; absolute, without links. A mount whose process died is cleared away.
pub(crate) fn check_mount_point(given: &str) -> Outcome<PathBuf> {
    let path = Path::new(given);
    let missing = || {
        Failure::new(format!("the mount point {given} does not exist"))
            .hint(format!("mkdir -p {given}"))
    };
    let resolved = match crate::mounts::resolve(path) {
        Ok(resolved) => resolved,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(missing()),
        Err(error) => return Err(error).while_(format_args!("use {given} as a mount point")),
    };
    let mut entries = std::fs::read_dir(&resolved);
    if let Err(error) = &entries
        && error.raw_os_error() == Some(libc::ENOTCONN)
    {
        tracing::warn!(mount_point = %resolved.display(), "a mount whose process died is cleared away");
        nix::mount::umount2(&resolved, nix::mount::MntFlags::MNT_DETACH)
            .while_(format_args!("clear away the dead mount at {given}"))?;
        entries = std::fs::read_dir(&resolved);
    }
    match entries {
        Ok(mut entries) => match entries.next() {
            None => std::fs::canonicalize(&resolved)
                .while_(format_args!("use {given} as a mount point")),
            Some(_) => Err(Failure::new(format!("the mount point {given} is not empty"))
                .hint("its files would be hidden: choose an empty directory, or unmount what is there")),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(missing()),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            Err(Failure::new(format!("the mount point {given} is not a directory")))
        }
        Err(error) => Err(error).while_(format_args!("use {given} as a mount point")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serving(options: &str) -> Serving {
        Serving {
            options: vec![options.to_owned()],
            read_only: false,
            cache_dir: Vec::new(),
            cache_size: 1,
            buffer_size: 1,
            io_timeout: Duration::from_secs(30),
            close_sync: false,
            dir_ahead: false,
            writeback: false,
            upload_delay: Duration::ZERO,
            recall_wait: Duration::from_secs(60),
            flush_age: Duration::from_secs(1),
            atime: Atime::Noatime,
            threads: None,
            allow_other: false,
            upload_limit: 0,
            download_limit: 0,
            sync_interval: Duration::from_secs(7 * 24 * 3600),
            follow_promotion: false,
            free_space_ratio: 0.1,
            no_bgjob: false,
            compact_interval: Duration::from_secs(60),
            mirror_read: MirrorRead::Latest,
            buckets: BucketAccess::default(),
            passphrase: PassphraseSource::default(),
            metrics: None,
        }
    }

    #[test]
    fn fstab_options_are_the_flags_by_name() {
        let mut access = Access::default();
        let mut taken = serving(
            "ro,_netdev,relatime,cache-size=2G,io-timeout=2500ms,writeback,upload-delay=1m,token-file=/t,x-systemd.automount",
        );
        taken.take_options(&mut access).unwrap();
        assert!(taken.read_only);
        assert_eq!((taken.atime, taken.cache_size), (Atime::Relatime, 2 << 30));
        assert_eq!(taken.io_timeout, Duration::from_millis(2500));
        // The background process is given the same.
        let arguments = taken.to_arguments();
        let at = arguments
            .iter()
            .position(|argument| argument == "--io-timeout");
        assert_eq!(arguments[at.unwrap() + 1], "2500ms");
        assert!(arguments.contains(&"--writeback".into()));
        assert!(arguments.contains(&"60000ms".into()));
        assert_eq!(access.token_file, Some("/t".into()));
        for wrong in [
            "cache-size",
            "cache-size=much",
            "io-timeout=10ms",
            "threads=x",
            "colour=red",
        ] {
            assert!(serving(wrong).take_options(&mut access).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_mount_point_must_be_an_empty_directory() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
        assert!(check_mount_point(&at("missing")).is_err());
        std::fs::write(at("file"), "").unwrap();
        assert!(check_mount_point(&at("file")).is_err());
        assert!(check_mount_point(&at("")).is_err());
        std::fs::create_dir(at("empty")).unwrap();
        assert!(check_mount_point(&at("empty")).is_ok());
    }
}

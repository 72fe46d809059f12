//! Mounts a volume, takes it down, and cleans up after a mount that died.
//!
//! - [`device`]: mounting as root, so that the type is `fuse.heliofs`
//! - [`table`]: what is mounted where

mod device;
mod table;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use blockstore::SegmentStore;
use fuser::{Config, MountOption, SessionACL};
use meta_client::Session;
use nix::errno::Errno as Sys;
use nix::mount::{MntFlags, umount2};
use table::mounted_at;
use tokio::sync::watch;

use crate::coherence::Coherence;
use crate::fs::Fs;
use crate::fuse::Adapter;
use crate::metrics::Metrics;
use crate::options::MountOptions;
use crate::write::staging::{Staging, StagingError};

/// What `mount` shows as the type: `fuse.heliofs`.
const SUBTYPE: &str = "heliofs";

/// Bounds of the number of event loops when it is not given: one may be copying data while another answers, and more than
/// these find nothing to do, since no event loop waits.
const THREADS_MIN: usize = 2;
const THREADS_MAX: usize = 8;

/// Why a volume could not be mounted or unmounted. Messages say what to do next.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MountError {
    /// There is no such directory.
    #[error("mount point {} does not exist: create it with `mkdir -p {}`", .0.display(), .0.display())]
    Missing(PathBuf),
    /// It is something else.
    #[error("mount point {} is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// There are files below, which the mount would hide.
    #[error("mount point {} is not empty: choose another one, or mount with `-o nonempty`", .0.display())]
    NotEmpty(PathBuf),
    /// heliofs is mounted there and works.
    #[error("{} is mounted already ({source_name}): unmount it first with `heliofs umount {}`", .mount_point.display(), .mount_point.display())]
    AlreadyMounted {
        /// Where.
        mount_point: PathBuf,
        /// `heliofs:NAME`.
        source_name: String,
    },
    /// Files are open, or a program's working directory lies there.
    #[error("{} is in use: close what uses it (`fuser -vm {}` shows it), or unmount with `--lazy`", .0.display(), .0.display())]
    Busy(PathBuf),
    /// The kernel or the FUSE device refused.
    #[error("{}: {what}: {detail}{}", .mount_point.display(), hint(.what))]
    Refused {
        /// Where.
        mount_point: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        detail: String,
    },
    /// Data was written and could not be stored before the end.
    #[error("the data of {0} files could not be stored and is lost: see the log")]
    DataLost(usize),
    /// The staging folder can't be used.
    #[error(
        "{0}: give this mount a cache directory of its own with `--cache-dir`, or mount without `--writeback`"
    )]
    Staging(String),
    /// What an earlier mount has staged can't be taken over; it stays where it is.
    #[error("what an earlier mount has staged cannot be stored now: {0}")]
    NotResumed(String),
    /// Metrics of the same name are registered.
    #[error("metrics: {0}")]
    Metrics(String),
}

impl From<StagingError> for MountError {
    fn from(error: StagingError) -> Self {
        Self::Staging(error.to_string())
    }
}

fn hint(what: &str) -> &'static str {
    if what == "mount" && !Path::new("/dev/fuse").exists() {
        " (there is no /dev/fuse: load the module with `modprobe fuse`, or give the container the device)"
    } else {
        ""
    }
}

/// A mounted volume. Dropped without [`Mounted::unmount`] it is detached: open files live until they are closed.
#[derive(Debug)]
pub struct Mounted {
    fs: Arc<Fs>,
    mount_point: PathBuf,
    ended: watch::Receiver<Option<Result<(), MountError>>>,
}

/// Mounts a volume. `session` must have `coherence` as its watcher. Operations and the background run on `runtime`.
///
/// A dead mount in the way (`Transport endpoint is not connected`) is detached first.
pub async fn mount(
    runtime: &tokio::runtime::Handle,
    session: Session,
    coherence: Arc<Coherence>,
    store: Arc<SegmentStore>,
    mount_point: &Path,
    options: MountOptions,
) -> Result<Mounted, MountError> {
    let mount_point = prepare(mount_point, options.nonempty)?;
    let metrics = Metrics::new(&options.volume, options.registry.as_ref())
        .map_err(|error| MountError::Metrics(error.to_string()))?;
    let config = config(&options);
    let read_ahead_kib = options.kernel_read_ahead_kib;
    let staging = options.fs.staging.clone().map(Staging::open).transpose()?;
    let (staging, found) = staging.flatten().unzip();
    let fs = Fs::start(
        runtime, session, coherence, store, staging, options.fs, metrics,
    );
    // Before anybody can look: what fsync confirmed is to be seen at once.
    if let Err(error) = fs.resume(found.unwrap_or_default()).await {
        fs.stop();
        fs.coherence().close();
        return Err(MountError::NotResumed(error.to_string()));
    }
    let refused = |what: &'static str| {
        let mount_point = mount_point.clone();
        move |error: io::Error| MountError::Refused {
            mount_point,
            what,
            detail: error.to_string(),
        }
    };
    let adapter = Adapter { fs: fs.clone() };
    let begun = device::connect(adapter, &mount_point, &config)
        .map_err(refused("mount"))
        .and_then(|session| {
            let notifiers = fs
                .coherence()
                .start_notifiers(&session.notifier())
                .map_err(refused("start threads"))?;
            // A thread of its own, since fuser's loop blocks; it ends when the kernel ends the connection.
            let (sender, receiver) = tokio::sync::oneshot::channel();
            let mount_point_of_loop = mount_point.clone();
            std::thread::Builder::new()
                .name("heliofs-fuse".to_owned())
                .spawn(move || {
                    let ended = session.run();
                    device::clear(&mount_point_of_loop, ended.is_err());
                    // Nobody listens any more when the runtime is gone.
                    let _ = sender.send(ended);
                })
                .map_err(refused("start threads"))?;
            Ok((notifiers, receiver))
        });
    let (notifiers, receiver) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            fs.stop();
            fs.coherence().close();
            return Err(error);
        }
    };
    set_kernel_read_ahead(&mount_point, read_ahead_kib);
    let (sender, ended) = watch::channel(None);
    let (finished, place) = (fs.clone(), mount_point.clone());
    let flush_marker = options.flush_marker.clone();
    runtime.spawn(async move {
        match receiver.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the kernel's connection broke"),
            Err(_) => tracing::error!("an event loop panicked"),
        }
        tracing::info!(mount_point = %place.display(), "unmounted");
        sender.send_replace(Some(finish(&finished, notifiers, flush_marker).await));
    });
    Ok(Mounted {
        fs,
        mount_point,
        ended,
    })
}

/// Between two attempts to store everything at the end.
const FLUSH_PAUSE: Duration = Duration::from_secs(1);

/// The kernel let go: what is still buffered is stored, then everything ends.
async fn finish(
    fs: &Arc<Fs>,
    notifiers: Vec<JoinHandle<()>>,
    flush_marker: Option<PathBuf>,
) -> Result<(), MountError> {
    fs.close_all().await;
    let mut lost = fs.flush_all().await;
    while !lost.is_empty() && flush_marker.as_deref().is_some_and(Path::exists) {
        tracing::warn!(
            files = lost.len(),
            "not everything is stored yet; trying again"
        );
        tokio::time::sleep(FLUSH_PAUSE).await;
        lost = fs.flush_all().await;
    }
    if !lost.is_empty() {
        lost = fs.stage_all(lost).await;
    }
    // Changes of names that were answered, and are known to be lost, or not known to be there.
    let names = fs.coherence().ahead.lock().lost();
    if !names.is_empty() {
        tracing::error!(inodes = ?names, "changes of these were answered, and are lost or not known to be there");
        lost.extend(names);
    }
    fs.stop();
    fs.coherence().close();
    let joined = tokio::task::spawn_blocking(move || {
        for notifier in notifiers {
            if notifier.join().is_err() {
                tracing::error!("a notifier panicked");
            }
        }
    });
    if let Err(error) = joined.await {
        tracing::error!(%error, "notifiers were not joined");
    }
    fs.session().detach().await;
    if lost.is_empty() {
        return Ok(());
    }
    tracing::error!(inodes = ?lost, "the data of these inodes could not be stored");
    Err(MountError::DataLost(lost.len()))
}

impl Mounted {
    /// The file system behind the mount.
    pub fn fs(&self) -> &Arc<Fs> {
        &self.fs
    }

    /// Where it is mounted: absolute, without symlinks.
    pub fn mount_point(&self) -> &Path {
        &self.mount_point
    }

    /// Waits until it is unmounted, by whomever, and everything is stored.
    ///
    /// Errors: `DataLost`.
    pub async fn wait(&self) -> Result<(), MountError> {
        let mut ended = self.ended.clone();
        let outcome = ended.wait_for(Option::is_some).await;
        outcome.map_or(Ok(()), |outcome| outcome.clone().unwrap_or(Ok(())))
    }

    /// Unmounts; when it returns, everything that was written is stored.
    ///
    /// Errors: `Busy` (the mount goes on; what was written so far has been stored), `Refused`, `DataLost`.
    pub async fn unmount(&self) -> Result<(), MountError> {
        if self.ended.borrow().is_none()
            && let Err(error) = unmount(&self.mount_point, false)
        {
            if matches!(error, MountError::Busy(_)) {
                // Whoever asked may end the process whatever the answer is.
                let unstored = self.fs.flush_all().await;
                if !unstored.is_empty() {
                    tracing::error!(inodes = ?unstored, "data of open files could not be stored");
                }
            }
            return Err(error);
        }
        self.wait().await
    }

    /// Hides the mount now and ends it when the last file is closed.
    pub async fn detach(&self) -> Result<(), MountError> {
        if self.ended.borrow().is_none() {
            unmount(&self.mount_point, true)?;
        }
        self.wait().await
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.ended.borrow().is_none()
            && let Err(error) = unmount(&self.mount_point, true)
        {
            tracing::warn!(%error, "not unmounted");
        }
    }
}

/// Unmounts what is mounted at `mount_point`, in whatever process. `force`: detaches it even if it is in use.
///
/// Errors: `Busy`; `Refused`, also when nothing is mounted there.
pub fn unmount(mount_point: &Path, force: bool) -> Result<(), MountError> {
    let flags = if force {
        MntFlags::MNT_DETACH
    } else {
        MntFlags::empty()
    };
    let refused = |detail: String| MountError::Refused {
        mount_point: mount_point.to_owned(),
        what: "unmount",
        detail,
    };
    match umount2(mount_point, flags) {
        Ok(()) => Ok(()),
        Err(Sys::EBUSY) => Err(MountError::Busy(mount_point.to_owned())),
        Err(Sys::EPERM) => {
            // Not root: the setuid helper may unmount what this user has mounted.
            let mut command = std::process::Command::new("fusermount3");
            command.arg("-u");
            if force {
                command.arg("-z");
            }
            let output = command
                .arg("--")
                .arg(mount_point)
                .output()
                .map_err(|error| refused(format!("fusermount3: {error}")))?;
            if output.status.success() {
                return Ok(());
            }
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            if said.contains("busy") {
                return Err(MountError::Busy(mount_point.to_owned()));
            }
            Err(refused(said))
        }
        Err(Sys::EINVAL) => Err(refused("nothing is mounted there".to_owned())),
        Err(error) => Err(refused(error.desc().to_owned())),
    }
}

/// Looks at the mount point, and detaches a dead mount.
fn prepare(mount_point: &Path, nonempty: bool) -> Result<PathBuf, MountError> {
    let refused = |what: &'static str, error: &io::Error| MountError::Refused {
        mount_point: mount_point.to_owned(),
        what,
        detail: error.to_string(),
    };
    let mut looked = std::fs::metadata(mount_point);
    // Mounts may be stacked; every dead one is in the way.
    for _ in 0..16 {
        match &looked {
            Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
                tracing::warn!(mount_point = %mount_point.display(), "detaching a dead mount");
                unmount(mount_point, true)?;
                looked = std::fs::metadata(mount_point);
            }
            _ => break,
        }
    }
    let metadata = match looked {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(MountError::Missing(mount_point.to_owned()));
        }
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(MountError::NotADirectory(mount_point.to_owned()));
        }
        Err(error) => return Err(refused("look at the mount point", &error)),
    };
    if !metadata.is_dir() {
        return Err(MountError::NotADirectory(mount_point.to_owned()));
    }
    let absolute = std::fs::canonicalize(mount_point)
        .map_err(|error| refused("look at the mount point", &error))?;
    if let Some(source_name) = heliofs_mounted_at(&absolute) {
        return Err(MountError::AlreadyMounted {
            mount_point: absolute,
            source_name,
        });
    }
    if !nonempty {
        let mut entries = std::fs::read_dir(&absolute)
            .map_err(|error| refused("list the mount point", &error))?;
        if entries.next().is_some() {
            return Err(MountError::NotEmpty(absolute));
        }
    }
    Ok(absolute)
}

fn heliofs_mounted_at(mount_point: &Path) -> Option<String> {
    let info = mounted_at(mount_point)?;
    // Mounts by the setuid helper and by root differ in what they show as the type.
    let ours = info.kind.starts_with("fuse") && info.source.starts_with(&format!("{SUBTYPE}:"));
    ours.then_some(info.source)
}

/// Raises the kernel's read-ahead above the 128 KiB that FUSE mounts start with. Only root can; without it large reads are
/// slower and nothing else.
fn set_kernel_read_ahead(mount_point: &Path, kib: u32) {
    let Some(info) = mounted_at(mount_point) else {
        return;
    };
    let setting = format!("/sys/class/bdi/{}/read_ahead_kb", info.device);
    if let Err(error) = std::fs::write(&setting, kib.to_string()) {
        tracing::debug!(setting, %error, "the kernel's read-ahead stays as it is");
    }
}

fn config(options: &MountOptions) -> Config {
    let mut mount_options = vec![
        MountOption::FSName(format!("{SUBTYPE}:{}", options.volume)),
        MountOption::Subtype(SUBTYPE.to_owned()),
        MountOption::DefaultPermissions,
        if options.fs.read_only {
            MountOption::RO
        } else {
            MountOption::RW
        },
        if options.dev {
            MountOption::Dev
        } else {
            MountOption::NoDev
        },
        if options.suid {
            MountOption::Suid
        } else {
            MountOption::NoSuid
        },
        if options.exec {
            MountOption::Exec
        } else {
            MountOption::NoExec
        },
    ];
    if options.fs.atime == crate::options::AtimePolicy::Off {
        mount_options.push(MountOption::NoAtime);
    }
    let mut config = Config::default();
    config.mount_options = mount_options;
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(if options.threads > 0 {
        options.threads
    } else {
        std::thread::available_parallelism()
            .map_or(THREADS_MIN, usize::from)
            .clamp(THREADS_MIN, THREADS_MAX)
    });
    config.clone_fd = true;
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_mount_point_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        assert!(matches!(
            prepare(&missing, false),
            Err(MountError::Missing(_))
        ));
        let file = dir.path().join("file");
        std::fs::write(&file, b"x").unwrap();
        assert!(matches!(
            prepare(&file, false),
            Err(MountError::NotADirectory(_))
        ));
        assert!(matches!(
            prepare(&file.join("below"), false),
            Err(MountError::NotADirectory(_))
        ));
        let error = prepare(dir.path(), false).unwrap_err();
        assert!(matches!(error, MountError::NotEmpty(_)));
        assert!(error.to_string().contains("nonempty"));
        assert!(prepare(dir.path(), true).is_ok());
    }
}

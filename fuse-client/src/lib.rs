//! The heliofs mount: a file system on a metadata session and a segment store, and its thin FUSE front.
//!
//! - [`mount`]: mounts, unmounts, cleans up
//! - [`fs`]: the file system; knows nothing of FUSE
//! - `fuse`: the adapter between the kernel and [`fs`]
//! - [`coherence`]: keeps caches in step with other mounts; the session's watcher
//! - [`meta_cache`]: attributes and names; [`inode`]: open and dirty files; [`handles`]: numbers of open files
//! - [`write`] and [`read`]: the data path; [`compact`]: sparse segments become full ones
//! - [`clock`], [`errno`], [`metrics`], [`options`]
//!
//! ```no_run
//! # async fn example(cluster: meta_client::Cluster, registry: prometheus::Registry) -> Result<(), Box<dyn std::error::Error>> {
//! let coherence = fuse_client::Coherence::new(300_000, 300_000, 300 << 20);
//! let session = meta_client::Session::attach(cluster, meta_client::SessionOptions {
//!     volume: "home".to_owned(),
//!     watcher: Some(coherence.clone()),
//!     ..Default::default()
//! }).await?;
//! let store = blockstore::SegmentStore::open(&session.storage(), "home", session.volume_id(), Default::default())?;
//! let options = fuse_client::MountOptions { volume: "home".to_owned(), ..Default::default() };
//! let mounted = fuse_client::mount(&tokio::runtime::Handle::current(), session, coherence, store, "/mnt".as_ref(), options).await?;
//! mounted.wait().await?;
//! # Ok(()) }
//! ```

pub mod ahead;
pub mod clock;
pub mod coherence;
pub mod compact;
pub mod errno;
pub mod fs;
mod fuse;
pub mod handles;
pub mod inode;
pub mod meta_cache;
pub mod metrics;
pub mod mount;
pub mod options;
pub mod read;
pub mod write;

pub use coherence::Coherence;
pub use errno::{Errno, FsResult};
pub use fs::Fs;
pub use mount::{MountError, Mounted, mount};
pub use options::{AtimePolicy, CompactionOptions, FsOptions, MountOptions};
pub use write::staging::{StagingError, StagingOptions};

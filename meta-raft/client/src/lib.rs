//! Talks to a metadata cluster: leader tracking, sessions, retries, leases.
//!
//! - [`mod@url`] reads `helio://host:port,host:port/NAME`
//! - [`token`]: the cluster's token
//! - [`cluster`]: [`Cluster`], the peers and the calls that need no session; [`admin`] are the typed calls
//! - [`changelog`]: follows a volume's history from any replica
//! - `mirror`: slots, copies of volumes, status of mirrors
//! - [`session`]: [`Session`], one long-lived stream to the leader that survives reconnects and failovers
//! - [`error`]: what went wrong, by what the caller should do about it

pub mod admin;
pub mod changelog;
pub mod cluster;
mod dial;
pub mod error;
mod mirror;
pub mod session;
pub mod token;
pub mod url;

pub use changelog::{ChangelogFollower, ChangelogItem};
pub use cluster::{Cluster, ClusterOptions};
pub use error::{AttachError, ClientError, ClusterError, ErrorKind};
pub use mirror::{ReplayHold, VolumeCopy};
pub use session::{CacheTicket, Event, Recalled, Session, SessionOptions, Watcher, position_of};
pub use token::{Token, TokenError};
pub use url::{MetaUrl, UrlError};

//! Real parts for tests: `heliofs` processes, an S3 server that we did not write, mounts, disks that lose power. Everything
//! that a test starts or mounts ends with the value that holds it, also when the test panics.
//!
//! - [`process`]: a process and its log; [`spawner`]: who starts it; [`cluster`]: metadata nodes; [`mount`]: a mounted volume
//! - [`s3`]: SeaweedFS; [`disk`]: ext4 on a loop device; [`net`]: replies that get lost; [`lan`]: links that are cut
//! - [`mirror`]: a second region; [`relay`]: the link between
//! - [`load`]: writers that know what was acknowledged, and check it later; [`clocked`]: one that knows when

// Each test file uses a part of it.
#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used
)]

pub mod clocked;
pub mod cluster;
pub mod disk;
pub mod faults;
pub mod lan;
pub mod load;
pub mod mirror;
pub mod mount;
pub mod net;
pub mod process;
pub mod relay;
pub mod s3;
pub mod spawner;

pub use clocked::Clocked;
pub use cluster::{Cluster, Ran};
pub use disk::Disk;
pub use faults::{Fault, FaultyS3};
pub use lan::Lan;
pub use load::{Acknowledged, Load};
pub use mount::Mount;
pub use net::LostReplies;
pub use process::Process;
pub use relay::Relay;
pub use s3::S3;

use std::net::TcpListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Looks again and again until `look` finds something; panics when it does not within `within`.
pub fn wait_for<T>(what: &str, within: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "{what} did not happen within {within:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Loopback ports that were free a moment ago; held together while they are chosen, so that none comes twice.
pub fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<_> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    held.iter()
        .map(|listener| listener.local_addr().unwrap().port())
        .collect()
}

/// A new directory on disk, not in memory: nodes must really sync.
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("heliofs-test-")
        .tempdir()
        .unwrap()
}

/// Where `.ci/setup` puts tools.
pub fn tools() -> PathBuf {
    let cache = std::env::var_os("HELIOFS_CACHE")
        .map(PathBuf::from)
        .unwrap_or_else(|| {
            let base = std::env::var_os("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .unwrap_or_else(|| {
                    PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache")
                });
            base.join("heliofs")
        });
    cache.join("tools")
}

/// Mount tests can't be skipped quietly: where they should run, /dev/fuse is there.
pub fn need_root_and_fuse() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test mounts file systems: run it as root"
    );
    assert!(
        std::path::Path::new("/dev/fuse").exists(),
        "/dev/fuse is missing: run .ci/setup test"
    );
}

/// What a process that serves metrics at `address` says of the sum or gauge `name`.
pub fn metric(address: &str, name: &str) -> u64 {
    let shown = cluster::run(std::process::Command::new("curl").args([
        "-s",
        "-f",
        &format!("http://{address}/metrics"),
    ]));
    let shown = shown.success().out;
    // A label follows the name.
    let start = format!("{name}{{");
    let line = shown.lines().find(|line| line.starts_with(&start));
    line.unwrap_or_else(|| panic!("no {name} in\n{shown}"))
        .rsplit(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

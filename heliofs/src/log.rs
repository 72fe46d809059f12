//! Where log lines go: standard error, or a file.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Mutex;

use tracing_subscriber::EnvFilter;

use crate::failure::{Outcome, While};

/// Who is logging decides what is worth a line when nobody said.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Runs for long: changes of state are worth a line.
    Service,
    /// Answers by its output and exit code.
    Command,
}

/// Starts logging. RUST_LOG, else -v, else what suits the role.
pub(crate) fn start(role: Role, verbose: u8, file: Option<&Path>) -> Outcome {
    let ours = match (role, verbose) {
        (Role::Command, 0) => "error",
        (Role::Service, 0) | (Role::Command, 1) => "info",
        (Role::Service, 1) | (Role::Command, 2) => "debug",
        (_, _) => "trace",
    };
    // Libraries only when something is odd; openraft reports each refused connection as a warning or error.
    let default = format!(
        "warn,heliofs={ours},meta_server={ours},meta_client={ours},blockstore={ours},fuse_client={ours},mirror_sync={ours},openraft=off"
    );
    let filter = match std::env::var("RUST_LOG") {
        Ok(wanted) if !wanted.is_empty() => EnvFilter::try_new(&wanted).while_("use RUST_LOG")?,
        _ => EnvFilter::try_new(default).while_("set up logging")?,
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(true);
    match file {
        Some(path) => {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)
                    .while_(format_args!("create {}", parent.display()))?;
            }
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .while_(format_args!("open the log file {}", path.display()))?;
            subscriber
                .with_ansi(false)
                .with_writer(Mutex::new(file))
                .init();
        }
        None => {
            let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
            subscriber
                .with_ansi(ansi)
                .with_writer(std::io::stderr)
                .init();
        }
    }
    Ok(())
}

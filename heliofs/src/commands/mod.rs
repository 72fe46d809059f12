//! One file per command.

pub(crate) mod auth;
pub(crate) mod bench;
pub(crate) mod changelog;
pub(crate) mod clone;
pub(crate) mod compact;
pub(crate) mod config;
pub(crate) mod destroy;
pub(crate) mod format;
pub(crate) mod fsck;
pub(crate) mod gc;
pub(crate) mod info;
pub(crate) mod meta;
pub(crate) mod mirror;
pub(crate) mod mount;
pub(crate) mod objbench;
pub(crate) mod quota;
pub(crate) mod raft;
pub(crate) mod restore;
pub(crate) mod rmr;
pub(crate) mod segments;
pub(crate) mod snapshot;
pub(crate) mod staging;
pub(crate) mod status;
pub(crate) mod summary;
pub(crate) mod sync;
pub(crate) mod umount;
pub(crate) mod up;
pub(crate) mod version;
pub(crate) mod warmup;

use std::future::Future;

use crate::cli::{Cli, Command};
use crate::failure::{Outcome, While};
use crate::log::{self, Role};

/// Runs what was typed.
pub(crate) fn run(cli: Cli) -> Outcome {
    let Cli {
        json,
        verbose,
        command,
    } = cli;
    match command {
        // These set up logging and threads by themselves.
        Command::Up(options) => return up::run(&options, json, verbose),
        Command::Meta(options) => return meta::run(options, json, verbose),
        Command::Mount(options) => return mount::run(options, json, verbose),
        _ => log::start(Role::Command, verbose, None)?,
    }
    match command {
        Command::Auth(options) => auth::run(options, json),
        Command::Raft(command) => wait(raft::run(command, json)),
        Command::Format(options) => wait(format::run(options, json)),
        Command::Umount(options) => umount::run(&options, json),
        Command::Status(options) => wait(status::run(options, json)),
        Command::Info(options) => wait(info::run(options, json)),
        Command::Config(options) => wait(config::run(options, json)),
        Command::Fsck(options) => wait(fsck::run(options, json)),
        Command::Gc(options) => wait(gc::run(options, json)),
        Command::Compact(options) => wait(compact::run(options, json)),
        Command::Destroy(options) => wait(destroy::run(options, json)),
        Command::Clone(options) => wait(clone::run(options, json)),
        Command::Warmup(options) => warmup::run(&options, json),
        Command::Sync(options) => runtime(service_threads())?.block_on(sync::run(options, json)),
        Command::Objbench(options) => wait(objbench::run(options, json)),
        Command::Quota(command) => wait(quota::run(command, json)),
        Command::Snapshot(command) => wait(snapshot::run(command, json)),
        Command::Staging(command) => wait(staging::run(command, json)),
        Command::Summary(options) => wait(summary::run(options, json)),
        Command::Bench(options) => bench::run(&options, json),
        Command::Restore(options) => wait(restore::run(options, json)),
        Command::Rmr(options) => wait(rmr::run(options, json)),
        Command::Changelog(options) => wait(changelog::run(options, json)),
        Command::Mirror(command) => wait(mirror::run(command, json)),
        Command::Version => version::run(json),
        Command::Up(_) | Command::Meta(_) | Command::Mount(_) => unreachable!("handled above"),
    }
}

/// Runs a short command to its end. Two threads: it waits for the network and little else.
fn wait(command: impl Future<Output = Outcome>) -> Outcome {
    runtime(2)?.block_on(command)
}

/// An executor with `threads` workers.
fn runtime(threads: usize) -> Outcome<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .while_("start the executor")
}

/// Threads for a service: one a core, and never fewer than two, so that a long task does not stop heartbeats.
fn service_threads() -> usize {
    std::thread::available_parallelism().map_or(2, |cores| cores.get().max(2))
}

//! The heliofs command: one binary for metadata nodes, mounts and operators.
//!
//! - [`cli`]: flags that all commands share, and the list of commands; [`commands`]: one file per command
//! - [`failure`]: errors with a hint and an exit code
//! - [`passphrase`]: of encrypted volumes; [`connect`]: META-URL and token to a cluster; [`mounts`]: which mounts run on this machine
//! - [`mirror_target`]: a metadata node as a mirror
//! - [`background`]: `-d`; [`fstab`]: `mount.heliofs`; [`signals`]; [`serve_metrics`]; [`log`]
//! - [`units`], [`output`], [`progress`]: sizes, times and tables as people write and read them

mod background;
mod buckets;
mod cli;
mod commands;
mod connect;
mod copying;
mod failure;
mod fencing;
mod fstab;
mod log;
mod mirror_target;
mod mounts;
mod output;
mod passphrase;
mod progress;
mod serve_metrics;
mod signals;
mod units;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::Cli;
use crate::failure::Failure;

// RocksDB and the mount allocate from many threads; glibc's arenas keep what they were given.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let arguments = match fstab::translate(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(failure) => return failure.report(false),
    };
    let json = arguments.iter().any(|argument| argument == "--json");
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        // For programs it is an object on one line, like every other error.
        Err(error) if json && error.use_stderr() => {
            let text = error.render().to_string();
            let first = text.lines().next().unwrap_or_default();
            return Failure::usage(first.trim_start_matches("error: "))
                .hint("--help shows what can be given")
                .report(true);
        }
        Err(error) => error.exit(),
    };
    let json = cli.json;
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        // The parent prints it.
        Err(failure) if background::is_child() => {
            background::failed(&failure);
            failure.exit_code()
        }
        Err(failure) => failure.report(json),
    }
}

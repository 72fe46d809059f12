//! How fast are a mounted file system's metadata operations and small files? A load generator in the manner of mdtest, and the
//! table that sets two systems side by side. `benches/quick` runs it.
//!
//! - [`load`]: the phases and how they are timed
//! - [`fsync`]: what one synced append costs on a device, the floor under every durable operation
//! - [`table`]: medians of repeated runs and their ratios

mod fsync;
mod load;
mod table;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "heliofs-load",
    about = "Measures metadata operations and small files on a mounted file system"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs every phase in a fresh directory and prints one JSON line a phase.
    Run(load::Options),
    /// Prints the cost of a 4 KiB append with fdatasync in a directory.
    Fsync {
        /// Where to append.
        directory: PathBuf,
    },
    /// Prints the table of two files of JSON lines, ratio = first / second.
    Table(table::Options),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(options) => load::run(&options),
        Command::Fsync { directory } => fsync::print(&directory),
        Command::Table(options) => table::print(&options),
    }
}

//! How fast are a mounted file system's metadata operations and small files? A load generator in the manner of mdtest, and the
//! table that sets two systems side by side. `benches/quick`, `benches/scale` and `benches/failover` run it.
//!
//! - [`load`]: the phases and how they are timed
//! - [`filer`]: how far SeaweedFS's filer.sync is behind
//! - [`fsync`]: what one synced append costs on a device, the floor under every durable operation
//! - [`gap`]: the longest time between two creates that succeeded
//! - [`mirror`]: how far a mirror is behind over a slow link, and how quickly it comes back
//! - [`scale`]: millions of inodes, a file of a million extents, and others' latencies meanwhile
//! - [`table`]: medians of repeated runs and their ratios

mod filer;
mod fsync;
mod gap;
mod load;
mod mirror;
mod scale;
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
    /// Fills a volume with empty files through sessions.
    Inodes(scale::Inodes),
    /// Makes one file of very many extents through a session.
    Extents(scale::Extents),
    /// Works on files of its own through a mount until told to stop, and prints how long each operation took.
    Others(scale::Others),
    /// Creates files through a mount until told to stop, and prints the longest time between two that succeeded.
    Gap(gap::Options),
    /// Passes connections on, with a round trip of its own.
    Relay(mirror::Relay),
    /// Commits at a rate and prints how old entries are when a mirror has applied them.
    MirrorLag(mirror::Lag),
    /// Makes directories in one SeaweedFS filer at a rate and prints how long they take to another.
    FilerLag(filer::FilerLag),
    /// Lets a mirror fall behind and prints how quickly it applies what it missed.
    MirrorCatchUp(mirror::CatchUp),
    /// Prints the table of two files of JSON lines, ratio = first / second.
    Table(table::Options),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(options) => load::run(&options),
        Command::Fsync { directory } => fsync::print(&directory),
        Command::Inodes(options) => scale::inodes(&options),
        Command::Extents(options) => scale::extents(&options),
        Command::Others(options) => scale::others(&options),
        Command::Gap(options) => gap::run(&options),
        Command::Relay(options) => mirror::relay(&options),
        Command::MirrorLag(options) => mirror::lag(&options),
        Command::FilerLag(options) => filer::lag(&options),
        Command::MirrorCatchUp(options) => mirror::catch_up(&options),
        Command::Table(options) => table::print(&options),
    }
}

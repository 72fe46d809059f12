//! What can be typed: flags that all commands share, and the commands.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::commands;

/// A POSIX file system on object storage, with metadata in a Raft cluster.
#[derive(Parser)]
#[command(name = "heliofs", version = commands::version::LONG, propagate_version = true)]
pub(crate) struct Cli {
    /// Prints JSON instead of tables and sentences.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Logs more; twice: even more. RUST_LOG has the last word.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How a cluster is reached.
#[derive(Args, Clone, Default, Debug)]
pub(crate) struct Access {
    /// The cluster's token, before any other; better --token-file or HELIOFS_TOKEN, since everybody on this machine can read the process list.
    // By the variable a mount tells the process in the background.
    #[arg(
        long,
        value_name = "TOKEN",
        env = "HELIOFS_BACKGROUND_TOKEN",
        hide_env = true
    )]
    pub(crate) token: Option<String>,
    /// File with the cluster token, readable by its owner only. Else: HELIOFS_TOKEN, ~/.config/heliofs/token, /etc/heliofs/token.
    #[arg(long, value_name = "FILE", env = "HELIOFS_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,
}

/// The commands.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Everything in one process: a metadata node, a directory as bucket, a mount. Needs no flags.
    Up(commands::up::Options),
    /// Runs one metadata node.
    Meta(commands::meta::Options),
    /// Looks at and changes the nodes of a metadata cluster.
    #[command(subcommand)]
    Raft(commands::raft::Command),
    /// Creates a volume.
    Format(commands::format::Options),
    /// Saves how a volume is reached from here, under a name that stands for all of it.
    Auth(commands::auth::Options),
    /// Mounts a volume.
    Mount(commands::mount::Options),
    /// Unmounts a volume.
    #[command(alias = "unmount")]
    Umount(commands::umount::Options),
    /// Shows a cluster's nodes, volumes and mounts.
    Status(commands::status::Options),
    /// Shows what the metadata knows of a file: attributes, extents, segments.
    Info(commands::info::Options),
    /// Shows or changes a volume's settings.
    Config(commands::config::Options),
    /// Checks metadata, objects and data against each other.
    Fsck(commands::fsck::Options),
    /// Finds objects that nothing refers to.
    Gc(commands::gc::Options),
    /// Copies what lives in sparse objects together.
    Compact(commands::compact::Options),
    /// Destroys a volume and its objects.
    Destroy(commands::destroy::Options),
    /// Removes whole trees in one step.
    Rmr(commands::rmr::Options),
    /// Copies a file or a tree by sharing its data.
    Clone(commands::clone::Options),
    /// Reads files through a mount, so that they lie in its caches.
    Warmup(commands::warmup::Options),
    /// Shows what is below directories, and where most of it lies.
    Summary(commands::summary::Options),
    /// Measures a mount: large files, small files, attributes.
    Bench(commands::bench::Options),
    /// Copies what a bucket, a prefix or a local path lacks of another.
    Sync(commands::sync::Options),
    /// Measures an object store.
    Objbench(commands::objbench::Options),
    /// Limits what directories, users and groups may use.
    #[command(subcommand)]
    Quota(commands::quota::Command),
    /// Makes, shows and removes read-only copies of directories.
    #[command(subcommand)]
    Snapshot(commands::snapshot::Command),
    /// Shows what mounts with --writeback have staged or kept aside, and takes it out.
    #[command(subcommand)]
    Staging(commands::staging::Command),
    /// Shows what is in the trash, and puts it back.
    Restore(commands::restore::Options),
    /// Prints a volume's history.
    Changelog(commands::changelog::Options),
    /// Mirrors of volumes in other regions: slots at the source, status at the mirror.
    #[command(subcommand)]
    Mirror(commands::mirror::Command),
    /// Prints versions.
    Version,
}

//! `heliofs mirror …`: what a source keeps for its mirrors, and how a mirror is.
//!
//! - [`bucket`]: a mirror's own bucket; [`worker`]: fills it
//! - [`promote`]: the mirror becomes the volume; [`rejoin`]: the old source becomes its mirror
//! - [`slots`]: at the source; [`show`]: status at the mirror; [`token`]: waiting for what was written; [`verify`]: record by
//!   record

mod bucket;
mod handover;
mod incomplete;
mod promote;
mod promoted;
mod rejoin;
mod show;
mod slots;
mod tail_paths;
mod token;
mod verify;
mod worker;

use clap::{Args, Subcommand};

use crate::cli::Access;
use crate::failure::Outcome;

/// A volume of some cluster.
#[derive(Args)]
pub(crate) struct At {
    #[command(flatten)]
    access: Access,
    /// helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]
    #[arg(value_name = "META-URL")]
    url: String,
    /// The volume; all, where that makes sense.
    name: Option<String>,
}

/// What to do about mirrors.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Makes a slot at the source: from now on log and segments are kept for the mirror.
    Create(slots::Create),
    /// Lists slots at the source.
    List(At),
    /// Stops a mirror for a while, at the source; log and segments are kept within the slot's cap.
    Pause(slots::Named),
    /// Lets a paused mirror go on.
    Resume(slots::Named),
    /// Deletes a slot at the source; a mirror that still runs makes another and loads anew.
    Delete(slots::Named),
    /// Shows how far mirrors are, at the mirror.
    Status(show::Options),
    /// Prints a volume's position: at the source, everything that was acknowledged so far.
    Token(At),
    /// Waits until a mirror has applied a token's position.
    Wait(token::Wait),
    /// Drops what a mirror has of a volume and loads it anew, at the mirror.
    Reload(At),
    /// Gives a mirror a bucket of its own, into which objects are copied, at the mirror.
    Bucket(bucket::Options),
    /// Copies objects into a mirror's own bucket, beside its mounts; several share the work.
    Worker(worker::Options),
    /// Makes a mirror the volume that is written to, or all mirrors of a cluster, under a new epoch; the source becomes read-only first.
    Promote(promote::Options),
    /// Makes an old source a mirror of the one that was promoted, and exports what only it has.
    Rejoin(rejoin::Options),
    /// Compares a mirror's records with the source's; exit code 2 when they differ.
    Verify(verify::Options),
}

pub(crate) async fn run(command: Command, json: bool) -> Outcome {
    match command {
        Command::Create(options) => slots::create(options, json).await,
        Command::List(at) => slots::list(at, json).await,
        Command::Pause(named) => slots::pause(named, true, json).await,
        Command::Resume(named) => slots::pause(named, false, json).await,
        Command::Delete(named) => slots::delete(named, json).await,
        Command::Status(options) => show::run(options, json).await,
        Command::Token(at) => token::print(at, json).await,
        Command::Wait(options) => token::wait(options, json).await,
        Command::Reload(at) => show::reload(at, json).await,
        Command::Bucket(options) => bucket::run(options, json).await,
        Command::Worker(options) => worker::run(options, json).await,
        Command::Promote(options) => promote::run(options, json).await,
        Command::Rejoin(options) => rejoin::run(options, json).await,
        Command::Verify(options) => verify::run(options, json).await,
    }
}

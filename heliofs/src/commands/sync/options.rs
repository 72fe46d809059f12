//! [`Options`]: the flags of `heliofs sync`.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::plan::Rules;
use crate::units;

/// From where to where, and what of it.
#[derive(Args)]
pub(crate) struct Options {
    /// A path, file:///PATH, s3://BUCKET[/PREFIX] or http[s]://HOST[:PORT]/BUCKET[/PREFIX]. All below it is copied; without a
    /// slash at the end, a single file or object of that name, if there is one.
    #[arg(value_name = "SRC")]
    pub(super) source: String,
    /// In the same manner. What is missing of it is created.
    #[arg(value_name = "DST")]
    pub(super) destination: String,
    /// SRC's access key, or HELIOFS_ACCESS_KEY. Keys that may only read are enough.
    #[arg(long, value_name = "KEY")]
    pub(super) access_key: Option<String>,
    /// SRC's secret key; better HELIOFS_SECRET_KEY, since everybody on this machine can read the process list.
    #[arg(long, value_name = "KEY")]
    pub(super) secret_key: Option<String>,
    /// DST's access key, or HELIOFS_ACCESS_KEY2 [default: SRC's, when SRC is of the same server or no bucket].
    #[arg(long, value_name = "KEY")]
    pub(super) access_key2: Option<String>,
    /// DST's secret key; better HELIOFS_SECRET_KEY2.
    #[arg(long, value_name = "KEY")]
    pub(super) secret_key2: Option<String>,
    /// The region of SRC's bucket, when its URL does not say.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(super) region: String,
    /// The region of DST's bucket, when its URL does not say.
    #[arg(
        long,
        default_value = "",
        value_name = "REGION",
        hide_default_value = true
    )]
    pub(super) region2: String,
    #[command(flatten)]
    pub(super) patterns: Patterns,
    /// Says what would be done and does nothing.
    #[arg(long, alias = "dry", conflicts_with = "checkpoint")]
    pub(super) dry_run: bool,
    /// Copies what is newer at SRC, and leaves what is newer at DST.
    #[arg(short, long)]
    update: bool,
    /// Copies all, equal or not.
    #[arg(short, long)]
    force_update: bool,
    /// Copies only what DST has, too.
    #[arg(long, alias = "ignore-non-existing")]
    existing: bool,
    /// Copies only what DST has not.
    #[arg(long)]
    ignore_existing: bool,
    /// Deletes at SRC what DST has: after it was copied, or because it was the same.
    #[arg(long)]
    delete_src: bool,
    /// Deletes at DST what SRC has not. What the patterns exclude stays.
    #[arg(long, conflicts_with = "delete_src")]
    delete_dst: bool,
    /// Compares the bytes of all that both have, and copies what differs.
    #[arg(long)]
    check_all: bool,
    /// Reads back what was copied and compares.
    #[arg(long)]
    pub(super) check_new: bool,
    /// Objects under way at once. Each takes up to 24 MiB of memory.
    #[arg(short = 'p', long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Bytes per second that are read from SRC at most. 0: no limit.
    #[arg(long, value_parser = units::parse_size, default_value = "0", value_name = "SIZE")]
    pub(super) bwlimit: u64,
    /// Objects of SRC that are looked at, at most.
    #[arg(long, value_name = "N")]
    pub(super) limit: Option<u64>,
    /// The first key, below SRC.
    #[arg(short, long, value_name = "KEY")]
    pub(super) start: Option<String>,
    /// The last key, below SRC.
    #[arg(short, long, value_name = "KEY")]
    pub(super) end: Option<String>,
    /// Keeps in this file how far the run came; the same command goes on from there. Removed at the end.
    #[arg(long, value_name = "FILE")]
    pub(super) checkpoint: Option<PathBuf>,
}

impl Options {
    pub(super) fn rules(&self) -> Rules {
        Rules {
            update: self.update,
            force_update: self.force_update,
            existing: self.existing,
            ignore_existing: self.ignore_existing,
            check_all: self.check_all,
            delete_src: self.delete_src,
            delete_dst: self.delete_dst,
        }
    }

    pub(super) fn threads(&self) -> usize {
        usize::from(self.threads)
    }
}

/// `--include` (true) and `--exclude` in the order in which they were typed, which `#[derive(Args)]` loses.
#[derive(Clone, Debug, Default)]
pub(crate) struct Patterns(pub(super) Vec<(bool, String)>);

impl FromArgMatches for Patterns {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut patterns = Vec::new();
        for (id, include) in [("include", true), ("exclude", false)] {
            let given = matches.get_many::<String>(id).into_iter().flatten();
            let places = matches.indices_of(id).into_iter().flatten();
            patterns.extend(
                places
                    .zip(given)
                    .map(|(at, text)| (at, include, text.clone())),
            );
        }
        patterns.sort();
        let patterns = patterns.into_iter();
        Ok(Self(
            patterns.map(|(_, include, text)| (include, text)).collect(),
        ))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Patterns {
    fn augment_args(command: Command) -> Command {
        let pattern = |name: &'static str, help: &'static str| {
            Arg::new(name)
                .long(name)
                .value_name("PATTERN")
                .action(ArgAction::Append)
                .help(help)
        };
        command
            .arg(pattern(
                "include",
                "Keeps what matches, whatever later patterns say. May be repeated; the first that matches decides",
            ))
            .arg(pattern(
                "exclude",
                "Leaves out what matches: NAME, *.tmp, dir/ (at any depth), /from/the/top, a/**/b. May be repeated",
            ))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

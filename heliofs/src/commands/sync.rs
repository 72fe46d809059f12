//! `heliofs sync`: copies what one bucket, prefix or local path lacks of another.
//!
//! Both listings are read in the order of their keys, side by side: memory does not grow with them.
//!
//! - [`options`]: the flags; [`filter`]: `--include` and `--exclude`; [`plan`]: what is done about a key, and how far all is done
//! - [`place`]: a source or destination; [`local`]: a directory as one; [`copy`]: single objects
//! - [`checkpoint`]: the file by which an interrupted run goes on; [`summary`]: what came of it

mod checkpoint;
mod copy;
mod filter;
mod local;
mod options;
mod place;
mod plan;
mod summary;

use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Duration;

use blockstore::StoreOptions;
use blockstore::object::{From, PlainObject, RateLimit};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::time::MissedTickBehavior;

pub(crate) use options::Options;

use self::checkpoint::{Checkpoint, State};
use self::copy::{Copier, Done};
use self::filter::Filters;
use self::place::{Ignored, Listing, Place, Role, Trouble};
use self::plan::{Pair, Progress, Rules, Step, first};
use self::summary::Summary;
use crate::buckets::find_keys;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::signals::Stop;

/// How often the checkpoint is written.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// So many failures without one success: it is not about single objects.
const HOPELESS: u64 = 100;

/// Both listings, merged.
struct Plan {
    source: Listing,
    destination: Listing,
    source_head: Option<PlainObject>,
    destination_head: Option<PlainObject>,
    source_ended: bool,
    destination_ended: bool,
    /// The last key of all.
    end: Option<String>,
}

impl Plan {
    /// The next key in order and where it lies. Nothing is lost when it is dropped while it waits.
    async fn next(&mut self) -> Outcome<Option<Pair>> {
        let end = self.end.as_deref();
        advance(
            &mut self.source,
            &mut self.source_head,
            &mut self.source_ended,
            end,
        )
        .await?;
        advance(
            &mut self.destination,
            &mut self.destination_head,
            &mut self.destination_ended,
            end,
        )
        .await?;
        fn key(head: &Option<PlainObject>) -> Option<&str> {
            head.as_ref().map(|object| object.key.as_str())
        }
        let order = first(key(&self.source_head), key(&self.destination_head));
        let pair = match order {
            None => None,
            Some(Ordering::Less) => self.source_head.take().map(Pair::Source),
            Some(Ordering::Greater) => self.destination_head.take().map(Pair::Destination),
            Some(Ordering::Equal) => self
                .source_head
                .take()
                .zip(self.destination_head.take())
                .map(|(source, destination)| Pair::Both(source, destination)),
        };
        Ok(pair)
    }
}

async fn advance(
    listing: &mut Listing,
    head: &mut Option<PlainObject>,
    ended: &mut bool,
    end: Option<&str>,
) -> Outcome {
    if head.is_some() || *ended {
        return Ok(());
    }
    match listing.recv().await.transpose()? {
        Some(object) if end.is_none_or(|end| object.key.as_str() <= end) => *head = Some(object),
        _ => *ended = true,
    }
    Ok(())
}

fn store_options(options: &Options) -> StoreOptions {
    StoreOptions {
        memory_cache_bytes: 0,
        uploads_max: options.threads(),
        downloads_max: options.threads(),
        ..StoreOptions::default()
    }
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    let store_options = store_options(&options);
    let filters = Filters::parse(&options.patterns.0)?;
    let (keys, keys2) = keys(&options)?;
    let source = Place::parse(
        Role::Source,
        &options.source,
        keys,
        &options.region,
        &store_options,
    )?;
    let mut destination = Place::parse(
        Role::Destination,
        &options.destination,
        keys2.clone(),
        &options.region2,
        &store_options,
    )?;
    let checkpoint = match &options.checkpoint {
        Some(path) => Some(Checkpoint::open(path, state(&options))?),
        None => None,
    };
    let single = source.is_single().await?;
    if single {
        destination = destination.for_single(&source)?;
    }
    if source.overlaps(&destination) {
        return Err(Failure::usage(format!(
            "{} and {} lie in each other",
            source.shown(),
            destination.shown()
        )));
    }
    if !single {
        check_source(&source, &options).await?;
    }
    // A local directory above a single file is made when the file is.
    if !options.dry_run && (destination.is_bucket() || !single) {
        destination
            .create(keys2, &options.region2, &store_options)
            .await?;
    }
    let summary = Arc::new(Summary::new(&source, &destination, options.dry_run, json));
    let resumed = checkpoint.as_ref().and_then(Checkpoint::done);
    let resumed = resumed.map(str::to_owned);
    let plan = match single {
        true => single_plan(&source, &destination).await?,
        false => plan(
            &options,
            &source,
            &destination,
            &filters,
            &resumed,
            &summary,
        ),
    };
    let copier = Copier {
        source,
        destination,
        limit: RateLimit::new(options.bwlimit),
        check_new: options.check_new,
        delete_src: options.rules().delete_src,
    };
    let work = Work {
        rules: options.rules(),
        threads: options.threads(),
        limit: options.limit,
        dry_run: options.dry_run,
        plan,
        copier,
        summary: Arc::clone(&summary),
        progress: Progress::new(resumed),
        checkpoint,
    };
    let ended = work.run().await;
    summary.show()?;
    ended?;
    summary.outcome()
}

/// What a checkpoint belongs to.
fn state(options: &Options) -> State {
    State {
        format: 1,
        source: options.source.clone(),
        destination: options.destination.clone(),
        rules: options.rules(),
        filters: options.patterns.0.clone(),
        start: options.start.clone(),
        end: options.end.clone(),
        done: None,
    }
}

type Keys = Option<(String, String)>;

/// Keys of SRC and DST. When only one of them is a bucket, or both are of one server, the keys of one are those of the other.
fn keys(options: &Options) -> Outcome<(Keys, Keys)> {
    let first = find_keys(&options.access_key, &options.secret_key, "")?;
    let second = find_keys(&options.access_key2, &options.secret_key2, "2")?;
    let host = |url: &str| -> Option<String> {
        let (scheme, rest) = url
            .split_once("://")
            .filter(|(scheme, _)| *scheme != "file")?;
        let host = rest.split('/').next().unwrap_or_default();
        // A bucket's name is no host: all of them are Amazon's.
        Some(if scheme == "s3" { "s3" } else { host }.to_owned())
    };
    let shared = match (host(&options.source), host(&options.destination)) {
        (Some(source), Some(destination)) => source == destination,
        _ => true,
    };
    Ok(match shared {
        true => (first.clone().or(second.clone()), second.or(first)),
        false => (first, second),
    })
}

/// Fails where nothing can be meant: a prefix that is not there, or an empty place that the destination would be made equal to.
async fn check_source(source: &Place, options: &Options) -> Outcome {
    let nobody: Ignored = Arc::new(|_, _| {});
    let mut listing = source.list(None, &Filters::default(), false, nobody);
    if listing.recv().await.transpose()?.is_some() {
        return Ok(());
    }
    if source.is_prefix() {
        return Err(
            Failure::new(format!("nothing lies below {}", source.shown())).hint("is SRC right?"),
        );
    }
    if options.rules().delete_dst {
        return Err(Failure::new(format!(
            "{} is empty, and --delete-dst would empty {}, too",
            source.shown(),
            options.destination
        ))
        .hint("is SRC right, and mounted?"));
    }
    Ok(())
}

fn plan(
    options: &Options,
    source: &Place,
    destination: &Place,
    filters: &Filters,
    resumed: &Option<String>,
    summary: &Arc<Summary>,
) -> Plan {
    let from = match (resumed, &options.start) {
        (Some(done), _) => Some(From {
            key: done.clone(),
            inclusive: false,
        }),
        (None, Some(start)) => Some(From {
            key: start.clone(),
            inclusive: true,
        }),
        (None, None) => None,
    };
    let ignored: Ignored = {
        let summary = Arc::clone(summary);
        Arc::new(move |key, why| summary.ignored(key, why))
    };
    let nobody: Ignored = Arc::new(|_, _| {});
    let clean = !options.dry_run;
    Plan {
        source: source.list(from.clone(), filters, false, ignored),
        destination: destination.list(from, filters, clean, nobody),
        source_head: None,
        destination_head: None,
        source_ended: false,
        destination_ended: false,
        end: options.end.clone(),
    }
}

/// Of one object, or one file.
async fn single_plan(source: &Place, destination: &Place) -> Outcome<Plan> {
    let (_, nothing) = tokio::sync::mpsc::channel(1);
    let (_, nothing_either) = tokio::sync::mpsc::channel(1);
    Ok(Plan {
        source: nothing,
        destination: nothing_either,
        source_head: source.single().await?,
        destination_head: destination.single().await?,
        source_ended: true,
        destination_ended: true,
        end: None,
    })
}

/// A run.
struct Work {
    rules: Rules,
    threads: usize,
    limit: Option<u64>,
    dry_run: bool,
    plan: Plan,
    copier: Copier,
    summary: Arc<Summary>,
    progress: Progress,
    checkpoint: Option<Checkpoint>,
}

/// One object that is worked on ended.
struct Ended {
    number: u64,
    key: String,
    outcome: Result<Done, Trouble>,
}

impl Work {
    /// Goes through the plan, several objects at once. Single objects may fail; an error ends all.
    async fn run(mut self) -> Outcome {
        let mut stop = Stop::catch()?;
        let mut save = tokio::time::interval(SAVE_EVERY);
        save.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut planning = true;
        let Self {
            rules,
            threads,
            limit,
            dry_run,
            plan,
            copier,
            summary,
            progress,
            checkpoint,
        } = &mut self;
        let copier = &*copier;
        let mut running = FuturesUnordered::new();
        let mut limited = false;
        let ended = loop {
            if !planning && running.is_empty() {
                break Ok(());
            }
            tokio::select! {
                signal = stop.wait() => {
                    break Err(Failure::new(format!("stopped by {signal}")).hint(
                        match checkpoint {
                            Some(_) => "the same command goes on where it was",
                            None => "the same command copies what is missing",
                        },
                    ));
                }
                _ = save.tick() => {
                    if let Some(checkpoint) = checkpoint
                        && let Err(failure) = checkpoint.save(progress.done())
                    {
                        break Err(failure);
                    }
                }
                Some(ended) = running.next(), if !running.is_empty() => {
                    let Ended { number, key, outcome } = ended;
                    progress.end(number, outcome.is_ok());
                    summary.ended(copier.source.name(&key), outcome);
                    if summary.failed_only(HOPELESS) {
                        break Err(Failure::new(format!("{HOPELESS} objects failed, and none succeeded")));
                    }
                }
                next = plan.next(), if planning && running.len() < *threads => {
                    let pair = match next {
                        Err(failure) => break Err(failure),
                        Ok(None) => {
                            planning = false;
                            continue;
                        }
                        Ok(Some(pair)) => pair,
                    };
                    let step = rules.decide(&pair);
                    let (object, at_source) = match pair {
                        Pair::Source(object) | Pair::Both(object, _) => (object, true),
                        Pair::Destination(object) => (object, false),
                    };
                    if at_source && limit.is_some_and(|limit| summary.found() >= limit) {
                        (planning, limited) = (false, true);
                        continue;
                    }
                    if at_source {
                        summary.one_found();
                    }
                    if step == Step::Skip {
                        progress.pass(&object.key);
                        if at_source {
                            summary.skipped();
                        }
                    } else if *dry_run {
                        if let Err(failure) = summary.would(step, copier.source.name(&object.key), object.bytes) {
                            break Err(failure);
                        }
                    } else {
                        if !at_source {
                            summary.one_more();
                        }
                        let number = progress.begin(&object.key);
                        running.push(async move {
                            let outcome = copier.run(step, &object).await;
                            Ended { number, key: object.key, outcome }
                        });
                    }
                }
            }
        };
        drop(running);
        let done = self.progress.done().map(str::to_owned);
        match self.checkpoint {
            None => {}
            Some(checkpoint) if ended.is_ok() && !limited && !self.summary.has_failures() => {
                checkpoint.remove()?;
            }
            Some(mut checkpoint) => checkpoint.save(done.as_deref())?,
        }
        ended
    }
}

/// A line of a dry run.
fn dry(step: Step, key: &str) -> Outcome {
    match step {
        Step::Skip => Ok(()),
        Step::Copy => output::line(format_args!("copy {key}")),
        Step::Check => output::line(format_args!("compare {key}")),
        Step::DeleteSource => output::line(format_args!("delete at SRC {key}")),
        Step::DeleteDestination => output::line(format_args!("delete at DST {key}")),
    }
}

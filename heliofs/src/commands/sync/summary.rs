//! [`Summary`]: what came of a run, while it goes on and at its end.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use indicatif::ProgressBar;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::copy::Done;
use super::place::{Place, Trouble};
use super::plan::Step;
use crate::failure::{Failure, Outcome};
use crate::units::show_size;
use crate::{output, progress};

/// Objects that are named in JSON.
const NAMED: usize = 1000;

/// Counters, and the bar.
pub(crate) struct Summary {
    source: String,
    destination: String,
    dry_run: bool,
    json: bool,
    bar: ProgressBar,
    found: AtomicU64,
    copied: AtomicU64,
    copied_bytes: AtomicU64,
    skipped: AtomicU64,
    checked: AtomicU64,
    deleted: AtomicU64,
    lost: AtomicU64,
    failed: AtomicU64,
    ignored: AtomicU64,
    failures: Mutex<Vec<Value>>,
}

impl Summary {
    pub(crate) fn new(source: &Place, destination: &Place, dry_run: bool, json: bool) -> Self {
        Self {
            source: source.shown().to_owned(),
            destination: destination.shown().to_owned(),
            dry_run,
            json,
            // A dry run prints lines of its own.
            bar: progress::bar("sync", 0, false, json || dry_run),
            found: AtomicU64::new(0),
            copied: AtomicU64::new(0),
            copied_bytes: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            checked: AtomicU64::new(0),
            deleted: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            ignored: AtomicU64::new(0),
            failures: Mutex::default(),
        }
    }

    /// Objects of the source so far.
    pub(crate) fn found(&self) -> u64 {
        self.found.load(Relaxed)
    }

    /// One more.
    pub(crate) fn one_found(&self) {
        self.found.fetch_add(1, Relaxed);
        self.bar.inc_length(1);
    }

    /// An object that only the destination has is looked at.
    pub(crate) fn one_more(&self) {
        self.bar.inc_length(1);
    }

    /// An object of the source was left as it is.
    pub(crate) fn skipped(&self) {
        self.skipped.fetch_add(1, Relaxed);
        self.bar.inc(1);
    }

    /// Something that is no file. Said at once.
    pub(crate) fn ignored(&self, key: &str, why: &str) {
        self.ignored.fetch_add(1, Relaxed);
        self.say(key, &format!("ignored: {why}"));
    }

    fn say(&self, key: &str, what: &str) {
        if !self.json {
            self.bar.suspend(|| eprintln!("{key}: {what}"));
        }
    }

    /// What a dry run would have done.
    pub(crate) fn would(&self, step: Step, key: &str, bytes: u64) -> Outcome {
        match step {
            Step::Skip => {}
            Step::Copy => {
                self.copied.fetch_add(1, Relaxed);
                self.copied_bytes.fetch_add(bytes, Relaxed);
            }
            Step::Check => {
                self.checked.fetch_add(1, Relaxed);
            }
            Step::DeleteSource | Step::DeleteDestination => {
                self.deleted.fetch_add(1, Relaxed);
            }
        }
        match self.json {
            true => Ok(()),
            false => super::dry(step, key),
        }
    }

    /// Work on an object ended.
    pub(crate) fn ended(&self, key: &str, outcome: Result<Done, Trouble>) {
        self.bar.inc(1);
        match outcome {
            Ok(done) => {
                if let Some(bytes) = done.copied {
                    self.copied.fetch_add(1, Relaxed);
                    let bytes = self.copied_bytes.fetch_add(bytes, Relaxed) + bytes;
                    self.bar.set_message(format!("sync {}", show_size(bytes)));
                }
                self.checked.fetch_add(u64::from(done.checked), Relaxed);
                self.deleted.fetch_add(done.deleted, Relaxed);
                self.lost.fetch_add(u64::from(done.lost), Relaxed);
                if done.marker || (done.checked && done.copied.is_none()) {
                    self.skipped.fetch_add(1, Relaxed);
                }
            }
            Err(trouble) => {
                self.failed.fetch_add(1, Relaxed);
                self.say(key, &format!("failed: {trouble}"));
                let mut failures = self.failures.lock();
                if failures.len() < NAMED {
                    failures.push(json!({ "key": key, "error": trouble.to_string() }));
                }
            }
        }
    }

    pub(crate) fn has_failures(&self) -> bool {
        self.failed.load(Relaxed) > 0
    }

    /// Whether so many failed, and nothing succeeded.
    pub(crate) fn failed_only(&self, many: u64) -> bool {
        let successes = [&self.copied, &self.checked, &self.deleted];
        self.failed.load(Relaxed) >= many && successes.iter().all(|count| count.load(Relaxed) == 0)
    }

    /// Prints it.
    pub(crate) fn show(&self) -> Outcome {
        self.bar.finish_and_clear();
        let of = |count: &AtomicU64| count.load(Relaxed);
        if self.json {
            return output::print_json(&json!({
                "source": self.source,
                "destination": self.destination,
                "dry_run": self.dry_run,
                "found": of(&self.found),
                "copied": of(&self.copied),
                "copied_bytes": of(&self.copied_bytes),
                "skipped": of(&self.skipped),
                "checked": of(&self.checked),
                "deleted": of(&self.deleted),
                "lost": of(&self.lost),
                "failed": of(&self.failed),
                "ignored": of(&self.ignored),
                "failures": *self.failures.lock(),
            }));
        }
        let mut text = format!(
            "{}copied {} of {} objects ({}), skipped {}",
            if self.dry_run { "dry run: " } else { "" },
            of(&self.copied),
            of(&self.found),
            show_size(of(&self.copied_bytes)),
            of(&self.skipped),
        );
        for (name, count) in [
            ("checked", &self.checked),
            ("deleted", &self.deleted),
            ("gone before they were copied", &self.lost),
            ("ignored", &self.ignored),
            ("failed", &self.failed),
        ] {
            if of(count) > 0 {
                text.push_str(&format!(", {name} {}", of(count)));
            }
        }
        output::line(text)
    }

    /// An error when objects failed.
    pub(crate) fn outcome(&self) -> Outcome {
        match self.failed.load(Relaxed) {
            0 => Ok(()),
            failed => Err(
                Failure::new(format!("{failed} objects could not be synchronised"))
                    .hint("the same command tries them again"),
            ),
        }
    }
}

//! How long does a mounted file system stand still? Threads create files without a pause, and the longest time between two that
//! succeeded is noted. `benches/failover` kills leaders meanwhile.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Context;

/// What `gap` does.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// A directory of the mount; a new directory is made in it and removed again.
    #[arg(long)]
    directory: PathBuf,
    /// Threads that create at once.
    #[arg(long, default_value_t = 4)]
    threads: usize,
    /// Ends when this file appears.
    #[arg(long)]
    until: PathBuf,
    /// What the result is filed under.
    #[arg(long)]
    label: String,
}

/// Creates until told to stop; prints one JSON line: creates, errors, and the longest gap in milliseconds.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let top = tempfile::Builder::new()
        .prefix("gap-")
        .tempdir_in(&options.directory)
        .context("making a directory to work in")?;
    let began = Instant::now();
    // Microseconds after `began`; the time before the first create does not count.
    let (last, longest) = (AtomicU64::new(0), AtomicU64::new(0));
    let (created, errors) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..options.threads {
            let (top, last, longest) = (top.path(), &last, &longest);
            let (created, errors) = (&created, &errors);
            scope.spawn(move || {
                let mut n: u64 = 0;
                while !options.until.exists() {
                    let path = top.join(format!("{thread}-{n}"));
                    n += 1;
                    if let Err(error) = File::create_new(&path) {
                        errors.fetch_add(1, Ordering::Relaxed);
                        eprintln!("{}: {error}", path.display());
                        continue;
                    }
                    created.fetch_add(1, Ordering::Relaxed);
                    let now = began.elapsed().as_micros() as u64;
                    let before = last.fetch_max(now, Ordering::AcqRel);
                    if before != 0 {
                        longest.fetch_max(now.saturating_sub(before), Ordering::AcqRel);
                    }
                }
            });
        }
    });
    let line = serde_json::json!({
        "label": options.label,
        "created": created.into_inner(),
        "errors": errors.into_inner(),
        "gap_ms": longest.into_inner() as f64 / 1000.0,
    });
    println!("{line}");
    top.close().context("removing what the run made")?;
    Ok(())
}

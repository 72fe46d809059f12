//! The phases: every thread works in a directory of its own, all threads begin a phase together, and before a phase that reads
//! the kernel's caches are dropped, so that the file system itself has to answer.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::Instant;

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// A directory of the file system to measure; a new directory is made in it and removed again.
    #[arg(long)]
    directory: PathBuf,
    /// Threads that work at once.
    #[arg(long, default_value_t = 4)]
    threads: usize,
    /// Files of each thread.
    #[arg(long, default_value_t = 250)]
    files: usize,
    /// Bytes of each file.
    #[arg(long, default_value_t = 0)]
    size: usize,
    /// What the results are filed under.
    #[arg(long)]
    label: String,
    /// Only these phases, in their usual order. Phases that read or rename need `create` before them.
    #[arg(long, value_delimiter = ',')]
    phases: Vec<String>,
}

/// One phase of one run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) label: String,
    pub(crate) phase: String,
    pub(crate) threads: usize,
    pub(crate) size: usize,
    pub(crate) operations: u64,
    pub(crate) seconds: f64,
    pub(crate) p50_us: u64,
    pub(crate) p99_us: u64,
}

/// Latencies up to a minute, three digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds are constant and valid")
}

struct Phase {
    name: &'static str,
    /// Drop dentries, inodes and pages first.
    cold: bool,
    /// Operations that one call stands for, given the number of files: a listing counts each entry.
    entries_per_call: fn(usize) -> u64,
    /// Calls per thread, given the number of files.
    calls: fn(usize) -> usize,
    run: fn(&Path, usize, &Options) -> anyhow::Result<()>,
}

const PHASES: &[Phase] = &[
    Phase {
        name: "mkdir",
        cold: false,
        entries_per_call: |_| 1,
        calls: |files| files,
        run: |directory, n, _| Ok(fs::create_dir(directory.join(format!("d{n}")))?),
    },
    Phase {
        name: "create",
        cold: false,
        entries_per_call: |_| 1,
        calls: |files| files,
        run: create,
    },
    Phase {
        name: "stat",
        cold: true,
        entries_per_call: |_| 1,
        calls: |files| files,
        run: |directory, n, options| {
            let length = fs::symlink_metadata(directory.join(format!("f{n}")))?.len();
            ensure!(length == options.size as u64, "stat says {length} bytes");
            Ok(())
        },
    },
    Phase {
        name: "open+read",
        cold: true,
        entries_per_call: |_| 1,
        calls: |files| files,
        run: open_and_read,
    },
    Phase {
        name: "readdir",
        cold: true,
        // Directories of the mkdir phase are listed too.
        entries_per_call: |files| 2 * files as u64,
        calls: |_| 1,
        run: |directory, _, options| {
            let found = fs::read_dir(directory)?.count();
            ensure!(found == 2 * options.files, "readdir lists {found} entries");
            Ok(())
        },
    },
    Phase {
        name: "rename",
        cold: false,
        entries_per_call: |_| 1,
        calls: |files| files,
        run: |directory, n, _| {
            Ok(fs::rename(
                directory.join(format!("f{n}")),
                directory.join(format!("r{n}")),
            )?)
        },
    },
    Phase {
        name: "unlink",
        cold: false,
        entries_per_call: |_| 1,
        calls: |files| files,
        run: |directory, n, _| Ok(fs::remove_file(directory.join(format!("r{n}")))?),
    },
];

fn create(directory: &Path, n: usize, options: &Options) -> anyhow::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(directory.join(format!("f{n}")))?;
    if options.size > 0 {
        file.write_all(&content(n, options.size))?;
    }
    // What close itself reports is lost in std; open+read finds whatever was not stored.
    Ok(())
}

fn open_and_read(directory: &Path, n: usize, options: &Options) -> anyhow::Result<()> {
    let mut found = Vec::with_capacity(options.size);
    File::open(directory.join(format!("f{n}")))?.read_to_end(&mut found)?;
    ensure!(found == content(n, options.size), "file {n} reads wrong");
    Ok(())
}

/// Bytes that do not compress to nothing and differ from file to file.
fn content(n: usize, size: usize) -> Vec<u8> {
    let mut state = n as u64 ^ 0x9e37_79b9_7f4a_7c15;
    (0..size)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .collect()
}

/// Drops pages, dentries and inodes of the whole machine. Both systems that are compared pay the same.
fn drop_caches() -> anyhow::Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "3").context("dropping the kernel's caches needs root")
}

/// Runs every phase and prints a JSON line for each.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    for name in &options.phases {
        let known: Vec<_> = PHASES.iter().map(|phase| phase.name).collect();
        ensure!(
            known.contains(&name.as_str()),
            "no phase {name}; there are {}",
            known.join(", ")
        );
    }
    let top = tempfile::Builder::new()
        .prefix("load-")
        .tempdir_in(&options.directory)
        .context("making a directory to work in")?;
    let directories: Vec<_> = (0..options.threads)
        .map(|thread| top.path().join(format!("thread{thread}")))
        .collect();
    for directory in &directories {
        fs::create_dir(directory)?;
    }
    let wanted = |phase: &&Phase| {
        options.phases.is_empty() || options.phases.iter().any(|name| name == phase.name)
    };
    for phase in PHASES.iter().filter(wanted) {
        if phase.cold {
            drop_caches()?;
        }
        let measured = run_phase(phase, &directories, options)
            .with_context(|| format!("{} in {}", phase.name, options.directory.display()))?;
        println!("{}", serde_json::to_string(&measured)?);
    }
    top.close().context("removing what the run made")?;
    Ok(())
}

fn run_phase(
    phase: &Phase,
    directories: &[PathBuf],
    options: &Options,
) -> anyhow::Result<Measured> {
    let calls = (phase.calls)(options.files);
    let together = Barrier::new(directories.len() + 1);
    let (began, latencies) = std::thread::scope(|scope| {
        let workers: Vec<_> = directories
            .iter()
            .map(|directory| {
                let together = &together;
                scope.spawn(move || -> anyhow::Result<Histogram<u64>> {
                    let mut latencies = histogram();
                    together.wait();
                    for n in 0..calls {
                        let began = Instant::now();
                        (phase.run)(directory, n, options)?;
                        latencies.saturating_record((began.elapsed().as_micros() as u64).max(1));
                    }
                    Ok(latencies)
                })
            })
            .collect();
        together.wait();
        let began = Instant::now();
        let mut all = histogram();
        for worker in workers {
            let latencies = worker.join().expect("a worker returns its errors")?;
            all.add(latencies)
                .expect("all histograms have the same bounds");
        }
        anyhow::Ok((began.elapsed(), all))
    })?;
    Ok(Measured {
        label: options.label.clone(),
        phase: phase.name.to_owned(),
        threads: directories.len(),
        size: options.size,
        operations: (calls * directories.len()) as u64 * (phase.entries_per_call)(options.files),
        seconds: began.as_secs_f64(),
        p50_us: latencies.value_at_quantile(0.5),
        p99_us: latencies.value_at_quantile(0.99),
    })
}

//! `heliofs bench`: measures a mount as a program meets it: large files, small files, attributes.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use rand::RngCore;
use serde_json::json;

use crate::failure::{Failure, Outcome, While};
use crate::units::{self, show_size};
use crate::{output, progress};

/// Where, and how much.
#[derive(Args)]
pub(crate) struct Options {
    /// A directory, in a mount or elsewhere. A directory is made in it, and removed in the end.
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Bytes per read and write of the large files.
    #[arg(long, value_parser = units::parse_size, default_value = "1M", value_name = "SIZE")]
    block_size: u64,
    /// Size of each large file; one for each thread. 0: none.
    #[arg(long, value_parser = units::parse_size, default_value = "1G", value_name = "SIZE")]
    big_file_size: u64,
    /// Size of each small file.
    #[arg(long, value_parser = units::parse_size, default_value = "128K", value_name = "SIZE")]
    small_file_size: u64,
    /// Small files for each thread. 0: none.
    #[arg(long, default_value_t = 100, value_name = "N")]
    small_file_count: u32,
    /// Threads that work at once.
    #[arg(short = 'p', long, default_value_t = 1, value_name = "N")]
    threads: u32,
}

/// One row.
struct Measured {
    what: &'static str,
    operations: u64,
    bytes: u64,
    took: Duration,
    /// Of one operation by one thread, on average.
    each: Duration,
}

/// Removes what was made, also when the command fails.
struct Made(PathBuf);

impl Drop for Made {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "what the benchmark made is left");
        }
    }
}

pub(crate) fn run(options: &Options, json: bool) -> Outcome {
    let bounds = [
        (options.block_size, 1..=64 << 20, "block size"),
        (options.small_file_size, 0..=1 << 30, "small file size"),
        (options.threads.into(), 1..=256, "number of threads"),
    ];
    for (value, range, what) in bounds {
        if !range.contains(&value) {
            return Err(Failure::usage(format!(
                "a {what} of {value} is out of bounds"
            )));
        }
    }
    let directory = options
        .path
        .join(format!("heliofs-bench-{}", &units::random_hex()[..8]));
    fs::create_dir(&directory).while_(format_args!("create {}", directory.display()))?;
    let made = Made(directory);
    let measured = measure(options, &made.0, json)?;
    drop(made);
    show(&measured, json)
}

fn measure(options: &Options, directory: &Path, json: bool) -> Outcome<Vec<Measured>> {
    let mut measured = Vec::new();
    let large = |thread: u32, _: u32| directory.join(format!("large-{thread}"));
    let small = |thread: u32, n: u32| directory.join(format!("small-{thread}-{n}"));
    let bar = progress::bar("bench", 5, false, json);
    if options.big_file_size > 0 {
        let (size, block) = (options.big_file_size, options.block_size);
        let write = |path: &Path| write(path, size, block);
        measured.push(each("write a large file", options, 1, size, &large, write)?);
        bar.inc(1);
        let read = |path: &Path| read(path, size, block);
        measured.push(each("read a large file", options, 1, size, &large, read)?);
        bar.inc(1);
    }
    let count = options.small_file_count;
    if count > 0 {
        let (size, block) = (options.small_file_size, 128 << 10);
        let write = |path: &Path| write(path, size, block);
        measured.push(each(
            "write small files",
            options,
            count,
            size,
            &small,
            write,
        )?);
        bar.inc(1);
        let read = |path: &Path| read(path, size, block);
        measured.push(each(
            "read small files",
            options,
            count,
            size,
            &small,
            read,
        )?);
        bar.inc(1);
        let stat = |path: &Path| fs::metadata(path).map(drop);
        measured.push(each("stat files", options, count, 0, &small, stat)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(measured)
}

/// Lets every thread do the same to `count` files of its own.
fn each(
    what: &'static str,
    options: &Options,
    count: u32,
    bytes: u64,
    path: &(impl Fn(u32, u32) -> PathBuf + Sync),
    operation: impl Fn(&Path) -> std::io::Result<()> + Sync,
) -> Outcome<Measured> {
    let began = Instant::now();
    let outcome: Outcome<Vec<Duration>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..options.threads)
            .map(|thread| {
                let operation = &operation;
                scope.spawn(move || {
                    let began = Instant::now();
                    for n in 0..count {
                        let path = path(thread, n);
                        operation(&path).while_(format_args!("{what}: {}", path.display()))?;
                    }
                    Ok(began.elapsed())
                })
            })
            .collect();
        let joined = threads.into_iter().map(|thread| {
            thread
                .join()
                .map_err(|_| Failure::new("a thread of the benchmark panicked"))?
        });
        joined.collect()
    });
    let spent: Duration = outcome?.into_iter().sum();
    let operations = u64::from(count) * u64::from(options.threads);
    Ok(Measured {
        what,
        operations,
        bytes: bytes * operations,
        took: began.elapsed(),
        each: spent / u32::try_from(operations).unwrap_or(u32::MAX).max(1),
    })
}

/// Writes a file of bytes that don't compress, and waits until it is stored, as whoever must not lose it does.
fn write(path: &Path, size: u64, block: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; block.min(size) as usize];
    rand::rng().fill_bytes(&mut buffer);
    let mut file = File::create(path)?;
    let mut left = size;
    while left > 0 {
        let part = left.min(block) as usize;
        file.write_all(&buffer[..part])?;
        left -= part as u64;
    }
    file.sync_all()
}

/// Reads a whole file, past what the kernel still has of it.
fn read(path: &Path, size: u64, block: u64) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let mut buffer = vec![0; block.max(1) as usize];
    let mut total = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            length => total += length as u64,
        }
    }
    match total == size {
        true => Ok(()),
        false => Err(std::io::Error::other(format!(
            "{total} bytes instead of {size}"
        ))),
    }
}

fn show(measured: &[Measured], json: bool) -> Outcome {
    if json {
        let measured = measured.iter().map(|it| {
            json!({
                "what": it.what,
                "operations": it.operations,
                "bytes": it.bytes,
                "seconds": it.took.as_secs_f64(),
                "each_ms": it.each.as_secs_f64() * 1000.0,
            })
        });
        return output::print_json(&measured.collect::<Vec<_>>().into());
    }
    let mut table = output::table(["what", "files per second", "bytes per second", "each"]);
    for it in measured {
        let seconds = it.took.as_secs_f64().max(1e-9);
        let rate = match it.bytes {
            0 => String::new(),
            bytes => show_size((bytes as f64 / seconds) as u64),
        };
        table.add_row([
            it.what.to_owned(),
            format!("{:.1}", it.operations as f64 / seconds),
            rate,
            format!("{:.2} ms", it.each.as_secs_f64() * 1000.0),
        ]);
    }
    output::print_table(&table)?;
    output::line(
        "writes wait until the data is stored (fsync); reads pass the kernel's cache, not the mount's",
    )
}

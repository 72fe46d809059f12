//! Writers that remember what was acknowledged, so that it can be asked for later.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Empty, inline, packed and larger than a page of a segment.
const SIZES: [usize; 4] = [0, 900, 20_000, 150_000];

/// Runs until it is stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Thread>>,
    root: PathBuf,
}

#[derive(Default)]
struct Thread {
    files: BTreeMap<PathBuf, u64>,
    gone: Vec<PathBuf>,
    errors: Vec<String>,
    longest: Duration,
}

/// What must be there whatever happened.
#[derive(Default)]
pub struct Acknowledged {
    /// Path below the root, and the number that its content is made of.
    pub files: BTreeMap<PathBuf, u64>,
    /// Removed.
    pub gone: Vec<PathBuf>,
    /// Errors that the writers saw.
    pub errors: Vec<String>,
    /// Longest time that one file took.
    pub longest: Duration,
}

/// The content of file `number`.
pub fn content(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..SIZES[number as usize % SIZES.len()])
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .collect()
}

impl Load {
    /// `threads` writers, each in a directory of its own below `root`.
    pub fn start(root: &Path, threads: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let threads = (0..threads)
            .map(|thread| {
                let directory = PathBuf::from(format!("writer-{thread}"));
                fs::create_dir_all(root.join(&directory)).unwrap();
                let (root, stop, done) = (root.to_owned(), Arc::clone(&stop), Arc::clone(&done));
                std::thread::spawn(move || write(&root, &directory, thread, &stop, &done))
            })
            .collect();
        Self {
            stop,
            done,
            threads,
            root: root.to_owned(),
        }
    }

    /// Files acknowledged so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until `more` more files were acknowledged.
    pub fn wait_for_more(&self, more: u64, within: Duration) {
        let goal = self.done() + more;
        super::wait_for(&format!("writing {more} more files"), within, || {
            (self.done() >= goal).then_some(())
        });
    }

    pub fn stop(self) -> Acknowledged {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Acknowledged::default();
        for thread in self.threads {
            let thread = thread.join().expect("a writer panicked");
            all.files.extend(thread.files);
            all.gone.extend(thread.gone);
            all.errors.extend(thread.errors);
            all.longest = all.longest.max(thread.longest);
        }
        all
    }
}

/// Create, write, sync, close, rename; every seventh file is removed again. A file counts once all of it was acknowledged.
fn write(
    root: &Path,
    directory: &Path,
    thread: u64,
    stop: &AtomicBool,
    done: &AtomicU64,
) -> Thread {
    let mut result = Thread::default();
    for turn in 0.. {
        if stop.load(Ordering::Relaxed) {
            return result;
        }
        let number = thread << 32 | turn;
        let part = directory.join(format!("{turn}.part"));
        let path = directory.join(turn.to_string());
        let began = Instant::now();
        let attempt = || -> std::io::Result<()> {
            let mut file = File::create_new(root.join(&part))?;
            file.write_all(&content(number))?;
            file.sync_all()?;
            drop(file);
            fs::rename(root.join(&part), root.join(&path))
        };
        match attempt() {
            Ok(()) => {
                result.files.insert(path.clone(), number);
                done.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => result.errors.push(format!("{}: {error}", path.display())),
        }
        if turn % 7 == 6 && result.files.contains_key(&path) {
            match fs::remove_file(root.join(&path)) {
                Ok(()) => result.gone.push(path.clone()),
                Err(error) => result
                    .errors
                    .push(format!("remove {}: {error}", path.display())),
            }
            result.files.remove(&path);
        }
        result.longest = result.longest.max(began.elapsed());
    }
    unreachable!("the loop ends by returning")
}

impl Acknowledged {
    /// Reads everything back below `root`, which may be another mount.
    pub fn verify(&self, root: &Path) {
        for (path, number) in &self.files {
            let found = fs::read(root.join(path)).unwrap_or_else(|error| {
                panic!("{} was acknowledged and is lost: {error}", path.display())
            });
            let expected = content(*number);
            assert!(
                found == expected,
                "{} has other content than was acknowledged: {} bytes of {}, {} of them equal",
                path.display(),
                found.len(),
                expected.len(),
                found.iter().zip(&expected).filter(|(a, b)| a == b).count()
            );
        }
        for path in &self.gone {
            assert!(
                !root.join(path).exists(),
                "{} was removed and is back",
                path.display()
            );
        }
    }

    /// No error reached the writers.
    pub fn assert_no_errors(&self) {
        assert!(
            self.errors.is_empty(),
            "{} errors, first: {:?}",
            self.errors.len(),
            &self.errors[..self.errors.len().min(5)]
        );
    }
}

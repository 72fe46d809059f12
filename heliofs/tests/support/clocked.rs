//! A writer that notes when each change was acknowledged, and when refused: for who may write at which moment.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const EROFS: i32 = 30;

/// A writer that notes when each file was acknowledged.
pub struct Clocked {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Noted>,
}

/// What it noted.
#[derive(Default)]
pub struct Noted {
    pub acknowledged: Vec<(String, Instant)>,
    pub refused: Vec<Instant>,
    pub others: Vec<String>,
}

impl Clocked {
    pub fn start(root: &Path, name: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let root = root.to_owned();
        let thread = std::thread::spawn(move || {
            let mut noted = Noted::default();
            for turn in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let file = format!("{name}-{turn}");
                let write = || -> std::io::Result<()> {
                    let mut out = File::create_new(root.join(&file))?;
                    out.write_all(file.as_bytes())?;
                    out.sync_all()
                };
                match write() {
                    Ok(()) => noted.acknowledged.push((file, Instant::now())),
                    Err(error) if error.raw_os_error() == Some(EROFS) => {
                        noted.refused.push(Instant::now());
                        // Others need the processors, too.
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    Err(error) => noted.others.push(format!("{file}: {error}")),
                }
            }
            noted
        });
        Self { stop, thread }
    }

    pub fn stop(self) -> Noted {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

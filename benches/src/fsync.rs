//! One synced append: what a durable metadata operation costs at least.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;

const APPENDS: usize = 500;
const APPEND_BYTES: usize = 4096;

/// Prints one JSON line with the median and the 99th percentile, in microseconds.
pub(crate) fn print(directory: &Path) -> anyhow::Result<()> {
    let path = directory.join("fsync-probe");
    let mut file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    let block = [0x5a_u8; APPEND_BYTES];
    let mut micros = Vec::with_capacity(APPENDS);
    for _ in 0..APPENDS {
        let began = Instant::now();
        file.write_all(&block)?;
        file.sync_data()?;
        micros.push(began.elapsed().as_micros());
    }
    std::fs::remove_file(&path)?;
    micros.sort_unstable();
    println!(
        "{}",
        serde_json::json!({
            "fsync_p50_us": micros[APPENDS / 2] as u64,
            "fsync_p99_us": micros[APPENDS * 99 / 100] as u64,
        })
    );
    Ok(())
}

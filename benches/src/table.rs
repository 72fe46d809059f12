//! Two systems side by side: for each phase, thread count and size the median run of each, and the ratio of the medians.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};

use crate::load::Measured;

/// Which results to compare.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// JSON lines of the system under test.
    ours: PathBuf,
    /// JSON lines of the peer.
    peer: PathBuf,
    /// JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Groups and orders the rows: threads, size, and the phase's place in a run.
type Key = (usize, usize, usize);

struct Row {
    phase: String,
    runs: Vec<Measured>,
}

impl Row {
    fn rate(&self) -> f64 {
        median(
            self.runs
                .iter()
                .map(|run| run.operations as f64 / run.seconds),
        )
    }

    fn p50(&self) -> f64 {
        median(self.runs.iter().map(|run| run.p50_us as f64))
    }

    fn p99(&self) -> f64 {
        median(self.runs.iter().map(|run| run.p99_us as f64))
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn read(path: &Path) -> anyhow::Result<BTreeMap<Key, Row>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let mut places: Vec<String> = Vec::new();
    let mut rows: BTreeMap<Key, Row> = BTreeMap::new();
    for line in text.lines() {
        let run: Measured = serde_json::from_str(line).context("a line is not a measurement")?;
        let place = places
            .iter()
            .position(|phase| *phase == run.phase)
            .unwrap_or_else(|| {
                places.push(run.phase.clone());
                places.len() - 1
            });
        rows.entry((run.threads, run.size, place))
            .or_insert_with(|| Row {
                phase: run.phase.clone(),
                runs: Vec::new(),
            })
            .runs
            .push(run);
    }
    Ok(rows)
}

fn size_name(bytes: usize) -> String {
    match bytes {
        0 => "empty".to_owned(),
        _ => format!("{} KiB", bytes / 1024),
    }
}

/// Prints the comparison.
pub(crate) fn print(options: &Options) -> anyhow::Result<()> {
    let ours = read(&options.ours)?;
    let peer = read(&options.peer)?;
    if options.json {
        for (key, row) in &ours {
            let Some(other) = peer.get(key) else { continue };
            println!(
                "{}",
                serde_json::json!({
                    "threads": key.0, "size": key.1, "phase": row.phase,
                    "ours_per_s": row.rate(), "peer_per_s": other.rate(), "ratio": row.rate() / other.rate(),
                    "ours_p50_us": row.p50(), "ours_p99_us": row.p99(),
                    "peer_p50_us": other.p50(), "peer_p99_us": other.p99(),
                })
            );
        }
        return Ok(());
    }
    let name = |rows: &BTreeMap<Key, Row>| {
        rows.values()
            .next()
            .map_or_else(String::new, |row| row.runs[0].label.clone())
    };
    let (our_name, peer_name) = (name(&ours), name(&peer));
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "threads".to_owned(),
        "files".to_owned(),
        "operation".to_owned(),
        format!("{our_name} /s"),
        format!("{peer_name} /s"),
        "ratio".to_owned(),
        format!("{our_name} p50 / p99 ms"),
        format!("{peer_name} p50 / p99 ms"),
    ]);
    for (key, row) in &ours {
        let Some(other) = peer.get(key) else { continue };
        table.add_row([
            key.0.to_string(),
            size_name(key.1),
            row.phase.clone(),
            format!("{:.0}", row.rate()),
            format!("{:.0}", other.rate()),
            format!("{:.2}", row.rate() / other.rate()),
            format!("{:.2} / {:.2}", row.p50() / 1000.0, row.p99() / 1000.0),
            format!("{:.2} / {:.2}", other.p50() / 1000.0, other.p99() / 1000.0),
        ]);
    }
    for column in table.column_iter_mut() {
        if column.index != 1 && column.index != 2 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    println!("{table}");
    Ok(())
}

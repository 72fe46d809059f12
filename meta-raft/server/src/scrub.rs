//! Every node reads all of its records again, slowly, and compares them with the digests: what rotted at rest is found before a
//! reader meets it.

use std::time::{Duration, Instant};

use heliofs_proto::ids::VolumeId;
use tokio_util::sync::CancellationToken;

use crate::damage::Damage;
use crate::store::State;

/// Records a second at most: a million inodes, of some four records each, in less than two minutes.
const RATE: f64 = 50_000.0;

/// Until cancelled. `every`: from the begin of one pass over all volumes to the begin of the next; zero: never.
pub async fn run(state: State, damage: Damage, every: Duration, cancel: CancellationToken) {
    if every.is_zero() {
        return;
    }
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // What was just opened, or is being loaded, need not be read at once.
    ticks.tick().await;
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }
        for volume in state.volumes() {
            let (state, damage, cancel) = (state.clone(), damage.clone(), cancel.clone());
            let volume = VolumeId(volume.id);
            let pass = tokio::task::spawn_blocking(move || pass(&state, &damage, volume, &cancel));
            if let Err(error) = pass.await {
                tracing::error!(%volume, %error, "a scrub failed");
            }
        }
    }
}

fn pass(state: &State, damage: &Damage, volume: VolumeId, cancel: &CancellationToken) {
    let began = Instant::now();
    let mut read = 0;
    let scrubbed = state.scrub(volume, |records| {
        read += records;
        let due = Duration::from_secs_f64(read as f64 / RATE);
        std::thread::sleep(due.saturating_sub(began.elapsed()));
        !cancel.is_cancelled()
    });
    match scrubbed {
        Ok(None) => {}
        Ok(Some(scrubbed)) if scrubbed.differing.is_empty() => {
            let (records, took) = (scrubbed.records, began.elapsed());
            tracing::info!(%volume, records, ?took, "all records are what was applied");
        }
        Ok(Some(scrubbed)) => {
            tracing::error!(
                %volume, position = %scrubbed.position, sums = ?scrubbed.differing,
                "records of this node are not what was applied: replace it, or load the mirror anew"
            );
            state.note_rot(volume, &scrubbed);
        }
        Err(corruption) => damage.report("all records, to compare them", &corruption),
    }
}

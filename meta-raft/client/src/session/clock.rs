//! The task that watches the clock for a session: pings, deadlines of operations, a lost lease, a silent leader.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::driver::{Shared, wake};

/// How often it looks. One timer for all operations instead of one per operation; deadlines are this much late at most.
const TICK: Duration = Duration::from_millis(50);

/// Runs until the session ends or its last handle is gone.
pub(super) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
            () = shared.ended.cancelled() => return,
        }
        look(&shared, Instant::now());
    }
}

fn look(shared: &Shared, now: Instant) {
    shared.check_lease(now);
    let mut state = shared.state.lock();
    let lease = Duration::from_millis(state.welcome.lease_ms.max(1));
    // Half a lease more than the lease: by then other mounts may rely on this one's caches being dropped, and a leader that
    // is merely busy has had time for one more round.
    let silent = state.silent(lease * 3 / 2, now);
    let completions = state.expire(shared.options.op_deadline, now);
    if state.ping_if_due(lease / 3, now) {
        wake(state);
    } else {
        drop(state);
    }
    for (caller, outcome) in completions {
        // A caller that has gone away doesn't mind.
        let _: Result<(), _> = caller.send(outcome);
    }
    if silent {
        shared.leader_silent.notify_one();
    }
}

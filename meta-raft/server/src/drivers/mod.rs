//! Tasks that run while this node leads. They propose commands and never edit anything themselves.
//!
//! - [`reign`]: makes the soft state when a term begins, runs the drivers, drops all when it ends
//! - [`reap`]: removes orphans that nobody has open; [`work`]: goes on with erasures and tree removals
//! - [`slots`]: gives up what is kept for mirrors that are too far behind
//! - `copies`: finds what a region's own bucket lacks
//! - [`pins`]: moves forward what is shown of a region's own bucket
//! - [`trash`]: removes hours of the trash that are over
//! - [`expiry`]: ends sessions that are silent; [`beats`]: says how far a volume is, and its digest
//!
//! Drivers share the log with clients. Each has little under way at once and rests as long as it worked, so that they never
//! take more than half of what the log can do.

pub mod beats;
mod copies;
pub mod expiry;
pub mod pins;
pub mod reap;
pub mod reign;
pub mod slots;
pub mod trash;
pub mod work;

use std::time::{Duration, Instant};

/// Longest rest of a driver between two steps.
const REST_MAX: Duration = Duration::from_millis(100);

/// How long a driver waits after its steps failed: the lead is about to change, or a command is refused that should not be.
const FAILED_REST: Duration = Duration::from_secs(1);

/// How a driver's step went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// Nothing was to be done.
    Idle,
    /// Something was done; there may be more.
    More,
    /// Something could not be done now.
    Failed,
}

/// Rests as long as the step took.
pub(crate) async fn rest(step: Step, began: Instant) {
    match step {
        Step::Idle => {}
        Step::More => tokio::time::sleep(began.elapsed().min(REST_MAX)).await,
        Step::Failed => tokio::time::sleep(FAILED_REST).await,
    }
}

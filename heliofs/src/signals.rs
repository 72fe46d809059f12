//! SIGTERM and SIGINT end a service in order.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::{Outcome, While};

/// Both signals, caught from the moment of its making.
pub(crate) struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    /// From here on the signals no longer kill the process.
    pub(crate) fn catch() -> Outcome<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).while_("catch SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).while_("catch SIGINT")?,
        })
    }

    /// Waits for one of them; its name.
    pub(crate) async fn wait(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

//! The outgoing half of a stream: frames are built when the connection asks for them, from everything queued at that
//! moment. So requests gather while the connection is busy, and travel at once when it is not.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures::Stream;
use futures::task::AtomicWaker;
use heliofs_proto::v1;

use super::driver::Shared;

/// The outgoing frames of one attempt to attach: its hello, then, once the attempt was accepted, what is queued. It ends
/// when another attempt is accepted, when the session leaves (after the farewell) or is over.
pub(super) struct Outgoing {
    shared: Arc<Shared>,
    line: u64,
    accepted: Arc<AtomicWaker>,
    hello: Option<v1::Hello>,
    said_bye: bool,
}

impl Outgoing {
    /// `line` numbers attempts, ascending. `accepted` is woken when this one was.
    pub(super) fn new(
        shared: Arc<Shared>,
        line: u64,
        accepted: Arc<AtomicWaker>,
        hello: v1::Hello,
    ) -> Self {
        Self {
            shared,
            line,
            accepted,
            hello: Some(hello),
            said_bye: false,
        }
    }
}

impl Stream for Outgoing {
    type Item = v1::ClientFrame;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<v1::ClientFrame>> {
        let this = self.get_mut();
        if let Some(hello) = this.hello.take() {
            return Poll::Ready(Some(v1::ClientFrame {
                hello: Some(hello),
                ..Default::default()
            }));
        }
        if this.said_bye {
            return Poll::Ready(None);
        }
        // Before the look at the state, so that an acceptance in between is not missed.
        this.accepted.register(context.waker());
        let mut state = this.shared.state.lock();
        match state.line() {
            Some(line) if line == this.line => {}
            // Another attempt won, or this one broke.
            _ if state.last_line() >= this.line || state.gone().is_some() => {
                return Poll::Ready(None);
            }
            _ => return Poll::Pending,
        }
        if let Some(frame) = state.frame(Instant::now()) {
            return Poll::Ready(Some(frame));
        }
        if state.bye_due() {
            this.said_bye = true;
            return Poll::Ready(Some(v1::ClientFrame {
                bye: true,
                ..Default::default()
            }));
        }
        state.sleep(context.waker());
        Poll::Pending
    }
}

//! A stream's outgoing queue: what was put first leaves first, many messages per frame.
//!
//! A frame's invalidations come before its responses and its recalls behind them, so an invalidation behind a response starts a
//! new frame, and so does a response behind a recall.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use heliofs_proto::ids::Position;
use heliofs_proto::v1;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio_stream::Stream;
use tonic::Status;

/// A frame is closed when it holds this many bytes: far below the largest gRPC message, above which batching gains nothing.
const FRAME_BYTES_TARGET: usize = 256 << 10;

/// Messages taken from the queue at once.
const DRAIN_MAX: usize = 256;

/// Invalidations held back for a stream that is shown an old position.
const HELD_MAX: usize = 100_000;

/// Above this many waiting invalidations a stream counts as crowded.
const CROWDED: usize = 16 * 1024;

/// Above this many bytes (about) of waiting responses nothing more is asked for by reading frames.
const ROOM_BYTES: usize = 8 << 20;

/// One thing to send.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "most are responses, and a box each would cost more than the room"
)]
pub enum Outgoing {
    /// The first frame.
    Welcome(Box<v1::Welcome>),
    /// An answer.
    Response(v1::Response),
    /// Something that the client must not trust any more.
    Invalidation(v1::Invalidation),
    /// This write lease is to be returned.
    Recall(v1::WriteLease),
    /// The lease is renewed.
    Pong(u64),
    /// Last: the client finds its leader elsewhere (`host:port`, or empty).
    Moved(String),
    /// Last: the session is over.
    SessionEnded,
    /// Last: ends the stream without a word (the client said bye).
    Close,
}

/// The sending side; clones share the queue.
#[derive(Clone, Debug)]
pub struct Outbox {
    sender: mpsc::UnboundedSender<Outgoing>,
    waiting: Arc<Waiting>,
    /// Of a stream that is shown a pinned position.
    held: Option<Arc<Mutex<Held>>>,
}

/// Invalidations of what a stream is not shown yet.
#[derive(Debug)]
struct Held {
    /// What it is shown.
    shown: Position,
    later: VecDeque<v1::Invalidation>,
}

/// How much waits in the queue.
#[derive(Debug, Default)]
struct Waiting {
    invalidations: AtomicUsize,
    response_bytes: AtomicUsize,
    room: Notify,
}

/// The frames that leave.
#[derive(Debug)]
pub struct Frames {
    receiver: mpsc::UnboundedReceiver<Outgoing>,
    count: Arc<Waiting>,
    waiting: VecDeque<Outgoing>,
    drained: Vec<Outgoing>,
    over: bool,
}

/// An empty queue. Its bounds are kept by those who fill it: see [`Outbox::is_crowded`] and [`Outbox::room`].
pub fn outbox() -> (Outbox, Frames) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let waiting = Arc::new(Waiting::default());
    let frames = Frames {
        receiver,
        count: Arc::clone(&waiting),
        waiting: VecDeque::new(),
        drained: Vec::new(),
        over: false,
    };
    let outbox = Outbox {
        sender,
        waiting,
        held: None,
    };
    (outbox, frames)
}

impl Outbox {
    /// Of a stream that is shown a pinned position, at first `shown`: what changed later is told when it is shown.
    #[must_use]
    pub fn pinned(self, shown: Position) -> Self {
        let held = Held {
            shown,
            later: VecDeque::new(),
        };
        Self {
            held: Some(Arc::new(Mutex::new(held))),
            ..self
        }
    }

    /// The stream is shown a pinned position.
    pub fn is_pinned(&self) -> bool {
        self.held.is_some()
    }

    /// From here on the stream is shown a later position.
    pub fn show(&self, position: Position) {
        let Some(held) = &self.held else { return };
        let mut held = held.lock();
        held.shown = position;
        let mut later = std::mem::take(&mut held.later);
        later.retain(|message| {
            let due = message.position.map(Position::from).unwrap_or_default() <= position;
            if due {
                self.send_now(Outgoing::Invalidation(message.clone()));
            }
            !due
        });
        held.later = later;
    }

    /// Appends. A stream that is gone needs nothing any more, so there is no error.
    pub fn send(&self, outgoing: Outgoing) {
        if let (Some(held), Outgoing::Invalidation(message)) = (&self.held, &outgoing) {
            let mut held = held.lock();
            if message.position.map(Position::from).unwrap_or_default() > held.shown {
                if held.later.len() >= HELD_MAX {
                    // It begins anew, with nothing told.
                    self.send_now(Outgoing::Moved(String::new()));
                    held.later.clear();
                }
                held.later.push_back(message.clone());
                return;
            }
        }
        self.send_now(outgoing);
    }

    fn send_now(&self, outgoing: Outgoing) {
        match &outgoing {
            Outgoing::Invalidation(_) => {
                self.waiting.invalidations.fetch_add(1, Ordering::Relaxed);
            }
            Outgoing::Response(response) => {
                self.waiting
                    .response_bytes
                    .fetch_add(weight(response), Ordering::Relaxed);
            }
            _ => {}
        }
        // With the receiver gone the counts are of no use to anybody.
        self.sender.send(outgoing).ok();
    }

    /// The client does not keep up with its invalidations.
    pub fn is_crowded(&self) -> bool {
        self.waiting.invalidations.load(Ordering::Relaxed) > CROWDED
    }

    /// The client keeps up with its responses.
    pub fn has_room(&self) -> bool {
        self.waiting.response_bytes.load(Ordering::Relaxed) < ROOM_BYTES
    }

    /// Waits until the client has caught up with its responses.
    pub async fn room(&self) {
        loop {
            let notified = self.waiting.room.notified();
            if self.has_room() {
                return;
            }
            notified.await;
        }
    }

    /// The stream ended.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Waits until the stream ended.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }
}

impl Frames {
    /// The next frame from what waits; `None` when nothing waits.
    fn frame(&mut self) -> Option<v1::ServerFrame> {
        let mut frame = v1::ServerFrame::default();
        let mut bytes = 0;
        let mut any = false;
        while let Some(next) = self.waiting.front() {
            let alone = matches!(
                next,
                Outgoing::Welcome(_)
                    | Outgoing::Moved(_)
                    | Outgoing::SessionEnded
                    | Outgoing::Close
            );
            let behind_response =
                matches!(next, Outgoing::Invalidation(_)) && !frame.responses.is_empty();
            let behind_recall = matches!(next, Outgoing::Response(_) | Outgoing::Invalidation(_))
                && !frame.recalls.is_empty();
            let second_pong = matches!(next, Outgoing::Pong(_)) && frame.pong != 0;
            if any
                && (alone
                    || behind_response
                    || behind_recall
                    || second_pong
                    || bytes >= FRAME_BYTES_TARGET)
            {
                break;
            }
            any = true;
            let Some(next) = self.waiting.pop_front() else {
                break;
            };
            match next {
                Outgoing::Welcome(welcome) => frame.welcome = Some(*welcome),
                Outgoing::Response(response) => {
                    let weight = weight(&response);
                    self.count
                        .response_bytes
                        .fetch_sub(weight, Ordering::Relaxed);
                    bytes += weight;
                    frame.responses.push(response);
                }
                Outgoing::Invalidation(invalidation) => {
                    self.count.invalidations.fetch_sub(1, Ordering::Relaxed);
                    bytes += INVALIDATION_WEIGHT;
                    frame.invalidations.push(invalidation);
                }
                Outgoing::Recall(lease) => frame.recalls.push(lease),
                Outgoing::Pong(ping) => frame.pong = ping,
                Outgoing::Moved(address) => frame.moved = Some(address),
                Outgoing::SessionEnded => frame.session_ended = true,
                Outgoing::Close => {}
            }
            if alone {
                self.over = frame.welcome.is_none();
                break;
            }
        }
        if self.count.response_bytes.load(Ordering::Relaxed) < ROOM_BYTES {
            self.count.room.notify_one();
        }
        any.then_some(frame)
    }
}

const INVALIDATION_WEIGHT: usize = 64;

/// About how many bytes a response takes; cheaper than encoding it.
fn weight(response: &v1::Response) -> usize {
    use v1::response::Body;
    let body = match &response.body {
        Some(Body::DirPage(page)) => page.entries.len() * 160,
        Some(Body::Extents(page)) => extents_weight(page),
        Some(Body::Opened(opened)) => opened.extents.as_ref().map_or(0, extents_weight),
        Some(Body::Bytes(bytes)) => bytes.len(),
        Some(Body::Names(names)) => names.names.iter().map(|name| name.len() + 8).sum(),
        Some(Body::Walk(walk)) => walk.attrs.len() * 96,
        Some(Body::Maintained(maintained)) => maintained_weight(maintained),
        Some(Body::Deletions(deletions)) => deletions.segments.len() * 8,
        Some(Body::Copies(copies)) => copies.tasks.len() * 32,
        Some(
            Body::Reply(_) | Body::Attr(_) | Body::StatFs(_) | Body::Lock(_) | Body::Summary(_),
        )
        | None => 0,
    };
    body + 128
}

fn extents_weight(page: &v1::ExtentPage) -> usize {
    page.extents
        .iter()
        .map(|extent| 40 + extent.inline_bytes.len())
        .sum()
}

fn maintained_weight(maintained: &v1::Maintained) -> usize {
    use v1::maintained::Answer;
    match &maintained.answer {
        Some(Answer::Segments(page)) => page.segments.len() * 32,
        Some(Answer::States(states)) => states.states.len(),
        Some(Answer::Extents(page)) => page.extents.len() * 40,
        Some(Answer::Sparse(sparse)) => sparse.segments.len() * 32,
        Some(Answer::Records(checked)) => checked.problems.iter().map(|it| it.len() + 8).sum(),
        Some(Answer::Quotas(page)) => page.quotas.len() * 48,
        None => 0,
    }
}

impl Stream for Frames {
    type Item = Result<v1::ServerFrame, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        if this.waiting.len() < DRAIN_MAX {
            let room = DRAIN_MAX - this.waiting.len();
            let drained = this.receiver.poll_recv_many(cx, &mut this.drained, room);
            this.waiting.extend(this.drained.drain(..));
            if this.waiting.is_empty() {
                ready!(drained);
                // Nothing came and nothing will: the session's task dropped the queue.
                return Poll::Ready(None);
            }
        }
        let frame = this.frame();
        if this.over {
            // Nothing may be promised behind the last word.
            this.receiver.close();
            if frame
                .as_ref()
                .is_some_and(|frame| *frame == v1::ServerFrame::default())
            {
                return Poll::Ready(None);
            }
        }
        Poll::Ready(frame.map(Ok))
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;

    use super::*;

    fn response(id: u64) -> Outgoing {
        Outgoing::Response(v1::Response {
            id,
            ..Default::default()
        })
    }

    fn invalidation(ino: u64) -> Outgoing {
        Outgoing::Invalidation(v1::Invalidation {
            ino,
            ..Default::default()
        })
    }

    #[tokio::test]
    async fn what_waits_leaves_in_one_frame_and_order_is_kept() {
        let (outbox, mut frames) = outbox();
        for outgoing in [
            invalidation(1),
            response(1),
            response(2),
            Outgoing::Pong(9),
            invalidation(2),
            response(3),
        ] {
            outbox.send(outgoing);
        }
        let frame = frames.next().await.unwrap().unwrap();
        assert_eq!(frame.invalidations.len(), 1);
        assert_eq!(
            frame
                .responses
                .iter()
                .map(|response| response.id)
                .collect::<Vec<_>>(),
            [1, 2]
        );
        assert_eq!(frame.pong, 9);
        let frame = frames.next().await.unwrap().unwrap();
        assert_eq!((frame.invalidations[0].ino, frame.responses[0].id), (2, 3));
        assert!(!outbox.is_crowded());
    }

    #[tokio::test]
    async fn a_recall_comes_behind_what_was_answered_before_it() {
        let (outbox, mut frames) = outbox();
        let lease = v1::WriteLease { ino: 7, grant: 1 };
        for outgoing in [response(1), Outgoing::Recall(lease), response(2)] {
            outbox.send(outgoing);
        }
        let frame = frames.next().await.unwrap().unwrap();
        assert_eq!((frame.responses[0].id, frame.recalls), (1, vec![lease]));
        let frame = frames.next().await.unwrap().unwrap();
        assert_eq!((frame.responses[0].id, frame.recalls), (2, vec![]));
    }

    #[tokio::test]
    async fn the_last_word_ends_the_stream() {
        let (outbox, mut frames) = outbox();
        outbox.send(response(1));
        outbox.send(Outgoing::Moved("there:1".into()));
        outbox.send(response(2));
        assert_eq!(frames.next().await.unwrap().unwrap().responses.len(), 1);
        let last = frames.next().await.unwrap().unwrap();
        assert_eq!(
            (last.moved.as_deref(), last.responses.len()),
            (Some("there:1"), 0)
        );
        assert!(frames.next().await.is_none());
        assert!(outbox.is_closed());
    }

    #[tokio::test]
    async fn a_large_answer_does_not_make_a_frame_of_all_that_waits() {
        let (outbox, mut frames) = self::outbox();
        for id in 0..4 {
            outbox.send(Outgoing::Response(v1::Response {
                id,
                body: Some(v1::response::Body::Bytes(
                    vec![0; FRAME_BYTES_TARGET].into(),
                )),
                ..Default::default()
            }));
        }
        drop(outbox);
        let mut number = 0;
        while let Some(frame) = frames.next().await {
            assert_eq!(frame.unwrap().responses.len(), 1);
            number += 1;
        }
        assert_eq!(number, 4);
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_becomes_crowded() {
        let (outbox, mut frames) = outbox();
        for ino in 0..=CROWDED as u64 {
            outbox.send(invalidation(ino));
        }
        assert!(outbox.is_crowded());
        frames.next().await.unwrap().unwrap();
        assert!(!outbox.is_crowded());
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_its_answers_is_asked_for_no_more() {
        let (outbox, mut frames) = outbox();
        let large = v1::response::Body::Bytes(vec![0; ROOM_BYTES / 2].into());
        for id in 0..2 {
            assert!(outbox.has_room());
            let body = Some(large.clone());
            outbox.send(Outgoing::Response(v1::Response {
                id,
                body,
                ..Default::default()
            }));
        }
        assert!(!outbox.has_room());
        let room = tokio::spawn({
            let outbox = outbox.clone();
            async move { outbox.room().await }
        });
        frames.next().await.unwrap().unwrap();
        room.await.unwrap();
    }
}

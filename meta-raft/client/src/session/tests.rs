//! A session against a scripted server that loses answers, redirects, falls silent.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::Stream;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, Position};
use heliofs_proto::limits::IN_FLIGHT_MAX;
use heliofs_proto::v1;
use heliofs_proto::v1::request::Body;
use heliofs_proto::v1::response::Body as Answer;
use heliofs_proto::v1::sessions_server::{Sessions, SessionsServer};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use super::{Event, Recalled, Session, SessionOptions, Watcher};
use crate::cluster::{Cluster, ClusterOptions};
use crate::error::{AttachError, ClientError, ClusterError};
use crate::token::Token;

const TOKEN: &str = "0123456789abcdef";
const SESSION: u64 = 7 << 32 | 1;

type ServerFrames = Pin<Box<dyn Stream<Item = Result<v1::ServerFrame, Status>> + Send>>;

/// One accepted stream, in the hands of the test.
struct Line {
    hello: v1::Hello,
    frames: Streaming<v1::ClientFrame>,
    out: mpsc::UnboundedSender<Result<v1::ServerFrame, Status>>,
}

impl Line {
    fn send(&self, frame: v1::ServerFrame) {
        self.out.send(Ok(frame)).unwrap();
    }

    fn respond(&self, responses: Vec<v1::Response>) {
        self.send(v1::ServerFrame {
            responses,
            ..Default::default()
        });
    }

    /// The next frame; pings are answered on the way.
    async fn frame(&mut self) -> Option<v1::ClientFrame> {
        let frame = self.frames.message().await.ok().flatten()?;
        if frame.ping != 0 {
            self.send(v1::ServerFrame {
                pong: frame.ping,
                ..Default::default()
            });
        }
        Some(frame)
    }

    /// The next `count` requests, however they are spread over frames.
    async fn requests(&mut self, count: usize) -> Vec<v1::Request> {
        let mut requests = Vec::new();
        while requests.len() < count {
            let frame = tokio::time::timeout(Duration::from_secs(5), self.frame());
            let frame = frame.await.expect("requests came in time").unwrap();
            requests.extend(frame.requests);
        }
        requests
    }
}

/// A node whose every accepted stream is handed to the test.
struct Fake {
    address: String,
    lines: mpsc::UnboundedReceiver<Line>,
    refuse: Arc<Mutex<Option<Status>>>,
    attempts: Arc<AtomicU64>,
}

struct Service {
    lines: mpsc::UnboundedSender<Line>,
    refuse: Arc<Mutex<Option<Status>>>,
    attempts: Arc<AtomicU64>,
}

#[tonic::async_trait]
impl Sessions for Service {
    type AttachStream = ServerFrames;

    async fn attach(
        &self,
        request: Request<Streaming<v1::ClientFrame>>,
    ) -> Result<Response<ServerFrames>, Status> {
        self.attempts.fetch_add(1, Ordering::SeqCst);
        if let Some(status) = self.refuse.lock().clone() {
            return Err(status);
        }
        let bearer = request.metadata().get("authorization").unwrap();
        assert_eq!(bearer, &format!("Bearer {TOKEN}"));
        let mut frames = request.into_inner();
        let hello = frames.message().await?.unwrap().hello.unwrap();
        let (out, receiver) = mpsc::unbounded_channel();
        let welcome = v1::Welcome {
            session: SESSION,
            volume_id: 3,
            lease_ms: 300,
            ..Default::default()
        };
        let line = Line { hello, frames, out };
        line.send(v1::ServerFrame {
            welcome: Some(welcome),
            ..Default::default()
        });
        self.lines.send(line).ok();
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(
            receiver,
        ))))
    }
}

async fn fake() -> Fake {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sender, lines) = mpsc::unbounded_channel();
    let refuse = Arc::new(Mutex::new(None));
    let attempts = Arc::new(AtomicU64::new(0));
    let service = SessionsServer::new(Service {
        lines: sender,
        refuse: refuse.clone(),
        attempts: attempts.clone(),
    });
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    Fake {
        address,
        lines,
        refuse,
        attempts,
    }
}

impl Fake {
    async fn line(&mut self) -> Line {
        let line = tokio::time::timeout(Duration::from_secs(5), self.lines.recv());
        line.await.expect("a stream was attached in time").unwrap()
    }
}

fn cluster(fakes: &[&Fake]) -> Cluster {
    let peers = fakes.iter().map(|fake| fake.address.clone()).collect();
    let options = ClusterOptions {
        deadline: Duration::from_secs(2),
        unreachable_after: Duration::from_millis(300),
        attempt_timeout: Duration::from_secs(1),
        connect_timeout: Duration::from_millis(500),
    };
    Cluster::new(peers, Token::new(TOKEN).unwrap(), options)
}

fn options() -> SessionOptions {
    SessionOptions {
        volume: "photos".into(),
        op_deadline: Duration::from_secs(10),
        ..Default::default()
    }
}

async fn attach(fakes: &[&Fake], options: SessionOptions) -> Session {
    Session::attach(cluster(fakes), options).await.unwrap()
}

fn create(name: &str) -> v1::command::Op {
    v1::command::Op::Create(v1::Create {
        parent: 1,
        name: Bytes::copy_from_slice(name.as_bytes()),
        ..Default::default()
    })
}

fn command(request: &v1::Request) -> &v1::Command {
    match &request.body {
        Some(Body::Command(command)) => command,
        other => panic!("not a mutation: {other:?}"),
    }
}

/// Answers a mutation with its own sequence as the value.
fn reply(request: &v1::Request) -> v1::Response {
    v1::Response {
        id: request.id,
        body: Some(Answer::Reply(v1::Reply {
            value: command(request).sequence,
            ..Default::default()
        })),
        ..Default::default()
    }
}

fn spawn_creates(
    session: &Session,
    count: usize,
) -> Vec<tokio::task::JoinHandle<Result<v1::Reply, ClientError>>> {
    let create = |index: usize| {
        let session = session.clone();
        async move {
            let op = create(&index.to_string());
            session.mutate(v1::Caller::default(), op).await
        }
    };
    (0..count)
        .map(|index| tokio::spawn(create(index)))
        .collect()
}

#[tokio::test]
async fn mutations_without_an_answer_are_resent_under_their_sequences_in_order() {
    let mut fake = fake().await;
    let session = attach(&[&fake], options()).await;
    let mut line = fake.line().await;
    assert_eq!(line.hello.session, 0);
    let calls = spawn_creates(&session, 20);
    let first = line.requests(20).await;
    let named: BTreeMap<u64, v1::Command> = first
        .iter()
        .map(|request| (command(request).sequence, command(request).clone()))
        .collect();
    assert_eq!(
        named.keys().copied().collect::<Vec<_>>(),
        (1..=20).collect::<Vec<_>>()
    );
    // Two were answered, the rest of the answers is lost with the stream.
    let answered = [reply(&first[3]), reply(&first[7])];
    let answered_sequences = [command(&first[3]).sequence, command(&first[7]).sequence];
    line.respond(answered.to_vec());
    tokio::task::yield_now().await;
    drop(line);

    let mut line = fake.line().await;
    assert_eq!(line.hello.session, SESSION, "the same session is resumed");
    let again = line.requests(18).await;
    let sequences: Vec<u64> = again.iter().map(|r| command(r).sequence).collect();
    assert!(sequences.is_sorted(), "in order: {sequences:?}");
    for request in &again {
        let command = command(request);
        assert!(!answered_sequences.contains(&command.sequence));
        assert_eq!(command.op, named[&command.sequence].op);
        assert!(command.acknowledged_below <= sequences[0]);
    }
    line.respond(again.iter().map(reply).collect());
    let mut values = Vec::new();
    for call in calls {
        values.push(call.await.unwrap().unwrap().value);
    }
    values.sort_unstable();
    assert_eq!(values, (1..=20).collect::<Vec<_>>(), "each got one reply");

    let next = spawn_creates(&session, 1);
    let request = line.requests(1).await.remove(0);
    assert_eq!(command(&request).sequence, 21);
    assert_eq!(command(&request).acknowledged_below, 21);
    line.respond(vec![reply(&request)]);
    for call in next {
        call.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn the_lowest_unanswered_mutation_bounds_how_far_others_run_ahead() {
    let mut fake = fake().await;
    let session = attach(&[&fake], options()).await;
    let mut line = fake.line().await;
    let calls = spawn_creates(&session, IN_FLIGHT_MAX + 50);
    let first = line.requests(IN_FLIGHT_MAX).await;
    assert_eq!(first.len(), IN_FLIGHT_MAX);
    // All but the lowest are answered: still no room.
    line.respond(first[1..].iter().map(reply).collect());
    let more = tokio::time::timeout(Duration::from_millis(300), async {
        while line.frame().await.unwrap().requests.is_empty() {}
    });
    assert!(more.await.is_err(), "a mutation ran ahead of the window");
    line.respond(vec![reply(&first[0])]);
    let rest = line.requests(50).await;
    let acknowledged = command(&rest[0]).acknowledged_below;
    assert_eq!(acknowledged, IN_FLIGHT_MAX as u64 + 1);
    line.respond(rest.iter().map(reply).collect());
    for call in calls {
        call.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_mutation_past_its_deadline_is_unknown_and_holds_its_sequence_until_answered() {
    let mut fake = fake().await;
    let quick = SessionOptions {
        op_deadline: Duration::from_millis(200),
        ..options()
    };
    let session = attach(&[&fake], quick).await;
    let mut line = fake.line().await;
    let lost = spawn_creates(&session, 1).remove(0);
    line.requests(1).await;
    let error = lost.await.unwrap().unwrap_err();
    assert!(matches!(error, ClientError::Unknown { .. }), "{error:?}");
    assert_eq!(error.errno(), 5);
    drop(line);

    let mut line = fake.line().await;
    let again = line.requests(1).await.remove(0);
    assert_eq!(command(&again).sequence, 1, "it is still resent");
    let second = spawn_creates(&session, 1).remove(0);
    let request = line.requests(1).await.remove(0);
    assert_eq!(command(&request).acknowledged_below, 1);
    line.respond(vec![reply(&again), reply(&request)]);
    second.await.unwrap().unwrap();
    let third = spawn_creates(&session, 1).remove(0);
    let request = line.requests(1).await.remove(0);
    assert_eq!(command(&request).acknowledged_below, 3);
    line.respond(vec![reply(&request)]);
    third.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_was_never_sent_had_no_effect() {
    let mut fake = fake().await;
    let quick = SessionOptions {
        op_deadline: Duration::from_millis(300),
        ..options()
    };
    let session = attach(&[&fake], quick).await;
    let line = fake.line().await;
    *fake.refuse.lock() = Some(Status::unavailable("an election"));
    let mut events = session.events().unwrap();
    drop(line);
    while events.recv().await.unwrap() != Event::Disconnected {}
    let mutation = spawn_creates(&session, 1).remove(0);
    let read = session.get_attr(Ino::ROOT).await.unwrap_err();
    assert!(
        matches!(&read, ClientError::Unavailable { detail, .. } if detail.contains("an election")),
        "{read:?}"
    );
    let error = mutation.await.unwrap().unwrap_err();
    assert!(
        matches!(error, ClientError::Unavailable { .. }),
        "{error:?}"
    );

    *fake.refuse.lock() = None;
    let mut line = fake.line().await;
    let next = spawn_creates(&session, 1).remove(0);
    let request = line.requests(1).await.remove(0);
    assert_eq!(
        command(&request).sequence,
        1,
        "the withdrawn mutation took no sequence"
    );
    line.respond(vec![reply(&request)]);
    next.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_redirect_is_followed_and_a_silent_leader_is_left() {
    let mut first = fake().await;
    let mut second = fake().await;
    let mut status = Status::failed_precondition("not the leader");
    let leader = first.address.parse().unwrap();
    status.metadata_mut().insert("heliofs-leader", leader);
    *second.refuse.lock() = Some(status);
    let session = attach(&[&second, &first], options()).await;
    let line = first.line().await;
    // The first falls silent, with its connection open; the second takes over.
    *second.refuse.lock() = None;
    let begun = Instant::now();
    let resumed = second.line().await;
    assert_eq!(resumed.hello.session, SESSION);
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
    drop((line, session));
}

#[tokio::test]
async fn opens_and_locks_are_asserted_again_and_released_ones_are_not() {
    let mut fake = fake().await;
    let session = attach(&[&fake], options()).await;
    let mut line = fake.line().await;
    let lock = v1::Lock {
        ino: 10,
        owner: 5,
        kind: v1::LockKind::Write.into(),
        start: 0,
        end: 9,
        ..Default::default()
    };
    let opener = session.clone();
    let work = tokio::spawn(async move {
        opener.open(Ino(10), 1, false).await.unwrap();
        opener.open(Ino(10), 1, false).await.unwrap();
        opener.open(Ino(11), 0, false).await.unwrap();
        opener.lock(lock).await.unwrap();
    });
    let mut kinds = Vec::new();
    for _ in 0..4 {
        let request = line.requests(1).await.remove(0);
        let answer = match request.body.unwrap() {
            Body::Open(_) => {
                kinds.push("open");
                Answer::Opened(v1::Opened::default())
            }
            Body::GetExtents(_) => {
                kinds.push("extents");
                Answer::Extents(v1::ExtentPage::default())
            }
            Body::Lock(_) => {
                kinds.push("lock");
                Answer::Lock(v1::LockReply::default())
            }
            other => panic!("{other:?}"),
        };
        line.respond(vec![v1::Response {
            id: request.id,
            body: Some(answer),
            ..Default::default()
        }]);
    }
    work.await.unwrap();
    assert_eq!(
        kinds,
        ["open", "extents", "open", "lock"],
        "one registration per inode"
    );
    session.release(Ino(10));
    session.release(Ino(11));
    let released = line.requests(1).await.remove(0);
    assert_eq!(released.body, Some(Body::Release(v1::Release { ino: 11 })));
    drop(line);

    let line = fake.line().await;
    assert_eq!(line.hello.opens, [10]);
    assert_eq!(line.hello.locks.len(), 1);
    assert_eq!(line.hello.locks[0].lock, Some(lock));
    drop(line);
    session.release(Ino(10));
    assert!(fake.line().await.hello.opens.is_empty());
}

#[tokio::test]
async fn a_created_file_is_open_only_for_those_who_use_it() {
    let mut fake = fake().await;
    let session = attach(&[&fake], options()).await;
    let mut line = fake.line().await;
    let creator = session.clone();
    let file = |name: &'static str| v1::Create {
        parent: 1,
        name: Bytes::from_static(name.as_bytes()),
        kind: v1::FileKind::File.into(),
        ..Default::default()
    };
    let work = tokio::spawn(async move {
        let caller = v1::Caller::default();
        creator.create_open(caller, file("used")).await.unwrap();
        let op = v1::command::Op::Create(file("only made"));
        creator.mutate(caller, op).await.unwrap();
    });
    for ino in [20, 21] {
        let request = line.requests(1).await.remove(0);
        let mut response = reply(&request);
        if let Some(Answer::Reply(reply)) = &mut response.body {
            reply.attr = Some(v1::Attr {
                ino,
                ..Default::default()
            });
        }
        line.respond(vec![response]);
    }
    work.await.unwrap();
    let released = line.requests(1).await.remove(0);
    assert_eq!(released.body, Some(Body::Release(v1::Release { ino: 21 })));
    drop(line);
    let mut line = fake.line().await;
    assert_eq!(line.hello.opens, [20]);
    session.release(Ino(20));
    let released = line.requests(1).await.remove(0);
    assert_eq!(released.body, Some(Body::Release(v1::Release { ino: 20 })));
}

#[tokio::test]
async fn a_blocking_lock_is_cancelled_by_dropping_it_and_a_late_grant_is_taken_back() {
    let mut fake = fake().await;
    let quick = SessionOptions {
        op_deadline: Duration::from_millis(100),
        ..options()
    };
    let session = attach(&[&fake], quick).await;
    let mut line = fake.line().await;
    let lock = v1::Lock {
        ino: 10,
        owner: 5,
        kind: v1::LockKind::Write.into(),
        start: 0,
        end: 9,
        wait: true,
        ..Default::default()
    };
    let waiting = tokio::time::timeout(Duration::from_millis(400), session.lock(lock));
    assert!(
        waiting.await.is_err(),
        "it waits past the deadline of other operations"
    );
    let (mut id, mut cancelled) = (0, false);
    while !cancelled {
        let frame = line.frame().await.unwrap();
        id = frame.requests.first().map_or(id, |request| request.id);
        cancelled = frame.cancels.contains(&id);
    }
    line.respond(vec![v1::Response {
        id,
        body: Some(Answer::Lock(v1::LockReply::default())),
        ..Default::default()
    }]);
    let undo = line.requests(1).await.remove(0);
    let Some(Body::Lock(undo)) = undo.body else {
        panic!("{undo:?}")
    };
    assert_eq!(undo.kind(), v1::LockKind::Unlock);
    assert_eq!((undo.start, undo.end, undo.owner), (0, 9, 5));
}

#[tokio::test]
async fn a_session_that_the_server_ended_fails_what_waits_and_all_that_follows() {
    let mut fake = fake().await;
    let session = attach(&[&fake], options()).await;
    let mut events = session.events().unwrap();
    let mut line = fake.line().await;
    let waiting = spawn_creates(&session, 1).remove(0);
    line.requests(1).await;
    line.send(v1::ServerFrame {
        session_ended: true,
        ..Default::default()
    });
    let error = waiting.await.unwrap().unwrap_err();
    assert!(matches!(error, ClientError::SessionGone(_)), "{error:?}");
    let mut last = None;
    while let Some(event) = events.recv().await {
        last = Some(event.clone());
        if let Event::Gone(_) = event {
            break;
        }
    }
    assert!(matches!(last, Some(Event::Gone(_))));
    assert!(!session.lease_valid());
    let after = session.get_attr(Ino::ROOT).await.unwrap_err();
    assert!(matches!(after, ClientError::SessionGone(_)));
    let renewed = session.renew().await.unwrap();
    assert_eq!(fake.line().await.hello.session, 0);
    assert!(renewed.gone().is_none());
}

/// Records in which order things were heard.
#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

impl Watcher for Recorder {
    fn invalidated(&self, invalidation: &v1::Invalidation) {
        self.0
            .lock()
            .push(format!("invalidated {}", invalidation.ino));
    }

    fn forget_all(&self) {
        self.0.lock().push("forget".into());
    }

    fn recalled(&self, _: Recalled) {}
}

#[tokio::test]
async fn an_answer_older_than_an_invalidation_is_not_cacheable() {
    let mut fake = fake().await;
    let recorder = Arc::new(Recorder::default());
    let watched = SessionOptions {
        watcher: Some(recorder.clone()),
        ..options()
    };
    let session = attach(&[&fake], watched).await;
    let mut line = fake.line().await;
    let ticket = session.cache_ticket();
    let reader = session.clone();
    let call = tokio::spawn(async move { reader.get_attr(Ino(5)).await });
    let request = line.requests(1).await.remove(0);
    let at = |seq| Some(v1::Position { epoch: 0, seq });
    line.send(v1::ServerFrame {
        invalidations: vec![v1::Invalidation {
            position: at(9),
            ino: 5,
            attr: true,
            ..Default::default()
        }],
        responses: vec![v1::Response {
            id: request.id,
            position: at(8),
            body: Some(Answer::Attr(v1::Attr::default())),
            ..Default::default()
        }],
        ..Default::default()
    });
    let (_, position) = call.await.unwrap().unwrap();
    assert_eq!(*recorder.0.lock(), ["invalidated 5"], "before the response");
    assert!(!session.cacheable(ticket, position));
    let fresh = Position { seq: 9, ..position };
    assert!(session.cacheable(ticket, fresh));
    let mut events = session.events().unwrap();
    drop(line);
    let _line = fake.line().await;
    while events.recv().await.unwrap() != Event::Reattached {}
    assert!(!session.cacheable(ticket, fresh), "old tickets are void");
    assert_eq!(recorder.0.lock()[1], "forget");
}

#[tokio::test]
async fn the_lease_lives_by_pongs_and_is_lost_without() {
    let mut fake = fake().await;
    let session = attach(&[&fake], options()).await;
    assert!(
        !session.lease_valid(),
        "there is none before the first pong"
    );
    let mut events = session.events().unwrap();
    let mut line = fake.line().await;
    for _ in 0..8 {
        line.frame().await.unwrap();
    }
    assert!(session.lease_valid());
    // 300 ms after the last ping that was answered it is over; the line is held, but says nothing.
    let mut seen = Vec::new();
    while seen.last() != Some(&Event::LeaseLost) {
        seen.push(events.recv().await.unwrap());
    }
    assert!(!session.lease_valid());
    assert_eq!(seen, [Event::LeaseRegained, Event::LeaseLost]);
}

/// A new leader takes a hello for the word that nothing is cached any more.
#[tokio::test]
async fn a_broken_stream_ends_the_lease_before_the_next_hello() {
    let mut fake = fake().await;
    let session = attach(&[&fake], options()).await;
    let mut line = fake.line().await;
    while !session.lease_valid() {
        line.frame().await.unwrap();
    }
    let mut events = session.events().unwrap();
    drop(line);
    let line = fake.line().await;
    assert_ne!(line.hello.session, 0, "it was resumed");
    let mut seen = Vec::new();
    while seen.last() != Some(&Event::Reattached) {
        seen.push(events.recv().await.unwrap());
    }
    assert!(seen.contains(&Event::LeaseLost), "{seen:?}");
}

#[tokio::test]
async fn detaching_sends_what_is_queued_and_says_goodbye() {
    let mut fake = fake().await;
    let session = attach(&[&fake], options()).await;
    let mut line = fake.line().await;
    let call = session.clone();
    let waiting = tokio::spawn(async move { call.open(Ino(5), 0, false).await });
    line.requests(1).await;
    session.release(Ino(5));
    let server = tokio::spawn(async move {
        let mut requests = 0;
        while let Some(frame) = line.frame().await {
            requests += frame.requests.len();
            if frame.bye {
                return requests;
            }
        }
        panic!("no goodbye");
    });
    let begun = Instant::now();
    session.detach().await;
    assert!(
        begun.elapsed() < Duration::from_millis(900),
        "it did not wait in vain"
    );
    assert_eq!(server.await.unwrap(), 1, "the release");
    assert!(matches!(
        waiting.await.unwrap(),
        Err(ClientError::SessionGone(_))
    ));
    assert!(session.gone().is_some());
}

#[tokio::test]
async fn verdicts_and_refusals_say_what_they_are() {
    let mut fake = fake().await;
    let session = attach(&[&fake], options()).await;
    let mut line = fake.line().await;
    let looker = session.clone();
    let lookups = tokio::spawn(async move {
        let name = Bytes::from_static(b"x");
        let absent = looker.try_lookup(Ino::ROOT, name.clone()).await;
        (absent, looker.lookup(Ino::ROOT, name).await)
    });
    for _ in 0..2 {
        let request = line.requests(1).await.remove(0);
        line.respond(vec![v1::Response {
            id: request.id,
            error: FsError::NotFound.into(),
            position: Some(v1::Position { epoch: 0, seq: 4 }),
            ..Default::default()
        }]);
    }
    let (absent, error) = lookups.await.unwrap();
    let (attr, position) = absent.unwrap();
    assert_eq!((attr, position.seq), (None, 4));
    assert_eq!(error.unwrap_err().errno(), 2);

    *fake.refuse.lock() = Some(Status::not_found("volume `photos`"));
    let refused = Session::attach(cluster(&[&fake]), options()).await.err();
    assert!(
        matches!(refused, Some(AttachError::NoVolume { .. })),
        "{refused:?}"
    );
    *fake.refuse.lock() = Some(Status::unauthenticated("bad token"));
    let refused = Session::attach(cluster(&[&fake]), options()).await.err();
    let token = AttachError::Cluster(ClusterError::TokenRefused {
        peer: fake.address.clone(),
    });
    assert_eq!(refused, Some(token));
    *fake.refuse.lock() = Some(Status::unavailable("an election"));
    let before = fake.attempts.load(Ordering::SeqCst);
    let refused = Session::attach(cluster(&[&fake]), options()).await.err();
    assert!(
        matches!(
            refused,
            Some(AttachError::Cluster(ClusterError::NoLeader { .. }))
        ),
        "{refused:?}"
    );
    let attempts = fake.attempts.load(Ordering::SeqCst) - before;
    assert!((10..=80).contains(&attempts), "{attempts} attempts in 2 s");
}

#[tokio::test]
async fn nobody_there_is_said_soon_and_with_the_addresses() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let options = ClusterOptions {
        unreachable_after: Duration::from_millis(200),
        ..Default::default()
    };
    let nobody = Cluster::new(vec![address.clone()], Token::new(TOKEN).unwrap(), options);
    let begun = Instant::now();
    let error = nobody.status().await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(2));
    let text = error.to_string();
    assert!(
        text.contains(&address) && text.contains("heliofs meta"),
        "{text}"
    );
    assert!(text.contains("refused"), "{text}");
    // A change that was certainly not delivered is not reported as "may have taken effect".
    let change = nobody.init_cluster().await.unwrap_err();
    assert!(matches!(change, ClusterError::NoNode { .. }), "{change:?}");
    let attach = Session::attach(nobody, self::options()).await.err();
    assert!(matches!(
        attach,
        Some(AttachError::Cluster(ClusterError::NoNode { .. }))
    ));
}

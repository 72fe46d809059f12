//! An S3 server that fails as real ones do: a relay in front of one that doesn't.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// How long an answer that never comes keeps its connection; longer than any client waits.
const STUCK: Duration = Duration::from_secs(25);

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// 503 SlowDown, and no effect.
    SlowDown,
    /// The request has no answer, and no effect.
    TimeOut,
    /// The connection is reset before the request takes effect.
    Reset,
    /// A body ends early.
    ShortBody,
    /// One bit of an object is another.
    WrongBytes,
    /// A put or delete takes effect, and the answer is lost.
    LostAnswer,
    /// A listing is the first one that was asked for.
    StaleListing,
}

impl Fault {
    pub const ALL: [Self; 7] = [
        Self::SlowDown,
        Self::TimeOut,
        Self::Reset,
        Self::ShortBody,
        Self::WrongBytes,
        Self::LostAnswer,
        Self::StaleListing,
    ];
}

/// The relay; until dropped.
pub struct FaultyS3 {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    to: String,
    stop: AtomicBool,
    /// What goes wrong, and how often.
    fault: Mutex<Option<(Fault, f64)>>,
    random: Mutex<StdRng>,
    listings: Mutex<HashMap<String, Vec<u8>>>,
    requests: AtomicU64,
    faults: AtomicU64,
}

/// A request, whole.
struct Request {
    method: String,
    target: String,
    head: String,
    body: Vec<u8>,
}

impl FaultyS3 {
    /// In front of `url` (`http://host:port`), without faults.
    pub fn start(url: &str, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            to: url.trim_start_matches("http://").to_owned(),
            stop: AtomicBool::new(false),
            fault: Mutex::default(),
            random: Mutex::new(StdRng::seed_from_u64(seed)),
            listings: Mutex::default(),
            requests: AtomicU64::new(0),
            faults: AtomicU64::new(0),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if accepting.stop.load(Ordering::Relaxed) {
                    return;
                }
                let (Ok(client), shared) = (stream, Arc::clone(&accepting)) else {
                    return;
                };
                std::thread::spawn(move || {
                    // Clients close connections at any time.
                    serve(&shared, client).ok();
                });
            }
        });
        Self { port, shared }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// From now on; `None`: nothing goes wrong.
    pub fn set(&self, fault: Option<(Fault, f64)>) {
        *self.shared.fault.lock().unwrap() = fault;
    }

    /// Requests, and faults injected; from here on they are counted anew.
    pub fn take_counts(&self) -> (u64, u64) {
        let take = |count: &AtomicU64| count.swap(0, Ordering::Relaxed);
        (take(&self.shared.requests), take(&self.shared.faults))
    }
}

impl Drop for FaultyS3 {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Wakes the accepting thread, which sees that it is over.
        TcpStream::connect(("127.0.0.1", self.port)).ok();
    }
}

fn read_request(client: &mut TcpStream) -> io::Result<Option<Request>> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16 << 10];
    let end = loop {
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
        let count = client.read(&mut buffer)?;
        if count == 0 {
            return Ok(None);
        }
        bytes.extend_from_slice(&buffer[..count]);
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let header = |name: &str| {
        head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name)
                .then(|| value.trim().to_owned())
        })
    };
    assert!(
        header("transfer-encoding").is_none(),
        "not expected: {head}"
    );
    let length = header("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = bytes.split_off(end);
    while body.len() < length {
        let count = client.read(&mut buffer)?;
        if count == 0 {
            return Ok(None);
        }
        body.extend_from_slice(&buffer[..count]);
    }
    let mut words = head.split(' ');
    Ok(Some(Request {
        method: words.next().unwrap_or_default().to_owned(),
        target: words.next().unwrap_or_default().to_owned(),
        head,
        body,
    }))
}

impl Shared {
    /// The server's answer, to the end of its connection.
    fn forward(&self, request: &Request) -> io::Result<Vec<u8>> {
        let mut server = TcpStream::connect(&self.to)?;
        server.set_nodelay(true)?;
        // Nobody signs this header.
        let head = request.head.trim_end_matches("\r\n");
        server.write_all(format!("{head}\r\nConnection: close\r\n\r\n").as_bytes())?;
        server.write_all(&request.body)?;
        let mut answer = Vec::new();
        server.read_to_end(&mut answer)?;
        Ok(answer)
    }

    /// Whether the next request is answered by a reset.
    fn resets(&self) -> bool {
        let Some((Fault::Reset, rate)) = *self.fault.lock().unwrap() else {
            return false;
        };
        let hit = self.random.lock().unwrap().random_bool(rate);
        self.faults.fetch_add(u64::from(hit), Ordering::Relaxed);
        hit
    }

    /// Whether this request is hit.
    fn hit(&self, request: &Request) -> Option<Fault> {
        let (fault, rate) = (*self.fault.lock().unwrap())?;
        let (reads, lists) = (
            request.method == "GET",
            request.target.contains("list-type="),
        );
        let concerned = match fault {
            Fault::SlowDown | Fault::TimeOut => true,
            // Before it is read.
            Fault::Reset => false,
            Fault::ShortBody => reads,
            Fault::WrongBytes => reads && !lists,
            Fault::LostAnswer => !reads && request.method != "HEAD",
            Fault::StaleListing => lists,
        };
        let hit = concerned && self.random.lock().unwrap().random_bool(rate);
        self.faults.fetch_add(u64::from(hit), Ordering::Relaxed);
        hit.then_some(fault)
    }
}

fn serve(shared: &Shared, mut client: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    if shared.resets() {
        // Closed with bytes that nobody has read, a connection is reset. Source: tcp(7), RFC 1122 4.2.2.13.
        client.peek(&mut [0])?;
        return Ok(());
    }
    let Some(request) = read_request(&mut client)? else {
        return Ok(());
    };
    shared.requests.fetch_add(1, Ordering::Relaxed);
    let fault = shared.hit(&request);
    match fault {
        Some(Fault::SlowDown) => {
            let body = "<?xml version=\"1.0\"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>";
            let length = body.len();
            let head = format!(
                "HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
            );
            return client.write_all(format!("{head}{body}").as_bytes());
        }
        Some(Fault::TimeOut) => {
            std::thread::sleep(STUCK);
            return client.shutdown(Shutdown::Both);
        }
        _ => {}
    }
    let mut answer = shared.forward(&request)?;
    let body_at = answer
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .map_or(0, |at| at + 4);
    if request.target.contains("list-type=") {
        let mut listings = shared.listings.lock().unwrap();
        let first = listings
            .entry(request.target.clone())
            .or_insert_with(|| answer.clone());
        if fault == Some(Fault::StaleListing) {
            answer.clone_from(first);
        }
    }
    let body = answer.len() - body_at;
    match fault {
        Some(Fault::LostAnswer) => return client.shutdown(Shutdown::Both),
        Some(Fault::ShortBody) if body > 0 => {
            let kept = shared.random.lock().unwrap().random_range(0..body);
            answer.truncate(body_at + kept);
        }
        Some(Fault::WrongBytes) if body > 0 => {
            let bit = shared.random.lock().unwrap().random_range(0..body * 8);
            answer[body_at + bit / 8] ^= 1 << (bit % 8);
        }
        _ => {}
    }
    client.write_all(&answer)
}

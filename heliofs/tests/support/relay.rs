//! A relay between two regions: adds time to each direction, and can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// Passes connections on to one address; until dropped.
pub struct Relay {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    to: String,
    delay: Duration,
    cut: AtomicBool,
    stop: AtomicBool,
    passed: AtomicU64,
    /// It cuts itself when as many bytes went through.
    passes_max: AtomicU64,
    refused: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
}

impl Relay {
    /// To `to`, with `delay` in each direction: a round trip takes twice as long.
    pub fn start(to: &str, delay: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            to: to.to_owned(),
            delay,
            cut: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            passed: AtomicU64::new(0),
            passes_max: AtomicU64::new(u64::MAX),
            refused: AtomicU64::new(0),
            open: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if accepting.stop.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(client) = stream else { return };
                if accepting.cut.load(Ordering::Relaxed) {
                    accepting.refused.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                // A server that is down refuses, and so do we.
                let Ok(server) = TcpStream::connect(&accepting.to) else {
                    continue;
                };
                for stream in [&client, &server] {
                    stream.set_nodelay(true).unwrap();
                    let mut open = accepting.open.lock().unwrap();
                    open.push(stream.try_clone().unwrap());
                }
                pass(
                    &accepting,
                    client.try_clone().unwrap(),
                    server.try_clone().unwrap(),
                );
                pass(&accepting, server, client);
            }
        });
        Self { port, shared }
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Bytes that went through, both ways.
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::Relaxed)
    }

    /// Connections that were tried while it was cut.
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// From now on nothing gets through.
    pub fn cut(&self) {
        self.shared.cut();
    }

    /// It cuts itself when `bytes` more went through: in the middle of whatever needs more.
    pub fn cut_after(&self, bytes: u64) {
        let max = self.passed() + bytes;
        self.shared.passes_max.store(max, Ordering::Relaxed);
    }

    /// Whether it is cut.
    pub fn is_cut(&self) -> bool {
        self.shared.cut.load(Ordering::Relaxed)
    }

    /// It passes connections on again.
    pub fn heal(&self) {
        self.shared.passes_max.store(u64::MAX, Ordering::Relaxed);
        self.shared.cut.store(false, Ordering::Relaxed);
    }
}

impl Shared {
    fn cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
        for stream in self.open.lock().unwrap().drain(..) {
            // It may be closed already.
            stream.shutdown(Shutdown::Both).ok();
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.cut();
        // Wakes the accepting thread, which sees that it is over.
        TcpStream::connect(self.address()).ok();
    }
}

/// One direction: a thread that reads and notes when, and one that writes when it is time.
fn pass(shared: &Arc<Shared>, mut from: TcpStream, mut to: TcpStream) {
    let (sender, receiver) = mpsc::sync_channel::<(Instant, Vec<u8>)>(4096);
    let delay = shared.delay;
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count) = from.read(&mut buffer)
            && count > 0
        {
            let due = Instant::now() + delay;
            if sender.send((due, buffer[..count].to_vec())).is_err() {
                break;
            }
        }
    });
    let shared = Arc::clone(shared);
    std::thread::spawn(move || {
        while let Ok((due, bytes)) = receiver.recv() {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let after = shared.passed.load(Ordering::Relaxed) + bytes.len() as u64;
            if after > shared.passes_max.load(Ordering::Relaxed) {
                shared.cut();
                break;
            }
            if to.write_all(&bytes).is_err() {
                break;
            }
            let count = bytes.len() as u64;
            shared.passed.fetch_add(count, Ordering::Relaxed);
        }
        to.shutdown(Shutdown::Both).ok();
    });
}

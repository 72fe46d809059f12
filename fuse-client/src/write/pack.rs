//! Packing: small batches of all files share segments.
//!
//! A batch that fills no segment waits here. The flush that brought it asks for a segment ([`Fs::pack`]): it leaves at once if
//! no packed segment is on its way, otherwise with everything that gathers meanwhile (but not for longer than [`PATIENCE`], since
//! one slow request must not hold up everybody). Whatever fills a segment leaves without
//! waiting. Files are packed in the order in which they come, so that neighbours of a directory lie side by side.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::budget::Uploading;
use super::pieces::Frame;
use crate::fs::Fs;
use crate::inode::Uploaded;

/// Longest wait for a segment that is on its way.
const PATIENCE: Duration = Duration::from_millis(250);

/// Told once the segment is stored, or can't be.
type Done = watch::Sender<Option<Arc<Uploaded>>>;

/// What one batch brings.
struct Part {
    frames: Vec<Frame>,
    bytes: u64,
    done: Done,
    _memory: Uploading,
}

#[derive(Default)]
struct Waiting {
    parts: Vec<Part>,
    bytes: u64,
    /// A packed segment that is not full is on its way, and not for long.
    under_way: bool,
    /// Somebody will look again when patience is over.
    timed: bool,
}

/// Batches that wait for a segment.
#[derive(Default)]
pub(crate) struct Packer {
    waiting: Mutex<Waiting>,
}

impl Packer {
    /// Puts a batch in line. It leaves with a later [`Fs::pack`].
    pub(crate) fn add(
        &self,
        frames: Vec<Frame>,
        memory: Uploading,
    ) -> watch::Receiver<Option<Arc<Uploaded>>> {
        let (done, receiver) = watch::channel(None);
        let bytes = frames.iter().map(|frame| frame.length).sum();
        let mut waiting = self.waiting.lock();
        waiting.bytes += bytes;
        waiting.parts.push(Part {
            frames,
            bytes,
            done,
            _memory: memory,
        });
        receiver
    }

    /// The next segment's parts, and whether it is full; `None` when nothing may leave now.
    fn next(&self, segment_bytes: u64) -> Option<(Vec<Part>, bool)> {
        let mut waiting = self.waiting.lock();
        // What was removed or overwritten since is not wanted any more.
        waiting.parts.retain(|part| !part.done.is_closed());
        waiting.bytes = waiting.parts.iter().map(|part| part.bytes).sum();
        let full = waiting.bytes >= segment_bytes;
        if waiting.parts.is_empty() || (!full && waiting.under_way) {
            return None;
        }
        let mut bytes = 0;
        let count = waiting
            .parts
            .iter()
            .take_while(|part| {
                let fits = bytes < segment_bytes;
                bytes += part.bytes;
                fits
            })
            .count();
        let parts: Vec<Part> = waiting.parts.drain(..count).collect();
        waiting.bytes -= parts.iter().map(|part| part.bytes).sum::<u64>();
        waiting.under_way |= !full;
        Some((parts, full))
    }

    /// Nobody needs to wait for the segment that is on its way: it arrived, or takes too long.
    fn go_on(&self) {
        self.waiting.lock().under_way = false;
    }

    /// Whether the caller is to look again when patience is over.
    fn needs_timer(&self) -> bool {
        let mut waiting = self.waiting.lock();
        let needed = !waiting.parts.is_empty() && !waiting.timed;
        waiting.timed |= needed;
        needed
    }

    fn timer_ended(&self) {
        let mut waiting = self.waiting.lock();
        (waiting.timed, waiting.under_way) = (false, false);
    }
}

impl Fs {
    /// Somebody waits for what is in line: sends off what may leave.
    pub(crate) fn pack(self: &Arc<Self>) {
        while let Some((parts, full)) = self.packer().next(self.segment_bytes()) {
            let fs = self.clone();
            self.runtime().spawn(async move {
                fs.upload_packed(parts).await;
                if !full {
                    fs.packer().go_on();
                    // Those that came meanwhile share the next one.
                    fs.pack();
                }
            });
        }
        if self.packer().needs_timer() {
            let fs = self.clone();
            self.runtime().spawn(async move {
                tokio::time::sleep(PATIENCE).await;
                fs.packer().timer_ended();
                fs.pack();
            });
        }
    }

    async fn upload_packed(&self, mut parts: Vec<Part>) {
        let counts: Vec<usize> = parts.iter().map(|part| part.frames.len()).collect();
        let frames = parts
            .iter_mut()
            .flat_map(|part| std::mem::take(&mut part.frames));
        let frames: Vec<Frame> = frames.collect();
        // What is loaded from the staging folder is counted nowhere else.
        let turn = match frames.iter().all(Frame::is_in_memory) {
            true => None,
            false => self.upload_turns().acquire().await.ok(),
        };
        let uploaded = self.upload(frames).await;
        drop(turn);
        let mut at = 0;
        for (count, Part { done, .. }) in counts.into_iter().zip(parts) {
            let part = uploaded
                .as_ref()
                .map(|(segment, numbers)| (Arc::clone(segment), numbers[at..at + count].to_vec()))
                .map_err(|error| *error);
            at += count;
            // Nobody listens when the batch was dropped with its inode.
            done.send_replace(Some(Arc::new(part)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: u64) -> Vec<Frame> {
        vec![Frame {
            offset: 0,
            pieces: Vec::new(),
            length,
        }]
    }

    /// A packer whose parts somebody waits for.
    #[derive(Default)]
    struct Tested {
        packer: Packer,
        receivers: Mutex<Vec<watch::Receiver<Option<Arc<Uploaded>>>>>,
    }

    impl std::ops::Deref for Tested {
        type Target = Packer;

        fn deref(&self) -> &Packer {
            &self.packer
        }
    }

    impl Tested {
        fn add(&self, frames: Vec<Frame>) {
            let memory = Arc::new(super::super::budget::Budget::new(1)).upload(1);
            self.receivers.lock().push(self.packer.add(frames, memory));
        }
    }

    fn lengths(next: Option<(Vec<Part>, bool)>) -> Option<(Vec<u64>, bool)> {
        next.map(|(parts, full)| (parts.iter().map(|part| part.bytes).collect(), full))
    }

    #[test]
    fn those_that_come_during_a_put_share_the_next() {
        let packer = Tested::default();
        packer.add(frame(10));
        assert_eq!(lengths(packer.next(100)), Some((vec![10], false)));
        packer.add(frame(20));
        packer.add(frame(30));
        assert_eq!(lengths(packer.next(100)), None);
        packer.go_on();
        assert_eq!(lengths(packer.next(100)), Some((vec![20, 30], false)));
        packer.go_on();
        assert_eq!(lengths(packer.next(100)), None);
    }

    #[test]
    fn what_nobody_waits_for_is_not_stored() {
        let packer = Tested::default();
        packer.add(frame(10));
        packer.add(frame(20));
        packer.receivers.lock().remove(0);
        assert_eq!(lengths(packer.next(100)), Some((vec![20], false)));
        assert!(packer.waiting.lock().parts.is_empty());
    }

    #[test]
    fn nobody_waits_longer_than_patience_lasts() {
        let packer = Tested::default();
        packer.add(frame(10));
        assert!(packer.next(100).is_some());
        assert!(!packer.needs_timer(), "nobody waits");
        packer.add(frame(20));
        assert!(packer.next(100).is_none());
        assert!(packer.needs_timer());
        assert!(!packer.needs_timer(), "one timer is enough");
        packer.timer_ended();
        assert_eq!(lengths(packer.next(100)), Some((vec![20], false)));
    }

    #[test]
    fn a_full_segment_waits_for_nobody() {
        let packer = Tested::default();
        packer.add(frame(10));
        assert!(packer.next(100).is_some());
        for length in [60, 30, 30, 70, 20] {
            packer.add(frame(length));
        }
        assert_eq!(lengths(packer.next(100)), Some((vec![60, 30, 30], true)));
        assert_eq!(lengths(packer.next(100)), None, "90 bytes are left");
        packer.add(frame(10));
        assert_eq!(lengths(packer.next(100)), Some((vec![70, 20, 10], true)));
    }
}

//! Memory that uncommitted data of all files may take; writers wait when it is used up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

/// See the module.
#[derive(Debug)]
pub struct Budget {
    used: AtomicU64,
    uploading: AtomicU64,
    bytes_max: u64,
    freed: Notify,
    pressed: Notify,
}

impl Budget {
    /// A budget of `bytes_max` bytes.
    pub fn new(bytes_max: u64) -> Self {
        Self {
            used: AtomicU64::new(0),
            uploading: AtomicU64::new(0),
            bytes_max,
            freed: Notify::new(),
            pressed: Notify::new(),
        }
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }

    /// Whether a write may go ahead. One that is larger than the whole budget may when nothing else is held.
    pub fn has_room(&self, bytes: u64) -> bool {
        let used = self.used();
        let uploading = self.uploading.load(Ordering::Acquire);
        let held = used.max(uploading);
        held == 0 || held + bytes <= self.bytes_max
    }

    /// Counts bytes of an upload as long as the guard lives. They are mostly those of buffers, but stay when a buffer's bytes
    /// are overwritten or cut off meanwhile; so memory stays below twice the budget.
    pub fn upload(self: &Arc<Self>, bytes: u64) -> Uploading {
        self.uploading.fetch_add(bytes, Ordering::AcqRel);
        Uploading {
            budget: self.clone(),
            bytes,
        }
    }

    /// A buffer grew from `before` to `after` bytes, or shrank.
    pub fn moved(&self, before: u64, after: u64) {
        if after >= before {
            let used = self.used.fetch_add(after - before, Ordering::AcqRel) + (after - before);
            if used > self.bytes_max / 2 {
                self.pressed.notify_one();
            }
        } else {
            self.used.fetch_sub(before - after, Ordering::AcqRel);
            self.freed.notify_waiters();
        }
    }

    /// Waits until there is room for `bytes`.
    pub async fn wait(&self, bytes: u64) {
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            // Registered before the look, so that room made in between is not missed.
            freed.as_mut().enable();
            if self.has_room(bytes) {
                return;
            }
            self.pressed.notify_one();
            freed.await;
        }
    }

    /// Waits until more than half of the budget is used (or was, since the last call).
    pub async fn pressure(&self) {
        self.pressed.notified().await;
    }

    /// Whether more than half of the budget is in use.
    pub fn is_pressed(&self) -> bool {
        self.used() > self.bytes_max / 2
    }
}

/// See [`Budget::upload`].
#[derive(Debug)]
pub struct Uploading {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Drop for Uploading {
    fn drop(&mut self) {
        self.budget
            .uploading
            .fetch_sub(self.bytes, Ordering::AcqRel);
        self.budget.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_writer_waits_for_room_and_is_woken_by_it() {
        let budget = Arc::new(Budget::new(100));
        budget.moved(0, 90);
        assert!(!budget.has_room(20));
        assert!(budget.is_pressed());
        let waiter = tokio::spawn({
            let budget = budget.clone();
            async move { budget.wait(20).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        budget.moved(90, 10);
        waiter.await.unwrap();
    }

    #[test]
    fn uploads_of_what_was_cut_off_since_still_count() {
        let budget = Arc::new(Budget::new(100));
        budget.moved(0, 80);
        let upload = budget.upload(80);
        budget.moved(80, 0);
        assert!(!budget.has_room(30));
        drop(upload);
        assert!(budget.has_room(30));
    }

    #[test]
    fn a_write_larger_than_the_budget_goes_alone() {
        let budget = Budget::new(10);
        assert!(budget.has_room(1000));
        budget.moved(0, 1);
        assert!(!budget.has_room(1000));
    }
}

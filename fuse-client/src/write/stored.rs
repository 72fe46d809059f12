//! A segment that this mount has stored and not named yet. If all of it is overwritten, cut off or removed before a commit names
//! it, nobody else will ever know of it: the mount deletes it, instead of leaving it to gc.

use std::sync::atomic::{AtomicBool, Ordering};

use heliofs_proto::ids::SegmentId;
use heliofs_proto::v1;
use tokio::sync::mpsc::UnboundedSender;

/// Shared by the batches that lie in the segment.
#[derive(Debug)]
pub struct Stored {
    record: v1::Segment,
    named: AtomicBool,
    abandoned: UnboundedSender<SegmentId>,
}

impl Stored {
    /// The segment of `record` was stored; it is told to `abandoned` when it is dropped without ever having been named.
    pub fn new(record: v1::Segment, abandoned: UnboundedSender<SegmentId>) -> Self {
        Self {
            record,
            named: AtomicBool::new(false),
            abandoned,
        }
    }

    /// Its id.
    pub fn id(&self) -> u64 {
        self.record.id
    }

    /// For a commit that is about to be proposed: from here on the cluster may know the segment, whatever it answers.
    pub fn name(&self) -> v1::Segment {
        self.named.store(true, Ordering::Release);
        self.record
    }
}

impl Drop for Stored {
    fn drop(&mut self) {
        if !*self.named.get_mut() {
            // When nobody listens the mount has ended, and gc finds it once the session is over.
            let _unheard = self.abandoned.send(SegmentId(self.record.id));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn only_what_was_never_named_is_abandoned_and_only_by_the_last_holder() {
        let (sender, mut abandoned) = tokio::sync::mpsc::unbounded_channel();
        let stored = |id| {
            let record = v1::Segment {
                id,
                ..v1::Segment::default()
            };
            Arc::new(Stored::new(record, sender.clone()))
        };
        let (first, second) = (stored(1), stored(2));
        let other = Arc::clone(&first);
        drop(first);
        assert!(abandoned.try_recv().is_err());
        assert_eq!(second.name().id, 2);
        drop(second);
        drop(other);
        assert_eq!(abandoned.try_recv(), Ok(SegmentId(1)));
        assert!(abandoned.try_recv().is_err());
    }
}

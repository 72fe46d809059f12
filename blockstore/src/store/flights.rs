//! What is being fetched right now, by page, so that concurrent readers and prefetches share one fetch.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::Shared;
use heliofs_proto::ids::SegmentId;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::oneshot;

use crate::cache::PageKey;
use crate::{FrameNumber, StoreError};

/// What a fetch came to: one result per page.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) first: u32,
    pub(super) pages: Vec<Result<Bytes, StoreError>>,
}

impl Run {
    pub(super) fn page(&self, page: u32) -> Option<Result<Bytes, StoreError>> {
        self.pages
            .get(page.checked_sub(self.first)? as usize)
            .cloned()
    }
}

/// A fetch that readers wait for. The outer error: its task died.
pub(super) type Flight = Shared<oneshot::Receiver<Arc<Run>>>;

/// All fetches of one store.
#[derive(Debug, Default)]
pub(super) struct Flights {
    by_page: Mutex<HashMap<PageKey, Flight>>,
}

/// The fetch's own end: its pages are in flight until this is dropped.
pub(super) struct Landing {
    flights: Arc<Flights>,
    segment: SegmentId,
    frame: FrameNumber,
    pages: Range<u32>,
    done: Option<oneshot::Sender<Arc<Run>>>,
}

impl Flights {
    pub(super) fn lock(&self) -> MutexGuard<'_, HashMap<PageKey, Flight>> {
        self.by_page.lock()
    }
}

impl Landing {
    /// Registers a fetch of `pages`, none of which is in flight; `table` is the lock of `flights`.
    pub(super) fn register(
        flights: &Arc<Flights>,
        table: &mut HashMap<PageKey, Flight>,
        segment: SegmentId,
        frame: FrameNumber,
        pages: Range<u32>,
    ) -> (Self, Flight) {
        let (done, waiting) = oneshot::channel();
        let flight = waiting.shared();
        for page in pages.clone() {
            let key = PageKey {
                segment,
                frame,
                page,
            };
            table.insert(key, flight.clone());
        }
        let landing = Self {
            flights: Arc::clone(flights),
            segment,
            frame,
            pages,
            done: Some(done),
        };
        (landing, flight)
    }

    /// Ends the fetch. Its pages must be in the memory tier already, or a reader between the two would fetch them again.
    pub(super) fn land(mut self, run: Run) {
        if let Some(done) = self.done.take() {
            // Nobody may be waiting any more.
            let _unread = done.send(Arc::new(run));
        }
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut table = self.flights.by_page.lock();
        for page in self.pages.clone() {
            table.remove(&PageKey {
                segment: self.segment,
                frame: self.frame,
                page,
            });
        }
    }
}

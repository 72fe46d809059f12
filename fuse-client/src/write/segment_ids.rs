//! Ids for new segments, taken from the cluster in ranges so that an upload doesn't wait for a round trip.

use std::collections::VecDeque;
use std::ops::Range;

use heliofs_proto::ids::SegmentId;
use heliofs_proto::v1;
use meta_client::{ClientError, Session};

/// Ids per request; what is unused when the mount ends is never used again, which 48 bits can afford.
const RANGE: u32 = 1024;

/// See the module.
#[derive(Debug, Default)]
pub struct SegmentIds {
    ranges: tokio::sync::Mutex<VecDeque<Range<u64>>>,
}

impl SegmentIds {
    /// An id that nobody else has.
    pub async fn next(&self, session: &Session) -> Result<SegmentId, ClientError> {
        let mut ranges = self.ranges.lock().await;
        loop {
            if let Some(range) = ranges.front_mut() {
                if let Some(id) = range.next() {
                    return Ok(SegmentId(id));
                }
                ranges.pop_front();
                continue;
            }
            let op = v1::command::Op::SegmentsAllocate(v1::SegmentsAllocate { count: RANGE });
            let reply = session.mutate(v1::Caller::default(), op).await?;
            ranges.push_back(reply.value..reply.value + u64::from(RANGE));
        }
    }

    /// The ranges were closed: ids of them are refused.
    pub async fn discard(&self) {
        self.ranges.lock().await.clear();
    }
}

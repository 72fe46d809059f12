//! Who watches what is applied: invalidations are made from it.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use heliofs_proto::ids::{Position, SessionId, UnixNanos, VolumeId};
use heliofs_proto::v1;
use meta_core::Touched;

/// One replicated command that was applied.
#[derive(Clone, Debug)]
pub struct AppliedItem<'a> {
    /// Its volume.
    pub volume: VolumeId,
    /// Who sent it; `SessionId::SYSTEM` for drivers.
    pub session: SessionId,
    /// The position it took.
    pub position: Position,
    /// Its effective time.
    pub time: UnixNanos,
    /// The command.
    pub command: Cow<'a, v1::Command>,
    /// What it answered; a refusal is an answer.
    pub reply: v1::Reply,
    /// What it changed that clients may have cached.
    pub touched: Vec<Touched>,
}

/// Sees everything that is applied on this node. Runs on the apply task: must be quick and must not block.
pub trait ApplyObserver: Send + Sync + 'static {
    /// A group was written: called in log order, once per command, before any waiter of the group gets its reply.
    fn applied(&self, items: &[AppliedItem<'_>]);

    /// A group took this long to be applied and written; comes after [`ApplyObserver::applied`], for groups without commands too.
    fn took(&self, _spent: Duration) {}

    /// The whole state was replaced (a snapshot was installed): whatever was seen before may have changed.
    fn reset(&self);

    /// A volume was created, changed or destroyed.
    fn volumes_changed(&self) {}
}

/// The registered observers; cheap to clone.
#[derive(Clone, Default)]
pub struct Observers {
    list: Arc<ArcSwap<Vec<Arc<dyn ApplyObserver>>>>,
}

impl Observers {
    /// Adds one; it sees the groups applied from now on.
    pub fn register(&self, observer: Arc<dyn ApplyObserver>) {
        self.list.rcu(|list| {
            let mut list = Vec::clone(list);
            list.push(observer.clone());
            list
        });
    }

    pub(crate) fn each(&self, f: impl Fn(&dyn ApplyObserver)) {
        for observer in self.list.load().iter() {
            f(observer.as_ref());
        }
    }
}

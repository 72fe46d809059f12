//! What which stream was told, so that changes by others invalidate it. Pure: no clock, no I/O.
//!
//! Told is remembered per inode (attributes, content, extended attributes) and per directory (entries: any name, found or
//! not). An inode's bit is dropped when its invalidation is sent; interest in a directory's entries stays, since an
//! invalidation names one entry and the others may still be cached. Memory is bounded: the inode that was longest not told
//! is forgotten, and everybody who was told is sent an invalidation for all of it.
//!
//! A stream that resumes a session follows everything for a while: what the session was told on an earlier stream, perhaps by
//! another node, is not known here, and a kernel behind it may still go by it.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::time::Instant;

use bytes::Bytes;
use heliofs_proto::v1;
use lru::LruCache;
use meta_core::Touched;

/// A stream: a session's attachment to this node. A new stream of the same session starts with nothing told.
pub type StreamId = u64;

/// Kinds of knowledge about an inode, as bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct What(u8);

impl What {
    /// Attributes.
    pub const ATTR: Self = Self(1);
    /// Extents and inline data.
    pub const CONTENT: Self = Self(2);
    /// Extended attributes.
    pub const XATTR: Self = Self(4);
    /// Entries of the directory.
    pub const ENTRIES: Self = Self(8);

    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// Something that a reply tells: about which inode, and what of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Told {
    /// The inode.
    pub ino: u64,
    /// What of it.
    pub what: What,
}

struct Holder {
    stream: StreamId,
    what: What,
}

impl Holder {
    fn of_all(stream: StreamId) -> Self {
        let what = What::ATTR
            .and(What::CONTENT)
            .and(What::XATTR)
            .and(What::ENTRIES);
        Self { stream, what }
    }
}

/// The part of a command's effects that concerns one inode.
#[derive(Default, Clone)]
struct Effect {
    attr: bool,
    content: bool,
    xattr: bool,
    names: Vec<Bytes>,
}

/// What one command touched, by inode. A command touches a handful, so a list is searched faster than a map.
#[derive(Default, Clone)]
pub struct Effects(Vec<(u64, Effect)>);

impl Effects {
    /// Gathers by inode.
    pub fn of(touched: &[Touched]) -> Self {
        let mut effects = Self::default();
        for touched in touched {
            match touched {
                Touched::Inode {
                    ino,
                    attr,
                    content,
                    xattr,
                } => {
                    let effect = effects.entry(ino.0);
                    effect.attr |= attr;
                    effect.content |= content;
                    effect.xattr |= xattr;
                }
                Touched::Entry { parent, name } => effects.entry(parent.0).names.push(name.clone()),
            }
        }
        effects
    }

    /// The inodes.
    pub fn inos(&self) -> impl Iterator<Item = u64> {
        self.0.iter().map(|(ino, _)| *ino)
    }

    fn entry(&mut self, ino: u64) -> &mut Effect {
        let at = self
            .0
            .iter()
            .position(|(known, _)| *known == ino)
            .unwrap_or_else(|| {
                self.0.push((ino, Effect::default()));
                self.0.len() - 1
            });
        &mut self.0[at].1
    }
}

/// Who was told what, of one volume.
pub struct Interest {
    inodes: LruCache<u64, Vec<Holder>>,
    streams: HashSet<StreamId>,
    /// Streams that are sent every change until then.
    followers: Vec<(StreamId, Instant)>,
}

/// Each time an inode's holders reach a multiple of this, those whose stream ended are dropped.
const PRUNE_EVERY: usize = 64;

impl Interest {
    /// Remembers at most `inodes_max` inodes.
    pub fn new(inodes_max: NonZeroUsize) -> Self {
        // Not `LruCache::new`, which allocates for the bound at once.
        let mut inodes = LruCache::unbounded();
        inodes.resize(inodes_max);
        Self {
            inodes,
            streams: HashSet::new(),
            followers: Vec::new(),
        }
    }

    /// A stream begins.
    pub fn begin(&mut self, stream: StreamId) {
        self.streams.insert(stream);
    }

    /// The stream is sent every change until then, whether it was told or not.
    pub fn follow_all(&mut self, stream: StreamId, until: Instant) {
        self.followers.push((stream, until));
    }

    /// A stream ended. What it was told is dropped when it is met: walking through all inodes would hold up everybody.
    pub fn end(&mut self, stream: StreamId) {
        self.streams.remove(&stream);
        self.followers.retain(|(follower, _)| *follower != stream);
    }

    /// `stream` is told. What has to be forgotten for it is invalidated through `send`.
    pub fn tell(
        &mut self,
        stream: StreamId,
        told: Told,
        mut send: impl FnMut(StreamId, v1::Invalidation),
    ) {
        if let Some(holders) = self.inodes.get_mut(&told.ino) {
            match holders.iter_mut().find(|holder| holder.stream == stream) {
                Some(holder) => holder.what = holder.what.and(told.what),
                None => {
                    if holders.len() % PRUNE_EVERY == 0 {
                        holders.retain(|holder| self.streams.contains(&holder.stream));
                    }
                    holders.push(Holder {
                        stream,
                        what: told.what,
                    });
                }
            }
            return;
        }
        let holders = vec![Holder {
            stream,
            what: told.what,
        }];
        if let Some((ino, holders)) = self.inodes.push(told.ino, holders) {
            for holder in holders {
                if self.streams.contains(&holder.stream) {
                    send(holder.stream, everything(ino, holder.what));
                }
            }
        }
    }

    /// Sends invalidations of a command's effects to all streams but `by`, which made the change. `crowded` streams are sent
    /// "all names" once instead of name after name, so that the queue of a client that does not read stays bounded.
    pub fn change(
        &mut self,
        by: Option<StreamId>,
        effects: &Effects,
        now: Instant,
        crowded: impl Fn(StreamId) -> bool,
        mut send: impl FnMut(StreamId, v1::Invalidation),
    ) {
        self.followers.retain(|(_, until)| now < *until);
        for (ino, effect) in &effects.0 {
            for (stream, _) in &self.followers {
                if Some(*stream) != by
                    && let Some(message) =
                        invalidate(*ino, effect, &mut Holder::of_all(*stream), crowded(*stream))
                {
                    send(*stream, message);
                }
            }
            let Some(holders) = self.inodes.peek_mut(ino) else {
                continue;
            };
            holders.retain_mut(|holder| {
                if !self.streams.contains(&holder.stream) {
                    return false;
                }
                if Some(holder.stream) != by
                    && let Some(message) = invalidate(*ino, effect, holder, crowded(holder.stream))
                    && !self
                        .followers
                        .iter()
                        .any(|(follower, _)| *follower == holder.stream)
                {
                    send(holder.stream, message);
                }
                holder.what != What::default()
            });
            if holders.is_empty() {
                self.inodes.pop(ino);
            }
        }
    }

    /// Attributes and content of a file are to be asked for anew by everybody but `by`. They stay told: an answer that is on its
    /// way may be taken for newer than this, and is corrected by the change that comes.
    pub fn outdate(
        &mut self,
        ino: u64,
        by: Option<StreamId>,
        mut send: impl FnMut(StreamId, v1::Invalidation),
    ) {
        let effect = Effect {
            attr: true,
            content: true,
            ..Effect::default()
        };
        let followers = self
            .followers
            .iter()
            .map(|(stream, _)| (*stream, Holder::of_all(*stream).what));
        let holders = self.inodes.peek(&ino).into_iter().flatten();
        let holders = holders.map(|holder| (holder.stream, holder.what));
        for (stream, what) in followers.chain(holders) {
            if Some(stream) != by
                && self.streams.contains(&stream)
                && let Some(message) = invalidate(ino, &effect, &mut Holder { stream, what }, false)
            {
                send(stream, message);
            }
        }
    }

    /// As [`Interest::change`], for one stream only: a change that happened between a read and the moment when its answer is
    /// told.
    pub fn change_for(
        &mut self,
        stream: StreamId,
        effects: &Effects,
        mut send: impl FnMut(v1::Invalidation),
    ) {
        for (ino, effect) in &effects.0 {
            let Some(holders) = self.inodes.peek_mut(ino) else {
                continue;
            };
            let holder = holders.iter_mut().find(|holder| holder.stream == stream);
            if let Some(message) = holder.and_then(|holder| invalidate(*ino, effect, holder, false))
            {
                send(message);
            }
            holders.retain(|holder| holder.what != What::default());
            if holders.is_empty() {
                self.inodes.pop(ino);
            }
        }
    }

    /// Number of inodes that somebody was told about.
    pub fn len(&self) -> usize {
        self.inodes.len()
    }

    /// Nobody was told anything.
    pub fn is_empty(&self) -> bool {
        self.inodes.is_empty()
    }
}

/// All that a holder was told about an inode.
pub fn everything(ino: u64, what: What) -> v1::Invalidation {
    v1::Invalidation {
        position: None,
        ino,
        attr: what.has(What::ATTR),
        content: what.has(What::CONTENT),
        names: Vec::new(),
        all_names: what.has(What::ENTRIES),
        xattr: what.has(What::XATTR),
    }
}

fn invalidate(
    ino: u64,
    effect: &Effect,
    holder: &mut Holder,
    crowded: bool,
) -> Option<v1::Invalidation> {
    let what = holder.what;
    let names = what.has(What::ENTRIES) && !effect.names.is_empty();
    let message = v1::Invalidation {
        position: None,
        ino,
        attr: effect.attr && what.has(What::ATTR),
        content: effect.content && what.has(What::CONTENT),
        names: if names && !crowded {
            effect.names.clone()
        } else {
            Vec::new()
        },
        all_names: names && crowded,
        xattr: effect.xattr && what.has(What::XATTR),
    };
    let mut clear = |sent: bool, bit: What| {
        if sent {
            holder.what.0 &= !bit.0;
        }
    };
    clear(message.attr, What::ATTR);
    clear(message.content, What::CONTENT);
    clear(message.xattr, What::XATTR);
    clear(message.all_names, What::ENTRIES);
    (message.attr || message.content || message.xattr || names).then_some(message)
}

#[cfg(test)]
mod tests {
    use heliofs_proto::ids::Ino;

    use super::*;

    fn interest(inodes_max: usize) -> Interest {
        let mut interest = Interest::new(NonZeroUsize::new(inodes_max).unwrap());
        (1..=3).for_each(|stream| interest.begin(stream));
        interest
    }

    fn tell(
        interest: &mut Interest,
        stream: StreamId,
        ino: u64,
        what: What,
    ) -> Vec<(StreamId, u64)> {
        let mut sent = Vec::new();
        interest.tell(stream, Told { ino, what }, |stream, message| {
            sent.push((stream, message.ino))
        });
        sent
    }

    fn change(
        interest: &mut Interest,
        by: Option<StreamId>,
        touched: &[Touched],
    ) -> Vec<(StreamId, v1::Invalidation)> {
        let mut sent = Vec::new();
        interest.change(
            by,
            &Effects::of(touched),
            Instant::now(),
            |_| false,
            |stream, message| {
                sent.push((stream, message));
            },
        );
        sent
    }

    fn attr(ino: u64) -> Touched {
        Touched::Inode {
            ino: Ino(ino),
            attr: true,
            content: false,
            xattr: false,
        }
    }

    fn entry(parent: u64, name: &'static str) -> Touched {
        Touched::Entry {
            parent: Ino(parent),
            name: Bytes::from(name),
        }
    }

    #[test]
    fn only_others_who_were_told_are_invalidated_and_only_once() {
        let mut interest = interest(10);
        tell(&mut interest, 1, 7, What::ATTR);
        tell(&mut interest, 2, 7, What::ATTR);
        tell(&mut interest, 3, 7, What::XATTR);
        let sent = change(&mut interest, Some(1), &[attr(7)]);
        assert_eq!(sent.len(), 1);
        assert_eq!(sent[0].0, 2);
        assert!(sent[0].1.attr && !sent[0].1.content && !sent[0].1.xattr);
        assert!(change(&mut interest, Some(1), &[attr(7)]).is_empty());
        tell(&mut interest, 2, 7, What::ATTR);
        let sent = change(&mut interest, None, &[attr(7)]);
        assert_eq!(
            sent.iter().map(|(stream, _)| *stream).collect::<Vec<_>>(),
            [1, 2]
        );
    }

    #[test]
    fn a_resumed_stream_hears_of_everything_for_a_while() {
        let mut interest = interest(10);
        let now = Instant::now();
        let until = now + std::time::Duration::from_secs(1);
        interest.follow_all(1, until);
        interest.follow_all(2, until);
        tell(&mut interest, 1, 7, What::ATTR);
        let heard = |interest: &mut Interest, by, now| {
            let mut sent = Vec::new();
            let effects = Effects::of(&[attr(7), entry(5, "a")]);
            interest.change(
                by,
                &effects,
                now,
                |_| false,
                |stream, message| {
                    sent.push((stream, message.ino));
                },
            );
            sent
        };
        let sent = heard(&mut interest, Some(2), now);
        assert_eq!(sent, [(1, 7), (1, 5)], "once each, and not by its own");
        interest.end(2);
        assert_eq!(heard(&mut interest, None, now), [(1, 7), (1, 5)]);
        assert_eq!(heard(&mut interest, None, until), []);
    }

    #[test]
    fn interest_in_entries_outlives_the_invalidation_of_one_name() {
        let mut interest = interest(10);
        tell(&mut interest, 1, 5, What::ENTRIES);
        for name in ["a", "b"] {
            let sent = change(&mut interest, None, &[entry(5, name), attr(5)]);
            assert_eq!(sent.len(), 1);
            assert_eq!(sent[0].1.names, [name]);
            assert!(!sent[0].1.attr);
        }
        let mut sent = Vec::new();
        let effects = Effects::of(&[entry(5, "c")]);
        let now = Instant::now();
        interest.change(
            None,
            &effects,
            now,
            |_| true,
            |_, message| {
                sent.push(message);
            },
        );
        assert!(sent[0].all_names && sent[0].names.is_empty());
        assert!(change(&mut interest, None, &[entry(5, "d")]).is_empty());
        assert!(interest.is_empty());
    }

    #[test]
    fn what_is_forgotten_for_lack_of_room_is_invalidated() {
        let mut interest = interest(2);
        assert_eq!(tell(&mut interest, 1, 10, What::ATTR), []);
        assert_eq!(tell(&mut interest, 2, 10, What::ENTRIES), []);
        assert_eq!(tell(&mut interest, 1, 11, What::ATTR), []);
        assert_eq!(tell(&mut interest, 1, 12, What::ATTR), [(1, 10), (2, 10)]);
        assert_eq!(tell(&mut interest, 1, 11, What::ATTR), []);
        assert_eq!(tell(&mut interest, 1, 13, What::ATTR), [(1, 12)]);
        assert_eq!(interest.len(), 2);
    }

    #[test]
    fn a_stream_that_ended_is_sent_nothing_and_forgotten() {
        let mut interest = interest(10);
        tell(&mut interest, 1, 7, What::ATTR);
        interest.end(1);
        assert!(change(&mut interest, None, &[attr(7)]).is_empty());
        assert!(interest.is_empty());
    }

    #[test]
    fn a_late_answer_is_followed_up_for_its_stream_alone() {
        let mut interest = interest(10);
        tell(&mut interest, 1, 7, What::ATTR.and(What::CONTENT));
        tell(&mut interest, 2, 7, What::ATTR);
        let mut sent = Vec::new();
        interest.change_for(1, &Effects::of(&[attr(7)]), |message| sent.push(message));
        assert_eq!(sent.len(), 1);
        assert!(sent[0].attr && !sent[0].content);
        assert_eq!(change(&mut interest, None, &[attr(7)]).len(), 1);
    }
}

//! Listings: pages of a directory by cookie, correct while it changes.
//!
//! Pages are fetched ahead of what the kernel takes; before an entry is handed out it is compared with what has changed since
//! its page was read, and the rest of the page is fetched anew if it did. Otherwise an entry that was removed meanwhile would
//! come back to life in the kernel's cache.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, Position};
use heliofs_proto::v1;
use meta_client::ClientError;
use parking_lot::Mutex;

use super::{Entry, Fs};
use crate::ahead;
use crate::errno::FsResult;
use crate::meta_cache::Generation;

/// Entries of the first page of a listing, and of the largest: a small directory should not wait for a large page.
const PAGE_MIN: u32 = 128;
const PAGE_MAX: u32 = 2048;

/// Attempts to get a page that nothing has changed since it was read.
const FETCHES_MAX: usize = 8;

/// Files whose attributes are asked for one by one, at the same time.
const ASKED_AT_ONCE: usize = 64;

/// An open directory.
#[derive(Debug)]
pub struct DirHandle {
    /// The directory.
    pub ino: u64,
    listing: tokio::sync::Mutex<Listing>,
    changes: Mutex<Changes>,
}

#[derive(Debug)]
struct Listing {
    buffer: VecDeque<v1::DirEntry>,
    /// Position and cache generation of `buffer`.
    at: Position,
    generation: Generation,
    /// With attributes.
    plus: bool,
    /// Cookie of the entry before the buffer's first.
    before: u64,
    /// Nothing follows the buffer.
    end: bool,
    page_entries: u32,
    /// A listing from the start without gaps: what [`crate::meta_cache::MetaCache::listing`] gave.
    whole: Option<(Generation, u64)>,
}

/// What changed since the buffer was filled.
#[derive(Debug, Default)]
struct Changes {
    names: HashMap<Bytes, Position>,
    all: Position,
    forgotten: bool,
}

/// An entry of a listing.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Name.
    pub name: Bytes,
    /// Inode.
    pub ino: u64,
    /// Kind.
    pub kind: v1::FileKind,
    /// Where to go on after it.
    pub cookie: u64,
    /// Its attributes, if they were asked for.
    pub entry: Option<Entry>,
}

/// What has become of an entry since its page was read.
enum Current {
    /// It is this.
    Is(Listed),
    /// It is no more.
    Gone,
    /// The page must be read anew.
    Outdated,
}

impl DirHandle {
    /// A name of the directory changed at `at`; `None`: any.
    pub fn changed(&self, name: Option<&Bytes>, at: Position) {
        let mut changes = self.changes.lock();
        match name {
            Some(name) => {
                let newest = changes.names.entry(name.clone()).or_insert(at);
                *newest = at.max(*newest);
            }
            None => changes.all = changes.all.max(at),
        }
    }

    /// Everything may have changed.
    pub fn forget(&self) {
        self.changes.lock().forgotten = true;
    }

    fn is_stale(&self, name: &Bytes, at: Position) -> bool {
        let changes = self.changes.lock();
        changes.forgotten
            || changes.all > at
            || changes.names.get(name).is_some_and(|changed| *changed > at)
    }
}

impl Fs {
    /// Opens a directory.
    pub fn open_dir(&self, ino: u64) -> u64 {
        let handle = Arc::new(DirHandle {
            ino,
            listing: tokio::sync::Mutex::new(Listing {
                buffer: VecDeque::new(),
                at: Position::START,
                generation: self.coherence.cache.generation(),
                plus: false,
                before: 0,
                end: false,
                page_entries: PAGE_MIN,
                whole: None,
            }),
            changes: Mutex::default(),
        });
        self.coherence.dir_opened(&handle);
        self.dirs.insert(handle)
    }

    /// Closes a directory.
    pub fn release_dir(&self, handle: u64) -> FsResult<()> {
        let handle = self.dirs.remove(handle)?;
        self.coherence.dir_closed(&handle);
        Ok(())
    }

    /// The parent of a directory, for its entry `..`.
    pub async fn parent_of(&self, ino: u64) -> FsResult<u64> {
        if ino == Ino::ROOT.0 {
            return Ok(ino);
        }
        Ok(self.get_attr(ino).await?.attr.parent)
    }

    /// Up to `entries_max` entries after cookie `after`; empty at the end. `after` below 3 starts anew.
    pub async fn read_dir(
        &self,
        handle: u64,
        after: u64,
        entries_max: usize,
        plus: bool,
    ) -> FsResult<Vec<Listed>> {
        let handle = self.dirs.get(handle)?;
        let mut listing = handle.listing.lock().await;
        self.go_to(&handle, &mut listing, after, plus);
        let mut listed = Vec::with_capacity(entries_max.min(256));
        let mut fetches = 0;
        let mut next = 0;
        loop {
            while listed.len() < entries_max
                && let Some(entry) = listing.buffer.get(next)
            {
                match self.current(&handle, &listing, entry) {
                    Current::Is(entry) => listed.push(entry),
                    Current::Gone => {}
                    Current::Outdated if fetches < FETCHES_MAX => break,
                    // It changes all the time; what was read is as true as anything else could be.
                    Current::Outdated => listed.push(self.as_read(&listing, entry)),
                }
                next += 1;
            }
            // Half an answer now is better than a full one later.
            let exhausted = listing.end && next >= listing.buffer.len();
            if !listed.is_empty() || exhausted {
                return Ok(listed);
            }
            // Nothing of the buffer could be used.
            let from = if next == 0 {
                listing.before
            } else {
                listing.buffer[next - 1].cookie
            };
            self.fetch(&handle, &mut listing, from, plus).await?;
            fetches += 1;
            next = 0;
        }
    }

    /// Brings the buffer to the entry after `after`, if it is in there.
    fn go_to(&self, handle: &DirHandle, listing: &mut Listing, after: u64, plus: bool) {
        // 1 and 2 are `.` and `..`.
        let after = if after < 3 { 0 } else { after };
        while let Some(front) = listing.buffer.front()
            && front.cookie <= after
        {
            listing.before = front.cookie;
            listing.buffer.pop_front();
        }
        if after == 0 {
            let cache = &self.coherence.cache;
            listing.whole = Some((cache.generation(), cache.listing(handle.ino)));
            listing.page_entries = PAGE_MIN;
        } else if listing.before != after {
            listing.whole = None;
        } else if !plus || listing.plus {
            return;
        }
        listing.buffer.clear();
        listing.before = after;
        listing.end = false;
    }

    /// Fills the buffer with the page after cookie `from`.
    async fn fetch(
        &self,
        handle: &DirHandle,
        listing: &mut Listing,
        from: u64,
        plus: bool,
    ) -> FsResult<()> {
        self.settled(&[handle.ino]).await?;
        let cache = &self.coherence.cache;
        let generation = cache.generation();
        handle.changes.lock().forgotten = false;
        let (ino, entries) = (Ino(handle.ino), listing.page_entries);
        let (mut page, at) = self
            .ask(|session| async move { session.read_dir(ino, from, entries, plus).await })
            .await?;
        if plus {
            self.ask_writers(&mut page).await?;
        }
        self.keep_page(generation, handle.ino, &page, at);
        handle
            .changes
            .lock()
            .names
            .retain(|_, changed| *changed > at);
        listing.page_entries = (listing.page_entries * 4).min(PAGE_MAX);
        listing.buffer = page.entries.into();
        listing.before = from;
        listing.at = at;
        listing.generation = generation;
        listing.plus = plus;
        listing.end = page.end;
        if page.end
            && let Some((generation, began)) = listing.whole.take()
        {
            cache.listed(generation, handle.ino, began);
        }
        Ok(())
    }

    /// A page has no attributes of files that another mount holds back data of: asking for one makes it come forth. Files that
    /// are gone by then leave the page.
    async fn ask_writers(&self, page: &mut v1::DirPage) -> FsResult<()> {
        let session = self.session();
        let missing: Vec<u64> = page
            .entries
            .iter()
            .filter(|entry| entry.attr.is_none())
            .map(|entry| entry.ino)
            .collect();
        let mut asked = futures::stream::iter(missing)
            .map(|ino| {
                let session = session.clone();
                async move { (ino, session.get_attr(Ino(ino)).await) }
            })
            .buffer_unordered(ASKED_AT_ONCE);
        let mut answers = HashMap::new();
        while let Some((ino, answer)) = asked.next().await {
            match answer {
                Ok((attr, _)) => answers.insert(ino, attr),
                Err(ClientError::Verdict(FsError::Stale | FsError::NotFound)) => None,
                Err(error) => return Err(error.into()),
            };
        }
        page.entries.retain_mut(|entry| {
            entry.attr = entry.attr.or_else(|| answers.get(&entry.ino).copied());
            entry.attr.is_some()
        });
        Ok(())
    }

    /// The entry as it is now.
    fn current(&self, handle: &DirHandle, listing: &Listing, entry: &v1::DirEntry) -> Current {
        let mut listed = self.as_read(listing, entry);
        let known = {
            let state = self.coherence.ahead.lock();
            let known = state.listed(handle.ino, &entry.name, entry.ino);
            known.map(|known| (known, state.at()))
        };
        if let Some(((what, attr), at)) = known {
            match what {
                ahead::Listed::Same => {}
                ahead::Listed::Moved => return Current::Outdated,
                ahead::Listed::Gone => return Current::Gone,
            }
            if let (Some(shown), Some(attr)) = (&mut listed.entry, attr) {
                (shown.attr, shown.at) = (self.show(attr), at);
                return Current::Is(listed);
            }
        } else if handle.is_stale(&entry.name, listing.at) {
            return Current::Outdated;
        }
        if let Some(shown) = &mut listed.entry {
            match self.coherence.cache.newer_attr(entry.ino, listing.at) {
                Ok(Some(newer)) => shown.attr = self.show(newer),
                // Not for the kernel to keep: changes of it may be under way.
                Ok(None) if known.is_some() => shown.at = Position::START,
                Ok(None) => {}
                Err(_) if known.is_some() => shown.at = Position::START,
                Err(_) => return Current::Outdated,
            }
        }
        Current::Is(listed)
    }

    fn as_read(&self, listing: &Listing, entry: &v1::DirEntry) -> Listed {
        Listed {
            name: entry.name.clone(),
            ino: entry.ino,
            kind: entry.kind(),
            cookie: entry.cookie,
            entry: entry.attr.map(|attr| Entry {
                attr: self.show(attr),
                at: listing.at,
                generation: listing.generation,
            }),
        }
    }
}

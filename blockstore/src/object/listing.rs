//! [`Listing`]: the keys of a bucket in the order of their bytes, page by page, also from servers that list otherwise.
//!
//! S3 lists keys in the order of their bytes: `d-x`, `d.txt`, `d/a`. Servers that keep directories (SeaweedFS) go through the
//! tree, which is the order of bytes with `/` before all others: `d/a`, `d-x`, `d.txt`. Two listings can only be merged in one
//! order. So: where a directory begins, and siblings that belong before it follow behind it, it is put off until they have
//! passed. Whether such siblings follow is seen in the same page, or asked with one small request for each directory that does
//! not end within its page. On servers in the order of bytes none ever follow.

use std::cmp::Ordering;
use std::collections::VecDeque;

use async_trait::async_trait;

use super::plain::PlainObject;
use crate::StoreError;

/// Behind every key of a directory, in both orders: the last code point.
const LAST: char = '\u{10FFFF}';

/// Where a listing begins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct From {
    /// A key, of an object or not.
    pub key: String,
    /// Whether the key itself belongs to it.
    pub inclusive: bool,
}

/// Some keys, as the server orders them.
#[derive(Debug, Default)]
pub(super) struct Page {
    pub(super) objects: Vec<PlainObject>,
    /// For the next page, if there is one.
    pub(super) token: Option<String>,
}

/// A server that lists.
#[async_trait]
pub(super) trait Pager: Send + Sync {
    /// Keys that begin with `prefix`, behind `after`, or behind the page that gave `token`. `max`: at most so many; 0 leaves it
    /// to the server.
    async fn page(
        &self,
        prefix: &str,
        after: Option<&str>,
        token: Option<&str>,
        max: usize,
    ) -> Result<Page, StoreError>;
}

/// A part of the tree that is being listed, as the server orders it.
#[derive(Debug, Default)]
struct Frame {
    prefix: String,
    /// Where the next request begins, unless there is a token.
    after: Option<String>,
    token: Option<String>,
    buffer: VecDeque<PlainObject>,
    /// Nothing follows behind the buffer.
    ended: bool,
    /// Directories above this key have been looked at.
    previous: String,
    /// Directories that come as soon as the siblings that belong before them have passed; the innermost last.
    deferred: Vec<Deferred>,
}

#[derive(Debug)]
struct Deferred {
    /// Ends with `/`.
    directory: String,
    /// Its objects, when one page had them all.
    objects: Option<VecDeque<PlainObject>>,
}

impl Deferred {
    /// Whether `key` belongs before the directory and follows behind it in the order of the tree.
    fn waits_for(&self, key: &str) -> bool {
        belongs_before(&self.directory, key)
    }

    fn into_frame(self) -> Frame {
        Frame {
            ended: self.objects.is_some(),
            buffer: self.objects.unwrap_or_default(),
            previous: self.directory.clone(),
            prefix: self.directory,
            ..Frame::default()
        }
    }
}

/// `d-x` belongs before `d/`.
fn belongs_before(directory: &str, key: &str) -> bool {
    let stem = directory.trim_end_matches('/');
    key.strip_prefix(stem)
        .and_then(|rest| rest.bytes().next())
        .is_some_and(|byte| byte < b'/')
}

/// The order of the tree: that of bytes with `/` before all others.
fn by_tree(a: &str, b: &str) -> Ordering {
    let rank = |byte: u8| if byte == b'/' { 0 } else { byte };
    a.bytes().map(rank).cmp(b.bytes().map(rank))
}

/// Before `key` and behind nearly all that come before it, in both orders.
fn predecessor(key: &str) -> Option<String> {
    let last = key.chars().last()?;
    let mut before = key[..key.len() - last.len_utf8()].to_owned();
    match char::from_u32(u32::from(last).saturating_sub(1)) {
        // No server likes an empty name of a directory.
        Some('/') => before.extend(['.', LAST]),
        Some(less) => before.extend([less, LAST]),
        // All that is between comes along, and is dropped.
        None => {}
    }
    Some(before).filter(|before| !before.is_empty())
}

/// See the module.
pub(super) struct Listing<P> {
    pager: P,
    frames: Vec<Frame>,
    from: Option<From>,
    last: Option<String>,
    /// The server is known to list in the order of bytes.
    bytewise: bool,
}

impl<P: Pager> Listing<P> {
    /// Keys that begin with `prefix` (empty, or ending with `/`), from `from` on, which begins with it.
    pub(super) fn new(pager: P, prefix: &str, from: Option<From>, bytewise: bool) -> Self {
        let mut frame = Frame {
            prefix: prefix.to_owned(),
            previous: prefix.to_owned(),
            ..Frame::default()
        };
        if let Some(From { key, inclusive }) = &from {
            frame.after = match inclusive {
                true => predecessor(key).filter(|before| before.len() > prefix.len()),
                false => Some(key.clone()),
            };
            frame.previous.clone_from(key);
            // Directories that lie behind `from` in the order of bytes, and before it in that of the tree.
            frame.deferred = key
                .bytes()
                .enumerate()
                .skip(prefix.len())
                .filter(|(at, byte)| *byte < b'/' && *at > prefix.len() && !bytewise)
                .filter(|(at, _)| !key[..*at].ends_with('/'))
                .map(|(at, _)| Deferred {
                    directory: format!("{}/", &key[..at]),
                    objects: None,
                })
                .collect();
        }
        Self {
            pager,
            frames: vec![frame],
            from,
            last: None,
            bytewise,
        }
    }

    /// The next object; `None` at the end.
    ///
    /// Errors: those of the server; `Invalid` when it keeps neither order.
    pub(super) async fn next(&mut self) -> Result<Option<PlainObject>, StoreError> {
        while let Some(object) = self.step().await? {
            let key = &object.key;
            let early = self.from.as_ref().is_some_and(|from| match from.inclusive {
                true => *key < from.key,
                false => *key <= from.key,
            });
            if early {
                continue;
            }
            if self.last.as_ref().is_some_and(|last| last >= key) {
                // `d/`, an empty object that stands for a directory, has lost its slash on the way.
                if object.bytes == 0 {
                    continue;
                }
                return Err(StoreError::Invalid(format!(
                    "the server lists `{key}` behind `{}`: that is neither the order of bytes nor that of a tree",
                    self.last.as_deref().unwrap_or_default()
                )));
            }
            self.last = Some(object.key.clone());
            return Ok(Some(object));
        }
        Ok(None)
    }

    async fn step(&mut self) -> Result<Option<PlainObject>, StoreError> {
        loop {
            let Some(frame) = self.frames.last_mut() else {
                return Ok(None);
            };
            if frame.buffer.is_empty() && !frame.ended {
                let page = self
                    .pager
                    .page(
                        &frame.prefix,
                        frame.after.as_deref(),
                        frame.token.as_deref(),
                        0,
                    )
                    .await?;
                frame.buffer = page.objects.into();
                frame.ended = page.token.is_none();
                frame.token = page.token;
                continue;
            }
            let key = frame.buffer.front().map(|object| object.key.clone());
            if let Some(deferred) = frame.deferred.last()
                && !key.as_deref().is_some_and(|key| deferred.waits_for(key))
            {
                let deferred = frame.deferred.pop().expect("it was there a line before");
                // Put off only because the listing began in the middle; the server has it here itself.
                let here = key.is_some_and(|key| key.starts_with(&deferred.directory));
                if !here {
                    self.frames.push(deferred.into_frame());
                }
                continue;
            }
            let Some(key) = key else {
                self.frames.pop();
                continue;
            };
            if !self.bytewise {
                let previous = &frame.previous;
                self.bytewise = *previous < key && by_tree(previous, &key) == Ordering::Greater;
            }
            if !self.bytewise && put_off(&self.pager, frame, &key).await? {
                continue;
            }
            frame.previous = key;
            return Ok(frame.buffer.pop_front());
        }
    }
}

/// Puts a directory off that begins with `key`, the first of the buffer, if it must be.
async fn put_off<P: Pager>(pager: &P, frame: &mut Frame, key: &str) -> Result<bool, StoreError> {
    let slashes = key
        .bytes()
        .enumerate()
        .skip(frame.prefix.len())
        .filter(|(_, byte)| *byte == b'/');
    for (slash, _) in slashes {
        let directory = &key[..=slash];
        if frame.previous.starts_with(directory) {
            continue;
        }
        let inside = frame
            .buffer
            .iter()
            .take_while(|object| object.key.starts_with(directory))
            .count();
        let behind = match frame.buffer.get(inside) {
            Some(object) => Some(object.key.clone()),
            None if frame.ended => None,
            None => {
                let end = format!("{directory}{LAST}");
                let page = pager.page(&key[..slash], Some(&end), None, 1).await?;
                page.objects.into_iter().next().map(|object| object.key)
            }
        };
        if !behind.is_some_and(|behind| belongs_before(directory, &behind)) {
            continue;
        }
        let whole = inside < frame.buffer.len();
        let objects = frame.buffer.drain(..inside).collect();
        frame.deferred.push(Deferred {
            directory: directory.to_owned(),
            objects: whole.then_some(objects),
        });
        if !whole {
            frame.after = Some(format!("{directory}{LAST}"));
            frame.token = None;
            frame.ended = false;
        }
        key.clone_into(&mut frame.previous);
        return Ok(true);
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use proptest::prelude::*;

    use super::*;

    /// Lists in one of the orders, in pages of `page` keys.
    struct Server {
        keys: Vec<String>,
        tree: bool,
        page: usize,
        requests: AtomicUsize,
    }

    impl Server {
        fn new(keys: &BTreeSet<String>, tree: bool, page: usize) -> Self {
            let mut keys: Vec<_> = keys.iter().cloned().collect();
            if tree {
                keys.sort_by(|a, b| by_tree(a, b));
            }
            Self {
                keys,
                tree,
                page,
                requests: AtomicUsize::new(0),
            }
        }

        fn order(&self, a: &str, b: &str) -> Ordering {
            match self.tree {
                true => by_tree(a, b),
                false => a.cmp(b),
            }
        }
    }

    #[async_trait]
    impl Pager for &Server {
        async fn page(
            &self,
            prefix: &str,
            after: Option<&str>,
            token: Option<&str>,
            max: usize,
        ) -> Result<Page, StoreError> {
            self.requests.fetch_add(1, Relaxed);
            let after = token.or(after);
            let max = if max == 0 { self.page } else { max };
            let mut found: Vec<_> = self
                .keys
                .iter()
                .filter(|key| key.starts_with(prefix))
                .filter(|key| after.is_none_or(|after| self.order(after, key).is_lt()))
                .take(max + 1)
                .map(|key| PlainObject {
                    key: key.clone(),
                    bytes: 1,
                    modified: 0,
                })
                .collect();
            let more = found.len() > max;
            found.truncate(max);
            Ok(Page {
                token: more.then(|| found[max - 1].key.clone()),
                objects: found,
            })
        }
    }

    async fn list(server: &Server, prefix: &str, from: Option<From>) -> Vec<String> {
        let mut listing = Listing::new(server, prefix, from, false);
        let mut keys = Vec::new();
        while let Some(object) = listing.next().await.unwrap() {
            keys.push(object.key);
        }
        keys
    }

    fn run(server: &Server, prefix: &str, from: Option<From>) -> Vec<String> {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.build().unwrap();
        runtime.block_on(list(server, prefix, from))
    }

    fn keys(text: &str) -> BTreeSet<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn a_tree_comes_in_the_order_of_bytes() {
        let keys = keys("d d/a d/b d-x d-x/y d.txt d0 e/f e/f/g e/f-x z");
        for page in 1..12 {
            let server = Server::new(&keys, true, page);
            assert_ne!(server.keys, Vec::from_iter(keys.clone()));
            assert_eq!(run(&server, "", None), Vec::from_iter(keys.clone()));
        }
    }

    #[test]
    fn a_server_in_the_order_of_bytes_is_hardly_asked_more() {
        let keys: BTreeSet<_> = (0..1000)
            .map(|n| format!("v/c-{}/{n:04}", n / 100))
            .collect();
        let server = Server::new(&keys, false, 100);
        assert_eq!(run(&server, "v/", None).len(), 1000);
        let requests = server.requests.load(Relaxed);
        assert!((10..=20).contains(&requests), "{requests}");
    }

    #[test]
    fn neither_order_is_an_error() {
        let mut server = Server::new(&keys("a b c"), false, 10);
        server.keys.reverse();
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let listed = runtime.unwrap().block_on(async {
            let mut listing = Listing::new(&server, "", None, false);
            listing.next().await.unwrap();
            listing.next().await
        });
        assert!(listed.unwrap_err().to_string().contains("order"));
    }

    fn key() -> impl Strategy<Value = String> {
        let part = proptest::collection::vec(
            prop::sample::select(vec!['a', 'b', '!', '-', '0', 'é']),
            1..4,
        )
        .prop_map(|chars| chars.into_iter().collect::<String>());
        proptest::collection::vec(part, 1..4).prop_map(|parts| parts.join("/"))
    }

    proptest! {
        #[test]
        fn every_listing_is_in_the_order_of_bytes(
            names in proptest::collection::btree_set(key(), 0..40),
            tree: bool,
            page in 1usize..9,
            from in proptest::option::of((key(), any::<bool>())),
            below: bool,
        ) {
            let prefix = if below { "p-q/" } else { "" };
            let inside = names.iter().map(|name| format!("{prefix}{name}"));
            let mut keys: BTreeSet<String> = inside.collect();
            let from = from.map(|(key, inclusive)| From { key: format!("{prefix}{key}"), inclusive });
            let expected: Vec<_> = keys.iter().filter(|key| match &from {
                None => true,
                Some(from) if from.inclusive => **key >= from.key,
                Some(from) => **key > from.key,
            }).cloned().collect();
            if below {
                keys.extend(["p".to_owned(), "p-q-r".to_owned(), "p/x".to_owned(), "z".to_owned()]);
            }
            let server = Server::new(&keys, tree, page);
            prop_assert_eq!(run(&server, prefix, from), expected);
        }
    }
}

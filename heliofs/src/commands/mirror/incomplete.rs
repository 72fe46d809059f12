//! Which files of a mirror refer to objects that are not in its own bucket.

use std::collections::BTreeSet;

use futures::{StreamExt, TryStreamExt};
use heliofs_proto::ids::Ino;
use meta_client::{ClientError, Session};

use crate::commands::segments;
use crate::connect::Target;
use crate::failure::Outcome;
use crate::output;

/// Files whose names are looked for, and told in JSON.
const NAMED_MAX: usize = 10_000;

/// Files whose names people are shown.
const SHOWN_MAX: usize = 20;

/// Questions about files under way at once.
const ASKED_AT_ONCE: usize = 32;

/// Segments that are asked for by id; with more, all extents are asked for and looked through here.
const ASKED_BY_ID_MAX: usize = 2000;

/// Files that can't be read whole without the other bucket.
#[derive(Debug, Default)]
pub(super) struct Incomplete {
    /// How many. Up to [`NAMED_MAX`] without those that were removed and are still open somewhere.
    pub(super) files: u64,
    /// Paths of the first of them, by inode.
    pub(super) names: Vec<String>,
}

impl Incomplete {
    /// Looks for all of them, in pages: one pass over the volume's extents.
    pub(super) async fn find(target: &Target) -> Outcome<Self> {
        let mut missing = BTreeSet::new();
        let mut after = Some(0);
        while let Some(from) = after {
            let page = target
                .cluster
                .list_missing(&target.volume, false, from)
                .await?;
            missing.extend(page.0.iter().map(|listed| listed.segment));
            after = page.1;
        }
        if missing.is_empty() {
            return Ok(Self::default());
        }
        let session = target.session(true).await?;
        let found = Self::of(&session, &missing).await;
        session.detach().await;
        found
    }

    async fn of(session: &Session, missing: &BTreeSet<u64>) -> Outcome<Self> {
        let any = BTreeSet::new();
        let asked = match missing.len() > ASKED_BY_ID_MAX {
            true => &any,
            false => missing,
        };
        // The first byte of each file that is not here; extents come by inode.
        let mut files: Vec<(u64, u64)> = Vec::new();
        let mut count = 0;
        let mut last = None;
        segments::each_extent(session, asked, |ino, extent| {
            if !missing.contains(&extent.segment) {
                return;
            }
            if last.replace(ino) != Some(ino) {
                count += 1;
                if files.len() < NAMED_MAX {
                    files.push((ino, extent.offset));
                }
            } else if let Some((of, first)) = files.last_mut()
                && *of == ino
            {
                *first = extent.offset.min(*first);
            }
        })
        .await?;
        let unnamed = count - files.len() as u64;
        let names = files.into_iter().map(|(ino, first)| async move {
            let ino = Ino(ino);
            match session.get_attr(ino).await {
                // What was cut off, and is not erased yet.
                Ok((attr, _)) if attr.size <= first => Ok(None),
                Ok(_) => session.path_of(ino).await,
                Err(ClientError::Verdict(_)) => Ok(None),
                Err(error) => Err(error),
            }
        });
        let names = futures::stream::iter(names).buffered(ASKED_AT_ONCE);
        let names = names.try_collect::<Vec<Option<String>>>().await?;
        let names: Vec<String> = names.into_iter().flatten().collect();
        Ok(Self {
            files: names.len() as u64 + unnamed,
            names,
        })
    }

    /// For people.
    pub(super) fn print(&self) -> Outcome {
        output::line(format_args!("{} files are not complete here:", self.files))?;
        let shown = self.names.iter().take(SHOWN_MAX);
        let more = self.files - shown.len() as u64;
        for name in shown {
            output::line(format_args!("  {name}"))?;
        }
        if more > 0 {
            output::line(format_args!("  and {more} more: `heliofs fsck` names them"))?;
        }
        Ok(())
    }
}

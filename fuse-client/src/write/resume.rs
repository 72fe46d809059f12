//! What an earlier mount has staged and not stored: it becomes this mount's uncommitted data.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use heliofs_proto::error::FsError;
use heliofs_proto::ids::{Ino, Position};
use meta_client::ClientError;

use super::pieces::StagedAt;
use super::staging::record::Header;
use super::staging::{StagedRecord, Staging};
use crate::fs::Fs;
use crate::inode::Inode;

/// Extents asked for with the open, and per request after that.
const EXTENTS: u32 = 512;

impl Fs {
    /// Takes over the records of the staging folder, in their order. Each file is opened at the server, which recalls the write
    /// lease from whoever holds it (an earlier mount that died loses it within seconds), and stays open until its data is stored.
    /// Records of files that others have changed since, that are gone, or that can't be read are put aside.
    ///
    /// Errors: the session is gone, or nobody answers; the records stay where they are.
    pub(crate) async fn resume(self: &Arc<Self>, found: Vec<PathBuf>) -> Result<(), ClientError> {
        let Some(staging) = self.staging().cloned() else {
            return Ok(());
        };
        let (_, at) = self.session().get_attr(Ino::ROOT).await?;
        self.saw_epoch(at);
        let mut files: BTreeMap<u64, Vec<(Header, Arc<StagedRecord>)>> = BTreeMap::new();
        for path in found {
            let (folder, store, file) = (staging.clone(), self.store().clone(), path.clone());
            let read = self
                .runtime()
                .spawn_blocking(move || folder.read(&file, &store))
                .await
                .unwrap_or_else(|error| Err(error.to_string()));
            let read = read.and_then(|(header, record)| {
                if header.volume != self.volume.0 {
                    return Err(format!("it is volume {}'s", header.volume));
                }
                Ok((header, record))
            });
            match read {
                Ok((header, record)) => files.entry(header.ino).or_default().push((header, record)),
                Err(why) => {
                    let folder = staging.clone();
                    let aside = move || folder.put_aside(&path, &format!("it is damaged: {why}"));
                    if let Err(error) = self.runtime().spawn_blocking(aside).await {
                        tracing::error!(%error, "a damaged record stays where it is");
                    }
                }
            }
        }
        let count = files.len();
        // They are stored in the order in which they are taken over: the file that was staged first comes first.
        let mut files: Vec<_> = files.into_iter().collect();
        files.sort_by_key(|(_, records)| records.first().map(|(_, record)| record.number()));
        for (ino, records) in files {
            self.resume_file(&staging, ino, records).await?;
        }
        if count > 0 {
            tracing::info!(
                files = count,
                "staged data of an earlier mount is stored now"
            );
        }
        Ok(())
    }

    async fn resume_file(
        self: &Arc<Self>,
        staging: &Staging,
        ino: u64,
        records: Vec<(Header, Arc<StagedRecord>)>,
    ) -> Result<(), ClientError> {
        let inode = self.coherence().inodes.acquire(ino);
        // A recall of the lease that the open brings waits until there is something to be stored (`Fs::answer_recalls`).
        let changing = inode.changing.lock().await;
        inode.lock().resuming = true;
        let taken = self.take_over(staging, &inode, records).await;
        inode.lock().resuming = false;
        drop(changing);
        match taken {
            Ok(true) => {
                // The open goes back once the data is stored.
                if self.coherence().inodes.release(&inode) {
                    self.session().release(Ino(ino));
                }
                Ok(())
            }
            Ok(false) => {
                self.coherence().inodes.abandon(&inode);
                Ok(())
            }
            Err(error) => {
                self.coherence().inodes.abandon(&inode);
                Err(error)
            }
        }
    }

    /// Opens the file under its write lease and takes its records over. False: there are none to be stored, and it is not open.
    async fn take_over(
        &self,
        staging: &Staging,
        inode: &Arc<Inode>,
        records: Vec<(Header, Arc<StagedRecord>)>,
    ) -> Result<bool, ClientError> {
        let (session, ino) = (self.session(), inode.ino);
        let mut opened = session.open(Ino(ino), EXTENTS, true).await;
        if opened.is_ok() && !session.holds_write_lease(Ino(ino)) {
            // The mount that died counted when the lease could have been given; by now its session has ended.
            session.release(Ino(ino));
            opened = session.open(Ino(ino), EXTENTS, true).await;
        }
        let (opened, at) = match opened {
            Ok(opened) => opened,
            Err(ClientError::Verdict(FsError::Stale | FsError::NotFound)) => {
                for (_, record) in records {
                    let why = format!("the file (inode {ino}) is gone");
                    staging.put_aside(record.path(), &why);
                }
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        let attr = opened.attr.unwrap_or_default();
        let mut ours = None;
        let mut accepted = Vec::new();
        for (header, record) in records {
            let fits = header.epoch == u64::from(at.epoch.0)
                && (!accepted.is_empty() || header.base_seq == attr.data_seq || {
                    if staging.has_led_to(ino, attr.data_seq) {
                        ours = Some(true);
                    }
                    if ours.is_none() {
                        let asked =
                            self.changed_by_us_last(&session, ino, attr.data_seq, |place| {
                                staging.may_have_placed(ino, place)
                            });
                        ours = Some(asked.await.inspect_err(|_| session.release(Ino(ino)))?);
                    }
                    ours == Some(true)
                });
            if fits {
                accepted.push((header, record));
            } else {
                let path = session.path_of(Ino(ino)).await.ok().flatten();
                let path = path.unwrap_or_else(|| format!("inode {ino}"));
                let why = format!("{path} was changed by others since");
                staging.put_aside(record.path(), &why);
            }
        }
        tracing::debug!(
            ino,
            records = accepted.len(),
            leased = session.holds_write_lease(Ino(ino)),
            "staged data is taken over"
        );
        if accepted.is_empty() {
            session.release(Ino(ino));
            return Ok(false);
        }
        {
            let mut state = inode.lock();
            state.saw(&attr, at, false);
            if let Some(page) = &opened.extents {
                state.learn(&attr, at, 0..page.complete_to, &page.extents);
            }
            // Somebody may write to it before this is stored, if it has no lease: not over that.
            state.staged_base = Some(attr.data_seq);
            for (header, record) in accepted {
                let mut offset = 0;
                for (place, length) in header.ranges {
                    let record = record.clone();
                    state
                        .pieces
                        .put_staged(place, StagedAt { record, offset }, length);
                    offset += length;
                }
                if header.mtime != 0 {
                    // A time that was set after the write stays.
                    state.mtime = Some(match attr.ctime > header.mtime {
                        true => attr.mtime,
                        false => header.mtime,
                    });
                }
                state.records.push_back(record);
            }
            // What lies over earlier records is in later ones.
            state.pieces.take_hidden();
            self.remove_loose_records(&mut state);
            state.dirty_since = Some(Instant::now());
        }
        self.dirty().lock().insert(ino, inode.clone());
        Ok(true)
    }

    /// The epoch that staged records belong to.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// The volume is at `at`.
    pub(crate) fn saw_epoch(&self, at: Position) {
        let epoch = u64::from(at.epoch.0);
        self.epoch
            .fetch_max(epoch, std::sync::atomic::Ordering::Relaxed);
    }
}

//! A mount goes on after it has lost its session.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use meta_client::{ClientError, Session};

use super::Fs;
use super::background::RENEW_PAUSE;
use crate::errno::Errno;
use crate::write::conflict::Overtaken;
use crate::write::staging::Place;

/// A question that the end of a session left without an answer waits this long for the next one: less than programs wait for a
/// leader.
const RENEWED_WITHIN: Duration = Duration::from_secs(10);

impl Fs {
    /// Asks what changes nothing, once more in the session that follows when one ends meanwhile: a mirror's sessions end when it
    /// is promoted, and those who read there should not notice.
    pub(crate) async fn ask<T, F: Future<Output = Result<T, ClientError>>>(
        &self,
        question: impl Fn(Session) -> F,
    ) -> Result<T, ClientError> {
        loop {
            let session = self.session();
            match question(session.clone()).await {
                Err(ClientError::SessionGone(_)) if self.renewed(&session).await => {}
                answer => return answer,
            }
        }
    }

    /// Waits until another session goes on instead of `last`, which has ended; `false`: it has not, or none did in time.
    pub(crate) async fn renewed(&self, last: &Session) -> bool {
        if last.gone().is_none() {
            return false;
        }
        let another = async {
            loop {
                let mut renewal = std::pin::pin!(self.renewals.notified());
                renewal.as_mut().enable();
                if self.session().id() != last.id() {
                    return;
                }
                renewal.await;
            }
        };
        tokio::time::timeout(RENEWED_WITHIN, another).await.is_ok()
    }

    /// Goes on with a new session: what is open or dirty here is opened there. Uncommitted data of files that nobody else changed
    /// since is uploaded and committed again, under new segment ids. Locks and leases ended with the old session, so what others
    /// have written since stays, and ours is lost, or kept aside if it was staged: whoever syncs or opens such a file learns it.
    ///
    /// Errors: the new session ended meanwhile; nothing is lost by that.
    pub(super) async fn adopt(&self, session: &Session) -> Result<(), ClientError> {
        // Nobody opens or closes meanwhile: each handle is to be counted once.
        let _adoption = self.adoption.write().await;
        self.segment_ids.discard().await;
        let mut lost = Vec::new();
        for inode in self.coherence.inodes.all() {
            // Not while a flush is under way under the old session.
            let _changing = inode.changing.lock().await;
            let (opens, base, dirty, sent) = {
                let mut state = inode.lock();
                state.forget();
                (
                    state.handles + state.owed_releases,
                    state.staged_base.or(state.base_seq),
                    !state.pieces.is_empty(),
                    state.proposed.clone(),
                )
            };
            let (mut content, mut gone) = (base, false);
            for _ in 0..opens {
                match self.open_again(session, inode.ino).await? {
                    Some(data_seq) => content = Some(data_seq),
                    None => gone = true,
                }
            }
            // The outcome of a commit that was under way is unknown: it may have been the last change.
            let unchanged = gone
                || content == base
                || match content {
                    Some(data_seq) if dirty => {
                        self.ours_for_sure(session, inode.ino, data_seq, &sent)
                            .await?
                    }
                    _ => false,
                };
            if gone {
                inode.lock().lost = Some(Errno::STALE);
            }
            if !dirty {
                continue;
            }
            if gone {
                lost.push((inode.clone(), Overtaken::Gone));
                continue;
            }
            if !unchanged {
                lost.push((inode.clone(), Overtaken::Changed));
                continue;
            }
            let mut state = inode.lock();
            tracing::info!(
                ino = inode.ino,
                bytes = state.pieces.bytes(),
                "uncommitted data is uploaded again"
            );
            state.batches.clear();
            state.pieces.unsend_all();
            state.retry = None;
            state.failure = None;
            state.base_seq = content.or(state.base_seq);
            state.staged_base = state.staged_base.and(content);
        }
        self.session.store(Arc::new(session.clone()));
        self.renewals.notify_waiters();
        for (inode, why) in lost {
            self.give_over(&inode, why);
            self.settle(&inode);
        }
        tracing::info!("a new session goes on");
        Ok(())
    }

    /// Opens a file once more, for as long as it takes. What identifies its content; `None`: it is gone.
    ///
    /// Without its write lease: a recall would be answered in the old session, and two mounts that adopt at the same time could
    /// wait for each other. What is dirty is stored at once, staged data only over what it was staged over.
    async fn open_again(&self, session: &Session, ino: u64) -> Result<Option<u64>, ClientError> {
        loop {
            match session.open(Ino(ino), 0, false).await {
                Ok((opened, _)) => {
                    return Ok(Some(opened.attr.map_or(0, |attr| attr.data_seq)));
                }
                Err(error) => {
                    if self.is_final(ino, error).await? {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// As [`Fs::changed_by_us_last`], for as long as it takes.
    async fn ours_for_sure(
        &self,
        session: &Session,
        ino: u64,
        data_seq: u64,
        sent: &HashSet<Place>,
    ) -> Result<bool, ClientError> {
        loop {
            match self
                .changed_by_us_last(session, ino, data_seq, |place| sent.contains(&place))
                .await
            {
                Ok(ours) => return Ok(ours),
                Err(error) => {
                    if self.is_final(ino, error).await? {
                        return Ok(false);
                    }
                }
            }
        }
    }

    /// Whether `error` says that the file is gone; otherwise it is time to ask again.
    ///
    /// Errors: the session ended, or the mount does.
    async fn is_final(&self, ino: u64, error: ClientError) -> Result<bool, ClientError> {
        match error {
            ClientError::Verdict(FsError::Stale | FsError::NotFound) => Ok(true),
            ClientError::SessionGone(_) => Err(error),
            ClientError::Verdict(_)
            | ClientError::Unavailable { .. }
            | ClientError::Unknown { .. }
            | ClientError::Invalid(_) => {
                tracing::warn!(ino, %error, "an open file could not be opened again yet");
                if self.stop.is_cancelled() {
                    return Err(error);
                }
                tokio::time::sleep(RENEW_PAUSE).await;
                Ok(false)
            }
        }
    }
}

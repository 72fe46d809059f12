//! What becomes of uncommitted data when its file is found changed, or gone.

use heliofs_proto::error::FsError;
use heliofs_proto::ids::Ino;
use meta_client::{ClientError, Session};

use super::flush::Refused;
use super::staging::Place;
use crate::errno::Errno;
use crate::fs::Fs;
use crate::inode::Inode;

/// Extents asked for per request.
const EXTENTS: u32 = 512;

/// Why a file's uncommitted data can't be stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Overtaken {
    /// Others have changed the file since it was written, and this mount had no lease by which it would have been asked.
    Changed,
    /// The file has no name any more, and nobody has it open.
    Gone,
}

impl Fs {
    /// A commit that depends on the file's content was refused, since that is another one. The caller holds `changing`.
    pub(super) async fn overtaken(&self, inode: &Inode) -> Refused {
        let session = self.session();
        let sent = inode.lock().proposed.clone();
        let ours = async {
            let (attr, _) = session.get_attr(Ino(inode.ino)).await?;
            let ours = self
                .changed_by_us_last(&session, inode.ino, attr.data_seq, |place| {
                    sent.contains(&place)
                })
                .await?;
            Ok::<_, ClientError>(ours.then_some(attr.data_seq))
        };
        match ours.await {
            Ok(Some(data_seq)) => {
                tracing::info!(ino = inode.ino, "an earlier commit took effect after all");
                let mut state = inode.lock();
                state.staged_base = state.staged_base.map(|_| data_seq);
                Refused::Again
            }
            Ok(None) => {
                self.give_over(inode, Overtaken::Changed);
                Refused::Failed(Errno::STALE)
            }
            Err(ClientError::Verdict(FsError::Stale | FsError::NotFound)) => {
                self.give_over(inode, Overtaken::Gone);
                Refused::Failed(Errno::STALE)
            }
            // Nothing is known: the next flush asks again.
            Err(error) => {
                tracing::warn!(ino = inode.ino, %error, "whose change it was could not be asked");
                Refused::Failed(Errno::from(error))
            }
        }
    }

    /// A file's uncommitted data will not be stored: every sync says so from now on, as long as it is open. What is staged of a
    /// file that still exists is kept aside.
    pub(crate) fn give_over(&self, inode: &Inode, why: Overtaken) {
        let mut state = inode.lock();
        let records = std::mem::take(&mut state.records);
        let (ino, bytes, staged) = (inode.ino, state.pieces.bytes(), records.len());
        match why {
            Overtaken::Gone => {
                tracing::info!(
                    ino,
                    bytes,
                    staged,
                    "the file is gone, and what was written to it"
                );
                if let Some(staging) = self.staging() {
                    staging.remove(&Vec::from(records));
                }
            }
            Overtaken::Changed => {
                let what = "others have written to it since";
                tracing::error!(ino, bytes, staged, what, "uncommitted data is not stored");
                if let Some(staging) = self.staging() {
                    for record in records {
                        staging.put_aside(record.path(), &format!("inode {ino}: {what}"));
                    }
                }
                // A record that is being written now was for what isn't the content any more.
                state.content = None;
                state.base_seq = None;
            }
        }
        state.kept_aside = staged > 0;
        state.pieces.clear();
        state.batches.clear();
        state.staged_base = None;
        state.proposed.clear();
        state.lost = Some(Errno::STALE);
    }

    /// Whether the last change of a file's content was a commit that put bytes in places that `placed` knows: then all that came with
    /// it lie in such places, while others who share the same bytes put them elsewhere.
    pub(crate) async fn changed_by_us_last(
        &self,
        session: &Session,
        ino: u64,
        data_seq: u64,
        placed: impl Fn(Place) -> bool,
    ) -> Result<bool, ClientError> {
        let mut from = 0;
        let mut ours = false;
        loop {
            let (page, _) = session
                .get_extents(Ino(ino), from, u64::MAX - from, EXTENTS)
                .await?;
            let newest = page.extents.iter().filter(|extent| extent.seq == data_seq);
            for place in newest.filter_map(Place::of) {
                if !placed(place) {
                    return Ok(false);
                }
                ours = true;
            }
            let size = page.attr.map_or(0, |attr| attr.size);
            if page.complete_to <= from || page.complete_to >= size {
                return Ok(ours);
            }
            from = page.complete_to;
        }
    }
}

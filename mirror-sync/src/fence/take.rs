//! Makes a marker name this cluster: when a volume gets a fence store, and when a mirror is promoted.

use std::time::{Duration, Instant};

use blockstore::StoreError;
use blockstore::object::register::Version;
use blockstore::object::{Register, Written};

use super::marker::{Marker, Me, Stored};

/// Two clocks may differ by this part of a lease over one lease.
pub const DRIFT: u32 = 10;

/// A marker is looked at this often while its lease is waited out.
const LOOKS_PER_LEASE: u32 = 10;

/// A marker that is renewed during this many leases has a writer that lives.
const LEASES_MAX: u32 = 4;

/// Of a put without an answer nobody knows whether it took effect: it is looked at again, this often.
const TRIES: usize = 10;

/// What the one before is known to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It logged that it writes no more.
    Demoted,
    /// It may be alive: its lease is waited out.
    LeaseOut,
}

/// The marker is ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// How long was waited for the lease of the one before.
    pub waited: Duration,
    /// Who had it.
    pub before: Option<Marker>,
}

/// Why the marker is not ours.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TakeError {
    /// Nobody has made one.
    #[error("there is no marker `{0}` in the fence store: the volume does not use this one")]
    NoMarker(String),
    /// It is no marker, or of another volume.
    #[error("`{key}`: {why}")]
    Foreign {
        /// The object.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// Another cluster has it at this epoch or a later one.
    #[error("the cluster at {} has taken over already, with epoch {}", .0.url, .0.epoch)]
    TakenBy(Marker),
    /// It is renewed all the time.
    #[error("the cluster at {} renews its marker in the fence store: it is alive, and writes", .0.url)]
    Alive(Marker),
    /// The fence store.
    #[error("the fence store: {0}")]
    Store(#[from] StoreError),
}

/// What lies in the marker's place.
enum Found {
    Nothing,
    /// It was given up by this one, in this version.
    GivenUp(Marker, Version),
    Marker(Marker, Version),
}

async fn look(register: &Register, volume: u32) -> Result<Found, TakeError> {
    let Some((bytes, version)) = register.read().await? else {
        return Ok(Found::Nothing);
    };
    let foreign = |why: String| TakeError::Foreign {
        key: register.key().to_owned(),
        why,
    };
    let stored = Marker::decode(&bytes).map_err(foreign)?;
    let (Stored::Marker(marker) | Stored::GivenUp(marker)) = &stored;
    if marker.volume != volume {
        return Err(foreign(format!(
            "it is the marker of another volume, with id {}",
            marker.volume
        )));
    }
    Ok(match stored {
        Stored::Marker(marker) => Found::Marker(marker, version),
        Stored::GivenUp(last) => Found::GivenUp(last, version),
    })
}

/// Whom the marker names, and at which epoch; `None`: nobody has made one, or it was given up.
pub async fn holder(register: &Register, volume: u32) -> Result<Option<Marker>, TakeError> {
    Ok(match look(register, volume).await? {
        Found::Marker(marker, _) => Some(marker),
        Found::Nothing | Found::GivenUp(..) => None,
    })
}

/// Who gave the marker up had taken the volume over from `me`.
fn superseded(me: Me, last: &Marker) -> bool {
    last.cluster != me.cluster && last.epoch > me.epoch
}

/// Makes the marker name `me` at the epoch after the one that was mirrored. Returns once no other cluster acknowledges anything
/// any more, or never will: by `how`.
///
/// Errors: see [`TakeError`]; nothing was changed, unless the fence store failed.
pub async fn take_over(
    register: &Register,
    me: Me,
    url: &str,
    lease: Duration,
    how: How,
) -> Result<Taken, TakeError> {
    let begun = Instant::now();
    // Since when which version has been there without a change.
    let mut watched: Option<(String, Instant)> = None;
    let mut failures = 0;
    loop {
        let (marker, version) = match look(register, me.volume).await {
            Ok(Found::Marker(marker, version)) => (marker, version),
            Ok(Found::Nothing | Found::GivenUp(..)) => {
                return Err(TakeError::NoMarker(register.key().to_owned()));
            }
            Err(TakeError::Store(error @ StoreError::Retry { .. })) if failures < TRIES => {
                tracing::debug!(%error, "the marker can't be read");
                failures += 1;
                tokio::time::sleep(lease / LOOKS_PER_LEASE).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        // After it was read: what its writer did before is over by then.
        let now = Instant::now();
        if marker.cluster == me.cluster && marker.epoch == me.epoch {
            return Ok(Taken {
                waited: begun.elapsed(),
                before: None,
            });
        }
        if marker.epoch >= me.epoch {
            return Err(TakeError::TakenBy(marker));
        }
        let longest = marker.lease().max(lease);
        let since = match &watched {
            Some((nonce, since)) if *nonce == marker.nonce => *since,
            _ => {
                watched = Some((marker.nonce.clone(), now));
                now
            }
        };
        let mine = marker.cluster == me.cluster;
        if how == How::LeaseOut && !mine && now < since + longest + longest / DRIFT {
            if begun.elapsed() > longest * LEASES_MAX {
                return Err(TakeError::Alive(marker));
            }
            tokio::time::sleep(longest / LOOKS_PER_LEASE).await;
            continue;
        }
        let taken = Marker::new(me, url, lease);
        match register.write(taken.encode(), Some(&version)).await {
            Ok(Written::Done(_)) => {
                return Ok(Taken {
                    waited: begun.elapsed(),
                    before: Some(marker),
                });
            }
            Ok(Written::Conflict) => {}
            Err(error @ StoreError::Retry { .. }) if failures < TRIES => {
                tracing::debug!(%error, "whether the marker was taken is not known");
                failures += 1;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Makes the marker of a volume that gets a fence store, or one that is this cluster's already, name `me`.
///
/// Errors: `TakenBy` when another cluster has one under this name, `Alive` when it renews one of an earlier epoch; the store's, also when it does not keep conditions.
pub async fn claim(
    register: &Register,
    me: Me,
    url: &str,
    lease: Duration,
) -> Result<(), TakeError> {
    let mut failures = 0;
    loop {
        let marker = Marker::new(me, url, lease);
        let over = match look(register, me.volume).await? {
            Found::Nothing => None,
            Found::GivenUp(last, _) if superseded(me, &last) => {
                return Err(TakeError::TakenBy(last));
            }
            Found::GivenUp(_, version) => Some(version),
            Found::Marker(found, _) if found.cluster != me.cluster && found.epoch >= me.epoch => {
                return Err(TakeError::TakenBy(found));
            }
            // It may be in use: only one that nobody renews is taken over.
            Found::Marker(found, _) if found.cluster != me.cluster => {
                tracing::warn!(?found, "the marker of an earlier epoch is waited for");
                take_over(register, me, url, lease, How::LeaseOut).await?;
                continue;
            }
            // Its keeper renews it.
            Found::Marker(found, _) => {
                register.check_conditions(&found.encode()).await?;
                return Ok(());
            }
        };
        match register.write(marker.encode(), over.as_ref()).await {
            // On the next look it is ours.
            Ok(Written::Done(_) | Written::Conflict) => {}
            Err(error @ StoreError::Retry { .. }) if failures < TRIES => {
                tracing::debug!(%error, "whether the marker was made is not known");
                failures += 1;
                tokio::time::sleep(lease / LOOKS_PER_LEASE).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Gives the marker up: a tombstone takes its place, over just the version that was seen to be `me`'s, so that whoever took the
/// marker meanwhile keeps it. The tombstone stays: removing it could meet somebody else's marker, and nobody takes it for one.
///
/// Errors: `TakenBy` when another cluster has the marker; the store's.
pub async fn give_up(register: &Register, me: Me) -> Result<(), TakeError> {
    let mut failures = 0;
    loop {
        let (marker, version) = match look(register, me.volume).await? {
            Found::GivenUp(last, _) if superseded(me, &last) => {
                return Err(TakeError::TakenBy(last));
            }
            Found::Nothing | Found::GivenUp(..) => return Ok(()),
            Found::Marker(marker, _) if marker.cluster != me.cluster => {
                return Err(TakeError::TakenBy(marker));
            }
            Found::Marker(marker, version) => (marker, version),
        };
        match register.write(marker.tombstone(), Some(&version)).await {
            // On the next look it is seen. Its keeper renews it a few times in a lease: that can't go on for long.
            Ok(Written::Done(_) | Written::Conflict) => {}
            Err(error @ StoreError::Retry { .. }) if failures < TRIES => {
                tracing::debug!(%error, "whether the marker was given up is not known");
                failures += 1;
                tokio::time::sleep(marker.lease() / LOOKS_PER_LEASE).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use heliofs_proto::v1::{FenceStore, StorageConfig};

    use super::*;

    const LEASE: Duration = Duration::from_millis(200);

    fn me(cluster: u32, epoch: u32) -> Me {
        Me {
            volume: 1,
            cluster,
            epoch,
        }
    }

    fn register(name: &str) -> Register {
        let fence = FenceStore {
            store: Some(StorageConfig {
                storage: "memory".to_owned(),
                bucket: format!("take-tests-{name}"),
                ..StorageConfig::default()
            }),
            lease_ms: 200,
        };
        super::super::open(&fence, "vol").unwrap()
    }

    #[tokio::test]
    async fn a_dead_writers_lease_is_waited_out_and_taken_once() {
        let register = register("dead");
        let none = take_over(&register, me(2, 1), "", LEASE, How::LeaseOut).await;
        assert!(matches!(none, Err(TakeError::NoMarker(_))), "{none:?}");
        claim(&register, me(1, 0), "helio://one", LEASE)
            .await
            .unwrap();
        claim(&register, me(1, 0), "helio://one", LEASE)
            .await
            .unwrap();
        let other = claim(&register, me(3, 0), "", LEASE).await;
        assert!(matches!(other, Err(TakeError::TakenBy(_))), "{other:?}");
        let begun = Instant::now();
        let taken = take_over(&register, me(2, 1), "helio://two", LEASE, How::LeaseOut).await;
        let taken = taken.unwrap();
        assert!(begun.elapsed() >= LEASE, "{taken:?}");
        assert_eq!(taken.before.unwrap().cluster, 1);
        // Again: it is ours.
        let again = take_over(&register, me(2, 1), "", LEASE, How::LeaseOut).await;
        assert!(again.unwrap().waited < LEASE);
        let late = take_over(&register, me(4, 1), "", LEASE, How::LeaseOut).await;
        assert!(matches!(late, Err(TakeError::TakenBy(_))), "{late:?}");
    }

    #[tokio::test]
    async fn what_was_given_up_is_nobodys_and_what_was_taken_over_is_not_given_up() {
        let register = register("given-up");
        give_up(&register, me(1, 0)).await.unwrap();
        claim(&register, me(1, 0), "", LEASE).await.unwrap();
        let Some((_, seen)) = register.read().await.unwrap() else {
            panic!("no marker")
        };
        give_up(&register, me(1, 0)).await.unwrap();
        give_up(&register, me(1, 0)).await.unwrap();
        for how in [How::LeaseOut, How::Demoted] {
            let none = take_over(&register, me(2, 1), "", LEASE, how).await;
            assert!(matches!(none, Err(TakeError::NoMarker(_))), "{none:?}");
        }
        // Its keeper knew the version before.
        let late = Marker::new(me(1, 0), "", LEASE).encode();
        let late = register.write(late, Some(&seen)).await;
        assert!(matches!(late, Ok(Written::Conflict)), "{late:?}");
        // It can be made anew.
        claim(&register, me(1, 0), "", LEASE).await.unwrap();
        take_over(&register, me(2, 1), "helio://two", LEASE, How::LeaseOut)
            .await
            .unwrap();
        let taken = give_up(&register, me(1, 0)).await;
        assert!(matches!(taken, Err(TakeError::TakenBy(_))), "{taken:?}");
        let again = take_over(&register, me(2, 1), "", LEASE, How::LeaseOut).await;
        assert!(again.is_ok(), "it is theirs still: {again:?}");
        // Who took the volume over and gave the marker up still has the volume.
        give_up(&register, me(2, 1)).await.unwrap();
        let claimed = claim(&register, me(1, 0), "", LEASE).await;
        assert!(matches!(claimed, Err(TakeError::TakenBy(_))), "{claimed:?}");
        let ended = give_up(&register, me(1, 0)).await;
        assert!(matches!(ended, Err(TakeError::TakenBy(_))), "{ended:?}");
    }

    #[tokio::test]
    async fn a_demoted_one_is_not_waited_for() {
        let register = register("demoted");
        claim(&register, me(1, 0), "", LEASE).await.unwrap();
        let taken = take_over(&register, me(2, 1), "", LEASE, How::Demoted).await;
        assert!(taken.unwrap().waited < LEASE);
    }

    #[tokio::test]
    async fn a_writer_that_renews_keeps_the_marker() {
        let register = Arc::new(register("alive"));
        claim(&register, me(1, 0), "", LEASE).await.unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let renewing = tokio::spawn({
            let (register, stop) = (Arc::clone(&register), Arc::clone(&stop));
            async move {
                while !stop.load(Ordering::Relaxed) {
                    let (_, version) = register.read().await.unwrap().unwrap();
                    let marker = Marker::new(me(1, 0), "", LEASE);
                    let written = register.write(marker.encode(), Some(&version)).await;
                    assert!(matches!(written, Ok(Written::Done(_))), "{written:?}");
                    tokio::time::sleep(LEASE / 8).await;
                }
            }
        });
        let taken = take_over(&register, me(2, 1), "", LEASE, How::LeaseOut).await;
        assert!(matches!(taken, Err(TakeError::Alive(_))), "{taken:?}");
        let claimed = claim(&register, me(2, 1), "", LEASE).await;
        assert!(
            matches!(claimed, Err(TakeError::Alive(_))),
            "another volume of this id: {claimed:?}"
        );
        stop.store(true, Ordering::Relaxed);
        renewing.await.unwrap();
        take_over(&register, me(2, 1), "", LEASE, How::LeaseOut)
            .await
            .unwrap();
    }
}

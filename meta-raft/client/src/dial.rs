//! Finds the node that accepts a stream: attempts at several peers overlap, so that a stopped one costs no time.

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::{Instant, sleep_until};

use crate::cluster::{Answer, Cluster, Search};
use crate::error::ClusterError;

/// A leader named by a redirect is asked at once, but not more often than this: it may be the one that died.
const REDIRECT_REST: Duration = Duration::from_millis(50);

/// Runs `attempt` at one peer after another, at the search's pace without waiting for the slow ones (at most one attempt
/// per peer at a time), and returns the first success; the others are dropped. A redirect is followed at once.
///
/// `patient`: never gives up by itself. `avoid` is tried last. Every failure is told to `note`.
pub(crate) async fn race<T, F, Fut>(
    cluster: &Cluster,
    avoid: Option<&str>,
    patient: bool,
    attempt: F,
    note: impl Fn(&str),
) -> Result<T, ClusterError>
where
    F: Fn(String) -> Fut,
    Fut: Future<Output = Result<T, Answer>>,
{
    let mut search = Search::new(cluster);
    let mut queue: VecDeque<String> = cluster.order(avoid).into();
    let mut first_round = true;
    let mut under_way: HashSet<String> = HashSet::new();
    let mut redirected: HashMap<String, Instant> = HashMap::new();
    let mut attempts = FuturesUnordered::new();
    let launch = |peer: String| {
        let outcome = attempt(peer.clone());
        async move { (peer, outcome.await) }
    };
    let mut next_launch = Instant::now();
    loop {
        if Instant::now() >= next_launch {
            if queue.is_empty() {
                first_round = false;
                queue = cluster.order(avoid).into();
            }
            // Peers that still think are passed over; the round then goes on with the next.
            let idle = queue.iter().position(|peer| !under_way.contains(peer));
            if let Some(peer) = idle.and_then(|index| queue.remove(index)) {
                under_way.insert(peer.clone());
                attempts.push(launch(peer));
            } else {
                queue.clear();
            }
            next_launch = Instant::now() + search.pace();
        }
        let deadline = search.deadline();
        tokio::select! {
            biased;
            Some((peer, outcome)) = attempts.next(), if !attempts.is_empty() => {
                under_way.remove(&peer);
                match outcome {
                    Ok(done) => return Ok(done),
                    Err(Answer::Refused(error)) => return Err(error),
                    Err(Answer::Elsewhere(hint, detail)) => {
                        search.note(&peer, &detail, true);
                        note(search.detail());
                        if let Some(leader) = hint {
                            cluster.learn_leader(Some(leader.clone()));
                            let rested = redirected
                                .get(&leader)
                                .is_none_or(|last| last.elapsed() >= REDIRECT_REST);
                            if rested && under_way.insert(leader.clone()) {
                                redirected.insert(leader.clone(), Instant::now());
                                attempts.push(launch(leader));
                            }
                        }
                    }
                    Err(Answer::Unreachable(detail)) | Err(Answer::Broken(detail)) => {
                        search.note(&peer, &detail, false);
                        note(search.detail());
                        // Each peer gets its first chance without a pause between.
                        if first_round && !queue.is_empty() {
                            next_launch = Instant::now();
                        }
                    }
                }
            }
            () = sleep_until(next_launch) => {}
            () = sleep_until(deadline), if !patient => return Err(search.failure()),
        }
    }
}

//! What a promotion came to: what is lost, what is not complete, and how that is shown.

use std::time::{Duration, Instant, SystemTime};

use heliofs_proto::ids::Position;
use heliofs_proto::v1;
use serde_json::json;

use super::incomplete::Incomplete;
use crate::connect::Target;
use crate::failure::{Failure, Outcome};
use crate::output;

/// What became of a volume.
pub(super) fn row(volume: &str, outcome: &Outcome<Promoted>) -> [String; 6] {
    match outcome {
        Err(failure) => {
            let why = failure.message().to_owned();
            [
                volume.to_owned(),
                "no".to_owned(),
                String::new(),
                String::new(),
                String::new(),
                why,
            ]
        }
        Ok(Promoted::TakenBack { at, .. }) => {
            let first = format!("behind {at}");
            [
                volume.to_owned(),
                "taken back".to_owned(),
                first,
                "0".to_owned(),
                "0".to_owned(),
                String::new(),
            ]
        }
        Ok(Promoted::Begun(begun)) => {
            let lost = match &begun.loss {
                Loss::None => "0".to_owned(),
                Loss::Known { entries, .. } => format!("at least {entries}"),
                Loss::Unknown => "not known".to_owned(),
            };
            let incomplete = match &begun.incomplete {
                Some(Ok(incomplete)) => incomplete.files.to_string(),
                Some(Err(_)) | None => "not known".to_owned(),
            };
            [
                volume.to_owned(),
                "yes".to_owned(),
                begun.first.to_string(),
                lost,
                incomplete,
                String::new(),
            ]
        }
    }
}

/// What became of a volume that is written here now.
pub(super) enum Promoted {
    /// It was written here before: its successor was not promoted.
    TakenBack { volume: String, at: Position },
    /// An epoch has begun.
    Begun(Box<Begun>),
}

/// A promotion that took effect.
pub(super) struct Begun {
    pub(super) volume: String,
    pub(super) last: Position,
    pub(super) first: Position,
    pub(super) forced: bool,
    pub(super) lag_ms: u64,
    pub(super) loss: Loss,
    pub(super) source_only: u64,
    pub(super) seconds: f64,
    pub(super) fenced: bool,
    pub(super) waited: Duration,
    /// `None`: nobody has looked yet.
    pub(super) incomplete: Option<Outcome<Incomplete>>,
}

impl Promoted {
    /// Looks for the files that are not complete, until then. Not before the promotion took effect: the region waits for its
    /// volume, and nobody for this.
    pub(super) async fn look(&mut self, target: &Target, until: Instant) {
        let Self::Begun(begun) = self else { return };
        begun.incomplete = Some(match begun.forced && begun.source_only > 0 {
            true => tokio::time::timeout_at(until.into(), Incomplete::find(target))
                .await
                .unwrap_or_else(|_| Err(Failure::new("it takes too long"))),
            false => Ok(Incomplete::default()),
        });
    }

    pub(super) fn as_json(&self) -> serde_json::Value {
        let begun = match self {
            Self::TakenBack { volume, at } => {
                return json!({ "volume": volume, "promoted": true, "taken_back_at": at.to_string() });
            }
            Self::Begun(begun) => begun,
        };
        let mut shown = json!({
            "volume": begun.volume,
            "promoted": true,
            "last_position": begun.last.to_string(),
            "first_position": begun.first.to_string(),
            "lag_ms": begun.lag_ms,
            "objects_at_source_only": begun.source_only,
            "seconds": begun.seconds,
            "fenced": begun.fenced,
            "lease_waited_ms": u64::try_from(begun.waited.as_millis()).unwrap_or(u64::MAX),
        });
        begun.loss.put(&mut shown);
        // `null`: they could not be looked for.
        let incomplete = begun.incomplete.as_ref();
        let incomplete = incomplete.and_then(|found| found.as_ref().ok());
        shown["incomplete_files"] = json!(incomplete.map(|it| it.files));
        shown["incomplete_file_names"] = json!(incomplete.map(|it| &it.names));
        shown
    }

    /// What it came to, but for the files that are not complete.
    pub(super) fn print(&self) -> Outcome {
        let begun = match self {
            Self::TakenBack { volume, at } => {
                return output::line(format_args!(
                    "{volume} is written here again, behind {at}: its successor was not promoted"
                ));
            }
            Self::Begun(begun) => begun,
        };
        output::line(format_args!(
            "{} is written here from {} on; the last position of the source that is here is {}",
            begun.volume, begun.first, begun.last
        ))?;
        if !begun.forced {
            return Ok(());
        }
        output::line(&begun.loss)?;
        if begun.source_only == 0 {
            return Ok(());
        }
        output::line(format_args!(
            "{} objects are in the source's bucket only: files that need them can be read while that bucket can; \
             `heliofs mirror status --missing` lists them",
            begun.source_only
        ))
    }

    /// The files that are not complete, once they were looked for.
    pub(super) fn print_incomplete(&self) -> Outcome {
        let Self::Begun(begun) = self else {
            return Ok(());
        };
        match &begun.incomplete {
            _ if begun.source_only == 0 => Ok(()),
            None => Ok(()),
            Some(Ok(incomplete)) if begun.forced => incomplete.print(),
            Some(Ok(_)) => Ok(()),
            Some(Err(failure)) => output::line(format_args!(
                "which files of {} these are could not be looked for ({}): `heliofs fsck` names them",
                begun.volume,
                failure.message()
            )),
        }
    }
}

/// What a promotion lost, as far as it can be known here.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// Nothing: it was planned.
    None,
    /// At least this.
    Known {
        /// Entries up to `head` that are not here.
        entries: u64,
        /// How far the source was when it was last heard of.
        head: Position,
        /// How long ago that was. What it acknowledged since then is lost, too.
        silent: Duration,
    },
    /// Whoever leads the mirror now never heard of the source.
    Unknown,
}

impl Loss {
    /// Of a forced promotion after `last`.
    pub(super) fn known(status: &v1::MirrorStatus, last: Position) -> Self {
        let Some(head) = status.source_head.map(Position::from) else {
            return Self::Unknown;
        };
        Self::Known {
            entries: head.seq.saturating_sub(last.seq),
            head,
            silent: Duration::from_millis(status.contact_ms.unwrap_or_default()),
        }
    }

    fn put(&self, shown: &mut serde_json::Value) {
        let (entries, head, silent) = match self {
            Self::None => (Some(0), None, None),
            Self::Known {
                entries,
                head,
                silent,
            } => (Some(*entries), Some(head.to_string()), Some(*silent)),
            Self::Unknown => (None, None, None),
        };
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        shown["lost_entries_known"] = json!(entries);
        shown["source_known_up_to"] = json!(head);
        shown["source_silent_ms"] = json!(silent.map(millis));
        shown["source_last_heard"] = json!(silent.map(clock));
    }
}

/// The time of day so long ago, UTC.
fn clock(ago: Duration) -> String {
    humantime::format_rfc3339_seconds(SystemTime::now() - ago).to_string()
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => write!(f, "lost: nothing"),
            Self::Known {
                entries,
                head,
                silent,
            } => write!(
                f,
                "lost: at least {entries} entries, which the source was known to have (up to {head}); it was last heard of at {}, \
                 {:.1} s ago, and what it acknowledged since then is lost too and could not be counted",
                clock(*silent),
                silent.as_secs_f64()
            ),
            Self::Unknown => write!(
                f,
                "lost: not known; the mirror's leader has not heard of the source since it leads, and whatever the source \
                 acknowledged behind that position is lost"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_counted_as_far_as_it_is_known_and_never_called_nothing() {
        let at = |seq| v1::Position { epoch: 2, seq };
        let mut status = v1::MirrorStatus {
            source_head: Some(at(50)),
            contact_ms: Some(7000),
            ..v1::MirrorStatus::default()
        };
        let loss = Loss::known(&status, at(38).into());
        let mut shown = json!({});
        loss.put(&mut shown);
        assert_eq!(shown["lost_entries_known"], 12);
        assert_eq!(shown["source_known_up_to"], "2:50");
        assert_eq!(shown["source_silent_ms"], 7000);
        assert!(loss.to_string().contains("at least 12 entries"), "{loss}");
        assert!(loss.to_string().contains("7.0 s ago"), "{loss}");
        status.source_head = None;
        let loss = Loss::known(&status, at(38).into());
        loss.put(&mut shown);
        assert!(shown["lost_entries_known"].is_null(), "{shown}");
        assert!(loss.to_string().contains("not known"), "{loss}");
    }
}

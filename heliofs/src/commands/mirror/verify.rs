//! Compares a mirror with its source, record by record, at one position.

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use clap::Args;
use heliofs_proto::ids::Position;
use heliofs_proto::v1::{CopyBegin, MirrorState, StoredRecord};
use meta_client::{Cluster, ClusterError, VolumeCopy};
use meta_core::keys::{self, Tag};
use serde_json::{Value, json};

use crate::cli::Access;
use crate::failure::{Failure, Outcome};
use crate::{output, units};

/// Differences that are told.
const TOLD_MAX: usize = 100;

/// How often the mirror is held: with more it would fall behind for the sake of being looked at.
const ROUNDS_MAX: u32 = 5;

/// Which mirror, and of what.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// The mirror: helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]
    #[arg(value_name = "META-URL")]
    url: String,
    /// The volume.
    name: Option<String>,
    /// The source, if it is reached under another address than the mirror's nodes use.
    #[arg(long, value_name = "META-URL")]
    source: Option<String>,
    /// File with the source's cluster token [default: the mirror's].
    #[arg(long, value_name = "FILE")]
    source_token_file: Option<std::path::PathBuf>,
    /// The mirror must come to the position at which the source is compared: gives up after this long.
    #[arg(long, value_parser = units::parse_duration, default_value = "60s", value_name = "TIME")]
    timeout: Duration,
}

/// One side's records, in key order.
struct Side {
    copy: VolumeCopy,
    begin: CopyBegin,
    records: VecDeque<StoredRecord>,
    ended: bool,
}

impl Side {
    async fn open(cluster: &Cluster, volume: &str) -> Outcome<Self> {
        Self::begin(cluster.copy_volume(volume).await?).await
    }

    async fn begin(mut copy: VolumeCopy) -> Outcome<Self> {
        let first = copy.next().await?;
        let begin = first.and_then(|frame| frame.begin);
        let begin =
            begin.ok_or_else(|| Failure::new("a copy does not begin with what it is of"))?;
        Ok(Self {
            copy,
            begin,
            records: VecDeque::new(),
            ended: false,
        })
    }

    fn position(&self) -> Position {
        self.begin.position.map(Position::from).unwrap_or_default()
    }

    /// Makes sure that the next record is there, if there is one.
    async fn fill(&mut self) -> Outcome {
        while self.records.is_empty() && !self.ended {
            let frame = self.copy.next().await?;
            let frame = frame.ok_or_else(|| Failure::new("a copy broke off; try again"))?;
            self.records.extend(frame.records);
            self.ended = frame.end.is_some();
        }
        Ok(())
    }
}

/// What a key is of, as people would say it.
fn name(key: &bytes::Bytes) -> String {
    let Some(tag) = Tag::of(key) else {
        return format!("unknown key {}", units::hex(key));
    };
    let number = |index| keys::number(key, index).unwrap_or_default();
    let text = || String::from_utf8_lossy(&keys::name_of(key)).into_owned();
    match tag {
        Tag::Head => "head".to_owned(),
        Tag::Settings => "settings".to_owned(),
        Tag::Counters => "counters".to_owned(),
        Tag::Inode => format!("inode {}", number(0)),
        Tag::Name => format!("entry `{}` of directory {}", text(), number(0)),
        Tag::Cookie => format!("entry {} of directory {}", number(1), number(0)),
        Tag::Extent => format!("extent of inode {} at {}", number(0), number(1)),
        Tag::Symlink => format!("symlink {}", number(0)),
        Tag::Xattr => format!("attribute `{}` of inode {}", text(), number(0)),
        Tag::Erase => format!("erased ranges of inode {}", number(0)),
        Tag::Segment => format!("segment {:016x}", number(0)),
        Tag::SegmentBlock => format!("segment block {:x}", number(0)),
        Tag::Orphan => format!("orphan {}", number(0)),
        Tag::RemoveTree => format!("tree removal {} at directory {}", number(0), number(1)),
        Tag::Session => format!("session {:016x}", number(0)),
        Tag::Reply => format!("reply {} of session {:016x}", number(1), number(0)),
        Tag::Quota => format!("quota {}/{}", number(0), number(1)),
        Tag::QuotaWalk => format!("walk of quota {} at directory {}", number(0), number(1)),
    }
}

/// What a comparison came to.
#[derive(Default)]
struct Found {
    records: u64,
    differ: u64,
    told: Vec<Value>,
}

impl Found {
    fn differs(&mut self, key: &bytes::Bytes, how: &str) {
        self.differ += 1;
        if self.told.len() < TOLD_MAX {
            self.told.push(json!({
                "record": name(key),
                "key": units::hex(key),
                "bucket": meta_core::digest::bucket(key),
                "how": how,
            }));
        }
    }
}

async fn compare(source: &mut Side, mirror: &mut Side) -> Outcome<Found> {
    let mut found = Found::default();
    loop {
        source.fill().await?;
        mirror.fill().await?;
        let order = match (source.records.front(), mirror.records.front()) {
            (None, None) => return Ok(found),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(one), Some(other)) => one.key.cmp(&other.key),
        };
        found.records += 1;
        let one = match order {
            Ordering::Less | Ordering::Equal => source.records.pop_front(),
            Ordering::Greater => None,
        };
        let other = match order {
            Ordering::Greater | Ordering::Equal => mirror.records.pop_front(),
            Ordering::Less => None,
        };
        match (one, other) {
            (Some(one), Some(other)) if one.value != other.value => {
                found.differs(&one.key, "another value");
            }
            (Some(one), None) => found.differs(&one.key, "missing at the mirror"),
            (None, Some(other)) => found.differs(&other.key, "only at the mirror"),
            _ => {}
        }
    }
}

/// What is compared with what.
struct Volumes<'a> {
    source: &'a Cluster,
    source_name: &'a str,
    mirror: &'a Cluster,
    mirror_name: &'a str,
}

impl Volumes<'_> {
    /// Copies of both at one position, whatever is written meanwhile: the mirror is held until the source's copy is open, then
    /// comes to that position, and goes on as soon as its own is open.
    async fn open_both(&self, timeout: Duration) -> Outcome<(Side, Side)> {
        let until = Instant::now() + timeout;
        let mut rounds = 0;
        loop {
            rounds += 1;
            // One that is far behind would be held in vain.
            let there = self.source.get_volume(self.source_name).await?;
            let there = there.position.map(Position::from).unwrap_or_default();
            self.expect_reached(there, until).await?;
            let hold = match self.mirror.hold_replay(self.mirror_name).await {
                Ok(hold) => Some(hold),
                Err(ClusterError::Invalid(why)) => {
                    tracing::debug!(why, "a mirror of an earlier release");
                    None
                }
                Err(error) => return Err(error.into()),
            };
            let one = Side::open(self.source, self.source_name).await?;
            let Some(hold) = hold else {
                self.expect_reached(one.position(), until).await?;
                let other = Side::open(self.mirror, self.mirror_name).await?;
                if one.position() == other.position() {
                    return Ok((one, other));
                }
                if Instant::now() > until {
                    return Err(Failure::new(format!(
                        "the source changes too quickly: both were never at one position within {timeout:?}"
                    ))
                    .hint("a mirror of this release waits for that"));
                }
                continue;
            };
            let held = async {
                let cluster = self.mirror;
                let copy = cluster.copy_held_volume(self.mirror_name, &hold, one.position());
                Side::begin(copy.await?).await
            };
            let why = match held.await {
                Ok(other) if one.position() == other.position() => return Ok((one, other)),
                Ok(other) => format!("the mirror is at {}", other.position()),
                Err(error) => error.message().to_owned(),
            };
            tracing::debug!(why, "the mirror was not held where the source is");
            if rounds == ROUNDS_MAX || Instant::now() > until {
                return Err(Failure::new(format!(
                    "the mirror did not come to the source's {} in {rounds} attempts: {why}",
                    one.position()
                )));
            }
        }
    }

    /// Waits until the mirror has applied `position`.
    async fn expect_reached(&self, position: Position, until: Instant) -> Outcome {
        let left = until.saturating_duration_since(Instant::now());
        let waited = self
            .mirror
            .mirror_wait(self.mirror_name, position, false, left);
        match waited.await? {
            (true, _) => Ok(()),
            (false, at) => Err(Failure::new(format!(
                "the mirror is at {at} and does not reach the source's {position} in time"
            ))),
        }
    }
}

pub(super) async fn run(options: Options, json: bool) -> Outcome {
    let target = options
        .access
        .target(&options.url, options.name.as_deref())?;
    let status = target.cluster.mirror_status(Some(&target.volume)).await?;
    let status = status.into_iter().next().unwrap_or_default();
    let diverged = status.diverged.map(Position::from);
    let mirror = status.mirror;
    let mirror = mirror.ok_or_else(|| Failure::new(format!("{} is no mirror", target.volume)))?;
    // It will not come to the source's position any more: what it has is compared with what the source has now.
    let stopped = mirror.state() == MirrorState::Stopped;
    let access = options.access.with_file(options.source_token_file);
    let source = access.connect(options.source.as_ref().unwrap_or(&mirror.source))?;
    let volumes = Volumes {
        source: &source.cluster,
        source_name: &mirror.volume,
        mirror: &target.cluster,
        mirror_name: &target.volume,
    };
    let (mut one, mut other) = match stopped {
        true => (
            Side::open(&source.cluster, &mirror.volume).await?,
            Side::open(&target.cluster, &target.volume).await?,
        ),
        false => volumes.open_both(options.timeout).await?,
    };
    let found = compare(&mut one, &mut other).await?;
    let position = one.position().to_string();
    let at = match one.position() == other.position() {
        true => format!("at position {position}"),
        false => format!(
            "between the source at {position} and the mirror, which stopped at {} ({}): what the source changed since is among them",
            other.position(),
            mirror.reason
        ),
    };
    let first = diverged.map(|first| first.to_string());
    let (index, index_is) = match &first {
        Some(first) => (first.clone(), "diverged"),
        None => (position.clone(), "compared"),
    };
    if json {
        output::print_json(&json!({
            "volume": target.volume,
            "index": index,
            "index_is": index_is,
            "position": position,
            "mirror_position": other.position().to_string(),
            "first_differing_position": first,
            "records": found.records,
            "differ": found.differ,
            "differences": found.told,
        }))?;
    } else {
        for difference in &found.told {
            let text = |key: &str| difference[key].as_str().unwrap_or_default().to_owned();
            output::line(format_args!("{}: {}", text("record"), text("how")))?;
        }
    }
    if found.differ > 0 {
        let first = match first {
            Some(first) => format!(
                "; the digests differ from position {first} on, or from one up to a second before it"
            ),
            None => format!(
                "; no digest has differed so far, so {index} is the position at which they were compared, not the first that differs"
            ),
        };
        return Err(Failure::differs(format!(
            "{} of {} records of {} differ {at}{first}",
            found.differ, found.records, target.volume
        ))
        .hint("`heliofs mirror reload` loads the volume anew"));
    }
    if json {
        return Ok(());
    }
    let noted = first.map_or_else(String::new, |first| {
        format!("; a digest differed at position {first} before")
    });
    output::line(format_args!(
        "{} records of {} are the source's at position {position}{noted}",
        found.records, target.volume
    ))
}

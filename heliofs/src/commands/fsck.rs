//! `heliofs fsck`: checks metadata, objects and data against each other, and says which files are hit.
//!
//! Reads only, unless `--repair`: then what can still be read of damaged segments (from the disk cache of this machine, say) is
//! stored anew, and the files are let follow. A volume may be in use meanwhile: whatever looks wrong is asked for again, and
//! what was deleted in between is no damage.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::time::Duration;

use blockstore::segment::object::{FrameEntry, check_object};
use blockstore::{Bucket, DiskCacheOptions, Kind, SegmentStore, StoreOptions};
use clap::{Args, ValueEnum};
use fuse_client::compact::Compactor;
use fuse_client::write::segment_ids::SegmentIds;
use futures::StreamExt;
use heliofs_proto::ids::{Ino, SegmentId, VolumeId};
use heliofs_proto::v1::{self, FileKind, SegmentState, maintain::Ask, maintained::Answer};
use meta_client::Session;
use serde_json::json;

use super::info::{self, Place, places};
use super::{config, segments};
use crate::buckets::find_keys;
use crate::cli::Access;
use crate::connect::Target;
use crate::failure::{Failure, Outcome};
use crate::passphrase::PassphraseSource;
use crate::signals::Stop;
use crate::units::{self, show_size};
use crate::{output, progress};

/// Files named per damaged segment.
const FILES_SHOWN: usize = 20;

/// Times that an object is read before it counts as damaged.
const READS_MAX: usize = 4;

/// Listings in flight.
const LISTS: usize = 4;

/// How deep to look.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
pub(crate) enum Level {
    /// The metadata's records against each other.
    Meta,
    /// And that every object is there, with its length.
    Exists,
    /// And every byte of every object.
    Data,
}

/// What to check, and how deep.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// META-URL with the volume's name, alone or with paths inside the volume; or paths in mounts.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,
    /// How deep to look.
    #[arg(long, value_enum, default_value = "exists")]
    level: Level,
    /// Goes on behind this segment, as an interrupted run has said.
    #[arg(long, value_name = "SEGMENT", value_parser = parse_segment)]
    from: Option<u64>,
    /// Objects read at once.
    #[arg(long, default_value_t = 4, value_name = "N")]
    threads: usize,
    /// Bytes to read per second at most. 0: no limit.
    #[arg(long, value_parser = units::parse_size, default_value = "0", value_name = "SIZE")]
    limit: u64,
    /// Stores anew what can still be read of damaged segments.
    #[arg(long)]
    repair: bool,
    /// With --repair: a disk cache that may hold what the bucket has lost; its mount must be unmounted.
    #[arg(long, value_name = "DIR", requires = "repair")]
    cache_dir: Option<PathBuf>,
    /// With --repair: another region's bucket of the volume, such as a mirror's, or a copy of this one: whole objects come from
    /// there.
    #[arg(long, value_name = "BUCKET", requires = "repair")]
    bucket2: Option<String>,
    /// Its access key, or HELIOFS_ACCESS_KEY2 [default: the bucket's].
    #[arg(long, value_name = "KEY", requires = "bucket2")]
    access_key2: Option<String>,
    /// Its secret key; better HELIOFS_SECRET_KEY2.
    #[arg(long, value_name = "KEY", requires = "bucket2")]
    secret_key2: Option<String>,
    #[command(flatten)]
    passphrase: PassphraseSource,
}

fn parse_segment(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text, 16).map_err(|_| "16 hex digits, as fsck prints them".to_owned())
}

/// What is wrong with one segment.
struct Damage {
    id: u64,
    what: String,
    /// The object is whole again.
    healed: bool,
}

/// One check of one volume.
struct Check<'a> {
    options: &'a Options,
    json: bool,
    bucket: Bucket,
    /// Where whole objects may be had.
    second: Option<Bucket>,
    storage: v1::StorageConfig,
    session: &'a Session,
    volume: VolumeId,
}

/// An object's frames: number and bytes of data, by number.
type Frames = Vec<(u32, u32)>;

/// What is wrong with where an extent says that its bytes lie.
fn misplaced(frames: &Frames, extent: &v1::Extent) -> Option<String> {
    let end = u64::from(extent.frame_offset) + extent.length;
    let at = frames.binary_search_by_key(&extent.frame, |(number, _)| *number);
    let what = match at.map(|at| u64::from(frames[at].1)) {
        Ok(bytes) if end <= bytes => return None,
        Ok(bytes) => format!("which has {bytes} bytes"),
        Err(_) => "which is none".to_owned(),
    };
    Some(format!(
        "its bytes {}..{} are said to be those from {} on of frame {} of segment {:016x}, {what}",
        extent.offset,
        extent.offset + extent.length,
        extent.frame_offset,
        extent.frame,
        extent.segment
    ))
}

/// How far an interrupted check came.
#[derive(Clone, Copy)]
enum StoppedAt {
    /// The metadata's records were not all compared.
    Records,
    /// Everything up to this segment is checked.
    Segment(u64),
}

impl StoppedAt {
    /// What `--from` goes on with.
    fn from(self) -> Option<String> {
        match self {
            Self::Records => None,
            Self::Segment(id) => Some(format!("{id:016x}")),
        }
    }
}

/// What a check came to.
#[derive(Default)]
struct Report {
    problems: Vec<String>,
    segments: u64,
    bytes: u64,
    damages: Vec<Damage>,
    /// Per damaged segment: (inode, extent).
    users: BTreeMap<u64, Vec<(u64, v1::Extent)>>,
    /// Per sound object that was read its frames.
    frames: HashMap<u64, Frames>,
    /// Where to go on, when it was interrupted.
    stopped_at: Option<StoppedAt>,
    repaired_bytes: u64,
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    let mut verdict = Verdict::default();
    let whole = options.paths.len() == 1 && options.paths[0].starts_with("helio://");
    if whole {
        let target = options.access.target(&options.paths[0], None)?;
        verdict = check(&options, &target, &[], json).await?;
    } else {
        let volumes = places(&options.access, &options.paths)?;
        if options.from.is_some() && volumes.len() > 1 {
            return Err(Failure::usage(
                "--from goes on with one volume, and the paths lie in several",
            )
            .hint("check each volume by itself"));
        }
        for (target, places) in volumes {
            let of_this = check(&options, &target, &places, json).await?;
            verdict.damaged |= of_this.damaged;
            if of_this.interrupted {
                verdict.interrupted = true;
                break;
            }
        }
    }
    match verdict {
        Verdict { damaged: true, .. } => Err(Failure::damaged("the volume is damaged").hint(
            "--repair saves what can still be read; other files must be restored or removed",
        )),
        Verdict {
            interrupted: true, ..
        } => Err(Failure::new("the check was interrupted")
            .hint("nothing is wrong as far as it came; --from goes on")),
        Verdict { .. } => Ok(()),
    }
}

/// What a check has found.
#[derive(Clone, Copy, Default)]
struct Verdict {
    /// Damage is left; otherwise nothing is wrong as far as it came, or all of it was repaired.
    damaged: bool,
    /// It did not come to the end.
    interrupted: bool,
}

/// The other bucket, if one is named.
fn second(options: &Options, storage: &v1::StorageConfig, prefix: &str) -> Outcome<Option<Bucket>> {
    let Some(bucket) = &options.bucket2 else {
        return Ok(None);
    };
    let keys = find_keys(&options.access_key2, &options.secret_key2, "2")?;
    let (access_key, secret_key) =
        keys.unwrap_or_else(|| (storage.access_key.clone(), storage.secret_key.clone()));
    let local = bucket.starts_with('/') || bucket.starts_with("file://");
    let storage = v1::StorageConfig {
        storage: if local { "file" } else { "s3" }.to_owned(),
        bucket: bucket.clone(),
        access_key,
        secret_key,
        ..v1::StorageConfig::default()
    };
    let options = StoreOptions {
        deadline: Duration::from_secs(30),
        memory_cache_bytes: 0,
        ..StoreOptions::default()
    };
    Ok(Some(Bucket::open(&storage, prefix, &options)?))
}

/// A bucket that was emptied has lost its marker, too. Nothing of another volume is in it then.
async fn claim_emptied(storage: &v1::StorageConfig, prefix: &str) -> Outcome {
    let options = StoreOptions {
        deadline: Duration::from_secs(30),
        memory_cache_bytes: 0,
        ..StoreOptions::default()
    };
    blockstore::object::create_bucket(storage, &options).await?;
    let bucket = Bucket::open(storage, prefix, &options)?;
    match bucket.check_marker(&storage.uuid).await {
        Err(error) if error.kind() == Kind::NotFound => {
            tracing::warn!("the bucket has no marker: it is made anew");
            Ok(bucket.claim_marker(&storage.uuid).await?)
        }
        // What is wrong with it is told by who opens it.
        _ => Ok(()),
    }
}

/// A step's outcome, unless a signal comes first; a repair that is broken off leaves whole objects.
async fn unless_stopped<T>(stop: &mut Stop, step: impl Future<Output = Outcome<T>>) -> Outcome<T> {
    tokio::select! {
        biased;
        _ = stop.wait() => Err(Failure::new("the check was interrupted")
            .hint("what was stored anew stays; begin again")),
        done = step => done,
    }
}

/// Checks the volume, or what lies below some places of it.
async fn check(
    options: &Options,
    target: &Target,
    places: &[Place],
    json: bool,
) -> Outcome<Verdict> {
    let volume = config::find(&target.cluster, &target.volume).await?;
    let storage = volume.storage.clone().unwrap_or_default();
    if options.repair {
        config::not_a_mirror(&volume)?;
    }
    let prefix = config::prefix(&volume);
    let second = second(options, &storage, prefix)?;
    if second.is_some() {
        claim_emptied(&storage, prefix).await?;
    }
    let bucket = segments::bucket(&storage, prefix).await?;
    let session = target.patient_session(!options.repair).await?;
    let check = Check {
        options,
        json,
        bucket,
        second,
        storage,
        session: &session,
        volume: session.volume_id(),
    };
    let outcome = check.run(prefix, places).await;
    session.detach().await;
    outcome
}

impl Check<'_> {
    async fn run(&self, volume: &str, places: &[Place]) -> Outcome<Verdict> {
        let mut report = Report::default();
        // From here on, not only while something is waited for: a signal that comes in between is not to be lost.
        let mut stop = Stop::catch()?;
        let only = match places {
            [] => None,
            places => Some(unless_stopped(&mut stop, self.segments_below(places)).await?),
        };
        if only.is_none() && self.options.from.is_none() {
            self.records(&mut stop, &mut report).await?;
        }
        if self.options.level > Level::Meta && report.stopped_at.is_none() {
            let live = segments::live(self.session, self.options.from.unwrap_or(0));
            let mut live = unless_stopped(&mut stop, live).await?;
            if let Some(only) = &only {
                live.retain(|segment| only.contains(&segment.id));
            }
            report.segments = live.len() as u64;
            report.bytes = live.iter().map(|segment| segment.length).sum();
            self.exists(&live, &mut stop, &mut report).await?;
            if self.options.level == Level::Data && report.stopped_at.is_none() {
                let missing: BTreeSet<u64> = report.damages.iter().map(|it| it.id).collect();
                live.retain(|segment| !missing.contains(&segment.id));
                self.data(&live, &mut stop, &mut report).await?;
                if report.stopped_at.is_none() {
                    self.places(&mut stop, &mut report).await?;
                }
            }
        }
        if let Some(second) = &self.second {
            unless_stopped(&mut stop, self.fetch(second, &mut report)).await?;
        }
        let damaged: BTreeSet<u64> = report
            .damages
            .iter()
            .filter(|damage| !damage.healed)
            .map(|damage| damage.id)
            .collect();
        if !damaged.is_empty() {
            let users = segments::users(self.session, &damaged);
            report.users = unless_stopped(&mut stop, users).await?;
        }
        if self.options.repair && !damaged.is_empty() {
            let repairing = self.repair(volume, &damaged, &mut report);
            unless_stopped(&mut stop, repairing).await?;
        }
        self.show(volume, &report).await?;
        let left = report
            .damages
            .iter()
            .any(|damage| report.users.contains_key(&damage.id));
        Ok(Verdict {
            damaged: left || !report.problems.is_empty(),
            interrupted: report.stopped_at.is_some(),
        })
    }

    /// Segments of the files at and below some places.
    async fn segments_below(&self, places: &[Place]) -> Outcome<BTreeSet<u64>> {
        let mut found = BTreeSet::new();
        let mut open: Vec<(u64, FileKind)> = Vec::new();
        for place in places {
            let attr = info::walk(self.session, &place.inside).await?;
            let attr = attr.ok_or_else(|| {
                Failure::new(format!("{}: no such file or directory", place.shown))
            })?;
            open.push((attr.ino, attr.kind()));
        }
        while let Some((ino, kind)) = open.pop() {
            match kind {
                FileKind::Directory => {
                    let mut after = 0;
                    loop {
                        let (page, _) = self.session.read_dir(Ino(ino), after, 4096, false).await?;
                        open.extend(page.entries.iter().map(|entry| (entry.ino, entry.kind())));
                        match page.entries.last() {
                            Some(last) if !page.end => after = last.cookie,
                            _ => break,
                        }
                    }
                }
                FileKind::File => {
                    // A file that was removed meanwhile is no damage.
                    if let Ok(extents) = info::all_extents(self.session, Ino(ino)).await {
                        found.extend(extents.iter().map(|extent| extent.segment));
                    }
                }
                _ => {}
            }
        }
        found.remove(&0);
        Ok(found)
    }

    /// The records of the node that is asked, against each other.
    async fn records(&self, stop: &mut Stop, report: &mut Report) -> Outcome {
        let bar = progress::bar("records", 1, false, self.json);
        let (mut part, mut parts) = (0, 0);
        loop {
            let ask = Ask::CheckRecords(v1::CheckRecords { part, parts });
            let answer = tokio::select! {
                biased;
                _ = stop.wait() => {
                    report.stopped_at = Some(StoppedAt::Records);
                    break;
                }
                answer = self.session.maintain(ask) => answer?,
            };
            let Answer::Records(checked) = answer else {
                return Err(Failure::new(
                    "the cluster gave another answer than was asked for",
                ));
            };
            if checked.parts == 0 && checked.problems.is_empty() {
                // A server of a release before there were parts knows none of the question.
                return Err(Failure::new(
                    "the metadata records were not checked: the metadata server is of an earlier release, which can't",
                )
                .hint("upgrade the metadata nodes first"));
            }
            report.problems.extend(checked.problems);
            parts = checked.parts;
            part += 1;
            bar.set_length(parts.into());
            bar.inc(1);
            if part >= parts {
                break;
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Every object is listed, with the length that metadata knows.
    async fn exists(&self, live: &[v1::Segment], stop: &mut Stop, report: &mut Report) -> Outcome {
        let groups: BTreeSet<u8> = live.iter().map(|segment| segment.id as u8).collect();
        let bar = progress::bar("exists", groups.len() as u64, false, self.json);
        let mut listings = futures::stream::iter(groups)
            .map(|group| async move { (group, self.bucket.list(&format!("{group:02x}")).await) })
            .buffered(LISTS);
        loop {
            let next = tokio::select! {
                biased;
                _ = stop.wait() => {
                    report.stopped_at = Some(StoppedAt::Segment(self.options.from.unwrap_or(0)));
                    break;
                }
                next = listings.next() => next,
            };
            let Some((group, listed)) = next else {
                break;
            };
            let listed: BTreeMap<String, u64> = listed?.into_iter().collect();
            for segment in live.iter().filter(|segment| segment.id as u8 == group) {
                let what = match listed.get(&SegmentId(segment.id).object_name()) {
                    None => "the object is missing".to_owned(),
                    Some(length) if *length != segment.length => {
                        format!(
                            "the object has {length} bytes instead of {}",
                            segment.length
                        )
                    }
                    Some(_) => continue,
                };
                // A listing may be older than the object.
                if !self.is_whole(segment).await? {
                    self.found(segment.id, what, report).await?;
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Whether the object is there and ends where it should.
    async fn is_whole(&self, segment: &v1::Segment) -> Outcome<bool> {
        let name = SegmentId(segment.id).object_name();
        let end = segment.length.saturating_sub(1)..segment.length + 1;
        match self.bucket.get_range(&name, end).await {
            Ok(end) => Ok(end.len() == 1),
            Err(error) if error.kind() == Kind::NotFound => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Something is wrong, unless the segment was freed meanwhile.
    async fn found(&self, id: u64, what: String, report: &mut Report) -> Outcome {
        if segments::states(self.session, &[id]).await? == [SegmentState::Live] {
            report.damages.push(Damage {
                id,
                what,
                healed: false,
            });
        }
        Ok(())
    }

    /// Every byte of every object. `live` is in order of id.
    async fn data(&self, live: &[v1::Segment], stop: &mut Stop, report: &mut Report) -> Outcome {
        let bytes = live.iter().map(|segment| segment.length).sum();
        let bar = progress::bar("data", bytes, true, self.json);
        let mut checks = futures::stream::iter(live)
            .map(|segment| async move { (segment, self.object(segment).await) })
            .buffered(self.options.threads.max(1));
        let mut last = self.options.from.unwrap_or(0);
        loop {
            let next = tokio::select! {
                biased;
                _ = stop.wait() => {
                    report.stopped_at = Some(StoppedAt::Segment(last));
                    break;
                }
                next = checks.next() => next,
            };
            let Some((segment, outcome)) = next else {
                break;
            };
            let outcome = outcome.map_err(|error: Failure| {
                error.hint(format!(
                    "what was checked so far need not be again: --from {last:016x}"
                ))
            });
            match outcome? {
                Ok(frames) => {
                    report.frames.insert(segment.id, frames);
                }
                Err(what) => self.found(segment.id, what, report).await?,
            }
            last = segment.id;
            bar.inc(segment.length);
            if let Some(wait) = (segment.length * 1000).checked_div(self.options.limit) {
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_millis(wait)) => {}
                    _ = stop.wait() => {
                        report.stopped_at = Some(StoppedAt::Segment(last));
                        break;
                    }
                }
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Every extent names bytes that its frame has. Segments never change: that extents come and go meanwhile is no matter.
    async fn places(&self, stop: &mut Stop, report: &mut Report) -> Outcome {
        let (frames, problems) = (&report.frames, &mut report.problems);
        let any = BTreeSet::new();
        let looking = segments::each_extent(self.session, &any, |ino, extent| {
            let wrong = frames
                .get(&extent.segment)
                .and_then(|frames| misplaced(frames, &extent));
            if let Some(wrong) = wrong {
                problems.push(format!("inode {ino}: {wrong}"));
            }
        });
        tokio::select! {
            biased;
            _ = stop.wait() => {
                let last = frames.keys().max().copied();
                report.stopped_at = Some(StoppedAt::Segment(last.unwrap_or(0)));
                Ok(())
            }
            looked = looking => looked,
        }
    }

    /// The frames of an object, or what is wrong with it, every time that it is read.
    async fn object(&self, segment: &v1::Segment) -> Outcome<Result<Frames, String>> {
        let mut found = Err("it was not read".to_owned());
        // What a connection damaged is no damage of the object.
        for _ in 0..READS_MAX {
            found = self.object_once(segment).await?;
            if found.is_ok() {
                break;
            }
        }
        Ok(found)
    }

    async fn object_once(&self, segment: &v1::Segment) -> Outcome<Result<Frames, String>> {
        let id = SegmentId(segment.id);
        let object = match self.bucket.get(&id.object_name()).await {
            Ok(object) => object,
            Err(error) if error.kind() == Kind::NotFound => {
                return Ok(Err("the object is missing".to_owned()));
            }
            Err(error) => return Err(error.into()),
        };
        let (volume, checksum) = (self.volume, segment.checksum);
        let checked = tokio::task::spawn_blocking(move || {
            let frames = check_object(&object, volume, id).map_err(|fault| fault.to_string())?;
            let found = crc32fast::hash(&object);
            if found != checksum {
                return Err(format!("checksum is {found:08x}, should be {checksum:08x}"));
            }
            let frame = |entry: &FrameEntry| (entry.frame.0, entry.decoded_bytes);
            Ok(frames.iter().map(frame).collect())
        });
        checked.await.map_err(Failure::new)
    }

    /// Puts whole objects back that the other bucket has.
    async fn fetch(&self, second: &Bucket, report: &mut Report) -> Outcome {
        let ids: Vec<u64> = report.damages.iter().map(|damage| damage.id).collect();
        if ids.is_empty() {
            return Ok(());
        }
        let live = segments::live(self.session, 0).await?;
        let known: BTreeMap<u64, v1::Segment> = live
            .into_iter()
            .map(|segment| (segment.id, segment))
            .collect();
        let bar = progress::bar("from the other bucket", ids.len() as u64, false, self.json);
        for damage in &mut report.damages {
            bar.inc(1);
            // One that was freed meanwhile is not brought back.
            let Some(segment) = known.get(&damage.id) else {
                continue;
            };
            let name = SegmentId(segment.id).object_name();
            let object = match second.get_about(&name, segment.length).await {
                Ok(object) => object,
                Err(error) if error.kind() == Kind::NotFound => continue,
                Err(error) => return Err(error.into()),
            };
            if object.len() as u64 != segment.length
                || crc32fast::hash(&object) != segment.checksum
                || segments::states(self.session, &[segment.id]).await? != [SegmentState::Live]
            {
                continue;
            }
            self.bucket.put(&name, object).await?;
            damage.healed = true;
            report.repaired_bytes += segment.length;
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Lets files follow what can still be read.
    async fn repair(&self, volume: &str, damaged: &BTreeSet<u64>, report: &mut Report) -> Outcome {
        let options = StoreOptions {
            cache_uploads: false,
            disk_cache: self.options.cache_dir.as_ref().map(|directory| {
                // As a mount of this volume names it. Nothing is added to it that was not asked for.
                DiskCacheOptions::new(directory.join(&self.storage.uuid), u64::MAX)
            }),
            opener: match self.storage.encryption {
                Some(_) => Some(self.options.passphrase.required()?),
                None => None,
            },
            ..StoreOptions::default()
        };
        let store = SegmentStore::open(&self.storage, volume, self.volume, options)?;
        // The cache's index is read in the background.
        store.flush_cache().await;
        let compactor = Compactor {
            session: self.session,
            store: &store,
            ids: &SegmentIds::default(),
            segment_bytes: self.storage.segment_bytes,
            bytes_per_second: self.options.limit,
            leased: false,
        };
        let damaged_ids: Vec<u64> = damaged.iter().copied().collect();
        let done = compactor
            .compact(&damaged_ids)
            .await
            .map_err(Failure::new)?;
        report.repaired_bytes += done.moved_bytes;
        // What is still named could not be read.
        report.users = segments::users(self.session, damaged).await?;
        Ok(())
    }

    async fn show(&self, volume: &str, report: &Report) -> Outcome {
        let mut damages = Vec::new();
        for damage in &report.damages {
            let users = report.users.get(&damage.id).map_or(&[][..], Vec::as_slice);
            let inos: BTreeSet<u64> = users.iter().map(|(ino, _)| *ino).collect();
            let mut files = Vec::new();
            for ino in inos.iter().take(FILES_SHOWN) {
                let path = self.session.path_of(Ino(*ino)).await?;
                files.push(path.unwrap_or_else(|| format!("inode {ino}, which has no name")));
            }
            let object = format!("{volume}/{}", SegmentId(damage.id).object_name());
            if !self.json {
                let repaired = if users.is_empty() { " (repaired)" } else { "" };
                output::line(format_args!("{object}: {}{repaired}", damage.what))?;
                for file in &files {
                    output::line(format_args!("  {file}"))?;
                }
                if inos.len() > FILES_SHOWN {
                    output::line(format_args!(
                        "  and {} more files",
                        inos.len() - FILES_SHOWN
                    ))?;
                }
            }
            damages.push(json!({
                "segment": format!("{:016x}", damage.id),
                "object": object,
                "what": damage.what,
                "files": files,
                "files_total": inos.len(),
                "repaired": users.is_empty(),
            }));
        }
        if self.json {
            return output::print_json(&json!({
                "volume": volume,
                "problems": report.problems,
                "segments": report.segments,
                "bytes": report.bytes,
                "damages": damages,
                "repaired_bytes": report.repaired_bytes,
                "interrupted": report.stopped_at.is_some(),
                "stopped_at": report.stopped_at.and_then(StoppedAt::from),
            }));
        }
        for problem in &report.problems {
            output::line(format_args!("metadata: {problem}"))?;
        }
        if let Some(stopped) = report.stopped_at {
            output::line(match stopped.from() {
                Some(from) => format!("interrupted; go on with --from {from}"),
                None => "interrupted before the records were compared: begin anew".to_owned(),
            })?;
        }
        if self.options.level == Level::Meta {
            return output::line(format_args!(
                "{volume}: {} contradictions in the metadata",
                report.problems.len()
            ));
        }
        output::line(format_args!(
            "{volume}: {} segments with {}, {} damaged, {} stored anew",
            report.segments,
            show_size(report.bytes),
            report.damages.len(),
            show_size(report.repaired_bytes)
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_lie_in_frames_that_are_there() {
        let frames = vec![(4, 100), (20, 70_000)];
        let extent = |frame, frame_offset, length| v1::Extent {
            frame,
            frame_offset,
            length,
            segment: 1,
            ..v1::Extent::default()
        };
        for sound in [
            extent(4, 0, 100),
            extent(4, 99, 1),
            extent(20, 4095, 65_905),
        ] {
            assert_eq!(misplaced(&frames, &sound), None);
        }
        for (wrong, what) in [
            (extent(4, 1, 100), "which has 100 bytes"),
            (extent(5, 0, 1), "which is none"),
            (extent(20, u32::MAX, 1), "which has 70000 bytes"),
        ] {
            let said = misplaced(&frames, &wrong).unwrap();
            assert!(said.ends_with(what), "{said}");
        }
    }
}

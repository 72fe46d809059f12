//! `heliofs quota`: limits for directories, users and groups.

use std::path::Path;

use clap::{Args, Subcommand};
use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{
    self, FileKind, FsError, ListQuotas, Quota, QuotaKind, QuotaRemove, QuotaSet, command::Op,
    maintain::Ask, maintained::Answer,
};
use meta_client::{ClientError, Session};
use meta_core::limits::QUOTA_DEPTH_MAX;
use serde_json::{Value, json};

use super::info::{self, places};
use crate::cli::Access;
use crate::connect::Target;
use crate::failure::{Failure, Outcome};
use crate::units::{self, show_limit, show_size};
use crate::{mounts, output};

/// Quotas per question.
const PAGE: u32 = 1000;

/// What to do with quotas.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Sets or changes a quota. What is there already is counted in the background; more than the limit is left as it is.
    Set(SetOptions),
    /// Shows one quota and its usage.
    Get(OneOptions),
    /// Shows all quotas and their usage.
    #[command(alias = "ls")]
    List(ListOptions),
    /// Takes a quota back.
    #[command(alias = "delete", alias = "del")]
    Rm(OneOptions),
}

/// Whose quota it is.
#[derive(Args)]
pub(crate) struct Payer {
    #[command(flatten)]
    access: Access,
    /// A directory in a mount; or helio://HOST/VOLUME, and with --path or a second word the directory inside the volume.
    #[arg(value_name = "PATH", num_args = 1..=2, required = true)]
    place: Vec<String>,
    /// The directory inside the volume.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["uid", "gid"])]
    path: Option<String>,
    /// The quota of a user, in the volume that PATH lies in.
    #[arg(long, value_name = "UID", conflicts_with = "gid")]
    uid: Option<u32>,
    /// The quota of a group.
    #[arg(long, value_name = "GID")]
    gid: Option<u32>,
}

/// Limits.
#[derive(Args)]
pub(crate) struct SetOptions {
    #[command(flatten)]
    payer: Payer,
    /// Bytes of stored data, such as 10G. 0: no limit; without it the limit stays as it was.
    #[arg(long, value_parser = units::parse_size, value_name = "SIZE")]
    capacity: Option<u64>,
    /// Files, directories and the like. 0: no limit; without it the limit stays as it was.
    #[arg(long, value_name = "N")]
    inodes: Option<u64>,
}

/// Which one.
#[derive(Args)]
pub(crate) struct OneOptions {
    #[command(flatten)]
    payer: Payer,
}

/// Of which volume.
#[derive(Args)]
pub(crate) struct ListOptions {
    #[command(flatten)]
    access: Access,
    /// A path in a mount, or helio://HOST/VOLUME.
    #[arg(value_name = "PATH")]
    place: String,
    /// Users and groups without limits, too, as long as any of them has one.
    #[arg(long)]
    all: bool,
}

/// A quota by name.
struct Named {
    kind: QuotaKind,
    id: u64,
    /// For people.
    shown: String,
}

pub(crate) async fn run(command: Command, json: bool) -> Outcome {
    match command {
        Command::Set(options) => {
            if options.capacity.is_none() && options.inodes.is_none() {
                return Err(Failure::usage("no limit is given").hint("--capacity SIZE, --inodes N"));
            }
            let (target, inside) = target(&options.payer)?;
            let session = target.session(false).await?;
            let outcome = set(&session, &options, &inside, json).await;
            session.detach().await;
            outcome
        }
        Command::Get(options) => {
            let (target, inside) = target(&options.payer)?;
            let session = target.session(true).await?;
            let outcome = get(&session, &options.payer, &inside, json).await;
            session.detach().await;
            outcome
        }
        Command::List(options) => {
            let target = volume(&options.access, &options.place)?;
            let session = target.session(true).await?;
            let outcome = list(&session, options.all, json).await;
            session.detach().await;
            outcome
        }
        Command::Rm(options) => {
            let (target, inside) = target(&options.payer)?;
            let session = target.session(false).await?;
            let outcome = remove(&session, &options.payer, &inside, json).await;
            session.detach().await;
            outcome
        }
    }
}

/// The volume that a path in a mount lies in, or that a URL names.
fn volume(access: &Access, place: &str) -> Outcome<Target> {
    if place.starts_with("helio://") {
        return access.target(place, None);
    }
    let (note, _) = mounts::containing(Path::new(place))?;
    let access = access.or_file(note.token_file);
    access.target(&note.url, None)
}

/// The volume, and the directory inside it if one is meant.
fn target(payer: &Payer) -> Outcome<(Target, String)> {
    let owner = payer.uid.is_some() || payer.gid.is_some();
    let url = payer.place[0].starts_with("helio://");
    let named = match (&payer.path, payer.place.get(1)) {
        (Some(path), None) => Some(path),
        (None, named) => named,
        (Some(_), Some(_)) => return Err(Failure::usage("the directory is named twice")),
    };
    if owner {
        return Ok((volume(&payer.access, &payer.place[0])?, String::new()));
    }
    match (url, named) {
        (true, None) => Err(Failure::usage("whose quota is it?")
            .hint("--path DIR inside the volume, --uid UID or --gid GID")),
        // As JuiceFS has it: the path inside the volume, whatever mount names the volume.
        (_, Some(path)) => Ok((volume(&payer.access, &payer.place[0])?, path.clone())),
        (false, None) => {
            let found = places(&payer.access, &payer.place[..1])?;
            let place = found.into_iter().next();
            let (target, mut inside) = place.ok_or_else(|| Failure::usage("no path is named"))?;
            let inside = inside.pop().map(|place| place.inside).unwrap_or_default();
            Ok((target, inside.to_string_lossy().into_owned()))
        }
    }
}

async fn named(session: &Session, payer: &Payer, inside: &str) -> Outcome<Named> {
    if let Some(uid) = payer.uid {
        return Ok(Named {
            kind: QuotaKind::User,
            id: uid.into(),
            shown: format!("user {uid}"),
        });
    }
    if let Some(gid) = payer.gid {
        return Ok(Named {
            kind: QuotaKind::Group,
            id: gid.into(),
            shown: format!("group {gid}"),
        });
    }
    let inside = inside.trim_matches('/');
    let shown = format!("/{inside}");
    let attr = info::walk(session, Path::new(inside))
        .await?
        .ok_or_else(|| Failure::new(format!("{shown}: no such file or directory")))?;
    if attr.kind() != FileKind::Directory {
        return Err(Failure::new(format!("{shown} is no directory")));
    }
    if attr.ino == Ino::ROOT.0 {
        return Err(
            Failure::usage("the limits of a whole volume are no quota").hint(
                "heliofs config META-URL --capacity SIZE --inodes N; for users and groups: --uid, --gid",
            ),
        );
    }
    Ok(Named {
        kind: QuotaKind::Directory,
        id: attr.ino,
        shown,
    })
}

/// As in rmr: the server trusts whoever has the token.
async fn change(session: &Session, op: Op, shown: &str) -> Outcome<v1::Reply> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::new("quotas are root's to change"));
    }
    match session.mutate(v1::Caller::default(), op).await {
        Ok(reply) => Ok(reply),
        Err(ClientError::Verdict(verdict)) => Err(match verdict {
            FsError::NotSupported => Failure::new("the volume is older than quotas")
                .hint("when all metadata nodes and mirrors run this release: heliofs config META-URL --core-level 2"),
            FsError::Busy => Failure::new(format!(
                "{shown}: quotas are being counted or taken back here"
            ))
            .hint("try again when `heliofs quota list` says so no more"),
            FsError::NotFound => Failure::new(format!("{shown} has no quota")),
            FsError::TooBig => Failure::new(format!(
                "{shown}: too many quotas would lie in each other (at most {QUOTA_DEPTH_MAX})"
            ))
            .hint("`heliofs quota list` shows them; take back one above or below"),
            FsError::ReadOnly => Failure::new(format!("{shown}: the volume is read-only"))
                .hint("is it a mirror? its quotas are set at the source"),
            FsError::Invalid => Failure::usage("a quota must limit something")
                .hint("--capacity SIZE or --inodes N above 0; `heliofs quota rm` takes it back"),
            other => ClientError::Verdict(other).into(),
        }),
        Err(error) => Err(error.into()),
    }
}

async fn set(session: &Session, options: &SetOptions, inside: &str, json: bool) -> Outcome {
    let named = named(session, &options.payer, inside).await?;
    let op = Op::QuotaSet(QuotaSet {
        kind: named.kind as i32,
        id: named.id,
        bytes_max: options.capacity,
        inodes_max: options.inodes,
    });
    change(session, op, &named.shown).await?;
    match find(session, &named).await? {
        Some(quota) => show(&[(quota, named.shown)], json, false),
        None => {
            if json {
                return output::print_json(&Value::Null);
            }
            output::line(format_args!("{} has no limits", named.shown))
        }
    }
}

async fn get(session: &Session, payer: &Payer, inside: &str, json: bool) -> Outcome {
    let named = named(session, payer, inside).await?;
    match find(session, &named).await? {
        Some(quota) => show(&[(quota, named.shown)], json, false),
        None => Err(Failure::new(format!("{} has no quota", named.shown))),
    }
}

async fn remove(session: &Session, payer: &Payer, inside: &str, json: bool) -> Outcome {
    let named = named(session, payer, inside).await?;
    let op = Op::QuotaRemove(QuotaRemove {
        kind: named.kind as i32,
        id: named.id,
    });
    change(session, op, &named.shown).await?;
    if json {
        return output::print_json(&json!({ "removed": named.shown }));
    }
    Ok(())
}

async fn list(session: &Session, all: bool, json: bool) -> Outcome {
    let mut shown = Vec::new();
    for quota in quotas(session).await? {
        let name = match quota.kind() {
            QuotaKind::User => format!("user {}", quota.id),
            QuotaKind::Group => format!("group {}", quota.id),
            QuotaKind::Directory | QuotaKind::Unspecified => session
                .path_of(Ino(quota.id))
                .await?
                .unwrap_or_else(|| format!("removed directory {}", quota.id)),
        };
        let limited = quota.bytes_max != 0 || quota.inodes_max != 0;
        if limited || all || quota.counting && quota.kind() == QuotaKind::Directory {
            shown.push((quota, name));
        }
    }
    if shown.is_empty() && !json {
        return output::line("there are no quotas");
    }
    show(&shown, json, true)
}

async fn find(session: &Session, named: &Named) -> Outcome<Option<Quota>> {
    let ask = Ask::ListQuotas(ListQuotas {
        // The one before it.
        after_kind: if named.id == 0 {
            named.kind as i32 - 1
        } else {
            named.kind as i32
        },
        after_id: named.id.wrapping_sub(1),
        quotas_max: 1,
    });
    let Answer::Quotas(page) = session.maintain(ask).await? else {
        return Err(Failure::new("the server answered something else"));
    };
    let quota = page.quotas.into_iter().next();
    Ok(quota.filter(|quota| {
        (quota.kind(), quota.id) == (named.kind, named.id)
            && !quota.removed
            && (quota.bytes_max != 0 || quota.inodes_max != 0)
    }))
}

async fn quotas(session: &Session) -> Outcome<Vec<Quota>> {
    let mut all: Vec<Quota> = Vec::new();
    loop {
        let (after_kind, after_id) = all.last().map_or((0, 0), |last| (last.kind, last.id));
        let ask = Ask::ListQuotas(ListQuotas {
            after_kind,
            after_id,
            quotas_max: PAGE,
        });
        let Answer::Quotas(page) = session.maintain(ask).await? else {
            return Err(Failure::new("the server answered something else"));
        };
        let end = page.end || page.quotas.is_empty();
        all.extend(page.quotas);
        if end {
            return Ok(all);
        }
    }
}

fn state(quota: &Quota) -> &'static str {
    match (quota.counting, quota.removed) {
        (true, false) => "counting",
        (true, true) => "being removed",
        (false, true) => "removed",
        (false, false) => "ready",
    }
}

fn show(quotas: &[(Quota, String)], json: bool, list: bool) -> Outcome {
    if json {
        let mut values: Vec<Value> = quotas
            .iter()
            .map(|(quota, name)| {
                json!({
                    "name": name,
                    "kind": match quota.kind() {
                        QuotaKind::User => "user",
                        QuotaKind::Group => "group",
                        QuotaKind::Directory | QuotaKind::Unspecified => "directory",
                    },
                    "id": quota.id,
                    "capacity": quota.bytes_max,
                    "inodes": quota.inodes_max,
                    "used_bytes": quota.used_bytes,
                    "used_inodes": quota.used_inodes,
                    "state": state(quota),
                })
            })
            .collect();
        return match (list, values.pop()) {
            (false, Some(one)) => output::print_json(&one),
            (_, last) => {
                values.extend(last);
                output::print_json(&values.into())
            }
        };
    }
    let mut table = output::table([
        "quota", "capacity", "used", "use%", "inodes", "used", "use%", "state",
    ]);
    for (quota, name) in quotas {
        table.add_row([
            name.clone(),
            show_limit(quota.bytes_max, show_size),
            show_size(quota.used_bytes),
            percent(quota.used_bytes, quota.bytes_max),
            show_limit(quota.inodes_max, |inodes| inodes.to_string()),
            quota.used_inodes.to_string(),
            percent(quota.used_inodes, quota.inodes_max),
            state(quota).to_owned(),
        ]);
    }
    output::print_table(&table)
}

/// Rounded down, so that 100 % means full.
fn percent(used: u64, max: u64) -> String {
    match max {
        0 => "-".to_owned(),
        max => {
            let percent = (u128::from(used) * 100) / u128::from(max);
            format!("{percent} %")
        }
    }
}

//! `heliofs mount`: serves a volume at a directory until it is unmounted.

mod options;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::json;

pub(crate) use self::options::{Serving, check_mount_point};
use super::{auth, runtime, service_threads};
use crate::cli::Access;
use crate::failure::{Failure, Outcome, While};
use crate::log::{self, Role};
use crate::mounts::MountNote;
use crate::signals::Stop;
use crate::{background, output};

/// What to mount where, and how.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// META-URL NAME MOUNTPOINT, helio://HOST[,HOST…]/NAME MOUNTPOINT, or NAME MOUNTPOINT with what `heliofs auth` saved.
    #[arg(value_name = "META-URL")]
    first: String,
    /// As above; the MOUNTPOINT when two are given.
    #[arg(value_name = "NAME")]
    second: String,
    /// As above.
    #[arg(value_name = "MOUNTPOINT")]
    third: Option<String>,
    /// Returns once it is mounted, and serves in the background.
    #[arg(short = 'd', long)]
    background: bool,
    #[command(flatten)]
    serving: Serving,
    /// Where to log [default with -d: /var/log/heliofs.log, or ~/.local/state/heliofs/mount.log for users].
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

pub(crate) fn run(mut options: Options, json: bool, verbose: u8) -> Outcome {
    options.serving.take_options(&mut options.access)?;
    let (url, second) = (options.first.clone(), options.second.clone());
    let (name, mount_point) = match options.third.clone() {
        Some(third) => (Some(second), third),
        None => (None, second),
    };
    // The background process finds it for itself, so that no secret is in its arguments.
    let typed = match auth::find(&url)? {
        Some(saved) if name.is_none() => {
            options.serving.buckets = options.serving.buckets.or(saved.buckets);
            let given = options.access.token.is_some();
            options.access = options.access.or_file(Some(saved.token_file));
            (!given).then(|| url.clone())
        }
        _ => None,
    };
    // What is wrong here is said before anything runs.
    let target = options.access.target(&url, name.as_deref())?;
    let mount_point = check_mount_point(&mount_point)?;
    if options.background && !background::is_child() {
        let arguments: Vec<OsString> =
            child_arguments(&options, &target, typed.as_deref(), &mount_point, verbose);
        let mut environment = options.serving.buckets.to_environment();
        let token = options.access.token.clone();
        environment.extend(token.map(|token| ("HELIOFS_BACKGROUND_TOKEN", token.into())));
        let (pid, ready) = background::spawn(&arguments, environment)?;
        if json {
            return output::print_json(&ready);
        }
        return output::line(format_args!(
            "mounted {} at {} (process {pid})",
            target.volume,
            mount_point.display()
        ));
    }
    let child = background::is_child();
    let log_file = options
        .log_file
        .clone()
        .or_else(|| child.then(options::default_log_file));
    if child {
        background::detach_from_terminal()?;
    }
    log::start(Role::Service, verbose, log_file.as_deref())?;
    let note = MountNote {
        mount_point,
        url: target.url.to_string(),
        pid: std::process::id(),
        token_file: options
            .access
            .token_file
            .clone()
            .map(absolute)
            .transpose()?,
        log_file,
    };
    runtime(service_threads())?.block_on(serve(&options, target.cluster, note, json, child))
}

fn absolute(path: PathBuf) -> Outcome<PathBuf> {
    std::path::absolute(&path).while_(format_args!("resolve {}", path.display()))
}

/// As they came, but with paths that do not depend on the working directory.
fn child_arguments(
    options: &Options,
    target: &crate::connect::Target,
    saved: Option<&str>,
    mount_point: &std::path::Path,
    verbose: u8,
) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["mount".into(), "-d".into()];
    arguments.extend((0..verbose).map(|_| "-v".into()));
    let path = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
    if let Some(file) = &options.access.token_file
        && options.access.token.is_none()
    {
        arguments.extend(["--token-file".into(), path(file).into()]);
    }
    if let Some(file) = &options.log_file {
        arguments.extend(["--log-file".into(), path(file).into()]);
    }
    arguments.extend(options.serving.to_arguments());
    let place = saved.map_or_else(|| target.url.to_string(), str::to_owned);
    arguments.extend([place.into(), mount_point.as_os_str().to_owned()]);
    arguments
}

async fn serve(
    options: &Options,
    cluster: meta_client::Cluster,
    note: MountNote,
    json: bool,
    child: bool,
) -> Outcome {
    let mut stop = Stop::catch()?;
    let volume = note.url.rsplit('/').next().unwrap_or_default().to_owned();
    let mounted = options.serving.mount(cluster, &volume, &note).await?;
    let _noted = note.leave()?;
    let ready = json!({
        "volume": volume,
        "mount_point": note.mount_point,
        "pid": note.pid,
        "log_file": note.log_file,
    });
    tracing::info!(volume, mount_point = %note.mount_point.display(), "mounted");
    match (child, json) {
        (true, _) => background::ready(&ready)?,
        (false, true) => output::line(&ready)?,
        (false, false) => output::line(format_args!(
            "mounted {volume} at {}",
            note.mount_point.display()
        ))?,
    }
    finish(mounted, &mut stop).await
}

/// How long a stopping mount may take to store what it holds.
const STOP_WITHIN: Duration = Duration::from_secs(60);

/// Waits for an unmount or a signal; after a signal it unmounts by itself.
pub(crate) async fn finish(mounted: fuse_client::Mounted, stop: &mut Stop) -> Outcome {
    tokio::select! {
        ended = mounted.wait() => ended.map_err(Failure::new),
        signal = stop.wait() => {
            tracing::info!(signal, "unmounting");
            match tokio::time::timeout(STOP_WITHIN, mounted.unmount()).await {
                Ok(done) => done.map_err(Failure::new),
                Err(_) => Err(Failure::new(format!("not everything was stored within {STOP_WITHIN:?}"))),
            }
        }
    }
}

//! `heliofs rmr`: removes whole trees; they are gone for everybody at once, and taken apart in the background.

use std::path::Path;

use bytes::Bytes;
use clap::Args;
use heliofs_proto::ids::Ino;
use heliofs_proto::v1::{self, FsError, RemoveTree, command::Op};
use meta_client::{ClientError, Session};
use serde_json::json;

use super::info::{Place, places};
use crate::cli::Access;
use crate::failure::{Failure, Outcome};
use crate::output;

/// What to remove.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// Paths in mounts, or META-URL with the volume's name and then paths inside the volume.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,
}

pub(crate) async fn run(options: Options, json: bool) -> Outcome {
    let mut removed = Vec::new();
    for (target, places) in places(&options.access, &options.paths)? {
        let session = target.session(false).await?;
        let mut outcome = Ok(());
        for place in &places {
            outcome = remove(&session, place).await;
            if outcome.is_err() {
                break;
            }
            removed.push(place.shown.clone());
        }
        session.detach().await;
        outcome?;
    }
    if json {
        return output::print_json(&json!({ "removed": removed }));
    }
    Ok(())
}

/// As the caller's own user: the server trusts whoever has the token, so the check is ours.
async fn remove(session: &Session, place: &Place) -> Outcome {
    let inside = Path::new(&place.inside);
    let (Some(parent), Some(name)) = (inside.parent(), inside.file_name()) else {
        return Err(
            Failure::usage(format!("{} is the root of the volume", place.shown))
                .hint("remove what is in it, or `heliofs destroy` the volume"),
        );
    };
    if !nix::unistd::geteuid().is_root() {
        return Err(
            Failure::new("rmr is root's: it checks no permissions below PATH").hint("use rm -r"),
        );
    }
    let found = super::info::walk(session, parent).await?;
    let Some(found) = found else {
        return Err(not_found(place));
    };
    let op = Op::RemoveTree(RemoveTree {
        parent: Ino(found.ino).0,
        name: Bytes::copy_from_slice(name.as_encoded_bytes()),
    });
    let caller = v1::Caller {
        uid: 0,
        gid: 0,
        pid: std::process::id(),
        ..v1::Caller::default()
    };
    match session.mutate(caller, op).await {
        Ok(_) => Ok(()),
        Err(ClientError::Verdict(FsError::NotFound)) => Err(not_found(place)),
        Err(error) => Err(error.into()),
    }
}

fn not_found(place: &Place) -> Failure {
    Failure::new(format!("{}: no such file or directory", place.shown))
}

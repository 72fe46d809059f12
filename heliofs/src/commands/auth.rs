//! `heliofs auth`: saves how a volume is reached from this machine, so that its name is all that other commands need.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;
use meta_client::{MetaUrl, Token};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::buckets::BucketAccess;
use crate::cli::Access;
use crate::failure::{Failure, Outcome, While};
use crate::output;

/// What to save.
#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// The volume's name here, and what commands are then given instead of a META-URL. Without it: lists what is saved.
    name: Option<String>,
    /// helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]; the volume is NAME unless it is named.
    #[arg(long, value_name = "META-URL")]
    meta: Option<String>,
    #[command(flatten)]
    buckets: BucketAccess,
    /// Forgets what was saved.
    #[arg(long, requires = "name")]
    delete: bool,
}

/// What is saved of a volume. The token lies beside it, in a file of its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Saved {
    /// META-URL with the volume.
    pub(crate) meta: String,
    /// How its buckets are reached.
    #[serde(default)]
    pub(crate) buckets: BucketAccess,
    /// Where the token is.
    #[serde(skip)]
    pub(crate) token_file: PathBuf,
}

fn directory() -> Outcome<PathBuf> {
    let config = match (
        std::env::var_os("XDG_CONFIG_HOME"),
        std::env::var_os("HOME"),
    ) {
        (Some(config), _) => PathBuf::from(config),
        (None, Some(home)) => Path::new(&home).join(".config"),
        (None, None) => {
            return Err(Failure::new("neither HOME nor XDG_CONFIG_HOME is set")
                .hint("they say where names of volumes are saved"));
        }
    };
    Ok(config.join("heliofs/auth"))
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

/// What was saved under a name; `None`: nothing was, or it is no name.
pub(crate) fn find(name: &str) -> Outcome<Option<Saved>> {
    if !is_name(name) {
        return Ok(None);
    }
    let Ok(directory) = directory() else {
        return Ok(None);
    };
    let file = directory.join(format!("{name}.json"));
    let text = match fs::read(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).while_(format_args!("read {}", file.display())),
    };
    let saved: Saved = serde_json::from_slice(&text).map_err(|error| {
        Failure::new(format!("{} can't be read: {error}", file.display()))
            .hint("save it again with `heliofs auth`")
    })?;
    Ok(Some(Saved {
        token_file: directory.join(format!("{name}.token")),
        ..saved
    }))
}

/// Readable by its owner only, and whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> Outcome {
    let doing = || format!("write {}", path.display());
    let new = path.with_extension("new");
    if let Err(error) = fs::remove_file(&new)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).while_(doing());
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)
        .while_(doing())?;
    file.write_all(bytes).while_(doing())?;
    file.sync_all().while_(doing())?;
    fs::rename(&new, path).while_(doing())
}

fn list(json: bool) -> Outcome {
    let mut names = Vec::new();
    match fs::read_dir(directory()?) {
        Ok(entries) => {
            for entry in entries {
                let path = entry.while_("list what is saved")?.path();
                if path
                    .extension()
                    .is_some_and(|extension| extension == "json")
                {
                    names.extend(path.file_stem().map(|it| it.to_string_lossy().into_owned()));
                }
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).while_("list what is saved"),
    }
    names.sort();
    let mut rows = Vec::new();
    for name in names {
        if let Some(saved) = find(&name)? {
            rows.push((name, saved.meta));
        }
    }
    if json {
        let rows = rows
            .iter()
            .map(|(name, meta)| json!({ "name": name, "meta": meta }));
        return output::print_json(&rows.collect());
    }
    if rows.is_empty() {
        return output::line(
            "nothing is saved: heliofs auth NAME --meta META-URL --token-file FILE",
        );
    }
    for (name, meta) in rows {
        output::line(format_args!("{name}  {meta}"))?;
    }
    Ok(())
}

pub(crate) fn run(options: Options, json: bool) -> Outcome {
    let Some(name) = &options.name else {
        return list(json);
    };
    if !is_name(name) {
        return Err(Failure::usage(format!("`{name}` can't be a name"))
            .hint("lower-case letters, digits and dashes"));
    }
    let directory = directory()?;
    let file = directory.join(format!("{name}.json"));
    if options.delete {
        for file in [file, directory.join(format!("{name}.token"))] {
            fs::remove_file(&file).while_(format_args!("remove {}", file.display()))?;
        }
        return output::line(format_args!("{name} is forgotten"));
    }
    let before = find(name)?;
    let meta = match (&options.meta, &before) {
        (Some(meta), _) => meta.clone(),
        (None, Some(before)) => before.meta.clone(),
        (None, None) => {
            return Err(Failure::usage("--meta is missing")
                .hint("heliofs auth NAME --meta helio://HOST[,HOST…][/VOLUME] --token-file FILE"));
        }
    };
    let mut url: MetaUrl = meta.parse()?;
    url.volume.get_or_insert_with(|| name.clone());
    let token = match &before {
        // What was saved stays, unless something else is said.
        Some(before) if !options.access.is_given() => Token::from_file(&before.token_file)?,
        _ => options.access.token()?,
    };
    let buckets = match before {
        Some(before) => options.buckets.or(before.buckets),
        None => options.buckets,
    };
    let saved = Saved {
        meta: url.to_string(),
        buckets: buckets.with_environment()?,
        token_file: PathBuf::new(),
    };
    fs::create_dir_all(&directory).while_(format_args!("create {}", directory.display()))?;
    let secret = super::format::secret_of(&token);
    write(&directory.join(format!("{name}.token")), secret.as_bytes())?;
    let text = serde_json::to_vec_pretty(&saved).map_err(Failure::new)?;
    write(&file, &text)?;
    if json {
        return output::print_json(&json!({ "name": name, "meta": saved.meta, "file": file }));
    }
    output::line(format_args!(
        "saved in {}: heliofs mount {name} DIRECTORY",
        file.display()
    ))
}

//! Which mounts of heliofs run on this machine: each leaves a note that names its volume, so that `info`, `rmr` and `umount`
//! work on paths.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome, While};

/// What a mount says about itself. No secrets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MountNote {
    /// Absolute, without links.
    pub(crate) mount_point: PathBuf,
    /// With the volume's name.
    pub(crate) url: String,
    /// The process that serves it.
    pub(crate) pid: u32,
    /// Where its token is, when it came from a file.
    pub(crate) token_file: Option<PathBuf>,
    /// Where it logs.
    pub(crate) log_file: Option<PathBuf>,
}

/// Removes the note when the mount is over.
pub(crate) struct Noted(PathBuf);

impl Drop for Noted {
    fn drop(&mut self) {
        // A note without a process is ignored by readers, so that a failure here costs nothing.
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "the mount's note was not removed");
        }
    }
}

fn directory() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return PathBuf::from("/run/heliofs");
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(runtime) => Path::new(&runtime).join("heliofs"),
        None => std::env::temp_dir().join(format!("heliofs-{}", nix::unistd::geteuid())),
    }
}

impl MountNote {
    /// Leaves the note.
    pub(crate) fn leave(&self) -> Outcome<Noted> {
        let directory = directory();
        fs::create_dir_all(&directory).while_(format_args!("create {}", directory.display()))?;
        // One process may serve one mount only, so that the process id names the note.
        let path = directory.join(format!("{}.json", self.pid));
        let part = directory.join(format!(".{}.part", self.pid));
        let text = serde_json::to_vec(self).while_("encode the mount's note")?;
        fs::write(&part, text).while_(format_args!("write {}", part.display()))?;
        fs::rename(&part, &path).while_(format_args!("write {}", path.display()))?;
        Ok(Noted(path))
    }

    /// If this file exists when the mount ends, the mount stores everything first, however long that takes.
    pub(crate) fn flush_marker(&self) -> PathBuf {
        directory().join(format!("{}.flush", self.pid))
    }

    /// Whether the process still runs. One that has ended and that its parent has not looked at yet does not.
    pub(crate) fn alive(&self) -> bool {
        // Source: proc_pid_stat(5); the state follows the name, which is in parentheses and may hold some itself.
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let state = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.chars().next());
        !matches!(state, None | Some('Z' | 'X'))
    }
}

/// Notes of mounts whose process runs.
pub(crate) fn all() -> Outcome<Vec<MountNote>> {
    let directory = directory();
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).while_(format_args!("read {}", directory.display())),
    };
    let mut notes = Vec::new();
    for entry in entries {
        let path = entry
            .while_(format_args!("read {}", directory.display()))?
            .path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        // It may vanish at any time, with its mount.
        let Ok(text) = fs::read(&path) else { continue };
        match serde_json::from_slice::<MountNote>(&text) {
            Ok(note) if note.alive() => notes.push(note),
            Ok(_) => drop(fs::remove_file(&path)),
            Err(error) => tracing::warn!(path = %path.display(), %error, "not a note of a mount"),
        }
    }
    Ok(notes)
}

/// The mount that `path` is in, and the path inside of it ("" is the root). Links in all but the last component are followed.
pub(crate) fn containing(path: &Path) -> Outcome<(MountNote, PathBuf)> {
    let absolute = resolve(path).while_(format_args!("find {}", path.display()))?;
    let best = all()?
        .into_iter()
        .filter_map(|note| {
            let inside = absolute.strip_prefix(&note.mount_point).ok()?.to_owned();
            Some((note, inside))
        })
        // Mounts may lie in mounts: the innermost one holds the path.
        .min_by_key(|(_, inside)| inside.components().count());
    best.ok_or_else(|| {
        Failure::new(format!(
            "{} is not in a mount of heliofs on this machine",
            path.display()
        ))
        .hint("name the volume instead: helio://HOST/VOLUME PATH")
    })
}

/// Absolute, with the links of the parent resolved and those of the last component kept.
pub(crate) fn resolve(path: &Path) -> io::Result<PathBuf> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => {
            let parent = if parent.as_os_str().is_empty() {
                Path::new(".")
            } else {
                parent
            };
            Ok(fs::canonicalize(parent)?.join(name))
        }
        _ => fs::canonicalize(path),
    }
}

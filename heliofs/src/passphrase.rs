//! Where the passphrase of an encrypted volume comes from: never from argv.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use blockstore::Passphrase;
use clap::Args;

use crate::failure::{Failure, Outcome, While};

/// The variable that holds it.
const VARIABLE: &str = "HELIOFS_PASSPHRASE";

/// How the passphrase is given.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct PassphraseSource {
    /// File with the passphrase of an encrypted volume, readable by its owner only. Else: HELIOFS_PASSPHRASE.
    #[arg(long, value_name = "FILE")]
    pub(crate) passphrase_file: Option<PathBuf>,
}

impl PassphraseSource {
    /// The passphrase, if one is given.
    pub(crate) fn find(&self) -> Outcome<Option<Passphrase>> {
        let text = match (&self.passphrase_file, std::env::var(VARIABLE)) {
            (Some(file), _) => read_private(file, "passphrase")?,
            (None, Ok(text)) if !text.is_empty() => text,
            (None, _) => return Ok(None),
        };
        let passphrase = Passphrase::new(text);
        if passphrase.is_empty() {
            return Err(Failure::usage("the passphrase is empty"));
        }
        Ok(Some(passphrase))
    }

    /// The passphrase; without one it is said how to give it.
    pub(crate) fn required(&self) -> Outcome<Passphrase> {
        self.find()?.ok_or_else(|| {
            Failure::usage("the volume is encrypted, and no passphrase was given").hint(format!(
                "--passphrase-file FILE, or {VARIABLE} in the environment"
            ))
        })
    }

    /// As a flag, for the background process. The path is made absolute; the variable is inherited.
    pub(crate) fn to_arguments(&self) -> Vec<OsString> {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        self.passphrase_file
            .iter()
            .flat_map(|path| ["--passphrase-file".into(), absolute(path).into()])
            .collect()
    }
}

/// The text of a file that nobody else may read; `what` it holds is for the error.
pub(crate) fn read_private(path: &Path, what: &str) -> Outcome<String> {
    use std::os::unix::fs::PermissionsExt;
    let doing = || format!("read the {what} in {}", path.display());
    let mode = std::fs::metadata(path)
        .while_(doing())?
        .permissions()
        .mode();
    if mode & 0o077 != 0 {
        return Err(
            Failure::new(format!("{} can be read by others", path.display()))
                .hint(format!("chmod 600 {}", path.display())),
        );
    }
    std::fs::read_to_string(path).while_(doing())
}

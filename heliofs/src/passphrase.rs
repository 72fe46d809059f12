//! Where the passphrase or the key of an encrypted volume comes from: no secret from argv.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockstore::{AgeKey, KeyOpener, Passphrase, RsaKey};
use clap::Args;
use zeroize::Zeroizing;

use crate::failure::{Failure, Outcome, While};

/// The variable that holds it.
const VARIABLE: &str = "HELIOFS_PASSPHRASE";

/// The variable that holds the passphrase of an RSA key.
const KEY_VARIABLE: &str = "HELIOFS_KEY_PASSPHRASE";

/// How the passphrase or the key is given.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct PassphraseSource {
    /// File with the passphrase of an encrypted volume, readable by its owner only. Else: HELIOFS_PASSPHRASE.
    #[arg(long, value_name = "FILE")]
    pub(crate) passphrase_file: Option<PathBuf>,
    /// File with an RSA key in PEM, or an age key (X25519), that the volume's key is wrapped for, instead of a passphrase: the
    /// private key or age identity, readable by its owner only (the passphrase that an RSA key may have itself:
    /// HELIOFS_KEY_PASSPHRASE); to format, the public key or age recipient is enough.
    #[arg(
        long,
        visible_alias = "encrypt-rsa-key",
        value_name = "FILE",
        conflicts_with = "passphrase_file"
    )]
    pub(crate) encrypt_key: Option<PathBuf>,
}

impl PassphraseSource {
    /// Whether anything was given on the command line.
    pub(crate) fn is_given(&self) -> bool {
        self.passphrase_file.is_some() || self.encrypt_key.is_some()
    }

    /// The passphrase or the key, if one is given.
    pub(crate) fn find(&self) -> Outcome<Option<KeyOpener>> {
        if let Some(file) = &self.encrypt_key {
            return Ok(Some(read_key(file)?));
        }
        let text = match (&self.passphrase_file, std::env::var(VARIABLE)) {
            (Some(file), _) => read_private(file, "passphrase")?,
            (None, Ok(text)) if !text.is_empty() => Zeroizing::new(text),
            (None, _) => return Ok(None),
        };
        let passphrase = Passphrase::new(text);
        if passphrase.is_empty() {
            return Err(Failure::usage("the passphrase is empty"));
        }
        Ok(Some(passphrase.into()))
    }

    /// The passphrase or the key; without one it is said how to give it.
    pub(crate) fn required(&self) -> Outcome<KeyOpener> {
        self.find()?.ok_or_else(|| {
            Failure::usage("the volume is encrypted, and no passphrase was given").hint(format!(
                "--passphrase-file FILE, or {VARIABLE} in the environment; --encrypt-key FILE for an RSA or age key"
            ))
        })
    }

    /// As a flag, for the background process. The path is made absolute; the variable is inherited.
    pub(crate) fn to_arguments(&self) -> Vec<OsString> {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let files = [
            ("--passphrase-file", &self.passphrase_file),
            ("--encrypt-key", &self.encrypt_key),
        ];
        files
            .into_iter()
            .filter_map(|(flag, path)| Some((flag, path.as_ref()?)))
            .flat_map(|(flag, path)| [flag.into(), absolute(path).into()])
            .collect()
    }
}

/// An RSA key or an age key. A public one may be read by anybody.
pub(crate) fn read_key(file: &Path) -> Outcome<KeyOpener> {
    let doing = || format!("read the key in {}", file.display());
    let text = Zeroizing::new(std::fs::read_to_string(file).while_(doing())?);
    let age = AgeKey::is_in(&text);
    let text = match age == Some(true) || text.contains("PRIVATE KEY") {
        true => read_private(file, "key")?,
        false => text,
    };
    if age.is_some() {
        return Ok(KeyOpener::Age(Arc::new(AgeKey::from_text(&text)?)));
    }
    if text.starts_with("age-encryption.org/") || text.contains("BEGIN AGE ENCRYPTED FILE") {
        return Err(
            Failure::new(format!("{} is encrypted with age", file.display()))
                .hint("decrypt it first: age -d -o KEY FILE"),
        );
    }
    let passphrase = match std::env::var(KEY_VARIABLE) {
        Ok(text) if !text.is_empty() => Some(Passphrase::new(Zeroizing::new(text))),
        _ => None,
    };
    let key = RsaKey::from_pem(&text, passphrase.as_ref())?;
    Ok(KeyOpener::Rsa(Arc::new(key)))
}

/// The text of a file that nobody else may read; `what` it holds is for the error.
pub(crate) fn read_private(path: &Path, what: &str) -> Outcome<Zeroizing<String>> {
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
    Ok(Zeroizing::new(
        std::fs::read_to_string(path).while_(doing())?,
    ))
}

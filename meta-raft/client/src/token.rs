//! The cluster token: what every connection proves.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tonic::metadata::{Ascii, MetadataValue};

/// Shorter tokens can be guessed.
const TOKEN_BYTES_MIN: usize = 16;

/// The secret that all nodes and clients of a cluster share. `Debug` doesn't show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    secret: String,
}

/// A token that is not used, and why.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file can't be read.
    #[error("cannot read the token file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Others than the owner may read the file.
    #[error("the token file {} can be read by others (mode {mode:04o}): run chmod 600 on it", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Fewer than 16 bytes, or characters that don't travel in a header.
    #[error(
        "the token must be at least {TOKEN_BYTES_MIN} printable ASCII characters without spaces; make one with: openssl rand -hex 32"
    )]
    Unusable,
}

impl Token {
    /// A token from text (an environment variable, say); white space around it is dropped.
    pub fn new(text: &str) -> Result<Self, TokenError> {
        let secret = text.trim();
        if secret.len() < TOKEN_BYTES_MIN || !secret.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(TokenError::Unusable);
        }
        Ok(Self {
            secret: secret.to_owned(),
        })
    }

    /// Reads a token from a file, which only its owner may read: a secret that others can read is not one.
    pub fn from_file(path: &Path) -> Result<Self, TokenError> {
        let read = |source| TokenError::Read {
            path: path.to_owned(),
            source,
        };
        let mode = std::fs::metadata(path).map_err(read)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(TokenError::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        Self::new(&std::fs::read_to_string(path).map_err(read)?)
    }

    /// The secret itself: for starting a server with it, never for showing.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// The value of the `authorization` header.
    pub(crate) fn bearer(&self) -> MetadataValue<Ascii> {
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", self.secret)
            .parse()
            .expect("new() admits only graphic ASCII");
        value.set_sensitive(true);
        value
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_never_shown_and_a_weak_one_is_refused() {
        let token = Token::new(" 0123456789abcdef\n").unwrap();
        assert_eq!(token.secret(), "0123456789abcdef");
        assert_eq!(format!("{token:?}"), "Token(…)");
        assert!(matches!(Token::new("short"), Err(TokenError::Unusable)));
        assert!(matches!(
            Token::new("0123456789 abcdef"),
            Err(TokenError::Unusable)
        ));
    }

    #[test]
    fn a_token_file_that_others_can_read_is_refused() {
        let path = std::env::temp_dir().join(format!("heliofs-token-{}", std::process::id()));
        std::fs::write(&path, "0123456789abcdef\n").unwrap();
        let chmod = |mode| {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        chmod(0o644);
        let exposed = Token::from_file(&path);
        chmod(0o600);
        let private = Token::from_file(&path);
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(
            exposed,
            Err(TokenError::Exposed { mode: 0o644, .. })
        ));
        assert!(private.is_ok());
        assert!(matches!(
            Token::from_file(&path),
            Err(TokenError::Read { .. })
        ));
    }
}

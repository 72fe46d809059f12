//! Errors as a user meets them: what went wrong, what to do next, and an exit code.

use std::fmt;
use std::process::ExitCode;

use blockstore::StoreError;
use meta_client::{AttachError, ClientError, ClusterError, TokenError, UrlError};

/// The command was understood and did not succeed.
const FAILED: u8 = 1;
/// What was typed makes no sense; clap uses the same number.
const USAGE: u8 = 2;
/// Two things that should be equal are not.
const DIFFERS: u8 = 2;

/// A check has found damage that is left; fsck(8) of other file systems uses the same number.
const DAMAGED: u8 = 4;

/// Why a command ends without success.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    hint: Option<String>,
    code: u8,
}

/// The result of a command.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// The command failed.
    pub(crate) fn new(message: impl fmt::Display) -> Self {
        Self {
            message: message.to_string(),
            hint: None,
            code: FAILED,
        }
    }

    /// What was typed is wrong.
    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self {
            code: USAGE,
            ..Self::new(message)
        }
    }

    /// A comparison found differences; scripts tell them from failures by the exit code.
    pub(crate) fn differs(message: impl fmt::Display) -> Self {
        Self {
            code: DIFFERS,
            ..Self::new(message)
        }
    }

    /// Damage was found.
    pub(crate) fn damaged(message: impl fmt::Display) -> Self {
        Self {
            code: DAMAGED,
            ..Self::new(message)
        }
    }

    /// What to do next.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    /// What went wrong, without what to do next.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// As JSON, for `--json` and for the parent of a background mount.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "error": self.message, "hint": self.hint, "code": self.code })
    }

    /// What [`Failure::to_json`] wrote.
    pub(crate) fn from_json(value: &serde_json::Value) -> Option<Self> {
        Some(Self {
            message: value.get("error")?.as_str()?.to_owned(),
            hint: value
                .get("hint")
                .and_then(|hint| hint.as_str())
                .map(str::to_owned),
            code: value.get("code")?.as_u64()?.try_into().ok()?,
        })
    }

    /// Prints it and gives the exit code.
    pub(crate) fn report(&self, json: bool) -> ExitCode {
        if json {
            eprintln!("{}", self.to_json());
        } else {
            eprintln!("error: {}", self.message);
            if let Some(hint) = &self.hint {
                eprintln!("hint: {hint}");
            }
        }
        self.exit_code()
    }

    /// 1, 2 or 4.
    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }
}

/// Adds what was being done to an error that says only why.
pub(crate) trait While<T> {
    /// `doing` reads "cannot {doing}: {why}".
    fn while_(self, doing: impl fmt::Display) -> Outcome<T>;
}

impl<T, E: fmt::Display> While<T> for Result<T, E> {
    fn while_(self, doing: impl fmt::Display) -> Outcome<T> {
        self.map_err(|error| Failure::new(format!("cannot {doing}: {error}")))
    }
}

impl From<ClusterError> for Failure {
    fn from(error: ClusterError) -> Self {
        match error {
            ClusterError::NoNode { peers, detail } => {
                Self::new(format!("no metadata node answered at {peers} ({detail})"))
                    .hint("is one running (`heliofs meta`), and is the address right?")
            }
            ClusterError::NoLeader { peers, waited, detail } => Self::new(format!(
                "no leader at {peers} within {:.0} s ({detail})",
                waited.as_secs_f64()
            ))
            .hint("a majority of the nodes must run: see `heliofs raft status`; a new cluster is formed with `heliofs raft init`"),
            ClusterError::Unknown { peer, call, detail } => Self::new(format!(
                "{peer} did not answer {call}, which may have taken effect ({detail})"
            ))
            .hint("look with `heliofs status` before trying again"),
            ClusterError::TokenRefused { peer } => {
                Self::new(format!("{peer} refused the cluster token"))
                    .hint("pass the token that the node was started with: --token-file FILE or HELIOFS_TOKEN")
            }
            ClusterError::NotFound(message)
            | ClusterError::Invalid(message)
            | ClusterError::OtherHistory(message) => Self::new(message),
            ClusterError::Trimmed(message) => {
                Self::new(format!("the changelog no longer reaches back that far: {message}"))
                    .hint("begin at a later position; `heliofs status` shows each volume's")
            }
        }
    }
}

impl From<AttachError> for Failure {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::Cluster(error) => error.into(),
            AttachError::NoVolume { volume, .. } => Self::no_volume(&volume),
        }
    }
}

impl Failure {
    /// The cluster has no volume of that name.
    pub(crate) fn no_volume(name: &str) -> Self {
        Self::new(format!("the cluster has no volume `{name}`"))
            .hint("`heliofs status META-URL` lists the volumes; `heliofs format` creates one")
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Verdict(verdict) => {
                let errno = verdict.errno().unwrap_or(libc::EIO);
                Self::new(std::io::Error::from_raw_os_error(errno))
            }
            error @ (ClientError::Unavailable { .. } | ClientError::Unknown { .. }) => {
                Self::new(error).hint("see `heliofs raft status`")
            }
            error @ (ClientError::SessionGone(_) | ClientError::Invalid(_)) => Self::new(error),
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let hint = match &error {
            StoreError::Denied { operation, .. } if operation.contains("key") => Some(
                "give what opens this volume: --passphrase-file FILE or HELIOFS_PASSPHRASE; --encrypt-key FILE, whose own passphrase is in HELIOFS_KEY_PASSPHRASE",
            ),
            StoreError::Denied { .. } => Some(
                "check the access key, the secret key and the bucket's policy; keys come from --access-key and \
                 SECRET_KEY or --secret-key-file",
            ),
            StoreError::Unavailable { .. } | StoreError::Retry { .. } => {
                Some("is the object store running, and is --bucket right?")
            }
            StoreError::AlreadyExists { .. }
            | StoreError::NotFound { .. }
            | StoreError::Corrupt { .. }
            | StoreError::Invalid(_) => None,
        };
        let failure = Self::new(&error);
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

impl From<TokenError> for Failure {
    fn from(error: TokenError) -> Self {
        match &error {
            TokenError::Exposed { path, .. } => {
                let hint = format!("chmod 600 {}", path.display());
                Self::new(error).hint(hint)
            }
            TokenError::Read { .. } | TokenError::Unusable => Self::new(error),
        }
    }
}

impl From<UrlError> for Failure {
    fn from(error: UrlError) -> Self {
        Self::usage(error)
    }
}

//! From what a user types to a cluster, a volume, a session.

use std::path::{Path, PathBuf};
use std::time::Duration;

use meta_client::{Cluster, MetaUrl, Session, SessionOptions, Token};

use crate::cli::Access;
use crate::commands::{auth, version};
use crate::failure::{Failure, Outcome};

/// A cluster and how it was named.
pub(crate) struct Connected {
    /// What was typed, parsed.
    pub(crate) url: MetaUrl,
    /// Calls without a session.
    pub(crate) cluster: Cluster,
}

/// A cluster and one of its volumes.
pub(crate) struct Target {
    /// Calls without a session.
    pub(crate) cluster: Cluster,
    /// The peers as typed, with the volume's name.
    pub(crate) url: MetaUrl,
    /// The volume's name.
    pub(crate) volume: String,
}

impl Access {
    /// The token, from the first place that has one.
    pub(crate) fn token(&self) -> Outcome<Token> {
        if let Some(text) = &self.token {
            return Ok(Token::new(text)?);
        }
        if let Some(file) = &self.token_file {
            return Ok(Token::from_file(file)?);
        }
        if let Some(text) = std::env::var_os("HELIOFS_TOKEN") {
            let text = text
                .into_string()
                .map_err(|_| Failure::new("HELIOFS_TOKEN is not text"))?;
            return Ok(Token::new(&text)?);
        }
        for file in default_token_files() {
            if file.exists() {
                return Ok(Token::from_file(&file)?);
            }
        }
        Err(Failure::new("no cluster token was given").hint(
            "nodes and clients share one: (umask 077; openssl rand -hex 32 > token), then --token-file token, \
             or HELIOFS_TOKEN in the environment",
        ))
    }

    /// Whether the command line, or HELIOFS_TOKEN_FILE, says which token it is.
    pub(crate) fn is_given(&self) -> bool {
        self.token.is_some() || self.token_file.is_some()
    }

    /// As given; the token in `file` if none is.
    pub(crate) fn or_file(&self, file: Option<PathBuf>) -> Self {
        match self.is_given() {
            true => self.clone(),
            false => Self {
                token: None,
                token_file: file,
            },
        }
    }

    /// With the token in `file` if there is one; else as given.
    pub(crate) fn with_file(&self, file: Option<PathBuf>) -> Self {
        match file {
            None => self.clone(),
            file => Self {
                token: None,
                token_file: file,
            },
        }
    }

    /// The cluster at a META-URL, or of a name that was saved with `heliofs auth`.
    pub(crate) fn connect(&self, url: &str) -> Outcome<Connected> {
        let (url, token) = match auth::find(url)? {
            Some(saved) if !self.is_given() => (saved.meta, Token::from_file(&saved.token_file)?),
            Some(saved) => (saved.meta, self.token()?),
            None => (url.to_owned(), self.token()?),
        };
        let url: MetaUrl = url.parse()?;
        let cluster = Cluster::from_url(&url, token);
        Ok(Connected { url, cluster })
    }

    /// The volume at `META-URL NAME` or `helio://…/NAME`.
    pub(crate) fn target(&self, url: &str, name: Option<&str>) -> Outcome<Target> {
        let Connected { mut url, cluster } = self.connect(url)?;
        let volume = match (name, &url.volume) {
            (Some(name), None) => name.to_owned(),
            (None, Some(name)) => name.clone(),
            (Some(name), Some(other)) if name == other => name.to_owned(),
            (Some(name), Some(other)) => {
                return Err(Failure::usage(format!(
                    "the volume is named twice: {other} and {name}"
                )));
            }
            (None, None) => {
                return Err(Failure::usage("no volume is named")
                    .hint(format!("write META-URL NAME, or {url}/NAME")));
            }
        };
        url.volume = Some(volume.clone());
        Ok(Target {
            cluster,
            url,
            volume,
        })
    }
}

impl Target {
    /// A session for a command.
    pub(crate) async fn session(&self, read_only: bool) -> Outcome<Session> {
        self.attach(self.options(read_only)).await
    }

    /// A session for a command whose questions take minutes to answer.
    pub(crate) async fn patient_session(&self, read_only: bool) -> Outcome<Session> {
        let options = SessionOptions {
            op_deadline: Duration::from_secs(300),
            ..self.options(read_only)
        };
        self.attach(options).await
    }

    fn options(&self, read_only: bool) -> SessionOptions {
        SessionOptions {
            volume: self.volume.clone(),
            host: host_name(),
            build: version::BUILD.to_owned(),
            read_only,
            short_lived: true,
            ..SessionOptions::default()
        }
    }

    async fn attach(&self, options: SessionOptions) -> Outcome<Session> {
        Ok(Session::attach(self.cluster.clone(), options).await?)
    }
}

/// This machine's name, for `heliofs status`.
pub(crate) fn host_name() -> String {
    nix::unistd::gethostname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

fn default_token_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    if let Some(home) = std::env::var_os("XDG_CONFIG_HOME") {
        files.push(Path::new(&home).join("heliofs/token"));
    } else if let Some(home) = std::env::var_os("HOME") {
        files.push(Path::new(&home).join(".config/heliofs/token"));
    }
    files.push(PathBuf::from("/etc/heliofs/token"));
    files
}

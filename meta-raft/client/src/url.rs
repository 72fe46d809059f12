//! `helio://host1:port,host2:port[/NAME]`: which cluster, and which of its volumes.

use std::fmt;
use std::str::FromStr;

/// Where a metadata node listens unless told otherwise.
pub const PORT_DEFAULT: u16 = 7870;

const SCHEME: &str = "helio://";

/// A parsed META-URL: at least one peer as `host:port`, and perhaps a volume's name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MetaUrl {
    /// `host:port`, in the order given, none twice. IPv6 addresses keep their brackets.
    pub peers: Vec<String>,
    /// The part after the slash.
    pub volume: Option<String>,
}

/// A META-URL that can't be used; every message says what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// It doesn't begin with `helio://`.
    #[error("`{0}` is not a metadata URL; write helio://HOST[:PORT][,HOST[:PORT]…][/VOLUME]")]
    Scheme(String),
    /// Nothing between `//` and `/`, or between two commas.
    #[error("`{0}` names no host where one is expected; write helio://HOST[:PORT][,HOST[:PORT]…]")]
    NoHost(String),
    /// A port is not a number from 1 to 65535.
    #[error("`{port}` is not a port in `{peer}`; write a number from 1 to 65535")]
    Port {
        /// What stood after the colon.
        port: String,
        /// The peer as given.
        peer: String,
    },
    /// A host with characters that no host name or address has.
    #[error(
        "`{0}` is not a host name or address; IPv6 addresses are written in brackets: [::1]:7870"
    )]
    Host(String),
    /// The same peer twice.
    #[error("`{0}` is named twice")]
    Twice(String),
    /// More than one path component, or characters that no volume's name has.
    #[error("`{0}` is not a volume's name; one name follows the hosts: helio://HOST/VOLUME")]
    Volume(String),
}

impl MetaUrl {
    /// The volume's name, or an error that says how to give one.
    pub fn require_volume(&self) -> Result<&str, UrlError> {
        self.volume
            .as_deref()
            .ok_or_else(|| UrlError::Volume(String::new()))
    }
}

impl FromStr for MetaUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let rest = text
            .strip_prefix(SCHEME)
            .ok_or_else(|| UrlError::Scheme(text.to_owned()))?;
        let (hosts, volume) = match rest.split_once('/') {
            Some((hosts, path)) => (hosts, parse_volume(path)?),
            None => (rest, None),
        };
        let mut peers = Vec::new();
        for host in hosts.split(',') {
            if host.is_empty() {
                return Err(UrlError::NoHost(text.to_owned()));
            }
            let peer = parse_peer(host)?;
            if peers.contains(&peer) {
                return Err(UrlError::Twice(peer));
            }
            peers.push(peer);
        }
        Ok(Self { peers, volume })
    }
}

impl fmt::Display for MetaUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.peers.join(","))?;
        match &self.volume {
            Some(volume) => write!(f, "/{volume}"),
            None => Ok(()),
        }
    }
}

/// One trailing slash is forgiven: completion and copying leave it behind.
fn parse_volume(path: &str) -> Result<Option<String>, UrlError> {
    let name = path.strip_suffix('/').unwrap_or(path);
    if name.is_empty() {
        return Ok(None);
    }
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.chars().all(plain) {
        Ok(Some(name.to_owned()))
    } else {
        Err(UrlError::Volume(name.to_owned()))
    }
}

/// `host`, `host:port`, `[v6]` or `[v6]:port` to `host:port`. Also for addresses given outside of a URL.
pub fn parse_peer(peer: &str) -> Result<String, UrlError> {
    let bad_host = || UrlError::Host(peer.to_owned());
    let (host, port) = if let Some(rest) = peer.strip_prefix('[') {
        let (address, after) = rest.split_once(']').ok_or_else(bad_host)?;
        address
            .parse::<std::net::Ipv6Addr>()
            .map_err(|_| bad_host())?;
        let port = match after {
            "" => None,
            _ => Some(after.strip_prefix(':').ok_or_else(bad_host)?),
        };
        (format!("[{address}]"), port)
    } else {
        let (host, port) = match peer.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (peer, None),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if port.is_some_and(|port| port.contains(':')) || !host.chars().all(plain) {
            return Err(bad_host());
        }
        (host.to_owned(), port)
    };
    if host.is_empty() {
        return Err(UrlError::NoHost(peer.to_owned()));
    }
    let port = match port {
        None => PORT_DEFAULT,
        Some(port) => match port.parse() {
            Ok(number) if number != 0 => number,
            _ => {
                return Err(UrlError::Port {
                    port: port.to_owned(),
                    peer: peer.to_owned(),
                });
            }
        },
    };
    Ok(format!("{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<MetaUrl, UrlError> {
        text.parse()
    }

    #[test]
    fn hosts_get_the_default_port_and_the_name_is_optional() {
        let url = parse("helio://a,b:9000,[::1],[fe80::2]:1/photos").unwrap();
        assert_eq!(url.peers, ["a:7870", "b:9000", "[::1]:7870", "[fe80::2]:1"]);
        assert_eq!(url.volume.as_deref(), Some("photos"));
        assert_eq!(parse("helio://a").unwrap().volume, None);
        assert_eq!(parse("helio://a/").unwrap().volume, None);
        assert_eq!(parse(&url.to_string()).unwrap(), url);
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        assert!(matches!(parse("redis://a"), Err(UrlError::Scheme(_))));
        assert!(matches!(parse("helio://"), Err(UrlError::NoHost(_))));
        assert!(matches!(parse("helio://a,,b"), Err(UrlError::NoHost(_))));
        assert!(matches!(parse("helio:///x"), Err(UrlError::NoHost(_))));
        assert!(matches!(parse("helio://:7/x"), Err(UrlError::NoHost(_))));
        assert!(matches!(parse("helio://a:0"), Err(UrlError::Port { .. })));
        assert!(matches!(
            parse("helio://a:70000"),
            Err(UrlError::Port { .. })
        ));
        assert!(matches!(parse("helio://a:x"), Err(UrlError::Port { .. })));
        assert!(matches!(parse("helio://::1"), Err(UrlError::Host(_))));
        assert!(matches!(parse("helio://[zz]:1"), Err(UrlError::Host(_))));
        assert!(matches!(parse("helio://a b"), Err(UrlError::Host(_))));
        assert_eq!(
            parse("helio://a,a:7870"),
            Err(UrlError::Twice("a:7870".into()))
        );
        assert!(matches!(parse("helio://a/b/c"), Err(UrlError::Volume(_))));
    }
}

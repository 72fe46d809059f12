//! age keys (X25519) that wrap a volume's key: as with RSA, whoever formats a volume needs the public half alone.
//!
//! Keys are read as age writes them, and a key is wrapped as age wraps a file's key for such a recipient; but not into an age
//! file, so that the `age` crate isn't needed: it brings along some 50 crates of a localization framework. Source: <https://age-encryption.org/v1>, "The X25519 recipient type".

use std::fmt;

use aws_lc_rs::agreement::{PrivateKey, UnparsedPublicKey, X25519, agree};
use bech32::primitives::decode::CheckedHrpstring;
use bech32::{Bech32, Hrp};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf;
use zeroize::Zeroizing;

use crate::StoreError;

/// How the two halves begin: the human-readable part of Bech32, and its separator.
const IDENTITY: &str = "AGE-SECRET-KEY-1";
const RECIPIENT: &str = "age1";
/// Of both halves, bytes.
const KEY_BYTES: usize = 32;
/// What the wrapping key is expanded for.
const INFO: &[u8] = b"age-encryption.org/v1/X25519";

/// An age key: its public half (the recipient), or both.
pub struct AgeKey {
    recipient: [u8; KEY_BYTES],
    identity: Option<PrivateKey>,
}

impl fmt::Debug for AgeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AgeKey({})", self.recipient())
    }
}

fn invalid(what: impl fmt::Display) -> StoreError {
    StoreError::Invalid(format!("the age key: {what}"))
}

/// The lines of a key's file that are not comments.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// What a line of Bech32 of this kind says.
fn decode(line: &str, kind: &str) -> Result<Zeroizing<[u8; KEY_BYTES]>, StoreError> {
    let checked = CheckedHrpstring::new::<Bech32>(line)
        .map_err(|error| invalid(format_args!("it is mistyped or cut off: {error}")))?;
    // Keys of other kinds begin alike, and go on before the separator.
    let begins = checked.hrp();
    if !format!("{begins}1").eq_ignore_ascii_case(kind) {
        return Err(invalid(format_args!(
            "a key of the kind `{begins}` can't be used, only X25519's"
        )));
    }
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    let mut length = 0;
    for (place, byte) in bytes.iter_mut().zip(checked.byte_iter()) {
        *place = byte;
        length += 1;
    }
    match length == KEY_BYTES && checked.byte_iter().len() == KEY_BYTES {
        true => Ok(bytes),
        false => Err(invalid("it has another length than 32 bytes")),
    }
}

impl AgeKey {
    /// Whether a file's text is an age key's, and of which half: `Some(true)` when it is secret.
    pub fn is_in(text: &str) -> Option<bool> {
        let first = lines(text).next()?;
        let begins = |with: &str| {
            first
                .get(..with.len())
                .is_some_and(|it| it.eq_ignore_ascii_case(with))
        };
        match (begins(IDENTITY), begins(RECIPIENT)) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        }
    }

    /// Reads an identity as `age-keygen` writes it, or a recipient (`age1…`); comments and empty lines are passed over.
    ///
    /// Errors: `Invalid`.
    pub fn from_text(text: &str) -> Result<Self, StoreError> {
        let mut lines = lines(text);
        let line = lines.next().ok_or_else(|| invalid("there is none"))?;
        if lines.next().is_some() {
            return Err(invalid("there are several in one file"));
        }
        match Self::is_in(text) {
            Some(true) => {
                let identity = PrivateKey::from_private_key(&X25519, &decode(line, IDENTITY)?[..])
                    .map_err(|error| invalid(error.to_string()))?;
                Ok(Self {
                    recipient: public_half(&identity)?,
                    identity: Some(identity),
                })
            }
            Some(false) => Ok(Self {
                recipient: *decode(line, RECIPIENT)?,
                identity: None,
            }),
            None => Err(invalid(format_args!(
                "it begins with neither {IDENTITY} nor {RECIPIENT}"
            ))),
        }
    }

    /// The recipient, `age1…`; not secret.
    pub fn recipient(&self) -> String {
        let hrp = Hrp::parse("age").expect("three letters");
        bech32::encode::<Bech32>(hrp, &self.recipient).expect("32 bytes are well below the limit")
    }

    /// Whether it can open what it wrapped.
    pub fn is_private(&self) -> bool {
        self.identity.is_some()
    }

    /// The public half of a key for this once, then the sealed key. `id` is authenticated.
    pub(super) fn wrap(&self, secret: &[u8; 32], id: &[u8]) -> Result<Vec<u8>, StoreError> {
        let failed = |_| invalid("the system gives no random numbers");
        let once = PrivateKey::generate(&X25519).map_err(failed)?;
        let share = public_half(&once)?;
        let key = self
            .wrapping_key(&once, &self.recipient, &share)
            .ok_or_else(|| invalid("its recipient is no point that can be wrapped for"))?;
        let mut sealed = secret.to_vec();
        // The key is never used again.
        let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]);
        key.seal_in_place_append_tag(nonce, Aad::from(id), &mut sealed)
            .expect("32 bytes are far below the cipher's limit");
        Ok([&share[..], &sealed].concat())
    }

    /// `None`: it is not what this key wrapped for this id.
    pub(super) fn open(&self, wrapped: &[u8], id: &[u8]) -> Option<Zeroizing<[u8; 32]>> {
        let (share, sealed) = wrapped.split_first_chunk::<KEY_BYTES>()?;
        let key = self.wrapping_key(self.identity.as_ref()?, share, share)?;
        let mut sealed = Zeroizing::new(sealed.to_vec());
        let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]);
        let opened = key
            .open_in_place(nonce, Aad::from(id), &mut sealed[..])
            .ok()?;
        <[u8; 32]>::try_from(&opened[..]).ok().map(Zeroizing::new)
    }

    /// What `own` and the owner of `peer` both know; bound to both public halves.
    fn wrapping_key(
        &self,
        own: &PrivateKey,
        peer: &[u8; KEY_BYTES],
        share: &[u8; KEY_BYTES],
    ) -> Option<LessSafeKey> {
        let salt = [&share[..], &self.recipient].concat();
        let peer = UnparsedPublicKey::new(&X25519, &peer[..]);
        agree(own, peer, (), |shared| {
            let expanded = hkdf::Salt::new(hkdf::HKDF_SHA256, &salt).extract(shared);
            let unbound = expanded
                .expand(&[INFO], &CHACHA20_POLY1305)
                .map(UnboundKey::from);
            Ok(LessSafeKey::new(unbound.map_err(drop)?))
        })
        .ok()
    }
}

fn public_half(private: &PrivateKey) -> Result<[u8; KEY_BYTES], StoreError> {
    let public = private
        .compute_public_key()
        .map_err(|error| invalid(error.to_string()))?;
    <[u8; KEY_BYTES]>::try_from(public.as_ref())
        .map_err(|_| invalid("its public half has another length than 32 bytes"))
}

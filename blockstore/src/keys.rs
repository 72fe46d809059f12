//! The key of an encrypted volume, and how a passphrase opens it.

use std::fmt;

use argon2::{Algorithm, Argon2, Params, Version};
use bytes::Bytes;
use heliofs_proto::v1;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf;
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::{Zeroize, Zeroizing};

use crate::StoreError;

/// The only cipher.
const CIPHER: &str = "aes-256-gcm";
/// The only way of wrapping.
const ARGON2ID: &str = "argon2id";
/// Argon2's cost: what OWASP asks for at the least, thrice over; some 100 ms on one core.
const MEMORY_KIB: u32 = 64 << 10;
const PASSES: u32 = 2;
const LANES: u32 = 1;
/// Costs that a volume's settings may ask of a mount: a wrong setting must not take its memory.
const MEMORY_KIB_MAX: u32 = 4 << 20;
const PASSES_MAX: u32 = 64;

/// A passphrase; it shows itself to nobody and leaves no copy in memory.
#[derive(Clone)]
pub struct Passphrase(Zeroizing<String>);

impl Passphrase {
    /// Takes it as it is, without the line's end that a file has.
    pub fn new(text: String) -> Self {
        let mut text = Zeroizing::new(text);
        let length = text.trim_end_matches(['\r', '\n']).len();
        text.truncate(length);
        Self(text)
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(…)")
    }
}

/// The data key of a volume. All frames' keys are derived from it.
pub struct VolumeKey {
    id: u32,
    secret: Zeroizing<[u8; 32]>,
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeKey({:08x})", self.id)
    }
}

impl VolumeKey {
    /// A new key for a new volume, wrapped by `passphrase`. What is returned goes into the volume's `StorageConfig`.
    ///
    /// Errors: `Invalid`, with an empty passphrase too.
    pub fn create(passphrase: &Passphrase) -> Result<(Self, v1::Encryption), StoreError> {
        let random = SystemRandom::new();
        let no_random = |_| StoreError::Invalid("the system gives no random numbers".to_owned());
        let mut secret = Zeroizing::new([0; 32]);
        random.fill(&mut secret[..]).map_err(no_random)?;
        let mut id = [0; 4];
        while id == [0; 4] {
            random.fill(&mut id).map_err(no_random)?;
        }
        let key = Self {
            id: u32::from_le_bytes(id),
            secret,
        };
        let encryption = v1::Encryption {
            cipher: CIPHER.to_owned(),
            key_id: key.id,
            keys: vec![key.wrap(passphrase)?],
        };
        Ok((key, encryption))
    }

    /// The key, wrapped by another passphrase.
    ///
    /// Errors: `Invalid`, with an empty passphrase too.
    pub fn wrap(&self, passphrase: &Passphrase) -> Result<v1::WrappedKey, StoreError> {
        if passphrase.is_empty() {
            return Err(StoreError::Invalid("the passphrase is empty".to_owned()));
        }
        let no_random = |_| StoreError::Invalid("the system gives no random numbers".to_owned());
        let (mut salt, mut nonce) = ([0; 16], [0; NONCE_LEN]);
        SystemRandom::new().fill(&mut salt).map_err(no_random)?;
        SystemRandom::new().fill(&mut nonce).map_err(no_random)?;
        let mut wrapped = v1::WrappedKey {
            kind: ARGON2ID.to_owned(),
            salt: salt.to_vec().into(),
            memory_kib: MEMORY_KIB,
            passes: PASSES,
            lanes: LANES,
            nonce: nonce.to_vec().into(),
            wrapped: Bytes::new(),
        };
        let wrapping = wrapping_key(&wrapped, passphrase)?;
        let aad = Aad::from(self.id.to_le_bytes());
        let nonce = Nonce::assume_unique_for_key(nonce);
        let mut sealed = self.secret.to_vec();
        wrapping
            .seal_in_place_append_tag(nonce, aad, &mut sealed)
            .expect("32 bytes are far below the cipher's limit");
        wrapped.wrapped = sealed.into();
        Ok(wrapped)
    }

    /// Opens the key of a volume. Takes some 100 ms of one core: not for a thread that others wait for.
    ///
    /// Errors: `Denied` when the passphrase is wrong; `Invalid` when this release does not know how.
    pub fn open(encryption: &v1::Encryption, passphrase: &Passphrase) -> Result<Self, StoreError> {
        if encryption.cipher != CIPHER {
            return Err(StoreError::Invalid(format!(
                "the volume is encrypted with `{}`, which this release does not know; upgrade",
                encryption.cipher
            )));
        }
        let mut known = false;
        for wrapped in encryption.keys.iter().filter(|key| key.kind == ARGON2ID) {
            known = true;
            let wrapping = wrapping_key(wrapped, passphrase)?;
            let Ok(nonce) = Nonce::try_assume_unique_for_key(&wrapped.nonce) else {
                continue;
            };
            let aad = Aad::from(encryption.key_id.to_le_bytes());
            let mut secret = Zeroizing::new(wrapped.wrapped.to_vec());
            if let Ok(opened) = wrapping.open_in_place(nonce, aad, &mut secret[..])
                && let Ok(secret) = <[u8; 32]>::try_from(&opened[..])
            {
                return Ok(Self {
                    id: encryption.key_id,
                    secret: Zeroizing::new(secret),
                });
            }
        }
        if known {
            return Err(StoreError::Denied {
                operation: "open the volume's key",
                key: format!("{:08x}", encryption.key_id),
                detail: "the passphrase is wrong".to_owned(),
            });
        }
        Err(StoreError::Invalid(
            "this release knows no way to open the volume's key; upgrade".to_owned(),
        ))
    }

    /// Tells keys apart; not secret.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What keys of the frame with this salt are expanded from.
    pub(crate) fn derive(&self, salt: &[u8]) -> hkdf::Prk {
        hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(&self.secret[..])
    }
}

fn wrapping_key(
    wrapped: &v1::WrappedKey,
    passphrase: &Passphrase,
) -> Result<LessSafeKey, StoreError> {
    let wrong = |what: String| StoreError::Invalid(format!("the volume's wrapped key: {what}"));
    if wrapped.memory_kib > MEMORY_KIB_MAX || wrapped.passes > PASSES_MAX {
        return Err(wrong("its cost is out of bounds".to_owned()));
    }
    let params = Params::new(wrapped.memory_kib, wrapped.passes, wrapped.lanes, Some(32))
        .map_err(|error| wrong(error.to_string()))?;
    let mut key = [0; 32];
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into(passphrase.0.as_bytes(), &wrapped.salt, &mut key)
        .map_err(|error| wrong(error.to_string()))?;
    let unbound = UnboundKey::new(&AES_256_GCM, &key).expect("32 bytes are the cipher's key");
    key.zeroize();
    Ok(LessSafeKey::new(unbound))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phrase(text: &str) -> Passphrase {
        Passphrase::new(text.to_owned())
    }

    #[test]
    fn a_passphrase_opens_what_it_wrapped_and_another_does_not() {
        let (key, mut encryption) = VolumeKey::create(&phrase("correct horse\n")).unwrap();
        let opened = VolumeKey::open(&encryption, &phrase("correct horse")).unwrap();
        assert_eq!((opened.id(), &opened.secret), (key.id(), &key.secret));
        let refused = VolumeKey::open(&encryption, &phrase("correct hors")).unwrap_err();
        assert_eq!(refused.kind(), crate::Kind::Denied, "{refused}");
        assert!(refused.to_string().contains("passphrase is wrong"));
        // A second passphrase for the same key.
        encryption.keys.push(key.wrap(&phrase("another")).unwrap());
        for words in ["another", "correct horse"] {
            let opened = VolumeKey::open(&encryption, &phrase(words)).unwrap();
            assert_eq!(opened.secret, key.secret);
        }
        // Under another id the wrapped key is not this volume's.
        encryption.key_id ^= 1;
        assert!(VolumeKey::open(&encryption, &phrase("another")).is_err());
        assert!(VolumeKey::create(&phrase("\n")).is_err());
        assert!(!format!("{key:?} {:?}", phrase("secret")).contains("secret"));
    }
}

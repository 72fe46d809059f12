//! The key of an encrypted volume, and how a passphrase, an RSA key or an age key opens it.

use std::fmt;
use std::sync::Arc;

use argon2::{Algorithm, Argon2, Params, Version};
use bytes::Bytes;
use heliofs_proto::v1;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf;
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::{Zeroize, Zeroizing};

mod age;
mod rsa;

pub use age::AgeKey;
pub use rsa::RsaKey;

use crate::StoreError;

/// The only cipher.
const CIPHER: &str = "aes-256-gcm";
/// Ways of wrapping: by a key that comes from a passphrase, by an RSA key, by an age key.
const ARGON2ID: &str = "argon2id";
const RSA_OAEP: &str = "rsa-oaep-sha256";
const AGE_X25519: &str = "age-x25519";
/// What the commitment to a key is expanded for; no frame's salt is as long.
const COMMITMENT: &[u8] = b"heliofs: commitment to a volume's key";
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
    pub fn new(text: impl Into<Zeroizing<String>>) -> Self {
        let mut text = text.into();
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

/// What opens a volume's key.
#[derive(Clone, Debug)]
pub enum KeyOpener {
    /// A passphrase.
    Passphrase(Passphrase),
    /// An RSA key; without its private half it can only wrap.
    Rsa(Arc<RsaKey>),
    /// An age key; without its identity it can only wrap.
    Age(Arc<AgeKey>),
}

impl From<Passphrase> for KeyOpener {
    fn from(passphrase: Passphrase) -> Self {
        Self::Passphrase(passphrase)
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
    /// A new key for a new volume, wrapped for `opener`. What is returned goes into the volume's `StorageConfig`.
    ///
    /// Errors: `Invalid`, with an empty passphrase too.
    pub fn create(opener: &KeyOpener) -> Result<(Self, v1::Encryption), StoreError> {
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
            keys: vec![key.wrap(opener)?],
            commitment: key.commitment(),
        };
        Ok((key, encryption))
    }

    /// The key, wrapped for another passphrase, RSA key or age key.
    ///
    /// Errors: `Invalid`, with an empty passphrase too.
    pub fn wrap(&self, opener: &KeyOpener) -> Result<v1::WrappedKey, StoreError> {
        let passphrase = match opener {
            KeyOpener::Passphrase(passphrase) => passphrase,
            KeyOpener::Rsa(rsa) => {
                return Ok(v1::WrappedKey {
                    kind: RSA_OAEP.to_owned(),
                    salt: rsa.fingerprint_bytes().to_vec().into(),
                    wrapped: rsa.wrap(&self.secret, &self.id.to_le_bytes())?.into(),
                    ..v1::WrappedKey::default()
                });
            }
            KeyOpener::Age(age) => {
                return Ok(v1::WrappedKey {
                    kind: AGE_X25519.to_owned(),
                    salt: age.recipient().into(),
                    wrapped: age.wrap(&self.secret, &self.id.to_le_bytes())?.into(),
                    ..v1::WrappedKey::default()
                });
            }
        };
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
    /// Errors: `Denied` when the passphrase or the key is wrong; `Invalid` when this release does not know how, the volume's key
    /// is wrapped for another kind, or what opens is not the key that the volume began with.
    pub fn open(encryption: &v1::Encryption, opener: &KeyOpener) -> Result<Self, StoreError> {
        let key = Self::unwrap_key(encryption, opener)?;
        // Whoever knows a public key can wrap any other key for it.
        if !encryption.commitment.is_empty() && encryption.commitment != key.commitment() {
            return Err(StoreError::Invalid(
                "the volume's wrapped key was exchanged: it opens, and is not the key that the volume was created with"
                    .to_owned(),
            ));
        }
        Ok(key)
    }

    fn unwrap_key(encryption: &v1::Encryption, opener: &KeyOpener) -> Result<Self, StoreError> {
        if encryption.cipher != CIPHER {
            return Err(StoreError::Invalid(format!(
                "the volume is encrypted with `{}`, which this release does not know; upgrade",
                encryption.cipher
            )));
        }
        let passphrase = match opener {
            KeyOpener::Passphrase(passphrase) => passphrase,
            KeyOpener::Rsa(rsa) => return Self::open_by_rsa(encryption, rsa),
            KeyOpener::Age(age) => return Self::open_by_age(encryption, age),
        };
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
        Err(not_wrapped_for(encryption, "a passphrase"))
    }

    fn open_by_rsa(encryption: &v1::Encryption, rsa: &RsaKey) -> Result<Self, StoreError> {
        let denied = |detail: String| StoreError::Denied {
            operation: "open the volume's key",
            key: format!("{:08x}", encryption.key_id),
            detail,
        };
        if !rsa.is_private() {
            return Err(denied(
                "a public key opens nothing; the private key is needed".to_owned(),
            ));
        }
        let mut others = Vec::new();
        for wrapped in encryption.keys.iter().filter(|key| key.kind == RSA_OAEP) {
            if wrapped.salt[..] != rsa.fingerprint_bytes()[..] {
                others.push(hex(&wrapped.salt));
                continue;
            }
            let label = encryption.key_id.to_le_bytes();
            return match rsa.open(&wrapped.wrapped, &label) {
                Some(secret) => Ok(Self {
                    id: encryption.key_id,
                    secret,
                }),
                None => Err(denied(
                    "the volume's wrapped key is damaged: its own RSA key does not open it"
                        .to_owned(),
                )),
            };
        }
        if others.is_empty() {
            return Err(not_wrapped_for(encryption, "an RSA key"));
        }
        Err(denied(format!(
            "the RSA key is wrong: its public key's SHA-256 is {}, the volume's {}",
            rsa.fingerprint(),
            others.join(" or ")
        )))
    }

    fn open_by_age(encryption: &v1::Encryption, age: &AgeKey) -> Result<Self, StoreError> {
        let denied = |detail: String| StoreError::Denied {
            operation: "open the volume's key",
            key: format!("{:08x}", encryption.key_id),
            detail,
        };
        if !age.is_private() {
            return Err(denied(
                "a recipient opens nothing; the identity (AGE-SECRET-KEY-1…) is needed".to_owned(),
            ));
        }
        let recipient = age.recipient();
        let wrapped: Vec<_> = encryption
            .keys
            .iter()
            .filter(|key| key.kind == AGE_X25519)
            .collect();
        if wrapped.is_empty() {
            return Err(not_wrapped_for(encryption, "an age key"));
        }
        let Some(own) = wrapped.iter().find(|key| key.salt == recipient.as_bytes()) else {
            let others: Vec<_> = wrapped
                .iter()
                .map(|key| String::from_utf8_lossy(&key.salt))
                .collect();
            return Err(denied(format!(
                "the age key is wrong: it is {recipient}, the volume's {}",
                others.join(" or ")
            )));
        };
        match age.open(&own.wrapped, &encryption.key_id.to_le_bytes()) {
            Some(secret) => Ok(Self {
                id: encryption.key_id,
                secret,
            }),
            None => Err(denied(
                "the volume's wrapped key is damaged: its own age key does not open it".to_owned(),
            )),
        }
    }

    /// Says which key it is, and nothing about it: stays in the volume's record, however the key is wrapped.
    pub fn commitment(&self) -> Bytes {
        let mut commitment = [0; 32];
        self.derive(COMMITMENT)
            .expand(&[COMMITMENT], hkdf::HKDF_SHA256)
            .and_then(|expanded| expanded.fill(&mut commitment))
            .expect("32 bytes are what the hash gives");
        Bytes::copy_from_slice(&commitment)
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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The key that was given is of a kind that the volume's key is not wrapped for.
fn not_wrapped_for(encryption: &v1::Encryption, given: &str) -> StoreError {
    let kinds: Vec<&str> = encryption
        .keys
        .iter()
        .map(|key| match key.kind.as_str() {
            ARGON2ID => "a passphrase",
            RSA_OAEP => "an RSA key",
            AGE_X25519 => "an age key",
            _ => "something that this release does not know (upgrade)",
        })
        .collect();
    StoreError::Invalid(format!(
        "the volume's key is opened by {}, not by {given}",
        kinds.join(" or ")
    ))
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
    use bech32::{Bech32, Hrp};

    use super::*;

    fn phrase(text: &str) -> KeyOpener {
        Passphrase::new(text.to_owned()).into()
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

    fn pem(arguments: &[&str]) -> String {
        let made = std::process::Command::new("openssl")
            .args(arguments)
            .output()
            .expect("openssl is installed");
        assert!(made.status.success(), "{made:?}");
        String::from_utf8(made.stdout).unwrap()
    }

    #[test]
    fn an_rsa_key_opens_what_its_public_half_wrapped_and_others_say_why_not() {
        let generate = [
            "genpkey",
            "-algorithm",
            "RSA",
            "-pkeyopt",
            "rsa_keygen_bits:2048",
        ];
        let (private, other) = (pem(&generate), pem(&generate));
        let rsa = |text: &str, passphrase: Option<&str>| {
            let passphrase = passphrase.map(|text| Passphrase::new(text.to_owned()));
            RsaKey::from_pem(text, passphrase.as_ref())
        };
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("key.pem");
        std::fs::write(&file, &private).unwrap();
        let file = file.to_str().unwrap();
        let public = rsa(&pem(&["pkey", "-in", file, "-pubout"]), None).unwrap();
        assert!(!public.is_private());
        let public = KeyOpener::Rsa(Arc::new(public));
        let (key, mut encryption) = VolumeKey::create(&public).unwrap();
        let opener =
            |text: &str, passphrase| KeyOpener::Rsa(Arc::new(rsa(text, passphrase).unwrap()));
        let opened = VolumeKey::open(&encryption, &opener(&private, None)).unwrap();
        assert_eq!((opened.id(), &opened.secret), (key.id(), &key.secret));

        // With a passphrase of its own.
        let locked = pem(&["pkcs8", "-topk8", "-in", file, "-passout", "pass:sesame"]);
        assert!(locked.contains("ENCRYPTED PRIVATE KEY"));
        VolumeKey::open(&encryption, &opener(&locked, Some("sesame"))).unwrap();
        let refused = rsa(&locked, Some("barley")).unwrap_err();
        assert_eq!(refused.kind(), crate::Kind::Denied, "{refused}");
        assert!(
            rsa(&locked, None)
                .unwrap_err()
                .to_string()
                .contains("none was given")
        );
        let old = pem(&["rsa", "-in", file, "-traditional"]);
        assert!(
            rsa(&old, None)
                .unwrap_err()
                .to_string()
                .contains("openssl pkcs8")
        );
        assert!(rsa("nothing", None).is_err());

        let refused = |opener: &KeyOpener, encryption: &v1::Encryption| {
            VolumeKey::open(encryption, opener).unwrap_err().to_string()
        };
        assert!(refused(&opener(&other, None), &encryption).contains("the RSA key is wrong"));
        assert!(refused(&public, &encryption).contains("private key is needed"));
        assert!(refused(&phrase("words"), &encryption).contains("opened by an RSA key"));
        // Both ways open the same key.
        encryption.keys.push(key.wrap(&phrase("words")).unwrap());
        VolumeKey::open(&encryption, &phrase("words")).unwrap();
        VolumeKey::open(&encryption, &opener(&private, None)).unwrap();
        encryption.keys.remove(0);
        assert!(refused(&opener(&private, None), &encryption).contains("opened by a passphrase"));
        assert!(!format!("{:?}", opener(&private, None)).contains("PRIVATE"));
    }

    #[test]
    fn an_age_key_opens_what_its_recipient_wrapped_and_others_say_why_not() {
        // A pair of age's own tests.
        let identity = "# created: today
# public key: age1t7rxyev2z3rw82stdlrrepyc39nvn86l5078zqkf5uasdy86jp6svpy7pa
AGE-SECRET-KEY-1GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33
";
        let recipient = "age1t7rxyev2z3rw82stdlrrepyc39nvn86l5078zqkf5uasdy86jp6svpy7pa";
        let other = Hrp::parse("AGE-SECRET-KEY-").unwrap();
        let other = bech32::encode_upper::<Bech32>(other, &[7; 32]).unwrap();
        let opener = |text: &str| KeyOpener::Age(Arc::new(AgeKey::from_text(text).unwrap()));
        let public = opener(&format!("{recipient}\n"));
        assert_eq!(AgeKey::from_text(identity).unwrap().recipient(), recipient);
        let (key, mut encryption) = VolumeKey::create(&public).unwrap();
        let opened = VolumeKey::open(&encryption, &opener(identity)).unwrap();
        assert_eq!((opened.id(), &opened.secret), (key.id(), &key.secret));

        let refused = |opener: &KeyOpener, encryption: &v1::Encryption| {
            VolumeKey::open(encryption, opener).unwrap_err().to_string()
        };
        let wrong = refused(&opener(&other), &encryption);
        assert!(
            wrong.contains("the age key is wrong: it is age1"),
            "{wrong}"
        );
        assert!(refused(&public, &encryption).contains("identity"));
        assert!(refused(&phrase("words"), &encryption).contains("opened by an age key"));
        assert_eq!(AgeKey::is_in(identity), Some(true));
        assert_eq!(AgeKey::is_in(recipient), Some(false));
        assert_eq!(AgeKey::is_in("-----BEGIN PUBLIC KEY-----"), None);
        for bad in ["", "# nothing", "age1nothing", "AGE-SECRET-KEY-1NOTHING"] {
            assert!(AgeKey::from_text(bad).is_err(), "{bad}");
        }
        assert!(AgeKey::from_text(&(identity.to_owned() + &other)).is_err());
        assert!(!format!("{:?}", opener(identity)).contains("SECRET"));

        // Wrapped for the right key by somebody else, who knows no more than its public half.
        let (theirs, _) = VolumeKey::create(&public).unwrap();
        let theirs = VolumeKey {
            id: key.id(),
            secret: theirs.secret,
        };
        let own = std::mem::replace(&mut encryption.keys[0], theirs.wrap(&public).unwrap());
        assert!(refused(&opener(identity), &encryption).contains("was exchanged"));
        // Of another volume's id.
        encryption.keys[0] = own;
        encryption.key_id ^= 1;
        assert!(refused(&opener(identity), &encryption).contains("damaged"));
    }
}

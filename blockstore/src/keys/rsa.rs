//! RSA keys that wrap a volume's key, so that whoever formats a volume needs the public key alone.
//!
//! OAEP with SHA-256 by AWS-LC, which the TLS of the object stores brings along and whose decryption takes constant time. The
//! `rsa` crate's does not (RUSTSEC-2023-0071, "Marvin").

use std::fmt;

use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::rsa::{
    OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, OaepPublicEncryptingKey,
    PrivateDecryptingKey, PublicEncryptingKey,
};
use pkcs8::{Document, EncryptedPrivateKeyInfo, SecretDocument};
use ring::digest;
use zeroize::{Zeroize, Zeroizing};

use super::Passphrase;
use crate::StoreError;

/// An RSA key of 2048 to 8192 bits: its public half, or both.
pub struct RsaKey {
    public: OaepPublicEncryptingKey,
    private: Option<OaepPrivateDecryptingKey>,
    fingerprint: [u8; 32],
}

impl fmt::Debug for RsaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RsaKey({})", self.fingerprint())
    }
}

fn invalid(what: impl fmt::Display) -> StoreError {
    StoreError::Invalid(format!("the RSA key: {what}"))
}

impl RsaKey {
    /// Reads a key from PEM: `PUBLIC KEY`, `PRIVATE KEY`, or `ENCRYPTED PRIVATE KEY` with its passphrase.
    ///
    /// Errors: `Denied` when the passphrase is wrong; `Invalid` for everything else.
    pub fn from_pem(pem: &str, passphrase: Option<&Passphrase>) -> Result<Self, StoreError> {
        let begin = pem.find("-----BEGIN ").ok_or_else(|| invalid("no PEM"))?;
        let pem = &pem[begin..];
        if pem.starts_with("-----BEGIN PUBLIC KEY") {
            let (_, document) = Document::from_pem(pem).map_err(invalid)?;
            let public = PublicEncryptingKey::from_der(document.as_bytes()).map_err(invalid)?;
            return Self::new(public, None);
        }
        let (label, document) = SecretDocument::from_pem(pem).map_err(invalid)?;
        match label {
            "PRIVATE KEY" => Self::from_pkcs8(document.as_bytes()),
            "ENCRYPTED PRIVATE KEY" => {
                let passphrase =
                    passphrase.ok_or_else(|| invalid("it has a passphrase, and none was given"))?;
                let encrypted =
                    EncryptedPrivateKeyInfo::try_from(document.as_bytes()).map_err(invalid)?;
                let opened = encrypted
                    .decrypt(passphrase.0.as_bytes())
                    .map_err(|error| StoreError::Denied {
                        operation: "open the RSA key",
                        key: String::new(),
                        detail: format!("its passphrase is wrong ({error})"),
                    })?;
                Self::from_pkcs8(opened.as_bytes())
            }
            other => Err(invalid(format!(
                "`{other}` is none of PUBLIC KEY, PRIVATE KEY, ENCRYPTED PRIVATE KEY; \
                 `openssl pkcs8 -topk8 -in OLD -out NEW` makes one of others"
            ))),
        }
    }

    fn from_pkcs8(der: &[u8]) -> Result<Self, StoreError> {
        let private = PrivateDecryptingKey::from_pkcs8(der).map_err(invalid)?;
        let public = private.public_key();
        let private = OaepPrivateDecryptingKey::new(private).map_err(invalid)?;
        Self::new(public, Some(private))
    }

    fn new(
        public: PublicEncryptingKey,
        private: Option<OaepPrivateDecryptingKey>,
    ) -> Result<Self, StoreError> {
        let der = AsDer::<PublicKeyX509Der<'_>>::as_der(&public).map_err(invalid)?;
        let digest = digest::digest(&digest::SHA256, der.as_ref());
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(digest.as_ref());
        Ok(Self {
            public: OaepPublicEncryptingKey::new(public).map_err(invalid)?,
            private,
            fingerprint,
        })
    }

    /// SHA-256 of the public key (SubjectPublicKeyInfo), in hex: what is kept beside a wrapped key, so that the wrong key is told
    /// from a damaged one.
    pub fn fingerprint(&self) -> String {
        self.fingerprint
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    pub(super) fn fingerprint_bytes(&self) -> &[u8; 32] {
        &self.fingerprint
    }

    /// Whether it can open what it wrapped.
    pub fn is_private(&self) -> bool {
        self.private.is_some()
    }

    pub(super) fn wrap(&self, secret: &[u8; 32], label: &[u8]) -> Result<Vec<u8>, StoreError> {
        let mut sealed = vec![0; self.public.ciphertext_size()];
        let length = self
            .public
            .encrypt(&OAEP_SHA256_MGF1SHA256, secret, &mut sealed, Some(label))
            .map_err(invalid)?
            .len();
        sealed.truncate(length);
        Ok(sealed)
    }

    /// `None`: it is not what this key wrapped under this label.
    pub(super) fn open(&self, wrapped: &[u8], label: &[u8]) -> Option<Zeroizing<[u8; 32]>> {
        let private = self.private.as_ref()?;
        let mut room = Zeroizing::new(vec![0; private.min_output_size()]);
        let opened = private
            .decrypt(&OAEP_SHA256_MGF1SHA256, wrapped, &mut room, Some(label))
            .ok()?;
        let secret = <[u8; 32]>::try_from(&*opened).ok().map(Zeroizing::new);
        room.zeroize();
        secret
    }
}

//! Sealing of callbacks' and sources' secrets with AES-256-GCM, in the form of [`contract::secret`].

use std::{convert::Infallible, fmt};

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use contract::{
    ObjectId,
    process::{Callback, Source},
    secret::{KeyId, Secret, SecretField},
};
pub use ring::aead::NONCE_LEN;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

/// The owner and the field that a secret is sealed for. It opens only there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealingContext {
    /// The project.
    pub project_id: ObjectId,
    /// The callback or source.
    pub owner_id: ObjectId,
    /// The field of the callback or source.
    pub field: SecretField,
}

impl SealingContext {
    fn associated_data(&self) -> String {
        let field = match self.field {
            SecretField::Signing => "secrets",
            SecretField::Auth => "auth",
            SecretField::Header => "headers",
            SecretField::ClientKey => "clientCertificate",
            SecretField::Source => "source",
        };
        format!("{}.{}.{field}", self.project_id, self.owner_id)
    }
}

/// Why a sealed value cannot be opened with these keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The key that sealed it is not configured.
    #[error("sealed with the key {0}, which is neither SECRETS_KEY nor among SECRETS_KEYS_OLD")]
    UnknownKey(KeyId),
    /// The value was changed, or was sealed for another callback, source or field.
    #[error("sealed with the key {0}, but changed since or copied from another callback or source")]
    NotAuthentic(KeyId),
    /// A later version of Leadrelay sealed it.
    #[error("sealed in a form that this version does not support")]
    UnknownForm,
}

/// A text is not a sealing key. The error does not quote the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it must be the base64 of 32 random bytes")]
pub struct InvalidKey;

fn key_id(key: &[u8; 32]) -> KeyId {
    let digest = Sha256::new().chain_update("leadrelay key id:").chain_update(key).finalize();
    let mut id = [0; 4];
    id.copy_from_slice(&digest[..4]);
    KeyId::from_bytes(id)
}

struct Key {
    id: KeyId,
    key: LessSafeKey,
}

impl Key {
    fn parse(text: &str) -> Result<Self, InvalidKey> {
        let bytes = Zeroizing::new(BASE64_STANDARD.decode(text.trim()).map_err(|_| InvalidKey)?);
        let bytes: &[u8; 32] = bytes.as_slice().try_into().map_err(|_| InvalidKey)?;
        let key = UnboundKey::new(&AES_256_GCM, bytes).map_err(|_| InvalidKey)?;
        Ok(Self { id: key_id(bytes), key: LessSafeKey::new(key) })
    }
}

/// The keys of an installation: the present key seals, and every key opens.
pub struct SealingKeys {
    present: Key,
    old: Vec<Key>,
}

impl SealingKeys {
    /// Reads the present key and the old ones, each the base64 of 32 bytes.
    pub fn parse<'a>(present: &str, old: impl IntoIterator<Item = &'a str>) -> Result<Self, InvalidKey> {
        Ok(Self { present: Key::parse(present)?, old: old.into_iter().map(Key::parse).collect::<Result<_, _>>()? })
    }

    /// The key that seals.
    pub fn present(&self) -> KeyId {
        self.present.id
    }

    /// Whether this key is configured.
    pub fn has(&self, key_id: KeyId) -> bool {
        self.by_id(key_id).next().is_some()
    }

    fn by_id(&self, key_id: KeyId) -> impl Iterator<Item = &Key> {
        std::iter::once(&self.present).chain(&self.old).filter(move |key| key.id == key_id)
    }

    /// Seals a value in clear. The nonce must be random: two values under one nonce reveal each other.
    pub fn seal(&self, context: &SealingContext, nonce: [u8; NONCE_LEN], clear: &Secret) -> Secret {
        let mut sealed = Zeroizing::new(clear.expose().as_bytes().to_vec());
        let aad = Aad::from(context.associated_data());
        #[allow(clippy::expect_used, reason = "only a value of 64 GiB or more cannot be sealed")]
        let tag = self
            .present
            .key
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), aad, &mut sealed)
            .expect("a value of a sane length");
        let bytes = [&nonce, sealed.as_slice(), tag.as_ref()].concat();
        Secret::sealed(self.present.id, &BASE64_URL_SAFE_NO_PAD.encode(bytes))
    }

    /// Opens a value. A value in clear is returned unchanged.
    pub fn open(&self, context: &SealingContext, secret: &Secret) -> Result<Secret, OpenError> {
        if !secret.is_sealed() {
            return Ok(secret.clone());
        }
        let (key_id, text) = secret.sealed_parts().ok_or(OpenError::UnknownForm)?;
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|_| OpenError::NotAuthentic(key_id))?;
        let Some((nonce, sealed)) = bytes.split_first_chunk::<NONCE_LEN>() else {
            return Err(OpenError::NotAuthentic(key_id));
        };
        let mut error = OpenError::UnknownKey(key_id);
        for key in self.by_id(key_id) {
            let mut buffer = Zeroizing::new(sealed.to_vec());
            let aad = Aad::from(context.associated_data());
            let opened = key.key.open_in_place(Nonce::assume_unique_for_key(*nonce), aad, &mut buffer);
            match opened.ok().and_then(|clear| std::str::from_utf8(clear).ok()) {
                Some(clear) => return Ok(clear.into()),
                None => error = OpenError::NotAuthentic(key_id),
            }
        }
        Err(error)
    }
}

impl SealingKeys {
    /// Seals every secret of the callback that is in clear. Sealed secrets stay as they are.
    pub fn seal_callback(
        &self,
        project_id: ObjectId,
        callback: &Callback,
        mut nonce: impl FnMut() -> [u8; NONCE_LEN],
    ) -> Callback {
        let sealed = callback.with_secrets(|field, secret| {
            let context = SealingContext { project_id, owner_id: callback.callback_id, field };
            let sealed = if secret.is_sealed() { secret.clone() } else { self.seal(&context, nonce(), secret) };
            Ok::<_, Infallible>(sealed)
        });
        let Ok(sealed) = sealed;
        sealed
    }

    /// The callback with every secret in clear.
    ///
    /// # Errors
    /// One of the secrets cannot be opened.
    pub fn open_callback(&self, project_id: ObjectId, callback: &Callback) -> Result<Callback, OpenError> {
        callback.with_secrets(|field, secret| {
            self.open(&SealingContext { project_id, owner_id: callback.callback_id, field }, secret)
        })
    }

    /// Seals every secret of the source that is in clear. Sealed secrets stay as they are.
    pub fn seal_source(
        &self,
        project_id: ObjectId,
        source: &Source,
        mut nonce: impl FnMut() -> [u8; NONCE_LEN],
    ) -> Source {
        let sealed = source.with_secrets(|field, secret| {
            let context = SealingContext { project_id, owner_id: source.source_id, field };
            let sealed = if secret.is_sealed() { secret.clone() } else { self.seal(&context, nonce(), secret) };
            Ok::<_, Infallible>(sealed)
        });
        let Ok(sealed) = sealed;
        sealed
    }

    /// The source with every secret in clear.
    ///
    /// # Errors
    /// One of the secrets cannot be opened.
    pub fn open_source(&self, project_id: ObjectId, source: &Source) -> Result<Source, OpenError> {
        source.with_secrets(|field, secret| {
            self.open(&SealingContext { project_id, owner_id: source.source_id, field }, secret)
        })
    }
}

/// Shows the keys' ids.
impl fmt::Debug for SealingKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let old: Vec<_> = self.old.iter().map(|key| key.id).collect();
        f.debug_struct("SealingKeys").field("present", &self.present.id).field("old", &old).finish()
    }
}

/// Makes the text of a new sealing key from 32 random bytes.
pub fn new_sealing_key(random: [u8; 32]) -> String {
    BASE64_STANDARD.encode(random)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONTEXT: SealingContext = SealingContext {
        project_id: ObjectId::from_bytes([1; 12]),
        owner_id: ObjectId::from_bytes([2; 12]),
        field: SecretField::Signing,
    };

    fn keys(present: u8, old: &[u8]) -> SealingKeys {
        let old: Vec<_> = old.iter().map(|byte| new_sealing_key([*byte; 32])).collect();
        SealingKeys::parse(&new_sealing_key([present; 32]), old.iter().map(String::as_str)).unwrap()
    }

    #[test]
    fn a_sealed_value_has_the_documented_form() {
        let keys = keys(7, &[]);
        let sealed = keys.seal(&CONTEXT, [9; 12], &"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".into());
        insta::assert_snapshot!(sealed.expose(), @"sealed:v1:d3efba69:CQkJCQkJCQkJCQkJUO338d2vjAfrM_JK3q3ohqXCN4Reu6eEV-cK9o89bkifhKuisSVkEI8-bTBj3Tit8lY38CVP");
        assert_eq!(sealed.key_id(), Some(keys.present()));
        assert_eq!(keys.open(&CONTEXT, &sealed).unwrap().expose(), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
    }

    #[test]
    fn a_value_does_not_open_in_another_context() {
        let keys = keys(7, &[]);
        let sealed = keys.seal(&CONTEXT, [9; 12], &"t0ken".into());
        let other = ObjectId::from_bytes([3; 12]);
        let contexts = [
            SealingContext { project_id: other, ..CONTEXT },
            SealingContext { owner_id: other, ..CONTEXT },
            SealingContext { field: SecretField::Auth, ..CONTEXT },
            SealingContext { field: SecretField::Header, ..CONTEXT },
            SealingContext { field: SecretField::ClientKey, ..CONTEXT },
            SealingContext { field: SecretField::Source, ..CONTEXT },
            SealingContext { project_id: CONTEXT.owner_id, owner_id: CONTEXT.project_id, ..CONTEXT },
        ];
        for context in contexts {
            assert_eq!(keys.open(&context, &sealed), Err(OpenError::NotAuthentic(keys.present())), "{context:?}");
        }
    }

    #[test]
    fn an_old_key_opens_and_does_not_seal() {
        let before = keys(1, &[]);
        let sealed = before.seal(&CONTEXT, [9; 12], &"t0ken".into());
        let during = keys(2, &[5, 1]);
        assert_eq!(during.open(&CONTEXT, &sealed).unwrap().expose(), "t0ken");
        let again = during.seal(&CONTEXT, [9; 12], &"t0ken".into());
        assert_eq!(again.key_id(), Some(during.present()));
        assert_eq!(keys(2, &[]).open(&CONTEXT, &again).unwrap().expose(), "t0ken");
        let after = keys(2, &[]).open(&CONTEXT, &sealed);
        assert_eq!(after, Err(OpenError::UnknownKey(before.present())));
        let message = after.unwrap_err().to_string();
        assert!(message.contains(&before.present().to_string()) && !message.contains("t0ken"), "{message}");
        assert!(during.has(before.present()) && !keys(2, &[]).has(before.present()));
    }

    #[test]
    fn values_in_clear_stay_and_unknown_forms_are_rejected() {
        assert_eq!(keys(1, &[]).open(&CONTEXT, &"t0ken".into()).unwrap().expose(), "t0ken");
        for text in ["sealed:v2:00000000:AAAA", "sealed:v1:0000:AAAA", "sealed:v1:00000000", "sealed:"] {
            assert_eq!(keys(1, &[]).open(&CONTEXT, &text.into()), Err(OpenError::UnknownForm), "{text}");
        }
    }

    #[test]
    fn only_32_bytes_are_a_key_and_errors_do_not_quote_it() {
        for text in ["", "AAAA", "not base64", &BASE64_STANDARD.encode([0; 33])] {
            let refused = SealingKeys::parse(text, []).unwrap_err().to_string();
            assert!(text.is_empty() || !refused.contains(text), "{refused}");
        }
        assert!(SealingKeys::parse(&format!(" {}\n", new_sealing_key([1; 32])), []).is_ok());
        assert!(!format!("{:?} {:?}", keys(1, &[2]), Secret::from("t0ken")).contains("t0ken"));
    }

    proptest! {
        #[test]
        fn sealing_round_trips(clear: String, nonce: [u8; 12]) {
            let keys = keys(7, &[]);
            let sealed = keys.seal(&CONTEXT, nonce, &clear.as_str().into());
            prop_assert!(sealed.is_sealed());
            let opened = keys.open(&CONTEXT, &sealed).unwrap();
            prop_assert_eq!(opened.expose(), clear);
        }

        #[test]
        fn a_changed_character_does_not_open(at in 19_usize..60, to in "[A-Za-z0-9_-]") {
            let keys = keys(7, &[]);
            let sealed = keys.seal(&CONTEXT, [9; 12], &"0123456789".into());
            let mut text = sealed.expose().to_owned();
            let at = at.min(text.len() - 1);
            text.replace_range(at..=at, &to);
            prop_assert!(text == sealed.expose() || keys.open(&CONTEXT, &text.into()).is_err());
        }

        #[test]
        fn arbitrary_text_never_panics(text in "(sealed:)?(v1:)?([0-9a-f]{8}:)?.*") {
            let _ = keys(7, &[]).open(&CONTEXT, &text.into());
        }
    }
}

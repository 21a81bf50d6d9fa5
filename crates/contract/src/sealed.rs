//! Sealed values: how the secrets of callbacks stand in Postgres and in the bucket `processes`.
//!
//! ```text
//! sealed:v1:{keyId}:{base64url(nonce ‖ ciphertext ‖ tag)}
//! ```
//!
//! AES-256-GCM (NIST SP 800-38D) with a random nonce of 96 bits; base64url without padding (RFC 4648, section 5).
//! `keyId` is the first four bytes, in hex, of the SHA-256 of `leadrelay key id:` and the key. The associated data is
//! `{projectId}.{callbackId}.{field}`, so that a sealed value opens nowhere but where it was sealed.
//!
//! lead-state seals, the webhook-notifier opens what it is about to send.

use std::fmt;

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

use crate::ObjectId;

/// What every sealed value begins with; what comes next is its version.
const PREFIX: &str = "sealed:";
const VERSION: &str = "v1";

/// A secret value, sealed or in clear. It is never shown by `Debug`, and wiped from memory when it is dropped.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The text itself: for sealing, signing and sending, and for whoever is shown a new secret once.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is nothing: what is not shown is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it is sealed. What an older version stored is in clear.
    pub fn is_sealed(&self) -> bool {
        self.0.starts_with(PREFIX)
    }

    /// The key that it is sealed with; none when it is in clear, or not in a form that is known.
    pub fn key_id(&self) -> Option<KeyId> {
        Some(self.parts()?.0)
    }

    /// The key's id and the sealed bytes.
    fn parts(&self) -> Option<(KeyId, &str)> {
        let rest = self.0.strip_prefix(PREFIX)?.strip_prefix(VERSION)?.strip_prefix(':')?;
        let (key_id, bytes) = rest.split_once(':')?;
        Some((KeyId::parse(key_id)?, bytes))
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Which key it is, without telling the key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId([u8; 4]);

impl KeyId {
    fn of(key: &[u8; 32]) -> Self {
        let digest = Sha256::new().chain_update("leadrelay key id:").chain_update(key).finalize();
        let mut id = [0; 4];
        id.copy_from_slice(&digest[..4]);
        Self(id)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut id = [0; 4];
        hex::decode_to_slice(text, &mut id).ok()?;
        Some(Self(id))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for KeyId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KeyId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("a key id must be 8 hex digits"))
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for KeyId {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "KeyId".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "pattern": "^[0-9a-f]{8}$"})
    }
}

/// Where a secret stands: it opens nowhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The project.
    pub project_id: ObjectId,
    /// The callback.
    pub callback_id: ObjectId,
    /// The callback's field.
    pub field: Field,
}

/// A field of a callback that holds secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// A signing secret.
    Secrets,
    /// The value that authenticates to the endpoint.
    Auth,
}

impl Place {
    fn associated_data(&self) -> String {
        let field = match self.field {
            Field::Secrets => "secrets",
            Field::Auth => "auth",
        };
        format!("{}.{}.{field}", self.project_id, self.callback_id)
    }
}

/// Why a sealed value cannot be opened. It never will be with these keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CannotOpen {
    /// It was sealed with a key that is not there.
    #[error("sealed with the key {0}, which is neither SECRETS_KEY nor among SECRETS_KEYS_OLD")]
    UnknownKey(KeyId),
    /// The key is there, but what is sealed was changed, or belongs elsewhere.
    #[error("sealed with the key {0}, but changed since, or moved here from another callback")]
    NotAuthentic(KeyId),
    /// Sealed by a later version of Leadrelay.
    #[error("sealed in a form that this version does not know")]
    UnknownForm,
}

/// A key's text is not a key. It does not say what the text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it must be the base64 of 32 random bytes")]
pub struct NotAKey;

struct Key {
    id: KeyId,
    key: LessSafeKey,
}

impl Key {
    fn parse(text: &str) -> Result<Self, NotAKey> {
        let bytes = Zeroizing::new(BASE64_STANDARD.decode(text.trim()).map_err(|_| NotAKey)?);
        let bytes: &[u8; 32] = bytes.as_slice().try_into().map_err(|_| NotAKey)?;
        let key = UnboundKey::new(&AES_256_GCM, bytes).map_err(|_| NotAKey)?;
        Ok(Self { id: KeyId::of(bytes), key: LessSafeKey::new(key) })
    }
}

/// The keys of an installation: one that seals, and all that open.
pub struct Keys {
    present: Key,
    old: Vec<Key>,
}

impl Keys {
    /// Reads the present key, and old ones that still open; each the base64 of 32 bytes.
    pub fn parse<'a>(present: &str, old: impl IntoIterator<Item = &'a str>) -> Result<Self, NotAKey> {
        Ok(Self { present: Key::parse(present)?, old: old.into_iter().map(Key::parse).collect::<Result<_, _>>()? })
    }

    /// The key that seals.
    pub fn present(&self) -> KeyId {
        self.present.id
    }

    /// Whether this key is there, to seal or to open.
    pub fn has(&self, key_id: KeyId) -> bool {
        self.by_id(key_id).next().is_some()
    }

    fn by_id(&self, key_id: KeyId) -> impl Iterator<Item = &Key> {
        std::iter::once(&self.present).chain(&self.old).filter(move |key| key.id == key_id)
    }

    /// Seals a value in clear for its place. The nonce must be random: two values under one nonce tell of each other.
    pub fn seal(&self, place: &Place, nonce: [u8; NONCE_LEN], clear: &Secret) -> Secret {
        let mut sealed = Zeroizing::new(clear.expose().as_bytes().to_vec());
        let aad = Aad::from(place.associated_data());
        #[allow(clippy::expect_used, reason = "only a value of 64 GiB or more cannot be sealed")]
        let tag = self
            .present
            .key
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), aad, &mut sealed)
            .expect("a value of a sane length");
        let bytes = [&nonce, sealed.as_slice(), tag.as_ref()].concat();
        Secret(format!("{PREFIX}{VERSION}:{}:{}", self.present.id, BASE64_URL_SAFE_NO_PAD.encode(bytes)))
    }

    /// Opens a value at its place. What is in clear, from an older version, is returned as it is.
    pub fn open(&self, place: &Place, secret: &Secret) -> Result<Secret, CannotOpen> {
        if !secret.is_sealed() {
            return Ok(secret.clone());
        }
        let (key_id, text) = secret.parts().ok_or(CannotOpen::UnknownForm)?;
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|_| CannotOpen::NotAuthentic(key_id))?;
        let Some((nonce, sealed)) = bytes.split_first_chunk::<NONCE_LEN>() else {
            return Err(CannotOpen::NotAuthentic(key_id));
        };
        let mut error = CannotOpen::UnknownKey(key_id);
        for key in self.by_id(key_id) {
            let mut buffer = Zeroizing::new(sealed.to_vec());
            let aad = Aad::from(place.associated_data());
            let opened = key.key.open_in_place(Nonce::assume_unique_for_key(*nonce), aad, &mut buffer);
            match opened.ok().and_then(|clear| std::str::from_utf8(clear).ok()) {
                Some(clear) => return Ok(clear.into()),
                None => error = CannotOpen::NotAuthentic(key_id),
            }
        }
        Err(error)
    }
}

/// Shows which keys they are, not the keys.
impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let old: Vec<_> = self.old.iter().map(|key| key.id).collect();
        f.debug_struct("Keys").field("present", &self.present.id).field("old", &old).finish()
    }
}

/// Makes the text of a new key from 32 random bytes.
pub fn new_key(random: [u8; 32]) -> String {
    BASE64_STANDARD.encode(random)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLACE: Place = Place {
        project_id: ObjectId::from_bytes([1; 12]),
        callback_id: ObjectId::from_bytes([2; 12]),
        field: Field::Secrets,
    };

    fn keys(present: u8, old: &[u8]) -> Keys {
        let old: Vec<_> = old.iter().map(|byte| new_key([*byte; 32])).collect();
        Keys::parse(&new_key([present; 32]), old.iter().map(String::as_str)).unwrap()
    }

    #[test]
    fn a_sealed_value_on_the_wire() {
        let keys = keys(7, &[]);
        let sealed = keys.seal(&PLACE, [9; 12], &"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".into());
        insta::assert_snapshot!(sealed.expose(), @"sealed:v1:d3efba69:CQkJCQkJCQkJCQkJUO338d2vjAfrM_JK3q3ohqXCN4Reu6eEV-cK9o89bkifhKuisSVkEI8-bTBj3Tit8lY38CVP");
        assert_eq!(sealed.key_id(), Some(keys.present()));
        assert_eq!(keys.open(&PLACE, &sealed).unwrap().expose(), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
    }

    #[test]
    fn it_opens_nowhere_else() {
        let keys = keys(7, &[]);
        let sealed = keys.seal(&PLACE, [9; 12], &"t0ken".into());
        let other = ObjectId::from_bytes([3; 12]);
        let places = [
            Place { project_id: other, ..PLACE },
            Place { callback_id: other, ..PLACE },
            Place { field: Field::Auth, ..PLACE },
            Place { project_id: PLACE.callback_id, callback_id: PLACE.project_id, ..PLACE },
        ];
        for place in places {
            assert_eq!(keys.open(&place, &sealed), Err(CannotOpen::NotAuthentic(keys.present())), "{place:?}");
        }
    }

    #[test]
    fn an_old_key_opens_and_does_not_seal() {
        let before = keys(1, &[]);
        let sealed = before.seal(&PLACE, [9; 12], &"t0ken".into());
        let during = keys(2, &[5, 1]);
        assert_eq!(during.open(&PLACE, &sealed).unwrap().expose(), "t0ken");
        let again = during.seal(&PLACE, [9; 12], &"t0ken".into());
        assert_eq!(again.key_id(), Some(during.present()));
        assert_eq!(keys(2, &[]).open(&PLACE, &again).unwrap().expose(), "t0ken");
        let after = keys(2, &[]).open(&PLACE, &sealed);
        assert_eq!(after, Err(CannotOpen::UnknownKey(before.present())));
        let told = after.unwrap_err().to_string();
        assert!(told.contains(&before.present().to_string()) && !told.contains("t0ken"), "{told}");
        assert!(during.has(before.present()) && !keys(2, &[]).has(before.present()));
    }

    #[test]
    fn values_in_clear_and_of_later_versions() {
        assert_eq!(keys(1, &[]).open(&PLACE, &"t0ken".into()).unwrap().expose(), "t0ken");
        for text in ["sealed:v2:00000000:AAAA", "sealed:v1:0000:AAAA", "sealed:v1:00000000", "sealed:"] {
            assert_eq!(keys(1, &[]).open(&PLACE, &text.into()), Err(CannotOpen::UnknownForm), "{text}");
        }
    }

    #[test]
    fn what_is_a_key() {
        for text in ["", "AAAA", "not base64", &BASE64_STANDARD.encode([0; 33])] {
            let refused = Keys::parse(text, []).unwrap_err().to_string();
            assert!(text.is_empty() || !refused.contains(text), "{refused}");
        }
        assert!(Keys::parse(&format!(" {}\n", new_key([1; 32])), []).is_ok());
        assert!(!format!("{:?} {:?}", keys(1, &[2]), Secret::from("t0ken")).contains("t0ken"));
    }

    proptest! {
        #[test]
        fn sealing_round_trips(clear: String, nonce: [u8; 12]) {
            let keys = keys(7, &[]);
            let sealed = keys.seal(&PLACE, nonce, &clear.as_str().into());
            prop_assert!(sealed.is_sealed());
            let opened = keys.open(&PLACE, &sealed).unwrap();
            prop_assert_eq!(opened.expose(), clear);
        }

        #[test]
        fn a_changed_character_does_not_open(at in 19_usize..60, to in "[A-Za-z0-9_-]") {
            let keys = keys(7, &[]);
            let sealed = keys.seal(&PLACE, [9; 12], &"0123456789".into());
            let mut text = sealed.expose().to_owned();
            let at = at.min(text.len() - 1);
            text.replace_range(at..=at, &to);
            prop_assert!(text == sealed.expose() || keys.open(&PLACE, &text.into()).is_err());
        }

        #[test]
        fn arbitrary_text_never_panics(text in "(sealed:)?(v1:)?([0-9a-f]{8}:)?.*") {
            let _ = keys(7, &[]).open(&PLACE, &text.into());
        }
    }
}

//! The secrets of callbacks and sources, as they are stored in Postgres and in the bucket `processes`.
//!
//! ```text
//! sealed:v1:{keyId}:{base64url(nonce ‖ ciphertext ‖ tag)}
//! ```
//!
//! AES-256-GCM (NIST SP 800-38D) with a random nonce of 96 bits; base64url without padding (RFC 4648, section 5).
//! `keyId` is the first four bytes, in hex, of the SHA-256 of `leadrelay key id:` and the key. The associated data is
//! `{projectId}.{callbackId or sourceId}.{field}`, so a sealed value opens only in the field that it was sealed for.
//!
//! The crate `secrets` seals and opens: lead-state seals, and the webhook-notifier opens the secrets that it is about
//! to send or verify.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

/// The prefix of every sealed value; its version follows.
const PREFIX: &str = "sealed:";
const VERSION: &str = "v1";

/// A secret value, sealed or in clear. `Debug` hides it, and dropping it wipes it from memory.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The text itself: for sealing, signing, sending, and for showing a new secret once.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether the text is empty, as it is where secrets are not shown.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it is sealed.
    pub fn is_sealed(&self) -> bool {
        self.0.starts_with(PREFIX)
    }

    /// The text of a sealed value.
    pub fn sealed(key_id: KeyId, bytes: &str) -> Self {
        Self(format!("{PREFIX}{VERSION}:{key_id}:{bytes}"))
    }

    /// The key that it is sealed with; none when it is in clear or in an unknown form.
    pub fn key_id(&self) -> Option<KeyId> {
        Some(self.sealed_parts()?.0)
    }

    /// The key's id and the sealed bytes in base64url.
    pub fn sealed_parts(&self) -> Option<(KeyId, &str)> {
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

/// Identifies a sealing key without revealing it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId([u8; 4]);

impl KeyId {
    /// The id with these bytes.
    pub const fn from_bytes(id: [u8; 4]) -> Self {
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

/// A field of a callback or source that holds secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretField {
    /// A signing secret.
    Signing,
    /// The secret of `auth`, which authenticates to the endpoint.
    Auth,
    /// The value of one of the `headers` that authenticate to the endpoint.
    Header,
    /// The private key of a client certificate.
    ClientKey,
    /// A secret that authenticates the reports of a source.
    Source,
}

//! Tokens that clients keep and cannot read or change, such as sessions in cookies: AES-256-GCM, base64url.

use std::fmt;

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use zeroize::Zeroizing;

use crate::InvalidKey;

/// The key that seals tokens.
pub struct TokenKey(LessSafeKey);

impl TokenKey {
    /// Reads the base64 of 32 bytes.
    pub fn parse(text: &str) -> Result<Self, InvalidKey> {
        let bytes = Zeroizing::new(BASE64_STANDARD.decode(text.trim()).map_err(|_| InvalidKey)?);
        let bytes: &[u8; 32] = bytes.as_slice().try_into().map_err(|_| InvalidKey)?;
        Ok(Self(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, bytes).map_err(|_| InvalidKey)?)))
    }

    /// Seals a token for a purpose. The nonce must be random: two tokens under one nonce reveal each other.
    pub fn seal(&self, purpose: &str, nonce: [u8; NONCE_LEN], clear: &[u8]) -> String {
        let mut sealed = Zeroizing::new(clear.to_vec());
        #[allow(clippy::expect_used, reason = "only a token of 64 GiB or more cannot be sealed")]
        let tag = self
            .0
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(purpose), &mut sealed)
            .expect("a token of a sane length");
        BASE64_URL_SAFE_NO_PAD.encode([&nonce, sealed.as_slice(), tag.as_ref()].concat())
    }

    /// Opens a token; `None` if it was changed, or sealed for another purpose or with another key.
    pub fn open(&self, purpose: &str, token: &str) -> Option<Zeroizing<Vec<u8>>> {
        let mut bytes = Zeroizing::new(BASE64_URL_SAFE_NO_PAD.decode(token).ok()?);
        let (nonce, sealed) = bytes.split_first_chunk_mut::<NONCE_LEN>()?;
        let clear = self.0.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(purpose), sealed).ok()?;
        Some(Zeroizing::new(clear.to_vec()))
    }
}

/// Hides the key.
impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenKey").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(byte: u8) -> TokenKey {
        TokenKey::parse(&BASE64_STANDARD.encode([byte; 32])).unwrap()
    }

    #[test]
    fn a_token_opens_for_its_purpose_and_key_only() {
        let token = key(1).seal("session", [9; NONCE_LEN], b"text");
        assert_eq!(key(1).open("session", &token).as_deref().map(Vec::as_slice), Some(&b"text"[..]));
        assert_eq!(key(1).open("other", &token), None);
        assert_eq!(key(2).open("session", &token), None);
        assert!(TokenKey::parse("AAAA").is_err());
    }

    proptest! {
        #[test]
        fn changed_and_arbitrary_tokens_do_not_open(at: prop::sample::Index, to in "[A-Za-z0-9_-]", text in ".*") {
            let token = key(1).seal("session", [9; NONCE_LEN], b"0123456789");
            let at = at.index(token.len());
            let mut changed = token.clone();
            changed.replace_range(at..=at, &to);
            prop_assert!(changed == token || key(1).open("session", &changed).is_none());
            prop_assert!(key(1).open("session", &text).is_none());
        }
    }
}

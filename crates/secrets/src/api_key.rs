//! The text of API keys. It is shown once and never stored; the services store and watch its SHA-256.

use sha2::{Digest, Sha256};

/// Makes the text of a new key from 256 random bits.
pub fn generate(random: [u8; 32]) -> String {
    format!("lr_{}", hex::encode(random))
}

/// The SHA-256 of a key's text in hex: its key in the bucket `api_keys`.
pub fn hash(key: &str) -> String {
    hex::encode(Sha256::digest(key))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_key_and_its_hash() {
        let key = super::generate([1; 32]);
        insta::assert_snapshot!(format!("{key} {}", super::hash(&key)), @"lr_0101010101010101010101010101010101010101010101010101010101010101 daf443c4ebafb7da6abdaa896ec75b8453e828c2bf6c4ebc190381b691ff490e");
    }
}

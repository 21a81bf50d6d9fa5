//! Seals the secrets of callbacks and sources, hashes API keys, and seals tokens that clients keep. The wire forms are
//! in [`contract::secret`] and [`contract::key`].

pub mod api_key;
mod sealing;
mod token;

pub use crate::{
    sealing::{InvalidKey, NONCE_LEN, OpenError, SealingContext, SealingKeys, new_sealing_key},
    token::TokenKey,
};

//! Secrets at rest: sealing of callbacks' secrets, hashing of API keys, and tokens that clients keep. What of them crosses the wire is in
//! [`contract::secret`] and [`contract::key`].

pub mod api_key;
mod sealing;
mod token;

pub use crate::{
    sealing::{InvalidKey, NONCE_LEN, OpenError, SealingContext, SealingKeys, new_sealing_key},
    token::TokenKey,
};

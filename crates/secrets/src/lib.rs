//! Secrets at rest: sealing of callbacks' secrets, and hashing of API keys. What of them crosses the wire is in
//! [`contract::secret`] and [`contract::key`].

pub mod api_key;
mod sealing;

pub use crate::sealing::{InvalidKey, NONCE_LEN, OpenError, SealingContext, SealingKeys, new_sealing_key};

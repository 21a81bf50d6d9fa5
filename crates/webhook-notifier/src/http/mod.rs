//! 7 Deliver, 8 Retry: one HTTP request to a callback.

pub(crate) mod client;
pub(crate) mod dns;
pub(crate) mod failure;
pub(crate) mod guard;
pub(crate) mod own_addresses;
mod pool;
pub(crate) mod request;
pub(crate) mod resolver;
pub(crate) mod response_limit;
pub(crate) mod signature;
mod token;
mod token_request;

//! 7 Deliver, 8 Retry: one HTTP request to a callback.

pub(crate) mod client;
pub(crate) mod guard;
pub(crate) mod request;
pub(crate) mod response_limit;
pub(crate) mod signature;

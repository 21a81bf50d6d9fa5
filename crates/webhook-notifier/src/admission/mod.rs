//! 7 Deliver, 8 Retry: which attempts may start now.

pub(crate) mod breaker;
pub(crate) mod limiter;
pub(crate) mod token_bucket;

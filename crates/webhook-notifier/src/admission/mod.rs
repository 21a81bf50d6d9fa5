//! 7 Deliver, 8 Retry: which attempts may start now.
//!
//! [`limiter`] owns the pool that first attempts and retries share. [`share`] computes how much of it an endpoint may
//! take, [`endpoint`] holds the state of one endpoint: its window, its rate limit ([`token_bucket`]) and its circuit
//! breaker ([`breaker`]).

pub(crate) mod breaker;
pub(crate) mod endpoint;
pub(crate) mod limiter;
pub(crate) mod share;
pub(crate) mod token_bucket;

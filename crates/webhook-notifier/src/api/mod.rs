//! Queries over NATS.

pub(crate) mod callbacks;
pub(crate) mod ping;
pub(crate) mod recovery;

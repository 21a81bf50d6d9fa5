//! Answers queries over NATS.

pub(crate) mod callbacks;
pub(crate) mod deliveries;
pub(crate) mod ping;
pub(crate) mod recovery;
pub(crate) mod sources;

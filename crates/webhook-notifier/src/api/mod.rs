//! Answers queries over NATS.

mod backfill;
pub(crate) mod callbacks;
pub(crate) mod deliveries;
pub(crate) mod ping;
pub(crate) mod recovery;
pub(crate) mod sources;

//! The queries that lead-state answers over NATS. Every instance answers, not only the leader.

pub(crate) mod admin;
pub(crate) mod lists;
pub(crate) mod queries;
pub(crate) mod updates;

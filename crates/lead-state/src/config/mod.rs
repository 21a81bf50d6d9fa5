//! Configuration: what a change makes of a process, its secrets at rest, and its projection into NATS buckets.

pub(crate) mod projection;
pub(crate) mod secrets;

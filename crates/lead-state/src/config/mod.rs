//! Configuration: secrets at rest, and the projection into NATS buckets.

pub(crate) mod projection;
pub(crate) mod sealer;

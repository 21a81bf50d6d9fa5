//! 7 Deliver, 8 Retry: types and decisions without effects. Imports nothing else of the crate.

pub(crate) mod delivery;
pub(crate) mod schedule;

//! 7 Deliver: completion events from `LEAD_EVENTS` become deliveries.

pub(crate) mod consumer;
pub(crate) mod dead_letter;
pub(crate) mod erasures;
pub(crate) mod event;
pub(crate) mod memory;
pub(crate) mod ordering;
pub(crate) mod parked;

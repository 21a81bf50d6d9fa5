//! Types and decisions without effects. Imports nothing else of the crate.

pub(crate) mod delivery;
pub(crate) mod ordering;
pub(crate) mod outcome;
pub(crate) mod report_signature;
pub(crate) mod schedule;

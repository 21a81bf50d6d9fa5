//! 4 Decide: pure functions. This module imports nothing else of the crate; time is an argument.

mod address;
pub mod batch;
mod callback_auth;
mod creation;
pub mod decide;
pub mod entry;
mod erasure;
pub(crate) mod lead_search;
mod merge;
mod outcome;
pub(crate) mod process_change;
pub(crate) mod process_diff;
mod source_change;
pub(crate) mod statistics;
pub mod work;

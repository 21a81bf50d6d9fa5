//! 3–6: the tasks of the leader, which read the command log, decide, apply and announce.

mod announcer;
mod applier;
mod call_expiry;
pub(crate) mod created_leads;
mod dead_letters;
mod erasure;
pub(crate) mod leader;
mod planner;
mod prefetch;
mod progress;
mod reader;
mod retry;
pub(crate) mod term;

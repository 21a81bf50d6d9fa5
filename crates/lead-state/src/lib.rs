//! lead-state: 3 read in order, 4 decide, 5 apply, 6 announce.
//!
//! Only this service changes leads. [`core`] is pure, `pipeline` runs it on the command log under one leader at a time, and all SQL is
//! in `store`.

mod admin;
mod cache;
mod configure;
pub mod core;
mod housekeeping;
mod lag;
mod lists;
mod metrics;
mod pipeline;
mod projection;
mod queries;
mod recovery;
mod secrets;
mod service;
mod store;
mod updates;

pub use service::{Config, lacking_migrations, migrate, run};

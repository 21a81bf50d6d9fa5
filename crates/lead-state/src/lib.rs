//! lead-state: 3 read in order, 4 decide, 5 apply, 6 announce.
//!
//! Only this service changes leads. [`core`] is pure, `pipeline` runs it on the command log under one leader at a time,
//! and all SQL is in `store`.

#![allow(missing_docs, reason = "an application: its public items only serve leadctl and the tests")]

mod api;
mod cache;
mod config;
pub mod core;
mod housekeeping;
mod lag;
mod metrics;
mod pipeline;
mod recovery;
mod service;
mod store;

pub use service::{Config, lacking_migrations, migrate, run};

//! The webhook-notifier: delivers the outcomes of lead updates to callback URLs.
//!
//! Its part of the flow (the numbers are those of docs/ARCHITECTURE.md):
//!
//! - 7 Deliver: [`dispatch`] pulls completion events from `LEAD_EVENTS` and starts the first attempt for each callback.
//!   [`callbacks`] finds the callbacks, [`admission`] limits how many attempts run at once and per second, [`http`]
//!   signs and sends the request, [`core`] decides what follows from the response, [`recorder`] writes it to Postgres.
//!   Then the event is acknowledged.
//! - 8 Retry: [`retry`] claims due deliveries in Postgres and sends them the same way ([`deliver`]); [`process_reads`]
//!   reads the processes that memory lacks; [`api`] makes finished deliveries due again on request.
//!
//! [`outbox`] publishes events about exhausted deliveries and disabled callbacks, [`callback_health`] disables
//! callbacks that fail for too long, [`housekeeping`] creates and drops partitions, [`backlog`] measures what waits.
//! All SQL is in [`store`].

mod admission;
mod api;
mod backlog;
mod callback_health;
mod callbacks;
mod config;
mod core;
mod deliver;
mod dispatch;
mod housekeeping;
mod http;
mod metrics;
mod operational;
mod outbox;
mod process_reads;
mod recorder;
mod retry;
mod service;
mod store;

pub use callback_health::DisableAfter;
pub use config::Config;
pub use http::signature::{BadSecret, signature};
pub use service::{lacking_migrations, migrate, run};

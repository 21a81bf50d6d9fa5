//! 1 Accept: the HTTP API. A request is authenticated, validated and made a command; the answer goes out once
//! JetStream has it. Queries are asked of lead-state and webhook-notifier. The gateway itself stores nothing.

mod auth;
mod body;
mod command_log;
mod config;
mod error;
mod fields;
mod idempotency;
mod if_match;
mod lines;
mod metrics;
#[cfg(test)]
mod openapi;
mod outcomes;
mod prefer;
mod rate;
mod routes;
mod server;
mod tls;

pub use crate::{
    config::Config,
    routes::documents::{DOCUMENTS, Document},
    server::{ENDPOINTS, Endpoint, run, run_on},
};

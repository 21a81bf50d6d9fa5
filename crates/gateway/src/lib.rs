//! 1 Accept: the HTTP API, and the intake of producers' messages over NATS. A request is authenticated, validated and
//! turned into a command; the response is sent once JetStream has the command. Queries go to lead-state and
//! webhook-notifier. The gateway has no database.

mod accept;
mod adapters;
mod admission;
mod app;
mod auth;
mod bulk;
mod command;
mod command_log;
mod config;
mod error;
mod event_subscribers;
mod idempotency;
mod intake;
mod json_splitter;
mod key_uses;
mod metrics;
#[cfg(test)]
mod openapi;
mod outage;
mod outcome_waiters;
mod packer;
mod rate_limit;
mod request;
mod response;
mod router;
mod routes;
mod server;
mod tls;
mod work_budget;

pub use crate::{
    config::Config,
    router::Endpoint,
    routes::{
        ENDPOINTS,
        docs::{DOCUMENTS, Document},
    },
    server::{run, run_on},
};

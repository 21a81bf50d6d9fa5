//! What every service needs around its part of the flow: configuration, telemetry, lifecycle, health, metrics, HTTP
//! serving, NATS connection, streams, buckets and queries.

pub mod batch;
mod choice;
pub mod clock;
pub mod config;
pub mod health;
pub mod http;
pub mod kv;
pub mod lifecycle;
pub mod metrics;
pub mod nats;
pub mod publish;
pub mod retention;
pub mod rpc;
pub mod telemetry;
pub mod tls;
pub mod traces;
pub mod version;

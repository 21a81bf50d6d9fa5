//! What every service needs around its part of the flow: configuration, telemetry, lifecycle, health, metrics, HTTP
//! serving, NATS connection, streams, buckets and queries, and the Postgres code that several services share.

pub mod audits;
pub mod clock;
pub mod config;
pub mod escape;
pub mod health;
pub mod http;
pub mod idempotency;
pub mod kv;
pub mod lifecycle;
pub mod metrics;
pub mod nats;
#[cfg(feature = "postgres")]
pub mod postgres;
pub mod publish;
pub mod publisher;
pub mod replay_note;
pub mod retention;
pub mod rpc;
mod secret_files;
pub mod shares;
pub mod telemetry;
pub mod tls;
pub mod traces;
pub mod version;

//! The schema `webhooks`: all SQL of this service, checked at compile time. Every statement can be repeated.

use service_kit::{
    config::DatabaseConfig,
    postgres::{DatabaseUrlError, Pool, Schema},
};

pub(crate) mod backlog;
mod bodies;
pub(crate) mod claim;
pub(crate) mod deliveries;
pub(crate) mod erasures;
pub(crate) mod error;
pub(crate) mod failures;
pub(crate) mod health;
pub(crate) mod operational;
pub(crate) mod ordering;
pub(crate) mod outbox;
pub(crate) mod parked;
pub(crate) mod partitions;
pub(crate) mod record;
pub(crate) mod statistics;

/// A pool that connects on first use, so that the service can start before its database.
pub(crate) fn pool(config: &DatabaseConfig) -> Result<Pool, DatabaseUrlError> {
    // Every statement finds its rows by index. A plan that was cached while a table was small would scan it once it is
    // large; and JIT compilation of short statements costs more than running them.
    Pool::new(config, "webhook-notifier", &[("enable_seqscan", "off"), ("jit", "off")])
}

pub(crate) fn schema() -> Schema {
    Schema::new("webhooks", sqlx::migrate!())
}

fn id(bytes: [u8; 12]) -> contract::ObjectId {
    contract::ObjectId::from_bytes(bytes)
}

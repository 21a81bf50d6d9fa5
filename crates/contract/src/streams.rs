//! Streams and buckets: what they hold, and what happens when they are full. lead-state makes them; the other
//! services wait until they are there.

use std::time::Duration;

use async_nats::jetstream::{
    kv,
    stream::{Config, DiscardPolicy, Info, RetentionPolicy, StorageType},
};

use crate::{ObjectId, subject};

/// The command log: totally ordered, durable, the source of every change.
pub const LEAD_COMMANDS: &str = "LEAD_COMMANDS";
/// Completion events, for the webhook-notifier and whoever wants to know.
pub const LEAD_EVENTS: &str = "LEAD_EVENTS";
/// Events about deliveries and callbacks.
pub const WEBHOOK_EVENTS: &str = "WEBHOOK_EVENTS";
/// What could not be parsed, whole.
pub const LEAD_DEAD_LETTERS: &str = "LEAD_DEAD_LETTERS";
/// The bucket of API keys, by SHA-256 of the key in hex; values are [`ApiKey`](crate::key::ApiKey).
pub const API_KEYS: &str = "api_keys";
/// The bucket of processes, by [`process_key`](crate::subject::process_key); values are
/// [`Process`](crate::process::Process).
pub const PROCESSES: &str = "processes";
/// The bucket of requests that carried an `Idempotency-Key`, by
/// [`idempotency_key`](crate::idempotency::idempotency_key); values are
/// [`IdempotencyRecord`](crate::idempotency::IdempotencyRecord). Its entries go after [`IDEMPOTENCY_AGE`].
pub const IDEMPOTENCY: &str = "idempotency";

/// How long a client's `Idempotency-Key` is remembered. Longer lets clients repeat requests later, and holds more.
pub const IDEMPOTENCY_AGE: Duration = Duration::from_hours(24);

/// The durable consumer through which all webhook-notifiers share the events.
pub const NOTIFIER_CONSUMER: &str = "webhook-notifier";
/// The consumer by which webhook-notifiers take down what callbacks with an order are to be told, ahead of all attempts.
pub const ORDER_CONSUMER: &str = "webhook-notifier-order";

/// How much the streams may hold.
#[derive(Debug, Clone, Copy)]
pub struct StreamLimits {
    /// Most bytes of the command log and, again, of the events. When one is full its publisher waits or answers
    /// 503; nothing is dropped.
    pub max_bytes: i64,
    /// Copies of each stream: 1 on a single server, 3 on a cluster.
    pub replicas: usize,
}

/// What the description of a stream begins with; its mark follows.
const MARKED: &str = "Leadrelay, stream ";

/// A stream's identity: another one is another log, with sequences of its own.
///
/// It is the mark that the stream got when it was made. A stream without one goes by the time of its making, though that
/// is no identity on every server: nats-server 2.9 changes it when a stream's configuration is changed after a restart.
pub fn identity(info: &Info) -> String {
    let mark = info.config.description.as_deref().and_then(|description| description.strip_prefix(MARKED));
    mark.map_or_else(|| info.created.unix_timestamp_nanos().to_string(), str::to_owned)
}

/// The streams, as they should be; those that are made now get this mark.
pub fn streams(limits: StreamLimits, mark: ObjectId) -> [Config; 4] {
    let stream = |name: &str, subjects: &str, discard, max_bytes| Config {
        name: name.into(),
        description: Some(format!("{MARKED}{mark}")),
        subjects: vec![subjects.into()],
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        num_replicas: limits.replicas,
        discard,
        max_bytes,
        // A producer's retry within this time never reaches the log; a later one is met by the ledger. Longer
        // costs the server memory per message, shorter sends more retries to the ledger.
        duplicate_window: Duration::from_secs(120),
        ..Config::default()
    };
    // Published to in atomic batches, which servers before 2.12 do not know, and in fast-ingest batches, from 2.14 on.
    let batched = |stream| Config { allow_atomic_publish: true, allow_batch_publish: true, ..stream };
    // Refuse rather than forget: what is in these two must be read before it may go.
    let refuse = DiscardPolicy::New;
    // Notices: the source of truth is in Postgres or gone for good, so the oldest make room.
    let forget = DiscardPolicy::Old;
    [
        batched(stream(LEAD_COMMANDS, subject::ALL_COMMANDS, refuse, limits.max_bytes)),
        batched(stream(LEAD_EVENTS, subject::ALL_EVENTS, refuse, limits.max_bytes)),
        stream(WEBHOOK_EVENTS, subject::ALL_WEBHOOK_EVENTS, forget, limits.max_bytes / 16),
        stream(LEAD_DEAD_LETTERS, subject::ALL_DEAD_LETTERS, forget, limits.max_bytes / 16),
    ]
}

/// The buckets, as they should be.
pub fn buckets(limits: StreamLimits) -> [kv::Config; 3] {
    let bucket = |bucket: &str| kv::Config {
        bucket: bucket.into(),
        history: 1,
        storage: StorageType::File,
        num_replicas: limits.replicas,
        ..kv::Config::default()
    };
    let idempotency = kv::Config {
        max_age: IDEMPOTENCY_AGE,
        // Bounded, for clients fill it: about 300 bytes a key. When it is full, requests with a new key are refused.
        max_bytes: limits.max_bytes / 4,
        ..bucket(IDEMPOTENCY)
    };
    [bucket(API_KEYS), bucket(PROCESSES), idempotency]
}

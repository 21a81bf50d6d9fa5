//! Streams and buckets: what they hold, and what happens when they are full. lead-state creates them; the other
//! services wait for them.

use std::time::Duration;

use async_nats::jetstream::{
    kv,
    stream::{Config, DiscardPolicy, Info, RetentionPolicy, StorageType},
};

use crate::{ObjectId, console::PORTAL_AGE, subject};

/// The command log: totally ordered, durable, the source of every change.
pub const LEAD_COMMANDS: &str = "LEAD_COMMANDS";
/// Completion events, for the webhook-notifier and other consumers.
pub const LEAD_EVENTS: &str = "LEAD_EVENTS";
/// Events about deliveries and callbacks.
pub const WEBHOOK_EVENTS: &str = "WEBHOOK_EVENTS";
/// Messages that could not be applied, unchanged.
pub const LEAD_DEAD_LETTERS: &str = "LEAD_DEAD_LETTERS";
/// The bucket of API keys, by SHA-256 of the key in hex; values are [`ApiKey`](crate::key::ApiKey).
pub const API_KEYS: &str = "api_keys";
/// The bucket of processes, by [`process_key`](crate::subject::process_key); values are
/// [`Process`](crate::process::Process).
pub const PROCESSES: &str = "processes";
/// The bucket of requests that carried an `Idempotency-Key`, by
/// [`idempotency_key`](crate::idempotency::idempotency_key); values are
/// [`IdempotencyRecord`](crate::idempotency::IdempotencyRecord). Its entries expire after [`IDEMPOTENCY_AGE`].
pub const IDEMPOTENCY: &str = "idempotency";

/// The bucket of links of the operator console that were not used or revoked; values are
/// [`ConsoleLogin`](crate::console::ConsoleLogin)s and [`PortalLink`](crate::console::PortalLink)s.
pub const CONSOLE_LOGINS: &str = "console_logins";

/// The bucket of the last uses of API keys, by the key's id; values are [`Timestamp`](crate::Timestamp)s, rounded down
/// to the minute. Its entries expire after [`KEY_USE_AGE`].
pub const KEY_USES: &str = "key_uses";

/// The bucket of the verdicts of audits, by scope; values are [`AuditRecord`](crate::audit::AuditRecord)s.
pub const AUDITS: &str = "audits";

/// How long the last use of a key is kept.
pub const KEY_USE_AGE: Duration = Duration::from_hours(400 * 24);

/// How long a client's `Idempotency-Key` is valid. Longer lets clients repeat requests later, and takes more space.
pub const IDEMPOTENCY_AGE: Duration = Duration::from_hours(24);

/// The durable consumer through which all webhook-notifiers share the events.
pub const NOTIFIER_CONSUMER: &str = "webhook-notifier";
/// The consumer through which webhook-notifiers record the deliveries of ordered callbacks, ahead of all attempts.
pub const ORDER_CONSUMER: &str = "webhook-notifier-order";

/// The key in the metadata of lead-state's micro service that shows operators how many replicas new streams get.
pub const STREAM_REPLICAS: &str = "stream_replicas";

/// The size of the streams.
#[derive(Debug, Clone, Copy)]
pub struct StreamLimits {
    /// The most bytes of the command log, and of the events. If one is full its publisher waits or answers 503; nothing
    /// is dropped.
    pub max_bytes: i64,
    /// Copies of each stream: 1 on a single server, 3 on a cluster.
    pub replicas: usize,
}

/// The beginning of a stream's description; the mark follows.
const MARKED: &str = "Leadrelay, stream ";

/// A stream's identity. A stream with another identity is another log, with its own sequences.
///
/// It is the mark that the stream got when it was created. Without a mark it is the creation time, although nats-server
/// 2.9 changes that when a stream's configuration is changed after a restart.
pub fn identity(info: &Info) -> String {
    let mark = info.config.description.as_deref().and_then(|description| description.strip_prefix(MARKED));
    mark.map_or_else(|| info.created.unix_timestamp_nanos().to_string(), str::to_owned)
}

/// How long a stream recognizes a message id. Within this time a producer's retry does not reach the log; after it, the
/// ledger recognizes retries that have the id of their update. A longer time costs the server memory per message; a
/// shorter one sends more retries to the ledger.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);
/// The same for events, one per update: a server keeps 107 bytes per id. The time is longer than lead-state resends an
/// event on one connection. An event that is announced again after a longer outage is in the stream twice with the same
/// id; webhook-notifier recognizes the second one by its deliveries.
const EVENTS_DUPLICATE_WINDOW: Duration = Duration::from_secs(30);

/// The names of all streams that [`streams`] and [`buckets`] configure.
pub fn names() -> Vec<String> {
    let limits = StreamLimits { max_bytes: 0, replicas: 1 };
    let streams = streams(limits, ObjectId::from_bytes([0; 12])).map(|stream| stream.name);
    streams.into_iter().chain(buckets(limits).map(|bucket| format!("KV_{}", bucket.bucket))).collect()
}

/// The configuration of the streams; new ones get this mark.
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
        duplicate_window: DUPLICATE_WINDOW,
        ..Config::default()
    };
    // Atomic batches need nats-server 2.12.
    let batched = |stream| Config { allow_atomic_publish: true, ..stream };
    // These two streams refuse messages when they are full: each message must be read before it may be purged.
    let refuse = DiscardPolicy::New;
    // These two contain notices, so the oldest may be dropped.
    let forget = DiscardPolicy::Old;
    [
        batched(stream(LEAD_COMMANDS, subject::ALL_COMMANDS, refuse, limits.max_bytes)),
        Config {
            duplicate_window: EVENTS_DUPLICATE_WINDOW,
            ..batched(stream(LEAD_EVENTS, subject::ALL_EVENTS, refuse, limits.max_bytes))
        },
        stream(WEBHOOK_EVENTS, subject::ALL_WEBHOOK_EVENTS, forget, limits.max_bytes / 16),
        stream(LEAD_DEAD_LETTERS, subject::ALL_DEAD_LETTERS, forget, limits.max_bytes / 16),
    ]
}

/// The configuration of the buckets.
pub fn buckets(limits: StreamLimits) -> [kv::Config; 6] {
    let bucket = |bucket: &str| kv::Config {
        bucket: bucket.into(),
        history: 1,
        storage: StorageType::File,
        num_replicas: limits.replicas,
        ..kv::Config::default()
    };
    let idempotency = kv::Config {
        max_age: IDEMPOTENCY_AGE,
        // Bounded, because clients fill it: about 220 bytes per key. If it is full, requests with a new key are
        // refused.
        max_bytes: limits.max_bytes / 4,
        ..bucket(IDEMPOTENCY)
    };
    // No link is valid for longer.
    let logins = kv::Config { max_age: PORTAL_AGE, ..bucket(CONSOLE_LOGINS) };
    let key_uses = kv::Config { max_age: KEY_USE_AGE, ..bucket(KEY_USES) };
    [bucket(API_KEYS), bucket(PROCESSES), idempotency, logins, key_uses, bucket(AUDITS)]
}

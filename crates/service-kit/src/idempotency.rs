//! Estimates when the bucket of idempotency keys is full.

use std::time::Duration;

use anyhow::Context;
use async_nats::jetstream::{self, stream::Stream};
use contract::{
    Timestamp,
    idempotency::lasts,
    streams::{IDEMPOTENCY, IDEMPOTENCY_AGE},
};

use crate::{clock, metrics::age};

/// The rate is computed from this many of the last keys. Fewer keys follow the rate faster, but mistake a short burst
/// for it.
const RECENT_KEYS: u64 = 1000;

/// How long until the bucket is full at the present rate; [`IDEMPOTENCY_AGE`] means never.
///
/// # Errors
/// The bucket cannot be read.
pub async fn bucket_lasts(js: &jetstream::Context) -> anyhow::Result<Duration> {
    let stream = js.get_stream(format!("KV_{IDEMPOTENCY}")).await.context("cannot find the idempotency keys")?;
    Ok(stream_lasts(&stream).await)
}

/// Like [`bucket_lasts`], with the bucket's stream as it was read.
pub async fn stream_lasts(stream: &Stream) -> Duration {
    let info = stream.cached_info();
    let state = &info.state;
    let Some(max_bytes) = u64::try_from(info.config.max_bytes).ok().filter(|max| *max > 0) else {
        return IDEMPOTENCY_AGE;
    };
    let keys = RECENT_KEYS.min(state.messages);
    // The key may have expired meanwhile: then hardly any key is new.
    let Ok(first) = stream.get_raw_message(state.last_sequence.saturating_sub(keys) + 1).await else {
        return IDEMPOTENCY_AGE;
    };
    // At least a second, so that a few keys at once do not count as a high rate.
    let seconds = age(clock::now(), Timestamp::from(first.time)).max(1.0);
    let key_bytes = state.bytes as f64 / state.messages.max(1) as f64;
    lasts(state.bytes, max_bytes, keys as f64 * key_bytes / seconds)
}

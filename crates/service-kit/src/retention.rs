//! Making room in streams: what was read may go, after a while or when room is needed; what was not may never.

use std::time::Duration;

use anyhow::Context;
use async_nats::jetstream::stream::Stream;
use contract::Timestamp;

/// Purges the prefix of a stream that ends at `read_up_to` (inclusive): all that is older than `window`, and all of it
/// when the stream is more than half full. Returns how many messages went.
pub async fn purge_read(stream: &Stream, read_up_to: u64, now: Timestamp, window: Duration) -> anyhow::Result<u64> {
    let info = stream.get_info().await.context("cannot read the stream's state")?;
    let (first, limit) = (info.state.first_sequence, info.config.max_bytes);
    if info.state.messages == 0 || read_up_to < first {
        return Ok(0);
    }
    let needs_room = limit > 0 && info.state.bytes > limit as u64 / 2;
    // Exclusive end of what goes: found by bisection, for a stream knows times by sequence only.
    let mut end = read_up_to + 1;
    if !needs_room {
        let oldest_kept = now.minus(window);
        let (mut low, mut high) = (first, end);
        while low < high {
            let middle = low + (high - low) / 2;
            if logged_at(stream, middle).await?.is_none_or(|at| at < oldest_kept) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        end = low;
    }
    if end <= first {
        return Ok(0);
    }
    let purged = stream.purge().sequence(end).await.context("cannot purge the stream")?.purged;
    Ok(purged)
}

/// When a message was stored; none if it is not there any more.
async fn logged_at(stream: &Stream, sequence: u64) -> anyhow::Result<Option<Timestamp>> {
    use async_nats::jetstream::stream::RawMessageErrorKind;
    match stream.get_raw_message(sequence).await {
        Ok(message) => Ok(Some(message.time.into())),
        Err(e) if e.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(e) => Err(e).context("cannot read a message's time"),
    }
}

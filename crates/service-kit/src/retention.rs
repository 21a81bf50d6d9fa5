//! Retention: messages that were read may be purged from a stream when they are old or space is needed, unread ones
//! never. Partitions in Postgres may be dropped when they are old enough.

use std::{fmt, str::FromStr, time::Duration};

use anyhow::Context;
use async_nats::jetstream::stream::Stream;
use contract::Timestamp;

/// How long monthly partitions in Postgres are kept: a duration, or off for no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention(Option<Duration>);

/// The last two monthly partitions are always kept.
const MIN_RETENTION: Duration = Duration::from_secs(62 * 24 * 60 * 60);

impl Retention {
    /// The duration; none for no limit.
    pub fn duration(self) -> Option<Duration> {
        self.0
    }

    /// The time before which partitions may be dropped; none for no limit.
    pub fn cutoff(self, now: Timestamp) -> Option<Timestamp> {
        self.0.map(|kept| now.minus(kept))
    }
}

impl FromStr for Retention {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        let kept = *text.parse::<humantime::Duration>().map_err(|e| format!("{e}; try 400days, or off"))?;
        if kept < MIN_RETENTION {
            return Err("must be at least 62days, or off".into());
        }
        Ok(Self(Some(kept)))
    }
}

impl fmt::Display for Retention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(kept) => humantime::format_duration(kept).fmt(f),
            None => f.write_str("off"),
        }
    }
}

/// Purges messages up to `read_up_to` (inclusive): those older than `window`, or all of them if the stream is more than
/// half full. Returns the number of purged messages.
///
/// # Errors
/// The stream cannot be read or purged.
pub async fn purge_read(stream: &Stream, read_up_to: u64, now: Timestamp, window: Duration) -> anyhow::Result<u64> {
    let info = stream.get_info().await.context("cannot read the stream's state")?;
    let (first, limit) = (info.state.first_sequence, info.config.max_bytes);
    if info.state.messages == 0 || read_up_to < first {
        return Ok(0);
    }
    let needs_space = limit > 0 && info.state.bytes > limit as u64 / 2;
    // The exclusive end of the purge. Bisection, because a stream can be searched by sequence only.
    let mut end = read_up_to + 1;
    if !needs_space {
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

/// When a message was stored; none if it was deleted.
async fn logged_at(stream: &Stream, sequence: u64) -> anyhow::Result<Option<Timestamp>> {
    use async_nats::jetstream::stream::RawMessageErrorKind;
    match stream.get_raw_message(sequence).await {
        Ok(message) => Ok(Some(message.time.into())),
        Err(e) if e.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(e) => Err(e).context("cannot read a message's time"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retention_is_at_least_two_months_or_off() {
        assert_eq!(Retention::default().to_string().parse(), Ok(Retention::default()));
        let year = "400days".parse::<Retention>().unwrap();
        assert_eq!(year.to_string().parse(), Ok(year));
        let now = Timestamp::from_millis(1_768_193_759_048);
        assert_eq!(year.cutoff(now).unwrap().to_iso(), "2024-12-08T04:55:59.048Z");
        assert_eq!(Retention::default().cutoff(now), None);
        for wrong in ["", "61days", "0s", "never"] {
            assert!(wrong.parse::<Retention>().is_err(), "{wrong}");
        }
    }
}

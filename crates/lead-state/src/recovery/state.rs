//! 3 Read in order, 6 Announce: reads the state of log, checkpoint and events.

use anyhow::Context;
use async_nats::jetstream::{
    self,
    stream::{self, RawMessageErrorKind, Stream},
};
use contract::{
    Timestamp, headers,
    position::{EventPosition, LogPosition},
    streams::{self, LEAD_COMMANDS, LEAD_EVENTS},
};
use service_kit::{clock, postgres::Pool};

use crate::store::{
    self,
    checkpoint::{self, Checkpoint},
    ledger,
};

/// The state of events, checkpoint, last event and log, read in this order. So, unless something was lost, no event is
/// newer than the checkpoint, the last event is not older than the announce watermark, and the checkpoint is not newer
/// than the log. A former leader may still move all of them.
#[derive(Debug, Clone)]
pub(crate) struct RecoveryState {
    /// The identity of `LEAD_EVENTS`.
    pub(crate) events_identity: String,
    /// The last sequence of `LEAD_EVENTS`.
    pub(crate) events_last: u64,
    /// The position in the last event; None if the stream is empty.
    pub(crate) last_event: Option<EventPosition>,
    pub(crate) checkpoint: Checkpoint,
    /// The position in the last event, read after the checkpoint; None if the stream is empty.
    pub(crate) last_event_after: Option<EventPosition>,
    /// The last decision in the ledger that counts as announced.
    pub(crate) last_announced: Option<LogPosition>,
    /// The identity of `LEAD_COMMANDS`.
    pub(crate) log_identity: String,
    /// The first sequence in the log; if the log is empty, the next one.
    pub(crate) log_first: u64,
    pub(crate) log_last: u64,
    /// When the log stored the entry at the checkpoint; None if the log does not hold it any more.
    pub(crate) applied_entry_at: Option<Timestamp>,
}

impl RecoveryState {
    pub(crate) async fn observe(pool: &Pool, js: &jetstream::Context) -> anyhow::Result<Self> {
        let events = js.get_stream(LEAD_EVENTS).await.with_context(|| format!("cannot find {LEAD_EVENTS}"))?;
        let info = events.cached_info();
        let events_identity = streams::identity(info);
        let events_last = info.state.last_sequence;
        let last_event = last_event_of(&events, info).await?;
        // The identity only initializes a new database; the log's state is read after the checkpoint.
        let log = js.get_stream(LEAD_COMMANDS).await.with_context(|| format!("cannot find {LEAD_COMMANDS}"))?;
        let checkpoint = checkpoint::load(
            &mut store::acquire(pool).await?,
            LEAD_COMMANDS,
            &streams::identity(log.cached_info()),
            clock::now(),
        )
        .await?;
        let last_announced = ledger::last_up_to(pool, checkpoint.announced).await?;
        let info = events.get_info().await.with_context(|| format!("cannot read the state of {LEAD_EVENTS}"))?;
        let last_event_after = last_event_of(&events, &info).await?;
        let info = log.get_info().await.with_context(|| format!("cannot read the state of {LEAD_COMMANDS}"))?;
        let applied_entry_at = match checkpoint.applied.sequence {
            0 => None,
            sequence => logged_at(&log, sequence).await?,
        };
        Ok(Self {
            events_identity,
            events_last,
            last_event,
            checkpoint,
            last_event_after,
            last_announced,
            log_identity: streams::identity(&info),
            log_first: info.state.first_sequence,
            log_last: info.state.last_sequence,
            applied_entry_at,
        })
    }
}

/// The position in the stream's last event; None if the stream is empty.
async fn last_event_of(events: &Stream, info: &stream::Info) -> anyhow::Result<Option<EventPosition>> {
    match info.state.messages {
        0 => Ok(None),
        _ => event_position(events, info.state.last_sequence).await,
    }
}

/// The position in an event's header.
pub(crate) async fn event_position(events: &Stream, sequence: u64) -> anyhow::Result<Option<EventPosition>> {
    match events.get_raw_message(sequence).await {
        Ok(message) => Ok(message.headers.get(headers::POSITION).and_then(|value| value.as_str().parse().ok())),
        Err(e) if e.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(e) => Err(e).context("cannot read an event"),
    }
}

/// When the log stored an entry; None if the log does not hold it.
pub(crate) async fn logged_at(log: &Stream, sequence: u64) -> anyhow::Result<Option<Timestamp>> {
    match log.get_raw_message(sequence).await {
        Ok(message) => Ok(Some(message.time.into())),
        Err(e) if e.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(e) => Err(e).context("cannot read an entry of the log"),
    }
}

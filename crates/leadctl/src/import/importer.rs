//! A running import: sends chunks, records outcomes, and writes chunks whose outcomes are complete.

use std::{collections::HashMap, pin::pin, time::Duration};

use anyhow::Context;
use contract::{ObjectId, Timestamp, streams::IDEMPOTENCY_AGE};
use http_api::BulkUpdateResult;
use service_kit::clock;
use tokio::time::{Instant, timeout, timeout_at};

use crate::{
    clients::{
        event_stream::{EventStream, StreamEvent},
        gateway::GatewayClient,
    },
    import::{
        files::{ImportFiles, ImportState},
        follow::{self, Outcome},
        rows::{Row, Rows, Source},
        send,
        window::{Chunk, RowRecord, RowStatus, Window},
    },
    output::{escape::escaped, progress::Bar},
};

/// Rows per chunk. More rows mean fewer requests, and more to repeat after an interruption. A change of this constant
/// or the next one changes what a chunk's key stands for: then the version in the digest of the file must change, too.
const CHUNK_ROWS: usize = 1000;
/// A chunk ends once it has this many bytes, even with fewer rows.
const CHUNK_BYTES: usize = 1 << 20;
/// Rows with pending outcomes, each a few hundred bytes of memory. At this limit nothing is sent until the oldest chunk
/// is complete.
pub(crate) const WINDOW_ROWS: usize = 10_000;
/// How old chunks may be that a resumed import repeats, when it begins: less than the gateway keeps their idempotency
/// keys. The difference is the time for repeating them.
pub(crate) const KEY_LIFETIME: Duration = Duration::from_secs(23 * 3600);
/// How long before the end of its key a chunk is not repeated any more: longer than its request takes.
const KEY_MARGIN: Duration = Duration::from_mins(10);
/// Outcomes that are kept while the response with their update ids is still pending. At this limit no events are read
/// until the response is there.
const MAX_EARLY: usize = 2 * CHUNK_ROWS;
/// How long to wait for the gateway before the first chunk.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The rows of one request.
#[derive(Default)]
struct Batch {
    records: Vec<RowRecord>,
    /// Indexes of the valid records.
    valid: Vec<usize>,
    body: Vec<u8>,
}

impl Batch {
    fn push(&mut self, row: Row) {
        let Row { number, lead_id, reference_id, body, .. } = row;
        let status = match body {
            Ok(text) => {
                self.valid.push(self.records.len());
                self.body.extend_from_slice(text.as_bytes());
                self.body.push(b'\n');
                // Until the gateway has answered.
                RowStatus::Unknown
            }
            Err(fault) => RowStatus::Invalid { code: fault.code, error: escaped(&fault.to_string()) },
        };
        self.records.push(RowRecord { number, lead_id, reference_id, status });
    }
}

pub(crate) struct Importer {
    gateway: GatewayClient,
    rows: Rows,
    files: ImportFiles,
    /// The state that this import continues from.
    previous: ImportState,
    /// When this process began to import.
    began: Timestamp,
    /// None if outcomes are not waited for.
    follower: Option<EventStream>,
    window: Window,
    /// Outcomes of the chunk that is being sent.
    early: HashMap<ObjectId, Outcome>,
    /// Whether events were missed since outcomes were last requested.
    gap: bool,
    /// Whether events of the previous import's chunks are missed: it did not follow events, or the stream has dropped
    /// them.
    previous_missed: bool,
    wait: Duration,
    /// When the last awaited outcome arrived, or waiting started.
    last_outcome_at: Instant,
    bar: Bar,
}

impl Importer {
    pub(crate) fn new(
        gateway: GatewayClient,
        source: &Source,
        files: ImportFiles,
        began: Timestamp,
        wait: Duration,
        rows: u64,
    ) -> anyhow::Result<Self> {
        let last_event_id = files.state.last_event_id.clone();
        Ok(Self {
            previous_missed: last_event_id.is_none(),
            follower: (!wait.is_zero()).then(|| EventStream::new(gateway.clone(), last_event_id)),
            gateway,
            rows: Rows::open(source)?,
            previous: files.state.clone(),
            began,
            files,
            window: Window::default(),
            early: HashMap::new(),
            gap: false,
            wait,
            last_outcome_at: Instant::now(),
            bar: Bar::new(rows),
        })
    }

    pub(crate) async fn run(mut self) -> anyhow::Result<ImportFiles> {
        for _ in 0..self.previous.written.rows() {
            self.rows.next()?;
        }
        if let Some(follower) = &mut self.follower {
            let started = timeout(START_TIMEOUT, follower.start()).await;
            started.with_context(|| format!("the gateway does not answer within {START_TIMEOUT:?}"))??;
        }
        let mut at_end = false;
        loop {
            self.write_complete_chunks()?;
            if !at_end && self.window.rows() < WINDOW_ROWS {
                match self.read_batch()? {
                    Some(batch) => self.send(batch).await?,
                    None => at_end = true,
                }
            } else if self.window.rows() > 0 {
                self.wait_for_event().await?;
            } else {
                self.bar.remove();
                return Ok(self.files);
            }
        }
    }

    /// Reads the next chunk. Its end depends on its rows only, so that a resumed import sends the same chunks.
    fn read_batch(&mut self) -> anyhow::Result<Option<Batch>> {
        let mut batch = Batch::default();
        while batch.records.len() < CHUNK_ROWS && batch.body.len() < CHUNK_BYTES {
            let Some(row) = self.rows.next()? else { break };
            batch.push(row);
        }
        Ok((!batch.records.is_empty()).then_some(batch))
    }

    /// Sends a chunk and adds it to the window.
    async fn send(&mut self, batch: Batch) -> anyhow::Result<()> {
        let Batch { mut records, valid, body } = batch;
        let (Some(first), Some(last)) = (records.first(), records.last()) else { return Ok(()) };
        let (first, last) = (first.number, last.number);
        // The interrupted import may have sent it already.
        let repeated = last <= self.previous.sent;
        let now = clock::now();
        let (sent_at, last_event_id) = match &self.follower {
            _ if repeated => (self.previous.sent_at.unwrap_or(now), self.previous.last_event_id.clone()),
            Some(follower) => (now, follower.last_event_id().map(str::to_owned)),
            None => (now, None),
        };
        if !valid.is_empty() && may_send(sent_at, self.began, now) {
            self.save_sent(last, sent_at, last_event_id.as_deref())?;
            let key = format!("leadctl-import-{}-{first}", self.files.state.run.run_id);
            let results = self.send_and_follow(&key, body, valid.len(), repeated).await?;
            for (index, result) in valid.into_iter().zip(results) {
                records[index].status = match (result.update_id, &self.follower) {
                    (Some(update_id), Some(_)) => RowStatus::Awaited(update_id),
                    (Some(update_id), None) => RowStatus::Pending(update_id),
                    (None, _) => RowStatus::Rejected {
                        code: result.code.unwrap_or_default().into_owned(),
                        error: result.error.unwrap_or_default(),
                    },
                };
            }
        }
        if self.window.awaited().len() == 0 {
            self.last_outcome_at = Instant::now();
        }
        self.window.push(Chunk { records, sent_at, last_event_id });
        self.gap |= repeated && self.previous_missed;
        for (_, outcome) in std::mem::take(&mut self.early) {
            self.record(outcome);
        }
        self.close_gap().await?;
        self.show_progress(last);
        Ok(())
    }

    /// Saves that rows up to `last` may have been sent.
    fn save_sent(&mut self, last: u64, sent_at: Timestamp, last_event_id: Option<&str>) -> anyhow::Result<()> {
        let state = &mut self.files.state;
        if last <= state.sent {
            return Ok(());
        }
        state.sent = last;
        if state.sent_at.is_none() {
            state.sent_at = Some(sent_at);
            state.last_event_id = last_event_id.map(str::to_owned);
        }
        self.files.save()
    }

    /// Sends a chunk and reads events meanwhile. While a chunk is repeated, no events are read: the update ids of their
    /// outcomes are not known yet, and the gateway keeps the events.
    async fn send_and_follow(
        &mut self,
        key: &str,
        body: Vec<u8>,
        lines: usize,
        repeated: bool,
    ) -> anyhow::Result<Vec<BulkUpdateResult>> {
        let Self { gateway, follower, window, early, gap, previous_missed, last_outcome_at, bar, .. } = self;
        let on_retry = |error: &anyhow::Error| bar.print(format_args!("retrying: {error:#}"));
        let mut sending = pin!(send::send(gateway, key, body.into(), lines, on_retry));
        loop {
            let follows = !repeated && early.len() < MAX_EARLY;
            let event = tokio::select! {
                results = &mut sending => return results,
                event = next_event(follower), if follows => event?,
            };
            match event {
                StreamEvent::Gap => (*gap, *previous_missed) = (true, true),
                StreamEvent::Event(event) => {
                    let outcome = Outcome::from(*event);
                    if window.record(outcome.clone()) {
                        *last_outcome_at = Instant::now();
                    } else {
                        early.insert(outcome.update_id, outcome);
                    }
                }
            }
        }
    }

    /// Waits for an outcome; after the timeout, the oldest chunk's rows become pending.
    async fn wait_for_event(&mut self) -> anyhow::Result<()> {
        match timeout_at(self.last_outcome_at + self.wait, next_event(&mut self.follower)).await {
            Ok(Ok(StreamEvent::Event(event))) => self.record(Outcome::from(*event)),
            Ok(Ok(StreamEvent::Gap)) => {
                (self.gap, self.previous_missed) = (true, true);
                self.close_gap().await?;
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => self.window.stop_waiting_for_oldest(),
        }
        self.show_progress(self.files.state.sent);
        Ok(())
    }

    fn record(&mut self, outcome: Outcome) {
        if self.window.record(outcome) {
            self.last_outcome_at = Instant::now();
        }
    }

    /// If events were missed, requests the outcome of every awaited update.
    async fn close_gap(&mut self) -> anyhow::Result<()> {
        let Some(follower) = self.follower.as_mut().filter(|_| std::mem::take(&mut self.gap)) else { return Ok(()) };
        self.bar.print(format_args!("events were missed; requesting outcomes"));
        // The event stream starts before the requests, so that no outcome falls between the two.
        follower.start().await?;
        for update_id in self.window.awaited().collect::<Vec<_>>() {
            if let Some(outcome) = follow::request_outcome(&self.gateway, update_id).await? {
                self.record(outcome);
            }
        }
        Ok(())
    }

    fn write_complete_chunks(&mut self) -> anyhow::Result<()> {
        while let Some(chunk) = self.window.pop_complete() {
            self.files.write(&chunk)?;
            let state = &mut self.files.state;
            state.sent = state.sent.max(state.written.rows());
            // Until the chunks of the interrupted import are written, its times stay valid.
            if state.written.rows() >= self.previous.sent {
                let oldest = self.window.oldest();
                state.sent_at = oldest.map(|chunk| chunk.sent_at);
                state.last_event_id = match oldest {
                    Some(chunk) => chunk.last_event_id.clone(),
                    None => self.follower.as_ref().and_then(EventStream::last_event_id).map(str::to_owned),
                };
            }
            self.files.save()?;
        }
        Ok(())
    }

    fn show_progress(&mut self, sent: u64) {
        self.bar.show(sent, self.window.awaited().len());
    }
}

/// Whether a chunk that was first sent at `sent_at` may be sent now. A resumed import decides by the time at which it
/// began: outcomes that it removed from the file to request them again do not become unknown while it does so.
fn may_send(sent_at: Timestamp, began: Timestamp, now: Timestamp) -> bool {
    began.minus(KEY_LIFETIME) < sent_at && now.minus(IDEMPOTENCY_AGE - KEY_MARGIN) < sent_at
}

/// The next event; never resolves without a follower.
async fn next_event(follower: &mut Option<EventStream>) -> anyhow::Result<StreamEvent> {
    match follower {
        Some(follower) => follower.next().await.context("use --wait 0s to import without outcomes"),
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_repeated_if_its_key_was_kept_when_the_import_was_resumed() {
        let after = |hours, minutes| {
            Timestamp::from_millis(0).plus(Duration::from_hours(hours)).plus(Duration::from_mins(minutes))
        };
        let sent_at = after(0, 0);

        assert!(may_send(sent_at, after(22, 59), after(22, 59)));
        assert!(may_send(sent_at, after(22, 59), after(23, 30)), "the outcomes were removed when it was resumed");
        assert!(!may_send(sent_at, after(23, 0), after(23, 0)));
        assert!(!may_send(sent_at, after(22, 59), after(23, 50)), "the key may have expired");
        assert!(may_send(after(90, 0), after(1, 0), after(90, 0)), "a chunk that was not sent before");
    }
}

//! 5 Apply: writes batches, one transaction each. The next batch is planned while one is being written.

use std::{
    pin::pin,
    time::{Instant, SystemTime},
};

use async_nats::Client;
use contract::{position::LogPosition, subject, work::WorkReport};
use service_kit::{
    health::Liveness,
    nats::{error_chain, retry_backoff},
    postgres::PinnedConnection,
    traces::{Span, Step, Traces},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    announcer::AnnounceSender,
    dead_letters::DeadLetterPublisher,
    planner::{PlannedBatch, Planner},
    prefetch::{ParsedBatch, PrefetchedBatch, PrefetchedRows, parse_entries},
    reader::ReadMessage,
    retry::{ApplyError, Attempt, NextStep, next_step},
};
use crate::{
    core::{
        batch::LedgerRow,
        entry::{DeadLetter, LogMessage},
        work,
    },
    metrics::Metrics,
    store::{
        StoreError,
        batch::{self, Batch},
        checkpoint::Checkpoint,
        ledger::Announcement,
    },
};

/// Applies batches until shutdown, and hands every written batch to the announcer.
pub(crate) struct Applier {
    pub(crate) preparer: Preparer,
    pub(crate) writer: Writer,
    pub(crate) announcer: AnnounceSender,
    /// Publishes the work of each batch.
    pub(crate) client: Client,
    pub(crate) metrics: Metrics,
}

/// Plans a batch and publishes its dead letters, before the batch is written.
pub(crate) struct Preparer {
    pub(crate) planner: Planner,
    pub(crate) dead_letters: DeadLetterPublisher,
    pub(crate) traces: Traces,
}

pub(crate) struct Writer {
    pub(crate) connection: PinnedConnection,
    pub(crate) liveness: Liveness,
    /// The checkpoint after the last written batch.
    pub(crate) checkpoint: Checkpoint,
    /// The announce watermark, written with each batch.
    pub(crate) announced: watch::Receiver<LogPosition>,
}

/// A batch that is planned and whose dead letters are published.
struct PreparedBatch {
    planned: PlannedBatch,
    /// Spans of the batch's updates, open until the batch is written.
    spans: Vec<Span>,
}

struct InFlightBatch {
    messages: Vec<ReadMessage>,
    read_at: SystemTime,
    prepared: Result<PreparedBatch, ApplyError>,
}

/// Entries of a failed batch that are still to be applied in one transaction.
struct Part<'a> {
    entries: &'a [&'a LogMessage],
    read_at: SystemTime,
    failures: usize,
    /// Why the database refuses the only entry, which then becomes a dead letter.
    refusal: Option<String>,
}

fn entries(read: &[ReadMessage]) -> Vec<&LogMessage> {
    read.iter().flat_map(|read| &read.entries).collect()
}

impl Preparer {
    async fn prepare_prefetched(&mut self, batch: PrefetchedBatch) -> InFlightBatch {
        let PrefetchedBatch { messages: read, read_at, parsed, rows } = batch;
        let prepared = self.prepare(&entries(&read), parsed, rows, read_at).await;
        InFlightBatch { messages: read, read_at, prepared }
    }

    async fn prepare(
        &mut self,
        entries: &[&LogMessage],
        parsed: ParsedBatch,
        rows: Option<PrefetchedRows>,
        read_at: SystemTime,
    ) -> Result<PreparedBatch, ApplyError> {
        let mut planned = self.planner.plan(parsed, rows).await?;
        self.dead_letters.publish_dead_letters(entries, &planned.dead_letters).await?;
        let spans = begin_spans(&self.traces, &mut planned.plan.rows, read_at, planned.count);
        Ok(PreparedBatch { planned, spans })
    }
}

/// Begins the span of each update, and makes it the parent of the spans after the update's announcement.
fn begin_spans(traces: &Traces, rows: &mut [LedgerRow], read_at: SystemTime, count: usize) -> Vec<Span> {
    let begin = |row: &mut LedgerRow| {
        let mut span = traces.begin_at(Step::Apply, row.traceparent.as_deref(), read_at);
        row.traceparent = Some(span.traceparent()?);
        span.update(row.event.update_id);
        let outcome = if row.event.success { "applied" } else { "refused" };
        span.note(|| {
            [
                ("leadrelay.log.sequence", (row.position.sequence as i64).into()),
                ("leadrelay.outcome", outcome.into()),
                ("messaging.batch.message_count", (count as i64).into()),
            ]
        });
        if let Some(code) = &row.event.error_code {
            span.note(|| [("leadrelay.error_code", code.clone().into())]);
        }
        Some(span)
    };
    rows.iter_mut().filter_map(begin).collect()
}

impl Writer {
    /// Writes a batch in one transaction, provided that the batch before it is the last one written.
    async fn write(&mut self, batch: &PlannedBatch) -> Result<(), StoreError> {
        let &PlannedBatch { last, logged_at, ends_message, applied_at, ref revisions, ref plan, .. } = batch;
        let announced = *self.announced.borrow();
        let batch = Batch { from: &self.checkpoint, last, logged_at, ends_message, revisions, announced, plan };
        self.liveness.step("applier", batch::write(&mut self.connection, &batch, applied_at)).await?;
        (self.checkpoint.applied, self.checkpoint.ends_message) = (last, ends_message);
        Ok(())
    }
}

impl Applier {
    /// Returns after shutdown.
    ///
    /// # Errors
    /// The error ends the term.
    pub(crate) async fn run(
        mut self,
        mut batches: mpsc::Receiver<PrefetchedBatch>,
        shutdown: CancellationToken,
    ) -> Result<(), ApplyError> {
        let mut next = None;
        loop {
            let InFlightBatch { messages: read, read_at, prepared } = match next.take() {
                Some(batch) => batch,
                None => {
                    let batch = tokio::select! {
                        batch = batches.recv() => batch,
                        () = shutdown.cancelled() => None,
                    };
                    let Some(batch) = batch else { return Ok(()) };
                    self.preparer.prepare_prefetched(batch).await
                }
            };
            let applied = match prepared {
                Ok(prepared) => self.apply(prepared, &mut batches, &mut next, &shutdown).await,
                Err(e) => Err(e),
            };
            let Err(error) = applied else { continue };
            let failed_entries = entries(&read);
            let mut parts = Vec::new();
            let failed = Part { entries: &failed_entries, read_at, failures: 0, refusal: None };
            self.reschedule(failed, &error, &mut parts).await.map_err(|()| error)?;
            self.apply_parts(parts).await?;
            if let Some(InFlightBatch { messages: read, read_at, .. }) = next.take() {
                // The next batch was planned on a plan that was discarded, so it is planned again.
                let part = Part { entries: &entries(&read), read_at, failures: 0, refusal: None };
                self.apply_parts(vec![part]).await?;
            }
        }
    }

    /// Writes a batch, and meanwhile prepares the next one, if there is one and it can be planned ahead.
    async fn apply(
        &mut self,
        batch: PreparedBatch,
        batches: &mut mpsc::Receiver<PrefetchedBatch>,
        next: &mut Option<InFlightBatch>,
        shutdown: &CancellationToken,
    ) -> Result<(), ApplyError> {
        let planned = &batch.planned;
        let started = Instant::now();
        let ahead = planned.plan.is_plain() && self.preparer.planner.can_plan_ahead() && !shutdown.is_cancelled();
        let written = {
            let mut write = pin!(self.writer.write(planned));
            loop {
                tokio::select! {
                    // Sends the statement to Postgres before the next batch is planned.
                    biased;
                    written = &mut write => break written,
                    Some(batch) = batches.recv(), if ahead && next.is_none() => {
                        *next = Some(self.preparer.prepare_prefetched(batch).await);
                    }
                }
            }
        };
        self.metrics.observe_batch(planned.count, planned.took + started.elapsed());
        self.conclude(batch, written).await
    }

    /// Applies the parts of failed batches, the last one first.
    async fn apply_parts(&mut self, mut parts: Vec<Part<'_>>) -> Result<(), ApplyError> {
        while let Some(part) = parts.pop() {
            if let Err(error) = self.attempt(&part).await {
                self.reschedule(part, &error, &mut parts).await.map_err(|()| error)?;
            }
        }
        Ok(())
    }

    async fn attempt(&mut self, part: &Part<'_>) -> Result<(), ApplyError> {
        let epoch = self.writer.checkpoint.applied.epoch;
        let Some(mut parsed) = parse_entries(part.entries.iter().copied(), epoch) else { return Ok(()) };
        if let Some(refusal) = &part.refusal {
            parsed.entries.clear();
            parsed.dead_letters = vec![DeadLetter::unapplicable(parsed.last, refusal.clone())];
        }
        let batch = self.preparer.prepare(part.entries, parsed, None, part.read_at).await?;
        let started = Instant::now();
        let written = self.writer.write(&batch.planned).await;
        self.metrics.observe_batch(batch.planned.count, batch.planned.took + started.elapsed());
        self.conclude(batch, written).await
    }

    /// Puts a part that failed back on the list, as one or as two. Fails if the term must end.
    async fn reschedule<'a>(
        &mut self,
        mut part: Part<'a>,
        error: &ApplyError,
        parts: &mut Vec<Part<'a>>,
    ) -> Result<(), ()> {
        let planner = &mut self.preparer.planner;
        planner.discard_plans();
        let attempt = Attempt {
            entries: part.entries.len(),
            checked_duplicates: planner.check_duplicates,
            dead_lettered: part.refusal.is_some(),
        };
        match next_step(error, attempt) {
            NextStep::Retry => {}
            NextStep::RetryLater => {
                tracing::warn!("cannot apply a batch, retrying: {}", error_chain(error));
                tokio::time::sleep(retry_backoff().nth(part.failures).unwrap_or_default()).await;
                part.failures += 1;
            }
            NextStep::CheckDuplicates => planner.check_duplicates = true,
            NextStep::Split => {
                let (first, second) = part.entries.split_at(part.entries.len() / 2);
                let of = |entries| Part { entries, read_at: part.read_at, failures: 0, refusal: None };
                parts.extend([of(second), of(first)]);
                return Ok(());
            }
            NextStep::DeadLetter => {
                tracing::error!("the database refuses a command: {}", error_chain(error));
                part.refusal = Some(error.to_string());
            }
            NextStep::Stop => return Err(()),
        }
        parts.push(part);
        Ok(())
    }

    /// Ends the spans of a batch, and hands it to the announcer if it was written.
    async fn conclude(&mut self, batch: PreparedBatch, written: Result<(), StoreError>) -> Result<(), ApplyError> {
        let PreparedBatch { planned, mut spans } = batch;
        if let Err(e) = &written {
            spans.iter_mut().for_each(|span| span.fail("not_committed", e));
        }
        drop(spans);
        let planner = &mut self.preparer.planner;
        if let Err(StoreError::Fenced) = written
            && planner.reload_rules(&planned).await?
        {
            return Err(ApplyError::RulesChanged);
        }
        written?;
        planner.record_written(&planned);
        let work = work::of(&planned.plan, |process| planner.rules.callbacks(process));
        report(&self.client, &work).await;
        let PlannedBatch { plan, last, count, dead_letters, .. } = planned;
        self.metrics.count_updates(&plan.rows);
        for dead in &dead_letters {
            self.metrics.count_dead_letter(dead.reason);
        }
        tracing::debug!(
            entries = count,
            updates = plan.rows.len(),
            leads = plan.leads.len(),
            dead_letters = dead_letters.len(),
            last_sequence = last.sequence,
            "applied a batch"
        );
        let announcements = plan.rows.into_iter().map(Announcement::from).collect();
        self.announcer.send(announcements, last).await;
        Ok(())
    }
}

/// Reports the work of a batch to the gateways.
async fn report(client: &Client, work: &WorkReport) {
    let report = serde_json::to_vec(work).unwrap_or_default();
    if let Err(e) = client.publish(subject::WORK, report.into()).await {
        tracing::debug!("cannot report the work of a batch: {e}");
    }
}

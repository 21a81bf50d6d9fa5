//! 7 Deliver, 8 Retry: callbacks with `ordering: "lead"` receive a lead's deliveries one after the other.
//!
//! Ordered deliveries are inserted with `next_attempt_at = NULL`. A delivery becomes due once it is the lead's oldest
//! pending one and every earlier event is recorded; from then on it is retried like any other. Leads are checked after
//! each insert and after each completed delivery; a sweep over all leads of callbacks that may be called covers
//! notifiers that crashed in between. The sweep visits a limited number of leads per turn: a callback that has not
//! responded for days has pending deliveries of very many leads.

use std::{collections::HashSet, sync::Arc, time::Duration};

use anyhow::Context;
use async_nats::jetstream;
use contract::streams::{self, LEAD_EVENTS, NOTIFIER_CONSUMER, ORDER_CONSUMER};
use service_kit::{clock, postgres::Pool};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    admission::limiter::ConcurrencyLimiter,
    callbacks::Callbacks,
    core::ordering::{LeadKey, LeadQueue, PendingLeads, RecordedWatermark},
    store,
};

/// How often all leads are checked. Longer delays what a crashed notifier had to make due, shorter costs Postgres more.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// Most leads in one statement.
const MAX_BATCH: usize = 500;
/// How soon a lead with an earlier unrecorded event is checked again: at first, and at most.
const FIRST_DELAY: Duration = Duration::from_millis(5);
const MAX_DELAY: Duration = Duration::from_millis(320);

/// The task that makes ordered deliveries due.
#[derive(Debug)]
pub(crate) struct LeadOrdering {
    pub(crate) queue: Arc<LeadQueue>,
    pub(crate) js: jetstream::Context,
    pub(crate) pool: Pool,
    pub(crate) callbacks: Arc<Callbacks>,
    pub(crate) limiter: Arc<ConcurrencyLimiter>,
}

/// What a check left to be checked again, and whether it made any delivery due.
#[derive(Default)]
struct Checked {
    early: PendingLeads,
    any_due: bool,
}

impl LeadOrdering {
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut next_sweep = Instant::now();
        let mut delay = FIRST_DELAY;
        loop {
            let PendingLeads { leads, all } = self.queue.take();
            let sweep = all || Instant::now() >= next_sweep;
            if sweep {
                next_sweep = Instant::now() + SWEEP_INTERVAL;
            }
            let Checked { early, any_due } = match self.check(&leads, sweep).await {
                Ok(checked) => checked,
                Err(e) => {
                    tracing::warn!("cannot order deliveries, trying again: {e:#}");
                    delay = MAX_DELAY;
                    Checked { early: PendingLeads { leads, all: sweep }, any_due: false }
                }
            };
            let next_check = if early.is_empty() {
                delay = FIRST_DELAY;
                next_sweep
            } else {
                delay = if any_due { FIRST_DELAY } else { (delay * 2).min(MAX_DELAY) };
                self.queue.put_back(early);
                next_sweep.min(Instant::now() + delay)
            };
            // Leads that are added during a backoff are checked together with the early ones.
            let added = async {
                if delay == FIRST_DELAY {
                    self.queue.added().await;
                } else {
                    std::future::pending().await
                }
            };
            tokio::select! {
                () = tokio::time::sleep_until(next_check) => {}
                () = added => {}
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    /// Checks these leads, and with `sweep` all others.
    async fn check(&self, leads: &HashSet<LeadKey>, sweep: bool) -> anyhow::Result<Checked> {
        let mut checked = Checked::default();
        let mut watermark = None;
        let leads = leads.iter().copied().collect::<Vec<_>>();
        self.make_due(&leads, &mut watermark, &mut checked).await?;
        let mut after = None;
        let mut swept = !sweep;
        let held = if sweep { self.callbacks.held() } else { Vec::new() };
        while !swept {
            let waiting = store::ordering::waiting_leads(&self.pool, after, &held, MAX_BATCH as i64).await?;
            self.make_due(&waiting, &mut watermark, &mut checked).await?;
            swept = waiting.len() < MAX_BATCH;
            after = waiting.last().copied();
        }
        if checked.any_due {
            self.limiter.wake_retries();
        }
        Ok(checked)
    }

    /// Reads the watermark once, before the first deliveries are read: what is recorded later has a higher sequence.
    async fn make_due(
        &self,
        leads: &[LeadKey],
        watermark: &mut Option<RecordedWatermark>,
        checked: &mut Checked,
    ) -> anyhow::Result<()> {
        for leads in leads.chunks(MAX_BATCH) {
            let watermark = match watermark {
                Some(watermark) => &*watermark,
                None => watermark.insert(self.recorded_watermark().await?),
            };
            for head in store::ordering::make_heads_due(&self.pool, leads, watermark, clock::now()).await? {
                if head.is_due {
                    checked.any_due = true;
                } else {
                    checked.early.insert(head.lead);
                }
            }
        }
        Ok(())
    }

    async fn recorded_watermark(&self) -> anyhow::Result<RecordedWatermark> {
        let stream = self.js.get_stream(LEAD_EVENTS).await.context("cannot find the stream LEAD_EVENTS")?;
        // Both consumers acknowledge an event once it is recorded. The consumer that only records is usually ahead, and
        // exists only while a callback is ordered.
        let delivered = stream.consumer_info(NOTIFIER_CONSUMER).await.context("cannot read the consumer's state")?;
        let recorded = stream.consumer_info(ORDER_CONSUMER).await;
        let recorded = recorded.map_or(0, |consumer| consumer.ack_floor.stream_sequence);
        let sequence = recorded.max(delivered.ack_floor.stream_sequence) + 1;
        Ok(RecordedWatermark { stream: streams::identity(stream.cached_info()), sequence })
    }
}

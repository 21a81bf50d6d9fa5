//! 7 Deliver, 8 Retry: callbacks with `ordering: "lead"` receive a lead's deliveries one after the other.
//!
//! Ordered deliveries are inserted with `next_attempt_at = NULL`. A delivery becomes due once it is the lead's oldest
//! pending one and every earlier event is recorded; from then on it is retried like any other. Leads are checked after
//! each insert and after each completed delivery; a sweep over all leads of callbacks that may be called covers
//! notifiers that crashed in between. The sweep visits a limited number of leads per turn: a callback that has not
//! responded for days has pending deliveries of very many leads.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use async_nats::jetstream;
use contract::streams::{self, LEAD_EVENTS, NOTIFIER_CONSUMER, ORDER_CONSUMER};
use service_kit::{clock, postgres::Pool};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    admission::limiter::ConcurrencyLimiter,
    callbacks::Callbacks,
    core::ordering::{EarlyLeads, LeadKey, LeadQueue, PendingLeads, RecordedWatermark, Sweep},
    store,
};

/// Maximum number of leads in one statement.
const MAX_BATCH: usize = 500;
/// How soon a turn that failed is repeated.
const RETRY_DELAY: Duration = Duration::from_millis(320);

/// The task that makes ordered deliveries due.
#[derive(Debug)]
pub(crate) struct LeadOrdering {
    pub(crate) queue: Arc<LeadQueue>,
    pub(crate) js: jetstream::Context,
    pub(crate) pool: Pool,
    pub(crate) callbacks: Arc<Callbacks>,
    pub(crate) limiter: Arc<ConcurrencyLimiter>,
}

impl LeadOrdering {
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let order = async {
            let (mut sweep, mut early) = (Sweep::new(Instant::now()), EarlyLeads::default());
            loop {
                if let Err(e) = self.turn(&mut sweep, &mut early).await {
                    tracing::warn!("cannot order deliveries, trying again: {e:#}");
                    tokio::time::sleep(RETRY_DELAY).await;
                    continue;
                }
                let next_step = sweep.next_step(Instant::now());
                let next_turn = early.next_check().map_or(next_step, |next_check| next_check.min(next_step));
                tokio::select! {
                    () = tokio::time::sleep_until(next_turn) => {}
                    () = self.queue.added() => {}
                }
            }
        };
        shutdown.run_until_cancelled(order).await;
        Ok(())
    }

    /// Checks the added leads and the early leads that are due, then takes a step of the sweep.
    async fn turn(&self, sweep: &mut Sweep, early: &mut EarlyLeads) -> anyhow::Result<()> {
        let now = Instant::now();
        let PendingLeads { mut leads, all } = self.queue.take();
        if all {
            sweep.request(now);
        }
        leads.extend(early.due(now));
        let leads = leads.into_iter().collect::<Vec<_>>();
        let mut watermark = None;
        if let Err(e) = self.make_due(&leads, &mut watermark, early).await {
            self.queue.put_back(leads);
            return Err(e);
        }
        if sweep.start_if_due(now) {
            self.sweep_step(sweep, &mut watermark, early).await?;
        }
        Ok(())
    }

    async fn sweep_step(
        &self,
        sweep: &mut Sweep,
        watermark: &mut Option<RecordedWatermark>,
        early: &mut EarlyLeads,
    ) -> anyhow::Result<()> {
        let held = self.callbacks.held();
        let visited = store::ordering::visit_leads(&self.pool, sweep.after(), &held, MAX_BATCH as i64).await?;
        let waiting = visited.iter().filter(|visited| visited.is_waiting).map(|visited| visited.lead);
        self.make_due(&waiting.collect::<Vec<_>>(), watermark, early).await?;
        let last = visited.last().filter(|_| visited.len() == MAX_BATCH);
        sweep.note_step(last.map(|visited| visited.lead));
        Ok(())
    }

    /// Makes the next deliveries of these leads due. Reads the watermark once, before the first deliveries: events that
    /// are recorded later have a higher sequence.
    async fn make_due(
        &self,
        leads: &[LeadKey],
        watermark: &mut Option<RecordedWatermark>,
        early: &mut EarlyLeads,
    ) -> anyhow::Result<()> {
        for leads in leads.chunks(MAX_BATCH) {
            let watermark = match watermark {
                Some(watermark) => &*watermark,
                None => watermark.insert(self.recorded_watermark().await?),
            };
            let heads = store::ordering::make_heads_due(&self.pool, leads, watermark, clock::now()).await?;
            if heads.iter().any(|head| head.is_due) {
                self.limiter.wake_retries();
            }
            early.note_check(leads, &heads, Instant::now());
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

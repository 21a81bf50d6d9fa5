//! Makes the deliveries of past events that a callback does not have, spread over time.

use std::collections::HashSet;

use contract::{
    ObjectId, Timestamp,
    position::EventPosition,
    process::EventValues,
    rpc::{BackfillCallback, DeliveryId, ErrorCode, GetEvents, LedgerEvent, Query, RecoveredDeliveries, RpcError},
};
use service_kit::{
    clock,
    rpc::{internal, request},
};

use super::{
    deliveries::DeliveryApi,
    recovery::{RecoveryCall, RecoveryCursor},
};
use crate::{
    callbacks::Target,
    core::delivery::{DeliveryRecord, DeliverySource, DeliveryState, LeadOrder, PendingDelivery},
    dispatch::event::pending_deliveries,
    retry::LEASE,
    store::{self, error::StoreError},
};

/// The list that backfill cursors belong to.
const BACKFILL: &str = "backfill";

impl DeliveryApi {
    /// Records the deliveries of past events that the callback does not have. Each becomes due like every retry.
    pub(super) async fn backfill(self, query: BackfillCallback) -> Result<RecoveredDeliveries, RpcError> {
        let BackfillCallback { project_id, process_id, callback_id, .. } = query;
        let target = self.callbacks.read(project_id, process_id, callback_id).await;
        let target = target.map_err(|e| internal(BackfillCallback::SUBJECT, &e))?;
        let target = target.ok_or_else(|| RpcError::new(ErrorCode::CallbackNotFound, "Callback not found"))?;
        let mut call = RecoveryCall::begin(BACKFILL, query.per_second, query.cursor.as_ref())?;
        loop {
            let (ids, next) = self.updates_since(project_id, query.since, call.cursor.next.clone()).await?;
            let (deliveries, until) = self.backfill_page(&query, &target, &ids, &mut call.cursor).await?;
            if let Some(made) = call.end_page(deliveries, until, next) {
                if made.deliveries > 0 && !query.dry_run {
                    tracing::info!(%project_id, %callback_id, deliveries = made.deliveries, "backfill requested");
                }
                return Ok(made);
            }
        }
    }

    /// Records the missing deliveries of these updates. Returns how many there are, and when the last one is due.
    async fn backfill_page(
        &self,
        query: &BackfillCallback,
        target: &Target,
        ids: &[ObjectId],
        cursor: &mut RecoveryCursor,
    ) -> Result<(u64, Option<Timestamp>), RpcError> {
        let project_id = query.project_id;
        let recorded = self.of_updates(project_id, ids).await?;
        let recorded = recorded.into_iter().map(|delivery| delivery.id).collect::<HashSet<_>>();
        let (mut made, mut until) = (0, None);
        let mut rest = ids;
        while !rest.is_empty() {
            let events = request(&self.client, &GetEvents { project_id, update_ids: rest.to_vec() }).await?;
            // A reply has as many events as fit, in the order of the request. An event that is missing in between is
            // erased.
            let last = events.last().and_then(|last| rest.iter().position(|id| *id == last.event.update_id));
            rest = last.map_or(&[], |last| &rest[last + 1..]);
            let mut records = Vec::new();
            for event in &events {
                let deliveries = deliveries(target, event).map_err(|e| internal(BackfillCallback::SUBJECT, &e))?;
                for delivery in deliveries {
                    let PendingDelivery { update_id, callback_id, kind, .. } = delivery;
                    if !recorded.contains(&DeliveryId { update_id, callback_id, kind }) {
                        // The event may have arrived just now, with its first attempt still in flight.
                        let settled_at = event.event.timestamp.plus(LEASE);
                        let due = cursor.next_due(query.per_second).max(settled_at);
                        until = until.max(Some(due));
                        records.push(record(delivery, due));
                    }
                }
            }
            made += records.len() as u64;
            if !query.dry_run {
                self.write(&records).await?;
            }
        }
        Ok((made, until.filter(|_| !query.dry_run)))
    }

    async fn write(&self, records: &[DeliveryRecord]) -> Result<(), StoreError> {
        let mut transaction = self.pool.begin().await?;
        store::record::write(&mut transaction, records).await?;
        transaction.commit().await?;
        let leads = records.iter().filter_map(|record| record.delivery.ordered_lead());
        leads.for_each(|lead| self.lead_queue.push(lead));
        Ok(())
    }
}

/// The deliveries of an event to the callback. Ordered ones precede the deliveries of all events announced later.
fn deliveries(
    target: &Target,
    LedgerEvent { position, event }: &LedgerEvent,
) -> serde_json::Result<Vec<PendingDelivery>> {
    if event.process_id != target.process_id() {
        return Ok(Vec::new());
    }
    let position = EventPosition { generation: 0, log: *position };
    // Without a stream: the delivery waits for no earlier event to be recorded.
    let order = event.lead_id.map(|lead_id| LeadOrder::new(lead_id, position, "".into(), 0));
    let subscribed = target.deliveries(&EventValues::of(event)).map(|kind| (target.clone(), kind)).collect();
    let deliveries = pending_deliveries(subscribed, event, order.as_ref(), None)?;
    Ok(deliveries.into_iter().map(|(_, delivery)| delivery).collect())
}

fn record(delivery: PendingDelivery, due: Timestamp) -> DeliveryRecord {
    let state = if delivery.order.is_some() { DeliveryState::Queued } else { DeliveryState::RetryAt(due) };
    DeliveryRecord::new(delivery, DeliverySource::Event, state, clock::now())
}

//! Queries about deliveries, and redelivering one.

use std::{sync::Arc, time::Duration};

use async_nats::service::Service;
use contract::{
    ObjectId, Timestamp,
    event::ERASED,
    event_kind::DeliveryKind,
    rpc::{
        CallbackFailures, CountDeliveries, Cursor, Delivery, DeliveryCounts, DeliveryId, DeliveryStatus, ErrorCode,
        GetDelivery, GetEvents, GetOutcomes, GroupFailures, InvalidRange, ListDeliveries, ListUpdateDeliveries,
        ListUpdates, ListedDelivery, MAX_LIMIT, Outcome, Page, Query, Redeliver, RpcError, UpdateDeliveries, clamp,
    },
};
use service_kit::{
    clock,
    lifecycle::Tasks,
    postgres::Pool,
    rpc::{internal, request, serve},
};
use tokio_util::sync::CancellationToken;

use crate::{
    callbacks::{CallbackLookup, Callbacks},
    core::ordering::LeadQueue,
    store::{
        self,
        deliveries::{Redelivery, Requeued},
    },
};

/// The lists that cursors belong to.
const BY_STATUS: &str = "deliveries-by-status";
const BY_UPDATE: &str = "deliveries-by-update";
/// Rows per statement. A larger chunk finds rare deliveries sooner, but takes more memory.
pub(super) const CHUNK: i64 = 500;
/// Chunks that are searched for a page.
const MAX_CHUNKS: usize = 10;
/// How long after its decision an update may have deliveries that are not recorded. Later, a callback without a
/// delivery was added after the update, or the delivery was removed. Only a longer backlog is misjudged.
const RECORDED_WITHIN: Duration = Duration::from_hours(24);

/// Answers queries about deliveries and makes completed ones due again.
///
/// A redelivery is a row that becomes due like every retry, so windows, rate limits and breakers apply. Its body is the
/// stored one or, for a delivered one, comes from the ledger. Only the ledger can list the updates of a project or
/// lead.
#[derive(Debug, Clone)]
pub(crate) struct DeliveryApi {
    pub(crate) client: async_nats::Client,
    pub(crate) pool: Pool,
    pub(crate) callbacks: Arc<Callbacks>,
    pub(crate) lead_queue: Arc<LeadQueue>,
}

fn not_found() -> RpcError {
    RpcError::new(ErrorCode::DeliveryNotFound, "Delivery not found")
}

impl DeliveryApi {
    /// Answers until shutdown.
    pub(crate) async fn serve(
        self,
        tasks: &mut Tasks,
        service: &Service,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<()> {
        macro_rules! serve {
            ($method:path) => {{
                let api = self.clone();
                serve(tasks, service, shutdown.clone(), move |query| $method(api.clone(), query)).await?;
            }};
        }
        serve!(Self::list_of_update);
        serve!(Self::list);
        serve!(Self::get);
        serve!(Self::redeliver);
        serve!(Self::recover);
        serve!(Self::backfill);
        serve!(Self::count);
        serve!(Self::group_failures);
        Ok(())
    }

    async fn list_of_update(self, query: ListUpdateDeliveries) -> Result<UpdateDeliveries, RpcError> {
        let ListUpdateDeliveries { project_id, update_id } = query;
        // Read before the deliveries, because a parked event is deleted after its deliveries are recorded.
        let parked = store::parked::of_update(&self.pool, project_id, update_id).await?;
        let deliveries = store::deliveries::with_attempts(&self.pool, project_id, update_id).await?;
        let subscribed = self.subscribed(project_id, update_id).await;
        let unrecorded = subscribed.map(|subscribed| count_unrecorded(&subscribed, &deliveries));
        Ok(UpdateDeliveries { deliveries, parked, unrecorded })
    }

    /// The callbacks and kinds of a new update's deliveries. None if the update is pending, or if its event or process
    /// cannot be read.
    async fn subscribed(&self, project_id: ObjectId, update_id: ObjectId) -> Option<Vec<(ObjectId, DeliveryKind)>> {
        let events = request(&self.client, &GetEvents { project_id, update_ids: vec![update_id] }).await.ok()?;
        let event = &events.first()?.event;
        if event.timestamp.plus(RECORDED_WITHIN) < clock::now() {
            return Some(Vec::new());
        }
        let targets = match self.callbacks.for_event(event).await.ok()? {
            Some(targets) => targets,
            None if event.process_id.is_none() => Vec::new(),
            None => self.callbacks.fallback(event).await.ok()?,
        };
        Some(targets.into_iter().map(|(target, kind)| (target.callback_id, kind)).collect())
    }

    async fn count(self, query: CountDeliveries) -> Result<Vec<DeliveryCounts>, RpcError> {
        query.range.check()?;
        let counts = store::statistics::count_deliveries(&self.pool, &query).await?;
        Ok(counts.ok_or(InvalidRange::TooMany)?)
    }

    async fn group_failures(self, query: GroupFailures) -> Result<CallbackFailures, RpcError> {
        Ok(store::failures::group(&self.pool, &query).await?)
    }

    async fn get(self, query: GetDelivery) -> Result<Delivery, RpcError> {
        let GetDelivery { project_id, id } = query;
        let deliveries = store::deliveries::with_attempts(&self.pool, project_id, id.update_id).await?;
        let is_same = |delivery: &Delivery| delivery.callback_id == id.callback_id && delivery.kind == id.kind;
        deliveries.into_iter().find(is_same).ok_or_else(not_found)
    }

    async fn list(self, query: ListDeliveries) -> Result<Page<ListedDelivery>, RpcError> {
        match query {
            ListDeliveries { update_id: Some(update_id), .. } => self.list_by_id(&query, update_id).await,
            ListDeliveries {
                lead_id: None,
                status: Some(status @ (DeliveryStatus::Pending | DeliveryStatus::Exhausted)),
                ..
            } => self.list_by_status(&query, status).await,
            // There is no index of delivered deliveries: it would slow down every delivery. The ledger has an index of
            // its updates.
            _ => self.list_by_update(&query).await,
        }
    }

    async fn list_by_id(&self, query: &ListDeliveries, update_id: ObjectId) -> Result<Page<ListedDelivery>, RpcError> {
        let mut items = self.matching_of_updates(query, &[update_id]).await?;
        if let (Some(lead_id), Some(delivery)) = (query.lead_id, items.first())
            && !self.is_of_lead(query.project_id, delivery.id, lead_id).await?
        {
            items.clear();
        }
        let made = update_id.timestamp().unix_seconds();
        let since = query.since.map_or(0, Timestamp::unix_seconds);
        let until = query.until.map_or(u32::MAX, Timestamp::unix_seconds_rounded_up);
        items.retain(|_| since <= made && made < until);
        Ok(Page { items, next: None })
    }

    async fn is_of_lead(&self, project_id: ObjectId, id: DeliveryId, lead_id: ObjectId) -> Result<bool, RpcError> {
        let outcomes = self.outcomes(project_id, &[id]).await?;
        Ok(outcomes.first().and_then(|outcome| outcome.lead_id) == Some(lead_id))
    }

    /// Reads the index of deliveries that are not delivered.
    async fn list_by_status(
        &self,
        query: &ListDeliveries,
        status: DeliveryStatus,
    ) -> Result<Page<ListedDelivery>, RpcError> {
        let limit = clamp(query.limit);
        let cursor = |id: DeliveryId| Cursor::new(BY_STATUS, &id.to_string());
        let mut before = match &query.cursor {
            Some(cursor) => Some(cursor.place(BY_STATUS)?.parse().map_err(|_| Cursor::invalid())?),
            None => None,
        };
        let mut items = Vec::new();
        for _ in 0..MAX_CHUNKS {
            let mut rows = store::deliveries::undelivered(&self.pool, query, status, before, CHUNK).await?;
            let is_last = (rows.len() as i64) < CHUNK;
            before = rows.last().map(|row| row.id).or(before);
            self.add_status_codes(query, &mut rows).await?;
            items.extend(rows);
            if is_last || items.len() > limit as usize {
                let rest = if is_last { None } else { before.map(cursor) };
                return Ok(Page::cut(items, limit, |row| cursor(row.id), rest));
            }
        }
        Ok(Page::cut(items, limit, |row| cursor(row.id), before.map(cursor)))
    }

    /// Update by update, in the order of the ledger. The deliveries of an update stay together, even where they exceed
    /// `limit`.
    async fn list_by_update(&self, query: &ListDeliveries) -> Result<Page<ListedDelivery>, RpcError> {
        let limit = clamp(query.limit) as usize;
        let mut cursor = match &query.cursor {
            Some(cursor) => Some(Cursor::from_text(cursor.place(BY_UPDATE)?)),
            None => None,
        };
        let after = |cursor: &Cursor| Cursor::new(BY_UPDATE, cursor.as_str());
        let mut items: Vec<ListedDelivery> = Vec::new();
        for _ in 0..MAX_CHUNKS {
            let list = ListUpdates {
                project_id: query.project_id,
                lead_id: query.lead_id,
                since: query.since,
                until: query.until,
                oldest_first: false,
                cursor,
                limit: MAX_LIMIT,
            };
            let updates = request(&self.client, &list).await?;
            let ids = updates.items.iter().map(|update| update.update_id).collect::<Vec<_>>();
            let mut found = self.matching_of_updates(query, &ids).await?.into_iter().peekable();
            let mut last = None;
            for update in &updates.items {
                let mut of_update = Vec::new();
                while let Some(delivery) = found.next_if(|delivery| delivery.id.update_id == update.update_id) {
                    of_update.push(delivery);
                }
                if !items.is_empty() && items.len() + of_update.len() > limit {
                    // Continues after the last complete update, or where this page started if there is none.
                    let next = last.or(list.cursor.as_ref()).map(after);
                    return Ok(Page { items, next });
                }
                items.extend(of_update);
                last = Some(&update.cursor);
            }
            cursor = updates.next;
            if cursor.is_none() {
                break;
            }
        }
        Ok(Page { items, next: cursor.as_ref().map(after) })
    }

    async fn redeliver(self, query: Redeliver) -> Result<ListedDelivery, RpcError> {
        let Redeliver { project_id, id } = query;
        let deliveries = self.of_updates(project_id, &[id.update_id]).await?;
        let delivery = deliveries.into_iter().find(|delivery| delivery.id == id).ok_or_else(not_found)?;
        let callback = self.callbacks.look_up(project_id, delivery.process_id, id.callback_id).await;
        match callback.map_err(|e| internal(Redeliver::SUBJECT, &e))? {
            CallbackLookup::Enabled(_) | CallbackLookup::Locked => {}
            CallbackLookup::Held(hold) => {
                let message = format!("The delivery cannot be sent: {hold}");
                return Err(RpcError::new(ErrorCode::CallbackDisabled, message));
            }
            CallbackLookup::Removed => {
                return Err(RpcError::new(ErrorCode::CallbackGone, "The callback was removed"));
            }
            CallbackLookup::NoProcess => {
                return Err(RpcError::new(
                    ErrorCode::CallbackGone,
                    "The callback's process is not in the configuration",
                ));
            }
        }
        let pending = || RpcError::new(ErrorCode::DeliveryPending, "The delivery is pending already");
        let outcomes = match delivery.status {
            DeliveryStatus::Pending => return Err(pending()),
            DeliveryStatus::Delivered => self.outcomes(project_id, &[id]).await?,
            DeliveryStatus::Exhausted => Vec::new(),
        };
        let is_erased = delivery.status == DeliveryStatus::Exhausted && delivery.error.as_deref() == Some(ERASED);
        if is_erased || delivery.status == DeliveryStatus::Delivered && outcomes.is_empty() {
            return Err(RpcError::new(ErrorCode::OutcomeGone, "The ledger no longer has the outcome of the update"));
        }
        let payload = outcomes.first().map(|outcome| outcome.payload.get());
        let now = clock::now();
        let requeued = self.requeue(project_id, &[Redelivery { id, due: now, payload }], now).await?;
        let requeued = requeued.into_iter().next().ok_or_else(pending)?;
        tracing::info!(delivery = %id, "redelivery requested");
        Ok(requeued)
    }

    /// Makes completed deliveries pending again. Returns those that were not pending already.
    pub(super) async fn requeue(
        &self,
        project_id: ObjectId,
        redeliveries: &[Redelivery<'_>],
        now: Timestamp,
    ) -> Result<Vec<ListedDelivery>, RpcError> {
        let Requeued { deliveries, leads } =
            store::deliveries::requeue(&self.pool, project_id, redeliveries, now).await?;
        leads.into_iter().for_each(|lead| self.lead_queue.push(lead));
        Ok(deliveries)
    }

    pub(super) async fn of_updates(
        &self,
        project_id: ObjectId,
        update_ids: &[ObjectId],
    ) -> Result<Vec<ListedDelivery>, RpcError> {
        Ok(store::deliveries::of_updates(&self.pool, project_id, update_ids).await?)
    }

    async fn matching_of_updates(
        &self,
        query: &ListDeliveries,
        update_ids: &[ObjectId],
    ) -> Result<Vec<ListedDelivery>, RpcError> {
        let mut deliveries = self.of_updates(query.project_id, update_ids).await?;
        self.add_status_codes(query, &mut deliveries).await?;
        Ok(deliveries)
    }

    /// Adds the status codes of the deliveries that match a query, and removes the others first: reading a code takes
    /// as long as reading its delivery.
    async fn add_status_codes(
        &self,
        query: &ListDeliveries,
        deliveries: &mut Vec<ListedDelivery>,
    ) -> Result<(), RpcError> {
        let but_code = ListDeliveries { status_code: None, ..query.clone() };
        deliveries.retain(|delivery| matches(&but_code, delivery));
        store::deliveries::add_status_codes(&self.pool, deliveries).await?;
        deliveries.retain(|delivery| matches(query, delivery));
        Ok(())
    }

    pub(super) async fn outcomes(
        &self,
        project_id: ObjectId,
        deliveries: &[DeliveryId],
    ) -> Result<Vec<Outcome>, RpcError> {
        let update_ids = deliveries.iter().map(|id| id.update_id).collect();
        let mut kinds = deliveries.iter().map(|id| id.kind).collect::<Vec<_>>();
        // An older lead-state has only the outcomes of updates, and rejects unknown fields.
        if kinds.iter().all(DeliveryKind::is_update) {
            kinds.clear();
        }
        Ok(request(&self.client, &GetOutcomes { project_id, update_ids, kinds }).await?)
    }
}

fn count_unrecorded(subscribed: &[(ObjectId, DeliveryKind)], recorded: &[Delivery]) -> u64 {
    let is_recorded = |callback_id, kind| {
        recorded.iter().any(|delivery| delivery.callback_id == callback_id && delivery.kind == kind)
    };
    subscribed.iter().filter(|(callback_id, kind)| !is_recorded(*callback_id, *kind)).count() as u64
}

fn matches(query: &ListDeliveries, delivery: &ListedDelivery) -> bool {
    query.status.is_none_or(|status| status == delivery.status)
        && query.callback_id.is_none_or(|callback_id| callback_id == delivery.id.callback_id)
        && query.process_id.is_none_or(|process_id| Some(process_id) == delivery.process_id)
        && query.status_code.is_none_or(|code| Some(code) == delivery.status_code)
        && query.error.as_ref().is_none_or(|text| delivery.error.as_ref().is_some_and(|error| error.contains(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deliveries_without_a_row_are_counted_by_callback_and_kind() {
        let id = |n| ObjectId::from_bytes([n; 12]);
        let delivery = Delivery {
            update_id: id(9),
            callback_id: id(1),
            kind: DeliveryKind::Update,
            status: DeliveryStatus::Delivered,
            next_attempt_at: None,
            attempts: vec![],
        };
        let subscribed =
            [(id(1), DeliveryKind::Update), (id(1), DeliveryKind::StateChanged), (id(2), DeliveryKind::Update)];

        assert_eq!(count_unrecorded(&subscribed, &[]), 3);
        assert_eq!(count_unrecorded(&subscribed, std::slice::from_ref(&delivery)), 2);
        assert_eq!(count_unrecorded(&subscribed[..1], &[delivery]), 0);
    }
}

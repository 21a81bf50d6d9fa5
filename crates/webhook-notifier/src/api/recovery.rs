//! 8 Retry: what was delivered and what was not, told to who asks; and settled deliveries made again.
//!
//! A delivery that is made again is a row that is due, like every retry: slots, rates and breakers hold for it. Its body is
//! the one that was kept or, where it was delivered and none was, the ledger's, of which the event was made. Which updates
//! a project or a lead has is the ledger's to know, too.

use std::{sync::Arc, time::Duration};

use async_nats::service::Service;
use contract::{
    ObjectId, Timestamp,
    rpc::{
        Cursor, DELIVERY_GET, DELIVERY_LIST, DELIVERY_RECOVER, DELIVERY_REDELIVER, Delivery, DeliveryId,
        DeliveryStatus, GetDelivery, GetOutcomes, ListDeliveries, ListUpdates, ListedDelivery, ListedUpdate, MAX_LIMIT,
        MAX_PER_SECOND, Outcome, Page, RecoverDeliveries, RecoveredDeliveries, RpcError, UPDATE_LIST, UPDATE_OUTCOMES,
        clamp,
    },
};
use service_kit::{
    clock,
    lifecycle::Tasks,
    rpc::{endpoint, internal, query},
};
use sqlx::PgPool;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    callbacks::{Callbacks, Found},
    dispatch::ordering::Turns,
    store::{self, deliveries::Again},
};

/// What cursors say which list they are of.
const BY_STATUS: &str = "deliveries-by-status";
const BY_UPDATE: &str = "deliveries-by-update";
const RECOVERY: &str = "recovery";
/// How many rows a statement looks at. More finds rare ones sooner, and holds more in memory.
const CHUNK: i64 = 500;
/// How many chunks are looked at for a page.
const CHUNKS: usize = 10;
/// How long a call may go on recovering before it says where to go on. Well below what whoever asks waits.
const RECOVERING: Duration = Duration::from_millis(1500);

/// How far ahead a delivery may be made due.
const MOST_SPREAD: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Answers, and makes pending.
#[derive(Debug, Clone)]
struct Stories {
    client: async_nats::Client,
    pool: PgPool,
    callbacks: Arc<Callbacks>,
    turns: Arc<Turns>,
}

/// Serves the queries, until shutdown.
pub(crate) async fn serve(
    tasks: &mut Tasks,
    service: &Service,
    client: &async_nats::Client,
    pool: &PgPool,
    (callbacks, turns): (&Arc<Callbacks>, &Arc<Turns>),
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let stories =
        Stories { client: client.clone(), pool: pool.clone(), callbacks: callbacks.clone(), turns: turns.clone() };
    macro_rules! serve {
        ($subject:path, $method:path) => {{
            let stories = stories.clone();
            endpoint(tasks, service, $subject, shutdown.clone(), move |query| $method(stories.clone(), query)).await?;
        }};
    }
    serve!(DELIVERY_LIST, Stories::list);
    serve!(DELIVERY_GET, Stories::get);
    serve!(DELIVERY_REDELIVER, Stories::redeliver);
    serve!(DELIVERY_RECOVER, Stories::recover);
    Ok(())
}

fn failed(e: sqlx::Error) -> RpcError {
    internal("a query of the delivery log", &e)
}

fn not_found() -> RpcError {
    RpcError::new(404, "delivery_not_found", "Delivery not found")
}

impl Stories {
    async fn list(self, query: ListDeliveries) -> Result<Page<ListedDelivery>, RpcError> {
        match query {
            ListDeliveries { update_id: Some(update_id), .. } => self.of_update(&query, update_id).await,
            ListDeliveries {
                lead_id: None,
                status: Some(status @ (DeliveryStatus::Pending | DeliveryStatus::Exhausted)),
                ..
            } => self.by_status(&query, status).await,
            // What is delivered has no index of its own: it would cost every delivery. The ledger has one of its updates.
            _ => self.by_update(&query).await,
        }
    }

    async fn of_update(&self, query: &ListDeliveries, update_id: ObjectId) -> Result<Page<ListedDelivery>, RpcError> {
        let of_lead = match query.lead_id {
            Some(lead_id) => self.is_of_lead(query.project_id, update_id, lead_id).await?,
            None => true,
        };
        let mut items = match of_lead {
            true => store::deliveries::of_updates(&self.pool, query.project_id, &[update_id]).await.map_err(failed)?,
            false => Vec::new(),
        };
        let since = query.since.map_or(0, Timestamp::unix_seconds);
        items.retain(|delivery| matches(query, delivery) && update_id.timestamp().unix_seconds() >= since);
        Ok(Page { items, next: None })
    }

    async fn is_of_lead(&self, project_id: ObjectId, update_id: ObjectId, lead_id: ObjectId) -> Result<bool, RpcError> {
        let wanted = GetOutcomes { project_id, update_ids: vec![update_id] };
        let outcomes: Vec<Outcome> = query(&self.client, UPDATE_OUTCOMES, &wanted).await?;
        let member = |outcome: &Outcome| outcome.payload.members().get("leadId").map(|raw| raw.get().to_owned());
        Ok(outcomes.first().and_then(member).is_some_and(|text| text == format!("\"{lead_id}\"")))
    }

    /// By the index of what is not delivered.
    async fn by_status(
        &self,
        query: &ListDeliveries,
        status: DeliveryStatus,
    ) -> Result<Page<ListedDelivery>, RpcError> {
        let limit = clamp(query.limit);
        let place = |id: DeliveryId| Cursor::new(BY_STATUS, &id.to_string());
        let mut before = match &query.cursor {
            Some(cursor) => Some(cursor.place(BY_STATUS)?.parse().map_err(|_| Cursor::invalid())?),
            None => None,
        };
        let mut items = Vec::new();
        for _ in 0..CHUNKS {
            let (pool, project_id) = (&self.pool, query.project_id);
            let rows = store::deliveries::unsettled(pool, project_id, status, query.since, before, CHUNK);
            let rows = rows.await.map_err(failed)?;
            let end = (rows.len() as i64) < CHUNK;
            before = rows.last().map(|row| row.id).or(before);
            items.extend(rows.into_iter().filter(|row| matches(query, row)));
            if end || items.len() > limit as usize {
                let rest = if end { None } else { before.map(place) };
                return Ok(Page::cut(items, limit, |row| place(row.id), rest));
            }
        }
        Ok(Page::cut(items, limit, |row| place(row.id), before.map(place)))
    }

    /// Update by update, as the ledger has them. An update's deliveries stay together, even where they are more than
    /// `limit`.
    async fn by_update(&self, query: &ListDeliveries) -> Result<Page<ListedDelivery>, RpcError> {
        let limit = clamp(query.limit) as usize;
        let mut cursor = match &query.cursor {
            Some(cursor) => Some(Cursor::from_text(cursor.place(BY_UPDATE)?)),
            None => None,
        };
        let place = |cursor: &Cursor| Cursor::new(BY_UPDATE, cursor.as_str());
        let mut items: Vec<ListedDelivery> = Vec::new();
        for _ in 0..CHUNKS {
            let wanted = ListUpdates {
                project_id: query.project_id,
                lead_id: query.lead_id,
                since: query.since,
                oldest_first: false,
                cursor,
                limit: MAX_LIMIT,
            };
            let updates: Page<ListedUpdate> = self::query(&self.client, UPDATE_LIST, &wanted).await?;
            let ids = updates.items.iter().map(|update| update.update_id).collect::<Vec<_>>();
            let found = store::deliveries::of_updates(&self.pool, query.project_id, &ids).await.map_err(failed)?;
            let mut found = found.into_iter().peekable();
            let mut last = None;
            for update in &updates.items {
                let mut of_update = Vec::new();
                while let Some(delivery) = found.next_if(|delivery| delivery.id.update_id == update.update_id) {
                    if matches(query, &delivery) {
                        of_update.push(delivery);
                    }
                }
                if !items.is_empty() && items.len() + of_update.len() > limit {
                    // Behind the update before this one, which may be where this page began.
                    let next = last.or(wanted.cursor.as_ref()).map(place);
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
        Ok(Page { items, next: cursor.as_ref().map(place) })
    }

    async fn get(self, query: GetDelivery) -> Result<Delivery, RpcError> {
        let deliveries =
            store::query::of_update(&self.pool, query.project_id, query.id.update_id).await.map_err(failed)?;
        deliveries.into_iter().find(|delivery| delivery.callback_id == query.id.callback_id).ok_or_else(not_found)
    }

    async fn redeliver(self, query: GetDelivery) -> Result<ListedDelivery, RpcError> {
        let GetDelivery { project_id, id } = query;
        let deliveries =
            store::deliveries::of_updates(&self.pool, project_id, &[id.update_id]).await.map_err(failed)?;
        let delivery = deliveries.into_iter().find(|delivery| delivery.id == id).ok_or_else(not_found)?;
        let found = self.callbacks.find(project_id, delivery.process_id, id.callback_id).await;
        match found.map_err(|e| internal(DELIVERY_REDELIVER, &e))? {
            Found::Callback(_) | Found::Locked => {}
            Found::Disabled => {
                let message = "The callback is disabled: leadctl callback enable lets it be told again";
                return Err(RpcError::new(409, "callback_disabled", message));
            }
            Found::Refused(why) => return Err(RpcError::new(409, "callback_gone", format!("Nobody is told: {why}"))),
            Found::NoProcess => {
                return Err(RpcError::new(409, "callback_gone", "The callback's process is not in the configuration"));
            }
        }
        let pending = || RpcError::new(409, "delivery_pending", "The delivery is on its way already");
        if delivery.status == DeliveryStatus::Pending {
            return Err(pending());
        }
        let outcomes = match delivery.status {
            DeliveryStatus::Delivered => self.outcomes(project_id, &[id.update_id]).await?,
            _ => Vec::new(),
        };
        if delivery.status == DeliveryStatus::Delivered && outcomes.is_empty() {
            return Err(RpcError::new(410, "outcome_gone", "The ledger no longer holds what is to be told"));
        }
        let payload = outcomes.first().map(|outcome| outcome.payload.get());
        let now = clock::now();
        let again = store::deliveries::requeue(&self.pool, project_id, &[Again { id, due: now, payload }], now).await;
        let again = again.map_err(failed)?.pop().ok_or_else(pending)?;
        self.turns.ask_everybody();
        tracing::info!(update_id = %id.update_id, callback_id = %id.callback_id, "delivered again, as asked");
        Ok(again)
    }

    async fn outcomes(&self, project_id: ObjectId, update_ids: &[ObjectId]) -> Result<Vec<Outcome>, RpcError> {
        let wanted = GetOutcomes { project_id, update_ids: update_ids.to_vec() };
        query(&self.client, UPDATE_OUTCOMES, &wanted).await
    }

    async fn recover(self, query: RecoverDeliveries) -> Result<RecoveredDeliveries, RpcError> {
        if !(1..=MAX_PER_SECOND).contains(&query.per_second) {
            let message = format!("perSecond must be a number from 1 to {MAX_PER_SECOND}");
            return Err(RpcError::new(400, "invalid_field", message));
        }
        let begun = Instant::now();
        let mut walk = Walk::begin(query.cursor.as_ref(), clock::now())?;
        let mut deliveries = 0;
        let mut until = None;
        loop {
            let Step { found, after } = match query.status {
                DeliveryStatus::Exhausted => self.exhausted(&query, &walk).await?,
                DeliveryStatus::Delivered => self.delivered(&query, &walk).await?,
                DeliveryStatus::Pending => {
                    let message = "status must be exhausted or delivered: what is pending is on its way already";
                    return Err(RpcError::new(400, "invalid_field", message));
                }
            };
            deliveries += match query.dry_run {
                true => found.len() as u64,
                false => self.make_due(&query, &mut walk, &found, &mut until).await?,
            };
            let end = after.is_none();
            walk.after = after;
            if end || begun.elapsed() >= RECOVERING {
                if deliveries > 0 && !query.dry_run {
                    tracing::info!(project_id = %query.project_id, deliveries, "deliveries are made again, as asked");
                }
                return Ok(RecoveredDeliveries { deliveries, until, next: (!end).then(|| walk.cursor()) });
            }
        }
    }

    /// The next exhausted deliveries.
    async fn exhausted(&self, query: &RecoverDeliveries, walk: &Walk) -> Result<Step, RpcError> {
        let after = walk.after.as_deref().map(str::parse).transpose().map_err(|_| Cursor::invalid())?;
        let ids = store::deliveries::exhausted_after(&self.pool, query.project_id, query.since, after, CHUNK).await;
        let mut found = ids.map_err(failed)?;
        let more = found.len() as i64 == CHUNK;
        let after = found.last().filter(|_| more).map(ToString::to_string);
        found.retain(|id| query.callback_id.is_none_or(|wanted| wanted == id.callback_id));
        Ok(Step { found, after })
    }

    /// The next delivered ones.
    async fn delivered(&self, query: &RecoverDeliveries, walk: &Walk) -> Result<Step, RpcError> {
        let project_id = query.project_id;
        let wanted = ListUpdates {
            project_id,
            lead_id: None,
            since: Some(query.since),
            oldest_first: true,
            cursor: walk.after.clone().map(Cursor::from_text),
            limit: MAX_LIMIT,
        };
        let updates: Page<ListedUpdate> = self::query(&self.client, UPDATE_LIST, &wanted).await?;
        let ids = updates.items.iter().map(|update| update.update_id).collect::<Vec<_>>();
        let mut found = store::deliveries::of_updates(&self.pool, project_id, &ids).await.map_err(failed)?;
        found.retain(|delivery| {
            delivery.status == DeliveryStatus::Delivered
                && query.callback_id.is_none_or(|wanted| wanted == delivery.id.callback_id)
        });
        let after = updates.next.map(|next| next.as_str().to_owned());
        Ok(Step { found: found.into_iter().map(|delivery| delivery.id).collect(), after })
    }

    /// Makes what was found due, one after the other; how many were not pending already.
    async fn make_due(
        &self,
        query: &RecoverDeliveries,
        walk: &mut Walk,
        found: &[DeliveryId],
        until: &mut Option<Timestamp>,
    ) -> Result<u64, RpcError> {
        let mut rest = found;
        let mut made = 0;
        while !rest.is_empty() {
            let outcomes = match query.status {
                DeliveryStatus::Delivered => {
                    let mut ids = rest.iter().map(|id| id.update_id).collect::<Vec<_>>();
                    ids.dedup();
                    self.outcomes(query.project_id, &ids).await?
                }
                _ => Vec::new(),
            };
            let (batch, later) = match query.status {
                DeliveryStatus::Delivered => with_bodies(rest, &outcomes),
                _ => (rest.iter().map(|id| (*id, None)).collect(), &[][..]),
            };
            let batch = batch.into_iter().map(|(id, payload)| Again { id, due: walk.due(query.per_second), payload });
            let batch = batch.collect::<Vec<_>>();
            *until = batch.last().map(|again| again.due).or(*until);
            let again = store::deliveries::requeue(&self.pool, query.project_id, &batch, clock::now()).await;
            made += again.map_err(failed)?.len() as u64;
            self.turns.ask_everybody();
            rest = later;
        }
        Ok(made)
    }
}

/// Whether a delivery is among what is asked for, as far as its row tells.
fn matches(query: &ListDeliveries, delivery: &ListedDelivery) -> bool {
    query.status.is_none_or(|status| status == delivery.status)
        && query.callback_id.is_none_or(|callback_id| callback_id == delivery.id.callback_id)
}

/// A part of what a recovery walks over.
struct Step {
    found: Vec<DeliveryId>,
    /// Where the next part begins; none after the last.
    after: Option<String>,
}

/// The deliveries whose bodies are here, and those whose bodies are to be asked for next: an answer holds as many as fit,
/// in the order of the question. What is missing in between, the ledger no longer has.
fn with_bodies<'d, 'o>(
    deliveries: &'d [DeliveryId],
    outcomes: &'o [Outcome],
) -> (Vec<(DeliveryId, Option<&'o str>)>, &'d [DeliveryId]) {
    let body = |id: &DeliveryId| outcomes.iter().find(|outcome| outcome.update_id == id.update_id);
    let Some(last) = deliveries.iter().rposition(|id| body(id).is_some()) else { return (Vec::new(), &[]) };
    let (here, later) = deliveries.split_at(last + 1);
    let with = here.iter().filter_map(|id| Some((*id, Some(body(id)?.payload.get()))));
    (with.collect(), later)
}

/// How far a recovery is: it walks over everything once, and spreads what it finds over time.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Walk {
    begun: Timestamp,
    /// How many were made due.
    given: u64,
    /// Where it goes on.
    after: Option<String>,
}

impl Walk {
    fn begin(cursor: Option<&Cursor>, now: Timestamp) -> Result<Self, RpcError> {
        let Some(cursor) = cursor else { return Ok(Self { begun: now, given: 0, after: None }) };
        let place = cursor.place(RECOVERY)?;
        let mut parts = place.splitn(3, '.');
        let mut number = || parts.next()?.parse::<u64>().ok();
        let (begun, given) = number().zip(number()).ok_or_else(Cursor::invalid)?;
        let begun = i64::try_from(begun).map_err(|_| Cursor::invalid())?;
        // A walk that began in the future is forged.
        let begun = Timestamp::from_millis(begun).min(now);
        Ok(Self { begun, given, after: parts.next().map(str::to_owned) })
    }

    fn cursor(&self) -> Cursor {
        let Self { begun, given, after } = self;
        Cursor::new(RECOVERY, &format!("{}.{given}.{}", begun.millis(), after.as_deref().unwrap_or_default()))
    }

    /// When the next one is due, so that no more than so many are in any second.
    fn due(&mut self, per_second: u32) -> Timestamp {
        let after = Duration::from_millis(self.given.saturating_mul(1000) / u64::from(per_second.max(1)));
        self.given = self.given.saturating_add(1);
        // Farther is never meant, and no time that Postgres has.
        self.begun.plus(after.min(MOST_SPREAD))
    }
}

#[cfg(test)]
mod tests {
    use contract::JsonObject;
    use proptest::prelude::*;

    use super::*;

    fn delivery(update: u8, callback: u8) -> DeliveryId {
        DeliveryId { update_id: ObjectId::from_bytes([update; 12]), callback_id: ObjectId::from_bytes([callback; 12]) }
    }

    #[test]
    fn bodies_are_given_as_far_as_they_came() {
        let outcome = |update| Outcome {
            update_id: ObjectId::from_bytes([update; 12]),
            payload: JsonObject::from_text(format!("{{\"n\": {update}}}")).unwrap(),
        };
        let wanted = [delivery(1, 1), delivery(1, 2), delivery(2, 1), delivery(3, 1), delivery(4, 1)];
        let outcomes = [outcome(1), outcome(3)];
        let (with, later) = with_bodies(&wanted, &outcomes);
        let one = Some("{\"n\": 1}");
        assert_eq!(with, [(wanted[0], one), (wanted[1], one), (wanted[3], Some("{\"n\": 3}"))]);
        assert_eq!(later, [wanted[4]]);
        assert_eq!(with_bodies(&wanted, &[]), (vec![], &[][..]), "an answer without any ends the question");
    }

    proptest! {
        #[test]
        fn a_walk_goes_on_where_it_was_at_its_pace(
            now in 0..4_000_000_000_000_i64, given in 0..10_000_000_u64, per_second in 1..=MAX_PER_SECOND, after in "[0-9a-z-]+",
        ) {
            let now = Timestamp::from_millis(now);
            let walk = Walk { begun: now, given, after: Some(after) };
            let mut again = Walk::begin(Some(&walk.cursor()), now).unwrap();
            prop_assert_eq!(&again, &walk);
            let dues = (0..=per_second).map(|_| again.due(per_second).millis()).collect::<Vec<_>>();
            prop_assert!(dues.is_sorted());
            prop_assert!((999..=1000).contains(&(dues[per_second as usize] - dues[0])) || dues[0] - now.millis() >= MOST_SPREAD.as_millis() as i64 - 1000);
        }

        #[test]
        fn forged_walks_never_panic(place in "[0-9.-]{0,40}|.*", per_second: u32) {
            if let Ok(mut walk) = Walk::begin(Some(&Cursor::new(RECOVERY, &place)), Timestamp::from_millis(0)) {
                walk.due(per_second);
            }
        }
    }
}

//! Makes many completed deliveries due again, spread over time.

use std::time::Duration;

use contract::{
    Timestamp,
    rpc::{
        Cursor, DeliveryId, DeliveryStatus, ErrorCode, ListUpdates, MAX_LIMIT, MAX_PER_SECOND, Outcome,
        RecoverDeliveries, RecoveredDeliveries, RpcError,
    },
};
use service_kit::{clock, rpc::request};
use tokio::time::Instant;

use super::deliveries::{CHUNK, DeliveryApi};
use crate::store::{self, deliveries::Redelivery};

/// The list that recovery cursors belong to.
const RECOVERY: &str = "recovery";
/// How long a call recovers before it returns a cursor: well below the timeout of the query.
const MAX_DURATION: Duration = Duration::from_millis(1500);
/// How far ahead a delivery may become due.
const MAX_SPREAD: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// The deliveries found by one step of a recovery.
struct RecoveryPage {
    found: Vec<DeliveryId>,
    /// Where the next page starts; none after the last.
    next: Option<String>,
}

/// The progress of a recovery, which visits every delivery once.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RecoveryCursor {
    started_at: Timestamp,
    /// How many deliveries were made due.
    recovered: u64,
    /// Where the next page starts.
    next: Option<String>,
}

impl RecoveryCursor {
    fn parse(cursor: Option<&Cursor>, now: Timestamp) -> Result<Self, RpcError> {
        let Some(cursor) = cursor else { return Ok(Self { started_at: now, recovered: 0, next: None }) };
        let text = cursor.place(RECOVERY)?;
        let mut parts = text.splitn(3, '.');
        let mut number = || parts.next()?.parse::<u64>().ok();
        let (started_at, recovered) = number().zip(number()).ok_or_else(Cursor::invalid)?;
        let started_at = i64::try_from(started_at).map_err(|_| Cursor::invalid())?;
        // A start in the future is forged.
        let started_at = Timestamp::from_millis(started_at).min(now);
        Ok(Self { started_at, recovered, next: parts.next().map(str::to_owned) })
    }

    fn to_cursor(&self) -> Cursor {
        let Self { started_at, recovered, next } = self;
        let next = next.as_deref().unwrap_or_default();
        Cursor::new(RECOVERY, &format!("{}.{recovered}.{next}", started_at.millis()))
    }

    /// When the next delivery is due, so that every second has at most `per_second`.
    fn next_due(&mut self, per_second: u32) -> Timestamp {
        let delay = Duration::from_millis(self.recovered.saturating_mul(1000) / u64::from(per_second.max(1)));
        self.recovered = self.recovered.saturating_add(1);
        // A forged count must not exceed the times that Postgres has.
        self.started_at.plus(delay.min(MAX_SPREAD))
    }
}

impl DeliveryApi {
    pub(super) async fn recover(self, query: RecoverDeliveries) -> Result<RecoveredDeliveries, RpcError> {
        if !(1..=MAX_PER_SECOND).contains(&query.per_second) {
            let message = format!("perSecond must be a number from 1 to {MAX_PER_SECOND}");
            return Err(RpcError::new(ErrorCode::InvalidField, message));
        }
        let started = Instant::now();
        let mut cursor = RecoveryCursor::parse(query.cursor.as_ref(), clock::now())?;
        let mut deliveries = 0;
        let mut until = None;
        loop {
            let RecoveryPage { found, next } = match query.status {
                DeliveryStatus::Exhausted => self.exhausted_page(&query, cursor.next.as_deref()).await?,
                DeliveryStatus::Delivered => self.delivered_page(&query, cursor.next.clone()).await?,
                DeliveryStatus::Pending => {
                    let message = "status must be exhausted or delivered: pending deliveries need no recovery";
                    return Err(RpcError::new(ErrorCode::InvalidField, message));
                }
            };
            deliveries += match query.dry_run {
                true => found.len() as u64,
                false => self.make_due(&query, &mut cursor, &found, &mut until).await?,
            };
            let is_last = next.is_none();
            cursor.next = next;
            if is_last || started.elapsed() >= MAX_DURATION {
                if deliveries > 0 && !query.dry_run {
                    tracing::info!(project_id = %query.project_id, deliveries, "recovery of deliveries requested");
                }
                return Ok(RecoveredDeliveries { deliveries, until, next: (!is_last).then(|| cursor.to_cursor()) });
            }
        }
    }

    async fn exhausted_page(&self, query: &RecoverDeliveries, after: Option<&str>) -> Result<RecoveryPage, RpcError> {
        let after = after.map(str::parse).transpose().map_err(|_| Cursor::invalid())?;
        let mut found = store::deliveries::exhausted(&self.pool, query.project_id, query.since, after, CHUNK).await?;
        let has_more = found.len() as i64 == CHUNK;
        let next = found.last().filter(|_| has_more).map(ToString::to_string);
        found.retain(|id| query.callback_id.is_none_or(|callback_id| callback_id == id.callback_id));
        Ok(RecoveryPage { found, next })
    }

    async fn delivered_page(&self, query: &RecoverDeliveries, after: Option<String>) -> Result<RecoveryPage, RpcError> {
        let project_id = query.project_id;
        let list = ListUpdates {
            project_id,
            lead_id: None,
            since: Some(query.since),
            until: None,
            oldest_first: true,
            cursor: after.map(Cursor::from_text),
            limit: MAX_LIMIT,
        };
        let updates = request(&self.client, &list).await?;
        let ids = updates.items.iter().map(|update| update.update_id).collect::<Vec<_>>();
        let mut found = self.of_updates(project_id, &ids).await?;
        found.retain(|delivery| {
            delivery.status == DeliveryStatus::Delivered
                && query.callback_id.is_none_or(|callback_id| callback_id == delivery.id.callback_id)
        });
        let next = updates.next.map(|next| next.as_str().to_owned());
        Ok(RecoveryPage { found: found.into_iter().map(|delivery| delivery.id).collect(), next })
    }

    /// Makes the found deliveries due one after the other. Returns how many were not pending already.
    async fn make_due(
        &self,
        query: &RecoverDeliveries,
        cursor: &mut RecoveryCursor,
        found: &[DeliveryId],
        until: &mut Option<Timestamp>,
    ) -> Result<u64, RpcError> {
        let mut rest = found;
        let mut requeued = 0;
        while !rest.is_empty() {
            let outcomes = match query.status {
                DeliveryStatus::Delivered => {
                    let mut bodies = rest.to_vec();
                    // The callbacks of an update share the body of a kind.
                    bodies.dedup_by_key(|id| (id.update_id, id.kind));
                    self.outcomes(query.project_id, &bodies).await?
                }
                _ => Vec::new(),
            };
            let (batch, later) = match query.status {
                DeliveryStatus::Delivered => with_payloads(rest, &outcomes),
                _ => (rest.iter().map(|id| (*id, None)).collect(), &[][..]),
            };
            let batch = batch.into_iter().map(|(id, payload)| {
                let due = cursor.next_due(query.per_second);
                Redelivery { id, due, payload }
            });
            let batch = batch.collect::<Vec<_>>();
            *until = batch.last().map(|redelivery| redelivery.due).or(*until);
            requeued += self.requeue(query.project_id, &batch, clock::now()).await?.len() as u64;
            rest = later;
        }
        Ok(requeued)
    }
}

/// The deliveries whose payloads arrived, and those whose payloads are to be requested next: a reply has as many as
/// fit, in the order of the request. A payload that is missing in between is no longer in the ledger.
fn with_payloads<'d, 'o>(
    deliveries: &'d [DeliveryId],
    outcomes: &'o [Outcome],
) -> (Vec<(DeliveryId, Option<&'o str>)>, &'d [DeliveryId]) {
    let outcome =
        |id: &DeliveryId| outcomes.iter().find(|outcome| outcome.update_id == id.update_id && outcome.kind == id.kind);
    let Some(last) = deliveries.iter().rposition(|id| outcome(id).is_some()) else { return (Vec::new(), &[]) };
    let (arrived, later) = deliveries.split_at(last + 1);
    let arrived = arrived.iter().filter_map(|id| Some((*id, Some(outcome(id)?.payload.get()))));
    (arrived.collect(), later)
}

#[cfg(test)]
mod tests {
    use contract::{JsonObject, ObjectId, event_kind::DeliveryKind};
    use proptest::prelude::*;

    use super::*;

    fn delivery(update: u8, callback: u8) -> DeliveryId {
        let (update_id, callback_id) = (ObjectId::from_bytes([update; 12]), ObjectId::from_bytes([callback; 12]));
        DeliveryId { update_id, callback_id, kind: DeliveryKind::Update }
    }

    #[test]
    fn payloads_are_paired_as_far_as_they_arrived() {
        let outcome = |update| Outcome {
            update_id: ObjectId::from_bytes([update; 12]),
            kind: DeliveryKind::Update,
            lead_id: None,
            payload: JsonObject::from_text(format!("{{\"n\": {update}}}")).unwrap(),
        };
        let deliveries = [delivery(1, 1), delivery(1, 2), delivery(2, 1), delivery(3, 1), delivery(4, 1)];
        let outcomes = [outcome(1), outcome(3)];

        let (arrived, later) = with_payloads(&deliveries, &outcomes);

        let one = Some("{\"n\": 1}");
        assert_eq!(arrived, [(deliveries[0], one), (deliveries[1], one), (deliveries[3], Some("{\"n\": 3}"))]);
        assert_eq!(later, [deliveries[4]]);
        assert_eq!(with_payloads(&deliveries, &[]), (vec![], &[][..]), "an empty reply ends the requests");
    }

    proptest! {
        #[test]
        fn a_cursor_continues_the_recovery_at_its_rate(
            now in 0..4_000_000_000_000_i64,
            recovered in 0..10_000_000_u64,
            per_second in 1..=MAX_PER_SECOND,
            next in "[0-9a-z-]+",
        ) {
            let now = Timestamp::from_millis(now);
            let cursor = RecoveryCursor { started_at: now, recovered, next: Some(next) };
            let mut parsed = RecoveryCursor::parse(Some(&cursor.to_cursor()), now).unwrap();
            prop_assert_eq!(&parsed, &cursor);
            let dues = (0..=per_second).map(|_| parsed.next_due(per_second).millis()).collect::<Vec<_>>();
            prop_assert!(dues.is_sorted());
            let at_limit = dues[0] - now.millis() >= MAX_SPREAD.as_millis() as i64 - 1000;
            prop_assert!((999..=1000).contains(&(dues[per_second as usize] - dues[0])) || at_limit);
        }

        #[test]
        fn forged_cursors_never_panic(text in "[0-9.-]{0,40}|.*", per_second: u32) {
            let cursor = Cursor::new(RECOVERY, &text);
            if let Ok(mut cursor) = RecoveryCursor::parse(Some(&cursor), Timestamp::from_millis(0)) {
                cursor.next_due(per_second);
            }
        }
    }
}

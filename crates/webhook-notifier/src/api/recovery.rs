//! Makes many completed deliveries due again, spread over time.

use std::time::Duration;

use contract::{
    ObjectId, Timestamp,
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

/// The progress of a recovery or backfill, which visits every delivery once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RecoveryCursor {
    started_at: Timestamp,
    /// How many deliveries were made due.
    recovered: u64,
    /// Where the next page starts.
    pub(super) next: Option<String>,
}

impl RecoveryCursor {
    /// Reads a cursor of this list.
    fn parse(list: &str, cursor: Option<&Cursor>, now: Timestamp) -> Result<Self, RpcError> {
        let Some(cursor) = cursor else { return Ok(Self { started_at: now, recovered: 0, next: None }) };
        let text = cursor.place(list)?;
        let mut parts = text.splitn(3, '.');
        let mut number = || parts.next()?.parse::<u64>().ok();
        let (started_at, recovered) = number().zip(number()).ok_or_else(Cursor::invalid)?;
        let started_at = i64::try_from(started_at).map_err(|_| Cursor::invalid())?;
        // A start in the future is forged.
        let started_at = Timestamp::from_millis(started_at).min(now);
        Ok(Self { started_at, recovered, next: parts.next().map(str::to_owned) })
    }

    fn to_cursor(&self, list: &str) -> Cursor {
        let Self { started_at, recovered, next } = self;
        let next = next.as_deref().unwrap_or_default();
        Cursor::new(list, &format!("{}.{recovered}.{next}", started_at.millis()))
    }

    /// When the next delivery is due, so that every second has at most `per_second`.
    pub(super) fn next_due(&mut self, per_second: u32) -> Timestamp {
        let delay = Duration::from_millis(self.recovered.saturating_mul(1000) / u64::from(per_second.max(1)));
        self.recovered = self.recovered.saturating_add(1);
        // A forged count must not lead to a time beyond the range of Postgres.
        self.started_at.plus(delay.min(MAX_SPREAD))
    }
}

/// A call of a recovery or backfill, which makes deliveries due page by page until its time is over.
pub(super) struct RecoveryCall {
    list: &'static str,
    started: Instant,
    pub(super) cursor: RecoveryCursor,
    reply: RecoveredDeliveries,
}

impl RecoveryCall {
    pub(super) fn begin(list: &'static str, per_second: u32, cursor: Option<&Cursor>) -> Result<Self, RpcError> {
        if !(1..=MAX_PER_SECOND).contains(&per_second) {
            let message = format!("perSecond must be a number from 1 to {MAX_PER_SECOND}");
            return Err(RpcError::new(ErrorCode::InvalidField, message));
        }
        let cursor = RecoveryCursor::parse(list, cursor, clock::now())?;
        let reply = RecoveredDeliveries { deliveries: 0, until: None, next: None };
        Ok(Self { list, started: Instant::now(), cursor, reply })
    }

    /// Counts the deliveries of a page, the last of which is due at `until`; `next` is where the next page starts.
    /// Returns the reply if the call ends here.
    pub(super) fn end_page(
        &mut self,
        deliveries: u64,
        until: Option<Timestamp>,
        next: Option<String>,
    ) -> Option<RecoveredDeliveries> {
        self.reply.deliveries += deliveries;
        self.reply.until = until.or(self.reply.until);
        self.cursor.next = next;
        let is_last = self.cursor.next.is_none();
        (is_last || self.started.elapsed() >= MAX_DURATION).then(|| RecoveredDeliveries {
            next: (!is_last).then(|| self.cursor.to_cursor(self.list)),
            ..self.reply.clone()
        })
    }
}

impl DeliveryApi {
    pub(super) async fn recover(self, query: RecoverDeliveries) -> Result<RecoveredDeliveries, RpcError> {
        let mut call = RecoveryCall::begin(RECOVERY, query.per_second, query.cursor.as_ref())?;
        loop {
            let next = call.cursor.next.clone();
            let RecoveryPage { found, next } = match query.status {
                DeliveryStatus::Exhausted => self.exhausted_page(&query, next.as_deref()).await?,
                DeliveryStatus::Delivered => self.delivered_page(&query, next).await?,
                DeliveryStatus::Pending => {
                    let message = "status must be exhausted or delivered: pending deliveries need no recovery";
                    return Err(RpcError::new(ErrorCode::InvalidField, message));
                }
            };
            let (deliveries, until) = match query.dry_run {
                true => (found.len() as u64, None),
                false => self.make_due(&query, &mut call.cursor, &found).await?,
            };
            if let Some(recovered) = call.end_page(deliveries, until, next) {
                if recovered.deliveries > 0 && !query.dry_run {
                    let (project_id, deliveries) = (query.project_id, recovered.deliveries);
                    tracing::info!(%project_id, deliveries, "recovery of deliveries requested");
                }
                return Ok(recovered);
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
        let (ids, next) = self.updates_since(project_id, query.since, after).await?;
        let mut found = self.of_updates(project_id, &ids).await?;
        found.retain(|delivery| {
            delivery.status == DeliveryStatus::Delivered
                && query.callback_id.is_none_or(|callback_id| callback_id == delivery.id.callback_id)
        });
        Ok(RecoveryPage { found: found.into_iter().map(|delivery| delivery.id).collect(), next })
    }

    /// A page of a project's updates, the oldest first, and where the next page starts.
    pub(super) async fn updates_since(
        &self,
        project_id: ObjectId,
        since: Timestamp,
        after: Option<String>,
    ) -> Result<(Vec<ObjectId>, Option<String>), RpcError> {
        let list = ListUpdates {
            project_id,
            lead_id: None,
            since: Some(since),
            until: None,
            oldest_first: true,
            cursor: after.map(Cursor::from_text),
            limit: MAX_LIMIT,
        };
        let updates = request(&self.client, &list).await?;
        let ids = updates.items.iter().map(|update| update.update_id).collect();
        Ok((ids, updates.next.map(|next| next.as_str().to_owned())))
    }

    /// Makes the found deliveries due one after the other. Returns how many were not pending already, and when the last
    /// one is due.
    async fn make_due(
        &self,
        query: &RecoverDeliveries,
        cursor: &mut RecoveryCursor,
        found: &[DeliveryId],
    ) -> Result<(u64, Option<Timestamp>), RpcError> {
        let mut rest = found;
        let (mut requeued, mut until) = (0, None);
        while !rest.is_empty() {
            let next = &rest[..rest.len().min(MAX_LIMIT as usize)];
            let outcomes = match query.status {
                DeliveryStatus::Delivered => {
                    let mut bodies = next.to_vec();
                    // The callbacks of an update share the body of a kind.
                    bodies.dedup_by_key(|id| (id.update_id, id.kind));
                    self.outcomes(query.project_id, &bodies).await?
                }
                _ => Vec::new(),
            };
            let (batch, later) = match query.status {
                DeliveryStatus::Delivered => with_payloads(next, &outcomes),
                _ => (next.iter().map(|id| (*id, None)).collect(), &[][..]),
            };
            let batch = batch.into_iter().map(|(id, payload)| {
                let due = cursor.next_due(query.per_second);
                Redelivery { id, due, payload }
            });
            let batch = batch.collect::<Vec<_>>();
            until = batch.last().map(|redelivery| redelivery.due).or(until);
            requeued += self.requeue(query.project_id, &batch, clock::now()).await?.len() as u64;
            rest = &rest[next.len() - later.len()..];
        }
        Ok((requeued, until))
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
            let mut parsed = RecoveryCursor::parse(RECOVERY, Some(&cursor.to_cursor(RECOVERY)), now).unwrap();
            prop_assert_eq!(&parsed, &cursor);
            let dues = (0..=per_second).map(|_| parsed.next_due(per_second).millis()).collect::<Vec<_>>();
            prop_assert!(dues.is_sorted());
            let at_limit = dues[0] - now.millis() >= MAX_SPREAD.as_millis() as i64 - 1000;
            prop_assert!((999..=1000).contains(&(dues[per_second as usize] - dues[0])) || at_limit);
        }

        #[test]
        fn forged_cursors_never_panic(text in "[0-9.-]{0,40}|.*", per_second: u32) {
            let cursor = Cursor::new(RECOVERY, &text);
            if let Ok(mut cursor) = RecoveryCursor::parse(RECOVERY, Some(&cursor), Timestamp::from_millis(0)) {
                cursor.next_due(per_second);
            }
        }
    }
}

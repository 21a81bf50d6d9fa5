//! 7 Deliver, 8 Retry: makes deliveries of operational events
//! (docs/adr/0057-deliver-operational-events-from-an-outbox.md).
//!
//! What happens to a callback is recorded as an event in the same transaction. This task turns each event into
//! deliveries to the callbacks that name its kind, in one transaction, so that a crash neither loses an event nor
//! repeats it under another id. The retries attempt them, like every delivery.

use std::{collections::HashMap, sync::Arc, time::Duration};

use contract::{
    ObjectId, Timestamp,
    operational::{OperationalData, OperationalPayload},
    process::{Callback, EventKind, Process},
    subject::process_key,
};
use service_kit::{clock, nats::error_chain, postgres::Pool};
use tokio_util::sync::CancellationToken;

use crate::{
    callbacks::Callbacks,
    store::{
        error::StoreError,
        operational::{self, OperationalDelivery, OperationalEvent},
    },
};

/// How often Postgres is polled for events. A longer interval delays events; a shorter one costs an idle Postgres more.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of events per transaction. Each event has a delivery per callback that names it.
const BATCH: i64 = 100;

/// The task that makes the deliveries.
#[derive(Debug)]
pub(crate) struct OperationalEvents {
    pub(crate) pool: Pool,
    pub(crate) callbacks: Arc<Callbacks>,
    /// How long a callback has nothing but failures before it is reported.
    pub(crate) failing_after: Duration,
    /// How long after an event about exhausted deliveries of a callback the next one is due.
    pub(crate) exhausted_interval: Duration,
}

impl OperationalEvents {
    /// Makes deliveries until shutdown.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        loop {
            if let Err(e) = self.round().await {
                tracing::warn!("cannot deliver operational events, trying again: {}", error_chain(&e));
            }
            tokio::select! {
                () = tokio::time::sleep(POLL_INTERVAL) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    async fn round(&self) -> Result<(), StoreError> {
        // Until the whole configuration is in memory, a missing callback may not have been removed.
        if !self.callbacks.view.is_complete() {
            return Ok(());
        }
        let now = clock::now();
        operational::record_failing(&self.pool, now.minus(self.failing_after), now).await?;
        while self.deliver_batch().await? {}
        Ok(())
    }

    /// Returns whether there may be more.
    async fn deliver_batch(&self) -> Result<bool, StoreError> {
        let now = clock::now();
        let mut transaction = self.pool.begin().await?;
        let mut events = operational::take_recorded(&mut transaction, BATCH).await?;
        let next = now.plus(self.exhausted_interval);
        let exhausted = operational::take_exhausted(&mut transaction, now, next, BATCH).await?;
        let has_more = events.len().max(exhausted.len()) as i64 == BATCH;
        events.extend(exhausted);
        if !events.is_empty() {
            let deliveries = self.deliveries(&events);
            operational::insert_deliveries(&mut transaction, &deliveries, now).await?;
        }
        transaction.commit().await?;
        Ok(has_more)
    }

    fn deliveries(&self, events: &[OperationalEvent]) -> Vec<OperationalDelivery> {
        let all = self.callbacks.view.all();
        let of_callbacks: HashMap<ObjectId, &Process> = all
            .iter()
            .flat_map(|process| process.callbacks.iter().map(|callback| (callback.callback_id, &***process)))
            .collect();
        let of_event = |event: &OperationalEvent| {
            // The callback was removed meanwhile: its event is dropped.
            let Some(process) = of_callbacks.get(&event.callback_id) else { return Vec::new() };
            let fallback = self.callbacks.view.get(&process_key(process.project_id, None));
            deliveries_of(event, process, fallback.as_deref().map(|fallback| &**fallback))
        };
        events.iter().flat_map(of_event).collect()
    }
}

/// The deliveries of an event about a callback of this process: one for each other callback of the process and of the
/// fallback process that names the event's kind.
fn deliveries_of(event: &OperationalEvent, process: &Process, fallback: Option<&Process>) -> Vec<OperationalDelivery> {
    let Some(subject) = process.callbacks.iter().find(|callback| callback.callback_id == event.callback_id) else {
        return Vec::new();
    };
    let names = |callback: &Callback| {
        let named = callback.events.iter().flatten().any(|kind: &EventKind| kind.delivery() == event.kind);
        named && callback.callback_id != event.callback_id
    };
    let fallback = fallback.filter(|fallback| fallback.process_id != process.process_id);
    let mut deliveries = Vec::new();
    for target in [process].into_iter().chain(fallback) {
        for callback in target.callbacks.iter().filter(|callback| names(callback)) {
            let Some(body) = body(event, process, subject) else { continue };
            deliveries.push(OperationalDelivery {
                event_id: event.event_id,
                kind: event.kind,
                project_id: target.project_id,
                process_id: target.process_id,
                callback_id: callback.callback_id,
                body,
            });
        }
    }
    deliveries
}

fn body(event: &OperationalEvent, process: &Process, subject: &Callback) -> Option<String> {
    let data = OperationalData {
        project_id: process.project_id,
        process_id: process.process_id,
        process: &process.name,
        callback_id: subject.callback_id,
        callback: &subject.name,
        reason: event.reason.as_deref(),
        failing_since: event.failing_since.map(Timestamp::to_iso),
        deliveries: event.exhausted.map(|(deliveries, _)| deliveries),
        last_delivery_id: event.exhausted.map(|(_, last)| last.to_string()),
    };
    // Serializing texts and ids cannot fail.
    OperationalPayload::body(event.kind, event.at, data).ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use contract::event_kind::DeliveryKind;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const PROJECT: ObjectId = ObjectId::from_bytes([2; 12]);
    const PROCESS: ObjectId = ObjectId::from_bytes([3; 12]);

    fn callback(number: u8, events: Option<&BTreeSet<EventKind>>, enabled: bool) -> Callback {
        let callback_id = ObjectId::from_bytes([number; 12]);
        serde_json::from_value(json!({
            "callbackId": callback_id, "name": format!("c-{number}"), "url": "https://x.example", "events": events,
            "enabled": enabled,
        }))
        .unwrap()
    }

    fn process(process_id: Option<ObjectId>, callbacks: Vec<Callback>) -> Process {
        serde_json::from_value(json!({
            "projectId": PROJECT, "processId": process_id, "revision": 1, "name": "Sales", "callbacks": callbacks,
        }))
        .unwrap()
    }

    fn event(callback: u8, kind: DeliveryKind) -> OperationalEvent {
        OperationalEvent {
            event_id: ObjectId::from_bytes([9; 12]),
            callback_id: ObjectId::from_bytes([callback; 12]),
            kind,
            at: Timestamp::from_millis(0),
            reason: None,
            failing_since: None,
            exhausted: None,
        }
    }

    #[test]
    fn an_event_goes_to_the_callbacks_of_the_process_and_of_the_project_that_name_it() {
        let named = BTreeSet::from([EventKind::CallbackDisabled]);
        let own = process(
            Some(PROCESS),
            vec![callback(1, Some(&named), true), callback(2, Some(&named), true), callback(3, None, true)],
        );
        let fallback = process(None, vec![callback(4, Some(&named), true), callback(5, Some(&named), false)]);
        let targets = |event: &OperationalEvent, process: &Process| {
            let deliveries = deliveries_of(event, process, Some(&fallback));
            deliveries.iter().map(|d| (d.process_id, d.callback_id.as_bytes()[0])).collect::<Vec<_>>()
        };

        let disabled = event(1, DeliveryKind::CallbackDisabled);

        assert_eq!(
            targets(&disabled, &own),
            [(Some(PROCESS), 2), (None, 4), (None, 5)],
            "not to itself; to one that is off, where it waits"
        );
        assert_eq!(targets(&event(3, DeliveryKind::CallbackFailing), &own), []);
        assert_eq!(targets(&event(4, DeliveryKind::CallbackDisabled), &fallback), [(None, 5)], "each callback once");
        assert_eq!(targets(&event(7, DeliveryKind::CallbackDisabled), &own), [], "a callback that was removed");
    }

    proptest! {
        #[test]
        fn no_callback_gets_an_event_about_itself_or_one_twice(
            named in prop::collection::vec((prop::collection::btree_set(0..EventKind::ALL.len(), 0..6), any::<bool>()), 1..8),
            own in 0_usize..8,
            subject in 0_u8..8,
            kind in 0..DeliveryKind::ALL.len(),
        ) {
            let callbacks: Vec<_> = (0..).zip(&named).map(|(number, (events, enabled))| {
                let events = events.iter().map(|index| EventKind::ALL[*index]).collect();
                callback(number, Some(&events), *enabled)
            }).collect();
            let (own, others) = callbacks.split_at(own.min(callbacks.len()));
            let (own, fallback) = (process(Some(PROCESS), own.to_vec()), process(None, others.to_vec()));
            let event = event(subject, DeliveryKind::ALL[kind]);
            let deliveries = deliveries_of(&event, &own, Some(&fallback));
            let targets: BTreeSet<_> = deliveries.iter().map(|delivery| delivery.callback_id).collect();
            prop_assert_eq!(targets.len(), deliveries.len());
            prop_assert!(!targets.contains(&event.callback_id));
            for delivery in deliveries {
                let of = if delivery.process_id.is_some() { &own } else { &fallback };
                let target = of.callbacks.iter().find(|callback| callback.callback_id == delivery.callback_id).unwrap();
                prop_assert!(target.events.iter().flatten().any(|kind| kind.delivery() == event.kind));
            }
        }
    }
}

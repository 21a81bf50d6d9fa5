//! Operational events: callbacks that list them receive that other callbacks fail, are disabled, recover, or exhaust
//! deliveries.

use std::collections::BTreeSet;

use contract::{
    ObjectId,
    rpc::{EnableCallback, ProcessChangeResult},
};
use serde_json::{Value, json};
use test_support::{Request, eventually};

use crate::support::{Stack, TEST_TIMEOUT, all_pages, assert_includes, process_id, secret, verify};

const ALL: [&str; 4] = ["callback.failing", "callback.disabled", "callback.recovered", "delivery.exhausted"];

/// A process with the callback `crm`, and the project's callback `owner`, which lists every operational event.
async fn with_owner(stack: &Stack) -> (ProcessChangeResult, ProcessChangeResult) {
    let applied = stack.process_calling(&["crm"]).await;
    let owner = json!([{"name": "owner", "url": stack.receiver.url("/owner"), "events": ALL}]);
    let owner = stack.fallback_of(stack.api.project_id, owner).await;
    stack.backdate_processes().await;
    (applied, owner)
}

fn callback_id(applied: &ProcessChangeResult) -> ObjectId {
    applied.process.callbacks[0].callback_id
}

fn webhook_id(request: &Request) -> String {
    request.header("webhook-id").expect("a webhook-id").to_owned()
}

fn kind(request: &Request) -> String {
    request.json()["type"].as_str().expect("a type").to_owned()
}

/// Waits for this many requests of this kind to `/owner`, and returns them.
async fn of_kind(stack: &Stack, wanted: &str, count: usize) -> Vec<Request> {
    eventually(TEST_TIMEOUT, "the owner receives the event", async || {
        let requests = stack.receiver.requests_to("/owner");
        let found: Vec<_> = requests.iter().filter(|request| kind(request) == wanted).cloned().collect();
        let kinds: Vec<_> = requests.iter().map(kind).collect();
        if found.len() >= count { Ok(found) } else { Err(format!("{kinds:?}")) }
    })
    .await
}

async fn update(stack: &Stack, lead: &str, number: usize) {
    stack.api.update(json!({"leadId": lead, "metadata": {"n": number}})).await;
}

#[tokio::test]
async fn the_owner_receives_that_a_callback_is_disabled_and_enabled_again() {
    let stack = Stack::start().await;
    let (applied, owner) = with_owner(&stack).await;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    stack.receiver.on("/crm", [410]);

    update(&stack, &lead, 1).await;
    let disabled = of_kind(&stack, "callback.disabled", 1).await;
    let enabled = stack.call(&EnableCallback { callback_id: callback_id(&applied) }).await;
    let recovered = of_kind(&stack, "callback.recovered", 1).await;

    assert!(enabled.was_disabled);
    let of_crm = json!({
        "projectId": stack.api.project_id, "processId": process_id(&applied), "process": applied.process.name,
        "callbackId": callback_id(&applied), "callback": "crm", "deliveries": null, "lastDeliveryId": null,
    });
    for (request, reason) in [(&disabled[0], "the endpoint answered 410 Gone"), (&recovered[0], "it was enabled again")]
    {
        verify(request, &secret(&owner.process, "owner"));
        let data = &request.json()["data"];
        assert_includes(data, of_crm.clone());
        assert_eq!(data["reason"], reason);
        let id = webhook_id(request);
        let (event_id, of) = id.split_once('.').expect("a kind");
        assert!(event_id.parse::<ObjectId>().is_ok() && of == kind(request), "{id}");
    }
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_callback_that_fails_for_a_while_is_reported_once_and_once_more_when_it_recovers() {
    let settings =
        [("FAILING_AFTER", "1s"), ("RETRY_SCHEDULE", "0s,300ms,300ms,300ms,300ms,300ms,300ms,1s,1s,1s,1s,1s,1s,1s")];
    let stack = Stack::start_with(&settings).await;
    let (applied, _) = with_owner(&stack).await;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    stack.receiver.on("/crm", [500]);
    update(&stack, &lead, 1).await;

    let failing = of_kind(&stack, "callback.failing", 1).await;
    stack.receiver.on("/crm", [200]);
    let recovered = of_kind(&stack, "callback.recovered", 1).await;
    update(&stack, &lead, 2).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending'", 0).await;
    stack.wait_for_clean_audit().await;

    let (failing, recovered) = (failing[0].json(), recovered[0].json());
    assert_includes(
        &failing["data"],
        json!({"callback": "crm", "reason": "the endpoint answered 500 Internal Server Error"}),
    );
    assert_eq!(failing["data"]["failingSince"], recovered["data"]["failingSince"]);
    assert!(
        failing["data"]["failingSince"].is_string() && recovered["data"]["reason"].is_null(),
        "{failing} {recovered}"
    );
    assert_eq!(stack.receiver.requests_to("/owner").len(), 2, "one of each");
}

/// A dead endpoint causes a few events, whose numbers add up. Events that the owner's endpoint rejects cause no further
/// events.
#[tokio::test]
async fn exhausted_deliveries_are_reported_together_and_events_cause_no_events() {
    const UPDATES: usize = 300;
    let settings =
        [("RETRY_SCHEDULE", "0s"), ("EXHAUSTED_INTERVAL", "3s"), ("FAILING_AFTER", "1s"), ("DISABLE_AFTER", "off")];
    let stack = Stack::start_with(&settings).await;
    let (applied, owner) = with_owner(&stack).await;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    // The status is not 500, which would open the breaker.
    stack.receiver.on("/crm", [400]);

    for number in 0..UPDATES {
        update(&stack, &lead, number).await;
    }
    let of_owner = || {
        let of_kind = stack.receiver.requests_to("/owner").into_iter().filter(|one| kind(one) == "delivery.exhausted");
        of_kind.map(|request| (webhook_id(&request), request.json()["data"].clone())).collect::<Vec<_>>()
    };
    let reported = eventually(TEST_TIMEOUT * 3, "every exhausted delivery is reported", async || {
        let events = of_owner();
        let sum: u64 = events.iter().map(|(_, data)| data["deliveries"].as_u64().expect("a number")).sum();
        if sum == UPDATES as u64 { Ok(events) } else { Err(format!("{sum} in {} events", events.len())) }
    })
    .await;
    // Now the owner's endpoint is dead as well.
    stack.receiver.on("/owner", [400]);
    update(&stack, &lead, UPDATES).await;
    let (owner_id, crm) = (callback_id(&owner), callback_id(&applied));
    let exhausted = eventually(TEST_TIMEOUT * 3, "the owner's deliveries are exhausted", async || {
        let (found, _) = all_pages(&stack.api, "/api/v1/deliveries?status=exhausted&", 100).await;
        let found: Vec<_> = found.into_iter().filter(|one| one["callbackId"] == json!(owner_id)).collect();
        if found.is_empty() { Err(String::new()) } else { Ok(found) }
    })
    .await;
    // At that point each of them is counted, if it must be reported.
    let uncounted = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'exhausted' AND NOT exhausted_announced";
    stack.wait_for_count(uncounted, 0).await;
    let counted = "SELECT count(*) FROM webhooks.exhausted_deliveries WHERE callback_id = $1";
    let counted = sqlx::query_scalar(counted).bind(owner_id.as_bytes()).fetch_one(&stack.pool).await;
    assert_eq!(counted.ok(), Some(0_i64), "the owner's deliveries are not to be reported");

    assert!((1..=20).contains(&reported.len()), "{} events", reported.len());
    let ids: BTreeSet<_> = reported.iter().map(|(id, _)| id).collect();
    assert_eq!(ids.len(), reported.len());
    let last = reported.last().expect("an event").1["lastDeliveryId"].as_str().expect("an id").to_owned();
    assert!(last.contains(&crm.to_string()), "{last}");
    assert_includes(&exhausted[0], json!({"kind": "delivery.exhausted", "callbackId": owner_id}));
    let about_owner =
        stack.receiver.requests_to("/owner").iter().any(|one| one.json()["data"]["callbackId"] == json!(owner_id));
    assert!(!about_owner);
    stack.wait_for_count("SELECT count(*) FROM webhooks.exhausted_deliveries WHERE deliveries > 0", 0).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.operational_events", 0).await;
    // Ending crm's series of failures also writes every series that began earlier. The owner has no such series.
    stack.receiver.on("/crm", [200]);
    update(&stack, &lead, UPDATES + 1).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.callback_failures", 0).await;
    let report = stack.wait_for_clean_audit().await;
    let of_owner = report["callbacks"].as_array().expect("callbacks").iter().find(|one| one["name"] == "owner");
    let counts = of_owner.expect("the owner");
    let number = |name: &str| counts[name].as_i64().expect("a number");
    assert_eq!(number("announced"), number("delivered") + number("exhausted") + number("pending"), "{counts}");
    assert!(number("exhausted") >= 1, "{counts}");
}

#[tokio::test]
async fn a_crash_neither_loses_an_event_nor_repeats_it_under_another_id() {
    let mut stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,200ms,200ms,200ms,1s,1s,1s,1s,1s,1s,1s")]).await;
    let (applied, _) = with_owner(&stack).await;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    stack.receiver.on("/crm", [410]);
    stack.receiver.on("/owner", [500]);

    update(&stack, &lead, 1).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.callback_health", 1).await;
    stack.notifier.kill9().await;
    let recorded = "SELECT (SELECT count(*) FROM webhooks.operational_events WHERE kind = 'callback.disabled')
                        + (SELECT count(*) FROM webhooks.deliveries WHERE kind = 'callback.disabled')";
    let recorded_before = stack.count(recorded).await;
    stack.notifier.restart().await;
    of_kind(&stack, "callback.disabled", 1).await;
    stack.notifier.kill9().await;
    stack.receiver.on("/owner", [200]);
    stack.notifier.restart().await;
    stack
        .wait_for_count_within(
            TEST_TIMEOUT * 4,
            "SELECT count(*) FROM webhooks.deliveries WHERE kind = 'callback.disabled' AND status = 'delivered'",
            1,
        )
        .await;

    assert_eq!(recorded_before, 1, "in the transaction that disabled the callback");
    let requests = stack.receiver.requests_to("/owner");
    let ids: BTreeSet<_> = requests.iter().filter(|one| kind(one) == "callback.disabled").map(webhook_id).collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
    stack.wait_for_clean_audit().await;
}

/// The callback of an owner whose endpoint answers 410 is disabled, and no event reports that.
#[tokio::test]
async fn an_event_that_is_answered_410_disables_its_callback_without_another_event() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm", "late"]).await;
    let callback = |name: &str| json!({"name": name, "url": stack.receiver.url(&format!("/{name}")), "events": ALL});
    let owners = stack.fallback_of(stack.api.project_id, json!([callback("owner"), callback("other")])).await;
    stack.backdate_processes().await;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    stack.receiver.on("/crm", [410, 200]);
    stack.receiver.on("/late", [200, 410]);
    stack.receiver.on("/other", [410, 200]);

    update(&stack, &lead, 1).await;
    of_kind(&stack, "callback.disabled", 1).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.callback_health WHERE enabled_at IS NULL", 2).await;
    // Events are delivered in order, so an event about the other owner would be delivered before this one.
    update(&stack, &lead, 2).await;
    of_kind(&stack, "callback.disabled", 2).await;

    let other = owners.process.callbacks[1].callback_id;
    let about: Vec<Value> =
        stack.receiver.requests_to("/owner").iter().map(|one| one.json()["data"]["callbackId"].clone()).collect();
    assert!(!about.contains(&json!(other)), "{about:?}");
    // Their waiting deliveries are then sent.
    for callback_id in [other, callback_id(&applied)] {
        stack.call(&EnableCallback { callback_id }).await;
    }
    stack.wait_for_clean_audit().await;
}

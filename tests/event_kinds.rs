//! Callbacks list the events that they get. Each kind is a separate delivery, with its own `webhook-id` and body.

use contract::{Timestamp, rpc::ProcessChangeResult};
use reqwest::Method;
use serde_json::{Value, json};
use test_support::{Request, eventually};

use crate::support::{
    Stack, TEST_TIMEOUT, all_pages, assert_includes, assert_ok, assert_refused, assert_webhook_fields, ids, process_id,
    secret, verify,
};

const ALL: [&str; 6] =
    ["update.succeeded", "update.failed", "lead.state_changed", "lead.disposition_set", "call.started", "call.ended"];

/// A process with the callbacks `crm`, which lists no events, and `all`, which lists every kind.
async fn with_all_kinds(stack: &Stack, all: Value) -> ProcessChangeResult {
    let mut callback = json!({"name": "all", "url": stack.receiver.url("/all"), "events": ALL});
    callback.as_object_mut().expect("an object").extend(all.as_object().cloned().unwrap_or_default());
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}, callback])).await;
    stack.backdate_processes().await;
    applied
}

/// Reports the start of a call, sends an update that fails because of the call, reports the end of the call, and sends
/// an update that moves the lead. Returns the ids of all four.
async fn call_and_move(stack: &Stack, lead: &str) -> [String; 4] {
    let call = async |event: &str| {
        let path = format!("/api/v1/calls/{event}");
        let body = json!({"leadId": lead, "callId": "c-1"});
        let answer = assert_ok(stack.api.ask(Method::POST, &path, &[("prefer", "wait=30")], &body).await);
        answer["updateId"].as_str().expect("an id").to_owned()
    };
    let update = async |body: Value| {
        let id = stack.api.update(body).await;
        stack.api.outcome(&id).await;
        id
    };
    let started = call("started").await;
    let refused = update(json!({"leadId": lead, "name": "Ada"})).await;
    let ended = call("ended").await;
    let moved = update(json!({"leadId": lead, "targetState": "interested", "disposition": "hot", "userId": "u-1"}));
    [started, refused, ended, moved.await]
}

fn webhook_id(request: &Request) -> &str {
    request.header("webhook-id").expect("a webhook-id")
}

#[tokio::test]
async fn each_callback_gets_the_kinds_that_it_names() {
    let stack = Stack::start().await;
    let applied = with_all_kinds(&stack, json!({})).await;
    let process_id = process_id(&applied);
    let lead = stack.api.initiate(process_id, Some("R")).await;

    let [started, refused, ended, moved] = call_and_move(&stack, &lead).await;
    let mut requests = stack.receiver.wait_for_requests("/all", 6, TEST_TIMEOUT).await;
    stack.wait_for_clean_audit().await;

    requests.sort_by_key(|request| webhook_id(request).to_owned());
    let mut expected = vec![
        format!("{started}.call.started"),
        refused.clone(),
        format!("{ended}.call.ended"),
        moved.clone(),
        format!("{moved}.lead.disposition_set"),
        format!("{moved}.lead.state_changed"),
    ];
    expected.sort();
    assert_eq!(requests.iter().map(webhook_id).collect::<Vec<_>>(), expected);
    requests.iter().for_each(|request| verify(request, &secret(&applied.process, "all")));
    let body = |id: &str| requests.iter().find(|request| webhook_id(request) == id).expect("a request").json();
    assert_webhook_fields(&body(&moved));
    let of_lead = json!({
        "updateId": moved, "projectId": stack.api.project_id, "processId": process_id, "leadId": lead,
        "referenceId": "R", "fromState": "new", "toState": "interested", "disposition": "hot", "version": 2,
        "userId": "u-1",
    });
    for kind in ["lead.state_changed", "lead.disposition_set"] {
        let body = body(&format!("{moved}.{kind}"));
        assert_eq!((&body["type"], &body["data"]), (&json!(kind), &of_lead));
        assert!(body["timestamp"].as_str().is_some_and(|at| at.ends_with('Z')), "{body}");
    }
    let of_call = json!({
        "updateId": started, "projectId": stack.api.project_id, "processId": process_id, "leadId": lead,
        "referenceId": "R", "callId": "c-1",
    });
    assert_eq!(body(&format!("{started}.call.started"))["data"], of_call);
    // Without `events`, a callback gets the outcomes of updates.
    let mut of_crm = stack.receiver.requests_to("/crm").iter().map(|r| webhook_id(r).to_owned()).collect::<Vec<_>>();
    of_crm.sort();
    let mut outcomes = vec![refused, moved];
    outcomes.sort();
    assert_eq!(of_crm, outcomes);
}

#[tokio::test]
async fn a_delivery_of_a_kind_is_listed_and_repeated_byte_for_byte() {
    let stack = Stack::start().await;
    let applied = with_all_kinds(&stack, json!({})).await;
    let lead = stack.api.initiate(process_id(&applied), Some("R")).await;
    let [started, .., moved] = call_and_move(&stack, &lead).await;
    stack.receiver.wait_for_requests("/all", 6, TEST_TIMEOUT).await;
    let delivered = eventually(TEST_TIMEOUT, "all are delivered", async || {
        let (found, _) = all_pages(&stack.api, "/api/v1/deliveries?status=delivered&", 7).await;
        if found.len() == 8 { Ok(found) } else { Err(format!("{} are", found.len())) }
    })
    .await;

    for (update, kind) in [(&started, "call.started"), (&moved, "lead.state_changed")] {
        let id = ids(&delivered, "deliveryId").into_iter().find(|id| id.starts_with(update) && id.ends_with(kind));
        let id = id.expect("a delivery of this kind");
        assert_ok(stack.api.post(&format!("/api/v1/deliveries/{id}/redeliver"), &json!({})).await);
        let is_same = |request: &Request| webhook_id(request) == format!("{update}.{kind}");
        let same = eventually(TEST_TIMEOUT, "it is delivered again", async || {
            let same = stack.receiver.requests_to("/all").into_iter().filter(is_same).collect::<Vec<_>>();
            if same.len() == 2 { Ok(same) } else { Err(format!("{} requests", same.len())) }
        });
        let same = same.await;
        assert_eq!(same[0].body, same[1].body);
        let shown = eventually(TEST_TIMEOUT, "both attempts are recorded", async || {
            let shown = assert_ok(stack.api.get(&format!("/api/v1/deliveries/{id}")).await);
            if shown["data"]["attempts"][1].is_object() { Ok(shown) } else { Err(shown.to_string()) }
        });
        assert_includes(&shown.await["data"], json!({"deliveryId": id, "kind": kind, "status": "delivered"}));
    }
    let timeline = assert_ok(stack.api.get(&format!("/api/v1/updates/{moved}")).await);
    let kinds = timeline["data"]["deliveries"].as_array().expect("deliveries").iter().map(|d| d["kind"].clone());
    assert_eq!(kinds.filter(Value::is_null).count(), 2, "{timeline}");
    let text = stack.leadctl(&["update", "watch", &moved]).await.assert_ok().text();
    assert!(text.contains(" lead.state_changed: delivered"), "{text}");
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn one_kind_is_retried_exhausted_and_recovered_alone() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,50ms")]).await;
    let applied = stack.process(json!([
        {"name": "states", "url": stack.receiver.url("/states"), "events": ["lead.state_changed", "update.succeeded"]},
    ]));
    let lead = stack.api.initiate(process_id(&applied.await), None).await;
    stack.backdate_processes().await;
    // A long body is stored separately from its delivery.
    let long = "x".repeat(5000);
    stack.receiver.on("/states", [500]);
    let since = service_kit::clock::now().minus(std::time::Duration::from_secs(1)).to_iso();

    let update = json!({"leadId": lead, "targetState": "interested", "metadata": {"long": long}});
    let update = stack.api.update(update).await;
    let exhausted = eventually(TEST_TIMEOUT, "both are exhausted", async || {
        let (found, _) = all_pages(&stack.api, "/api/v1/deliveries?status=exhausted&", 1).await;
        if found.len() == 2 { Ok(found) } else { Err(format!("{} are", found.len())) }
    })
    .await;
    let event = stack.wait_for_webhook_event("webhooks.evt.*.*.exhausted").await;
    stack.receiver.on("/states", [200]);
    let before = stack.receiver.requests_to("/states").len();
    let recovered = assert_ok(stack.api.post("/api/v1/deliveries/recover", &json!({"since": since})).await);
    let requests = stack.receiver.wait_for_requests("/states", before + 2, TEST_TIMEOUT).await;

    assert_eq!(recovered["data"]["deliveries"], 2);
    assert_eq!(exhausted.iter().filter(|delivery| delivery["kind"] == "lead.state_changed").count(), 1);
    assert_eq!(event["updateId"], json!(update));
    let mut again = requests[before..].iter().map(|r| webhook_id(r).to_owned()).collect::<Vec<_>>();
    again.sort();
    assert_eq!(again, [update.clone(), format!("{update}.lead.state_changed")]);
    let of = |id: &str| requests.iter().find(|r| webhook_id(r) == id).expect("a request").json();
    assert_eq!(of(&update)["data"]["long"], json!(long));
    assert_eq!(of(&format!("{update}.lead.state_changed"))["data"]["toState"], "interested");
    stack.wait_for_clean_audit().await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.payloads", 0).await;
}

#[tokio::test]
async fn an_ordered_callback_gets_the_kinds_of_an_event_one_after_the_other() {
    let stack = Stack::start().await;
    let applied = with_all_kinds(&stack, json!({"ordering": "lead"})).await;
    let lead = stack.api.initiate(process_id(&applied), None).await;

    let [started, refused, ended, moved] = call_and_move(&stack, &lead).await;
    let requests = stack.receiver.wait_for_requests("/all", 6, TEST_TIMEOUT).await;

    let expected = [
        format!("{started}.call.started"),
        refused,
        format!("{ended}.call.ended"),
        moved.clone(),
        format!("{moved}.lead.state_changed"),
        format!("{moved}.lead.disposition_set"),
    ];
    assert_eq!(requests.iter().map(webhook_id).collect::<Vec<_>>(), expected);
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn an_event_that_is_announced_again_makes_the_deliveries_that_are_missing() {
    let stack = Stack::start().await;
    let applied = with_all_kinds(&stack, json!({})).await;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    let [started, .., moved] = call_and_move(&stack, &lead).await;
    stack.receiver.wait_for_requests("/all", 6, TEST_TIMEOUT).await;
    stack.wait_for_clean_audit().await;

    // The audit reports deliveries of a lost kind.
    let lose = "DELETE FROM webhooks.deliveries WHERE kind IN ('lead.state_changed', 'call.started');
        DELETE FROM webhooks.delivery_counts WHERE kind IN ('lead.state_changed', 'call.started')";
    stack.sql(lose).await;
    let (code, report) = stack.audit(&[]).await;
    let undelivered = report["invariants"].as_array().expect("invariants").iter();
    let undelivered = undelivered.filter(|invariant| invariant["count"] != 0).collect::<Vec<_>>();
    assert_eq!((code, undelivered.len()), (1, 1), "{report}");
    let callback = applied.process.callbacks[1].callback_id;
    let mut lost = ids(undelivered[0]["violations"].as_array().expect("violations"), "id");
    lost.sort();
    let mut expected =
        vec![format!("{started}/{callback}/call.started"), format!("{moved}/{callback}/lead.state_changed")];
    expected.sort();
    assert_eq!(lost, expected);

    stack.leadctl(&["recover", "reannounce", "--since", "1h", "--yes"]).await.assert_ok();
    stack.wait_for_clean_audit().await;
    for id in [format!("{started}.call.started"), format!("{moved}.lead.state_changed")] {
        eventually(TEST_TIMEOUT, "the lost delivery is made again", async || {
            let requests = stack.receiver.requests_to("/all");
            let count = requests.iter().filter(|request| webhook_id(request) == id).count();
            if count == 2 { Ok(()) } else { Err(format!("{count} requests of {id}")) }
        })
        .await;
    }
}

#[tokio::test]
async fn delivered_kinds_of_more_updates_than_a_query_may_name_are_sent_again() {
    let stack = Stack::start().await;
    let applied = with_all_kinds(&stack, json!({})).await;
    let since = Timestamp::from_millis(0).to_iso();
    // Each update has three deliveries, so a page of updates has three times as many bodies.
    let updates = 110;
    for _ in 0..updates {
        let lead = stack.api.initiate(process_id(&applied), None).await;
        stack.api.update(json!({"leadId": lead, "targetState": "interested", "disposition": "hot"})).await;
    }
    stack.receiver.wait_for_requests("/all", 3 * updates, TEST_TIMEOUT).await;
    stack.wait_for_clean_audit().await;

    let callback = applied.process.callbacks[1].callback_id;
    let recover = json!({"since": since, "perSecond": 1000, "callbackId": callback, "status": "delivered"});
    let done = assert_ok(stack.api.post("/api/v1/deliveries/recover", &recover).await);

    assert_eq!(done["data"]["deliveries"], 3 * updates, "{done}");
    stack.receiver.wait_for_requests("/all", 6 * updates, TEST_TIMEOUT).await;
}

#[tokio::test]
async fn an_unknown_kind_is_refused_with_the_known_ones() {
    let stack = Stack::start().await;
    let process_id = process_id(&stack.process_calling(&[]).await);
    let body = json!({"name": "crm", "url": stack.receiver.url("/crm"), "events": ["lead.renamed"]});

    let refused = stack.api.post(&format!("/api/v1/processes/{process_id}/callbacks"), &body).await;

    let refused = assert_refused(refused, 400, "invalid_process");
    let message = refused["error"].as_str().or(refused["message"].as_str()).expect("an error").to_owned();
    assert!(message.contains("unknown variant, expected one of `update.succeeded`, `update.failed`"), "{refused}");
}

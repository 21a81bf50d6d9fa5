//! Deliveries are listed, sent again one by one, and recovered in bulk.

use std::time::{Duration, Instant};

use contract::{ObjectId, rpc::ProcessChangeResult};
use reqwest::Method;
use serde_json::{Value, json};
use test_support::eventually;

use crate::support::{
    Stack, TEST_TIMEOUT, UPDATE, all_pages, assert_includes, assert_ok, assert_refused, by_update, ids, process_id,
    secret, send, verify,
};

const RECOVER: &str = "/api/v1/deliveries/recover";

/// Waits until this many deliveries have a status, and returns them.
async fn wait_for(stack: &Stack, status: &str, count: usize) -> Vec<Value> {
    eventually(TEST_TIMEOUT, status, async || {
        let (found, _) = all_pages(&stack.api, &format!("/api/v1/deliveries?status={status}&"), 7).await;
        if found.len() == count { Ok(found) } else { Err(format!("{} {status}", found.len())) }
    })
    .await
}

#[tokio::test]
async fn a_redelivery_repeats_the_request_byte_for_byte() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,50ms,50ms")]).await;
    let applied = stack.process_calling(&["crm"]).await;
    let lead = stack.api.initiate(process_id(&applied), Some("R")).await;
    // The redelivery must not change digits and white space.
    let body = format!(r#"{{"leadId":"{lead}","metadata":{{"n": 100000000000000000000000000001.50, "t":"ä\n" }}}}"#);
    let answer = assert_ok(send(stack.api.request(Method::POST, UPDATE).body(body)).await);
    let delivered = wait_for(&stack, "delivered", 1).await;
    let delivery = delivered[0]["deliveryId"].as_str().expect("an id");
    let path = format!("/api/v1/deliveries/{delivery}");

    // Redelivers after a success, while the endpoint is down for longer than the schedule, and with leadctl.
    let again = assert_ok(stack.api.post(&format!("{path}/redeliver"), &json!({})).await);
    assert_eq!(again["data"]["status"], "pending");
    stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    wait_for(&stack, "delivered", 1).await;
    stack.receiver.on("/crm", [500, 500, 500, 200]);
    assert_ok(stack.api.post(&format!("{path}/redeliver"), &json!({})).await);
    wait_for(&stack, "exhausted", 1).await;
    stack.leadctl_of_project(&["deliveries", "redeliver", delivery]).await.assert_ok();
    wait_for(&stack, "delivered", 1).await;

    let requests = stack.receiver.requests_to("/crm");
    assert_eq!(requests.len(), 6);
    for request in &requests {
        assert_eq!(request.body, requests[0].body);
        assert_eq!(request.header("webhook-id"), answer["updateId"].as_str());
        assert_eq!(request.header("traceparent"), requests[0].header("traceparent"));
        verify(request, &secret(&applied.process, "crm"));
    }
    let (_, shown) = stack.api.get(&path).await;
    let codes = shown["data"]["attempts"].as_array().expect("attempts").iter().map(|a| a["statusCode"].clone());
    assert_eq!(codes.collect::<Vec<_>>(), [200, 200, 500, 500, 500, 200].map(|code| json!(code)));
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_redelivery_is_refused_for_an_unknown_delivery_and_a_removed_callback() {
    let stack = Stack::start().await;
    let lead = stack.lead(&["crm"]).await;
    let update = stack.api.update(json!({"leadId": lead, "name": "x"})).await;
    let delivery = wait_for(&stack, "delivered", 1).await[0]["deliveryId"].as_str().expect("an id").to_owned();
    let unknown = format!("{update}-{}", ObjectId::from_bytes([1; 12]));
    let path = |id: &str| format!("/api/v1/deliveries/{id}/redeliver");

    stack.process(json!([])).await;

    assert_refused(stack.api.post(&path(&unknown), &json!({})).await, 404, "delivery_not_found");
    eventually(TEST_TIMEOUT, "the notifier has removed the callback", async || {
        let (status, answer) = stack.api.post(&path(&delivery), &json!({})).await;
        if (status, &answer["code"]) == (409, &json!("callback_gone")) { Ok(()) } else { Err(answer.to_string()) }
    })
    .await;
}

/// A stack where 20 updates of two leads were delivered to `/crm` and are exhausted at `/dead`.
async fn with_exhausted_deliveries() -> (Stack, ProcessChangeResult, [String; 2], String) {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s")]).await;
    let applied = stack.process_calling(&["dead", "crm"]).await;
    let process_id = process_id(&applied);
    let leads = [stack.api.initiate(process_id, None).await, stack.api.initiate(process_id, None).await];
    stack.receiver.on("/dead", [400]);
    let since = service_kit::clock::now().minus(Duration::from_secs(1)).to_iso();
    for number in 0..20 {
        stack.api.update(json!({"leadId": leads[number % 2], "metadata": {"n": number}})).await;
    }
    wait_for(&stack, "exhausted", 20).await;
    wait_for(&stack, "delivered", 20).await;
    (stack, applied, leads, since)
}

#[tokio::test]
async fn deliveries_are_found_by_each_filter() {
    let (stack, applied, [lead, other], since) = with_exhausted_deliveries().await;
    let process = process_id(&applied);
    let dead = applied.process.callbacks[0].callback_id.to_string();
    let (of_lead, _) = all_pages(&stack.api, &format!("/api/v1/deliveries?leadId={lead}&status=exhausted&"), 7).await;
    assert!(of_lead.iter().all(|delivery| delivery["callbackId"] == json!(dead)));
    let update = &ids(&of_lead, "updateId")[0];

    for (query, count) in [
        (String::new(), 40),
        (format!("leadId={lead}&"), 20),
        (format!("leadId={lead}&status=exhausted&"), 10),
        (format!("updateId={update}&"), 2),
        (format!("updateId={update}&leadId={lead}&callbackId={dead}&"), 1),
        (format!("updateId={update}&leadId={other}&"), 0),
        (format!("callbackId={dead}&status=delivered&"), 0),
        ("since=2100-01-01T00:00:00Z&".into(), 0),
        ("until=2100-01-01T00:00:00Z&".into(), 40),
        ("until=2026-01-01T00:00:00Z&".into(), 0),
        ("status=exhausted&until=2026-01-01T00:00:00Z&".into(), 0),
        (format!("status=exhausted&since={since}&until=2100-01-01T00:00:00Z&"), 20),
        (format!("updateId={update}&until=2026-01-01T00:00:00Z&"), 0),
        (format!("processId={process}&"), 40),
        (format!("processId={dead}&"), 0),
        ("statusCode=400&".into(), 20),
        ("statusCode=200&".into(), 20),
        ("status=exhausted&statusCode=400&".into(), 20),
        ("status=exhausted&statusCode=200&".into(), 0),
        ("error=answered%20400&".into(), 20),
        ("status=exhausted&error=timed%20out&".into(), 0),
    ] {
        let (found, _) = all_pages(&stack.api, &format!("/api/v1/deliveries?{query}"), 3).await;
        assert_eq!(found.len(), count, "{query}");
        let mut distinct = ids(&found, "deliveryId");
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), count, "{query}");
    }
    let list = [
        "deliveries",
        "list",
        "--status-code",
        "400",
        "--error",
        "answered",
        "--process",
        &process.to_string(),
        "--json",
    ];
    let listed = stack.leadctl_of_project(&list).await.assert_ok().json_lines();
    assert!(listed.len() == 20 && listed.iter().all(|delivery| delivery["statusCode"] == 400), "{listed:?}");
}

#[tokio::test]
async fn exhausted_deliveries_are_recovered_at_the_given_pace() {
    let (stack, applied, _, since) = with_exhausted_deliveries().await;
    let dead = applied.process.callbacks[0].callback_id.to_string();

    // Neither a dry run nor a request with a misspelt field sends anything.
    let dry = json!({"since": since, "perSecond": 10, "dryRun": true});
    assert_includes(&stack.api.post(RECOVER, &dry).await.1, json!({"data": {"deliveries": 20}}));
    let misspelt = json!({"since": since, "perSecond": 10, "callback": dead});
    assert_refused(stack.api.post(RECOVER, &misspelt).await, 400, "invalid_field");
    let dry = ["deliveries", "recover", "--since", &since, "--dry-run", "--json"];
    assert_eq!(stack.leadctl_of_project(&dry).await.json()["deliveries"], 20);
    assert_eq!(stack.receiver.requests_to("/dead").len(), 20);

    stack.receiver.on("/dead", [200]);
    let recover = json!({"since": since, "perSecond": 10, "callbackId": dead});
    let begun = Instant::now();
    let done = assert_ok(stack.api.post(RECOVER, &recover).await);

    assert_eq!((&done["data"]["deliveries"], &done["data"]["next"]), (&json!(20), &Value::Null), "{done}");
    let requests = stack.receiver.wait_for_requests("/dead", 40, TEST_TIMEOUT).await;
    let took = requests[39].received_at.duration_since(begun);
    assert!(took >= Duration::from_millis(1200), "ten a second, less a poll of half a second: {took:?}");
    wait_for(&stack, "delivered", 40).await;
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn delivered_deliveries_are_sent_again_to_a_receiver_that_lost_them() {
    let (stack, applied, _, since) = with_exhausted_deliveries().await;
    let crm = applied.process.callbacks[1].callback_id;

    let recover = json!({"since": since, "perSecond": 1000, "callbackId": crm, "status": "delivered"});
    let done = assert_ok(stack.api.post(RECOVER, &recover).await);

    assert_eq!(done["data"]["deliveries"], 20, "{done}");
    let requests = stack.receiver.wait_for_requests("/crm", 40, TEST_TIMEOUT).await;
    let bodies = by_update(&requests);
    assert!(bodies.values().all(|bodies| bodies.len() == 2 && bodies[0] == bodies[1]), "{bodies:?}");
    wait_for(&stack, "delivered", 20).await;
}

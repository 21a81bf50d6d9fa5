//! What a request can ask for beyond the vendor's API: a lead as the client saw it, what would be,
//! the outcome in the answer.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use test_support::eventually;

use crate::stack::{Api, CALL_IN_PROGRESS, SOON, Stack, by_update};

const UPDATE: &str = "/api/v1/leads/update";

/// Posts with these headers; status, headers and body of the answer.
async fn post(api: &Api, headers: &[(&str, &str)], body: &Value) -> (u16, reqwest::header::HeaderMap, Value) {
    let mut request = api.http.post(format!("{}{UPDATE}", api.url)).bearer_auth(&api.key);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = request.body(body.to_string()).send().await.expect("an answer");
    let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
    (status, headers, serde_json::from_slice(&answer.bytes().await.expect("a body")).expect("JSON"))
}

/// A lead's entity tag.
async fn etag(api: &Api, lead_id: &str) -> String {
    let request = api.http.get(format!("{}/api/v1/leads/get?leadId={lead_id}", api.url)).bearer_auth(&api.key);
    let answer = request.send().await.expect("an answer");
    answer.headers()["etag"].to_str().expect("text").to_owned()
}

#[tokio::test]
async fn an_update_is_for_the_lead_as_the_client_saw_it() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let lead_id = &stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let seen = etag(&stack.api, lead_id).await;
    assert_eq!(seen, "\"1\"");
    let of =
        |answer: &(u16, reqwest::header::HeaderMap, Value)| answer.2["updateId"].as_str().expect("an id").to_owned();

    // Two clients saw the same version: one of them wins.
    let first =
        post(&stack.api, &[("if-match", &seen)], &json!({"leadId": lead_id, "targetState": "interested"})).await;
    assert_eq!(stack.api.outcome(&of(&first)).await["status"], "succeeded");
    let second = post(&stack.api, &[("if-match", &seen)], &json!({"leadId": lead_id, "name": "Eve"})).await;
    let story = stack.api.outcome(&of(&second)).await;
    assert_eq!((&story["status"], &story["errorCode"]), (&json!("failed"), &json!("version_mismatch")), "{story}");
    assert_eq!(story["outcome"]["error"], "Lead is at version 2, not at the expected version 1");
    assert_eq!(etag(&stack.api, lead_id).await, "\"2\"");

    let by_state = json!({"leadId": lead_id, "name": "Eve", "expectedState": "new"});
    let story = stack.api.outcome(&of(&post(&stack.api, &[], &by_state).await)).await;
    assert_eq!((&story["status"], &story["errorCode"]), (&json!("failed"), &json!("state_mismatch")), "{story}");
    assert_eq!(story["outcome"]["error"], "Lead is in the state \"interested\", not in the expected state \"new\"");
    let both = json!({"leadId": lead_id, "name": "Eve", "expectedState": "interested", "expectedVersion": 2});
    let story = stack.api.outcome(&of(&post(&stack.api, &[], &both).await)).await;
    assert_eq!((&story["status"], &story["version"]), (&json!("succeeded"), &json!(3)), "{story}");

    // What cannot be compared is refused, and the same key with another expectation is another request.
    let (status, _, refused) = post(&stack.api, &[("if-match", "3")], &both).await;
    assert_eq!((status, &refused["code"]), (400, &json!("invalid_field")), "{refused}");
    let rename = json!({"leadId": lead_id, "name": "Ada"});
    let keyed = async |version| post(&stack.api, &[("idempotency-key", "k"), ("if-match", version)], &rename).await;
    let first = keyed("\"3\"").await;
    assert_eq!(of(&keyed("\"3\"").await), of(&first));
    let (status, _, refused) = keyed("\"4\"").await;
    assert_eq!((status, &refused["code"]), (422, &json!("idempotency_key_reused")), "{refused}");
    assert_eq!(stack.api.outcome(&of(&first)).await["status"], "succeeded");
}

#[tokio::test]
async fn a_dry_run_says_what_would_be_and_leaves_no_trace() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let process_id = applied.process.process_id.expect("an id");
    let lead_id = stack.api.initiate(process_id, Some("R")).await;
    let dry = async |body: Value| {
        let mut body = body;
        body["dryRun"] = json!(true);
        let (status, _, answer) = post(&stack.api, &[("idempotency-key", "k")], &body).await;
        assert_eq!((status, &answer["dryRun"]), (200, &json!(true)), "{answer}");
        assert!(answer.get("updateId").is_none(), "{answer}");
        answer["outcome"].clone()
    };
    let change = json!({
        "referenceId": "R", "projectId": stack.api.project_id, "processId": process_id, "targetState": "interested",
        "metadata": {"n": 1.5},
    });
    let would_be = json!({
        "success": true, "error": null, "errorCode": null, "leadId": lead_id, "referenceId": "R", "fromState": "new",
        "toState": "interested", "version": 2, "data": {"source": "import", "n": 1.5},
    });
    assert_eq!(dry(change.clone()).await, would_be);
    let refused = dry(json!({"leadId": lead_id, "targetState": "nowhere"})).await;
    assert_eq!((&refused["success"], &refused["errorCode"]), (&json!(false), &json!("unknown_state")), "{refused}");
    let stranger = dry(json!({"leadId": "00000000000000000000dead", "name": "Ada"})).await;
    assert_eq!(
        (&stranger["errorCode"], &stranger["fromState"]),
        (&json!("lead_not_found"), &Value::Null),
        "{stranger}"
    );

    // Nothing was logged, applied or told, and the idempotency key is still free. What was said would be, is.
    let js = service_kit::nats::jetstream(&stack.client);
    let log = js.get_stream(contract::streams::LEAD_COMMANDS).await.expect("the log");
    assert_eq!(log.cached_info().state.last_sequence, 0);
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates").await, 0);
    assert_eq!(etag(&stack.api, &lead_id).await, "\"1\"");
    let (status, headers, made) = post(&stack.api, &[("idempotency-key", "k")], &change).await;
    assert_eq!((status, headers.get("idempotent-replayed")), (200, None), "{made}");
    let story = stack.api.outcome(made["updateId"].as_str().expect("an id")).await;
    assert_eq!(story["outcome"]["data"], would_be["data"]);
    assert_eq!(
        (&story["fromState"], &story["toState"], &story["version"]),
        (&json!("new"), &json!("interested"), &json!(2))
    );
    assert_eq!(stack.receiver.wait_for_requests("/crm", 1, SOON).await.len(), 1);
}

#[tokio::test]
async fn an_answer_waits_for_the_outcome() {
    let mut stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let api = stack.api.clone();
    let lead_id = &api.initiate(applied.process.process_id.expect("an id"), Some("R")).await;
    let wait = async |key: &str, seconds: u32, body: Value| {
        let begun = Instant::now();
        let preference = format!("respond-async, wait={seconds}");
        let headers = [("prefer", preference.as_str()), ("idempotency-key", key)];
        let (status, headers, answer) = post(&api, &headers, &body).await;
        assert_eq!((status, &answer["success"]), (200, &json!(true)), "{answer}");
        let applied = headers.get("preference-applied").map(|value| value.to_str().expect("text").to_owned());
        (answer, applied, begun.elapsed())
    };

    // Of many who wait at once, each hears of its own; and hears the same when it asks again, long after.
    for _ in 0..2 {
        let many = (0..50).map(async |n| {
            let body = json!({"leadId": lead_id, "metadata": {format!("k{n}"): n}});
            (n, wait(&format!("many-{n}"), 30, body).await)
        });
        for (n, (answer, applied, took)) in futures::future::join_all(many).await {
            assert_eq!(applied.as_deref(), Some("wait=30"), "{answer}");
            let outcome = &answer["outcome"];
            assert_eq!((&outcome["updateId"], &outcome["success"]), (&answer["updateId"], &json!(true)), "{answer}");
            assert_eq!(outcome["data"][format!("k{n}")], n, "{answer}");
            assert!(took < Duration::from_secs(10), "{took:?}");
        }
        stack.receiver.wait_for_requests("/crm", 50, SOON).await;
    }
    // It is what the webhook says.
    let (answer, ..) = wait("many-7", 30, json!({"leadId": lead_id, "metadata": {"k7": 7}})).await;
    let webhooks = by_update(&stack.receiver.requests_to("/crm"));
    assert_eq!(webhooks[answer["updateId"].as_str().expect("an id")], [answer["outcome"].clone()]);

    // A failure is an outcome, too.
    stack.publish(format!("leads.cmd.{}.call.started", api.project_id), json!({"leadId": lead_id}).to_string()).await;
    let (answer, ..) = wait("refused", 30, json!({"leadId": lead_id, "name": "Eve"})).await;
    assert_eq!((&answer["outcome"]["success"], &answer["outcome"]["error"]), (&json!(false), &json!(CALL_IN_PROGRESS)));

    // Nobody decides: the plain answer when time is up, and at once when the gateway stops.
    stack.lead_state.terminate().await;
    let js = service_kit::nats::jetstream(&stack.client);
    let log = js.get_stream(contract::streams::LEAD_COMMANDS).await.expect("the log");
    let logged = log.cached_info().state.last_sequence;
    let (answer, applied, took) = wait("late", 1, json!({"leadId": lead_id, "name": "Eve"})).await;
    assert!(answer["updateId"].is_string() && answer.get("outcome").is_none() && applied.is_none(), "{answer}");
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(10), "{took:?}");
    let stopping = async {
        eventually(SOON, "the update is logged", async || {
            let last = log.get_info().await.expect("its state").state.last_sequence;
            if last == logged + 2 { Ok(()) } else { Err(last) }
        })
        .await;
        stack.gateway.terminate().await;
    };
    let (plain, _) = tokio::join!(wait("stopped", 30, json!({"leadId": lead_id, "name": "Eve"})), stopping);
    assert!(plain.0["updateId"].is_string() && plain.1.is_none() && plain.2 < Duration::from_secs(10), "{plain:?}");
}

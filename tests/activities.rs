//! Activities: the result of a call is recorded once, moves the lead by the rules of an update, and reaches callbacks.

use contract::Timestamp;
use reqwest::Method;
use serde_json::{Value, json};
use test_support::eventually;

use crate::support::{
    CALL_IN_PROGRESS, Stack, TEST_TIMEOUT, assert_includes, assert_ok, assert_refused, assert_webhook_fields,
    process_id, secret, send, verify,
};

const STARTED: &str = "/api/v1/calls/started";
const ENDED: &str = "/api/v1/calls/ended";
const WAIT: (&str, &str) = ("prefer", "wait=30");

/// Reports a call event, waits for its outcome, and returns its id.
async fn report(stack: &Stack, path: &str, body: Value) -> String {
    let answer = assert_ok(stack.api.ask(Method::POST, path, &[WAIT], &body).await);
    assert_eq!(answer["outcome"]["success"], true, "{answer}");
    answer["updateId"].as_str().expect("an id").to_owned()
}

async fn activity(stack: &Stack, id: &str) -> Value {
    assert_ok(stack.api.get(&format!("/api/v1/activities/{id}")).await)["data"].clone()
}

#[tokio::test]
async fn a_customer_can_use_http_only() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([
        {"name": "outcomes", "url": stack.receiver.url("/outcomes")},
        {"name": "states", "url": stack.receiver.url("/states"), "events": ["lead.state_changed"]},
        {"name": "calls", "url": stack.receiver.url("/calls"), "events": ["activity.completed"]},
    ]));
    let applied = applied.await;
    let lead = stack.api.initiate(process_id(&applied), Some("AB123456789")).await;
    stack.backdate_processes().await;
    let result = json!({
        "status": "completed", "connected": true, "disposition": "wants a test drive", "summary": "Likes the Camry.",
        "analysis": {"score": 0.9, "dispositionType": "positive"}, "recordingUrl": "https://calls.example/7.mp3",
        "durationSeconds": 94, "metadata": {"agent": "a-1"},
    });

    report(&stack, STARTED, json!({"leadId": lead, "callId": "call-7", "timeoutSeconds": 600})).await;
    let refused = stack.api.update_and_wait(json!({"leadId": lead, "name": "Ada"})).await;
    let ended = json!({"leadId": lead, "callId": "call-7", "toState": "interested", "result": result});
    let ended = report(&stack, ENDED, ended).await;

    assert_eq!(refused["outcome"]["error"], CALL_IN_PROGRESS);
    let request = async |path: &str| {
        let requests = stack.receiver.wait_for_requests(&format!("/{path}"), 1, TEST_TIMEOUT).await;
        verify(&requests[0], &secret(&applied.process, path));
        requests[0].clone()
    };
    let of_update = request("outcomes").await;
    assert_webhook_fields(&of_update.json());
    assert_includes(&of_update.json(), json!({"success": false, "error": CALL_IN_PROGRESS}));
    let of_state = request("states").await;
    assert_eq!(of_state.header("webhook-id"), Some(&*format!("{ended}.lead.state_changed")));
    let moved = json!({"updateId": ended, "fromState": "new", "toState": "interested", "version": 2,
        "disposition": "wants a test drive"});
    assert_includes(&of_state.json()["data"], moved);
    let of_call = request("calls").await;
    assert_eq!(of_call.header("webhook-id"), Some(&*format!("{ended}.activity.completed")));
    assert_includes(&of_call.json(), json!({"action_type": "update", "activityId": ended, "leadId": lead}));
    let analysis = json!({
        "success": null, "disposition": "wants a test drive", "dispositionType": "positive",
        "summary": "Likes the Camry.", "recordingUrl": "https://calls.example/7.mp3", "transcriptUrl": null,
        "durationSeconds": 94, "score": 0.9,
    });
    assert_eq!(of_call.json()["activity"]["result"]["analysis"], analysis);
    assert_includes(&stack.api.lead(&lead).await, json!({"currentState": "interested"}));
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn an_activity_is_read_by_the_id_of_its_call_and_shown_with_its_lead() {
    let stack = Stack::start().await;
    let lead = stack.lead(&[]).await;
    let body = format!(
        r#"{{"leadId":"{lead}","callId":"c-1","result":{{"status":"no-answer","connected":false,"metadata":{{"n": 1.50}}}}}}"#
    );
    let key = [WAIT, ("idempotency-key", "c-1-ended"), ("content-type", "application/json")];

    let mut ids = Vec::new();
    for _ in 0..2 {
        let request = stack.api.request(Method::POST, ENDED);
        let request = key.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        ids.push(assert_ok(send(request.body(body.clone())).await)["updateId"].as_str().expect("an id").to_owned());
    }
    let without = report(&stack, ENDED, json!({"leadId": lead})).await;

    assert_eq!(ids[0], ids[1]);
    let shown = activity(&stack, &ids[0]).await;
    let expected = json!({
        "activityId": ids[0], "type": "call", "leadId": lead, "callId": "c-1", "fromState": "new", "toState": "new",
        "version": null, "warnings": [],
    });
    assert_includes(&shown, expected);
    assert_eq!(shown["result"], json!({"status": "no-answer", "connected": false, "metadata": {"n": 1.5}}));
    let text =
        stack.api.request(Method::GET, &format!("/api/v1/activities/{}", ids[0])).send().await.expect("a response");
    assert!(text.text().await.expect("a body").contains(r#"{"n": 1.50}"#), "digits are kept");
    let activities = stack.api.lead(&lead).await["activities"].clone();
    assert_includes(&activities[1], json!({"updateId": ids[0], "result": {"status": "no-answer", "connected": false}}));
    assert_eq!(activities[0]["result"], Value::Null);
    for unknown in [&without, &"f".repeat(24)] {
        let response = stack.api.get(&format!("/api/v1/activities/{unknown}")).await;
        assert_refused(response, 404, "activity_not_found");
    }
    let text = stack.leadctl_of_project(&["lead", "get", &lead]).await.assert_ok().text();
    assert!(text.contains("call.ended succeeded: no-answer, not connected"), "{text}");
}

#[tokio::test]
async fn the_end_of_a_call_moves_its_lead_by_the_rules_of_an_update() {
    let stack = Stack::start().await;
    let lead = stack.lead(&["crm"]).await;
    let end = async |call: &str, to_state: &str| {
        let result = json!({"disposition": "hot"});
        let id =
            report(&stack, ENDED, json!({"leadId": lead, "callId": call, "toState": to_state, "result": result})).await;
        activity(&stack, &id).await
    };

    report(&stack, STARTED, json!({"leadId": lead, "callId": "other"})).await;
    let during = end("c-1", "interested").await;
    let moved = end("other", "interested").await;
    let unknown = end("c-1", "nowhere").await;
    let lost = end("c-1", "lost").await;
    let terminal = end("c-1", "new").await;

    let warning = |text: &str| json!([format!("toState was ignored: {text}")]);
    assert_includes(&during, json!({"toState": "new", "version": null, "warnings": warning(CALL_IN_PROGRESS)}));
    assert_includes(&moved, json!({"fromState": "new", "toState": "interested", "version": 2, "warnings": []}));
    let fault = "targetState \"nowhere\" is not a state of the lead's process";
    assert_includes(&unknown, json!({"toState": "interested", "version": null, "warnings": warning(fault)}));
    assert_includes(&lost, json!({"toState": "lost", "version": 3}));
    let fault = "Lead is in the terminal state \"lost\" and cannot be moved to \"new\"";
    assert_includes(&terminal, json!({"toState": "lost", "warnings": warning(fault)}));
    let after = stack.api.update_and_wait(json!({"leadId": lead, "name": "Ada"})).await;
    assert_includes(&after, json!({"status": "succeeded", "version": 4}));
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn calls_with_a_result_are_counted_by_what_they_brought() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    let lead = stack.api.initiate(process_id(&applied), Some("L-1")).await;
    let other = stack.api.initiate(process_id(&applied), Some("L-2")).await;
    let end = async |lead: &str, to_state: Option<&str>, result: Value| {
        let mut body = json!({"leadId": lead, "callId": "c", "result": result});
        body["toState"] = json!(to_state);
        report(&stack, ENDED, body).await
    };
    let begin = Timestamp::from(std::time::SystemTime::now()).millis() / 1000 * 1000;

    end(&lead, None, json!({"connected": false, "status": "busy", "disposition": "busy"})).await;
    end(&lead, None, json!({"connected": true})).await;
    end(&lead, Some("interested"), json!({"connected": true, "direction": "outgoing"})).await;
    end(&other, None, json!({"connected": true, "direction": "incoming", "analysis": {"disposition": "hot"}})).await;
    let last = end(&other, None, json!({"direction": "incoming"})).await;
    report(&stack, ENDED, json!({"leadId": lead, "callId": "without a result"})).await;

    let path = "/api/v1/analytics/customer/stats";
    let end = begin + 86_400_000;
    let mut request = json!({"start": begin, "end": end, "includeUniqueLeads": true, "timezoneOffsetMinutes": 330});
    let counted = assert_ok(stack.api.post(path, &request).await)["data"].clone();
    let today = |offset: i64| Timestamp::from_millis(begin + offset * 60_000).to_iso()[..10].to_owned();
    let expected = json!({
        "attempts": 3, "connected": 3, "incoming": 2, "meaningfullyHandled": 2,
        "interested": {"total": 1, "data": [{"date": counted["interested"]["data"][0]["date"], "count": 1}]},
        "unique": {"attempts": 1, "connected": 2, "incoming": 1, "meaningfullyHandled": 2, "interested": 1},
    });
    assert_eq!(counted, expected);
    let date = counted["interested"]["data"][0]["date"].as_str().expect("a date");
    assert!([today(330), today(331)].iter().any(|day| day == date), "{date}");

    request["processId"] = json!("f".repeat(24));
    let none = json!({"attempts": 0, "connected": 0, "incoming": 0, "meaningfullyHandled": 0,
        "interested": {"total": 0, "data": []},
        "unique": {"attempts": 0, "connected": 0, "incoming": 0, "meaningfullyHandled": 0, "interested": 0}});
    assert_eq!(assert_ok(stack.api.post(path, &request).await)["data"], none);
    let of_group = json!({"start": begin, "end": end, "groupId": "spring"});
    assert_includes(&assert_ok(stack.api.post(path, &of_group).await)["data"], json!({"attempts": 0, "unique": null}));
    let later = json!({"start": end, "end": end + 1});
    assert_includes(&assert_ok(stack.api.post(path, &later).await)["data"], json!({"incoming": 0}));

    let project = stack.api.project_id.to_string();
    let table = stack.leadctl(&["call", "count", "--project", &project, "--unique-leads"]).await.assert_ok();
    assert!(table.stdout.contains("leads  1"), "{}", table.stdout);
    let shown = activity(&stack, &last).await;
    assert_eq!(shown["result"], json!({"direction": "incoming"}));
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_result_of_240_kib_passes_every_way_in_and_a_longer_one_none() {
    let stack = Stack::start().await;
    let applied = stack
        .process(json!([{"name": "calls", "url": stack.receiver.url("/calls"), "events": ["activity.completed"]}]))
        .await;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    let result = |bytes: usize| json!({"summary": "x".repeat(bytes - r#"{"summary":""}"#.len())});
    let body = |bytes: usize| json!({"leadId": lead, "result": result(bytes)});
    let (fits, exceeds) = (body(240 << 10), body((240 << 10) + 1));

    let over_http = report(&stack, ENDED, fits.clone()).await;
    assert_refused(stack.api.post(ENDED, &exceeds).await, 400, "invalid_field");
    let bulk =
        stack.api.request(Method::POST, "/api/v1/calls/ended/bulk").header("content-type", "application/x-ndjson");
    let bulk =
        bulk.body(format!("{fits}\n{exceeds}\n")).send().await.expect("a response").text().await.expect("a body");
    let codes: Vec<Value> =
        bulk.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")["code"].clone()).collect();
    stack.publish_call("ended", &fits).await;
    stack.publish_call("ended", &exceeds).await;

    assert_eq!(codes, [Value::Null, json!("invalid_field")]);
    let requests = stack.receiver.wait_for_requests("/calls", 3, TEST_TIMEOUT).await;
    assert!(requests.iter().all(|request| request.body.len() > 240 << 10));
    assert_eq!(activity(&stack, &over_http).await["result"], fits["result"]);
    eventually(TEST_TIMEOUT, "the longer one in the log is a dead letter", async || match stack.dead_letters().await {
        1 => Ok(()),
        letters => Err(format!("{letters} dead letters")),
    })
    .await;
    stack.wait_for_clean_audit().await;
}

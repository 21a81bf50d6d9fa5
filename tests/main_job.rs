//! The main job: an update goes in, the lead changes, the webhook comes out.

use contract::{ObjectId, process::Process};
use serde_json::{Value, json};
use test_support::Request;

use crate::stack::{CALL_IN_PROGRESS, SOON, Stack, verify};

/// Exactly the seed's eight fields, with its types.
fn assert_shape(body: &Value) {
    let fields: Vec<_> = body.as_object().expect("an object").keys().map(String::as_str).collect();
    let mut expected = ["action_type", "updateId", "success", "error", "leadId", "referenceId", "timestamp", "data"];
    expected.sort_unstable();
    assert_eq!(fields, expected);
    assert_eq!(body["action_type"], "update");
    assert!(body["updateId"].as_str().expect("a string").parse::<ObjectId>().is_ok());
    assert!(body["success"].is_boolean());
    let millis = body["timestamp"].as_i64().expect("a number");
    assert!((1_700_000_000_000..10_000_000_000_000).contains(&millis), "{millis} are not milliseconds");
}

fn secret(process: &Process, name: &str) -> String {
    let callback = process.callbacks.iter().find(|callback| callback.name == name).expect(name);
    callback.secrets[0].expose().to_owned()
}

#[tokio::test]
async fn an_update_changes_the_lead_and_reaches_every_callback() {
    main_job(&Stack::start().await).await;
}

/// The main job from end to end: whatever else a stack is like, this must work.
pub(crate) async fn main_job(stack: &Stack) {
    let applied = stack
        .process(json!([
            {"name": "crm", "url": stack.receiver.url("/crm"), "auth": {"type": "bearer", "token": "t0ken"}},
            {"name": "analytics", "url": stack.receiver.url("/analytics"),
             "auth": {"type": "header", "name": "X-Api-Key", "value": "k3y"}},
        ]))
        .await;
    let process_id = applied.process.process_id.expect("an id");
    let lead_id = stack.api.initiate(process_id, Some("AB123456789")).await;

    let update_id = stack
        .api
        .update(json!({
            "referenceId": "AB123456789", "projectId": stack.api.project_id, "processId": process_id,
            "make": "Toyota", "model": "Camry", "targetState": "interested", "disposition": "hot", "userId": "u-7",
        }))
        .await;

    let story = stack.api.outcome(&update_id).await;
    assert_eq!(
        (&story["status"], &story["fromState"], &story["toState"]),
        (&json!("succeeded"), &json!("new"), &json!("interested"))
    );
    assert_eq!(story["userId"], "u-7");

    for (path, name) in [("/crm", "crm"), ("/analytics", "analytics")] {
        let request = &stack.receiver.wait_for_requests(path, 1, SOON).await[0];
        verify(request, &secret(&applied.process, name));
        let body = request.json();
        assert_shape(&body);
        assert_eq!(
            body,
            json!({
                "action_type": "update", "updateId": update_id, "success": true, "error": null, "leadId": lead_id,
                "referenceId": "AB123456789", "timestamp": body["timestamp"],
                "data": {"source": "import", "make": "Toyota", "model": "Camry"},
            })
        );
        // The order of the seed's fields, and the lead's own order of keys.
        let text = std::str::from_utf8(&request.body).expect("UTF-8");
        assert!(text.starts_with(r#"{"action_type":"update","updateId":""#), "{text}");
        assert!(text.ends_with(r#""data":{"source":"import","make":"Toyota","model":"Camry"}}"#), "{text}");
        assert_eq!(request.method, "POST");
        assert_eq!(request.header("content-type"), Some("application/json"));
        assert_eq!(request.header("webhook-id"), Some(update_id.as_str()));
        assert!(request.header("user-agent").is_some_and(|agent| agent.starts_with("Leadrelay/")));
        assert!(request.header("traceparent").is_some_and(contract::trace::is_traceparent));
    }
    let header = |requests: &[Request], name| requests[0].header(name).map(str::to_owned);
    assert_eq!(header(&stack.receiver.requests_to("/crm"), "authorization").as_deref(), Some("Bearer t0ken"));
    assert_eq!(header(&stack.receiver.requests_to("/analytics"), "x-api-key").as_deref(), Some("k3y"));

    let (status, lead) = stack.api.get(&format!("/api/v1/leads/get?leadId={lead_id}")).await;
    assert_eq!(status, 200);
    let lead = &lead["data"];
    assert_eq!((&lead["currentState"], &lead["lastDisposition"]), (&json!("interested"), &json!("hot")));
    assert_eq!(lead["metadata"], json!({"source": "import", "make": "Toyota", "model": "Camry"}));
    assert_eq!(lead["activities"].as_array().map(Vec::len), Some(1));

    // One id tells the story down to each attempt.
    let story = test_support::eventually(SOON, "both deliveries are in the story", async || {
        let story = stack.api.outcome(&update_id).await;
        let delivered = |delivery: &&Value| delivery["status"] == "delivered";
        let count = story["deliveries"].as_array().map_or(0, |all| all.iter().filter(delivered).count());
        if count == 2 { Ok(story) } else { Err(story.to_string()) }
    })
    .await;
    for delivery in story["deliveries"].as_array().expect("a list") {
        assert_eq!(delivery["attempts"][0]["statusCode"], 200);
    }
}

#[tokio::test]
async fn an_update_during_a_call_fails_with_the_seeds_words() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let process_id = applied.process.process_id.expect("an id");
    let lead_id = stack.api.initiate(process_id, Some("AB123456789")).await;
    let subject = |what: &str| format!("leads.cmd.{}.call.{what}", stack.api.project_id);

    // A plain client, no headers, no ack awaited.
    stack.publish(subject("started"), json!({"leadId": lead_id}).to_string()).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.active_calls", 1, SOON).await;
    let update_id =
        stack.api.update(json!({"leadId": lead_id, "metadata": {"make": "Toyota"}, "targetState": "lost"})).await;

    let request = &stack.receiver.wait_for_requests("/crm", 1, SOON).await[0];
    verify(request, &secret(&applied.process, "crm"));
    let body = request.json();
    assert_shape(&body);
    assert_eq!(
        body,
        json!({
            "action_type": "update", "updateId": update_id, "success": false, "error": CALL_IN_PROGRESS,
            "leadId": lead_id, "referenceId": "AB123456789", "timestamp": body["timestamp"], "data": null,
        })
    );
    let (_, lead) = stack.api.get(&format!("/api/v1/leads/get?leadId={lead_id}")).await;
    assert_eq!(
        (&lead["data"]["currentState"], &lead["data"]["metadata"]),
        (&json!("new"), &json!({"source": "import"}))
    );

    stack.publish(subject("ended"), json!({"referenceId": "AB123456789", "processId": process_id}).to_string()).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.active_calls", 0, SOON).await;
    let update_id = stack.api.update(json!({"leadId": lead_id, "targetState": "lost"})).await;
    assert_eq!(stack.api.outcome(&update_id).await["status"], "succeeded");
}

#[tokio::test]
async fn values_stay_what_they_are() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), None).await;
    let metadata = r#"{"n":123456789012345678901234567890,"f":1.50,"e":1e5,"ü":"\u00e9\ud83d\ude00"}"#;
    let raw = format!(r#"{{"leadId":"{lead_id}","metadata":{metadata}}}"#);
    let answer = test_support::http_client()
        .post(format!("{}/api/v1/leads/update", stack.api.url))
        .bearer_auth(&stack.api.key)
        .body(raw)
        .send()
        .await
        .expect("an answer");
    assert_eq!(answer.status().as_u16(), 200);
    let request = &stack.receiver.wait_for_requests("/crm", 1, SOON).await[0];
    let text = std::str::from_utf8(&request.body).expect("UTF-8");
    let merged = format!(r#""data":{{"source":"import",{}}}"#, &metadata[1..]);
    assert!(text.ends_with(&merged), "{text}");
}

#[tokio::test]
async fn a_lead_of_another_project_does_not_exist() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([{"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    let lead_id = stack.api.initiate(applied.process.process_id.expect("an id"), Some("R")).await;
    let other = crate::stack::Api::create(stack.api.url.clone(), &stack.client, "other").await;
    stack.fallback_of(other.project_id, json!([{"name": "fallback", "url": stack.receiver.url("/fallback")}])).await;

    let (status, _) = other.get(&format!("/api/v1/leads/get?leadId={lead_id}")).await;
    assert_eq!(status, 404);
    let update_id = other.update(json!({"leadId": lead_id, "name": "Mallory"})).await;
    let story = other.outcome(&update_id).await;
    assert_eq!((&story["status"], &story["errorCode"]), (&json!("failed"), &json!("lead_not_found")));
    assert_eq!(stack.api.get(&format!("/api/v1/updates/{update_id}")).await.0, 404);
    // The failure goes to the stranger's own fallback, and to nobody else.
    let request = &stack.receiver.wait_for_requests("/fallback", 1, SOON).await[0];
    assert_eq!((&request.json()["updateId"], &request.json()["error"]), (&json!(update_id), &json!("Lead not found")));
    assert!(stack.receiver.requests_to("/crm").is_empty());
}

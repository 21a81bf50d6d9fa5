//! Internal producers: the messages that they send over NATS take the same path as updates over HTTP, and get the same
//! webhook.

use contract::{ObjectId, streams::LEAD_COMMANDS};
use serde_json::{Value, json};
use service_kit::{config::NatsConfig, health::Readiness};
use test_support::eventually;

use crate::support::{Api, LEDGER_ROWS, Stack, TEST_TIMEOUT, Tenant, assert_includes, process_id};

/// An update id with the current time.
fn update_id() -> String {
    service_kit::clock::new_id().to_string()
}

#[tokio::test]
async fn a_producers_body_is_the_body_of_an_update() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&["crm"]).await;

    let id = update_id();
    let body = json!({"leadId": lead_id, "a": 1, "name": "", "apiKeyId": lead_id, "updateId": 7, "userId": "batch"});
    let answer = stack.produce(stack.api.project_id, "update", &[("Leadrelay-Update-Id", &id)], &body).await;

    assert_eq!(answer, json!({"stream": LEAD_COMMANDS, "seq": 1}));
    let body = stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await[0].json();
    // Fields that look like fields of the gateway are metadata, as over HTTP.
    let data = json!({"source": "import", "a": 1, "apiKeyId": lead_id, "updateId": 7});
    assert_eq!((&body["updateId"], &body["data"]), (&json!(id), &data));
    let timeline = stack.api.outcome(&id).await;
    assert_eq!((&timeline["userId"], &timeline["apiKeyId"]), (&json!("batch"), &Value::Null));
    assert_eq!(timeline["command"]["warnings"], json!(["name is empty and was ignored"]));
    let lead = stack.api.lead(&lead_id).await;
    assert_ne!(lead["name"], "");
}

/// A producer may choose the id of an update of another project.
#[tokio::test]
async fn two_projects_with_one_update_id_are_sent_their_own_bodies_again() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,1s,1s,1s,1s")]).await;
    let other = Api::create(stack.api.url.clone(), &stack.client, "other").await;
    let id = update_id();
    for (api, path) in [(&stack.api, "/one"), (&other, "/other")] {
        stack.receiver.on(path, [500, 200]);
        let callbacks = json!([{"name": "crm", "url": stack.receiver.url(path)}]);
        let spec =
            json!({"projectId": api.project_id, "name": "p", "states": [{"name": "new"}], "callbacks": callbacks});
        let lead_id = api.initiate(process_id(&stack.apply(spec).await), None).await;
        // The body is too long for the row of its delivery.
        let body = json!({"leadId": lead_id, "text": path.repeat(1000)});
        stack.produce(api.project_id, "update", &[("Leadrelay-Update-Id", &id)], &body).await;
    }

    for path in ["/one", "/other"] {
        let requests = stack.receiver.wait_for_requests(path, 2, TEST_TIMEOUT).await;
        assert_eq!(requests[0].json()["updateId"], json!(id));
        assert_eq!(requests[1].json(), requests[0].json());
    }
}

#[tokio::test]
async fn a_refused_message_is_answered_with_the_code_of_the_http_api() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    let project_id = stack.api.project_id;
    let update = json!({"leadId": lead_id, "name": "Ada"});
    let produce = async |kind: &str, headers: &[(&str, &str)], body: &Value| {
        stack.produce(project_id, kind, headers, body).await["error"].take()
    };

    let missing = produce("update", &[], &json!({"name": "Ada"})).await;
    let early = produce("update", &[("Leadrelay-Update-Id", "65e4b2d9f1a2000000000001")], &update).await;
    let late = produce("update", &[("Leadrelay-Update-Id", &"f".repeat(24))], &update).await;
    let expired = produce("call.expired", &[], &json!({"leadId": lead_id})).await;
    let large = produce("update", &[], &json!({"leadId": lead_id, "name": "x".repeat(300_000)})).await;

    assert_includes(&missing, json!({"code": 400, "err_code": 20400}));
    for (refused, code) in [
        (missing, "address_missing"),
        (early, "invalid_field"),
        (late, "invalid_field"),
        (expired, "invalid_field"),
        (large, "body_too_large"),
    ] {
        let description = refused["description"].as_str().expect("a description");
        assert!(description.starts_with(&format!("{code}: ")), "{description}");
    }
    assert_eq!(stack.stream_state(LEAD_COMMANDS).await.last_sequence, 0);
}

#[tokio::test]
async fn ids_count_within_a_project_and_headers_for_jetstream_do_nothing() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    let lead_id = stack.api.initiate(process_id(&applied), Some("R-1")).await;
    let other = Api::create(stack.api.url.clone(), &stack.client, "other").await;
    let own = stack.api.project_id;
    let call = json!({"leadId": lead_id, "callId": "c-1"});
    let by_reference =
        json!({"referenceId": "R-1", "projectId": own, "processId": process_id(&applied), "name": "Ada"});

    // Message ids of different projects do not conflict, also for call events.
    let id: &[_] = &[("Nats-Msg-Id", "m-1")];
    assert_eq!(stack.produce(other.project_id, "call.started", id, &call).await["seq"], 1);
    assert_eq!(stack.produce(own, "call.started", id, &call).await["seq"], 2);
    assert_includes(&stack.produce(own, "call.started", id, &call).await, json!({"seq": 2, "duplicate": true}));
    assert_eq!(stack.produce(own, "call.ended", &[], &call).await["seq"], 3);

    // A producer repeats an update under its id with other message ids, as it would long after.
    let (id, trace) = (update_id(), "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    for number in 1..=3 {
        let message_id = format!("retry-{number}");
        let headers = [("Leadrelay-Update-Id", &*id), ("Nats-Msg-Id", &message_id), ("traceparent", trace)];
        assert_eq!(stack.produce(own, "update", &headers, &by_reference).await["seq"], 3 + number);
    }

    // None of these reaches the log.
    let headers = [
        ("Nats-Batch-Id", "b"),
        ("Nats-Batch-Sequence", "1"),
        ("Nats-Expected-Last-Sequence", "999"),
        ("Nats-Expected-Stream", "OTHER"),
        ("Nats-Rollup", "all"),
        ("Nats-TTL", "1s"),
    ];
    assert_eq!(stack.produce(own, "update", &headers, &json!({"leadId": lead_id, "name": "Grace"})).await["seq"], 7);

    let requests = stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    let of_update: Vec<_> = requests.iter().filter(|request| request.json()["updateId"] == id.as_str()).collect();
    assert_eq!(of_update.len(), 1, "applied and announced once");
    assert_eq!(of_update[0].header("traceparent"), Some(trace));
    assert_eq!(stack.count(LEDGER_ROWS).await, 2);
    assert_eq!(stack.stream_state(LEAD_COMMANDS).await.messages, 7);
}

/// Publishes as fast as it can, without waiting for answers, until it is stopped.
async fn flood(client: async_nats::Client, project_id: ObjectId, lead_id: String) {
    let body = bytes::Bytes::from(json!({"leadId": lead_id, "metadata": {"flood": "x".repeat(200)}}).to_string());
    loop {
        for _ in 0..100 {
            let subject = format!("leads.intake.{project_id}.update");
            client.publish(subject, body.clone()).await.expect("a publish");
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_flood_of_one_producer_leaves_other_projects_served() {
    let stack = Stack::start().await;
    let flooding_lead = stack.lead(&[]).await;
    let Tenant { api: other, lead_id: other_lead, .. } = Tenant::new(&stack, "other", json!([])).await;
    let update = json!({"leadId": flooding_lead, "metadata": {"a": 1}});
    stack.produce(stack.api.project_id, "update", &[], &update).await;
    let of_other = json!({"leadId": other_lead, "metadata": {"a": 1}});
    stack.produce(other.project_id, "update", &[], &of_other).await;
    let (config, readiness) = (NatsConfig::at(stack.nats.url()), Readiness::default());
    let flooding = service_kit::nats::connect(&config, "flood", &readiness).await.expect("a client");
    let flood = tokio::spawn(flood(flooding, stack.api.project_id, flooding_lead));
    eventually(TEST_TIMEOUT, "the log has entries of the flood", async || {
        (stack.stream_state(LEAD_COMMANDS).await.messages > 500).then_some(())
    })
    .await;

    for _ in 0..5 {
        let over_http = other.update_and_wait(of_other.clone()).await;
        assert_eq!(over_http["status"], "succeeded");
        let over_nats = stack.produce(other.project_id, "update", &[], &of_other).await;
        assert!(over_nats["error"].is_null(), "{over_nats}");
    }
    flood.abort();

    let log = stack.stream_state(LEAD_COMMANDS).await;
    let applied = stack.count(LEDGER_ROWS).await;
    let behind = log.last_sequence.saturating_sub(u64::try_from(applied).expect("a number"));
    assert!(behind < 5000, "{behind} entries are not applied");
}

#[tokio::test]
async fn a_call_expires_by_its_own_timeout() {
    let stack = Stack::start().await;
    let lead_id = stack.lead(&[]).await;
    let call = json!({"leadId": lead_id, "callId": "a", "timeoutSeconds": 1});
    stack.produce(stack.api.project_id, "call.started", &[], &call).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.active_calls", 1).await;

    let refused = stack.api.update_and_wait(json!({"leadId": lead_id, "name": "x"})).await;

    assert_eq!(refused["errorCode"], "call_in_progress");
    eventually(TEST_TIMEOUT, "the call has expired", async || {
        stack.api.update_and_wait(json!({"leadId": lead_id, "name": "x"})).await["status"] == "succeeded"
    })
    .await;
}

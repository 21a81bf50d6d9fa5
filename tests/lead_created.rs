//! `lead.created`: the creation of a lead is an event like the others, for every way to create a lead.

use contract::{ObjectId, rpc::ProcessChangeResult};
use reqwest::Method;
use serde_json::{Value, json};
use test_support::{Request, eventually};

use crate::support::{Stack, TEST_TIMEOUT, assert_includes, assert_ok, process_id, secret, verify};

const INITIATE: &str = "/api/v1/leads/initiate";

/// A process with two callbacks: `leads`, which gets `lead.created` and has the fields of `more`, and `crm`, which
/// lists no events.
async fn process(stack: &Stack, more: Value) -> ProcessChangeResult {
    let mut callback = json!({"name": "leads", "url": stack.receiver.url("/leads"), "events": ["lead.created"]});
    callback.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
    let applied = stack.process(json!([callback, {"name": "crm", "url": stack.receiver.url("/crm")}])).await;
    stack.backdate_processes().await;
    applied
}

fn given(stack: &Stack, process_id: ObjectId, reference: &str) -> Value {
    json!({
        "projectId": stack.api.project_id, "processId": process_id, "referenceId": reference, "name": "Ada",
        "phone": "+14155550123", "email": "Ada@example.com", "metadata": {"n": 1.5, "list": [null]},
    })
}

fn webhook_id(request: &Request) -> String {
    request.header("webhook-id").expect("a webhook-id").to_owned()
}

/// The history of a lead, newest first.
async fn history(stack: &Stack, lead: &str) -> Vec<Value> {
    let history = assert_ok(stack.api.get(&format!("/api/v1/leads/{lead}/updates")).await)["data"].take();
    history.as_array().expect("a list").clone()
}

#[tokio::test]
async fn each_lead_that_is_created_is_delivered_once() {
    let stack = Stack::start().await;
    let applied = process(&stack, json!({})).await;
    let process_id = process_id(&applied);
    let given = |reference: &str| given(&stack, process_id, reference);

    let one = assert_ok(stack.api.post(INITIATE, &json!({"lead": given("one")})).await);
    let upsert = json!({"lead": given("one"), "onExisting": "update"});
    assert_ok(stack.api.ask(Method::POST, INITIATE, &[("prefer", "wait=30")], &upsert).await);
    let (status, refused) = stack.api.post(INITIATE, &json!({"lead": given("one")})).await;
    let bulk = json!({"leads": [given("two"), given("three")], "onExisting": "return"});
    assert_ok(stack.api.post("/api/v1/leads/bulk/initiate", &bulk).await);
    let requests = stack.receiver.wait_for_requests("/leads", 3, TEST_TIMEOUT).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.created_leads", 0).await;
    let report = stack.wait_for_clean_audit().await;

    assert_eq!(status, 400, "{refused}");
    requests.iter().for_each(|request| verify(request, &secret(&applied.process, "leads")));
    let mut references: Vec<_> = requests
        .iter()
        .map(|request| request.json()["data"]["referenceId"].as_str().expect("a text").to_owned())
        .collect();
    references.sort();
    assert_eq!(references, ["one", "three", "two"]);
    let lead = one["_id"].as_str().expect("an id");
    let request = requests.iter().find(|request| request.json()["data"]["leadId"] == lead).expect("a request");
    let body = request.json();
    let update_id = body["data"]["updateId"].as_str().expect("an id").to_owned();
    assert_eq!(webhook_id(request), format!("{update_id}.lead.created"));
    let data = json!({
        "updateId": update_id, "projectId": stack.api.project_id, "processId": process_id, "leadId": lead,
        "referenceId": "one", "state": "new", "name": "Ada", "phone": "+14155550123", "email": "ada@example.com",
        "metadata": {"n": 1.5, "list": [null]},
    });
    assert_eq!((&body["type"], &body["data"]), (&json!("lead.created"), &data));
    // These are the creations, and the update of the lead that existed.
    assert_includes(&report["updates"], json!({"accepted": 4, "succeeded": 4, "failed": 0, "pending": 0}));
    let callbacks = report["callbacks"].as_array().expect("callbacks");
    let of_leads = callbacks.iter().find(|callback| callback["name"] == "leads").expect("a callback");
    assert_includes(of_leads, json!({"announced": 3, "delivered": 3}));
    assert_eq!((stack.receiver.requests_to("/leads").len(), stack.receiver.requests_to("/crm").len()), (3, 1));
    let history = history(&stack, lead).await;
    assert_includes(
        &history[1],
        json!({"kind": "lead.created", "toState": "new", "version": 1, "updateId": update_id}),
    );
    let timeline = stack.api.outcome(&update_id).await;
    assert_includes(&timeline["outcome"], json!({"action_type": "lead.created", "success": true}));
    assert_includes(&timeline["deliveries"][0], json!({"kind": "lead.created", "status": "delivered"}));
}

#[tokio::test]
async fn a_process_without_a_callback_for_it_logs_no_creations() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    stack.backdate_processes().await;

    let lead = stack.api.initiate(process_id(&applied), None).await;
    let update = stack.api.update(json!({"leadId": lead, "name": "Grace"})).await;
    stack.api.outcome(&update).await;

    assert_eq!(stack.log_entries().await.len(), 1);
    assert_eq!(history(&stack, &lead).await.len(), 1);
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn an_ordered_callback_gets_the_creation_of_a_lead_first_and_again_byte_for_byte() {
    let stack = Stack::start().await;
    let events = json!({"events": ["lead.created", "update.succeeded", "lead.state_changed"], "ordering": "lead"});
    let process_id = process_id(&process(&stack, events).await);

    let mut expected = Vec::new();
    for number in 0..5 {
        let lead = stack.api.initiate(process_id, Some(&format!("R-{number}"))).await;
        let update = stack.api.update(json!({"leadId": lead, "targetState": "interested"})).await;
        expected.push((lead, update));
    }
    let requests = stack.receiver.wait_for_requests("/leads", 15, TEST_TIMEOUT).await;

    for (lead, update) in expected {
        let of_lead = requests.iter().filter(|request| {
            let body = request.json();
            body["data"]["leadId"] == lead.as_str() || body["leadId"] == lead.as_str()
        });
        let ids: Vec<_> = of_lead.map(webhook_id).collect();
        assert!(ids[0].ends_with(".lead.created"), "{ids:?}");
        assert_eq!(ids[1..], [update.clone(), format!("{update}.lead.state_changed")]);
    }
    let first = requests.iter().find(|request| webhook_id(request).ends_with(".lead.created")).expect("a creation");
    let delivery = {
        let update = webhook_id(first).replace(".lead.created", "");
        let listed = assert_ok(stack.api.get(&format!("/api/v1/deliveries?updateId={update}")).await);
        listed["data"][0]["deliveryId"].as_str().expect("an id").to_owned()
    };
    assert_ok(stack.api.post(&format!("/api/v1/deliveries/{delivery}/redeliver"), &json!({})).await);
    let again = eventually(TEST_TIMEOUT, "it is delivered again", async || {
        let requests = stack.receiver.requests_to("/leads");
        let same: Vec<_> = requests.into_iter().filter(|request| webhook_id(request) == webhook_id(first)).collect();
        if same.len() == 2 { Ok(same) } else { Err(format!("{} requests", same.len())) }
    });
    assert_eq!(again.await[1].body, first.body);
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_filter_selects_leads_by_what_they_are_created_with() {
    let stack = Stack::start().await;
    let filter = json!({"filter": [
        {"field": "toState", "equals": "new"}, {"field": "fromState", "exists": false},
        {"field": "metadata.n", "in": ["1.5"]},
    ]});
    let process_id = process_id(&process(&stack, filter).await);

    let mut other = given(&stack, process_id, "other");
    other["metadata"]["n"] = json!(2);
    assert_ok(stack.api.post(INITIATE, &json!({"lead": other})).await);
    assert_ok(stack.api.post(INITIATE, &json!({"lead": given(&stack, process_id, "wanted")})).await);
    let requests = stack.receiver.wait_for_requests("/leads", 1, TEST_TIMEOUT).await;
    stack.wait_for_clean_audit().await;

    assert_eq!(requests[0].json()["data"]["referenceId"], "wanted");
    assert_eq!(stack.receiver.requests_to("/leads").len(), 1);
}

/// The state after lead-state died before it logged a creation, or before it received the ack.
#[tokio::test]
async fn a_creation_that_was_left_is_logged_by_the_leader_and_applied_once() {
    let stack = Stack::start().await;
    let process_id = process_id(&process(&stack, json!({})).await);
    let lead = stack.api.initiate(process_id, Some("left")).await;
    let requests = stack.receiver.wait_for_requests("/leads", 1, TEST_TIMEOUT).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.created_leads", 0).await;
    let logged = requests[0].json()["data"]["updateId"].as_str().expect("an id").to_owned();
    let left = ObjectId::new(service_kit::clock::now(), [7; 8]);
    let leave = |lead: &str, update: &str| {
        let command =
            json!({"updateId": update, "leadId": lead, "state": "new", "contact": {}, "metadata": {"left": 1}});
        format!(
            "INSERT INTO lead_state.created_leads (lead_id, project_id, update_id, command, created_at)
             VALUES ('\\x{lead}', '\\x{}', '\\x{update}', '{command}', now() - interval '1 min');",
            stack.api.project_id
        )
    };

    // The creation of the second lead is not logged. The creation of the first lead is logged, and its row in the
    // outbox is left over.
    let second = left.to_string();
    let copy = format!(
        "INSERT INTO lead_state.leads SELECT (json_populate_record(l, json_build_object(
             'lead_id', '\\x{second}', 'reference_id', 'second', 'created_at', now()))).*
         FROM lead_state.leads l WHERE lead_id = '\\x{lead}'"
    );
    stack.sql(&copy).await;
    let (code, report) = stack.audit(&[]).await;
    stack.sql(&(leave(&second, &second) + &leave(&lead, &logged))).await;
    let requests = stack.receiver.wait_for_requests("/leads", 2, TEST_TIMEOUT).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.created_leads", 0).await;
    stack.wait_for_clean_audit().await;

    assert_eq!(code, 1, "{report}");
    let lost = report["invariants"].as_array().expect("invariants").iter().find(|one| one["count"] != 0);
    let lost = lost.expect("a violation");
    assert_eq!((&lost["invariant"], &lost["violations"][0]["id"]), (&json!("creation_lost"), &json!(second)));
    assert_eq!(webhook_id(&requests[1]), format!("{second}.lead.created"));
    assert_eq!(requests[1].json()["data"]["metadata"], json!({"left": 1}));
    assert_eq!(stack.receiver.requests_to("/leads").len(), 2);
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates WHERE kind = 'lead.created'").await, 2);
}

/// While the log is unavailable, leads are created. Their creations are logged afterwards.
#[tokio::test]
async fn leads_are_created_while_the_log_refuses_their_creations() {
    let stack = Stack::start().await;
    let process_id = process_id(&process(&stack, json!({})).await);
    let js = stack.js();
    let mut config = js.get_stream("LEAD_COMMANDS").await.expect("the log").cached_info().config.clone();
    let max_bytes = config.max_bytes;
    config.max_bytes = 1;
    js.update_stream(&config).await.expect("a log that is full");

    for number in 0..3 {
        stack.api.initiate(process_id, Some(&format!("R-{number}"))).await;
    }
    let waiting = stack.count("SELECT count(*) FROM lead_state.created_leads").await;
    let (_, report) = stack.audit(&[]).await;
    config.max_bytes = max_bytes;
    js.update_stream(&config).await.expect("a log with room");
    stack.receiver.wait_for_requests("/leads", 3, TEST_TIMEOUT).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.created_leads", 0).await;
    stack.wait_for_clean_audit().await;

    assert_eq!(waiting, 3);
    assert_includes(&report["updates"], json!({"accepted": 3, "pending": 3}));
    assert!(report["invariants"].as_array().expect("invariants").iter().all(|one| one["count"] == 0), "{report}");
    assert_eq!(stack.receiver.requests_to("/leads").len(), 3);
}

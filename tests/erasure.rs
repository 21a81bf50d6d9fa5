//! Erasing a lead: its data is removed from both schemas, and the audit is still clean.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::Row;
use test_support::{Reply, eventually};

use crate::support::{Api, Stack, TEST_TIMEOUT, assert_includes, assert_ok, assert_refused, process_id};

const WAIT: (&str, &str) = ("prefer", "wait=30");
/// A text that is part of every value of the lead.
const MARKER: &str = "zanzibar";

/// The tables and columns of both schemas that contain the marker.
async fn places(stack: &Stack) -> BTreeSet<String> {
    let columns = sqlx::query(
        "SELECT table_schema || '.' || table_name AS name, column_name::text AS of FROM information_schema.columns
         WHERE table_schema IN ('lead_state', 'webhooks')",
    )
    .fetch_all(&stack.pool)
    .await
    .expect("the columns");
    let mut places = BTreeSet::new();
    for column in columns {
        let (table, name): (String, String) = (column.get("name"), column.get("of"));
        // A `bytea` is also searched for the hex digits of the marker.
        let query = format!(
            "SELECT EXISTS (SELECT FROM {table} WHERE \"{name}\"::text ILIKE '%{MARKER}%'
                            OR \"{name}\"::text ILIKE '%' || encode('{MARKER}', 'hex') || '%')"
        );
        let found = sqlx::query_scalar(sqlx::AssertSqlSafe(query.clone())).fetch_one(&stack.pool).await;
        if found.unwrap_or_else(|e| panic!("{query}: {e}")) {
            places.insert(format!("{table}.{name}"));
        }
    }
    places
}

async fn initiate(stack: &Stack, process: &impl serde::Serialize, reference: &str) -> String {
    let lead = json!({
        "projectId": stack.api.project_id, "processId": process, "name": format!("Ada {MARKER}"),
        "email": format!("ada@{MARKER}.example"), "phone": "+4915112345678", "referenceId": reference,
        "metadata": {"source": MARKER},
    });
    let answer = assert_ok(stack.api.post("/api/v1/leads/initiate", &json!({"lead": lead, "init": true})).await);
    answer["_id"].as_str().expect("an id").to_owned()
}

async fn erase(stack: &Stack, lead: &str) -> Value {
    assert_ok(stack.api.ask(Method::DELETE, &format!("/api/v1/leads/{lead}"), &[WAIT], &json!(null)).await)
}

async fn wait_until_erased(stack: &Stack) {
    eventually(TEST_TIMEOUT * 2, "nothing of the lead is left", async || {
        let places = places(stack).await;
        if places.is_empty() { Ok(()) } else { Err(format!("{places:?}")) }
    })
    .await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.pending_erasures", 0).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.pending_erasures", 0).await;
}

#[tokio::test]
async fn an_erased_lead_leaves_ids_codes_and_times() {
    let stack = Stack::start().await;
    let applied = stack
        .process(json!([
            {"name": "crm", "url": stack.receiver.url("/crm")},
            {"name": "broken", "url": stack.receiver.url("/broken")},
            {"name": "filtered", "url": stack.receiver.url("/filtered"),
             "filter": [{"field": "metadata.source", "exists": false}]},
            {"name": "calls", "url": stack.receiver.url("/calls"), "events": ["activity.completed"]},
            {"name": "created", "url": stack.receiver.url("/created"), "events": ["lead.created"]},
        ]))
        .await;
    let process = process_id(&applied);
    stack.receiver.on("/broken", [Reply::status(500).body(MARKER)]);
    // This update arrives before a lead with its reference exists.
    let unknown = json!({"processId": process, "projectId": stack.api.project_id, "referenceId": MARKER, "n": MARKER});
    let unknown = stack.api.update_and_wait(unknown).await;
    let lead = initiate(&stack, &process, MARKER).await;
    let other = initiate(&stack, &process, "other").await;
    stack.backdate_processes().await;
    let long = MARKER.repeat(400);
    let first = stack.api.update_and_wait(json!({"leadId": lead, "metadata": {"n": MARKER, "long": long}})).await;
    let refused = stack.api.update_and_wait(json!({"leadId": lead, "targetState": MARKER})).await;
    let result = json!({"status": "completed", "disposition": MARKER, "summary": MARKER});
    let ended = json!({"leadId": lead, "callId": MARKER, "toState": "interested", "result": result});
    assert_ok(stack.api.ask(Method::POST, "/api/v1/calls/ended", &[WAIT], &ended).await);
    stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    stack.receiver.wait_for_requests("/broken", 2, TEST_TIMEOUT).await;
    stack.receiver.wait_for_requests("/calls", 1, TEST_TIMEOUT).await;
    let created = stack.receiver.wait_for_requests("/created", 2, TEST_TIMEOUT).await;
    assert!(created.iter().all(|request| request.json()["data"]["metadata"]["source"] == MARKER));
    let before = places(&stack).await;
    for place in ["lead_updates.command", "deliveries.payload", "payloads.payload", "attempts.response", "leads.name"] {
        assert!(before.iter().any(|found| found.ends_with(place)), "{place} is not in {before:?}");
    }

    let answer = erase(&stack, &lead).await;

    assert_includes(&answer, json!({"success": true, "message": "Lead erasure accepted"}));
    assert_includes(&answer["outcome"], json!({"action_type": "erase", "success": true, "leadId": lead}));
    // The other lead is unchanged.
    assert_includes(&stack.api.lead(&other).await, json!({"name": format!("Ada {MARKER}"), "referenceId": "other"}));
    erase(&stack, &other).await;
    wait_until_erased(&stack).await;
    assert_refused(stack.api.get(&format!("/api/v1/leads/get?leadId={lead}")).await, 404, "lead_not_found");
    let listed = assert_ok(stack.api.get("/api/v1/leads").await);
    assert_eq!(listed["data"], json!([]));
    let history = assert_ok(stack.api.get(&format!("/api/v1/leads/{lead}/updates")).await)["data"].clone();
    let kinds: Vec<_> = history.as_array().expect("a list").iter().map(|one| one["kind"].clone()).collect();
    assert_eq!(kinds, ["erase", "call.ended", "update", "update", "lead.created", "update"]);
    assert_includes(&history[2], json!({"updateId": refused["updateId"], "errorCode": "unknown_state"}));
    assert_includes(&history[3], json!({"updateId": first["updateId"], "status": "succeeded", "version": 2}));
    assert_includes(&history[4], json!({"status": "succeeded", "toState": "new", "version": 1}));
    assert_includes(&history[5], json!({"updateId": unknown["updateId"], "errorCode": "lead_not_found"}));
    assert_eq!(stack.api.outcome(answer["updateId"].as_str().expect("an id")).await["status"], "succeeded");
    let timeline = stack.api.outcome(first["updateId"].as_str().expect("an id")).await;
    let of_broken = timeline["deliveries"].as_array().expect("a list").iter().find(|one| one["status"] == "exhausted");
    let delivery = of_broken.unwrap_or_else(|| panic!("{timeline}"));
    let (update, callback) =
        (first["updateId"].as_str().expect("an id"), delivery["callbackId"].as_str().expect("an id"));
    let redeliver = format!("/api/v1/deliveries/{update}-{callback}/redeliver");
    assert_refused(stack.api.post(&redeliver, &json!({})).await, 410, "outcome_gone");
    let report = stack.wait_for_clean_audit().await;
    assert_eq!(report["updates"]["failed"], 2, "{report}");
}

#[tokio::test]
async fn updates_after_an_erasure_are_refused_and_bring_nothing_back() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    let process = process_id(&applied);
    let lead = initiate(&stack, &process, "R-1").await;
    let update = |body: Value| stack.api.update_and_wait(body);
    update(json!({"leadId": lead, "metadata": {"n": MARKER}})).await;

    erase(&stack, &lead).await;
    let by_id = update(json!({"leadId": lead, "name": MARKER, "metadata": {"n": MARKER}, "userId": MARKER})).await;
    let call = json!({"leadId": lead, "callId": MARKER});
    let call = assert_ok(stack.api.ask(Method::POST, "/api/v1/calls/started", &[WAIT], &call).await);
    let again = erase(&stack, &lead).await;
    let by_reference = json!({"processId": process, "projectId": stack.api.project_id, "referenceId": "R-1", "a": 1});
    let by_reference = update(by_reference).await;
    let new = stack.api.initiate(process, Some("R-1")).await;
    let by_new_reference =
        update(json!({"processId": process, "projectId": stack.api.project_id, "referenceId": "R-1", "a": 1})).await;

    assert_includes(&by_id, json!({"status": "failed", "errorCode": "lead_erased"}));
    assert_eq!(by_id["outcome"]["error"], "Lead was erased");
    assert_includes(&call["outcome"], json!({"success": false, "error": "Lead was erased"}));
    assert_eq!(again["outcome"]["success"], true, "a second erasure repeats the first");
    assert_eq!(by_reference["errorCode"], "lead_not_found");
    assert_includes(&by_new_reference["outcome"], json!({"success": true, "leadId": new}));
    wait_until_erased(&stack).await;
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_lead_is_erased_during_a_call_with_its_queued_updates() {
    let stack = Stack::start().await;
    let spec = json!({
        "projectId": stack.api.project_id, "name": "sales", "duringCall": "queue", "states": [{"name": "new"}],
        "callbacks": [{"name": "crm", "url": stack.receiver.url("/crm")}],
    });
    let lead = initiate(&stack, &process_id(&stack.apply(spec).await), MARKER).await;
    stack.publish_call("started", &json!({"leadId": lead, "callId": MARKER, "timeoutSeconds": 600})).await;
    let queued = stack.api.update(json!({"leadId": lead, "metadata": {"n": MARKER}})).await;
    stack.wait_for_count("SELECT count(*) FROM lead_state.queued_updates", 1).await;

    let answer = erase(&stack, &lead).await;

    assert_eq!(answer["outcome"]["success"], true);
    assert_includes(&stack.api.outcome(&queued).await, json!({"status": "failed", "errorCode": "lead_erased"}));
    assert_eq!(assert_ok(stack.api.get("/api/v1/calls").await)["data"], json!([]));
    wait_until_erased(&stack).await;
    stack.wait_for_clean_audit().await;
    assert_eq!(stack.dead_letters().await, 0);
}

#[tokio::test]
async fn a_lead_with_more_updates_than_a_page_is_erased_to_the_last_one() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    let lead = initiate(&stack, &process_id(&applied), MARKER).await;
    let lines: String = (0..450).map(|n| json!({"leadId": lead, "metadata": {"n": n}}).to_string() + "\n").collect();
    let request = stack.api.request(Method::POST, "/api/v1/leads/update/bulk");
    let response = request.header("content-type", "application/x-ndjson").body(lines).send().await.expect("a response");
    assert_eq!(response.text().await.expect("results").matches(r#""success":true"#).count(), 450);

    assert_eq!(erase(&stack, &lead).await["outcome"]["success"], true);

    wait_until_erased(&stack).await;
    let with_content = "SELECT count(*) FROM lead_state.lead_updates WHERE kind = 'update'
        AND (command::text <> '{}' OR data IS NOT NULL OR reference_id IS NOT NULL)";
    assert_eq!(stack.count(with_content).await, 0);
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_parked_event_of_an_erased_lead_is_delivered_without_its_content() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    stack.backdate_processes().await;
    let lead = initiate(&stack, &process_id(&applied), MARKER).await;
    let entry = stack.replace_entry(process_id(&applied), "{").await;
    let update = stack.api.update(json!({"leadId": lead, "metadata": {"n": MARKER}})).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.parked_events", 1).await;

    erase(&stack, &lead).await;
    wait_until_erased(&stack).await;
    stack.replace_entry(process_id(&applied), entry).await;

    let requests = stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    let expected = json!({"updateId": update, "success": true, "leadId": lead, "referenceId": null, "data": null});
    assert_includes(&requests[0].json(), expected);
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn an_update_behind_an_erasure_is_not_the_leads_although_one_batch_has_both() {
    let mut stack = Stack::start().await;
    let process = process_id(&stack.process_calling(&["crm"]).await);
    let lead = initiate(&stack, &process, "R-1").await;
    assert!(stack.lead_state.terminate().await.success());
    let erased = stack.api.ask(Method::DELETE, &format!("/api/v1/leads/{lead}"), &[], &json!(null)).await;
    assert_ok(erased);
    let project = stack.api.project_id;
    let update = json!({"referenceId": "R-1", "projectId": project, "processId": process, "name": "Ada"});
    let update = stack.api.update(update).await;

    stack.lead_state.restart().await;

    assert_eq!(stack.api.outcome(&update).await["status"], "failed");
    assert_eq!(stack.count("SELECT count(*) FROM lead_state.lead_updates WHERE lead_id IS NULL").await, 1);
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn a_lead_of_another_project_is_not_erased() {
    let stack = Stack::start().await;
    let lead = stack.lead(&[]).await;
    let other = Api::create(stack.api.url.clone(), &stack.client, "other").await;

    let path = format!("/api/v1/leads/{lead}");
    let foreign = assert_ok(other.ask(Method::DELETE, &path, &[WAIT], &json!(null)).await);

    assert_includes(&foreign["outcome"], json!({"success": false, "error": "Lead not found"}));
    assert_eq!(stack.api.lead(&lead).await["name"], "Ada");
}

#[tokio::test]
async fn leadctl_exports_a_lead_and_erases_it_only_with_a_confirmation() {
    let stack = Stack::start().await;
    let lead = stack.lead(&["crm"]).await;
    let update = stack.api.update(json!({"leadId": lead, "metadata": {"n": MARKER}})).await;
    let result = json!({"leadId": lead, "result": {"summary": MARKER}});
    assert_ok(stack.api.ask(Method::POST, "/api/v1/calls/ended", &[WAIT], &result).await);
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    stack.wait_for_clean_audit().await;

    let export = stack.leadctl_of_project(&["lead", "export", &lead]).await.assert_ok().json();
    stack.leadctl(&["lead", "erase", &lead]).await.assert_fails("add --yes to confirm");
    assert_eq!(stack.api.lead(&lead).await["name"], "Ada");
    stack.leadctl(&["lead", "erase", &lead, "--yes", "--wait"]).await.assert_ok().assert_prints(&["succeeded"]);

    assert_includes(&export["lead"], json!({"leadId": lead, "name": "Ada", "phone": "+4915112345678"}));
    assert_eq!(export["updates"][0]["update"]["command"]["result"]["summary"], MARKER);
    let exported = &export["updates"][1];
    assert_includes(&exported["update"], json!({"updateId": update, "data": {"source": "import", "n": MARKER}}));
    assert_eq!(exported["deliveries"][0]["attempts"][0]["statusCode"], 200, "{exported}");
    stack.leadctl_of_project(&["lead", "export", &lead]).await.assert_code(3);
}

#[tokio::test]
async fn a_delivery_that_was_exhausted_before_the_erasure_is_not_sent_again() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s")]).await;
    stack.receiver.on("/crm", [500]);
    let applied = stack.process_calling(&["crm"]).await;
    let process = process_id(&applied);
    let lead = initiate(&stack, &process, MARKER).await;
    let update = stack.api.update(json!({"leadId": lead, "metadata": {"long": MARKER.repeat(400)}})).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.deliveries WHERE status = 'exhausted'", 1).await;

    erase(&stack, &lead).await;
    wait_until_erased(&stack).await;

    let delivery = format!("/api/v1/deliveries/{update}-{}", applied.process.callbacks[0].callback_id);
    assert_refused(stack.api.post(&format!("{delivery}/redeliver"), &json!({})).await, 410, "outcome_gone");
    let detail = assert_ok(stack.api.get(&delivery).await)["data"].take();
    let failed = detail["attempts"][0]["error"].as_str().expect("why the attempt failed");
    assert!(failed.contains("500"), "{failed}");
}

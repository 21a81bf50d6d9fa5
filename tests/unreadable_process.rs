//! A process whose entry in the bucket cannot be read: its events are parked, delay no other tenant, and are delivered
//! once the entry can be read again. Configuration that cannot be projected delays no other.

use contract::{
    streams::{API_KEYS, PROCESSES},
    subject::process_key,
};
use reqwest::Method;
use serde_json::json;
use test_support::eventually;

use crate::support::{Api, DELIVERED, LEDGER_ROWS, Stack, TEST_TIMEOUT, Tenant, process_id};

/// More events than all webhook-notifiers together may have unacknowledged.
const EVENTS: usize = 4200;
/// The number of events of one lead for an ordered callback.
const ORDERED: usize = 100;
const PARKED: &str = "SELECT count(*) FROM webhooks.parked_events";

/// Updates a lead this many times in one request.
async fn update_in_bulk(api: &Api, lead_id: &str, count: usize) {
    let lines: String =
        (0..count).map(|n| json!({"leadId": lead_id, "metadata": {"n": n}}).to_string() + "\n").collect();
    let request = api.request(Method::POST, "/api/v1/leads/update/bulk").header("content-type", "application/x-ndjson");
    let response = request.body(lines).send().await.expect("a response");
    assert_eq!(response.status(), 200);
    let results = response.text().await.expect("results");
    assert_eq!(results.matches(r#""success":true"#).count(), count);
}

#[tokio::test]
async fn events_of_an_unreadable_process_are_parked_and_delay_no_other_tenant() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    let callbacks = json!([{"name": "ordered", "url": stack.receiver.url("/ordered"), "ordering": "lead"}]);
    let spec = json!({
        "projectId": stack.api.project_id, "name": "ordered", "states": [{"name": "new"}], "callbacks": callbacks,
    });
    let ordered = stack.apply(spec).await;
    stack.backdate_processes().await;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;
    let ordered_lead = stack.api.initiate(process_id(&ordered), None).await;
    let callbacks = json!([{"name": "crm", "url": stack.receiver.url("/healthy")}]);
    let Tenant { api: healthy, lead_id: healthy_lead, .. } = Tenant::new(&stack, "healthy", callbacks).await;
    let mut entries = Vec::new();
    for process in [&applied, &ordered] {
        entries.push((process_id(process), stack.replace_entry(process_id(process), "{").await));
    }

    update_in_bulk(&stack.api, &ordered_lead, ORDERED).await;
    update_in_bulk(&stack.api, &lead_id, EVENTS).await;
    stack.wait_for_count_within(TEST_TIMEOUT * 3, LEDGER_ROWS, (EVENTS + ORDERED) as i64).await;
    for n in 0..5 {
        healthy.update(json!({"leadId": healthy_lead, "metadata": {"n": n}})).await;
    }
    stack.receiver.wait_for_requests("/healthy", 5, TEST_TIMEOUT * 3).await;
    stack.wait_for_count_within(TEST_TIMEOUT * 3, PARKED, (EVENTS + ORDERED) as i64).await;

    // The timeline, the audit and the doctor show the parked events.
    let last = stack.api.update(json!({"leadId": lead_id, "metadata": {"n": EVENTS}})).await;
    stack.wait_for_count(PARKED, (EVENTS + ORDERED) as i64 + 1).await;
    let timeline = stack.api.outcome(&last).await;
    assert_eq!(timeline["deliveries"], json!([]));
    let key = process_key(stack.api.project_id, Some(process_id(&applied)));
    assert!(timeline["parked"]["reason"].as_str().is_some_and(|why| why.contains(&key)), "{timeline}");
    let (code, report) = stack.audit(&[]).await;
    assert_eq!(code, 0, "{report}");
    let project = stack.api.project_id;
    assert_eq!(report["parked"], json!([{"projectId": project, "events": EVENTS + ORDERED + 1}]), "{report}");
    for callback in report["callbacks"].as_array().expect("callbacks") {
        let counts = ["announced", "delivered", "parked"].map(|count| callback[count].as_u64());
        let all_of = |events: usize| counts == [events as u64, 0, events as u64].map(Some);
        assert!(all_of(EVENTS + 1) || all_of(ORDERED) || counts[2] == Some(0), "{report}");
    }
    let doctor = stack.leadctl(&["doctor"]).await;
    doctor.assert_prints(&[&format!("{} of process {}", EVENTS + 1, process_id(&applied)), "cannot read the process"]);

    for (process, entry) in entries {
        stack.replace_entry(process, entry).await;
    }
    stack.wait_for_count_within(TEST_TIMEOUT * 3, DELIVERED, (EVENTS + 1 + ORDERED + 5) as i64).await;
    stack.wait_for_count(PARKED, 0).await;
    let numbers: Vec<_> =
        stack.receiver.requests_to("/ordered").iter().map(|r| r.json()["data"]["n"].as_u64()).collect();
    assert!(numbers.is_sorted() && numbers.len() == ORDERED, "the lead's updates arrive in their order");
    stack.wait_for_clean_audit().await;
}

#[tokio::test]
async fn due_deliveries_of_an_unreadable_process_wait_and_are_reported_once() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,2s,1s,1s")]).await;
    stack.receiver.on("/crm", [500]);
    stack.receiver.on("/healthy", [500]);
    let applied = stack.process_calling(&["crm"]).await;
    let lead_id = stack.api.initiate(process_id(&applied), None).await;
    let callbacks = json!([{"name": "crm", "url": stack.receiver.url("/healthy")}]);
    let Tenant { api: healthy, lead_id: healthy_lead, .. } = Tenant::new(&stack, "healthy", callbacks).await;
    stack.api.update(json!({"leadId": lead_id, "name": "Ada"})).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;

    let entry = stack.replace_entry(process_id(&applied), "{").await;

    let report = || stack.notifier.log().matches("cannot read the process").count();
    eventually(TEST_TIMEOUT, "the report", async || if report() > 0 { Ok(()) } else { Err("none") }).await;
    // The retries of another tenant show that several rounds have passed.
    healthy.update(json!({"leadId": healthy_lead, "name": "Ada"})).await;
    stack.receiver.wait_for_requests("/healthy", 4, TEST_TIMEOUT).await;
    assert_eq!((report(), stack.receiver.requests_to("/crm").len()), (1, 1));
    stack.receiver.on("/crm", [200]);
    stack.replace_entry(process_id(&applied), entry).await;
    stack.wait_for_count(DELIVERED, 1).await;
}

#[tokio::test]
async fn unreadable_configuration_blocks_no_other() {
    let mut stack = Stack::start().await;
    let lead_id = stack.lead(&["crm"]).await;
    stack
        .sql(&format!(
            r#"INSERT INTO lead_state.processes (project_id, name, process_id, config, revision)
               VALUES ('\x{}', 'broken', decode(repeat('0b', 12), 'hex'), '{{"name": 5}}', 0);
               UPDATE lead_state.processes SET revision = 1 WHERE name = 'broken'"#,
            stack.api.project_id
        ))
        .await;
    assert!(stack.lead_state.terminate().await.success());
    for bucket in [API_KEYS, PROCESSES] {
        stack.js().delete_key_value(bucket).await.expect("deleted");
    }

    stack.lead_state.restart().await;

    eventually(TEST_TIMEOUT, "the key and the other process are in effect again", async || {
        let (status, body) = stack.api.post("/api/v1/leads/update", &json!({"leadId": lead_id, "name": "Ada"})).await;
        if status == 200 && !stack.receiver.requests_to("/crm").is_empty() { Ok(()) } else { Err(body.to_string()) }
    })
    .await;
    let finding = eventually(TEST_TIMEOUT, "the doctor names what is not projected", async || {
        let checks = stack.leadctl(&["doctor", "--json"]).await.json()["checks"].clone();
        let found = checks.as_array().expect("checks").iter().find(|check| check["check"] == "projection").cloned();
        found.filter(|check| check["state"] == "failed").ok_or(checks.to_string())
    })
    .await;
    let named = finding["finding"].as_str().expect("text");
    assert!(named.starts_with(r#"1 stored and not in effect: the process "broken" of project"#), "{finding}");
}

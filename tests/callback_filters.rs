//! Filters: a callback gets the events that satisfy its conditions. Other events have no delivery, and the audit
//! expects none.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use test_support::{Request, eventually};

use crate::support::{Stack, TEST_TIMEOUT, assert_includes, assert_ok, assert_refused, process_id};

/// A callback for each kind of condition: name, filter, and the updates of `updates` that satisfy it.
fn filters() -> Vec<(&'static str, Value, &'static [usize])> {
    vec![
        ("state", json!([{"field": "toState", "in": ["interested", "lost"]}]), &[1, 2]),
        ("disposition", json!([{"field": "disposition", "exists": true}]), &[2]),
        ("text", json!([{"field": "metadata.source.name", "equals": "wéb"}]), &[0, 1, 2]),
        ("number", json!([{"field": "metadata.price", "equals": "100000000000000000000000000001.50"}]), &[1, 2]),
        ("item", json!([{"field": "metadata.cars.1", "in": ["Camry", "Corolla"]}]), &[2]),
        ("none", json!([{"field": "metadata.cars", "exists": false}]), &[0, 1, 3]),
        ("both", json!([{"field": "fromState", "equals": "new"}, {"field": "metadata.flag", "equals": "true"}]), &[1]),
        ("never", json!([{"field": "metadata.source", "equals": "web"}]), &[]),
    ]
}

/// The changes of the lead, in order. The last one fails.
fn updates(lead: &str) -> Vec<String> {
    vec![
        format!(r#"{{"leadId":"{lead}","metadata":{{"source":{{"name":"w\u00e9b"}},"flag":null}}}}"#),
        format!(
            r#"{{"leadId":"{lead}","targetState":"interested","metadata":{{"price":100000000000000000000000000001.50,"flag":true}}}}"#
        ),
        format!(
            r#"{{"leadId":"{lead}","targetState":"lost","disposition":"price","metadata":{{"cars":["Yaris","Corolla"]}}}}"#
        ),
        format!(r#"{{"leadId":"{lead}","targetState":"nowhere"}}"#),
    ]
}

fn updates_of(requests: &[Request]) -> BTreeSet<String> {
    requests.iter().map(|request| request.header("webhook-id").expect("a webhook-id").to_owned()).collect()
}

#[tokio::test]
async fn a_callback_gets_the_events_that_satisfy_its_filter_and_the_audit_expects_no_others() {
    let stack = Stack::start().await;
    let callback = |(name, filter, _): &(&str, Value, &[usize])| json!({"name": name, "url": stack.receiver.url(&format!("/{name}")), "filter": filter});
    let mut callbacks: Vec<_> = filters().iter().map(callback).collect();
    callbacks.push(json!({"name": "all", "url": stack.receiver.url("/all")}));
    let applied = stack.process(json!(callbacks)).await;
    stack.backdate_processes().await;
    let lead = stack.api.initiate(process_id(&applied), Some("R")).await;

    let mut ids = Vec::new();
    for body in updates(&lead) {
        let request = stack.api.request(reqwest::Method::POST, "/api/v1/leads/update").body(body);
        let id = assert_ok(crate::support::send(request).await)["updateId"].as_str().expect("an id").to_owned();
        stack.api.outcome(&id).await;
        ids.push(id);
    }
    stack.receiver.wait_for_requests("/all", 4, TEST_TIMEOUT).await;
    stack.wait_for_clean_audit().await;

    let expected = |satisfying: &[usize]| satisfying.iter().map(|index| ids[*index].clone()).collect::<BTreeSet<_>>();
    for (name, _, satisfying) in filters() {
        assert_eq!(updates_of(&stack.receiver.requests_to(&format!("/{name}"))), expected(satisfying), "{name}");
    }
    // After all deliveries are deleted, the audit reports exactly the events that satisfy the filters.
    sqlx::raw_sql("DELETE FROM webhooks.attempts; DELETE FROM webhooks.deliveries")
        .execute(&stack.pool)
        .await
        .expect("no deliveries");
    let mut missing = BTreeSet::new();
    let filters = filters();
    let all = ("all", Value::Null, &[0, 1, 2, 3][..]);
    for (name, _, satisfying) in filters.iter().chain([&all]) {
        let callback = applied.process.callbacks.iter().find(|callback| callback.name == *name).expect("a callback");
        missing.extend(expected(satisfying).into_iter().map(|id| format!("{id}/{}", callback.callback_id)));
    }
    eventually(TEST_TIMEOUT, "the audit misses them", async || {
        let report = stack.leadctl(&["audit", "--json"]).await.json();
        let invariants = report["invariants"].as_array().expect("invariants");
        let undelivered = invariants.iter().find(|invariant| invariant["invariant"] == "undelivered");
        let violations = undelivered.and_then(|invariant| invariant["violations"].as_array()).expect("violations");
        let found = violations.iter().map(|violation| violation["id"].as_str().expect("an id").to_owned()).collect();
        if missing == found { Ok(()) } else { Err(report.to_string()) }
    })
    .await;
}

#[tokio::test]
async fn a_filter_is_configured_over_http_and_by_leadctl() {
    let stack = Stack::start().await;
    let applied = stack.process(json!([])).await;
    let path = format!("/api/v1/processes/{}/callbacks", process_id(&applied));
    let filter = json!([{"field": "toState", "in": ["lost"]}, {"field": "metadata.a.0", "exists": true}]);
    let body = json!({"name": "crm", "url": stack.receiver.url("/crm"), "filter": filter});

    let created = assert_ok(stack.api.post(&path, &body).await);
    let odd =
        json!({"name": "odd", "url": stack.receiver.url("/odd"), "filter": [{"field": "state", "equals": "lost"}]});
    let refused = assert_refused(stack.api.post(&path, &odd).await, 400, "invalid_process");

    assert_eq!(created["data"]["filter"], filter);
    assert!(refused["error"].as_str().is_some_and(|text| text.contains("must be fromState")), "{refused}");
    let spec = stack.leadctl_of_project(&["process", "get", "sales", "--spec"]).await.assert_ok().json();
    assert_includes(&spec["callbacks"][0], json!({"name": "crm", "filter": filter}));
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), spec.to_string()).expect("a file");
    let file = file.path().to_str().expect("a path");
    stack.leadctl(&["process", "apply", file]).await.assert_ok().assert_prints(&["unchanged"]);
}

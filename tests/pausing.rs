//! Callbacks that are paused, off or disabled: their deliveries are recorded and wait. No delivery is lost or sent.

use contract::{ObjectId, rpc::ProcessChangeResult};
use reqwest::Method;
use serde_json::{Value, json};
use test_support::{Reply, eventually};

use crate::support::{
    DELIVERED, Load, Stack, TEST_TIMEOUT, Tenant, assert_ok, assert_refused, by_update, health_page, numbers,
    process_id,
};

const HELD: &str = "SELECT count(*) FROM webhooks.deliveries WHERE status = 'pending' AND attempts = 0";

/// Pauses or resumes a callback over HTTP, and returns whether it was paused before.
async fn post(stack: &Stack, applied: &ProcessChangeResult, callback_id: ObjectId, action: &str) -> Value {
    let path = format!("/api/v1/processes/{}/callbacks/{callback_id}/{action}", process_id(applied));
    assert_ok(stack.api.post(&path, &json!({})).await)["data"]["wasPaused"].take()
}

/// The state of the first callback, as `leadctl callback list` shows it.
async fn state(stack: &Stack) -> Value {
    stack.leadctl_of_project(&["callback", "list", "--json"]).await.assert_ok().json()[0]["state"].take()
}

#[tokio::test]
async fn a_callback_paused_under_load_gets_every_event_once_and_in_order_after_it_is_resumed() {
    let mut stack = Stack::start().await;
    let callback = |name: &str, ordering: &str| json!({"name": name, "url": stack.receiver.url(&format!("/{name}")), "ordering": ordering});
    let callbacks = json!([callback("crm", "none"), callback("ordered", "lead"), callback("other", "none")]);
    let applied = stack.process(callbacks).await;
    let [crm, ordered] = [0, 1].map(|place: usize| applied.process.callbacks[place].callback_id);
    let mut leads = Vec::new();
    for _ in 0..5 {
        leads.push(stack.api.initiate(process_id(&applied), None).await);
    }
    let load = Load::start(&stack.api, leads);
    load.wait_for_more_applied(&stack.api, 20).await;

    assert_eq!(post(&stack, &applied, crm, "pause").await, false);
    assert_eq!(post(&stack, &applied, crm, "pause").await, true);
    assert_eq!(post(&stack, &applied, ordered, "pause").await, false);
    load.wait_for_more_applied(&stack.api, 10).await;
    let sent = ["/crm", "/ordered"].map(|path| stack.receiver.requests_to(path).len());
    load.wait_for_more_applied(&stack.api, 20).await;
    // The pause survives a restart of the notifier.
    assert!(stack.notifier.terminate().await.success());
    stack.notifier.restart().await;
    load.wait_for_more_applied(&stack.api, 20).await;

    let accepted = load.end().await;
    stack.receiver.wait_for_requests("/other", accepted.len(), TEST_TIMEOUT).await;
    stack.wait_for_count(HELD, (2 * accepted.len() - sent[0] - sent[1]) as i64).await;
    assert_eq!(["/crm", "/ordered"].map(|path| stack.receiver.requests_to(path).len()), sent, "a paused one is called");
    assert_eq!(state(&stack).await, "paused");
    let (code, report) = stack.audit(&[]).await;
    assert_eq!(code, 0, "{report}");
    eventually(TEST_TIMEOUT, "what is held is measured apart", async || {
        let (_, page) = health_page(&stack.notifier_ready, "/metrics").await?;
        let is_line = |line: &str| page.lines().any(|found| found == line);
        let measured = is_line("leadrelay_webhook_notifier_pending_deliveries 0")
            && is_line("leadrelay_webhook_notifier_oldest_pending_age_seconds 0.0")
            && is_line("leadrelay_webhook_notifier_paused_callbacks 2")
            && !is_line("leadrelay_webhook_notifier_held_deliveries 0");
        if measured { Ok(()) } else { Err(page) }
    })
    .await;

    assert_eq!(post(&stack, &applied, crm, "resume").await, true);
    stack.leadctl(&["callback", "resume", &ordered.to_string()]).await.assert_ok().assert_prints(&["resumed"]);

    stack.wait_for_clean_audit().await;
    for path in ["/crm", "/ordered", "/other"] {
        let requests = stack.receiver.requests_to(path);
        assert_eq!((requests.len(), by_update(&requests).len()), (accepted.len(), accepted.len()), "{path}");
    }
    for (lead, numbers) in numbers(&stack.receiver.requests_to("/ordered")) {
        assert!(numbers.is_sorted(), "{lead}: {numbers:?}");
    }
    // Waiting deliveries are sent oldest first, except those that are in flight at the same time.
    let waited = stack.receiver.requests_to("/crm").split_off(sent[0]);
    let first = waited[0].json()["data"]["n"].as_u64().expect("a number") as usize;
    assert!(first <= sent[0] + 10, "{first} is sent first, after {}", sent[0]);
}

#[tokio::test]
async fn a_callback_that_is_off_gets_what_happened_meanwhile_once_it_is_on() {
    let stack = Stack::start().await;
    let callback = |enabled: bool| json!([{"name": "crm", "url": stack.receiver.url("/crm"), "enabled": enabled}]);
    let applied = stack.process(callback(false)).await;
    let lead = stack.api.initiate(process_id(&applied), None).await;

    let mut updates = Vec::new();
    for number in 0..5 {
        updates.push(stack.api.update(json!({"leadId": lead, "metadata": {"n": number}})).await);
    }

    stack.wait_for_count(HELD, 5).await;
    let (code, report) = stack.audit(&[]).await;
    assert_eq!((code, &report["callbacks"][0]["pending"]), (0, &json!(5)), "{report}");
    stack.sql("UPDATE webhooks.deliveries SET next_attempt_at = now() - interval '1 hour'").await;
    let checks = stack.leadctl(&["doctor", "--json"]).await.json();
    let late = checks["checks"].as_array().expect("checks").iter().find(|check| check["check"] == "deliveries");
    assert_eq!(late.expect("the check")["state"], "ok", "what waits for its callback is not late: {late:?}");
    assert_eq!(state(&stack).await, "off");
    assert_eq!(stack.receiver.requests_to("/crm").len(), 0);

    stack.process(callback(true)).await;

    stack.wait_for_clean_audit().await;
    let requests = stack.receiver.requests_to("/crm");
    assert_eq!((requests.len(), by_update(&requests).len()), (5, 5));
}

#[tokio::test]
async fn large_bodies_that_waited_for_many_callbacks_are_sent_a_share_of_the_pool_at_a_time() {
    const CALLBACKS: usize = 30;
    const UPDATES: usize = 4;
    const BLOB: usize = 200_000;
    // The share of a project is half of a pool of 64 units of 64 KiB.
    const SHARE: usize = 32 * 64 * 1024;
    let settings = [("MAX_IN_FLIGHT", "64"), ("RETRY_SCHEDULE", "0s,100ms,100ms,100ms")];
    let stack = Stack::start_with(&settings).await;
    let url = stack.receiver.url("/crm");
    let callbacks = |enabled: bool| -> Value {
        (0..CALLBACKS)
            .map(|n| json!({"name": format!("crm {n}"), "url": url, "enabled": enabled, "timeoutSeconds": 5}))
            .collect()
    };
    let applied = stack.process(callbacks(false)).await;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    stack.api.update(json!({"leadId": lead, "metadata": {"blob": "x".repeat(BLOB)}})).await;
    for number in 1..UPDATES {
        stack.api.update(json!({"leadId": lead, "metadata": {"n": number}})).await;
    }
    stack.wait_for_count(HELD, (CALLBACKS * UPDATES) as i64).await;
    stack.receiver.on("/crm", [Reply::hang()]);

    stack.process(callbacks(true)).await;

    stack.receiver.wait_for_requests("/crm", 2, TEST_TIMEOUT).await;
    // The retries of another tenant show that several rounds have passed.
    stack.receiver.on("/other", [500]);
    let other = json!([{"name": "other", "url": stack.receiver.url("/other")}]);
    let Tenant { api, lead_id, .. } = Tenant::new(&stack, "other", other).await;
    api.update(json!({"leadId": lead_id, "name": "Ada"})).await;
    stack.receiver.wait_for_requests("/other", 4, TEST_TIMEOUT).await;
    let bodies: Vec<_> = stack.receiver.requests_to("/crm").iter().map(|request| request.body.len()).collect();
    assert!(bodies.iter().all(|bytes| *bytes > BLOB), "{bodies:?}");
    assert!((SHARE / 2..=SHARE + 2 * BLOB).contains(&bodies.iter().sum()), "{} bodies in flight", bodies.len());
    stack.receiver.on("/crm", [200]);
    stack.wait_for_count_within(TEST_TIMEOUT * 2, DELIVERED, (CALLBACKS * UPDATES) as i64).await;
}

#[tokio::test]
async fn a_paused_callback_refuses_redeliveries_and_only_its_project_pauses_it() {
    let stack = Stack::start().await;
    let applied = stack.process_calling(&["crm"]).await;
    let callback_id = applied.process.callbacks[0].callback_id;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    let update = stack.api.update(json!({"leadId": lead, "name": "Ada"})).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    stack.wait_for_clean_audit().await;

    stack.leadctl(&["callback", "pause", &callback_id.to_string()]).await.assert_ok().assert_prints(&["paused"]);

    let path = format!("/api/v1/deliveries/{update}-{callback_id}/redeliver");
    let refused = assert_refused(stack.api.post(&path, &json!({})).await, 409, "callback_disabled");
    assert_eq!(refused["error"], "The delivery cannot be sent: the callback is paused");
    let unknown = ObjectId::from_bytes([1; 12]);
    for action in ["pause", "resume"] {
        let path = format!("/api/v1/processes/{}/callbacks/{unknown}/{action}", process_id(&applied));
        assert_refused(stack.api.ask(Method::POST, &path, &[], &Value::Null).await, 404, "callback_not_found");
    }
}

#[tokio::test]
async fn a_callback_that_is_resumed_begins_without_failures() {
    let stack = Stack::start_with(&[("RETRY_SCHEDULE", "0s,1h"), ("FAILING_AFTER", "1s")]).await;
    stack.receiver.on("/crm", [500]);
    let callbacks = json!([
        {"name": "crm", "url": stack.receiver.url("/crm")},
        {"name": "owner", "url": stack.receiver.url("/owner"), "events": ["callback.failing", "callback.recovered"]},
    ]);
    let applied = stack.process(callbacks).await;
    let crm = applied.process.callbacks[0].callback_id;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    stack.api.update(json!({"leadId": lead, "metadata": {"n": 1}})).await;
    stack.receiver.wait_for_requests("/owner", 1, TEST_TIMEOUT).await;
    post(&stack, &applied, crm, "pause").await;
    stack.sql("UPDATE webhooks.callback_failures SET failing_since = now() - interval '6 days'").await;

    post(&stack, &applied, crm, "resume").await;
    stack.api.update(json!({"leadId": lead, "metadata": {"n": 2}})).await;

    stack.wait_for_count("SELECT count(*) FROM webhooks.attempts WHERE status_code = 500", 2).await;
    assert_eq!(stack.count("SELECT count(*) FROM webhooks.callback_health").await, 0, "it is disabled");
    let events = stack.receiver.wait_for_requests("/owner", 2, TEST_TIMEOUT).await;
    let recovered = events.iter().map(|event| event.json()).find(|event| event["type"] == "callback.recovered");
    assert_eq!(recovered.expect("the event")["data"]["reason"], "it was resumed");
}

#[tokio::test]
async fn a_callback_gets_nothing_while_its_disabling_is_recorded() {
    let stack = Stack::start().await;
    stack.receiver.on("/crm", [410, 200]);
    let applied = stack.process_calling(&["crm", "other"]).await;
    let lead = stack.api.initiate(process_id(&applied), None).await;
    // While the lock is held, the record cannot be written, and each synchronization reads that no callback is
    // disabled.
    let mut transaction = stack.pool.begin().await.expect("a transaction");
    let lock = sqlx::raw_sql("LOCK TABLE webhooks.callback_health IN SHARE MODE").execute(&mut *transaction).await;
    lock.expect("the lock");
    stack.api.update(json!({"leadId": lead, "metadata": {"n": 1}})).await;
    stack.receiver.wait_for_requests("/crm", 1, TEST_TIMEOUT).await;
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    stack.wait_for_count(waits, 1).await;
    // Each of these requests is answered after a synchronization.
    let other = applied.process.callbacks[1].callback_id;
    post(&stack, &applied, other, "pause").await;
    post(&stack, &applied, other, "resume").await;

    stack.api.update(json!({"leadId": lead, "metadata": {"n": 2}})).await;
    stack.receiver.wait_for_requests("/other", 2, TEST_TIMEOUT).await;
    transaction.commit().await.expect("committed");

    stack.wait_for_count(HELD, 1).await;
    assert_eq!(stack.receiver.requests_to("/crm").len(), 1);
}

#[tokio::test]
async fn a_removed_callback_is_not_counted_as_disabled_and_one_of_an_unreadable_process_is() {
    let mut stack = Stack::start().await;
    let applied = stack.process_calling(&["removed", "kept"]).await;
    let callbacks = json!([{"name": "lost", "url": stack.receiver.url("/lost")}]);
    let spec = json!({
        "projectId": stack.api.project_id, "name": "unreadable", "states": [{"name": "new"}], "callbacks": callbacks,
    });
    let unreadable = stack.apply(spec).await;
    for path in ["/removed", "/kept", "/lost"] {
        stack.receiver.on(path, [410]);
    }
    for process in [&applied, &unreadable] {
        let lead = stack.api.initiate(process_id(process), None).await;
        stack.api.update(json!({"leadId": lead, "name": "Ada"})).await;
    }
    let announced = "SELECT count(*) FROM webhooks.callback_health WHERE disabled_announced";
    stack.wait_for_count(announced, 3).await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.callback_failures", 3).await;

    let removed = applied.process.callbacks[0].callback_id;
    let path = format!("/api/v1/processes/{}/callbacks/{removed}", process_id(&applied));
    assert_ok(stack.api.ask(Method::DELETE, &path, &[], &Value::Null).await);
    stack.replace_entry(process_id(&unreadable), "{").await;
    assert!(stack.notifier.terminate().await.success());
    stack.notifier.restart().await;

    stack.wait_for_count("SELECT count(*) FROM webhooks.callback_failures", 2).await;
    let disabled = sqlx::query_scalar::<_, Vec<u8>>("SELECT callback_id FROM webhooks.callback_health ORDER BY 1");
    let mut expected = [&applied.process.callbacks[1], &unreadable.process.callbacks[0]]
        .map(|callback| callback.callback_id.as_bytes().to_vec());
    expected.sort();
    assert_eq!(disabled.fetch_all(&stack.pool).await.expect("the disabled ones"), expected);
    eventually(TEST_TIMEOUT, "two callbacks count as disabled", async || {
        let (_, page) = health_page(&stack.notifier_ready, "/metrics").await?;
        let counted = page.lines().any(|line| line == "leadrelay_webhook_notifier_disabled_callbacks 2");
        if counted { Ok(()) } else { Err(page) }
    })
    .await;
}

#[tokio::test]
async fn the_pause_of_a_removed_callback_ends_and_that_of_an_unreadable_process_stays() {
    let mut stack = Stack::start().await;
    let applied = stack.process_calling(&["crm", "old", "other"]).await;
    let [crm, old, other] = [0, 1, 2].map(|place: usize| applied.process.callbacks[place].callback_id);
    let callbacks = json!([{"name": "lost", "url": stack.receiver.url("/lost")}]);
    let spec = json!({
        "projectId": stack.api.project_id, "name": "unreadable", "states": [{"name": "new"}], "callbacks": callbacks,
    });
    let unreadable = stack.apply(spec).await;
    stack.backdate_processes().await;
    let lost = unreadable.process.callbacks[0].callback_id;
    for callback in [crm, old, other] {
        post(&stack, &applied, callback, "pause").await;
    }
    post(&stack, &unreadable, lost, "pause").await;
    // The state of a pause by the previous version. The next start finds its process.
    let forget =
        format!("UPDATE webhooks.paused_callbacks SET project_id = NULL WHERE callback_id = decode('{old}', 'hex')");
    stack.sql(&forget).await;
    assert!(stack.notifier.terminate().await.success());
    stack.notifier.restart().await;
    stack.wait_for_count("SELECT count(*) FROM webhooks.paused_callbacks WHERE project_id IS NULL", 0).await;

    for callback in [crm, old] {
        let path = format!("/api/v1/processes/{}/callbacks/{callback}", process_id(&applied));
        assert_ok(stack.api.ask(Method::DELETE, &path, &[], &Value::Null).await);
    }
    stack.replace_entry(process_id(&unreadable), "{").await;
    assert!(stack.notifier.terminate().await.success());
    stack.notifier.restart().await;

    stack.wait_for_count("SELECT count(*) FROM webhooks.paused_callbacks", 2).await;
    let paused = sqlx::query_scalar::<_, Vec<u8>>("SELECT callback_id FROM webhooks.paused_callbacks ORDER BY 1");
    let mut expected = [other, lost].map(|id| id.as_bytes().to_vec());
    expected.sort();
    assert_eq!(paused.fetch_all(&stack.pool).await.expect("the pauses"), expected);
}
